"""Which pages rows lie on, by counting bytes; and the pool of pages against a fake driver."""

from __future__ import annotations

import threading
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signalbox.kernels.pages import PagePool, pages_of_rows, runs_of
from tests.kernels.fake_cuda_driver import FakeDriver

PAGE = FakeDriver.page


@given(st.lists(st.integers(0, 60), max_size=12), st.integers(1, 9000), st.sampled_from([512, 4096]))
def test_pages_are_those_that_hold_a_byte_of_a_row(rows: list[int], row_bytes: int, page_bytes: int) -> None:
    expected = {at // page_bytes for row in rows for at in range(row * row_bytes, (row + 1) * row_bytes)}
    pages = pages_of_rows(rows, row_bytes, page_bytes)
    assert pages.tolist() == sorted(expected)
    runs = runs_of(pages)
    assert [page for first, count in runs for page in range(first, first + count)] == sorted(expected)
    assert all(a + count < b for (a, count), (b, _) in pairwise(runs))


def test_the_papers_experts_share_pages() -> None:
    """Gate and up of an expert are 5.5 pages of 2 MiB, down is 2.75 (DeepSeek-V2-Lite)."""
    page, gate_up, down = 2 << 20, 2 * 1408 * 2048 * 2, 1408 * 2048 * 2
    assert [len(pages_of_rows(range(64, 64 + n), gate_up, page)) for n in (1, 2, 12)] == [6, 11, 66]
    assert [len(pages_of_rows(range(64, 64 + n), down, page)) for n in (1, 2, 4, 12)] == [3, 6, 11, 33]


def test_the_pool_keeps_count() -> None:
    driver = FakeDriver()
    with pytest.raises(ValueError, match="-1 bytes"):
        PagePool(0, -1, driver=driver)
    pool = PagePool(0, 100 * PAGE, driver=driver)
    pages = pool.take(5)
    with pytest.raises(ValueError, match="twice"):
        pool.give_back([pages[0], pages[0]])
    with pytest.raises(ValueError, match="not taken"):
        pool.give_back([999])
    with pytest.raises(RuntimeError, match="5 pages are still in use"):
        pool.close()
    pool.give_back(pages)
    with pytest.raises(ValueError, match="not taken"):
        pool.give_back(pages[:1])
    pool.reserve(3)
    assert (pool.pages_in_use, pool.pages_free, driver.calls["cuMemCreate"]) == (0, 5, 5)
    assert [pool.pages_of(n) for n in (0, 1, PAGE, PAGE + 1)] == [0, 1, 1, 2]
    assert pool.trim(keep=2) == 3 and pool.trim(keep=2) == 0 and len(driver.handles) == 2
    threads = [threading.Thread(target=lambda: [pool.give_back(pool.take(4)) for _ in range(200)]) for _ in range(4)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert pool.pages_in_use == 0 and pool.pages_free == len(driver.handles) <= 16
    pool.close()
    driver.close()
