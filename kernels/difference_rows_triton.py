"""The Triton kernel of `woven_product`. Imported only where it runs.

A program computes one tile of the output, a block of picks by some output features. Where bytes count: first the
product with the full row that all picks of the block share, then, for each variant that picks of the block have, the
product with its difference, where all other picks' inputs are zero. Both are sums in the same float32 tile. Where
blocks are large (`Blocks.apart`): the products with differences are a second kernel's, whose blocks have picks of one
of them, and which adds to what the first has written. Where multiplications count (`Blocks.added`): one product, with
the sum of both, for a block whose picks have the same row.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from signalbox.kernels.align import capacity
from signalbox.kernels.difference_rows import Aligned, Apart, Blocks, Differences, group_of

NONE = tl.constexpr(2**31 - 1)
# Nibbles become floats without the slow conversion: as the lowest bits of the mantissa of a number whose unit that is.
# What is too much, with the 8 that nibbles have more than their numbers, is taken off later, of fewer numbers.
RAISED = tl.constexpr(128.0 + 8.0)
MAGIC = tl.constexpr(0x4B000000)  # the float32 2^23
ABOVE = tl.constexpr(2.0**23 - 128.0)
# The same for two bfloat16 in a register, 128 + u each, from the nibbles of two 16-bit words: a shift and a mask.
UNPACK_BF16 = tl.constexpr("""
{
    .reg .b32 w;
    lop3.b32 $0, $4, 0x000F000F, 0x43004300, 0xEA;
    shr.u32 w, $4, 4;
    lop3.b32 $1, w, 0x000F000F, 0x43004300, 0xEA;
    shr.u32 w, $4, 8;
    lop3.b32 $2, w, 0x000F000F, 0x43004300, 0xEA;
    shr.u32 w, $4, 12;
    lop3.b32 $3, w, 0x000F000F, 0x43004300, 0xEA;
}
""")
# And times the scales of $5 for the first two of a word, of $6 for the others, less what is too much: rounded once.
UNPACK_SCALED_BF16 = tl.constexpr("""
{
    .reg .b32 w, one, less;
    mov.b32 one, 0x3F803F80;
    mov.b32 less, 0xC308C308;
    lop3.b32 w, $4, 0x000F000F, 0x43004300, 0xEA;
    fma.rn.bf16x2 w, w, one, less;
    mul.rn.bf16x2 $0, w, $5;
    shr.u32 w, $4, 4;
    lop3.b32 w, w, 0x000F000F, 0x43004300, 0xEA;
    fma.rn.bf16x2 w, w, one, less;
    mul.rn.bf16x2 $1, w, $5;
    shr.u32 w, $4, 8;
    lop3.b32 w, w, 0x000F000F, 0x43004300, 0xEA;
    fma.rn.bf16x2 w, w, one, less;
    mul.rn.bf16x2 $2, w, $6;
    shr.u32 w, $4, 12;
    lop3.b32 w, w, 0x000F000F, 0x43004300, 0xEA;
    fma.rn.bf16x2 w, w, one, less;
    mul.rn.bf16x2 $3, w, $6;
}
""")
# Two weights: the nibbles of $1's words that lie $4 bits up, less RAISED, times the scales in $2, added to the weights
# in $3 and rounded once.
ADD_BF16 = tl.constexpr("""
{
    .reg .b32 w, one, less;
    mov.b32 one, 0x3F803F80;
    mov.b32 less, 0xC308C308;
    shr.u32 w, $1, $4;
    lop3.b32 w, w, 0x000F000F, 0x43004300, 0xEA;
    fma.rn.bf16x2 w, w, one, less;
    fma.rn.bf16x2 $0, w, $2, $3;
}
""")


@triton.jit
def raised(words, shift):
    """The nibbles of uint16 words that lie `shift` bits up, 0 to 15, as 128 to 143 in float32."""
    return (((words.to(tl.int32) >> shift) & 15) | MAGIC).to(tl.float32, bitcast=True) - ABOVE


@triton.jit
def nibbles(words, dtype: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Of words [n, h] their four nibbles as -8 to 7 in `dtype`, plus RAISED; in ASSEMBLY, which is for bfloat16 alone.

    The first two are columns j and h + j of one group, the others of the next (`difference_of`).
    """
    if ASSEMBLY:
        a, b, c, d = tl.inline_asm_elementwise(
            UNPACK_BF16,
            "=r,=r,=r,=r,r",
            [words],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        a = raised(words, 0).to(dtype)
        b = raised(words, 4).to(dtype)
        c = raised(words, 8).to(dtype)
        d = raised(words, 12).to(dtype)
    return a, b, c, d


@triton.jit
def scaled_nibbles(words, low, high, dtype: tl.constexpr, ASSEMBLY: tl.constexpr):
    """The differences themselves in `dtype`: `nibbles` times the scales [n] of their groups, low and high."""
    if ASSEMBLY:
        a, b, c, d = tl.inline_asm_elementwise(
            UNPACK_SCALED_BF16,
            "=r,=r,=r,=r,r,r,r",
            [words, low[:, None], high[:, None]],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        low, high = low.to(tl.float32)[:, None], high.to(tl.float32)[:, None]
        a = ((raised(words, 0) - RAISED) * low).to(dtype)
        b = ((raised(words, 4) - RAISED) * low).to(dtype)
        c = ((raised(words, 8) - RAISED) * high).to(dtype)
        d = ((raised(words, 12) - RAISED) * high).to(dtype)
    return a, b, c, d


@triton.jit
def added(weights, words, scale, shift, ASSEMBLY: tl.constexpr):
    """weights [n, k] plus the nibbles of words [n, k] that lie `shift` bits up, times scale [n]."""
    if ASSEMBLY:
        args = [words, scale[:, None], weights, shift]
        found = tl.inline_asm_elementwise(ADD_BF16, "=r,r,r,r,r,r", args, dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        difference = (raised(words, shift) - RAISED) * scale.to(tl.float32)[:, None]
        found = (weights.to(tl.float32) + difference).to(weights.dtype)
    return found


@triton.jit
def group_of_picks(x_at, mask):
    """Inputs of a group's halves, [m, group / 2] each; x_at: pointers to the first half."""
    half: tl.constexpr = x_at.shape[1]
    return tl.load(x_at, mask=mask, other=0.0), tl.load(x_at + half, mask=mask, other=0.0)


@triton.jit
def plus_product(acc, x0, x1, w0, w1, TURNED: tl.constexpr):
    """acc plus the product of inputs and weights of a group's halves: x @ w.T, or w @ x.T where it is TURNED."""
    if x0.shape[1] < 16:  # too few for the tensor cores
        x = tl.reshape(tl.join(x0, x1), (x0.shape[0], 2 * x0.shape[1]))
        w = tl.reshape(tl.join(w0, w1), (w0.shape[0], 2 * w0.shape[1]))
        if TURNED:
            acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
        else:
            acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    elif TURNED:
        acc = tl.dot(w0, tl.trans(x0), acc, input_precision="ieee")
        acc = tl.dot(w1, tl.trans(x1), acc, input_precision="ieee")
    else:
        acc = tl.dot(x0, tl.trans(w0), acc, input_precision="ieee")
        acc = tl.dot(x1, tl.trans(w1), acc, input_precision="ieee")
    return acc


@triton.jit
def too_much(x0, x1):
    """What RAISED weights add to a group's product, float32 [m], negative."""
    return (tl.sum(x0.to(tl.float32), axis=1) + tl.sum(x1.to(tl.float32), axis=1)) * -RAISED


@triton.jit(do_not_specialize=["picks", "num_full"])
def woven_product_kernel(
    x,
    full,
    packed,
    scales,
    base_of,
    rows,
    topk_weights,
    out,
    sorted_ids,
    block_rows,
    padded,
    picks,
    num_full,
    x_row,
    full_row,
    N: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    GROUP: tl.constexpr,
    DIFFERENCES: tl.constexpr,
    ADDED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SCALE_PRODUCT: tl.constexpr,
    STAGES: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[p] = x[p // TOP_K] @ W(rows[p]).T over the blocks of an alignment; BLOCK_K divides K.

    Without DIFFERENCES those that the picks of a block may have are left out. A difference's scales multiply the
    product (SCALE_PRODUCT) or the weights, whichever are fewer; its loop has STAGES.
    """
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)[None, :]
    n_blocks: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tiles = tl.load(padded) // BLOCK_M * n_blocks
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        block = tile // n_blocks
        n = (tile % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
        # Columns beyond the last are computed, as others that exist, and not stored.
        n_read = n % N
        row = tl.load(block_rows + block)
        pick = tl.load(sorted_ids + block * BLOCK_M + m)
        real = pick < picks
        if ADDED:
            variant = row - num_full
            row = tl.load(base_of + variant, mask=variant >= 0, other=row)
            end = tl.where((row < 0) | (variant >= 0), 0, K)
        else:
            end = tl.where(row < 0, 0, K)
        if DIFFERENCES and not ADDED:
            variants = tl.load(rows + pick, mask=real, other=-1) - num_full
            variant = tl.min(tl.where(variants >= 0, variants, NONE), axis=0)
        x_at = x + (pick // TOP_K).to(tl.int64)[:, None] * x_row
        full_at = full + row.to(tl.int64) * full_row + n_read[:, None] * K
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in range(0, end, BLOCK_K):
            xs = tl.load(x_at + (k0 + k), mask=real[:, None], other=0.0)
            ws = tl.load(full_at + (k0 + k))
            acc = tl.dot(xs, tl.trans(ws), acc, input_precision="ieee")
        if DIFFERENCES:
            j = tl.arange(0, GROUP // 2)[None, :]
        if ADDED:
            packed_at = packed + variant.to(tl.int64) * (N * (K // 4)) + n_read[:, None] * (GROUP // 2) + j
            scales_at = scales + variant.to(tl.int64) * (N * (K // GROUP)) + n_read
            for g in tl.range(0, tl.where(variant < 0, 0, K // GROUP), num_stages=STAGES):
                x0, x1 = group_of_picks(x_at + (g * GROUP + j), real[:, None])
                words = tl.load(packed_at + g // 2 * (N * (GROUP // 2)))
                scale = tl.load(scales_at + g * N)
                w0 = added(tl.load(full_at + (g * GROUP + j)), words, scale, g % 2 * 8, ASSEMBLY)
                w1 = added(tl.load(full_at + (g * GROUP + GROUP // 2 + j)), words, scale, g % 2 * 8 + 4, ASSEMBLY)
                acc = plus_product(acc, x0, x1, w0, w1, False)
        elif DIFFERENCES:
            while variant < NONE:
                hit = (variants == variant)[:, None]
                packed_at = packed + variant.to(tl.int64) * (N * (K // 4)) + n_read[:, None] * (GROUP // 2) + j
                scales_at = scales + variant.to(tl.int64) * (N * (K // GROUP)) + n_read
                for g in tl.range(0, K // GROUP, 2, num_stages=STAGES):
                    words = tl.load(packed_at + g // 2 * (N * (GROUP // 2)))
                    x0, x1 = group_of_picks(x_at + (g * GROUP + j), hit)
                    x2, x3 = group_of_picks(x_at + (g * GROUP + GROUP + j), hit)
                    low, high = tl.load(scales_at + g * N), tl.load(scales_at + (g + 1) * N)
                    if SCALE_PRODUCT:
                        w0, w1, w2, w3 = nibbles(words, x.dtype.element_ty, ASSEMBLY)
                        w0, w1, w2, w3 = w0 - RAISED, w1 - RAISED, w2 - RAISED, w3 - RAISED
                        none = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                        acc += plus_product(none, x0, x1, w0, w1, False) * low.to(tl.float32)[None, :]
                        acc += plus_product(none, x2, x3, w2, w3, False) * high.to(tl.float32)[None, :]
                    else:
                        w0, w1, w2, w3 = scaled_nibbles(words, low, high, x.dtype.element_ty, ASSEMBLY)
                        acc = plus_product(acc, x0, x1, w0, w1, False)
                        acc = plus_product(acc, x2, x3, w2, w3, False)
                variant = tl.min(tl.where(variants > variant, variants, NONE), axis=0)
        if WEIGHTED:
            acc *= tl.load(topk_weights + pick, mask=real, other=0.0)[:, None]
        out_at = out + pick.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(out_at, acc.to(out.dtype.element_ty), mask=real[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["picks"])
def difference_product_kernel(
    x,
    packed,
    scales,
    topk_weights,
    out,
    sorted_ids,
    block_rows,
    padded,
    picks,
    x_row,
    N: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    GROUP: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SCALE_PRODUCT: tl.constexpr,
    STAGES: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[p] += x[p // TOP_K] @ difference(p).T over the blocks of an alignment, each of picks of one difference.

    Its product is turned, differences @ inputs.T: tensor cores take 8 picks so, and there are few of a difference.
    """
    m = tl.arange(0, BLOCK_M)
    j = tl.arange(0, GROUP // 2)[None, :]
    n_blocks: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tiles = tl.load(padded) // BLOCK_M * n_blocks
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        block = tile // n_blocks
        n = (tile % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
        n_read = n % N
        variant = tl.load(block_rows + block).to(tl.int64)
        pick = tl.load(sorted_ids + block * BLOCK_M + m)
        real = pick < picks
        x_at = x + (pick // TOP_K).to(tl.int64)[:, None] * x_row
        packed_at = packed + variant * (N * (K // 4)) + n_read[:, None] * (GROUP // 2) + j
        scales_at = scales + variant * (N * (K // GROUP)) + n_read
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for g in tl.range(0, K // GROUP, 2, num_stages=STAGES):
            words = tl.load(packed_at + g // 2 * (N * (GROUP // 2)))
            x0, x1 = group_of_picks(x_at + (g * GROUP + j), real[:, None])
            x2, x3 = group_of_picks(x_at + (g * GROUP + GROUP + j), real[:, None])
            low, high = tl.load(scales_at + g * N), tl.load(scales_at + (g + 1) * N)
            if SCALE_PRODUCT:
                w0, w1, w2, w3 = nibbles(words, x.dtype.element_ty, ASSEMBLY)
                of_low = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
                of_high = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
                if x.dtype.element_ty == tl.float32:  # whose digits the way below would cost
                    w0, w1, w2, w3 = w0 - RAISED, w1 - RAISED, w2 - RAISED, w3 - RAISED
                else:
                    of_low += too_much(x0, x1)[None, :]
                    of_high += too_much(x2, x3)[None, :]
                acc += plus_product(of_low, x0, x1, w0, w1, True) * low.to(tl.float32)[:, None]
                acc += plus_product(of_high, x2, x3, w2, w3, True) * high.to(tl.float32)[:, None]
            else:
                w0, w1, w2, w3 = scaled_nibbles(words, low, high, x.dtype.element_ty, ASSEMBLY)
                acc = plus_product(acc, x0, x1, w0, w1, True)
                acc = plus_product(acc, x2, x3, w2, w3, True)
        product = tl.trans(acc)
        if WEIGHTED:
            product *= tl.load(topk_weights + pick, mask=real, other=0.0)[:, None]
        out_at = out + pick.to(tl.int64)[:, None] * N + n[None, :]
        written = real[:, None] & (n < N)[None, :]
        product += tl.load(out_at, mask=written, other=0.0).to(tl.float32)
        tl.store(out_at, product.to(out.dtype.element_ty), mask=written)


def launch_of(blocks: Blocks, in_features: int, differences: bool, dtype: torch.dtype) -> dict[str, Any]:
    """What the kernel is compiled for beside the shapes."""
    return {
        "GROUP": group_of(in_features) if differences else 0,
        "DIFFERENCES": differences,
        "ADDED": differences and blocks.added,
        "SCALE_PRODUCT": blocks.m <= 16,
        "STAGES": blocks.stages if blocks.m <= 32 else 2,
        "ASSEMBLY": dtype == torch.bfloat16,
        "BLOCK_M": blocks.m,
        "BLOCK_N": blocks.n,
        "BLOCK_K": blocks.k,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
        # The second loop must not cost the first, which all picks need, its share of programs that run at a time.
        # Products of float32 go without tensor cores and need more anyway.
        "maxnreg": 128 if differences and dtype != torch.float32 else None,
    }


def launch_apart(apart: Apart, in_features: int, dtype: torch.dtype) -> dict[str, Any]:
    """The same of the second kernel."""
    return {
        "GROUP": group_of(in_features),
        "SCALE_PRODUCT": apart.m <= 16,
        "STAGES": apart.stages,
        "ASSEMBLY": dtype == torch.bfloat16,
        "BLOCK_M": apart.m,
        "BLOCK_N": apart.n,
        "num_warps": apart.warps,
        "num_stages": apart.stages,
        "maxnreg": min(255, 65536 // (32 * apart.warps * apart.programs)) // 8 * 8,
    }


def woven_product_triton(
    x: Tensor,
    full: Tensor,
    rows: Tensor,
    out: Tensor,
    alignment: Aligned,
    top_k: int,
    differences: Differences | None,
    topk_weights: Tensor | None,
    blocks: Blocks,
    usual_rows: int | None,
) -> None:
    """`woven_product` on a GPU. Raises ValueError for memory that is laid out otherwise."""
    num_full, features, inner = full.shape
    if full.stride()[1:] != (inner, 1) or x.stride(1) != 1 or not (out.is_contiguous() and rows.is_contiguous()):
        raise ValueError("full rows and inputs must be contiguous in themselves, rows and out altogether")
    together, by_themselves = alignment
    if together.sorted_ids.shape[0] != together.block_rows.shape[0] * blocks.m or inner % blocks.k:
        raise ValueError(f"{blocks} fit neither this alignment nor {inner} input features: align by `blocks.m` picks")
    picks = rows.numel()
    apart = blocks.apart if differences else None
    groups = num_full + len(differences.base_of) if differences and blocks.added else num_full
    sizes = [capacity(picks, blocks.m, groups)]
    sizes += [capacity(picks, apart.m, len(differences.base_of))] if differences and apart else []
    if differences and [len(part.sorted_ids) for part in alignment if part] != sizes:
        raise ValueError(f"{blocks} need the alignment that `align_picks` makes of these picks and differences")
    if not picks:
        return
    wide = min(len(together.block_rows), capacity(picks, blocks.m, usual_rows or num_full) // blocks.m)
    # What is not used is given something; the same always, as kernels are compiled by their arguments' types.
    stored = differences if differences and apart is None else Differences(rows, rows, rows)
    packed = rows if stored.packed is rows else stored.packed.view(torch.uint16)
    weights = rows if topk_weights is None else topk_weights
    constants = {"N": features, "K": inner, "TOP_K": top_k, "WEIGHTED": topk_weights is not None}
    woven_product_kernel[(wide * triton.cdiv(features, blocks.n),)](
        x,
        full,
        packed,
        stored.scales,
        stored.base_of,
        rows,
        weights,
        out,
        *together,
        picks,
        num_full,
        x.stride(0),
        full.stride(0),
        **constants,
        **launch_of(blocks, inner, differences is not None and apart is None, x.dtype),
    )
    if apart is None or differences is None or by_themselves is None:
        return
    tiles = len(by_themselves.block_rows) * triton.cdiv(features, apart.n)
    difference_product_kernel[(min(tiles, apart.programs * multiprocessors(x.device)),)](
        x,
        differences.packed.view(torch.uint16),
        differences.scales,
        weights,
        out,
        *by_themselves,
        picks,
        x.stride(0),
        **constants,
        **launch_apart(apart, inner, x.dtype),
    )


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """How many a GPU has; 1 where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
