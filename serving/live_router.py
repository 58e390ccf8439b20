"""Live artifacts: a router's new version takes over while requests are served.

The artifact's folder, or the one that a symbolic link leads to, is looked at once a second. What is new is loaded and
warmed up in a thread of its own, beside the router that serves, and put in place between two of its batches. What is
damaged or does not fit the pool is refused with a log line, and the old one serves on.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from signalbox.router.artifact import DESCRIPTION, TENSORS, ArtifactError
from signalbox.router.online import OnlineRouter
from signalbox.serving.routing import Routing, artifact_version, load_artifact

log = logging.getLogger(__name__)

PERIOD_S = 1.0

Signature = tuple[tuple[int, int, int], ...]


class ArtifactWatch:
    """Watches one artifact for one `Routing`; `start` it after that."""

    def __init__(self, routing: Routing, path: Path, kind: str | None, *, period_s: float = PERIOD_S) -> None:
        self._routing = routing
        self._path = path
        self._kind = kind
        self._period_s = period_s
        self._seen: Signature | None = None  # of the files that were looked into last, taken or refused
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="router-load")
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to watch."""
        self._task = asyncio.create_task(self._watch(), name="artifact-watch")

    async def close(self) -> None:
        """Stop watching."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._worker.shutdown(wait=False, cancel_futures=True)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._period_s)
            if self._routing.ready:
                try:
                    await self.look()
                except Exception:
                    log.exception("the artifact %s could not be looked at", self._path)

    async def look(self) -> bool:
        """Take a new version, if there is one that can be used; says whether it was."""
        loop = asyncio.get_running_loop()
        signature = await loop.run_in_executor(self._worker, _signature, self._path)
        if signature is None or signature == self._seen:
            return False
        old = self._routing.online
        try:
            if (
                old is not None
                and await loop.run_in_executor(self._worker, artifact_version, self._path) == old.version
            ):
                self._seen = signature
                return False
            new = await loop.run_in_executor(self._worker, load_artifact, self._path, self._kind)
            self._check_pool(old, new)
        except Exception as error:
            self._seen = signature  # tried again as soon as a file changes: it may be only half written
            self._routing.refused = f"{type(error).__name__}: {error}"
            log.error("the new router in %s is refused, the old one serves on: %s", self._path, error)
            return False
        self._seen = signature
        self._routing.swap(new)
        log.info("router version %s takes over from %s", new.version, old.version if old else "none")
        return True

    def _check_pool(self, old: OnlineRouter | None, new: OnlineRouter) -> None:
        """Raises `ArtifactError` where an expert of the pool would not be chosen any more."""
        lost = [name for name in self._routing.experts if old and name in old.experts and name not in new.experts]
        if lost:
            raise ArtifactError(
                f"it does not know {', '.join(lost)} of the pool: train it with them, or take them out of the pool"
            )


def _signature(path: Path) -> Signature | None:
    """What changes with the files behind a path; None while they are not there."""
    try:
        stats = [(path / name).stat() for name in (DESCRIPTION, TENSORS)]
    except OSError:
        return None
    return tuple((s.st_dev, s.st_ino, s.st_mtime_ns) for s in stats)
