"""The registry's records: in the store first, then in memory, one change at a time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from signalbox.adapters.lifecycle import Numbers, Record, served, version_id
from signalbox.adapters.registry_protocols import DataLost, RecordStore, StaleWrite, StoreLost

log = logging.getLogger(__name__)

Change = Callable[[Record | None], Record | None]


class Ledger:
    """All records, as last read or written. They are the store's content, except while `doubtful`.

    A write whose outcome is unknown (the store did not answer) leaves doubt: nothing more is changed until the records
    have been read again.
    """

    def __init__(self, store: RecordStore) -> None:
        self._store = store
        self._lock = asyncio.Lock()
        self._ceased: dict[str, int] = {}
        self._first_generation = 0
        self.records: dict[str, Record] = {}
        self.numbers = Numbers()
        self.generation = 0
        self.doubtful = True
        self.news = asyncio.Event()  # for the one who reconciles
        self.changed = asyncio.Event()  # for all who wait for a change; a new one after each

    async def open(self) -> None:
        """Become the only writer and read everything. Raises `StoreLost`."""
        await self._store.take_over()
        async with self._lock:
            await self._reread()
        self._first_generation = self.generation

    async def settle(self) -> None:
        """Read again where there is doubt. Raises `StoreLost`, `Fenced`."""
        if self.doubtful:
            async with self._lock:
                await self._reread()

    async def commit(self, name: str, change: Change) -> Record | None:
        """Change one record. `change` gets it as it is now, returns what it becomes, and may raise.

        A record without versions is deleted. Raises `StoreLost`, `Fenced`; then it is unknown or will not be known
        here whether the change was made.
        """
        async with self._lock:
            if self.doubtful:
                await self._reread()
            before = self.records.get(name)
            after = change(before)
            last = next((record.number for record in (after, before) if record is not None), 0)
            if after is not None and not after.versions:
                after = None
            if after == before:
                return after
            numbers = self.numbers.with_name(name, last) if after is None and last else self.numbers
            try:
                await self._write(name, before, after, numbers)
            except DataLost:
                await self._restore()
                await self._write(name, before, after, numbers)
            return after

    async def _write(self, name: str, before: Record | None, after: Record | None, numbers: Numbers) -> None:
        entry_before, entry = (served(record) if record is not None else None for record in (before, after))
        self.doubtful = True  # until the store has answered, whatever happens
        try:
            generation = await self._store.write(name, after, entry, numbers, table=entry != entry_before)
        except StaleWrite as error:
            raise StoreLost("another write came in between") from error
        except DataLost:
            self.doubtful = False  # nothing was written: what was known before is what there is
            raise
        self.doubtful = False
        self.numbers, self.generation = numbers, generation
        if after is None:
            self.records.pop(name, None)
        else:
            self.records[name] = after
        self._note_ceased(name, before, after)
        self.wake()

    async def _reread(self) -> None:
        try:
            self.records, self.numbers, self.generation = await self._store.read()
        except DataLost:
            await self._restore()
        self.doubtful = False
        for name, record in self.records.items():
            self._note_ceased(name, None, record)
        self.wake()

    async def _restore(self) -> None:
        log.warning("the store has lost its data: writing %d adapters anew", len(self.records))
        entries = [entry for record in self.records.values() if (entry := served(record)) is not None]
        self.generation = await self._store.restore(self.records.values(), entries, self.numbers)

    def wake(self) -> None:
        """Tell everyone that something has changed."""
        self.news.set()
        self.changed.set()
        self.changed = asyncio.Event()

    # -- since when gateways do not use a version ---------------------------------------------------------------

    def ceased(self, vid: str) -> int:
        """The generation from which on no gateway starts a request on a version that is not served."""
        return self._ceased.get(vid, self._first_generation)

    def forget_ceased(self, known: set[str]) -> None:
        """Drop what is kept of versions other than these."""
        self._ceased = {vid: generation for vid, generation in self._ceased.items() if vid in known}

    def _note_ceased(self, name: str, before: Record | None, after: Record | None) -> None:
        active = after.current if after is not None and not after.evicted else None
        for record in (before, after):
            for version in record.versions if record is not None else ():
                if version.number != active:
                    self._ceased.setdefault(version_id(name, version.number), self.generation)
        if active is not None:
            self._ceased.pop(version_id(name, active), None)
