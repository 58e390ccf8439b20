"""`align_rows` by Triton kernels. Imported only where they run.

Of few picks (a decode step) each program owns some, and compares them with all to find how many come before in the same
group. Of more it compares them with those of their chunk, and a launch before has counted the groups of each chunk. Of
many (a long prompt) each program owns a group and puts all of its picks in place. How much room the groups before take,
it counts.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from signalbox.kernels.align import Alignment, capacity
from signalbox.kernels.align_kernels import (
    COUNTED,
    align_counted_kernel,
    align_few_kernel,
    align_many_kernel,
    count_kernel,
)

FEW = 4096  # picks that can be compared with all; two counts up to here fit into an int32
SHORT = 2048  # beyond so many they are counted before, which should be the faster way (not measured yet)
OWN = 16
FEW_CHUNK = 512  # picks looked at at a time
COUNTED_CHUNK = FEW // COUNTED.value
COUNTED_GROUPS = 1024  # the most, as a program keeps the counts of all chunks
MANY_CHUNK = 2048


def align_rows_triton(rows: Tensor, block: int, num_rows: int, base_of: Tensor | None = None) -> Alignment:
    """`align_rows` on a GPU, one launch or two."""
    picks = rows.numel()
    alignment = room_for(picks, block, num_rows, rows.device)
    by_row = base_of is not None  # which nothing can be counted for ahead
    if not picks:
        return alignment
    if not by_row and countable(picks, num_rows):
        align_counted(rows, None, alignment, None, block, num_rows, 0, 0)
    elif picks <= FEW:
        align_few(rows, base_of, alignment, None, block, num_rows, 0, 0, ordered=by_row)
    else:
        align_many(rows, base_of, alignment, block, 0, num_rows, ordered=by_row)
    return alignment


def align_apart_triton(
    rows: Tensor, block: int, num_rows: int, base_of: Tensor, apart: int
) -> tuple[Alignment, Alignment]:
    """`align_apart` on a GPU: one launch of a decode step's picks, two of a prompt's."""
    picks, differences = rows.numel(), len(base_of)
    together = room_for(picks, block, num_rows, rows.device)
    by_themselves = room_for(picks, apart, differences, rows.device)
    if not picks:
        return together, by_themselves
    if countable(picks, max(num_rows, differences)):
        align_counted(rows, base_of, together, by_themselves, block, num_rows, apart, differences)
    elif picks <= FEW:
        align_few(rows, base_of, together, by_themselves, block, num_rows, apart, differences)
    else:
        align_many(rows, base_of, together, block, 0, num_rows)
        align_many(rows, None, by_themselves, apart, num_rows, differences)
    return together, by_themselves


def groups_of(num_rows: int) -> int:
    """Places for counts of so many rows, of absent ones, and of none: a power of two."""
    return triton.next_power_of_2(num_rows + 2)


def countable(picks: int, num_rows: int) -> bool:
    """Whether picks are worth counting before they are put in place, and can be."""
    return SHORT < picks <= FEW and groups_of(num_rows) <= COUNTED_GROUPS


def constants(
    base_of: Tensor | None, by_themselves: Alignment | None, num_rows: int, differences: int
) -> dict[str, Any]:
    """What kernels for one alignment, or also for differences alone, are compiled by beside their blocks."""
    return {
        "DIFFERENCES": base_of is not None,
        "SIDES": 1 if by_themselves is None else 2,
        "GROUPS": groups_of(num_rows),
        "GROUPS_APART": groups_of(differences),
        "num_warps": 8,
    }


def align_few(
    rows: Tensor,
    base_of: Tensor | None,
    together: Alignment,
    by_themselves: Alignment | None,
    block: int,
    num_rows: int,
    apart: int,
    differences: int,
    *,
    ordered: bool = False,
) -> None:
    """Fills in one alignment or two of up to FEW picks, by one launch."""
    picks, second = rows.numel(), by_themselves or together
    compiled = constants(base_of, by_themselves, num_rows, differences)
    align_few_kernel[(triton.cdiv(picks, OWN), compiled["SIDES"])](
        rows,
        rows if base_of is None else base_of,
        *together,
        *second,
        picks,
        len(together.block_rows),
        num_rows,
        len(second.block_rows),
        differences,
        **compiled,
        ORDERED=ordered,
        BLOCK=block,
        PAD=triton.next_power_of_2(block),
        BLOCK_APART=max(1, apart),
        OWN=OWN,
        CHUNK=FEW_CHUNK,
        # Two programs to a multiprocessor, so that those of both alignments run at a time.
        maxnreg=None if by_themselves is None else 128,
    )


def align_counted(
    rows: Tensor,
    base_of: Tensor | None,
    together: Alignment,
    by_themselves: Alignment | None,
    block: int,
    num_rows: int,
    apart: int,
    differences: int,
) -> None:
    """Fills in one alignment or two of up to FEW picks, by two launches."""
    picks, second = rows.numel(), by_themselves or together
    chunks = triton.cdiv(picks, COUNTED_CHUNK)
    compiled = constants(base_of, by_themselves, num_rows, differences) | {"CHUNK": COUNTED_CHUNK}
    sides, counted = compiled["SIDES"], chunks * (compiled["GROUPS"] + compiled["GROUPS_APART"])
    behind = -(-sides * picks // 4) * 4  # each begins where 16 bytes do, or kernels are compiled for either case
    memory = torch.empty(behind + counted, dtype=torch.int32, device=rows.device)
    ranks, counts = memory[:behind], memory[behind:]
    given = (rows, rows if base_of is None else base_of, counts, ranks)
    count_kernel[(chunks, sides)](*given, picks, num_rows, differences, **compiled)
    align_counted_kernel[(triton.cdiv(picks, OWN), sides)](
        *given,
        *together,
        *second,
        picks,
        chunks,
        len(together.block_rows),
        num_rows,
        len(second.block_rows),
        differences,
        **compiled,
        BLOCK=block,
        PAD=triton.next_power_of_2(block),
        BLOCK_APART=max(1, apart),
        OWN=OWN,
    )


def align_many(
    rows: Tensor,
    base_of: Tensor | None,
    alignment: Alignment,
    block: int,
    first: int,
    num_rows: int,
    *,
    ordered: bool = False,
) -> None:
    """Fills in an alignment of any number of picks. Rows count from `first`, and those below are in no block then."""
    align_many_kernel[(num_rows + 1,)](
        rows,
        rows if base_of is None else base_of,
        *alignment,
        rows.numel(),
        len(alignment.block_rows),
        first,
        num_rows,
        DIFFERENCES=base_of is not None,
        ORDERED=ordered,
        ABSENT=not first,
        GROUPS=groups_of(num_rows),
        BLOCK=block,
        PAD=triton.next_power_of_2(block),
        CHUNK=MANY_CHUNK,
        num_warps=8,
    )


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
