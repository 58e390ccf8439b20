"""The Triton kernels of `align_rows`. Imported only where they run.

One launch and no atomics between programs: what a program needs to know of the others' work it finds out by itself,
by looking at all picks. Of few picks (a decode step) each program owns some, and compares them with all to find how
many come before in the same group. Of many (a prompt) each program owns a group and puts all of its picks in place.
How much room the groups before take, it counts. Compiled by the block's size and the power of two above the number of
rows, never by the number of picks.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from signalbox.kernels.align import Alignment, capacity

FEW = 4096  # picks up to which programs own picks; two counts up to here fit into an int32
OWN = 16
FEW_CHUNK = 512  # picks looked at at a time
MANY_CHUNK = 2048
TOGETHER = tl.constexpr(1 << 16)
NONE = tl.constexpr(2**31 - 1)


@triton.jit
def rows_and_groups(rows, base_of, i, picks, first, num_rows, DIFFERENCES: tl.constexpr, ABSENT: tl.constexpr):
    """Row from `first` on and group of pick i: the row or that row's base; num_rows: absent, num_rows + 1: none.

    Rows below `first` are absent, or of no group where ABSENT picks are to have none.
    """
    row = tl.load(rows + i, mask=i < picks, other=-1) - first
    group = row
    if DIFFERENCES:
        base = tl.load(base_of + row - num_rows, mask=row >= num_rows, other=0)
        group = tl.where(row >= num_rows, base, row)
    return row, tl.where(i < picks, tl.where(row < 0, num_rows + (0 if ABSENT else 1), group), num_rows + 1)


@triton.jit
def place_own(
    rows,
    base_of,
    sorted_ids,
    block_rows,
    padded,
    picks,
    blocks,
    first,
    num_rows,
    DIFFERENCES: tl.constexpr,
    ABSENT: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    PAD: tl.constexpr,
    OWN: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Puts OWN picks in place. GROUPS: power of two, at least num_rows + 2; PAD: power of two, at least BLOCK - 1."""
    own = tl.program_id(0) * OWN + tl.arange(0, OWN)
    own_row, mine = rows_and_groups(rows, base_of, own, picks, first, num_rows, DIFFERENCES, ABSENT)
    counts = tl.zeros((GROUPS,), tl.int32)
    found = tl.zeros((OWN, CHUNK), tl.int32)
    for start in range(0, picks, CHUNK):
        i = start + tl.arange(0, CHUNK)
        row, theirs = rows_and_groups(rows, base_of, i, picks, first, num_rows, DIFFERENCES, ABSENT)
        counts += tl.histogram(theirs, GROUPS)
        before = i[None, :] < own[:, None]
        if DIFFERENCES:
            before = (row[None, :] < own_row[:, None]) | ((row[None, :] == own_row[:, None]) & before)
        # Picks of the same group in the low half, those of them that come before in the high half.
        found += tl.where(theirs[None, :] == mine[:, None], tl.where(before, TOGETHER + 1, 1), 0)
    both = tl.sum(found, axis=1)
    count = both % TOGETHER
    place = both // TOGETHER
    group = tl.arange(0, GROUPS)
    room = tl.where(group <= num_rows, (counts + BLOCK - 1) // BLOCK * BLOCK, 0)
    total = tl.sum(room, axis=0)
    at = place + tl.sum(tl.where(group[None, :] < mine[:, None], room[None, :], 0), axis=1)
    present = mine <= num_rows
    tl.store(sorted_ids + at, own, mask=present)
    # The first pick of a block names the block's row, the last pick of a group fills up its block.
    tl.store(block_rows + at // BLOCK, tl.where(mine < num_rows, mine, -1), mask=present & (place % BLOCK == 0))
    after = 1 + tl.arange(0, PAD)[None, :]
    last = (present & (place == count - 1))[:, None]
    rest = (BLOCK - 1 - place % BLOCK)[:, None]
    tl.store(sorted_ids + at[:, None] + after, tl.zeros((OWN, PAD), tl.int32) + picks, mask=last & (after <= rest))
    # There are no more blocks than picks, so that each program has its share of those that are not used.
    tl.store(block_rows + own, tl.full((OWN,), -1, tl.int32), mask=(own >= total // BLOCK) & (own < blocks))
    if tl.program_id(0) == 0:
        tl.store(padded, total)


@triton.jit(do_not_specialize=["picks", "blocks", "num_rows"])
def align_few_kernel(
    rows,
    base_of,
    sorted_ids,
    block_rows,
    padded,
    picks,
    blocks,
    num_rows,
    DIFFERENCES: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    PAD: tl.constexpr,
    OWN: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One alignment of few picks."""
    place_own(
        rows,
        base_of,
        sorted_ids,
        block_rows,
        padded,
        picks,
        blocks,
        0,
        num_rows,
        DIFFERENCES,
        True,
        GROUPS,
        BLOCK,
        PAD,
        OWN,
        CHUNK,
    )


@triton.jit(do_not_specialize=["picks", "blocks", "num_rows", "blocks_apart", "differences"])
def align_few_apart_kernel(
    rows,
    base_of,
    sorted_ids,
    block_rows,
    padded,
    sorted_apart,
    block_apart,
    padded_apart,
    picks,
    blocks,
    num_rows,
    blocks_apart,
    differences,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    PAD: tl.constexpr,
    GROUPS_APART: tl.constexpr,
    BLOCK_APART: tl.constexpr,
    OWN: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Both alignments of few picks, by programs of their own."""
    if tl.program_id(1) == 0:
        place_own(
            rows,
            base_of,
            sorted_ids,
            block_rows,
            padded,
            picks,
            blocks,
            0,
            num_rows,
            True,
            True,
            GROUPS,
            BLOCK,
            PAD,
            OWN,
            CHUNK,
        )
    else:
        place_own(
            rows,
            base_of,
            sorted_apart,
            block_apart,
            padded_apart,
            picks,
            blocks_apart,
            num_rows,
            differences,
            False,
            False,
            GROUPS_APART,
            BLOCK_APART,
            BLOCK_APART,
            OWN,
            CHUNK,
        )


@triton.jit(do_not_specialize=["picks", "blocks", "first", "num_rows"])
def align_many_kernel(
    rows,
    base_of,
    sorted_ids,
    block_rows,
    padded,
    picks,
    blocks,
    first,
    num_rows,
    DIFFERENCES: tl.constexpr,
    ABSENT: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    PAD: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Puts all picks of one group in place, one row of it after the other. GROUPS and PAD as above."""
    mine = tl.program_id(0)
    each = tl.arange(0, CHUNK)
    counts = tl.zeros((GROUPS,), tl.int32)
    lowest = tl.full((CHUNK,), NONE, tl.int32)
    for start in range(0, picks, CHUNK):
        row, theirs = rows_and_groups(rows, base_of, start + each, picks, first, num_rows, DIFFERENCES, ABSENT)
        counts += tl.histogram(theirs, GROUPS)
        lowest = tl.minimum(lowest, tl.where(theirs == mine, row, NONE))
    group = tl.arange(0, GROUPS)
    room = tl.where(group <= num_rows, (counts + BLOCK - 1) // BLOCK * BLOCK, 0)
    total = tl.sum(room, axis=0)
    begin = tl.sum(tl.where(group < mine, room, 0), axis=0)
    own_room = tl.sum(tl.where(group == mine, room, 0), axis=0)
    done = 0
    current = tl.min(lowest, axis=0)
    while current < NONE:
        lowest = tl.full((CHUNK,), NONE, tl.int32)
        for start in range(0, picks, CHUNK):
            i = start + each
            row, theirs = rows_and_groups(rows, base_of, i, picks, first, num_rows, DIFFERENCES, ABSENT)
            equal = ((theirs == mine) & (row == current)).to(tl.int32)
            place = done + tl.cumsum(equal, axis=0) - 1
            tl.store(sorted_ids + begin + place, i, mask=equal > 0)
            done += tl.sum(equal, axis=0)
            lowest = tl.minimum(lowest, tl.where((theirs == mine) & (row > current), row, NONE))
        current = tl.min(lowest, axis=0)
    pad = done + tl.arange(0, PAD)
    tl.store(sorted_ids + begin + pad, tl.zeros((PAD,), tl.int32) + picks, mask=pad < own_room)
    row = tl.where(mine < num_rows, mine, -1)
    for start in range(0, own_room // BLOCK, CHUNK):
        tl.store(block_rows + begin // BLOCK + start + each, row + each * 0, mask=start + each < own_room // BLOCK)
    for start in range(total // BLOCK + mine * CHUNK, blocks, tl.num_programs(0) * CHUNK):
        tl.store(block_rows + start + each, each * 0 - 1, mask=start + each < blocks)
    if mine == 0:
        tl.store(padded, total)


def align_rows_triton(
    rows: Tensor, block: int, num_rows: int, base_of: Tensor | None = None, first: int = 0
) -> Alignment:
    """`align_rows` on a GPU, one launch. With `first`, rows count from there and those below are in no block."""
    picks = rows.numel()
    alignment = room_for(picks, block, num_rows, rows.device)
    if not picks:
        return alignment
    sizes = {
        "DIFFERENCES": base_of is not None,
        "GROUPS": triton.next_power_of_2(num_rows + 2),
        "BLOCK": block,
        "PAD": triton.next_power_of_2(block),
    }
    arguments = (rows, rows if base_of is None else base_of, *alignment, picks, len(alignment.block_rows))
    if picks <= FEW and not first:
        grid = (triton.cdiv(picks, OWN),)
        align_few_kernel[grid](*arguments, num_rows, **sizes, OWN=OWN, CHUNK=FEW_CHUNK, num_warps=8)
    else:
        absent = {"ABSENT": not first, "CHUNK": MANY_CHUNK}
        align_many_kernel[(num_rows + 1,)](*arguments, first, num_rows, **sizes, **absent, num_warps=8)
    return alignment


def align_apart_triton(
    rows: Tensor, block: int, num_rows: int, base_of: Tensor, apart: int
) -> tuple[Alignment, Alignment]:
    """`align_apart` on a GPU: one launch of a decode step's picks, two of a prompt's."""
    picks, differences = rows.numel(), len(base_of)
    if picks > FEW:
        together = align_rows_triton(rows, block, num_rows, base_of)
        return together, align_rows_triton(rows, apart, differences, first=num_rows)
    together = room_for(picks, block, num_rows, rows.device)
    by_themselves = room_for(picks, apart, differences, rows.device)
    if picks:
        align_few_apart_kernel[(triton.cdiv(picks, OWN), 2)](
            rows,
            base_of,
            *together,
            *by_themselves,
            picks,
            len(together.block_rows),
            num_rows,
            len(by_themselves.block_rows),
            differences,
            GROUPS=triton.next_power_of_2(num_rows + 2),
            BLOCK=block,
            PAD=triton.next_power_of_2(block),
            GROUPS_APART=triton.next_power_of_2(differences + 2),
            BLOCK_APART=apart,
            OWN=OWN,
            CHUNK=FEW_CHUNK,
            num_warps=8,
            maxnreg=128,  # two programs to a multiprocessor, so that those of both alignments run at a time
        )
    return together, by_themselves


def room_for(picks: int, block: int, num_rows: int, device: torch.device) -> Alignment:
    """Memory of an alignment, not filled; of no picks it is as it has to be."""
    size = capacity(picks, block, num_rows)
    # One allocation for all three; each begins where 16 bytes do, as kernels like to read them.
    blocks = size // block
    ends = [-(-size // 4) * 4, -(-size // 4) * 4 + -(-blocks // 4) * 4]
    memory = torch.empty(ends[1] + 1, dtype=torch.int32, device=device)
    if not picks:
        memory.zero_()
    return Alignment(memory[:size], memory[ends[0] : ends[0] + blocks], memory[ends[1] :])
