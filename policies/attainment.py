"""What became of a load under its policies: attainment, goodput, waits and cost, by policy and in all.

Used for simulated and for measured requests alike, so that the two can be held against each other.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from signalbox.policies.base import Policy, Slo

ALL = "all"  # the row of figures over every policy
BLOCKS = 20  # of the time, for intervals: requests that come together fare alike, so they are no independent draws
Z95 = 1.96
T95 = 2.093  # of Student, with a degree of freedom less than there are blocks

Status = Literal["answered", "shed", "unfinished", "failed"]


@dataclass(slots=True, frozen=True)
class Outcome:
    """One request's fate. `at` is when it came, seconds since the load began; times in ms count from then.

    `reason` is the machine-readable one of a refusal or an error. `unfinished`: the load's end was waited for too
    briefly to say more; such a request counts as missed.
    """

    policy: str
    at: float
    status: Status
    reason: str = ""
    expert: str = ""
    ttft_ms: float = math.inf
    tpot_ms: float = math.inf
    total_ms: float = math.inf
    cost_usd: float = 0.0

    def kept(self, slo: Slo) -> bool:
        """Whether it was answered within every time that the policy promises."""
        if self.status != "answered":
            return False
        limits = ((slo.max_ttft_ms, self.ttft_ms), (slo.max_tpot_ms, self.tpot_ms), (slo.max_total_ms, self.total_ms))
        return all(limit is None or value <= limit for limit, value in limits)


@dataclass(slots=True, frozen=True)
class Figures:
    """Of the requests of one policy, or of all. Counts of requests; `goodput` in kept requests a second.

    offered = answered + shed (by reason) + unfinished + failed (by reason). `attainment` is the share of the offered
    that kept every ceiling, with its 95 % interval; TTFT is of answered requests, NaN where there is none.
    """

    offered: int
    answered: int
    unfinished: int
    shed: dict[str, int]
    failed: dict[str, int]
    experts: dict[str, int]
    kept: int
    attainment: float
    low: float
    high: float
    goodput: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    cost_usd: float


@dataclass(slots=True)
class _Gathered:
    outcomes: list[Outcome] = field(default_factory=list)
    kept: list[bool] = field(default_factory=list)


def figures(outcomes: Iterable[Outcome], policies: Mapping[str, Policy], seconds: float) -> dict[str, Figures]:
    """Figures by policy, in the order of `policies`, and under `all` of the whole.

    Args:
        outcomes: of every request that was offered.
        policies: whose ceilings count, by the name in the outcome.
        seconds: for how long requests were offered.

    Raises:
        KeyError: an outcome's policy is not among them.
    """
    gathered = {name: _Gathered() for name in (*policies, ALL)}
    for outcome in outcomes:
        kept = outcome.kept(policies[outcome.policy].slo)
        for name in (outcome.policy, ALL):
            gathered[name].outcomes.append(outcome)
            gathered[name].kept.append(kept)
    return {name: _figures(g, seconds) for name, g in gathered.items() if g.outcomes or name == ALL}


def _figures(gathered: _Gathered, seconds: float) -> Figures:
    outcomes, kept = gathered.outcomes, gathered.kept
    answered = [o for o in outcomes if o.status == "answered"]
    ttfts = sorted(o.ttft_ms for o in answered)
    low, high = interval([o.at for o in outcomes], [float(k) for k in kept], seconds)
    return Figures(
        offered=len(outcomes),
        answered=len(answered),
        unfinished=sum(o.status == "unfinished" for o in outcomes),
        shed=dict(sorted(Counter(o.reason for o in outcomes if o.status == "shed").items())),
        failed=dict(sorted(Counter(o.reason for o in outcomes if o.status == "failed").items())),
        experts=dict(sorted(Counter(o.expert for o in answered).items())),
        kept=sum(kept),
        attainment=sum(kept) / len(kept) if kept else math.nan,
        low=low,
        high=high,
        goodput=sum(kept) / seconds if seconds > 0 else math.nan,
        ttft_p50_ms=quantile(ttfts, 0.5),
        ttft_p99_ms=quantile(ttfts, 0.99),
        cost_usd=math.fsum(o.cost_usd for o in outcomes),
    )


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` of the sorted values lie, the nearest that was seen; NaN of none."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else math.nan


def interval(times: Sequence[float], flags: Sequence[float], seconds: float) -> tuple[float, float]:
    """95 % interval of the mean of 0/1 flags: the wider of Wilson's and of the one between blocks of time."""
    n = len(flags)
    if n == 0:
        return (math.nan, math.nan)
    mean = sum(flags) / n
    middle = (mean + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(mean * (1 - mean) / n + Z95**2 / (4 * n * n))
    error = T95 * _block_error(times, flags, seconds)
    return (max(0.0, min(middle - half, mean - error)), min(1.0, max(middle + half, mean + error)))


def _block_error(times: Sequence[float], flags: Sequence[float], seconds: float) -> float:
    """Standard error of a ratio of sums over blocks of time (linearised: Cochran, Sampling Techniques, section 6.3)."""
    counts, sums = [0] * BLOCKS, [0.0] * BLOCKS
    for time, flag in zip(times, flags, strict=True):
        block = min(BLOCKS - 1, max(0, int(time / seconds * BLOCKS))) if seconds > 0 else 0
        counts[block] += 1
        sums[block] += flag
    total = sum(counts)
    mean = sum(sums) / total
    squares = sum((s - mean * c) ** 2 for s, c in zip(sums, counts, strict=True))
    return math.sqrt(squares * BLOCKS / (BLOCKS - 1)) / total
