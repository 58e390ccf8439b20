"""The registry's life of an adapter, step by step, in a world in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from signalbox.adapters.base import AdapterError
from signalbox.adapters.lifecycle import Numbers, Record, ServedAdapter, describe
from signalbox.adapters.registry import Registry
from signalbox.adapters.registry_protocols import Fenced, RegistryError, StoreLost
from tests.adapters.registry_fakes import MemoryFleet, MemoryStorage, MemoryStore, World


class Run:
    """A registry in a world, driven tick by tick."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.registry: Registry
        self.store: MemoryStore
        self.fleet: MemoryFleet

    async def start(self) -> Registry:
        self.store, self.fleet = MemoryStore(self.world.server, self.world.gateways), MemoryFleet(self.world)
        self.registry = Registry(
            self.store,
            self.fleet,
            MemoryStorage(),
            list(self.world.replicas),
            reserved=["gpt"],
            clock=self.world.clock,
            wall=self.world.clock,
        )
        await self.registry.start()
        return self.registry

    async def kill(self) -> None:
        """As `kill -9`: nothing that it still does has any effect."""
        self.store.dead = self.fleet.dead = True
        registry = self.registry
        await registry.close()

    async def ticks(self, count: int = 12, *, seconds: float = 0.1, gateways: bool = True) -> None:
        """Time passes; gateways, where they live, read and publish."""
        for _ in range(count):
            self.world.clock.now += seconds
            if gateways:
                for gateway in self.world.gateways.values():
                    gateway.read()
                    gateway.publish()
            await self.registry.tick()
            for _ in range(12):
                await asyncio.sleep(0)
        assert self.world.violations == []

    def told(self, name: str) -> dict[str, Any]:
        """What a user is told, the replicas being asked now."""
        record = self.registry.record(name)
        if record is None:
            return {"phase": "gone"}
        live = [r.report() for r in self.world.replicas[record.base].values() if not r.silent]
        return describe(record, live)

    def entry(self, name: str) -> ServedAdapter | None:
        return self.world.server.table.get(name)


async def running(**options: Any) -> Run:
    run = Run(World(**options))
    await run.start()
    return run


async def test_added_loaded_everywhere_and_served() -> None:
    run = await running()
    record = await run.registry.add("bank", "base", "h1")
    assert [v.phase for v in record.versions] == ["staged"] and run.entry("bank") is None
    await run.ticks(3)
    assert run.world.holding("bank@1") == {"r1", "r2"}
    entry = run.entry("bank")
    assert entry is not None and entry.version == "bank@1" and entry.holders == {"r1", "r2"}
    told = run.told("bank")
    assert told["phase"] == "ready" and told["serving"] == 1 and told["content_hash"] == "h1" and told["rank"] == 8
    assert {r["phase"] for r in told["replicas"].values()} == {"ready"}
    assert run.registry.settled


async def test_the_same_content_again_changes_nothing() -> None:
    run = await running()
    first = await run.registry.add("bank", "base", "h1")
    assert (await run.registry.add("bank", "base", "h1")).number == first.number == 1  # while it is being staged
    await run.ticks(3)
    generation = run.world.server.generation
    assert (await run.registry.add("bank", "base", "h1")).number == 1
    await run.ticks(3)
    assert run.world.server.generation == generation and run.fleet.loads == 2


async def test_an_update_is_staged_beside_switched_at_once_and_the_old_drained() -> None:
    run = await running()
    gateway = run.world.add_gateway("g")
    await run.registry.add("bank", "base", "h1")
    await run.ticks(3)
    gateway.read()
    gateway.in_flight["bank@1"] += 1
    await run.registry.add("bank", "base", "h2")
    await run.ticks(3)
    entry = run.entry("bank")
    assert entry is not None and entry.version == "bank@2"
    assert run.told("bank")["phase"] == "ready" and run.told("bank")["version"] == 2
    await run.ticks(5)
    assert run.world.holding("bank@1") == {"r1", "r2"}  # a request is in flight on it
    gateway.in_flight["bank@1"] -= 1
    await run.ticks(5)
    assert run.world.holding("bank@1") == set()
    assert {v["version"]: v["phase"] for v in run.told("bank")["versions"]} == {1: "gone", 2: "ready"}


async def test_a_gateway_that_has_not_seen_the_switch_keeps_the_old_version_loaded_until_it_is_gone() -> None:
    run = await running()
    run.world.add_gateway("g")
    await run.registry.add("bank", "base", "h1")
    await run.ticks(3)
    await run.registry.add("bank", "base", "h2")
    await run.ticks(6, gateways=False)  # it is silent, and has seen nothing
    entry = run.entry("bank")
    assert entry is not None and entry.version == "bank@2" and run.world.holding("bank@1") == {"r1", "r2"}
    await run.ticks(40, gateways=False)  # more than 4 s
    assert run.world.holding("bank@1") == set()


async def test_no_switch_while_a_gateway_may_be_losing_the_store() -> None:
    run = await running()
    run.world.add_gateway("g")
    await run.ticks(1)
    run.world.clock.now += 2.0  # it has not been heard of for longer than a switch allows
    await run.registry.add("bank", "base", "h1")
    await run.ticks(10, gateways=False)
    assert run.entry("bank") is None and run.told("bank")["phase"] == "staged"
    await run.ticks(3)
    assert run.told("bank")["phase"] == "ready"


async def test_the_newest_of_two_updates_wins() -> None:
    run = await running()
    gate = asyncio.Event()
    for replica in run.world.replicas["base"].values():
        replica.gate = gate
    await run.registry.add("bank", "base", "h1")
    await run.ticks(2)
    await run.registry.add("bank", "base", "h2")
    await run.ticks(2)
    gate.set()
    await run.ticks(10)
    told = run.told("bank")
    assert told["serving"] == 2 and told["phase"] == "ready"
    old = next(v for v in told["versions"] if v["version"] == 1)
    assert old["phase"] == "gone" and old["reason"] == "superseded by version 2"
    assert run.world.holding("bank@1") == set()


async def test_back_to_what_is_served_cancels_the_update() -> None:
    run = await running()
    await run.registry.add("bank", "base", "h1")
    await run.ticks(3)
    for replica in run.world.replicas["base"].values():
        replica.gate = asyncio.Event()
    await run.registry.add("bank", "base", "h2")
    await run.ticks(2)
    record = await run.registry.add("bank", "base", "h1")
    assert record.current == 1
    for replica in run.world.replicas["base"].values():
        assert replica.gate is not None
        replica.gate.set()
    await run.ticks(10)
    assert run.told("bank")["serving"] == 1 and run.told("bank")["phase"] == "ready"
    assert run.world.holding("bank@2") == set()


async def test_removed_at_any_phase() -> None:
    run = await running()
    await run.registry.add("a", "base", "h1")
    await run.registry.remove("a")  # before anything is loaded
    await run.ticks(3)
    assert run.registry.record("a") is None
    await run.registry.add("b", "base", "h2")
    await run.ticks(3)
    run.world.replicas["base"]["r1"].gate = asyncio.Event()
    await run.registry.add("b", "base", "h3")
    await run.ticks(1)
    await run.registry.remove("b")  # while one is served and one is loading
    assert run.entry("b") is None
    run.world.replicas["base"]["r1"].gate.set()
    await run.ticks(10)
    assert run.registry.record("b") is None and not any(r.held for r in run.world.replicas["base"].values())
    with pytest.raises(RegistryError) as caught:
        await run.registry.remove("b")
    assert caught.value.status == 404
    record = await run.registry.add("b", "base", "h2")
    assert record.number == 3  # never again what was something else


async def test_broken_files_leave_no_trace_but_for_those_who_cannot_be_told() -> None:
    run = await running()
    with pytest.raises(AdapterError):
        await run.registry.add("bank", "base", "bad")
    assert run.registry.record("bank") is None
    await run.registry.add("bank", "base", "h1")
    await run.ticks(3)
    with pytest.raises(AdapterError):
        await run.registry.add("bank", "base", "bad")
    told = run.told("bank")
    assert told["phase"] == "ready" and told["version"] == 1 and "refused" in told["events"][0]["reason"]
    with pytest.raises(AdapterError):
        await run.registry.add("conf", "base", "bad", origin="config")
    assert run.told("conf")["phase"] == "failed" and run.told("conf")["tensor"] == "lora_A"
    await run.registry.add("conf", "base", "h9")
    await run.ticks(3)
    assert run.told("conf")["phase"] == "ready"


@pytest.mark.parametrize(
    ("name", "base", "status"),
    [("auto", "base", 409), ("gpt", "base", 409), ("base", "base", 409), ("x y", "base", 400), ("x", "none", 422)],
)
async def test_names_that_cannot_be_had(name: str, base: str, status: int) -> None:
    run = await running()
    with pytest.raises(RegistryError) as caught:
        await run.registry.add(name, base, "h1")
    assert caught.value.status == status


async def test_another_base_under_the_same_name_is_refused() -> None:
    run = await running(bases=("base", "other"))
    await run.registry.add("bank", "base", "h1")
    with pytest.raises(RegistryError, match="adapts 'base'"):
        await run.registry.add("bank", "other", "h1")


async def test_one_replica_refuses_a_new_version() -> None:
    run = await running()
    await run.registry.add("bank", "base", "h1")
    await run.ticks(3)
    run.world.replicas["base"]["r2"].refuses.add("h2")
    await run.registry.add("bank", "base", "h2")
    await run.ticks(6)
    told = run.told("bank")
    assert told["phase"] == "failed" and told["code"] == "refused" and "r2" in told["reason"]
    entry = run.entry("bank")
    assert told["serving"] == 1 and entry is not None and entry.version == "bank@1"
    assert run.world.holding("bank@2") == set() and run.world.holding("bank@1") == {"r1", "r2"}


async def test_a_new_replica_that_refuses_what_others_serve() -> None:
    run = await running()
    await run.registry.add("bank", "base", "h1")
    await run.ticks(3)
    replica = run.world.add_replica()
    replica.refuses.add("h1")
    await run.ticks(10)
    entry, told = run.entry("bank"), run.told("bank")
    assert entry is not None and entry.holders == {"r1", "r2"}
    assert told["phase"] == "staged" and "r3" in told["reason"]  # not on every replica: not said to be ready
    assert any("refuses" in event["reason"] for event in told["events"])
    replica.refuses.clear()
    await run.ticks(30, seconds=1.0)
    assert run.told("bank")["phase"] == "ready"


async def test_a_replica_that_was_restarted_gets_what_it_should_hold() -> None:
    run = await running()
    await run.registry.add("bank", "base", "h1")
    await run.ticks(3)
    run.world.replicas["base"]["r1"].restart_engine()
    assert run.told("bank")["phase"] == "staged"  # true at once, before the registry has noticed
    await run.ticks(6)
    assert run.told("bank")["phase"] == "ready" and run.world.holding("bank@1") == {"r1", "r2"}
    assert any("lost on r1" in event["reason"] for event in run.told("bank")["events"])


async def test_what_no_record_knows_is_unloaded() -> None:
    run = await running()
    run.world.replicas["base"]["r1"].held["ghost@7"] = ("h", "ready")
    await run.ticks(3)
    assert run.world.holding("ghost@7") == set()


async def test_a_share_moves_when_its_replica_dies() -> None:
    run = await running(replicas=3)
    await run.registry.add("bank", "base", "h1", replicas=2)
    await run.ticks(3)
    holders = run.world.holding("bank@1")
    assert len(holders) == 2 and run.told("bank")["phase"] == "ready"
    dead = run.world.replicas["base"][min(holders)]
    run.world.kill_replica(dead)
    await run.ticks(40)
    assert len(run.world.holding("bank@1")) == 2 and run.told("bank")["phase"] == "ready"
    entry = run.entry("bank")
    assert entry is not None and entry.holders == run.world.holding("bank@1")


async def test_adapters_of_few_replicas_are_spread() -> None:
    run = await running(replicas=3, slots=4)
    for i in range(6):
        await run.registry.add(f"a{i}", "base", f"h{i}", replicas=1)
    await run.ticks(3)
    assert [len(r.held) for r in run.world.replicas["base"].values()] == [2, 2, 2]


async def test_the_least_recently_used_makes_room_and_comes_back() -> None:
    run = await running(slots=2)
    for name in ("a", "b"):
        await run.registry.add(name, "base", f"h-{name}")
        await run.ticks(3)
    run.world.clock.now += 10
    for replica in run.world.replicas["base"].values():
        replica.used["a@1"] = run.world.clock()  # b is the older one now
    run.world.clock.now += 5
    await run.registry.add("c", "base", "h-c")
    await run.ticks(8)
    assert run.told("c")["phase"] == "ready" and run.told("a")["phase"] == "ready"
    told, entry = run.told("b"), run.entry("b")
    assert told["evicted"] and told["phase"] == "staged" and entry is not None and not entry.holders
    assert run.registry.settled
    run.world.clock.now += 10
    await run.registry.ensure("b")
    await run.ticks(8)
    assert run.told("b")["phase"] == "ready" and not run.told("b")["evicted"]
    assert sum(run.told(name)["evicted"] for name in "abc") == 1


async def test_pinned_adapters_keep_their_slots() -> None:
    run = await running(slots=2)
    for name in ("a", "b"):
        await run.registry.add(name, "base", f"h-{name}", pinned=True)
    await run.ticks(4)
    await run.registry.add("c", "base", "h-c")
    await run.ticks(4)
    told = run.told("c")
    assert told["phase"] == "failed" and told["code"] == "no_slot" and "pinned" in told["reason"]
    assert run.told("a")["phase"] == run.told("b")["phase"] == "ready"


async def test_what_is_in_use_is_not_evicted() -> None:
    run = await running(slots=1)
    gateway = run.world.add_gateway("g")
    await run.registry.add("a", "base", "h-a")
    await run.ticks(4)
    gateway.in_flight["a@1"] += 1
    run.world.clock.now += 5
    await run.registry.add("b", "base", "h-b")
    await run.ticks(10)
    assert run.told("a")["phase"] == "ready" and run.told("b")["phase"] == "staged"
    gateway.in_flight["a@1"] -= 1
    await run.ticks(10)
    assert run.told("a")["evicted"] and run.told("b")["phase"] == "ready"


def give_room(run: Run, room: int) -> None:
    for replica in run.world.replicas["base"].values():
        replica.room = room


async def test_short_of_room_the_least_recently_used_of_the_kind_goes() -> None:
    """Slots are free, but an engine has no memory for another ESFT adapter: a LoRA's going would not help."""
    run = await running(slots=9)
    give_room(run, 5)
    for name, content in (("lora", "h-l"), ("old", "2!old"), ("new", "2!new")):
        await run.registry.add(name, "base", content)
        await run.ticks(3)
        run.world.clock.now += 5
    await run.registry.add("more", "base", "3!more")
    await run.ticks(12)
    assert {name: run.told(name)["phase"] for name in ("lora", "new", "more")} == dict.fromkeys(
        ("lora", "new", "more"), "ready"
    )
    assert run.told("old")["evicted"] and "room went to more@1" in run.told("old")["reason"]
    assert run.registry.settled and run.fleet.loads == 2 * 5  # each replica was asked once in vain
    run.world.clock.now += 10
    await run.registry.ensure("old")  # its place is with `new`: `more` alone would leave too little
    await run.ticks(12)
    assert run.told("old")["phase"] == "ready" and run.told("lora")["phase"] == "ready"


async def test_several_make_room_for_a_large_one() -> None:
    run = await running(slots=9)
    give_room(run, 6)
    for i in range(3):
        await run.registry.add(f"small-{i}", "base", f"2!{i}")
        await run.ticks(3)
    run.world.clock.now += 10
    await run.registry.add("large", "base", "4!large")
    await run.ticks(24)
    assert run.told("large")["phase"] == "ready"
    assert sum(run.told(f"small-{i}")["evicted"] for i in range(3)) == 2


async def test_no_room_and_nothing_that_may_go() -> None:
    run = await running(slots=9)
    give_room(run, 3)
    await run.registry.add("pinned", "base", "2!pinned", pinned=True)
    await run.registry.add("lora", "base", "h-l")
    await run.ticks(4)
    await run.registry.add("more", "base", "2!more")
    await run.ticks(6)
    told = run.told("more")
    assert told["phase"] == "failed" and told["code"] == "adapter_memory_full"
    assert "memory kept for adapters is full" in told["reason"] and "esft" in told["reason"]
    assert run.told("pinned")["phase"] == run.told("lora")["phase"] == "ready"
    await run.registry.remove("pinned")
    await run.ticks(4)
    await run.registry.add("more", "base", "2!more")
    await run.ticks(6)
    assert run.told("more")["phase"] == "ready"


async def test_two_that_keep_each_other_out_are_loaded_one_after_the_other() -> None:
    run = await running(slots=9)
    give_room(run, 5)
    gates = [asyncio.Event(), asyncio.Event()]
    for replica, gate in zip(run.world.replicas["base"].values(), gates, strict=True):
        replica.gate = gate
    for name in "ab":
        await run.registry.add(name, "base", f"3!{name}", pinned=True)
    await run.ticks(3)
    for gate in gates:  # both are in by now, and too large together
        gate.set()
    await run.ticks(12)
    phases = sorted(run.told(name)["phase"] for name in "ab")
    assert phases == ["failed", "ready"], phases


async def test_too_many_names() -> None:
    world = World()
    run = Run(world)
    await run.start()
    run.registry._max_adapters = 2
    await run.registry.add("a", "base", "h1")
    await run.registry.add("b", "base", "h2")
    with pytest.raises(RegistryError, match="remove one first"):
        await run.registry.add("c", "base", "h3")


async def test_a_successor_goes_on_and_the_older_one_is_fenced() -> None:
    run = await running()
    await run.registry.add("bank", "base", "h1")
    old = run.registry
    await run.start()
    with pytest.raises(Fenced):
        await old.tick()
    with pytest.raises(Fenced):
        await old.remove("bank")
    await old.close()
    await run.ticks(3)
    assert run.told("bank")["phase"] == "ready"


async def test_a_write_whose_reply_is_lost_is_found_out() -> None:
    run = await running()
    await run.registry.add("bank", "base", "h1")
    await run.ticks(1)
    run.world.server.lose_reply = True  # of the switch
    with pytest.raises(StoreLost):
        await run.ticks(3)
    entry = run.entry("bank")
    assert entry is not None and entry.version == "bank@1"
    await run.ticks(3)
    assert run.told("bank")["phase"] == "ready" and run.world.holding("bank@1") == {"r1", "r2"}


async def test_a_store_that_has_lost_its_data_gets_it_back_from_the_registry() -> None:
    run = await running()
    gateway = run.world.add_gateway("g")
    await run.registry.add("bank", "base", "h1")
    await run.registry.add("gone", "base", "h2")
    await run.ticks(4)
    await run.registry.remove("gone")
    await run.ticks(4)
    seen = gateway.seen
    run.world.server.wipe()
    run.world.server.generation = 0
    await run.ticks(3)
    assert set(run.world.server.records) == {"bank"} and run.entry("bank") is not None
    assert run.world.server.generation > seen and run.told("bank")["phase"] == "ready"
    assert (await run.registry.add("gone", "base", "h3")).number == 2


async def test_with_store_and_registry_both_lost_numbers_start_after_what_replicas_hold() -> None:
    run = await running()
    await run.registry.add("bank", "base", "h1")
    await run.ticks(3)
    await run.kill()
    run.world.server.wipe()
    await run.start()
    assert run.registry.record("bank") is None
    assert (await run.registry.add("bank", "base", "other")).number == 2
    await run.ticks(6)
    assert run.world.holding("bank@1") == set() and run.world.holding("bank@2") == {"r1", "r2"}


async def test_waiting() -> None:
    run = await running()
    record = await run.registry.add("bank", "base", "h1")
    waiter = asyncio.create_task(run.registry.wait("bank", record.number, timeout_s=60))
    await run.ticks(1)
    assert not waiter.done()
    await run.ticks(3)
    await asyncio.wait_for(waiter, 1)
    assert run.told("bank")["phase"] == "ready"
    await run.registry.remove("bank")
    waiter = asyncio.create_task(run.registry.wait("bank", timeout_s=60))
    await run.ticks(4)
    await asyncio.wait_for(waiter, 1)
    assert run.registry.record("bank") is None


def test_numbers_are_kept_within_bounds() -> None:
    numbers = Numbers()
    for i in range(1100):
        numbers = numbers.with_name(f"n{i}", 5)
    assert len(numbers.last) == 1024 and numbers.of("n0") == 5 and numbers.of("never") == 5
    assert Numbers.loads(numbers.dumps()) == numbers


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"name": 1}', b'{"name":"x","base":"y","versions":[{}]}'])
def test_a_damaged_record_is_a_value_error(data: bytes) -> None:
    for loads in (Record.loads, ServedAdapter.loads, Numbers.loads):
        loader: Callable[[bytes], object] = loads
        with pytest.raises(ValueError):
            loader(data)
