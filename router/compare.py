"""All kinds of router side by side on one table, and the choice among them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from signalbox.router import metrics
from signalbox.router.artifact import Artifact, Report, predictor_class
from signalbox.router.base import Facts, Prediction, Prompt
from signalbox.router.crossvalidate import FOLDS, CrossValidated, cross_validate, folds_of, lines_of_folds
from signalbox.router.encoder import Encoder, encode_all
from signalbox.router.evaluate import evaluate, figures_of, unseen
from signalbox.router.judge import WIN, Evaluation, Lines, check_pair, judge, lines_of
from signalbox.router.kinds import KINDS
from signalbox.router.metrics import Vector, standard_error, taken
from signalbox.router.table import Table, TableError
from signalbox.router.train import prompt_hash, training_facts

Objective = Literal["quality", "aiq", "apgr"]
SINGLE, COMPOUND = "single", "cascade"
# Resamples of the prompts, for standard errors of figures that are no mean over prompts.
RESAMPLES = 100
# Decisions timed for each kind.
DECISIONS = 40


def all_kinds() -> list[str]:
    """Every kind that learns to tell prompts apart."""
    return [kind for kind in KINDS if kind != SINGLE]


@dataclass(frozen=True)
class Contender:
    """One kind of router on the judged rows. `error` says why it could not be fitted; the others are None then."""

    kind: str
    prediction: Prediction | None = None
    evaluation: Evaluation | None = None
    fit_s: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Comparison:
    """Contenders in the order asked for, on the same `rows`; `folds` is 0 where they are of a table of their own."""

    rows: Table
    contenders: list[Contender]
    folds: int
    pair: tuple[str, str] | None = None
    lines: Lines = field(default_factory=Lines)

    @property
    def fitted(self) -> list[Contender]:
        """Those that could be fitted, best mean quality first."""
        able = [c for c in self.contenders if c.evaluation is not None]
        return sorted(able, key=lambda c: -c.evaluation.quality if c.evaluation else 0.0)

    def to_json(self) -> dict[str, Any]:
        """Kind -> the evaluation as `router eval` writes it, or {"error": reason}."""
        return {
            c.kind: {"error": c.error} if c.evaluation is None else c.evaluation.to_json() | {"fit_s": c.fit_s}
            for c in self.contenders
        }


def compare(
    table: Table,
    encoder: Encoder,
    *,
    kinds: Sequence[str],
    test: Table | None = None,
    pool: Sequence[str] | None = None,
    pair: tuple[str, str] | None = None,
    folds: int = FOLDS,
    seed: int = 0,
    facts: Facts | None = None,
    report: Report | None = None,
) -> Comparison:
    """Fit every kind and judge it: on the rows of `test` that are not in `table`, or by cross-validation without one.

    A kind that cannot learn from this table is named with its reason and does not stop the others. Raises `TableError`
    (columns, too few rows, no such pair).
    """
    known = table.pool(pool).complete()
    if pair is not None:
        check_pair(pair, known.models)
    if test is not None:
        return _on_test(known, test.pool(known.models).complete(), encoder, kinds, pair, seed, facts, report)
    parts = folds_of(known, folds)
    lines = lines_of_folds(known, encoder, parts, report)
    found: dict[str, CrossValidated] = {}
    failed: dict[str, str] = {}
    # What is made of others comes first: their predictions come with it.
    for kind in sorted(kinds, key=lambda k: k != COMPOUND):
        if kind in found:
            continue
        try:
            found |= cross_validate(kind, known, encoder, parts, seed=seed, facts=facts, report=report)
        except TableError as error:
            failed[kind] = str(error)
    contenders = []
    for kind in kinds:
        if kind in failed:
            contenders.append(Contender(kind, error=failed[kind]))
            continue
        fold = found[kind]
        held = known.rows(fold.held)
        evaluation = replace(
            judge(known, fold.prediction, lines, pair=pair), **figures_of(fold.last, held, encoder, DECISIONS)
        )
        contenders.append(Contender(kind, fold.prediction, evaluation, fold.fit_s))
    return Comparison(known, contenders, folds, pair, lines)


def _on_test(
    known: Table,
    test: Table,
    encoder: Encoder,
    kinds: Sequence[str],
    pair: tuple[str, str] | None,
    seed: int,
    facts: Facts | None,
    report: Report | None,
) -> Comparison:
    figures = training_facts(known)
    seen = np.unique(np.array([prompt_hash(p) for p in known.prompt], dtype=np.int64))
    noted = Artifact("", known.models, {"seen": seen}, training=figures)
    neighbours: dict[str, NDArray[Any]] = {
        "embeddings": encode_all(encoder, known.prompt, report or (lambda step, done, of: None)),
        "scores": known.score,
    }
    rows = unseen(test, noted)
    contenders = []
    for number, kind in enumerate(kinds):
        if report:
            report("fitting and judging", number, len(kinds))
        started = time.perf_counter()
        try:
            predictor = predictor_class(kind).fit(known, encoder, seed=seed, facts=facts)
        except TableError as error:
            contenders.append(Contender(kind, error=str(error)))
            continue
        took = time.perf_counter() - started
        found = evaluate(
            predictor, test, encoder, artifact=noted, neighbours=neighbours, pair=pair, decisions=DECISIONS
        )
        prediction = predictor.predict([Prompt(p) for p in rows.prompt])
        contenders.append(Contender(kind, prediction, found, took))
    if report:
        report("fitting and judging", len(kinds), len(kinds))
    return Comparison(rows, contenders, 0, pair, lines_of(rows, figures))


# Choosing

# Cross-validating every kind on more rows than this takes longer than the difference is worth.
CHOOSING_ROWS = 4000


@dataclass(frozen=True)
class Choice:
    """The kind to serve. `gains` has for each kind its objective less that of no router, and the standard error."""

    kind: str
    objective: Objective
    reference: float
    gains: dict[str, tuple[float, float]]

    def to_json(self) -> dict[str, Any]:
        """For the artifact's training figures."""
        gains = {kind: {"gain": gain, "se": error} for kind, (gain, error) in self.gains.items()}
        return {"chosen_by": self.objective, "choice": self.reason, "compared": gains}

    @property
    def reason(self) -> str:
        """In a sentence."""
        name = {"quality": "mean quality", "aiq": "AIQ", "apgr": "APGR"}[self.objective]
        if self.kind != SINGLE:
            gain, error = self.gains[self.kind]
            return f"{self.kind} has the best {name}: {gain:+.4f} ± {error:.4f} over no router ({self.reference:.4f})"
        if not self.gains:
            return "no router could be fitted on this table: the best single expert is served"
        kind, (gain, error) = max(self.gains.items(), key=lambda item: item[1][0])
        return (
            f"no router beats the best single expert on this table by {WIN:g} standard errors "
            f"(the nearest, {kind}: {gain:+.4f} ± {error:.4f} in {name}): the best single expert is served"
        )


def best_kind(
    table: Table,
    encoder: Encoder,
    *,
    objective: Objective = "quality",
    pair: tuple[str, str] | None = None,
    kinds: Sequence[str] | None = None,
    seed: int = 0,
    facts: Facts | None = None,
    report: Report | None = None,
) -> tuple[Choice, Comparison]:
    """Cross-validate the kinds (default: all) on at most `CHOOSING_ROWS` rows of a table and choose.

    Raises `TableError` as `compare` and `choose` do.
    """
    known = table.complete()
    known = known.rows(known.sample(CHOOSING_ROWS))
    comparison = compare(known, encoder, kinds=kinds or all_kinds(), pair=pair, seed=seed, facts=facts, report=report)
    return choose(comparison, objective, seed), comparison


def choose(comparison: Comparison, objective: Objective = "quality", seed: int = 0) -> Choice:
    """The kind with the greatest objective, or `single` where none exceeds no router by two standard errors.

    No router is: the best single expert (quality), the single experts' hull (aiq), tossing a coin (apgr). Raises
    `TableError` where the table lacks what the objective needs.
    """
    rows = comparison.rows
    if objective == "apgr" and comparison.pair is None:
        raise TableError("the objective apgr needs a pair WEAK:STRONG")
    if objective == "aiq" and ("cost" not in rows.measures or np.isnan(rows.measures["cost"]).any()):
        raise TableError("the objective aiq needs a cost:<model> for every row")
    gains = {}
    for c in comparison.fitted:
        if c.prediction is not None:
            gains[c.kind] = _gain(comparison, c.prediction, objective, seed)
    ms = {c.kind: (c.evaluation.decision_ms or {}).get("p50", 0.0) for c in comparison.fitted if c.evaluation}
    winner = max(gains, key=lambda kind: (round(gains[kind][0], 6), -ms[kind]), default=SINGLE)  # of equals the fastest
    if winner != SINGLE and not (gains[winner][0] > WIN * gains[winner][1] and gains[winner][0] > 0):
        winner = SINGLE
    if objective == "quality":
        reference = float(rows.score.mean(axis=0).max())
    elif objective == "aiq":
        reference = metrics.aiq_of_singles(rows.score, rows.measures["cost"])
    else:
        reference = 0.5
    return Choice(winner, objective, reference, gains)


def _gain(comparison: Comparison, prediction: Prediction, objective: Objective, seed: int) -> tuple[float, float]:
    """How far the objective exceeds that of no router, and the standard error of this paired difference."""
    rows = comparison.rows
    if objective == "quality":
        got = taken(rows.score, prediction.quality.argmax(axis=1))
        gain = got - rows.score[:, int(rows.score.mean(axis=0).argmax())]
        return float(gain.mean()), standard_error(gain)
    value = _aiq_gain if objective == "aiq" else _apgr_gain
    every = np.arange(len(rows))
    rng = np.random.default_rng(seed)
    draws = [value(comparison, prediction, rng.choice(every, len(every))) for _ in range(RESAMPLES)]
    return value(comparison, prediction, every), float(np.std([d for d in draws if np.isfinite(d)], ddof=1))


def _aiq_gain(comparison: Comparison, prediction: Prediction, rows: NDArray[np.intp]) -> float:
    scores, cost = comparison.rows.score[rows], comparison.rows.measures["cost"][rows]
    expected = comparison.lines.expected_cost
    curve = metrics.cost_quality_curve(
        prediction.quality[rows], cost.mean(axis=0) if expected is None else expected[rows], scores, cost
    )
    return metrics.aiq(curve, cost) - metrics.aiq_of_singles(scores, cost)


def _apgr_gain(comparison: Comparison, prediction: Prediction, rows: NDArray[np.intp]) -> float:
    assert comparison.pair is not None
    weak, strong = (comparison.rows.models.index(name) for name in comparison.pair)
    scores, quality = comparison.rows.score[rows], prediction.quality[rows].astype(np.float64)
    margin: Vector = quality[:, strong] - quality[:, weak]
    try:
        curve = metrics.performance_gap_recovered(margin, scores[:, weak], scores[:, strong])
    except ValueError:  # a resample in which the strong expert is not better has no gap
        return float("nan")
    return metrics.apgr(curve) - 0.5
