"""`signalbox router plan`, as typed, and the sizes of experts as people write them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import orjson
import pytest
import typer
from typer.testing import CliRunner

from signalbox.router.table import Table, write_table
from signalbox.serving.cli_composition import is_nominal, parameters_of, size_in_name, size_of
from signalbox.serving.cli_router import router_app
from tests.router.conftest import SUBJECTS, planted

run = CliRunner()
NAMES = ("sporty-7B", "cook-8b", "coder")
SIZES = "coder=34e9"


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "table.csv"
    write_table(replace(planted(), models=NAMES), path)
    return path


def plan(table: Path, *arguments: str) -> dict[str, object]:
    out = table.parent / "plans" / "plan.json"
    result = run.invoke(
        router_app, ["plan", "--table", str(table), "--json", str(out), *arguments], env={"COLUMNS": "200"}
    )
    assert result.exit_code == 0, result.output
    found: dict[str, object] = orjson.loads(out.read_bytes()) | {"printed": words(result.output)}
    return found


def test_the_plan_says_what_each_budget_buys(table: Path) -> None:
    found = plan(table, "--parameters", SIZES, "--active", "coder=3B", "--budget", "20B")
    assert found["parameters"] == {"sporty-7B": 7e9, "cook-8b": 8e9, "coder": 34e9}
    assert found["active"] == {"sporty-7B": 7e9, "cook-8b": 8e9, "coder": 3e9} and found["nominal"] == []
    curve, budgets = found["curve"], found["budgets"]
    assert isinstance(curve, list) and isinstance(budgets, dict)
    assert all(a["quality"] < b["quality"] and a["budget"] < b["budget"] for a, b in pairwise(curve))
    assert curve[0]["kept"] in (["sporty-7B"], ["cook-8b"]) and curve[-1]["kept"] == list(NAMES)
    assert curve[-1]["resident"] == 49e9 and 3e9 < curve[-1]["average_active"] < 8e9
    best = dict(zip(SUBJECTS, NAMES, strict=True))
    assert {c: budgets["none"]["experts"][c] for c in SUBJECTS} == best and budgets["none"]["budget"] is None
    assert budgets["given"]["budget"] == 20e9 and budgets["given"]["kept"] == ["sporty-7B", "cook-8b"]
    assert budgets["tight"]["budget"] == 49e9 / 4 and len(budgets["tight"]["kept"]) == 1
    assert budgets["middle"]["budget"] == 49e9 / 2
    for point in (*curve, *budgets.values()):  # tasks that are told, and rows that are alike: what is promised holds
        assert point["held_out"] == pytest.approx(point["quality"], abs=0.02) and 0 < point["held_out_se"] < 0.02
    single = found["best_single"]
    assert isinstance(single, dict) and curve[0]["quality"] <= single["quality"] + 1e-9 < curve[-1]["quality"]
    printed = str(found["printed"])
    assert "given: 20B" in printed and "no limit" in printed and f"{curve[-1]['quality']:.4f}" in printed


def test_a_pool_and_nominal_sizes(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    write_table(replace(planted(), models=("a-7B", "mix-8x7B-v0.1", "c-350M")), table)
    found = plan(table, "--pool", "a-7B,mix-8x7B-v0.1")
    assert found["experts"] == ["a-7B", "mix-8x7B-v0.1"] and found["nominal"] == ["mix-8x7B-v0.1"]
    assert "56B is nominal" in str(found["printed"])
    found = plan(table, "--pool", "a-7B,mix-8x7B-v0.1", "--parameters", "mix-8x7B-v0.1=46.7e9")
    assert found["nominal"] == [] and "nominal" not in str(found["printed"])


def test_sizes_from_a_file(table: Path) -> None:
    file = table.parent / "sizes.json"
    file.write_text('{"coder": "34B", "cook-8b": 9e9}')
    assert parameters_of(str(file), NAMES) == {"sporty-7B": 7e9, "cook-8b": 9e9, "coder": 34e9}
    assert plan(table, "--parameters", str(file))["parameters"] == {"sporty-7B": 7e9, "cook-8b": 9e9, "coder": 34e9}
    for text, message in (
        ("[1]", "must hold an object"),
        ("{", "is not JSON"),
        ('{"coder": true}', "no number of parameters"),
        ('{"coder": -1}', "no number of parameters"),
        ('{"codr": 1e9}', "did you mean coder"),
    ):
        file.write_text(text)
        with pytest.raises(typer.BadParameter, match=message):
            parameters_of(str(file), NAMES)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("Meta-Llama-3_1-8B-Instruct", 8e9),
        ("Mixtral-8x7B-Instruct-v0.1", 56e9),
        ("Mixtral-8x22B", 176e9),
        ("mathstral-7B", 7e9),
        ("Yi-34B", 34e9),
        ("gemma-7b", 7e9),
        ("Qwen2.5-0.5B", 0.5e9),
        ("Qwen3-235B-A22B", 235e9),
        ("smollm_135M_instruct", 135e6),
        ("openai/gpt-4o-2024-05-13", None),
        ("Phi-3-mini-4k-instruct", None),
        ("c4ai-command-r-v01", None),
        ("model-0B", None),
        ("7Bees", None),
    ],
)
def test_sizes_in_names(name: str, size: float | None) -> None:
    assert size_in_name(name) == size
    assert size is None or is_nominal(name, size) == ("x" in name)


def test_sizes_as_written() -> None:
    written = {"8e9": 8e9, "7B": 7e9, "1.5b": 1.5e9, "350M": 350e6, "8x7B": 56e9, " 3 ": 3.0, "46.7e9": 46.7e9}
    assert {text: size_of(text) for text in written} == written
    assert all(size_of(text) is None for text in ("", "big", "B", "-7B", "7BB", "nan", "1e400B?"))
    listed = parameters_of(" coder = 34e9 , sporty-7B=6.7B,", NAMES)
    assert listed == {"sporty-7B": 6.7e9, "cook-8b": 8e9, "coder": 34e9}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parameters", "codr=34e9"], "did you mean coder"),
        (["--parameters", "coder=34e9,coder=35e9"], "coder is given twice"),
        (["--parameters", "coder=1e999"], "coder=1e999 is no number of parameters"),
        (["--parameters", "coder=0"], "coder=0 is no number of parameters"),
        (["--parameters", "coder=34e9,nonsense"], "'nonsense' is not name=size"),
        (["--parameters", "absent.json"], "there is no file absent.json"),
        ([], "--parameters coder=7e9"),
        (["--parameters", SIZES, "--active", "chef=1e9"], "--active: the pool has no expert 'chef'"),
        (["--parameters", SIZES, "--budget", "6.9B"], "smallest budget that works is 7e+09"),
        (["--parameters", SIZES, "--budget", "lots"], "--budget lots is no number of parameters"),
        (["--parameters", SIZES, "--pool", "coder,chef"], "no column for chef"),
    ],
)
def test_bad_arguments(table: Path, arguments: list[str], message: str) -> None:
    result = run.invoke(router_app, ["plan", "--table", str(table), *arguments], env={"COLUMNS": "400"})
    assert result.exit_code == 2 and message in words(result.output), result.output


def test_a_table_without_tasks_is_clustered(table: Path) -> None:
    rows: Table = replace(planted(), models=NAMES, task=[""] * 360)
    write_table(rows, table)
    found = plan(table, "--parameters", SIZES)
    assert "clusters" in str(found["categories_from"]) and "no tasks" in str(found["printed"])
    categories, curve, single = found["categories"], found["curve"], found["best_single"]
    assert isinstance(categories, dict) and isinstance(curve, list) and isinstance(single, dict)
    assert len(categories) > 2 and curve[-1]["held_out"] > single["quality"] + 0.03


def test_too_few_rows(tmp_path: Path) -> None:
    table = tmp_path / "few.jsonl"
    write_table(replace(planted(), models=NAMES).rows(np.arange(8)), table)
    result = run.invoke(router_app, ["plan", "--table", str(table), "--parameters", SIZES])
    assert result.exit_code == 2 and "8 different prompts are too few" in words(result.output)
