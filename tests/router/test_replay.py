"""Replay on planted tables: regret falls as outcomes come, poison is held off, and all of it can be repeated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import pytest
from typer.testing import CliRunner

from signalbox.router.artifact import save_artifact
from signalbox.router.lexical import LexicalPredictor
from signalbox.router.online import Learning
from signalbox.router.replay import Poisoning, replay
from signalbox.router.table import Table, TableError, write_table
from signalbox.serving.cli import app
from tests.router.conftest import planted


@pytest.fixture(scope="module")
def few() -> LexicalPredictor:
    """An artifact of 24 noisy rows."""
    return LexicalPredictor.fit(planted(24, signal=0.5, noise=0.4, seed=7, scores=True))


@pytest.fixture(scope="module")
def requests() -> Table:
    return planted(1500, signal=0.5, noise=0.2, seed=8, scores=True)


def worsened(table: Table, expert: str, by: float) -> Table:
    """The same table after one expert has become worse at everything."""
    score = table.score.copy()
    score[:, table.models.index(expert)] = np.clip(score[:, table.models.index(expert)] - by, 0, 1)
    return replace(table, measures={"score": score})


@pytest.mark.parametrize("seed", range(3))
def test_regret_falls_when_the_artifact_knows_little(few: LexicalPredictor, requests: Table, seed: int) -> None:
    result = replay(few, requests, windows=5, seed=seed)
    first, last = result.windows[0], result.windows[-1]
    assert last.regret < 0.7 * last.frozen_regret and last.regret < first.regret
    assert last.gain > 4 * last.gain_se > 0
    assert not result.rollbacks and 0 < result.explored <= 0.1 + 0.03
    assert result.requests == sum(w.requests for w in result.windows) == len(requests)


def test_regret_falls_when_the_artifact_is_stale() -> None:
    """It knows the subjects well, but one expert has been replaced by a poor one since."""
    stale = LexicalPredictor.fit(planted(200, seed=1, scores=True))
    now = worsened(planted(1200, seed=2, scores=True), "cook", 0.6)
    result = replay(stale, now, windows=6, max_loss=0.2)
    assert result.windows[-1].regret < 0.5 * result.windows[-1].frozen_regret
    assert result.gain > 4 * result.gain_se and not result.rollbacks


def test_a_good_artifact_loses_little() -> None:
    good = LexicalPredictor.fit(planted(300, seed=3, scores=True))
    result = replay(good, planted(800, seed=4, scores=True))
    assert abs(result.gain) < 0.01, "what exploring may cost is bounded, and there is nothing to gain"


@pytest.fixture(scope="module")
def poisonable() -> tuple[LexicalPredictor, Table]:
    """An artifact that knows something, but not so surely that false outcomes could not change its choices."""
    base = LexicalPredictor.fit(planted(40, signal=0.5, noise=0.4, seed=7, scores=True))
    return base, planted(2000, signal=0.5, noise=0.4, seed=6, scores=True)


@pytest.mark.parametrize("seed", range(3))
def test_poison_is_held_off(poisonable: tuple[LexicalPredictor, Table], seed: int) -> None:
    """False outcomes from a quarter to three quarters of the requests, with the guard and without."""
    kept, harmed = (
        replay(*poisonable, poisoning=Poisoning("inverted"), windows=8, seed=seed, learning=learning)
        for learning in (Learning(), Learning(guard_errors=1e9))
    )
    assert [w.poisoned for w in kept.windows] == [False] * 2 + [True] * 4 + [False] * 2
    assert [why for number, why in kept.rollbacks if 500 <= number < 1500], "it is noticed while it lasts"
    assert not harmed.rollbacks
    later = slice(4, 8)
    assert np.mean([w.gain for w in harmed.windows[later]]) < -0.03, "or the test would prove nothing"
    assert np.mean([w.gain for w in kept.windows[later]]) > -0.01


def test_a_replay_can_be_repeated(few: LexicalPredictor, requests: Table) -> None:
    once, again = (replay(few, requests.rows(np.arange(200)), seed=4, rounds=2) for _ in range(2))
    assert once == again and once.requests == 400
    assert replay(few, requests.rows(np.arange(200)), seed=5, rounds=2) != once
    assert replay(few, requests.rows(np.arange(200)), explore=0).explored == 0


def test_bad_tables(few: LexicalPredictor, requests: Table) -> None:
    with pytest.raises(TableError, match="too few"):
        replay(few, requests.rows(np.arange(5)))
    with pytest.raises(TableError, match="cook"):
        replay(few, requests.pool(["sporty", "coder"]))


def test_command(few: LexicalPredictor, requests: Table, tmp_path: Path) -> None:
    save_artifact(few.to_artifact(), tmp_path / "router")
    write_table(requests.rows(np.arange(400)), tmp_path / "t.parquet")
    command = ["router", "replay", "--artifact", str(tmp_path / "router"), "--table", str(tmp_path / "t.parquet")]
    out = tmp_path / "figures" / "replay.json"
    done = CliRunner().invoke(app, [*command, "--poison", "inverted", "--windows", "4", "--json", str(out)])
    assert done.exit_code == 0, done.output
    assert "regret" in done.output and "poisoned" in done.output
    figures = orjson.loads(out.read_bytes())
    assert figures["requests"] == 400 and len(figures["windows"]) == 4 and figures["version"]
    for wrong, says in (["--explore", "0.7"], "explore"), (["--poison", "arsenic"], "poison"):
        bad = CliRunner().invoke(app, [*command, *wrong])
        assert bad.exit_code == 2 and says in bad.output
    missing = CliRunner().invoke(app, [*command[:-1], str(tmp_path / "none.parquet")])
    assert missing.exit_code == 2 and "no such file" in missing.output
