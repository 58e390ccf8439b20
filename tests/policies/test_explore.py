"""Exploration keeps every ceiling, its share and its loss, whatever the pool and the draw."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from signalbox.policies.base import Candidate, Explore, NoCandidate, Policy, RequestShape, Slo
from signalbox.policies.decide import decide
from signalbox.policies.explore import MOST_ARMS, explore
from signalbox.router.online import probability_best

SHAPE = RequestShape(400, 100)


def candidate(name: str, price: float = 1.0, ttft: float = 100.0) -> Candidate:
    return Candidate(name, price, price, ttft, 10.0)


POOL = [candidate("a"), candidate("b"), candidate("c")]


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Candidate], dict[str, tuple[float, float]], dict[str, float], Policy]:
    names = [f"e{i}" for i in range(draw(st.integers(1, 12)))]
    unit = st.floats(0, 1)
    pool = [candidate(n, draw(st.floats(0, 20)), draw(st.floats(1, 2000))) for n in names]
    predicted = {n: (draw(unit), draw(st.floats(0, 0.5))) for n in names}
    deviation = {n: draw(st.floats(0, 0.5)) for n in names if draw(st.booleans())}
    policy = Policy(
        slo=Slo(
            max_ttft_ms=draw(st.none() | st.floats(1, 2000)),
            max_cost_per_1m=draw(st.none() | st.floats(0, 20)),
        ),
        min_quality=draw(st.floats(0, 0.6)),
        fallback=draw(st.integers(0, 3)),
        on_no_candidates=draw(st.sampled_from(["fail", "best", "cheapest"])),
        explore=Explore(share=draw(st.floats(0, 0.5)), max_loss=draw(unit)),
    )
    return pool, predicted, deviation, policy


@given(cases(), st.floats(0, 1, exclude_max=True), st.floats(0.05, 1))
def test_no_draw_leads_beyond_the_bounds(
    case: tuple[list[Candidate], dict[str, tuple[float, float]], dict[str, float], Policy], draw: float, spread: float
) -> None:
    pool, predicted, deviation, policy = case
    try:
        greedy = decide(predicted, pool, SHAPE, policy, spread=spread)
    except NoCandidate:
        return
    found = explore(greedy, deviation, policy, draw, spread=spread)
    decision = found.decision
    assert found.explored == (decision.expert != greedy.expert)
    assert 0 < found.propensity <= 1
    if not found.explored:
        assert decision is greedy and found.propensity >= 1 - policy.explore.share - 1e-9
        return
    assert draw < policy.explore.share and found.propensity <= policy.explore.share + 1e-9
    rating = next(r for r in decision.ratings if r.expert == decision.expert)
    assert not rating.strikes and not greedy.violated and decision.expert in deviation
    assert rating.quality >= predicted[greedy.expert][0] - policy.explore.max_loss - 1e-9
    assert len(decision.fallbacks) <= policy.fallback and decision.expert not in decision.fallbacks
    assert len(set(decision.fallbacks)) == len(decision.fallbacks)
    if policy.fallback:
        assert decision.fallbacks[0] == greedy.expert


def test_propensities_are_the_frequencies() -> None:
    policy = Policy(explore=Explore(share=0.3, max_loss=0.2))
    predicted = {"a": (0.60, 0.1), "b": (0.58, 0.1), "c": (0.50, 0.1)}
    greedy = decide(predicted, POOL, SHAPE, policy)
    found = [explore(greedy, dict.fromkeys("abc", 0.05), policy, (i + 0.5) / 2000) for i in range(2000)]
    for name in "abc":
        mine = [f for f in found if f.decision.expert == name]
        assert mine and len({f.propensity for f in mine}) == 1
        assert len(mine) / 2000 == pytest.approx(mine[0].propensity, abs=1e-3)
    assert sum(f.explored for f in found) / 2000 == pytest.approx(0.3, abs=1e-3), "more than the share would win"


def test_what_is_well_known_is_not_explored() -> None:
    policy = Policy(explore=Explore(share=0.5, max_loss=0.5))
    greedy = decide({"a": (0.6, 0.3), "b": (0.5, 0.3)}, POOL[:2], SHAPE, policy)
    assert not any(explore(greedy, {"a": 0.01, "b": 0.01}, policy, (i + 0.5) / 100).explored for i in range(100))
    assert any(explore(greedy, {"a": 0.1, "b": 0.1}, policy, i / 100).explored for i in range(100))
    assert not explore(greedy, {}, policy, 0.0).explored, "nothing is known of what was learned"
    off = Policy()
    assert not explore(greedy, {"a": 1.0, "b": 1.0}, off, 0.0).explored, "off by default"


def test_a_large_pool_is_bounded() -> None:
    policy = Policy(explore=Explore(share=0.5, max_loss=1.0))
    names = [f"e{i}" for i in range(40)]
    greedy = decide(dict.fromkeys(names, (0.5, 0.1)), [candidate(n) for n in names], SHAPE, policy)
    taken = {explore(greedy, dict.fromkeys(names, 0.1), policy, i / 500).decision.expert for i in range(500)}
    assert len(taken) == MOST_ARMS


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=8))
def test_probabilities(arms: list[tuple[float, float]]) -> None:
    chances = probability_best([m for m, _ in arms], [s for _, s in arms])
    assert chances.sum() == pytest.approx(1) and (chances >= 0).all() and np.isfinite(chances).all()


def test_probability_of_two_normals() -> None:
    first, second = probability_best([0.5, 0.4], [0.1, 0.2])
    assert first == pytest.approx(0.5 * (1 + math.erf(0.1 / math.hypot(0.1, 0.2) / math.sqrt(2))), abs=0.01)
    assert second == pytest.approx(1 - first)


@pytest.mark.parametrize("block", [{"share": 0.6}, {"share": -0.1}, {"max_loss": 2}, {"rate": 0.1}])
def test_the_block_is_strict(block: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Policy.model_validate({"explore": block})
