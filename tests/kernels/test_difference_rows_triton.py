"""The grouped product's kernel against the definition: on a GPU where there is one, else by Triton's interpreter."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from signalbox.kernels.align import Alignment
from signalbox.kernels.difference_rows import Aligned, Apart, Blocks, Differences, align_picks, blocks_of
from tests.kernels.hopper import compile_for_hopper, run_interpreted
from tests.kernels.test_difference_rows import by_hand, random_differences

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
APART = Blocks(64, 16, 32, 4, 3, apart=Apart(8, 32, 4, 3, 2))
ONE_WARP = APART._replace(apart=Apart(8, 64, 1, 3, 4))
LARGE = APART._replace(apart=Apart(32, 32, 4, 3, 2))
here = pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="runs in the interpreter's process")


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed here")
@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="is the process that runs the kernels")
def test_kernels_in_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed here")
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("tokens", [8, 128, 256, 1024])
@pytest.mark.parametrize("differences", [False, True])
def test_the_kernel_compiles_for_hopper_without_a_gpu(tokens: int, differences: bool) -> None:
    from signalbox.kernels.difference_rows_triton import launch_of, woven_product_kernel

    pointers = dict.fromkeys(("rows", "base_of", "sorted_ids", "block_rows", "padded"), "*i32")
    pointers |= dict.fromkeys(("x", "full", "out", "scales"), "*bf16") | {"packed": "*u16", "topk_weights": "*fp32"}
    pointers |= {"x_row": "i64", "full_row": "i64"}
    for features, inner, top_k in ((2816, 2048, 6), (2048, 1408, 1)):
        blocks = blocks_of(tokens, inner, differences)
        inside = differences and not blocks.apart  # else they are the second kernel's
        launch = launch_of(blocks, inner, inside, torch.bfloat16)
        options = {name: launch.pop(name) for name in ("num_warps", "num_stages", "maxnreg")}
        constants = launch | {"N": features, "K": inner, "TOP_K": top_k, "WEIGHTED": top_k == 1}
        ptx, usage = compile_for_hopper(woven_product_kernel, pointers, constants, **options)
        # Both loops take their weights by asynchronous copies, and at least two programs fit onto a multiprocessor.
        assert ptx.count("cp.async.wait_group") >= 2 * (1 + inside)
        assert usage["REG"] * 32 * blocks.warps * 2 <= 65536 and 2 * (usage["shared"] + 1024) <= 227 * 1024
        assert usage["STACK"] <= 96  # bytes a thread, of which the widest tiles spill some


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed here")
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("apart", [Apart(8, 128, 1, 3, 8), Apart(16, 256, 4, 3, 2), Apart(64, 128, 8, 3, 2)])
def test_differences_apart_compile_for_hopper_without_a_gpu(apart: Apart) -> None:
    from signalbox.kernels.difference_rows_triton import difference_product_kernel, launch_apart

    pointers = dict.fromkeys(("sorted_ids", "block_rows", "padded"), "*i32") | {"x_row": "i64"}
    pointers |= dict.fromkeys(("x", "out", "scales"), "*bf16") | {"packed": "*u16", "topk_weights": "*fp32"}
    for features, inner, top_k in ((2816, 2048, 6), (2048, 1408, 1), (64, 352, 1)):
        launch = launch_apart(apart, inner, torch.bfloat16)
        options = {name: launch.pop(name) for name in ("num_warps", "num_stages", "maxnreg")}
        constants = launch | {"N": features, "K": inner, "TOP_K": top_k, "WEIGHTED": top_k == 1}
        ptx, usage = compile_for_hopper(difference_product_kernel, pointers, constants, **options)
        assert ptx.count("cp.async.wait_group") >= 2 and usage["STACK"] <= 32
        # As many programs as the launch counts on fit onto a multiprocessor.
        assert usage["REG"] * 32 * apart.warps * apart.programs <= 65536
        assert apart.programs * (usage["shared"] + 1024) <= 227 * 1024


TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
if INTERPRETED:  # its dot multiplies the bits of bfloat16 as integers
    del TOLERANCE[torch.bfloat16]


def on_device(aligned: Aligned) -> Aligned:
    return Aligned(*(part and Alignment(*(memory.to(DEVICE) for memory in part)) for part in aligned))


@here
@settings(max_examples=12 if INTERPRETED else 60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    tokens=st.integers(0, 20),
    top_k=st.integers(1, 3),
    num_full=st.integers(1, 4),
    count=st.integers(0, 8),
    features=st.sampled_from([16, 40]),
    inner=st.sampled_from([32, 96, 256]),
    blocks=st.sampled_from(
        [
            Blocks(16, 16, 32, 4, 3),
            Blocks(64, 32, 16, 4, 2),
            Blocks(16, 32, 32, 4, 3, added=True),
            APART,
            ONE_WARP,
            LARGE,
        ]
    ),
    dtype=st.sampled_from(list(TOLERANCE)),
    weighted=st.booleans(),
    usual_rows=st.sampled_from([None, 1]),
    seed=st.integers(0, 2**20),
)
@example(20, 2, 3, 8, 40, 128, Blocks(16, 32, 32, 4, 3), torch.float32, True, 1, 0)
@example(70, 1, 2, 6, 16, 128, Blocks(64, 16, 64, 4, 3), torch.float16, False, None, 1)
@example(40, 2, 3, 8, 40, 128, Blocks(16, 32, 64, 4, 3, added=True), torch.float16, True, 1, 3)
@example(40, 2, 3, 8, 40, 256, APART, torch.float32, True, 1, 4)
@example(70, 1, 1, 1, 16, 128, APART, torch.float16, True, None, 5)  # more picks of a difference than its blocks hold
@example(40, 2, 3, 8, 40, 256, ONE_WARP, torch.float16, True, 1, 6)
@example(40, 2, 2, 3, 40, 256, LARGE, torch.float16, True, 1, 7)
@example(9, 2, 2, 0, 16, 48, Blocks(16, 16, 16, 4, 3), torch.float32, True, None, 2)
def test_products_are_what_they_are_by_hand(
    tokens: int,
    top_k: int,
    num_full: int,
    count: int,
    features: int,
    inner: int,
    blocks: Blocks,
    dtype: torch.dtype,
    weighted: bool,
    usual_rows: int | None,
    seed: int,
) -> None:
    from signalbox.kernels.difference_rows_triton import woven_product_triton

    draw = torch.Generator().manual_seed(seed)
    full = torch.randn(num_full, features, inner, generator=draw).mul(inner**-0.5).to(dtype)
    differences = random_differences(full, count, draw)[0] if count else None
    x = torch.randn(tokens, inner, generator=draw).to(dtype)
    rows = torch.randint(-1, num_full + count, (tokens, top_k), generator=draw, dtype=torch.int32)
    weights = torch.rand(tokens, top_k, generator=draw) if weighted else None
    expected = by_hand(x, full, rows, top_k, differences, weights)
    # What no pick names must not matter; in use it is memory that is not there.
    used = set(rows.flatten().tolist())
    if differences:
        differences.scales[[i for i in range(count) if num_full + i not in used]] = float("nan")
        used |= {int(differences.base_of[row - num_full]) for row in used if row >= num_full}
    full[[row for row in range(num_full) if row not in used]] = float("nan")
    alignment = align_picks(rows, num_full, blocks, differences)
    out = torch.full((rows.numel(), features), float("nan"), dtype=dtype, device=DEVICE)
    woven_product_triton(
        x.to(DEVICE),
        full.to(DEVICE),
        rows.to(DEVICE),
        out,
        on_device(alignment),
        top_k,
        Differences(*(part.to(DEVICE) for part in differences)) if differences else None,
        weights.to(DEVICE) if weights is not None else None,
        blocks,
        usual_rows,
    )
    torch.testing.assert_close(out.cpu().double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@here
@pytest.mark.parametrize("blocks", [Blocks(16, 16, 64, 4, 3), Blocks(16, 16, 64, 4, 3, apart=APART.apart)])
def test_rows_of_the_base_do_not_change_by_a_bit_for_variants_in_their_block(blocks: Blocks) -> None:
    from signalbox.kernels.difference_rows_triton import woven_product_triton

    draw = torch.Generator().manual_seed(0)
    full = torch.randn(2, 16, 128, generator=draw)
    differences, _ = random_differences(full, 4, draw)
    x = torch.randn(12, 128, generator=draw)
    mixed = torch.tensor([0, 2, 1, 3, 0, 4, 1, 5, 0, 1, 2, 3], dtype=torch.int32)
    alone = torch.where(mixed < 2, mixed, differences.base_of[(mixed - 2).clamp(min=0).long()])
    outs = []
    for rows in (mixed, alone):
        alignment = align_picks(rows, 2, blocks, differences)
        out = torch.empty(12, 16, device=DEVICE)
        woven_product_triton(
            x.to(DEVICE),
            full.to(DEVICE),
            rows.to(DEVICE),
            out,
            on_device(alignment),
            1,
            Differences(*(part.to(DEVICE) for part in differences)),
            None,
            blocks,
            None,
        )
        outs.append(out.cpu())
    assert torch.equal(outs[0][mixed < 2], outs[1][mixed < 2])
    assert not torch.equal(outs[0][mixed >= 2], outs[1][mixed >= 2])


@here
def test_blocks_of_another_alignment_are_refused() -> None:
    from signalbox.kernels.difference_rows_triton import woven_product_triton

    rows = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    alignment = on_device(align_picks(rows.cpu(), 2, Blocks(16, 16, 32, 4, 3), None))
    x, full, out = (torch.zeros(*shape, device=DEVICE) for shape in ((4, 32), (2, 16, 32), (4, 16)))
    with pytest.raises(ValueError, match=r"align by `blocks.m` picks"):
        woven_product_triton(x, full, rows, out, alignment, 1, None, None, Blocks(32, 16, 32, 4, 3), None)
    differences = random_differences(full.cpu(), 3, torch.Generator().manual_seed(0))[0]
    stored = Differences(*(part.to(DEVICE) for part in differences))
    with pytest.raises(ValueError, match="`align_picks` makes"):  # of the base's rows, not of each difference's
        woven_product_triton(x, full, rows, out, alignment, 1, stored, None, Blocks(16, 16, 32, 4, 3, True), None)
    with pytest.raises(ValueError, match="`align_picks` makes"):  # without that of the differences
        blocks = Blocks(16, 16, 32, 4, 3, apart=APART.apart)
        woven_product_triton(x, full, rows, out, alignment, 1, stored, None, blocks, None)
    with pytest.raises(ValueError, match="contiguous in themselves"):
        turned = torch.zeros(2, 32, 16, device=DEVICE).transpose(1, 2)
        woven_product_triton(x, turned, rows, out, alignment, 1, None, None, Blocks(16, 16, 32, 4, 3), None)
