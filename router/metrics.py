"""What a router's choices are worth: pure functions of measured scores, costs and predictions.

Shapes throughout: `scores` [n, E] in [0, 1] and `costs` [n, E] in US dollars are what each of E experts really scored
and cost on each of n prompts; `predicted` [n, E] and `expected_cost` ([E], or [n, E]) are all that the router saw when
it chose; `choice` int [n] are columns.

Sources: RouterBench (Hu et al., arXiv 2403.12031) for the cost-quality hull and AIQ; RouteLLM (Ong et al., arXiv
2406.18665) for PGR, APGR and CPT; Tryage (Hari & Thomson, arXiv 2308.11601) for optimal selection and regret.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Matrix = NDArray[np.floating]
Choice = NDArray[np.intp]

# Scores nearer than this are the same: a tie with the best is optimal.
TIE = 1e-9
# Price weights of the cost-quality curve, in units of (typical quality range) / (range of expected costs).
PRICE_WEIGHTS = np.concatenate([[0.0], np.geomspace(1e-4, 1e4, 161)])


def taken(values: Matrix, choice: Choice) -> Vector:
    """The chosen column's value on each row, float64 [n]."""
    return np.asarray(values[np.arange(len(values)), choice], dtype=np.float64)


def standard_error(values: Vector) -> float:
    """Standard error of the mean of independent values; 0 for a single one, of which nothing is known."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def optimal_selection(scores: Matrix, choice: Choice) -> float:
    """Share of prompts on which the chosen expert is the best or ties with it (Tryage)."""
    return float((taken(scores, choice) >= scores.max(axis=1) - TIE).mean())


def regret(scores: Matrix, choice: Choice) -> float:
    """Mean score given away against the best expert of each prompt, 0 or more (Tryage's excess loss)."""
    return float((scores.max(axis=1) - taken(scores, choice)).mean())


def shares(experts: Sequence[str], choice: Choice) -> dict[str, float]:
    """Share of the prompts that each expert gets; they add up to 1."""
    return {name: float((choice == e).mean()) for e, name in enumerate(experts)}


# Cost and quality (RouterBench)


@dataclass(frozen=True)
class CostQualityCurve:
    """A router at each of k price weights, from "price does not matter" to "only price matters".

    cost and quality: float64 [k], means over prompts of what the chosen experts really cost and scored;
    choices: int [k, n].
    """

    cost: Vector
    quality: Vector
    choices: NDArray[np.intp]


def cost_quality_curve(predicted: Matrix, expected_cost: Matrix, scores: Matrix, costs: Matrix) -> CostQualityCurve:
    """Choose the greatest predicted quality - weight * expected cost, for each of `PRICE_WEIGHTS`.

    The weight is the inverse of RouterBench's willingness to pay. The weights stand in proportion to the predictions'
    mean range over that of the costs, so the curve does not depend on the currency; the last point is the cheapest
    expected expert of each prompt, the better predicted among equals.
    """
    predicted = np.asarray(predicted, dtype=np.float64)
    expected = np.broadcast_to(np.asarray(expected_cost, dtype=np.float64), predicted.shape)
    quality_range = float((predicted.max(axis=1) - predicted.min(axis=1)).mean())
    cost_range = float((expected.max(axis=1) - expected.min(axis=1)).mean())
    unit = quality_range / cost_range if cost_range > 0 else 0.0
    picks = [(predicted - weight * unit * expected).argmax(axis=1) for weight in PRICE_WEIGHTS]
    cheapest = expected <= expected.min(axis=1, keepdims=True)
    picks.append(np.where(cheapest, predicted, -np.inf).argmax(axis=1))
    choices = np.stack(picks)
    cost = np.array([taken(costs, c).mean() for c in choices])
    quality = np.array([taken(scores, c).mean() for c in choices])
    return CostQualityCurve(cost, quality, choices)


def non_decreasing_hull(cost: Vector, quality: Vector) -> tuple[Vector, Vector]:
    """Upper convex hull of (cost, quality) points, from the cheapest to where quality stops rising (RouterBench).

    A point between two corners is reached by tossing a coin between them; past the last corner quality stays flat,
    for nobody has to pay more. Returns costs and qualities of the corners, both strictly increasing.
    """
    hull: list[tuple[float, float]] = []
    for i in np.lexsort((-np.asarray(quality), np.asarray(cost))):
        x, y = float(cost[i]), float(quality[i])
        if hull and y <= hull[-1][1]:
            continue
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x0) > (y - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, y))
    corners = np.array(hull)
    return corners[:, 0], corners[:, 1]


def area_under_hull(cost: Vector, quality: Vector, low: float, high: float) -> float:
    """Mean height, over costs in [low, high], of the points' non-decreasing hull.

    Below the cheapest point nothing can be had, so the height there is 0. Where low is high, the hull's height there.
    """
    x, y = non_decreasing_hull(cost, quality)

    def height(at: Vector) -> Vector:
        return np.interp(at, x, y)

    if high - low <= TIE * abs(high):  # one price for all, up to rounding
        affordable = high * (1 + TIE)
        return float(height(np.array([affordable]))[0]) if affordable >= x[0] else 0.0
    corners = np.unique(np.clip(np.concatenate([x, [max(low, x[0]), high]]), max(low, x[0]), high))
    return float(np.trapezoid(height(corners), corners) / (high - low)) if high > x[0] else 0.0


def aiq(curve: CostQualityCurve, costs: Matrix) -> float:
    """Average improvement in quality (RouterBench): the mean height of the router's non-decreasing convex hull over
    the range of costs from the cheapest to the dearest single expert. In [0, 1]; more is better."""
    single = costs.mean(axis=0)
    return area_under_hull(curve.cost, curve.quality, float(single.min()), float(single.max()))


def aiq_of_singles(scores: Matrix, costs: Matrix) -> float:
    """The same area under the hull of the single experts: what tossing a coin between two of them reaches without
    reading the prompt (RouterBench's "zero router"), which a router must exceed."""
    single = costs.mean(axis=0)
    return area_under_hull(single, scores.mean(axis=0), float(single.min()), float(single.max()))


def collapse(experts: Sequence[str], curve: CostQualityCurve, costs: Matrix, points: int = 11) -> list[dict[str, Any]]:
    """Share of the most chosen expert along the budget.

    A router has collapsed where that share comes near 1: it sends all prompts to one expert and might as well be that
    expert. Budgets are `points` evenly spaced mean costs in US dollars from the cheapest to the dearest single expert;
    at each, the router weighs price as little as it can afford. A budget below all its points gets the cheapest one.
    """
    single = costs.mean(axis=0)
    out = []
    for budget in np.linspace(single.min(), single.max(), points):
        affordable = np.flatnonzero(curve.cost <= budget * (1 + TIE))  # in order of rising price weight
        point = int(affordable[0]) if len(affordable) else int(curve.cost.argmin())
        counts = np.bincount(curve.choices[point], minlength=len(experts))
        out.append(
            {
                "budget": float(budget),
                "cost": float(curve.cost[point]),
                "quality": float(curve.quality[point]),
                "most_chosen": experts[int(counts.argmax())],
                "share": float(counts.max() / counts.sum()),
            }
        )
    return out


# A weak and a strong expert (RouteLLM)


def performance_gap_recovered(margin: Vector, weak: Vector, strong: Vector) -> Vector:
    """PGR float64 [n + 1] (RouteLLM) when the 0, 1, ..., n prompts of largest `margin` go to the strong expert.

    0 is the weak expert's mean score, 1 the strong one's; in between, a good router may exceed 1 and a bad one fall
    below 0. Prompts of equal margin get their average order, so a constant margin is the random router, a straight
    line.

    Args:
        margin: predicted score of the strong less that of the weak expert, [n].
        weak, strong: measured scores [n].

    Raises:
        ValueError: the strong expert is not better on the mean, so that there is no gap.
    """
    gain = np.asarray(strong, dtype=np.float64) - np.asarray(weak, dtype=np.float64)
    if gain.sum() <= TIE:
        raise ValueError("the strong expert is not better than the weak one on these rows")
    _, group = np.unique(-np.asarray(margin, dtype=np.float64), return_inverse=True)
    mean_of_ties = np.bincount(group, weights=gain) / np.bincount(group)
    curve = np.concatenate([[0.0], np.cumsum(mean_of_ties[np.sort(group)])]) / gain.sum()
    curve[-1] = 1.0  # by definition; the sum has rounding errors
    return curve


def apgr(gap_recovered: Vector) -> float:
    """Average PGR over the share of calls to the strong expert (RouteLLM), by the trapezoidal rule over all shares
    where the paper takes ten. The random router has 0.5."""
    return float((gap_recovered[1:] + gap_recovered[:-1]).mean() / 2)


def cpt(gap_recovered: Vector, target: float) -> float:
    """Call-performance threshold CPT(target) (RouteLLM): the least share of calls to the strong expert that recovers
    `target`, in [0, 1], of the gap. The random router needs a share of `target`."""
    if not 0 <= target <= 1:
        raise ValueError(f"the share of the gap to recover must lie in [0, 1], got {target:g}")
    return float(np.argmax(gap_recovered >= target - TIE) / (len(gap_recovered) - 1))
