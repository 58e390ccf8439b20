"""Expert rows stored as 4-bit differences to the base's, and the grouped matrix product that reads them.

Fine-tuning moves weights little, so that the difference to the base expert needs few bits; and a product is linear:

    out[p] = x[p // K] @ W(row of p).T,    x @ (base + difference).T = x @ base.T + x @ difference.T

Picks of a base expert and of all adapters' variants of it therefore share blocks (`align_rows` with `base_of`): the
base's row is read once for all, and of each variant a quarter of a row's bytes. Where blocks are large, differences
are multiplied in small blocks of their own after that. Serving the base alone reads and computes what it does without
adapters, and its results do not change by a bit. The idea of deltas beside a shared
base is BitDelta's (Liu et al., arXiv 2402.10193); grouping by base expert is ours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from signalbox.kernels.align import Alignment, align_apart, align_rows

# Fractions of the scale that just covers a group's greatest difference; smaller ones clip it for the others' sake.
SCALES = (8 / 7, 1.0, 0.925, 0.85, 0.775, 0.7)
LOWEST, HIGHEST = -8, 7
CROWD = 64  # picks of a row up to which blocks of 128 are mostly padding


class Differences(NamedTuple):
    """Stored differences, contiguous and on one device. Memory of rows that no pick names is never touched.

    packed: uint8 [R, N, K / 2], bytes of a row in the order of `difference_of`; scales: bf16 [R, K / group, N];
    base_of: int32 [R], the full row that each adds to.
    """

    packed: Tensor
    scales: Tensor
    base_of: Tensor


class Apart(NamedTuple):
    """Blocks of a launch of its own for differences: m picks of one of them by n features, so many programs at a time.

    programs: of one multiprocessor. They share out the blocks, so that the launch costs little where there are none.
    From 32 picks on scales multiply the weights and not, of each group, the product.
    """

    m: int
    n: int
    warps: int
    stages: int
    programs: int


class Blocks(NamedTuple):
    """Block sizes of the kernel and how it is launched; `m` is also the block of the alignment.

    By itself the base's product is followed, block by block, by those of the differences that its picks have: one
    launch, but each computes with all rows of the block. apart: they have a second launch, which adds them to what the
    first has written. added: differences are added to the weights, which makes each variant a group of picks of its
    own, instead of their products to the base's: less to compute, but the base's rows are read for each variant.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    added: bool = False
    apart: Apart | None = None


class Aligned(NamedTuple):
    """The picks by block of the one launch, and of the second one where there is one."""

    picks: Alignment
    apart: Alignment | None = None


def blocks_of(tokens: int, in_features: int, differences: bool, picks_per_row: float | None = None) -> Blocks:
    """Blocks for a step of so many tokens: bound by memory where they are few, by arithmetic where they are many.

    What counts is how many picks an expert of the base has on average, tokens * top_k / experts; without
    `picks_per_row` they are 6 / 64 of the tokens, as of DeepSeek-V2-Lite. With differences the best of those that
    `benchmarks/expert_rows_blocks.py` tries on an H200. Raises ValueError unless `in_features` is a multiple of 16.
    """
    if in_features % 16:
        raise ValueError(f"{in_features} input features: the kernel needs a multiple of 16")
    picks = tokens * 6 / 64 if picks_per_row is None else picks_per_row
    if picks <= 3 or (differences and picks <= 12):
        blocks = Blocks(16, 64, 128, 4, 4)
    elif picks <= 6:
        blocks = Blocks(32, 64, 128, 4, 3)
    elif picks <= 9:
        blocks = Blocks(32, 128, 64, 4, 3)
    elif picks <= CROWD:
        blocks = Blocks(64, 128, 64, 4 if picks <= 12 else 8, 3)
    else:
        blocks = Blocks(128, 128, 64, 8, 3, added=differences and picks > 96)
    if differences and 4.5 < picks <= 96:
        # Programs of one warp wait for nobody's part of a tile; where picks are many, unpacking once for 16 is better.
        blocks = blocks._replace(apart=Apart(8, 128, 1, 3, 8) if picks <= 48 else Apart(16, 256, 4, 3, 2))
    return blocks._replace(k=min(blocks.k, in_features & -in_features))


def align_picks(rows: Tensor, num_full: int, blocks: Blocks, differences: Differences | None) -> Aligned:
    """The alignment that `woven_product` needs with these blocks; rows as there. Raises as `align_rows` does."""
    if differences is None:
        return Aligned(align_rows(rows, blocks.m, num_full))
    if blocks.added:
        return Aligned(align_rows(rows, blocks.m, num_full + len(differences.base_of)))
    if blocks.apart:
        return Aligned(*align_apart(rows, blocks.m, num_full, differences.base_of, blocks.apart.m))
    return Aligned(align_rows(rows, blocks.m, num_full, differences.base_of))


def group_of(in_features: int) -> int:
    """How many neighbouring weights share a scale: 64, or less where the features are no multiple of 128.

    Raises ValueError where they are no multiple of 32.
    """
    if in_features % 32:
        raise ValueError(f"{in_features} input features: differences are packed in multiples of 32")
    return min(128, in_features & -in_features) // 2


def difference_of(base: Tensor, tuned: Tensor) -> tuple[Tensor, Tensor]:
    """The difference tuned - base in 4 bits: packed uint8 [..., N, K / 2] and scales bf16 [..., K / group, N].

    base, tuned: any float [..., N, K]. Each group of `group_of(K)` weights has the scale, of a few, whose error is
    least in squares. A byte holds column j of a group in its low half and column j + group / 2 in its high half, each
    as the integer -8 to 7 plus 8. The bytes are in the order [K / (2 * group), N, group / 2, 2], so that a tile of many
    outputs is one piece of memory, and two bytes are four columns of two groups: of two such words in a register one
    shift and one mask make two weights. Raises ValueError where the shapes differ, K is no multiple of 32 or a weight
    is not finite. GPUs are not waited for: there a group with such a weight gets no difference, so that it cannot spoil
    other adapters' picks of its block, and the caller has to check.
    """
    if base.shape != tuned.shape:
        raise ValueError(f"base {list(base.shape)} and tuned {list(tuned.shape)} differ in shape")
    if base.ndim > 2:  # one row after the other, for the sake of memory
        both = [difference_of(*pair) for pair in zip(base.flatten(0, -3), tuned.flatten(0, -3), strict=True)]
        packed, scales = (torch.stack(part).unflatten(0, base.shape[:-2]) for part in zip(*both, strict=True))
        return packed, scales
    group = group_of(base.shape[-1])
    difference = (tuned.float() - base.float()).unflatten(-1, (-1, group))
    extreme = difference.gather(-1, difference.abs().argmax(-1, keepdim=True))
    best = torch.full_like(extreme, float("inf"))
    scale, number = torch.zeros_like(extreme), torch.zeros_like(difference)
    for fraction in SCALES:
        # The greatest difference, of whichever sign, becomes -8: the side that reaches further.
        tried = (extreme / LOWEST * fraction).to(torch.bfloat16).float()
        rounded = torch.where(tried == 0, 0.0, difference / tried).round_().clamp_(LOWEST, HIGHEST)
        error = (difference - rounded * tried).square_().sum(-1, keepdim=True)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, tried, scale)
        number = torch.where(better, rounded, number)
    if not best.is_cuda and not bool(best.isfinite().all()):
        raise ValueError("some weights are no finite numbers: check the adapter's files, or train it again")
    nibbles = (number - LOWEST).to(torch.uint8).unflatten(-1, (2, -1))
    pairs = (nibbles[..., 0, :] | nibbles[..., 1, :] << 4).unflatten(-2, (-1, 2))  # [N, K / (2 * group), 2, group / 2]
    packed = pairs.permute(1, 0, 3, 2).reshape(len(base), -1)
    return packed, scale.squeeze(-1).T.to(torch.bfloat16).contiguous()


def unpack_difference(packed: Tensor, scales: Tensor) -> Tensor:
    """The differences themselves, float32 [..., N, K]. The kernel may round each once to the inputs' dtype."""
    group = packed.shape[-1] * 2 // scales.shape[-2]
    *rows, features, half = packed.shape
    pairs = packed.reshape(*rows, half // group, features, group // 2, 2).transpose(-4, -3).transpose(-2, -1)
    numbers = torch.stack([pairs & 15, pairs >> 4], dim=-2).flatten(-2).flatten(-3, -2).float() + LOWEST
    return (numbers * scales.float().transpose(-1, -2)[..., None]).flatten(-2)


def apply_difference(base: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """base [..., N, K] plus its difference, rounded once to the base's dtype: the row as a plain one."""
    return (base.float() + unpack_difference(packed, scales)).to(base.dtype)


def woven_product(
    x: Tensor,
    full: Tensor,
    rows: Tensor,
    out: Tensor,
    alignment: Aligned,
    *,
    top_k: int,
    blocks: Blocks,
    differences: Differences | None = None,
    topk_weights: Tensor | None = None,
    usual_rows: int | None = None,
) -> None:
    """out[p] = x[p // top_k] @ W(rows[p]).T (* topk_weights[p]) for each pick p, zeros where rows[p] is -1.

    x: [P / top_k, K]; full: [B, N, K] of x's dtype, rows contiguous in themselves; rows: int32 [P] in any shape; out:
    contiguous [P, N]; topk_weights: float32 [P] in any shape. W(r) is full[r], from B on the full row base_of[r - B]
    plus difference r - B. blocks: `blocks_of` the step's tokens and K, which may differ between linears in all but m,
    added and apart.m; alignment: `align_picks` with them. bf16, fp16 or fp32, sums in float32; where differences are
    apart, the base's product is rounded to x's dtype before theirs is added. Only the rows that picks name are read:
    the tensors may be views over memory that is not mapped elsewhere. On GPUs one launch, with differences apart two;
    the first is as wide as `usual_rows` different groups of picks need (all where it is None) and computes more all the
    same. Raises ValueError where the shapes do not fit.
    """
    picks = rows.numel()
    if x.ndim != 2 or x.shape[0] * top_k != picks or out.shape != (picks, full.shape[1]) or x.shape[1] != full.shape[2]:
        raise ValueError(
            f"x {list(x.shape)}, full rows {list(full.shape)}, {picks} picks of top {top_k} and out {list(out.shape)} "
            "do not fit: they must be [P / top_k, K], [B, N, K], P and [P, N]"
        )
    if x.is_cuda:
        from signalbox.kernels.difference_rows_triton import woven_product_triton

        woven_product_triton(x, full, rows, out, alignment, top_k, differences, topk_weights, blocks, usual_rows)
    else:
        out.copy_(grouped_product(x, full, rows, top_k=top_k, differences=differences, topk_weights=topk_weights))


def grouped_product(
    x: Tensor,
    full: Tensor,
    rows: Tensor,
    *,
    top_k: int,
    differences: Differences | None = None,
    topk_weights: Tensor | None = None,
) -> Tensor:
    """What `woven_product` writes, in plain PyTorch, on any device: [P, N] of x's dtype, computed in float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    flat = rows.flatten()
    out = torch.zeros(len(flat), full.shape[1], dtype=wide, device=x.device)
    for row in flat.unique().tolist():
        if row < 0:
            continue
        of = flat == row
        if row < len(full):
            weight = full[row].to(wide)
        else:
            assert differences is not None, f"row {row} is a difference, but none are given"
            i = row - len(full)
            weight = full[differences.base_of[i]].to(wide)
            weight = weight + unpack_difference(differences.packed[i], differences.scales[i])
        out[of] = x[of.nonzero().flatten() // top_k].to(wide) @ weight.T
    if topk_weights is not None:
        out *= topk_weights.reshape(-1, 1)
    return out.to(x.dtype)
