"""`signalbox esft score | select | train` on a tiny mixture of experts, and what they say of what cannot be done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from signalbox.adapters.base import Limits
from signalbox.adapters.base_shape import base_shape
from signalbox.adapters.esft_format import read_esft_facts
from signalbox.serving.cli import app
from tests.moe_models import save_tiny_moe
from tests.tiny_models import save_tiny

CPU = ("--device", "cpu", "--threads", "1")
QUICK = ("--samples", "4", "--sample-length", "256")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_moe(tmp_path_factory.mktemp("base") / "moe", "olmoe")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task that tiny models learn: the answer is a word of the text."""
    path = tmp_path_factory.mktemp("tables") / "colours.csv"
    rows = [f"{colour} box {100 * n},is_{colour}\n" for n in range(100) for colour in ("red", "green", "blue")]
    path.write_text("text,label\n" + "".join(rows))
    return path


@pytest.fixture(scope="module")
def scores(base: Path, table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scores") / "scores.json"
    run("score", "--base", base, "--data", table, "--out", out, *QUICK, *CPU)
    return out


def run(*arguments: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["esft", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def said(result: Result) -> str:
    """What was printed, without the frames and breaks that a terminal's width brings."""
    return " ".join(result.output.replace("│", " ").split())


def test_from_scores_to_an_adapter_that_answers(base: Path, table: Path, scores: Path, tmp_path: Path) -> None:
    raw = json.loads(scores.read_text())
    assert raw["tokens"] == 1024 and raw["top_k"] == 2 and set(raw["layers"]) == {"0", "1", "2"}
    assert raw["base"] == str(base) and len(raw["fingerprint"]) == 16 and raw["data"]["file"] == "colours.csv"
    selection, out = tmp_path / "expert_cfg.json", tmp_path / "adapter"
    told = said(run("select", scores, "--out", selection, "--threshold", "0.5"))
    chosen = json.loads(selection.read_text())["experts"]
    for layer, ids in chosen.items():
        token = raw["layers"][layer]["token"]
        assert sum(token[i] for i in ids) >= 0.5 > sum(token[i] for i in ids) - min(token[i] for i in ids)
    count = sum(map(len, chosen.values()))
    assert f"{count} of 48 experts" in told
    result = run(
        "train", "--base", base, "--data", table, "--out", out, "--experts", selection, "--lr", "3e-3",
        "--steps", "40", *CPU,
    )  # fmt: skip
    facts = read_esft_facts(out, base_shape(base), Limits((tmp_path,)))
    assert len(facts.modules) == count and facts.nbytes == count * 3 * 32 * 64 * 4  # float32, as the base
    assert json.loads((out / "expert_cfg.json").read_text())["experts"] == chosen
    report = json.loads((out / "training.json").read_text())
    figures = report["scores"]["bare"]
    assert figures["accuracy"]["beats"] and figures["accuracy"]["adapter"][0] > 0.8 > figures["accuracy"]["base"][0]
    assert report["experts"]["selected"] == count and report["experts"]["from"] == "expert_cfg.json"
    assert report["hyperparameters"]["weight_decay"] == 0.1 and report["hyperparameters"]["betas"] == [0.9, 0.95]
    assert report["content_hash"] == facts.content_hash and report["training"]["steps"] == 40
    assert (out / "loss.svg").read_text().startswith("<svg") and "signalbox adapters add" in said(result)


@pytest.mark.parametrize("given", [True, False])
def test_training_scores_and_selects_by_itself(
    base: Path, table: Path, scores: Path, tmp_path: Path, given: bool
) -> None:
    """With a file of scores and without one: the same experts, those that `select` chooses."""
    out = tmp_path / "adapter"
    more = ("--scores", scores) if given else QUICK
    run(
        "train", "--base", base, "--data", table, "--out", out, "--steps", "2", "--score", "gate", "--threshold", "0.2",
        "--eval-rows", "4", *more, *CPU,
    )  # fmt: skip
    run("select", scores, "--out", tmp_path / "cfg.json", "--score", "gate", "--threshold", "0.2")
    assert (out / "expert_cfg.json").read_text() == (tmp_path / "cfg.json").read_text()
    how = json.loads((out / "training.json").read_text())["experts"]
    assert (how["score"], how["threshold"], how["normalise"], how["tokens"]) == ("gate", 0.2, "layer", 1024)


def test_normalised_scores_need_fewer_experts(scores: Path, tmp_path: Path) -> None:
    """OLMoE's gate scores sum to less than 1; divided by their sum they reach a threshold sooner."""
    counts = {}
    for normalise in ("none", "layer"):
        out = tmp_path / f"{normalise}.json"
        run("select", scores, "--out", out, "--score", "gate", "--threshold", "0.5", "--normalise", normalise)
        counts[normalise] = sum(map(len, json.loads(out.read_text())["experts"].values()))
    assert 0 < counts["layer"] < counts["none"]


def test_what_cannot_be_done_is_said(base: Path, table: Path, scores: Path, tmp_path: Path) -> None:
    common = ("--data", table, "--out", tmp_path / "out", *CPU)
    dense = save_tiny(tmp_path / "llama")
    told = said(run("train", "--base", dense, *common, code=2))
    assert "no routed experts" in told and "signalbox adapters train" in told
    assert "no routed experts" in said(run("score", "--base", dense, *common, code=2))
    other = save_tiny_moe(tmp_path / "other", "olmoe", seed=1)
    told = said(run("train", "--base", other, "--scores", scores, *common, code=2))
    assert "whose content is not that of" in told
    told = said(run("train", "--base", base, "--scores", tmp_path / "none.json", *common, code=2))
    assert "signalbox esft score" in told
    told = said(run("train", "--base", base, "--score", "weight", *common, code=2))
    assert "score: Input should be 'gate' or 'token'" in told
    told = said(run("train", "--base", base, "--weight-decay", "inf", *common, code=2))
    assert "weight_decay: Input should be a finite number" in told
    told = said(run("train", "--base", base, "--scores", scores, "--experts", scores, *common, code=2))
    assert "not both" in told
    assert "threshold" in said(run("select", scores, "--threshold", "0", code=2))
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    shutil.copy(scores, tmp_path / "out" / "something")
    assert "is there already" in said(run("train", "--base", base, *common, code=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "foo"), "'foo' is none of auto, cpu, cuda and cuda:N"),
        (("--device", "mps"), "'mps' is none of"),
        (("--device", "cuda:99"), "PyTorch sees"),
        (("--epochs", "inf"), "epochs: Input should be a finite number"),
        (("--lr", "nan"), "rate: Input should be"),
        (("--seed", str(2**64)), "seed: Input should be less than"),
    ],
)
def test_options_that_make_no_sense(
    base: Path, table: Path, tmp_path: Path, options: tuple[str, str], message: str
) -> None:
    told = said(run("train", "--base", base, "--data", table, "--out", tmp_path / "out", *QUICK, *options, code=2))
    assert message in told and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config.json", {"model_type": "never_heard_of"}),
        ("config.json", {"hidden_size": "a"}),
        ("config.json", {"hidden_act": "never_heard_of"}),
        ("config.json", {"num_experts_per_tok": 99}),
        ("tokenizer.json", None),
    ],
)
def test_a_model_that_makes_no_sense(
    base: Path, table: Path, tmp_path: Path, file: str, changes: dict[str, object] | None
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    raw = json.loads((broken / file).read_text())
    (broken / file).write_text(json.dumps({"version": "1.0"} if changes is None else raw | changes))
    common = ("--base", broken, "--data", table, *QUICK, *CPU)
    told = said(run("score", *common, "--out", tmp_path / "scores.json", code=2))
    assert "error: " in told and str(broken) in told.replace(" ", ""), told
    assert not (tmp_path / "scores.json").exists()


def test_where_nothing_can_be_written_is_said_before_the_work(
    base: Path, table: Path, scores: Path, tmp_path: Path
) -> None:
    nothing = ("--base", tmp_path / "none", "--data", tmp_path / "none.csv", *CPU)  # would be refused next
    assert "is a folder; name a file" in said(run("score", *nothing, "--out", tmp_path, code=2))
    assert "is a folder; name a file" in said(run("select", scores, "--out", tmp_path, code=2))
    for command in (("score", *nothing), ("train", *nothing), ("select", scores)):
        assert "cannot be written" in said(run(*command, "--out", table / "below" / "out", code=2))
    told = said(run("select", scores, "--out", "/proc/none/out.json", code=2))
    assert told.startswith("error:") and "/proc/none" in told


def test_the_commands_are_explained() -> None:
    assert all(name in said(run("--help")) for name in ("score", "select", "train"))
    assert "--normalise" in said(run("train", "--help"))
