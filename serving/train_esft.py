"""Makes one ESFT adapter from a recipe: scores of the base's experts, selection, training, files, held-out scores."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from signalbox.experts.models import fingerprint
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
    from signalbox.adapters.esft_scores import ScoreFile
    from signalbox.adapters.train import Optimisation


class EsftRecipe(TaskRecipe):
    """How an ESFT adapter is made. The defaults are those of the paper and its code."""

    score: Literal["gate", "token"] = Field("token", description="relevance: average gate score, or token ratio")
    threshold: float | None = Field(None, gt=0, le=1, description="default: 0.2 for token, 0.1 for gate")
    normalise: Literal["layer", "none"] = Field("layer", description="layer: divide a layer's scores by their sum")
    samples: int = Field(32, gt=0, le=65_536, description="most samples that the experts are scored on")
    sample_length: int = Field(4096, gt=0, description="tokens of a sample")
    rate: float = Field(1e-5, gt=0, allow_inf_nan=False, description="highest learning rate")
    schedule: Literal["constant", "cosine"] = Field("constant", description="of the learning rate")
    weight_decay: float = Field(0.1, ge=0, allow_inf_nan=False)
    steps: int | None = Field(500, gt=0, description="None: as many as `epochs` are")
    longest: int = Field(4096, gt=8, description="rows of more tokens are left out")

    def optimisation(self) -> Optimisation:
        """What `adapters.train.fit` needs of it."""
        from signalbox.adapters.esft_train import PAPER

        names = ("rate", "schedule", "batch", "epochs", "steps", "minutes", "longest", "seed", "weight_decay")
        return replace(PAPER, **{name: getattr(self, name) for name in names})


def score_base(base: Base, recipe: EsftRecipe, effort: Effort, watch: Watcher) -> ScoreFile:
    """Score the base's experts on the rows that a recipe trains on. Blocking. Raises `TrainingError`, `ExpertError`."""
    device = device_of(effort)
    task = read_task(base, recipe, effort, device, watch)
    return _scored(base, _load(base, device), task, recipe, watch)


def train_esft(
    base: Base,
    recipe: EsftRecipe,
    out: Path,
    effort: Effort,
    watch: Watcher,
    *,
    experts: Path | None = None,
    scores: Path | None = None,
) -> dict[str, Any]:
    """Train the experts that `experts` (an expert_cfg.json) names, or `scores`, or scores measured now, select.

    Writes `out` in the released format, scores what was written on the held-out rows and returns what `training.json`
    says. Blocking. Raises `TrainingError`, `ExpertError`, `AdapterError`; `out` is only there once it is whole.
    """
    import torch

    from signalbox.adapters.base_shape import base_shape
    from signalbox.adapters.esft_scores import expert_layers
    from signalbox.adapters.esft_select import read_selection
    from signalbox.adapters.esft_train import attach_experts, tuned_weights
    from signalbox.adapters.esft_write import check_free, write_esft
    from signalbox.adapters.train import fit

    started = time.perf_counter()
    check_free(out)
    device = device_of(effort)
    known = None if scores is None else _checked(base, scores)
    task = read_task(base, recipe, effort, device, watch)
    model = _load(base, device)
    counts = {layer: int(module.gate_up_proj.shape[0]) for layer, module in expert_layers(model).items()}  # type: ignore[index]
    if experts is not None:
        chosen, how = read_selection(experts, counts), {"from": experts.name}
    else:
        chosen, how = _selected(known or _scored(base, model, task, recipe, watch), recipe)
    selected, routed = sum(map(len, chosen.values())), sum(counts.values())
    watch.said(f"{selected} of {routed} experts are trained ({selected / routed:.1%}), in {len(chosen)} layers")
    options = recipe.optimisation()
    tuned = attach_experts(model, chosen)
    fitted = fit(model, task.train, task.validation, options, task.codec, partial(watch.trained, "training"))
    dtype = _stored_dtype(base)
    facts = write_esft(out, chosen, partial(tuned_weights, tuned), base_shape(base.folder), dtype=dtype)
    del model, tuned
    report = report_of(base, task, recipe, options, fitted) | {
        "experts": {
            **how,
            "selected": selected,
            "of": routed,
            "share": selected / routed,
            "layers": {str(layer): list(ids) for layer, ids in chosen.items()},
        },
        "weights_bytes": facts.nbytes,
        "content_hash": facts.content_hash,
        "parameters": facts.parameters,
    }
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return finish(out, report, fitted, watch, started, lambda: _scores(base, out, recipe, task, effort, watch))


def _selected(file: ScoreFile, recipe: EsftRecipe) -> tuple[dict[int, tuple[int, ...]], dict[str, Any]]:
    """The experts to train, and what a report says of how they were found."""
    from signalbox.adapters.esft_select import THRESHOLDS, select_experts

    chosen = select_experts(file.scores, recipe.score, recipe.threshold, recipe.normalise)
    threshold = THRESHOLDS[recipe.score] if recipe.threshold is None else recipe.threshold
    measured = {"samples": file.scores.samples, "tokens": file.scores.tokens}
    return chosen, {"score": recipe.score, "threshold": threshold, "normalise": recipe.normalise, **measured}


def _scored(base: Base, model: Any, task: Task, recipe: EsftRecipe, watch: Watcher) -> ScoreFile:
    from signalbox.adapters.esft_scores import ScoreFile, expert_layers, packed_samples, score_experts

    expert_layers(model)  # refuses other models before anything else is done
    length = min(recipe.sample_length, task.codec.context_length)
    samples = packed_samples(task.train, recipe.samples, length, recipe.seed)
    scores = score_experts(model, samples, partial(watch.scored, "experts"))
    watch.said(f"experts scored on {scores.samples} samples, {scores.tokens} tokens")
    data = {"file": task.table.name, "sha256": task.table.sha256, "seed": recipe.seed}
    return ScoreFile(scores, base.reference, fingerprint(base.reference), data)


def _checked(base: Base, path: Path) -> ScoreFile:
    """Scores from a file, which must be of this very base."""
    from signalbox.adapters.esft_scores import read_scores
    from signalbox.adapters.train_data import TrainingError

    file = read_scores(path)
    if file.fingerprint != fingerprint(base.reference):
        raise TrainingError(
            f"{path} has the scores of {file.base}, whose content is not that of {base.reference}; "
            "score this base's experts with: signalbox esft score"
        )
    return file


def _stored_dtype(base: Base) -> Any:
    """In which the base's weights lie in its files."""
    import torch
    from transformers import AutoConfig

    told = AutoConfig.from_pretrained(base.folder).get_text_config().dtype
    dtype = getattr(torch, told, None) if isinstance(told, str) else told
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32


def _load(base: Base, device: Any) -> Any:
    """The base for training: as it is stored where that is bf16 on a GPU, else in float32."""
    import torch

    dtype = _stored_dtype(base) if device.type == "cuda" else torch.float32
    return load_base(base, device, torch.float32 if dtype == torch.float16 else dtype)


def _scores(base: Base, folder: Path, recipe: EsftRecipe, task: Task, effort: Effort, watch: Watcher) -> dict[str, Any]:
    """Base and adapter, read back from its files, on held-out rows in float32."""
    import torch

    from signalbox.adapters.base import Limits
    from signalbox.adapters.base_shape import base_shape
    from signalbox.adapters.esft_format import EsftAdapter
    from signalbox.adapters.esft_train import applied

    model = load_base(base, task.device, torch.float32)
    size = sum(file.stat().st_size for file in folder.iterdir())
    with EsftAdapter(folder, base_shape(base.folder), Limits((folder.resolve().parent,), max_bytes=size)) as adapter:
        states: dict[str, Callable[[], AbstractContextManager[Any]]] = {
            "base": nullcontext,
            "adapter": partial(applied, model, adapter),
        }
        return held_out_scores(model, states, task, recipe, effort, watch)
