"""Policies decide: ceilings, weights, and the pure function that applies them."""

from signalbox.policies.base import Candidate, Decision, NoCandidate, Objective, Policy, RequestShape, Slo
from signalbox.policies.decide import decide
from signalbox.policies.flags import objective_of_flags, objective_of_tradeoff, parse_flags

__all__ = [
    "Candidate",
    "Decision",
    "NoCandidate",
    "Objective",
    "Policy",
    "RequestShape",
    "Slo",
    "decide",
    "objective_of_flags",
    "objective_of_tradeoff",
    "parse_flags",
]
