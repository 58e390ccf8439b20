"""A trained router on disk: a versioned directory of safetensors and JSON, never pickle.

    routers/quickstart/
        router.json              kind, format, version, experts in order, encoder (or ""), spread, training figures
        router.safetensors       the predictor's tensors (names and shapes are the kind's own affair)
        neighbours.safetensors   optional: training embeddings and scores, for the kNN reference line of `eval`

`version` is the hash of the tensors and of what they mean: two artifacts of one version predict alike.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

import numpy as np
import orjson
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from signalbox.router.base import Facts, Predictor
from signalbox.router.encoder import DEFAULT_ENCODER, Encoder, load_encoder
from signalbox.router.kinds import KINDS
from signalbox.router.table import Table

FORMAT = 1
TENSORS, DESCRIPTION, NEIGHBOURS = "router.safetensors", "router.json", "neighbours.safetensors"

Report = Callable[[str, int, int], None]


class ArtifactError(ValueError):
    """A router artifact that is damaged, of another format, or does not fit the pool."""


@dataclass(frozen=True)
class Artifact:
    """What is saved of a router. `settings` is the kind's own, `training` figures for people to read."""

    kind: str
    experts: tuple[str, ...]
    tensors: dict[str, NDArray[Any]]
    settings: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    encoder: str = DEFAULT_ENCODER
    spread: float = 0.0
    created: str = ""
    path: Path | None = None

    @property
    def version(self) -> str:
        """12 hex digits of a hash over everything that bears on predictions."""
        meaning = [self.kind, self.experts, self.settings, self.encoder, self.spread]
        digest = hashlib.sha256(orjson.dumps(meaning, option=orjson.OPT_SORT_KEYS))
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name}{tensor.dtype}{tensor.shape}".encode())
            digest.update(np.ascontiguousarray(tensor).tobytes())
        return digest.hexdigest()[:12]

    def tensor(self, name: str, *shape: int) -> NDArray[np.float32]:
        """A float tensor of the artifact in float32, with its shape checked. Raises `ArtifactError`."""
        if name not in self.tensors:
            raise ArtifactError(f"{self.path or 'router artifact'}: {TENSORS} has no tensor {name}; train it again")
        found = self.tensors[name]
        if found.shape != shape:
            raise ArtifactError(f"{self.path or 'router artifact'}: {name} has shape {found.shape}, expected {shape}")
        return found.astype(np.float32)


class Trainable(Predictor, Protocol):
    """A predictor that can be saved, and made again from what was saved.

    Where `uses_encoder` is False, the encoder may be None and is passed over.
    """

    uses_encoder: ClassVar[bool]

    def to_artifact(self) -> Artifact:
        """Everything `from_artifact` needs."""

    @classmethod
    def from_artifact(cls, artifact: Artifact, encoder: Encoder | None, experts: Sequence[str]) -> Trainable:
        """The predictor of these experts, a selection of the artifact's, in this order."""

    @classmethod
    def fit(
        cls,
        table: Table,
        encoder: Encoder | None,
        *,
        seed: int = 0,
        report: Report | None = None,
        facts: Facts | None = None,
    ) -> Trainable:
        """Learn from complete rows; `report(step, done, of)` is called as it goes."""


def predictor_class(kind: str) -> type[Trainable]:
    """The class of a kind of router. Raises `ArtifactError` listing the kinds there are."""
    if kind not in KINDS:
        near = get_close_matches(kind, KINDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ArtifactError(f"there is no router kind {kind!r}{hint} (kinds: {', '.join(KINDS)})")
    module, name = KINDS[kind].split(":")
    return cast("type[Trainable]", getattr(importlib.import_module(module), name))


def save_artifact(artifact: Artifact, path: str | Path, *, neighbours: dict[str, NDArray[Any]] | None = None) -> None:
    """Write the directory whole or not at all, in place of an artifact that may be there.

    Raises `ArtifactError` where `path` is something else than a router artifact, or a tensor is not finite.
    """
    path = Path(path)
    _check_finite(artifact.tensors, path)
    if path.exists() and not (path / DESCRIPTION).is_file() and (not path.is_dir() or any(path.iterdir())):
        raise ArtifactError(f"{path} exists and is no router artifact: choose another directory")
    fresh = path.with_name(f".{path.name}.{os.getpid()}.writing")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        description = {
            "format": FORMAT,
            "kind": artifact.kind,
            "version": artifact.version,
            "created": artifact.created or datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "experts": artifact.experts,
            "encoder": artifact.encoder,
            "spread": artifact.spread,
            "settings": artifact.settings,
            "training": artifact.training,
        }
        (fresh / DESCRIPTION).write_bytes(orjson.dumps(description, option=orjson.OPT_INDENT_2) + b"\n")
        save_file({k: np.ascontiguousarray(v) for k, v in artifact.tensors.items()}, fresh / TENSORS)
        if neighbours:
            save_file({k: np.ascontiguousarray(v) for k, v in neighbours.items()}, fresh / NEIGHBOURS)
        for file in fresh.iterdir():  # safetensors makes files that only their owner reads
            file.chmod((fresh / DESCRIPTION).stat().st_mode)
        old = path.with_name(f".{path.name}.{os.getpid()}.old")
        if path.exists():
            path.rename(old)
        fresh.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def read_artifact(path: str | Path) -> Artifact:
    """Read and check a directory. Raises `ArtifactError` saying what is wrong and what to do."""
    path = Path(path)
    for name in (DESCRIPTION, TENSORS):
        if not (path / name).is_file():
            raise ArtifactError(
                f"{path} is not a router artifact: it has no {name}; make one by `signalbox router train`"
            )
    try:
        found = orjson.loads((path / DESCRIPTION).read_bytes())
        if found.get("format") != FORMAT:
            raise ArtifactError(f"{path}: format {found.get('format')!r}, this version reads {FORMAT}; train it again")
        artifact = Artifact(
            kind=str(found["kind"]),
            experts=tuple(map(str, found["experts"])),
            tensors=load_file(path / TENSORS),
            settings=dict(found["settings"]),
            training=dict(found["training"]),
            encoder=str(found["encoder"]),
            spread=float(found["spread"]),
            created=str(found["created"]),
            path=path,
        )
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ArtifactError(f"{path} is damaged ({type(error).__name__}: {error}); train it again") from None
    if not artifact.experts or len(set(artifact.experts)) != len(artifact.experts):
        raise ArtifactError(f"{path}: `experts` is empty or names one twice; train it again")
    if not np.isfinite(artifact.spread):
        raise ArtifactError(f"{path}: `spread` is not a finite number; train it again")
    _check_finite(artifact.tensors, path)
    if found["version"] != artifact.version:
        raise ArtifactError(f"{path}: {TENSORS} is not the one that {DESCRIPTION} was written with; train it again")
    return artifact


def _check_finite(tensors: dict[str, NDArray[Any]], path: Path) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
            raise ArtifactError(f"{path}: tensor {name} holds a value that is not finite; train it again")


def check_pool(artifact: Artifact, pool: Sequence[str]) -> None:
    """Raises `ArtifactError` naming the experts of the pool that the router was not trained on."""
    missing = [name for name in pool if name not in artifact.experts]
    if missing:
        raise ArtifactError(
            f"the router {artifact.path or artifact.kind} does not know {', '.join(missing)} "
            f"(it was trained on {', '.join(artifact.experts)}): collect and train with them, "
            f"or set `routable: false` for them"
        )
    if not pool:
        raise ArtifactError("the pool is empty: a router needs at least one expert to choose")


def load_predictor(path: str | Path, *, pool: Sequence[str] | None = None, encoder: Encoder | None = None) -> Predictor:
    """The trained router in a directory, for the experts of `pool` (default: all it knows), in that order.

    An expert it knows that is not in the pool is left out. Raises `ArtifactError` where the artifact is damaged
    or the pool has an expert that it was not trained on.
    """
    artifact = read_artifact(path)
    experts = tuple(pool) if pool is not None else artifact.experts
    check_pool(artifact, experts)
    cls = predictor_class(artifact.kind)
    if encoder is None and cls.uses_encoder:
        encoder = load_encoder(artifact.encoder)
    return cls.from_artifact(artifact, encoder, experts)


def load_neighbours(path: str | Path) -> dict[str, NDArray[Any]] | None:
    """The training rows kept for the kNN reference line, or None where the artifact holds none."""
    file = Path(path) / NEIGHBOURS
    return load_file(file) if file.is_file() else None
