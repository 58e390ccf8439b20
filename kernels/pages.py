"""Physical memory of one CUDA device in pages, and which pages the rows of a tensor lie on.

A page has the size of the driver's allocation granularity, 2 MiB on Hopper. Source: ExpertWeave (arXiv 2508.17624),
section 4.1, there for Ascend devices; here the CUDA driver's virtual memory management through `cuda.bindings.driver`.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


class DriverError(RuntimeError):
    """A call of the CUDA driver failed; the message names the call and its CUresult."""


class OutOfPages(MemoryError):
    """No page is left: the pool's limit is reached, or the device is out of memory."""


def pages_of_rows(rows: Iterable[int], row_bytes: int, page_bytes: int) -> np.ndarray:
    """The pages that rows of `row_bytes` bytes lie on, int64, ascending, each once; row 0 starts where page 0 does."""
    index = np.fromiter(rows, np.int64)
    if not index.size or not row_bytes:
        return np.empty(0, np.int64)
    first = index * row_bytes // page_bytes
    last = ((index + 1) * row_bytes - 1) // page_bytes
    steps = np.arange(int((last - first).max()) + 1)
    pages = first[:, None] + steps
    return np.unique(pages[pages <= last[:, None]])


def runs_of(pages: Sequence[int] | np.ndarray) -> list[tuple[int, int]]:
    """Ascending pages as runs without a gap: (first page, number of pages)."""
    array = np.asarray(pages, np.int64)
    if not array.size:
        return []
    starts = np.flatnonzero(np.diff(array, prepend=array[0] - 2) != 1)
    counts = np.diff(starts, append=array.size)
    return list(zip(array[starts].tolist(), counts.tolist(), strict=True))


class CudaMemory:
    """The driver's calls for virtual memory on one device. Addresses and sizes are multiples of `granularity` bytes.

    All methods raise `DriverError`, and `OutOfPages` where the driver reports that memory is out. `driver` is
    the module `cuda.bindings.driver` or one with its functions; None: imported here.
    """

    def __init__(self, device: int, driver: Any = None) -> None:
        self.device = device
        self._driver = driver = driver or _import_driver()
        self._call("cuInit", 0)
        self._place = place = driver.CUmemAllocationProp()
        place.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        place.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        place.location.id = device
        self._access = access = driver.CUmemAccessDesc()
        access.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        access.location.id = device
        access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        minimum = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        self.granularity = int(self._call("cuMemGetAllocationGranularity", place, minimum))

    def supported(self) -> bool:
        """Whether this device has virtual memory management at all."""
        attribute = self._driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
        return bool(self._call("cuDeviceGetAttribute", attribute, self._call("cuDeviceGet", self.device)))

    def create(self) -> int:
        """One page of physical memory, not mapped anywhere; returns its handle."""
        return int(self._call("cuMemCreate", self.granularity, self._place, 0))

    def release(self, page: int) -> None:
        """Give a page, which is mapped nowhere, back to the device."""
        self._call("cuMemRelease", page)

    def reserve(self, nbytes: int) -> int:
        """A range of addresses with nothing behind it; returns its start."""
        return int(self._call("cuMemAddressReserve", nbytes, self.granularity, 0, 0))

    def free(self, address: int, nbytes: int) -> None:
        """Give a range back, in which nothing is mapped any more."""
        self._call("cuMemAddressFree", address, nbytes)

    def map(self, address: int, pages: Sequence[int]) -> None:
        """Put pages behind the addresses from `address` on, and open them to this device; all of them or none."""
        size, done = self.granularity, 0
        try:
            for page in pages:
                self._call("cuMemMap", address + done * size, size, 0, page, 0)
                done += 1
            # The dearest of the three calls costs by the call, so once for all pages.
            self._call("cuMemSetAccess", address, done * size, [self._access], 1)
        except BaseException:
            if done:
                self.unmap(address, done)
            raise

    def unmap(self, address: int, count: int) -> None:
        """Take `count` pages, all mapped, from behind the addresses from `address` on."""
        self._call("cuMemUnmap", address, count * self.granularity)

    def _call(self, name: str, *arguments: Any) -> Any:
        code, *values = getattr(self._driver, name)(*arguments)
        if code == self._driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise OutOfPages(f"{name}: device {self.device} is out of memory; unload an adapter or lower the limits")
        if code != self._driver.CUresult.CUDA_SUCCESS:
            raise DriverError(f"{name} on device {self.device} failed: {getattr(code, 'name', code)}")
        return values[0] if values else None


def _import_driver() -> Any:
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise RuntimeError("CUDA virtual memory needs the package cuda-bindings: pip install cuda-bindings") from error


class PagePool:
    """The pages of one device that virtual tensors share. Safe to use from several threads.

    limit_bytes: most bytes ever created, in use and free together, rounded down to pages; None: what the device has.
    Pages given back are kept for the next load, which then only maps; `trim` returns them to the device.
    """

    def __init__(self, device: int, limit_bytes: int | None, *, driver: Any = None) -> None:
        if limit_bytes is not None and limit_bytes < 0:
            raise ValueError(f"a limit of {limit_bytes} bytes: give at least 0, or None for no limit")
        self.memory = CudaMemory(device, driver)
        self.device = device
        self.page_bytes = self.memory.granularity
        self.limit = None if limit_bytes is None else limit_bytes // self.page_bytes
        self._free: list[int] = []
        self._used: set[int] = set()
        self._lock = threading.Lock()

    @property
    def pages_in_use(self) -> int:
        """Pages taken and not given back."""
        return len(self._used)

    @property
    def pages_free(self) -> int:
        """Pages created and kept for the next load."""
        return len(self._free)

    @property
    def pages_left(self) -> int | None:
        """Pages that `take` would still give under the limit; None where there is no limit."""
        return None if self.limit is None else self.limit - len(self._used)

    def pages_of(self, nbytes: int) -> int:
        """Pages that hold so many bytes."""
        return -(-nbytes // self.page_bytes)

    def take(self, n: int) -> list[int]:
        """Handles of n pages, all or none. Raises `OutOfPages`, with nothing kept of what was created for it."""
        with self._lock:
            self._create(n - len(self._free))
            split = len(self._free) - n
            taken, self._free = self._free[split:], self._free[:split]
            self._used.update(taken)
            return taken

    def give_back(self, pages: Iterable[int]) -> None:
        """Return pages that are mapped nowhere any more. Raises ValueError for one that was not taken."""
        with self._lock:
            returned = list(pages)
            if len(set(returned)) < len(returned) or not self._used.issuperset(returned):
                raise ValueError("a page is given back that was not taken, or twice")
            self._used.difference_update(returned)
            self._free += returned

    def reserve(self, n: int) -> None:
        """Create ahead until n pages are free. Raises `OutOfPages`, with nothing created."""
        with self._lock:
            self._create(n - len(self._free))

    def trim(self, keep: int = 0) -> int:
        """Return free pages beyond `keep` to the device; returns how many."""
        with self._lock:
            return self._release(len(self._free) - keep)

    def close(self) -> None:
        """Return all pages to the device. Raises RuntimeError while tensors hold some."""
        if self._used:
            raise RuntimeError(f"{len(self._used)} pages are still in use: close the virtual tensors before their pool")
        self.trim()

    def _create(self, n: int) -> None:
        if n <= 0:
            return
        existing = len(self._used) + len(self._free)
        if self.limit is not None and existing + n > self.limit:
            raise OutOfPages(
                f"{n} more pages of {self.page_bytes} bytes are needed; {existing} of at most {self.limit} exist, "
                f"{len(self._free)} of them free: unload an adapter or raise the pool's limit"
            )
        before = len(self._free)
        try:
            while len(self._free) < before + n:
                self._free.append(self.memory.create())
        except BaseException:
            self._release(len(self._free) - before)
            raise

    def _release(self, n: int) -> int:
        for _ in range(n):
            self.memory.release(self._free.pop())
        return max(0, n)
