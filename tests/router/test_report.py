"""The format of benchmark results, and the quickstart benchmark's rows in it."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import orjson
import pytest
from benchmarks.report import Row, print_table, write_results
from benchmarks.router_quickstart import DATA, gather_texts, results
from rich.console import Console

from signalbox.router.encoder import SentenceEncoder
from signalbox.router.evaluate import evaluate
from signalbox.router.train import train
from tests.router.conftest import planted


def test_the_file_has_what_the_format_asks_for(tmp_path: Path) -> None:
    rows = [Row("a case", "speed", 1.25, "ms", 1.0, 1.5, reference=2.0, goal="at most 2", met=True), Row("b", "n", 3)]
    found = orjson.loads(write_results("demo", "make demo", rows, tmp_path).read_bytes())
    assert set(found) == {"machine", "versions", "commit", "command", "rows"}
    keys = {"case", "metric", "value", "low", "high", "unit", "reference", "goal", "met"}
    assert all(set(row) == keys for row in found["rows"])
    assert found["rows"][0]["met"] is True and found["rows"][1]["low"] is None
    assert found["machine"]["cores"] > 0 and found["machine"]["cpu"] and found["versions"]["torch"]
    assert len(found["commit"].removesuffix("+changes")) == 12
    assert [p.name for p in tmp_path.iterdir()] == ["demo.json"]


def test_the_table_shows_goals_that_were_missed() -> None:
    out = io.StringIO()
    rows = [Row("a", "speed", 1.25, "ms", goal="at most 1", met=False), Row("b", "speed", 0.5, "ms")]
    print_table(rows, "title", Console(file=out, width=120))
    assert "1.25" in out.getvalue() and "at most 1" in out.getvalue() and " no " in out.getvalue()


def test_an_evaluation_becomes_rows(encoder: SentenceEncoder) -> None:
    trained = train(planted(160), encoder)
    result = evaluate(trained.predictor, trained.held_out, encoder, decisions=3)
    rows = results(result, "quickstart")
    by_metric = {row.metric: row for row in rows if row.case == "quickstart"}
    assert by_metric["mean quality"].value == result.quality and by_metric["mean quality"].met is True
    assert by_metric["mean quality"].reference == result.best_single
    assert by_metric["mean quality, oracle"].value == result.oracle
    assert {row.case for row in rows} == {"quickstart", *(f"quickstart: {task}" for task in result.tasks)}


@pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is absent")
def test_the_benchmark_gathers_balanced_texts() -> None:
    texts = gather_texts(12)
    counts = Counter(t.task for t in texts)
    assert set(counts.values()) == {12} and {"banking77", "gsm8k", "everyday"} <= set(counts), counts
    assert len({t.prompt_id for t in texts}) == len(texts)
