"""Where the weights of a layer's experts are, base and tuned alike; here in whole rows.

Each store takes one tuned expert at a time, as vLLM would lay it out (gate and up projection stacked, the shard of this
rank), on the stream of the load.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from signalbox.kernels.virtual_tensor import RowTensor


class Store(Protocol):
    """Rows of one layer: an expert's gate and up projection (w13) and its down projection (w2)."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one tuned expert."""

    def take(self, rows: Sequence[int]) -> None:
        """Give these rows memory. Raises `OutOfPages` with nothing taken."""

    def give_back(self, rows: Sequence[int]) -> None:
        """Take their memory away; no step may use them any more."""

    def write(self, row: int, expert: int, w13: Tensor, w2: Tensor) -> None:
        """Store a tuned expert; `expert` is the base's row that it replaces."""

    def equal(self, row: int, expert: int, w13: Tensor, w2: Tensor) -> Tensor:
        """Whether a row holds what `write` would store: bool [] on the device. `row` may be the base's own."""


Pack = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class FullRows:
    """Rows in the base's own precision and layout: `w13` and `w2` [rows, ...], views over the memory of `parts`.

    `pack` rearranges an expert's two weights as vLLM's kernels want them.
    """

    def __init__(self, parts: Sequence[RowTensor], w13: Tensor, w2: Tensor, pack: Pack) -> None:
        self.w13, self.w2 = w13, w2
        self._parts, self._pack = parts, pack

    @property
    def row_bytes(self) -> int:
        """See `Store`."""
        return int(self.w13[0].nbytes + self.w2[0].nbytes)

    def take(self, rows: Sequence[int]) -> None:
        """See `Store`."""
        take_all(self._parts, rows)

    def give_back(self, rows: Sequence[int]) -> None:
        """See `Store`."""
        for part in self._parts:
            part.unmap_rows(rows)

    def write(self, row: int, expert: int, w13: Tensor, w2: Tensor) -> None:
        """See `Store`."""
        w13, w2 = self._pack(w13, w2)
        self.w13[row].copy_(w13)
        self.w2[row].copy_(w2)

    def equal(self, row: int, expert: int, w13: Tensor, w2: Tensor) -> Tensor:
        """See `Store`."""
        w13, w2 = self._pack(w13, w2)
        return (self.w13[row] == w13).all() & (self.w2[row] == w2).all()


def take_all(parts: Sequence[RowTensor], rows: Sequence[int]) -> None:
    """Map the rows in every part, or in none. Raises what the last of them raised."""
    done: list[RowTensor] = []
    try:
        for part in parts:
            part.map_rows(rows)
            done.append(part)
    except BaseException:
        for part in done:
            part.unmap_rows(rows)
        raise
