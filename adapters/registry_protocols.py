"""What the adapter registry needs of the world: a store with fencing, a fleet of replicas, a place for files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from signalbox.adapters.base import AdapterFacts
from signalbox.adapters.lifecycle import Numbers, Record, ReplicaReport, ServedAdapter


class RegistryError(Exception):
    """The registry refuses what it was asked for. `status` is the HTTP status it becomes."""

    def __init__(self, message: str, *, code: str, status: int) -> None:
        super().__init__(message)
        self.message, self.code, self.status = message, code, status


class StoreLost(Exception):
    """The store did not answer: whether the command was carried out is unknown."""


class StaleWrite(Exception):
    """Another write came in between: read again."""


class DataLost(Exception):
    """The store has lost what was written to it."""


class Fenced(Exception):
    """A newer registry has taken over: this one must stop."""


class NoSlot(Exception):
    """The replica has no free slot."""


class NoRoom(Exception):
    """The replica has a free slot, but its engine no room beside the other adapters. `code` is the engine's."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class ReplicaLost(Exception):
    """The replica has gone, does not answer or is not ready: it may work later, or elsewhere."""


@dataclass(slots=True, frozen=True)
class GatewayReport:
    """What a gateway last published: the table's generation that it has seen, its requests in flight by version id.

    `silent_s` seconds ago this reader first saw the report.
    """

    generation: int
    in_flight: Mapping[str, int] = field(default_factory=dict)
    silent_s: float = 0.0


class RecordStore(Protocol):
    """Records, the gateways' table and its generation, with one writer at a time.

    All methods raise `StoreLost`. `read`, `write` and `gateways` raise `Fenced` once another registry has taken over,
    and `DataLost` where the store is empty though it was not.
    """

    async def take_over(self) -> None:
        """Become the only writer: from here on every write of an earlier one is refused."""

    async def read(self) -> tuple[dict[str, Record], Numbers, int]:
        """All records, the numbers of names that are gone, and the table's generation."""

    async def write(
        self, name: str, record: Record | None, entry: ServedAdapter | None, numbers: Numbers, *, table: bool
    ) -> int:
        """Put or delete one record and, with `table`, its entry in the gateways' table, which makes a new generation.

        One atomic step; returns the table's generation. Raises `StaleWrite` where the store is not as last read.
        """

    async def restore(self, records: Iterable[Record], entries: Iterable[ServedAdapter], numbers: Numbers) -> int:
        """Write everything anew into a store that has lost its data; returns the generation, greater than any before.

        Raises `Fenced` where another registry was faster.
        """

    async def gateways(self) -> dict[str, GatewayReport]:
        """The reports of all gateways that have not been silent for very long."""


class Fleet(Protocol):
    """The replicas of the bases."""

    async def probe(self, base: str) -> list[ReplicaReport]:
        """What each replica says at this moment; those that do not answer are missing. Never raises."""

    async def load(self, base: str, replica_id: str, version: str, path: str, content_hash: str) -> None:
        """Load a version on one replica and have it answer a canary request. Nothing happens where it is loaded.

        Raises `AdapterError` where the replica refuses it for good, `NoSlot`, `NoRoom`, `ReplicaLost`.
        """

    async def unload(self, base: str, replica_id: str, version: str) -> None:
        """Unload a version, once its requests have ended. Nothing happens where it is not loaded. `ReplicaLost`."""


class AdapterStorage(Protocol):
    """The registry's own copies of adapters, by content hash: what is in use does not change or vanish."""

    async def take(self, base: str, path: str) -> AdapterFacts:
        """Copy, check and keep an adapter. Raises `AdapterError`."""

    def folder(self, content_hash: str) -> str:
        """The folder of the copy."""

    async def sweep(self, used: set[str]) -> None:
        """Delete copies that are not in use and not new."""
