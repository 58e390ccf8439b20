"""ESFT adapters: retrained routed experts of a mixture-of-experts base, as DeepSeek's ESFT repository writes them.

`expert_cfg.json` says which experts of which layers; their weights are in sharded safetensors with an index, whole
(not low-rank), gigabytes of them. Source: Wang et al., "Let the Expert Stick to His Last" (ESFT, 2024), section 3.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Self

from signalbox.adapters.base import AdapterError, AdapterFacts, BaseShape, Limits
from signalbox.adapters.files import (
    AdapterFolder,
    ContentHash,
    SafetensorsFile,
    TensorEntry,
    check_finite,
    shown,
    tensor_of,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CONFIG = "expert_cfg.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARDS = 1024
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

# The first release's keys lack `model.`.
_KEY = re.compile(r"(?:model\.)?layers\.(\d{1,5})\.mlp\.experts\.(\d{1,5})\.(gate_proj|up_proj|down_proj)\.weight")
_Place = tuple[int, int, str]  # layer, expert, projection


class Part(NamedTuple):
    """A tensor in a file: `nbytes` from byte `start` on."""

    path: str
    start: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class EsftAdapter:
    """The tensors of an ESFT adapter, read when they are asked for. Use as a context manager: it holds its files.

    `experts` maps a layer to the ids of its retrained experts, ascending. Construction checks everything but the
    values. Raises `AdapterError`; codes besides those of `AdapterFolder`: `unsupported`, `bad_config`, `no_experts`,
    `unsafe_format`, `unknown_tensor`, `unknown_module`, `not_targeted`, `duplicate_tensor`, `missing_tensor`,
    `shape_mismatch`, `bad_index`.
    """

    def __init__(self, path: Path, base: BaseShape, limits: Limits) -> None:
        self._folder = AdapterFolder(path, limits)
        try:
            self.experts = _experts(self._folder.read_json(CONFIG), base)
            self._places = _placed(_shards(self._folder), self.experts, base)
        except BaseException:
            self.close()
            raise
        self.path = self._folder.path

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close its files."""
        self._folder.__exit__(None, None, None)

    def expert(self, layer: int, expert: int, *, finite: bool = True) -> dict[str, Tensor]:
        """One retrained expert: `gate_proj` and `up_proj` [intermediate, hidden], `down_proj` [hidden, intermediate].

        Any thread may read. Raises `AdapterError` (`not_finite`, unless the caller looks himself), and KeyError for an
        expert that is not in `experts`.
        """
        found = {}
        for projection in PROJECTIONS:
            file, entry = self._places[layer, expert, projection]
            found[projection] = file.read(entry)
            if finite:
                check_finite(entry, found[projection])
        return found

    def parts(self, layer: int, expert: int) -> dict[str, Part]:
        """Where one retrained expert's tensors are, by projection, for another process to read while this is open."""
        found = {}
        for projection in PROJECTIONS:
            file, entry = self._places[layer, expert, projection]
            found[projection] = Part(file.shared_path, entry.start, entry.nbytes, entry.torch_dtype, entry.shape)
        return found

    def facts(self) -> AdapterFacts:
        """Reads every tensor once, for its values and the content's hash; one tensor in memory at a time."""
        digest = ContentHash({"kind": "esft", "experts": {str(layer): ids for layer, ids in self.experts.items()}})
        named = {f"{layer}.{expert}.{part}": found for (layer, expert, part), found in self._places.items()}
        nbytes = parameters = 0
        for name, (file, entry) in sorted(named.items()):
            data = file.read_bytes(entry)
            check_finite(entry, tensor_of(entry, data))
            digest.add(name, entry, data)
            nbytes += entry.nbytes
            parameters += entry.elements
        return AdapterFacts(
            kind="esft",
            path=str(self.path),
            content_hash=digest.hexdigest(),
            rank=0,
            nbytes=nbytes,
            modules=tuple(f"{layer}.{expert}" for layer, ids in self.experts.items() for expert in ids),
            parameters=parameters,
        )


def read_esft_facts(path: Path, base: BaseShape, limits: Limits) -> AdapterFacts:
    """Validate the ESFT adapter in a folder, all its values included. Blocking: about a second for each gigabyte.

    Raises `AdapterError` as `EsftAdapter` does, and `not_finite`.
    """
    with EsftAdapter(path, base, limits) as adapter:
        return adapter.facts()


def layer_number(text: str) -> int:
    """The layer that a file means. Raises ValueError for other spellings, which could name a layer twice."""
    if not re.fullmatch(r"0|[1-9]\d{0,4}", text, re.ASCII):
        raise ValueError(f"{text[:20]!r} is no number of a layer")
    return int(text)


def _experts(raw: dict[str, Any], base: BaseShape) -> dict[int, tuple[int, ...]]:
    """Layer -> ids of its retrained experts, from `expert_cfg.json`."""
    for key, what in (
        ("shared_experts", "retrained shared experts run for every token of every request"),
        ("non_expert_modules", "retrained attention, norms and embeddings would change the base itself"),
    ):
        value = raw.get(key, False)
        if not isinstance(value, bool):
            _config(key, f"{key} is {shown(value)} and not true or false")
        if value:
            _config(key, f"{key} is true, and that is not supported: {what}", code="unsupported")
    listed = raw.get("experts")
    if not isinstance(listed, dict):
        _config("experts", "experts is no map from layers to lists of expert ids")
    if not base.experts:
        raise AdapterError(
            f"the base {base.model} has no routed experts; an ESFT adapter needs a mixture-of-experts base",
            code="unknown_module",
            tensor="experts",
        )
    found: dict[int, tuple[int, ...]] = {}
    for key, ids in listed.items():
        try:
            layer = layer_number(key)
        except ValueError:
            layer = -1
        if layer not in base.experts:
            _config("experts", f"experts names layer {shown(key)}, which has no routed experts in {base.model}")
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < base.experts[layer] for i in ids):
            _config("experts", f"experts of layer {key} are no list of ids from 0 to {base.experts[layer] - 1}")
        if len(set(ids)) < len(ids):
            _config("experts", f"experts of layer {key} name one twice")
        if ids:
            found[layer] = tuple(sorted(ids))
    if not found:
        _config("experts", "experts is empty: the adapter changes nothing", code="no_experts")
    return dict(sorted(found.items()))


def _shards(folder: AdapterFolder) -> list[tuple[SafetensorsFile, set[str] | None]]:
    """The files of weights, each with the tensors that the index places in it (None without an index)."""
    if not folder.has(INDEX):
        if not folder.has(SINGLE) and (pickles := folder.pickles()):
            raise AdapterError(
                f"{folder.path} holds {shown(pickles[0])} and no {INDEX}: unpickling runs code, so only safetensors "
                "are read; convert it to safetensors",
                code="unsafe_format",
                tensor=pickles[0],
            )
        return [(folder.safetensors(SINGLE), None)]
    weight_map = folder.read_json(INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        _index("weight_map", "has no weight_map from tensors to files")
    placed: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        if not re.fullmatch(r"[\w.-]{1,128}\.safetensors", name) or name.startswith("."):
            _index(tensor, f"places a tensor in {shown(name)}, which is no safetensors file of the folder")
        placed.setdefault(name, set()).add(tensor)
    if len(placed) > MAX_SHARDS:
        _index("weight_map", f"names more than {MAX_SHARDS} files")
    return [(folder.safetensors(name), tensors) for name, tensors in sorted(placed.items())]


def _placed(
    shards: list[tuple[SafetensorsFile, set[str] | None]], experts: dict[int, tuple[int, ...]], base: BaseShape
) -> dict[_Place, tuple[SafetensorsFile, TensorEntry]]:
    """Where each tensor of the experts is; every one of them is there, once, and no other."""
    places: dict[_Place, tuple[SafetensorsFile, TensorEntry]] = {}
    for file, expected in shards:
        if expected is not None and (missing := sorted(expected - set(file.entries))):
            _refuse("missing_tensor", missing[0], f"is not in {file.name}, where {INDEX} places it")
        for entry in file.entries.values():
            if expected is not None and entry.name not in expected:
                _refuse("unknown_tensor", entry.name, f"is in {file.name}, and {INDEX} does not say so")
            match = _KEY.fullmatch(entry.name)
            if match is None:
                _refuse("unknown_tensor", entry.name, "is no gate_proj, up_proj or down_proj of a routed expert")
            layer, expert, projection = int(match[1]), int(match[2]), match[3]
            if expert not in experts.get(layer, ()):
                _refuse("not_targeted", entry.name, f"is for an expert that {CONFIG} does not name")
            if (layer, expert, projection) in places:
                _refuse("duplicate_tensor", entry.name, "is there twice")
            if entry.shape != base.expert_linears[projection]:
                expected_shape = list(base.expert_linears[projection])
                _refuse("shape_mismatch", entry.name, f"has shape {list(entry.shape)}; the base needs {expected_shape}")
            places[layer, expert, projection] = (file, entry)
    for layer, ids in experts.items():
        for expert in ids:
            for projection in PROJECTIONS:
                if (layer, expert, projection) not in places:
                    name = f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"
                    _refuse("missing_tensor", name, f"is missing, and {CONFIG} names its expert")
    return places


def _config(key: str, message: str, *, code: str = "bad_config") -> NoReturn:
    raise AdapterError(f"{CONFIG}: {message}", code=code, tensor=key)


def _index(tensor: str, message: str) -> NoReturn:
    raise AdapterError(f"{INDEX} {message}", code="bad_index", tensor=tensor)


def _refuse(code: str, tensor: str, what: str) -> NoReturn:
    raise AdapterError(f"tensor {shown(tensor)} {what}", code=code, tensor=tensor)
