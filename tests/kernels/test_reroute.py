"""Rerouting against its definition written as loops, and the paper's worked example."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from signalbox.kernels.reroute import (
    ABSENT,
    BASE,
    reroute,
    reroute_by_operations,
    reroute_table,
    slot_rows,
    topk_reroute,
)

# ExpertWeave's figure 4: 64 experts, top 6, two adapters, 8 rows reserved for each.
TUNED = ([3, 14, 47], [5, 13, 14, 27, 35, 57, 59])
FIGURE_4 = [
    (BASE, [15, 14, 45, 47, 3, 57], [15, 14, 45, 47, 3, 57]),
    (BASE, [35, 1, 32, 43, 11, 54], [35, 1, 32, 43, 11, 54]),
    (0, [31, 13, 62, 12, 34, 14], [31, 13, 62, 12, 34, 65]),
    (0, [26, 47, 31, 3, 58, 60], [26, 66, 31, 64, 58, 60]),
    (BASE, [30, 14, 58, 46, 50, 44], [30, 14, 58, 46, 50, 44]),
    (1, [13, 31, 14, 35, 15, 5], [73, 31, 74, 76, 15, 72]),
    (1, [8, 27, 35, 59, 5, 63], [8, 75, 76, 78, 72, 63]),
    (1, [35, 59, 52, 58, 7, 37], [76, 78, 52, 58, 7, 37]),
    (0, [3, 13, 60, 0, 14, 32], [64, 13, 60, 0, 65, 32]),
    (1, [57, 5, 3, 13, 27, 59], [77, 72, 3, 73, 75, 78]),
]


def figure_4() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Adapters of the tokens, experts before, rows after, the table."""
    table = reroute_table(64, [slot_rows(slot, tuned, 64, 8) for slot, tuned in enumerate(TUNED)])
    slots, before, after = zip(*FIGURE_4, strict=True)
    ids = torch.tensor(before, dtype=torch.int32)
    return torch.tensor(slots, dtype=torch.int32), ids, torch.tensor(after, dtype=torch.int32), table


def random_case(experts: int, adapters: int, tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits far enough apart to be ordered the same by every exponential, many of them equal; adapters; a table."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randint(-12, 13, (tokens, experts), generator=draw).float() / 4
    owners = torch.randint(-1, adapters, (tokens + 3,), generator=draw, dtype=torch.int32)
    placements = []
    for _ in range(adapters):
        tuned = torch.randperm(experts, generator=draw)[: int(torch.randint(0, experts + 1, (), generator=draw))]
        rows = torch.randint(ABSENT, experts * (adapters + 1), tuned.shape, generator=draw)
        placements.append(dict(zip(tuned.tolist(), rows.tolist(), strict=True)))
    return logits, owners, reroute_table(experts, placements)


def by_hand(logits: Tensor, top_k: int, owners: Tensor, table: Tensor, renormalize: bool) -> tuple[Tensor, Tensor]:
    """`topk_reroute` one token after the other, in float64."""
    weights, rows = [], []
    for token, line in enumerate(logits.double()):
        p = (line - line.max()).exp()
        p = (p / p.sum()).tolist()
        best = sorted(range(len(p)), key=lambda expert: (-p[expert], expert))[:top_k]
        total = sum(p[expert] for expert in best) if renormalize else 1.0
        weights.append([p[expert] / total for expert in best])
        rows.append([int(table[int(owners[token]) + 1][expert]) for expert in best])
    shape = (len(logits), top_k)
    return torch.tensor(weights, dtype=torch.float64).view(shape), torch.tensor(rows, dtype=torch.int32).view(shape)


def test_the_paper_s_figure_4() -> None:
    owners, before, after, table = figure_4()
    assert table.shape == (3, 64) and table[0].tolist() == list(range(64))
    for function in (reroute, reroute_by_operations):
        for dtype in (torch.int32, torch.int64):
            rows = function(before.to(dtype), owners, table)
            assert rows.dtype == torch.int32
            assert rows.tolist() == after.tolist()


@settings(max_examples=60, deadline=None)
@given(
    experts=st.sampled_from([1, 4, 7, 64]),
    adapters=st.integers(0, 4),
    tokens=st.integers(0, 9),
    top_k=st.integers(1, 8),
    renormalize=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**20),
)
def test_router_and_rerouting_in_one_are_what_they_are_by_hand(
    experts: int, adapters: int, tokens: int, top_k: int, renormalize: bool, dtype: torch.dtype, seed: int
) -> None:
    top_k = min(top_k, experts)
    logits, owners, table = random_case(experts, adapters, tokens, seed)
    weights, rows = topk_reroute(logits.to(dtype), top_k, owners, table, renormalize=renormalize)
    expected_weights, expected_rows = by_hand(logits, top_k, owners, table, renormalize)
    assert rows.dtype == torch.int32 and weights.dtype == torch.float32
    assert rows.tolist() == expected_rows.tolist()
    torch.testing.assert_close(weights.double(), expected_weights, rtol=1e-5, atol=1e-7)
    if adapters:
        ids = by_hand(logits, top_k, torch.full_like(owners, BASE), table, renormalize)[1]
        assert reroute_by_operations(ids, owners, table).tolist() == rows.tolist()


def close_logits(dtype: torch.dtype) -> Tensor:
    """[40, 64] of 16 bits whose probabilities differ by less than the type can tell."""
    apart = {torch.bfloat16: 0.05, torch.float16: 0.006}[dtype]
    return (torch.randn(40, 64, generator=torch.Generator().manual_seed(3)) * apart).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_router_that_rounds_takes_the_lower_of_close_experts(dtype: torch.dtype) -> None:
    logits, owners, table = close_logits(dtype), torch.full((40,), BASE, dtype=torch.int32), reroute_table(64, [])
    weights, rows = topk_reroute(logits, 6, owners, table, renormalize=False, rounded=True)
    probabilities = torch.softmax(logits, dim=-1).float()  # as the type can tell them
    best = [sorted(range(64), key=lambda expert: (-line[expert], expert))[:6] for line in probabilities.tolist()]
    assert rows.tolist() == best and torch.equal(weights, probabilities.gather(1, rows.long()))
    plain = topk_reroute(logits, 6, owners, table, renormalize=False)[1]
    assert (plain != rows).any(dim=1).sum() > 10


def test_rows_of_rubbish_yield_valid_rows_with_weights_of_zero() -> None:
    logits = torch.tensor([[float("nan")] * 8, [float("-inf")] * 8, [float("inf")] * 8])
    owners, table = torch.tensor([-1, 0, 0], dtype=torch.int32), reroute_table(8, [{1: 9}])
    weights, rows = topk_reroute(logits, 3, owners, table, renormalize=True)
    assert rows.tolist() == [[0, 1, 2], [0, 9, 2], [0, 9, 2]]
    assert weights.tolist() == [[0.0] * 3] * 3


def test_what_does_not_fit_is_refused() -> None:
    table = reroute_table(8, [])
    with pytest.raises(ValueError, match="experts 0 to 7"):
        reroute_table(8, [{8: 9}])
    with pytest.raises(ValueError, match="row -2"):
        reroute_table(8, [{7: -2}])
    with pytest.raises(ValueError, match="twice"):
        slot_rows(0, [1, 1], 8, 4)
    with pytest.raises(ValueError, match="reserve more"):
        slot_rows(0, [1, 2, 3], 8, 2)
    with pytest.raises(ValueError, match="one for each token"):
        reroute(torch.zeros(3, 2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32), table)
    with pytest.raises(ValueError, match="contiguous int32"):
        reroute(torch.zeros(2, 2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32), table.long())
    with pytest.raises(ValueError, match="top 9 of 8"):
        topk_reroute(torch.zeros(1, 8), 9, torch.zeros(1, dtype=torch.int32), table, renormalize=False)
