"""Segmented LoRA on CPU against the definition in float64, one row at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from signalbox.kernels.segmented_lora import LoraWeights, Segments, add_lora, plan_blocks, plan_tiles, tile_of

Parts = list[tuple[Tensor, Tensor, float] | None]


def random_parts(ranks: list[int], in_features: int, outs: tuple[int, ...], generator: torch.Generator) -> list[Parts]:
    """One adapter a rank, the same rank in every slice; rank 0 leaves the linear alone."""

    def part(rank: int, out: int) -> tuple[Tensor, Tensor, float] | None:
        if rank == 0:
            return None
        a = torch.randn(rank, in_features, generator=generator) / in_features**0.5
        return a, torch.randn(out, rank, generator=generator) / rank**0.5, 0.5 + rank / 7

    return [[part(rank, out) for out in outs] for rank in ranks]


def expected(y: Tensor, x: Tensor, adapters: list[Parts], slots: list[int]) -> Tensor:
    """The definition, in float64."""
    rows = []
    for n, slot in enumerate(slots):
        row = y[n].double()
        if slot >= 0:
            x64 = x[n].double()
            deltas = [
                torch.zeros(0) if p is None else p[2] * (p[1].double() @ (p[0].double() @ x64)) for p in adapters[slot]
            ]
            if any(p is not None for p in adapters[slot]):
                row = row + torch.cat(deltas)
        rows.append(row)
    return torch.stack(rows) if rows else y.double()


def filled(adapters: list[Parts], max_rank: int, in_features: int, outs: tuple[int, ...], dtype: torch.dtype,
           device: str = "cpu") -> LoraWeights:  # fmt: skip
    weights = LoraWeights.allocate(len(adapters), max_rank, in_features, outs, dtype, device)
    for slot, parts in enumerate(adapters):
        weights.write(slot, parts)
    return weights


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Ranks of the slots, and the slot of each row: single rows and runs of prompts, idle slots, base rows."""
    ranks = draw(st.lists(st.integers(0, 24), min_size=1, max_size=12))
    runs = draw(st.lists(st.tuples(st.integers(-1, len(ranks) - 1), st.sampled_from([1, 1, 1, 2, 5, 11])), max_size=14))
    return ranks, [slot for slot, length in runs for _ in range(length)]


@settings(max_examples=150, deadline=None)
@given(batches(), st.sampled_from([1, 2]), st.sampled_from([(8,), (6, 3, 3)]), st.integers(0, 2**20))
def test_rows_get_their_adapter_and_base_rows_nothing(
    batch: tuple[list[int], list[int]], threads: int, outs: tuple[int, ...], seed: int
) -> None:
    ranks, slots = batch
    generator = torch.Generator().manual_seed(seed)
    adapters = random_parts(ranks, 12, outs, generator)
    weights = filled(adapters, 24, 12, outs, torch.float32)
    x = torch.randn(len(slots), 12, generator=generator)
    y = torch.randn(len(slots), sum(outs), generator=generator)
    y[torch.tensor([s < 0 for s in slots], dtype=torch.bool)] = -0.0  # adding 0 would turn it into +0
    before, want = y.clone(), expected(y, x, adapters, slots)
    segments = Segments.of(slots, ranks, "cpu")
    assert (segments is None) == all(s < 0 for s in slots)
    if segments is not None:
        segments.threads = threads
        add_lora(y, x, weights, segments)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    for n, slot in enumerate(slots):
        if slot < 0:
            assert torch.equal(y[n].view(torch.int32), before[n].view(torch.int32))


def test_a_slot_written_again_keeps_nothing_of_the_old_adapter() -> None:
    generator = torch.Generator().manual_seed(1)
    old, new = random_parts([16, 5], 12, (8,), generator)
    weights = LoraWeights.allocate(2, 16, 12, (8,), torch.float32, "cpu")
    for parts in (old, new):
        weights.write(0, parts)
    x, y = torch.randn(3, 12), torch.zeros(3, 8)
    for rank in (5, 16):  # whatever rank the step is computed with
        segments = Segments.of([0, 0, 0], [rank, 0], "cpu")
        assert segments is not None
        out = y.clone()
        add_lora(out, x, weights, segments)
        torch.testing.assert_close(out.double(), expected(y, x, [new], [0, 0, 0]), rtol=1e-5, atol=1e-5)
    weights.write(0, [None])
    assert weights.bits == 0 and int(weights.ranks[0]) == 0 and not weights.a.any() and not weights.b.any()


def test_what_does_not_fit_is_refused() -> None:
    weights = LoraWeights.allocate(2, 4, 12, (8,), torch.float32, "cpu")
    with pytest.raises(ValueError, match="rank 5"):
        weights.write(0, [(torch.zeros(5, 12), torch.zeros(8, 5), 1.0)])
    with pytest.raises(ValueError, match="do not fit"):
        weights.write(0, [(torch.zeros(4, 11), torch.zeros(8, 4), 1.0)])
    assert weights.bits == 0


def test_a_plan_computes_every_row_once_and_idle_slots_hardly() -> None:
    slots = [0, 9, 0, 3, -1, 9] + [2] * 20 + [0] * 9
    blocks = plan_blocks(slots, [8] * 10)
    real = []
    for block in blocks:
        if isinstance(block.rows, slice):
            real += [(n, block.first) for n in range(block.rows.start, block.rows.stop)]
            continue
        index = block.rows.view(block.last - block.first, -1)
        mask = torch.ones(index.shape) if block.mask is None else block.mask[..., 0]
        real += [(int(n), block.first + g) for g, n in zip(mask.nonzero()[:, 0].tolist(), index[mask > 0], strict=True)]
    assert sorted(real) == [(n, s) for n, s in enumerate(slots) if s >= 0]
    assert len(blocks) == 4  # two long runs, slots 0 to 3 batched, slot 9 by itself


def test_tiles_cover_the_rows_that_have_an_adapter() -> None:
    slots = [3, -1, 0, 3] * 100
    order, tiles = plan_tiles(slots)
    covered = {}
    for slot, start, count in tiles.tolist():
        assert 0 < count <= tile_of(len(slots))
        covered |= {int(n): slot for n in order[start : start + count]}
    assert covered == {n: s for n, s in enumerate(slots) if s >= 0}
    assert plan_tiles([-1, -1])[1].shape == (0, 3) and plan_tiles([])[0].shape == (0,)


def test_reserved_segments_hold_any_batch_of_their_size() -> None:
    for count, used in ((1, 1), (16, 16), (200, 7), (600, 5)):
        segments = Segments.reserve(count, used, "cpu")
        assert segments.order is not None and segments.tiles is not None
        address = segments.tiles.data_ptr(), segments.order.data_ptr()
        generator = torch.Generator().manual_seed(count)
        for _ in range(5):
            slots = torch.randint(-1, used, (count,), generator=generator).tolist()
            segments.refill(slots)
            order, tiles = plan_tiles(slots)
            assert segments.tiles[: len(tiles)].tolist() == tiles.tolist() and not segments.tiles[len(tiles) :].any()
            assert segments.order[: len(order)].tolist() == order.tolist()
        assert address == (segments.tiles.data_ptr(), segments.order.data_ptr())
    with pytest.raises(ValueError, match="reserved"):
        segments.refill([0])
