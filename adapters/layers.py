"""LoRA adapters inside a loaded model: each linear adds the part of the adapter that a row's request names.

Storage for all slots is allocated when the model is loaded and written in place, so that loading one more adapter
changes no address, compiles nothing and stops nobody. Which rows belong to which slot is said once a step by `step`;
without it the linears are the base's, at the cost of one comparison.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from signalbox.adapters.base import AdapterError, BaseShape, LoraAdapter
from signalbox.kernels.segmented_lora import LoraWeights, Segments, add_lora

OUTPUT = "lm_head"


@dataclass(slots=True)
class _Step:
    """What the linears of a forward pass ask for: the rows of the whole batch, and those of the kept positions."""

    rows: Segments | None = None
    kept: Segments | None = None


class LoraLayers:
    """Slots for adapters in every `nn.Linear` of a causal language model, its output layer included.

    One thread computes (`step`); `load` may be called from any other for a slot that no row uses.
    """

    def __init__(self, model: nn.Module, slots: int, max_rank: int) -> None:
        self.slots, self.max_rank = slots, max_rank
        self.weights: dict[str, LoraWeights] = {}
        self._ranks = [0] * slots
        self._outputs: list[LoraWeights] = []
        self._step = _Step()
        self._writing = threading.Lock()
        linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        for name, linear in linears.items():
            weight = linear.weight
            self.weights[name] = storage = LoraWeights.allocate(
                slots, max_rank, linear.in_features, (linear.out_features,), weight.dtype, weight.device
            )
            # The output layer computes the kept positions only. Set on the instance, so that the module keeps its
            # class and its place and `nn.Module.__call__` needs no hook.
            kept = name.split(".")[-1] == OUTPUT
            if kept:
                self._outputs.append(storage)
            linear.forward = partial(_forward, linear, storage, self._step, kept)  # type: ignore[method-assign]
        self.device = next(iter(self.weights.values())).ranks.device if self.weights else torch.device("cpu")
        self.shape = BaseShape(
            model=type(model).__name__,
            linears={name: (linear.out_features, linear.in_features) for name, linear in linears.items()},
        )

    @property
    def nbytes(self) -> int:
        """Bytes reserved for all slots; on CPU the system hands them out when a slot is first used."""
        return sum(storage.nbytes for storage in self.weights.values())

    def load(self, slot: int, adapter: LoraAdapter) -> None:
        """Copy an adapter into a slot that no row uses. Blocking.

        Raises `AdapterError` where it has a module that this model lacks, or a shape or rank that does not fit.
        """
        for name, module in adapter.modules.items():
            if name not in self.weights:
                raise AdapterError(f"the model has no linear {name}", code="unknown_module", tensor=name)
            if module.rank > self.max_rank:
                raise AdapterError(
                    f"{name} has rank {module.rank}; this expert takes at most {self.max_rank}: raise its "
                    "max_adapter_rank",
                    code="rank_too_high",
                    tensor=name,
                )
        with self._writing, torch.inference_mode():
            for name, storage in self.weights.items():
                part = adapter.modules.get(name)
                try:
                    storage.write(slot, [None if part is None else (part.a, part.b, part.scaling)])
                except ValueError as error:
                    raise AdapterError(f"{name}: {error}", code="shape_mismatch", tensor=name) from error
            self._ranks[slot] = max((module.rank for module in adapter.modules.values()), default=0)

    @contextmanager
    def step(self, slots: Sequence[int] | None, keep: Sequence[int]) -> Iterator[None]:
        """For one forward pass: the slot of each row, -1 for the base's, None for all base; `keep` as in its logits."""
        if slots is not None:
            self._step.rows = Segments.of(slots, self._ranks, self.device)
            if any(storage.bits for storage in self._outputs):
                self._step.kept = Segments.of([slots[i] for i in keep], self._ranks, self.device)
        try:
            yield
        finally:
            self._step.rows = self._step.kept = None


def _forward(linear: nn.Linear, storage: LoraWeights, step: _Step, kept: bool, x: Tensor) -> Tensor:
    y = F.linear(x, linear.weight, linear.bias)
    segments = step.kept if kept else step.rows
    if segments is not None and storage.bits:
        add_lora(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), storage, segments)
    return y
