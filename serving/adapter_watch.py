"""A watched folder: what is put there is registered, what is taken away is removed.

An adapter is the folder `BASE/NAME` below it. It counts once its files have stayed the same between two looks, so that
one that is being copied there is not read half.
"""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

from signalbox.adapters.base import AdapterError
from signalbox.adapters.registry import Registry
from signalbox.adapters.registry_protocols import RegistryError, StoreLost

log = logging.getLogger(__name__)

LOOK_S = 2.0
MAX_FOLDERS = 4096
MAX_FILES = 1024

Signature = tuple[tuple[str, int, int], ...]


class WatchedFolder:
    """Looks at `BASE/NAME` below a folder and tells the registry. Only what came from here is removed from here."""

    def __init__(self, folder: Path, registry: Registry) -> None:
        self._folder = folder
        self._registry = registry
        self._before: dict[tuple[str, str], Signature] = {}
        self._done: dict[tuple[str, str], Signature] = {}

    async def run(self) -> None:
        """Look again and again."""
        while True:
            try:
                await self.look()
            except StoreLost:
                pass
            except Exception:
                log.exception("the watched folder %s cannot be read", self._folder)
            await asyncio.sleep(LOOK_S)

    async def look(self) -> None:
        """Look once. Raises `StoreLost`."""
        found = await asyncio.to_thread(self._scan)
        if found is None:  # gone as a whole, as when its disk is not mounted: no reason to remove anything
            return
        for key, signature in found.items():
            if self._before.get(key) == signature and self._done.get(key) != signature:
                await self._register(*key)
                self._done[key] = signature
        self._before = found
        self._done = {key: signature for key, signature in self._done.items() if key in found}
        for record in self._registry.records():
            if record.origin == "watch" and not record.removed and (record.base, record.name) not in found:
                await self._registry.remove(record.name)

    async def _register(self, base: str, name: str) -> None:
        try:
            await self._registry.add(name, base, str(self._folder / base / name), origin="watch")
        except (AdapterError, RegistryError) as error:
            log.error("the adapter %s/%s in the watched folder is not registered: %s", base, name, error.message)

    def _scan(self) -> dict[tuple[str, str], Signature] | None:
        found: dict[tuple[str, str], Signature] = {}
        try:
            bases = [entry for entry in os.scandir(self._folder) if entry.is_dir() and not entry.name.startswith(".")]
        except OSError:
            return None
        for base in bases:
            for entry in os.scandir(base.path):
                if entry.is_dir() and not entry.name.startswith(".") and len(found) < MAX_FOLDERS:
                    found[base.name, entry.name] = _signature(entry.path)
        return found


def _signature(folder: str) -> Signature:
    """Name, size and time of change of each file."""
    said = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name)[:MAX_FILES]:
        try:
            status = entry.stat()
        except OSError:
            continue
        said.append((entry.name, status.st_size, status.st_mtime_ns))
    return tuple(said)
