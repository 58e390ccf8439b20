"""`signalbox router add-expert`, as typed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import pytest
from typer.testing import CliRunner

from signalbox.router.artifact import load_neighbours, load_predictor, read_artifact
from signalbox.router.base import Prompt
from signalbox.router.table import Table, write_table
from signalbox.serving.cli_router import router_app
from tests.router.conftest import EXPERTS, planted

run = CliRunner()
NEW = "second-cook"


def words(text: str) -> str:
    return " ".join(text.split())


def with_second_cook(rows: int, seed: int) -> Table:
    """A fourth expert that is far better in the kitchen than anybody, and fair elsewhere; it has a cost too."""
    table = planted(rows, seed=seed, scores=True)
    kitchen = np.array(table.task) == "kitchen"
    fresh = np.where(kitchen, 0.95, 0.2) + np.random.default_rng(seed).normal(0, 0.03, rows)
    return replace(
        table,
        models=(*EXPERTS, NEW),
        measures={
            "score": np.column_stack([table.score, np.clip(fresh, 0, 1)]),
            "cost": np.tile([0.01, 0.02, 0.03, 0.04], (rows, 1)),
        },
    )


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("irt")
    write_table(with_second_cook(240, 0), folder / "table.parquet")
    arguments = ["--kind", "irt", "--table", str(folder / "table.parquet"), "--pool", ",".join(EXPERTS)]
    result = run.invoke(router_app, ["train", *arguments, "--out", str(folder / "router")])
    assert result.exit_code == 0, result.output
    return folder / "router"


def test_an_expert_is_added_and_then_chosen(artifact: Path, tmp_path: Path) -> None:
    few = with_second_cook(48, 5)
    scores = few.score.copy()
    scores[40:, 3] = np.nan  # not scored: passed over
    write_table(replace(few, measures={**few.measures, "score": scores}).pool([NEW]), tmp_path / "few.csv")
    arguments = ["--artifact", str(artifact), "--table", str(tmp_path / "few.csv"), "--expert", NEW]
    result = run.invoke(router_app, ["add-expert", *arguments, "--out", str(tmp_path / "larger")])
    assert result.exit_code == 0, result.output
    assert "added second-cook from 40 scored prompts" in words(result.output)
    before, after = read_artifact(artifact), read_artifact(tmp_path / "larger")
    assert after.experts == (*EXPERTS, NEW) and before.experts == EXPERTS and after.version in result.output
    assert after.training["mean_cost"] == pytest.approx({"sporty": 0.01, "cook": 0.02, "coder": 0.03, NEW: 0.04})
    # What it learned from is remembered, so that `eval` leaves it out; rows for a kNN line would lack its scores.
    assert len(after.tensors["seen"]) == len(before.tensors["seen"]) + len({p.lower() for p in few.prompt[:40]})
    assert load_neighbours(artifact) is not None and load_neighbours(tmp_path / "larger") is None
    prompts = [Prompt("Why does the oven matter so much in case 7?"), Prompt("Explain the regex to a beginner")]
    old, new = (load_predictor(folder).predict(prompts) for folder in (artifact, tmp_path / "larger"))
    np.testing.assert_array_equal(new.quality[:, :3], old.quality)
    assert new.quality[0].argmax() == 3 and new.quality[1].argmax() == 2
    # The larger router is judged as any other, and gains by the new expert on rows that neither has seen.
    write_table(with_second_cook(150, 9), tmp_path / "unseen.csv")
    quality = []
    for folder in (artifact, tmp_path / "larger"):
        command = ["eval", "--artifact", str(folder), "--table", str(tmp_path / "unseen.csv")]
        result = run.invoke(router_app, [*command, "--json", str(tmp_path / "eval.json")])
        assert result.exit_code == 0, result.output
        quality.append(orjson.loads((tmp_path / "eval.json").read_bytes())["quality"])
    assert quality[1] > quality[0] + 0.03


def test_what_cannot_be_added_is_said_in_a_line(artifact: Path, tmp_path: Path) -> None:
    write_table(with_second_cook(40, 5), tmp_path / "few.csv")
    write_table(with_second_cook(5, 5), tmp_path / "five.csv")
    other = tmp_path / "lexical"
    arguments = ["--kind", "lexical", "--no-neighbours", "--pool", ",".join(EXPERTS)]
    result = run.invoke(
        router_app, ["train", *arguments, "--table", str(tmp_path / "few.csv"), "--holdout", "0", "--out", str(other)]
    )
    assert result.exit_code == 0, result.output
    for folder, table, expert, message in (
        (artifact, "few.csv", "cook", "knows an expert 'cook' already"),
        (artifact, "few.csv", "second-cok", "did you mean second-cook?"),
        (artifact, "five.csv", NEW, "5 scored prompts are too few"),
        (artifact, "none.csv", NEW, "no such file"),
        (other, "few.csv", NEW, "a router of kind lexical"),
        (tmp_path, "few.csv", NEW, "not a router artifact"),
    ):
        arguments = ["--artifact", str(folder), "--table", str(tmp_path / table), "--expert", expert]
        result = run.invoke(router_app, ["add-expert", *arguments, "--out", str(tmp_path / "out")])
        assert result.exit_code == 2 and message in words(result.output), result.output
        assert not (tmp_path / "out").exists()
