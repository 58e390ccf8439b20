"""A replica's adapters, with a scripted engine: what a real one does only rarely (slow, full, wrong, started anew)."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from signalbox.experts.base import (
    Chunk,
    EngineState,
    ExpertError,
    ExpertUnavailable,
    GenerateRequest,
    InvalidRequest,
    QueueFull,
    TokenLogprob,
    Usage,
)
from signalbox.serving.adapter_replica import ReplicaAdapters


class ScriptedEngine:
    """An engine that does as told. `gate` holds loads up, `errors` are raised by the next loads or answers."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.calls: list[str] = []
        self.gate, self.drained = asyncio.Event(), asyncio.Event()
        self.gate.set()
        self.drained.set()
        self.load_errors: list[Exception] = []
        self.answer_errors: list[Exception] = []
        self.logprob = -1.0

    async def load(self, name: str, path: str) -> None:
        self.calls.append(f"load {name}")
        await self.gate.wait()
        if self.load_errors:
            raise self.load_errors.pop(0)
        self.loaded.append(name)

    async def unload(self, name: str) -> None:
        self.calls.append(f"unload {name}")
        await self.drained.wait()
        if name in self.loaded:
            self.loaded.remove(name)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        assert request.adapter in self.loaded and request.sampling.max_tokens == 1
        if self.answer_errors:
            raise self.answer_errors.pop(0)
        yield Chunk("x", [1], [TokenLogprob("x", self.logprob, b"x")], "length", Usage(1, 1))

    def state(self) -> EngineState:
        return EngineState(adapters=dict.fromkeys(self.loaded, 0))


def made(slots: int = 2) -> tuple[ReplicaAdapters, ScriptedEngine]:
    adapters, engine = ReplicaAdapters("r1", slots), ScriptedEngine()
    adapters.use(engine)  # type: ignore[arg-type]
    return adapters, engine


def held(adapters: ReplicaAdapters) -> dict[str, str]:
    return {v: h.state for v, h in adapters.report(ready=True, reason="").adapters.items()}


async def test_loaded_tried_out_and_told(tmp_path: Path) -> None:
    adapters, engine = made()
    (tmp_path / "adapter_model.safetensors").write_bytes(b"12345")
    assert await adapters.load("a@1", str(tmp_path), "h") is None
    report = adapters.report(ready=True, reason="")
    assert report.holds("a@1") and report.adapters["a@1"].nbytes == 5 and report.adapters["a@1"].content_hash == "h"
    assert await adapters.load("a@1", str(tmp_path), "h") is None and engine.calls == ["load a@1"]
    error = await adapters.load("a@1", str(tmp_path), "other")
    assert isinstance(error, InvalidRequest) and error.status == 409
    assert await adapters.unload("a@1") is None and held(adapters) == {} and engine.loaded == []
    assert await adapters.unload("a@1") is None


async def test_two_callers_share_one_load_and_one_may_leave() -> None:
    adapters, engine = made()
    engine.gate.clear()
    one, two = (asyncio.create_task(adapters.load("a@1", "/a", "h")) for _ in range(2))
    await asyncio.sleep(0.01)
    assert held(adapters) == {"a@1": "loading"} and not adapters.report(ready=True, reason="").holds("a@1")
    one.cancel()  # the registry died
    engine.gate.set()
    assert await two is None and engine.calls == ["load a@1"] and held(adapters) == {"a@1": "ready"}


async def test_unloading_waits_for_loading_and_loading_for_unloading() -> None:
    adapters, engine = made()
    engine.gate.clear()
    load = asyncio.create_task(adapters.load("a@1", "/a", "h"))
    await asyncio.sleep(0.01)
    unload = asyncio.create_task(adapters.unload("a@1"))
    await asyncio.sleep(0.01)
    assert held(adapters) == {"a@1": "unloading"} and engine.calls == ["load a@1"]
    engine.drained.clear()
    engine.gate.set()
    await load
    again = asyncio.create_task(adapters.load("a@1", "/a", "h"))
    await asyncio.sleep(0.01)
    assert engine.calls == ["load a@1", "unload a@1"] and not again.done()
    engine.drained.set()
    assert await unload is None and await again is None
    assert engine.loaded == ["a@1"] and held(adapters) == {"a@1": "ready"}


async def test_no_more_than_the_slots() -> None:
    adapters, engine = made(slots=1)
    assert await adapters.load("a@1", "/a", "h") is None
    assert isinstance(await adapters.load("b@1", "/b", "h"), QueueFull) and engine.loaded == ["a@1"]


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (
            InvalidRequest("does not fit", code="shape_mismatch", status=422, param="t"),
            InvalidRequest,
            "shape_mismatch",
        ),
        (ExpertUnavailable("later"), ExpertUnavailable, "expert_unavailable"),
        (RuntimeError("out of memory"), InvalidRequest, "load_failed"),
    ],
)
async def test_a_load_that_fails_leaves_nothing(error: Exception, kind: type[ExpertError], code: str) -> None:
    adapters, engine = made()
    engine.load_errors.append(error)
    found = await adapters.load("a@1", "/a", "h")
    assert isinstance(found, kind) and found.code == code and held(adapters) == {}
    assert await adapters.load("a@1", "/a", "h") is None


async def test_a_canary_that_is_not_finite_refuses_the_adapter() -> None:
    adapters, engine = made()
    engine.logprob = math.nan
    found = await adapters.load("a@1", "/a", "h")
    assert isinstance(found, InvalidRequest) and found.code == "canary_failed"
    assert held(adapters) == {} and engine.loaded == []


async def test_a_canary_waits_while_the_queue_is_full() -> None:
    adapters, engine = made()
    engine.answer_errors += [QueueFull("full"), QueueFull("full")]
    assert await adapters.load("a@1", "/a", "h") is None and held(adapters) == {"a@1": "ready"}


async def test_an_engine_that_was_started_anew_holds_nothing() -> None:
    adapters, engine = made()
    assert await adapters.load("a@1", "/a", "h") is None
    nonce = adapters.report(ready=True, reason="").nonce
    engine.gate.clear()
    loading = asyncio.create_task(adapters.load("b@1", "/b", "h"))
    await asyncio.sleep(0.01)
    fresh = ScriptedEngine()
    adapters.use(fresh)  # type: ignore[arg-type]
    assert isinstance(await loading, ExpertUnavailable)
    assert held(adapters) == {} and adapters.report(ready=True, reason="").nonce != nonce
    assert await adapters.load("a@1", "/a", "h") is None and fresh.loaded == ["a@1"]
    adapters.use(None)
    assert isinstance(await adapters.load("a@1", "/a", "h"), ExpertUnavailable)


async def test_use_is_counted() -> None:
    adapters, _ = made()
    await adapters.load("a@1", "/a", "h")

    def told() -> Any:
        return adapters.report(ready=True, reason="").adapters["a@1"]

    with adapters.using("a@1"), adapters.using(None), adapters.using("unknown@1"):
        assert told().in_flight == 1
        await asyncio.sleep(0.05)
    said = told()
    assert said.in_flight == 0 and said.age_s - said.idle_s >= 0.05
