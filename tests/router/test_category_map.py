"""The category-to-expert map: the integer programme against brute force, the budget curve, the shrunk means."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from signalbox.router.category_map import (
    CategoryMap,
    Matrix,
    budget_curve,
    category_quality,
    cross_fitted,
    frequencies,
    routed_score,
    solve_map,
)
from signalbox.router.table import TableError


def brute_force(quality: Matrix, frequency: Matrix, sizes: Matrix, budget: float | None) -> float:
    """The best expected quality over all subsets of experts that fit."""
    experts = range(len(sizes))
    best = -np.inf
    for count in range(1, len(sizes) + 1):
        for subset in combinations(experts, count):
            if budget is None or sizes[list(subset)].sum() <= budget * (1 + 1e-9):
                best = max(best, float(frequency @ quality[:, list(subset)].max(axis=1)))
    return best


@st.composite
def problems(draw: st.DrawFn) -> tuple[Matrix, Matrix, Matrix]:
    c, e = draw(st.integers(1, 6)), draw(st.integers(1, 7))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    quality = rng.random((c, e))
    if draw(st.booleans()):  # ties
        quality = quality.round(1)
    sizes = draw(st.lists(st.sampled_from([1, 2, 3, 7, 8, 13, 34, 70, 405]), min_size=e, max_size=e))
    return quality, rng.dirichlet(np.ones(c)), np.array(sizes) * 1e9


@settings(max_examples=60, deadline=None)
@given(problems(), st.floats(0.0, 1.2))
def test_the_milp_is_as_good_as_brute_force(problem: tuple[Matrix, Matrix, Matrix], share: float) -> None:
    quality, frequency, sizes = problem
    budget = sizes.min() + share * (sizes.sum() - sizes.min())
    found = solve_map(quality, frequency, sizes, budget)
    assert found.quality == pytest.approx(brute_force(quality, frequency, sizes, budget), abs=1e-9)
    _is_sound(found, quality, frequency, sizes)
    assert found.resident <= budget * (1 + 1e-9)


@settings(max_examples=15, deadline=None)
@given(problems())
def test_the_curve_rises_and_is_the_best_at_every_budget(problem: tuple[Matrix, Matrix, Matrix]) -> None:
    quality, frequency, sizes = problem
    curve = budget_curve(quality, frequency, sizes)
    assert all(a.quality < b.quality and a.resident < b.resident for a, b in pairwise(curve))
    assert curve[-1].quality == pytest.approx(brute_force(quality, frequency, sizes, None), abs=1e-9)
    assert curve[0].resident == sizes.min()
    for point in curve:
        _is_sound(point, quality, frequency, sizes)
    for budget in np.linspace(sizes.min(), sizes.sum(), 7):  # in between, a larger budget buys nothing
        here = max(p.quality for p in curve if p.resident <= budget * (1 + 1e-9))
        assert here == pytest.approx(brute_force(quality, frequency, sizes, budget), abs=1e-9)


def _is_sound(found: CategoryMap, quality: Matrix, frequency: Matrix, sizes: Matrix) -> None:
    assert len(found.experts) == len(quality) and set(found.experts) == set(found.kept)
    assert found.resident == pytest.approx(sizes[list(found.kept)].sum())
    assert found.quality == pytest.approx(
        sum(f * q[e] for f, q, e in zip(frequency, quality, found.experts, strict=True))
    )
    assert found.average_active == pytest.approx(frequency @ sizes[list(found.experts)])


def test_a_specialist_is_worth_its_parameters_only_where_it_serves_enough() -> None:
    """A generalist of 8 at .6 everywhere; specialists of 4 at .9 in their own category and .1 elsewhere."""
    quality = np.array([[0.6, 0.9, 0.1], [0.6, 0.1, 0.9]])
    sizes = np.array([8e9, 4e9, 4e9])
    assert solve_map(quality, np.array([0.5, 0.5]), sizes, 8e9).experts == (1, 2)  # both specialists fit together
    assert solve_map(quality, np.array([0.5, 0.5]), sizes, 7.9e9).kept in {(1,), (2,)}
    found = solve_map(quality, np.array([0.9, 0.1]), sizes, 4e9, active=np.array([8e9, 1e9, 4e9]))
    assert found.experts == (1, 1) and found.average_active == 1e9 and found.resident == 4e9
    assert found.quality == pytest.approx(0.9 * 0.9 + 0.1 * 0.1)


def test_a_budget_met_exactly_counts_and_one_a_hair_below_does_not() -> None:
    quality = np.array([[0.9, 0.1, 0.2], [0.1, 0.9, 0.2]])
    sizes = np.array([0.1, 0.2, 0.05])  # .1 + .2 is a hair more than .3
    frequency = np.array([0.5, 0.5])
    assert solve_map(quality, frequency, sizes, 0.3).kept == (0, 1)
    assert solve_map(quality, frequency, sizes, 0.3 * (1 - 1e-7)).kept != (0, 1)  # within the solver's own tolerance
    assert solve_map(quality, frequency, sizes, 0.3 * (1 - 1e-7)).resident < 0.3 * (1 - 1e-7)


def test_what_cannot_be_solved_is_refused() -> None:
    quality, frequency = np.array([[0.5, 0.6]]), np.array([1.0])
    with pytest.raises(TableError, match=r"smallest budget that works is 7e\+09"):
        solve_map(quality, frequency, np.array([8e9, 7e9]), 6.9e9)
    for budget in (float("nan"), -1.0, 0.0):
        with pytest.raises(TableError, match="holds no expert"):
            solve_map(quality, frequency, np.array([8e9, 7e9]), budget)
    for sizes in ([8e9, 0.0], [8e9, float("nan")], [8e9]):
        with pytest.raises(ValueError, match="sizes"):
            solve_map(quality, frequency, np.array(sizes), None)
    with pytest.raises(ValueError, match="shape"):
        solve_map(quality, np.array([0.5, 0.5]), np.array([1.0, 1.0]), None)


def test_shrinking_is_better_than_plain_means_and_stops_where_there_is_much_data() -> None:
    rng = np.random.default_rng(0)
    truth = 0.5 + 0.05 * rng.normal(size=(20, 4))
    plain, shrunk = [], []
    for _ in range(20):
        category = rng.permutation(np.repeat(np.arange(20), 15))
        scores = truth[category] + 0.3 * rng.normal(size=(300, 4))
        found = category_quality(scores, category, 20)
        means = np.array([scores[category == c].mean(axis=0) for c in range(20)])
        plain.append(((means - truth) ** 2).mean())
        shrunk.append(((found - truth) ** 2).mean())
    assert np.mean(shrunk) < 0.5 * np.mean(plain)
    category = np.repeat(np.arange(20), 20_000)
    scores = truth[category] + 0.3 * rng.normal(size=(len(category), 4))
    np.testing.assert_allclose(category_quality(scores, category, 20), truth, atol=0.008)


def test_a_category_without_rows_has_the_overall_means() -> None:
    scores = np.array([[0.2, 0.8], [0.4, 0.6], [0.3, 0.9], [0.1, 0.7]])
    found = category_quality(scores, np.array([0, 0, 2, 2]), 4)
    np.testing.assert_allclose(found[[1, 3]], np.broadcast_to(scores.mean(axis=0), (2, 2)))
    assert np.isfinite(category_quality(np.full((6, 2), 0.5), np.array([0, 1] * 3), 2)).all()  # no variance at all
    np.testing.assert_allclose(frequencies(np.array([0, 0, 2, 2]), 4), [0.5, 0, 0.5, 0])


def test_cross_fitting_does_not_see_the_row_itself() -> None:
    """On noise, the category's own rows seem to tell; left out, they do not."""
    rng = np.random.default_rng(1)
    scores, category, folds = rng.random((2000, 3)), rng.integers(0, 200, 2000), rng.integers(0, 5, 2000)
    guess = cross_fitted(scores, category, 200, folds)
    centred = guess - guess.mean(axis=0)
    assert abs((centred * (scores - scores.mean(axis=0))).mean()) < 5e-4
    routed = routed_score(scores, category, 200, folds, lambda q, f: solve_map(q, f, np.ones(3)))
    assert abs(routed.mean() - 0.5) < 4 * routed.std() / np.sqrt(2000)
    scores[np.arange(2000), category % 3] += 1.0
    routed = routed_score(scores, category, 200, folds, lambda q, f: solve_map(q, f, np.ones(3)))
    assert routed.mean() > 1.45
