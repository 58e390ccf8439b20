"""The adapters of a vLLM engine: LoRA in vLLM's own slots, ESFT as rows of ExpertWeave's.

vLLM scales every module by the configuration's one rank and alpha and says nothing of a `rank_pattern` or an
`alpha_pattern`, whose adapters it would answer with wrongly. So it is never given a user's folder: it reads a copy of
the validated tensors, all of one rank (zeros beyond a module's own) with the scaling multiplied into B, which is
deleted once it is loaded. An ESFT adapter is read by vLLM's workers themselves, beside running steps, and asked after
until it is there. On the engine's event loop; files are read and written by threads.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from signalbox.adapters.base import AdapterError, BaseShape, Kind, Limits, LoraAdapter
from signalbox.adapters.peft_format import CONFIG, WEIGHTS, read_lora
from signalbox.adapters.slots import Slot
from signalbox.adapters.validate import adapter_kind
from signalbox.experts import vllm_versions
from signalbox.experts.base import ExpertUnavailable, InvalidRequest, QueueFull, Unsupported
from signalbox.experts.engine_adapters import EngineAdapters
from signalbox.experts.expertweave.settings import STAGING_LOST
from signalbox.experts.vllm_versions import BASE, Bound

if TYPE_CHECKING:
    from signalbox.experts.vllm_versions import Core

_POLL_S = 0.005  # seconds between two polls of an adapter that loads: each of them copies what has been read


class VllmAdapters(EngineAdapters):
    """Adapters by version id; `core` and `shape` are set by `serve` once the engine runs. `kinds` are those served."""

    def __init__(self, expert: str, max_adapters: int, max_rank: int, kinds: tuple[Kind, ...]) -> None:
        super().__init__(expert, max_adapters, max_rank, _nothing)
        self.kinds = kinds
        self._core: Core | None = None
        self._shape: BaseShape | None = None
        self._numbers = itertools.count(1)  # vLLM knows adapters by number; none comes again
        self._bound: dict[str, Bound] = {}  # of each adapter that vLLM may hold

    def serve(self, core: Core, shape: BaseShape | None) -> None:
        """From now on adapters may be added; without a `shape` none ever can."""
        self._core, self._shape = core, shape

    def bound(self, name: str | None) -> Bound:
        """What vLLM is told of an adapter that is open; None for the base."""
        return BASE if name is None else self._bound[name]

    async def add(self, name: str, path: str) -> None:
        """See `Engine.load`. Cancelled or refused, nothing of the adapter is left in vLLM."""
        if self._core is None:
            raise ExpertUnavailable(f"expert {self.expert!r} is not running")
        if self._shape is None:
            raise Unsupported(f"expert {self.expert!r} takes no adapters: set its max_adapters", param="adapter")
        slot = self._take(name)
        adding = asyncio.ensure_future(self._add(slot, path, self._core, self._shape))
        try:
            await asyncio.shield(adding)
        except asyncio.CancelledError:
            slot.leaving = slot.leaving or asyncio.ensure_future(self._leave(slot))
            raise

    async def _add(self, slot: Slot, path: str, core: Core, shape: BaseShape) -> None:
        """Into vLLM, or with an error not at all."""
        try:
            kind = await asyncio.to_thread(adapter_kind, Path(path), Limits.of_any_size(Path(path)))
            if kind not in self.kinds:
                served = " and ".join(self.kinds)
                raise AdapterError(f"expert {self.expert!r} serves {served} adapters, not {kind}", code="wrong_kind")
            if kind == "esft":
                await self._add_esft(slot, path, core)
            else:
                await self._add_lora(slot, path, core, shape)
            slot.accepting = slot.leaving is None
        except BaseException as error:
            await self._forget(slot, core)
            if isinstance(error, AdapterError):
                raise InvalidRequest(error.message, status=422, code=error.code, param=error.tensor) from error
            raise
        finally:
            slot.loaded.set()

    async def _add_lora(self, slot: Slot, path: str, core: Core, shape: BaseShape) -> None:
        folder = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="signalbox-lora-"))
        try:
            await asyncio.to_thread(self._rewrite, Path(path), folder, shape, core.dissolved)
            request = vllm_versions.lora_request(slot.name, next(self._numbers), folder)
            self._bound[slot.name] = Bound(lora=request)
            with vllm_versions.translated_load(self.expert, slot.name):
                await core.add_lora(request)
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    async def _add_esft(self, slot: Slot, path: str, core: Core) -> None:
        """Raises `AdapterError`; `QueueFull` where there is no room for its experts; `ExpertUnavailable`: try again."""
        self._bound[slot.name] = Bound(slot=slot.index, salt=f"{slot.name}#{next(self._numbers)}")
        with vllm_versions.translated_load(self.expert, slot.name):
            await core.workers("expertweave_load", slot.index, path)
            reports = await self._settled(core, slot)
        for report in reports:
            if report["state"] == "failed":
                if report["code"] in ("adapter_memory_full", "adapter_slots_full"):
                    raise QueueFull(f"expert {self.expert!r}: {report['error']}", code=report["code"])
                if report["code"] == STAGING_LOST:
                    raise ExpertUnavailable(f"expert {self.expert!r}: {report['error']}")
                raise AdapterError(report["error"], code=report["code"], tensor=report["tensor"])

    async def _settled(self, core: Core, slot: Slot) -> list[dict[str, Any]]:
        """The workers' reports on a slot, once none of them loads or unloads any more."""
        failed: list[dict[str, Any]] = []  # a failure is told once
        while True:
            reports = await core.workers("expertweave_poll", slot.index)
            failed += [report for report in reports if report["state"] == "failed"]
            if not any(report["state"] in ("loading", "unloading") for report in reports):
                return failed + [report for report in reports if report["state"] != "failed"]
            await asyncio.sleep(_POLL_S)

    def _rewrite(self, source: Path, folder: Path, shape: BaseShape, dissolved: frozenset[str]) -> None:
        """Blocking. Raises `AdapterError`, also for modules that vLLM would answer without (`Core.dissolved`)."""
        adapter = read_lora(source, shape, Limits.of_any_size(source, max_rank=self.max_rank))
        for name in adapter.modules:
            if name.rpartition(".")[2] in dissolved:
                raise AdapterError(
                    f"{name}: vLLM's latent attention takes this linear apart and would answer without the adapter: "
                    "train it on other linears",
                    code="unserved_module",
                    tensor=name,
                )
        write_plain(adapter, folder)

    async def _leave(self, slot: Slot) -> None:
        await slot.loaded.wait()
        await slot.idle.wait()
        if self._core is not None:
            await self._forget(slot, self._core)

    async def _forget(self, slot: Slot, core: Core) -> None:
        """Out of vLLM, then the slot is free. A dead core holds nothing."""
        bound = self._bound.pop(slot.name, BASE)
        with suppress(Exception):
            if bound.lora is not None:
                await core.remove_lora(bound.lora)
            elif bound.slot is not None:
                await core.workers("expertweave_unload", bound.slot)
                await self._settled(core, slot)
        self._table.give_back(slot)


def write_plain(adapter: LoraAdapter, folder: Path) -> None:
    """Write an adapter so that every reader takes it alike: one rank for all modules, and a scaling of 1. Blocking.

    float32: what 16 bits would round away of scaling * B stays.
    """
    import torch
    from safetensors.torch import save_file

    rank = adapter.facts.rank
    tensors = {}
    for name, module in adapter.modules.items():
        a = torch.zeros(rank, module.a.shape[1])
        b = torch.zeros(module.b.shape[0], rank)
        a[: module.rank] = module.a
        b[:, : module.rank] = module.b.float() * module.scaling
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    targets = sorted({name.rpartition(".")[2] for name in adapter.modules})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "target_modules": targets}
    (folder / CONFIG).write_text(json.dumps(config | {"r": rank, "lora_alpha": rank, "use_rslora": False}))


async def _nothing() -> None:
    """vLLM removes an adapter between two steps by itself."""
