"""vLLM's experts kernels over rows: the base's and the adapters' in one grouped product.

On CUDA the product is ours (`kernels.difference_rows`), in the blocks that vLLM has for the base's experts: its launch
is as wide as the base alone needs, where vLLM's own kernel begins a program for every block that reserved rows could
fill. That one computes the shortest steps, whose picks are a block each, and the longest, of prompts.
"""

# mypy: disable-error-code="misc,no-any-return"
from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from signalbox.experts.expertweave.difference_store import DifferenceRows
from signalbox.experts.expertweave.weave import Weave, WovenLayer
from signalbox.kernels.align import align_rows
from signalbox.kernels.difference_rows import CROWD, Blocks, Differences, align_picks, blocks_of, woven_product

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
    import triton.language as tl
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
    from vllm.model_executor.layers.fused_moe.fused_moe import (
        invoke_fused_moe_triton_kernel,
        moe_align_block_size,
        try_get_optimal_moe_config,
    )
    from vllm.model_executor.layers.fused_moe.utils import _resize_cache

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
            woven, store = self.woven, self.woven.store
            gate_up = _resize_cache(workspace2, (tokens, top_k, width))
            activated = _resize_cache(workspace13, (tokens * top_k, self.adjust_N_for_activation(width, activation)))
            down = _resize_cache(workspace2, (tokens, top_k, hidden))
            weights = None if apply_router_weight_on_input else topk_weights
            blocks = blocks_of_step(woven, topk_ids)
            if blocks is not None:
                full13, full2, more13, more2 = _stored(store)
                aligned = align_picks(topk_ids, len(full13), blocks[0], more13)

                def product(x: Tensor, second: bool, out: Tensor, times: int, weights: Tensor | None) -> None:
                    woven_product(
                        x,
                        full2 if second else full13,
                        topk_ids,
                        out.view(-1, out.shape[-1]),
                        aligned,
                        top_k=times,
                        blocks=blocks[second],
                        differences=more2 if second else more13,
                        topk_weights=weights,
                        usual_rows=woven.base_rows,
                    )
            else:
                config = try_get_optimal_moe_config(w1.size(), w2.size(), top_k, None, tokens)
                sorted_ids, block_rows, padded = self._assigned(topk_ids, config["BLOCK_SIZE_M"])

                def product(x: Tensor, second: bool, out: Tensor, times: int, weights: Tensor | None) -> None:
                    invoke_fused_moe_triton_kernel(
                        x,
                        store.w2 if second else store.w13,
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

            product(hidden_states, False, gate_up, top_k, None)
            self.activation(activation, activated, gate_up.view(-1, width))
            product(activated, True, down, 1, weights)
            self.moe_sum(down, output)

        def _assigned(self, rows: Tensor, block: int) -> tuple[Tensor | None, Tensor, Tensor]:
            """(sorted ids or None, row of each block, padded picks) as vLLM's kernel wants them."""
            woven = self.woven
            if each_a_block(woven, rows):
                return None, rows.view(-1), _constant(rows.numel() * block, rows.device)
            if may_be_captured(woven, rows) or woven.partial or woven.rows_in_use > VLLM_ROWS:
                return align_rows(rows, block, woven.total_rows)
            return moe_align_block_size(rows, block, woven.rows_in_use)

    return WovenTritonExperts


def each_a_block(woven: WovenLayer, rows: Tensor) -> bool:
    """Whether each pick is a block by itself: decided by the base's experts, as vLLM does without adapters."""
    return rows.numel() * FEW_PICKS <= len(woven.local) and not woven.partial


def may_be_captured(woven: WovenLayer, rows: Tensor) -> bool:
    """Whether a CUDA graph may hold the step, so that it must be right for rows taken later; or it is a short one."""
    return rows.numel() <= MANY_PICKS or len(rows) <= woven.weave.longest_captured


def blocks_of_step(woven: WovenLayer, rows: Tensor) -> tuple[Blocks, Blocks] | None:
    """Of our kernel for both linears of a step with these rows; None: vLLM's kernel computes it."""
    full13, full2, differences, _ = _stored(woven.store)
    tokens, top_k = rows.shape
    inputs, crowd = (full13.shape[2], full2.shape[2]), rows.numel() / len(woven.local)
    if differences is not None:
        wide, narrow = (blocks_of(tokens, each, True, crowd) for each in inputs)
        return wide, narrow
    if each_a_block(woven, rows) or not may_be_captured(woven, rows):
        return None
    from vllm.model_executor.layers.fused_moe.fused_moe import try_get_optimal_moe_config

    base = ((woven.base_rows, *full.shape[1:]) for full in (full13, full2))
    return blocks_like(try_get_optimal_moe_config(*base, top_k, None, tokens), inputs, crowd)


def blocks_like(config: Mapping[str, int], inputs: tuple[int, int], crowd: float) -> tuple[Blocks, Blocks] | None:
    """vLLM's block sizes as ours for linears of so many input features, at `crowd` picks of an expert on average.

    Products are summed in the same order, so that results are the same. None where our kernel has no such blocks.
    """
    wide, narrow = (min(config["BLOCK_SIZE_K"], each & -each) for each in inputs)
    if min(wide, narrow) < 32 or config.get("SPLIT_K", 1) != 1:
        return None
    m = config["BLOCK_SIZE_M"] if crowd > CROWD else min(64, config["BLOCK_SIZE_M"])
    blocks = Blocks(m, config["BLOCK_SIZE_N"], wide, config.get("num_warps", 4), config.get("num_stages", 3))
    return blocks, blocks._replace(k=narrow)


def _stored(store: Any) -> tuple[Tensor, Tensor, Differences | None, Differences | None]:
    """Full rows of both linears, and the differences to them where that is how adapters' rows are kept."""
    if isinstance(store, DifferenceRows):
        return store.w13, store.w2, store.differences13, store.differences2
    return store.w13, store.w2, None, None


@lru_cache(maxsize=256)
def _constant(value: int, device: torch.device) -> Tensor:
    """int32 [1], made once: vLLM fills a new one in every layer of every step."""
    return torch.full((1,), value, dtype=torch.int32, device=device)


def warm_up(weave: Weave) -> None:
    """Compile what steps of any size need, so that no request waits for it: one layer stands for all."""
    if weave.device.type != "cuda":
        return
    layer = next(iter(weave.layers.values()))
    full13, full2, more13, more2 = _stored(layer.store)
    for tokens in (1, 24, 48, 80, 112, 256, 600, 1000, 1200):
        rows = torch.zeros(tokens, weave.top_k, dtype=torch.int32, device=weave.device)
        for block in (16, 32, 64, 128):
            align_rows(rows, block, layer.total_rows)
        blocks = blocks_of_step(layer, rows)
        if blocks is None:
            continue
        aligned = align_picks(rows, len(full13), blocks[0], more13)
        shares = torch.ones_like(rows, dtype=torch.float32)
        for full, more, top_k, sizes in ((full13, more13, weave.top_k, blocks[0]), (full2, more2, 1, blocks[1])):
            woven_product(
                torch.zeros(rows.numel() // top_k, full.shape[2], dtype=weave.dtype, device=weave.device),
                full,
                rows,
                torch.empty(rows.numel(), full.shape[1], dtype=weave.dtype, device=weave.device),
                aligned,
                top_k=top_k,
                blocks=sizes,
                differences=more,
                topk_weights=shares if top_k == 1 else None,
                usual_rows=layer.base_rows,
            )
    torch.cuda.synchronize(weave.device)
