"""The registry's records in a real Valkey: fencing, writes that come late, loss of all data, gateways' reports."""

from __future__ import annotations

from collections.abc import AsyncIterator

import orjson
import pytest

from signalbox.adapters.lifecycle import Numbers, Record, Version, served
from signalbox.adapters.registry_protocols import DataLost, Fenced, StaleWrite, StoreLost
from signalbox.serving.adapter_records import AdapterRecords
from signalbox.serving.adapter_table import GATEWAYS, GENERATION, RECORDS, TABLE
from signalbox.serving.embedded_valkey import EmbeddedValkey
from signalbox.serving.store import PREFIX, Store


@pytest.fixture
async def store() -> AsyncIterator[Store]:
    server = EmbeddedValkey()
    opened = Store(server.start(), timeout_s=0.5, retry_after_s=0.1)
    yield opened
    await opened.close()
    server.stop()


def ready(name: str, number: int = 1) -> Record:
    version = Version(number, "ready", "/a", 1.0, content_hash=f"h{number}", kind="lora", rank=4, loaded_at=2.0)
    return Record(name, "tiny", current=number, holders=("r1",), number=number, versions=(version,))


async def test_what_is_written_is_read_and_makes_a_generation(store: Store) -> None:
    records = AdapterRecords(store)
    await records.take_over()
    found, numbers, generation = await records.read()
    assert found == {} and numbers == Numbers() and generation > 1e12
    record = ready("bank")
    second = await records.write("bank", record, served(record), Numbers(3, {"x": 4}), table=True)
    assert second > generation and int(await store.get(GENERATION) or 0) == second
    assert await records.write("bank", record, served(record), Numbers(3, {"x": 4}), table=False) == second
    found, numbers, third = await records.read()
    assert found == {"bank": record} and numbers == Numbers(3, {"x": 4}) and third == second
    assert (await store.hgetall(TABLE)) == {"bank": served(record).dumps()}  # type: ignore[union-attr]
    assert await records.write("bank", None, None, Numbers(), table=True) > second
    assert await store.hgetall(RECORDS) == await store.hgetall(TABLE) == {}


async def test_an_older_registry_is_refused_whatever_it_does(store: Store) -> None:
    old, new = AdapterRecords(store), AdapterRecords(store)
    await old.take_over()
    await old.read()
    await new.take_over()
    assert new.epoch > old.epoch
    record = ready("bank")
    for attempt in (
        old.read(),
        old.write("bank", record, served(record), Numbers(), table=True),
        old.restore([record], [], Numbers()),
        old.gateways(),
    ):
        with pytest.raises(Fenced):
            await attempt
    assert await store.hgetall(RECORDS) == {}
    await new.read()
    await new.write("bank", record, served(record), Numbers(), table=True)


async def test_a_write_that_was_held_up_changes_nothing_later(store: Store) -> None:
    """Two objects of one epoch: what one of them knows is behind, as after a write whose reply was lost."""
    records, late = AdapterRecords(store), AdapterRecords(store)
    await records.take_over()
    await records.read()
    late._epoch, late._revision = records._epoch, records._revision
    await records.write("bank", ready("bank", 2), served(ready("bank", 2)), Numbers(), table=True)
    with pytest.raises(StaleWrite):
        await late.write("bank", ready("bank", 1), served(ready("bank", 1)), Numbers(), table=True)
    assert (await records.read())[0]["bank"].current == 2


async def test_a_command_that_the_client_repeats_counts_once(store: Store) -> None:
    from signalbox.serving import adapter_records

    records = AdapterRecords(store)
    await records.take_over()
    await records.read()
    keys = [adapter_records.WRITER, RECORDS, TABLE, GENERATION, adapter_records.NUMBERS]
    arguments = [records._epoch, b"0", "the-same", "bank", ready("bank").dumps(), 1, b"{}", Numbers().dumps()]
    first = await store.script(adapter_records._WRITE, keys, arguments)
    assert first[0] == b"ok" and await store.script(adapter_records._WRITE, keys, arguments) == first


async def test_lost_data_is_noticed_and_put_back_with_a_later_generation(store: Store) -> None:
    records = AdapterRecords(store)
    await records.take_over()
    await records.read()
    record = ready("bank")
    before = await records.write("bank", record, served(record), Numbers(1, {}), table=True)
    await store._redis.flushall()
    with pytest.raises(DataLost):
        await records.gateways()
    with pytest.raises(DataLost):
        await records.write("bank", record, None, Numbers(), table=True)
    entry = served(record)
    assert entry is not None
    after = await records.restore([record], [entry], Numbers(7, {"y": 2}))
    assert after > before
    found, numbers, generation = await records.read()
    assert found == {"bank": record} and numbers == Numbers(7, {"y": 2}) and generation == after
    assert await store.hgetall(TABLE) == {"bank": entry.dumps()}
    await records.write("bank", None, None, Numbers(), table=True)


async def test_many_records_are_put_back_at_once(store: Store) -> None:
    records = AdapterRecords(store)
    await records.take_over()
    await records.read()
    await store._redis.flushall()
    many = [ready(f"a{i}") for i in range(256)]
    await records.restore(many, [entry for r in many[:200] if (entry := served(r))], Numbers())
    assert len((await records.read())[0]) == 256 and len(await store.hgetall(TABLE)) == 200


async def test_gateways_are_as_silent_as_their_reports_are_old(store: Store) -> None:
    now = 100.0
    records = AdapterRecords(store, clock=lambda: now)
    await records.take_over()

    async def say(name: str, sequence: int) -> None:
        report = {"generation": 5, "in_flight": {"a@1": 2}, "sequence": sequence}
        await store.hset(GATEWAYS, {name: orjson.dumps(report)})

    await say("g1", 1)
    await say("g2", 1)
    await store.hset(GATEWAYS, {"junk": b"[]"})
    reports = await records.gateways()
    assert set(reports) == {"g1", "g2"} and reports["g1"].in_flight == {"a@1": 2} and reports["g1"].generation == 5
    now += 3
    await say("g1", 2)
    reports = await records.gateways()
    assert reports["g1"].silent_s == 0 and reports["g2"].silent_s == 3
    now += 100
    await say("g1", 3)
    await records.gateways()
    assert set(await store.hgetall(GATEWAYS)) == {"g1"}  # the others are forgotten


async def test_a_record_that_cannot_be_read_does_not_stop_the_others(store: Store) -> None:
    records = AdapterRecords(store)
    await records.take_over()
    await records.read()
    await records.write("bank", ready("bank"), None, Numbers(), table=False)
    await store._redis.hset(PREFIX + RECORDS, "junk", b"?")
    assert set((await records.read())[0]) == {"bank"}


async def test_a_store_that_is_not_there() -> None:
    store = Store("unix:///nowhere/valkey.sock", timeout_s=0.2)
    records = AdapterRecords(store)
    for attempt in (records.take_over(), records.read(), records.gateways()):
        with pytest.raises(StoreLost):
            await attempt
    await store.close()
