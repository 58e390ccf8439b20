"""Alignment against its definition written as loops."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from signalbox.kernels.align import Alignment, align_apart, align_rows, capacity


def by_hand(
    rows: list[int], block: int, num_rows: int, base_of: list[int], *, by_row: bool = True
) -> tuple[list[int], list[int]]:
    """`sorted_ids` and `block_rows` as far as they count; `by_row`: the picks of a group row after row."""
    groups: dict[int, list[int]] = {}
    for pick, row in enumerate(rows):
        group = num_rows if row < 0 else row if row < num_rows else base_of[row - num_rows]
        groups.setdefault(group, []).append(pick)
    sorted_ids, block_rows = [], []
    for group in sorted(groups):
        picks = sorted(groups[group], key=lambda pick: (rows[pick] if by_row else 0, pick))
        picks += [len(rows)] * (-len(picks) % block)
        sorted_ids += picks
        block_rows += [group if group < num_rows else -1] * (len(picks) // block)
    return sorted_ids, block_rows


def check(
    alignment: Alignment, rows: list[int], block: int, num_rows: int, base_of: list[int], *, by_row: bool = True
) -> None:
    """What an alignment has to be."""
    sorted_ids, block_rows = by_hand(rows, block, num_rows, base_of, by_row=by_row)
    size = capacity(len(rows), block, num_rows)
    assert {part.dtype for part in alignment} == {torch.int32}
    assert [len(part) for part in alignment] == [size, size // block, 1]
    assert int(alignment.padded) == len(sorted_ids) <= size
    assert alignment.sorted_ids[: len(sorted_ids)].tolist() == sorted_ids
    assert alignment.block_rows.tolist() == block_rows + [-1] * (size // block - len(block_rows))


def check_apart(alignment: Alignment, rows: list[int], block: int, num_rows: int, differences: int) -> None:
    """What the second alignment of `align_apart` has to be: differences by number, the base's picks nowhere."""
    kept = [pick for pick, row in enumerate(rows) if row >= num_rows]
    sorted_ids, block_rows = by_hand([rows[pick] - num_rows for pick in kept], block, differences, [])
    size = capacity(len(rows), block, differences)
    assert [len(part) for part in alignment] == [size, size // block, 1]
    assert int(alignment.padded) == len(sorted_ids) <= size
    there = [kept[i] if i < len(kept) else len(rows) for i in sorted_ids]
    assert alignment.sorted_ids[: len(there)].tolist() == there
    assert alignment.block_rows.tolist() == block_rows + [-1] * (size // block - len(block_rows))


def random_rows(picks: int, num_rows: int, differences: int, used: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of which few different ones are used, and the base of each difference."""
    draw = torch.Generator().manual_seed(seed)
    base_of = torch.randint(0, num_rows, (differences,), generator=draw, dtype=torch.int32)
    pool = torch.randint(-1, num_rows + differences, (used,), generator=draw, dtype=torch.int32)
    return pool[torch.randint(0, used, (picks,), generator=draw)], base_of


@settings(max_examples=100, deadline=None)
@given(
    picks=st.integers(0, 90),
    num_rows=st.integers(1, 20),
    differences=st.integers(0, 5),
    used=st.integers(1, 30),
    block=st.sampled_from([1, 3, 16, 64]),
    seed=st.integers(0, 2**20),
)
@example(48, 324, 0, 200, 16, 0)
def test_picks_are_grouped_as_by_hand(
    picks: int, num_rows: int, differences: int, used: int, block: int, seed: int
) -> None:
    rows, base_of = random_rows(picks, num_rows, differences, used, seed)
    alignment = align_rows(rows, block, num_rows, base_of if differences else None)
    check(alignment, rows.tolist(), block, num_rows, base_of.tolist())
    together, by_themselves = align_apart(rows, block, num_rows, base_of, 16)
    check(together, rows.tolist(), block, num_rows, base_of.tolist(), by_row=False)
    check_apart(by_themselves, rows.tolist(), 16, num_rows, differences)


def test_the_capacity_is_what_the_worst_choice_of_rows_needs() -> None:
    for picks, block, num_rows in itertools.product(range(6), range(1, 4), range(1, 4)):
        choices = itertools.product(range(-1, num_rows), repeat=picks)
        assert capacity(picks, block, num_rows) == max(len(by_hand(list(c), block, num_rows, [])[0]) for c in choices)


def test_more_rows_cost_nothing_where_the_picks_are_few() -> None:
    assert capacity(6, 16, 64) == capacity(6, 16, 100_000) == 6 * 16
    # vLLM's bound grows with the rows: 192 + 324 * 15.
    assert capacity(192, 16, 324) == 192 * 16 and capacity(192, 16, 64) == (65 + 127 // 16) * 16


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="contiguous int32"):
        align_rows(torch.zeros(4, dtype=torch.int64), 16, 4)
    with pytest.raises(ValueError, match="contiguous int32"):
        align_rows(torch.zeros(4, 4, dtype=torch.int32).T, 16, 4)
    with pytest.raises(ValueError, match="at least 1"):
        align_rows(torch.zeros(4, dtype=torch.int32), 0, 4)
