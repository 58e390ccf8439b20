"""The virtual weight tensor on a GPU: real pages, real kernels, CUDA graphs captured before a load."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from signalbox.kernels.pages import OutOfPages, PagePool
from signalbox.kernels.virtual_tensor import VirtualTensor, open_pool, row_tensor, row_tensors
from tests.kernels.test_virtual_tensor import random_loads

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def gpu_pool() -> Iterator[PagePool]:
    pool = open_pool("cuda", None)
    assert pool is not None
    yield pool
    pool.close()


def test_gpu_only_mapped_rows_take_memory(gpu_pool: PagePool) -> None:
    """2.75 pages a row; the range is larger than the device."""
    assert gpu_pool.page_bytes == 2 << 20
    tensor = VirtualTensor(gpu_pool, (100_000, 1408, 2048), torch.bfloat16)
    assert tensor.tensor.is_cuda and tensor.mapped_bytes == 0
    gpu_pool.trim()
    free, _ = torch.cuda.mem_get_info()
    tensor.map_rows([7, 8, 90_000])
    assert tensor.mapped_bytes == gpu_pool.pages_in_use * gpu_pool.page_bytes == 9 * (2 << 20)
    assert free - torch.cuda.mem_get_info()[0] >= tensor.mapped_bytes
    for row in (7, 8, 90_000):
        tensor.tensor[row] = row % 128
    tensor.unmap_rows([7])
    tensor.map_rows([9])
    tensor.tensor[9].normal_()
    torch.cuda.synchronize()
    assert all(bool((tensor.tensor[row] == row % 128).all()) for row in (8, 90_000))
    tensor.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.float32])
def test_gpu_any_element_type(gpu_pool: PagePool, dtype: torch.dtype) -> None:
    tensor = row_tensor((50, 700, 300), dtype, "cuda", gpu_pool)
    tensor.map_rows([3])
    tensor.tensor[3] = torch.ones(700, 300).to(dtype)
    assert tensor.tensor.dtype == dtype and bool((tensor.tensor[3].float() == 1).all())
    tensor.close()


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
            sums[i].copy_(tensor.tensor[5].float().mean())
        if i % 4 == 0:
            tensor.map_rows([4, 6])
            tensor.tensor[4] = 2
            tensor.tensor[6] = 3
            torch.cuda.current_stream().synchronize()
            tensor.unmap_rows([4, 6])
    torch.cuda.synchronize()
    assert bool((sums == 1).all())
    tensor.close()


def test_gpu_out_of_memory_maps_nothing(gpu_pool: PagePool) -> None:
    tensor = VirtualTensor(gpu_pool, (1 << 20, 1 << 20), torch.uint8)
    tensor.map_rows([0, 1])
    tensor.tensor[:2] = 9
    ballast = torch.empty(torch.cuda.mem_get_info()[0] - (1 << 30), dtype=torch.uint8, device="cuda")
    with pytest.raises(OutOfPages):
        tensor.map_rows(range(2, 1 << 19))  # 512 GiB
    assert gpu_pool.pages_in_use == 1 and gpu_pool.pages_free == 0 and bool((tensor.tensor[:2] == 9).all())
    tensor.close()
    del ballast
    torch.cuda.empty_cache()


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


def test_gpu_parts_side_by_side(gpu_pool: PagePool) -> None:
    """An expert of DeepSeek-V2-Lite, gate over up beside down: 8.25 pages."""
    parts = [((2816, 2048), torch.bfloat16), ((2048, 1408), torch.bfloat16)]
    rows, (w13, w2) = row_tensors(200, parts, "cuda", gpu_pool)
    rows.map_rows([64, 65, 66])
    assert rows.mapped_bytes == 25 * gpu_pool.page_bytes
    x = torch.randn(4, 2048, device="cuda", dtype=torch.bfloat16)
    for row in (64, 65, 66):
        w13[row].normal_(), w2[row].normal_()
        plain = w13[row].clone(), w2[row].clone()
        assert torch.equal(x @ w13[row].T, x @ plain[0].T) and torch.equal(
            w2[row] @ x[0, :1408], plain[1] @ x[0, :1408]
        )
    torch.cuda.synchronize()
    rows.close()
