"""Trains one LoRA adapter from a recipe, start to end: data, training, files, and scores of what was written."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from signalbox.experts.catalog import Strict
from signalbox.serving.training import (
    Base,
    Effort,
    Task,
    TaskRecipe,
    Watcher,
    device_of,
    finish,
    held_out_scores,
    load_base,
    read_task,
    report_of,
)

if TYPE_CHECKING:
    from signalbox.adapters.train import Hyperparameters


class Trial(Strict):
    """One candidate of a search: what it changes. Unset fields are as in the recipe."""

    rate: float | None = Field(None, gt=0)
    targets: tuple[str, ...] | None = None
    rank: int | None = Field(None, gt=0)
    alpha: float | None = Field(None, gt=0)
    batch: int | None = Field(None, gt=0)


class Recipe(TaskRecipe):
    """How a LoRA adapter is made; `recipe.yaml` beside the shipped ones."""

    rank: int = Field(8, gt=0, le=256)
    alpha: float = Field(16.0, gt=0)
    targets: tuple[str, ...] = Field(("q_proj", "k_proj", "v_proj", "o_proj"), min_length=1)
    dropout: float = Field(0.05, ge=0, lt=1)
    search: tuple[Trial, ...] = Field((), max_length=16, description="candidates; the lowest validation loss wins")
    search_steps: int = Field(200, gt=0, description="steps of each candidate's trial")

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


def train_adapter(base: Base, recipe: Recipe, out: Path, effort: Effort, watch: Watcher) -> dict[str, Any]:
    """Train, write `out`, score what was written on the held-out rows, and return what `training.json` says.

    Blocking. Raises `TrainingError`, `ExpertError`, `AdapterError`; `out` is only made once there are weights to write.
    """
    import torch

    from signalbox.adapters import train as training
    from signalbox.adapters.base import Limits
    from signalbox.adapters.base_shape import base_shape
    from signalbox.adapters.validate import validate

    started = time.perf_counter()
    device = device_of(effort)
    task = read_task(base, recipe, effort, device, watch)
    train, validation, codec = task.train, task.validation, task.codec
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
    del adapted, model
    report = report_of(base, task, recipe, options, fitted) | {
        "search": trials,
        "weights_bytes": nbytes,
        "content_hash": facts.content_hash,
        "parameters": facts.parameters,
    }
    return finish(out, report, fitted, watch, started, lambda: _scores(base, out, recipe, task, effort, watch))


def _scores(base: Base, folder: Path, recipe: Recipe, task: Task, effort: Effort, watch: Watcher) -> dict[str, Any]:
    """Base and adapter, read back from its files, on held-out rows in float32."""
    import torch
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_base(base, task.device, torch.float32), str(folder)).eval()
    states: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "base": model.disable_adapter,
        "adapter": nullcontext,
    }
    return held_out_scores(model, states, task, recipe, effort, watch)
