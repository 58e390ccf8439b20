"""The adapter registry: the only one that changes which adapters there are and which of their versions answers.

Killed at any point, its successor reads the records and goes on. Every write carries the registry's epoch, so that an
older one cannot write any more (fencing; Kleppmann, Designing Data-Intensive Applications, section 8.4). What cannot be
taken back (an unload) is done only after the record that calls for it has been written.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Callable, Collection
from dataclasses import replace

from signalbox.adapters import transitions
from signalbox.adapters.base import AdapterError
from signalbox.adapters.ledger import Ledger
from signalbox.adapters.lifecycle import Record
from signalbox.adapters.placement import MIN_RESIDENCY_S
from signalbox.adapters.reconciler import Reconciler
from signalbox.adapters.registry_protocols import (
    AdapterStorage,
    Fenced,
    Fleet,
    RecordStore,
    RegistryError,
    StoreLost,
)

log = logging.getLogger(__name__)

SETTLED_S, BUSY_S = 0.5, 0.1  # between two looks: where nothing is to be done, and where something is
SWEEP_S = 60.0

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Registry:
    """Adapters of all bases. Methods are for one event loop and raise `RegistryError`, `AdapterError` or `StoreLost`.

    bases: names of the experts that take adapters. reserved: further names that no adapter may have. `clock` counts
    seconds for intervals, `wall` gives Unix seconds for records. After `Fenced` it must not be used any more.
    """

    def __init__(
        self,
        store: RecordStore,
        fleet: Fleet,
        storage: AdapterStorage,
        bases: Collection[str],
        *,
        reserved: Collection[str] = (),
        max_adapters: int = 256,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        residency_s: float = MIN_RESIDENCY_S,
    ) -> None:
        self._storage = storage
        self._bases = tuple(bases)
        self._reserved = {name.lower() for name in (*reserved, *bases, "auto")}
        self._max_adapters = max_adapters
        self._clock, self._wall = clock, wall
        self._ledger = Ledger(store)
        self._takes: dict[tuple[str, int], asyncio.Task[Record]] = {}
        self._reconciler = Reconciler(
            self._ledger,
            store,
            fleet,
            storage,
            self._bases,
            is_taken=lambda name, number: (name, number) in self._takes,
            clock=clock,
            wall=wall,
            residency_s=residency_s,
        )
        self._swept = clock()
        self._closed = False

    # -- life --------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take over from whichever registry was before. Raises `StoreLost`."""
        await self._ledger.open()
        await self._reconciler.observe()

    async def run(self) -> None:
        """Reconcile until `close`. Raises `Fenced` when a newer registry has taken over."""
        while not self._closed:
            try:
                await self.tick()
            except StoreLost:
                await asyncio.sleep(BUSY_S)  # nothing can be changed; what is loaded goes on serving
            except Fenced:
                raise
            except Exception:
                log.exception("the adapters cannot be reconciled")
                await asyncio.sleep(SETTLED_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SETTLED_S if self.settled else BUSY_S):
                    await self._ledger.news.wait()
            self._ledger.news.clear()

    async def tick(self) -> None:
        """Reconcile once. Raises `StoreLost`, `Fenced`."""
        await self._reconciler.tick()
        if self._clock() - self._swept > SWEEP_S:
            self._swept = self._clock()
            await self._storage.sweep({v.content_hash for record in self.records() for v in record.versions})

    @property
    def settled(self) -> bool:
        """Whether nothing is under way."""
        return not self._takes and self._reconciler.settled

    async def close(self) -> None:
        """Stop what is being done from here; replicas finish what they have begun."""
        self._closed = True
        for task in self._takes.values():
            task.cancel()
        await asyncio.gather(*self._takes.values(), return_exceptions=True)
        await self._reconciler.close()

    # -- what callers ask for ----------------------------------------------------------------------------------

    def record(self, name: str) -> Record | None:
        """The record, as last read or written."""
        return self._ledger.records.get(name)

    def records(self) -> list[Record]:
        """All records, as last read or written."""
        return list(self._ledger.records.values())

    async def add(
        self,
        name: str,
        base: str,
        path: str,
        *,
        replicas: int | None = None,
        pinned: bool = False,
        origin: str = "api",
    ) -> Record:
        """Register an adapter or a new version of it; returns once its files are checked and copied.

        Content that the name has already changes nothing. Where the files are at fault (`AdapterError`) nothing is
        kept, except for origins other than `api`, which have nobody to tell.
        """
        self._check(name, base)
        number = 0

        def begin(record: Record | None) -> Record:
            nonlocal number
            if record is None:
                if len(self._ledger.records) >= self._max_adapters:
                    raise transitions.conflict(
                        f"{self._max_adapters} adapters are registered, and more may not be: remove one first"
                    )
                last = max(self._ledger.numbers.of(name), transitions.numbers_held(name, self._reconciler.held()))
                record = Record(name, base, replicas=replicas, pinned=pinned, origin=origin, number=last)
            if record.base != base:
                state = "is still being removed from" if record.removed else "adapts"
                raise transitions.conflict(f"'{name}' {state} '{record.base}': remove it first, or choose another name")
            number = record.number + 1
            # Said before the record is written: the reconciler drops what nobody checks.
            take = asyncio.create_task(self._take(written, name, number, base, path, replicas, pinned, origin))
            self._takes[name, number] = take
            take.add_done_callback(lambda _, key=(name, number): self._takes.pop(key, None))  # type: ignore[misc]
            return transitions.begin(record, path, self._wall())

        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        try:
            await self._ledger.commit(name, begin)
        except BaseException:
            written.cancel()
            raise
        written.set_result(None)
        return await asyncio.shield(self._takes[name, number])

    async def remove(self, name: str) -> Record:
        """Take an adapter out of service: no request gets it from here on, and it goes when the last one has ended."""
        removed: Record | None = None

        def change(record: Record | None) -> Record:
            nonlocal removed
            removed = transitions.remove(record, name, self._wall())
            return removed

        await self._ledger.commit(name, change)
        assert removed is not None
        return removed

    async def ensure(self, name: str) -> None:
        """Have an evicted adapter loaded again; returns at once. Raises `RegistryError` (404) where there is none."""
        await self._ledger.commit(name, lambda record: transitions.recall(record, name, self._wall()))

    async def wait(self, name: str, version: int | None = None, *, timeout_s: float, serving: bool = False) -> None:
        """Return once a version (default: the newest) is ready or has ended; with `serving`, once the name answers."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self._reached(name, version, serving):
                    await self._ledger.changed.wait()

    def _reached(self, name: str, number: int | None, serving: bool) -> bool:
        record = self._ledger.records.get(name)
        if record is None:
            return True
        if serving:
            return bool(record.holders) or record.serving is None or record.evicted
        if record.removed and number is None:
            return False
        version = record.shown if number is None else record.version(number)
        return version is None or version.phase in ("ready", "failed", "gone")

    def _check(self, name: str, base: str) -> None:
        if not _NAME.fullmatch(name):
            raise RegistryError(
                "an adapter's name has letters, digits, '.', '_' and '-', starts with a letter or digit, and is "
                f"64 characters at most; '{name[:64]}' is not one",
                code="invalid_name",
                status=400,
            )
        if name.lower() in self._reserved:
            raise transitions.conflict(f"'{name}' is taken by an expert: call the adapter something else")
        if base not in self._bases:
            known = ", ".join(self._bases) or "none"
            raise RegistryError(
                f"expert '{base[:64]}' takes no adapters; those that do: {known}", code="unknown_base", status=422
            )

    async def _take(
        self,
        written: asyncio.Future[None],
        name: str,
        number: int,
        base: str,
        path: str,
        replicas: int | None,
        pinned: bool,
        origin: str,
    ) -> Record:
        """Check and copy the files of a version, then have it loaded."""
        await written
        try:
            facts = await self._storage.take(base, path)
        except AdapterError as error:
            refusal, keep = error, origin != "api"
            await self._ledger.commit(
                name, lambda record: transitions.refuse(record, number, refusal, self._wall(), keep=keep)
            )
            raise
        except BaseException:
            with contextlib.suppress(StoreLost, Fenced):
                await self._ledger.commit(name, lambda record: transitions.drop(record, number))
            raise
        staged: Record | None = None

        def change(record: Record | None) -> Record:
            nonlocal staged
            staged = transitions.stage(
                record, number, facts, self._wall(), replicas=replicas, pinned=pinned, origin=origin
            )
            return staged

        await self._ledger.commit(name, change)
        assert staged is not None
        return replace(staged)
