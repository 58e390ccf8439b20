"""Loading an adapter into a weave's rows between running steps, and taking it out again.

Everything here runs in the worker's own thread, between two steps, and waits for nothing: a process beside it reads
the files (`staging`), copies are enqueued on a stream of their own, and what they brought is looked at when they are
done. An expert equal to the base's own, or to one that another adapter holds, keeps no row of its own.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from signalbox.adapters.base import AdapterError
from signalbox.adapters.expert_rows import OutOfRows
from signalbox.experts.expertweave.settings import STAGING_LOST
from signalbox.experts.expertweave.staging import Staged, StagingLost
from signalbox.experts.expertweave.weave import Weave, WovenLayer
from signalbox.kernels.virtual_tensor import OutOfPages

State = Literal["loading", "ready", "failed", "unloading", "gone"]
LAYERS_AT_ONCE = 2  # whose rows are given back between two steps: each takes the driver some milliseconds


class Feed(Protocol):
    """Where an adapter's experts come from."""

    experts: dict[int, tuple[int, ...]]

    def start(self, wanted: list[tuple[int, int]]) -> None:
        """These (layer, expert) are wanted, each once."""

    def ready(self) -> Iterator[Staged]:
        """Those that are there and were not handed over yet; never waits."""

    def close(self) -> None:
        """Nothing more is wanted."""


@dataclass(slots=True)
class _Arrival:
    """An expert in its own row, and what must be known before the adapter serves: flags on the device."""

    layer: WovenLayer
    expert: int
    row: int
    key: bytes
    twin: int | None  # a row that may hold the same
    flags: Tensor  # bool [3]: finite, equal to the base's, equal to the twin's


@dataclass(slots=True)
class Load:
    """One adapter's way into the weave. `missing` experts have not been copied yet."""

    slot: int
    feed: Feed
    missing: int = 0
    state: State = "loading"
    arrivals: list[_Arrival] = field(default_factory=list)
    held: dict[int, list[int]] = field(default_factory=dict)  # layer -> rows that it has a share of, once it serves
    report: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)
    copied: Any = None  # the event after its last copy


class Loader:
    """The loads and unloads of one weave. All methods are called between steps, and `poll` again and again."""

    def __init__(self, weave: Weave) -> None:
        self._weave = weave
        self._loads: dict[int, Load] = {}  # by slot, until it is gone
        self._cuda = weave.device.type == "cuda"
        self._lane = torch.cuda.Stream(weave.device) if self._cuda else None
        self._releases: list[tuple[Any, Callable[[], None]]] = []  # pinned memory, by the event after its copy

    def begin(self, slot: int, feed: Feed) -> None:
        """Start loading into a free slot. Raises ValueError for another; what cannot be loaded at all, `poll` tells."""
        if not 0 <= slot < self._weave.settings.slots or slot in self._loads:
            raise ValueError(f"slot {slot} is not free")
        layers = self._weave.layers
        load = self._loads[slot] = Load(slot, feed)
        try:
            if unknown := sorted(set(feed.experts) - set(layers)):
                raise AdapterError(f"the engine has no routed experts in layer {unknown[0]}", code="unknown_module")
            every = [(number, expert) for number, ids in feed.experts.items() for expert in ids]
            wanted = [(number, expert) for number, expert in every if layers[number].local[expert] >= 0]  # of this rank
            self._check_room(wanted)
            load.missing = len(wanted)
            feed.start(wanted)
        except Exception as error:
            self._abandon(load, error)

    def _check_room(self, wanted: list[tuple[int, int]]) -> None:
        """Refuse what would not fit if no other adapter were there: waiting for others to go would not help."""
        layers = self._weave.layers
        for number, count in Counter(number for number, _ in wanted).items():
            rows = layers[number].total_rows - layers[number].base_rows - len(layers[number].spare)
            if count > rows:
                raise AdapterError(
                    f"{count} experts of layer {number} are retrained, and there are {rows} rows for adapters: raise "
                    "esft.experts_per_layer or max_adapters",
                    code="too_many_experts",
                )
        needed, kept = sum(layers[number].store.row_bytes for number, _ in wanted), self._weave.kept_bytes
        if kept is not None and needed > kept:
            raise AdapterError(
                f"its experts need {needed / 2**30:.2f} GiB, and {kept / 2**30:.2f} GiB are kept for adapters: raise "
                "esft.memory_gib",
                code="adapter_too_large",
            )

    def poll(self, slot: int) -> dict[str, Any]:
        """Go on with a slot's load or unload; a plain report of where it stands. When all is there, it takes effect.

        A slot is free again once this has said "gone" or "failed".
        """
        load = self._loads.get(slot)
        self._free_places()
        if load is None:
            return {"state": "gone"}
        if load.state == "loading":
            try:
                self._advance(load)
            except Exception as error:
                self._abandon(load, error)
        elif load.state != "ready":
            self._give_back(load)
        if load.state in ("loading", "ready"):
            return {"state": load.state, **load.report}
        if load.held:
            return {"state": "unloading"}
        del self._loads[slot]
        return {"state": "failed", **load.report} if load.state == "failed" else {"state": "gone"}

    def unload(self, slot: int) -> None:
        """From the next step on nothing uses the adapter; a load that still runs ends. `poll` gives its memory back."""
        load = self._loads.get(slot)
        if load is None or load.state == "unloading":
            return
        if load.state == "ready":
            self._weave.commit(slot, {})
        else:
            self._stop(load)
        load.state = "unloading"

    # -- inside --------------------------------------------------------------------------------------------

    def _advance(self, load: Load) -> None:
        with torch.cuda.stream(self._lane):
            for staged in load.feed.ready():
                try:
                    load.arrivals.append(self._place(staged))
                    load.missing -= 1
                finally:
                    load.copied = self._event()
                    self._releases.append((load.copied, staged.release))
        if load.missing or not (load.copied is None or load.copied.query()):
            return
        load.feed.close()
        placed, shared = self._settle(load.arrivals)
        self._weave.commit(load.slot, placed)
        load.held = {number: list(rows.values()) for number, rows in placed.items()}
        load.state, load.arrivals = "ready", []
        load.report |= {
            "seconds": time.perf_counter() - load.started,
            "experts": sum(map(len, placed.values())),
            "shared": shared,
        }

    def _place(self, staged: Staged) -> _Arrival:
        """Into a row of its own, all enqueued."""
        layer = self._weave.layers[staged.layer]
        base, store = layer.local[staged.expert], layer.store
        row = layer.rows.take(1)[0]
        try:
            store.take([row])
        except BaseException:
            layer.rows.give_back([row])
            raise
        key = staged.digest + base.to_bytes(4, "little")
        twin = layer.rows.share(key)
        try:  # each of these may find the device's memory full
            w13, w2 = self._laid_out(staged.parts)
            store.write(row, base, w13, w2)
            finite = w13.isfinite().all() & w2.isfinite().all()
            as_twin = finite.new_zeros(()) if twin is None else store.equal(twin, base, w13, w2)
            flags = torch.stack([finite, store.equal(base, base, w13, w2), as_twin])
        except BaseException:
            if self._lane is not None:  # nothing is written there any more
                self._lane.synchronize()
            self._free_rows(layer, [row] if twin is None else [row, twin])
            raise
        return _Arrival(layer, staged.expert, row, key, twin, flags)

    def _laid_out(self, parts: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """This rank's share of an expert: [2 * intermediate / ranks, hidden] and [hidden, intermediate / ranks]."""
        rank, ranks = self._weave.shard
        moved = {name: part.to(self._weave.device, non_blocking=True) for name, part in parts.items()}
        gate, up = (moved[name].chunk(ranks, dim=0)[rank] for name in ("gate_proj", "up_proj"))
        down = moved["down_proj"].chunk(ranks, dim=1)[rank]
        return torch.cat([gate, up]).to(self._weave.dtype), down.to(self._weave.dtype).contiguous()

    def _settle(self, arrivals: list[_Arrival]) -> tuple[dict[int, dict[int, int]], int]:
        """With all copied: refuse what is not finite, and keep one row of what is there twice.

        Returns the row of each expert by layer, and how many experts share one.
        """
        flags = torch.stack([arrival.flags for arrival in arrivals]).tolist() if arrivals else []
        for arrival, (finite, _, _) in zip(arrivals, flags, strict=True):
            if not finite:
                name = f"model.layers.{arrival.layer.number}.mlp.experts.{arrival.expert}"
                raise AdapterError(
                    f"{name} has values that are not finite: its training diverged or the file is damaged",
                    code="not_finite",
                    tensor=name,
                )
        placed: dict[int, dict[int, int]] = {}
        shared = 0
        for arrival, (_, as_base, as_twin) in zip(arrivals, flags, strict=True):
            layer, row, unused = arrival.layer, arrival.row, []
            if arrival.twin is not None and (as_base or not as_twin):
                unused.append(arrival.twin)
            if as_base or (as_twin and arrival.twin is not None):
                unused.append(row)
                row = layer.local[arrival.expert] if as_base or arrival.twin is None else arrival.twin
                shared += 1
            elif arrival.twin is None:
                layer.rows.keep(row, arrival.key)
            self._free_rows(layer, unused)
            placed.setdefault(layer.number, {})[arrival.expert] = row
        return placed, shared

    def _abandon(self, load: Load, error: Exception) -> None:
        load.report = dict(zip(("error", "code", "tensor"), _reason(error), strict=True))
        self._stop(load)
        load.state = "failed"

    def _stop(self, load: Load) -> None:
        """No copy of it is under way after this, and its rows are those to give back."""
        load.feed.close()
        if load.copied is not None:
            load.copied.synchronize()
        for arrival in load.arrivals:
            rows = load.held.setdefault(arrival.layer.number, [])
            rows += [arrival.row] + ([] if arrival.twin is None else [arrival.twin])
        load.arrivals = []

    def _give_back(self, load: Load) -> None:
        """Return some of its rows, which no table names any more."""
        for number in list(load.held)[:LAYERS_AT_ONCE]:
            self._free_rows(self._weave.layers[number], load.held.pop(number))

    def _free_rows(self, layer: WovenLayer, rows: list[int]) -> None:
        tuned = [row for row in rows if row >= layer.base_rows]
        layer.store.give_back(layer.rows.give_back(tuned))

    def _free_places(self) -> None:
        waiting = []
        for event, release in self._releases:
            if event.query():
                release()
            else:
                waiting.append((event, release))
        self._releases = waiting

    def _event(self) -> Any:
        if not self._cuda:
            return _Done()
        event = torch.cuda.Event()
        event.record(self._lane)
        return event


class _Done:
    """The event after a copy where copies are made at once."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


def _reason(error: Exception) -> tuple[str, str, str | None]:
    """(message, code, tensor) of a load that failed."""
    if isinstance(error, AdapterError):
        return error.message, error.code, error.tensor
    if isinstance(error, StagingLost):
        return str(error), STAGING_LOST, None
    if isinstance(error, OutOfPages | torch.OutOfMemoryError):
        return f"the device memory kept for adapters is full: {error}", "adapter_memory_full", None
    if isinstance(error, OutOfRows):
        return f"a layer's rows for adapters are all taken: {error}", "adapter_slots_full", None
    return f"{type(error).__name__}: {error}", "engine_refuses", None
