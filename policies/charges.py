"""Whom limits bind, and what a request costs: the words in which budgets, rates and in-flight limits are kept."""

from __future__ import annotations

from dataclasses import dataclass

from signalbox.policies.base import Policy


@dataclass(slots=True, frozen=True)
class Account:
    """One policy's limits as they bind one holder: `tenant:acme`, `key:ci` or `anonymous`."""

    policy: str
    holder: str
    limits: Policy

    @property
    def limited(self) -> bool:
        """Whether the policy has a limit that must be counted."""
        return (
            self.limits.budget is not None or self.limits.rate is not None or self.limits.slo.max_inflight is not None
        )


@dataclass(slots=True, frozen=True)
class Charge:
    """What a request costs: USD, tokens of prompt and answer, and 1 request if anything of an answer was sent."""

    usd: float = 0.0
    tokens: int = 0
    requests: int = 1


NOTHING = Charge(requests=0)
