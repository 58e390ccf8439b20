"""The adapter registry as a Serve deployment: one replica, in whose place Serve puts another when it dies.

It also registers the adapters of the configuration, and, where one is set, what lies in the watched folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import threading
from collections.abc import Awaitable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from signalbox.adapters.base import AdapterError, BaseShape
from signalbox.adapters.lifecycle import Record, describe
from signalbox.adapters.registry import Registry
from signalbox.adapters.registry_protocols import Fenced, RegistryError, StoreLost
from signalbox.adapters.storage import CopiedAdapters
from signalbox.experts.base import ExpertError, ExpertUnavailable, InvalidRequest
from signalbox.experts.catalog import LocalExpert
from signalbox.experts.models import default_cache, resolve
from signalbox.serving.adapter_fleet import ServeFleet
from signalbox.serving.adapter_records import AdapterRecords
from signalbox.serving.adapter_watch import WatchedFolder
from signalbox.serving.config import Config, adapter_limits
from signalbox.serving.store import Store, redact

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle

log = logging.getLogger(__name__)

START_PAUSE_S = 0.5  # between two attempts to take over while the store does not answer
CONFIG_PAUSE_S = 2.0

Answer = dict[str, Any] | AdapterError | ExpertError


class AdapterRegistry:
    """What gateways call. Errors are returned, not raised. `experts` are handles of those that take adapters."""

    def __init__(self, config: Config, store_url: str, experts: Mapping[str, DeploymentHandle[Any]]) -> None:
        self._config = config
        self._store = Store(store_url)
        self._records = AdapterRecords(self._store)
        self._fleet = ServeFleet(experts)
        self._registry = Registry(
            self._records,
            self._fleet,
            CopiedAdapters(
                storage_folder(config, store_url),
                shape=self._shape,
                limits=partial(adapter_limits, config),
            ),
            list(experts),
            reserved=list(config.experts),
            max_adapters=config.adapter_files.max_adapters,
        )
        self._bases = list(experts)
        self._importing = threading.Lock()
        self._started = asyncio.Event()
        self._fenced = False
        self._tasks = [asyncio.create_task(self._run(), name="adapter-registry")]
        # Serve calls this before it ends the replica. On the class, garbage collection would call it again.
        self.__del__ = self.close

    # -- what gateways call ------------------------------------------------------------------------------------

    async def add(self, name: str, base: str, path: str, replicas: int | None, pinned: bool) -> Answer:
        """Register an adapter; its record once its files are accepted."""
        return await self._answer(self._add(name, base, path, replicas, pinned))

    async def remove(self, name: str) -> Answer:
        """Take an adapter out of service; its record."""
        return await self._answer(self._remove(name))

    async def ensure(self, name: str, timeout_s: float) -> Answer:
        """Have an evicted adapter loaded again; its record once it is, or as it is after `timeout_s` seconds."""
        return await self._answer(self._ensure(name, timeout_s))

    async def wait(self, name: str, version: int | None, timeout_s: float) -> Answer:
        """The record once a version is ready, failed or gone, or as it is after `timeout_s` seconds."""
        return await self._answer(self._wait(name, version, timeout_s))

    async def info(self) -> dict[str, Any]:
        """Process id and epoch of this registry, and whether anything is under way."""
        return {"pid": os.getpid(), "epoch": self._records.epoch, "settled": self._registry.settled}

    # -- what Serve calls --------------------------------------------------------------------------------------

    def check_health(self) -> None:
        """Raise once another registry has taken over: this replica must go."""
        if self._fenced or any(task.done() for task in self._tasks):
            raise RuntimeError("this adapter registry has been superseded or has stopped")

    async def close(self) -> None:
        """Stop; what replicas are doing goes on, and a successor takes over."""
        await self._registry.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._store.close()

    # -- inside ------------------------------------------------------------------------------------------------

    async def _answer(self, work: Awaitable[dict[str, Any]]) -> Answer:
        try:
            return await work
        except (AdapterError, ExpertError) as error:
            return error
        except RegistryError as error:
            return InvalidRequest(error.message, code=error.code, status=error.status)
        except (StoreLost, Fenced) as error:
            log.warning("the registry cannot act: %r", error)
            return ExpertUnavailable("adapters cannot be changed at this moment: the store does not answer")
        except Exception:
            log.exception("the adapter registry failed on a request")
            return ExpertError("the adapter registry failed on this request")

    async def _add(self, name: str, base: str, path: str, replicas: int | None, pinned: bool) -> dict[str, Any]:
        await self._ready()
        return await self._described(await self._registry.add(name, base, path, replicas=replicas, pinned=pinned))

    async def _remove(self, name: str) -> dict[str, Any]:
        await self._ready()
        return await self._described(await self._registry.remove(name))

    async def _ensure(self, name: str, timeout_s: float) -> dict[str, Any]:
        await self._ready()
        await self._registry.ensure(name)
        await self._registry.wait(name, timeout_s=timeout_s, serving=True)
        return await self._described(self._registry.record(name), name)

    async def _wait(self, name: str, version: int | None, timeout_s: float) -> dict[str, Any]:
        await self._ready()
        await self._registry.wait(name, version, timeout_s=timeout_s)
        return await self._described(self._registry.record(name), name)

    async def _ready(self) -> None:
        if not self._started.is_set():
            try:
                async with asyncio.timeout(5.0):
                    await self._started.wait()
            except TimeoutError:
                raise ExpertUnavailable("the adapter registry is starting: the store does not answer") from None

    async def _described(self, record: Record | None, name: str = "") -> dict[str, Any]:
        if record is None:
            return {"object": "adapter", "name": name, "phase": "gone", "reason": "", "version": None, "serving": None}
        reports = await self._fleet.probe(record.base) if record.versions else []
        return describe(record, reports) | {"store": "ok"}

    async def _run(self) -> None:
        while not self._started.is_set():
            try:
                await self._registry.start()
                self._started.set()
            except StoreLost:
                await asyncio.sleep(START_PAUSE_S)
            except Fenced:  # another one took over in this very moment: try to be the newest again
                await asyncio.sleep(START_PAUSE_S)
        log.info("the adapter registry has taken over, epoch %d", self._records.epoch)
        watch = self._config.adapter_files.watch
        helpers = [
            asyncio.create_task(self._register_configured(), name="adapters-configured"),
            asyncio.create_task(asyncio.to_thread(self._warm_up), name="adapters-warm-up"),
        ]
        if watch is not None:
            watched = WatchedFolder(watch, self._registry)
            helpers.append(asyncio.create_task(watched.run(), name="adapters-watch"))
        try:
            await self._registry.run()
        except Fenced:
            self._fenced = True
            log.error("another adapter registry has taken over; this one stops")
        finally:
            for helper in helpers:
                helper.cancel()
            await asyncio.gather(*helpers, return_exceptions=True)

    async def _register_configured(self) -> None:
        """Register what the configuration names, and remove what an earlier one named and this one does not."""
        pending = dict(self._config.adapters)
        stale = [r.name for r in self._registry.records() if r.origin == "config" and r.name not in pending]
        while pending or stale:
            for name in list(stale):
                with contextlib.suppress(StoreLost):
                    with contextlib.suppress(RegistryError):
                        await self._registry.remove(name)
                    stale.remove(name)
            for name, adapter in list(pending.items()):
                try:
                    await self._registry.add(
                        name,
                        adapter.base,
                        str(adapter.path),
                        replicas=adapter.replicas,
                        pinned=adapter.pinned,
                        origin="config",
                    )
                except StoreLost:
                    continue
                except (AdapterError, RegistryError) as error:
                    log.error("the adapter %s of the configuration cannot be registered: %s", name, error.message)
                del pending[name]
            if pending or stale:
                await asyncio.sleep(CONFIG_PAUSE_S)

    def _warm_up(self) -> None:
        """Build the bases' shapes, which takes seconds (transformers is imported): not while somebody waits for it."""
        for base in self._bases:
            try:
                self._shape(base)
            except Exception as error:
                log.warning("the shape of %s cannot be built yet: %s", base, error)

    def _shape(self, base: str) -> BaseShape:
        from signalbox.adapters.base_shape import base_shape

        expert = self._config.experts[base]
        assert isinstance(expert, LocalExpert)
        with self._importing:  # transformers cannot be imported by two threads at once
            return base_shape(resolve(expert.model, weights=expert.has_weights).path)


def storage_folder(config: Config, store_url: str) -> Path:
    """Where the copies are: beside the embedded store's data, else in the user's cache, one folder for each store.

    Folders of embedded stores in memory, whose sockets are gone, are deleted.
    """
    if config.store.data_dir is not None:
        return config.store.data_dir / "adapters"
    cache = default_cache().parent / "adapters"
    digest = hashlib.sha256(redact(store_url).encode()).hexdigest()[:16]
    if config.store.url != "embedded":
        return cache / digest
    socket = store_url.removeprefix("unix://").partition("?")[0]
    folder = cache / f"run-{digest}"
    with contextlib.suppress(OSError):
        _sweep_runs(cache)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        (folder / ".store").write_text(socket)
    return folder


def _sweep_runs(cache: Path) -> None:
    import shutil

    for run in cache.glob("run-*"):
        marker = run / ".store"
        if marker.is_file() and not os.path.exists(marker.read_text()):  # noqa: PTH110 the text may be no path
            shutil.rmtree(run, ignore_errors=True)


def deploy_registry(config: Config, store_url: str, experts: Mapping[str, Any]) -> Application:
    """The Serve application node of the registry. `experts` are the experts' nodes by name."""
    from ray import serve

    bases = {
        name: node
        for name, node in experts.items()
        if isinstance(expert := config.experts[name], LocalExpert) and expert.max_adapters
    }
    deployment = serve.deployment(
        name="adapter-registry",
        num_replicas=1,
        ray_actor_options={"num_cpus": 0.01},
        max_ongoing_requests=512,
        max_queued_requests=512,
        health_check_period_s=1.0,
        health_check_timeout_s=10.0,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=2.0,
    )
    return deployment(AdapterRegistry).bind(config, store_url, bases)
