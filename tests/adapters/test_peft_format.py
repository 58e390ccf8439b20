"""LoRA adapters as peft itself writes them: what we read is what peft computes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from signalbox.adapters import peft_config
from signalbox.adapters.base import AdapterError, Limits
from signalbox.adapters.base_shape import base_shape
from signalbox.adapters.peft_format import read_lora
from signalbox.adapters.validate import validate
from tests.adapters.folders import lora_config, lora_tensors, make_lora, write_lora
from tests.tiny_models import save_tiny

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 8, "lora_alpha": 16, "use_rslora": True, "target_modules": ["q_proj", "o_proj"]},
    "all-linear": {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"},
    "rank_pattern": {
        "r": 4,
        "target_modules": "all-linear",
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 6, r"^model\.layers\.[02]\.mlp\.up_proj": 1},
    },
    "alpha_pattern": {
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "target_modules": "all-linear",
        "alpha_pattern": {"q_proj": 32, r".*layers\.0.*": 1, "mlp.up.proj": 0.5},
        "rank_pattern": {"q_proj": 2, "self_attn.q_proj": 3},
    },
    "expression": {"r": 4, "target_modules": r"model\.layers\.(0|2)\..*(q|down)_proj"},
    "layers": {"r": 4, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "one_layer": {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    "excluded": {"r": 4, "target_modules": "all-linear", "exclude_modules": ["o_proj", "layers.1.mlp.up_proj"]},
    "whole_names": {"r": 4, "target_modules": ["model.layers.0.mlp.gate_proj", "v_proj", "of_no_model"]},
    "gaussian": {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
}


def by_peft(base: Path, folder: Path, **config: Any) -> dict[str, torch.Tensor]:
    """Save an adapter with random weights; returns what merging it adds to each parameter of the base.

    Merged by peft after loading: where several patterns fit a module, saving sorts them, and another may come first.
    """
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{"init_lora_weights": False} | config))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zero to begin with in some initialisations
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder)
    merged = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).merge_and_unload()
    return {name: parameter.detach() - before[name] for name, parameter in merged.named_parameters()}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_what_is_read_is_what_peft_merges(name: str, kind: str, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", kind)
    added = by_peft(base, tmp_path / "adapter", **CONFIGS[name])
    adapter = read_lora(tmp_path / "adapter", base_shape(base), Limits((tmp_path,)))
    assert adapter.facts.modules == tuple(sorted(adapter.modules))
    changed = {name.removesuffix(".weight") for name, delta in added.items() if delta.abs().max() > 0}
    assert changed == set(adapter.modules), "no module more and none less"
    for module, lora in adapter.modules.items():
        delta = lora.scaling * lora.b @ lora.a
        assert torch.allclose(delta, added[f"{module}.weight"], atol=2e-6), module
    assert adapter.facts.rank == max(lora.rank for lora in adapter.modules.values())
    assert adapter.facts.parameters * 4 == adapter.facts.nbytes
    assert adapter.facts == validate(tmp_path / "adapter", base_shape(base), Limits((tmp_path,)))


@pytest.mark.parametrize("name", CONFIGS)
def test_modules_and_ranks_by_pefts_own_functions(name: str, tmp_path: Path) -> None:
    """On a mixture of names that no single model has."""
    pytest.importorskip("peft")
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    raw = CONFIGS[name]
    if raw["target_modules"] == "all-linear":
        raw = raw | {"target_modules": ["q_proj", "mlp.up_proj", "model.layers.0.self_attn.o_proj"]}
    theirs = LoraConfig(**raw)
    ours = peft_config.Matcher(peft_config.parse({"peft_type": "LORA", "lora_alpha": 8} | raw))
    names = [
        f"{prefix}{layers}.{layer}.{part}"
        for prefix in ("", "model.", "model.language_model.", "xmodel.")
        for layers in ("layers", "h", "experts.3.layers")
        for layer in (0, 1, 2, 10)
        for part in ("self_attn.q_proj", "mlp.up_proj", "mlp.xup_proj", "mlp.upxproj", "self_attn.o_proj", "q_proj.x")
    ]
    for module in [*names, "q_proj", "lm_head"]:
        assert ours.targeted(module) is bool(check_target_module_exists(theirs, module)), module
        rank = theirs.rank_pattern.get(get_pattern_key(theirs.rank_pattern.keys(), module), theirs.r)
        alpha = theirs.alpha_pattern.get(get_pattern_key(theirs.alpha_pattern.keys(), module), theirs.lora_alpha)
        assert ours.rank(module) == rank, module
        assert ours.scaling(module) == pytest.approx(alpha / (rank**0.5 if theirs.use_rslora else rank)), module


SPELLINGS = {
    "old peft's": lambda key: key.replace(".weight", ".default.weight"),
    "without the wrapper": lambda key: key.removeprefix("base_model.model."),
    "without model": lambda key: key.replace("base_model.model.model.", "base_model.model."),
    "compiled": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    "sharded": lambda key: key.replace("self_attn.", "_fsdp_wrapped_module.self_attn."),
    "of a model that also sees": lambda key: key.replace("model.layers", "model.language_model.layers"),
    "of one that saw before": lambda key: key.replace("model.model.layers", "model.language_model.model.layers"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_other_spellings_of_the_same_adapter(spelling: str, base: Path, root: Path, limits: Limits) -> None:
    tensors = lora_tensors(base)
    spelled = {SPELLINGS[spelling](key): tensor for key, tensor in tensors.items()}
    assert not set(spelled) & set(tensors)
    plain = read_lora(write_lora(root / "plain", tensors), base_shape(base), limits)
    other = read_lora(write_lora(root / "other", spelled), base_shape(base), limits)
    assert other.facts.content_hash == plain.facts.content_hash and other.facts.modules == plain.facts.modules


def test_hash_is_of_the_content(base: Path, root: Path, limits: Limits) -> None:
    tensors, shape = lora_tensors(base), base_shape(base)

    def digest(name: str, tensors: dict[str, torch.Tensor], **config: Any) -> str:
        return validate(write_lora(root / name, tensors, lora_config(**config)), shape, limits).content_hash

    first = digest("first", tensors)
    reversed_order = dict(reversed(tensors.items()))
    assert (
        digest("again", reversed_order, lora_dropout=0.5, of_a_newer_peft={"x": 1}, target_modules=r".*[qv]_proj")
        == first
    )
    assert digest("alpha", tensors, lora_alpha=9) != first
    assert digest("pattern", tensors, alpha_pattern={"layers.1.self_attn.q_proj": 1}) != first
    assert digest("half", {key: tensor.half() for key, tensor in tensors.items()}) != first
    changed = {key: tensor.clone() for key, tensor in tensors.items()}
    next(iter(changed.values()))[0, 0] += 1e-3
    assert digest("value", changed) != first
    swapped = dict(zip(tensors, [*list(tensors.values())[2:4], *list(tensors.values())[:2]], strict=False))
    if all(swapped[key].shape == tensors[key].shape for key in swapped):
        assert digest("swapped", tensors | swapped) != first


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_are_kept(dtype: torch.dtype, base: Path, root: Path, limits: Limits) -> None:
    tensors = {key: tensor.to(dtype) for key, tensor in lora_tensors(base).items()}
    adapter = read_lora(write_lora(root / "adapter", tensors), base_shape(base), limits)
    module = adapter.modules["model.layers.0.self_attn.q_proj"]
    assert module.a.dtype == module.b.dtype == dtype
    assert torch.equal(module.a, tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"])


def test_tensors_outlive_the_files(base: Path, root: Path, limits: Limits) -> None:
    """What was checked is what is used: nothing is mapped from a file that may change or shrink afterwards."""
    folder = make_lora(root / "adapter", base)
    module = read_lora(folder, base_shape(base), limits).modules["model.layers.0.self_attn.q_proj"]
    before = module.a.clone()
    with (folder / "adapter_model.safetensors").open("r+b") as file:
        file.write(b"\xff" * 4000)
        file.truncate(100)
    assert torch.equal(module.a, before)


def test_five_megabytes_are_quick(root: Path, limits: Limits) -> None:
    base = root / "base"
    LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3
    ).save_pretrained(base)
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    tensors = lora_tensors(base, targets=targets, rank=4)
    config = lora_config(target_modules=list(targets))
    folder = write_lora(root / "adapter", tensors, config)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        facts = validate(folder, base_shape(base), limits)
        seconds.append(time.perf_counter() - started)
    assert len(facts.modules) == 210 and 4e6 < facts.nbytes < 6e6
    assert min(seconds) < 0.15, "some 30 ms on two idle cores"


# Hypothesis: damaged files


@pytest.fixture(scope="module")
def valid(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("flipped")
    return write_lora(root / "adapter", lora_tensors(base), lora_config(rank_pattern={r"q_pro.$": 4}))


FILES = st.sampled_from(["adapter_config.json", "adapter_model.safetensors"])


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    file=FILES,
    flips=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=4),
    header=st.booleans(),
)
def test_flipped_bytes_are_noticed_or_harmless(
    file: str, flips: list[tuple[float, int]], header: bool, valid: Path, base: Path
) -> None:
    """Damage gives an AdapterError, or another hash, or exactly the same adapter: nothing else, and never NaN."""
    limits, shape = Limits((valid.parent,)), base_shape(base)
    before = read_lora(valid, shape, limits)
    original = (valid / file).read_bytes()
    damaged = bytearray(original)
    reach = min(len(damaged), 2000) if header else len(damaged)
    for where, mask in flips:
        damaged[min(int(where * reach), reach - 1)] ^= mask
    (valid / file).write_bytes(damaged)
    try:
        after = read_lora(valid, shape, limits)
    except AdapterError as error:
        assert error.code and len(error.message) < 1000 and error.message.isprintable()
        return
    finally:
        (valid / file).write_bytes(original)
    assert all(lora.a.isfinite().all() and lora.b.isfinite().all() for lora in after.modules.values())
    if after.facts.content_hash == before.facts.content_hash:
        assert list(after.modules) == list(before.modules)
        for name, lora in after.modules.items():
            assert lora.scaling == before.modules[name].scaling
            assert torch.equal(lora.a, before.modules[name].a) and torch.equal(lora.b, before.modules[name].b)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300), length=st.integers(0, 400))
def test_any_bytes_for_weights(data: bytes, length: int, valid: Path, base: Path) -> None:
    original = (valid / "adapter_model.safetensors").read_bytes()
    (valid / "adapter_model.safetensors").write_bytes(length.to_bytes(8, "little") + data)
    try:
        with pytest.raises(AdapterError):
            read_lora(valid, base_shape(base), Limits((valid.parent,)))
    finally:
        (valid / "adapter_model.safetensors").write_bytes(original)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from(
    [
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "bias",
        "init_lora_weights",
        "modules_to_save",
        "use_dora",
    ]
)


@settings(max_examples=400, deadline=None)
@given(changes=st.dictionaries(KEYS, JSON, min_size=1, max_size=3))
def test_any_value_in_the_configuration(changes: dict[str, Any]) -> None:
    """Any JSON in any key is refused by an AdapterError that names a key, or understood."""
    text = json.dumps(lora_config() | changes)  # as peft would write it, NaN included
    try:
        matcher = peft_config.Matcher(peft_config.parse(json.loads(text)))
        assert matcher.targeted("model.layers.0.self_attn.q_proj") in (True, False)
        assert matcher.rank("model.layers.0.self_attn.q_proj") >= 1
        assert abs(matcher.scaling("q_proj")) < 1e9
    except AdapterError as error:
        assert error.tensor and error.tensor in error.message


def test_peft_reads_what_we_write(base: Path, root: Path) -> None:
    """The tests' own folders are what peft takes for an adapter."""
    peft = pytest.importorskip("peft")
    folder = make_lora(root / "adapter", base)
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    state = peft.get_peft_model_state_dict(model)
    ours = load_file(folder / "adapter_model.safetensors")
    assert set(state) == set(ours) and all(torch.equal(state[key], ours[key]) for key in ours)


def test_one_file_may_hold_many_sizes(base: Path, root: Path, limits: Limits) -> None:
    """An odd header length puts the data at odd addresses."""
    folder = make_lora(root / "adapter", base)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for padding in range(1, 9):
        save_file(tensors, file, metadata={"x": "y" * padding})
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = data[8 : 8 + length].rstrip() + b" " * (padding % 4)
        file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
        assert validate(folder, base_shape(base), limits).rank == 4
