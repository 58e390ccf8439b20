"""Adapters as folders, written by hand: valid ones with random weights, and a tiny mixture-of-experts base."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from signalbox.adapters.base_shape import base_shape

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def lora_config(**changes: Any) -> dict[str, Any]:
    """An `adapter_config.json` as peft writes it, of rank 4 on the attention's query and value."""
    config: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "bias": "none"}
    return config | {"target_modules": ["q_proj", "v_proj"], "use_rslora": False, "lora_dropout": 0.1} | changes


def lora_tensors(
    base: Path, *, targets: Iterable[str] = ("q_proj", "v_proj"), rank: int = 4, seed: int = 0, scale: float = 0.1
) -> dict[str, torch.Tensor]:
    """Random A and B for all linears of the base whose last name is one of `targets`, under peft's keys."""
    generator = torch.Generator().manual_seed(seed)
    wanted, tensors = set(targets), {}
    for name, (outputs, inputs) in base_shape(base).linears.items():
        if name.rpartition(".")[2] in wanted:
            key = f"base_model.model.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator) * scale
            tensors[f"{key}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator) * scale
    return tensors


def write_lora(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config or lora_config(), indent=2))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def make_lora(folder: Path, base: Path, *, seed: int = 0, scale: float = 0.1, rank: int = 4, **config: Any) -> Path:
    """A valid adapter of that rank on the attention's query and value."""
    return write_lora(folder, lora_tensors(base, rank=rank, seed=seed, scale=scale), lora_config(r=rank, **config))


def make_moe_base(folder: Path) -> Path:
    """config.json of a DeepSeek-V2-like model: layer 0 dense, layers 1 and 2 with eight routed experts. No weights."""
    from transformers import DeepseekV2Config

    DeepseekV2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        moe_intermediate_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
        kv_lora_rank=8,
        q_lora_rank=None,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
    ).save_pretrained(folder)
    return folder


ESFT_EXPERTS = {"1": [0, 5], "2": [3]}


def esft_tensors(base: Path, *, prefix: str = "model.", seed: int = 0) -> dict[str, torch.Tensor]:
    """Random bf16 weights of the experts in `ESFT_EXPERTS`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = base_shape(base).expert_linears
    return {
        f"{prefix}layers.{layer}.mlp.experts.{expert}.{projection}.weight": torch.randn(
            shape, generator=generator
        ).bfloat16()
        for layer, ids in ESFT_EXPERTS.items()
        for expert in ids
        for projection, shape in shapes.items()
    }


def write_esft(
    folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None, *, shards: int = 2
) -> Path:
    """Sharded as the ESFT repository does, the tensors dealt out in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"experts": ESFT_EXPERTS, "shared_experts": False, "non_expert_modules": False} | (config or {})
    (folder / "expert_cfg.json").write_text(json.dumps(config))
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {key: names[i % shards] for i, key in enumerate(tensors)}
    for name in names:
        save_file({key: tensors[key] for key in tensors if weight_map[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
