"""What benchmarks/expertweave.py compares: the shape, the adapters, whose requests they are, and the two engines."""

from __future__ import annotations

import multiprocessing
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.expertweave_engine import Owner, serve
from benchmarks.report import Row
from benchmarks.shapes import SHAPES
from benchmarks.weave_memory import adapters as table_1

E_MAX = 13  # of table 1
SEED = 7
_begun = time.perf_counter()


@dataclass(slots=True, frozen=True)
class Shape:
    """A mixture-of-experts model: its routed experts are in `layers`, `experts` in each."""

    name: str
    layers: range
    hidden: int
    intermediate: int
    experts: int = 64

    @property
    def folder(self) -> Path:
        return SHAPES / self.name

    @property
    def expert_bytes(self) -> int:
        """Of one routed expert in bf16."""
        return 3 * self.hidden * self.intermediate * 2

    def tuned_experts(self, count: int) -> list[dict[int, list[int]]]:
        """The tuned experts by layer of the first adapters of the paper's table 1, chosen at random."""
        found = []
        for index, sizes in enumerate(table_1(count)):
            draw = random.Random(1000 + index)
            pairs = zip(self.layers, sizes, strict=False)  # a model of fewer layers has the first of them
            found.append({layer: sorted(draw.sample(range(self.experts), size)) for layer, size in pairs})
        return found


DEEPSEEK = Shape("deepseek-v2-lite", range(1, 27), 2048, 1408)
OLMOE = Shape("olmoe-1b-7b", range(16), 2048, 1024)


@dataclass(slots=True)
class Plan:
    """What is measured, and how often."""

    shape: Shape = DEEPSEEK
    batches: tuple[int, ...] = (1, 8, 32, 128, 256)
    counts: tuple[int, ...] = (5, 10, 20)
    alphas: tuple[float, ...] = (1.0, 0.3, 0.1)
    uses: tuple[str, ...] = ("uniform", "skewed")
    rounds: int = 2
    steps: int = 30
    prompts: tuple[int, ...] = (512, 1536)
    rates: tuple[int, ...] = (1, 3, 5)
    poisson_s: float = 12.0
    repeats: int = 2  # of each rate, with other arrivals
    parts: tuple[str, ...] = ("decode", "prompts", "poisson", "exactness", "loading")
    difference: bool = False
    bandwidth: float = 0.0
    rows: list[Row] = field(default_factory=list)


class Peer:
    """An engine in a process of its own; calls wait for the answer."""

    def __init__(self, name: str, arguments: dict[str, Any], settings: dict[str, Any] | None) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, arguments, settings), name=name)
        self._process.start()
        theirs.close()
        self.name = name

    def started(self) -> float:
        """Seconds that the start took."""
        return float(self._answer())

    def __call__(self, method: str, *args: Any) -> Any:
        self._pipe.send((method, args))
        return self._answer()

    def _answer(self) -> Any:
        while not self._pipe.poll(1.0):
            if not self._process.is_alive():
                raise SystemExit(f"the engine {self.name} has died (exit code {self._process.exitcode})")
        kind, value = self._pipe.recv()
        if kind == "error":
            raise SystemExit(f"the engine {self.name}: {value}")
        return value

    def stop(self) -> None:
        """End the process."""
        self._pipe.send(None)
        self._process.join(20)
        self._process.kill()


def owners_of(batch: int, adapters: int, alpha: float, seed: int) -> list[Owner]:
    """Requests' adapters by popularity: adapter floor(N * u^(1/alpha)) with u uniform, stratified over the batch.

    alpha 1 is uniform; at 0.32 the first of two adapters has 80 % (the paper's section 5.3).
    """
    rng = np.random.default_rng(seed)
    u = (np.arange(batch) + rng.random(batch)) / batch
    chosen = np.minimum((adapters * u ** (1 / alpha)).astype(int), adapters - 1)
    return [Owner(int(a), int(a)) for a in rng.permutation(chosen)]


def on_base(owners: Sequence[Owner]) -> list[Owner]:
    """The same tasks without adapters."""
    return [Owner(owner.task) for owner in owners]


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, and the least and greatest of the rounds."""
    return statistics.median(values), min(values), max(values)


def mark(text: str) -> None:
    """Say how far the run is."""
    print(f"[{time.perf_counter() - _begun:6.1f} s] {text}", flush=True)
