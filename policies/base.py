"""What a policy says (ceilings, weights), what a decision knows, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field

from signalbox.experts.catalog import Strict


class Slo(Strict):
    """Ceilings. An expert predicted to break one is struck out."""

    max_ttft_ms: float | None = Field(None, gt=0, description="milliseconds to the first token")
    max_tpot_ms: float | None = Field(None, gt=0, description="milliseconds for each further token")
    max_total_ms: float | None = Field(None, gt=0, description="milliseconds to the last token")
    max_cost_per_1m: float | None = Field(
        None, ge=0, description="USD per million tokens, mean over the request's prompt and answer tokens"
    )
    max_cost_per_request: float | None = Field(None, ge=0, description="USD")


class Objective(Strict):
    """Weights of what is maximised: quality, less cost, latency, size and age (Tryage's lambdas).

    The penalties are scaled to [0, 1] over the pool. Quality is counted in units of the router's `spread`, the
    typical gap between the best and the worst expert of a prompt, so that equal weights mean an equal say:
    with `quality: 1, cost: 1` the dearest expert must be better by one typical gap than a free one.
    """

    quality: float = Field(1.0, ge=0, description="weight of the predicted quality")
    cost: float = Field(0.0, ge=0, description="weight of the cost, as a share of the dearest expert's")
    latency: float = Field(0.0, ge=0, description="weight of the time to the last token, as a share of the slowest's")
    size: float = Field(0.0, ge=0, description="weight of the parameter count (log scale, smallest 0, largest 1)")
    age: float = Field(0.0, ge=0, description="weight of the age (newest 0, oldest 1)")


class Explore(Strict):
    """How much may be risked to learn which expert is better. Every ceiling holds for explored experts too."""

    share: float = Field(
        0.0, ge=0, le=0.5, description="greatest share of requests that go to another expert than the best one; 0: none"
    )
    max_loss: float = Field(
        0.05, ge=0, le=1, description="predicted quality, in [0, 1], that such a request may give away"
    )


class Policy(Strict):
    """One SLA, named in the configuration and asked for as `auto:NAME`."""

    slo: Slo = Field(default_factory=lambda: Slo(), description="ceilings")
    objective: Objective = Field(default_factory=lambda: Objective(), description="weights")
    min_quality: float = Field(0.0, ge=0, le=1, description="lowest predicted quality that is acceptable")
    allowed: tuple[str, ...] = Field(("*",), description="globs of experts that may be chosen")
    denied: tuple[str, ...] = Field((), description="globs of experts that may not")
    fallback: int = Field(1, ge=0, le=16, description="how many other experts to try when the chosen one fails")
    cache: Literal["off", "exact"] = Field("exact", description="response cache for requests with temperature 0")
    on_no_candidates: Literal["cheapest", "best", "fail"] = Field(
        "fail", description="what to do when every expert is struck out by a ceiling"
    )
    explore: Explore = Field(default_factory=lambda: Explore(), description="exploration, for learning from outcomes")


@dataclass(slots=True, frozen=True)
class Candidate:
    """One expert as the decision sees it: declared facts and live figures. Money in USD, times in ms."""

    name: str
    price_input: float
    price_output: float
    ttft_ms: float
    tpot_ms: float
    context_length: int | None = None
    parameters: int | None = None
    released_ordinal: int | None = None
    bytes_per_token: float = 4.0
    available: bool = True


@dataclass(slots=True, frozen=True)
class RequestShape:
    """Size of a request before it is tokenised: bytes of its prompt, and how many tokens it may answer."""

    prompt_bytes: int
    answer_tokens: int
    max_tokens: int | None = None


@dataclass(slots=True, frozen=True)
class Strike:
    """Why an expert was struck out: the constraint, its limit and the expert's predicted value."""

    constraint: str
    limit: float | str
    value: float | str

    def __str__(self) -> str:
        """In a few words: `max_ttft_ms 900 > 800`, `not ready`."""
        match self.constraint:
            case "available":
                return "not ready"
            case "known_to_router":
                return "not known to the router"
            case "allowed" | "denied":
                return "not allowed"
        relation = "<" if self.constraint.startswith("min_") else ">"
        return f"{self.constraint} {_figure(self.value)} {relation} {_figure(self.limit)}"


def _figure(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass(slots=True)
class Rating:
    """One expert's row in the score table of a decision."""

    expert: str
    quality: float
    uncertainty: float
    cost_usd: float
    cost_per_1m: float
    ttft_ms: float
    tpot_ms: float
    total_ms: float
    utility: float
    strikes: list[Strike] = field(default_factory=list)


@dataclass(slots=True)
class Decision:
    """The chosen expert, whom to try next, and the whole table, best utility first.

    `confidence` is the probability that the chosen expert is better in utility than the runner-up, by the
    predictor's uncertainty. `violated` names the ceilings that the choice itself breaks (`on_no_candidates`).
    """

    expert: str
    fallbacks: list[str]
    ratings: list[Rating]
    confidence: float
    policy: str
    objective: Objective
    violated: list[str] = field(default_factory=list)


class NoCandidate(Exception):
    """Every expert was struck out; `ratings` has the reasons. The message lists them."""

    def __init__(self, ratings: list[Rating]) -> None:
        reasons = "; ".join(f"{r.expert}: {', '.join(map(str, r.strikes))}" for r in ratings)
        super().__init__(f"no expert satisfies the policy ({reasons or 'the pool is empty'})")
        self.ratings = ratings
