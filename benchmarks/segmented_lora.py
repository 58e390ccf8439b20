"""Segmented LoRA on one GPU: our kernels against vLLM's multi-LoRA kernels, in one process, on the same weights.

    python -m benchmarks.segmented_lora [--out DIR] [--dry]

All LoRA work of one model step: the merged linears of one layer as vLLM has them (qkv, o, gate_up, down), timed over
several layers' worth of separate weights and given for all layers. Inputs are random; each system's result is checked
against float64 before it is timed. What fails is a row with its reason. `--dry` runs tiny shapes on the CPU: Triton's
interpreter (TRITON_INTERPRET=1) or, without Triton, the PyTorch path alone, to see that the benchmark works.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import RESULTS, ROOT, Row, print_table, write_results
from signalbox.kernels.segmented_lora import LoraWeights, Segments, add_lora_torch, plan_blocks

SHAPES = ("llama-3.2-1b", "llama-3.1-8b")
DISTINCT = 4  # layers whose weights differ, so that one layer's adapters do not stay in the cache for the next
BATCHES = (1, 16, 64, 256, 2048)
ADAPTERS, RANKS = (1, 8, 16), (8, 16, 64)
BASE_SHARE = 0.125  # of the rows
BUDGET = 80.0  # seconds for everything; what does not fit is left out and said
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
Run = Callable[[], None]


@dataclass
class Linear:
    """One merged linear of one layer: base weight, adapters for us and for vLLM, input and output."""

    name: str
    weight: Tensor
    outs: tuple[int, ...]
    ours: LoraWeights
    vllm_a: list[Tensor]
    vllm_b: list[Tensor]
    x: Tensor
    y: Tensor


@dataclass
class Case:
    shape: str
    rows: int
    adapters: int
    rank: int

    def __str__(self) -> str:
        return f"{self.shape}, {self.rows} rows, {self.adapters} adapters of rank {self.rank}"


def linears_of(config: dict[str, Any], dry: bool) -> list[tuple[str, int, tuple[int, ...]]]:
    """(name, in, outs) of one layer's linears."""
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    if dry:
        hidden, inner, q, kv = 64, 128, 64, 32
    return [
        ("qkv", hidden, (q, kv, kv)),
        ("o", q, (hidden,)),
        ("gate_up", hidden, (inner, inner)),
        ("down", inner, (hidden,)),
    ]


def build(case: Case, config: dict[str, Any], device: str, dtype: torch.dtype, dry: bool) -> list[Linear]:
    built = []
    for _ in range(DISTINCT):
        for name, inside, outs in linears_of(config, dry):
            ours = LoraWeights.allocate(case.adapters, case.rank, inside, outs, dtype, device)
            a = torch.randn(len(outs), case.adapters, case.rank, inside, device=device, dtype=dtype) / inside**0.5
            b = torch.randn(case.adapters, case.rank, sum(outs), device=device, dtype=dtype) / case.rank**0.5
            ours.a.copy_(a)
            ours.b.copy_(b)
            ours.ranks.fill_(case.rank)
            ours.bits = (1 << case.adapters) - 1
            starts = [sum(outs[:i]) for i in range(len(outs))]
            built.append(
                Linear(
                    name,
                    torch.randn(sum(outs), inside, device=device, dtype=dtype) / inside**0.5,
                    outs,
                    ours,
                    [part.contiguous() for part in a],
                    [b[:, :, s : s + o].transpose(1, 2).contiguous() for s, o in zip(starts, outs, strict=True)],
                    torch.randn(case.rows, inside, device=device, dtype=dtype),
                    torch.randn(case.rows, sum(outs), device=device, dtype=dtype),
                )
            )
    return built


def slots_of(case: Case, seed: int) -> list[int]:
    """Decode rows in random order; prefill rows as prompts that lie side by side. Some rows are the base's."""
    generator = torch.Generator().manual_seed(seed)
    base = int(case.rows * BASE_SHARE)
    slots = [i % case.adapters for i in range(case.rows - base)] + [-1] * base
    if case.rows > 256:
        return sorted(slots)
    return [slots[i] for i in torch.randperm(case.rows, generator=generator).tolist()]


def reference(linear: Linear, slots: Sequence[int]) -> Tensor:
    """y with the adapters' part in float64."""
    y, x = linear.y.double(), linear.x.double()
    index = torch.tensor(slots, device=y.device)
    for slot in sorted({s for s in slots if s >= 0}):
        mine = (index == slot).nonzero()[:, 0]
        start = 0
        for part, out in zip(linear.ours.a, linear.outs, strict=True):
            inner = x[mine] @ part[slot].double().T
            y[mine, start : start + out] += inner @ linear.ours.b[slot, :, start : start + out].double()
            start += out
    return y


def our_kernels(
    linears: list[Linear], slots: Sequence[int], device: str
) -> tuple[Run, Callable[[Sequence[int]], None]]:
    from signalbox.kernels.segmented_lora_triton import add_lora_triton

    segments = Segments.reserve(len(slots), linears[0].ours.b.shape[0], device)
    segments.refill(slots)

    def run() -> None:
        for linear in linears:
            add_lora_triton(linear.y, linear.x, linear.ours, segments)

    return run, segments.refill


def vllm_kernels(
    linears: list[Linear], slots: Sequence[int], device: str
) -> tuple[Run, Callable[[Sequence[int]], None]]:
    """As `PunicaWrapperGPU.add_lora_linear` calls them, its buffer and metadata included."""
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink, utils

    for table in ("_LORA_A_PTR_DICT", "_LORA_B_PTR_DICT"):
        # Strides by address: an address that a case before this one used has other strides now.
        getattr(utils, table, {}).clear()
    adapters, rank = linears[0].vllm_a[0].shape[:2]
    meta = LoRAKernelMeta.make(adapters, len(slots), device=device)
    index = torch.tensor(slots, dtype=torch.int32, device=device)
    meta.prepare_tensors(index)
    try:  # since 0.11 the number of adapters in use may shrink the grid; False is its default
        arguments = meta.meta_args(len(slots), False)
    except TypeError:
        arguments = meta.meta_args(len(slots))  # type: ignore[call-arg]

    def run() -> None:
        for linear in linears:
            buffer = torch.empty(len(linear.outs), len(slots), rank, dtype=torch.float32, device=device)
            lora_shrink(linear.x, linear.vllm_a, buffer, *arguments, 1.0)
            lora_expand(buffer, linear.vllm_b, linear.y, *arguments, offset_start=0, add_inputs=True)

    def refill(new: Sequence[int]) -> None:
        meta.prepare_tensors(torch.tensor(new, dtype=torch.int32, device=device))

    return run, refill


def torch_path(linears: list[Linear], slots: Sequence[int], device: str) -> tuple[Run, None]:
    """The reference of our kernels: what a GPU without Triton would run."""
    blocks = plan_blocks(slots, [linears[0].ours.a.shape[2]] * linears[0].ours.b.shape[0])
    moved = [
        type(b)(b.first, b.last, b.rank, b.bits, b.rows if isinstance(b.rows, slice) else b.rows.to(device),
                None if b.mask is None else b.mask.to(device, linears[0].x.dtype))
        for b in blocks
    ]  # fmt: skip

    def run() -> None:
        for linear in linears:
            add_lora_torch(linear.y, linear.x, linear.ours, moved)

    return run, None


def base_linears(linears: list[Linear], slots: Sequence[int], device: str) -> tuple[Run, None]:
    def run() -> None:
        for linear in linears:
            torch.mm(linear.x, linear.weight.T)

    return run, None


SYSTEMS: dict[str, Any] = {
    "ours": our_kernels,
    "vLLM": vllm_kernels,
    "PyTorch": torch_path,
    "base linears": base_linears,
}


def check(linears: list[Linear], run: Run, slots: Sequence[int], dtype: torch.dtype) -> float:
    """Greatest relative error over the linears of a layer; base rows must keep every bit. Leaves y as it was."""
    before = [linear.y.clone() for linear in linears]
    want = [reference(linear, slots) for linear in linears[:4]]
    run()
    base = [i for i, slot in enumerate(slots) if slot < 0]
    worst = 0.0
    for linear, old, expected in zip(linears, before, want, strict=False):
        added, real = linear.y.double() - old.double(), expected - old.double()
        # y itself is rounded to its type: its spacing is no error of the adapters' part.
        error = float((linear.y.double() - expected).norm() / expected.norm().clamp_min(1e-9))
        if not torch.equal(linear.y[base], old[base]):
            raise AssertionError(f"{linear.name}: rows of the base were changed")
        if real.norm() > 0 and float((added - real).norm() / real.norm()) > 10 * TOLERANCE[dtype]:
            raise AssertionError(f"{linear.name}: the adapters' part is wrong")
        worst = max(worst, error if error == error else float("inf"))
    for linear, old in zip(linears, before, strict=True):
        linear.y.copy_(old)
    if worst > TOLERANCE[dtype]:
        raise AssertionError(f"relative error {worst:.1e} against float64")
    return worst


def captured(run: Run) -> Run:
    """The same work as one CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def timed(run: Run, device: str, seconds: float) -> list[float]:
    """Milliseconds of each of many runs, by events on a GPU. y grows with each: it stays finite, and random."""
    run()
    if device == "cpu":
        started = time.perf_counter()
        run()
        return [1000 * (time.perf_counter() - started)]
    torch.cuda.synchronize()
    found: list[float] = []
    until = time.perf_counter() + seconds
    while len(found) < 10 or (time.perf_counter() < until and len(found) < 300):
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(10)]
        for start, end in events:
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        found += [start.elapsed_time(end) for start, end in events]
    return found


def quartiles(values: list[float], factor: float) -> tuple[float, float, float]:
    ordered = sorted(values)
    low, high = ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]
    return statistics.median(ordered) * factor, low * factor, high * factor


def measure(case: Case, config: dict[str, Any], device: str, dtype: torch.dtype, dry: bool) -> list[Row]:
    slots = slots_of(case, 1)
    linears = build(case, config, device, dtype, dry)
    factor = config["num_hidden_layers"] / DISTINCT
    rows: list[Row] = []
    medians: dict[tuple[str, str], float] = {}
    for system, prepare in SYSTEMS.items():
        if system == "PyTorch" and not dry and case.rank != 16:
            continue  # far slower; one rank shows it
        try:
            run, refill = prepare(linears, slots, device)
            if system != "base linears":
                error = check(linears, run, slots, dtype)
                if case.rank == 16 and case.adapters == 8:
                    rows.append(Row(str(case), f"{system}: relative error against float64", error))
            modes = {"eager": run}
            if device != "cpu":
                modes = {"graph": captured(run), "eager": run}
                if refill is not None:  # the graph follows another batch of the same size
                    other = slots_of(case, 2)
                    refill(other)
                    check(linears, modes["graph"], other, dtype)
                    refill(slots)
            for mode, function in modes.items():
                median, low, high = quartiles(timed(function, device, 0.04), factor)
                medians[system, mode] = median
                base = medians.get(("vLLM", mode)) if system == "PyTorch" else None
                rows.append(Row(str(case), f"{system}, {mode}: one step", median, "ms", low, high, base))
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
            rows.append(Row(str(case), f"{system}: failed: {reason}", 0.0))
    for mode in ("graph", "eager"):
        if ("ours", mode) in medians and ("vLLM", mode) in medians:
            ratio = medians["vLLM", mode] / medians["ours", mode]
            goal = "at least 1" if mode == "graph" else None
            rows.append(Row(str(case), f"vLLM's time over ours, {mode}", ratio, goal=goal,
                            met=ratio >= 1 if goal else None))  # fmt: skip
    return rows


def cases(dry: bool) -> list[Case]:
    """The ranks and numbers of adapters in full for the 8B shape; a cross through the middle for the 1B shape."""
    if dry:
        return [Case(SHAPES[0], rows, 3, 16) for rows in (1, 9)]
    found = [Case(SHAPES[1], rows, adapters, 16) for rows in BATCHES for adapters in ADAPTERS if adapters <= rows]
    found += [Case(SHAPES[1], rows, 8, rank) for rows in BATCHES[1:] for rank in RANKS if rank != 16]
    found += [Case(SHAPES[0], rows, adapters, 16) for rows in BATCHES for adapters in ADAPTERS if adapters <= rows]
    return found + [Case(SHAPES[0], rows, 8, rank) for rows in BATCHES[1:] for rank in RANKS if rank != 16]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    if not options.dry and not torch.cuda.is_available():
        sys.exit("this benchmark needs a GPU; --dry shows that it works without")
    device, dtype = ("cpu", torch.float32) if options.dry else ("cuda", torch.bfloat16)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    if find_spec("triton") is None:
        SYSTEMS.pop("ours")
    if find_spec("vllm") is None:
        SYSTEMS.pop("vLLM")
    started, rows, skipped = time.perf_counter(), [], 0
    for case in cases(options.dry):
        if time.perf_counter() - started > BUDGET:
            skipped += 1
            continue
        config = json.loads((ROOT / "benchmarks" / "shapes" / case.shape / "config.json").read_text())
        with torch.inference_mode():
            rows += measure(case, config, device, dtype, options.dry)
        print(f"{time.perf_counter() - started:6.1f} s  {case}", flush=True)
    if skipped:
        rows.append(Row("all", f"cases left out: {BUDGET:.0f} s were over", skipped))
    rows.append(Row("all", "whole benchmark", time.perf_counter() - started, "s"))
    print_table(rows)
    write_results("segmented_lora", " ".join(["python -m benchmarks.segmented_lora", *sys.argv[1:]]), rows, options.out)


if __name__ == "__main__":
    main()
