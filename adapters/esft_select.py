"""Which experts an ESFT adapter retrains: in each layer the most relevant, until their scores sum to a threshold.

Source: Wang et al., ESFT (2024), section 3. A layer's scores are divided by their own sum first, so that a threshold is
a share in every family; token ratios sum to 1 by themselves. `normalise="none"` takes gate scores as the paper's tables
have them, where the router does not renormalise its weights: they sum to 0.26 to 0.53 in a layer there, and its 0.1 is
on that scale. Never across layers, as the authors' released script does (`np.sum(axis=0)`), although its published
tables are not made so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from signalbox.adapters.esft_format import CONFIG, layer_number
from signalbox.adapters.esft_scores import ExpertScores
from signalbox.adapters.train_data import TrainingError

Score = Literal["gate", "token"]
Normalise = Literal["none", "layer"]
THRESHOLDS: dict[Score, float] = {"gate": 0.1, "token": 0.2}  # of the paper
ROUNDING = 1e-9  # by which a sum of scores may miss a threshold that it reaches on paper


def select_experts(
    scores: ExpertScores, score: Score = "token", threshold: float | None = None, normalise: Normalise = "layer"
) -> dict[int, tuple[int, ...]]:
    """Layer -> ids of the experts to retrain, ascending. Without a `threshold`, the paper's for the score.

    In a layer whose scores sum to less than the threshold, all that were ever chosen. Raises `TrainingError` for a
    threshold outside (0, 1].
    """
    limit = THRESHOLDS[score] if threshold is None else threshold
    if not 0 < limit <= 1:
        raise TrainingError(f"the threshold is {limit:g}; it must be above 0 and at most 1")
    table = scores.gate if score == "gate" else scores.token
    return {
        layer: most_relevant(row, limit * float(row.sum()) if normalise == "layer" else limit)
        for layer, row in zip(scores.layers, table, strict=True)
    }


def most_relevant(scores: Tensor, threshold: float) -> tuple[int, ...]:
    """The fewest experts of a layer whose scores (float64 [experts]) sum to the threshold, highest first.

    Of equal ones the lower id; none that was never chosen. Ids ascending.
    """
    ordered, ids = torch.sort(scores, descending=True, stable=True)
    reached = int((torch.cumsum(ordered, 0) < threshold - ROUNDING).sum()) + 1
    return tuple(sorted(int(i) for i in ids[: min(reached, int((ordered > 0).sum()))]))


def expert_config(experts: Mapping[int, Sequence[int]]) -> dict[str, Any]:
    """What `expert_cfg.json` says of them, as the ESFT repository writes it."""
    listed = {str(layer): sorted(ids) for layer, ids in sorted(experts.items()) if ids}
    return {"experts": listed, "shared_experts": False, "non_expert_modules": False}


def write_selection(path: Path, experts: Mapping[int, Sequence[int]]) -> None:
    """Write `expert_cfg.json`. Raises `TrainingError` where no expert is selected."""
    if not any(experts.values()):
        raise TrainingError("no expert is selected; raise the threshold")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.writing")
    partial.write_text(json.dumps(expert_config(experts)) + "\n")
    partial.replace(path)


def read_selection(path: Path, experts: Mapping[int, int]) -> dict[int, tuple[int, ...]]:
    """The experts that an `expert_cfg.json` names, for a base with so many `experts` in each layer.

    Raises `TrainingError` where the file is no such configuration, names others, or wants more retrained than experts.
    """
    try:
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise TrainingError(f"cannot read {path}: {error.strerror}; make it with: signalbox esft select") from None
    except (ValueError, RecursionError) as error:
        raise TrainingError(f"{path} is no JSON: {error}") from None
    listed = raw.get("experts") if isinstance(raw, dict) else None
    if not isinstance(listed, dict):
        raise TrainingError(f"{path} has no map `experts`; make it with: signalbox esft select")
    if raw.get("shared_experts") or raw.get("non_expert_modules"):
        raise TrainingError(f"{path} wants shared experts or other modules retrained; set both to false")
    found = {}
    for layer, ids in listed.items():
        try:
            number = layer_number(layer)
        except ValueError as error:
            raise TrainingError(f"{path}: {error}") from None
        count = experts.get(number, 0)
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < count for i in ids):
            raise TrainingError(f"{path}: layer {layer} of the base has {count} routed experts; {CONFIG} names others")
        if ids:
            found[number] = tuple(sorted(set(ids)))
    if not found:
        raise TrainingError(f"{path} names no expert; raise the threshold of: signalbox esft select")
    return dict(sorted(found.items()))
