"""What `benchmarks.sla` does with a running service: capacity, calibration, and one load through one system."""

from __future__ import annotations

import asyncio
import bisect
import math
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import httpx

from benchmarks.latency_model import OtherWork
from benchmarks.serving_processes import chat, percentile
from benchmarks.sla_load import Sent, generate
from benchmarks.sla_pools import MIX, PRIORITIES, Pool
from signalbox.experts.catalog import Price
from signalbox.policies.attainment import Outcome
from signalbox.policies.calibrate import Calibration, Observation, calibrate
from signalbox.policies.simulate_load import Arrival, synthetic

PATH = "/v1/chat/completions"
IDLE_S = 30.0
SHARES = (0.0, 0.25, 0.5, 1.0, 1.1)  # of the places that are taken in the closed loop; 0: one request
System = Literal["signalbox", "first come", "round robin"]


@dataclass(frozen=True)
class Level:
    """The closed loop at one concurrency: each expert's finished requests a second, and all that was sent."""

    streams: dict[str, int]
    rate: dict[str, float]
    sent: list[Sent]


@dataclass(frozen=True)
class Capacity:
    """What the pool can finish a second, and the latencies that the ceilings are made of, in ms.

    `unloaded_ttft_ms`: median with one request at a time on each expert, of the slowest expert; `answer_ms` and
    `answer_p90_ms`: from first to last moment of an answer while all places are taken, over all experts.
    """

    requests_per_s: float
    by_expert: dict[str, float]
    levels: list[Level]
    unloaded_ttft_ms: float
    answer_ms: float
    answer_p90_ms: float


def load_of(pool: Pool, rate: float, seconds: float, seed: int) -> list[Arrival]:
    """The load of one factor: the same for every system."""
    return synthetic(rate, seconds, MIX, lengths=pool.lengths, prompts=pool.prompts, seed=seed)


async def measure_capacity(pool: Pool, port: int) -> Capacity:
    """Closed loop on all experts at once, from one request each to two more than there are places.

    The requests are those of the load, by the experts' names. An expert's capacity is its best rate.
    """
    sample = load_of(pool, 50.0, 20.0, seed=99)
    levels = []
    for share in SHARES:
        streams = {name: max(1, round(share * places)) for name, places in pool.places.items()}
        if share > 1:
            streams = {name: places + 2 for name, places in pool.places.items()}
        groups = [
            {
                "label": name,
                "streams": count,
                "bodies": [chat(name, a.prompt or "", a.max_tokens or 1) for a in sample],
            }
            for name, count in streams.items()
        ]
        job = {"port": port, "path": PATH, "seconds": pool.capacity_s, "think": pool.think, "groups": groups}
        sent = await generate(job)
        levels.append(Level(streams, {name: _rate(sent, name) for name in streams}, sent))
        await idle(port)
    by_expert = {name: max(level.rate[name] for level in levels) for name in pool.places}
    alone, full = levels[0], levels[-2]
    return Capacity(
        requests_per_s=sum(by_expert.values()),
        by_expert=by_expert,
        levels=levels,
        unloaded_ttft_ms=max(_percentile_ms(_ttft(alone.sent, name), 0.5) for name in pool.places),
        answer_ms=_percentile_ms([s.ended - s.sent for s in full.sent if _whole(s)], 0.5),
        answer_p90_ms=_percentile_ms([s.ended - s.sent for s in full.sent if _whole(s)], 0.9),
    )


def _rate(sent: Sequence[Sent], name: str) -> float:
    """Requests finished a second, from the first end to the last: neither start nor stop counts."""
    ends = sorted(s.ended for s in sent if s.label == name and _whole(s))
    if len(ends) < 3:
        raise RuntimeError(f"{name} finished {len(ends)} requests: make the levels longer; {_errors(sent)}")
    return (len(ends) - 1) / (ends[-1] - ends[0])


def _errors(sent: Sequence[Sent]) -> list[str]:
    return sorted({f"{s.status} {s.error}" for s in sent if s.error})[:5]


def _whole(sent: Sent) -> bool:
    return sent.ended > 0 and not sent.error and sent.status == 200 and sent.first > 0


def _ttft(sent: Sequence[Sent], name: str) -> list[float]:
    return [s.first - s.sent for s in sent if s.label == name and _whole(s)]


def _percentile_ms(seconds: Sequence[float], share: float) -> float:
    return 1000 * percentile(seconds, share)


def calibrated(pool: Pool, capacity: Capacity) -> dict[str, Calibration]:
    """Each expert's speed, fitted to the levels at which nobody waited for a place."""
    found = {}
    for name in pool.places:
        seen = []
        for level in capacity.levels[:-1]:
            done = [s for s in level.sent if s.label == name and s.sent > 0]
            begins = sorted(s.sent for s in done)
            ends = sorted(s.ended or math.inf for s in done)
            for s in done:
                if not _whole(s) or s.completion_tokens < 2:
                    continue
                tpot_ms = 1000 * (s.last - s.first) / (s.completion_tokens - 1)
                batch = _mean_running(begins, ends, s.sent, s.ended)
                seen.append(
                    Observation(
                        max(1.0, batch), s.prompt_tokens, s.completion_tokens, 1000 * (s.first - s.sent), tpot_ms
                    )
                )
        found[name] = calibrate(seen)
    return found


def _mean_running(begins: Sequence[float], ends: Sequence[float], since: float, until: float) -> float:
    """Requests in flight, itself included, as a mean over some moments between the two."""
    moments = [since + (until - since) * (i + 0.5) / 16 for i in range(16)]
    return sum(bisect.bisect_right(begins, m) - bisect.bisect_right(ends, m) for m in moments) / 16


def bytes_per_token(pool: Pool, capacity: Capacity) -> dict[str, float]:
    """Bytes of a prompt's text for each token that the engine counted, chat template included."""
    mean = sum(len(p.encode()) for p in pool.prompts) / len(pool.prompts)
    found = {}
    for name in pool.places:
        counts = [s.prompt_tokens for level in capacity.levels for s in level.sent if s.label == name and _whole(s)]
        found[name] = mean / (sum(counts) / len(counts))
    return found


def tiers_of(pool: Pool, capacity: Capacity) -> dict[str, dict[str, Any]]:
    """Three policies whose ceilings are sensible for the pool, as a configuration has them.

    A request that finds all places taken waits until an answer ends. So gold's time to first token is that of a whole
    answer under full load (at least five times the unloaded time to first token); silver's is twice and bronze's four
    times gold's. The total is that and twice what nine in ten answers take under full load.
    """
    gold = max(5 * capacity.unloaded_ttft_ms, capacity.answer_ms)
    found = {}
    for name, factor in (("gold", 1), ("silver", 2), ("bronze", 4)):
        ttft = 10 * math.ceil(factor * gold / 10)
        total = ttft + 10 * math.ceil(2 * capacity.answer_p90_ms / 10)
        found[name] = {
            "slo": {"max_ttft_ms": ttft, "max_total_ms": total},
            "objective": dict(pool.objectives[name]),
            "priority": PRIORITIES[name],
            "fallback": 1,
            "cache": "off",
        }
    return found


@dataclass(frozen=True)
class Played:
    """A load through a system: what became of each request, and how late the generator was, in ms.

    `other_lengths` counts answers of another length than asked for; `others_cores` is how much of the machine programs
    that are no part of this took meanwhile.
    """

    outcomes: list[Outcome]
    lag_p99_ms: float
    other_lengths: int
    others_cores: float


async def play(pool: Pool, port: int, system: System, load: Sequence[Arrival], grace_s: float) -> Played:
    """Send a load open loop, streamed, and wait until the service is idle again."""
    names = list(pool.places)
    requests = []
    for i, a in enumerate(load):
        model = {"signalbox": f"auto:{a.policy}", "first come": "auto:plain", "round robin": names[i % len(names)]}
        requests.append((a.at, str(i), chat(model[system], a.prompt or "", a.max_tokens or 1)))
    others, exited_s, since = OtherWork(), _exited_s(), time.monotonic()
    sent = await generate({"port": port, "path": PATH, "requests": requests, "grace": grace_s})
    generator = (_exited_s() - exited_s) / (time.monotonic() - since)
    others_cores = max(0.0, others.cores() - generator)
    prices = {name: Price(**expert.get("price", {})) for name, expert in pool.experts.items()}
    outcomes = [_outcome(load[int(s.label)], s, prices) for s in sent]
    lags = [s.sent - s.due for s in sent if s.sent]
    wrong = sum(_whole(s) and s.completion_tokens != load[int(s.label)].max_tokens for s in sent)
    await idle(port)
    return Played(outcomes, _percentile_ms(lags, 0.99), wrong, others_cores)


def _exited_s() -> float:
    """Processor seconds of child processes that have ended: the load generators'."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _outcome(arrival: Arrival, sent: Sent, prices: Mapping[str, Price]) -> Outcome:
    """Times are counted from when the request should have been sent."""
    if sent.error or (sent.ended and not _whole(sent)):
        shed = sent.status in (429, 503)
        reason = sent.error[:64] if shed else f"{sent.status} {sent.error[:64] or 'no text'}"
        return Outcome(arrival.policy, arrival.at, "shed" if shed else "failed", reason)
    if not sent.ended:
        return Outcome(arrival.policy, arrival.at, "unfinished")
    tokens = sent.completion_tokens
    price = prices.get(sent.expert, Price())
    return Outcome(
        policy=arrival.policy,
        at=arrival.at,
        status="answered",
        expert=sent.expert,
        ttft_ms=1000 * (sent.first - sent.due),
        tpot_ms=1000 * (sent.last - sent.first) / (tokens - 1) if tokens > 1 else 0.0,
        total_ms=1000 * (sent.last - sent.due),
        cost_usd=price.usd(sent.prompt_tokens, tokens),
    )


async def idle(port: int) -> None:
    """Until no expert has anything to do. Raises `RuntimeError` where that takes too long."""
    deadline = time.monotonic() + IDLE_S
    quiet = 0
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=10) as client:
        while quiet < 3:
            await asyncio.sleep(0.3)
            experts = (await client.get("/readyz")).json()["experts"]
            busy = sum(state.get("running", 0) + state.get("waiting", 0) for state in experts.values())
            quiet = 0 if busy else quiet + 1
            if time.monotonic() > deadline:
                raise RuntimeError(f"the service is not idle {IDLE_S:g} s after the load: {experts}")
