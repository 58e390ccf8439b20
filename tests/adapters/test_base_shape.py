"""The shape of a base, from its config.json alone, is that of the model which is loaded from it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from signalbox.adapters.base import AdapterError
from signalbox.adapters.base_shape import base_shape
from tests.tiny_models import save_tiny

SMALL = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_linears_of_the_loaded_model(kind: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / kind, kind)
    model = AutoModelForCausalLM.from_pretrained(folder)
    loaded = {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    shape = base_shape(folder)
    assert shape.linears == loaded and len(loaded) == 3 * 7 + 1
    assert shape.linears["model.layers.2.mlp.down_proj"] == (32, 64)
    assert not shape.experts and not shape.expert_linears


@pytest.mark.parametrize("family", ["Qwen2Config", "Qwen3Config"])
def test_dense_families(family: str, tmp_path: Path) -> None:
    getattr(transformers, family)(**SMALL).save_pretrained(tmp_path)
    linears = base_shape(tmp_path).linears
    assert set(linears) == {"lm_head"} | {
        f"model.layers.{layer}.{part}_proj"
        for layer in range(3)
        for part in (*(f"self_attn.{x}" for x in "qkvo"), "mlp.gate", "mlp.up", "mlp.down")
    }
    assert linears["model.layers.0.mlp.up_proj"] == (40, 24)


MIXTURES: dict[str, tuple[dict[str, Any], dict[int, int], int]] = {
    "DeepseekV2Config": (
        {"n_routed_experts": 6, "moe_intermediate_size": 10, "first_k_dense_replace": 1, "num_experts_per_tok": 2}
        | {"kv_lora_rank": 8, "q_lora_rank": None, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
        {1: 6, 2: 6},
        10,
    ),
    "Qwen3MoeConfig": ({"num_experts": 5, "moe_intermediate_size": 12, "decoder_sparse_step": 2}, {1: 5}, 12),
    "OlmoeConfig": ({"num_experts": 4, "num_experts_per_tok": 2}, {0: 4, 1: 4, 2: 4}, 40),
    "MixtralConfig": ({"num_local_experts": 3}, {0: 3, 1: 3, 2: 3}, 40),
    "GptOssConfig": ({"num_local_experts": 3}, {0: 3, 1: 3, 2: 3}, 40),  # its fused weights are transposed
}


@pytest.mark.parametrize("family", MIXTURES)
def test_mixtures_of_experts(family: str, tmp_path: Path) -> None:
    changes, experts, intermediate = MIXTURES[family]
    getattr(transformers, family)(**SMALL | changes).save_pretrained(tmp_path)
    shape = base_shape(tmp_path)
    assert shape.experts == experts
    assert shape.expert_linears == {
        "gate_proj": (intermediate, 24),
        "up_proj": (intermediate, 24),
        "down_proj": (24, intermediate),
    }
    assert not any(".experts." in name for name in shape.linears), "they are no linears of their own"


def test_remembered_until_the_file_changes(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "llama")
    first = base_shape(folder)
    assert base_shape(folder) is first
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    os.utime(folder / "config.json", ns=(1, 1))
    assert len(base_shape(folder).linears) == 8


@pytest.mark.parametrize(
    "text", [None, "no json", "[]", "{}", '{"model_type": "of_no_library"}', '{"model_type": "clip"}']
)
def test_no_base(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(AdapterError) as caught:
        base_shape(tmp_path)
    assert caught.value.code == "unknown_base" and str(tmp_path) in caught.value.message


def test_code_of_a_model_is_not_run(tmp_path: Path) -> None:
    """`auto_map` names Python files beside the configuration: they are never imported."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\nclass M: pass\n")
    names = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": names}))
    with pytest.raises(AdapterError):
        base_shape(tmp_path)
    assert not (tmp_path / "ran").exists()
