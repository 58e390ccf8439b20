"""Tuned experts as 4-bit differences to the base's: a quarter of the memory, and of the bytes that a step reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from signalbox.experts.expertweave.store import FullRows, Pack, take_all
from signalbox.kernels.difference_rows import Differences, apply_difference, difference_of, group_of
from signalbox.kernels.virtual_tensor import PagePool, RowTensor, row_tensor


class RoundedRows(FullRows):
    """Whole rows with the values that differences would have, for devices without a kernel that reads differences.

    So a service on the CPU answers as one on a GPU does, in more memory. `base` gives the base's unpacked weights.
    """

    def __init__(
        self, parts: Sequence[RowTensor], w13: Tensor, w2: Tensor, pack: Pack, base: tuple[Tensor, Tensor]
    ) -> None:
        super().__init__(parts, w13, w2, pack)
        self._base = base

    def write(self, row: int, expert: int, w13: Tensor, w2: Tensor) -> None:
        """See `Store`."""
        super().write(row, expert, *self._rounded(expert, w13, w2))

    def equal(self, row: int, expert: int, w13: Tensor, w2: Tensor) -> Tensor:
        """See `Store`."""
        return super().equal(row, expert, *self._rounded(expert, w13, w2))

    def _rounded(self, expert: int, w13: Tensor, w2: Tensor) -> list[Tensor]:
        return [
            apply_difference(base[expert], *difference_of(base[expert], tuned))
            for base, tuned in zip(self._base, (w13, w2), strict=True)
        ]


class DifferenceRows:
    """The base's weights whole, [rows, ...] as vLLM keeps them, and tuned experts as differences to them.

    Row base_rows + i is entry i of the packed tensors; `differences13` and `differences2` are what the products read.
    """

    def __init__(self, w13: Tensor, w2: Tensor, extra_rows: int, pool: PagePool | None) -> None:
        self.w13, self.w2 = w13, w2
        self.base_rows = len(w13)
        self.base_of = torch.zeros(extra_rows, dtype=torch.int32, device=w13.device)
        self._pairs = tuple(_difference_tensors(weight, extra_rows, pool) for weight in (w13, w2))
        self._tensors = tuple(tensor for pair in self._pairs for tensor in pair)
        self.differences13, self.differences2 = (
            Differences(packed.tensor, scales.tensor, self.base_of) for packed, scales in self._pairs
        )

    @property
    def row_bytes(self) -> int:
        """See `Store`."""
        return sum(int(rows.tensor[0].nbytes) for rows in self._tensors)

    def take(self, rows: Sequence[int]) -> None:
        """See `Store`."""
        take_all(self._tensors, [row - self.base_rows for row in rows])

    def give_back(self, rows: Sequence[int]) -> None:
        """See `Store`."""
        entries = [row - self.base_rows for row in rows]
        for tensor in self._tensors:
            tensor.unmap_rows(entries)

    def write(self, row: int, expert: int, w13: Tensor, w2: Tensor) -> None:
        """See `Store`."""
        entry = row - self.base_rows
        for base, tuned, (packed, scales) in zip((self.w13, self.w2), (w13, w2), self._pairs, strict=True):
            nibbles, steps = difference_of(base[expert], tuned)
            packed.tensor[entry].copy_(nibbles)
            scales.tensor[entry].copy_(steps)
        self.base_of[entry : entry + 1].fill_(expert)

    def equal(self, row: int, expert: int, w13: Tensor, w2: Tensor) -> Tensor:
        """See `Store`."""
        if row < self.base_rows:
            return (self.w13[row] == w13).all() & (self.w2[row] == w2).all()
        entry = row - self.base_rows
        same = self.base_of[entry] == expert
        for base, tuned, (packed, scales) in zip((self.w13, self.w2), (w13, w2), self._pairs, strict=True):
            nibbles, steps = difference_of(base[expert], tuned)
            same = same & (packed.tensor[entry] == nibbles).all() & (scales.tensor[entry] == steps).all()
        return same


def _difference_tensors(base: Tensor, rows: int, pool: PagePool | None) -> tuple[RowTensor, RowTensor]:
    _, outputs, inputs = base.shape
    packed = row_tensor((rows, outputs, inputs // 2), torch.uint8, base.device, pool)
    scales = row_tensor((rows, inputs // group_of(inputs), outputs), torch.bfloat16, base.device, pool)
    return packed, scales
