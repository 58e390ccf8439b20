"""The worker's end of the staging process: pinned memory that files are read into while steps are computed."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from signalbox.adapters.base import AdapterError
from signalbox.adapters.esft_format import EsftAdapter, Part
from signalbox.experts.expertweave import stage

PLACES = 16  # experts that are read or copied at once
STALL_S = 60.0  # a staging process that brings none of these for so long is given up, seconds


class StagingLost(RuntimeError):
    """The staging process has ended or hangs. The next load gets another one: the adapter is not to blame."""


@dataclass(slots=True)
class Staged:
    """An expert whose weights are in a place of the pinned memory; `release` the place once they are copied."""

    layer: int
    expert: int
    parts: dict[str, Tensor]
    digest: bytes
    release: Callable[[], None]


@dataclass(slots=True)
class _Job:
    layer: int
    expert: int
    parts: dict[str, Part]
    feed: FolderFeed


class Stager:
    """One for all loads of a worker. Nothing here waits: not for files, nor for the device."""

    def __init__(self, place_bytes: int, *, pinned: bool) -> None:
        self._place_bytes = -(-place_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        size = PLACES * self._place_bytes
        descriptor = os.memfd_create("signalbox-staging", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, size)
        self._memory = torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)
        self._pinned = pinned
        if pinned:
            code = int(torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), size, 0))
            if code:
                raise RuntimeError(f"{size >> 20} MiB for staging adapters cannot be pinned: CUDA error {code}")
        # Its own file, run by its path: it must import nothing of ours, and start at once.
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(Path(stage.__file__)), str(descriptor), str(size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(descriptor,),
        )
        os.close(descriptor)
        assert self._process.stdin is not None and self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._free = list(range(PLACES))
        self._waiting: list[_Job] = []
        self._running: dict[int, tuple[_Job, int]] = {}
        self._count = 0
        self._unread = b""
        self._heard = time.monotonic()  # when it answered last, or was asked with nothing to do
        self._lost = False

    def submit(self, jobs: list[_Job]) -> None:
        """Read these experts when there is room."""
        self._waiting += jobs
        self._start()

    def drop(self, feed: FolderFeed) -> None:
        """Read no more of a feed; what is under way is thrown away when it comes."""
        self._waiting = [job for job in self._waiting if job.feed is not feed]

    def collect(self) -> None:
        """Hand what has been read to its feeds."""
        assert self._process.stdout is not None
        ended = False
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._process.stdout.fileno(), 65536):
                self._unread += data
            ended = True
        *lines, self._unread = self._unread.split(b"\n")
        if lines or not self._running:
            self._heard = time.monotonic()
        for line in lines:
            number, digest, error = json.loads(line)
            job, place = self._running.pop(number)
            if error is not None or job.feed.closed:
                self._release(place)
                if error is not None:
                    job.feed.error = AdapterError(f"the adapter cannot be read: {error}", code="unreadable")
                continue
            job.feed.arrived.append(self._staged(job, place, bytes.fromhex(digest)))
        if ended or (self._running and time.monotonic() - self._heard > STALL_S):
            self._fail()
        self._start()

    @property
    def alive(self) -> bool:
        """Whether its process runs, and answers."""
        return not self._lost and self._process.poll() is None

    def close(self) -> None:
        """End the process; nothing may be copied from its memory any more."""
        self._process.kill()
        if not self._lost:  # one that hangs in a read may not end before that does
            self._process.wait()
        if self._pinned:
            torch.cuda.synchronize()  # copies of another load may be under way
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())

    # -- inside --------------------------------------------------------------------------------------------

    def _start(self) -> None:
        assert self._process.stdin is not None
        lines = []
        if not self._running:
            self._heard = time.monotonic()
        while self._free and self._waiting:
            job, place = self._waiting.pop(0), self._free.pop()
            self._count += 1
            self._running[self._count] = (job, place)
            parts = [[path, start, size] for path, start, size, _, _ in job.parts.values()]
            lines.append(json.dumps([self._count, place * self._place_bytes, parts]) + "\n")
        if lines:
            try:
                self._process.stdin.write("".join(lines).encode())
                self._process.stdin.flush()
            except OSError:
                self._fail()

    def _staged(self, job: _Job, place: int, digest: bytes) -> Staged:
        parts, at = {}, place * self._place_bytes
        for name, (_, _, size, dtype, shape) in job.parts.items():
            parts[name] = self._memory[at : at + size].view(dtype).view(shape)
            at += -(-size // stage.ALIGNMENT) * stage.ALIGNMENT
        return Staged(job.layer, job.expert, parts, digest, lambda: self._release(place))

    def _release(self, place: int) -> None:
        self._free.append(place)

    def _fail(self) -> None:
        self._lost = True
        self._process.kill()
        for job in [*self._waiting, *(job for job, _ in self._running.values())]:
            job.feed.error = StagingLost("the process that reads adapters ended or hangs; the load can be tried again")
        self._waiting, self._running = [], {}


@dataclass(eq=False)
class FolderFeed:
    """The experts of an adapter's folder, as the stager brings them."""

    adapter: EsftAdapter
    stager: Stager
    arrived: list[Staged] = field(default_factory=list)
    error: Exception | None = None
    closed: bool = False

    def __post_init__(self) -> None:
        self.experts: dict[int, tuple[int, ...]] = self.adapter.experts

    def start(self, wanted: list[tuple[int, int]]) -> None:
        """Have these (layer, expert) read."""
        self.stager.submit([_Job(layer, expert, self.adapter.parts(layer, expert), self) for layer, expert in wanted])

    def ready(self) -> Iterator[Staged]:
        """What has arrived since the last call. Raises what reading ended with."""
        self.stager.collect()
        if self.error is not None:
            raise self.error
        while self.arrived:
            yield self.arrived.pop()

    def close(self) -> None:
        """Read no more, and free what has arrived and was not taken."""
        if not self.closed:
            self.closed = True
            self.stager.drop(self)
            for staged in self.arrived:
                staged.release()
            self.arrived = []
            self.adapter.close()
