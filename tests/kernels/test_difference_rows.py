"""Differences in four bits, and products with them, against their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from signalbox.kernels.difference_rows import (
    HIGHEST,
    LOWEST,
    Differences,
    align_picks,
    apply_difference,
    blocks_of,
    difference_of,
    group_of,
    grouped_product,
    unpack_difference,
    woven_product,
)


def random_differences(
    full: Tensor, count: int, draw: torch.Generator, scale: float = 0.05
) -> tuple[Differences, Tensor]:
    """So many tuned variants of the full rows, of one expert several, as differences and as they were."""
    base_of = torch.randint(0, len(full), (count,), generator=draw, dtype=torch.int32)
    tuned = full[base_of.long()].float()
    tuned = (tuned + scale * torch.randn(tuned.shape, generator=draw)).to(full.dtype)
    packed, scales = difference_of(full[base_of.long()], tuned) if count else _none(full)
    return Differences(packed, scales, base_of), tuned


def _none(full: Tensor) -> tuple[Tensor, Tensor]:
    _, n, k = full.shape
    return torch.zeros(0, n, k // 2, dtype=torch.uint8), torch.zeros(0, k // group_of(k), n, dtype=torch.bfloat16)


def by_hand(
    x: Tensor, full: Tensor, rows: Tensor, top_k: int, differences: Differences, weights: Tensor | None
) -> Tensor:
    """The product pick by pick in float64, differences unpacked nibble by nibble."""
    out = torch.zeros(rows.numel(), full.shape[1], dtype=torch.float64)
    for pick, row in enumerate(rows.flatten().tolist()):
        if row < 0:
            continue
        if row < len(full):
            weight = full[row].double()
        else:
            i = row - len(full)
            weight = full[int(differences.base_of[i])].double()
            weight = weight + unpacked_by_hand(differences.packed[i], differences.scales[i])
        out[pick] = weight @ x[pick // top_k].double() * (1 if weights is None else weights.flatten()[pick].double())
    return out


def unpacked_by_hand(packed: Tensor, scales: Tensor) -> Tensor:
    """One row's difference, float64 [N, K]."""
    n, half = packed.shape
    group = 2 * half // scales.shape[0]
    number = torch.zeros(n, 2 * half, dtype=torch.float64)
    for place, byte in enumerate(packed.flatten().tolist()):
        block, rest = divmod(place, n * group)
        row, rest = divmod(rest, group)
        j, second = divmod(rest, 2)
        column = block * 2 * group + second * group + j
        number[row, column] = (byte % 16 - 8) * scales[column // group, row].double()
        number[row, column + group // 2] = (byte // 16 - 8) * scales[column // group, row].double()
    return number


@pytest.mark.parametrize("features", [32, 64, 96, 160, 192, 256, 1408])
def test_packed_differences_are_unpacked_to_what_the_bytes_mean(features: int) -> None:
    draw = torch.Generator().manual_seed(features)
    group = group_of(features)
    assert features % (2 * group) == 0 and 16 <= group <= 64
    packed = torch.randint(0, 256, (5, features // 2), generator=draw, dtype=torch.uint8)
    scales = torch.randn(features // group, 5, generator=draw).to(torch.bfloat16)
    assert unpack_difference(packed, scales).double().tolist() == unpacked_by_hand(packed, scales).tolist()


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([(3, 32), (2, 3, 64), (2, 2, 1, 96), (1, 256)]),
    scale=st.sampled_from([0.0, 1e-4, 0.01, 1.0]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 2**20),
)
def test_an_error_is_at_most_half_a_step_of_the_scale_that_covers_the_group(
    shape: tuple[int, ...], scale: float, dtype: torch.dtype, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=draw).to(dtype)
    tuned = (base.float() + scale * torch.randn(shape, generator=draw)).to(dtype)
    packed, scales = difference_of(base, tuned)
    *leading, n, k = shape
    group = group_of(k)
    assert packed.dtype == torch.uint8 and list(packed.shape) == [*leading, n, k // 2]
    assert scales.dtype == torch.bfloat16 and list(scales.shape) == [*leading, k // group, n]
    difference = tuned.float() - base.float()
    error = (unpack_difference(packed, scales) - difference).unflatten(-1, (-1, group))
    # The candidates include covering the group without clipping: the chosen one is no worse in squares.
    covering = difference.unflatten(-1, (-1, group)).abs().amax(-1, keepdim=True) / HIGHEST
    assert (error.square().mean(-1) <= (0.51 * covering.squeeze(-1)).square() + 1e-12).all()
    applied = apply_difference(base, packed, scales)
    assert applied.dtype == dtype
    if scale == 0:
        assert torch.equal(applied, base)


def test_differences_that_four_bits_hold_are_kept_exactly() -> None:
    draw = torch.Generator().manual_seed(0)
    number = torch.randint(LOWEST, HIGHEST + 1, (4, 128), generator=draw).float()
    number[:, 0], number[:, 64] = LOWEST, LOWEST
    packed, scales = difference_of(torch.zeros(4, 128), number / 64)
    assert torch.equal(unpack_difference(packed, scales), number / 64)


def test_a_better_scale_than_the_greatest_difference_s_is_found() -> None:
    draw = torch.Generator().manual_seed(0)
    difference = torch.randn(64, 512, generator=draw)
    packed, scales = difference_of(torch.zeros_like(difference), difference)
    error = (unpack_difference(packed, scales) - difference).square().mean()
    grouped = difference.unflatten(-1, (-1, 64))
    plain = grouped.abs().amax(-1, keepdim=True) / HIGHEST
    plain_error = ((grouped / plain).round() * plain - grouped).square().mean()
    assert error < 0.85 * plain_error
    assert error < 0.012  # of a variance of 1; the best of four bits for normal numbers is 0.0095 (Lloyd-Max)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 7),
    top_k=st.integers(1, 3),
    num_full=st.integers(1, 5),
    count=st.integers(0, 6),
    weighted=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_products_are_what_they_are_by_hand(
    tokens: int, top_k: int, num_full: int, count: int, weighted: bool, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    full = torch.randn(num_full, 10, 64, generator=draw)
    differences, _ = random_differences(full, count, draw)
    x = torch.randn(tokens, 64, generator=draw)
    rows = torch.randint(-1, num_full + count, (tokens, top_k), generator=draw, dtype=torch.int32)
    weights = torch.rand(tokens, top_k, generator=draw) if weighted else None
    out = torch.full((tokens * top_k, 10), float("nan"))
    blocks = blocks_of(tokens, 64, True)
    alignment = align_picks(rows, num_full, blocks, differences)
    woven_product(
        x,
        full,
        rows,
        out,
        alignment,
        top_k=top_k,
        blocks=blocks,
        differences=differences,
        topk_weights=weights,
    )
    expected = by_hand(x, full, rows, top_k, differences, weights)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_blocks_follow_the_picks_of_a_row() -> None:
    for tokens in (1, 32, 64, 128, 256, 512, 4096):
        for differences in (False, True):
            # 8 of 128 experts (Qwen3-MoE) are two thirds of DeepSeek-V2-Lite's 6 of 64.
            same = blocks_of(9999, 2048, differences, picks_per_row=tokens * 1.5 * 8 / 128)
            assert blocks_of(tokens, 2048, differences) == same
    assert blocks_of(8, 48, True).k == 16 and blocks_of(512, 2048, False).m > blocks_of(8, 2048, False).m


def test_a_variant_s_product_is_close_to_that_of_the_tuned_weights() -> None:
    draw = torch.Generator().manual_seed(0)
    full = torch.randn(2, 32, 256, generator=draw).to(torch.bfloat16)
    differences, tuned = random_differences(full, 3, draw)
    x = torch.randn(6, 256, generator=draw).to(torch.bfloat16)
    rows = torch.arange(6, dtype=torch.int32).clamp(2, 4)
    got = grouped_product(x, full, rows, top_k=1, differences=differences).float()
    wanted = torch.einsum("pk,pnk->pn", x.float(), tuned[(rows - 2).long()].float())
    base = torch.einsum("pk,pnk->pn", x.float(), full[differences.base_of[(rows - 2).long()].long()].float())
    assert (got - wanted).norm() < 0.15 * (base - wanted).norm()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        difference_of(torch.zeros(2, 32), torch.zeros(2, 64))
    with pytest.raises(ValueError, match="multiples of 32"):
        difference_of(torch.zeros(2, 48), torch.zeros(2, 48))
    for value in ("nan", "inf"):
        tuned = torch.zeros(2, 64)
        tuned[1, 40] = float(value)
        with pytest.raises(ValueError, match="no finite numbers"):
            difference_of(torch.zeros(2, 64), tuned)
    with pytest.raises(ValueError, match="multiple of 16"):
        blocks_of(1, 40, False)
    rows = torch.zeros(4, dtype=torch.int32)
    with pytest.raises(ValueError, match="do not fit"):
        woven_product(
            torch.zeros(3, 32),
            torch.zeros(2, 8, 32),
            rows,
            torch.zeros(4, 8),
            align_picks(rows, 2, blocks_of(3, 32, False), None),
            top_k=2,
            blocks=blocks_of(3, 32, False),
        )
