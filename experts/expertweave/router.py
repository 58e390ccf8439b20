"""vLLM's router, with the adapters' rows in place of the base's experts.

Plain softmax routing on CUDA is one kernel of ours: softmax, the best experts and their rows. Any other router runs as
it is, and its choice is rerouted after it. The router itself is the base's: ESFT freezes it, so one choice serves all.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.model_executor.layers.fused_moe.router.fused_moe_router import FusedMoERouter
from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import GroupedTopKRouter

from signalbox.experts.expertweave.weave import WovenLayer
from signalbox.kernels.reroute import reroute, topk_reroute


class WovenRouter(FusedMoERouter):
    """`inner` chooses experts; the ids handed on are rows of the layer's tensors."""

    def __init__(self, inner: Any, woven: WovenLayer) -> None:
        super().__init__(eplb_state=None)
        self._inner, self._woven = inner, woven
        self._captures = False
        # DeepSeek-V2's, which computes in the logits' dtype: a merged model in vLLM alone takes the same experts.
        self._rounded = isinstance(inner, GroupedTopKRouter)
        self._fused = woven.weave.device.type == "cuda" and _is_plain_softmax(inner)

    def set_capture_fn(self, capture_fn: Any) -> None:
        """See vLLM: the ids that it is called with are the base's experts."""
        self._captures = capture_fn is not None
        self._inner.set_capture_fn(capture_fn)

    @property
    def routing_method_type(self) -> Any:
        """See vLLM."""
        return self._inner.routing_method_type

    def _select_experts(
        self,
        hidden_states: Tensor,
        router_logits: Tensor,
        topk_indices_dtype: Any = None,
        *,
        input_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(weights float32 [tokens, top_k], rows int32 [tokens, top_k])."""
        woven = self._woven
        owners = woven.weave.step.tokens
        if self._fused and not self._captures:
            return topk_reroute(
                router_logits,
                self._inner.top_k,
                owners,
                woven.table,
                renormalize=self._inner.renormalize,
                rounded=self._rounded,
            )
        weights, experts = self._inner._select_experts(
            hidden_states, router_logits, topk_indices_dtype, input_ids=input_ids
        )
        return weights, reroute(experts, owners[: len(experts)], woven.table)


def _is_plain_softmax(router: Any) -> bool:
    """Whether it takes the softmax's greatest of all experts, with no groups, bias or scaling."""
    if getattr(router, "scoring_func", None) != "softmax" or getattr(router, "custom_routing_function", None):
        return False
    if getattr(router, "e_score_correction_bias", None) is not None or getattr(
        router, "num_fused_shared_experts", None
    ):
        return False
    groups = getattr(router, "num_expert_group", None) or 1
    return groups == 1 and getattr(router, "routed_scaling_factor", 1.0) == 1.0 and hasattr(router, "renormalize")
