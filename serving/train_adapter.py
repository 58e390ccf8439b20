"""Trains one adapter from a recipe, start to end: data, training, files, and scores of what was written.

Prompts and answers are tokenised by the code that serves requests (`experts.prompts`), so the adapter learns exactly
the chat that the service will show it.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from signalbox.experts.catalog import Strict

if TYPE_CHECKING:
    from signalbox.adapters.train import Fit, Hyperparameters, Moment
    from signalbox.adapters.train_data import Codec, Encoded, Split, TaskTable

REPORT_FILE, PLOT_FILE = "training.json", "loss.svg"
PACKAGES = ("torch", "transformers", "peft", "safetensors", "signalbox")


class Trial(Strict):
    """One candidate of a search: what it changes. Unset fields are as in the recipe."""

    rate: float | None = Field(None, gt=0)
    targets: tuple[str, ...] | None = None
    rank: int | None = Field(None, gt=0)
    alpha: float | None = Field(None, gt=0)
    batch: int | None = Field(None, gt=0)


class Recipe(Strict):
    """How an adapter is made; `recipe.yaml` beside the shipped ones."""

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
    rank: int = Field(8, gt=0, le=256)
    alpha: float = Field(16.0, gt=0)
    targets: tuple[str, ...] = Field(("q_proj", "k_proj", "v_proj", "o_proj"), min_length=1)
    dropout: float = Field(0.05, ge=0, lt=1)
    rate: float = Field(1e-3, gt=0, description="highest learning rate")
    batch: int = Field(32, gt=0, le=4096)
    epochs: float = Field(5.0, gt=0)
    steps: int | None = Field(None, gt=0, description="instead of epochs")
    minutes: float | None = Field(None, gt=0, description="most minutes of training")
    longest: int = Field(768, gt=8, description="rows of more tokens are left out")
    holdout: float = Field(0.1, gt=0, le=0.5, description="share of texts that only the scores see")
    seed: int = 0
    search: tuple[Trial, ...] = Field((), max_length=16, description="candidates; the lowest validation loss wins")
    search_steps: int = Field(200, gt=0, description="steps of each candidate's trial")
    max_new_tokens: int | None = Field(None, gt=0, description="of a held-out answer; default: by the references")

    @field_validator("wordings")
    @classmethod
    def _hold_text(cls, wordings: tuple[str, ...]) -> tuple[str, ...]:
        for wording in wordings:
            if "{text}" not in wording:
                raise ValueError(f"the wording {wording!r} has no {{text}}")
        return wordings

    def hyperparameters(self) -> Hyperparameters:
        """What `adapters.train.fit` needs of it."""
        from signalbox.adapters.train import Hyperparameters

        names = (
            "rank",
            "alpha",
            "targets",
            "dropout",
            "rate",
            "batch",
            "epochs",
            "steps",
            "minutes",
            "longest",
            "seed",
        )
        return Hyperparameters(**{name: getattr(self, name) for name in names})


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


def train_adapter(base: Base, recipe: Recipe, out: Path, effort: Effort, watch: Watcher) -> dict[str, Any]:
    """Train, write `out`, score what was written on the held-out rows, and return what `training.json` says.

    Blocking. Raises `TrainingError`, `ExpertError`, `AdapterError`; `out` is only made once there are weights to write.
    """
    import torch

    from signalbox.adapters import train as training
    from signalbox.adapters.base import Limits
    from signalbox.adapters.base_shape import base_shape
    from signalbox.adapters.train_data import encode, read_table, split
    from signalbox.adapters.validate import validate

    started = time.perf_counter()
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if effort.device == "auto" else effort.device
    )
    if effort.threads:
        torch.set_num_threads(effort.threads)
    table = read_table(Path(recipe.data), recipe.kind, text=recipe.text, answer=recipe.label, edits=recipe.edits)
    parts = split(table, recipe.holdout)
    codec = codec_of(base)
    longest = min(recipe.longest, codec.context_length)
    train = encode(parts.train, codec, longest)
    if recipe.wordings:
        train += encode(parts.train, codec, longest, recipe.wordings)
    validation = _sample(encode(parts.validation, codec, longest), effort.validation_rows or _default(device, 64, 512))
    watch.said(
        f"{table.name}: {table.kind}, {len(parts.train)} rows to learn, {len(parts.validation)} to validate, "
        f"{len(parts.held_out)} held out; on {device}"
    )
    options = recipe.hyperparameters()
    model = load_base(base, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    trials = []
    if recipe.search and device.type == "cuda":
        # A GPU's first steps take seconds, which would be taken from the first trial's minutes alone.
        warm = replace(options, steps=2)
        adapted = training.attach(model, warm, base.reference)
        training.fit(adapted, train, validation, warm, codec)
        model = adapted.unload()
    for number, trial in enumerate(recipe.search, 1):
        changed = replace(options, **trial.model_dump(exclude_none=True))
        tried = training.shortened(changed, recipe.search_steps, effort.search_minutes)
        adapted = training.attach(model, tried, base.reference)
        fitted = training.fit(adapted, train, validation, tried, codec, partial(watch.trained, f"trial {number}"))
        model = adapted.unload()
        trials.append({**trial.model_dump(exclude_none=True), "validation_loss": fitted.best, "steps": fitted.steps})
        watch.said(f"trial {number}: {trial.model_dump(exclude_none=True)}: validation loss {fitted.best:.4f}")
    if trials:
        best = min(range(len(trials)), key=lambda i: float(trials[i]["validation_loss"]))
        options = replace(options, **recipe.search[best].model_dump(exclude_none=True))
    adapted = training.attach(model, options, base.reference)
    fitted = training.fit(adapted, train, validation, options, codec, partial(watch.trained, "training"))
    nbytes = training.save(adapted, out)
    # What the service would say of it, now rather than when it is added.
    facts = validate(out, base_shape(base.folder), Limits((out.resolve(),), max_rank=max(64, options.rank)))
    watch.said(
        f"best validation loss {fitted.best:.4f} at step {fitted.kept} of {fitted.steps}, {fitted.seconds:.0f} s"
    )
    (out / PLOT_FILE).write_text(loss_svg(fitted))
    del adapted, model
    report = {
        "base": base.reference,
        "data": {"file": table.name, "sha256": table.sha256, "kind": table.kind, "labels": len(table.labels)}
        | {"train": len(parts.train), "validation": len(parts.validation), "held_out": len(parts.held_out)},
        "recipe": recipe.model_dump(mode="json", exclude={"data"}),
        "hyperparameters": asdict(options),
        "search": trials,
        "training": {
            "steps": fitted.steps,
            "kept_step": fitted.kept,
            "seconds": round(fitted.seconds, 1),
            "tokens": fitted.tokens,
            "validation_loss": fitted.best,
            "history": [_rounded(moment) for moment in fitted.history],
        },
        "weights_bytes": nbytes,
        "content_hash": facts.content_hash,
        "parameters": facts.parameters,
        "machine": machine(device),
        "versions": versions(),
    }
    _write(out, report)  # before the scores, which may be interrupted
    report["scores"] = _scores(base, out, recipe, table, parts, codec, device, effort, watch)
    report["seconds"] = round(time.perf_counter() - started, 1)
    _write(out, report)
    return report


def codec_of(base: Base) -> Codec:
    """The expert's tokenizer and chat template, as its engine uses them. Raises `ExpertUnavailable`."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    from signalbox.adapters.train_data import Codec, TrainingError
    from signalbox.experts.prompts import PromptEncoder

    tokenizer = AutoTokenizer.from_pretrained(base.folder)
    encoder = PromptEncoder(tokenizer, base.chat_template)
    text_config = AutoConfig.from_pretrained(base.folder).get_text_config()
    stops: set[int] = set()
    told = [tokenizer.eos_token_id, text_config.eos_token_id]
    if (base.folder / "generation_config.json").is_file():
        told.append(GenerationConfig.from_pretrained(base.folder).eos_token_id)
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
    except (OSError, ValueError, RuntimeError) as error:
        raise TrainingError(f"cannot load the model in {base.folder}: {error}") from error
    return model.to(device).eval().requires_grad_(False)


def _scores(
    base: Base,
    folder: Path,
    recipe: Recipe,
    table: TaskTable,
    parts: Split,
    codec: Codec,
    device: Any,
    effort: Effort,
    watch: Watcher,
) -> dict[str, Any]:
    """Base and adapter, read back from its files, on held-out rows in float32: bare, and in the recipe's wordings."""
    import torch
    from peft import PeftModel

    from signalbox.adapters.train_data import encode
    from signalbox.adapters.train_evaluate import metric_of, score_rows
    from signalbox.adapters.train_report import compare

    model = load_base(base, device, torch.float32)
    model = PeftModel.from_pretrained(model, str(folder)).eval()
    longest = min(recipe.longest, codec.context_length)
    metric = "exact" if table.kind == "classification" else metric_of([e.answer for e in parts.train])
    batch = _default(device, 16, 256)
    results: dict[str, Any] = {"metric": metric}
    for name, wordings in (("bare", ("{text}",)), ("instructed", recipe.wordings)):
        if not wordings:
            continue
        rows = _sample(encode(parts.held_out, codec, longest, wordings), effort.eval_rows)
        answers = max(len(row.answer) for row in rows)
        scored = []
        for who in ("base", "adapter"):
            with model.disable_adapter() if who == "base" else _nothing():
                scored.append(
                    score_rows(
                        model,
                        rows,
                        codec,
                        metric,
                        max_new_tokens=recipe.max_new_tokens or min(256, answers + 4),
                        batch=batch,
                        labels=table.labels if name == "bare" else (),
                        label_rows=_default(device, 32, 256) if effort.label_rows is None else effort.label_rows,
                        report=partial(watch.scored, f"{who}, {name}"),
                    )
                )
        results[name] = compare(*scored)
    return results


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


def machine(device: Any) -> dict[str, Any]:
    """What the run ran on."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": device.type,
        "name": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Of the packages that bear on the result."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _sample(rows: list[Encoded], most: int | None) -> list[Encoded]:
    """The first `most` rows in the order of their hashes: tables are often sorted by label."""
    from signalbox.adapters.train_data import hash_of

    return sorted(rows, key=lambda row: hash_of("sample\0" + row.text))[:most]


def _default(device: Any, cpu: int, gpu: int) -> int:
    return gpu if device.type == "cuda" else cpu


def _rounded(moment: Moment) -> dict[str, Any]:
    kept = {"step": moment.step, "loss": round(moment.loss, 5), "rate": round(moment.rate, 7)}
    kept["seconds"] = round(moment.seconds, 1)
    return kept if moment.validation is None else kept | {"validation": round(moment.validation, 5)}


def _write(folder: Path, report: dict[str, Any]) -> None:
    # A history row a line: the file is read by people, and compared by git.
    history = report["training"]["history"]
    short = {**report, "training": {**report["training"], "history": "@history"}}
    lines = ",\n".join("      " + json.dumps(row) for row in history)
    text = json.dumps(short, indent=2).replace('"@history"', f"[\n{lines}\n    ]")
    (folder / REPORT_FILE).write_text(text + "\n")


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()


__all__: Sequence[str] = ("Base", "Effort", "Recipe", "Watcher", "base_of", "train_adapter")
