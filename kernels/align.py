"""Which picks a block of a grouped matrix product computes: picks grouped by expert row, padded to whole blocks.

A step's picks are its (token, chosen expert) pairs, numbered token * K + k. The form is that of vLLM's
`moe_align_block_size`, so that its grouped kernel runs on it; the cost is not: it follows the picks, not the rows that
are reserved, and no row is too large a number. Rows that are stored as differences to another row
(`kernels/difference_rows.py`) can be grouped with that row, so that it is read once for itself and all of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Alignment(NamedTuple):
    """Picks by block. All int32 and on one device; what lies beyond `padded` means nothing.

    sorted_ids [capacity]: numbers of picks, group after group, each group filled up to whole blocks with the number of
    picks (which no pick has). block_rows [capacity / block]: the row of each block's group, -1 for picks that this
    rank does not compute, and beyond `padded`. padded [1]: the number of entries of `sorted_ids` that count.
    """

    sorted_ids: Tensor
    block_rows: Tensor
    padded: Tensor


def capacity(picks: int, block: int, num_rows: int) -> int:
    """The most entries that any choice of rows can need, a multiple of `block`: groups of one pick, one of the rest.

    Raises ValueError unless there is at least one entry a block.
    """
    if block < 1:
        raise ValueError(f"a block of {block} entries holds nothing: give at least 1")
    groups = min(picks, num_rows + 1)
    return (groups + (picks - groups) // block) * block


def align_rows(rows: Tensor, block: int, num_rows: int, base_of: Tensor | None = None) -> Alignment:
    """Group the picks by row, groups in ascending order, picks of a row too, so that the result is the same always.

    rows: int32, contiguous, of any shape, flattened: each pick's row, or -1 (on another rank; such picks are the last
    group). Without `base_of` each is below `num_rows`. With it, int32 [differences], row num_rows + i is a difference
    to row base_of[i] and grouped with it, row after row, so that few blocks have picks of the same difference;
    `block_rows` then names row base_of[i]. On GPUs it is one launch or two, waits for nothing, and the values are not
    checked. Raises ValueError for another dtype or a strided tensor.
    """
    if rows.dtype != torch.int32 or not rows.is_contiguous():
        raise ValueError(f"rows must be contiguous int32, not {rows.dtype} with strides {rows.stride()}")
    if rows.is_cuda:
        from signalbox.kernels.align_triton import align_rows_triton

        return align_rows_triton(rows, block, num_rows, base_of)
    return align_rows_torch(rows, block, num_rows, base_of)


def align_apart(rows: Tensor, block: int, num_rows: int, base_of: Tensor, apart: int) -> tuple[Alignment, Alignment]:
    """`align_rows` of the rows or their bases, and the differences' picks by themselves too, in blocks of `apart`.

    In both, picks of a group are in ascending order. The second's groups are the differences, its `block_rows` their
    numbers from 0; other picks are in none of its blocks, so that it has none where all are the base's. Raises as
    `align_rows` does.
    """
    if rows.dtype != torch.int32 or not rows.is_contiguous():
        raise ValueError(f"rows must be contiguous int32, not {rows.dtype} with strides {rows.stride()}")
    if rows.is_cuda:
        from signalbox.kernels.align_triton import align_apart_triton

        return align_apart_triton(rows, block, num_rows, base_of, apart)
    based = rows if not len(base_of) else base_of[(rows - num_rows).clamp(min=0).long()]
    together = align_rows_torch(torch.where(rows < num_rows, rows, based).contiguous(), block, num_rows)
    return together, align_rows_torch(rows, apart, len(base_of), first=num_rows)


def align_rows_torch(
    rows: Tensor, block: int, num_rows: int, base_of: Tensor | None = None, first: int = 0
) -> Alignment:
    """`align_rows` in plain PyTorch, on any device. Rows count from `first`; those below it are in no block then."""
    picks, size = rows.numel(), capacity(rows.numel(), block, num_rows)
    group = rows.flatten().long() - first
    if base_of is not None and len(base_of):
        of_base = base_of.long()[(group - num_rows).clamp(min=0)]
        group = torch.where(group < num_rows, group, of_base)
    group = torch.where(group < 0, num_rows, group)
    count = torch.zeros(num_rows + 1, dtype=torch.int64, device=rows.device).index_add_(0, group, group.new_ones(picks))
    room = (count + block - 1) // block * block
    if first:
        room[num_rows] = 0
    end, taken = room.cumsum(0), count.cumsum(0)
    order = rows.flatten().argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    ordered = group[order]
    place = torch.arange(picks, device=rows.device) - (taken - count)[ordered] + (end - room)[ordered]
    sorted_ids = torch.full((size,), picks, dtype=torch.int32, device=rows.device)
    kept = (ordered < num_rows) | (first == 0)
    sorted_ids[place[kept]] = order[kept].to(torch.int32)
    starts = torch.arange(0, size, block, device=rows.device)
    block_rows = torch.searchsorted(end, starts, right=True).to(torch.int32)
    # The group of absent picks, and what lies behind the last group, is no row.
    block_rows = torch.where(block_rows < num_rows, block_rows, -1)
    return Alignment(sorted_ids, block_rows, end[-1:].to(torch.int32))
