"""A small world for the registry's tests: a store, replicas with slots, gateways, files. All in memory, faulty at will.

These stand in for Redis, for Serve's replicas and for gateway processes, because a test must be able to stop any of
them between any two steps; `tests/serving/test_adapter_*.py` and `tests/faults` use the real ones. Every operation
yields to the event loop before and after it takes effect, so that a registry can be killed at either moment.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from signalbox.adapters.base import AdapterError, AdapterFacts
from signalbox.adapters.lifecycle import Holding, Numbers, Record, ReplicaReport, ServedAdapter
from signalbox.adapters.registry_protocols import (
    DataLost,
    Fenced,
    GatewayReport,
    NoRoom,
    NoSlot,
    ReplicaLost,
    StaleWrite,
    StoreLost,
)


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Server:
    """What is in the store. `lost` makes every command fail, `lose_reply` the next write's reply."""

    clock: Clock
    epoch: int = 0
    revision: int = 0
    generation: int = 0
    records: dict[str, bytes] = field(default_factory=dict)
    table: dict[str, ServedAdapter] = field(default_factory=dict)
    numbers: Numbers = field(default_factory=Numbers)
    lost: bool = False
    lose_reply: bool = False

    def wipe(self) -> None:
        """Lose all data, as a store in memory does when it is killed."""
        self.epoch, self.records, self.table, self.numbers = 0, {}, {}, Numbers()


class MemoryStore:
    """A `RecordStore` over a `Server`. After `kill` nothing more gets through: its process is dead."""

    def __init__(self, server: Server, gateways: dict[str, Gateway]) -> None:
        self.server, self._gateways = server, gateways
        self.epoch, self.revision, self.dead = 0, 0, False
        self.generation = 0

    async def _arrive(self) -> None:
        await asyncio.sleep(0)
        if self.dead:
            await asyncio.Event().wait()
        if self.server.lost:
            raise StoreLost("lost")

    def _fence(self) -> None:
        if self.server.epoch == 0:
            raise DataLost
        if self.server.epoch != self.epoch:
            raise Fenced

    async def take_over(self) -> None:
        await self._arrive()
        self.server.epoch = max(self.server.epoch, self.epoch) + 1 + int(self.server.clock() * 1000)
        self.server.revision = 0
        self.epoch = self.server.epoch
        await asyncio.sleep(0)

    async def read(self) -> tuple[dict[str, Record], Numbers, int]:
        await self._arrive()
        self._fence()
        self.revision, self.generation = self.server.revision, self.server.generation
        found = {name: Record.loads(data) for name, data in self.server.records.items()}
        numbers, generation = self.server.numbers, self.server.generation
        await asyncio.sleep(0)
        return found, Numbers.loads(numbers.dumps()), generation

    async def write(
        self, name: str, record: Record | None, entry: ServedAdapter | None, numbers: Numbers, *, table: bool
    ) -> int:
        await self._arrive()
        self._fence()
        server = self.server
        if server.revision != self.revision:
            raise StaleWrite
        server.revision += 1
        if record is None:
            server.records.pop(name, None)
        else:
            server.records[name] = record.dumps()
        server.numbers = numbers
        if table:
            if entry is None:
                server.table.pop(name, None)
            else:
                server.table[name] = ServedAdapter.loads(entry.dumps())
            server.generation += 1
        generation = server.generation
        await asyncio.sleep(0)
        if server.lose_reply:
            server.lose_reply = False
            raise StoreLost("the reply was lost")
        self.revision += 1
        self.generation = generation
        return generation

    async def restore(self, records: Iterable[Record], entries: Iterable[ServedAdapter], numbers: Numbers) -> int:
        await self._arrive()
        server = self.server
        if server.epoch not in (0, self.epoch):
            raise Fenced
        server.epoch, server.revision, self.revision = self.epoch, 0, 0
        server.records = {record.name: record.dumps() for record in records}
        server.table = {entry.name: entry for entry in entries}
        server.numbers = numbers
        server.generation = max(server.generation, self.generation) + 1
        await asyncio.sleep(0)
        return server.generation

    async def gateways(self) -> dict[str, GatewayReport]:
        await self._arrive()
        self._fence()
        reports = {
            name: GatewayReport(g.said[0], dict(g.said[1]), self.server.clock() - g.said_at)
            for name, g in self._gateways.items()
            if g.said is not None
        }
        await asyncio.sleep(0)
        return reports


class Gateway:
    """What `AdapterTable` does, by hand: read, hold, release, publish."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.seen, self.table = 0, {}  # type: ignore[var-annotated]
        self.in_flight: Counter[str] = Counter()
        self.said: tuple[int, Counter[str]] | None = None
        self.said_at = 0.0
        self.publish()

    def read(self) -> None:
        if not self._server.lost and self._server.epoch:
            if self.said is None:  # nothing is read before the registry can know of this gateway
                self.publish()
            self.seen, self.table = self._server.generation, dict(self._server.table)

    def publish(self) -> None:
        if not self._server.lost:
            self.said = (self.seen, Counter({v: n for v, n in self.in_flight.items() if n}))
            self.said_at = self._server.clock()


def size_of(content: str) -> int:
    """`3` of `3!law`; 0 of a content without a size."""
    size, mark, _ = content.partition("!")
    return int(size) if mark else 0


@dataclass
class Replica:
    """A replica with an engine that holds `slots` adapters. `refuses` are content hashes that it cannot load.

    `room` is for adapters whose content is `SIZE!...`, all together; it is taken while they load, as an engine does.
    """

    id: str
    slots: int
    clock: Clock
    nonce: int = 0
    held: dict[str, tuple[str, str]] = field(default_factory=dict)  # version -> content hash, state
    used: dict[str, float] = field(default_factory=dict)
    refuses: set[str] = field(default_factory=set)
    alive: bool = True
    silent: bool = False
    gate: asyncio.Event | None = None  # loads wait for it
    room: int = 0

    def left(self) -> int:
        """Room that no adapter takes."""
        return self.room - sum(size_of(content) for content, _ in self.held.values())

    def report(self) -> ReplicaReport:
        now = self.clock()
        return ReplicaReport(
            self.id,
            str(self.nonce),
            True,
            max_adapters=self.slots,
            adapters={
                version: Holding(
                    state,  # type: ignore[arg-type]
                    content,
                    idle_s=now - self.used.get(version, now),
                    age_s=now - self.used.get(version, now),
                )
                for version, (content, state) in self.held.items()
            },
        )

    def restart_engine(self) -> None:
        self.nonce += 1
        self.held.clear()


class World:
    """Everything together, and the history that invariants are checked against."""

    def __init__(self, *, replicas: int = 2, slots: int = 3, bases: tuple[str, ...] = ("base",)) -> None:
        self.clock = Clock()
        self.server = Server(self.clock)
        self.gateways: dict[str, Gateway] = {}
        self.replicas: dict[str, dict[str, Replica]] = {base: {} for base in bases}
        self.slots = slots
        self._next_replica = 0
        self.violations: list[str] = []  # what must never happen, and has: an assertion here would only be logged
        self.contents: dict[str, str] = {}  # version id -> content hash: one content for ever
        for base in bases:
            for _ in range(replicas):
                self.add_replica(base)

    def add_replica(self, base: str = "base") -> Replica:
        self._next_replica += 1
        replica = Replica(f"r{self._next_replica}", self.slots, self.clock)
        self.replicas[base][replica.id] = replica
        return replica

    def kill_replica(self, replica: Replica, base: str = "base") -> None:
        replica.alive = False
        self.replicas[base].pop(replica.id)

    def add_gateway(self, name: str) -> Gateway:
        self.gateways[name] = Gateway(self.server)
        return self.gateways[name]

    def holding(self, version: str) -> set[str]:
        """Ids of the live replicas on which a version is ready."""
        found = [r for replicas in self.replicas.values() for r in replicas.values()]
        return {r.id for r in found if r.held.get(version, ("", ""))[1] == "ready"}


class MemoryFleet:
    """A `Fleet` over the world's replicas. It checks what must never happen, at the moment when it would."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.dead = False
        self.loads = 0

    async def _arrive(self) -> None:
        await asyncio.sleep(0)
        if self.dead:
            await asyncio.Event().wait()

    async def probe(self, base: str) -> list[ReplicaReport]:
        await self._arrive()
        reports = [r.report() for r in self._world.replicas[base].values() if not r.silent]
        await asyncio.sleep(0)
        return reports

    async def load(self, base: str, replica_id: str, version: str, path: str, content_hash: str) -> None:
        await self._arrive()
        replica = self._replica(base, replica_id)
        self.loads += 1
        known = self._world.contents.setdefault(version, content_hash)
        if known != content_hash:
            self._world.violations.append(f"{version} stands for two contents")
        if version not in replica.held:
            if len(replica.held) >= replica.slots:
                raise NoSlot
            replica.held[version] = (content_hash, "loading")
            nonce = replica.nonce
            if replica.gate is not None:
                await replica.gate.wait()
            await asyncio.sleep(0)
            if not replica.alive or replica.nonce != nonce:
                raise ReplicaLost("died while loading")
            if replica.left() < 0:
                del replica.held[version]
                raise NoRoom("the memory kept for adapters is full", "adapter_memory_full")
            if content_hash in replica.refuses:
                del replica.held[version]
                raise AdapterError("the engine refuses it", code="refused")
            replica.held[version] = (content_hash, "ready")
            replica.used[version] = self._world.clock()
        if len(replica.held) > replica.slots:
            self._world.violations.append(f"{replica.id} holds more than its slots")
        await asyncio.sleep(0)

    async def unload(self, base: str, replica_id: str, version: str) -> None:
        await self._arrive()
        replica = self._replica(base, replica_id)
        entry = next((e for e in self._world.server.table.values() if e.version == version), None)
        for name, gateway in self._world.gateways.items():
            fresh = self._world.clock() - gateway.said_at < 4.0
            if fresh and gateway.said and gateway.said[1][version] and not (entry and replica_id not in entry.holders):
                self._world.violations.append(f"{version} is unloaded while gateway {name} has requests on it")
        if version in replica.held:
            await asyncio.sleep(0)
            replica.held.pop(version, None)
        await asyncio.sleep(0)

    def _replica(self, base: str, replica_id: str) -> Replica:
        replica = self._world.replicas[base].get(replica_id)
        if replica is None or replica.silent:
            raise ReplicaLost(f"{replica_id} is gone")
        return replica


class MemoryStorage:
    """An `AdapterStorage` whose paths are `HASH` for an adapter with this content, or `bad...` for a broken one.

    `SIZE!...` is an ESFT adapter of that size.
    """

    def __init__(self) -> None:
        self.dead = False

    async def take(self, base: str, path: str) -> AdapterFacts:
        await asyncio.sleep(0)
        if self.dead:
            await asyncio.Event().wait()
        if path.startswith("bad"):
            raise AdapterError("a tensor is missing", code="missing_tensor", tensor="lora_A")
        if size_of(path):
            return AdapterFacts("esft", path, path, 0, size_of(path), ("1.0",), 1000)
        return AdapterFacts("lora", path, path, 8, 1000, ("q_proj",), 1000)

    def folder(self, content_hash: str) -> str:
        return f"/copies/{content_hash}"

    async def sweep(self, used: set[str]) -> None:
        pass
