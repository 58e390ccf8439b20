"""Loads for the simulation and for benchmarks: recorded as JSON lines, or drawn as Poisson arrivals with bursts."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import orjson
from pydantic import Field, ValidationError

from signalbox.experts.catalog import Strict

MAX_ARRIVALS = 1_000_000


class LoadError(ValueError):
    """A load cannot be read or drawn; the message says where and why."""


class Arrival(Strict):
    """One request of a load, a line of its file. Either its prompt or the prompt's size is given."""

    at: float = Field(ge=0, allow_inf_nan=False, description="seconds since the load began")
    policy: str = Field(min_length=1, max_length=64, description="name of its policy")
    prompt: str | None = Field(None, description="its text")
    prompt_bytes: int | None = Field(None, ge=0, le=1 << 30, description="size of its text as UTF-8")
    max_tokens: int | None = Field(None, ge=1, le=1 << 20, description="most tokens that it may answer")
    answer_tokens: int | None = Field(
        None, ge=1, le=1 << 20, description="tokens that it does answer; default: max_tokens"
    )
    quality: dict[str, Annotated[float, Field(ge=0, le=1)]] | None = Field(
        None, max_length=4096, description="each expert's predicted quality"
    )

    @property
    def size(self) -> int:
        """Bytes of the prompt."""
        if self.prompt_bytes is not None:
            return self.prompt_bytes
        return len((self.prompt or "").encode())


@dataclass(frozen=True, slots=True)
class Bursts:
    """Arrivals in two states: for `share` of the time at `factor` times the mean rate, else so that the mean is kept.

    A Markov-modulated Poisson process but for this: every `period_s` seconds have just one burst, at a random place,
    so that a short load too has its share of them. `factor` 1: none.
    """

    factor: float = 3.0
    share: float = 0.1
    period_s: float = 10.0

    def __post_init__(self) -> None:
        if not (0 < self.share < 1 and self.factor >= 1 and self.period_s > 0):
            raise LoadError("bursts need 0 < share < 1, factor >= 1 and a period above 0")
        if self.share * self.factor > 1:
            raise LoadError(f"bursts of {self.factor:g} times the rate can take {1 / self.factor:.3g} of the time")


@dataclass(frozen=True, slots=True)
class Lengths:
    """Least and greatest of prompts (bytes) and of answers (tokens); log-uniform in between."""

    prompt_bytes: tuple[int, int] = (40, 800)
    answer_tokens: tuple[int, int] = (8, 64)

    def __post_init__(self) -> None:
        for low, high in (self.prompt_bytes, self.answer_tokens):
            if not 1 <= low <= high:
                raise LoadError(f"lengths from {low} to {high}: the least is at least 1, and no more than the greatest")


def synthetic(
    rate: float,
    seconds: float,
    mix: Mapping[str, float],
    *,
    bursts: Bursts | None = None,
    lengths: Lengths | None = None,
    prompts: Sequence[str] = (),
    seed: int = 0,
) -> list[Arrival]:
    """Open-loop arrivals in the order of time: nobody waits for an answer before the next one asks.

    Args:
        rate: mean arrivals a second.
        seconds: for how long.
        mix: policy -> share of the arrivals; the shares are made to sum to 1.
        bursts: default `Bursts()`.
        lengths: of prompts and answers; default `Lengths()`.
        prompts: texts to draw from; then the prompts' lengths are theirs.
        seed: the same one gives the same load.

    Raises:
        LoadError: nothing can be drawn, or more than a million requests.
    """
    bursts, lengths = bursts or Bursts(), lengths or Lengths()
    if not (rate > 0 and seconds > 0 and math.isfinite(rate * seconds)):
        raise LoadError("a load needs a rate and a duration above 0")
    if rate * seconds > MAX_ARRIVALS / 1.5:
        raise LoadError(f"{rate:g} requests/s for {seconds:g} s are more than {MAX_ARRIVALS:,} requests")
    if not mix or min(mix.values()) < 0 or sum(mix.values()) <= 0:
        raise LoadError("the mix names policies with shares of 0 or more, at least one above")
    rng = random.Random(seed)
    names, weights = list(mix), list(mix.values())
    found = []
    for at in _times(rate, seconds, bursts, rng):
        prompt = rng.choice(prompts) if prompts else None
        tokens = _log_uniform(rng, *lengths.answer_tokens)
        found.append(
            Arrival(
                at=at,
                policy=rng.choices(names, weights)[0],
                prompt=prompt,
                prompt_bytes=None if prompt is not None else _log_uniform(rng, *lengths.prompt_bytes),
                max_tokens=tokens,
                answer_tokens=tokens,
            )
        )
    return found


def _times(rate: float, seconds: float, bursts: Bursts, rng: random.Random) -> Iterable[float]:
    """Arrival times by thinning (Lewis and Shedler 1979): candidates at the greatest rate, kept in proportion."""
    calm = rate * (1 - bursts.share * bursts.factor) / (1 - bursts.share)
    peak = rate * bursts.factor
    length = bursts.share * bursts.period_s
    cycle, begins = -1, 0.0
    at = rng.expovariate(peak)
    while at < seconds:
        if int(at / bursts.period_s) != cycle:
            cycle = int(at / bursts.period_s)
            begins = cycle * bursts.period_s + rng.random() * (bursts.period_s - length)
        now = peak if begins <= at < begins + length else calm
        if rng.random() * peak < now:
            yield at
        at += rng.expovariate(peak)


def _log_uniform(rng: random.Random, low: int, high: int) -> int:
    return min(high, max(low, round(math.exp(rng.uniform(math.log(low - 0.5), math.log(high + 0.5))))))


def read_load(path: str | Path) -> list[Arrival]:
    """A load's file, one `Arrival` a line as JSON, in any order of time. Raises `LoadError` naming the line."""
    try:
        with Path(path).open("rb") as lines:
            found = list(_parsed(lines, str(path)))
    except OSError as error:
        raise LoadError(f"{path}: {error.strerror or error}") from None
    if not found:
        raise LoadError(f"{path} holds no requests")
    return sorted(found, key=lambda arrival: arrival.at)


def _parsed(lines: Iterable[bytes], name: str) -> Iterable[Arrival]:
    count = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        count += 1
        if count > MAX_ARRIVALS:
            raise LoadError(f"{name} holds more than {MAX_ARRIVALS:,} requests")
        try:
            arrival = Arrival.model_validate(orjson.loads(line))
        except orjson.JSONDecodeError as error:
            raise LoadError(f"{name}:{number}: not JSON: {error}") from None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise LoadError(f"{name}:{number}: {where + ': ' if where else ''}{first['msg']}") from None
        if (arrival.prompt is None) == (arrival.prompt_bytes is None):
            raise LoadError(f"{name}:{number}: give one of `prompt` and `prompt_bytes`")
        yield arrival


def write_load(path: Path, load: Iterable[Arrival]) -> None:
    """The same file, written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as out:
        for arrival in load:
            said: dict[str, Any] = arrival.model_dump(exclude_none=True)
            out.write(orjson.dumps(said) + b"\n")
