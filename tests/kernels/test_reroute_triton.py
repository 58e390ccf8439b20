"""The rerouting kernels against the definition: on a GPU where there is one, else by Triton's interpreter."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.kernels.hopper import compile_for_hopper, run_interpreted
from tests.kernels.test_reroute import by_hand, close_logits, figure_4, random_case

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
    from signalbox.kernels.reroute_triton import PICKS, TOKENS, reroute_kernel, topk_reroute_kernel

    pointers = {"adapter_of_token": "*i32", "table": "*i32", "weights": "*fp32", "rows": "*i32", "topk_ids": "*i32"}
    for experts, top_k, element in ((64, 6, "fp32"), (64, 8, "bf16"), (128, 8, "bf16")):
        constants = {"EXPERTS": experts, "WIDTH": experts, "TOP_K": top_k, "TOKENS": TOKENS}
        constants |= {"RENORMALIZE": True, "ROUNDED": True}
        types = pointers | {"logits": f"*{element}"}
        ptx, usage = compile_for_hopper(topk_reroute_kernel, types, constants, num_warps=TOKENS)
        assert usage["LOCAL"] == 0 and usage["REG"] <= 64
        # A token's experts lie in one warp: each of the k choices is two instructions of it.
        assert ptx.count("redux.sync") == 2 * top_k
    ptx, usage = compile_for_hopper(reroute_kernel, pointers, {"EXPERTS": 64, "TOP_K": 6, "BLOCK": PICKS}, num_warps=4)
    assert usage["LOCAL"] == 0 and usage["REG"] <= 64


@here
def test_the_paper_s_figure_4() -> None:
    from signalbox.kernels.reroute_triton import reroute_triton

    owners, before, after, table = figure_4()
    for dtype in (torch.int32, torch.int64):
        rows = reroute_triton(before.to(DEVICE, dtype), owners.to(DEVICE), table.to(DEVICE))
        assert rows.tolist() == after.tolist()


@here
@settings(max_examples=25 if INTERPRETED else 100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    experts=st.sampled_from([1, 4, 7, 64, 128]),
    adapters=st.integers(0, 4),
    tokens=st.integers(0, 9),
    top_k=st.integers(1, 8),
    renormalize=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    strided=st.booleans(),
    seed=st.integers(0, 2**20),
)
@example(64, 20, 9, 6, False, torch.bfloat16, False, 1)
@example(64, 20, 9, 8, True, torch.float32, True, 2)
def test_router_and_rerouting_in_one_are_what_they_are_by_hand(
    experts: int,
    adapters: int,
    tokens: int,
    top_k: int,
    renormalize: bool,
    dtype: torch.dtype,
    strided: bool,
    seed: int,
) -> None:
    from signalbox.kernels.reroute_triton import reroute_triton, topk_reroute_triton

    top_k = min(top_k, experts)
    logits, owners, table = random_case(experts, adapters, tokens, seed)
    given_logits = logits.to(DEVICE, dtype)
    if strided:  # the columns of a wider tensor
        given_logits = torch.cat([given_logits, given_logits + 9], dim=1)[:, :experts]
    weights, rows = topk_reroute_triton(
        given_logits, top_k, owners.to(DEVICE), table.to(DEVICE), renormalize=renormalize
    )
    expected_weights, expected_rows = by_hand(logits, top_k, owners, table, renormalize)
    assert rows.tolist() == expected_rows.tolist()
    torch.testing.assert_close(weights.cpu().double(), expected_weights, rtol=1e-5, atol=1e-7)
    ids = by_hand(logits, top_k, torch.full_like(owners, -1), table, renormalize)[1]
    assert reroute_triton(ids.to(DEVICE), owners.to(DEVICE), table.to(DEVICE)).tolist() == rows.tolist()


@here
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16][: 1 if INTERPRETED else 2])  # it cuts bfloat16 off
def test_a_router_that_rounds_takes_the_lower_of_close_experts(dtype: torch.dtype) -> None:
    from signalbox.kernels.reroute import reroute_table, topk_reroute_torch
    from signalbox.kernels.reroute_triton import topk_reroute_triton

    owners, table = torch.full((40,), -1, dtype=torch.int32, device=DEVICE), reroute_table(64, []).to(DEVICE)
    logits = close_logits(dtype).to(DEVICE)
    weights, rows = topk_reroute_triton(logits, 6, owners, table, renormalize=False, rounded=True)
    expected_weights, expected_rows = topk_reroute_torch(logits, 6, owners, table, renormalize=False, rounded=True)
    same = (rows == expected_rows).all(dim=1)
    assert same.sum() >= 38  # exponentials of other last digits may round a probability otherwise
    torch.testing.assert_close(weights[same], expected_weights[same], rtol=1e-2, atol=0)


@here
def test_rows_of_rubbish_yield_valid_rows_with_weights_of_zero() -> None:
    from signalbox.kernels.reroute import reroute_table
    from signalbox.kernels.reroute_triton import topk_reroute_triton

    logits = torch.tensor([[float("nan")] * 8, [float("-inf")] * 8, [float("inf")] * 8], device=DEVICE)
    owners, table = torch.tensor([-1, 0, 0], dtype=torch.int32), reroute_table(8, [{1: 9}])
    weights, rows = topk_reroute_triton(logits, 3, owners.to(DEVICE), table.to(DEVICE), renormalize=True)
    assert rows.tolist() == [[0, 1, 2], [0, 9, 2], [0, 9, 2]]
    assert weights.tolist() == [[0.0] * 3] * 3
