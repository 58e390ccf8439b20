"""The pool's plan against exhaustive search, and against the map without traffic."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from signalbox.policies.pool_plan import DoesNotFit, least_memory, solve_pool
from signalbox.router.category_map import solve_map


def exhaustive(quality: Any, frequency: Any, sizes: Any, demand: Any) -> list[tuple[float, float]]:
    """Quality and memory of every assignment of categories to experts."""
    c, e = quality.shape
    found = []
    for experts in itertools.product(range(e), repeat=c):
        load = [sum(demand[i, j] for i in range(c) if experts[i] == j) for j in range(e)]
        memory = sum(sizes[j] * max(1, math.ceil(load[j] - 1e-9)) for j in set(experts))
        found.append((float(sum(frequency[i] * quality[i, experts[i]] for i in range(c))), memory))
    return found


def case(seed: int, c: int, e: int, traffic: float) -> tuple[Any, ...]:
    rng = np.random.default_rng(seed)
    quality, sizes = rng.uniform(0, 1, (c, e)), rng.integers(1, 20, e).astype(float) * 1e9
    frequency = rng.dirichlet(np.ones(c))
    return quality, frequency, sizes, rng.uniform(0, traffic, (c, e))


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 4), st.sampled_from([0.0, 1.5, 6.0]), st.floats(0.1, 2)
)
def test_no_assignment_is_better(seed: int, c: int, e: int, traffic: float, share: float) -> None:
    quality, frequency, sizes, demand = case(seed, c, e, traffic)
    memory = share * sizes.sum()
    fitting = [(q, -m) for q, m in exhaustive(quality, frequency, sizes, demand) if m <= memory * (1 + 1e-9)]
    if not fitting:
        with pytest.raises(DoesNotFit):
            solve_pool(quality, frequency, sizes, demand, memory)
        smallest = min(m for _, m in exhaustive(quality, frequency, sizes, demand))
        assert least_memory(quality, frequency, sizes, demand).memory == pytest.approx(smallest)
        return
    plan = solve_pool(quality, frequency, sizes, demand, memory)
    assert plan.quality == pytest.approx(max(fitting)[0], abs=1e-6) and plan.memory <= memory * (1 + 1e-9)
    for j, (replicas, busy) in enumerate(zip(plan.replicas, plan.busy, strict=True)):
        load = sum(demand[i, j] for i in range(c) if plan.experts[i] == j)
        assert (replicas > 0) == (j in plan.experts)
        assert load <= replicas + 1e-6 and (not replicas or busy == pytest.approx(load / replicas))


def test_without_traffic_it_is_the_composition_s_map() -> None:
    quality, frequency, sizes, demand = case(7, 6, 5, 0.0)
    for budget in (sizes.min(), sizes.sum() / 3, sizes.sum()):
        plan, known = (
            solve_pool(quality, frequency, sizes, demand, budget),
            solve_map(quality, frequency, sizes, budget),
        )
        assert plan.quality == pytest.approx(known.quality, abs=1e-6)
        assert plan.memory <= known.resident and set(plan.replicas) <= {0, 1}


def test_traffic_moves_a_category_to_an_expert_that_bears_it() -> None:
    """The best expert would need four replicas where there is room for two: the cheaper one takes the busy category."""
    quality, frequency, sizes = np.array([[0.9, 0.8], [0.9, 0.5]]), np.array([0.5, 0.5]), np.array([10.0, 2.0])
    assert solve_pool(quality, frequency, sizes, np.zeros((2, 2)), 20).experts == (0, 0)
    busy = np.array([[2.5, 0.5], [1.0, 0.5]])
    plan = solve_pool(quality, frequency, sizes, busy, 20)
    assert (plan.experts, plan.replicas, plan.memory) == ((1, 0), (1, 1), 12)
    with pytest.raises(DoesNotFit):
        solve_pool(quality, frequency, sizes, busy, 1)
    assert least_memory(quality, frequency, sizes, busy).memory == 2
    assert solve_pool(quality, frequency, sizes, busy).replicas == (4, 0), "no limit"


def test_figures_that_make_no_sense() -> None:
    good = case(1, 2, 3, 1.0)
    for position, wrong in ((1, np.ones(5)), (2, np.array([0.0, 1, 1])), (3, -good[3]), (0, good[0] * np.nan)):
        arguments = list(good)
        arguments[position] = wrong
        with pytest.raises(ValueError, match=r"expected|must be"):
            solve_pool(*arguments)
