"""Who holds which row of a layer, against a plain model of it; and the digest by which equal experts are found."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from signalbox.adapters.expert_rows import PIECE, PIECES, ExpertRows, OutOfRows, digest_of


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


def test_the_bases_rows_are_found_and_never_given_back() -> None:
    rows = ExpertRows(4, 8)
    rows.keep_base(2, b"base")
    assert rows.share(b"base") == 2 and rows.holders(2) == 0
    assert rows.give_back([2, 2, 0]) == [] and rows.share(b"base") == 2 and rows.free == 4


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
    with pytest.raises(ValueError, match="not one of the base's 4"):
        rows.keep_base(row, b"a")
    for wrong_pair in ((row, row), (7, 0), (0, 1), (row, -1)):
        with pytest.raises(ValueError, match="cannot stand in"):
            rows.stand_in(*wrong_pair)
    with pytest.raises(ValueError, match="3 rows in total"):
        ExpertRows(4, 3)


def test_tuned_rows_stand_behind_the_row_they_replace() -> None:
    rows = ExpertRows(3, 9)
    a, b, c, d = rows.take(4)  # 3, 4, 5, 6; 7 and 8 stay free
    rows.stand_in(a, 1), rows.stand_in(b, 0), rows.stand_in(d, 1)
    order = [0, b, 1, a, d, 2, c, 7, 8]
    rank = rows.rank_of_rows()
    assert str(rank.dtype) == "int32" and [order.index(row) for row in range(9)] == rank.tolist()
    rows.give_back([a])
    assert rows.take(1) == [a]  # given to another, it no longer stands in for 1
    order = [0, b, 1, d, 2, a, c, 7, 8]
    assert [order.index(row) for row in range(9)] == rows.rank_of_rows().tolist()


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
                if self.rows.experts:
                    self.rows.stand_in(row, content % self.rows.experts)
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
        rank = self.rows.rank_of_rows()
        assert sorted(rank) == list(range(self.rows.rows))
        assert all(rank[row] >= self.rows.experts + len(self.content) for row in self.free_rows())
        if self.rows.experts:
            for row, content in self.content.items():
                base = content % self.rows.experts
                assert rank[base] < rank[row]
                assert base + 1 == self.rows.experts or rank[row] < rank[base + 1]

    def free_rows(self) -> set[int]:
        return set(range(self.rows.experts, self.rows.rows)) - self.content.keys()


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


@given(st.sampled_from([torch.bfloat16, torch.float32, torch.uint8, torch.float8_e4m3fn]), st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_a_digest_is_of_the_content_alone(dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randint(0, 100, (300, 450), generator=generator, dtype=torch.uint8)
    tensor = wide[:, :400].to(dtype)
    part = torch.cat([tensor, tensor])[300:]  # another place in memory
    assert digest_of([tensor]) == digest_of([part]) == digest_of([tensor.t().contiguous().t()])
    assert len(digest_of([tensor])) == 16
    assert len({digest_of(t) for t in ([tensor], [tensor.t()], [tensor[:-1]], [tensor, tensor], [])}) == 5


def test_a_digest_reads_both_ends_of_a_large_tensor_and_all_of_a_small_one() -> None:
    large, small = torch.zeros(1_000_003, dtype=torch.uint8), torch.zeros(PIECES * PIECE, dtype=torch.uint8)
    for tensor, places in ((large, (0, PIECE - 1, -1, -PIECE)), (small, range(0, len(small), 997))):
        before = digest_of([tensor])
        for place in places:
            tensor[place] = 1
            assert digest_of([tensor]) != before
            tensor[place] = 0
        assert digest_of([tensor]) == before
    assert digest_of([torch.tensor([1.0])]) != digest_of([torch.tensor([1065353216], dtype=torch.int32)])  # equal bits


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_a_digest_is_the_same_on_every_device() -> None:
    for tensor in (torch.randn(300, 500, dtype=torch.bfloat16), torch.randn(3)):
        assert digest_of([tensor]) == digest_of([tensor.cuda()])
