"""Composition of Experts, step 2: which expert serves which category, under a budget on resident parameters.

After Jain et al. (arXiv 2412.01868): maximise sum_c pi_c sum_e a[c, e] quality[c, e], where every category c is served
by one expert (a), only kept experts (z) serve, and the sizes of the kept ones fit the budget. Pure functions of arrays:
`quality` float [C, E] in [0, 1], `frequency` float [C] summing to 1, `sizes` and `active` float [E] in parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from signalbox.router.table import TableError

Matrix = NDArray[Any]
# Sums of sizes are compared up to rounding.
ROUNDING = 1e-9
# HiGHS stops within 1e-6 of the optimum of the objective; scaled by this, within 1e-10 of the quality.
OBJECTIVE_SCALE = 1e4


@dataclass(frozen=True)
class CategoryMap:
    """An expert (column) for each category, and what that is worth.

    kept: columns that some category uses, ascending; quality: expected quality; resident: parameters of all kept
    experts together; average_active: mean over prompts of the active parameters of the expert that serves them (the
    x-axis of the paper's plots, which is not the budget).
    """

    experts: tuple[int, ...]
    kept: tuple[int, ...]
    quality: float
    resident: float
    average_active: float


def solve_map(
    quality: Matrix, frequency: Matrix, sizes: Matrix, budget: float | None = None, active: Matrix | None = None
) -> CategoryMap:
    """The best map whose kept experts have `budget` parameters together at most (None: no limit), exactly.

    Raises `TableError` where the budget holds no expert at all (the message says the smallest that does), and
    `ValueError` for sizes that are not positive or shapes that do not fit.
    """
    quality, frequency, sizes, active = _checked(quality, frequency, sizes, active)
    if budget is None or sizes.sum() <= budget * (1 + ROUNDING):
        allowed = np.ones(len(sizes), dtype=bool)
    elif not budget >= sizes.min() * (1 - ROUNDING):  # NaN is refused too
        raise TableError(
            f"a budget of {budget:.6g} parameters holds no expert: the smallest budget that works is {sizes.min():.6g}"
        )
    else:
        allowed = _kept_by_milp(quality, frequency, sizes, budget)
    experts = np.where(allowed, quality, -np.inf).argmax(axis=1)
    kept = np.unique(experts)
    return CategoryMap(
        experts=tuple(experts.tolist()),
        kept=tuple(kept.tolist()),
        quality=float(frequency @ quality[np.arange(len(quality)), experts]),
        resident=float(sizes[kept].sum()),
        average_active=float(frequency @ active[experts]),
    )


def _kept_by_milp(quality: Matrix, frequency: Matrix, sizes: Matrix, budget: float) -> Matrix:
    """The kept experts, bool [E], by `scipy.optimize.milp`. Variables: a[c, e] row by row, then z[e].

    For given z the best a gives each category its best kept expert, so a may be declared continuous and is 0 or 1
    all the same; the search branches on z alone.
    """
    c, e = quality.shape
    a = np.arange(c * e).reshape(c, e)
    z = np.broadcast_to(c * e + np.arange(e), (c, e))
    ones, rows = np.ones(c * e), np.arange(c * e)
    one_expert = coo_array((ones, (np.repeat(np.arange(c), e), rows)), shape=(c, c * e + e))
    pairs = np.concatenate([rows, rows]), np.concatenate([a.ravel(), z.ravel()])
    only_kept = coo_array((np.concatenate([ones, -ones]), pairs), shape=(c * e, c * e + e))
    within = np.concatenate([np.zeros(c * e), sizes / budget])
    constraints = [
        LinearConstraint(one_expert, 1, 1),
        LinearConstraint(only_kept, -np.inf, 0),
        LinearConstraint(within[None], -np.inf, 1),
    ]
    objective = np.concatenate([-(frequency[:, None] * quality).ravel() * OBJECTIVE_SCALE, np.zeros(e)])
    integral = np.concatenate([np.zeros(c * e), np.ones(e)])
    while True:
        found = milp(
            objective, integrality=integral, bounds=Bounds(0, 1), constraints=constraints, options={"mip_rel_gap": 0.0}
        )
        if found.x is None:
            raise ValueError(f"the category-to-expert map could not be solved: {found.message}")
        kept = found.x[c * e :] > 0.5
        if sizes[kept].sum() <= budget * (1 + ROUNDING):
            return np.asarray(kept)
        # The solver's tolerance of 1e-6 let in a set that is too large: forbid it (and all that hold it).
        cut = np.concatenate([np.zeros(c * e), kept.astype(float)])
        constraints.append(LinearConstraint(cut[None], -np.inf, kept.sum() - 1))


def budget_curve(quality: Matrix, frequency: Matrix, sizes: Matrix, active: Matrix | None = None) -> list[CategoryMap]:
    """The best map at every budget at which a better one becomes possible: from one expert to as many as are of use.

    Ascending and strictly increasing in both `resident`, which is the least budget that allows the map, and `quality`.
    Between two of them a larger budget buys nothing.
    """
    points: list[CategoryMap] = []
    smallest = float(np.min(sizes))
    budget: float | None = None
    while budget is None or budget >= smallest:
        found = solve_map(quality, frequency, sizes, budget, active)
        if points and found.quality >= points[-1].quality - 1e-12:
            points.pop()  # as good, and smaller
        points.append(found)
        budget = found.resident * (1 - 1e-7)
    return points[::-1]


# What the map is made from


def category_quality(scores: Matrix, category: Matrix, count: int) -> Matrix:
    """Mean score of each expert in each category, float64 [C, E], shrunk towards the expert's overall mean.

    Empirical Bayes (method of moments): how hard a category is for all experts, and how much better than that an
    expert is in it, each keep the share between / (between + within / rows) of their deviation from the overall mean;
    the variance between categories is what the sampling error does not explain. A category without rows gets the
    experts' overall means. `scores` float [n, E]; `category` int [n] in [0, count).
    """
    overall = scores.mean(axis=0)
    residual = scores - overall
    level = residual.mean(axis=1, keepdims=True)
    return overall + _shrunk(level, category, count) + _shrunk(residual - level, category, count)


def _shrunk(values: Matrix, category: Matrix, count: int) -> Matrix:
    """Category means [C, k] of values [n, k] with mean 0, shrunk towards 0."""
    n = len(values)
    rows = np.bincount(category, minlength=count).astype(np.float64)
    sums = np.zeros((count, values.shape[1]))
    np.add.at(sums, category, values)
    means = sums / np.maximum(rows, 1)[:, None]
    groups = int((rows > 0).sum())
    if groups < 2 or n <= groups:
        return np.zeros_like(means)
    within = ((values - means[category]) ** 2).sum(axis=0) / (n - groups)  # [k]
    # E[sum_c rows * mean^2] = between * (n - sum rows^2 / n) + (groups - 1) * within, all columns pooled.
    excess = (rows[:, None] * means**2).sum(axis=0) - (groups - 1) * within
    between = max(0.0, float(excess.mean()) / (n - float((rows**2).sum()) / n))
    noise = within / np.maximum(rows, 1)[:, None]
    total = between + noise
    return means * np.divide(between, total, out=np.zeros_like(total), where=total > 0)


def cross_fitted(scores: Matrix, category: Matrix, count: int, folds: Matrix) -> Matrix:
    """Each row's category quality from the rows of the other folds, float64 [n, E]."""
    out = np.empty(scores.shape)
    for fold in np.unique(folds):
        held = folds == fold
        out[held] = category_quality(scores[~held], category[~held], count)[category[held]]
    return out


def routed_score(
    scores: Matrix, category: Matrix, count: int, folds: Matrix, solve: Callable[[Matrix, Matrix], CategoryMap]
) -> Matrix:
    """Score [n] of the expert that each row gets from a map made without its fold; `solve(quality, frequency)`."""
    out = np.empty(len(scores))
    for fold in np.unique(folds):
        held = folds == fold
        known = category[~held]
        found = solve(category_quality(scores[~held], known, count), frequencies(known, count))
        out[held] = scores[held, np.array(found.experts)[category[held]]]
    return out


def frequencies(category: Matrix, count: int) -> Matrix:
    """Share of the rows in each category, float64 [C]."""
    return np.bincount(category, minlength=count) / max(1, len(category))


def _checked(
    quality: Matrix, frequency: Matrix, sizes: Matrix, active: Matrix | None
) -> tuple[Matrix, Matrix, Matrix, Matrix]:
    quality, frequency, sizes = (np.asarray(v, dtype=np.float64) for v in (quality, frequency, sizes))
    active = sizes if active is None else np.asarray(active, dtype=np.float64)
    if quality.ndim != 2 or 0 in quality.shape or frequency.shape != quality.shape[:1]:
        raise ValueError(f"quality has shape {quality.shape}, frequency {frequency.shape}: expected [C, E] and [C]")
    if sizes.shape != quality.shape[1:] or active.shape != sizes.shape:
        raise ValueError(f"{quality.shape[1]} experts need as many sizes and active sizes")
    if not (np.isfinite(quality).all() and np.isfinite(frequency).all() and (frequency >= 0).all()):
        raise ValueError("quality and frequency must be finite, and frequencies not negative")
    if not all(np.isfinite(v).all() and (v > 0).all() for v in (sizes, active)):
        raise ValueError("sizes must be positive, finite numbers of parameters")
    return quality, frequency, sizes, active
