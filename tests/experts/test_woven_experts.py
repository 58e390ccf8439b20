"""The experts' computation on CUDA over rows, here by the kernels' references: what it asks of which kernel."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from signalbox.experts.vllm_arguments import installed
from signalbox.kernels.difference_rows import Blocks, Differences, difference_of

pytestmark = pytest.mark.skipif(not installed(), reason="vLLM is not installed here: make test-vllm")

BASE, EXTRA, HIDDEN, INNER, TOP_K = 8, 5, 64, 32, 2
DEFAULT = {"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 64, "num_warps": 8, "num_stages": 3}


def woven_layer(store: Any, local: list[int] | None = None, longest_captured: int = 64) -> Any:
    local = list(range(BASE)) if local is None else local
    held = sum(row >= 0 for row in local)
    weave = SimpleNamespace(longest_captured=longest_captured)
    return SimpleNamespace(
        store=store,
        local=local,
        partial=held < len(local),
        base_rows=held,
        total_rows=len(store.w13),
        rows_in_use=len(store.w13),
        weave=weave,
    )


def full_store(seed: int = 0) -> Any:
    draw = torch.Generator().manual_seed(seed)
    w13 = torch.randn(BASE + EXTRA, 2 * INNER, HIDDEN, generator=draw) * HIDDEN**-0.5
    w2 = torch.randn(BASE + EXTRA, HIDDEN, INNER, generator=draw) * INNER**-0.5
    return SimpleNamespace(w13=w13, w2=w2)


def experts_of(woven: Any) -> Any:
    """Our class of vLLM's with nothing of its constructor."""
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

    from signalbox.experts.expertweave.experts import _on_cuda

    made = object.__new__(_on_cuda(TritonExperts))
    made.woven = woven
    made.adjust_N_for_activation = lambda width, _: width // 2
    made.activation = lambda _, out, x: out.copy_(F.silu(x[:, : x.shape[1] // 2]) * x[:, x.shape[1] // 2 :])
    made.moe_sum = lambda x, out: out.copy_(x.sum(dim=1))
    return made


def run(experts: Any, x: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    tokens = len(x)
    output = torch.full((tokens, HIDDEN), float("nan"))
    workspaces = (torch.empty(tokens * TOP_K * 2 * INNER), torch.empty(tokens * TOP_K * max(HIDDEN, 2 * INNER)))
    store = experts.woven.store
    held = experts.woven.base_rows
    ours = (output, x, store.w13[:held], store.w2[:held], weights, rows)
    experts.apply(*ours, None, BASE, None, None, None, *workspaces, None, False)
    return output


def by_hand(w13: Tensor, w2: Tensor, x: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros(len(x), HIDDEN, dtype=torch.float64)
    for t, line in enumerate(rows.tolist()):
        for k, row in enumerate(line):
            if row >= 0:
                gate, up = (w13[row].double() @ x[t].double()).chunk(2)
                out[t] += weights[t, k].double() * (w2[row].double() @ (F.silu(gate) * up))
    return out


@pytest.mark.parametrize("absent", [False, True])
def test_whole_rows_are_what_they_are_by_hand(absent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.fused_moe import fused_moe

    monkeypatch.setattr(fused_moe, "try_get_optimal_moe_config", lambda *_: DEFAULT)
    store, draw = full_store(), torch.Generator().manual_seed(1)
    local = [0, 1, -1, 2, -1, 3, 4, -1] if absent else None
    experts = experts_of(woven_layer(store, local))
    x = torch.randn(20, HIDDEN, generator=draw)
    rows = torch.randint(-1 if absent else 0, BASE + EXTRA, (20, TOP_K), generator=draw, dtype=torch.int32)
    weights = torch.rand(20, TOP_K, generator=draw)
    found = run(experts, x, rows, weights)
    torch.testing.assert_close(found.double(), by_hand(store.w13, store.w2, x, rows, weights), rtol=1e-5, atol=1e-5)


def test_differences_are_what_they_are_by_hand() -> None:
    from signalbox.experts.expertweave.difference_store import DifferenceRows
    from signalbox.kernels.difference_rows import apply_difference

    whole, draw = full_store(2), torch.Generator().manual_seed(3)
    base_of = torch.tensor([7, 0, 3, 3, 1], dtype=torch.int32)
    store = object.__new__(DifferenceRows)
    store.base_rows, store.w13, store.w2 = BASE, whole.w13[:BASE], whole.w2[:BASE]
    rounded = []
    for name in ("w13", "w2"):
        base = getattr(store, name)[base_of.long()]
        packed, scales = difference_of(base, base + 0.1 * torch.randn(base.shape, generator=draw))
        setattr(store, name.replace("w", "differences"), Differences(packed, scales, base_of))
        rounded.append(torch.cat([getattr(store, name), apply_difference(base, packed, scales)]))
    woven = woven_layer(store)
    woven.total_rows = woven.rows_in_use = BASE + EXTRA
    x = torch.randn(20, HIDDEN, generator=draw)
    rows = torch.randint(0, BASE + EXTRA, (20, TOP_K), generator=draw, dtype=torch.int32)
    weights = torch.rand(20, TOP_K, generator=draw)
    found = run(experts_of(woven), x, rows, weights)
    torch.testing.assert_close(found.double(), by_hand(*rounded, x, rows, weights), rtol=1e-4, atol=1e-4)


def test_which_kernel_computes_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's where each pick is a block, and beyond what CUDA graphs hold."""
    from vllm.model_executor.layers.fused_moe import fused_moe

    from signalbox.experts.expertweave.experts import MANY_PICKS, blocks_of_step

    monkeypatch.setattr(fused_moe, "try_get_optimal_moe_config", lambda *_: DEFAULT)
    woven = woven_layer(full_store(), longest_captured=MANY_PICKS)

    def steps(tokens: int) -> tuple[Blocks, Blocks] | None:
        return blocks_of_step(woven, torch.zeros(tokens, TOP_K, dtype=torch.int32))

    assert steps(1) is None and steps(2) == (Blocks(64, 128, 64, 8, 3), Blocks(64, 128, 32, 8, 3))
    assert steps(MANY_PICKS) is not None and steps(MANY_PICKS + 1) is None
    woven.partial = True  # a pick of an absent expert is nobody's block
    assert steps(1) is not None


def test_vllm_s_blocks_as_ours() -> None:
    from signalbox.experts.expertweave.experts import blocks_like

    large = DEFAULT | {"BLOCK_SIZE_M": 128}
    assert blocks_like(large, (2048, 1408), 65.0) == (Blocks(128, 128, 64, 8, 3), Blocks(128, 128, 64, 8, 3))
    first, second = blocks_like(large, (2048, 352), 40.0) or (None, None)
    assert first == Blocks(64, 128, 64, 8, 3) and second == Blocks(64, 128, 32, 8, 3)
    assert blocks_like(large, (2048, 176), 40.0) is None  # 16 at a time would be slow
    assert blocks_like(large | {"SPLIT_K": 2}, (2048, 1408), 40.0) is None
    bare = {"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 32}  # as where vLLM is told to be batch-invariant
    assert blocks_like(bare, (2048, 1408), 9.0) == (Blocks(64, 64, 32, 4, 3), Blocks(64, 64, 32, 4, 3))
