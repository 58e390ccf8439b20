"""What an adapter is: its files, what a base model must look like for it to fit, and the phases of its life.

An adapter is never executed: its files are a JSON configuration and safetensors. Everything about it is checked before
any engine is touched, and what is wrong becomes an `AdapterError` that names the tensor at fault.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["lora", "esft"]
Phase = Literal["validating", "staged", "ready", "draining", "gone", "failed"]


class AdapterError(Exception):
    """An adapter that cannot be used as it is (HTTP 422).

    `code` is the machine-readable reason (`shape_mismatch`, `not_finite`, ...), `tensor` the tensor or the
    configuration key at fault, where there is one; the message says both and what to do.
    """

    def __init__(self, message: str, *, code: str = "invalid_adapter", tensor: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.tensor = tensor

    def __reduce__(self) -> Any:  # keeps the fields when Ray carries the error from one process to another
        return (_rebuild, (self.message, self.code, self.tensor))


def _rebuild(message: str, code: str, tensor: str | None) -> AdapterError:
    return AdapterError(message, code=code, tensor=tensor)


@dataclass(slots=True, frozen=True)
class BaseShape:
    """What of a base model an adapter is checked against.

    linears: module name as in the model (`model.layers.0.self_attn.q_proj`) -> (out_features, in_features).
    experts: layer -> number of routed experts, of mixture-of-experts models. expert_linears: `gate_proj`, `up_proj` and
    `down_proj` -> (out_features, in_features) of one routed expert.
    """

    model: str
    linears: dict[str, tuple[int, int]]
    experts: dict[int, int] = field(default_factory=dict)
    expert_linears: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(slots=True, frozen=True)
class Limits:
    """What an operator allows. `roots` are the folders below which adapters may lie; sizes in bytes.

    `kinds` are those that the base's engine serves.
    """

    roots: tuple[Path, ...]
    max_bytes: int = 8 << 30
    max_rank: int = 64
    kinds: tuple[Kind, ...] = ("lora", "esft")

    @classmethod
    def of_any_size(cls, root: Path, *, max_rank: int = 64) -> Limits:
        """For what was validated under the operator's limits before, and for who checks files of his own."""
        return cls(roots=(root,), max_bytes=sys.maxsize, max_rank=max_rank)


@dataclass(slots=True, frozen=True)
class AdapterFacts:
    """What validation found. `content_hash` covers configuration and weights: equal content has equal hash.

    rank: the greatest of its modules (0 for ESFT). modules: names of the linears (LoRA), or `layer.expert` (ESFT).
    nbytes: of its tensors as stored.
    """

    kind: Kind
    path: str
    content_hash: str
    rank: int
    nbytes: int
    modules: tuple[str, ...]
    parameters: int


@dataclass(slots=True, frozen=True)
class LoraModule:
    """One adapted linear: y += scaling * (x @ a.T) @ b.T, with a [rank, in_features] and b [out_features, rank].

    Source: Hu et al., LoRA (2021), section 4.1; scaling is alpha / rank, or alpha / sqrt(rank) with rsLoRA.
    """

    a: Tensor
    b: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """Columns of b."""
        return int(self.a.shape[0])


@dataclass(slots=True, frozen=True)
class LoraAdapter:
    """A validated LoRA adapter in memory; modules by the name of the linear in the base model."""

    facts: AdapterFacts
    modules: dict[str, LoraModule]
