"""`make bench-reroute`, on a GPU machine: what rerouting to the adapters' experts adds to a router.

The shape of a DeepSeek-V2-Lite layer: 64 experts, top 6, 20 adapters, random logits, tokens of all adapters and the
base. Against each other: vLLM's softmax and top-k alone; ours, which reroutes in the same launch; theirs followed by
our separate kernel, and by five operations of PyTorch (ExpertWeave's baseline "SingleOp"). The paper finds that the
five cost a model's step 29 % and one kernel less than 1 %. Every result is first compared with the definition. Times
are of one layer, out of many in one CUDA graph; without vLLM its place is taken by PyTorch's softmax and top-k.

    python -m benchmarks.reroute
    python -m benchmarks.reroute --dry      the reference alone, on the CPU, no results written
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from benchmarks.report import ROOT, Row, print_table, write_results
from benchmarks.segmented_lora import captured, timed
from signalbox.kernels.reroute import (
    reroute,
    reroute_by_operations,
    reroute_table,
    topk_reroute,
    topk_reroute_torch,
)

EXPERTS, TOP_K, ADAPTERS, TUNED = 64, 6, 20, 7
TOKENS = (1, 8, 32, 128, 256, 2048)
LAUNCHES = 50  # layers of one graph

Routing = tuple[Tensor, Tensor]


def router_alone(device: str) -> tuple[str, Callable[[Tensor], Routing]]:
    """The router that rerouting is added to: its name, and logits -> weights, experts."""

    def by_torch(logits: Tensor) -> Routing:
        weights, experts = torch.softmax(logits.float(), dim=-1).topk(TOP_K)
        return weights, experts.to(torch.int32)

    try:
        if device != "cuda":
            return "PyTorch", by_torch
        from vllm import _custom_ops as ops
    except ImportError:
        return "PyTorch", by_torch

    def by_vllm(logits: Tensor) -> Routing:
        shape = (len(logits), TOP_K)
        weights = torch.empty(shape, dtype=torch.float32, device=logits.device)
        experts = torch.empty(shape, dtype=torch.int32, device=logits.device)
        ops.topk_softmax(weights, experts, torch.empty_like(experts), logits, False)
        return weights, experts

    return "vLLM", by_vllm


def table_of(draw: torch.Generator) -> Tensor:
    """20 adapters of 7 tuned experts each, their rows one after the other."""
    placements = []
    for slot in range(ADAPTERS):
        tuned = torch.randperm(EXPERTS, generator=draw)[:TUNED].tolist()
        placements.append({expert: EXPERTS + slot * TUNED + place for place, expert in enumerate(tuned)})
    return reroute_table(EXPERTS, placements)


def systems_of(device: str, owners: Tensor, table: Tensor) -> dict[str, Callable[[Tensor], Routing]]:
    """What is timed: logits -> weights, rows. The first routes and does no more."""
    name, router = router_alone(device)

    def together(logits: Tensor) -> Routing:
        return topk_reroute(logits, TOP_K, owners, table, renormalize=False)

    def followed(logits: Tensor) -> Routing:
        weights, experts = router(logits)
        return weights, reroute(experts, owners, table)

    def by_operations(logits: Tensor) -> Routing:
        weights, experts = router(logits)
        return weights, reroute_by_operations(experts, owners, table)

    return {
        f"{name}'s router alone": router,
        "ours, router and rerouting in one": together,
        f"{name}'s router, then our kernel": followed,
        f"{name}'s router, then five operations": by_operations,
    }


def right(system: Callable[[Tensor], Routing], logits: Tensor, owners: Tensor, table: Tensor) -> bool:
    """Whether the rows are those of the definition and the weights equal but for rounding."""
    weights, rows = system(logits)
    expected, expected_rows = topk_reroute_torch(logits, TOP_K, owners, table, renormalize=False)
    return torch.equal(rows, expected_rows) and torch.allclose(weights, expected, rtol=1e-4, atol=1e-6)


def run_case(tokens: int, device: str, table: Tensor, draw: torch.Generator) -> list[Row]:
    """All systems on one batch of so many tokens."""
    cuda = device == "cuda"
    # Distinct, so that the order of equal logits, which PyTorch leaves open, does not matter.
    logits = torch.rand(tokens, EXPERTS, generator=draw).mul(8).to(device)
    owners = (torch.arange(tokens, dtype=torch.int32) % (ADAPTERS + 1) - 1).to(device)
    nobody = torch.full_like(owners, -1)
    rows: list[Row] = []
    alone: float | None = None
    for name, system in systems_of(device, owners, table).items():
        of = nobody if alone is None else owners
        case = f"{tokens} tokens: {name}"
        if not right(system, logits, of, table):
            raise ValueError(f"{case}: the results are not those of the definition")

        def step(system: Callable[[Tensor], Routing] = system) -> None:
            for _ in range(LAUNCHES if cuda else 1):
                system(logits)

        found = timed(captured(step) if cuda else step, cuda)
        value, low, high = (1000 * ms / (LAUNCHES if cuda else 1) for ms in found)
        ours = cuda and name.startswith("ours")
        goal = "no slower than the router alone" if ours else None
        met = value <= alone if ours and alone is not None else None
        rows.append(Row(case, "one layer", value, "us", low, high, alone, goal, met))
        if alone is None:
            alone = value
    return rows


def main(
    dry: Annotated[bool, typer.Option(help="small batches on the CPU, no results written")] = False,
    out: Annotated[Path, typer.Option(help="folder of the results")] = ROOT / "benchmarks" / "results",
) -> None:
    """Measure; prints a table and writes results/reroute.json."""
    device = "cpu" if dry else "cuda"
    draw = torch.Generator().manual_seed(0)
    rows: list[Row] = []
    with torch.inference_mode():
        table = table_of(draw).to(device)
        for tokens in (1, 8) if dry else TOKENS:
            rows += run_case(tokens, device, table, draw)
    if not dry:
        write_results("reroute", "python -m benchmarks.reroute", rows, out)
    print_table(rows, "rerouting: one layer's router, with and without")


if __name__ == "__main__":
    typer.run(main)
