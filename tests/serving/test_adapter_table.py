"""The gateway's table in a real Valkey: no read is older than its request, no report newer than what was read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import orjson
import pytest

from signalbox.adapters.lifecycle import Holding, Numbers, Record, ReplicaReport, Version, describe, served
from signalbox.experts.base import ExpertUnavailable
from signalbox.serving import adapter_router, adapter_table
from signalbox.serving.adapter_records import AdapterRecords
from signalbox.serving.adapter_table import GATEWAYS, GENERATION, AdapterTable
from signalbox.serving.embedded_valkey import EmbeddedValkey
from signalbox.serving.store import Store


class CountingStore(Store):
    """Counts the reads of the generation; `slow_s` delays each."""

    reads = 0
    slow_s = 0.0

    async def get(self, key: str) -> bytes | None:
        if key == GENERATION:
            self.reads += 1
            found = await super().get(key)
            await asyncio.sleep(self.slow_s)  # the answer is on its way, and may be old when it comes
            return found
        return await super().get(key)


class Bed:
    def __init__(self, server: EmbeddedValkey, url: str) -> None:
        self.server = server
        self.store = CountingStore(url, timeout_s=0.3, retry_after_s=0.1)
        self.other = Store(url)
        self.records = AdapterRecords(self.other)
        self.table = AdapterTable(self.store, None, {})

    async def switch(self, name: str, number: int, holders: tuple[str, ...] = ("r1",)) -> int:
        """Commit a version, as the registry does."""
        version = Version(number, "ready", "/a", 1.0, content_hash=f"h{number}", kind="lora", rank=4)
        record = Record(name, "tiny", current=number, holders=holders, number=number, versions=(version,))
        return await self.records.write(name, record, served(record), Numbers(), table=True)

    async def report(self) -> dict[str, object]:
        (data,) = (await self.other.hgetall(GATEWAYS)).values()
        return dict(orjson.loads(data))

    async def until(self, **wanted: object) -> None:
        deadline = time.monotonic() + 60
        while not wanted.items() <= (report := await self.report()).items():
            assert time.monotonic() < deadline, (report, wanted)
            await asyncio.sleep(0.01)


@pytest.fixture
async def bed() -> AsyncIterator[Bed]:
    server = EmbeddedValkey()
    made = Bed(server, server.start())
    await made.records.take_over()
    await made.records.read()
    yield made
    await made.table.close()
    await made.store.close()
    await made.other.close()
    server.stop()


async def version(bed: Bed, name: str) -> str | None:
    found = await bed.table.current(name)
    return found.version if found else None


async def test_every_read_after_a_switch_sees_it(bed: Bed) -> None:
    await bed.table.start()
    assert await bed.table.current("bank") is None
    for number in range(1, 50):
        await bed.switch("bank", number)
        assert await version(bed, "bank") == f"bank@{number}"
    assert [adapter.name for adapter in bed.table.served()] == ["bank"]
    await bed.records.write("bank", None, None, Numbers(), table=True)
    assert await bed.table.current("bank") is None


async def test_a_read_that_began_before_the_switch_is_not_shared_by_who_came_after(bed: Bed) -> None:
    await bed.switch("bank", 1)
    await bed.table.start()
    bed.store.slow_s = 0.2
    early = asyncio.create_task(version(bed, "bank"))
    await asyncio.sleep(0.05)  # its read has been answered with the old generation, which is on its way
    await bed.switch("bank", 2)
    late = await version(bed, "bank")
    assert late == "bank@2" and await early in ("bank@1", "bank@2")


async def test_many_requests_share_few_reads(bed: Bed) -> None:
    await bed.switch("bank", 1)
    await bed.table.start()
    bed.store.slow_s, bed.store.reads = 0.02, 0
    await asyncio.gather(*(version(bed, "bank") for _ in range(500)))
    assert 1 <= bed.store.reads <= 4


async def test_what_is_in_flight_is_reported_with_what_has_been_seen(bed: Bed) -> None:
    first = await bed.switch("bank", 1)
    await bed.table.start()
    async with bed.table.lease("bank") as adapter:
        assert adapter is not None and adapter.version == "bank@1"
        await bed.until(generation=first, in_flight={"bank@1": 1})
        second = await bed.switch("bank", 2)
        await bed.until(generation=second, in_flight={"bank@1": 1})  # without any request: it looks by itself
        async with bed.table.lease("bank") as newer:
            assert newer is not None and newer.version == "bank@2"
    await bed.until(generation=second, in_flight={})
    async with bed.table.lease("nobody") as nothing:
        assert nothing is None


async def test_reports_and_leases_never_contradict(bed: Bed) -> None:
    """At every moment: whoever has said to have seen a switch has nothing unreported on the version before it."""
    await bed.switch("bank", 1)
    await bed.table.start()
    switched: dict[int, int] = {}
    stop = False

    async def requests() -> None:
        while not stop:
            async with bed.table.lease("bank") as adapter:
                assert adapter is not None
                number = adapter.number
                for _ in range(3):
                    await asyncio.sleep(0)
                    report = await bed.report()
                    in_flight = report["in_flight"]
                    assert isinstance(in_flight, dict) and isinstance(report["generation"], int)
                    if number + 1 in switched and report["generation"] >= switched[number + 1]:
                        assert in_flight.get(f"bank@{number}"), (number, report)

    workers = [asyncio.create_task(requests()) for _ in range(8)]
    for number in range(2, 60):
        switched[number] = await bed.switch("bank", number)
        await asyncio.sleep(0.005)
    stop = True
    await asyncio.gather(*workers)


async def test_routers_learn_the_holders(bed: Bed) -> None:
    await bed.switch("bank", 1, ("r1", "r2"))
    await bed.table.start()
    await bed.table.current("bank")
    assert adapter_router._holders == {"bank@1": frozenset({"r1", "r2"})}
    await bed.switch("bank", 1, ())
    await bed.table.current("bank")
    assert adapter_router._holders == {"bank@1": frozenset()}


async def test_with_the_store_lost_the_last_known_table_serves(bed: Bed) -> None:
    await bed.switch("bank", 1)
    await bed.table.start()
    assert await version(bed, "bank") == "bank@1"
    before = await bed.table.describe()
    assert [record["name"] for record in before] == ["bank"] and before[0]["store"] == "ok"
    bed.server.stop()
    assert await version(bed, "bank") == "bank@1"
    assert bed.table.store_error
    times = []
    for _ in range(20):
        began = time.monotonic()
        assert await version(bed, "bank") == "bank@1"
        times.append(time.monotonic() - began)
    assert sorted(times)[10] < 0.1  # of most: nobody waits for a store that is known to be lost
    (record,) = await bed.table.describe()
    assert record["store"] == "lost" and record["name"] == "bank"
    assert record["phase"] == "staged"  # no replica can be asked here, so it is not said to be ready


async def test_without_a_registry_nothing_can_be_changed(bed: Bed) -> None:
    await bed.table.start()
    for attempt in (bed.table.add(name="a", base="b", path="/c"), bed.table.remove("a"), bed.table.ensure("a")):
        with pytest.raises(ExpertUnavailable):
            await attempt


async def test_an_end_withdraws_the_report(bed: Bed) -> None:
    await bed.table.start()
    assert len(await bed.other.hgetall(GATEWAYS)) == 1
    await bed.table.close()
    assert await bed.other.hgetall(GATEWAYS) == {}


class EvictingTable(AdapterTable):
    """Its registry loads the adapter as asked, and gives its slot to another one at once, `evictions` times."""

    bed: Bed
    evictions = 0
    asked = 0

    async def _ask(self, method: str, *arguments: object, timeout_s: float) -> dict[str, object]:
        assert method == "ensure"
        self.asked += 1
        await self.bed.switch("bank", 1)
        if self.asked <= self.evictions:
            await self.bed.switch("bank", 1, holders=())
        return {"phase": "ready", "reason": ""}


async def test_an_adapter_that_makes_room_before_it_is_used_is_asked_for_again(
    bed: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    bed.table = table = EvictingTable(bed.store, None, {})
    table.bed, table.evictions = bed, 3
    await bed.switch("bank", 1, holders=())
    await table.start()
    assert (await table.ensure("bank")).holders == {"r1"} and table.asked == 4

    monkeypatch.setattr(adapter_table, "ENSURE_S", 0.3)
    table.evictions = 10**6
    await bed.switch("bank", 1, holders=())
    with pytest.raises(ExpertUnavailable, match="not loaded"):
        await table.ensure("bank")


def test_a_replica_that_shall_hold_it_and_does_not_answer_makes_it_not_ready() -> None:
    version = Version(1, "ready", "/a", 1.0, content_hash="h", kind="lora", rank=4, targets=("r1", "r2"))
    record = Record("bank", "tiny", current=1, holders=("r1", "r2"), number=1, versions=(version,))
    held = [ReplicaReport(name, "n", True, adapters={"bank@1": Holding("ready")}) for name in ("r1", "r2")]
    assert describe(record, held)["phase"] == "ready"
    said = describe(record, held[:1])
    assert said["phase"] == "staged" and "r2" in said["reason"] and said["serving"] == 1
    assert said["replicas"]["r2"]["phase"] == "unreachable"
