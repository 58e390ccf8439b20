"""The table of broken adapters: each a way in which a folder can be wrong, and what must be said about it.

`BROKEN` maps a name to a builder, which gets the base's folder and a path below an allowed root, fills a folder there
and returns the path to submit. The error must have the `code` and the `tensor` (or configuration key), and its message
must contain `mentions`.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.adapters.folders import esft_tensors, lora_config, lora_tensors, make_lora, write_esft, write_lora

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
INDEX = "model.safetensors.index.json"
ATTENTION = "base_model.model.model.layers.0.self_attn"
A, B = f"{ATTENTION}.q_proj.lora_A.weight", f"{ATTENTION}.q_proj.lora_B.weight"
LAYER_1 = A.replace("layers.0", "layers.1")
SLOW = "(?:" * 12 + ".{0,9}" + "){0,400}" * 12
EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"

Build = Callable[[Path, Path], Path]


@dataclass(frozen=True)
class Broken:
    """`moe` cases need a mixture-of-experts base (`make_moe_base`); all others any Llama-like one."""

    build: Build
    code: str
    tensor: str | None
    mentions: str
    moe: bool = False


BROKEN: dict[str, Broken] = {}


def case(code: str, tensor: str | None, mentions: str = "", *, moe: bool = False) -> Callable[[Build], Build]:
    """Registers a builder under its own name."""

    def register(build: Build) -> Build:
        BROKEN[build.__name__] = Broken(build, code, tensor, mentions or tensor or "", moe)
        return build

    return register


def rewrite(file: Path, change: Callable[[bytes], bytes]) -> Path:
    """Change a file's bytes; returns its folder."""
    before = file.read_bytes()
    after = change(before)
    assert after != before, "the case would test a valid adapter"
    file.write_bytes(after)
    return file.parent


def reheader(file: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Change the header of a safetensors file, its data staying as it is; returns its folder."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return rewrite(file, lambda _: struct.pack("<Q", len(text)) + text + data[8 + length :])


# A valid adapter but for keys of its configuration: (name, code, key at fault, in the message, the keys)

_CONFIGS: list[tuple[str, str, str, str, dict[str, Any]]] = [
    ("peft_type_missing", "unsupported", "peft_type", "only LORA", {"peft_type": None}),
    ("another_peft_type", "unsupported", "peft_type", "IA3", {"peft_type": "IA3"}),
    ("rank_zero", "bad_rank", "r", "from 1 on", {"r": 0}),
    ("rank_negative", "bad_rank", "r", "from 1 on", {"r": -4}),
    ("rank_is_text", "bad_rank", "r", "'4'", {"r": "4"}),
    ("rank_is_a_truth_value", "bad_rank", "r", "True", {"r": True}),
    ("alpha_missing", "bad_config", "lora_alpha", "", {"lora_alpha": None}),
    ("alpha_is_text", "bad_config", "lora_alpha", "'16'", {"lora_alpha": "16"}),
    ("alpha_is_huge", "bad_config", "lora_alpha", "", {"lora_alpha": 10**300}),
    ("rslora_is_text", "bad_config", "use_rslora", "true or false", {"use_rslora": "yes"}),
    ("rank_pattern_zero", "bad_rank", "rank_pattern", "", {"rank_pattern": {"q_proj": 0}}),
    ("rank_pattern_a_list", "bad_config", "rank_pattern", "", {"rank_pattern": ["q_proj"]}),
    ("rank_pattern_differs", "shape_mismatch", A, "rank 8", {"rank_pattern": {"layers.0.self_attn.q_proj": 8}}),
    ("rank_pattern_refers_back", "bad_config", "rank_pattern", "groupref", {"rank_pattern": {"(?P<x>q)(?P=x)": 2}}),
    ("alpha_pattern_not_finite", "bad_config", "alpha_pattern", "finite", {"alpha_pattern": {"q_proj": 1e300}}),
    ("dora", "unsupported", "use_dora", "DoRA", {"use_dora": True}),
    ("modules_to_save", "unsupported", "modules_to_save", "", {"modules_to_save": ["lm_head"]}),
    ("bias_trained", "unsupported", "bias", "", {"bias": "all"}),
    ("lora_bias", "unsupported", "lora_bias", "", {"lora_bias": True}),
    ("fan_in_fan_out", "unsupported", "fan_in_fan_out", "Conv1D", {"fan_in_fan_out": True}),
    ("trainable_tokens", "unsupported", "trainable_token_indices", "", {"trainable_token_indices": [1, 2]}),
    ("pissa", "unsupported", "init_lora_weights", "pissa", {"init_lora_weights": "pissa_niter_16"}),
    ("olora", "unsupported", "init_lora_weights", "olora", {"init_lora_weights": "olora"}),
    ("loftq", "unsupported", "loftq_config", "", {"loftq_config": {"loftq_bits": 4}}),
    ("alora", "unsupported", "alora_invocation_tokens", "", {"alora_invocation_tokens": [5, 6]}),
    ("layer_replication", "unsupported", "layer_replication", "", {"layer_replication": [[0, 2], [1, 3]]}),
    ("megatron", "unsupported", "megatron_config", "", {"megatron_config": {"tp": 2}}),
    ("target_parameters", "unsupported", "target_parameters", "", {"target_parameters": ["experts.down_proj"]}),
    ("targets_missing", "bad_config", "target_modules", "", {"target_modules": None}),
    ("targets_a_number", "bad_config", "target_modules", "", {"target_modules": 7}),
    ("targets_no_expression", "bad_config", "target_modules", "no regular", {"target_modules": "(q_proj"}),
    ("targets_explode", "not_targeted", A, "does not target", {"target_modules": r"((\w|\.|_)+)+!"}),
    (
        "targets_take_for_ever",
        "bad_config",
        "target_modules",
        "too long",
        {"target_modules": SLOW},
    ),
    ("targets_endless", "bad_config", "target_modules", "characters", {"target_modules": "q" * 5000}),
    ("targets_of_another_family", "not_targeted", A, "does not target", {"target_modules": ["c_attn"]}),
    ("tensors_not_targeted", "not_targeted", A, "does not target", {"target_modules": ["v_proj"]}),
    ("tensors_excluded", "not_targeted", A, "does not target", {"exclude_modules": ["layers.0.self_attn.q_proj"]}),
    ("layers_left_out", "not_targeted", LAYER_1, "does not target", {"layers_to_transform": [0]}),
    ("layers_as_text", "bad_config", "layers_to_transform", "", {"layers_to_transform": ["0"]}),
    (
        "layers_beside_a_pattern",
        "bad_config",
        "layers_to_transform",
        "a list, not a pattern",
        {"layers_to_transform": [0], "target_modules": ".*[qv]_proj"},
    ),
    (
        "target_without_tensors",
        "missing_tensor",
        "model.layers.0.self_attn.k_proj",
        "not whole",
        {"target_modules": ["q_proj", "k_proj", "v_proj"]},
    ),
]


def _configured(changes: dict[str, Any]) -> Build:
    return lambda base, folder: write_lora(folder, lora_tensors(base), lora_config(**changes))


for _name, _code, _key, _mentions, _changes in _CONFIGS:
    BROKEN[_name] = Broken(_configured(_changes), _code, _key, _mentions or _key)


# A valid adapter but for its tensors: (name, code, tensor at fault, in the message, the tensors; None takes one away)

_TENSORS: list[tuple[str, str, str, str, dict[str, Callable[[torch.Tensor], torch.Tensor] | None]]] = [
    ("a_without_b", "unpaired", A, "lora_B is missing", {B: None}),
    ("b_without_a", "unpaired", B, "lora_A is missing", {A: None}),
    ("a_for_another_base", "shape_mismatch", A, "inputs", {A: lambda a: torch.zeros(4, 99)}),
    ("b_for_another_base", "shape_mismatch", B, "outputs", {B: lambda a: torch.zeros(99, 4)}),
    ("a_transposed", "shape_mismatch", A, "needs [4, ", {A: lambda a: a.T.contiguous()}),
    ("a_of_another_rank", "shape_mismatch", A, "rank 4", {A: lambda a: a[:2].contiguous()}),
    ("a_of_three_dimensions", "shape_mismatch", A, "shape [1, 4", {A: lambda a: a[None]}),
    ("a_empty", "zero_size", A, "empty", {A: lambda a: a[:0]}),
    ("a_of_integers", "dtype", A, "'I8'", {A: lambda a: a.to(torch.int8)}),
    ("a_of_doubles", "dtype", A, "'F64'", {A: lambda a: a.double()}),
    ("a_of_eight_bits", "dtype", A, "'F8_E4M3'", {A: lambda a: a.to(torch.float8_e4m3fn)}),
    ("a_with_nan", "not_finite", A, "1 of", {A: lambda a: a.index_fill(1, torch.tensor([0]), 0).clone()}),
    ("b_with_infinities", "not_finite", B, "4 infinite", {B: lambda b: b.clone()}),
    ("b_with_nan_in_half", "not_finite", B, "NaN", {B: lambda b: b.half()}),
    ("layer_99", "unknown_module", A.replace("layers.0", "layers.99"), "layers", {}),
    ("module_of_another_family", "unknown_module", A.replace("q_proj", "c_attn"), "does not have", {}),
    ("dora_magnitudes", "unsupported", f"{ATTENTION}.q_proj.lora_magnitude_vector.weight", "DoRA", {}),
    ("embedding", "unsupported", "base_model.model.model.embed_tokens.lora_embedding_A", "embedding", {}),
    ("whole_output_layer", "unsupported", "base_model.model.lm_head.weight", "output layer", {}),
    ("bias_of_b", "unsupported", f"{ATTENTION}.q_proj.lora_B.bias", "bias", {}),
    ("unknown_tensor", "unknown_tensor", "optimizer.step", "lora_A", {}),
    ("same_module_twice", "duplicate_tensor", A.removeprefix("base_model.model."), "twice", {}),
]


def _damaged(name: str, key: str, changes: dict[str, Any]) -> Build:
    def build(base: Path, folder: Path) -> Path:
        tensors = lora_tensors(base)
        for changed, change in changes.items():
            if change is None:
                del tensors[changed]
            else:
                tensors[changed] = change(tensors[changed])
        if not changes:  # the case is a tensor more
            tensors[key] = torch.ones(4, tensors[A].shape[1])
        if "nan" in name:
            tensors[key].view(-1)[3] = float("nan")
        if "infinities" in name:
            tensors[key][1] = float("inf")
        return write_lora(folder, tensors)

    return build


for _name, _code, _key, _mentions, _changes in _TENSORS:
    BROKEN[_name] = Broken(_damaged(_name, _key, _changes), _code, _key, _mentions)


@case("rank_too_high", A, "rank 600")
def rank_too_high(base: Path, folder: Path) -> Path:
    return make_lora(folder, base, rank=600)


@case("unknown_tensor", A, "another adapter")
def two_adapters_in_one_file(base: Path, folder: Path) -> Path:
    tensors = lora_tensors(base)
    return write_lora(folder, tensors | {A.replace(".weight", ".other.weight"): tensors[A].clone()})


@case("no_modules", "target_modules", "no linear")
def no_tensors_at_all(base: Path, folder: Path) -> Path:
    return write_lora(folder, {}, lora_config(target_modules=["c_attn"]))


# Files: the configuration


@case("missing_file", CONFIG)
def config_missing(base: Path, folder: Path) -> Path:
    (make_lora(folder, base) / CONFIG).unlink()
    return folder


@case("ambiguous", None, "expert_cfg.json")
def two_kinds_at_once(base: Path, folder: Path) -> Path:
    (make_lora(folder, base) / "expert_cfg.json").write_text("{}")
    return folder


@case("bad_json", CONFIG)
def config_cut_short(base: Path, folder: Path) -> Path:
    return rewrite(make_lora(folder, base) / CONFIG, lambda data: data[:-20])


@case("bad_json", CONFIG, "not a JSON object")
def config_a_list(base: Path, folder: Path) -> Path:
    return rewrite(make_lora(folder, base) / CONFIG, lambda data: b"[" + data + b"]")


@case("bad_json", CONFIG)
def config_nested_endlessly(base: Path, folder: Path) -> Path:
    deep = b', "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    return rewrite(make_lora(folder, base) / CONFIG, lambda data: data[:-1] + deep)


@case("bad_json", CONFIG, "16 levels")
def config_nested_deeply(base: Path, folder: Path) -> Path:
    deep = b', "x": ' + b"[" * 40 + b"]" * 40 + b"}"
    return rewrite(make_lora(folder, base) / CONFIG, lambda data: data[:-1] + deep)


@case("bad_json", "r", "twice")
def config_says_the_rank_twice(base: Path, folder: Path) -> Path:
    return rewrite(make_lora(folder, base) / CONFIG, lambda data: data[:-2] + b', "r": 8}')


@case("bad_json", CONFIG)
def config_with_nan(base: Path, folder: Path) -> Path:
    return rewrite(make_lora(folder, base) / CONFIG, lambda data: data.replace(b'alpha": 8', b'alpha": NaN'))


@case("bad_json", CONFIG)
def config_not_utf8(base: Path, folder: Path) -> Path:
    return rewrite(make_lora(folder, base) / CONFIG, lambda data: data.replace(b"CAUSAL", b"\xff\xfe"))


@case("too_large", CONFIG, "bytes")
def config_of_five_megabytes(base: Path, folder: Path) -> Path:
    return rewrite(make_lora(folder, base) / CONFIG, lambda data: data + b" " * (5 << 20))


# Files: the weights


@case("missing_file", WEIGHTS)
def weights_missing(base: Path, folder: Path) -> Path:
    (make_lora(folder, base) / WEIGHTS).unlink()
    return folder


@case("unsafe_format", "adapter_model.bin", "convert it to safetensors")
def weights_pickled(base: Path, folder: Path) -> Path:
    (make_lora(folder, base) / WEIGHTS).unlink()
    torch.save(lora_tensors(base), folder / "adapter_model.bin")
    return folder


@case("bad_safetensors", WEIGHTS)
def pickle_under_the_name_of_safetensors(base: Path, folder: Path) -> Path:
    return rewrite(make_lora(folder, base) / WEIGHTS, lambda _: pickle.dumps({"harmless": list(range(99))}))


@case("bad_safetensors", WEIGHTS, "0 bytes")
def weights_empty(base: Path, folder: Path) -> Path:
    return rewrite(make_lora(folder, base) / WEIGHTS, lambda _: b"")


@case("bad_safetensors", WEIGHTS, "cut short")
def weights_cut_short(base: Path, folder: Path) -> Path:
    return rewrite(make_lora(folder, base) / WEIGHTS, lambda data: data[:-7])


@case("bad_safetensors", WEIGHTS, "padded")
def weights_padded(base: Path, folder: Path) -> Path:
    return rewrite(make_lora(folder, base) / WEIGHTS, lambda data: data + b"MZ" * 50)


@case("bad_safetensors", WEIGHTS, "header claims")
def header_longer_than_the_file(base: Path, folder: Path) -> Path:
    return rewrite(make_lora(folder, base) / WEIGHTS, lambda data: struct.pack("<Q", 1 << 62) + data[8:])


@case("bad_safetensors", WEIGHTS, "JSON")
def header_no_json(base: Path, folder: Path) -> Path:
    return rewrite(make_lora(folder, base) / WEIGHTS, lambda data: data[:8] + b"}" + data[9:])


@case("bad_safetensors", A, "twice")
def header_names_a_tensor_twice(base: Path, folder: Path) -> Path:
    return rewrite(make_lora(folder, base) / WEIGHTS, lambda data: data.replace(B.encode(), A.encode()))


@case("dtype", A, "'F4'")
def header_of_unknown_dtype(base: Path, folder: Path) -> Path:
    return reheader(make_lora(folder, base) / WEIGHTS, lambda header: header[A].update(dtype="F4"))


@case("bad_safetensors", B, "overlaps")
def tensors_overlap(base: Path, folder: Path) -> Path:
    def move(header: dict[str, Any]) -> None:
        start, end = header[B]["data_offsets"]
        header[B]["data_offsets"] = [start - 4, end - 4]

    return reheader(make_lora(folder, base) / WEIGHTS, move)


@case("bad_safetensors", LAYER_1, "gap")
def gap_between_tensors(base: Path, folder: Path) -> Path:
    def drop(header: dict[str, Any]) -> None:
        for part in ("v_proj.lora_A", "v_proj.lora_B"):
            del header[f"{ATTENTION}.{part}.weight"]

    return reheader(make_lora(folder, base) / WEIGHTS, drop)


@case("bad_safetensors", A, "whole numbers")
def negative_shape(base: Path, folder: Path) -> Path:
    return reheader(make_lora(folder, base) / WEIGHTS, lambda header: header[A].update(shape=[-4, -32]))


@case("bad_safetensors", A, "does not take the bytes")
def shape_of_terabytes(base: Path, folder: Path) -> Path:
    return reheader(make_lora(folder, base) / WEIGHTS, lambda header: header[A].update(shape=[1 << 40, 32]))


@case("bad_safetensors", A, "data_offsets")
def tensor_without_offsets(base: Path, folder: Path) -> Path:
    return reheader(make_lora(folder, base) / WEIGHTS, lambda header: header[A].pop("data_offsets"))


@case("too_large", WEIGHTS, "raise the limit")
def weights_of_nine_gigabytes(base: Path, folder: Path) -> Path:
    os.truncate(make_lora(folder, base) / WEIGHTS, 9 << 30)  # sparse: it takes no space
    return folder


# Places


@case("outside_roots", None, "outside")
def folder_outside_the_roots(base: Path, folder: Path) -> Path:
    return base


@case("outside_roots", None, "'..'")
def folder_with_dots(base: Path, folder: Path) -> Path:
    return make_lora(folder, base) / ".." / folder.name


@case("outside_roots", None, "link that leads outside")
def folder_linked_outside(base: Path, folder: Path) -> Path:
    folder.symlink_to(base)
    return folder


@case("outside_roots", None, "link that leads outside")
def weights_linked_outside(base: Path, folder: Path) -> Path:
    (make_lora(folder, base) / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(base / "model.safetensors")
    return folder


@case("outside_roots", None, "link that leads outside")
def config_linked_outside(base: Path, folder: Path) -> Path:
    (make_lora(folder, base) / CONFIG).unlink()
    (folder / CONFIG).symlink_to("/etc/passwd")
    return folder


@case("not_a_file", WEIGHTS, "regular")
def weights_a_fifo(base: Path, folder: Path) -> Path:
    (make_lora(folder, base) / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)
    return folder


@case("not_a_file", WEIGHTS, "regular")
def weights_a_folder(base: Path, folder: Path) -> Path:
    (make_lora(folder, base) / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()
    return folder


@case("unreadable", WEIGHTS)
def weights_linked_to_themselves(base: Path, folder: Path) -> Path:
    (make_lora(folder, base) / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(WEIGHTS)
    return folder


@case("not_found", None, "no adapter at")
def folder_not_there(base: Path, folder: Path) -> Path:
    return folder / "nowhere"


@case("not_a_folder", None, "not a folder")
def a_file_in_place_of_the_folder(base: Path, folder: Path) -> Path:
    return make_lora(folder, base) / WEIGHTS


# ESFT: retrained experts


@case("unknown_module", "experts", "no routed experts")
def esft_on_a_dense_base(base: Path, folder: Path) -> Path:
    key = "model.layers.1.mlp.experts.0.up_proj.weight"
    return write_esft(folder, {key: torch.zeros(8, 16)}, {"experts": {"1": [0]}}, shards=1)


_EXPERTS: list[tuple[str, str, str, str, dict[str, Any]]] = [
    ("esft_shared_experts", "unsupported", "shared_experts", "every token", {"shared_experts": True}),
    ("esft_other_modules", "unsupported", "non_expert_modules", "base itself", {"non_expert_modules": True}),
    ("esft_flag_a_number", "bad_config", "shared_experts", "true or false", {"shared_experts": 1}),
    ("esft_experts_missing", "bad_config", "experts", "no map", {"experts": None}),
    ("esft_no_experts", "no_experts", "experts", "changes nothing", {"experts": {"1": [], "2": []}}),
    ("esft_expert_99", "bad_config", "experts", "0 to 7", {"experts": {"1": [0, 99]}}),
    ("esft_expert_twice", "bad_config", "experts", "twice", {"experts": {"1": [0, 0]}}),
    ("esft_dense_layer", "bad_config", "experts", "layer '0'", {"experts": {"0": [1]}}),
    ("esft_expert_not_named", "not_targeted", EXPERT, "name", {"experts": {"1": [0], "2": [3]}}),
    (
        "esft_expert_without_tensors",
        "missing_tensor",
        EXPERT.replace("5.up", "7.gate"),
        "names its expert",
        {"experts": {"1": [0, 5, 7], "2": [3]}},
    ),
]


def _esft(changes: dict[str, Any]) -> Build:
    return lambda base, folder: write_esft(folder, esft_tensors(base), changes)


for _name, _code, _key, _mentions, _changes in _EXPERTS:
    BROKEN[_name] = Broken(_esft(_changes), _code, _key, _mentions, moe=True)


@case("not_finite", EXPERT, "NaN", moe=True)
def esft_with_nan(base: Path, folder: Path) -> Path:
    tensors = esft_tensors(base)
    tensors[EXPERT][0, 0] = float("nan")
    return write_esft(folder, tensors)


@case("shape_mismatch", EXPERT, "the base needs [8, 16]", moe=True)
def esft_of_another_shape(base: Path, folder: Path) -> Path:
    return write_esft(folder, esft_tensors(base) | {EXPERT: torch.zeros(8, 17)})


@case("unknown_tensor", "model.layers.1.mlp.gate.weight", "no gate_proj, up_proj or down_proj", moe=True)
def esft_with_a_router(base: Path, folder: Path) -> Path:
    return write_esft(folder, esft_tensors(base) | {"model.layers.1.mlp.gate.weight": torch.zeros(8, 16)})


@case("duplicate_tensor", EXPERT, "twice", moe=True)
def esft_in_both_spellings(base: Path, folder: Path) -> Path:
    return write_esft(folder, esft_tensors(base) | {EXPERT.removeprefix("model."): torch.zeros(8, 16)}, shards=1)


@case("bad_index", EXPERT, "no safetensors file of the folder", moe=True)
def esft_index_leads_outside(base: Path, folder: Path) -> Path:
    write_esft(folder, esft_tensors(base))
    index = json.loads((folder / INDEX).read_bytes())
    index["weight_map"][EXPERT] = "../../secret.safetensors"
    return rewrite(folder / INDEX, lambda _: json.dumps(index).encode())


@case("bad_index", "weight_map", moe=True)
def esft_index_without_a_map(base: Path, folder: Path) -> Path:
    return rewrite(write_esft(folder, esft_tensors(base)) / INDEX, lambda _: b'{"metadata": {}}')


@case("missing_file", "model-00002-of-00002.safetensors", moe=True)
def esft_shard_missing(base: Path, folder: Path) -> Path:
    (write_esft(folder, esft_tensors(base)) / "model-00002-of-00002.safetensors").unlink()
    return folder


@case("missing_tensor", "model.layers.1.mlp.experts.0.down_proj.weight", "places it", moe=True)
def esft_shard_exchanged(base: Path, folder: Path) -> Path:
    other = write_esft(folder, esft_tensors(base)) / "model-00001-of-00002.safetensors"
    save_file({EXPERT: esft_tensors(base)[EXPERT]}, other)
    return folder


@case("unsafe_format", "pytorch_model-00001-of-00002.bin", "convert it to safetensors", moe=True)
def esft_pickled(base: Path, folder: Path) -> Path:
    for file in write_esft(folder, esft_tensors(base)).glob("model*"):
        file.unlink()
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(pickle.dumps({}))
    return folder
