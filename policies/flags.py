"""Wishes typed in the prompt or sent beside it, turned into objective weights (Tryage: user flags become lambdas)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from signalbox.policies.base import Objective

# A flag's weight is in units of the router's typical quality gap: at 4, only an expert that is better by
# four such gaps is taken against the wish.
FLAG_WEIGHT = 4.0

_WISHES: dict[str, str] = {
    "smallest model": "size",
    "small model": "size",
    "smallest": "size",
    "lowest latency": "latency",
    "low latency": "latency",
    "fastest": "latency",
    "fastest model": "latency",
    "most recent": "age",
    "most recent model": "age",
    "newest": "age",
    "newest model": "age",
    "latest model": "age",
    "lowest cost": "cost",
    "low cost": "cost",
    "cheapest": "cost",
    "cheapest model": "cost",
    "best quality": "quality",
    "highest quality": "quality",
    "best model": "quality",
    "most accurate": "quality",
}
_FLAG = re.compile(r"[ \t]*\[\s*flag\s*:\s*([^\]\[]{1,64})\]", re.IGNORECASE)


def parse_flags(text: str) -> tuple[str, list[str]]:
    """Take the known `[Flag: ...]` marks off a prompt.

    Returns the text without them and the wishes in order (`size`, `latency`, `age`, `cost`, `quality`). Several
    wishes in one mark are separated by commas. A mark with an unknown wish is left in the text: it may be meant
    for the expert.
    """
    wishes: list[str] = []

    def take(match: re.Match[str]) -> str:
        names = [" ".join(name.lower().split()) for name in match.group(1).split(",")]
        if not all(name in _WISHES for name in names):
            return match.group(0)
        wishes.extend(w for name in names if (w := _WISHES[name]) not in wishes)
        return ""

    stripped = _FLAG.sub(take, text)
    return (stripped.strip() if wishes else text), wishes


def objective_of_flags(wishes: Sequence[str], base: Objective) -> Objective:
    """The policy's weights with each wish raised to `FLAG_WEIGHT`; `quality` drops every penalty not wished for."""
    weights = base.model_dump()
    if "quality" in wishes:
        weights = {name: (value if name == "quality" else 0.0) for name, value in weights.items()}
    for wish in wishes:
        weights[wish] = max(weights[wish], 1.0 if wish == "quality" else FLAG_WEIGHT)
    return Objective(**weights)


def objective_of_tradeoff(tradeoff: float) -> Objective:
    """`cost_quality_tradeoff` from 0 (quality alone) to 10 (cost alone), linear between.

    Raises:
        ValueError: outside of [0, 10].
    """
    if not 0 <= tradeoff <= 10:
        raise ValueError("cost_quality_tradeoff must lie between 0 (quality alone) and 10 (cost alone)")
    return Objective(quality=1.0 - tradeoff / 10, cost=tradeoff / 10)
