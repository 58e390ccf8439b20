"""`signalbox router collect | train | eval`, as typed."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import pytest
from typer.testing import CliRunner

from signalbox.router.kinds import KINDS
from signalbox.router.table import read_table, write_table
from signalbox.serving import cli_router
from signalbox.serving.cli_router import router_app
from tests.router.conftest import EXPERTS, planted
from tests.tiny_models import save_tiny

run = CliRunner()


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "table.parquet"
    write_table(planted(240), path)
    return path


def test_train_then_eval(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "router"
    result = run.invoke(
        router_app, ["train", "--kind", "tryage", "--table", str(table), "--pool", "all", "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    assert "best single" in result.output and "oracle" in result.output
    figures = tmp_path / "figures" / "eval.json"
    result = run.invoke(router_app, ["eval", "--artifact", str(out), "--table", str(table), "--json", str(figures)])
    assert result.exit_code == 0, result.output
    found = orjson.loads(figures.read_bytes())
    assert found["rows"] + found["excluded_seen"] == 240 and found["excluded_seen"] > 150
    assert found["wins"] and found["knn"] > found["best_single"] and found["told_task"] > found["best_single"]
    assert set(found["decision_ms"]) == {"p50", "p99"} and set(found["share"]) == set(EXPERTS)
    # On another table, all rows are judged.
    other = tmp_path / "other.csv"
    write_table(planted(60, seed=9), other)
    result = run.invoke(router_app, ["eval", "--artifact", str(out), "--table", str(other), "--json", str(figures)])
    assert result.exit_code == 0, result.output
    found = orjson.loads(figures.read_bytes())
    assert found["rows"] >= 55 and found["wins"]
    assert found["apgr"] is None is found["aiq"]


def test_a_pair_on_the_command_line(table: Path, tmp_path: Path) -> None:
    """The coder is made better by far on all prompts: from the cook to the coder there is a gap."""
    rows = read_table(table)
    losses = rows.measures["loss"] + [0.0, 0.5, 0.0]
    priced = replace(rows, measures={"loss": losses, "cost": np.full((240, 3), [0.001, 0.002, 0.01])})
    write_table(priced, tmp_path / "priced.csv")
    out, figures = str(tmp_path / "router"), tmp_path / "eval.json"
    arguments = ["--table", str(tmp_path / "priced.csv")]
    assert run.invoke(router_app, ["train", "--no-neighbours", "--out", out, *arguments]).exit_code == 0
    command = ["eval", "--artifact", out, *arguments, "--json", str(figures), "--pair"]
    result = run.invoke(router_app, [*command, "cook:coder"])
    assert result.exit_code == 0, result.output
    assert "from cook to coder: APGR" in words(result.output) and "AIQ" in result.output
    found = orjson.loads(figures.read_bytes())
    assert found["pair"] == ["cook", "coder"] and found["apgr"] > 0.6
    assert found["cpt50"] <= found["cpt80"] < 0.8 and found["aiq"] > found["aiq_hull"]
    assert orjson.loads((tmp_path / "router" / "router.json").read_bytes())["training"]["mean_cost"][
        "coder"
    ] == pytest.approx(0.01)
    for pair, message in (("cook", "WEAK:STRONG"), ("cook:chef", "WEAK:STRONG"), ("coder:cook", "wrong way round")):
        result = run.invoke(router_app, [*command, pair])
        assert result.exit_code == 2 and message in words(result.output), result.output


def test_a_part_of_the_pool(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "pair"
    arguments = ["--table", str(table), "--pool", "coder, cook", "--out", str(out), "--no-neighbours", "--holdout", "0"]
    result = run.invoke(router_app, ["train", *arguments])
    assert result.exit_code == 0, result.output
    assert "no row was held out" in result.output
    assert orjson.loads((out / "router.json").read_bytes())["experts"] == ["coder", "cook"]
    assert not (out / "neighbours.safetensors").exists()
    result = run.invoke(router_app, ["eval", "--artifact", str(out), "--table", str(table)])
    assert result.exit_code == 2 and "no row is left" in words(result.output)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--kind", "tryag"], "did you mean tryage"),
        (["train", "--pool", "sporty,chef"], "no column for chef"),
        (["train", "--pool", ","], "pool is empty"),
        (["train", "--holdout", "2"], "holdout"),
    ],
)
def test_bad_training_arguments(table: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    result = run.invoke(router_app, [*arguments, "--table", str(table), "--out", str(tmp_path / "r")])
    assert result.exit_code == 2 and message in words(result.output), result.output
    assert not (tmp_path / "r").exists()


def test_bad_files(table: Path, tmp_path: Path) -> None:
    result = run.invoke(router_app, ["eval", "--artifact", str(tmp_path / "absent"), "--table", str(table)])
    assert result.exit_code == 2 and "no router.json" in words(result.output)
    bad = tmp_path / "bad.csv"
    bad.write_text("prompt_id,prompt,score:gemma\na,x,0.5\nb,y,1.3\n")
    result = run.invoke(router_app, ["train", "--table", str(bad), "--out", str(tmp_path / "r")])
    assert result.exit_code == 2 and "column score:gemma, row 2: 1.3 is not in [0, 1]" in words(result.output)


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    for seed, name in enumerate(("one", "two")):
        save_tiny(tmp_path / name, seed=seed)
    config = tmp_path / "pool.yaml"
    config.write_text(
        "experts:\n"
        "  one: {engine: transformers, model: ./one, threads: 1, price: {input: 1, output: 2}}\n"
        "  two: {engine: transformers, model: ./two, threads: 1}\n"
    )
    return config


def test_collect_writes_a_table(pool: Path, tmp_path: Path) -> None:
    texts = tmp_path / "sums.jsonl"
    texts.write_bytes(b"\n".join(orjson.dumps({"text": f"{i} plus one", "answer": str(i + 1)}) for i in range(9)))
    out = tmp_path / "table.parquet"
    arguments = ["collect", "--config", str(pool), "--out", str(out), "--limit", "6", "--texts", str(texts)]
    more = tmp_path / "more.jsonl"
    more.write_bytes(orjson.dumps({"prompt": "Say hello", "reference": "hello"}))
    result = run.invoke(router_app, [*arguments, str(more)])
    assert result.exit_code == 0, result.output
    table = read_table(out)
    assert len(table) == 7 and table.models == ("one", "two") and set(table.task) == {"sums", "more"}
    assert table.measures["cost"][0, 0] > 0 == table.measures["cost"][0, 1]
    assert not list(tmp_path.glob("*.partial.jsonl"))  # nothing failed: nothing to go on with
    result = run.invoke(router_app, [*arguments[:3], "--pool", "three", *arguments[3:]])
    assert result.exit_code == 2 and "no expert named three" in words(result.output)


# A collection that is killed when so many results have been written.
DIES_AFTER_20 = """
import os, signal
from signalbox.router.collect import Journal
from signalbox.serving.cli_router import router_app

write, written = Journal.write, []

def write_and_count(journal, *row):
    write(journal, *row)
    written.append(row)
    if len(written) == 20:
        os.kill(os.getpid(), signal.SIGKILL)

Journal.write = write_and_count
router_app()
"""


def test_a_killed_collection_goes_on_where_it_stopped(pool: Path, tmp_path: Path) -> None:
    texts, out = tmp_path / "many.jsonl", tmp_path / "table.parquet"
    rows = [{"text": f"{i} plus one and so on, at some length", "answer": str(i + 1)} for i in range(400)]
    texts.write_bytes(b"\n".join(map(orjson.dumps, rows)))
    arguments = ["collect", "--config", str(pool), "--out", str(out), "--texts", str(texts)]
    journal = tmp_path / "table.parquet.partial.jsonl"
    process = subprocess.run([sys.executable, "-c", DIES_AFTER_20, *arguments], stderr=subprocess.PIPE, timeout=200)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    done = journal.read_bytes().count(b"\n")
    assert done == 20 and not out.exists()
    result = run.invoke(router_app, arguments)
    assert result.exit_code == 0, result.output
    assert f"({done} results of a former run)" in words(result.output)
    assert len(read_table(out).complete()) == 400


def test_collect_checks_before_it_loads(pool: Path, tmp_path: Path) -> None:
    result = run.invoke(
        router_app, ["collect", "--config", str(pool), "--out", str(tmp_path / "t.xlsx"), "--texts", "x"]
    )
    assert result.exit_code == 2 and ".parquet" in words(result.output)
    result = run.invoke(router_app, ["collect", "--config", str(pool), "--out", str(tmp_path / "t.csv")])
    assert result.exit_code == 2 and "--texts" in words(result.output)
    result = run.invoke(
        router_app, ["collect", "--config", str(pool), "--out", str(tmp_path / "t.csv"), "--texts", "x.csv"]
    )
    assert result.exit_code == 2 and "x.csv: there is no such file" in words(result.output)
    pool.write_text(pool.read_text() + "storre: {}\n")
    result = run.invoke(
        router_app, ["collect", "--config", str(pool), "--out", str(tmp_path / "t.csv"), "--texts", "x.csv"]
    )
    assert result.exit_code == 2 and "storre" in words(result.output)


def test_the_help_names_every_kind() -> None:
    named = {word.strip(",") for word in cli_router.TRAINABLE.split()} - {"(cross-validates", "them", "all)"}
    assert named == {"best", *KINDS}
