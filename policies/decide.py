"""The decision: from predictions, prices and live speed to one expert, under a policy. A pure function."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from signalbox.experts.catalog import matches
from signalbox.policies.base import (
    Candidate,
    Decision,
    NoCandidate,
    Objective,
    Policy,
    Rating,
    RequestShape,
    Slo,
    Strike,
)

MARGIN = 0.1  # of a ceiling on time, left free for what predictions are off
# An expert struck out by one of these cannot serve the request, whatever `on_no_candidates` says.
HARD_CONSTRAINTS = frozenset({"available", "allowed", "denied", "known_to_router", "context_length"})


def decide(
    prediction: Mapping[str, tuple[float, float]],
    candidates: Sequence[Candidate],
    shape: RequestShape,
    policy: Policy,
    *,
    spread: float = 1.0,
    objective: Objective | None = None,
    policy_name: str = "",
) -> Decision:
    """Choose the expert of greatest utility among those that keep every ceiling.

    utility = w_q * quality / spread - w_c * cost - w_l * latency - w_s * size - w_a * age, the last four scaled
    to [0, 1] over the experts that could serve the request (Tryage's routing objective; papers.md, section 1).

    Args:
        prediction: expert -> (quality in [0, 1], its standard deviation).
        candidates: declared facts and live figures; their order does not matter.
        shape: the request's size in bytes and tokens.
        policy: ceilings, floors, globs, weights and the number of fallbacks.
        spread: the router's typical quality gap (`Prediction.spread`).
        objective: weights that replace the policy's (flags or the caller's trade-off).
        policy_name: copied into the decision.

    Raises:
        NoCandidate: every expert is struck out and `on_no_candidates` is `fail`, or none can serve at all.
    """
    weights = objective or policy.objective
    ratings = [rate(candidate, prediction, shape, policy) for candidate in candidates]
    able = [r for r in ratings if not _hard(r)]
    facts = {c.name: c for c in candidates}
    _set_utilities(ratings, able, facts, weights, max(spread, 1e-6))
    ratings.sort(key=lambda r: (-r.utility, r.cost_usd, -r.quality, r.expert))

    kept = [r for r in ratings if not r.strikes]
    violated: list[str] = []
    if not kept:
        bending = [r for r in ratings if not _hard(r)]
        if not bending or policy.on_no_candidates == "fail":
            raise NoCandidate(ratings)
        if policy.on_no_candidates == "least_violated":
            bending.sort(key=lambda r: (violation(r), -r.utility, r.cost_usd, r.expert))
            chosen = bending[0]
        elif policy.on_no_candidates == "cheapest":
            chosen = min(bending, key=lambda r: (r.cost_usd, -r.quality, r.expert))
        else:
            chosen = min(bending, key=lambda r: (-r.quality, r.cost_usd, r.expert))
        violated = [s.constraint for s in chosen.strikes]
        kept = [chosen, *(r for r in bending if r is not chosen)]
    return Decision(
        expert=kept[0].expert,
        fallbacks=[r.expert for r in kept[1 : 1 + policy.fallback]],
        ratings=ratings,
        confidence=_confidence(kept, weights, max(spread, 1e-6)),
        policy=policy_name,
        objective=weights,
        violated=violated,
    )


def rate(
    candidate: Candidate, prediction: Mapping[str, tuple[float, float]], shape: RequestShape, policy: Policy
) -> Rating:
    """Predicted figures of one expert and the constraints that strike it out; `decide` sets the utility."""
    quality, uncertainty = prediction.get(candidate.name, (0.0, 0.0))
    prompt_tokens = max(1, math.ceil(shape.prompt_bytes / candidate.bytes_per_token))
    answer_tokens = max(1, shape.answer_tokens)
    cost = shape.samples * (candidate.price_input * prompt_tokens + candidate.price_output * answer_tokens) / 1e6
    rating = Rating(
        expert=candidate.name,
        quality=quality,
        uncertainty=uncertainty,
        cost_usd=cost,
        cost_per_1m=cost * 1e6 / (prompt_tokens + answer_tokens),
        ttft_ms=candidate.wait_ms + candidate.ttft_ms,
        tpot_ms=candidate.tpot_ms,
        total_ms=candidate.wait_ms + candidate.ttft_ms + candidate.tpot_ms * (answer_tokens - 1),
        utility=0.0,
        wait_ms=candidate.wait_ms,
    )
    strike = rating.strikes.append
    if not candidate.available:
        strike(Strike("available", "ready", "not ready"))
    if candidate.name not in prediction:
        strike(Strike("known_to_router", "in the artifact", "not in the artifact"))
    if not matches(candidate.name, policy.allowed):
        strike(Strike("allowed", ", ".join(policy.allowed) or "none", candidate.name))
    if matches(candidate.name, policy.denied):
        strike(Strike("denied", ", ".join(policy.denied), candidate.name))
    if candidate.context_length is not None and prompt_tokens >= candidate.context_length:
        strike(Strike("context_length", candidate.context_length, prompt_tokens))
    slo = policy.slo
    for constraint, limit, value in (
        ("max_ttft_ms", slo.max_ttft_ms, rating.ttft_ms),
        ("max_tpot_ms", slo.max_tpot_ms, rating.tpot_ms),
        ("max_total_ms", slo.max_total_ms, rating.total_ms),
        ("max_cost_per_1m", slo.max_cost_per_1m, rating.cost_per_1m),
        ("max_cost_per_request", slo.max_cost_per_request, rating.cost_usd),
    ):
        if limit is not None and value > limit:
            strike(Strike(constraint, limit, value))
    if quality < policy.min_quality:
        strike(Strike("min_quality", policy.min_quality, quality))
    return rating


def violation(rating: Rating) -> float:
    """By how much an expert breaks the ceilings and floors: the sum of what is beyond each, as a share of the limit.

    0 where it keeps them all, infinity where it cannot serve at all.
    """
    if _hard(rating):
        return math.inf
    return sum(abs(distance(float(s.limit), float(s.value))) for s in rating.strikes)


def slack_ms(rating: Rating, slo: Slo) -> float | None:
    """How long a request may wait for this expert and still keep the ceilings on time; None: as long as it likes.

    A ceiling that the expert breaks without any waiting bounds nothing: it cannot be kept by hurrying. Of the others a
    tenth is left free (`MARGIN`): in a full queue requests begin just at their deadlines, and then half of those whose
    time was predicted a little short would be late.
    """
    alone = (
        (slo.max_ttft_ms, rating.ttft_ms - rating.wait_ms),
        (slo.max_total_ms, rating.total_ms - rating.wait_ms),
    )
    kept = [(limit, value) for limit, value in alone if limit is not None and value <= limit]
    return min((max(0.0, (1 - MARGIN) * limit - value) for limit, value in kept), default=None)


def distance(limit: float, value: float) -> float:
    """How far a value is from a limit, as a share of it: negative below, positive above."""
    return (value - limit) / max(abs(limit), 1e-9)


def _hard(rating: Rating) -> bool:
    return any(s.constraint in HARD_CONSTRAINTS for s in rating.strikes)


def _set_utilities(
    ratings: list[Rating], able: list[Rating], facts: Mapping[str, Candidate], weights: Objective, spread: float
) -> None:
    """Scale the penalties over the experts that could serve, and fill in every rating's utility."""
    pool = able or ratings
    dearest = max((r.cost_usd for r in pool), default=0.0)
    slowest = max((r.total_ms for r in pool), default=0.0)
    sizes = {r.expert: math.log10(p) for r in pool if (p := facts[r.expert].parameters)}
    births = {r.expert: float(b) for r in pool if (b := facts[r.expert].released_ordinal)}
    for r in ratings:
        r.utility = (
            weights.quality * r.quality / spread
            - weights.cost * _share(r.cost_usd, dearest)
            - weights.latency * _share(r.total_ms, slowest)
            - weights.size * _position(r.expert, sizes)
            - weights.age * (1.0 - _position(r.expert, births) if r.expert in births else 1.0)
        )


def _share(value: float, greatest: float) -> float:
    return min(1.0, value / greatest) if greatest > 0 else 0.0


def _position(name: str, values: Mapping[str, float]) -> float:
    """Where an expert stands between the least (0) and the greatest (1) of the pool; unknown counts as 1."""
    if name not in values:
        return 1.0
    low, high = min(values.values()), max(values.values())
    return (values[name] - low) / (high - low) if high > low else 0.0


def _confidence(kept: list[Rating], weights: Objective, spread: float) -> float:
    """Probability that the chosen expert's utility is above the runner-up's, errors taken as independent normals."""
    if len(kept) < 2:
        return 1.0
    first, second = kept[0], kept[1]
    deviation = weights.quality * math.hypot(first.uncertainty, second.uncertainty) / spread
    gap = first.utility - second.utility
    if deviation <= 0:
        return 1.0 if gap > 0 else 0.5
    return 0.5 * (1.0 + math.erf(gap / deviation / math.sqrt(2.0)))
