"""`make bench-esft`: what ESFT is worth on a real, small mixture of experts, against full fine-tuning and LoRA.

A base of 25 million parameters (8 layers of 32 experts, 4 chosen; without a GPU 4 layers) learns general text from
nothing. Then two tasks, whose labels it never saw, are learned by ESFT (by token ratio and by gate score), by all
parameters, and by LoRA, in equal steps of equal batches. Each way gets its best learning rate of a few, by the
validation loss of short runs on the first task. Reported: accuracy on rows held out, bits per byte of general text held
out, what was trained and stored.

    python -m benchmarks.esft --data ../shared/data --out .run/bench_esft
    python -m benchmarks.esft --quick      a toy, on the CPU in two minutes; nothing is written to results

`--out` then holds the base, an adapter for each task and what they answer: `benchmarks.esft_served` serves them.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoTokenizer

from benchmarks.esft_base import (
    ON_CPU,
    QUICK,
    TASKS,
    Corpus,
    Size,
    general_rows,
    new_model,
    pretrain,
    read_corpus,
    stream_of,
    train_tokenizer,
)
from benchmarks.report import ROOT, Row, print_table, write_results
from signalbox.adapters.base import Limits
from signalbox.adapters.base_shape import base_shape
from signalbox.adapters.esft_format import EsftAdapter
from signalbox.adapters.esft_scores import ExpertScores, packed_samples, read_scores, score_experts, write_scores
from signalbox.adapters.esft_select import Score, select_experts
from signalbox.adapters.esft_train import applied, attach_experts
from signalbox.adapters.train import Optimisation, attach, fit
from signalbox.adapters.train_data import Encoded, encode
from signalbox.adapters.train_evaluate import greedy_answers, is_correct, reference_bits
from signalbox.adapters.train_report import wilson
from signalbox.serving.train_adapter import Recipe, train_adapter
from signalbox.serving.train_esft import EsftRecipe, score_base, train_esft
from signalbox.serving.training import Base, Effort, Task, Watcher, load_base, read_task, sample_rows

RATES = {"esft": (1.5e-3, 4e-3, 1e-2), "full": (5e-4, 1e-3, 3e-3), "lora": (4e-3, 1e-2, 2e-2)}
# Score and threshold of each ESFT way: the paper's, which suits a large base with specialised experts, and wider ones
# for a small base without. The second is kept, to be served, and says how many random experts are its control.
ESFT_WAYS: tuple[tuple[Score, float], ...] = (("token", 0.2), ("token", 0.6), ("gate", 0.6))
SERVED = ESFT_WAYS[1]
SHARD = "15MB"  # of the files that are to be carried from one machine to another
MINUTES = 0.5  # most of one training: a slow GPU ends the benchmark with fewer steps, not without a result
PRETRAINING = "pretraining.json"  # in the base's folder
ANSWERS = 256  # rows whose answers are kept to compare a service with
started = time.perf_counter()


@dataclass(frozen=True)
class Run:
    """What is the same for every way of learning a task."""

    base: Base
    data: Path
    work: Path
    device: Any
    effort: Effort
    steps: int
    batch: int
    general: list[Encoded]
    general_scores: ExpertScores
    control: bool

    def task(self, name: str) -> Task:
        return read_task(self.base, self.esft(name), self.effort, self.device, Watcher())

    def recipe(self, name: str) -> dict[str, Any]:
        """The fields of both kinds of recipe."""
        table = self.data / "tasks" / f"{name}.parquet"
        common = {"data": str(table), "kind": "classification", "text": "text", "label": TASKS[name]}
        return {**common, "steps": self.steps, "minutes": self.minutes, "batch": self.batch, "longest": 256}

    @property
    def minutes(self) -> float | None:
        return MINUTES if self.device.type == "cuda" else None

    def esft(self, name: str, rate: float = 1e-5, way: tuple[Score, float] = SERVED) -> EsftRecipe:
        fields = {"rate": rate, "score": way[0], "threshold": way[1], "schedule": "cosine", "sample_length": 1024}
        return EsftRecipe.model_validate({**self.recipe(name), **fields})

    def lora(self, name: str, rate: float) -> Recipe:
        return Recipe.model_validate({**self.recipe(name), "rate": rate})

    def full(self, rate: float) -> Optimisation:
        """As ESFT's; of many weights at once a warm-up is due."""
        return replace(self.esft(next(iter(TASKS)), rate).optimisation(), warmup=0.05)


@dataclass(frozen=True)
class Outcome:
    """One way on one task: `accuracy` of `rows` held out, their answers and general text in bits per byte, its cost."""

    accuracy: float
    rows: int
    answers: float
    general: float
    trained: int
    steps: int
    seconds: float
    nbytes: int
    share: float | None = None  # of the experts, that were trained
    met: tuple[float, float] = (0.0, 0.0)  # share of picks that meet trained experts: in the task, in general text


def say(text: str) -> None:
    print(f"[{time.perf_counter() - started:6.1f} s] {text}", flush=True)


def main(
    data: Annotated[Path, typer.Option(help="folder with tasks/ and routing/")] = ROOT.parent / "shared" / "data",
    out: Annotated[Path, typer.Option(help="for the base, the adapters and their answers")] = ROOT / ".run/bench_esft",
    tokenizer: Annotated[Path | None, typer.Option(help="folder of a tokenizer; else one is trained")] = None,
    base: Annotated[Path | None, typer.Option(help="folder of a base that an earlier run trained")] = None,
    results: Annotated[Path | None, typer.Option(help="folder for esft.json; default benchmarks/results")] = None,
    steps: Annotated[int | None, typer.Option(help="of each way on each task; default 250, on a CPU 400")] = None,
    seconds: Annotated[float | None, typer.Option(help="most of pretraining; default 70, on a CPU 2100")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    control: Annotated[bool, typer.Option(help="also train as many random experts (another 40 s on a GPU)")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="a toy, to see that all runs")] = False,
) -> None:
    """Pretrain, learn the tasks in every way, compare."""
    chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    on_cpu = chosen.type == "cpu"
    size = QUICK if quick else replace(ON_CPU if on_cpu else Size(), seconds=seconds or (2100.0 if on_cpu else 70.0))
    steps, batch = (40, 8) if quick else (steps or (400 if on_cpu else 250), 32 if on_cpu else 64)
    out.mkdir(parents=True, exist_ok=True)
    for folder in out.glob("*-esft"):
        shutil.rmtree(folder)
    corpus = read_corpus(data, size.documents)
    say(f"{len(corpus.train)} general documents, {len(corpus.held_out)} held out")
    if base is None:
        made, rows = make_base(corpus, tokenizer, size, chosen, out / "base")
    else:
        if base.resolve() != (out / "base").resolve():
            shutil.copytree(base, out / "base", dirs_exist_ok=True)
        made, rows = Base(out / "base", str(out / "base")), pretraining_rows(out / "base")
    with tempfile.TemporaryDirectory() as work:
        effort = Effort(
            str(chosen), eval_rows=24 if quick else 1000, label_rows=0, validation_rows=16 if quick else 256
        )
        general = general_rows(AutoTokenizer.from_pretrained(made.folder), corpus, 20 if quick else 400, size.context)
        seen = score_experts(load_base(made, chosen, torch.float32), packed_samples(general, length=1024))
        run = Run(made, data, Path(work), chosen, effort, steps, batch, general, seen, control)
        rates = best_rates(run, 10 if quick else max(1, steps // 5), quick)
        for name in TASKS:
            rows += compare_ways(run, name, rates, out)
    rows.append(Row("all", "seconds", time.perf_counter() - started, "s"))
    print_table(rows, "ESFT on a small mixture of experts")
    command = f"python -m benchmarks.esft --steps {steps} " + ("--base" if base else f"--seconds {size.seconds:g}")
    if not quick:
        say(f"wrote {write_results('esft', command, rows, **({} if results is None else {'folder': results}))}")


def make_base(corpus: Corpus, given: Path | None, size: Size, device: Any, folder: Path) -> tuple[Base, list[Row]]:
    """Tokenizer and model, trained and written."""
    tokenizer = train_tokenizer(corpus, size) if given is None else AutoTokenizer.from_pretrained(given)
    stream = stream_of(tokenizer, corpus.train)
    say(f"{len(stream) / 1e6:.2f} million tokens, {len(tokenizer)} different ones")
    model = new_model(tokenizer, size).to(device, torch.bfloat16)
    parameters = sum(p.numel() for p in model.parameters())
    say(f"a base of {parameters / 1e6:.1f} million parameters, on {device}")
    told = pretrain(model, stream, size, say)
    say(f"pretrained: {told}")
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=SHARD)
    tokenizer.save_pretrained(folder)
    (folder / PRETRAINING).write_text(json.dumps({"parameters": parameters, **told}) + "\n")
    return Base(folder, str(folder)), pretraining_rows(folder)


def pretraining_rows(folder: Path) -> list[Row]:
    """What pretraining came to, from the base's folder."""
    return [
        Row("base, pretraining", name, value) for name, value in json.loads((folder / PRETRAINING).read_text()).items()
    ]


def best_rates(run: Run, steps: int, quick: bool) -> dict[str, float]:
    """Each way's learning rate: the lowest validation loss of short runs on the first task."""
    name = next(iter(TASKS))
    task = run.task(name)
    relevant = select_experts(_scores(run, name).scores, *SERVED)
    found = {}
    for way, rates in RATES.items():
        losses = {}
        for rate in rates[:1] if quick else rates:
            model = load_base(run.base, run.device, torch.float32)
            options: Optimisation
            if way == "esft":
                options = run.esft(name, rate).optimisation()
                attach_experts(model, relevant)
            elif way == "lora":
                options = lora = run.lora(name, rate).hyperparameters()
                model = attach(model, lora, run.base.reference)
            else:
                options = run.full(rate)
                model.requires_grad_(True)
            options = replace(options, steps=steps, minutes=run.minutes and run.minutes / 4)
            losses[rate] = fit(model, task.train, task.validation, options, task.codec).best
        found[way] = min(losses, key=lambda rate: losses[rate])
        say(f"rates for {way}: " + ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in losses.items()))
    return found


def _scores(run: Run, name: str) -> Any:
    return score_base(run.base, run.esft(name), run.effort, Watcher(said=say))


def compare_ways(run: Run, name: str, rates: dict[str, float], out: Path) -> list[Row]:
    """One task, learned in every way."""
    task = run.task(name)
    before = load_base(run.base, run.device, torch.float32)
    held = _held_out(run, task)
    base_bits = _bits_per_byte(before, task, run.general)
    base_accuracy = _accuracy(before, task, held)
    say(f"{name}: base {base_accuracy:.3f} on {len(held)} rows, general text {base_bits:.4f} bits per byte")
    file = _scores(run, name)
    scores = run.work / f"{name}.json"
    write_scores(scores, file)
    outcomes = {"full": _full(run, task, rates["full"], held)}
    for way in ESFT_WAYS:
        folder = out / f"{name}-esft" if way == SERVED else run.work / "-".join(map(str, (name, *way)))
        outcomes["ESFT, {} to {}".format(*way)] = _esft(run, name, task, way, rates["esft"], scores, folder)
    if run.control:
        outcomes["random experts"] = _random(run, name, task, rates["esft"], held, out / f"{name}-esft")
    outcomes["LoRA"] = _lora(run, name, task, rates["lora"])
    for label, found in outcomes.items():
        say(f"{name}, {label}: {found}")
    _keep_answers(run, task, held[:ANSWERS], out, name)
    rows = [
        Row(f"{name}, base", "accuracy", base_accuracy, "", *wilson(round(base_accuracy * len(held)), len(held))),
        Row(f"{name}, base", "right answers", _bits_per_byte(before, task, held), "bits/byte"),
        Row(f"{name}, base", "general text", base_bits, "bits/byte"),
    ]
    for label, found in outcomes.items():
        rows += _rows(f"{name}, {label}", found, outcomes, base_bits)
    return rows


def _rows(case: str, found: Outcome, ways: dict[str, Outcome], base_bits: float) -> list[Row]:
    """One way's figures; ESFT is held against LoRA in the task and against full fine-tuning in what is forgotten."""
    low, high = wilson(round(found.accuracy * found.rows), found.rows)
    esft = found.share is not None
    full, lora = ways["full"], ways["LoRA"]
    score = Row(case, "accuracy", found.accuracy, "", low, high)
    rise = Row(case, "general text, rise", found.general - base_bits, "bits/byte")
    if esft:
        score = replace(score, reference=lora.accuracy, goal="at least LoRA's", met=found.accuracy >= lora.accuracy)
        forgotten = full.general - base_bits
        kept = found.general - base_bits < forgotten
        rise = replace(rise, reference=forgotten, goal="less than full fine-tuning's", met=kept)
    rows = [
        score,
        Row(case, "right answers", found.answers, "bits/byte"),
        Row(case, "general text", found.general, "bits/byte", reference=base_bits),
        rise,
        Row(case, "parameters trained", found.trained),
        Row(case, "steps", found.steps),
        Row(case, "training", found.seconds, "s"),
        Row(case, "stored", found.nbytes, "bytes"),
    ]
    if found.share is not None:
        rows += [
            Row(case, "experts trained", 100 * found.share, "%"),
            Row(case, "task's picks that meet them", 100 * found.met[0], "%"),
            Row(case, "general text's picks that meet them", 100 * found.met[1], "%"),
        ]
    return rows


# -- the ways ----------------------------------------------------------------------------------------------------


def _esft(
    run: Run, name: str, task: Task, way: tuple[Score, float], rate: float, scores: Path, folder: Path
) -> Outcome:
    recipe = run.esft(name, rate, way)
    report = train_esft(run.base, recipe, folder, run.effort, Watcher(said=say), scores=scores)
    with _adapter(run, folder) as adapter:
        model = load_base(run.base, run.device, torch.float32)
        with applied(model, adapter):
            general = _bits_per_byte(model, task, run.general)
        met = _met(read_scores(scores).scores, adapter), _met(run.general_scores, adapter)
    return Outcome(**_reported(report), general=general, share=report["experts"]["share"], met=met)


def _met(scores: ExpertScores, adapter: EsftAdapter) -> float:
    """Share of all picks that meet an expert of the adapter."""
    tables = zip(scores.layers, scores.token, strict=True)
    sums = [float(row[list(adapter.experts.get(layer, ()))].sum()) for layer, row in tables]
    return sum(sums) / len(sums)


def _lora(run: Run, name: str, task: Task, rate: float) -> Outcome:
    from peft import PeftModel

    folder = run.work / f"{name}-lora"
    report = train_adapter(run.base, run.lora(name, rate), folder, run.effort, Watcher(said=say))
    model = PeftModel.from_pretrained(load_base(run.base, run.device, torch.float32), str(folder)).eval()
    return Outcome(**_reported(report), general=_bits_per_byte(model, task, run.general))


def _full(run: Run, task: Task, rate: float, held: list[Encoded]) -> Outcome:
    model = load_base(run.base, run.device, torch.float32).requires_grad_(True)
    return _direct(run, task, model, run.full(rate), held)


def _random(run: Run, name: str, task: Task, rate: float, held: list[Encoded], chosen: Path) -> Outcome:
    """As many experts of each layer as an adapter has, drawn: is it the selection that helps?"""
    draw = random.Random(0)
    model = load_base(run.base, run.device, torch.float32)
    counts = {layer: len(ids) for layer, ids in json.loads((chosen / "expert_cfg.json").read_text())["experts"].items()}
    attach_experts(model, {int(layer): draw.sample(range(model.config.num_experts), n) for layer, n in counts.items()})
    return _direct(run, task, model, run.esft(name, rate).optimisation(), held)


def _direct(run: Run, task: Task, model: Any, options: Optimisation, held: list[Encoded]) -> Outcome:
    """Training without a command, and the scores of what it came to."""
    fitted = fit(model, task.train, task.validation, options, task.codec)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    accuracy = _accuracy(model, task, held)
    answers, general = _bits_per_byte(model, task, held), _bits_per_byte(model, task, run.general)
    stored = 2 * trained  # in bf16
    return Outcome(accuracy, len(held), answers, general, trained, fitted.steps, fitted.seconds, stored)


def _reported(report: dict[str, Any]) -> dict[str, Any]:
    scores = report["scores"]["bare"]
    return {
        "accuracy": scores["accuracy"]["adapter"][0],
        "rows": scores["rows"],
        "answers": scores["bits_per_byte"]["adapter"][0],
        "trained": report["parameters"],
        "steps": report["training"]["steps"],
        "seconds": report["training"]["seconds"],
        "nbytes": report["weights_bytes"],
    }


# -- scores ------------------------------------------------------------------------------------------------------


def _held_out(run: Run, task: Task) -> list[Encoded]:
    """The rows that the commands score as well."""
    return sample_rows(encode(task.parts.held_out, task.codec, task.longest), run.effort.eval_rows)


def _answers(model: Any, task: Task, rows: list[Encoded]) -> list[str]:
    batch = 256 if model.device.type == "cuda" else 16
    return greedy_answers(model, rows, task.codec, max_new_tokens=_longest(rows), batch=batch)


def _longest(rows: list[Encoded]) -> int:
    return max(len(row.answer) for row in rows) + 4


def _accuracy(model: Any, task: Task, rows: list[Encoded]) -> float:
    model.eval()
    said = _answers(model, task, rows)
    return sum(is_correct(a, row.reference, "exact") for a, row in zip(said, rows, strict=True)) / len(rows)


def _bits_per_byte(model: Any, task: Task, rows: list[Encoded]) -> float:
    model.eval()
    return sum(reference_bits(model, rows, task.codec)) / sum(row.nbytes for row in rows)


def _adapter(run: Run, folder: Path) -> EsftAdapter:
    return EsftAdapter(folder, base_shape(run.base.folder), Limits((folder.resolve().parent,)))


def _keep_answers(run: Run, task: Task, rows: list[Encoded], out: Path, name: str) -> None:
    """What base and adapter answer in float32, greedily: what a service has to answer, too."""
    model = load_base(run.base, run.device, torch.float32)
    said = {}
    with _adapter(run, out / f"{name}-esft") as adapter:
        for who, state in (("base", nullcontext()), ("adapter", applied(model, adapter))):
            with state:
                said[who] = _answers(model, task, rows)
    kept = [
        {"text": row.text, "reference": row.reference, "base": base, "adapter": adapted}
        for row, base, adapted in zip(rows, said["base"], said["adapter"], strict=True)
    ]
    told = {"max_new_tokens": _longest(rows), "rows": kept}
    (out / f"{name}-answers.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
