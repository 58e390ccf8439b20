"""A FAKE of `cuda.bindings.driver`, for machines without a GPU: host memory behaves as the driver's manual says.

Addresses are really reserved (without any access), pages are pieces of one file in memory, and mapping puts a piece
at an address: what is written through one address is seen by all who look there, and touching an unmapped address
kills the process. Each rule of the manual that the real driver leaves undefined or answers with an error raises
AssertionError here, so that no test can pass by breaking one. Errors to be injected: `memory` pages and no more, and
`failures`: (function, number of calls that still succeed).
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections import Counter
from enum import Enum
from types import SimpleNamespace
from typing import Any

import torch

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_FIXED, _NONE = 0x10, 0


class CUresult(Enum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2


OK = (CUresult.CUDA_SUCCESS,)


def host_tensor(address: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What `virtual_tensor._tensor_at` is on a GPU, for the fake's addresses."""
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    return torch.frombuffer((ctypes.c_byte * nbytes).from_address(address), dtype=dtype).view(shape)


class FakeDriver:
    """The functions and names of the module that `signalbox.kernels.pages` uses; the granularity is the host's page."""

    CUresult = CUresult
    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED="pinned")
    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE="device")
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE="read and write")
    CUmemAllocationGranularity_flags = SimpleNamespace(CU_MEM_ALLOC_GRANULARITY_MINIMUM="minimum")
    CUdevice_attribute = SimpleNamespace(CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED="virtual memory")
    page = mmap.PAGESIZE

    def __init__(self, memory: int | None = None) -> None:
        self.memory = memory
        self.failures: dict[str, int] = {}
        self.calls: Counter[str] = Counter()
        self.handles: set[int] = set()  # created and not released
        self.ranges: dict[int, int] = {}  # reserved: address -> bytes
        self.mapped: dict[int, int] = {}  # address of a page -> handle
        self.accessible: set[int] = set()
        self._next = 1
        self._file = os.memfd_create("fake device memory")

    def CUmemAllocationProp(self) -> Any:
        return SimpleNamespace(type=None, location=SimpleNamespace(type=None, id=None))

    def CUmemAccessDesc(self) -> Any:
        return SimpleNamespace(flags=None, location=SimpleNamespace(type=None, id=None))

    def cuInit(self, flags: int) -> tuple[Any, ...]:
        assert flags == 0
        return OK

    def cuDeviceGet(self, ordinal: int) -> tuple[Any, ...]:
        return *OK, ordinal

    def cuDeviceGetAttribute(self, attribute: Any, device: int) -> tuple[Any, ...]:
        assert attribute == "virtual memory"
        return *OK, 1

    def cuMemGetAllocationGranularity(self, place: Any, option: Any) -> tuple[Any, ...]:
        self._check_place(place)
        return *OK, self.page

    def cuMemCreate(self, size: int, place: Any, flags: int) -> tuple[Any, ...]:
        if failed := self._fails("cuMemCreate"):
            return *failed, None
        self._check_place(place)
        assert size == self.page and flags == 0
        if self.memory is not None and len(self.handles) >= self.memory:
            return CUresult.CUDA_ERROR_OUT_OF_MEMORY, None
        handle, self._next = self._next, self._next + 1
        os.ftruncate(self._file, self._next * self.page)
        self.handles.add(handle)
        return *OK, handle

    def cuMemRelease(self, handle: int) -> tuple[Any, ...]:
        self.calls["cuMemRelease"] += 1
        assert handle in self.handles, "released twice or never created"
        assert handle not in self.mapped.values(), "released while mapped: its memory would stay taken, unseen"
        self.handles.remove(handle)
        return OK

    def cuMemAddressReserve(self, size: int, alignment: int, address: int, flags: int) -> tuple[Any, ...]:
        if failed := self._fails("cuMemAddressReserve"):
            return *failed, None
        assert size > 0 and size % self.page == 0 and alignment in (0, self.page) and address == 0 and flags == 0
        start = self._host_map(None, size, _NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        self.ranges[start] = size
        return *OK, start

    def cuMemAddressFree(self, address: int, size: int) -> tuple[Any, ...]:
        self.calls["cuMemAddressFree"] += 1
        assert self.ranges.pop(address) == size, "freed with another size than reserved"
        assert not any(address <= page < address + size for page in self.mapped), "freed with pages mapped"
        assert _libc.munmap(address, size) == 0
        return OK

    def cuMemMap(self, address: int, size: int, offset: int, handle: int, flags: int) -> tuple[Any, ...]:
        if failed := self._fails("cuMemMap"):
            return failed
        assert size == self.page and offset == 0 and flags == 0 and handle in self.handles
        assert self._reserved(address, size), "mapped outside of what is reserved"
        assert address not in self.mapped, "mapped twice"
        assert handle not in self.mapped.values(), "one page at two addresses: rows would overwrite each other"
        self.mapped[address] = handle
        return OK

    def cuMemSetAccess(self, address: int, size: int, access: list[Any], count: int) -> tuple[Any, ...]:
        if failed := self._fails("cuMemSetAccess"):
            return failed
        assert count == len(access) == 1 and access[0].flags == "read and write"
        self._check_location(access[0].location)
        for page in self._whole_pages(address, size):
            assert page in self.mapped, "access to what is not mapped"
            flags = mmap.MAP_SHARED | _FIXED
            self._host_map(
                page, self.page, mmap.PROT_READ | mmap.PROT_WRITE, flags, self._file, self.mapped[page] * self.page
            )
            self.accessible.add(page)
        return OK

    def cuMemUnmap(self, address: int, size: int) -> tuple[Any, ...]:
        if failed := self._fails("cuMemUnmap"):
            return failed
        pages = self._whole_pages(address, size)
        assert all(page in self.mapped for page in pages), "unmapped what is not mapped"
        for page in pages:
            del self.mapped[page]
            self.accessible.discard(page)
            self._host_map(page, self.page, _NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _FIXED, -1, 0)
        return OK

    def close(self) -> None:
        """Nothing may be left by then."""
        os.close(self._file)
        assert not (self.handles or self.ranges or self.mapped), "pages or ranges leaked"

    def _fails(self, name: str) -> tuple[Any, ...] | None:
        self.calls[name] += 1
        left = self.failures.get(name)
        if left is None:
            return None
        self.failures[name] = left - 1
        return (CUresult.CUDA_ERROR_INVALID_VALUE,) if left <= 0 else None

    def _whole_pages(self, address: int, size: int) -> range:
        assert address % self.page == 0 and size > 0 and size % self.page == 0
        return range(address, address + size, self.page)

    def _reserved(self, address: int, size: int) -> bool:
        return address % self.page == 0 and any(
            start <= address and address + size <= start + length for start, length in self.ranges.items()
        )

    def _check_place(self, place: Any) -> None:
        assert place.type == "pinned"
        self._check_location(place.location)

    def _check_location(self, location: Any) -> None:
        assert location.type == "device" and location.id == 0

    @staticmethod
    def _host_map(address: int | None, size: int, protection: int, flags: int, file: int, offset: int) -> int:
        found = _libc.mmap(address, size, protection, flags, file, offset)
        assert found not in (None, ctypes.c_void_p(-1).value), os.strerror(ctypes.get_errno())
        return int(found)
