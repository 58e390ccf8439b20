"""The Triton kernels of `align_triton`, compiled by the block's size and the power of two above the number of rows.

Nothing in them depends on the number of picks, and no program waits for another or adds to its numbers: what it needs
to know of the others' work it finds out by itself, or a launch before has.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

COUNTED = tl.constexpr(32)  # chunks of picks that are counted before
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
def write_own(
    sorted_ids,
    block_rows,
    padded,
    picks,
    blocks,
    num_rows,
    own,
    mine,
    place,
    count,
    counts,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    PAD: tl.constexpr,
    OWN: tl.constexpr,
):
    """Writes OWN picks of groups `mine`, each the `place`-th of `count` there. counts [GROUPS]: picks of each group.

    GROUPS: power of two, at least num_rows + 2; PAD: power of two, at least BLOCK - 1.
    """
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
    ORDERED: tl.constexpr,
    ABSENT: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    PAD: tl.constexpr,
    OWN: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Puts OWN picks in place, in ascending order in a group, or row after row where ORDERED."""
    own = tl.program_id(0) * OWN + tl.arange(0, OWN)
    own_row, mine = rows_and_groups(rows, base_of, own, picks, first, num_rows, DIFFERENCES, ABSENT)
    counts = tl.zeros((GROUPS,), tl.int32)
    found = tl.zeros((OWN, CHUNK), tl.int32)
    for start in range(0, picks, CHUNK):
        i = start + tl.arange(0, CHUNK)
        row, theirs = rows_and_groups(rows, base_of, i, picks, first, num_rows, DIFFERENCES, ABSENT)
        counts += tl.histogram(theirs, GROUPS)
        before = i[None, :] < own[:, None]
        if ORDERED:
            before = (row[None, :] < own_row[:, None]) | ((row[None, :] == own_row[:, None]) & before)
        # Picks of the same group in the low half, those of them that come before in the high half.
        found += tl.where(theirs[None, :] == mine[:, None], tl.where(before, TOGETHER + 1, 1), 0)
    both = tl.sum(found, axis=1)
    place, count = both // TOGETHER, both % TOGETHER
    write_own(
        sorted_ids,
        block_rows,
        padded,
        picks,
        blocks,
        num_rows,
        own,
        mine,
        place,
        count,
        counts,
        GROUPS,
        BLOCK,
        PAD,
        OWN,
    )


@triton.jit(do_not_specialize=["picks", "blocks", "num_rows", "blocks_apart", "differences"])
def align_few_kernel(
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
    DIFFERENCES: tl.constexpr,
    ORDERED: tl.constexpr,
    SIDES: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    PAD: tl.constexpr,
    GROUPS_APART: tl.constexpr,
    BLOCK_APART: tl.constexpr,
    OWN: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One alignment of few picks, or also the one of differences alone: SIDES, each with programs of its own."""
    if SIDES == 1 or tl.program_id(1) == 0:
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
            ORDERED,
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
            False,
            GROUPS_APART,
            BLOCK_APART,
            BLOCK_APART,
            OWN,
            CHUNK,
        )


@triton.jit
def count_chunk(
    rows,
    base_of,
    counts,
    ranks,
    picks,
    first,
    num_rows,
    DIFFERENCES: tl.constexpr,
    ABSENT: tl.constexpr,
    GROUPS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Counts a chunk's picks by group, into counts [chunks, GROUPS], and how many come before each in its group."""
    chunk = tl.program_id(0)
    i = chunk * CHUNK + tl.arange(0, CHUNK)
    _, group = rows_and_groups(rows, base_of, i, picks, first, num_rows, DIFFERENCES, ABSENT)
    tl.store(counts + chunk * GROUPS + tl.arange(0, GROUPS), tl.histogram(group, GROUPS))
    before = (group[None, :] == group[:, None]) & (i[None, :] < i[:, None])
    tl.store(ranks + i, tl.sum(before.to(tl.int32), axis=1), mask=i < picks)


@triton.jit(do_not_specialize=["picks", "num_rows", "differences"])
def count_kernel(
    rows,
    base_of,
    counts,
    ranks,
    picks,
    num_rows,
    differences,
    DIFFERENCES: tl.constexpr,
    SIDES: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_APART: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """`count_chunk` of each chunk for SIDES alignments, the one of differences alone behind the other in memory."""
    if SIDES == 1 or tl.program_id(1) == 0:
        count_chunk(rows, base_of, counts, ranks, picks, 0, num_rows, DIFFERENCES, True, GROUPS, CHUNK)
    else:
        apart = counts + tl.num_programs(0) * GROUPS
        count_chunk(
            rows, base_of, apart, ranks + picks, picks, num_rows, differences, False, False, GROUPS_APART, CHUNK
        )


@triton.jit
def place_counted(
    rows,
    base_of,
    counts,
    ranks,
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
    """Puts OWN picks of one chunk in place, all chunks counted."""
    own = tl.program_id(0) * OWN + tl.arange(0, OWN)
    _, mine = rows_and_groups(rows, base_of, own, picks, first, num_rows, DIFFERENCES, ABSENT)
    chunk = tl.arange(0, COUNTED)[:, None]
    group = tl.arange(0, GROUPS)[None, :]
    parts = tl.load(counts + chunk * GROUPS + group, mask=chunk * CHUNK < picks, other=0)
    counted = tl.sum(parts, axis=0)
    before = tl.sum(tl.where(chunk < tl.program_id(0) * OWN // CHUNK, parts, 0), axis=0)
    same = group == mine[:, None]
    place = tl.load(ranks + own, mask=own < picks, other=0) + tl.sum(tl.where(same, before[None, :], 0), axis=1)
    count = tl.sum(tl.where(same, counted[None, :], 0), axis=1)
    write_own(
        sorted_ids,
        block_rows,
        padded,
        picks,
        blocks,
        num_rows,
        own,
        mine,
        place,
        count,
        counted,
        GROUPS,
        BLOCK,
        PAD,
        OWN,
    )


@triton.jit(do_not_specialize=["picks", "chunks", "blocks", "num_rows", "blocks_apart", "differences"])
def align_counted_kernel(
    rows,
    base_of,
    counts,
    ranks,
    sorted_ids,
    block_rows,
    padded,
    sorted_apart,
    block_apart,
    padded_apart,
    picks,
    chunks,
    blocks,
    num_rows,
    blocks_apart,
    differences,
    DIFFERENCES: tl.constexpr,
    SIDES: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    PAD: tl.constexpr,
    GROUPS_APART: tl.constexpr,
    BLOCK_APART: tl.constexpr,
    OWN: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """SIDES alignments of picks that `count_kernel` has counted."""
    if SIDES == 1 or tl.program_id(1) == 0:
        place_counted(
            rows,
            base_of,
            counts,
            ranks,
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
    else:
        place_counted(
            rows,
            base_of,
            counts + chunks * GROUPS,
            ranks + picks,
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
    ORDERED: tl.constexpr,
    ABSENT: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    PAD: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Puts all picks of one group in place, where ORDERED one row of it after the other. GROUPS and PAD as above."""
    mine = tl.program_id(0)
    each = tl.arange(0, CHUNK)
    counts = tl.zeros((GROUPS,), tl.int32)
    lowest = tl.full((CHUNK,), NONE, tl.int32)
    for start in range(0, picks, CHUNK):
        row, theirs = rows_and_groups(rows, base_of, start + each, picks, first, num_rows, DIFFERENCES, ABSENT)
        counts += tl.histogram(theirs, GROUPS)
        if ORDERED:
            lowest = tl.minimum(lowest, tl.where(theirs == mine, row, NONE))
    group = tl.arange(0, GROUPS)
    room = tl.where(group <= num_rows, (counts + BLOCK - 1) // BLOCK * BLOCK, 0)
    total = tl.sum(room, axis=0)
    begin = tl.sum(tl.where(group < mine, room, 0), axis=0)
    own_room = tl.sum(tl.where(group == mine, room, 0), axis=0)
    done = 0
    current = tl.min(lowest, axis=0) if ORDERED else NONE - tl.where(own_room > 0, 1, 0)
    while current < NONE:
        lowest = tl.full((CHUNK,), NONE, tl.int32)
        for start in range(0, picks, CHUNK):
            i = start + each
            row, theirs = rows_and_groups(rows, base_of, i, picks, first, num_rows, DIFFERENCES, ABSENT)
            equal = (theirs == mine).to(tl.int32)
            if ORDERED:
                equal = ((theirs == mine) & (row == current)).to(tl.int32)
                lowest = tl.minimum(lowest, tl.where((theirs == mine) & (row > current), row, NONE))
            place = done + tl.cumsum(equal, axis=0) - 1
            tl.store(sorted_ids + begin + place, i, mask=equal > 0)
            done += tl.sum(equal, axis=0)
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
