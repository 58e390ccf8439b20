"""Trains selected experts of a mixture of experts, and nothing else of the model.

Source: Wang et al., ESFT (2024), section 3: router, shared experts, attention, norms and embeddings stay as they are,
so that one routing decision serves the base and all its adapters. transformers keeps a layer's experts in one tensor
[experts, ...]; here each selected expert has parameters of its own beside it, in float32: a step of 1e-5 is lost in the
8 bits of a bfloat16 weight. Gradients and the optimiser's state exist for these alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from signalbox.adapters.esft_format import EsftAdapter
from signalbox.adapters.esft_scores import expert_layers
from signalbox.adapters.train import Optimisation
from signalbox.adapters.train_data import TrainingError

# The authors' configs/base.yaml, with the batch and the most steps of the paper.
PAPER = Optimisation(
    rate=1e-5, batch=32, steps=500, warmup=0.0, schedule="constant", weight_decay=0.1, betas=(0.9, 0.95), longest=4096
)


class TunedExperts(nn.Module):
    """A layer's routed experts, some of them trainable. Takes the place of the family's own module.

    `experts`: the module it replaces, frozen. `ids`: the selected experts; `gate_up[n]` [2 I, H] and `down[n]` [H, I],
    float32, are the weights of `ids[n]`, which start as the base's.
    """

    def __init__(self, experts: nn.Module, ids: Sequence[int]) -> None:
        super().__init__()
        self.experts = experts.requires_grad_(False)
        self.ids = tuple(ids)
        self._place = {expert: n for n, expert in enumerate(self.ids)}
        stored: Any = experts
        self.gate_up = nn.ParameterList([_master(stored.gate_up_proj[i]) for i in self.ids])
        self.down = nn.ParameterList([_master(stored.down_proj[i]) for i in self.ids])

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], top_k_index int64 [T, K], top_k_weights [T, K] -> [T, H], as the module replaced."""
        experts: Any = self.experts
        tokens, chosen = top_k_index.shape
        flat = top_k_index.flatten()
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=experts.gate_up_proj.shape[0]).tolist()
        parts = hidden_states[order // chosen].split(counts)
        mixed = torch.cat([self._expert(i, part) for i, part in enumerate(parts) if len(part)])
        mixed = mixed * top_k_weights.flatten()[order, None]
        # In the order of the picks again, and summed for each token in one go: the same result every time.
        mixed = mixed[torch.argsort(order)].view(tokens, chosen, -1).sum(1)
        return mixed.to(hidden_states.dtype)

    def _expert(self, i: int, x: Tensor) -> Tensor:
        experts: Any = self.experts
        n = self._place.get(i)
        gate_up = experts.gate_up_proj[i] if n is None else self.gate_up[n].to(x.dtype)
        down = experts.down_proj[i] if n is None else self.down[n].to(x.dtype)
        gate, up = functional.linear(x, gate_up).chunk(2, dim=-1)
        return functional.linear(experts.act_fn(gate) * up, down)


def attach_experts(model: Any, experts: Mapping[int, Sequence[int]]) -> dict[int, TunedExperts]:
    """Freeze the model and make the selected experts trainable in place; layer -> the module put there.

    Raises `TrainingError` where the model has no such layer or expert, or none is selected.
    """
    layers = expert_layers(model)
    chosen = {layer: sorted(set(ids)) for layer, ids in experts.items() if ids}
    if not chosen:
        raise TrainingError("no expert is selected; raise the threshold")
    for layer, ids in chosen.items():
        count = int(layers[layer].gate_up_proj.shape[0]) if layer in layers else 0  # type: ignore[index]
        if ids[0] < 0 or ids[-1] >= count:
            raise TrainingError(f"layer {layer} of the base has {count} routed experts; {ids} are selected")
    model.requires_grad_(False).eval()
    tuned = {}
    for name, module in list(model.named_modules()):
        for layer, ids in chosen.items():
            if module is layers[layer]:
                tuned[layer] = TunedExperts(module, ids)
                model.set_submodule(name, tuned[layer])
    return tuned


def detach_experts(model: Any, tuned: Mapping[int, TunedExperts]) -> None:
    """Give the model its own, untouched experts back."""
    for name, module in list(model.named_modules()):
        if isinstance(module, TunedExperts) and any(module is ours for ours in tuned.values()):
            model.set_submodule(name, module.experts)


def tuned_weights(tuned: Mapping[int, TunedExperts], layer: int, expert: int) -> dict[str, Tensor]:
    """One trained expert: `gate_proj`, `up_proj` [intermediate, hidden] and `down_proj` [hidden, intermediate]."""
    module = tuned[layer]
    n = module.ids.index(expert)
    gate, up = module.gate_up[n].detach().chunk(2)
    return {"gate_proj": gate, "up_proj": up, "down_proj": module.down[n].detach()}


@contextmanager
def applied(model: Any, adapter: EsftAdapter) -> Iterator[None]:
    """The model with an adapter's experts in place of its own; afterwards its own again, bit by bit.

    Raises `AdapterError` where a weight of the adapter is not finite.
    """
    layers = expert_layers(model)
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        for layer, ids in adapter.experts.items():
            module: Any = layers[layer]
            for expert in ids:
                weights = adapter.expert(layer, expert)
                gate_up = torch.cat([weights["gate_proj"], weights["up_proj"]])
                for row, new in (
                    (module.gate_up_proj.data[expert], gate_up),
                    (module.down_proj.data[expert], weights["down_proj"]),
                ):
                    kept.append((row, row.clone()))
                    row.copy_(new)
        yield
    finally:
        for row, old in kept:
            row.copy_(old)


def _master(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().to(torch.float32, copy=True))
