"""Why an expert may or may not answer: every constraint of a policy, and how far each expert is from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from signalbox.experts.catalog import matches
from signalbox.policies.base import Candidate, Decision, NoCandidate, Policy, Rating
from signalbox.policies.decide import HARD_CONSTRAINTS, distance

# Ceilings of `Slo`, and the field of `Rating` that each binds.
CEILINGS = {
    "max_ttft_ms": "ttft_ms",
    "max_tpot_ms": "tpot_ms",
    "max_total_ms": "total_ms",
    "max_cost_per_1m": "cost_per_1m",
    "max_cost_per_request": "cost_usd",
}


def explain(decision: Decision | NoCandidate, policy: Policy, candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
    """Each expert's distance to each constraint that the policy sets, in the order of the decision's table.

    Args:
        decision: what `decide` answered, or raised.
        policy: the one that it was given.
        candidates: those that it was given.

    Returns:
        One dictionary an expert: `expert`, and `constraints`, a list of `constraint`, `limit`, `value`, `kept` and
        `distance`, which is what is beyond the limit as a share of it: above 0 where the constraint is broken, below
        where there is room. It is None for constraints that are not of degree (`available`, `allowed`, `denied`,
        `known_to_router`). Times in milliseconds, money in USD.
    """
    facts = {candidate.name: candidate for candidate in candidates}
    return [
        {
            "expert": rating.expert,
            "constraints": [*_hard(rating, policy, facts.get(rating.expert)), *_soft(rating, policy)],
        }
        for rating in decision.ratings
    ]


def _hard(rating: Rating, policy: Policy, candidate: Candidate | None) -> Iterator[dict[str, Any]]:
    """What bars an expert altogether; said also where it is kept, if the policy or the pool has a say in it."""
    broken = {strike.constraint: strike for strike in rating.strikes if strike.constraint in HARD_CONSTRAINTS}
    for strike in broken.values():
        limit, value = strike.limit, strike.value
        far = distance(limit, value) if isinstance(limit, int | float) and isinstance(value, int | float) else None
        yield _said(strike.constraint, limit, value, far, kept=False)
    if candidate is not None and candidate.available and "available" not in broken:
        yield _said("available", "ready", "ready", None, kept=True)
    if "allowed" not in broken and policy.allowed != ("*",) and matches(rating.expert, policy.allowed):
        yield _said("allowed", ", ".join(policy.allowed), rating.expert, None, kept=True)
    if "denied" not in broken and policy.denied:
        yield _said("denied", ", ".join(policy.denied), rating.expert, None, kept=True)


def _soft(rating: Rating, policy: Policy) -> Iterator[dict[str, Any]]:
    """Ceilings and floors, in the policy's order."""
    for constraint, field in CEILINGS.items():
        limit = getattr(policy.slo, constraint)
        if limit is not None:
            value = getattr(rating, field)
            yield _said(constraint, limit, value, distance(limit, value), kept=value <= limit)
    if policy.min_quality > 0:
        far = -distance(policy.min_quality, rating.quality)
        yield _said("min_quality", policy.min_quality, rating.quality, far, kept=rating.quality >= policy.min_quality)


def _said(constraint: str, limit: float | str, value: float | str, far: float | None, *, kept: bool) -> dict[str, Any]:
    return {"constraint": constraint, "limit": limit, "value": value, "distance": far, "kept": kept}
