"""One model's adapters inside a vLLM worker: their rows in every layer, the reroute tables, the step's index.

Copies run beside steps (`loading`); the table's row of an adapter, which makes its experts reachable, changes between
two steps. Source: ExpertWeave (arXiv 2508.17624), sections 4.1 and 4.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from signalbox.adapters.base import BaseShape
from signalbox.adapters.expert_rows import ExpertRows
from signalbox.experts.expertweave.settings import CannotWeave, WeaveSettings
from signalbox.experts.expertweave.step import StepIndex
from signalbox.kernels.virtual_tensor import open_pool

FILLED = 0.64  # of the rows between an adapter's most and its average experts of a layer: the paper's table 1


class WovenLayer:
    """One mixture-of-experts layer: the base's experts and those of adapters as rows of the same tensors.

    rows: who holds which row. table: int32 [slots + 1, experts] on the device, the row of each expert; its first row is
    the base's, row slot + 1 an adapter's. `store` keeps the weights, set once vLLM has made the base's.
    """

    def __init__(self, weave: Weave, number: int, experts: list[int]) -> None:
        settings = weave.settings
        self.weave, self.number = weave, number
        self.local = experts  # row of each of the base's experts, -1 for those of other ranks
        held = sum(row >= 0 for row in experts)
        self.partial = held < len(experts)  # other ranks hold the rest
        self.base_rows = held
        self.total_rows = held + settings.extra_rows + int(settings.rows == "difference4")
        self.rows = ExpertRows(held, self.total_rows)
        self.spare: list[int] = []
        if settings.rows == "difference4":
            # Never an adapter's, and always mapped: a kernel is not launched on a tensor that begins in no memory.
            self.spare = self.rows.take(1)
        self.table: Tensor = torch.tensor(experts, dtype=torch.int32).repeat(settings.slots + 1, 1)
        self.table = self.table.contiguous().to(weave.device)
        self.store: Any = None

    @property
    def rows_in_use(self) -> int:
        """One more than the highest row that is in use: what an alignment outside of a CUDA graph must count to."""
        return self.rows.end


class Weave:
    """All woven layers of the model that this process serves, or its share of them.

    config: vLLM's configuration of the model. shard: (rank, ranks) of tensor parallelism over each expert.
    """

    def __init__(self, settings: WeaveSettings, config: Any, device: torch.device, longest_step: int) -> None:
        self.settings, self.config, self.device = settings, config, device
        self.dtype: torch.dtype = config.model_config.dtype
        self.top_k = int(config.model_config.hf_text_config.num_experts_per_tok)
        self.longest_captured = int(config.compilation_config.max_cudagraph_capture_size or 0)  # tokens
        self.layers: dict[int, WovenLayer] = {}
        self.shard = (0, 1)
        self.step = StepIndex(longest_step, device)
        self.pool = open_pool(device, None)
        self.kept_bytes: int | None = None  # device memory for adapters, once the model is ready; None: not counted
        self._expert_shape = (0, 0)  # (intermediate, hidden)

    def layer(self, number: int, experts: list[int], expert_shape: tuple[int, int]) -> WovenLayer:
        """Add a layer. `experts`: the local row of each routed expert, -1 for those of other ranks.

        expert_shape: (intermediate, hidden) of a whole expert. Raises `CannotWeave`.
        """
        if number in self.layers:
            raise CannotWeave(f"layer {number} has two groups of routed experts; ESFT adapters know one")
        woven = self.layers[number] = WovenLayer(self, number, experts)
        self._expert_shape = expert_shape
        return woven

    @property
    def shape(self) -> BaseShape:
        """What an adapter's folder is read against."""
        intermediate, hidden = self._expert_shape
        return BaseShape(
            model=str(self.config.model_config.model),
            linears={},
            experts={number: len(layer.local) for number, layer in self.layers.items()},
            expert_linears={
                "gate_proj": (intermediate, hidden),
                "up_proj": (intermediate, hidden),
                "down_proj": (hidden, intermediate),
            },
        )

    def keep_memory(self, nbytes: int) -> None:
        """Take so many bytes of the device's memory for adapters, before the KV cache takes what is left.

        Called after each layer, whose base may have used pages that were kept before.
        """
        if self.pool is not None:
            self.pool.reserve(-(-nbytes // self.pool.page_bytes))

    def seal(self) -> None:
        """The model is ready: from now on adapters have the memory that was kept for them and no more."""
        if self.pool is not None:
            self.pool.limit = self.pool.pages_in_use + self.pool.pages_free
            self.kept_bytes = self.pool.pages_free * self.pool.page_bytes

    def memory(self) -> dict[str, int]:
        """Rows of adapters in use, and bytes of pages: in use (the base's included where it lies in pages) and free."""
        rows = sum(
            layer.total_rows - layer.base_rows - layer.rows.free - len(layer.spare) for layer in self.layers.values()
        )
        if self.pool is None:
            return {"rows": rows, "bytes_in_use": 0, "bytes_free": 0, "page_bytes": 0}
        page = self.pool.page_bytes
        return {
            "rows": rows,
            "bytes_in_use": self.pool.pages_in_use * page,
            "bytes_free": self.pool.pages_free * page,
            "page_bytes": page,
        }

    def commit(self, slot: int, placed: dict[int, dict[int, int]]) -> None:
        """Make an adapter's experts reachable, or none with an empty map: {layer: {expert: row}}. Between two steps.

        Returns when no step that began before can use the former table.
        """
        wait_for_steps(self.device)
        for number, layer in self.layers.items():
            row = list(layer.local)
            for expert, place in placed.get(number, {}).items():
                row[expert] = place
            layer.table[slot + 1].copy_(torch.tensor(row, dtype=torch.int32))


def wait_for_steps(device: torch.device) -> None:
    """Until the device has done all steps that were begun; copies of loads run on."""
    if device.type == "cuda":
        streams = {torch.cuda.current_stream(device), torch.cuda.default_stream(device)}
        for stream in streams:
            stream.synchronize()


_current: Weave | None = None


def current() -> Weave | None:
    """The weave of the model that this process loads or serves."""
    return _current


def begin(settings: WeaveSettings, config: Any, device: torch.device, longest_step: int) -> Weave:
    """A new model is loaded into this process."""
    global _current
    _current = Weave(settings, config, device, longest_step)
    return _current
