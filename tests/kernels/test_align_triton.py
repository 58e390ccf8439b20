"""The alignment kernels against the definition: on a GPU where there is one, else by Triton's interpreter."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.kernels.hopper import compile_for_hopper, run_interpreted
from tests.kernels.test_align import check, check_apart, random_rows

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
here = pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="runs in the interpreter's process")


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed here")
@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="is the process that runs the kernels")
def test_kernels_in_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed here")
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_kernels_compile_for_hopper_without_a_gpu() -> None:
    from signalbox.kernels.align_kernels import (
        align_counted_kernel,
        align_few_kernel,
        align_many_kernel,
        count_kernel,
    )
    from signalbox.kernels.align_triton import COUNTED_CHUNK, FEW_CHUNK, MANY_CHUNK, OWN

    names = ("rows", "base_of", "sorted_ids", "block_rows", "padded", "sorted_apart", "block_apart", "padded_apart")
    pointers = dict.fromkeys((*names, "counts", "ranks"), "*i32")
    for groups, block, differences in ((128, 16, True), (512, 64, False), (1024, 128, False)):
        sizes = {"GROUPS": groups, "BLOCK": block, "PAD": block, "DIFFERENCES": differences}
        for kernel, own in ((align_few_kernel, {"OWN": OWN, "CHUNK": FEW_CHUNK}), (align_many_kernel, None)):
            rest = own or {"CHUNK": MANY_CHUNK, "ABSENT": True}
            rest |= {"ORDERED": differences, "SIDES": 1, "GROUPS_APART": 2, "BLOCK_APART": 1}
            _, usage = compile_for_hopper(kernel, pointers, sizes | rest, num_warps=8)
            assert usage["STACK"] == usage["LOCAL"] == 0
    sizes = {"GROUPS": 128, "BLOCK": 64, "PAD": 64, "GROUPS_APART": 512, "BLOCK_APART": 16, "SIDES": 2}
    own = {"OWN": OWN, "CHUNK": FEW_CHUNK, "DIFFERENCES": True, "ORDERED": False}
    _, usage = compile_for_hopper(align_few_kernel, pointers, sizes | own, num_warps=8, maxnreg=128)
    assert usage["STACK"] <= 64 and usage["LOCAL"] == 0
    for groups in (512, 1024):
        counted = sizes | {"GROUPS": groups, "DIFFERENCES": groups == 512, "OWN": OWN, "CHUNK": COUNTED_CHUNK}
        for kernel in (count_kernel, align_counted_kernel):
            _, usage = compile_for_hopper(kernel, pointers, counted, num_warps=8)
            assert usage["STACK"] == usage["LOCAL"] == 0


@here
@settings(max_examples=25 if INTERPRETED else 150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    picks=st.integers(0, 90),
    num_rows=st.integers(1, 20),
    differences=st.integers(0, 5),
    used=st.integers(1, 30),
    block=st.sampled_from([1, 16, 64]),
    way=st.sampled_from(["few", "counted", "many"]),
    seed=st.integers(0, 2**20),
)
@example(48, 324, 0, 200, 16, "few", 0)
@example(1300, 62, 40, 100, 16, "few", 1)  # several chunks
@example(1300, 62, 40, 1, 64, "few", 2)
@example(4200, 40, 9, 45, 16, "many", 3)
@example(4200, 40, 9, 1, 1, "many", 4)  # more blocks of one group, and more unused ones, than are written at a time
@example(4096, 60, 9, 1, 16, "few", 5)  # the most that two counts in one integer must hold
@example(2100, 330, 9, 400, 64, "counted", 6)
@example(3300, 62, 130, 190, 16, "counted", 7)
@example(4096, 20, 9, 1, 128, "counted", 8)
def test_picks_are_grouped_as_by_hand(
    picks: int, num_rows: int, differences: int, used: int, block: int, way: str, seed: int
) -> None:
    from signalbox.kernels import align_triton

    rows, base_of = random_rows(picks, num_rows, differences, used, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(align_triton, "FEW", 0 if way == "many" else 4096)
        patch.setattr(align_triton, "SHORT", 0 if way == "counted" else 8192)
        alignment = align_triton.align_rows_triton(
            rows.to(DEVICE), block, num_rows, base_of.to(DEVICE) if differences else None
        )
        together, by_themselves = align_triton.align_apart_triton(
            rows.to(DEVICE), block, num_rows, base_of.to(DEVICE), 16
        )
    check(alignment, rows.tolist(), block, num_rows, base_of.tolist())
    check(together, rows.tolist(), block, num_rows, base_of.tolist(), by_row=False)
    check_apart(by_themselves, rows.tolist(), 16, num_rows, differences)
