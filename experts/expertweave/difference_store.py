"""Tuned experts as 4-bit differences to the base's: a quarter of the memory, and of the bytes that a step reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from signalbox.kernels.difference_rows import apply_difference, difference_of, group_of
from torch import Tensor

from signalbox.experts.expertweave.store import FullRows, Pack
from signalbox.kernels.virtual_tensor import PagePool, RowTensor, row_tensor


class RoundedRows(FullRows):
    """Whole rows with the values that differences would have, for devices without a kernel that reads differences.

    So a service on the CPU answers as one on a GPU does, in more memory. `base` gives the base's unpacked weights.
    """

    def __init__(
        self,
        w13: RowTensor,
        w2: RowTensor,
        pack: Pack,
        base: tuple[Tensor, Tensor],
    ) -> None:
        super().__init__(w13, w2, pack)
        self._base = base

    def write(self, row: int, expert: int, w13: Tensor, w2: Tensor) -> None:
        """See `Store`."""
        rounded = [
            apply_difference(base[expert], *difference_of(base[expert], tuned))
            for base, tuned in zip(self._base, (w13, w2), strict=True)
        ]
        super().write(row, expert, *rounded)

    def equal(self, row: int, expert: int, w13: Tensor, w2: Tensor) -> bool:
        """See `Store`; equal weights of the same expert are equal differences."""
        if row < len(self._base[0]):
            return torch.equal(self._base[0][row], w13) and torch.equal(self._base[1][row], w2)
        return False


class DifferenceRows:
    """The base's weights whole, tuned experts as differences: row `base_rows + i` is entry i of the packed tensors.

    base_of: int32 [extra rows], the base's row that each one differs from.
    """

    def __init__(self, w13: Tensor, w2: Tensor, extra_rows: int, pool: PagePool | None) -> None:
        self.w13, self.w2 = w13, w2
        self.base_rows = len(w13)
        self.packed13, self.scales13 = _difference_tensors(w13, extra_rows, pool)
        self.packed2, self.scales2 = _difference_tensors(w2, extra_rows, pool)
        self.base_of = torch.zeros(extra_rows, dtype=torch.int32, device=w13.device)
        self._tensors = (self.packed13, self.packed2, self.scales13, self.scales2)

    @property
    def row_bytes(self) -> int:
        """See `Store`."""
        return sum(int(rows.tensor[0].nbytes) for rows in self._tensors)

    def take(self, rows: Sequence[int]) -> None:
        """See `Store`."""
        entries = [row - self.base_rows for row in rows]
        done: list[RowTensor] = []
        try:
            for tensor in self._tensors:
                tensor.map_rows(entries)
                done.append(tensor)
        except BaseException:
            for tensor in done:
                tensor.unmap_rows(entries)
            raise

    def give_back(self, rows: Sequence[int]) -> None:
        """See `Store`."""
        entries = [row - self.base_rows for row in rows]
        for tensor in self._tensors:
            tensor.unmap_rows(entries)

    def write(self, row: int, expert: int, w13: Tensor, w2: Tensor) -> None:
        """See `Store`."""
        entry = row - self.base_rows
        for base, tuned, packed, scales in (
            (self.w13, w13, self.packed13, self.scales13),
            (self.w2, w2, self.packed2, self.scales2),
        ):
            nibbles, steps = difference_of(base[expert], tuned)
            packed.tensor[entry].copy_(nibbles)
            scales.tensor[entry].copy_(steps)
        self.base_of[entry : entry + 1].fill_(expert)

    def equal(self, row: int, expert: int, w13: Tensor, w2: Tensor) -> bool:
        """See `Store`."""
        if row < self.base_rows:
            return torch.equal(self.w13[row], w13) and torch.equal(self.w2[row], w2)
        entry = row - self.base_rows
        packed13, steps13 = difference_of(self.w13[expert], w13)
        packed2, steps2 = difference_of(self.w2[expert], w2)
        return (
            torch.equal(self.packed13.tensor[entry], packed13)
            and torch.equal(self.scales13.tensor[entry], steps13)
            and torch.equal(self.packed2.tensor[entry], packed2)
            and torch.equal(self.scales2.tensor[entry], steps2)
            and int(self.base_of[entry]) == expert
        )


def _difference_tensors(base: Tensor, rows: int, pool: PagePool | None) -> tuple[RowTensor, RowTensor]:
    _, outputs, inputs = base.shape
    packed = row_tensor((rows, outputs, inputs // 2), torch.uint8, base.device, pool)
    scales = row_tensor((rows, outputs, inputs // group_of(inputs)), torch.bfloat16, base.device, pool)
    return packed, scales
