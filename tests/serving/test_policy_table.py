"""The table of policies in a real Valkey: versions, conditions, seeding, and gateways that see each other's changes."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from signalbox.experts.base import ExpertError
from signalbox.policies.base import Policy
from signalbox.serving import policy_records
from signalbox.serving.embedded_valkey import EmbeddedValkey
from signalbox.serving.policy_records import PolicyRecord, PolicyRecords
from signalbox.serving.policy_table import PolicyTable
from signalbox.serving.store import Store, StoreUnavailable


def policy(ms: float, **more: Any) -> Policy:
    return Policy.model_validate({"slo": {"max_ttft_ms": ms}, **more})


CONFIGURED = {"gold": policy(800), "bronze": Policy(priority=-1)}


class Bed:
    """One store and as many gateways' tables as a test wants."""

    def __init__(self, server: EmbeddedValkey, url: str) -> None:
        self.server, self.url = server, url
        self.tables: list[PolicyTable] = []
        self.stores: list[Store] = []

    def store(self) -> Store:
        self.stores.append(Store(self.url, timeout_s=0.5, retry_after_s=0.1))
        return self.stores[-1]

    def table(self, configured: dict[str, Policy] | None = None, **protected: str) -> PolicyTable:
        self.tables.append(PolicyTable(self.store(), configured or CONFIGURED, protected=protected))
        return self.tables[-1]

    async def started(self, configured: dict[str, Policy] | None = None, **protected: str) -> PolicyTable:
        table = self.table(configured, **protected)
        await table.start()
        return table


@pytest.fixture
async def bed() -> AsyncIterator[Bed]:
    server = EmbeddedValkey()
    made = Bed(server, server.start())
    try:
        yield made
    finally:
        for table in made.tables:
            await table.close()
        for store in made.stores:
            await store.close()
        server.stop()


async def until(holds: Callable[[], bool], limit_s: float = 10.0) -> None:
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline, "it never came"
        await asyncio.sleep(0.01)


def current(table: PolicyTable, name: str) -> PolicyRecord:
    record = table.get(name)
    assert record is not None
    return record


async def refused(doing: Any) -> tuple[int, str]:
    with pytest.raises(ExpertError) as caught:
        await doing
    return caught.value.status, caught.value.code


async def test_the_configuration_seeds_the_table_once(bed: Bed) -> None:
    first, second = bed.table(), bed.table()
    assert current(first, "gold").version == 0, "before the store has been asked"
    await asyncio.gather(first.start(), second.start())
    for table in (first, second):
        assert table.names() == ["bronze", "gold"]
        assert [r.version for r in await table.versions("gold")] == [1], "two that seed at once write once"
    assert current(first, "gold") == current(second, "gold")
    assert first.policies() == CONFIGURED
    assert first.generation == second.generation != "configuration"


async def test_a_change_is_seen_by_every_gateway(bed: Bed) -> None:
    first, second = await bed.started(), await bed.started()
    before = second.generation
    record, created = await first.put("silver", policy(1500))
    assert created and record.version == 1
    assert first.get("silver") == record, "the one that wrote it sees it at once"
    await until(lambda: second.get("silver") == record)
    assert second.generation != before
    changed, created = await second.put("silver", policy(1200))
    assert not created and changed.version == 2 and changed.etag != record.etag
    await until(lambda: first.get("silver") == changed)
    await first.delete("silver")
    assert first.get("silver") is None and "silver" not in first.policies()
    await until(lambda: second.get("silver") is None)


async def test_what_is_in_force_already_changes_nothing(bed: Bed) -> None:
    table = await bed.started()
    before, generation = current(table, "gold"), table.generation
    record, created = await table.put("gold", policy(800))
    assert record == before and not created and table.generation == generation
    # The first intent that fits is taken: their order is content.
    one, two = {"keywords": ["a"]}, {"keywords": ["b"]}
    await table.put("gold", policy(800, intents={"one": one, "two": two}))
    record, _ = await table.put("gold", policy(800, intents={"two": two, "one": one}))
    assert record.version == 3 and list(current(table, "gold").policy.intents) == ["two", "one"]


async def test_conditions(bed: Bed) -> None:
    table = await bed.started()
    old = current(table, "gold").etag
    record, _ = await table.put("gold", policy(700), if_match=("other", old))
    assert record.version == 2
    failed = (412, "precondition_failed")
    assert await refused(table.put("gold", policy(600), if_match=(old,))) == failed
    assert await refused(table.put("gold", policy(600), if_none_match=True)) == failed
    assert await refused(table.put("new", policy(600), if_match=("*",))) == failed
    assert await refused(table.delete("gold", if_match=(old,))) == failed
    assert await refused(table.rollback("gold", 1, if_match=(old,))) == failed
    assert current(table, "gold").version == 2 and table.get("new") is None
    assert (await table.put("new", policy(600), if_none_match=True))[1]
    await table.delete("gold", if_match=("*",))


async def test_of_many_with_the_same_condition_one_writes(bed: Bed) -> None:
    tables = [await bed.started() for _ in range(4)]
    etag = current(tables[0], "gold").etag

    async def attempt(i: int) -> bool:
        try:
            await tables[i % 4].put("gold", policy(100 + i), if_match=(etag,))
        except ExpertError as error:
            assert error.code == "precondition_failed"
            return False
        return True

    assert sum(await asyncio.gather(*(attempt(i) for i in range(16)))) == 1
    assert [r.version for r in await tables[0].versions("gold")] == [2, 1]


async def test_without_conditions_each_write_is_a_version_of_its_own(bed: Bed) -> None:
    tables = [await bed.started() for _ in range(3)]
    await asyncio.gather(*(table.put("gold", policy(100 + i)) for i, table in enumerate(tables)))
    versions = await tables[0].versions("gold")
    assert [r.version for r in versions] == [4, 3, 2, 1]
    assert {r.policy.slo.max_ttft_ms for r in versions} == {100, 101, 102, 800}


async def test_numbers_never_repeat_and_a_deleted_policy_comes_back(bed: Bed) -> None:
    table = await bed.started()
    await table.put("silver", policy(1))
    await table.put("silver", policy(2))
    await table.delete("silver")
    assert await refused(table.delete("silver")) == (404, "policy_not_found")
    said = [(r.version, r.deleted) for r in await table.versions("silver")]
    assert said == [(3, True), (2, False), (1, False)]
    record = await table.rollback("silver", 1)
    assert record.version == 4 and record.policy == policy(1) and record.note == "rollback to version 1"
    assert current(table, "silver") == record
    await table.delete("silver")
    record, created = await table.put("silver", policy(3))
    assert created and record.version == 6
    for nowhere in (3, 5, 99):  # deletions, and what never was
        assert await refused(table.rollback("silver", nowhere)) == (404, "version_not_found")
    assert await refused(table.versions("nobody")) == (404, "policy_not_found")


async def test_a_forgotten_name_does_not_repeat_its_numbers(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_records, "MAX_DELETED", 2)
    table = await bed.started()
    for name in ("a", "b", "c"):
        for ms in (1, 2, 3):
            await table.put(name, policy(ms))
        await table.delete(name)
    assert await refused(table.versions("a")) == (404, "policy_not_found"), "the one deleted first is forgotten"
    assert len(await table.versions("b")) == 4
    record, _ = await table.put("a", policy(1))
    assert record.version == 5
    raw = await bed.stores[0].hgetall("policies:history")
    assert not any(field.startswith("a/") and field != "a/5" for field in raw), "nor is anything of it kept"


async def test_history_is_bounded(bed: Bed) -> None:
    table = await bed.started()
    for ms in range(1, 60):
        await table.put("gold", policy(ms))
    versions = [r.version for r in await table.versions("gold")]
    assert versions == list(range(60, 10, -1))
    assert len([f for f in await bed.stores[0].hgetall("policies:history") if f.startswith("gold/")]) == 50
    assert await refused(table.rollback("gold", 10)) == (404, "version_not_found")


async def test_bounds(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_records, "MAX_POLICIES", 3)
    table = await bed.started()
    await table.put("third", policy(1))
    assert await refused(table.put("fourth", policy(1))) == (409, "too_many_policies")
    await table.put("third", policy(2))  # a change is none more
    large = policy(1, intents={f"i{n}": {"examples": ["x" * 3000]} for n in range(32)})
    assert await refused(table.put("third", large)) == (413, "policy_too_large")
    for name in ("", "auto", "a b", "-x", "x" * 65, "validate"):
        assert await refused(table.put(name, policy(1))) == (400, "invalid_name")


async def test_one_in_use_cannot_be_deleted(bed: Bed) -> None:
    table = await bed.started(gold="default_policy")
    assert await refused(table.delete("gold")) == (409, "policy_in_use")
    await table.delete("bronze")


async def test_a_script_that_runs_twice_writes_once(bed: Bed) -> None:
    """As when its reply is lost; meanwhile another may have written."""
    table = await bed.started()
    records = PolicyRecords(bed.store())
    mine = PolicyRecord.of("gold", 2, policy(1), "twice")
    assert [await records.write(mine) for _ in range(2)] == ["ok", "ok"]
    other = PolicyRecord.of("gold", 3, policy(2), "another's")
    assert await records.write(other) == "ok"
    assert await records.write(mine) == "ok", "it was written, though it is in force no more"
    assert await records.write(PolicyRecord.of("gold", 2, policy(1), "late")) == "stale"
    gone = PolicyRecord.of("gold", 4, policy(2), "deleted", deleted=True)
    assert [await records.write(gone, "delete") for _ in range(2)] == ["ok", "ok"]
    assert [r.version for r in await table.versions("gold")] == [4, 3, 2, 1]


async def test_a_change_by_api_outlives_a_restart_until_the_file_changes(bed: Bed) -> None:
    table = await bed.started()
    await table.put("gold", policy(500))
    await table.delete("bronze")
    again = await bed.started()
    assert current(again, "gold").policy == policy(500) and again.get("bronze") is None
    changed = await bed.started({**CONFIGURED, "gold": policy(900)})
    assert (current(changed, "gold").version, current(changed, "gold").policy) == (3, policy(900))
    assert changed.get("bronze") is None, "the file says nothing new of it"
    await changed.put("gold", policy(500))
    once_more = await bed.started({**CONFIGURED, "gold": policy(900)})
    assert current(once_more, "gold").policy == policy(500)
    same = await bed.started({"gold": policy(500)})  # the file says what is in force: no version for that
    assert current(same, "gold").version == 4
    assert sorted(same.names()) == ["gold"]


async def test_a_lost_store_leaves_what_was_read(bed: Bed) -> None:
    table = await bed.started()
    record, _ = await table.put("gold", policy(500))
    bed.server.stop()
    assert current(table, "gold") == record
    unavailable = (503, "store_unavailable")
    assert await refused(table.put("gold", policy(1))) == unavailable
    assert await refused(table.delete("gold")) == unavailable
    assert await refused(table.versions("gold")) == unavailable
    assert await refused(table.rollback("gold", 1)) == unavailable
    late = await bed.started()
    assert late.policies() == CONFIGURED and late.generation == "configuration"


async def test_a_store_that_lost_its_data_is_filled_again(bed: Bed, caplog: pytest.LogCaptureFixture) -> None:
    first, second = await bed.started(), await bed.started()
    await first.put("gold", policy(500))
    await first.put("silver", policy(5))
    for _ in range(3):
        await first.put("passing", policy(1))
        await first.delete("passing")
    await until(lambda: second.generation == first.generation)
    old = first.generation
    with caplog.at_level(logging.WARNING):
        await first._records._store._redis.flushall()
        await until(lambda: first.generation != old and second.generation == first.generation)
    assert "has lost the policies" in caplog.text
    for table in (first, second):
        assert current(table, "gold").policy == policy(500) and current(table, "silver").policy == policy(5)
        assert current(table, "gold").version == 2, "a version is what it was"
    record, _ = await first.put("passing", policy(1))
    assert record.version == 7, "of a name that is forgotten no number comes again either"
    fresh = await bed.started()
    assert current(fresh, "gold").policy == policy(500), "what the configuration said last is known again too"


async def test_a_write_into_a_store_that_has_just_lost_its_data_loses_nothing(bed: Bed) -> None:
    table = await bed.started()
    await table.put("silver", policy(5))
    await table._records._store._redis.flushall()
    await table.put("gold", policy(500))
    assert table.names() == ["bronze", "gold", "silver"]


async def test_the_configuration_is_seeded_when_the_store_comes_late(bed: Bed) -> None:
    first = await bed.started()
    await first.put("gold", policy(500))
    store = bed.store()
    store._closed_until = time.monotonic() + 0.4  # as lost
    late = PolicyTable(store, {"gold": policy(900), "iron": policy(1)}, protected={})
    bed.tables.append(late)
    await late.start()
    assert late.generation == "configuration"
    await until(lambda: late.generation != "configuration")
    assert current(late, "gold").policy == policy(900) and late.names() == ["bronze", "gold", "iron"]


async def test_a_record_of_a_newer_version_is_passed_over(bed: Bed, caplog: pytest.LogCaptureFixture) -> None:
    table = await bed.started()
    store = bed.store()
    newer = current(table, "gold").dumps().replace(b'"policy":{', b'"policy":{"from_the_future":1,')
    await store.hset("policies:table", {"gold": newer, "broken": b"[1]"})
    await table.put("silver", policy(1))  # a new generation
    assert current(table, "gold").policy == policy(800), "what was known of it goes on"
    assert table.get("broken") is None and table.get("silver") is not None
    assert "from_the_future" in caplog.text and "broken" in caplog.text
    for doing in (table.put("gold", policy(1)), table.delete("gold")):
        assert await refused(doing) == (409, "policy_unreadable")
    caplog.clear()
    await table.put("silver", policy(2))
    assert "from_the_future" not in caplog.text, "said once"


async def test_records_raise_what_the_store_raises(bed: Bed) -> None:
    bed.server.stop()
    with pytest.raises(StoreUnavailable):
        await PolicyRecords(bed.store()).read("")


@pytest.mark.parametrize("seed", range(4))
async def test_random_changes_by_two_gateways_agree_with_a_model(bed: Bed, seed: int) -> None:
    """The model: for each name the list of its versions, None where it was deleted."""
    rng = random.Random(seed)
    tables = [await bed.started({"keep": policy(1)}) for _ in range(2)]
    model: dict[str, list[Policy | None]] = {"keep": [policy(1)]}
    for _ in range(120):
        table, name = rng.choice(tables), rng.choice(["keep", "a", "b"])
        versions = model.setdefault(name, [])
        in_force = versions[-1] if versions else None
        what = rng.choice(["put", "put", "delete", "rollback"])
        if what == "put":
            wanted = policy(rng.randint(1, 3))
            record, created = await table.put(name, wanted)
            assert created == (in_force is None)
            if wanted != in_force:
                versions.append(wanted)
            assert (record.version, record.policy) == (len(versions), wanted)
        elif what == "delete":
            if in_force is None:
                assert await refused(table.delete(name)) == (404, "policy_not_found")
            else:
                await table.delete(name)
                versions.append(None)
        elif versions:
            back = rng.randint(1, len(versions) + 1)
            old = versions[back - 1] if back <= len(versions) and back > len(versions) - 50 else None
            if old is None:
                assert await refused(table.rollback(name, back)) == (404, "version_not_found")
            else:
                record = await table.rollback(name, back)
                versions.append(old)
                assert (record.version, record.policy) == (len(versions), old)
    for name, versions in model.items():
        if versions:
            said = [(r.version, None if r.deleted else r.policy) for r in await tables[0].versions(name)]
            assert said == list(enumerate(versions, start=1))[::-1][:50]
    expected = {name: versions[-1] for name, versions in model.items() if versions and versions[-1] is not None}
    for table in tables:
        await until(lambda table=table: table.policies() == expected)  # type: ignore[misc]
