"""Loads, drawn and read."""

import itertools
import math
from collections import Counter
from pathlib import Path

import pytest

from signalbox.policies.simulate_load import (
    Arrival,
    Bursts,
    Lengths,
    LoadError,
    read_load,
    synthetic,
    write_load,
)

MIX = {"gold": 0.2, "silver": 0.3, "bronze": 0.5}


def test_bursts_keep_the_mean_and_have_their_share() -> None:
    rate, seconds = 50.0, 1000.0
    load = synthetic(rate, seconds, MIX, bursts=Bursts(3.0, 0.1, 10.0), seed=4)
    deviation = math.sqrt(rate * seconds)
    assert abs(len(load) - rate * seconds) < 4 * deviation
    assert all(a.at <= b.at for a, b in itertools.pairwise(load))
    seconds_of = Counter(int(a.at) for a in load)
    busy = sum(count > 1.8 * rate for count in seconds_of.values())  # of each ten seconds one, most of it in a second
    assert 0.05 < busy / seconds < 0.12
    calm = sorted(seconds_of.values())[: int(0.7 * seconds)]
    assert sum(calm) / len(calm) < 0.8 * rate


def test_shares_lengths_and_seeds_are_what_was_asked_for() -> None:
    load = synthetic(100.0, 100.0, MIX, lengths=Lengths((10, 20), (3, 5)), seed=1)
    count = Counter(a.policy for a in load)
    for name, share in MIX.items():
        assert abs(count[name] / len(load) - share) < 0.03
    assert {a.size for a in load} == set(range(10, 21))
    assert {a.answer_tokens for a in load} == {3, 4, 5}
    assert load == synthetic(100.0, 100.0, MIX, lengths=Lengths((10, 20), (3, 5)), seed=1)
    assert load != synthetic(100.0, 100.0, MIX, lengths=Lengths((10, 20), (3, 5)), seed=2)
    assert {a.prompt for a in synthetic(10.0, 10.0, MIX, prompts=["ä", "b"])} == {"ä", "b"}


def test_a_written_load_is_read_again(tmp_path: Path) -> None:
    load = synthetic(20.0, 5.0, MIX, seed=1)
    load.append(Arrival(at=99.0, policy="gold", prompt="Grüße", quality={"a": 0.5}))
    write_load(tmp_path / "load.jsonl", load)
    assert read_load(tmp_path / "load.jsonl") == load
    assert load[-1].size == 7


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"at": 1, "policy": "gold"}', "give one of `prompt` and `prompt_bytes`"),
        ('{"at": -1, "policy": "gold", "prompt_bytes": 1}', "at: "),
        ('{"at": 1, "policy": "gold", "prompt_bytes": 1, "tokens": 2}', "tokens: "),
        ('{"at": 1, "policy": "gold", "prompt_bytes": 1, "quality": {"a": 2}}', "quality.a: "),
        ("at=1", "not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "load.jsonl"
    file.write_text('{"at": 0, "policy": "gold", "prompt_bytes": 1}\n\n' + line + "\n")
    with pytest.raises(LoadError, match=r"load\.jsonl:3: ") as error:
        read_load(file)
    assert said in str(error.value)


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    for rate, seconds, mix in (
        (0.0, 1.0, MIX),
        (1.0, 0.0, MIX),
        (1.0, 1.0, {}),
        (1e6, 1e6, MIX),
        (1.0, 1.0, {"a": -1}),
    ):
        with pytest.raises(LoadError):
            synthetic(rate, seconds, mix)
    with pytest.raises(LoadError, match="can take"):
        Bursts(factor=20.0)
    with pytest.raises(LoadError):
        Lengths((5, 4))
    with pytest.raises(LoadError, match="No such file"):
        read_load(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(LoadError, match="no requests"):
        read_load(tmp_path / "empty.jsonl")
