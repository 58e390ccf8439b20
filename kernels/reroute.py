"""Batched rerouting: each token's chosen experts become rows of the expert weights of the token's own adapter.

    rows[t, k] = table[adapter_of_token[t] + 1, topk_ids[t, k]]

ExpertWeave (Huawei, arXiv 2508.17624), section "batched rerouting": the base and all adapters share one frozen
router, so experts are chosen once and only then exchanged for the adapter's own; the weights stay as they are. The
table has one row more than there are adapters, the base's (identity), in front, so that no token needs a branch.
`topk_reroute` is softmax, top-k and rerouting in one, on GPUs one launch in place of the router's own, so that
rerouting costs no launch. Routers of other kinds choose by themselves and call `reroute`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

BASE = -1  # the slot of tokens that no adapter serves
ABSENT = -1  # the row of an expert that lives on another rank


def reroute_table(experts: int, placements: Sequence[Mapping[int, int]]) -> Tensor:
    """The table of one layer: int32 [len(placements) + 1, experts], on the CPU.

    `placements[slot]` maps the adapter's tuned experts to their rows; an expert that it does not name keeps the
    base's row, its own number. A row may be ABSENT. Raises ValueError for an expert that the layer does not have and
    for a row that is not one.
    """
    table = torch.arange(experts, dtype=torch.int32).repeat(len(placements) + 1, 1)
    for slot, placement in enumerate(placements):
        for expert, row in placement.items():
            if not 0 <= expert < experts:
                raise ValueError(f"slot {slot} tunes expert {expert}: the layer has experts 0 to {experts - 1}")
            if not ABSENT <= row < 2**31:
                raise ValueError(f"slot {slot} puts expert {expert} into row {row}: rows count from 0 (-1: elsewhere)")
            table[slot + 1, expert] = row
    return table


def slot_rows(slot: int, tuned: Sequence[int], experts: int, per_slot: int) -> dict[int, int]:
    """Rows of an adapter's experts where each slot has `per_slot` rows of its own (the paper's Delta_i + delta_ij).

    Slot i begins at row experts + i * per_slot and takes its experts in ascending order. Raises ValueError where an
    expert is named twice or the slot is too small.
    """
    if len(set(tuned)) != len(tuned):
        raise ValueError(f"slot {slot} names an expert twice: {sorted(tuned)}")
    if len(tuned) > per_slot:
        raise ValueError(f"slot {slot} tunes {len(tuned)} experts, but has {per_slot} rows: reserve more for each slot")
    return {expert: experts + slot * per_slot + place for place, expert in enumerate(sorted(tuned))}


def reroute(topk_ids: Tensor, adapter_of_token: Tensor, table: Tensor) -> Tensor:
    """Rows of the chosen experts, int32 [T, K].

    topk_ids: integers [T, K], each below the table's width; adapter_of_token: int32 [T or more], BASE or a slot of the
    table; table: int32 [slots + 1, experts]. All on one device; on GPUs the values are not checked. Raises ValueError
    where the shapes do not fit.
    """
    _check(topk_ids.shape[0], adapter_of_token, table)
    if topk_ids.is_cuda:
        from signalbox.kernels.reroute_triton import reroute_triton

        return reroute_triton(topk_ids, adapter_of_token, table)
    return reroute_torch(topk_ids, adapter_of_token, table)


def reroute_torch(topk_ids: Tensor, adapter_of_token: Tensor, table: Tensor) -> Tensor:
    """`reroute` in plain PyTorch, on any device."""
    slots = adapter_of_token[: topk_ids.shape[0], None].long() + 1
    return table[slots, topk_ids.long()]


def reroute_by_operations(topk_ids: Tensor, adapter_of_token: Tensor, table: Tensor) -> Tensor:
    """`reroute` as the paper's baseline "SingleOp" does it: one operation of the framework a step.

    Broadcast, multiply, add, gather, where; at least one adapter. Kept to be measured against.
    """
    tokens, top_k = topk_ids.shape
    slots = adapter_of_token[:tokens, None].expand(tokens, top_k).contiguous()
    starts = slots * table.shape[1]
    # Base tokens look up something meaningless from the end of the table, which `where` throws away.
    places = starts + topk_ids
    tuned = table[1:].view(-1)[places]
    return torch.where(slots < 0, topk_ids, tuned).to(torch.int32)


def topk_reroute(
    logits: Tensor, top_k: int, adapter_of_token: Tensor, table: Tensor, *, renormalize: bool, rounded: bool = False
) -> tuple[Tensor, Tensor]:
    """A softmax router and the rerouting of what it chose: (weights float32 [T, K], rows int32 [T, K]).

    logits: any float [T, experts]; adapter_of_token and table as in `reroute`. Softmax in float32 over all experts,
    then the K most probable, the most probable first, of equal ones the lower expert first. `renormalize` divides the
    weights by their sum (unless it is 0). `rounded`: probabilities are rounded to the logits' dtype before the choice,
    as by routers that compute in it: in bf16 close experts are equal then, and the lower is taken. Probabilities that
    are no number count as 0, so that even rows of rubbish, which pad a captured batch, yield valid rows. Raises
    ValueError where the shapes do not fit.
    """
    _check(logits.shape[0], adapter_of_token, table)
    if logits.shape[1] != table.shape[1] or not 0 < top_k <= logits.shape[1]:
        raise ValueError(f"top {top_k} of {logits.shape[1]} experts do not fit a table of {table.shape[1]} experts")
    if logits.is_cuda:
        from signalbox.kernels.reroute_triton import topk_reroute_triton

        return topk_reroute_triton(logits, top_k, adapter_of_token, table, renormalize=renormalize, rounded=rounded)
    return topk_reroute_torch(logits, top_k, adapter_of_token, table, renormalize=renormalize, rounded=rounded)


def topk_reroute_torch(
    logits: Tensor, top_k: int, adapter_of_token: Tensor, table: Tensor, *, renormalize: bool, rounded: bool = False
) -> tuple[Tensor, Tensor]:
    """`topk_reroute` in plain PyTorch, on any device."""
    probabilities = torch.softmax(logits.float(), dim=-1).nan_to_num(nan=0.0)
    if rounded:
        probabilities = probabilities.to(logits.dtype).float()
    # Sorted, since `topk` does not say which of equal ones it takes.
    weights, experts = torch.sort(probabilities, dim=-1, descending=True, stable=True)
    weights, experts = weights[:, :top_k], experts[:, :top_k]
    if renormalize:
        total = weights.sum(dim=-1, keepdim=True)
        weights = weights / torch.where(total > 0, total, 1.0)
    return weights.contiguous(), reroute_torch(experts, adapter_of_token, table)


def _check(tokens: int, adapter_of_token: Tensor, table: Tensor) -> None:
    if adapter_of_token.shape[0] < tokens:
        raise ValueError(f"{tokens} tokens, but adapters of {adapter_of_token.shape[0]} only: write one for each token")
    if table.dtype != torch.int32 or table.ndim != 2 or not table.is_contiguous():
        raise ValueError(
            f"a table must be contiguous int32 [slots + 1, experts], not {table.dtype} {list(table.shape)}"
        )
