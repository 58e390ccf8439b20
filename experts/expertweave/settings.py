"""What the engine tells vLLM's processes about ExpertWeave: plain values, carried in vLLM's `additional_config`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

KEY = "expertweave"  # in vLLM's additional_config
SLOT_KEY = "expertweave_slot"  # in a request's sampling parameters (extra_args): the adapter's slot
STAGING_LOST = "staging_lost"  # code of a load that failed by no fault of the adapter's, and can be tried again
WORKER_EXTENSION = "signalbox.experts.expertweave.worker.ExpertWeaveWorker"

# Architectures by vLLM's names whose routed experts are whole linears behind a frozen router, as ESFT takes them.
FAMILIES = frozenset({"DeepseekV2ForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM"})

RowFormat = Literal["full", "difference4"]


class CannotWeave(ValueError):
    """The model or its configuration cannot carry ESFT adapters; the message says why."""


@dataclass(slots=True, frozen=True)
class WeaveSettings:
    """Room for adapters.

    slots: adapters at once (N). experts_per_layer: tuned experts that one may have in a layer, over all slots together
    (E_max of the paper): a layer has slots * experts_per_layer rows beside the base's. memory_bytes: device memory kept
    for those rows on each GPU; 0 decides by the shape of the model. rows: how they are stored.
    """

    slots: int
    experts_per_layer: int
    memory_bytes: int = 0
    rows: RowFormat = "full"

    @property
    def extra_rows(self) -> int:
        """Rows of a layer that adapters may take."""
        return self.slots * self.experts_per_layer

    def engine_arguments(self, *, on_cpu: bool) -> dict[str, Any]:
        """What vLLM's engine needs to be told."""
        arguments: dict[str, Any] = {"additional_config": {KEY: asdict(self)}, "worker_extension_cls": WORKER_EXTENSION}
        # The grouped product that addresses experts by row; the others rearrange the weights.
        return arguments if on_cpu else arguments | {"moe_backend": "triton"}

    @classmethod
    def of(cls, additional_config: Any) -> WeaveSettings | None:
        """The settings in vLLM's additional_config, None where ExpertWeave is not wanted."""
        if not isinstance(additional_config, Mapping) or KEY not in additional_config:
            return None
        return cls(**additional_config[KEY])
