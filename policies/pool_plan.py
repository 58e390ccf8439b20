"""Which experts to keep, and how many replicas of each: Composition of Experts' map under memory and traffic.

After Jain et al. (arXiv 2412.01868; papers.md, section 2): every category of prompts is served by one expert, and what
is kept fits the budget. `router.category_map` solves that for one copy of each expert. Here traffic is added: an expert
needs as many replicas as its categories keep busy, and all replicas together fit the memory. Pure functions of arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

Matrix = NDArray[Any]

ROUNDING = 1e-9
TOLERANCE = 1e-6  # the solver's, in replicas; of the memory that all replicas could take
LIMIT_S = 120.0
# HiGHS stops within 1e-6 of the optimum; so scaled, within 1e-10 of the quality.
OBJECTIVE_SCALE = 1e4
# Of two plans of the same quality the smaller one: all the memory together counts as little as this of the quality.
MEMORY_WEIGHT = 1e-7


class DoesNotFit(ValueError):
    """No plan fits the memory."""


@dataclass(frozen=True)
class PoolPlan:
    """Who serves each category, on how many replicas.

    experts: column for each category; replicas: int for each expert, 0 where it is not kept; quality: expected, by the
    categories' shares; memory: bytes of all replicas; busy: share of each expert's replicas that the traffic takes,
    NaN where it is not kept.
    """

    experts: tuple[int, ...]
    replicas: tuple[int, ...]
    quality: float
    memory: float
    busy: tuple[float, ...]


def solve_pool(
    quality: Matrix, frequency: Matrix, sizes: Matrix, demand: Matrix, memory: float | None = None
) -> PoolPlan:
    """The plan of greatest expected quality that fits `memory` (None: no limit), exactly; of equals the smallest.

    Args:
        quality: float [C, E] in [0, 1].
        frequency: float [C], the categories' shares of the traffic, summing to 1.
        sizes: float [E], bytes of one replica, above 0.
        demand: float [C, E], replicas of expert e that category c keeps busy; 0 where traffic is not counted.
        memory: bytes.

    Raises:
        DoesNotFit: no plan does; `least_memory` says what would.
        ValueError: shapes that do not agree, or figures that are not finite.
    """
    return _solve(quality, frequency, sizes, demand, memory, by_memory=False)


def least_memory(quality: Matrix, frequency: Matrix, sizes: Matrix, demand: Matrix) -> PoolPlan:
    """The plan that takes least memory and bears the traffic, whatever its quality. Arguments as for `solve_pool`."""
    return _solve(quality, frequency, sizes, demand, None, by_memory=True)


def _solve(
    quality: Matrix, frequency: Matrix, sizes: Matrix, demand: Matrix, memory: float | None, *, by_memory: bool
) -> PoolPlan:
    """A mixed-integer program. Variables: a[c, e] in {0, 1}, expert e serves category c, row by row; then r[e], whole
    numbers of replicas."""
    quality, frequency, sizes, demand = (np.asarray(v, dtype=np.float64) for v in (quality, frequency, sizes, demand))
    c, e = _checked(quality, frequency, sizes, demand)
    # One replica and all of a category's traffic on it bound what is ever needed.
    most = np.ceil(np.maximum(demand.sum(axis=0), 1.0) * (1 + ROUNDING))
    scale = float(sizes @ most)
    pairs = np.arange(c * e)  # a[c, e] as a column; r[e] is column c * e + e
    category, expert, ones = pairs // e, pairs % e, np.ones(c * e)
    kept = np.arange(e)

    def rows(parts: list[tuple[Matrix, Matrix, Matrix]], count: int) -> coo_array:
        values, row, column = (np.concatenate(part) for part in zip(*parts, strict=True))
        return coo_array((values, (row, column)), shape=(count, c * e + e))

    one_expert = rows([(ones, category, pairs)], c)
    only_kept = rows([(ones, pairs, pairs), (-ones, pairs, c * e + expert)], c * e)
    busy = rows([(demand.ravel(), expert, pairs), (-np.ones(e), kept, c * e + kept)], e)
    constraints = [
        LinearConstraint(one_expert, 1, 1),
        LinearConstraint(only_kept, -np.inf, 0),
        LinearConstraint(busy, -np.inf, 0),
    ]
    used = np.concatenate([np.zeros(c * e), sizes / scale])
    if memory is not None:
        constraints.append(LinearConstraint(used[None], -np.inf, memory / scale * (1 + ROUNDING)))
    worth = np.concatenate([(frequency[:, None] * quality).ravel(), np.zeros(e)])
    objective = used - MEMORY_WEIGHT * worth if by_memory else MEMORY_WEIGHT * used - worth
    found = milp(
        objective * OBJECTIVE_SCALE,
        integrality=np.ones(c * e + e),
        bounds=Bounds(0, np.concatenate([np.ones(c * e), most])),
        constraints=constraints,
        options={"mip_rel_gap": 0.0, "time_limit": LIMIT_S},
    )
    if found.status == 2:
        raise DoesNotFit("no plan fits the memory")
    if found.status == 1:
        raise ValueError(f"the plan was not solved in {LIMIT_S:g} s: take fewer experts, or coarser categories")
    if found.x is None:
        raise ValueError(f"the plan could not be solved: {found.message}")
    experts = found.x[: c * e].reshape(c, e).argmax(axis=1)
    load = np.bincount(experts, weights=demand[np.arange(c), experts], minlength=e)
    used_at_all = np.bincount(experts, minlength=e) > 0
    replicas = np.where(used_at_all, np.maximum(1, np.ceil(load - TOLERANCE)), 0).astype(int)
    return PoolPlan(
        experts=tuple(experts.tolist()),
        replicas=tuple(replicas.tolist()),
        quality=float(frequency @ quality[np.arange(c), experts]),
        memory=float(sizes @ replicas),
        busy=tuple((load[j] / replicas[j] if replicas[j] else float("nan")) for j in range(e)),
    )


def _checked(quality: Matrix, frequency: Matrix, sizes: Matrix, demand: Matrix) -> tuple[int, int]:
    if quality.ndim != 2 or 0 in quality.shape or frequency.shape != quality.shape[:1]:
        raise ValueError(f"quality has shape {quality.shape}, frequency {frequency.shape}: expected [C, E] and [C]")
    if sizes.shape != quality.shape[1:] or demand.shape != quality.shape:
        raise ValueError(f"sizes have shape {sizes.shape}, demand {demand.shape}: expected [E] and [C, E]")
    if not all(np.isfinite(v).all() for v in (quality, frequency, sizes, demand)):
        raise ValueError("all figures must be finite")
    if not ((sizes > 0).all() and (demand >= 0).all() and (frequency >= 0).all()):
        raise ValueError("sizes must be above 0, demand and frequencies not below")
    return quality.shape[0], quality.shape[1]
