"""Metrics against cases counted by hand, and what must hold for any table."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from signalbox.router import metrics

SMALL = st.integers(0, 2**32 - 1)


def drawn(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(predicted, scores, costs) of a table of random shape; every third has ties, every fifth equal prices."""
    rng = np.random.default_rng(seed)
    n, e = int(rng.integers(1, 40)), int(rng.integers(1, 6))
    scores, predicted = rng.random((n, e)), rng.random((n, e))
    costs = rng.random(e) * rng.uniform(0.5, 1.5, (n, e)) * 10.0 ** rng.integers(-6, 3)
    if seed % 3 == 0:
        scores, predicted = scores.round(), predicted.round(1)
    if seed % 5 == 0:
        costs[:] = 1.0
    return predicted, scores, costs


def test_selection_and_regret_by_hand() -> None:
    scores = np.array([[1.0, 0.0], [0.2, 0.6], [0.5, 0.5], [0.1, 0.9]])
    choice = np.array([0, 0, 1, 1])
    assert metrics.taken(scores, choice).tolist() == [1.0, 0.2, 0.5, 0.9]
    assert metrics.optimal_selection(scores, choice) == 0.75  # the tie counts
    assert metrics.regret(scores, choice) == pytest.approx(0.1)
    assert metrics.shares(["a", "b"], choice) == {"a": 0.5, "b": 0.5}
    assert metrics.standard_error(np.array([1.0, 3.0])) == pytest.approx(1.0)
    assert metrics.standard_error(np.array([1.0])) == 0.0


def test_the_hull_leaves_out_what_is_dominated() -> None:
    # (3, .5) lies under the segment from (1, .4) to (4, .8); (5, .7) costs more for less; (1, .3) is worse at a price.
    x, y = metrics.non_decreasing_hull(np.array([3.0, 5, 1, 4, 1]), np.array([0.5, 0.7, 0.3, 0.8, 0.4]))
    assert x.tolist() == [1, 4] and y.tolist() == [0.4, 0.8]


def test_the_hull_is_concave_where_three_points_count() -> None:
    x, y = metrics.non_decreasing_hull(np.array([0.0, 1, 2, 3]), np.array([0.0, 0.6, 0.9, 1.0]))
    assert x.tolist() == [0, 1, 2, 3] and y.tolist() == [0.0, 0.6, 0.9, 1.0]
    x, _ = metrics.non_decreasing_hull(np.array([0.0, 1, 2]), np.array([0.0, 0.5, 1.0]))
    assert x.tolist() == [0, 2]  # a point on the segment adds nothing


@pytest.mark.parametrize(
    ("low", "high", "area"),
    [
        (1.0, 3.0, 0.5),  # from .4 to .6 in a straight line
        (1.0, 5.0, (0.5 * 2 + 0.6 * 2) / 4),  # flat after the last point
        (0.0, 2.0, 0.45 / 2),  # nothing is to be had below 1
        (0.0, 0.5, 0.0),
        (3.0, 3.0, 0.6),
        (0.5, 0.5, 0.0),
        (2.0, 2.0, 0.5),
    ],
)
def test_area_by_hand(low: float, high: float, area: float) -> None:
    cost, quality = np.array([1.0, 3.0]), np.array([0.4, 0.6])
    assert metrics.area_under_hull(cost, quality, low, high) == pytest.approx(area)


def test_aiq_by_hand() -> None:
    """Cheap (1 $) is right on the first half, dear (3 $) on all: an oracle pays 2 $ for all of it."""
    scores = np.array([[1.0, 1.0], [1.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    costs = np.tile([1.0, 3.0], (4, 1))
    curve = metrics.cost_quality_curve(scores - [0.0, 1e-6], costs.mean(axis=0), scores, costs)
    # (1, .5), (2, 1), then flat: the mean height over [1, 3] is (.75 + 1) / 2.
    assert metrics.aiq(curve, costs) == pytest.approx(0.875)
    assert metrics.aiq_of_singles(scores, costs) == pytest.approx(0.75)
    blind = metrics.cost_quality_curve(np.tile([0.5, 1.0], (4, 1)), costs.mean(axis=0), scores, costs)
    assert metrics.aiq(blind, costs) == pytest.approx(0.75)  # a router that reads nothing has the singles' hull


def test_collapse_by_hand() -> None:
    scores = np.array([[1.0, 1.0], [1.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    costs = np.tile([1.0, 3.0], (4, 1))
    curve = metrics.cost_quality_curve(scores - [0.0, 1e-6], costs.mean(axis=0), scores, costs)
    line = metrics.collapse(["cheap", "dear"], curve, costs, points=3)
    assert [p["budget"] for p in line] == [1.0, 2.0, 3.0]
    assert [(p["most_chosen"], p["share"], p["quality"]) for p in line] == [
        ("cheap", 1.0, 0.5),
        ("cheap", 0.5, 1.0),
        ("cheap", 0.5, 1.0),  # more money, but no reason to spend it
    ]


@given(SMALL)
@example(1191)  # a row, and experts of almost one price
@settings(max_examples=60, deadline=None)
def test_what_holds_for_any_cost_quality_curve(seed: int) -> None:
    predicted, scores, costs = drawn(seed)
    curve = metrics.cost_quality_curve(predicted, costs.mean(axis=0), scores, costs)
    # The first point disregards price, the last quality.
    assert curve.quality[0] == pytest.approx(metrics.taken(scores, predicted.argmax(axis=1)).mean())
    assert curve.cost[-1] == pytest.approx(costs.mean(axis=0).min())
    x, y = metrics.non_decreasing_hull(curve.cost, curve.quality)
    assert (np.diff(x) > 0).all() and (np.diff(y) > 0).all()
    slopes = np.diff(y) / np.diff(x)
    assert (np.diff(slopes) <= 1e-9 * np.abs(slopes[1:]) + 1e-12).all()  # concave
    assert (np.interp(curve.cost, x, y) >= curve.quality - 1e-9).all()  # above every point
    assert 0 <= metrics.aiq(curve, costs) <= 1
    # Knowing the scores and the costs of each prompt is as good as it gets, up to the grid of price weights.
    oracle = metrics.cost_quality_curve(scores, costs, scores, costs)
    assert metrics.aiq(oracle, costs) >= metrics.aiq(curve, costs) - 0.02
    # Neither the currency nor the order of the rows matters.
    again = metrics.cost_quality_curve(predicted[::-1], 1000 * costs.mean(axis=0), scores[::-1], 1000 * costs[::-1])
    assert metrics.aiq(again, 1000 * costs) == pytest.approx(metrics.aiq(curve, costs), abs=1e-6)
    for point in metrics.collapse([str(e) for e in range(scores.shape[1])], curve, costs):
        assert 1 / scores.shape[1] - 1e-9 <= point["share"] <= 1
        assert point["cost"] <= point["budget"] * (1 + 1e-6) or point["cost"] == curve.cost.min()


def test_pgr_by_hand() -> None:
    weak, strong = np.array([0.0, 1.0, 0.0, 1.0]), np.array([1.0, 1.0, 1.0, 1.0])
    good = metrics.performance_gap_recovered(np.array([4.0, 1, 3, 2]), weak, strong)
    assert good.tolist() == [0, 0.5, 1, 1, 1]
    assert metrics.apgr(good) == pytest.approx((0.25 + 0.75 + 1 + 1) / 4)
    assert metrics.cpt(good, 0.5) == 0.25 and metrics.cpt(good, 0.8) == 0.5 and metrics.cpt(good, 0.0) == 0.0
    bad = metrics.performance_gap_recovered(-np.array([4.0, 1, 3, 2]), weak, strong)
    assert bad.tolist() == [0, 0, 0, 0.5, 1]
    assert metrics.cpt(bad, 0.5) == 0.75


def test_a_blind_router_recovers_half() -> None:
    rng = np.random.default_rng(0)
    weak = rng.random(50)
    strong = weak + rng.normal(0.1, 0.5, 50)
    curve = metrics.performance_gap_recovered(np.zeros(50), weak, strong)
    np.testing.assert_allclose(curve, np.linspace(0, 1, 51), atol=1e-12)
    assert metrics.apgr(curve) == pytest.approx(0.5)
    assert metrics.cpt(curve, 0.8) == pytest.approx(0.8)


@given(SMALL)
@settings(max_examples=60, deadline=None)
def test_what_holds_for_any_pair(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 60))
    weak = rng.random(n).round(1)
    strong = np.clip(weak + rng.normal(0.1, 0.4, n), 0, 1).round(1)
    if (strong - weak).sum() < 0.05:  # in tenths, and up to rounding
        with pytest.raises(ValueError, match="not better"):
            metrics.performance_gap_recovered(np.zeros(n), weak, strong)
        return
    margin = rng.normal(size=n).round(1)
    curve = metrics.performance_gap_recovered(margin, weak, strong)
    assert curve[0] == 0 and curve[-1] == 1 and len(curve) == n + 1
    # No order beats that of the true gains, and only the order counts.
    best = metrics.performance_gap_recovered(strong - weak, weak, strong)
    assert (best >= curve - 1e-9).all() and metrics.apgr(best) >= 0.5 - 1e-9
    np.testing.assert_allclose(metrics.performance_gap_recovered(np.exp(margin), weak, strong), curve)
    assert 0 <= metrics.cpt(best, 0.5) <= metrics.cpt(best, 0.8) <= 1
    with pytest.raises(ValueError, match="in \\[0, 1\\]"):
        metrics.cpt(curve, 50)
