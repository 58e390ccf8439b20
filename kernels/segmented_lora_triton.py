"""The Triton kernels of `segmented_lora`: shrink (x @ A.T), then expand (@ B, added into the output).

Imported only where they run, so that machines without Triton need none. The grid is the step's tiles: rows of one
adapter, at most a tile's height. Shrink splits the inner dimension over programs when rows are few; each writes its
partial sum and expand adds them up, so that nothing is zeroed before, no atomics are used and the result is the same
every time. What is compiled depends on the linear's shape, the dtype and which of three sizes the batch has, never on
which adapters are loaded or used. Nothing waits for the host.

Measured as it stands (benchmarks/results/segmented_lora.json): change it together with a new measurement.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from signalbox.kernels.segmented_lora import LoraWeights, Segments, tile_of

DECODE_ROWS = 64
MAX_SLICES = 3


@triton.jit(do_not_specialize=["t_slice", "t_split"])
def shrink_kernel(
    x,
    a,
    t,
    order,
    tiles,
    ranks,
    x_row,
    a_slice,
    a_slot,
    t_slice,
    t_split,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """t[split, slice, place, r] = x[order[place]] @ A[slice, slot, r] over this split's part of the inner dimension."""
    split = tl.program_id(0) % SPLIT_K
    r0 = (tl.program_id(0) // SPLIT_K) * BLOCK_R
    part = tl.program_id(1)
    tile = tl.program_id(2)
    slot = tl.load(tiles + 3 * tile)
    start = tl.load(tiles + 3 * tile + 1)
    count = tl.load(tiles + 3 * tile + 2)
    if count == 0:
        return
    rank = tl.load(ranks + slot)
    if r0 >= rank:
        return
    m = tl.arange(0, BLOCK_M)
    r = r0 + tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    rows = tl.load(order + start + m, mask=m < count, other=0).to(tl.int64)
    x_at = x + rows[:, None] * x_row + k[None, :]
    a_at = a + part.to(tl.int64) * a_slice + slot.to(tl.int64) * a_slot + r[:, None] * K + k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k0 in range(split * BLOCK_K, K, SPLIT_K * BLOCK_K):
        inside = k[None, :] < K - k0
        xs = tl.load(x_at + k0, mask=(m[:, None] < count) & inside, other=0.0)
        rs = tl.load(a_at + k0, mask=(r[:, None] < rank) & inside, other=0.0)
        acc = tl.dot(xs, tl.trans(rs), acc, input_precision="ieee")
    t_at = t + split * t_split + part * t_slice + (start + m)[:, None] * WIDTH + r[None, :]
    tl.store(t_at, acc, mask=(m[:, None] < count) & (r[None, :] < rank))


@triton.jit(do_not_specialize=["t_slice", "t_split"])
def expand_kernel(
    t,
    b,
    y,
    order,
    tiles,
    ranks,
    y_row,
    b_slot,
    t_slice,
    t_split,
    OUT: tl.constexpr,
    END_0: tl.constexpr,
    END_1: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y[order[place]] += t[., slice, place] @ B[slot], where the slice is the one that the columns belong to."""
    n0 = tl.program_id(0) * BLOCK_N
    tile = tl.program_id(1)
    slot = tl.load(tiles + 3 * tile)
    start = tl.load(tiles + 3 * tile + 1)
    count = tl.load(tiles + 3 * tile + 2)
    if count == 0:
        return
    rank = tl.load(ranks + slot)
    if rank == 0:
        return
    part = (n0 >= END_0).to(tl.int32) + (n0 >= END_1).to(tl.int32)
    m = tl.arange(0, BLOCK_M)
    n = n0 + tl.arange(0, BLOCK_N)
    rr = tl.arange(0, BLOCK_R)
    rows = tl.load(order + start + m, mask=m < count, other=0).to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r0 in range(0, rank, BLOCK_R):
        r = r0 + rr
        inside = (m[:, None] < count) & (r[None, :] < rank)
        t_at = t + part * t_slice + (start + m)[:, None] * WIDTH + r[None, :]
        inner = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for split in tl.static_range(SPLIT_K):
            inner += tl.load(t_at + split * t_split, mask=inside, other=0.0)
        b_at = b + slot.to(tl.int64) * b_slot + r[:, None] * OUT + n[None, :]
        bs = tl.load(b_at, mask=(r[:, None] < rank) & (n[None, :] < OUT), other=0.0)
        acc = tl.dot(inner.to(bs.dtype), bs, acc, input_precision="ieee")
    y_at = y + rows[:, None] * y_row + n[None, :]
    mask = (m[:, None] < count) & (n[None, :] < OUT)
    tl.store(y_at, (tl.load(y_at, mask=mask, other=0.0).to(tl.float32) + acc).to(y.dtype.element_ty), mask=mask)


def blocks_of(count: int, max_rank: int, in_features: int, outs: tuple[int, ...]) -> dict[str, int]:
    """Block sizes by the batch's size and the linear's shape alone. Raises ValueError where slices do not align."""
    block_n = 128
    for end in _ends(outs):
        while end % block_n:
            block_n //= 2
    if block_n < 16 or len(outs) > MAX_SLICES:
        raise ValueError(f"outputs of {outs} features cannot lie side by side: at most 3, in multiples of 16")
    block_k = min(128, triton.next_power_of_2(in_features))
    split_k = 8 if count <= DECODE_ROWS else 4 if tile_of(count) < 64 else 1
    while split_k > 1 and split_k * block_k > in_features:
        split_k //= 2
    return {
        "SPLIT_K": split_k,
        "BLOCK_M": tile_of(count),
        "BLOCK_R": min(64, max(16, triton.next_power_of_2(max_rank))),
        "BLOCK_K": max(16, block_k),
        "BLOCK_N": block_n,
    }


def _ends(outs: tuple[int, ...]) -> list[int]:
    """Where all slices but the last end."""
    return [sum(outs[: i + 1]) for i in range(len(outs) - 1)]


def add_lora_triton(y: Tensor, x: Tensor, weights: LoraWeights, segments: Segments) -> None:
    """`add_lora` on a GPU. x and y: rows may be strided, the features of a row may not."""
    order, tiles = segments.order, segments.tiles
    assert order is not None and tiles is not None
    slices, _, max_rank, in_features = weights.a.shape
    out, width = weights.b.shape[2], max_rank
    sizes: dict[str, Any] = blocks_of(segments.count, max_rank, in_features, weights.outs)
    if not len(tiles):
        return
    split_k, block_k, block_n = sizes["SPLIT_K"], sizes.pop("BLOCK_K"), sizes.pop("BLOCK_N")
    t = torch.empty(split_k, slices, len(order), width, dtype=torch.float32, device=x.device)
    rank_blocks = triton.cdiv(max_rank, sizes["BLOCK_R"])
    common = (order, tiles, weights.ranks)
    shrink_kernel[(split_k * rank_blocks, slices, len(tiles))](
        x,
        weights.a,
        t,
        *common,
        x.stride(0),
        weights.a.stride(0),
        weights.a.stride(1),
        t.stride(1),
        t.stride(0),
        K=in_features,
        WIDTH=width,
        BLOCK_K=block_k,
        num_warps=4,
        num_stages=3,
        **sizes,
    )
    ends = [*_ends(weights.outs), out, out]
    expand_kernel[(triton.cdiv(out, block_n), len(tiles))](
        t,
        weights.b,
        y,
        *common,
        y.stride(0),
        weights.b.stride(0),
        t.stride(1),
        t.stride(0),
        OUT=out,
        END_0=ends[0],
        END_1=ends[1],
        WIDTH=width,
        BLOCK_N=block_n,
        num_warps=4,
        **sizes,
    )
