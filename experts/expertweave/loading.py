"""Loading an adapter into a weave's rows beside running steps, and taking it out again.

A few threads each read one tuned expert after another into pinned memory, copy it to the device on a stream of their
own, and write it into its row. An expert equal to the base's own, or to one that another adapter holds, takes no row.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from signalbox.adapters.base import AdapterError
from signalbox.adapters.esft_format import EsftAdapter
from signalbox.adapters.expert_rows import OutOfRows, digest_of
from signalbox.experts.expertweave.weave import Weave, WovenLayer
from signalbox.kernels.virtual_tensor import OutOfPages

READERS = 3  # threads: as many as keep the bus busy; more take the interpreter from the steps
State = Literal["loading", "arrived", "ready", "failed", "unloading", "gone"]


class ExpertSource(Protocol):
    """Where tuned experts come from: `adapters.esft_format.EsftAdapter`, or a benchmark's random weights."""

    experts: dict[int, tuple[int, ...]]

    def read(self, layer: int, expert: int) -> dict[str, Tensor]:
        """`gate_proj` and `up_proj` [intermediate, hidden], `down_proj` [hidden, intermediate]; from any thread."""

    def close(self) -> None:
        """Nothing is read any more."""


class FolderSource:
    """An adapter's folder. Values are checked on the device, where that costs next to nothing."""

    def __init__(self, adapter: EsftAdapter) -> None:
        self._adapter = adapter
        self.experts = adapter.experts

    def read(self, layer: int, expert: int) -> dict[str, Tensor]:
        """See `ExpertSource`."""
        return self._adapter.expert(layer, expert, finite=False)

    def close(self) -> None:
        """See `ExpertSource`."""
        self._adapter.close()


@dataclass(slots=True)
class Load:
    """One adapter's way into the weave. placed: {layer: {expert: row}}; own: rows it holds a share of, by layer."""

    slot: int
    state: State = "loading"
    error: str = ""
    code: str = ""  # of the failure: adapter_slots_full, adapter_memory_full, or the AdapterError's
    tensor: str | None = None
    placed: dict[int, dict[int, int]] = field(default_factory=dict)
    seconds: float = 0.0
    nbytes: int = 0
    shared: int = 0  # experts that took no row of their own
    cancelled: bool = False

    def report(self) -> dict[str, Any]:
        """As an answer to the engine: plain values."""
        held = sum(len(experts) for experts in self.placed.values())
        return {
            "state": self.state,
            "error": self.error,
            "code": self.code,
            "tensor": self.tensor,
            "seconds": self.seconds,
            "nbytes": self.nbytes,
            "experts": held,
            "shared": self.shared,
        }


class Loader:
    """The loads of one weave. All but the threads' work is called between steps, by the worker."""

    def __init__(self, weave: Weave) -> None:
        self._weave = weave
        self._loads: dict[int, Load] = {}  # by slot, until it is gone
        self._readers = threading.local()

    def begin(self, slot: int, source: ExpertSource) -> None:
        """Start loading into a free slot."""
        if not 0 <= slot < self._weave.settings.slots or slot in self._loads:
            raise ValueError(f"slot {slot} is not free")
        load = self._loads[slot] = Load(slot)
        threading.Thread(target=self._run, args=(load, source), name=f"esft-load-{slot}", daemon=True).start()

    def poll(self, slot: int) -> dict[str, Any]:
        """How a load stands; one whose experts have all arrived becomes reachable here."""
        load = self._loads.get(slot)
        if load is None:
            return Load(slot, state="gone").report()
        if load.state == "arrived":
            self._weave.commit(slot, load.placed)
            load.state = "ready"
        elif load.state in ("failed", "gone"):
            del self._loads[slot]
        return load.report()

    def unload(self, slot: int) -> None:
        """Make the adapter unreachable now, and give its rows back in a thread; a load that still runs ends."""
        load = self._loads.get(slot)
        if load is None or load.state in ("unloading", "gone"):
            return
        load.cancelled = True
        if load.state == "loading":
            return  # its thread sees to it
        self._weave.commit(slot, {})
        load.state = "unloading"
        threading.Thread(target=self._give_back, args=(load, "gone"), name=f"esft-unload-{slot}", daemon=True).start()

    def slots(self) -> list[int]:
        """Slots that are not free."""
        return list(self._loads)

    # -- in threads ----------------------------------------------------------------------------------------

    def _run(self, load: Load, source: ExpertSource) -> None:
        started = time.perf_counter()
        work = [(layer, expert) for layer, experts in source.experts.items() for expert in experts]
        try:
            unknown = sorted(set(source.experts) - set(self._weave.layers))
            if unknown:
                raise AdapterError(f"the engine has no routed experts in layer {unknown[0]}", code="unknown_module")
            with ThreadPoolExecutor(READERS, thread_name_prefix="esft-read") as readers:
                futures = [readers.submit(self._bring, load, source, layer, expert) for layer, expert in work]
                for future in futures:
                    try:
                        future.result()
                    except BaseException:
                        load.cancelled = True  # the others need not go on
                        raise
            load.seconds = time.perf_counter() - started
            if not load.cancelled:
                load.state = "arrived"
                return
            self._give_back(load, "gone")
        except BaseException as error:
            load.error, load.code, load.tensor = _reason(error)
            self._give_back(load, "failed")
        finally:
            source.close()

    def _bring(self, load: Load, source: ExpertSource, number: int, expert: int) -> None:
        """One expert into its row."""
        layer = self._weave.layers[number]
        if load.cancelled or layer.local[expert] < 0:  # of another rank
            return
        parts = source.read(number, expert)
        with self._on_device() as staged:
            w13, w2 = staged(parts)
            if not (w13.isfinite().all() & w2.isfinite().all()):
                raise AdapterError(
                    f"expert {expert} of layer {number} has values that are not finite: its training diverged or the "
                    "file is damaged",
                    code="not_finite",
                    tensor=f"model.layers.{number}.mlp.experts.{expert}",
                )
            row = self._place(load, layer, expert, digest_of([parts[name] for name in sorted(parts)]), w13, w2)
            layer_placed = load.placed.setdefault(number, {})
            layer_placed[expert] = row
            load.nbytes += sum(part.nbytes for part in parts.values())

    def _place(self, load: Load, layer: WovenLayer, expert: int, digest: bytes, w13: Tensor, w2: Tensor) -> int:
        """The row of these weights: one that holds them already, or a new one that they are written to."""
        base = layer.local[expert]
        store = layer.store
        if store.equal(base, base, w13, w2):
            load.shared += 1
            return base
        key = digest + base.to_bytes(4, "little")
        with layer.lock:
            held = layer.rows.share(key)
        if held is not None:
            if store.equal(held, base, w13, w2):
                load.shared += 1
                return held
            with layer.lock:
                freed = layer.rows.give_back([held])
                store.give_back(freed)
        with layer.lock:
            row = layer.rows.take(1)[0]
            try:
                store.take([row])
            except BaseException:
                layer.rows.give_back([row])
                raise
        store.write(row, base, w13, w2)
        if w13.is_cuda:
            torch.cuda.current_stream().synchronize()  # whoever shares it from now on may compare at once
        with layer.lock:
            if held is None:
                layer.rows.keep(row, key)
        return row

    def _give_back(self, load: Load, state: State) -> None:
        """Return an adapter's rows, which no table names any more."""
        for number, experts in load.placed.items():
            layer = self._weave.layers[number]
            with layer.lock:
                tuned = [row for row in experts.values() if row >= layer.base_rows]
                layer.store.give_back(layer.rows.give_back(tuned))
        load.placed = {}
        load.state = state

    @contextmanager
    def _on_device(self) -> Iterator[Any]:
        """Gives a function that stages an expert's parts on the device: (gate over up [1, ..], down [1, ..])."""
        device = self._weave.device
        if device.type != "cuda":
            yield self._laid_out
            return
        lane = getattr(self._readers, "lane", None)
        if lane is None:
            lane = self._readers.lane = torch.cuda.Stream(device)
        with torch.cuda.device(device), torch.cuda.stream(lane):

            def staged(parts: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
                moved = {
                    name: part if part.is_cuda else part.pin_memory().to(device, non_blocking=True)
                    for name, part in parts.items()
                }
                return self._laid_out(moved)

            yield staged
            lane.synchronize()

    def _laid_out(self, parts: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """This rank's share of an expert: [2 * intermediate / ranks, hidden] and [hidden, intermediate / ranks]."""
        rank, ranks = self._weave.shard
        gate, up = (parts[name].chunk(ranks, dim=0)[rank] for name in ("gate_proj", "up_proj"))
        down = parts["down_proj"].chunk(ranks, dim=1)[rank]
        return torch.cat([gate, up]).to(self._weave.dtype), down.to(self._weave.dtype).contiguous()


def _reason(error: BaseException) -> tuple[str, str, str | None]:
    """(message, code, tensor) of a load that failed."""
    if isinstance(error, AdapterError):
        return error.message, error.code, error.tensor
    if isinstance(error, OutOfPages):
        return f"the device memory kept for adapters is full: {error}", "adapter_memory_full", None
    if isinstance(error, OutOfRows):
        return f"a layer's rows for adapters are all taken: {error}", "adapter_slots_full", None
    return f"{type(error).__name__}: {error}", "engine_refuses", None
