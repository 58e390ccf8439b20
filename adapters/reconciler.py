"""Brings the replicas to what the records say, again and again (level-triggered reconciliation).

`tick` looks at what every replica holds and starts what is missing. What it must remember is in the records, so a
successor can go on. A version is unloaded only when each live gateway has seen a table in which it is not served, and
has no request in flight on it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from signalbox.adapters import transitions
from signalbox.adapters.base import AdapterError
from signalbox.adapters.ledger import Ledger
from signalbox.adapters.lifecycle import Record, ReplicaReport, Version, split_id, version_id
from signalbox.adapters.placement import MIN_RESIDENCY_S, choose_targets, choose_victim, evictable
from signalbox.adapters.registry_protocols import (
    AdapterStorage,
    DataLost,
    Fleet,
    GatewayReport,
    NoRoom,
    NoSlot,
    RecordStore,
    ReplicaLost,
)

log = logging.getLogger(__name__)

GRACE_S = 3.0  # a replica that does not answer for so long is given up, and its share moves
FRESH_S = 1.5  # no switch while a gateway is silent for longer than this: it may be about to lose the store
GATEWAY_EXPIRY_S = 4.0  # a gateway that is silent for so long is gone and does not count any more
SLOT_WAIT_S = 30.0  # that a new adapter waits for a slot when all are in use
FIRST_PAUSE_S, LAST_PAUSE_S = 0.5, 15.0  # between two attempts on one replica

Key = tuple[str, str]  # replica id, version id


@dataclass(slots=True, frozen=True)
class _Crowded:
    """A replica's engine had no room for a version beside these; there is no use in asking before one of them goes."""

    beside: frozenset[str]
    reason: str
    code: str


class Reconciler:
    """Loads, switches, drains, unloads. `is_taken` says whether a version's files are being checked right now."""

    def __init__(
        self,
        ledger: Ledger,
        store: RecordStore,
        fleet: Fleet,
        storage: AdapterStorage,
        bases: Collection[str],
        *,
        is_taken: Callable[[str, int], bool],
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        residency_s: float = MIN_RESIDENCY_S,
    ) -> None:
        self._ledger, self._store, self._fleet, self._storage = ledger, store, fleet, storage
        self._bases = tuple(bases)
        self._is_taken = is_taken
        self._clock, self._wall = clock, wall
        self._residency_s = residency_s
        # What was seen last; `_seen` says when each replica answered last.
        self._reports: dict[str, dict[str, ReplicaReport]] = {base: {} for base in self._bases}
        self._seen: dict[tuple[str, str], float] = {}
        self._gateways: dict[str, GatewayReport] = {}
        # What is being done, and what was done since the replicas were last asked.
        self._actions: dict[Key, asyncio.Task[None]] = {}
        self._unseen: set[Key] = set()
        # Memory that a successor can do without.
        self._tries: dict[Key, tuple[int, float]] = {}  # failed attempts, and when the next one is due
        self._refused: dict[Key, AdapterError] = {}
        self._crowded: dict[Key, _Crowded] = {}
        self._blocked: dict[str, float] = {}  # since when a version has waited for a slot or for room

    async def tick(self) -> None:
        """Look once at everything and start what is to be done. Raises `StoreLost`, `Fenced`."""
        await self._ledger.settle()
        try:
            await self.observe()
        except DataLost:
            self._ledger.doubtful = True
            await self._ledger.settle()
            return
        for name in list(self._ledger.records):
            await self._drive(name)
        if not self._ledger.doubtful:
            self._unload_unwanted()
        self._forget()

    async def close(self) -> None:
        """Stop waiting for what was started; replicas finish it."""
        for task in self._actions.values():
            task.cancel()
        await asyncio.gather(*self._actions.values(), return_exceptions=True)

    @property
    def settled(self) -> bool:
        """Whether nothing is under way: every version that should be loaded is, and no other."""
        if self._actions or self._ledger.doubtful:
            return False
        for record in self._ledger.records.values():
            for version in record.versions:
                if version.phase in ("staged", "draining", "validating") and not self._is_evicted(record, version):
                    return False
                if version.phase == "ready" and not set(version.targets) <= set(record.holders):
                    return False
        return all(
            self._wanted(base, report.replica_id, vid)
            for base, reports in self._reports.items()
            for report in reports.values()
            for vid in report.adapters
        )

    def held(self) -> list[tuple[str, int]]:
        """Name and number of every version on any replica, as last seen."""
        return [split_id(vid) for reports in self._reports.values() for r in reports.values() for vid in r.adapters]

    async def observe(self) -> None:
        """Ask all replicas, and read what the gateways say. Raises `StoreLost`, `Fenced`, `DataLost`."""
        self._unseen = set()
        answers = await asyncio.gather(*(self._fleet.probe(base) for base in self._bases))
        now = self._clock()
        for base, reports in zip(self._bases, answers, strict=True):
            self._reports[base] = {report.replica_id: report for report in reports}
            self._seen |= {(base, report.replica_id): now for report in reports}
        self._seen = {key: at for key, at in self._seen.items() if now - at < GRACE_S}
        gateways = await self._store.gateways()
        self._gateways = {name: report for name, report in gateways.items() if report.silent_s < GATEWAY_EXPIRY_S}

    # -- one adapter -------------------------------------------------------------------------------------------

    async def _drive(self, name: str) -> None:
        commit = partial(self._ledger.commit, name)
        for version in self._versions(name):
            if version.phase == "draining" and self._is_nowhere(name, version.number):
                await commit(partial(transitions.end, number=version.number, at=self._wall()))
            elif version.phase == "validating" and not self._is_taken(name, version.number):
                # The registry that checked it has died, and whoever asked for it knows.
                await commit(partial(self._drop, number=version.number))
        record = self._ledger.records.get(name)
        if record is not None and record.removed:
            await commit(transitions.forget)
        for version in self._versions(name):
            if version.phase in ("staged", "ready"):
                await self._advance(name, version.number)

    def _drop(self, record: Record | None, number: int) -> Record | None:
        taken = record is not None and self._is_taken(record.name, number)
        return record if taken else transitions.drop(record, number)

    def _versions(self, name: str) -> tuple[Version, ...]:
        record = self._ledger.records.get(name)
        return record.versions if record is not None else ()

    def _is_nowhere(self, name: str, number: int) -> bool:
        vid = version_id(name, number)
        base = self._ledger.records[name].base
        held = any(vid in report.adapters for report in self._reports.get(base, {}).values())
        busy = any(key[1] == vid for key in (*self._actions, *self._unseen))
        return not held and not busy and self._is_unused(vid)

    async def _advance(self, name: str, number: int) -> None:
        """Load a version where it is missing; once it is everywhere, have it served."""
        record = self._ledger.records.get(name)
        version = record.version(number) if record is not None else None
        if record is None or version is None or self._is_evicted(record, version):
            return
        vid = version_id(name, number)
        reports = self._reports.get(record.base, {})
        live = {replica: report for replica, report in reports.items() if report.ready}
        silent = {replica for base, replica in self._seen if base == record.base} - set(reports)
        shares = self._shares(record.base) if record.replicas is not None else {}
        targets = choose_targets(version.targets, record.replicas, live, silent, shares)
        confirmed = [replica for replica in targets if replica in live and self._confirmed(live[replica], vid)]
        complete = bool(targets) and len(confirmed) == len(targets)
        serving = number == record.current
        if serving:  # a replica that is silent for a moment stays; where it has died, Serve's routers know at once
            holders = tuple(r for r in targets if r in confirmed or (r in silent and r in record.holders))
        else:
            holders = tuple(confirmed)
        if serving or (complete and self._may_switch()):
            await self._ledger.commit(
                name, lambda r: transitions.serve(r, number, targets, holders, self._wall(), complete=complete)
            )
        elif targets != version.targets:
            await self._ledger.commit(name, lambda r: transitions.retarget(r, number, targets))
        await self._heed_refusals(name, number)
        for replica in targets:
            if replica in live and replica not in confirmed:
                await self._load(name, number, live[replica], live)

    def _shares(self, base: str) -> Counter[str]:
        """How many versions each replica shall hold."""
        return Counter(
            replica
            for record in self._ledger.records.values()
            if record.base == base
            for version in record.versions
            if version.phase in ("staged", "ready") and not self._is_evicted(record, version)
            for replica in version.targets
        )

    def _may_switch(self) -> bool:
        """Whether every gateway will see a switch: none may be about to go on with what it saw last."""
        return all(report.silent_s < FRESH_S for report in self._gateways.values())

    async def _heed_refusals(self, name: str, number: int) -> None:
        vid = version_id(name, number)
        for key in [key for key in self._refused if key[1] == vid]:
            error = self._refused[key]
            await self._fail(name, number, f"replica {key[0]}: {error.message}", error.code, error.tensor)
            self._refused.pop(key, None)

    async def _fail(self, name: str, number: int, reason: str, code: str, tensor: str | None = None) -> None:
        await self._ledger.commit(
            name, lambda r: transitions.fail(r, number, reason, self._wall(), code=code, tensor=tensor)
        )

    # -- what is where -----------------------------------------------------------------------------------------

    @staticmethod
    def _is_evicted(record: Record, version: Version) -> bool:
        return record.evicted and version.number == record.current

    def _confirmed(self, report: ReplicaReport, vid: str) -> bool:
        key = (report.replica_id, vid)
        return report.holds(vid) and key not in self._actions and key not in self._unseen

    def _is_unused(self, vid: str) -> bool:
        """Whether no gateway can use the version: each has seen that it is served no more, and has none in flight."""
        since = self._ledger.ceased(vid)
        return all(g.generation >= since and not g.in_flight.get(vid) for g in self._gateways.values())

    def _wanted(self, base: str, replica: str, vid: str) -> bool:
        """Whether the records want this version on this replica."""
        name, number = split_id(vid)
        record = self._ledger.records.get(name)
        version = record.version(number) if record is not None else None
        if record is None or version is None or record.base != base or version.phase not in ("staged", "ready"):
            return False
        return replica in version.targets and not self._is_evicted(record, version)

    # -- loads and unloads -------------------------------------------------------------------------------------

    async def _load(self, name: str, number: int, report: ReplicaReport, live: Mapping[str, ReplicaReport]) -> None:
        """Start loading a version on one replica, or see to it that there will be room."""
        vid, replica = version_id(name, number), report.replica_id
        key = (replica, vid)
        record = self._ledger.records.get(name)
        version = record.version(number) if record is not None else None
        if record is None or version is None or not self._wanted(record.base, replica, vid):
            return
        if key in self._actions or key in self._unseen or self._clock() < self._tries.get(key, (0, 0.0))[1]:
            return
        pending = {other for at, other in (*self._actions, *self._unseen) if at == replica}
        others = frozenset((pending | set(report.adapters)) - {vid})
        crowded = self._crowded.get(key)
        if crowded is not None and pending:
            return  # two that are loaded at once can keep each other out
        if len(others) < report.max_adapters and (crowded is None or not crowded.beside <= others):
            self._blocked.pop(vid, None)
            folder = self._storage.folder(version.content_hash)
            load = self._fleet.load(record.base, replica, vid, folder, version.content_hash)
            self._act(key, load, beside=others)
        elif all(self._wanted(record.base, replica, other) for other in others):  # else one of them is about to go
            await self._make_room(record, version, report, live, crowded)

    async def _make_room(
        self,
        record: Record,
        version: Version,
        report: ReplicaReport,
        live: Mapping[str, ReplicaReport],
        crowded: _Crowded | None,
    ) -> None:
        """Evict what was not used for longest. Where nothing may go, wait a while, then give up.

        Where room is short and not slots, another kind of adapter would leave none that this one could use.
        """
        vid = version_id(record.name, version.number)
        in_flight: dict[str, int] = {}
        for gateway in self._gateways.values():
            for used, count in gateway.in_flight.items():
                in_flight[used] = in_flight.get(used, 0) + count
        others = [r for r in self._ledger.records.values() if r.name != record.name and r.base == record.base]
        candidates = [r for r in others if evictable(r)]
        if crowded is not None:
            candidates = [r for r in candidates if r.serving is not None and r.serving.kind == version.kind]
        victim = choose_victim(candidates, report, live, in_flight, residency_s=self._residency_s)
        if victim is not None and victim.current is not None:
            number = victim.current
            what = "slot" if crowded is None else "room"
            await self._ledger.commit(
                victim.name, lambda r: transitions.evict(r, number, f"its {what} went to {vid}", self._wall())
            )
            return
        moving = any(v.phase in ("staged", "draining") and not r.evicted for r in others for v in r.versions)
        since = self._blocked.setdefault(vid, self._clock())
        if (candidates or moving) and self._clock() - since < SLOT_WAIT_S:
            return
        self._blocked.pop(vid, None)
        if crowded is None:
            code, reason = (
                "no_slot",
                (
                    f"no slot is free on replica {report.replica_id}: all {report.max_adapters} are pinned or in use; "
                    "remove or unpin an adapter, or raise max_adapters"
                ),
            )
        else:
            code, reason = (
                crowded.code,
                (
                    f"no room on replica {report.replica_id} ({crowded.reason}), and no adapter may go; "
                    "remove or unpin one, or give the expert more (`esft`)"
                ),
            )
        if version.loaded_at is None:
            await self._fail(record.name, version.number, reason, code)
        elif not record.holders:
            await self._ledger.commit(record.name, lambda r: transitions.evict(r, version.number, reason, self._wall()))

    def _unload_unwanted(self) -> None:
        """Unload whatever no record wants where it is, once no gateway can send requests there."""
        all_know = all(gateway.generation >= self._ledger.generation for gateway in self._gateways.values())
        for base, reports in self._reports.items():
            for replica, report in reports.items():
                for vid in report.adapters:
                    key = (replica, vid)
                    if key in self._actions or key in self._unseen or self._wanted(base, replica, vid):
                        continue
                    if self._clock() < self._tries.get(key, (0, 0.0))[1]:
                        continue
                    if self._is_unused(vid) or (all_know and self._is_elsewhere(base, vid)):
                        self._act(key, self._fleet.unload(base, replica, vid))

    def _is_elsewhere(self, base: str, vid: str) -> bool:
        """Whether the version is served, by other replicas: a request that still comes here is sent on there."""
        name, number = split_id(vid)
        record = self._ledger.records.get(name)
        return record is not None and record.base == base and record.current == number and bool(record.holders)

    def _act(self, key: Key, work: Coroutine[Any, Any, None], *, beside: frozenset[str] = frozenset()) -> None:
        async def act() -> None:
            try:
                await work
                self._tries.pop(key, None)
                self._crowded.pop(key, None)
            except AdapterError as error:
                self._refused[key] = error
                self._pause(key)
            except NoRoom as error:
                log.info("adapter %s on replica %s: %s", key[1], key[0], error)
                self._crowded[key] = _Crowded(beside, str(error), error.code)
            except (NoSlot, ReplicaLost) as error:
                log.info("adapter %s on replica %s: %s", key[1], key[0], error)
                self._pause(key)
            except Exception:
                log.exception("adapter %s on replica %s", key[1], key[0])
                self._pause(key)
            finally:
                self._unseen.add(key)
                self._actions.pop(key, None)
                self._ledger.news.set()

        self._actions[key] = asyncio.create_task(act(), name=f"adapter-{key[1]}")

    def _pause(self, key: Key) -> None:
        tries = self._tries.get(key, (0, 0.0))[0] + 1
        self._tries[key] = (tries, self._clock() + min(FIRST_PAUSE_S * 2 ** (tries - 1), LAST_PAUSE_S))

    def _forget(self) -> None:
        """Drop what is remembered of versions that are nowhere any more."""
        known = {version_id(r.name, v.number) for r in self._ledger.records.values() for v in r.versions}
        known |= {vid for reports in self._reports.values() for report in reports.values() for vid in report.adapters}
        self._ledger.forget_ceased(known)
        self._tries = {key: value for key, value in self._tries.items() if key[1] in known}
        self._refused = {key: value for key, value in self._refused.items() if key[1] in known}
        self._crowded = {key: value for key, value in self._crowded.items() if key[1] in known}
        self._blocked = {vid: at for vid, at in self._blocked.items() if vid in known}
