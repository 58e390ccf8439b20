"""Who holds which row of a layer, against a plain model of it."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from signalbox.adapters.expert_rows import ExpertRows, OutOfRows


def test_rows_are_given_out_lowest_first_and_again() -> None:
    rows = ExpertRows(4, 12)
    assert rows.end == 4 and rows.take(3) == [4, 5, 6] and rows.take(2) == [7, 8] and rows.free == 3
    assert rows.give_back([5, 4]) == [4, 5]
    assert rows.end == 9 and rows.take(3) == [4, 5, 9] and rows.end == 10
    with pytest.raises(OutOfRows, match="3 rows are needed and 2 of 8 are free"):
        rows.take(3)
    assert rows.free == 2 and rows.take(0) == []


def test_equal_experts_are_one_row_until_the_last_holder_leaves() -> None:
    rows = ExpertRows(4, 8)
    first, second = rows.take(2)
    assert rows.share(b"a") is None
    rows.keep(first, b"a"), rows.keep(second, b"b")
    assert [rows.share(b"a"), rows.share(b"a"), rows.holders(first)] == [first, first, 3]
    assert rows.give_back([first, first]) == [] and rows.give_back([first]) == [first]
    assert rows.share(b"a") is None and rows.share(b"b") == second


def test_the_bases_rows_are_never_given_back() -> None:
    rows = ExpertRows(4, 8)
    assert rows.holders(2) == 0
    assert rows.give_back([2, 2, 0]) == [] and rows.free == 4


def test_two_rows_of_one_digest_are_both_remembered() -> None:
    """Two threads may bring equal experts at once, and unlike contents may have one digest."""
    rows = ExpertRows(1, 6)
    first, second = rows.take(2)
    rows.keep(second, b"a"), rows.keep(first, b"a")
    assert rows.share(b"a") == first
    assert rows.give_back([first, first]) == [first] and rows.share(b"a") == second
    rows.keep(second, b"new")
    assert rows.share(b"a") is None and rows.share(b"new") == second


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    rows = ExpertRows(4, 8)
    (row,) = rows.take(1)
    for wrong in ([row, row], [row, 7], [row, 99], [row, -1]):
        with pytest.raises(ValueError, match="is given back"):
            rows.give_back(wrong)
        assert rows.holders(row) == 1
    with pytest.raises(ValueError, match="row 7 is not held"):
        rows.keep(7, b"a")
    with pytest.raises(ValueError, match="3 rows in total"):
        ExpertRows(4, 3)


class Machine(RuleBasedStateMachine):
    """Adapters that load and unload experts, some of them equal, against plain sets."""

    @initialize(experts=st.integers(0, 6), extra=st.integers(0, 12))
    def begin(self, experts: int, extra: int) -> None:
        self.rows = ExpertRows(experts, experts + extra)
        self.content: dict[int, int] = {}  # row -> content
        self.adapters: list[list[int]] = []

    @rule(contents=st.lists(st.integers(0, 8), max_size=5))
    def load(self, contents: list[int]) -> None:
        mine = []
        for content in contents:
            digest = bytes([content])
            row = self.rows.share(digest)
            assert (row is not None) == (content in self.content.values())
            if row is None:
                free = sorted(set(range(self.rows.experts, self.rows.rows)) - self.content.keys())
                try:
                    (row,) = self.rows.take(1)
                except OutOfRows:
                    assert not free
                    continue
                assert row == free[0]
                self.rows.keep(row, digest)
                self.content[row] = content
            assert self.content[row] == content
            mine.append(row)
        self.adapters.append(mine)

    @precondition(lambda self: getattr(self, "adapters", None))
    @rule(which=st.integers(0, 100))
    def unload(self, which: int) -> None:
        leaving = self.adapters.pop(which % len(self.adapters))
        still = {row for rows in self.adapters for row in rows}
        freed = self.rows.give_back(leaving)
        assert freed == sorted(set(leaving) - still)
        for row in freed:
            del self.content[row]

    @precondition(lambda self: hasattr(self, "rows"))
    @invariant()
    def holders_are_those_that_name_the_row(self) -> None:
        held = [row for rows in self.adapters for row in rows]
        assert all(self.rows.holders(row) == held.count(row) for row in range(self.rows.rows))
        assert self.rows.free == self.rows.rows - self.rows.experts - len(self.content)
        assert self.rows.end == max(self.content, default=self.rows.experts - 1) + 1


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
