"""The entry point `vllm.general_plugins`: called by vLLM in each of its processes, before a model is built.

Registers the woven layer and hooks the model runners' input preparation. Without `expertweave` in vLLM's
`additional_config` all of it stands aside.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from signalbox.experts.expertweave import weave

log = logging.getLogger(__name__)
_registered = False


def register() -> None:
    """Register once in this process. A vLLM whose parts are elsewhere is left alone; the engine finds out."""
    global _registered
    if _registered:
        return
    _registered = True
    try:
        from signalbox.experts.expertweave import layer

        layer.register()
        _hook_runners()
    except (ImportError, AttributeError) as error:
        log.warning("ExpertWeave does not know this version of vLLM and is not available: %s", error)


def _hook_runners() -> None:
    """Let each step's requests and their order be known before its forward pass."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    _before(GPUModelRunner, "_update_states", lambda runner, scheduled: _begin(scheduled))
    _after(GPUModelRunner, "_prepare_inputs", _write_v1)
    try:
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner as GPUModelRunnerV2
    except ImportError:  # it needs Triton
        return
    _before(GPUModelRunnerV2, "add_requests", lambda runner, scheduled: _begin(scheduled))
    _after(GPUModelRunnerV2, "prepare_inputs", _write_v2)


def _begin(scheduled: Any) -> None:
    woven = weave.current()
    if woven is not None:
        woven.step.begin(scheduled)


def _write_v1(runner: Any, scheduled: Any, counts: Any, result: Any) -> None:
    woven = weave.current()
    if woven is not None:
        batch = runner.input_batch
        woven.step.write(batch.req_ids[: batch.num_reqs], counts)


def _write_v2(runner: Any, scheduled: Any, described: Any, batch: Any) -> None:
    woven = weave.current()
    if woven is not None:
        woven.step.write(batch.req_ids, batch.num_scheduled_tokens)


def _before(owner: type, name: str, hook: Callable[..., None]) -> None:
    method = getattr(owner, name)

    @functools.wraps(method)
    def hooked(self: Any, *args: Any, **kwargs: Any) -> Any:
        hook(self, *args, **kwargs)
        return method(self, *args, **kwargs)

    setattr(owner, name, hooked)


def _after(owner: type, name: str, hook: Callable[..., None]) -> None:
    method = getattr(owner, name)

    @functools.wraps(method)
    def hooked(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        hook(self, *args, *kwargs.values(), result)
        return result

    setattr(owner, name, hooked)
