"""The service's own copies of adapters, in folders named by content hash.

What users registered may be changed or deleted the moment after. So it is checked where it lies (a fault is told in
terms of the user's path), copied, and the copy is checked again; replicas load the copy alone. On file systems that
can, the copy shares its blocks with the original (`copy_file_range`). Hard links would not do: who overwrites a file in
place changes the linked one as well.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from signalbox.adapters.base import AdapterError, AdapterFacts, BaseShape, Limits
from signalbox.adapters.files import AdapterFolder
from signalbox.adapters.validate import validate

log = logging.getLogger(__name__)

MAX_FILES = 1024
KEEP_S = 600.0  # a copy that is in no record goes no sooner: its record may be about to be written
_BLOCK = 16 << 20
_SUFFIXES = (".safetensors", ".json")


class CopiedAdapters:
    """An `AdapterStorage` in a folder that only we write to. `shape` and `limits` are asked by the base's name.

    One adapter is copied at a time. Blocking work runs in threads.
    """

    def __init__(self, folder: Path, *, shape: Callable[[str], BaseShape], limits: Callable[[str], Limits]) -> None:
        self._folder = folder
        self._shape, self._limits = shape, limits
        self._lock = asyncio.Lock()

    async def take(self, base: str, path: str) -> AdapterFacts:
        """Check an adapter, copy it, check the copy. Raises `AdapterError`, also where there is no room for it."""
        async with self._lock:
            return await asyncio.to_thread(self._take, base, Path(path))

    def folder(self, content_hash: str) -> str:
        """The folder of the copy with this hash."""
        return str(self._folder / content_hash)

    async def sweep(self, used: set[str]) -> None:
        """Delete copies of other hashes than these, except those of the last minutes."""
        await asyncio.to_thread(self._sweep, used)

    def _take(self, base: str, path: Path) -> AdapterFacts:
        limits, shape = self._limits(base), self._shape(base)
        found = validate(path, shape, limits)
        target = self._folder / found.content_hash
        if target.is_dir():
            os.utime(target)
            return found
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            copy = Path(tempfile.mkdtemp(prefix=".new-", dir=self._folder))
        except OSError as error:
            raise _no_room(error) from None
        try:
            with _Source(path, limits) as source:
                source.copy_to(copy)
            ours = replace(limits, roots=(copy.resolve(),))
            facts = validate(copy, shape, ours)
            target = self._folder / facts.content_hash
            if target.is_dir():
                os.utime(target)
            else:
                copy.rename(target)
        except OSError as error:
            raise _no_room(error) from None
        finally:
            shutil.rmtree(copy, ignore_errors=True)
        return replace(facts, path=found.path)

    def _sweep(self, used: set[str]) -> None:
        try:
            entries = list(os.scandir(self._folder))
        except OSError:
            return
        for entry in entries:
            try:
                if entry.name not in used and time.time() - entry.stat().st_mtime > KEEP_S:
                    log.info("the copy of adapter %s is not used any more", entry.name[:16])
                    shutil.rmtree(entry.path)
            except OSError as error:
                log.warning("the copy %s cannot be deleted: %s", entry.path, error.strerror)


class _Source(AdapterFolder):
    """An adapter's folder that can be copied, each file through the descriptor that was checked."""

    def copy_to(self, target: Path) -> None:
        """Copy the files that an adapter may consist of; bounded in number and total size."""
        names = sorted(entry.name for entry in os.scandir(self.path) if entry.name.endswith(_SUFFIXES))
        if len(names) > MAX_FILES:
            raise AdapterError(f"the folder has more than {MAX_FILES} files", code="too_large")
        for name in names:
            descriptor, size = self._open(name)
            with (target / name).open("xb") as file:
                _copy(descriptor, file.fileno(), size)
            os.close(descriptor)
            self._descriptors.remove(descriptor)


def _copy(source: int, target: int, size: int) -> None:
    done = 0
    while done < size:
        try:
            count = os.copy_file_range(source, target, size - done, done, done)
        except OSError:  # not between these two file systems
            block = os.pread(source, min(_BLOCK, size - done), done)
            count = os.pwrite(target, block, done)
        if not count:
            raise AdapterError("a file of the adapter became shorter while it was read", code="truncated")
        done += count


def _no_room(error: OSError) -> AdapterError:
    return AdapterError(f"the adapter cannot be copied: {error.strerror or error}", code="not_copied")
