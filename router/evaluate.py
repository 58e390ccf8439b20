"""What a router is worth on rows it has not seen, beside the lines that every router must be held against."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from signalbox.router import metrics
from signalbox.router.artifact import Artifact
from signalbox.router.base import Prediction, Predictor, Prompt
from signalbox.router.encoder import Encoder
from signalbox.router.metrics import optimal_selection, regret, shares, standard_error, taken
from signalbox.router.table import Table, TableError
from signalbox.router.train import prompt_hash

Matrix = NDArray[np.float64]
NEIGHBOUR_COUNTS = (5, 10, 20, 40, 80, 160)
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
    `decision_ms` is one prompt at a time, encoder included and its cache emptied, on `threads` torch threads.
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
    decision_ms: dict[str, float]
    threads: int
    aiq: float | None = None
    aiq_hull: float | None = None
    collapse: list[dict[str, Any]] | None = None
    pair: list[str] | None = None
    apgr: float | None = None
    cpt50: float | None = None
    cpt80: float | None = None
    bare_text_quality: float | None = None
    excluded_seen: int = 0
    excluded_incomplete: int = 0
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain types, for `--json`."""
        return asdict(self)


def evaluate(
    predictor: Predictor,
    table: Table,
    encoder: Encoder | None,
    *,
    artifact: Artifact | None = None,
    neighbours: dict[str, NDArray[Any]] | None = None,
    pair: tuple[str, str] | None = None,
    decisions: int = 100,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Judge `predictor` on the rows of `table` whose prompt is not among those that `artifact` was trained on.

    Args:
        predictor: any router; its experts must be columns of the table.
        table: measurements; rows that lack an expert are left out.
        encoder: for the kNN line and for emptying its cache before a decision is timed; None: no kNN line.
        artifact: gives the training prompts' hashes, the majority expert, each task's best and the mean costs.
        neighbours: training `embeddings` [n, d] and `scores` [n, E], experts as in `artifact`.
        pair: the weak and the strong expert for APGR and CPT.
        decisions: number of decisions to time.
        progress: called with (prompts encoded, of how many).

    Raises:
        TableError: an expert has no column, no row is left, or `pair` is none: an expert that is not the router's,
            or a strong one that is not better on these rows.
    """
    if pair is not None:
        _check_pair(pair, predictor.experts)
    pooled = table.pool(predictor.experts)
    complete = pooled.complete()
    rows = _unseen(complete, artifact)
    if not len(rows):
        raise TableError(
            f"no row is left to judge on: {len(pooled) - len(complete)} of {len(pooled)} lack an expert, "
            f"and the others were trained on"
        )
    if encoder is not None:
        _encode(rows, encoder, progress)
    prediction = predictor.predict([Prompt(p) for p in rows.prompt])
    knn = _knn_quality(rows, predictor, encoder, artifact, neighbours)
    bare = _bare_text_quality(rows, predictor)
    choice = prediction.quality.argmax(axis=1)
    scores = rows.score
    got, top = taken(scores, choice), scores.max(axis=1)
    means = scores.mean(axis=0)
    single = int(means.argmax())
    gain = got - scores[:, single]
    facts = artifact.training if artifact else {}
    usual = _column(predictor, facts.get("majority"))
    cost = rows.measures.get("cost")
    cost = None if cost is None or np.isnan(cost).any() else cost
    return Evaluation(
        experts=list(predictor.experts),
        rows=len(rows),
        quality=float(got.mean()),
        quality_se=standard_error(got),
        best_single=float(means[single]),
        best_single_expert=predictor.experts[single],
        gain=float(gain.mean()),
        gain_se=standard_error(gain),
        wins=bool(gain.mean() > WIN * standard_error(gain) and gain.mean() > 0),
        majority=None if usual is None else float(means[usual]),
        cheapest=None if cost is None else float(means[int(cost.mean(axis=0).argmin())]),
        random=float(means.mean()),
        knn=knn,
        told_task=_told_task(rows, predictor, facts.get("best_of_task")),
        oracle=float(top.mean()),
        optimal_selection=optimal_selection(scores, choice),
        majority_optimal_selection=None if usual is None else optimal_selection(scores, np.full(len(rows), usual)),
        regret=regret(scores, choice),
        regret_bits=_regret_bits(rows, choice),
        share=shares(predictor.experts, choice),
        calibration=calibration(prediction, scores),
        decision_ms=decision_ms(predictor, encoder, rows.prompt, decisions),
        threads=torch.get_num_threads(),
        **({} if cost is None else _cost_figures(predictor, prediction.quality, scores, cost, facts)),
        **({} if pair is None else _pair_figures(pair, predictor.experts, prediction.quality, scores)),
        bare_text_quality=bare,
        excluded_seen=len(complete) - len(rows),
        excluded_incomplete=len(pooled) - len(complete),
        tasks=_by_task(rows, predictor.experts, choice),
    )


def _unseen(rows: Table, artifact: Artifact | None) -> Table:
    if artifact is None or "seen" not in artifact.tensors:
        return rows
    seen = set(artifact.tensors["seen"].tolist())
    return rows.rows(np.array([prompt_hash(p) not in seen for p in rows.prompt], dtype=bool))


def _encode(rows: Table, encoder: Encoder, progress: Callable[[int, int], None] | None) -> None:
    """Fill the encoder's cache, from which prediction and kNN then take what they need."""
    encoder.reserve(len(rows))
    done = 0

    def count(n: int) -> None:
        nonlocal done
        done += n
        if progress:
            progress(done, len(rows))

    encoder.encode(rows.prompt, progress=count)


def _cost_figures(
    predictor: Predictor, predicted: NDArray[np.float32], scores: Matrix, cost: Matrix, facts: dict[str, Any]
) -> dict[str, Any]:
    """AIQ, that of the single experts, and the collapse along the budget.

    Experts cost what they did on average in training, which a router may know; where the artifact does not say, what
    they do on these rows.
    """
    known = facts.get("mean_cost") or {}
    expected = np.array(
        [known.get(name, mean) for name, mean in zip(predictor.experts, cost.mean(axis=0), strict=True)]
    )
    curve = metrics.cost_quality_curve(predicted, expected, scores, cost)
    return {
        "aiq": metrics.aiq(curve, cost),
        "aiq_hull": metrics.aiq_of_singles(scores, cost),
        "collapse": metrics.collapse(predictor.experts, curve, cost),
    }


def _check_pair(pair: tuple[str, str], experts: Sequence[str]) -> None:
    for name in pair:
        if name not in experts:
            raise TableError(f"pair: the router has no expert {name!r} (it has: {', '.join(experts)})")
    if pair[0] == pair[1]:
        raise TableError(f"pair: {pair[0]} stands on both sides; name a weak and a strong expert")


def _pair_figures(
    pair: tuple[str, str], experts: Sequence[str], predicted: NDArray[np.float32], scores: Matrix
) -> dict[str, Any]:
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


def _column(predictor: Predictor, name: str | None) -> int | None:
    return predictor.experts.index(name) if name in predictor.experts else None


def _told_task(rows: Table, predictor: Predictor, best: dict[str, str] | None) -> float | None:
    """Mean score of each task's best expert in training; None where a task or its expert is not known."""
    columns = [_column(predictor, (best or {}).get(task)) for task in rows.task]
    known = [c for c in columns if c is not None]
    return float(taken(rows.score, np.array(known)).mean()) if len(known) == len(rows) else None


def _bare_text_quality(rows: Table, predictor: Predictor) -> float | None:
    """Mean score when the router sees the user's own words without the instruction that the experts were given."""
    if rows.text is None or not any(rows.text):
        return None
    texts = [text or prompt for text, prompt in zip(rows.text, rows.prompt, strict=True)]
    choice = predictor.predict([Prompt(t) for t in texts]).quality.argmax(axis=1)
    return float(taken(rows.score, choice).mean())


def _knn_quality(
    rows: Table,
    predictor: Predictor,
    encoder: Encoder | None,
    artifact: Artifact | None,
    neighbours: dict[str, NDArray[Any]] | None,
) -> float | None:
    """kNN on embeddings, its number of neighbours tuned by leave-one-out on the training rows."""
    if neighbours is None or encoder is None:
        return None
    order = list(artifact.experts if artifact else predictor.experts)
    scores = neighbours["scores"][:, [order.index(e) for e in predictor.experts]].astype(np.float64)
    known = neighbours["embeddings"].astype(np.float32)
    counts = [k for k in NEIGHBOUR_COUNTS if k < len(known)] or [max(1, len(known) - 1)]
    tuning = slice(0, 4096)  # enough to choose a small integer
    near = _nearest(known[tuning], known, max(counts) + 1)[:, 1:]
    left_out = {k: taken(scores[tuning], scores[near[:, :k]].mean(axis=1).argmax(axis=1)).mean() for k in counts}
    best = max(counts, key=lambda k: (left_out[k], k))
    near = _nearest(encoder.encode(rows.prompt), known, best)
    return float(taken(rows.score, scores[near].mean(axis=1).argmax(axis=1)).mean())


def _nearest(queries: NDArray[np.float32], known: NDArray[np.float32], k: int) -> NDArray[np.intp]:
    """Positions int [n, k] of the k most similar known rows, nearest first."""
    out = []
    for start in range(0, len(queries), 1024):  # bounds the similarity matrix
        similarity = queries[start : start + 1024] @ known.T
        part = np.argpartition(-similarity, min(k, len(known) - 1), axis=1)[:, :k]
        order = np.argsort(-np.take_along_axis(similarity, part, axis=1), axis=1, kind="stable")
        out.append(np.take_along_axis(part, order, axis=1))
    return np.concatenate(out)


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


def decision_ms(predictor: Predictor, encoder: Encoder | None, prompts: Sequence[str], count: int) -> dict[str, float]:
    """Milliseconds of single predictions, with no embedding cached: percentiles p50 and p99."""
    timed = []
    predictor.predict([Prompt("warm up")])
    for i in range(count):
        prompt = [Prompt(prompts[i % len(prompts)])]
        if encoder is not None:
            encoder.clear()
        start = time.perf_counter()
        predictor.predict(prompt)
        timed.append((time.perf_counter() - start) * 1e3)
    return {"p50": float(np.percentile(timed, 50)), "p99": float(np.percentile(timed, 99))}


def _by_task(rows: Table, experts: Sequence[str], choice: NDArray[np.intp]) -> dict[str, dict[str, Any]]:
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
            "best_single_expert": experts[int(means.argmax())],
            "random": float(means.mean()),
            "oracle": float(top.mean()),
            "optimal_selection": optimal_selection(part.score, picked),
            "regret": regret(part.score, picked),
            "regret_bits": _regret_bits(part, picked),
            "share": shares(experts, picked),
        }
    return out
