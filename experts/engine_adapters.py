"""The adapters of a transformers engine: loading beside running requests, counting them, unloading after the last.

On the engine's event loop; only reading files and copying weights is done by threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from signalbox.adapters.base import AdapterError, Limits
from signalbox.adapters.layers import LoraLayers
from signalbox.adapters.peft_format import read_lora
from signalbox.adapters.slots import BASE, Slot, SlotTable
from signalbox.experts.base import AdapterNotLoaded, InvalidRequest, QueueFull, Unsupported


class EngineAdapters:
    """Adapters by version id. `step_boundary` waits until no step that began before still computes."""

    def __init__(
        self, expert: str, max_adapters: int, max_rank: int, step_boundary: Callable[[], Awaitable[None]]
    ) -> None:
        self.expert, self.max_rank = expert, max_rank
        self._table = SlotTable(max_adapters)
        self._step_boundary = step_boundary

    @contextmanager
    def open(self, name: str | None) -> Iterator[int]:
        """A request's time with its adapter; gives the slot, `BASE` for the base's requests.

        Raises `Unsupported` where the expert takes no adapters, `AdapterNotLoaded` where this one may not be used now.
        """
        if name is None:
            yield BASE
            return
        slot = self._table.get(name)
        if not self._table.size:
            raise Unsupported(f"expert {self.expert!r} has no adapter {name!r}: it takes none", param="model")
        if slot is None or not slot.accepting:
            raise AdapterNotLoaded(f"expert {self.expert!r} does not hold adapter {name!r} now", param="model")
        slot.enter()
        try:
            yield slot.index
        finally:
            slot.leave()

    def _take(self, name: str) -> Slot:
        """A free slot. Raises `InvalidRequest` (409) where the adapter has one, `QueueFull` where none is left."""
        if name in self._table:
            raise InvalidRequest(f"adapter {name!r} is loaded already", status=409, code="already_loaded", param="name")
        slot = self._table.take(name)
        if slot is None:
            raise QueueFull(
                f"expert {self.expert!r} holds {self._table.size} adapters, its max_adapters; unload one first",
                code="adapter_slots_full",
            )
        return slot

    async def load(self, name: str, path: str, layers: LoraLayers | None) -> None:
        """See `Engine.load`. Cancelled, the adapter is not loaded, and its slot free as soon as the thread is done."""
        if layers is None:
            raise Unsupported(f"expert {self.expert!r} takes no adapters: set its max_adapters", param="adapter")
        slot = self._take(name)
        copying = asyncio.ensure_future(asyncio.to_thread(self._copy, slot.index, path, layers))
        copying.add_done_callback(lambda _: slot.loaded.set())
        try:
            await asyncio.shield(copying)
        except AdapterError as error:
            self._table.give_back(slot)
            raise InvalidRequest(error.message, status=422, code=error.code, param=error.tensor) from error
        except BaseException:
            # Cancelled, most likely. A thread cannot be: the slot is free once it is done with it.
            copying.add_done_callback(lambda _: self._table.give_back(slot))
            raise
        slot.accepting = slot.leaving is None

    def _copy(self, slot: int, path: str, layers: LoraLayers) -> None:
        folder = Path(path)
        limits = Limits(roots=(folder,), max_rank=self.max_rank)
        layers.load(slot, read_lora(folder, layers.shape, limits))

    async def unload(self, name: str) -> None:
        """See `Engine.unload`; further calls wait for the same end."""
        slot = self._table.get(name)
        if slot is None:
            return
        if slot.leaving is None:
            slot.accepting = False
            slot.leaving = asyncio.ensure_future(self._leave(slot))
        await asyncio.shield(slot.leaving)

    async def _leave(self, slot: Slot) -> None:
        await slot.loaded.wait()
        await slot.idle.wait()
        await self._step_boundary()
        self._table.give_back(slot)

    def accepting(self) -> list[str]:
        """Adapters that requests may name now."""
        return self._table.accepting()

    def open_requests(self) -> dict[str, int]:
        """Open requests by adapter, of those too that are being unloaded and still hold a slot."""
        return self._table.open_requests()
