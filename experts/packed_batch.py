"""A step's tokens packed in one row, and attention over it with one KV cache for all requests.

Every step of the transformers engine is a single forward pass over `[1, N]` tokens: first one token for each
decoding request, then pieces of prompts. The linear layers see N tokens and need not know whose they are; only
attention does. What else depends on the request, such as its adapter, is one more vector of length N beside `rows`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ATTENTION = "signalbox_packed"


class KVCache:
    """Keys and values of all running requests: per layer `[rows, kv_heads, length, head_dim]`.

    A request owns one row. The tensors grow when a longer or a further request needs room and are given back
    when nothing runs, so that memory follows the load up to the budget that the scheduler keeps.
    """

    def __init__(self, layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.layers, self.kv_heads, self.head_dim = layers, kv_heads, head_dim
        self.dtype, self.device = dtype, device
        self.rows = self.length = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token of one request takes over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes allocated now."""
        return self.rows * self.length * self.bytes_per_token

    def reserve(self, rows: int, length: int, budget_tokens: int) -> None:
        """Make room for `rows` requests of up to `length` tokens, keeping what is stored.

        Grows in powers of two to keep copies rare; where that would pass the budget, each row gets an equal share
        of it. The caller sees to it that `rows * length` itself fits.
        """
        if rows <= self.rows and length <= self.length:
            return
        for new_rows, new_length in (
            (_power_of_two(max(rows, self.rows)), _power_of_two(max(64, length, self.length))),
            (rows, _power_of_two(max(64, length))),
            (rows, max(length, budget_tokens // rows)),
        ):
            if new_rows * new_length <= budget_tokens:
                break
        keep_rows, keep_length = min(self.rows, new_rows), min(self.length, new_length)
        for stored in (self.keys, self.values):
            for layer in range(self.layers):
                # Zeros, not empty memory: a masked NaN would still poison the row's attention.
                grown = torch.zeros(
                    new_rows, self.kv_heads, new_length, self.head_dim, dtype=self.dtype, device=self.device
                )
                if layer < len(stored):
                    grown[:keep_rows, :, :keep_length] = stored[layer][:keep_rows, :, :keep_length]
                    stored[layer] = grown
                else:
                    stored.append(grown)
        self.rows, self.length = new_rows, new_length

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one row over another."""
        for stored in (*self.keys, *self.values):
            stored[target, :, :length] = stored[source, :, :length]

    def release(self) -> None:
        """Give all memory back; nothing may be running."""
        self.keys, self.values = [], []
        self.rows = self.length = 0


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


@dataclass(slots=True, frozen=True)
class Segment:
    """A piece of one prompt inside the packed row: tokens `start..end`, of which `offset` came before."""

    start: int
    end: int
    row: int
    offset: int


@dataclass(slots=True)
class PackedBatch:
    """What attention must know of a packed row of N tokens.

    rows, positions: int64 [N], the cache row and the position of each token. The first `len(decode_rows)` tokens
    are one each of the decoding requests. `cache` None means no cache: segments attend to themselves (scoring).
    slots: the adapter slot of each token, -1 for the base's; None where all are the base's.
    """

    token_ids: Tensor
    rows: Tensor
    positions: Tensor
    decode_rows: list[int]
    decode_length: int
    segments: list[Segment]
    cache: KVCache | None
    slots: list[int] | None = None
    _masks: dict[Any, Tensor] = field(default_factory=dict)

    def decode_mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Additive mask [span, 1, 1, decode_length] of the decoding requests, built once a step."""
        key = ("decode", window)
        if key not in self._masks:
            count = len(self.decode_rows)
            span = max(self.decode_rows) + 1
            positions = torch.zeros(span, dtype=torch.int64, device=self.rows.device)
            positions[self.rows[:count]] = self.positions[:count]
            self._masks[key] = _mask(positions, self.decode_length, window, dtype)[:, None, None, :]
        return self._masks[key]

    def segment_mask(self, segment: Segment, groups: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """Additive mask [groups * tokens, offset + tokens] of one piece of a prompt, built once a step."""
        key = (segment.start, window)
        if key not in self._masks:
            positions = torch.arange(
                segment.offset, segment.offset + segment.end - segment.start, device=self.rows.device
            )
            length = segment.offset + segment.end - segment.start
            self._masks[key] = _mask(positions, length, window, dtype).repeat(groups, 1)
        return self._masks[key]


def _mask(positions: Tensor, length: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """[n, length]: 0 where a query at `positions[i]` may look, -inf elsewhere."""
    keys = torch.arange(length, device=positions.device)
    hidden = keys[None, :] > positions[:, None]
    if window is not None:
        hidden |= keys[None, :] <= positions[:, None] - window
    return torch.zeros(hidden.shape, dtype=dtype, device=positions.device).masked_fill_(hidden, float("-inf"))


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: PackedBatch,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed row, in the shape that transformers' attention interface asks for.

    query [1, q_heads, N, d], key and value [1, kv_heads, N, d] -> [1, N, q_heads, d]. The query heads that share
    a key head are laid out as further query positions, so that keys are never repeated in memory.
    """
    if softcap is not None or s_aux is not None:
        raise NotImplementedError(f"{type(module).__name__} uses attention soft-capping or sinks")
    q_heads, dim = query.shape[1], query.shape[3]
    kv_heads = key.shape[1]
    groups = q_heads // kv_heads
    out = query.new_empty(query.shape[2], q_heads, dim)
    cache = packed.cache
    if cache is not None:
        layer: int = module.layer_idx  # type: ignore[assignment]
        keys, values = cache.keys[layer], cache.values[layer]
        keys[packed.rows, :, packed.positions] = key[0].transpose(0, 1)
        values[packed.rows, :, packed.positions] = value[0].transpose(0, 1)

        if count := len(packed.decode_rows):
            span, length = max(packed.decode_rows) + 1, packed.decode_length
            q = query[0, :, :count].transpose(0, 1).reshape(count, kv_heads, groups, dim)
            dense = span == count
            if not dense:  # rows of requests that are still reading their prompt lie between
                spread = q.new_zeros(span, kv_heads, groups, dim)
                spread[packed.rows[:count]] = q
                q = spread
            o = F.scaled_dot_product_attention(
                q,
                keys[:span, :, :length],
                values[:span, :, :length],
                attn_mask=packed.decode_mask(sliding_window, q.dtype),
                scale=scaling,
            )
            out[:count] = (o if dense else o[packed.rows[:count]]).reshape(count, q_heads, dim)

    for segment in packed.segments:
        tokens = segment.end - segment.start
        q = query[:, :, segment.start : segment.end].reshape(1, kv_heads, groups * tokens, dim)
        if cache is None:
            k, v = key[:, :, segment.start : segment.end], value[:, :, segment.start : segment.end]
        else:
            end = segment.offset + tokens
            k, v = keys[segment.row : segment.row + 1, :, :end], values[segment.row : segment.row + 1, :, :end]
        mask = packed.segment_mask(segment, groups, sliding_window, q.dtype)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
        out[segment.start : segment.end] = o.view(q_heads, tokens, dim).transpose(0, 1)
    return out[None], None
