"""What the training of every kind of adapter shares: the base and its chat, the table's rows, scores, the report.

Prompts and answers are tokenised by the code that serves requests (`experts.prompts`), so an adapter learns exactly
the chat that the service will show it.
"""

from __future__ import annotations

import json
import platform
import re
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from signalbox.experts.catalog import Strict

if TYPE_CHECKING:
    from signalbox.adapters.train import Fit, Moment, Optimisation
    from signalbox.adapters.train_data import Codec, Encoded, Split, TaskTable

REPORT_FILE, PLOT_FILE = "training.json", "loss.svg"
PACKAGES = ("torch", "transformers", "peft", "safetensors", "signalbox")


class TaskRecipe(Strict):
    """What is learned and for how long, whatever kind of adapter learns it."""

    data: str = Field(description="table: .parquet, .csv or .jsonl")
    kind: Literal["classification", "completion", "auto"] = Field("auto", description="what the table holds")
    text: str | None = Field(None, description="column of the texts")
    label: str | None = Field(None, description="column of the labels or answers")
    edits: tuple[tuple[str, str], ...] = Field(
        (), max_length=16, description="[regular expression, replacement]: applied to every answer, in this order"
    )
    wordings: tuple[str, ...] = Field(
        (), max_length=16, description="instructions around {text}: each row is also learned in one of them"
    )
    rate: float = Field(1e-3, gt=0, allow_inf_nan=False, description="highest learning rate")
    batch: int = Field(32, gt=0, le=4096)
    epochs: float = Field(5.0, gt=0, allow_inf_nan=False)
    steps: int | None = Field(None, gt=0, description="instead of epochs")
    minutes: float | None = Field(None, gt=0, allow_inf_nan=False, description="most minutes of training")
    longest: int = Field(768, gt=8, description="rows of more tokens are left out")
    holdout: float = Field(0.1, gt=0, le=0.5, description="share of texts that only the scores see")
    seed: int = Field(0, ge=-(2**63), lt=2**63)
    max_new_tokens: int | None = Field(None, gt=0, description="of a held-out answer; default: by the references")

    @field_validator("wordings")
    @classmethod
    def _hold_text(cls, wordings: tuple[str, ...]) -> tuple[str, ...]:
        for wording in wordings:
            if "{text}" not in wording:
                raise ValueError(f"the wording {wording!r} has no {{text}}")
        return wordings


@dataclass(slots=True, frozen=True)
class Base:
    """The model an adapter is for: its folder, the reference that the adapter's files name, and its chat template."""

    folder: Path
    reference: str
    chat_template: str | None = None


@dataclass(slots=True, frozen=True)
class Effort:
    """What a run may cost here; it does not change what is learned. `eval_rows` and `label_rows`: None for all."""

    device: str = "auto"
    threads: int | None = None
    eval_rows: int | None = None
    label_rows: int | None = None
    validation_rows: int | None = None
    search_minutes: float | None = None


@dataclass(slots=True)
class Watcher:
    """Who is told how far a run is. Each callback may be called from the thread that trains, and returns at once."""

    said: Callable[[str], None] = lambda text: None
    trained: Callable[[str, Moment], None] = lambda name, moment: None
    scored: Callable[[str, int, int], None] = lambda name, done, total: None


def base_of(reference: str, config: Path | None) -> Base:
    """An expert's name in the configuration, or a model reference. Raises `TrainingError`, `ModelUnavailable`."""
    from signalbox.adapters.train_data import TrainingError
    from signalbox.experts.catalog import LocalExpert
    from signalbox.experts.models import resolve

    if ":" not in reference and not Path(reference).exists():
        if config is None:
            raise TrainingError(f"--base {reference}: no such folder; for an expert's name give its --config")
        from signalbox.serving.config import load_config

        experts = load_config(config).experts
        expert = experts.get(reference)
        if expert is None:
            raise TrainingError(f"--base {reference}: {config} has the experts {', '.join(experts)}")
        if not isinstance(expert, LocalExpert):
            raise TrainingError(f"--base {reference}: a remote model cannot be trained here")
        return Base(resolve(expert.model).path, expert.model, expert.chat_template)
    return Base(resolve(reference).path, reference)


@dataclass(slots=True, frozen=True)
class Task:
    """A recipe's table as the base reads it: its split, and in tokens the rows to learn from and to validate with."""

    table: TaskTable
    parts: Split
    codec: Codec
    longest: int
    train: list[Encoded]
    validation: list[Encoded]
    device: Any  # torch.device of the run

    def facts(self) -> dict[str, Any]:
        """What a report says of it."""
        table, parts = self.table, self.parts
        return {"file": table.name, "sha256": table.sha256, "kind": table.kind, "labels": len(table.labels)} | {
            "train": len(parts.train),
            "validation": len(parts.validation),
            "held_out": len(parts.held_out),
        }


def device_of(effort: Effort) -> Any:
    """The `torch.device` that a run uses; sets the threads of torch on the CPU. Raises `TrainingError`."""
    import torch

    from signalbox.adapters.train_data import TrainingError

    if effort.threads:
        torch.set_num_threads(effort.threads)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if effort.device == "auto":
        return torch.device("cuda" if gpus else "cpu")
    named = re.fullmatch(r"cpu|cuda(?::(\d{1,3}))?", effort.device)
    if named is None:
        raise TrainingError(f"the device {effort.device!r} is none of auto, cpu, cuda and cuda:N")
    if effort.device != "cpu" and int(named[1] or 0) >= gpus:
        raise TrainingError(f"the device {effort.device!r} is not there: PyTorch sees {gpus} GPUs; leave out --device")
    return torch.device(effort.device)


def read_task(base: Base, recipe: TaskRecipe, effort: Effort, device: Any, watch: Watcher) -> Task:
    """Read, split and tokenise a recipe's table. Raises `TrainingError`, `ExpertUnavailable`."""
    from signalbox.adapters.train_data import TrainingError, encode, read_table, split

    table = read_table(Path(recipe.data), recipe.kind, text=recipe.text, answer=recipe.label, edits=recipe.edits)
    parts = split(table, recipe.holdout)
    codec = codec_of(base)
    longest = min(recipe.longest, codec.context_length)
    train = encode(parts.train, codec, longest)
    if recipe.wordings:
        train += encode(parts.train, codec, longest, recipe.wordings)
    every = encode(parts.validation, codec, longest)
    if not train or not every:
        raise TrainingError(f"{table.name}: hardly a row has {longest} tokens or fewer; give shorter texts")
    validation = sample_rows(every, effort.validation_rows or by_device(device, 64, 512))
    watch.said(
        f"{table.name}: {table.kind}, {len(parts.train)} rows to learn, {len(parts.validation)} to validate, "
        f"{len(parts.held_out)} held out; on {device}"
    )
    return Task(table, parts, codec, longest, train, validation, device)


def codec_of(base: Base) -> Codec:
    """An expert's tokenizer and chat template, as its engine uses them.

    Raises `ExpertUnavailable`, and `TrainingError` for files that make no sense.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    from signalbox.adapters.train_data import Codec, TrainingError
    from signalbox.experts.prompts import PromptEncoder

    try:
        tokenizer = AutoTokenizer.from_pretrained(base.folder)
        text_config = AutoConfig.from_pretrained(base.folder).get_text_config()
        told = [tokenizer.eos_token_id, text_config.eos_token_id]
        if (base.folder / "generation_config.json").is_file():
            told.append(GenerationConfig.from_pretrained(base.folder).eos_token_id)
    except Exception as error:  # transformers raises anything for files that make no sense
        raise TrainingError(f"cannot read the tokenizer and config.json in {base.folder}: {error!r:.300}") from error
    encoder = PromptEncoder(tokenizer, base.chat_template)
    stops: set[int] = set()
    for value in told:
        stops.update(value if isinstance(value, list | tuple) else [value] if value is not None else [])
    if tokenizer.eos_token_id is None:
        raise TrainingError(f"the tokenizer of {base.reference} names no token that ends an answer")
    pad = tokenizer.pad_token_id
    return Codec(
        encode_prompt=lambda text: encoder.encode_chat([{"role": "user", "content": text}]),
        encode_answer=lambda text: encoder.encode(encoder.answer_prefix + text, special=False),
        decode=lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
        eos=int(tokenizer.eos_token_id),
        stops=frozenset(stops),
        pad=int(tokenizer.eos_token_id if pad is None else pad),
        context_length=int(text_config.max_position_embeddings),
    )


def load_base(base: Base, device: Any, dtype: Any) -> Any:
    """The base model, frozen, on its device. Raises `TrainingError`."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from signalbox.adapters.train_data import TrainingError

    disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=dtype, use_safetensors=True)
    except Exception as error:
        raise TrainingError(f"cannot load the model in {base.folder}: {error!r:.300}") from error
    text = model.config.get_text_config()
    chosen, experts = (getattr(text, name, None) for name in ("num_experts_per_tok", "num_experts"))
    experts = experts or getattr(text, "n_routed_experts", None)
    if chosen and experts and chosen > experts:
        raise TrainingError(
            f"the model in {base.folder} chooses {chosen} of {experts} experts; is its config.json whole?"
        )
    return model.to(device).eval().requires_grad_(False)


def held_out_scores(
    model: Any,
    states: Mapping[str, Callable[[], AbstractContextManager[Any]]],
    task: Task,
    recipe: TaskRecipe,
    effort: Effort,
    watch: Watcher,
) -> dict[str, Any]:
    """Scores on held-out rows, bare and in the recipe's wordings, of `model` in the states `base` and `adapter`.

    A state is entered while the model is scored in it. The model is best given in float32.
    """
    from signalbox.adapters.train_data import encode
    from signalbox.adapters.train_evaluate import metric_of, score_rows
    from signalbox.adapters.train_report import compare

    table, parts, device = task.table, task.parts, model.device
    metric = "exact" if table.kind == "classification" else metric_of([e.answer for e in parts.train])
    results: dict[str, Any] = {"metric": metric}
    for name, wordings in (("bare", ("{text}",)), ("instructed", recipe.wordings)):
        if not wordings:
            continue
        rows = sample_rows(encode(parts.held_out, task.codec, task.longest, wordings), effort.eval_rows)
        answers = max(len(row.answer) for row in rows)
        scored = []
        for who in ("base", "adapter"):
            with states[who]():
                scored.append(
                    score_rows(
                        model,
                        rows,
                        task.codec,
                        metric,
                        max_new_tokens=recipe.max_new_tokens or min(256, answers + 4),
                        batch=by_device(device, 16, 256),
                        labels=table.labels if name == "bare" else (),
                        label_rows=by_device(device, 32, 256) if effort.label_rows is None else effort.label_rows,
                        report=partial(watch.scored, f"{who}, {name}"),
                    )
                )
        results[name] = compare(*scored)
    return results


def report_of(base: Base, task: Task, recipe: TaskRecipe, options: Optimisation, fitted: Fit) -> dict[str, Any]:
    """What `training.json` says whatever kind of adapter was trained; the kind's own facts are to be added."""
    return {
        "base": base.reference,
        "data": task.facts(),
        "recipe": recipe.model_dump(mode="json", exclude={"data"}),
        "hyperparameters": asdict(options),
        "training": _training_facts(fitted),
        "machine": _machine(task.device),
        "versions": _versions(),
    }


def finish(
    folder: Path,
    report: dict[str, Any],
    fitted: Fit,
    watch: Watcher,
    started: float,
    scores: Callable[[], dict[str, Any]],
) -> dict[str, Any]:
    """Write loss plot and report into an adapter's folder, then what `scores` finds. `started`: by perf_counter."""
    watch.said(
        f"best validation loss {fitted.best:.4f} at step {fitted.kept} of {fitted.steps}, {fitted.seconds:.0f} s"
    )
    (folder / PLOT_FILE).write_text(loss_svg(fitted))
    _write_report(folder, report)  # before the scores, which may be interrupted
    report["scores"] = scores()
    report["seconds"] = round(time.perf_counter() - started, 1)
    _write_report(folder, report)
    return report


def _training_facts(fitted: Fit) -> dict[str, Any]:
    return {
        "steps": fitted.steps,
        "kept_step": fitted.kept,
        "seconds": round(fitted.seconds, 1),
        "tokens": fitted.tokens,
        "validation_loss": fitted.best,
        "history": [_rounded(moment) for moment in fitted.history],
    }


def _write_report(folder: Path, report: dict[str, Any]) -> None:
    # A history row a line: the file is read by people, and compared by git.
    history = report["training"]["history"]
    short = {**report, "training": {**report["training"], "history": "@history"}}
    lines = ",\n".join("      " + json.dumps(row) for row in history)
    text = json.dumps(short, indent=2).replace('"@history"', f"[\n{lines}\n    ]")
    (folder / REPORT_FILE).write_text(text + "\n")


def loss_svg(fitted: Fit) -> str:
    """Loss over steps as a standalone SVG."""
    from signalbox.router.plots import Axes, Series, colour_of, plot

    series = [Series("training", [(m.step, m.loss) for m in fitted.history])]
    measured = [(m.step, m.validation) for m in fitted.history if m.validation is not None]
    if measured:
        series.append(Series("validation", measured, dots=True))
    style = (
        "<style>svg{--ink:#222;--soft:#777;background:#fff;font:12px sans-serif}"
        ".grid{stroke:#e4e4e4}.frame{fill:none;stroke:#999}text{fill:#222}</style>"
    )
    names = "".join(
        f'<text x="{640 + 100 * i}" y="34" style="fill:{colour_of(series, i)}">{s.name}</text>'
        for i, s in enumerate(series)
    )
    drawn = plot(series, Axes("step", "loss of the answer's tokens, nats"))
    head, body = drawn.split(">", 1)
    return f'{head} xmlns="http://www.w3.org/2000/svg">{style}{body.removesuffix("</svg>")}{names}</svg>\n'


def _machine(device: Any) -> dict[str, Any]:
    """What the run ran on."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": device.type,
        "name": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }


def _versions() -> dict[str, str]:
    """Of the packages that bear on the result."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def sample_rows(rows: list[Encoded], most: int | None) -> list[Encoded]:
    """The first `most` rows in the order of their hashes: tables are often sorted by label."""
    from signalbox.adapters.train_data import hash_of

    return sorted(rows, key=lambda row: hash_of("sample\0" + row.text))[:most]


def by_device(device: Any, cpu: int, gpu: int) -> int:
    """A number for the kind of device."""
    return gpu if device.type == "cuda" else cpu


def _rounded(moment: Moment) -> dict[str, Any]:
    kept = {"step": moment.step, "loss": round(moment.loss, 5), "rate": round(moment.rate, 7)}
    kept["seconds"] = round(moment.seconds, 1)
    return kept if moment.validation is None else kept | {"validation": round(moment.validation, 5)}
