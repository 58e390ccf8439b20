"""The virtual weight tensor against a fake driver with the real one's rules (on a GPU: `test_virtual_tensor_gpu`)."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from signalbox.kernels import virtual_tensor
from signalbox.kernels.pages import DriverError, OutOfPages, PagePool, pages_of_rows
from signalbox.kernels.virtual_tensor import PaddedTensor, VirtualTensor, open_pool, row_tensor, row_tensors
from tests.kernels.fake_cuda_driver import FakeDriver, host_tensor

PAGE = FakeDriver.page
# [rows, ...] of bf16: rows of 0.6, 1.4, 2.75 and exactly 2 of the fake's pages, and 17 to a page
SHAPES = [(40, 1230), (40, 2868), (24, 5632), (16, 4096), (200, 120)]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    monkeypatch.setattr(virtual_tensor, "_tensor_at", host_tensor)
    fake = FakeDriver()
    yield fake
    fake.close()


def test_only_mapped_rows_take_memory_and_neighbours_share_a_page(driver: FakeDriver) -> None:
    pool = PagePool(0, None, driver=driver)
    tensor = VirtualTensor(pool, (8, 6144), torch.bfloat16)  # a row has 3 pages
    half = VirtualTensor(pool, (8, 3072), torch.bfloat16)  # a row has 1.5
    assert tensor.tensor.shape == (8, 6144) and tensor.tensor.dtype == torch.bfloat16
    assert tensor.mapped_bytes == half.mapped_bytes == pool.pages_in_use == 0
    tensor.map_rows([0, 1, 5])
    assert (tensor.mapped_bytes, tensor.rows_bytes, pool.pages_in_use) == (9 * PAGE, 9 * PAGE, 9)
    half.map_rows([2])
    assert half.mapped_bytes == 2 * PAGE and half.rows_bytes == PAGE * 3 // 2 and half.pages_missing([3]) == 1
    half.map_rows([3])
    assert half.mapped_bytes == half.rows_bytes == 3 * PAGE
    half.tensor[3] = 7
    half.unmap_rows([2])
    assert half.mapped_bytes == 2 * PAGE and half.mapped_rows == {3} and bool((half.tensor[3] == 7).all())
    tensor.close(), half.close(), half.close()
    assert pool.pages_in_use == 0 and not driver.mapped
    pool.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.float32])
def test_any_element_type(driver: FakeDriver, dtype: torch.dtype) -> None:
    pool = PagePool(0, None, driver=driver)
    tensor = row_tensor((3, 70, 30), dtype, "cuda:0", pool)
    tensor.map_rows([0, 2])
    tensor.tensor[2] = torch.ones(70, 30).to(dtype)
    assert tensor.row_bytes == 2100 * dtype.itemsize and bool((tensor.tensor[2].float() == 1).all())
    tensor.close()
    pool.close()


def test_parts_side_by_side_waste_the_rest_of_one_page(driver: FakeDriver) -> None:
    """bf16 [30, 70] and [70, 15], and their scales: 6,300 bytes, each part at a multiple of 256 bytes."""
    pool = PagePool(0, None, driver=driver)
    parts = [((30, 70), torch.bfloat16), ((70, 15), torch.bfloat16), ((3,), torch.float32)]
    width = 4352 + 2304 + 256
    for device, source in (("cuda", pool), ("cpu", None)):
        rows, (first, second, scales) = row_tensors(12, parts, device, source)
        assert rows.row_bytes == width and first.shape == (12, 30, 70) and first.stride() == (width // 2, 70, 1)
        rows.map_rows([2, 3, 11])
        assert source is None or rows.mapped_bytes == PAGE * len(pages_of_rows([2, 3, 11], width, PAGE))
        for row in (2, 3, 11):
            first[row], second[row], scales[row] = row, -row, row / 2
        assert all(
            bool((part[row] == value).all()) for row in (2, 3, 11) for part, value in ((first, row), (second, -row))
        )
        assert scales[[2, 3, 11]].tolist() == [[1, 1, 1], [1.5, 1.5, 1.5], [5.5, 5.5, 5.5]]
        del first, second, scales
        rows.close()
    pool.close()


def test_a_load_maps_in_few_calls(driver: FakeDriver) -> None:
    """One call opens a run of pages; a load onto pages made ahead creates none."""
    pool = PagePool(0, None, driver=driver)
    tensor = VirtualTensor(pool, (40, 5632), torch.bfloat16)
    tensor.map_rows(range(8))
    pool.reserve(40)
    driver.calls.clear()
    tensor.map_rows([8, 9, 10, 20, 21])
    assert driver.calls == {"cuMemMap": 15, "cuMemSetAccess": 2}  # 8 pages continue the base's, 7 stand alone
    driver.calls.clear()
    tensor.unmap_rows([8, 9, 10, 20, 21])
    assert driver.calls == {"cuMemUnmap": 2}
    tensor.close()
    pool.close()


def test_wrong_rows_are_refused_and_change_nothing(driver: FakeDriver) -> None:
    pool = PagePool(0, None, driver=driver)
    for tensor in (VirtualTensor(pool, (4, 3000), torch.uint8), PaddedTensor((4, 3000), torch.uint8, "cpu")):
        tensor.map_rows([1])
        for rows, message in (([0, 4], "outside"), ([-1], "outside"), ([0, 1], "row 1 is mapped"), ([2, 2], "twice")):
            with pytest.raises(ValueError, match=message):
                tensor.map_rows(rows)
        for rows, message in (([1, 2], "row 2 is not mapped"), ([1, 1], "twice")):
            with pytest.raises(ValueError, match=message):
                tensor.unmap_rows(rows)
        assert tensor.mapped_rows == {1} and tensor.rows_bytes == 3000
        tensor.close()
    for shape in ((0, 4), (4, 0), ()):
        with pytest.raises(ValueError, match="at least 1"):
            VirtualTensor(pool, shape, torch.uint8)
    with pytest.raises(ValueError, match="wanted on cpu"):
        row_tensor((4, 4), torch.uint8, "cpu", pool)
    pool.close()


def test_beyond_the_limit_nothing_is_mapped(driver: FakeDriver) -> None:
    pool = PagePool(0, 10 * PAGE + 5, driver=driver)
    tensor = VirtualTensor(pool, (16, 6144), torch.bfloat16)
    tensor.map_rows([0, 1])
    assert pool.pages_left == 4
    with pytest.raises(OutOfPages, match="at most 10"):
        tensor.map_rows([3, 7])
    assert tensor.mapped_rows == {0, 1} and pool.pages_in_use == 6 == len(driver.mapped) == len(driver.handles)
    tensor.map_rows([7])
    tensor.close()
    pool.close()


def test_a_device_out_of_memory_loses_nothing(driver: FakeDriver) -> None:
    driver.memory = 8
    pool = PagePool(0, None, driver=driver)
    tensor = VirtualTensor(pool, (16, 6144), torch.bfloat16)
    tensor.map_rows([0, 1])
    for attempt in (lambda: tensor.map_rows([2]), lambda: pool.reserve(3), lambda: pool.take(3)):
        with pytest.raises(OutOfPages, match="cuMemCreate: device 0 is out of memory"):
            attempt()
        assert len(driver.handles) == 6 and pool.pages_free == 0 and tensor.mapped_rows == {0, 1}
    tensor.close()
    pool.close()


@pytest.mark.parametrize("name", ["cuMemCreate", "cuMemMap", "cuMemSetAccess"])
@pytest.mark.parametrize("succeed", [0, 1, 4])
def test_a_failing_call_is_undone(driver: FakeDriver, name: str, succeed: int) -> None:
    pool = PagePool(0, None, driver=driver)
    tensor = VirtualTensor(pool, (40, 5632), torch.bfloat16)
    tensor.map_rows([0, 1])
    tensor.tensor[:2] = 3
    before = dict(driver.mapped)
    driver.failures[name] = succeed
    with pytest.raises(DriverError, match=f"{name} on device 0 failed: CUDA_ERROR_INVALID_VALUE"):
        tensor.map_rows([2, 6, 10, 14, 18, 22])
    assert driver.mapped == before and driver.accessible == set(before) and pool.pages_in_use == len(before)
    driver.failures.clear()
    tensor.map_rows([2, 6, 10, 14, 18, 22])
    assert bool((tensor.tensor[:2] == 3).all())
    tensor.close()
    pool.close()


def test_what_cannot_be_unmapped_stays_known(driver: FakeDriver) -> None:
    pool = PagePool(0, None, driver=driver)
    tensor = VirtualTensor(pool, (8, 6144), torch.bfloat16)
    tensor.map_rows([0, 2])
    driver.failures["cuMemUnmap"] = 1
    with pytest.raises(DriverError, match="cuMemUnmap"):
        tensor.unmap_rows([0, 2])
    driver.failures.clear()
    assert tensor.mapped_rows == frozenset() and pool.pages_in_use == 3 == len(driver.mapped)
    tensor.map_rows([2])
    tensor.unmap_rows([2])
    assert pool.pages_in_use == 0
    tensor.close()
    pool.close()


def test_a_range_that_cannot_be_made_leaves_nothing(driver: FakeDriver) -> None:
    pool = PagePool(0, 0, driver=driver)
    with pytest.raises(OutOfPages):
        VirtualTensor(pool, (8, 6144), torch.bfloat16)
    assert not driver.ranges
    driver.failures["cuMemAddressReserve"] = 0
    with pytest.raises(DriverError, match="cuMemAddressReserve"):
        VirtualTensor(pool, (8, 6144), torch.bfloat16)
    pool.close()


def test_pages_return_after_200_random_loads(driver: FakeDriver) -> None:
    pool = PagePool(0, None, driver=driver)
    tensors = [VirtualTensor(pool, shape, torch.bfloat16) for shape in SHAPES]
    for tensor in tensors:
        tensor.map_rows(range(4))
    random_loads(pool, tensors, base=4, seed=1)
    for tensor in tensors:
        tensor.close()
    pool.close()


def random_loads(pool: PagePool, tensors: list[VirtualTensor], *, base: int, seed: int) -> None:
    """200 loads and unloads in random order; each row keeps what was written to it, and all pages come back."""
    choose, start = random.Random(seed), pool.pages_in_use
    held: list[tuple[VirtualTensor, list[int], int]] = []
    for tensor in tensors:
        tensor.tensor[:base] = 5
    for step in range(200):
        tensor = choose.choice(tensors)
        free = sorted(set(range(tensor.tensor.shape[0])) - tensor.mapped_rows)
        rows = choose.sample(free, min(len(free), choose.randint(1, 6)))
        tensor.map_rows(rows)
        value = step % 100
        for row in rows:
            tensor.tensor[row] = value
        held.append((tensor, rows, value))
        if len(held) > choose.randint(0, 8):
            tensor, rows, value = held.pop(choose.randrange(len(held)))
            assert all(bool((tensor.tensor[row] == value).all()) for row in rows)
            tensor.unmap_rows(rows)
    for tensor, rows, value in held:
        assert all(bool((tensor.tensor[row] == value).all()) for row in rows)
        tensor.unmap_rows(rows)
    assert pool.pages_in_use == start
    assert all(bool((tensor.tensor[:base] == 5).all()) for tensor in tensors)


class Machine(RuleBasedStateMachine):
    """Random maps and unmaps of two tensors over one pool, some of them failing, against a set of rows."""

    @initialize(a=st.sampled_from(SHAPES), b=st.sampled_from(SHAPES), limit=st.integers(30, 120))
    def begin(self, a: tuple[int, int], b: tuple[int, int], limit: int) -> None:
        self.original, virtual_tensor._tensor_at = virtual_tensor._tensor_at, host_tensor
        self.driver = FakeDriver()
        self.pool = PagePool(0, limit * PAGE, driver=self.driver)
        self.tensors = [VirtualTensor(self.pool, shape, torch.bfloat16) for shape in (a, b)]
        self.rows: list[dict[int, int]] = [{}, {}]
        self.value = 0

    @rule(which=st.integers(0, 1), picks=st.sets(st.integers(0, 199), max_size=7))
    def load(self, which: int, picks: set[int]) -> None:
        tensor, mine = self.tensors[which], self.rows[which]
        rows = [row for row in picks if row < tensor.tensor.shape[0] and row not in mine]
        missing = tensor.pages_missing(rows)
        fits = missing <= (self.pool.pages_left or 0)
        try:
            tensor.map_rows(rows)
        except OutOfPages:
            assert not fits
            return
        assert fits
        self.value = self.value % 250 + 1
        for row in rows:
            tensor.tensor[row] = mine[row] = self.value

    @rule(which=st.integers(0, 1), picks=st.sets(st.integers(0, 199), max_size=60))
    def unload(self, which: int, picks: set[int]) -> None:
        rows = picks & self.rows[which].keys()
        self.tensors[which].unmap_rows(rows)
        for row in rows:
            del self.rows[which][row]

    @rule(keep=st.integers(0, 10))
    def trim(self, keep: int) -> None:
        self.pool.trim(keep)

    @precondition(lambda self: hasattr(self, "pool"))
    @invariant()
    def every_row_is_there_and_no_page_else(self) -> None:
        pages = 0
        for tensor, mine in zip(self.tensors, self.rows, strict=True):
            expected = pages_of_rows(mine, tensor.row_bytes, PAGE)
            pages += len(expected)
            assert tensor.mapped_rows == mine.keys() and tensor.mapped_bytes == len(expected) * PAGE
            assert all(bool((tensor.tensor[row] == value).all()) for row, value in mine.items())
        assert pages == self.pool.pages_in_use == len(self.driver.accessible) == len(self.driver.mapped)
        assert len(self.driver.handles) == pages + self.pool.pages_free

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        virtual_tensor._tensor_at = self.original
        for tensor in self.tensors:
            tensor.close()
        self.pool.close()
        self.driver.close()


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_without_virtual_memory_all_rows_are_allocated() -> None:
    assert open_pool("cpu", None) is None
    tensor = row_tensor((6, 4, 5), torch.bfloat16, "cpu", None)
    assert isinstance(tensor, PaddedTensor) and tensor.mapped_bytes == 6 * 40 and tensor.row_bytes == 40
    address = tensor.tensor.data_ptr()
    tensor.map_rows([0, 3])
    tensor.tensor[3] = 1
    assert tensor.rows_bytes == 80 and tensor.pages_missing([4]) == 0 and tensor.tensor.data_ptr() == address
    tensor.unmap_rows([0])
    assert tensor.mapped_rows == {3} and bool((tensor.tensor[3] == 1).all())
    tensor.close()
    assert tensor.mapped_rows == frozenset()
