"""Exploration within a policy's bounds: now and then an expert that may be better than the one predicted best.

A pure function beside `decide`. Experts are drawn by the chance that they have the greatest utility, as Thompson
sampling does it, but in closed form: one uniform number decides, so a decision can be replayed, and the propensity of
the choice is known and goes on record, without which outcomes cannot be weighted afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from signalbox.policies.base import Decision, Policy
from signalbox.router.online import probability_best

MOST_ARMS = 8  # experts drawn from, the greedy one and the next best by utility: it bounds the time of a decision


@dataclass(slots=True, frozen=True)
class Exploration:
    """A decision after exploration: `explored` says whether it is another one than `decide` made.

    `propensity` is the probability with which this expert was to be chosen, in (0, 1].
    """

    decision: Decision
    explored: bool
    propensity: float


def explore(
    decision: Decision, deviation: Mapping[str, float], policy: Policy, draw: float, *, spread: float = 1.0
) -> Exploration:
    """Replace the decision's expert by another, with a chance of `policy.explore.share` at most.

    Only by one that no constraint struck out and whose predicted quality is less than the greedy choice's by
    `policy.explore.max_loss` at most. A choice that itself breaks a ceiling (`on_no_candidates`) stands.

    Args:
        decision: what `decide` chose.
        deviation: expert -> standard deviation of its mean quality under what was learned; others are not explored.
        policy: the bounds.
        draw: uniform in [0, 1).
        spread: as given to `decide`.
    """
    bounds = policy.explore
    by_name = {r.expert: r for r in decision.ratings}
    greedy = by_name[decision.expert]
    if bounds.share <= 0 or decision.violated or greedy.expert not in deviation:
        return Exploration(decision, False, 1.0)
    arms = [greedy] + [
        r
        for r in decision.ratings
        if r is not greedy and not r.strikes and r.expert in deviation and r.quality >= greedy.quality - bounds.max_loss
    ]
    arms = arms[:MOST_ARMS]
    unit = decision.objective.quality / max(spread, 1e-6)
    chances = probability_best([r.utility for r in arms], [deviation[r.expert] * unit for r in arms])
    others = float(chances[1:].sum())
    if others <= 0:
        return Exploration(decision, False, 1.0)
    scale = min(1.0, bounds.share / others)
    reached = 0.0
    for arm, chance in zip(arms[1:], chances[1:], strict=True):
        propensity = float(chance) * scale
        reached += propensity
        if draw < reached:
            rest = [greedy.expert, *(name for name in decision.fallbacks if name != arm.expert)]
            taken = replace(decision, expert=arm.expert, fallbacks=rest[: policy.fallback])
            return Exploration(taken, True, propensity)
    return Exploration(decision, False, 1.0 - others * scale)
