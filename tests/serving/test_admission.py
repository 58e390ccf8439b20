"""Places shared by several gateways over a real Valkey: one order, no lost place, and life without the store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import msgpack
import pytest

from signalbox.serving import admission as module
from signalbox.serving.access import AdmissionConfig
from signalbox.serving.admission import Admission, Shed, Slot
from signalbox.serving.embedded_valkey import EmbeddedValkey
from signalbox.serving.store import Store


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with EmbeddedValkey() as url:
        yield url


@asynccontextmanager
async def door(url: str, expert: str, places: int = 1, **changes: Any) -> AsyncIterator[Admission]:
    """A gateway's door to one expert."""
    store = Store(url)
    admission = Admission(store, AdmissionConfig(**changes), [expert], lambda _: places)
    await admission.start()
    try:
        yield admission
    finally:
        await admission.close()
        await store.close()


async def soon(condition: Any) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


async def wait_in_store(admission: Admission, expert: str, count: int) -> None:
    """Wait until so many wait for the expert in the store, over all gateways."""
    async with asyncio.timeout(30):
        while True:
            state = await admission._store.get(f"admission:queue:{expert}")
            if state is not None and len(msgpack.unpackb(state)["waiting"]) == count:
                return
            await asyncio.sleep(0.01)


def waiting(admission: Admission) -> int:
    return sum(not held.running.done() for held in admission._held.values())


async def test_one_place_over_two_gateways(url: str) -> None:
    """Never two at once, and all get their turn, whichever gateway they came through."""
    async with door(url, "one") as a, door(url, "one") as b:
        inside, most, served = 0, 0, 0

        async def visit(admission: Admission) -> None:
            nonlocal inside, most, served
            slot = await admission.enter("one", service_s=0.01)
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0.005)
            inside -= 1
            served += 1
            slot.leave(completed=True)

        await asyncio.gather(*(visit((a, b)[i % 2]) for i in range(40)))
        assert (served, most) == (40, 1)


async def test_priority_and_deadline_hold_across_gateways(url: str) -> None:
    async with door(url, "order") as a, door(url, "order") as b:
        first = await a.enter("order")
        order: list[str] = []

        async def visit(admission: Admission, name: str, **terms: Any) -> None:
            slot = await admission.enter("order", service_s=0.01, **terms)
            order.append(name)
            slot.leave(completed=False)

        tasks = [
            asyncio.create_task(visit(admission, name, **terms))
            for admission, name, terms in (
                (a, "late", {"slack_s": 50}),
                (b, "soon", {"slack_s": 30}),
                (b, "gold", {"slack_s": 55, "priority": 2}),
                (a, "bronze", {"slack_s": 20, "priority": -1}),
            )
        ]
        await wait_in_store(a, "order", 4)
        first.leave(completed=False)
        await asyncio.gather(*tasks)
        assert order == ["gold", "soon", "late", "bronze"]


async def test_who_cannot_start_in_time_is_told_at_once(url: str) -> None:
    async with door(url, "late") as admission:
        slot = await admission.enter("late", service_s=50)
        with pytest.raises(Shed) as caught:
            await admission.enter("late", slack_s=5, service_s=1)
        assert (caught.value.status, caught.value.code) == (429, "shed_deadline")
        assert caught.value.retry_after_s is not None and 20 < caught.value.retry_after_s <= 50
        slot.leave(completed=True)


async def test_a_request_of_greater_priority_displaces_one_at_another_gateway(url: str) -> None:
    async with door(url, "displaced") as a, door(url, "displaced") as b:
        slot = await a.enter("displaced", service_s=10)
        bronze = asyncio.create_task(a.enter("displaced", slack_s=12, service_s=5))
        await wait_in_store(a, "displaced", 1)
        gold = asyncio.create_task(b.enter("displaced", slack_s=20, service_s=5, priority=2))
        with pytest.raises(Shed) as caught:
            await bronze
        assert caught.value.code == "shed_priority"
        slot.leave(completed=True)
        (await gold).leave(completed=True)


async def test_a_full_queue(url: str) -> None:
    async with door(url, "full", max_queued=2) as admission:
        slots = [await admission.enter("full")]
        queued = {asyncio.create_task(admission.enter("full")) for _ in range(2)}
        await wait_in_store(admission, "full", 2)
        with pytest.raises(Shed) as caught:
            await admission.enter("full")
        assert caught.value.code == "queue_full"
        while queued:  # in the order in which they reached the store, which may be the other
            slots.pop().leave(completed=True)
            done, queued = await asyncio.wait(queued, return_when=asyncio.FIRST_COMPLETED)
            slots.append(await done.pop())
        slots.pop().leave(completed=True)


async def test_a_client_that_goes_away_leaves_no_trace(url: str) -> None:
    async with door(url, "gone") as admission:
        for moment in (0.0, 0.0005, 0.001, 0.002, 0.01):
            slot = await admission.enter("gone")
            tasks = [asyncio.create_task(admission.enter("gone")) for _ in range(5)]
            await asyncio.sleep(moment)
            slot.leave(completed=True)
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            for found in ended:
                if isinstance(found, Slot):
                    found.leave(completed=False)
        async with asyncio.timeout(30):  # what arrived after its client had gone is freed by the next sync
            (await admission.enter("gone")).leave(completed=True)
        assert not admission._held


async def test_a_gateway_that_dies_gives_its_places_back(url: str) -> None:
    async with door(url, "dead") as survivor:
        store = Store(url)
        dying = Admission(store, AdmissionConfig(), ["dead"], lambda _: 1)
        await dying.enter("dead", service_s=1)  # it never starts its tasks: nothing is heard of it again
        await store.close()
        async with asyncio.timeout(60):
            slot = await survivor.enter("dead", slack_s=50, service_s=0.1, priority=1)
        slot.leave(completed=True)


async def test_what_the_store_forgets_comes_again(url: str) -> None:
    async with door(url, "forgotten") as admission:
        slot = await admission.enter("forgotten")
        task = asyncio.create_task(admission.enter("forgotten"))
        await wait_in_store(admission, "forgotten", 1)
        await admission._store.delete("admission:queue:forgotten")
        (await asyncio.wait_for(task, 30)).leave(completed=True)
        slot.leave(completed=True)


async def test_forecasts_are_by_priority(url: str) -> None:
    async with door(url, "forecast", max_wait_s=3600) as admission:
        slot = await admission.enter("forecast", service_s=400)
        tasks = [asyncio.create_task(admission.enter("forecast", service_s=400)) for _ in range(2)]
        await soon(lambda: admission.wait_ms("forecast", 0) > 900_000)
        assert admission.wait_ms("forecast", 1) < 450_000, "the two that wait would wait behind it"
        assert admission.wait_ms("unknown", 0) == 0
        assert [ticket.priority for ticket in admission._views["forecast"].queue.waiting] == [0, 0]
        slot.leave(completed=True)
        for task in asyncio.as_completed(tasks):  # either may have reached the store first
            (await task).leave(completed=True)


async def test_without_the_store_each_gateway_goes_on_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SYNC_S", 0.2)
    valkey = EmbeddedValkey()
    async with door(valkey.start(), "alone", places=2) as admission:
        slots = [await admission.enter("alone"), await admission.enter("alone")]
        queued = asyncio.create_task(admission.enter("alone", slack_s=30))
        await soon(lambda: waiting(admission) == 1)
        valkey.stop()
        slots.append(await asyncio.wait_for(queued, 30))  # it waits no longer for a place that nobody can give it
        more = [asyncio.create_task(admission.enter("alone", service_s=1)) for _ in range(4)]
        await soon(lambda: sum(task.done() for task in more) == 1)
        assert waiting(admission) == 3, "two places, one of them taken"
        while more:
            slots += [task.result() for task in more if task.done()]
            more = [task for task in more if not task.done()]
            slots.pop().leave(completed=True)
            if more:
                await asyncio.wait(more, timeout=30, return_when=asyncio.FIRST_COMPLETED)
        for slot in slots:
            slot.leave(completed=True)
        assert not admission._held


async def test_switched_off_everybody_enters(url: str) -> None:
    async with door(url, "off", enabled=False) as admission:
        slots = [await admission.enter("off") for _ in range(5)]
        for slot in slots:
            slot.leave(completed=True)
        assert not admission._held and admission.wait_ms("off", 0) == 0
