"""The only way to the files of an adapter: below an allowed root, regular files, bounded JSON, and safetensors.

An adapter comes from outside. So each file is opened once, and everything is checked on the opened descriptor: what
was checked is what is used, whatever happens to the folder meanwhile. Nothing is ever unpickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import stat
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

import orjson

from signalbox.adapters.base import AdapterError, Limits

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_JSON_BYTES = 16 << 20  # an ESFT index of 256 experts in 60 layers has some 5 MB
MAX_HEADER_BYTES = 32 << 20
MAX_DEPTH = 16
MAX_NAME = 256
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Safetensors' name -> (torch's name, bytes of an element). No adapter is published in another type than these.
DTYPES = {"F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2)}
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


def shown(name: object) -> str:
    """A name from a file as it may stand in a message: quoted, control characters escaped, cut to 160 characters."""
    text = repr(str(name))
    return text if len(text) <= 160 else f"{text[:150]}...'"


class AdapterFolder:
    """An adapter's folder, opened for reading. Use as a context manager: it holds the descriptors of its files.

    Raises `AdapterError` with code `outside_roots`, `not_found`, `not_a_folder`; and from its methods `missing_file`,
    `not_a_file`, `outside_roots`, `too_large`, `bad_json`, `bad_safetensors`, `dtype`, `zero_size`.
    """

    def __init__(self, path: Path | str, limits: Limits) -> None:
        self._limits = limits
        self._roots = tuple(_resolved(root) for root in limits.roots)
        self._descriptors: list[int] = []
        self.nbytes = 0  # of all files opened so far
        if ".." in Path(path).parts:
            raise AdapterError(f"{shown(path)} contains '..': give the plain path", code="outside_roots")
        try:
            self.path = Path(path).resolve(strict=True)
        except (OSError, RuntimeError, ValueError) as error:
            if not self._allowed(_resolved(Path(path))):  # nothing is said of what lies outside, not even if it is
                self._outside(path)
            reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
            raise AdapterError(f"there is no adapter at {shown(path)}: {reason}", code="not_found") from None
        if not self._allowed(self.path):
            self._outside(path)
        if not self.path.is_dir():
            raise AdapterError(f"{shown(path)} is not a folder; name the folder of the adapter", code="not_a_folder")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    def has(self, name: str) -> bool:
        """Whether the folder has an entry of this name, whatever it is."""
        return os.path.lexists(self.path / name)

    def pickles(self) -> list[str]:
        """Names of weight files in the folder that only unpickling could read."""
        try:
            return sorted(name for name in os.listdir(self.path) if name.endswith(PICKLES))[:4]  # noqa: PTH208
        except OSError:
            return []

    def read_json(self, name: str, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
        """The JSON object in a file. Refused: duplicate keys, NaN, more than 16 levels, more than `max_bytes`."""
        descriptor, size = self._open(name)
        if size > max_bytes:
            raise AdapterError(
                f"{name} has {size:,} bytes, more than the {max_bytes:,} that are allowed",
                code="too_large",
                tensor=name,
            )
        return parse_object(_read(descriptor, 0, size, name), name, code="bad_json")

    def safetensors(self, name: str) -> SafetensorsFile:
        """A safetensors file, its header checked; no weights are read yet."""
        descriptor, size = self._open(name)
        return SafetensorsFile(name, descriptor, size)

    def _open(self, name: str) -> tuple[int, int]:
        """Descriptor and size of a regular file of the folder, symbolic links followed below the roots only."""
        path = self.path / name
        try:
            target = path.resolve(strict=True)
            if not self._allowed(target):
                self._outside(path)
            # Not blocking: a FIFO put there would hold us for ever.
            descriptor = os.open(target, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except (OSError, RuntimeError) as error:
            if isinstance(error, FileNotFoundError) and not path.is_symlink():
                raise AdapterError(f"{name} is missing in {self.path}", code="missing_file", tensor=name) from None
            reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
            code = "not_a_file" if isinstance(error, OSError) and error.errno == errno.ENXIO else "unreadable"
            raise AdapterError(f"{name} cannot be read: {reason}", code=code, tensor=name) from None
        self._descriptors.append(descriptor)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise AdapterError(f"{name} is not a regular file", code="not_a_file", tensor=name)
        opened = Path(f"/proc/self/fd/{descriptor}")
        if opened.is_symlink() and not self._allowed(Path(os.readlink(opened))):  # noqa: PTH115
            self._outside(path)  # a folder on the way was exchanged between the look and the opening
        self.nbytes += status.st_size
        if self.nbytes > self._limits.max_bytes:
            raise AdapterError(
                f"the adapter has more than the {self._limits.max_bytes:,} bytes that are allowed ({name} alone has "
                f"{status.st_size:,}); raise the limit if it is meant to be so big",
                code="too_large",
                tensor=name,
            )
        return descriptor, status.st_size

    def _allowed(self, path: Path) -> bool:
        return any(path.is_relative_to(root) for root in self._roots)

    def _outside(self, path: Path | str) -> NoReturn:
        roots = ", ".join(map(str, self._limits.roots)) or "none is configured"
        raise AdapterError(
            f"{shown(path)} lies outside the folders that adapters may be loaded from ({roots}), or is a link that "
            "leads outside; copy the adapter into one of them",
            code="outside_roots",
        )


@dataclass(slots=True, frozen=True)
class TensorEntry:
    """One tensor as a safetensors header declares it; `start` and `end` are bytes of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return self.end - self.start

    @property
    def elements(self) -> int:
        """Number of its elements."""
        return math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Its dtype in torch."""
        import torch

        return getattr(torch, DTYPES[self.dtype][0])


class SafetensorsFile:
    """A safetensors file: its header is checked wholly on construction, tensors are read one at a time.

    `entries` are in the order of their names, so that of several faults the same one is found first.

    Format: a little-endian u64 n, n bytes of JSON, then the data, which the tensors cover without gap or overlap
    (huggingface.co/docs/safetensors, "Format"). Raises `AdapterError`: `bad_safetensors`, `dtype`, `zero_size`.
    """

    def __init__(self, name: str, descriptor: int, size: int) -> None:
        self.name = name
        self._descriptor = descriptor
        if size < 8:
            self._bad(f"it has {size} bytes")
        (length,) = struct.unpack("<Q", _read(descriptor, 0, 8, name))
        if length > min(size - 8, MAX_HEADER_BYTES):
            self._bad(f"its header claims {length:,} bytes, of {size:,} in the file")
        header = parse_object(_read(descriptor, 8, length, name), name, code="bad_safetensors")
        header.pop("__metadata__", None)
        self.entries = {key: self._entry(key, value, 8 + length) for key, value in sorted(header.items())}
        place = 8 + length
        for entry in sorted(self.entries.values(), key=lambda entry: (entry.start, entry.end)):
            if entry.start != place:
                what = "overlaps the tensor before it" if entry.start < place else "leaves a gap before it"
                self._bad(f"tensor {shown(entry.name)} {what}", entry.name)
            place = entry.end
        if place != size:
            self._bad(f"it has {size:,} bytes where its header says {place:,}; it is cut short or padded")

    @property
    def shared_path(self) -> str:
        """Where another process of this user finds this very file while it is open here, whatever lies at its name."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def read(self, entry: TensorEntry) -> Tensor:
        """The tensor's values, in memory of its own."""
        return tensor_of(entry, self.read_bytes(entry))

    def read_bytes(self, entry: TensorEntry) -> bytearray:
        """The tensor's bytes, row-major and little-endian."""
        return _read(self._descriptor, entry.start, entry.nbytes, self.name)

    def _entry(self, name: str, value: Any, data: int) -> TensorEntry:
        if len(name) > MAX_NAME:
            self._bad(f"tensor {shown(name)} has a name of more than {MAX_NAME} characters", name[:MAX_NAME])
        if not isinstance(value, dict) or set(value) != _ENTRY_KEYS:
            self._bad(f"tensor {shown(name)} is not declared by dtype, shape and data_offsets", name)
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise AdapterError(
                f"tensor {shown(name)} has dtype {shown(dtype)}; an adapter's weights are F32, F16 or BF16: convert it",
                code="dtype",
                tensor=name,
            )
        if not _counts(shape) or len(shape) > 8 or not _counts(offsets) or len(offsets) != 2:
            self._bad(f"tensor {shown(name)} has a shape or offsets that are not lists of whole numbers", name)
        start, end = offsets
        if end - start != math.prod(shape) * DTYPES[dtype][1]:
            self._bad(f"tensor {shown(name)} of {dtype} {shape} does not take the bytes {start} to {end}", name)
        if 0 in shape:
            raise AdapterError(f"tensor {shown(name)} is empty: its shape is {shape}", code="zero_size", tensor=name)
        return TensorEntry(name, dtype, tuple(shape), data + start, data + end)

    def _bad(self, reason: str, tensor: str | None = None) -> NoReturn:
        raise AdapterError(
            f"{self.name} is no whole safetensors file: {reason}; save or copy it again",
            code="bad_safetensors",
            tensor=tensor or self.name,
        )


def tensor_of(entry: TensorEntry, data: bytearray) -> Tensor:
    """The bytes as a tensor of the entry's shape and dtype, sharing their memory."""
    import torch

    return torch.frombuffer(data, dtype=entry.torch_dtype).view(entry.shape)


def check_finite(entry: TensorEntry, tensor: Tensor) -> None:
    """Raises `AdapterError` (`not_finite`) naming the tensor and how many of its values are NaN or infinite."""
    low, high = tensor.aminmax()  # both are NaN where a value is; some 50 times as fast as looking at each value
    if not (low.isfinite() and high.isfinite()):
        finite = tensor.isfinite()
        wrong, nans = int((~finite).sum()), int(tensor.isnan().sum())
        raise AdapterError(
            f"tensor {shown(entry.name)} has {wrong:,} of {entry.elements:,} values that are not finite ({nans:,} NaN, "
            f"{wrong - nans:,} infinite): its training diverged or the file is damaged",
            code="not_finite",
            tensor=entry.name,
        )


class ContentHash:
    """SHA-256 over a configuration and tensors: the same for equal content, wherever its files lie and in what order.

    `add` must be called in the order of the tensors' names, which makes the digest independent of the files' order.
    """

    def __init__(self, configuration: Mapping[str, Any]) -> None:
        self._digest = hashlib.sha256(orjson.dumps(configuration, option=orjson.OPT_SORT_KEYS))
        self._last = ""

    def add(self, name: str, entry: TensorEntry, data: bytes | bytearray) -> None:
        """One tensor, by the name that it has in the model."""
        assert name > self._last, "tensors are added in the order of their names"
        self._last = name
        self._digest.update(orjson.dumps([name, entry.dtype, entry.shape, entry.nbytes]))
        self._digest.update(data)

    def hexdigest(self) -> str:
        """64 hexadecimal digits."""
        return self._digest.hexdigest()


def parse_object(data: bytes | bytearray, name: str, *, code: str) -> dict[str, Any]:
    """A JSON object from a file of this name. Refused: duplicate keys, NaN and infinities, more than 16 levels."""

    def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise AdapterError(f"{name} has the key {shown(twice)} twice", code=code, tensor=twice[:MAX_NAME])
        return found

    try:
        orjson.loads(data)  # the stricter of the two: no NaN, no half of a surrogate pair; but it lets duplicates pass
        value = json.loads(data, object_pairs_hook=unique)
        depth = _depth(value)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise AdapterError(f"{name} is not valid JSON: {reason}", code=code, tensor=name) from None
    if not isinstance(value, dict):
        raise AdapterError(f"{name} is not a JSON object", code=code, tensor=name)
    if depth > MAX_DEPTH:
        raise AdapterError(f"{name} is nested more than {MAX_DEPTH} levels deep", code=code, tensor=name)
    return value


def _depth(value: Any) -> int:
    """Levels of nesting, without recursion."""
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            child
            for parent in level
            if isinstance(parent, dict | list)
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
    return depth


def _counts(value: Any) -> bool:
    """Whether it is a list of whole numbers from 0 on that a file could hold."""
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 1 << 48 for number in value)


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError):
        return path.absolute()


def _read(descriptor: int, start: int, length: int, name: str) -> bytearray:
    """That many bytes, or an `AdapterError` where the file has become shorter."""
    data = bytearray(length)
    view, done = memoryview(data), 0
    try:
        while done < length:
            count = os.preadv(descriptor, [view[done:]], start + done)
            if count == 0:
                raise AdapterError(f"{name} became shorter while it was read", code="bad_safetensors", tensor=name)
            done += count
    except OSError as error:
        raise AdapterError(f"{name} cannot be read: {error.strerror}", code="unreadable", tensor=name) from None
    return data
