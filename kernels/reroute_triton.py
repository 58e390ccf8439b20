"""The Triton kernels of `reroute`. Imported only where they run.

`topk_reroute_kernel` gives each token one warp and keeps all of its experts in registers. Probabilities are at least
zero, hence ordered as the integers that have their bits, and integers are what a warp finds the greatest of in one
instruction. What was chosen k-th is kept in column k of the same tile, so that nothing moves between threads before
the one gather from the table at the end. Compiled by the layer's shape and dtype, never by the number of tokens;
nothing waits for the host, and nothing is read or written whose size the host does not know: CUDA graphs may hold it.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS = 4  # of one program of `topk_reroute_kernel`, each with a warp
PICKS = 256  # of one program of `reroute_kernel`


@triton.jit(do_not_specialize=["tokens"])
def topk_reroute_kernel(
    logits,
    adapter_of_token,
    table,
    weights,
    rows,
    tokens,
    logits_row,
    EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    ROUNDED: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """weights, rows [tokens, TOP_K] of the greatest softmax(logits) [tokens, EXPERTS]; WIDTH: power of two."""
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    n = tl.arange(0, WIDTH)[None, :]
    present = (t < tokens)[:, None]
    slot = tl.load(adapter_of_token + t[:, None], mask=present, other=-1)
    at = logits + t.to(tl.int64)[:, None] * logits_row + n
    x = tl.load(at, mask=present & (n < EXPERTS), other=float("-inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, axis=1)[:, None])
    p = e / tl.sum(e, axis=1)[:, None]
    p = tl.where(p == p, p, 0.0)
    if ROUNDED:
        p = p.to(logits.dtype.element_ty).to(tl.float32)
    left = tl.where(n < EXPERTS, p.to(tl.int32, bitcast=True), -1)
    chosen = tl.zeros((TOKENS, WIDTH), tl.int32)
    kept = tl.zeros((TOKENS, WIDTH), tl.int32)
    for k in tl.static_range(TOP_K):
        best = tl.max(left, axis=1)[:, None]
        expert = tl.min(tl.where(left == best, n, WIDTH), axis=1)[:, None]
        chosen = tl.where(n == k, expert, chosen)
        kept = tl.where(n == k, best, kept)
        left = tl.where(n == expert, -1, left)
    w = kept.to(tl.float32, bitcast=True)
    if RENORMALIZE:
        total = tl.sum(w, axis=1)[:, None]
        w = w / tl.where(total > 0, total, 1.0)
    used = present & (n < TOP_K)
    out = t.to(tl.int64)[:, None] * TOP_K + n
    row = tl.load(table + (slot.to(tl.int64) + 1) * EXPERTS + chosen, mask=used, other=0)
    tl.store(weights + out, w, mask=used)
    tl.store(rows + out, row, mask=used)


@triton.jit(do_not_specialize=["picks"])
def reroute_kernel(
    topk_ids, adapter_of_token, table, rows, picks, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr
):
    """rows[i] = table[adapter_of_token[i // TOP_K] + 1, topk_ids[i]] for i < picks."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    present = i < picks
    slot = tl.load(adapter_of_token + i // TOP_K, mask=present, other=-1).to(tl.int64)
    expert = tl.load(topk_ids + i, mask=present, other=0).to(tl.int64)
    tl.store(rows + i, tl.load(table + (slot + 1) * EXPERTS + expert, mask=present, other=0), mask=present)


def topk_reroute_triton(
    logits: Tensor, top_k: int, adapter_of_token: Tensor, table: Tensor, *, renormalize: bool, rounded: bool = False
) -> tuple[Tensor, Tensor]:
    """`topk_reroute` on a GPU, one launch. Rows of the logits may be strided, the experts of a row may not."""
    tokens, experts = logits.shape
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    rows = torch.empty(tokens, top_k, dtype=torch.int32, device=logits.device)
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    if tokens:
        topk_reroute_kernel[(triton.cdiv(tokens, TOKENS),)](
            logits,
            adapter_of_token,
            table,
            weights,
            rows,
            tokens,
            logits.stride(0),
            EXPERTS=experts,
            WIDTH=triton.next_power_of_2(experts),
            TOP_K=top_k,
            RENORMALIZE=renormalize,
            ROUNDED=rounded,
            TOKENS=TOKENS,
            num_warps=TOKENS,
        )
    return weights, rows


def reroute_triton(topk_ids: Tensor, adapter_of_token: Tensor, table: Tensor) -> Tensor:
    """`reroute` on a GPU, one launch."""
    rows = torch.empty(topk_ids.shape, dtype=torch.int32, device=topk_ids.device)
    picks = topk_ids.numel()
    if picks:
        reroute_kernel[(triton.cdiv(picks, PICKS),)](
            topk_ids.contiguous(),
            adapter_of_token,
            table,
            rows,
            picks,
            EXPERTS=table.shape[1],
            TOP_K=topk_ids.shape[1],
            BLOCK=PICKS,
            num_warps=4,
        )
    return rows
