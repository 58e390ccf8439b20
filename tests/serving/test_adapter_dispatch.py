"""Adapters as experts: names, versions, fallback and cache, with scripted experts over the real table in a real store.

The registry is not there: what it would have committed is written by `Table.commit`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from signalbox.adapters.lifecycle import ServedAdapter
from signalbox.experts.base import AdapterNotLoaded, Chunk, ExpertUnavailable, GenerateRequest, InvalidRequest, Usage
from signalbox.serving.adapter_table import GENERATION, TABLE, AdapterTable
from signalbox.serving.dispatch import Dispatcher, Run
from signalbox.serving.live_state import LiveState
from signalbox.serving.pool import Pool
from signalbox.serving.protocols.openai import parse_chat
from signalbox.serving.store import Store
from tests.serving.conftest import make_config
from tests.serving.test_dispatch import CountingRouting, ScriptedExpert


class Echo(ScriptedExpert):
    """Answers with the version id that it was asked for; `lost` are versions that it does not hold (any more)."""

    def __init__(self) -> None:
        super().__init__()
        self.lost: set[str] = set()

    async def generate(self, request: GenerateRequest) -> AsyncIterator[list[Chunk]]:
        self.requests.append(request)
        if request.adapter in self.lost:
            raise AdapterNotLoaded(f"{request.adapter} is not here")
        yield [Chunk(request.adapter or "base", [1])]
        yield [Chunk("", [], finish_reason="stop", usage=Usage(1, 1))]


def served(name: str, number: int = 1, base: str = "tiny", **changes: Any) -> ServedAdapter:
    adapter = ServedAdapter(
        name=name,
        base=base,
        version=f"{name}@{number}",
        number=number,
        kind="lora",
        content_hash=f"hash-{name}-{number}",
        rank=8,
        nbytes=1000,
        pinned=False,
        holders=frozenset({"replica"}),
        evicted=False,
        loaded_at=1.0,
    )
    return dataclasses.replace(adapter, **changes)


class Bench:
    """A dispatcher over the experts `tiny` and `wide`; `quality` is what the router predicts."""

    def __init__(self, store: Store, quality: dict[str, float]) -> None:
        self.store = store
        self.config = make_config({"tiny": Path("tiny"), "wide": Path("wide")})
        self.tiny, self.wide = Echo(), ScriptedExpert("w")
        experts: Any = {"tiny": self.tiny, "wide": self.wide}
        self.table = AdapterTable(store, None, {})
        self.routing = CountingRouting({name: (value, 0.01) for name, value in quality.items()})
        self.pool = Pool(self.config, live=LiveState(store, self.config.experts), adapters=self.table)
        self.dispatcher = Dispatcher(self.config, experts=experts, pool=self.pool, routing=self.routing, store=store)

    async def commit(self, *adapters: ServedAdapter) -> None:
        """What the registry does in one step: a new table, a new generation."""
        await self.store.delete(TABLE)
        await self.store.hset(TABLE, {adapter.name: adapter.dumps() for adapter in adapters})
        await self.store.set(GENERATION, str(time.monotonic_ns()))

    async def run(self, model: str, **fields: Any) -> tuple[Run, str]:
        body = {"model": model, "messages": [{"role": "user", "content": "hello"}]} | fields
        run = await self.dispatcher.open(parse_chat(body), "id", time.perf_counter())
        async for _ in run:
            pass
        await self.dispatcher.settle(run)
        await run.aclose()
        return run, run.builder.answer().choices[0].text


@pytest.fixture
async def bench(valkey: str) -> AsyncIterator[Bench]:
    store = Store(valkey)
    bench = Bench(store, {"tiny": 0.5, "wide": 0.6, "tiny:banking": 0.9})
    await bench.commit()
    yield bench
    await bench.commit()
    await store.close()


@pytest.mark.parametrize("name", ["tiny:banking", "banking"])
async def test_by_full_name_and_bare_name(bench: Bench, name: str) -> None:
    await bench.commit(served("banking", 3))
    run, text = await bench.run(name)
    assert (run.expert, text) == ("tiny:banking", "banking@3")
    assert bench.tiny.requests[0].adapter == "banking@3"
    run, text = await bench.run("tiny")
    assert (run.expert, text) == ("tiny", "base"), "the base answers for itself"


@pytest.mark.parametrize(
    "name", ["wide:banking", "tiny:other", "other", "tiny:", ":banking", "banking:tiny", "banking@3"]
)
async def test_names_that_are_none(bench: Bench, name: str) -> None:
    await bench.commit(served("banking", 3))
    with pytest.raises(InvalidRequest) as caught:
        await bench.run(name)
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")
    assert "tiny:banking" in caught.value.message, "it says what there is"


async def test_every_request_after_a_commit_gets_the_new_version(bench: Bench) -> None:
    for number in range(1, 30):
        await bench.commit(served("banking", number))
        answers = await asyncio.gather(*(bench.run("banking", temperature=1) for _ in range(4)))
        assert {text for _, text in answers} == {f"banking@{number}"}
    await bench.commit()
    with pytest.raises(InvalidRequest, match="there is no model 'banking'"):
        await bench.run("banking")


async def test_a_version_that_has_gone_meanwhile_is_looked_up_anew(bench: Bench) -> None:
    await bench.commit(served("banking", 1))
    bench.tiny.lost.add("banking@1")
    asking = asyncio.create_task(bench.run("banking"))
    async with asyncio.timeout(5):
        while not bench.tiny.requests:
            await asyncio.sleep(0.005)
    await bench.commit(served("banking", 2))
    run, text = await asking
    assert (text, run.attempts) == ("banking@2", 1)
    assert {request.adapter for request in bench.tiny.requests} == {"banking@1", "banking@2"}


async def test_one_that_no_replica_holds_falls_back(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("signalbox.serving.dispatch.REPLICA_WAIT_S", 0.2)
    await bench.commit(served("banking"))
    bench.tiny.lost.add("banking@1")
    with pytest.raises(AdapterNotLoaded):
        await bench.run("banking")
    run, text = await bench.run("banking", signalbox={"fallbacks": ["wide"]})
    assert (run.expert, text, run.attempts) == ("wide", "w", 2)
    run, text = await bench.run("wide", signalbox={"fallbacks": ["banking"]})
    assert (run.expert, text) == ("wide", "w")


async def test_an_evicted_one_is_asked_back(bench: Bench) -> None:
    await bench.commit(served("banking", holders=frozenset(), evicted=True))
    with pytest.raises(ExpertUnavailable, match="no adapter registry"):  # whose task it is: there is none here
        await bench.run("banking")


async def test_auto_chooses_an_adapter_while_it_is_there(bench: Bench) -> None:
    run, _ = await bench.run("auto")
    assert run.expert == "wide"
    await bench.commit(served("banking"))
    await bench.table.current("banking")
    run, text = await bench.run("auto")
    assert (run.expert, text) == ("tiny:banking", "banking@1")
    rating = next(r for r in run.plan.decision.ratings if r.expert == "tiny:banking")  # type: ignore[union-attr]
    assert rating.cost_usd > 0, "its tokens cost what its base's cost"
    run, _ = await bench.run("auto", signalbox={"allowed": ["wide", "tiny"]})
    assert run.expert == "wide"
    await bench.commit()
    await bench.table.current("banking")
    run, _ = await bench.run("auto")
    assert run.expert == "wide"


async def test_a_kept_answer_belongs_to_its_version(bench: Bench) -> None:
    await bench.commit(served("banking", 1))
    for verdict in ("miss", "hit"):
        run, text = await bench.run("banking", temperature=0, signalbox={"cache": {"namespace": "kept"}})
        assert (run.cache, text) == (verdict, "banking@1")
    await bench.commit(served("banking", 2))
    run, text = await bench.run("banking", temperature=0, signalbox={"cache": {"namespace": "kept"}})
    assert (run.cache, text) == ("miss", "banking@2")
    await bench.commit(served("banking", 5, content_hash="hash-banking-1"))  # the first content again
    run, text = await bench.run("banking", temperature=0, signalbox={"cache": {"namespace": "kept"}})
    assert (run.cache, text) == ("hit", "banking@1")
    run, text = await bench.run("tiny", temperature=0, signalbox={"cache": {"namespace": "kept"}})
    assert (run.cache, text) == ("miss", "base")


async def test_in_flight_is_counted_until_the_last_byte(bench: Bench) -> None:
    await bench.commit(served("banking"))
    body = {"model": "banking", "messages": [{"role": "user", "content": "hello"}], "stream": True}
    run = await bench.dispatcher.open(parse_chat(body), "id", time.perf_counter())
    assert bench.table._in_flight == {"banking@1": 1}
    async for _ in run:
        assert bench.table._in_flight == {"banking@1": 1}
    await run.aclose()
    assert not bench.table._in_flight
    run = await bench.dispatcher.open(parse_chat(body), "id", time.perf_counter())
    await run.aclose()  # the client went away
    assert not bench.table._in_flight


async def test_a_lease_is_of_a_version_that_some_replica_holds(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    evicted, asked = served("banking", holders=frozenset(), evicted=True), 0

    async def ask(method: str, name: str, *_: object, **__: object) -> dict[str, Any]:
        """A registry that is short of slots: what it loads goes again at once, until the third time."""
        nonlocal asked
        asked += 1
        await bench.commit(served("banking") if asked == 3 else evicted)
        return {"phase": "ready"}

    monkeypatch.setattr(bench.table, "_ask", ask)
    await bench.commit(evicted)
    async with bench.pool.lease("banking") as target:
        assert target.adapter is not None and target.adapter.holders and asked == 3
