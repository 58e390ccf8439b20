"""The service's own copies of adapters, in folders named by content hash.

What users registered may be changed or deleted the moment after. So it is checked where it lies (a fault is told in
terms of the user's path), copied, and the copy is checked again; replicas load the copy alone. On file systems that
can, the copy shares its blocks with the original (`copy_file_range`). Hard links would not do: who overwrites a file in
place changes the linked one as well.

The values of an ESFT adapter, gigabytes of them, are read once: in the copy. Files that have not been touched since
they were taken are not read or copied again.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import orjson

from signalbox.adapters.base import AdapterError, AdapterFacts, BaseShape, Limits
from signalbox.adapters.files import AdapterFolder
from signalbox.adapters.validate import check_outline, validate

log = logging.getLogger(__name__)

MAX_FILES = 1024
KEEP_S = 600.0  # a copy that is in no record goes no sooner: its record may be about to be written
_BLOCK = 16 << 20
_TAKEN = ".taken"  # in a copy: which files it was made of, and what was found in them
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
        """Delete copies of other hashes than these, except those of the last minutes; none while one is made."""
        if not self._lock.locked():
            async with self._lock:
                await asyncio.to_thread(self._sweep, used)

    def _take(self, base: str, path: Path) -> AdapterFacts:
        limits, shape = self._limits(base), self._shape(base)
        check_outline(path, shape, limits)
        with _Source(path, limits) as source:
            state = source.state(shape)
            if (known := self._known(state)) is not None:
                return known
            try:
                self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                copy = Path(tempfile.mkdtemp(prefix=".new-", dir=self._folder))
            except OSError as error:
                raise _no_room(error) from None
            try:
                source.copy_to(copy)
                facts = validate(copy, shape, replace(limits, roots=(copy.resolve(),)))
                facts = replace(facts, path=str(source.path))
                taken = orjson.dumps({"state": state, "facts": asdict(facts)})
                (copy / _TAKEN).write_bytes(taken)
                target = self._folder / facts.content_hash
                if target.is_dir():
                    (copy / _TAKEN).replace(target / _TAKEN)
                    os.utime(target)
                else:
                    copy.rename(target)
            except OSError as error:
                raise _no_room(error) from None
            finally:
                shutil.rmtree(copy, ignore_errors=True)
        return facts

    def _known(self, state: str) -> AdapterFacts | None:
        """What was found in these very files, where they have been taken already."""
        for file in self._folder.glob(f"*/{_TAKEN}"):
            with suppress(OSError, ValueError, KeyError, TypeError):
                taken = orjson.loads(file.read_bytes())
                if taken["state"] == state and taken["facts"]["content_hash"] == file.parent.name:
                    os.utime(file.parent)
                    return AdapterFacts(**taken["facts"] | {"modules": tuple(taken["facts"]["modules"])})
        return None

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

    def state(self, shape: BaseShape) -> str:
        """Changes when any file is written to or exchanged, and with the base that they are for.

        Who can set a file's times back makes us serve what he had registered before, and nothing else.
        """
        found: list[object] = [str(self.path), repr(shape)]
        for name in self._names():
            try:
                status = (self.path / name).stat()
            except OSError as error:
                reason = f"{name} cannot be read: {error.strerror}"
                raise AdapterError(reason, code="unreadable", tensor=name) from None
            found.append([name, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns])
        return hashlib.sha256(orjson.dumps(found)).hexdigest()

    def _names(self) -> list[str]:
        """The files that an adapter may consist of."""
        names = sorted(entry.name for entry in os.scandir(self.path) if entry.name.endswith(_SUFFIXES))
        if len(names) > MAX_FILES:
            raise AdapterError(f"the folder has more than {MAX_FILES} files", code="too_large")
        return names

    def copy_to(self, target: Path) -> None:
        """Copy its files, bounded in number and total size."""
        for name in self._names():
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
