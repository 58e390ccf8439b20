"""vLLM's experts kernels over rows: the base's and the adapters' in one grouped product.

On CUDA the product over whole rows is vLLM's own Triton kernel, which takes any row of the range; ours is what prepares
it: the alignment counts picks, not reserved rows, and the block configuration is the one of the base's experts. Over
differences the product is ours too (`kernels.difference_rows`).
"""

# mypy: disable-error-code="misc,no-any-return"
from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from signalbox.experts.expertweave.difference_store import DifferenceRows
from signalbox.experts.expertweave.weave import Weave, WovenLayer
from signalbox.kernels.align import align_rows
from signalbox.kernels.difference_rows import align_picks, blocks_of, woven_product

MANY_PICKS = 4096  # of a prompt: beyond them vLLM's alignment is the faster one
VLLM_ROWS = 960  # what vLLM's alignment can count to: below 1024, rounded up to a multiple of 32
FEW_PICKS = 4  # vLLM's margin: with so many times fewer picks than experts each pick is a block by itself


def woven_experts(vllm_class: type) -> type:
    """The subclass of a modular experts class of vLLM that computes over rows."""
    from vllm.platforms import current_platform

    return _on_cpu(vllm_class) if current_platform.is_cpu() else _on_cuda(vllm_class)


@lru_cache(maxsize=4)
def _on_cpu(vllm_class: type) -> type:
    class WovenCPUExperts(vllm_class):
        woven: WovenLayer

        def apply(self, output: Tensor, hidden_states: Tensor, w1: Tensor, w2: Tensor, *args: Any, **kw: Any) -> None:
            store = self.woven.store
            super().apply(output, hidden_states, store.w13, store.w2, *args, **kw)

    return WovenCPUExperts


@lru_cache(maxsize=4)
def _on_cuda(vllm_class: type) -> type:
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
    from vllm.model_executor.layers.fused_moe.fused_moe import (
        invoke_fused_moe_triton_kernel,
        moe_align_block_size,
        try_get_optimal_moe_config,
    )
    from vllm.model_executor.layers.fused_moe.utils import _resize_cache
    from vllm.triton_utils import tl

    from signalbox.experts.expertweave.settings import CannotWeave

    if vllm_class is not TritonExperts:
        raise CannotWeave(f"ESFT adapters are served by vLLM's Triton experts on GPUs, not by {vllm_class.__name__}")
    compute_types = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}

    class WovenTritonExperts(TritonExperts):
        woven: WovenLayer

        def apply(
            self,
            output: Tensor,
            hidden_states: Tensor,
            w1: Tensor,
            w2: Tensor,
            topk_weights: Tensor,
            topk_ids: Tensor,
            activation: Any,
            global_num_experts: int,
            expert_map: Tensor | None,
            a1q_scale: Tensor | None,
            a2_scale: Tensor | None,
            workspace13: Tensor,
            workspace2: Tensor,
            expert_tokens_meta: Any,
            apply_router_weight_on_input: bool,
        ) -> None:
            """`topk_ids` are rows [tokens, top_k]; `w1` and `w2` the base's, by whose shape blocks are chosen."""
            tokens, top_k = topk_ids.shape
            width, hidden = w1.shape[1], w2.shape[1]
            config = try_get_optimal_moe_config(w1.size(), w2.size(), top_k, None, tokens)
            store = self.woven.store
            gate_up = _resize_cache(workspace2, (tokens, top_k, width))
            activated = _resize_cache(workspace13, (tokens * top_k, self.adjust_N_for_activation(width, activation)))
            down = _resize_cache(workspace2, (tokens, top_k, hidden))
            weighted = not apply_router_weight_on_input
            if isinstance(store, DifferenceRows):
                crowd = topk_ids.numel() / store.base_rows
                wide, narrow = (blocks_of(tokens, inputs, True, crowd) for inputs in (hidden, activated.shape[1]))
                aligned = align_picks(topk_ids, store.base_rows, wide, store.differences13)
                woven_product(
                    hidden_states,
                    store.w13,
                    topk_ids,
                    gate_up.view(-1, width),
                    aligned,
                    top_k=top_k,
                    differences=store.differences13,
                    blocks=wide,
                )
                self.activation(activation, activated, gate_up.view(-1, width))
                woven_product(
                    activated,
                    store.w2,
                    topk_ids,
                    down.view(-1, hidden),
                    aligned,
                    top_k=1,
                    differences=store.differences2,
                    topk_weights=topk_weights if weighted else None,
                    blocks=narrow,
                )
            else:
                sorted_ids, block_rows, padded = self._assigned(topk_ids, config["BLOCK_SIZE_M"])

                def product(x: Tensor, rows: Tensor, out: Tensor, times: int, weights: Tensor | None) -> None:
                    invoke_fused_moe_triton_kernel(
                        x,
                        rows,
                        out,
                        None,
                        None,
                        weights if weights is not None else topk_weights,
                        sorted_ids,
                        block_rows,
                        padded,
                        weights is not None,
                        times,
                        config,
                        compute_type=compute_types[hidden_states.dtype],
                        use_fp8_w8a8=False,
                        use_int8_w8a8=False,
                        use_int8_w8a16=False,
                        use_int4_w4a16=False,
                        per_channel_quant=False,
                    )

                product(hidden_states, store.w13, gate_up, top_k, None)
                self.activation(activation, activated, gate_up.view(-1, width))
                product(activated, store.w2, down, 1, topk_weights if weighted else None)
            self.moe_sum(down, output)

        def _assigned(self, rows: Tensor, block: int) -> tuple[Tensor | None, Tensor, Tensor]:
            """(sorted ids or None, row of each block, padded picks) as vLLM's kernel wants them.

            Whether each pick is a block by itself is decided by the base's experts, as vLLM does without adapters.
            """
            woven = self.woven
            picks = rows.numel()
            if picks * FEW_PICKS <= len(woven.local) and not woven.partial:
                return None, rows.view(-1), _constant(picks * block, rows.device)
            # A captured graph must hold for rows that are taken later; beyond, those in use are enough.
            few = picks <= MANY_PICKS or len(rows) <= woven.weave.longest_captured
            if few or woven.partial or woven.rows_in_use > VLLM_ROWS:
                return align_rows(rows, block, woven.total_rows)
            return moe_align_block_size(rows, block, woven.rows_in_use)

    return WovenTritonExperts


@lru_cache(maxsize=256)
def _constant(value: int, device: torch.device) -> Tensor:
    """int32 [1], made once: vLLM fills a new one in every layer of every step."""
    return torch.full((1,), value, dtype=torch.int32, device=device)


def warm_up(weave: Weave) -> None:
    """Compile what steps of any size need, so that no request waits for it: one layer stands for all."""
    if weave.device.type != "cuda":
        return
    layer = next(iter(weave.layers.values()))
    store = layer.store
    for tokens in (1, 24, 48, 80, 112, 256, 600, 1200):
        rows = torch.zeros(tokens, weave.top_k, dtype=torch.int32, device=weave.device)
        for block in (16, 32, 64, 128):
            align_rows(rows, block, layer.total_rows)
        if isinstance(store, DifferenceRows):
            for full, differences, top_k in (
                (store.w13, store.differences13, rows.shape[1]),
                (store.w2, store.differences2, 1),
            ):
                blocks = blocks_of(tokens, full.shape[2], True, rows.numel() / store.base_rows)
                x = torch.zeros(rows.numel() // top_k, full.shape[2], dtype=weave.dtype, device=weave.device)
                out = torch.empty(rows.numel(), full.shape[1], dtype=weave.dtype, device=weave.device)
                shares = torch.ones_like(rows, dtype=torch.float32) if top_k == 1 else None
                woven_product(
                    x,
                    full,
                    rows,
                    out,
                    align_picks(rows, store.base_rows, blocks, differences),
                    top_k=top_k,
                    differences=differences,
                    topk_weights=shares,
                    blocks=blocks,
                )
    torch.cuda.synchronize(weave.device)
