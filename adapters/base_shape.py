"""The shape of a base model: its linears and routed experts, from config.json alone.

The model is built on PyTorch's meta device, by the same class that the engine loads: so the names are the engine's,
and not a byte of weights is read.
"""

from __future__ import annotations

import re
import threading
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from signalbox.adapters.base import AdapterError, BaseShape

if TYPE_CHECKING:
    from torch import nn

_EXPERTS = re.compile(r"(?:^|.*\.)layers\.(\d+)\..*\bexperts$")
_building = threading.Lock()


def base_shape(model_folder: Path) -> BaseShape:
    """The shape of the model in a folder with a config.json. Blocking: 0.1 s to 2 s, then remembered.

    Linears in quantised or custom modules that are no `torch.nn.Linear` are not listed, as nothing can adapt them.
    Raises `AdapterError` (`unknown_base`) where transformers cannot build such a model.
    """
    file = Path(model_folder) / "config.json"
    try:
        status = file.stat()
    except OSError as error:
        raise AdapterError(f"no base model in {model_folder}: {error.strerror}", code="unknown_base") from None
    return _cached(file.resolve(), status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=32)
def _cached(file: Path, mtime_ns: int, size: int) -> BaseShape:
    model = _build(file.parent)
    from torch import nn

    linears = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    experts: dict[int, int] = {}
    shapes: dict[str, tuple[int, int]] = {}
    hidden = model.config.get_text_config().hidden_size
    for name, module in model.named_modules():
        if (match := _EXPERTS.match(name)) and (found := _routed_experts(module, hidden)):
            experts[int(match[1])], shapes = found
    return BaseShape(model=file.parent.name, linears=linears, experts=experts, expert_linears=shapes)


def _build(folder: Path) -> Any:
    """The model of the folder's config.json without memory for its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    # transformers patches torch's initialisers while it builds: one at a time in a process.
    with _building, torch.device("meta"):
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except Exception as error:  # transformers raises anything for a config.json that makes no sense
            raise AdapterError(
                f"the shape of the base model in {folder} cannot be told: {str(error)[:300]}", code="unknown_base"
            ) from error


def _routed_experts(module: nn.Module, hidden: int) -> tuple[int, dict[str, tuple[int, int]]] | None:
    """Number of a layer's routed experts, and the shapes of one's linears; None where it has none.

    transformers 5 keeps them fused: gate_up_proj [experts, 2 * intermediate, hidden] and down_proj
    [experts, hidden, intermediate], in some families transposed; other code has a list of modules.
    """
    gate_up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    if getattr(gate_up, "ndim", 0) == 3 and getattr(down, "ndim", 0) == 3:
        intermediate = int(down.numel() // down.shape[0] // hidden)  # type: ignore[union-attr]
        count = int(down.shape[0])  # type: ignore[union-attr]
    else:
        listed = [child for name, child in module.named_children() if name.isdecimal()]
        linear = getattr(listed[0], "down_proj", None) if listed else None
        if linear is None or not hasattr(linear, "in_features"):
            return None
        count, intermediate = len(listed), int(linear.in_features)
    return count, {
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }
