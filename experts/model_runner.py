"""The model itself: weights, tokenizer, and one packed forward pass."""

from __future__ import annotations

import os
from collections.abc import Sequence as Seq
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from signalbox.adapters.layers import LoraLayers
from signalbox.experts.base import ExpertUnavailable
from signalbox.experts.packed_batch import ATTENTION, KVCache, PackedBatch, packed_attention
from signalbox.experts.prompts import PromptEncoder


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it (GPUs, CPUs with AVX512-BF16 or AMX), else float32."""
    if device.type == "cuda":
        return torch.bfloat16
    flags = Path("/proc/cpuinfo")
    known = flags.read_text() if flags.exists() else ""
    return torch.bfloat16 if "avx512_bf16" in known or "amx_bf16" in known else torch.float32


class ModelRunner(PromptEncoder):
    """Weights and tokenizer of one model, on one device.

    `lora` are the linears' slots for adapters, None where there are to be none.
    """

    def __init__(
        self,
        path: Path,
        *,
        device: str,
        dtype: str,
        threads: int | None,
        chat_template: str | None,
        max_adapters: int = 0,
        max_adapter_rank: int = 16,
    ) -> None:
        from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        if threads or device == "cpu" or not torch.cuda.is_available():
            torch.set_num_threads(threads or os.cpu_count() or 1)
        self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        self.dtype = best_dtype(self.device) if dtype == "auto" else getattr(torch, dtype)
        AttentionInterface.register(ATTENTION, packed_attention)
        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
            self.model = AutoModelForCausalLM.from_pretrained(
                path, dtype=self.dtype, attn_implementation=ATTENTION, use_safetensors=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ExpertUnavailable(f"cannot load the model in {path}: {error}") from error
        self.model.to(self.device)  # type: ignore[arg-type]
        self.model.eval().requires_grad_(False)
        self.lora = LoraLayers(self.model, max_adapters, max_adapter_rank) if max_adapters else None

        config = self.model.config.get_text_config()
        self.vocab_size: int = config.vocab_size
        self.context_length: int = config.max_position_embeddings
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.cache = KVCache(config.num_hidden_layers, kv_heads, head_dim, self.dtype, self.device)
        self.weight_bytes = sum(p.numel() * p.element_size() for p in self.model.parameters())
        self.parameters = sum(p.numel() for p in self.model.parameters())
        super().__init__(tokenizer, chat_template)
        self.eos_token_ids = self._eos_token_ids()

    def _eos_token_ids(self) -> frozenset[int]:
        """All tokens that end an answer: the generation config's, the model's and the tokenizer's."""
        found: set[int] = set()
        for value in (
            self.model.generation_config.eos_token_id,
            self.model.config.get_text_config().eos_token_id,
            self.tokenizer.eos_token_id,
        ):
            found.update(value if isinstance(value, list | tuple) else [value] if value is not None else [])
        return frozenset(found)

    @torch.inference_mode()
    def forward(self, batch: PackedBatch, keep: Seq[int]) -> Tensor:
        """Run a packed batch; logits [len(keep), V] at the packed positions `keep`, in the model's dtype."""
        with self.lora.step(batch.slots, keep) if self.lora else nullcontext():
            output = self.model(
                input_ids=batch.token_ids[None],
                position_ids=batch.positions[None],
                use_cache=False,
                logits_to_keep=torch.tensor(keep, dtype=torch.int64, device=self.device),
                packed=batch,
            )
        logits: Tensor = output.logits[0]
        return logits

    def tensor(self, values: Seq[int]) -> Tensor:
        """int64 tensor on the model's device."""
        return torch.tensor(values, dtype=torch.int64, device=self.device)
