"""The virtual weight tensor: rows reserved as addresses once, with memory behind those rows that are in use.

A layer's expert weights are one tensor [M + N * E_max, ...]: M rows of the base, the rest for adapters' experts. Its
addresses never change, so CUDA graphs captured before a load stay valid after it, and stock kernels run on it as on
any tensor. Rows are no multiples of pages: a page belongs to all rows on it and is mapped while one of them is.
Source: ExpertWeave (arXiv 2508.17624), section 4.1. Where virtual memory is missing, `PaddedTensor` has the same
interface over a plain allocation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from signalbox.kernels.pages import DriverError, OutOfPages, PagePool, pages_of_rows, runs_of

__all__ = [
    "DriverError",
    "OutOfPages",
    "PaddedTensor",
    "PagePool",
    "RowTensor",
    "VirtualTensor",
    "open_pool",
    "row_tensor",
    "row_tensors",
]

ALIGNMENT = 256  # bytes at which each part of a row begins: as torch's own allocations do on a GPU

# What `__cuda_array_interface__` calls an element of so many bytes; bf16 and fp8 have no name there.
_INTEGERS = {1: "|u1", 2: "<i2", 4: "<i4", 8: "<i8"}


class RowTensor(Protocol):
    """A tensor whose rows (of dimension 0) come and go while its address stays. One thread at a time changes it."""

    tensor: Tensor
    row_bytes: int

    @property
    def mapped_rows(self) -> frozenset[int]:
        """Rows that may be read and written; what is in a row just mapped is undefined."""

    @property
    def mapped_bytes(self) -> int:
        """Bytes of device memory taken."""

    @property
    def rows_bytes(self) -> int:
        """Bytes of the rows mapped; the rest of `mapped_bytes` is waste."""

    def pages_missing(self, rows: Iterable[int]) -> int:
        """Pages that `map_rows(rows)` would take from the pool."""

    def map_rows(self, rows: Iterable[int]) -> None:
        """Put memory behind rows, all or none. Raises `OutOfPages`; ValueError for a row mapped or out of range."""

    def unmap_rows(self, rows: Iterable[int]) -> None:
        """Take rows away that no kernel uses, running or to come. Raises ValueError for one not mapped, first."""

    def close(self) -> None:
        """Give all memory back; `tensor` and its views must not be used after it."""


class _Rows:
    """What both kinds share: the shape, and which rows are mapped."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.shape, self.dtype = tuple(shape), dtype
        self.row_bytes = math.prod(self.shape[1:]) * dtype.itemsize
        if not self.shape or self.shape[0] < 1 or self.row_bytes < 1:
            raise ValueError(f"a row tensor of shape {list(self.shape)}: every dimension must be at least 1")
        self._mapped: set[int] = set()

    @property
    def mapped_rows(self) -> frozenset[int]:
        return frozenset(self._mapped)

    @property
    def rows_bytes(self) -> int:
        return len(self._mapped) * self.row_bytes

    def _absent(self, rows: Iterable[int]) -> list[int]:
        """The rows, if all of them can be mapped."""
        wanted = self._distinct(rows)
        if outside := [row for row in wanted if not 0 <= row < self.shape[0]]:
            raise ValueError(f"row {outside[0]} is outside of the tensor's {self.shape[0]} rows")
        if again := self._mapped.intersection(wanted):
            raise ValueError(f"row {min(again)} is mapped already")
        return wanted

    def _present(self, rows: Iterable[int]) -> list[int]:
        """The rows, if all of them can be unmapped."""
        wanted = self._distinct(rows)
        if missing := set(wanted) - self._mapped:
            raise ValueError(f"row {min(missing)} is not mapped")
        return wanted

    @staticmethod
    def _distinct(rows: Iterable[int]) -> list[int]:
        wanted = [int(row) for row in rows]
        if len(set(wanted)) < len(wanted):
            raise ValueError("a row is named twice")
        return wanted


class VirtualTensor(_Rows):
    """A `RowTensor` over CUDA virtual memory, on the pool's device.

    Mapping is safe while kernels use other rows: a page under a live row is never touched. A kernel that reads an
    unmapped row faults, and the process's CUDA context with it.
    """

    def __init__(self, pool: PagePool, shape: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__(shape, dtype)
        self._pool, self._memory, self._page = pool, pool.memory, pool.page_bytes
        pages = -(-self.shape[0] * self.row_bytes // self._page)
        self._holders = np.zeros(pages, np.int64)  # mapped rows on each page
        self._handles: dict[int, int] = {}  # mapped page -> its physical page
        self._address = self._memory.reserve(pages * self._page)
        try:
            self.tensor = self._whole()
        except BaseException:
            self._memory.free(self._address, pages * self._page)
            raise
        self._closed = False

    def _whole(self) -> Tensor:
        # torch asks the driver whose an address is; without memory behind it the answer need not be this device.
        self._map(np.zeros(1, np.int64))
        try:
            return _tensor_at(self._address, self.shape, self.dtype, torch.device("cuda", self._pool.device))
        finally:
            self._unmap(np.zeros(1, np.int64))

    @property
    def mapped_bytes(self) -> int:
        """Bytes of the pages mapped."""
        return len(self._handles) * self._page

    def pages_missing(self, rows: Iterable[int]) -> int:
        """Pages that `map_rows(rows)` would take from the pool."""
        return len(self._unbacked(pages_of_rows(rows, self.row_bytes, self._page)))

    def map_rows(self, rows: Iterable[int]) -> None:
        """As `RowTensor.map_rows`; also raises `DriverError`, then too with nothing mapped."""
        wanted = self._absent(rows)
        self._map(self._unbacked(pages_of_rows(wanted, self.row_bytes, self._page)))
        self._count(wanted, 1)
        self._mapped.update(wanted)

    def unmap_rows(self, rows: Iterable[int]) -> None:
        """As `RowTensor.unmap_rows`; pages go back to the pool when the last row on them goes."""
        wanted = self._present(rows)
        self._mapped.difference_update(wanted)
        self._count(wanted, -1)
        pages = pages_of_rows(wanted, self.row_bytes, self._page)
        self._unmap(pages[self._holders[pages] == 0])

    def close(self) -> None:
        """As `RowTensor.close`; the range of addresses goes back too. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self.unmap_rows(self._mapped.copy())
        self._memory.free(self._address, len(self._holders) * self._page)

    def _count(self, rows: list[int], change: int) -> None:
        for row in rows:
            start = row * self.row_bytes
            self._holders[start // self._page : (start + self.row_bytes - 1) // self._page + 1] += change

    def _unbacked(self, pages: np.ndarray) -> np.ndarray:
        return np.asarray([page for page in pages.tolist() if page not in self._handles], np.int64)

    def _map(self, pages: np.ndarray) -> None:
        """Map pages that are not mapped; all or none."""
        handles = self._pool.take(len(pages))
        done = 0
        try:
            for first, count in runs_of(pages):
                self._memory.map(self._address + first * self._page, handles[done : done + count])
                self._handles.update(zip(range(first, first + count), handles[done : done + count], strict=True))
                done += count
        except BaseException:
            self._unmap(pages[:done])
            self._pool.give_back(handles[done:])
            raise

    def _unmap(self, pages: np.ndarray) -> None:
        """Unmap pages. What a failing driver leaves mapped stays accounted for."""
        for first, count in runs_of(pages):
            self._memory.unmap(self._address + first * self._page, count)
            self._pool.give_back([self._handles.pop(page) for page in range(first, first + count)])


class _Addresses:
    """Device memory as `__cuda_array_interface__` describes it."""

    def __init__(self, address: int, shape: tuple[int, ...], element: str) -> None:
        self.__cuda_array_interface__ = {"shape": shape, "typestr": element, "data": (address, False), "version": 3}


def _tensor_at(address: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor over a range of addresses, which it does not own, without a copy."""
    element = _INTEGERS.get(dtype.itemsize)
    if element is None:
        raise ValueError(f"{dtype} has {dtype.itemsize} bytes; a virtual tensor needs 1, 2, 4 or 8")
    tensor = torch.as_tensor(_Addresses(address, shape, element), device=device)
    if tensor.data_ptr() != address:
        raise RuntimeError(f"torch copied the range at {address:#x} to {tensor.device} and did not take it as it is")
    return tensor.view(dtype)


class PaddedTensor(_Rows):
    """A `RowTensor` over a plain allocation of all rows: for the CPU and devices without virtual memory.

    The system gives a large allocation's memory when it is first written, so on a CPU unused rows cost little.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__(shape, dtype)
        self.tensor = torch.empty(self.shape, dtype=dtype, device=device)

    @property
    def mapped_bytes(self) -> int:
        """Bytes of all rows."""
        return self.tensor.numel() * self.tensor.element_size()

    def pages_missing(self, rows: Iterable[int]) -> int:
        """0: the memory is there already."""
        return 0

    def map_rows(self, rows: Iterable[int]) -> None:
        """As `RowTensor.map_rows`; memory never runs out."""
        self._mapped.update(self._absent(rows))

    def unmap_rows(self, rows: Iterable[int]) -> None:
        """As `RowTensor.unmap_rows`."""
        self._mapped.difference_update(self._present(rows))

    def close(self) -> None:
        """Drop the allocation; views of `tensor` made before keep it alive."""
        self._mapped.clear()
        self.tensor = torch.empty(0, dtype=self.dtype, device=self.tensor.device)


def open_pool(device: torch.device | str, limit_bytes: int | None) -> PagePool | None:
    """A pool on a CUDA device; None where there is no virtual memory (CPU, ROCm, a driver without it)."""
    device = torch.device(device)
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    torch.cuda.init()
    pool = PagePool(torch.cuda.current_device() if device.index is None else device.index, limit_bytes)
    return pool if pool.memory.supported() else None


def row_tensor(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device | str, pool: PagePool | None
) -> RowTensor:
    """A virtual tensor from the pool's pages, or without a pool a padded one; no row is mapped yet.

    Raises ValueError for an empty shape, and where the pool is on another device.
    """
    if pool is None:
        return PaddedTensor(shape, dtype, device)
    device = torch.device(device)
    if device.type != "cuda" or device.index not in (None, pool.device):
        raise ValueError(f"the pool's pages are on cuda:{pool.device} and the tensor is wanted on {device}")
    return VirtualTensor(pool, shape, dtype)


def row_tensors(
    rows: int,
    parts: Sequence[tuple[Sequence[int], torch.dtype]],
    device: torch.device | str,
    pool: PagePool | None,
) -> tuple[RowTensor, list[Tensor]]:
    """Several tensors whose rows come and go together, side by side: row r of each is in row r of one `RowTensor`.

    parts: (shape of a row, dtype) of each. Returns the rows, and a view [rows, *shape] for each part, contiguous but
    for dimension 0. A load then wastes the rest of one page, not of one for each part, and makes one call.
    """
    starts, width = [], 0
    for shape, dtype in parts:
        starts.append(width)
        width += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    held = row_tensor((rows, width), torch.uint8, device, pool)
    views = [
        held.tensor[:, start : start + math.prod(shape) * dtype.itemsize].view(dtype).unflatten(1, tuple(shape))
        for start, (shape, dtype) in zip(starts, parts, strict=True)
    ]
    return held, views
