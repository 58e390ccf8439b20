"""The explanation: the same verdicts as the decision's own, with distances of the right sign."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from signalbox.policies.base import Candidate, Decision, NoCandidate, Policy, RequestShape
from signalbox.policies.decide import HARD_CONSTRAINTS, decide
from signalbox.policies.explain import explain


def candidate(name: str, **changes: Any) -> Candidate:
    return Candidate(
        **({"name": name, "price_input": 1.0, "price_output": 2.0, "ttft_ms": 400.0, "tpot_ms": 40.0} | changes)
    )


def explained(policy: Policy, *pool: Candidate, quality: float = 0.5) -> dict[str, dict[str, dict[str, Any]]]:
    """expert -> constraint -> what is said of it."""
    decided: Decision | NoCandidate
    try:
        decided = decide({c.name: (quality, 0.1) for c in pool}, pool, RequestShape(400, 101), policy)
    except NoCandidate as error:
        decided = error
    return {
        row["expert"]: {said["constraint"]: said for said in row["constraints"]}
        for row in explain(decided, policy, pool)
    }


def test_every_ceiling_and_floor_that_is_set_is_told_with_its_distance() -> None:
    policy = Policy.model_validate({"slo": {"max_ttft_ms": 500, "max_total_ms": 3520}, "min_quality": 0.4})
    said = explained(policy, candidate("a"))["a"]
    assert list(said) == ["available", "max_ttft_ms", "max_total_ms", "min_quality"]
    assert said["max_ttft_ms"] == {
        "constraint": "max_ttft_ms", "limit": 500, "value": 400, "distance": pytest.approx(-0.2), "kept": True
    }  # fmt: skip
    assert said["max_total_ms"]["value"] == 4400 and said["max_total_ms"]["distance"] == pytest.approx(0.25)
    assert not said["max_total_ms"]["kept"]
    assert said["min_quality"]["distance"] == pytest.approx(-0.25) and said["min_quality"]["kept"], "0.5 of 0.4 asked"
    broken = explained(policy, candidate("a"), quality=0.2)["a"]["min_quality"]
    assert broken["distance"] == pytest.approx(0.5) and not broken["kept"]


def test_reasons_without_a_degree() -> None:
    policy = Policy.model_validate({"allowed": ["a*"], "denied": ["ab"]})
    pool = (candidate("a"), candidate("ab"), candidate("c"), candidate("ax", available=False))
    said = explained(policy, *pool)
    assert {name: (row["allowed"]["kept"], row["denied"]["kept"]) for name, row in said.items()} == {
        "a": (True, True), "ab": (True, False), "c": (False, True), "ax": (True, True)
    }  # fmt: skip
    assert said["a"]["available"]["kept"] and not said["ax"]["available"]["kept"]
    assert said["c"]["allowed"]["distance"] is None
    short = explained(Policy(), candidate("a", context_length=50), candidate("b"))
    assert short["a"]["context_length"]["distance"] == pytest.approx(1.0), "100 tokens for 50"


def test_a_refusal_is_explained_too() -> None:
    policy = Policy.model_validate({"slo": {"max_ttft_ms": 1}, "on_no_candidates": "fail"})
    assert not explained(policy, candidate("a"))["a"]["max_ttft_ms"]["kept"]


@settings(max_examples=200, deadline=None)
@given(
    ceilings=st.fixed_dictionaries(
        {},
        optional={
            "max_ttft_ms": st.floats(1, 1000),
            "max_tpot_ms": st.floats(1, 100),
            "max_total_ms": st.floats(1, 5000),
            "max_cost_per_1m": st.floats(0, 3),
            "max_cost_per_request": st.floats(0, 1e-3),
        },
    ),
    floor=st.floats(0, 1),
    figures=st.lists(st.tuples(st.floats(1, 1000), st.floats(1, 100), st.floats(0, 3)), min_size=1, max_size=4),
    quality=st.floats(0, 1),
)
def test_it_agrees_with_the_decision(
    ceilings: dict[str, float], floor: float, figures: list[tuple[float, float, float]], quality: float
) -> None:
    policy = Policy.model_validate({"slo": ceilings, "min_quality": floor})
    pool = [candidate(f"e{i}", ttft_ms=t, tpot_ms=o, price_input=p) for i, (t, o, p) in enumerate(figures)]
    decision = decide({c.name: (quality, 0.1) for c in pool}, pool, RequestShape(100, 50), policy)
    rows = explain(decision, policy, pool)
    assert [row["expert"] for row in rows] == [rating.expert for rating in decision.ratings]
    for row, rating in zip(rows, decision.ratings, strict=True):
        broken = {said["constraint"] for said in row["constraints"] if not said["kept"]}
        assert broken == {strike.constraint for strike in rating.strikes}
        told = {said["constraint"] for said in row["constraints"]}
        assert told - HARD_CONSTRAINTS == {*ceilings, *(["min_quality"] if floor > 0 else [])}
        for said in row["constraints"]:
            if said["distance"]:
                assert (said["distance"] > 0) == (not said["kept"])
