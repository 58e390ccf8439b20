"""What a policy says (ceilings, floors, weights, limits), what a decision knows, and what it answers."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from signalbox.experts.catalog import Strict

# What the books can hold exactly: whole nano-USD and whole numbers, in the 53 bits of Lua's numbers.
MOST_USD, MOST_COUNT = 9e6, 2**53
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|w)", re.IGNORECASE)
_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def _seconds(value: Any) -> Any:
    """`90`, `30s`, `15m`, `1h`, `1d`, `2w` -> seconds."""
    if not isinstance(value, str):
        return value
    match = _DURATION.fullmatch(value.strip())
    if match is None:
        raise ValueError("a time is a number of seconds, or a number with ms, s, m, h, d or w: 30s, 15m, 1h, 1d")
    return float(match[1]) * _UNITS[match[2].lower()]


def _word(value: Any) -> Any:
    """YAML 1.1 reads a bare `off` as false."""
    return "off" if value is False else value


Seconds = Annotated[float, BeforeValidator(_seconds)]
IntentName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class Slo(Strict):
    """Ceilings. An expert predicted to break one is struck out."""

    max_ttft_ms: float | None = Field(None, gt=0, description="milliseconds to the first token")
    max_tpot_ms: float | None = Field(None, gt=0, description="milliseconds for each further token")
    max_total_ms: float | None = Field(None, gt=0, description="milliseconds to the last token")
    max_cost_per_1m: float | None = Field(
        None, ge=0, description="USD per million tokens, mean over the request's prompt and answer tokens"
    )
    max_cost_per_request: float | None = Field(None, ge=0, description="USD")
    max_inflight: int | None = Field(
        None, ge=1, description="requests of one key or tenant in flight at once, over all gateways; then 429"
    )


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


class Budget(Strict):
    """What one key or tenant may spend in a window; at least one of the three. Beyond it: 402.

    Windows are fixed: they begin at multiples of their length since 1970, so a day's begins at midnight UTC.
    """

    usd: float | None = Field(None, ge=0, le=MOST_USD, description="USD, by the experts' prices")
    tokens: int | None = Field(None, ge=0, le=MOST_COUNT, description="tokens of prompts and answers")
    requests: int | None = Field(
        None, ge=0, le=MOST_COUNT, description="requests that were answered, in whole or in part"
    )
    window: Seconds = Field(86400.0, ge=1, le=366 * 86400, description="length of a window: seconds, or 1h, 1d, 30d")

    @model_validator(mode="after")
    def _limits_something(self) -> Self:
        if self.usd is None and self.tokens is None and self.requests is None:
            raise ValueError("a budget limits something: give usd, tokens or requests")
        return self


class Rate(Strict):
    """How fast one key or tenant may ask; at least one of the two. Beyond it: 429 with `Retry-After`."""

    requests_per_minute: float | None = Field(None, ge=1e-3, le=1e9, description="requests a minute")
    tokens_per_minute: float | None = Field(
        None, ge=1e-3, le=1e12, description="tokens of prompts and answers a minute"
    )
    burst: Seconds = Field(60.0, gt=0, le=3600, description="what was not used in this time may be used at once")

    @model_validator(mode="after")
    def _limits_something(self) -> Self:
        if self.requests_per_minute is None and self.tokens_per_minute is None:
            raise ValueError("a rate limits something: give requests_per_minute or tokens_per_minute")
        return self


class Parallel(Strict):
    """Several answers to one request, and who chooses among them (papers.md, section 8: horizontal scaling).

    `samples` is the most; fewer are drawn where a cost ceiling would break. `none` takes the answer that is complete
    first, `vote` the one that most agree with, `judge` asks an expert which is best.
    """

    samples: int = Field(1, ge=1, le=16, description="answers drawn at once, at most")
    arbiter: Literal["none", "vote", "judge"] = Field("none", description="who chooses among the answers")
    judge: str | None = Field(None, description="the expert that judges, for `arbiter: judge`")

    @model_validator(mode="after")
    def _judge_is_named(self) -> Self:
        if (self.arbiter == "judge") != (self.judge is not None):
            raise ValueError("`arbiter: judge` needs `judge: EXPERT`, and nothing else does")
        return self


class Intent(Strict):
    """A kind of request, how it is recognised, and what the policy is for it: what is given here replaces the policy's.

    A request may name its intent (`signalbox.intent`); otherwise the first whose keywords are in the prompt, or else
    the one whose examples it resembles most.
    """

    keywords: tuple[str, ...] = Field(
        (), max_length=64, description="words or phrases, in any case, one of which tells"
    )
    examples: tuple[str, ...] = Field((), max_length=64, description="prompts of this kind")
    slo: Slo | None = Field(None, description="ceilings")
    objective: Objective | None = Field(None, description="weights")
    min_quality: float | None = Field(None, ge=0, le=1, description="lowest predicted quality that is acceptable")
    allowed: tuple[str, ...] | None = Field(None, description="globs of experts that may be chosen")
    max_tokens: int | None = Field(None, ge=1, description="longest answer, tokens")
    parallel: Parallel | None = Field(None, description="several answers and an arbiter")


class Policy(Strict):
    """One SLA: asked for as `auto:NAME`, or attached to keys and tenants, whom its limits then bind always."""

    description: str = Field("", max_length=1000, description="for whom it is")
    slo: Slo = Field(default_factory=lambda: Slo(), description="ceilings")
    objective: Objective = Field(default_factory=lambda: Objective(), description="weights")
    min_quality: float = Field(0.0, ge=0, le=1, description="lowest predicted quality that is acceptable")
    allowed: tuple[str, ...] = Field(("*",), description="globs of experts that may be chosen")
    denied: tuple[str, ...] = Field((), description="globs of experts that may not")
    fallback: int = Field(1, ge=0, le=16, description="how many other experts to try when the chosen one fails")
    cache: Annotated[Literal["off", "exact"], BeforeValidator(_word)] = Field(
        "exact", description="response cache for requests with temperature 0"
    )
    on_no_candidates: Literal["least_violated", "cheapest", "best", "fail"] = Field(
        "least_violated", description="whom to take when every expert is struck out by a ceiling; the reply is marked"
    )
    priority: int = Field(
        0, ge=-10, le=10, description="who waits less under load, and is shed last; greater is sooner"
    )
    max_tokens: int | None = Field(None, ge=1, description="longest answer, tokens; longer wishes are cut to it")
    parallel: Parallel = Field(default_factory=lambda: Parallel(), description="several answers and an arbiter")
    intents: dict[IntentName, Intent] = Field(
        default_factory=dict, max_length=32, description="kinds of requests that are treated otherwise"
    )
    budget: Budget | None = Field(None, description="what may be spent in a window")
    rate: Rate | None = Field(None, description="how fast may be asked")
    on_store_loss: Literal["allow", "deny"] = Field(
        "allow", description="whether requests that limits apply to are served while the store is lost"
    )
    explore: Explore = Field(default_factory=lambda: Explore(), description="exploration, for learning from outcomes")


@dataclass(slots=True, frozen=True)
class Candidate:
    """One expert as the decision sees it: declared facts and live figures. Money in USD, times in ms.

    `ttft_ms` is from when the request has its place; before that it waits `wait_ms` in the queue of admission.
    """

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
    wait_ms: float = 0.0


@dataclass(slots=True, frozen=True)
class RequestShape:
    """Size of a request before it is tokenised: bytes of its prompt, and how many tokens it may answer.

    `samples` answers are drawn and paid for.
    """

    prompt_bytes: int
    answer_tokens: int
    max_tokens: int | None = None
    samples: int = 1


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
    """One expert's row in the score table of a decision. `ttft_ms` and `total_ms` include `wait_ms`."""

    expert: str
    quality: float
    uncertainty: float
    cost_usd: float
    cost_per_1m: float
    ttft_ms: float
    tpot_ms: float
    total_ms: float
    utility: float
    wait_ms: float = 0.0
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
    """Every expert was struck out; `ratings` has the reasons, which the message lists.

    `constraints` is `explain`'s table, where somebody has made it.
    """

    def __init__(self, ratings: list[Rating]) -> None:
        reasons = "; ".join(f"{r.expert}: {', '.join(map(str, r.strikes))}" for r in ratings)
        super().__init__(f"no expert satisfies the policy ({reasons or 'the pool is empty'})")
        self.ratings = ratings
        self.constraints: list[dict[str, Any]] = []
