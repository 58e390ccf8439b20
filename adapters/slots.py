"""Who holds which slot of an engine, and how many open requests each adapter has. Used on one event loop."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

BASE = -1


@dataclass(slots=True, eq=False)
class Slot:
    """One adapter's place. `open` counts its requests from submission to the last chunk.

    `loaded` is set once loading has ended, well or badly; `idle` while no request is open; `leaving` once it unloads.
    """

    name: str
    index: int
    open: int = 0
    accepting: bool = False
    loaded: asyncio.Event = field(default_factory=asyncio.Event)
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    leaving: asyncio.Task[Any] | None = None

    def enter(self) -> None:
        """A request begins."""
        self.open += 1
        self.idle.clear()

    def leave(self) -> None:
        """A request has ended."""
        self.open -= 1
        if not self.open:
            self.idle.set()


class SlotTable:
    """Slots by the name of the adapter that holds them; the lowest free index first, which keeps batches dense."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = list(range(size))
        self._held: dict[str, Slot] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def get(self, name: str) -> Slot | None:
        """The slot of an adapter that is loading, loaded or leaving."""
        return self._held.get(name)

    def take(self, name: str) -> Slot | None:
        """A free slot for a new name, None where there is none."""
        if not self._free:
            return None
        self._free.sort()
        slot = self._held[name] = Slot(name, self._free.pop(0))
        slot.idle.set()
        return slot

    def give_back(self, slot: Slot) -> None:
        """Free a slot that nothing uses any more; again, nothing happens."""
        if self._held.get(slot.name) is slot:
            del self._held[slot.name]
            self._free.append(slot.index)

    def accepting(self) -> list[str]:
        """Names that a request may ask for now."""
        return [slot.name for slot in self._held.values() if slot.accepting]

    def open_requests(self) -> dict[str, int]:
        """Open requests of each adapter that is loaded, those that take no more requests included."""
        return {slot.name: slot.open for slot in self._held.values() if slot.accepting or slot.leaving}
