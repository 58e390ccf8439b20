"""The registry under random faults: it is killed between any two steps, replicas die, the store goes and comes back.

What must hold all the time is checked by the fakes and after every step; once the faults stop, everything must come to
what was last asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from signalbox.adapters.base import AdapterError
from signalbox.adapters.lifecycle import Record, describe, version_id
from signalbox.adapters.registry import Registry
from signalbox.adapters.registry_protocols import Fenced, RegistryError, StoreLost
from tests.adapters.registry_fakes import MemoryFleet, MemoryStorage, MemoryStore, Replica, World

NAMES = ["a", "b", "c", "d"]
CONTENTS = ["h1", "h2", "h3"]
SLOTS = 6  # all four fit, with room for an update


class RegistryUnderFaults(RuleBasedStateMachine):
    """Clients add and remove, gateways send requests, everything fails; time passes in small steps."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.world = World(replicas=2, slots=SLOTS)
        self.tasks: set[asyncio.Task[Any]] = set()
        self.leases: list[tuple[str, str]] = []
        self.wanted: dict[str, set[str | None]] = {name: {None} for name in NAMES}  # what may come of what was asked
        self.numbers: dict[str, int] = {}
        self.switched: dict[str, int] = {}

    # -- the machinery -----------------------------------------------------------------------------------------

    async def _yield(self, steps: int) -> None:
        for _ in range(steps):
            await asyncio.sleep(0)

    def run(self, steps: int) -> None:
        self.loop.run_until_complete(self._yield(steps))
        for task in [task for task in self.tasks if task.done()]:
            self.tasks.discard(task)
            if not task.cancelled() and task.exception() is not None:
                raise task.exception()  # type: ignore[misc]

    def spawn(self, work: Any) -> asyncio.Task[Any]:
        task = self.loop.create_task(work)
        self.tasks.add(task)
        return task

    async def _drive(self, registry: Registry) -> None:
        with contextlib.suppress(Fenced):
            while True:
                with contextlib.suppress(StoreLost):
                    await registry.tick()
                await asyncio.sleep(0)

    async def _boot(self) -> None:
        with contextlib.suppress(StoreLost, Fenced):
            await self.registry.start()
            await self._drive(self.registry)

    @initialize()
    def boot(self) -> None:
        self.store, self.fleet = MemoryStore(self.world.server, self.world.gateways), MemoryFleet(self.world)
        self.storage = MemoryStorage()
        self.registry = Registry(
            self.store,
            self.fleet,
            self.storage,
            ["base"],
            clock=self.world.clock,
            wall=self.world.clock,
            residency_s=0.0,
        )
        self.driver = self.spawn(self._boot())

    # -- faults ------------------------------------------------------------------------------------------------

    @rule(steps=st.integers(0, 9))
    def kill_the_registry(self, steps: int) -> None:
        """As `kill -9`, after any number of steps; what it had asked of replicas they go on with."""
        self.run(steps)
        self.store.dead = self.fleet.dead = self.storage.dead = True
        self.driver.cancel()
        self.boot()

    @rule(steps=st.integers(0, 9))
    def start_a_second_registry(self, steps: int) -> None:
        """The older one still runs: it is fenced."""
        self.run(steps)
        self.boot()

    @precondition(lambda self: len(self.world.replicas["base"]) > 1)
    @rule(data=st.data())
    def kill_a_replica(self, data: st.DataObject) -> None:
        self.world.kill_replica(self._some_replica(data))

    @precondition(lambda self: len(self.world.replicas["base"]) < 3)
    @rule()
    def add_a_replica(self) -> None:
        self.world.add_replica()

    @rule(data=st.data())
    def restart_an_engine(self, data: st.DataObject) -> None:
        self._some_replica(data).restart_engine()

    @rule(data=st.data(), silent=st.booleans())
    def silence_a_replica(self, data: st.DataObject, silent: bool) -> None:
        self._some_replica(data).silent = silent

    @rule(data=st.data(), slow=st.booleans())
    def make_loads_slow(self, data: st.DataObject, slow: bool) -> None:
        replica = self._some_replica(data)
        if replica.gate is not None:
            replica.gate.set()
        replica.gate = asyncio.Event() if slow else None

    @rule(lost=st.booleans())
    def lose_the_store(self, lost: bool) -> None:
        self.world.server.lost = lost

    @rule()
    def lose_a_reply(self) -> None:
        self.world.server.lose_reply = True

    def _some_replica(self, data: st.DataObject) -> Replica:
        return self.world.replicas["base"][data.draw(st.sampled_from(sorted(self.world.replicas["base"])))]

    # -- clients -----------------------------------------------------------------------------------------------

    @rule(name=st.sampled_from(NAMES), content=st.sampled_from(CONTENTS), replicas=st.sampled_from([None, 1]))
    def add(self, name: str, content: str, replicas: int | None) -> None:
        self.spawn(self._add(self.registry, name, f"{name}-{content}", replicas))

    async def _add(self, registry: Registry, name: str, content: str, replicas: int | None) -> None:
        self.wanted[name] = self.wanted[name] | {content}  # until it is acknowledged, either may come of it
        try:
            await registry.add(name, "base", content, replicas=replicas)
        except (StoreLost, Fenced, RegistryError):
            return
        assert not self.world.server.records.get(name) or content in self.wanted[name]

    @rule(name=st.sampled_from(NAMES))
    def add_broken(self, name: str) -> None:
        self.spawn(self._add_broken(self.registry, name))

    async def _add_broken(self, registry: Registry, name: str) -> None:
        with contextlib.suppress(StoreLost, Fenced, RegistryError), pytest.raises(AdapterError):
            await registry.add(name, "base", "bad")

    @rule(name=st.sampled_from(NAMES))
    def remove(self, name: str) -> None:
        self.spawn(self._remove(self.registry, name))

    async def _remove(self, registry: Registry, name: str) -> None:
        with contextlib.suppress(StoreLost, Fenced, RegistryError):
            await registry.remove(name)

    # -- gateways ----------------------------------------------------------------------------------------------

    @rule(gateway=st.sampled_from(["g1", "g2"]), name=st.sampled_from(NAMES))
    def request(self, gateway: str, name: str) -> None:
        """A request reads the table and takes a lease, as `AdapterTable.lease` does."""
        found = self.world.gateways.get(gateway) or self.world.add_gateway(gateway)
        found.read()
        entry = found.table.get(name)
        if entry is not None:
            if not self.world.server.lost:  # linearizable: never older than what any gateway has got
                assert entry.number >= self.switched.get(name, 0)
                self.switched[name] = max(entry.number, self.switched.get(name, 0))
            found.in_flight[entry.version] += 1
            self.leases.append((gateway, entry.version))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def end_a_request(self, data: st.DataObject) -> None:
        gateway, version = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        if gateway in self.world.gateways:
            self.world.gateways[gateway].in_flight[version] -= 1

    @rule(gateway=st.sampled_from(["g1", "g2"]))
    def kill_a_gateway(self, gateway: str) -> None:
        self.world.gateways.pop(gateway, None)
        self.leases = [lease for lease in self.leases if lease[0] != gateway]

    @rule(steps=st.integers(1, 60), seconds=st.sampled_from([0.0, 0.1, 0.5]))
    def time_passes(self, steps: int, seconds: float) -> None:
        for _ in range(steps):
            self.run(1)
        self.world.clock.now += seconds
        for gateway in self.world.gateways.values():
            gateway.read()
            gateway.publish()

    # -- what must hold ----------------------------------------------------------------------------------------

    @invariant()
    def what_is_gone_is_nowhere(self) -> None:
        for record in self._records():
            for version in record.versions:
                vid = version_id(record.name, version.number)
                if version.phase == "gone" and not version.reason.startswith("superseded"):
                    live = [r for r in self.world.replicas["base"].values() if not r.silent and vid in r.held]
                    assert not live or any(r.id not in self._known() for r in live), vid

    def _known(self) -> set[str]:
        return {replica for _, replica in self.registry._reconciler._seen}

    @invariant()
    def nothing_is_said_to_be_ready_that_is_not(self) -> None:
        live = [r.report() for r in self.world.replicas["base"].values() if not r.silent]
        for record in self._records():
            told = describe(record, live)
            if told["phase"] == "ready":
                vid = version_id(record.name, told["version"])
                holders = self.world.holding(vid) - {r.id for r in self.world.replicas["base"].values() if r.silent}
                assert holders and (record.replicas is not None or holders == {r.replica_id for r in live})

    @invariant()
    def nothing_has_happened_that_must_not(self) -> None:
        assert self.world.violations == []

    @invariant()
    def no_more_than_the_slots(self) -> None:
        assert all(len(r.held) <= r.slots for r in self.world.replicas["base"].values())

    def _records(self) -> list[Record]:
        return [Record.loads(data) for data in self.world.server.records.values()]

    # -- in the end --------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        if not hasattr(self, "registry"):
            return
        self.world.server.lost = self.world.server.lose_reply = False
        for replica in self.world.replicas["base"].values():
            replica.silent = False
            if replica.gate is not None:
                replica.gate.set()
                replica.gate = None
        for gateway in self.world.gateways.values():
            gateway.in_flight.clear()
        self.store.dead = self.fleet.dead = self.storage.dead = True
        self.driver.cancel()
        self.boot()
        for _ in range(25):
            self.time_passes(20, 0.5)
        records = {record.name: record for record in self._records()}
        assert self.registry.settled, records
        live = set(self.world.replicas["base"])
        loaded = set()
        for name, record in records.items():
            told = describe(record, [r.report() for r in self.world.replicas["base"].values()])
            assert told["phase"] == "ready" and not record.removed, told
            assert told["content_hash"] in self.wanted[name]
            vid = version_id(name, told["version"])
            holders = self.world.holding(vid)
            assert holders == live if record.replicas is None else len(holders) == 1
            assert self.world.server.table[name].holders == holders
            loaded.add(vid)
        assert set(self.world.server.table) == set(records)
        assert {vid for r in self.world.replicas["base"].values() for vid in r.held} == loaded  # nothing else
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self.run(5)
        self.loop.close()


TestRegistryUnderFaults = RegistryUnderFaults.TestCase
TestRegistryUnderFaults.settings = settings(
    max_examples=6,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
