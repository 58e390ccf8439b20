"""Live state through a real Valkey: fresh figures over declared ones, stale replicas out, a lost store survived."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import orjson
import pytest

from signalbox.experts.base import EngineState
from signalbox.policies.base import RequestShape
from signalbox.policies.latency import LatencyState
from signalbox.serving import live_state
from signalbox.serving.config import Config
from signalbox.serving.embedded_valkey import EmbeddedValkey
from signalbox.serving.live_state import LiveState, ReplicaState, candidate, publish
from signalbox.serving.pool import Pool
from signalbox.serving.store import Store
from tests.serving.conftest import make_config

FAST = EngineState(running=2, waiting=1, max_running=8, max_waiting=8, ttft_ms=80.0, tpot_ms=8.0)
SLOW = EngineState(running=1, waiting=0, max_running=8, max_waiting=8, ttft_ms=120.0, tpot_ms=12.0)


@pytest.fixture
def config() -> Config:
    return make_config({"tiny": Path("tiny"), "wide": Path("wide")})


@pytest.fixture(scope="module")
def alone() -> Iterator[str]:
    """A Valkey to which the session's experts do not publish."""
    with EmbeddedValkey() as url:
        yield url


@pytest.fixture
async def store(alone: str) -> AsyncIterator[Store]:
    store = Store(alone)
    await store.delete(live_state.live_key("tiny"), live_state.live_key("wide"))
    yield store
    await store.close()


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def test_measured_figures_overrule_declared_ones(config: Config, store: Store) -> None:
    live = LiveState(store, config.experts)
    declared = {c.name: c for c in live.candidates()}
    assert declared["tiny"].ttft_ms == 500 and declared["tiny"].available, "the store has not been asked yet"
    facts = {"parameters": 135, "context_length": 512, "bytes_per_token": 3.5, "fingerprint": "f"}
    await publish(store, "tiny", 0, ReplicaState(True, engine=FAST, sequence=1, **facts))
    await publish(store, "tiny", 1, ReplicaState(True, engine=SLOW, sequence=1, **facts))
    await publish(store, "wide", 0, ReplicaState(False, reason="out of memory", sequence=1))
    await live.refresh()
    tiny, wide = live.candidates()
    assert (tiny.ttft_ms, tiny.tpot_ms, tiny.available) == (100.0, 10.0, True), "mean over the replicas"
    assert (tiny.context_length, tiny.parameters, tiny.bytes_per_token) == (512, 135, 3.5)
    assert live.expert("tiny").running == 3 and live.expert("tiny").replicas == 2
    assert live.expert("tiny").fingerprint == "f"
    assert not wide.available and wide.ttft_ms == 500 and live.expert("wide").reason == "out of memory"


async def test_an_expert_that_never_reported_is_starting(config: Config, store: Store) -> None:
    live = LiveState(store, config.experts)
    await live.refresh()
    assert live.expert("tiny").reason == "starting" and not live.candidates()[0].available


async def test_a_silent_replica_is_not_counted_on(config: Config, store: Store) -> None:
    clock = Clock()
    live = LiveState(store, config.experts, clock=clock)
    await publish(store, "tiny", 0, ReplicaState(True, engine=FAST, sequence=7))
    await live.refresh()
    clock.now += live_state.STALE_S - 0.1
    await live.refresh()
    assert live.expert("tiny").ready
    clock.now += 0.2
    await live.refresh()
    assert not live.expert("tiny").ready and "no replica reports" in live.expert("tiny").reason
    await publish(store, "tiny", 0, ReplicaState(True, engine=FAST, sequence=8))
    await live.refresh()
    assert live.expert("tiny").ready


async def test_an_expert_that_could_not_be_reached_is_doubted_until_it_reports(config: Config, store: Store) -> None:
    live = LiveState(store, config.experts)
    await publish(store, "tiny", 0, ReplicaState(True, engine=FAST, sequence=7))
    await live.refresh()
    live.doubt("tiny")
    assert not live.expert("tiny").ready, "at once"
    await live.refresh()
    assert not live.expert("tiny").ready, "what the dead replica left in the store is not taken for a report"
    await publish(store, "tiny", 1, ReplicaState(True, engine=SLOW, sequence=1))
    await live.refresh()
    assert live.expert("tiny").ready and live.expert("tiny").ttft_ms == 120.0


async def test_a_lost_store_leaves_what_was_seen_last(config: Config) -> None:
    server = EmbeddedValkey()
    store = Store(server.start(), timeout_s=0.2, retry_after_s=0.0)
    try:
        clock = Clock()
        live = LiveState(store, config.experts, clock=clock)
        await publish(store, "tiny", 0, ReplicaState(True, engine=FAST, sequence=1))
        await live.refresh()
        server.stop()
        await live.refresh()
        assert live.store_error
        live.doubt("tiny")
        clock.now += 100
        await live.refresh()
        assert live.expert("tiny").ready and live.candidates()[0].ttft_ms == 80.0
    finally:
        server.stop()
        await store.close()


async def test_a_store_that_never_answered_leaves_declared_figures(config: Config) -> None:
    store = Store("redis://127.0.0.1:1", timeout_s=0.2)
    live = LiveState(store, config.experts)
    await live.start()
    candidates = live.candidates()
    assert live.store_error and [c.available for c in candidates] == [True, True]
    assert [c.ttft_ms for c in candidates] == [500, 500]
    await live.close()
    await store.close()


async def test_rubbish_in_the_store_is_passed_over(
    config: Config, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    await publish(store, "tiny", 0, ReplicaState(True, engine=FAST, sequence=1))
    await store.hset(live_state.live_key("tiny"), {"1": b"rubbish", "2": b'{"ready": true}', "3": b'{"engine": 5}'})
    live = LiveState(store, config.experts)
    await live.refresh()
    assert live.expert("tiny").ready and live.expert("tiny").replicas == 1
    assert "not a replica's state" in caplog.text


LEARNT = LatencyState(
    (10.0, 1.0, 20.0, 15.0, 0.0, 1.0),
    (10.0, 0.0, 2.0, 0.0),
    others=3.0,
    answer_tokens=50.0,
    max_running=8,
    ttft_error=0.1,
    tpot_error=0.05,
    ttft_count=100,
    tpot_count=90,
)


async def test_figures_are_those_of_the_request(config: Config, store: Store) -> None:
    """From each replica's own model and load; the mean over both."""
    slower = dataclasses.replace(LEARNT, ttft=(20.0, 1.0, 20.0, 15.0, 0.0, 1.0), ttft_error=0.3, ttft_count=300)
    await publish(store, "tiny", 0, ReplicaState(True, engine=FAST, sequence=1, latency=LEARNT))
    await publish(
        store, "tiny", 1, ReplicaState(True, engine=SLOW, sequence=1, latency=slower, prompt_tokens_waiting=100.0)
    )
    live = LiveState(store, config.experts)
    await live.refresh()
    seen, expert = live.expert("tiny"), config.experts["tiny"]
    assert seen.capacity == 16 and seen.ttft_count == 400
    # FAST has 3 requests: a step over 4 takes 16 ms. SLOW has 1, 12 ms, and 100 prompt tokens to read first.
    short = candidate("tiny", expert, seen, RequestShape(prompt_bytes=400, answer_tokens=1))
    assert short.ttft_ms == pytest.approx(((10 + 16 + 20) + (20 + 12 + 20 + 15)) / 2)
    longer = candidate("tiny", expert, seen, RequestShape(prompt_bytes=4000, answer_tokens=1))
    assert longer.ttft_ms == pytest.approx(short.ttft_ms + 9 * 20) and longer.tpot_ms == short.tpot_ms
    assert candidate("tiny", expert, seen).ttft_ms == 100.0, "without a shape: the means over recent requests"
    said = live_state.describe(seen)
    assert said["latency_model"] == {
        "ttft_error": pytest.approx((100 * 0.1 + 256 * 0.3) / 356, abs=1e-4),
        "tpot_error": 0.05,
        "ttft_requests": 400,
        "tpot_requests": 180,
    }


async def test_what_waits_in_front_of_the_expert_does_not_wait_in_it_again(config: Config, store: Store) -> None:
    full = EngineState(running=8, waiting=4, max_running=8, max_waiting=8)
    await publish(store, "tiny", 0, ReplicaState(True, engine=full, sequence=1, latency=LEARNT))
    live = LiveState(store, config.experts)
    await live.refresh()
    shape, expert = RequestShape(400, 50), config.experts["tiny"]
    inside, in_front = (
        live_state.latency(expert, live.expert("tiny"), shape, queued_in_front=front) for front in (False, True)
    )
    assert in_front.ttft_ms == pytest.approx(10 + 24 + 20), "as the eighth in the batch"
    assert inside.ttft_ms > in_front.ttft_ms + 5 * 50 * 24 / 8 - 1, "behind five that must finish first"
    many = live_state.latency(expert, live.expert("wide"), RequestShape(400, 50, samples=4))
    assert (many.ttft_ms, many.tpot_ms) == (500, 50), "nothing is known: the declared figures"
    pool = Pool(config, live=live)
    target = pool.known("tiny")
    assert target is not None and config.admission.enabled
    assert pool.latency(target, shape) == in_front
    (tiny, _), asked = pool.candidates(shape), pool.candidate("tiny", shape)
    assert tiny == asked and tiny.ttft_ms == in_front.ttft_ms and pool.candidate("nobody", shape) is None


async def test_states_of_other_versions_can_be_read(config: Config, store: Store) -> None:
    """A rolling upgrade: an older replica says less, a newer one more, one has another model of its latency."""
    new = orjson.loads(ReplicaState(True, engine=FAST, sequence=1, latency=LEARNT).dumps())
    new |= {"colour": "green", "engine": new["engine"] | {"wheels": 4}, "latency": new["latency"] | {"shape": "round"}}
    other = new | {"latency": {"kind": "another"}}
    old = {"ready": True, "engine": {"running": 1, "ttft_ms": 70.0, "tpot_ms": 7.0}}
    states = {str(i): orjson.dumps(said) for i, said in enumerate((new, other, old))}
    await store.hset(live_state.live_key("tiny"), states)
    live = LiveState(store, config.experts)
    await live.refresh()
    seen = live.expert("tiny")
    assert (seen.replicas, seen.running, seen.capacity) == (3, 5, 17)
    assert [speed.model for speed in seen.speeds] == [LEARNT, None, None]
    ttft_ms = live_state.latency(config.experts["tiny"], seen, RequestShape(400, 1)).ttft_ms
    assert ttft_ms == pytest.approx((46 + 80 + 70) / 3), "without a model a replica's means stand"


async def test_unroutable_experts_are_no_candidates(store: Store) -> None:
    base = make_config({"tiny": Path("tiny"), "wide": Path("wide")})
    experts = {**base.experts, "wide": base.experts["wide"].model_copy(update={"routable": False})}
    assert [c.name for c in LiveState(store, experts).candidates()] == ["tiny"]
