"""Live state through a real Valkey: fresh figures over declared ones, stale replicas out, a lost store survived."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from signalbox.experts.base import EngineState
from signalbox.serving import live_state
from signalbox.serving.config import Config
from signalbox.serving.embedded_valkey import EmbeddedValkey
from signalbox.serving.live_state import LiveState, ReplicaState, publish
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


async def test_unroutable_experts_are_no_candidates(store: Store) -> None:
    base = make_config({"tiny": Path("tiny"), "wide": Path("wide")})
    experts = {**base.experts, "wide": base.experts["wide"].model_copy(update={"routable": False})}
    assert [c.name for c in LiveState(store, experts).candidates()] == ["tiny"]
