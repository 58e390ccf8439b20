"""The virtual weight tensor: against a fake driver that keeps the real one's rules, and on a GPU where there is one."""

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
from signalbox.kernels.virtual_tensor import PaddedTensor, RowTensor, VirtualTensor, open_pool, row_tensor
from tests.kernels.fake_cuda_driver import FakeDriver, host_tensor

PAGE = FakeDriver.page
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
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
    tensor = row_tensor_on_the_fake(pool, (3, 70, 30), dtype)
    tensor.map_rows([0, 2])
    tensor.tensor[2] = torch.ones(70, 30).to(dtype)
    assert tensor.row_bytes == 2100 * dtype.itemsize and bool((tensor.tensor[2].float() == 1).all())
    tensor.close()
    pool.close()


def row_tensor_on_the_fake(pool: PagePool, shape: tuple[int, ...], dtype: torch.dtype) -> RowTensor:
    return row_tensor(shape, dtype, torch.device("cuda", 0), pool)


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


# The real driver.


@pytest.fixture
def gpu_pool() -> Iterator[PagePool]:
    pool = open_pool("cuda", None)
    assert pool is not None
    yield pool
    pool.close()


@on_gpu
def test_gpu_only_mapped_rows_take_memory(gpu_pool: PagePool) -> None:
    """2.75 pages a row; the range is larger than the device."""
    assert gpu_pool.page_bytes == 2 << 20
    tensor = VirtualTensor(gpu_pool, (100_000, 1408, 2048), torch.bfloat16)
    assert tensor.tensor.is_cuda and tensor.mapped_bytes == 0
    gpu_pool.trim()
    free, _ = torch.cuda.mem_get_info()
    tensor.map_rows([7, 8, 90_000])
    assert tensor.mapped_bytes == gpu_pool.pages_in_use * gpu_pool.page_bytes == 10 * (2 << 20)
    assert free - torch.cuda.mem_get_info()[0] >= tensor.mapped_bytes
    for row in (7, 8, 90_000):
        tensor.tensor[row] = row % 128
    tensor.unmap_rows([7])
    tensor.map_rows([9])
    tensor.tensor[9].normal_()
    torch.cuda.synchronize()
    assert all(bool((tensor.tensor[row] == row % 128).all()) for row in (8, 90_000))
    tensor.close()


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.float32])
def test_gpu_any_element_type(gpu_pool: PagePool, dtype: torch.dtype) -> None:
    tensor = row_tensor((50, 700, 300), dtype, "cuda", gpu_pool)
    tensor.map_rows([3])
    tensor.tensor[3] = torch.ones(700, 300).to(dtype)
    assert tensor.tensor.dtype == dtype and bool((tensor.tensor[3].float() == 1).all())
    tensor.close()


@on_gpu
def test_gpu_a_graph_captured_before_a_load_reads_the_loaded_row(gpu_pool: PagePool) -> None:
    tensor = VirtualTensor(gpu_pool, (32, 512, 512), torch.bfloat16)
    tensor.map_rows([0])
    tensor.tensor[0] = torch.eye(512, device="cuda", dtype=torch.bfloat16)
    row, x = torch.zeros(1, dtype=torch.int64, device="cuda"), torch.randn(4, 512, device="cuda", dtype=torch.bfloat16)
    product = lambda: x @ tensor.tensor.index_select(0, row)[0]  # noqa: E731
    product()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = product()
    graph.replay()
    assert torch.equal(y, x)
    for loaded, factor in ((20, 2.0), (31, -4.0)):
        tensor.map_rows([loaded])
        tensor.tensor[loaded] = factor * torch.eye(512, device="cuda", dtype=torch.bfloat16)
        row.fill_(loaded)
        graph.replay()
        assert torch.equal(y, factor * x)
        torch.cuda.synchronize()
        tensor.unmap_rows([loaded])
        row.fill_(0)
        graph.replay()
        assert torch.equal(y, x)
    torch.cuda.synchronize()
    del graph
    tensor.close()


@on_gpu
def test_gpu_loads_while_kernels_use_other_rows(gpu_pool: PagePool) -> None:
    """A stream reads a row over and over while its neighbours, on the same pages, come and go."""
    tensor = VirtualTensor(gpu_pool, (16, 1408, 2048), torch.bfloat16)
    tensor.map_rows([5])
    tensor.tensor[5] = 1
    sums = torch.zeros(400, device="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    for i in range(400):
        with torch.cuda.stream(stream):
            torch.mean(tensor.tensor[5], dtype=torch.float32, out=sums[i])
        if i % 4 == 0:
            tensor.map_rows([4, 6])
            tensor.tensor[4] = 2
            tensor.tensor[6] = 3
            torch.cuda.current_stream().synchronize()
            tensor.unmap_rows([4, 6])
    torch.cuda.synchronize()
    assert bool((sums == 1).all())
    tensor.close()


@on_gpu
def test_gpu_out_of_memory_maps_nothing(gpu_pool: PagePool) -> None:
    tensor = VirtualTensor(gpu_pool, (1 << 20, 1 << 20), torch.uint8)
    tensor.map_rows([0, 1])
    tensor.tensor[:2] = 9
    with pytest.raises(OutOfPages):
        tensor.map_rows(range(2, 1 << 19))  # 512 GiB
    assert gpu_pool.pages_in_use == 1 and gpu_pool.pages_free == 0 and bool((tensor.tensor[:2] == 9).all())
    tensor.close()


@on_gpu
def test_gpu_pages_return_after_200_random_loads(gpu_pool: PagePool) -> None:
    shapes = [(40, 2816, 1024), (40, 1408, 2048), (30, 600, 700)]
    tensors = [VirtualTensor(gpu_pool, shape, torch.bfloat16) for shape in shapes]
    for tensor in tensors:
        tensor.map_rows(range(4))
    random_loads(gpu_pool, tensors, base=4, seed=2)
    torch.cuda.synchronize()
    for tensor in tensors:
        tensor.close()
    assert gpu_pool.pages_in_use == 0
