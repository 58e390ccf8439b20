"""Many LoRA adapters in one batch: each row of a packed batch goes through the adapter of its own request.

    y[n] += (x[n] @ A[slot[n]].T) @ B[slot[n]]        (B with the adapter's scaling already in it)

Rows of slot -1 belong to the base and are not touched, not a bit of them. After Punica's segmented gather
matrix-vector product (Chen et al., 2023, section 4) and S-LoRA (Sheng et al., 2023, section 5). `add_lora` chooses by
device: Triton on GPUs, PyTorch on CPUs, where few operations count more than few multiplications. What is the same
for all linears of a step, which rows belong to whom, is prepared once a step as `Segments`.

B is stored [rank, out], transposed against PEFT's files: an adapter of a rank below the greatest is then one
contiguous piece of memory in both matrices, and the padding is neither read nor computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

# On CPU, so many rows of one adapter are a matrix product of their own; fewer are batched with other adapters' rows.
LONG = 8
# Idle slots that a batched product may step over (multiplied by a zero mask) to be one operation instead of two.
GAP = 4
# Rows of one tile of the Triton kernels: up to SMALL_BATCH rows in the batch, and above.
SMALL_BATCH, TILE, LARGE_TILE = 256, 16, 64


@dataclass(slots=True)
class LoraWeights:
    """The adapters of one linear, or of several that share their input and have their outputs side by side.

    a: [slices, slots, max_rank, in]; b: [slots, max_rank, sum of outs]; ranks: int32 [slots], 0 for an adapter that
    leaves this linear alone. All are allocated once and written in place, so that their addresses never change.
    outs: the output features of each slice.
    """

    a: Tensor
    b: Tensor
    ranks: Tensor
    outs: tuple[int, ...]
    bits: int = 0  # bit s: slot s adapts this linear; the CPU's copy of `ranks > 0`
    _written: dict[int, int] = field(default_factory=dict)  # slot -> highest rank that lies in it

    @classmethod
    def allocate(
        cls,
        slots: int,
        max_rank: int,
        in_features: int,
        outs: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> LoraWeights:
        """Zeros for so many adapters; on CPU memory is taken when a slot is first written, not before."""
        device = torch.device(device)
        return cls(
            a=_zeros((len(outs), slots, max_rank, in_features), dtype, device),
            b=_zeros((slots, max_rank, sum(outs)), dtype, device),
            ranks=torch.zeros(slots, dtype=torch.int32, device=device),
            outs=tuple(outs),
        )

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return (self.a.numel() + self.b.numel()) * self.a.element_size()

    def write(self, slot: int, parts: Sequence[tuple[Tensor, Tensor, float] | None]) -> None:
        """Put an adapter into a slot that no running row uses: (A [rank, in], B [out, rank], scaling) per slice.

        None where the adapter leaves a slice alone. Slices may differ in rank. Raises ValueError where a part does
        not fit.
        """
        ranks = [0 if part is None else part[0].shape[0] for part in parts]
        rank, stale = max(ranks), self._written.get(slot, 0)
        slices, _, max_rank, in_features = self.a.shape
        if len(parts) != slices or rank > max_rank:
            raise ValueError(f"{len(parts)} parts of rank {rank}: this storage has {slices} of at most {max_rank}")
        used = max(rank, stale)
        start = 0
        for i, (part, out) in enumerate(zip(parts, self.outs, strict=True)):
            mine = ranks[i]
            if part is not None:
                a, b, scaling = part
                if a.shape[1] != in_features or b.shape != (out, mine):
                    raise ValueError(f"A {list(a.shape)} and B {list(b.shape)} do not fit {out} x {in_features}")
                self.a[i, slot, :mine].copy_(a)
                # Scaled in float32, then rounded once to the storage's type.
                self.b[slot, :mine, start : start + out].copy_(b.T.float() * scaling)
            self.a[i, slot, mine:used].zero_()
            self.b[slot, mine:used, start : start + out].zero_()
            start += out
        self._written[slot] = rank
        self.ranks[slot] = rank
        bit = 1 << slot
        self.bits = self.bits | bit if rank else self.bits & ~bit


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # calloc's zero pages cost nothing until they are written; torch.zeros would touch them all.
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


@dataclass(slots=True, frozen=True)
class Block:
    """CPU: rows that are computed by one pair of matrix products, over the slots `first..last`.

    `rows` is a slice of the batch, or an index [groups * rows of a group]: with `mask` [groups, rows, 1] zero where
    a place in it is only filled.
    """

    first: int
    last: int
    rank: int
    bits: int
    rows: slice | Tensor
    mask: Tensor | None = None


@dataclass(slots=True)
class Segments:
    """A step's rows by adapter, for all linears that see these rows.

    CPU: `blocks`. GPU: `order`, int32 [rows]: the rows that have an adapter, grouped by slot; `tiles`, int32
    [tiles, 3]: slot, first place in `order`, number of rows (0: an empty tile). The tensors keep their address over
    `refill`, as CUDA graphs need it.
    """

    count: int
    blocks: list[Block] = field(default_factory=list)
    order: Tensor | None = None
    tiles: Tensor | None = None
    threads: int = 1

    @classmethod
    def of(cls, slots: Sequence[int], ranks: Sequence[int], device: torch.device | str) -> Segments | None:
        """From the slot of each row (-1: base) and the rank of each slot; None where all rows are the base's."""
        if not any(slot >= 0 for slot in slots):
            return None
        device = torch.device(device)
        if device.type == "cpu":
            return cls(len(slots), blocks=plan_blocks(slots, ranks), threads=torch.get_num_threads())
        order, tiles = plan_tiles(slots)
        packed = torch.from_numpy(np.concatenate([tiles.ravel(), order]))
        packed = packed.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else packed.to(device)
        return cls(len(slots), order=packed[tiles.size :], tiles=packed[: tiles.size].view(-1, 3))

    @classmethod
    def reserve(cls, count: int, slots: int, device: torch.device | str) -> Segments:
        """Room for any batch of `count` rows over `slots` adapters, for kernels captured in a CUDA graph."""
        size = tile_of(count)
        tiles = torch.zeros(min(count, count // size + slots), 3, dtype=torch.int32, device=device)
        return cls(count, order=torch.zeros(count, dtype=torch.int32, device=device), tiles=tiles)

    def refill(self, slots: Sequence[int]) -> None:
        """Put another batch of the same number of rows in place. Raises ValueError where its number differs."""
        if len(slots) != self.count or self.order is None or self.tiles is None:
            raise ValueError(f"{len(slots)} rows where {self.count} were reserved")
        order, tiles = plan_tiles(slots)
        padded = np.zeros((self.tiles.shape[0], 3), np.int32)
        padded[: len(tiles)] = tiles
        self.tiles.copy_(torch.from_numpy(padded))
        self.order[: len(order)].copy_(torch.from_numpy(order))


def tile_of(count: int) -> int:
    """Rows of a tile in a batch of `count` rows."""
    return TILE if count <= SMALL_BATCH else LARGE_TILE


def plan_tiles(slots: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """`order` and `tiles` of `Segments`, int32, on the host."""
    array = np.asarray(slots, np.int32)
    order = np.argsort(array, kind="stable").astype(np.int32)
    order = order[np.count_nonzero(array < 0) :]
    used, starts, counts = np.unique(array[order], return_index=True, return_counts=True)
    size = tile_of(len(array))
    tiles = [
        (slot, start + at, min(size, count - at))
        for slot, start, count in zip(used.tolist(), starts.tolist(), counts.tolist(), strict=True)
        for at in range(0, count, size)
    ]
    return order, np.asarray(tiles, np.int32).reshape(-1, 3)


def plan_blocks(slots: Sequence[int], ranks: Sequence[int]) -> list[Block]:
    """The CPU's matrix products: long runs as they lie, many rows of one adapter gathered, few rows of many batched."""
    blocks: list[Block] = []
    few: dict[int, list[int]] = {}
    start = 0
    for end in range(1, len(slots) + 1):
        if end < len(slots) and slots[end] == slots[start]:
            continue
        slot = slots[start]
        if slot >= 0 and end - start >= LONG:
            blocks.append(Block(slot, slot + 1, ranks[slot], 1 << slot, slice(start, end)))
        elif slot >= 0:
            few.setdefault(slot, []).extend(range(start, end))
        start = end
    batch: list[int] = []
    for slot in sorted(few):
        if len(few[slot]) >= LONG:
            blocks.append(_batched([slot], few, ranks))
            continue
        if batch and slot - batch[-1] > GAP + 1:
            blocks.append(_batched(batch, few, ranks))
            batch = []
        batch.append(slot)
    if batch:
        blocks.append(_batched(batch, few, ranks))
    return blocks


def _batched(slots: list[int], rows: dict[int, list[int]], ranks: Sequence[int]) -> Block:
    """One block for several slots; what fills it up are rows that have an adapter anyway, times zero."""
    first, last = slots[0], slots[-1] + 1
    rank, bits = max(ranks[s] for s in slots), sum(1 << s for s in slots)
    mine = rows[first]
    if last - first == 1 and mine[-1] - mine[0] + 1 == len(mine):
        return Block(first, last, rank, bits, slice(mine[0], mine[-1] + 1))
    longest = max(len(rows[s]) for s in slots)
    index, mask, full = [], [], True
    for slot in range(first, last):
        own = rows[slot] if bits >> slot & 1 else []
        filler = own or mine
        full &= len(own) == longest
        index += own + filler[:1] * (longest - len(own))
        mask += [1.0] * len(own) + [0.0] * (longest - len(own))
    return Block(
        first,
        last,
        rank,
        bits,
        torch.tensor(index, dtype=torch.int64),
        None if full else torch.tensor(mask).view(last - first, longest, 1),
    )


def add_lora(y: Tensor, x: Tensor, weights: LoraWeights, segments: Segments) -> None:
    """Add the adapters' part to y [N, out] in place, for x [N, in]; both of the weights' dtype."""
    if segments.order is None:
        add_lora_torch(y, x, weights, segments.blocks, segments.threads)
    else:
        from signalbox.kernels.segmented_lora_triton import add_lora_triton

        add_lora_triton(y, x, weights, segments)


def add_lora_torch(y: Tensor, x: Tensor, weights: LoraWeights, blocks: Sequence[Block], threads: int = 1) -> None:
    """`add_lora` in plain PyTorch, on any device; `threads` is what torch is set to in this thread."""
    for block in blocks:
        if not block.bits & weights.bits:
            continue
        # A small product is over before a second thread has woken up (0.2 ms with passive OpenMP threads).
        single = threads > 1 and (isinstance(block.rows, Tensor) or block.rows.stop - block.rows.start < 4 * LONG)
        if single:
            torch.set_num_threads(1)
        start = 0
        for a, out in zip(weights.a, weights.outs, strict=True):
            _add_block(
                y if len(weights.outs) == 1 else y[:, start : start + out],
                x,
                a[block.first : block.last, : block.rank],
                weights.b[block.first : block.last, : block.rank, start : start + out],
                block,
            )
            start += out
        if single:
            torch.set_num_threads(threads)


def _add_block(y: Tensor, x: Tensor, a: Tensor, b: Tensor, block: Block) -> None:
    rows = block.rows
    if isinstance(rows, slice):
        y[rows].addmm_(torch.mm(x[rows], a[0].T), b[0])
        return
    groups = block.last - block.first
    gathered = x.index_select(0, rows).view(groups, -1, x.shape[1])
    inner = torch.bmm(gathered, a.transpose(1, 2))
    if block.mask is not None:
        inner *= block.mask
    y.index_add_(0, rows, torch.bmm(inner, b).view(-1, y.shape[1]))
