"""Figures of a router's predictions on measured rows, beside the lines that every router must be held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from signalbox.router import metrics
from signalbox.router.base import Prediction
from signalbox.router.metrics import Vector, optimal_selection, regret, shares, standard_error, taken
from signalbox.router.table import Table, TableError

Matrix = NDArray[np.float64]
# Two standard errors: the paired difference to the best single model that counts as a win.
WIN = 2.0


@dataclass
class Evaluation:
    """Figures on `rows` unseen prompts; qualities are mean scores in [0, 1] of the experts that were chosen.

    `best_single` is the best expert in hindsight on these very rows, so the bar is never too low. `gain` is the
    paired difference to it, `gain_se` its standard error, and `wins` says that it exceeds two of them.
    `optimal_selection` is the share of prompts on which the chosen expert is the best or ties with it. `regret` is
    what the choice gives away of the score, `regret_bits` the same in bits per byte (None without losses).
    `majority`, `knn` and `told_task` know the training rows only; None where the artifact has not kept what they need.
    `aiq` and `aiq_hull` (the single experts') are None where a row lacks a cost; so is `collapse`, the share of the
    most chosen expert along the budget. `apgr`, `cpt50` and `cpt80` are those of `pair`, a weak and a strong expert.
    Their definitions are in `metrics.py`.
    `decision_ms` is one prompt at a time, encoder included and its cache emptied, on one thread; None where the
    predictions come from several predictors (cross-validation). `slow_share` is the share of prompts on which a cascade
    asked its slow router. `knn_rows` says on how many rows `knn` was tried, and `knn_quality_here` what the router
    reaches on the same ones. `robustness` is what becomes of the choices when prompts are changed (`robustness.py`).
    """

    experts: list[str]
    rows: int
    quality: float
    quality_se: float
    best_single: float
    best_single_expert: str
    gain: float
    gain_se: float
    wins: bool
    majority: float | None
    cheapest: float | None
    random: float
    knn: float | None
    told_task: float | None
    oracle: float
    optimal_selection: float
    majority_optimal_selection: float | None
    regret: float
    regret_bits: float | None
    share: dict[str, float]
    calibration: dict[str, Any]
    decision_ms: dict[str, float] | None = None
    aiq: float | None = None
    aiq_hull: float | None = None
    collapse: list[dict[str, Any]] | None = None
    pair: list[str] | None = None
    apgr: float | None = None
    cpt50: float | None = None
    cpt80: float | None = None
    knn_rows: int = 0
    knn_quality_here: float | None = None
    slow_share: float | None = None
    robustness: dict[str, dict[str, float]] | None = None
    bare_text_quality: float | None = None
    excluded_seen: int = 0
    excluded_incomplete: int = 0
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain types, for `--json`."""
        return asdict(self)

    @property
    def most_chosen(self) -> tuple[str, float]:
        """The expert that is chosen most often, and its share."""
        return max(self.share.items(), key=lambda item: item[1])


@dataclass(frozen=True)
class Lines:
    """What others, who know training rows alone, reach on each of n judged rows: scores float64 [n], or None.

    majority: the expert that is most often optimal; told_task: each task's best expert; knn: nearest neighbours, NaN on
    rows where it was not tried; expected_cost: US dollars that each expert costs on the mean, [n, E].
    """

    majority: Vector | None = None
    told_task: Vector | None = None
    knn: Vector | None = None
    expected_cost: Matrix | None = None

    @staticmethod
    def joined(parts: Sequence[Lines], order: NDArray[np.intp]) -> Lines:
        """Lines of several folds, one after the other, brought into the order of the table."""

        def join(name: str) -> Any:
            values = [getattr(part, name) for part in parts]
            return None if any(v is None for v in values) else np.concatenate(values)[np.argsort(order)]

        return Lines(*(join(name) for name in ("majority", "told_task", "knn", "expected_cost")))


def lines_of(rows: Table, facts: dict[str, Any], knn: Vector | None = None) -> Lines:
    """From what `train` notes of its rows: `majority`, `best_of_task`, `mean_cost`."""
    cost = rows.measures.get("cost")
    known = facts.get("mean_cost") or {}
    expected = None
    if cost is not None:
        each = [known.get(name, np.nanmean(c)) for name, c in zip(rows.models, cost.T, strict=True)]
        expected = np.broadcast_to(np.array(each), rows.score.shape)
    usual = _column(rows, facts.get("majority"))
    best = facts.get("best_of_task") or {}
    columns = [_column(rows, best.get(task)) for task in rows.task]
    known_columns = [c for c in columns if c is not None]
    told = taken(rows.score, np.array(known_columns)) if len(known_columns) == len(rows) else None
    return Lines(None if usual is None else rows.score[:, usual], told, knn, expected)


def _column(rows: Table, name: str | None) -> int | None:
    return rows.models.index(name) if name in rows.models else None


def judge(
    rows: Table, prediction: Prediction, lines: Lines | None = None, *, pair: tuple[str, str] | None = None
) -> Evaluation:
    """Figures of predictions for all rows of a complete table whose models are the prediction's experts, in order.

    Raises `TableError` where `pair` is none: an expert that is not the router's, or a strong one that is not better.
    """
    lines = lines or Lines()
    scores, choice = rows.score, prediction.quality.argmax(axis=1)
    got, top, means = taken(scores, choice), scores.max(axis=1), scores.mean(axis=0)
    single = int(means.argmax())
    gain = got - scores[:, single]
    cost = rows.measures.get("cost")
    cost = None if cost is None or np.isnan(cost).any() else cost
    asked = np.zeros(len(rows), dtype=bool) if lines.knn is None else ~np.isnan(lines.knn)
    knn = lines.knn[asked] if lines.knn is not None and asked.any() else None
    usual = lines.majority
    return Evaluation(
        experts=list(rows.models),
        rows=len(rows),
        quality=float(got.mean()),
        quality_se=standard_error(got),
        best_single=float(means[single]),
        best_single_expert=rows.models[single],
        gain=float(gain.mean()),
        gain_se=standard_error(gain),
        wins=bool(gain.mean() > WIN * standard_error(gain) and gain.mean() > 0),
        majority=None if usual is None else float(usual.mean()),
        cheapest=None if cost is None else float(means[int(cost.mean(axis=0).argmin())]),
        random=float(means.mean()),
        knn=None if knn is None else float(knn.mean()),
        knn_rows=int(asked.sum()),
        knn_quality_here=None if knn is None else float(got[asked].mean()),
        told_task=None if lines.told_task is None else float(lines.told_task.mean()),
        oracle=float(top.mean()),
        optimal_selection=optimal_selection(scores, choice),
        majority_optimal_selection=None if usual is None else float((usual >= top - metrics.TIE).mean()),
        regret=regret(scores, choice),
        regret_bits=_regret_bits(rows, choice),
        share=shares(rows.models, choice),
        calibration=calibration(prediction, scores),
        **({} if cost is None else _cost_figures(rows.models, prediction.quality, scores, cost, lines.expected_cost)),
        **({} if pair is None else _pair_figures(pair, rows.models, prediction.quality, scores)),
        tasks=_by_task(rows, choice),
    )


def _cost_figures(
    experts: Sequence[str], predicted: NDArray[np.float32], scores: Matrix, cost: Matrix, expected: Matrix | None
) -> dict[str, Any]:
    """AIQ, that of the single experts, and the collapse along the budget.

    Experts are expected to cost what they did on average in training, which a router may know; where nobody says, what
    they do on these rows.
    """
    curve = metrics.cost_quality_curve(predicted, cost.mean(axis=0) if expected is None else expected, scores, cost)
    return {
        "aiq": metrics.aiq(curve, cost),
        "aiq_hull": metrics.aiq_of_singles(scores, cost),
        "collapse": metrics.collapse(experts, curve, cost),
    }


def check_pair(pair: tuple[str, str], experts: Sequence[str]) -> None:
    """Raises `TableError` where these are not two of the experts."""
    for name in pair:
        if name not in experts:
            raise TableError(f"pair: the router has no expert {name!r} (it has: {', '.join(experts)})")
    if pair[0] == pair[1]:
        raise TableError(f"pair: {pair[0]} stands on both sides; name a weak and a strong expert")


def _pair_figures(
    pair: tuple[str, str], experts: Sequence[str], predicted: NDArray[np.float32], scores: Matrix
) -> dict[str, Any]:
    check_pair(pair, experts)
    weak, strong = (experts.index(name) for name in pair)
    margin = predicted[:, strong].astype(np.float64) - predicted[:, weak]
    try:
        curve = metrics.performance_gap_recovered(margin, scores[:, weak], scores[:, strong])
    except ValueError as error:
        means = scores.mean(axis=0)
        raise TableError(
            f"pair {pair[0]}:{pair[1]}: {error} ({means[weak]:.4f} and {means[strong]:.4f}); is it the wrong way round?"
        ) from None
    return {
        "pair": list(pair),
        "apgr": metrics.apgr(curve),
        "cpt50": metrics.cpt(curve, 0.5),
        "cpt80": metrics.cpt(curve, 0.8),
    }


def _regret_bits(rows: Table, choice: NDArray[np.intp]) -> float | None:
    return None if rows.loss is None else regret(-rows.loss, choice)


def calibration(prediction: Prediction, scores: Matrix, bins: int = 5) -> dict[str, Any]:
    """Whether the predicted standard deviation is the one seen.

    `z_rms` is the root mean square of residual / predicted deviation (1 is right, more is over-confident);
    `within_1sd` and `within_2sd` are shares of residuals (.683 and .954 for Gaussian ones); `bins` compares the
    predicted deviation with the root mean squared residual in groups of equal size.
    """
    residual = (scores - prediction.quality).ravel()
    deviation = prediction.uncertainty.astype(np.float64).ravel()
    z = np.abs(residual) / np.maximum(deviation, 1e-9)
    groups = [g for g in np.array_split(np.argsort(deviation, kind="stable"), bins) if len(g)]
    return {
        "z_rms": float(np.sqrt(np.mean(z**2))),
        "within_1sd": float((z <= 1).mean()),
        "within_2sd": float((z <= 2).mean()),
        "bins": [
            {
                "predicted": float(deviation[g].mean()),
                "observed": float(np.sqrt(np.mean(residual[g] ** 2))),
                "n": len(g),
            }
            for g in groups
        ],
    }


def _by_task(rows: Table, choice: NDArray[np.intp]) -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    tasks = np.array(rows.task)
    for task in sorted(set(rows.task)):
        mask = tasks == task
        part, picked = rows.rows(mask), choice[mask]
        got, means = taken(part.score, picked), part.score.mean(axis=0)
        top = part.score.max(axis=1)
        out[task or "(none)"] = {
            "rows": len(part),
            "quality": float(got.mean()),
            "quality_se": standard_error(got),
            "best_single": float(means.max()),
            "best_single_expert": rows.models[int(means.argmax())],
            "random": float(means.mean()),
            "oracle": float(top.mean()),
            "optimal_selection": optimal_selection(part.score, picked),
            "regret": regret(part.score, picked),
            "regret_bits": _regret_bits(part, picked),
            "share": shares(rows.models, picked),
        }
    return out
