"""Who holds which row of a layer's expert weights, and which experts of several adapters are one row.

Rows 0..M-1 are the base's. Those from M on are given out lowest first, so the experts of all adapters lie close
together and share pages (`kernels.virtual_tensor`): a row's place says nothing about whose it is, the reroute table
does. ExpertWeave (arXiv 2508.17624, section 4.1) gives each adapter a range of its own instead.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable


class OutOfRows(RuntimeError):
    """A layer has fewer free rows than an adapter needs."""


class ExpertRows:
    """The rows of one layer. experts: M, the base's rows; rows: M and those for adapters. Not thread-safe.

    A row from M on is free, or has holders: each adapter that one of its experts points there. Rows are found again
    by a digest of their content. `end` is one more than the highest row in use, the base's included: an attribute,
    read in every step.
    """

    def __init__(self, experts: int, rows: int) -> None:
        if not 0 <= experts <= rows:
            raise ValueError(f"{rows} rows in total, of which {experts} are the base's: give at least as many rows")
        self.experts, self.rows, self.end = experts, rows, experts
        self._free = list(range(experts, rows))  # a heap
        self._holders: dict[int, int] = {}
        self._digests: dict[int, bytes] = {}
        self._alike: dict[bytes, list[int]] = {}

    @property
    def free(self) -> int:
        """Rows that `take` would still give."""
        return len(self._free)

    def holders(self, row: int) -> int:
        """How many hold a row; 0 for a free one, and for the base's, which are always there."""
        return self._holders.get(row, 0)

    def take(self, count: int) -> list[int]:
        """The lowest free rows, ascending, each with one holder; all of them or none. Raises `OutOfRows`."""
        if count > len(self._free):
            raise OutOfRows(
                f"{count} rows are needed and {len(self._free)} of {self.rows - self.experts} are free: unload an "
                "adapter, or raise the experts that an adapter may have in a layer"
            )
        taken = [heapq.heappop(self._free) for _ in range(count)]
        self._holders.update(dict.fromkeys(taken, 1))
        self.end = max([self.end, *(row + 1 for row in taken)])
        return taken

    def keep(self, row: int, digest: bytes) -> None:
        """Let a row that is held be found by `share`. Raises ValueError for one that is free or the base's."""
        if row not in self._holders:
            raise ValueError(f"row {row} is not held by an adapter")
        self._remember(row, digest)

    def share(self, digest: bytes) -> int | None:
        """The lowest row kept with this digest, with one holder more if it is an adapter's; None where there is none.

        A digest may be of a sample: the caller compares the contents, and gives the row back if they differ.
        """
        alike = self._alike.get(digest)
        if not alike:
            return None
        row = min(alike)
        if row in self._holders:
            self._holders[row] += 1
        return row

    def give_back(self, rows: Iterable[int]) -> list[int]:
        """One holder fewer for each row named; returns the rows that are free by it, ascending. The base's stay.

        Raises ValueError, with nothing given back, where a row has fewer holders than it is named times.
        """
        leaving: dict[int, int] = {}
        for row in rows:
            if not 0 <= row < self.experts:
                leaving[row] = leaving.get(row, 0) + 1
        for row, count in leaving.items():
            if self._holders.get(row, 0) < count:
                raise ValueError(f"row {row} is given back {count} times and has {self.holders(row)} holders")
        freed = []
        for row, count in leaving.items():
            self._holders[row] -= count
            if not self._holders[row]:
                del self._holders[row]
                self._forget(row)
                heapq.heappush(self._free, row)
                freed.append(row)
        if self.end - 1 in freed:
            self.end = max(self._holders, default=self.experts - 1) + 1
        return sorted(freed)

    def _remember(self, row: int, digest: bytes) -> None:
        self._forget(row)
        self._digests[row] = digest
        self._alike.setdefault(digest, []).append(row)

    def _forget(self, row: int) -> None:
        digest = self._digests.pop(row, None)
        if digest is not None:
            self._alike[digest].remove(row)
            if not self._alike[digest]:
                del self._alike[digest]
