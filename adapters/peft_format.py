"""LoRA adapters as PEFT writes them: `adapter_config.json` and `adapter_model.safetensors`.

Source: Hu et al., LoRA (2021), section 4.1, and peft 0.21 for the files. Everything is checked against the base's
shape before a value is read, and every value before the adapter is handed on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from signalbox.adapters.base import AdapterError, AdapterFacts, BaseShape, Limits, LoraAdapter, LoraModule
from signalbox.adapters.files import (
    AdapterFolder,
    ContentHash,
    SafetensorsFile,
    TensorEntry,
    check_finite,
    shown,
    tensor_of,
)
from signalbox.adapters.peft_config import Matcher, parse

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 4 << 20

# `base_model.model.` is peft's wrapper, absent in files of other tools; the adapter's name in the key is old peft's.
_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[\w-]+))?\.weight")
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# Parts of a key that belong to variants of LoRA, and what each says.
_VARIANTS = {
    "lora_magnitude_vector": "DoRA's magnitudes",
    "lora_embedding_": "LoRA on an embedding",
    "modules_to_save": "a whole module trained beside the LoRA",
    "token_adapter": "trained token embeddings",
    "trainable_tokens": "trained token embeddings",
    "base_layer": "a weight of the base itself",
    ".bias": "a trained bias",
    "embed_tokens.weight": "a whole embedding",
    "lm_head.weight": "a whole output layer",
}


@dataclass(slots=True, frozen=True)
class _Pair:
    """The two tensors of one module, as declared; `spelled` is the module's name in the file."""

    spelled: str
    a: TensorEntry
    b: TensorEntry


def read_lora(path: Path, base: BaseShape, limits: Limits) -> LoraAdapter:
    """Validate the LoRA adapter in a folder and read it: tensors on the CPU, in the dtype of the file. Blocking.

    Raises `AdapterError` with the tensor or configuration key at fault. Codes, besides those of `AdapterFolder`:
    `unsupported`, `bad_config`, `bad_rank`, `rank_too_high`, `unsafe_format`, `unknown_tensor`, `unknown_module`,
    `duplicate_tensor`, `not_targeted`, `missing_tensor`, `unpaired`, `shape_mismatch`, `no_modules`, `not_finite`.
    """
    with AdapterFolder(path, limits) as folder:
        config = parse(folder.read_json(CONFIG, MAX_CONFIG_BYTES))
        matcher = Matcher(config)
        file = _open_weights(folder)
        pairs = _paired(file, base)
        _check_targets(pairs, matcher, base)
        for module, pair in pairs.items():
            _check_shapes(module, pair, matcher, base, limits)
        return _read(file, pairs, matcher, folder.path)


def _open_weights(folder: AdapterFolder) -> SafetensorsFile:
    if not folder.has(WEIGHTS) and (pickles := folder.pickles()):
        raise AdapterError(
            f"{folder.path} holds {shown(pickles[0])} and no {WEIGHTS}: unpickling runs code, so only safetensors are "
            "read; convert it to safetensors (peft's save_pretrained does)",
            code="unsafe_format",
            tensor=pickles[0],
        )
    return folder.safetensors(WEIGHTS)


def _paired(file: SafetensorsFile, base: BaseShape) -> dict[str, _Pair]:
    """The file's tensors by the base's name of their module, in the order of the names."""
    found: dict[str, dict[str, TensorEntry]] = {}
    spelled: dict[str, str] = {}
    adapters: set[str | None] = set()
    for entry in file.entries.values():
        key = entry.name
        for wrapper in _WRAPPERS:
            key = key.replace(wrapper, "")
        match = _KEY.fullmatch(key)
        if match is None:
            what = next((what for part, what in _VARIANTS.items() if part in key), None)
            if what is not None:
                _refuse("unsupported", entry.name, f"is {what}, which is not supported")
            _refuse("unknown_tensor", entry.name, "is no lora_A or lora_B weight of a module")
        adapters.add(match["adapter"])
        if len(adapters) > 1:
            _refuse("unknown_tensor", entry.name, "belongs to another adapter than the tensors before it; save one")
        module = _module_of(match["module"], base)
        if module is None:
            near = _nearest(match["module"], base)
            _refuse("unknown_module", entry.name, f"is for a module that the base {base.model} does not have{near}")
        sides = found.setdefault(module, {})
        if (other := sides.get(match["side"])) is not None:
            _refuse("duplicate_tensor", entry.name, f"is there twice, the other time as {shown(other.name)}")
        sides[match["side"]], spelled[module] = entry, match["module"]
    for sides in found.values():
        if len(sides) == 1:
            has, lacks = ("lora_A", "lora_B") if "A" in sides else ("lora_B", "lora_A")
            _refuse("unpaired", next(iter(sides.values())).name, f"is a {has} whose {lacks} is missing")
    return {module: _Pair(spelled[module], sides["A"], sides["B"]) for module, sides in sorted(found.items())}


def _module_of(spelled: str, base: BaseShape) -> str | None:
    """The base's name of a module: as it is, or as tools spell it that wrap or unwrap the language model."""
    inner = re.sub(r"^(?:model\.)?language_model\.(?:model\.)?", "", spelled)
    candidates = (spelled, f"model.{spelled}", f"model.{inner}", inner, f"model.language_model.{inner}")
    return next((name for name in candidates if name in base.linears), None)


def _nearest(spelled: str, base: BaseShape) -> str:
    """A hint: the layers that the base has, where only the layer's number is wrong."""
    numbers = [int(part) for part in re.findall(r"\.layers\.(\d+)\.", "".join(f".{name}" for name in base.linears))]
    match = re.search(r"\blayers\.(\d+)\.", spelled)
    if match and numbers and len(match[1]) < 9 and int(match[1]) > max(numbers):
        return f": it has {max(numbers) + 1} layers; was the adapter trained on another base?"
    return "; was the adapter trained on another base?"


def _check_targets(pairs: dict[str, _Pair], matcher: Matcher, base: BaseShape) -> None:
    for module, pair in pairs.items():
        if not matcher.targeted(module) and not matcher.targeted(pair.spelled):
            _refuse("not_targeted", pair.a.name, "is for a module that adapter_config.json does not target")
    wanted = [module for module in base.linears if matcher.targeted(module)]
    for module in wanted:
        if module not in pairs:
            raise AdapterError(
                f"adapter_config.json targets {module}, and {WEIGHTS} has no lora_A and lora_B for it; the file is "
                "not whole, or the adapter was trained on another base",
                code="missing_tensor",
                tensor=module,
            )
    if not pairs:
        raise AdapterError(
            f"adapter_config.json targets no linear of the base {base.model}",
            code="no_modules",
            tensor="target_modules",
        )


def _check_shapes(module: str, pair: _Pair, matcher: Matcher, base: BaseShape, limits: Limits) -> None:
    rank = matcher.rank(module)
    if rank > limits.max_rank:
        raise AdapterError(
            f"module {module} has rank {rank}, more than the {limits.max_rank} that this service takes; raise "
            "max_adapter_rank of the base",
            code="rank_too_high",
            tensor=pair.a.name,
        )
    outputs, inputs = base.linears[module]
    for entry, expected in ((pair.a, (rank, inputs)), (pair.b, (outputs, rank))):
        if entry.shape != expected:
            _refuse(
                "shape_mismatch",
                entry.name,
                f"has shape {list(entry.shape)}; rank {rank} on a linear of the base with {inputs} inputs and "
                f"{outputs} outputs needs {list(expected)}",
            )


def _read(file: SafetensorsFile, pairs: dict[str, _Pair], matcher: Matcher, path: Path) -> LoraAdapter:
    # What the configuration decides of the computation is each module's scaling; ranks are in the tensors' shapes.
    digest = ContentHash({"kind": "lora", "scaling": {module: matcher.scaling(module) for module in pairs}})
    modules: dict[str, LoraModule] = {}
    nbytes = parameters = 0
    for module, pair in pairs.items():
        tensors = []
        for side, entry in (("lora_A", pair.a), ("lora_B", pair.b)):
            data = file.read_bytes(entry)
            tensor = tensor_of(entry, data)
            check_finite(entry, tensor)
            digest.add(f"{module}.{side}", entry, data)
            tensors.append(tensor)
            nbytes += entry.nbytes
            parameters += entry.elements
        modules[module] = LoraModule(a=tensors[0], b=tensors[1], scaling=matcher.scaling(module))
    facts = AdapterFacts(
        kind="lora",
        path=str(path),
        content_hash=digest.hexdigest(),
        rank=max(module.rank for module in modules.values()),
        nbytes=nbytes,
        modules=tuple(modules),
        parameters=parameters,
    )
    return LoraAdapter(facts=facts, modules=modules)


def _refuse(code: str, tensor: str, what: str) -> NoReturn:
    raise AdapterError(f"tensor {shown(tensor)} {what}", code=code, tensor=tensor)
