"""`make bench-segmented_lora`, on a GPU machine: our segmented LoRA kernels against those of vLLM's multi-LoRA.

For the linears of the 1B and 8B Llama shapes as vLLM has them (q, k, v side by side, gate and up too), random weights:
the time of all adapter work of one decode step or prompt, captured in a CUDA graph and launched one by one, beside the
base's own linears and the PyTorch reference. Every case is first compared with float64. Rows of a batch take the
adapters in turn, one row in eight is the base's. A few layers are computed over and over and scaled to all of them;
their weights do not fit the L2 cache.

    python -m benchmarks.segmented_lora
    python -m benchmarks.segmented_lora --dry      the reference alone, on the CPU, no results written
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from benchmarks.report import ROOT, Row, print_table, write_results
from signalbox.kernels.segmented_lora import LoraWeights, Segments, add_lora, add_lora_torch, plan_blocks

LAYERS = 4  # computed; a model has more
REPEATS = 30
WORST_ERROR = 2e-2  # bf16 outputs against float64


@dataclass(frozen=True)
class Shape:
    """The linears of one layer: name -> (in, outs), and how many layers the model has."""

    layers: int
    linears: dict[str, tuple[int, tuple[int, ...]]]


SHAPES = {
    "8B": Shape(
        32,
        {
            "qkv": (4096, (4096, 1024, 1024)),
            "o": (4096, (4096,)),
            "gate_up": (4096, (14336, 14336)),
            "down": (14336, (4096,)),
        },
    ),
    "1B": Shape(
        16,
        {
            "qkv": (2048, (2048, 512, 512)),
            "o": (2048, (2048,)),
            "gate_up": (2048, (8192, 8192)),
            "down": (8192, (2048,)),
        },
    ),
    "dry": Shape(2, {"qkv": (64, (64, 32, 32)), "down": (128, (64,))}),
}
# (shape, rows, adapters, rank), the most telling first
CASES = [(shape, rows, count, 16) for shape in ("8B", "1B") for rows in (16, 64, 256, 1, 2048) for count in (8, 1)]
CASES += [("8B", rows, 16, 16) for rows in (16, 256)] + [("8B", 16, 8, rank) for rank in (8, 64)]


@dataclass
class Linear:
    """One linear with its adapters in our form and in vLLM's, and its input and output of this batch."""

    base: Tensor
    ours: LoraWeights
    a: list[Tensor]  # vLLM: [slots, 1, rank, in] for each slice
    b: list[Tensor]  # vLLM: [slots, 1, out, rank]
    x: Tensor
    y: Tensor


def make(
    shape: Shape, rows: int, slots: int, rank: int, device: str, dtype: torch.dtype, draw: torch.Generator
) -> list[Linear]:
    """Fresh random weights and inputs of `LAYERS` layers."""

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=draw, device=device) * scale).to(dtype)

    made = []
    for _ in range(LAYERS):
        for inner, outs in shape.linears.values():
            ours = LoraWeights.allocate(slots, rank, inner, outs, dtype, device)
            a = [normal(slots, 1, rank, inner, scale=inner**-0.5) for _ in outs]
            b = [normal(slots, 1, out, rank, scale=rank**-0.5) for out in outs]
            for slot in range(slots):
                ours.write(slot, [(a[i][slot, 0], b[i][slot, 0], 1.0) for i in range(len(outs))])
            x = normal(rows, inner)
            base = normal(sum(outs), inner, scale=inner**-0.5)
            made.append(Linear(base, ours, a, b, x, normal(rows, sum(outs))))
    return made


def exact(linear: Linear, owner: Tensor) -> Tensor:
    """What the output has to be, in float64."""
    y = linear.y.double()
    start = 0
    for a, b in zip(linear.a, linear.b, strict=True):
        out = b.shape[2]
        for slot in range(a.shape[0]):
            mine = owner == slot
            y[mine, start : start + out] += linear.x[mine].double() @ a[slot, 0].double().T @ b[slot, 0].double().T
        start += out
    return y


def vllm_step(linears: list[Linear], owner: Tensor, slots: int) -> Callable[[], None]:
    """The same work by vLLM's kernels, as its `add_lora_linear` calls them; metadata of the step prepared before."""
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

    meta = LoRAKernelMeta.make(slots, len(owner), owner.device)
    meta.prepare_tensors(owner)
    arguments = meta.meta_args(len(owner), False)

    def step() -> None:
        for linear in linears:
            buffer = torch.empty(
                (len(linear.a), len(owner), linear.a[0].shape[2]), dtype=torch.float32, device=owner.device
            )
            lora_shrink(linear.x, linear.a, buffer, *arguments, 1.0)
            lora_expand(buffer, linear.b, linear.y, *arguments, offset_start=0, add_inputs=True)

    return step


def steps_of(linears: list[Linear], owner: Tensor, slots: int, rank: int) -> dict[str, Callable[[], Any]]:
    """What is timed."""
    known = owner.tolist()
    segments = Segments.of(known, [rank] * slots, owner.device)
    assert segments is not None
    blocks = plan_blocks(known, [rank] * slots)
    for block in blocks:
        if isinstance(block.rows, Tensor):  # the reference's plan is made for the CPU
            object.__setattr__(block, "rows", block.rows.to(owner.device))
        if block.mask is not None:
            object.__setattr__(block, "mask", block.mask.to(owner.device, linears[0].x.dtype))

    def ours() -> None:
        for linear in linears:
            add_lora(linear.y, linear.x, linear.ours, segments)

    def reference() -> None:
        for linear in linears:
            add_lora_torch(linear.y, linear.x, linear.ours, blocks)

    def base() -> None:
        for linear in linears:
            F.linear(linear.x, linear.base)

    return {"ours": ours, "PyTorch reference": reference, "base linears alone": base}


def error_of(linears: list[Linear], owner: Tensor, step: Callable[[], Any]) -> float:
    """Greatest relative error of a step's outputs; the outputs are put back. Base rows must not change by a bit."""
    wanted = [exact(linear, owner) for linear in linears[: len(linears) // LAYERS]]
    before = [linear.y.clone() for linear in linears]
    step()
    worst = 0.0
    for linear, want, old in zip(linears, wanted, before, strict=False):
        if not torch.equal(linear.y[owner < 0], old[owner < 0]):
            return float("inf")
        worst = max(worst, float((linear.y.double() - want).norm() / want.norm()))
    for linear, old in zip(linears, before, strict=True):
        linear.y.copy_(old)
    return worst


def timed(step: Callable[[], Any], cuda: bool) -> tuple[float, float, float]:
    """Median, least and greatest of single runs, ms."""
    times = []
    for _ in range(5 if cuda else 1):
        step()
    for _ in range(REPEATS if cuda else 3):
        if cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            step()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            began = time.perf_counter()
            step()
            times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times), min(times), max(times)


def captured(step: Callable[[], Any]) -> Callable[[], Any]:
    """The step as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def run_case(name: str, rows: int, adapters: int, rank: int, device: str) -> list[Row]:
    """All systems on one batch; what cannot run is a row that says why."""
    shape, cuda = SHAPES[name], device == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    slots = max(8, adapters)
    draw = torch.Generator(device).manual_seed(hash((name, rows, adapters, rank)) % 2**31)
    linears = make(shape, rows, slots, rank, device, dtype, draw)
    owner = torch.arange(rows, device=device, dtype=torch.int32)
    if rows >= 1024:  # prompts: each row's neighbours are of the same request
        owner = owner * adapters // rows
    else:
        owner = torch.where(owner % 8 == 7, -1, owner % adapters).to(torch.int32)
    steps = steps_of(linears, owner, slots, rank)
    case = f"{name}, {rows} rows, {adapters} adapters of rank {rank}"
    if cuda:
        try:
            steps["vLLM"] = vllm_step(linears, owner, slots)
        except Exception as error:
            print(f"{case}: vLLM's kernels cannot run: {type(error).__name__}: {error}")
    rows_found: list[Row] = []
    scale = shape.layers / LAYERS
    figures: dict[str, tuple[float, float, float]] = {}
    for system, step in steps.items():
        if system != "base linears alone":
            off = error_of(linears, owner, step)
            worst = WORST_ERROR if cuda else 1e-5
            rows_found.append(Row(f"{case}: {system}", "relative error", off, goal=f"below {worst:g}", met=off < worst))
        for way, run in ({"": step} | ({"graph": captured(step)} if cuda else {})).items():
            figures[f"{system} {way}".strip()] = tuple(scale * v for v in timed(run, cuda))  # type: ignore[assignment]
    for system, (value, low, high) in figures.items():
        theirs = figures.get(system.replace("ours", "vLLM")) if system.startswith("ours") else None
        met = value <= theirs[0] if theirs else None
        goal = "no slower than vLLM's" if theirs else None
        how = system.removesuffix(" graph")
        way = "in a CUDA graph" if system.endswith("graph") else "launched one by one"
        rows_found.append(
            Row(f"{case}: {how}", f"one step, {way}", value, "ms", low, high, theirs[0] if theirs else None, goal, met)
        )
    return rows_found


def main(
    seconds: Annotated[float, typer.Option(help="no further case is begun after so long")] = 110.0,
    dry: Annotated[bool, typer.Option(help="small shapes on the CPU, no results written")] = False,
    out: Annotated[Path, typer.Option(help="folder of the results")] = ROOT / "benchmarks" / "results",
) -> None:
    """Measure; prints a table and writes results/segmented_lora.json."""
    device = "cpu" if dry else "cuda"
    cases = [("dry", rows, count, 8) for rows in (1, 16, 64) for count in (1, 4)] if dry else CASES
    rows: list[Row] = []
    began = time.monotonic()
    with torch.inference_mode():
        for case in cases:
            if time.monotonic() - began > seconds:
                print(f"time is up before {case}")
                break
            try:
                rows += run_case(*case, device)
            except Exception as error:
                print(f"{case}: {type(error).__name__}: {error}", flush=True)
                continue
            print(f"{case} after {time.monotonic() - began:.0f} s", flush=True)
            if not dry:
                write_results("segmented_lora", "python -m benchmarks.segmented_lora", rows, out)
    print_table(rows, "segmented LoRA: all adapter work of one step")


if __name__ == "__main__":
    typer.run(main)
