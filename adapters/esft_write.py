"""Writes retrained experts as the ESFT repository releases them: `expert_cfg.json`, sharded safetensors, their index.

Everything is written into a folder beside, read back by the reader that serves adapters, and moved into place: there is
never half an adapter under its name.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from signalbox.adapters.base import AdapterFacts, BaseShape, Limits
from signalbox.adapters.esft_format import CONFIG, INDEX, PROJECTIONS, read_esft_facts
from signalbox.adapters.esft_select import write_selection
from signalbox.adapters.train_data import TrainingError

SHARD_BYTES = 2 << 30
Weights = Callable[[int, int], Mapping[str, Tensor]]


def write_esft(
    folder: Path,
    experts: Mapping[int, Sequence[int]],
    weights: Weights,
    base: BaseShape,
    *,
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int = SHARD_BYTES,
) -> AdapterFacts:
    """Write an adapter and return what validation says of it.

    `weights(layer, expert)` gives `gate_proj` and `up_proj` [intermediate, hidden] and `down_proj` [hidden,
    intermediate], on any device; asked for once each, a shard of at most `shard_bytes` (or one expert) in memory.
    Raises `TrainingError` where `folder` is there and not empty, `AdapterError` where the base does not fit, OSError.
    """
    check_free(folder)
    folder = folder.resolve()  # a link's target, for the link itself cannot be exchanged for a folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.writing-", dir=folder.parent))
    try:
        write_selection(building / CONFIG, experts)
        _write_shards(building, experts, weights, base, dtype, shard_bytes)
        room = sum(file.stat().st_size for file in building.iterdir())
        facts = read_esft_facts(building, base, Limits((building.parent.resolve(),), max_bytes=room))
        building.chmod(0o755)  # mkdtemp keeps others out
        if folder.is_dir():
            folder.rmdir()  # empty, or this fails
        building.rename(folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return facts


def check_free(folder: Path) -> None:
    """Raises `TrainingError` where an adapter cannot be written to `folder`, best asked before hours of training."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise TrainingError(f"{folder} is there already; name another folder, or remove it first")
    whole = folder.resolve()  # OSError for links in a circle
    if whole == Path.cwd() or whole.is_mount():
        raise TrainingError(f"{folder} cannot be exchanged while it is in use; name a folder in it")


def _write_shards(
    folder: Path,
    experts: Mapping[int, Sequence[int]],
    weights: Weights,
    base: BaseShape,
    dtype: torch.dtype,
    shard_bytes: int,
) -> None:
    from safetensors.torch import save_file

    element = torch.empty((), dtype=dtype).element_size()
    one = sum(base.expert_linears[name][0] * base.expert_linears[name][1] for name in PROJECTIONS) * element
    each = max(1, shard_bytes // one)
    order = [(layer, expert) for layer, ids in sorted(experts.items()) for expert in sorted(ids)]
    shards = [order[start : start + each] for start in range(0, len(order), each)]
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {
            f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight": tensor.detach().to("cpu", dtype).contiguous()
            for layer, expert in shard
            for part, tensor in weights(layer, expert).items()
        }
        save_file(tensors, folder / name, metadata={"format": "pt"})
        (folder / name).chmod(0o644)  # safetensors lets only the owner read; a service may run as another
        _flush(folder / name)
        weight_map.update(dict.fromkeys(tensors, name))
    index = {"metadata": {"total_size": one * len(order)}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _flush(file: Path) -> None:
    """A rename may reach the disk before the data does."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
