"""A gateway's side of the adapters: which version answers a name now, and which of them this gateway still uses.

Each request that names an adapter first reads one integer from the store, the table's generation, and the table itself
where it has changed. A read that began after a switch was committed sees it; so does every request that came after it,
on every gateway. What this gateway has seen, and its requests in flight by version, it publishes all the time: the
registry unloads a version only when no gateway can send a request to it any more (epoch-based reclamation as in RCU,
McKenney and Slingwine, 1998).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import orjson

from signalbox.adapters.base import AdapterError
from signalbox.adapters.lifecycle import Record, ReplicaReport, ServedAdapter, describe
from signalbox.experts.base import ExpertError, ExpertUnavailable
from signalbox.serving.adapter_fleet import probe
from signalbox.serving.adapter_router import set_holders
from signalbox.serving.store import Store, StoreUnavailable

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

__all__ = ["AdapterTable", "ServedAdapter"]

log = logging.getLogger(__name__)

GENERATION = "adapters:generation"
TABLE = "adapters:table"
RECORDS = "adapters:records"
GATEWAYS = "adapters:gateways"

LOOK_S = 0.1  # between two looks at the generation where no request makes one
LOST_WAIT_S = 0.05  # that a request waits for a store that is lost
PUBLISH_S = 0.25  # between two reports where nothing has changed
GATEWAYS_EXPIRY_S = 60.0  # of all reports, when the last gateway is gone
ACCEPT_S = 20.0  # that a registry which has died has to come back
ADD_S = 600.0  # an adapter of gigabytes is read and copied before it is accepted
CALL_S = 30.0
ENSURE_S = 30.0  # that a request waits for an evicted adapter


class AdapterTable:
    """The adapters as one gateway process sees them. All methods are for one event loop.

    `registry` is the handle of the registry's deployment (None: adapters are read, never changed); `experts` are the
    handles of those experts that may hold adapters, or of all.
    """

    def __init__(
        self, store: Store, registry: DeploymentHandle[Any] | None, experts: Mapping[str, DeploymentHandle[Any]]
    ) -> None:
        self._store = store
        self._registry = registry
        self._experts = experts
        self._id = uuid.uuid4().hex[:16]
        self._generation = 0  # what has been read, and the table at least as new
        self._raw: dict[str, bytes] = {}
        self._table: dict[str, ServedAdapter] = {}
        self._in_flight: Counter[str] = Counter()
        self._sequence = 0
        self._published = False
        self._news = asyncio.Event()
        self._next: asyncio.Future[None] | None = None
        self._reader: asyncio.Task[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._records: dict[str, Record] = {}
        self.store_error: str | None = None

    async def start(self) -> None:
        """Make this gateway known, read the table, then keep publishing and looking until `close`."""
        with contextlib.suppress(StoreUnavailable):
            await self._publish()  # before the first read: no switch may take place that does not wait for us
        await self._refresh()
        self._tasks = [
            asyncio.create_task(self._keep_publishing(), name="adapters-publish"),
            asyncio.create_task(self._keep_looking(), name="adapters-look"),
        ]

    async def close(self) -> None:
        """Stop, and withdraw this gateway's report."""
        reader = [self._reader] if self._reader else []
        for task in (*self._tasks, *reader):
            task.cancel()
        await asyncio.gather(*self._tasks, *reader, return_exceptions=True)
        with contextlib.suppress(StoreUnavailable):
            await self._store.hdel(GATEWAYS, self._id)

    # -- for requests ------------------------------------------------------------------------------------------

    @property
    def generation(self) -> int:
        """Of the table as last seen; it changes with every change of what answers a name."""
        return self._generation

    async def current(self, name: str) -> ServedAdapter | None:
        """The version that answers `name` now, None where none does.

        Linearizable: what was committed before the call is seen. With the store lost it is what was seen last; the
        registry cannot switch then either.
        """
        await self._refresh()
        return self._table.get(name)

    def served(self) -> list[ServedAdapter]:
        """All adapters that can be asked for, as last seen."""
        return list(self._table.values())

    @contextlib.asynccontextmanager
    async def lease(self, name: str) -> AsyncIterator[ServedAdapter | None]:
        """The current version of `name`, not unloaded before the block ends; None where there is none."""
        adapter = await self.current(name)
        if adapter is None:
            yield None
            return
        with self.hold(adapter):  # no await since the look-up: no report can lie between the two
            yield adapter

    @contextlib.contextmanager
    def hold(self, adapter: ServedAdapter) -> Iterator[None]:
        """Count a request in flight. To be entered with no await since `current` returned; `lease` does both."""
        version = adapter.version
        self._in_flight[version] += 1
        try:
            yield
        finally:
            self._in_flight[version] -= 1
            if not self._in_flight[version]:
                del self._in_flight[version]
                served = self._table.get(adapter.name)
                if served is None or served.version != version or not served.holders:
                    self._news.set()  # somebody waits for this

    async def ensure(self, name: str) -> ServedAdapter:
        """The current version of `name`, loaded again where it was evicted.

        Raises `InvalidRequest` (404) where there is no such adapter, `ExpertUnavailable` where it is not back in time.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + ENSURE_S
        answer: dict[str, Any] = {}
        while True:
            adapter = await self.current(name)
            if adapter is not None and adapter.holders:
                return adapter
            left = deadline - loop.time()
            if answer and (adapter is None or left <= 0):
                reason = answer.get("reason") or answer.get("phase")
                raise ExpertUnavailable(f"the adapter '{name}' is not loaded: {reason}", code="adapter_not_loaded")
            if answer:  # it was loaded, and has made room for another one before anybody could use it
                await asyncio.sleep(LOOK_S)
            answer = await self._ask("ensure", name, left, timeout_s=left + 5)

    # -- for the API -------------------------------------------------------------------------------------------

    async def describe(self, name: str | None = None) -> list[dict[str, Any]]:
        """Records for `/v1/adapters`, of one name or of all, by name; each says what the replicas say right now.

        `store` is `ok` or `lost`; where it is lost the records are those read last, and the replicas are asked all the
        same.
        """
        records, store = await self._read_records(name)
        bases = sorted({record.base for record in records if record.base in self._experts})
        reports = dict(zip(bases, await asyncio.gather(*(self._probe(base) for base in bases)), strict=True))
        return [describe(record, reports.get(record.base)) | {"store": store} for record in records]

    async def _read_records(self, name: str | None) -> tuple[list[Record], str]:
        store = "ok"
        try:
            if name is None:
                found = await self._store.hgetall(RECORDS)
            else:
                data = await self._store.hget(RECORDS, name)
                found = {name: data} if data is not None else {}
        except StoreUnavailable:
            known, store = self._records, "lost"
            found = {}
        else:
            known = {key: Record.loads(data) for key, data in found.items()}
            if name is None:
                self._records = known
            elif name in known:
                self._records[name] = known[name]
            else:
                self._records.pop(name, None)
        return [known[key] for key in sorted(known) if name in (None, key)], store

    async def _probe(self, base: str) -> list[ReplicaReport]:
        return await probe(self._experts[base])

    async def add(
        self, *, name: str, base: str, path: str, replicas: int | None = None, pinned: bool = False
    ) -> dict[str, Any]:
        """Register an adapter, or a new version of it; returns its record, which is not ready yet.

        Raises `AdapterError` where its files are at fault, `InvalidRequest` where the name cannot be had (400, 409),
        `ExpertUnavailable` where registry or store cannot be reached.
        """
        return await self._ask("add", name, base, path, replicas, pinned, timeout_s=ADD_S)

    async def remove(self, name: str) -> dict[str, Any]:
        """Take an adapter out of service; returns its record. Raises `InvalidRequest` (404) where there is none."""
        return await self._ask("remove", name, timeout_s=CALL_S)

    async def wait(self, name: str, version: int | None = None, timeout_s: float = 60.0) -> dict[str, Any]:
        """The record once the version (default: the newest) is ready, failed or gone; or as it is after `timeout_s`."""
        return await self._ask("wait", name, version, timeout_s, timeout_s=timeout_s + 5)

    async def _ask(self, method: str, *arguments: Any, timeout_s: float) -> dict[str, Any]:
        if self._registry is None:
            raise ExpertUnavailable("this service has no adapter registry")
        response = self._registry.options(method_name=method).remote(*arguments)
        try:
            async with asyncio.timeout(ACCEPT_S):  # Serve holds the call back until there is a registry
                await response._fetch_future_result_async()
            async with asyncio.timeout(timeout_s):
                answer = await response
        except Exception as error:
            response.cancel()
            log.warning("the adapter registry cannot be reached: %r", error)
            raise ExpertUnavailable("the adapter registry cannot be reached; try again in a moment") from error
        if isinstance(answer, AdapterError | ExpertError):
            raise answer
        return dict(answer)

    # -- inside: reading ---------------------------------------------------------------------------------------

    async def _refresh(self) -> None:
        """Return after a read of the generation that began after this call; concurrent calls share it."""
        if self._next is None:
            self._next = asyncio.get_running_loop().create_future()
            if self._reader is None or self._reader.done():
                self._reader = asyncio.create_task(self._read_all(), name="adapters-read")
        read = asyncio.shield(self._next)
        if self.store_error is None:
            await read
            return
        # With the store lost nobody waits long for it. That is safe: the registry makes no switch before this gateway
        # has published again, and publishing clears the error.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOST_WAIT_S):
                await read

    async def _read_all(self) -> None:
        while self._next is not None:
            asked, self._next = self._next, None
            try:
                await self._read()
            except StoreUnavailable as error:
                self.store_error = str(error)
            except Exception:
                log.exception("the table of adapters cannot be read")
            finally:
                if not asked.done():
                    asked.set_result(None)

    async def _read(self) -> None:
        if not self._published:  # the store was lost at the start: nothing is read before the registry knows of us
            await self._publish()
        found = await self._store.get(GENERATION)
        self.store_error = None
        # None: a store that has lost its data, until the registry has written it again.
        generation = int(found) if found is not None else None
        if generation is None or generation == self._generation:
            return
        raw = await self._store.hgetall(TABLE)  # at least as new as the generation
        table = {}
        for name, data in raw.items():
            known = self._table.get(name)
            table[name] = known if known and self._raw.get(name) == data else ServedAdapter.loads(data)
        self._raw, self._table, self._generation = raw, table, generation
        set_holders({adapter.version: adapter.holders for adapter in table.values()})
        self._news.set()

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            await self._refresh()

    # -- inside: publishing ------------------------------------------------------------------------------------

    async def _keep_publishing(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PUBLISH_S):
                    await self._news.wait()
            self._news.clear()
            try:
                await self._publish()
            except StoreUnavailable:
                await asyncio.sleep(LOOK_S)  # the store logs its loss
            except Exception:
                log.exception("the use of adapters cannot be published")

    async def _publish(self) -> None:
        """One report: what has been seen, and what is in flight, at the same moment."""
        self._sequence += 1
        report = {"generation": self._generation, "in_flight": self._in_flight, "sequence": self._sequence}
        await self._store.hset(GATEWAYS, {self._id: orjson.dumps(report)}, ttl_s=GATEWAYS_EXPIRY_S)
        self._published, self.store_error = True, None
