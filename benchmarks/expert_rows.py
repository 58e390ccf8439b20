"""`make bench-expert_rows`, on a GPU machine: aligning picks and multiplying with many adapters' expert rows.

Alignment against vLLM's `moe_align_block_size`, at the rows of the base and at those reserved for 20 adapters. Then the
two products of a DeepSeek-V2-Lite layer (64 experts, top 6, 2048 x 1408), random weights and hidden states: vLLM's
kernel on the base alone, its tokens on the base and on 20 adapters of 7 tuned experts each, whose rows are stored in
full (vLLM's kernel and ours) or as 4-bit differences (ours). Tokens choose experts uniformly, or a quarter of their
picks among those that their adapter tuned. Every product is first compared with float64. Times are of one layer, of
several in one CUDA graph; its weights do not fit the L2 cache.

    python -m benchmarks.expert_rows
    python -m benchmarks.expert_rows --blocks    which block sizes are best instead (expert_rows_blocks.py)
    python -m benchmarks.expert_rows --dry       the references alone, on the CPU, no results written
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.report import ROOT, Row, print_table, write_results
from benchmarks.segmented_lora import captured, timed
from signalbox.kernels.align import Alignment, align_rows, align_rows_torch
from signalbox.kernels.difference_rows import (
    Blocks,
    Differences,
    align_picks,
    blocks_of,
    difference_of,
    grouped_product,
    woven_product,
)
from signalbox.kernels.reroute import BASE, reroute, reroute_table

TOKENS = (1, 8, 32, 128, 256, 2048)
ALIGNED = (1, 8, 32, 128, 256, 384, 544, 1024, 2048)
PROMPT = 1024  # from so many tokens on: a few requests, each with its adapter
RESERVED = 64 + 20 * 13  # rows of the paper's slots
LAYERS = 4  # of one graph
WORST_ERROR = 2e-2  # bf16 outputs against float64


@dataclass(frozen=True)
class Shape:
    """A layer: its experts and features, and the adapters on it."""

    experts: int
    top_k: int
    hidden: int
    inner: int
    adapters: int
    tuned: int


LITE = Shape(64, 6, 2048, 1408, 20, 7)
DRY = Shape(8, 2, 64, 32, 3, 2)


@dataclass(frozen=True)
class Layer:
    """The two linears of a layer's experts: base rows, then the tuned ones in full; the latter also as differences."""

    shape: Shape
    table: Tensor
    gate_up: Tensor  # [rows, 2 * inner, hidden]
    down: Tensor  # [rows, hidden, inner]
    gate_up_differences: Differences
    down_differences: Differences


def make_layer(shape: Shape, device: str, dtype: torch.dtype, draw: torch.Generator) -> Layer:
    """Random base experts, and tuned ones that differ from them by a twentieth."""
    placements, base_of = [], []
    for slot in range(shape.adapters):
        tuned = torch.randperm(shape.experts, generator=draw, device=device)[: shape.tuned].tolist()
        placements.append({e: shape.experts + slot * shape.tuned + place for place, e in enumerate(tuned)})
        base_of += tuned
    bases = torch.tensor(base_of, dtype=torch.int32, device=device)

    def rows(out: int, inner: int) -> tuple[Tensor, Differences]:
        full = torch.empty(shape.experts + len(base_of), out, inner, dtype=dtype, device=device)
        full.normal_(generator=draw).mul_(inner**-0.5)
        tuned = full[shape.experts :]
        tuned.mul_(0.05).add_(full[bases.long()])
        return full, Differences(*difference_of(full[bases.long()], tuned), bases)

    gate_up, gate_up_differences = rows(2 * shape.inner, shape.hidden)
    down, down_differences = rows(shape.hidden, shape.inner)
    table = reroute_table(shape.experts, placements).to(device)
    return Layer(shape, table, gate_up, down, gate_up_differences, down_differences)


def picks_of(layer: Layer, tokens: int, use: str, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """(experts, rows) int32 [T, K]: tokens of the base, of all adapters, or of those with their own more often."""
    shape, device = layer.shape, layer.table.device
    owners = torch.arange(tokens, dtype=torch.int32, device=device)
    owners = owners * min(4, shape.adapters) // tokens if tokens >= PROMPT else owners % shape.adapters
    owners = torch.full_like(owners, BASE) if use == "base" else owners
    liking = torch.rand(tokens, shape.experts, generator=draw, device=device)
    if use == "skewed":
        own = layer.table[owners.long() + 1] >= shape.experts
        chosen = (own * (1 + liking)).topk((shape.top_k + 3) // 4).indices
        number = torch.arange(tokens, device=device)[:, None] % 4 + shape.top_k  # of own ones, times four
        wanted = torch.arange(chosen.shape[1], device=device) < number // 4
        liking.scatter_(1, chosen, torch.where(wanted, 2.0, liking.gather(1, chosen)))
    experts = liking.topk(shape.top_k).indices.to(torch.int32)
    return experts, reroute(experts, owners, layer.table)


Product = Callable[[Tensor, Tensor], None]
"""Fills the two outputs [P, 2 * inner] and [P, hidden]."""


@dataclass(frozen=True)
class Batch:
    """What one step multiplies: hidden states, the inputs of the second linear, and the picks."""

    x: Tensor
    y: Tensor
    weights: Tensor
    experts: Tensor
    rows: Tensor

    @classmethod
    def of(cls, layer: Layer, tokens: int, use: str, draw: torch.Generator) -> Batch:
        """Random inputs."""
        experts, rows = picks_of(layer, tokens, use, draw)
        like: dict[str, Any] = {"device": rows.device, "dtype": layer.down.dtype}
        shape = layer.shape
        x = torch.empty(tokens, shape.hidden, **like).normal_(generator=draw)
        y = torch.empty(tokens * shape.top_k, shape.inner, **like).normal_(generator=draw)
        weights = torch.rand(tokens, shape.top_k, generator=draw, device=rows.device)
        return cls(x, y, weights, experts, rows)


def ours(
    layer: Layer, batch: Batch, stored: str, blocks: tuple[Blocks, Blocks] | None = None, align: bool = False
) -> tuple[Product, str]:
    """Our kernel on full rows or on differences, and its block sizes in words. `align`: each time, not once before."""
    shape, as_differences, tokens = layer.shape, stored == "differences", len(batch.x)
    of_hidden, of_inner = blocks or tuple(blocks_of(tokens, k, as_differences) for k in (shape.hidden, shape.inner))
    gate_up, down, first, second = layer.gate_up, layer.down, None, None
    if as_differences:
        gate_up, down = gate_up[: shape.experts], down[: shape.experts]
        first, second = layer.gate_up_differences, layer.down_differences
    once = align_picks(batch.rows, len(gate_up), of_hidden, first)

    def product(up: Tensor, out: Tensor) -> None:
        alignment = align_picks(batch.rows, len(gate_up), of_hidden, first) if align else once
        for x, full, y, of, weights, k, sizes in (
            (batch.x, gate_up, up, first, None, shape.top_k, of_hidden),
            (batch.y, down, out, second, batch.weights, 1, of_inner),
        ):
            woven_product(
                x,
                full,
                batch.rows,
                y,
                alignment,
                top_k=k,
                blocks=sizes,
                differences=of,
                topk_weights=weights,
                usual_rows=shape.experts,
            )

    return product, in_words(of_hidden)


def in_words(blocks: Blocks) -> str:
    """m x n x k x warps x stages, and how differences are computed if not in the same blocks."""
    apart = ", apart " + "x".join(map(str, blocks.apart)) if blocks.apart else ""
    return "x".join(map(str, blocks[:5])) + (", added" if blocks.added else "") + apart


def vllm_s(layer: Layer, batch: Batch, assigned: str, align: bool = False) -> Product:
    """vLLM's kernel, as its `fused_experts_impl` calls it: its own alignment of the experts, or ours of the rows."""
    import triton.language as tl
    from vllm.model_executor.layers.fused_moe import fused_moe

    tokens, top_k, count = len(batch.x), layer.shape.top_k, layer.shape.experts
    config: dict[str, Any] = fused_moe.try_get_optimal_moe_config(
        layer.gate_up[:count].shape, layer.down[:count].shape, top_k, None, tokens
    )

    def assignment() -> Any:
        if assigned == "theirs":
            return fused_moe._prepare_expert_assignment(batch.experts, config, tokens, top_k, count, None)
        return align_rows(batch.rows, config["BLOCK_SIZE_M"], len(layer.gate_up))

    once = assignment()

    def product(up: Tensor, out: Tensor) -> None:
        sorted_ids, block_rows, padded = assignment() if align else once
        for x, full, y, weighted, k in (
            (batch.x, layer.gate_up, up, False, top_k),
            (batch.y, layer.down, out, True, 1),
        ):
            fused_moe.invoke_fused_moe_triton_kernel(
                x,
                full,
                y.view(tokens, top_k, -1),
                None,
                None,
                batch.weights,
                sorted_ids,
                block_rows,
                padded,
                weighted,
                k,
                config,
                compute_type=tl.bfloat16,
                use_fp8_w8a8=False,
                use_int8_w8a8=False,
                use_int8_w8a16=False,
                use_int4_w4a16=False,
                per_channel_quant=False,
            )

    return product


def reference(layer: Layer, batch: Batch, stored: str) -> tuple[Tensor, Tensor]:
    """Both outputs in float64."""
    count = layer.shape.experts
    plain = stored == "full"
    first, second = (None, None) if plain else (layer.gate_up_differences, layer.down_differences)
    up = grouped_product(
        batch.x.double(),
        layer.gate_up if plain else layer.gate_up[:count],
        batch.rows,
        top_k=layer.shape.top_k,
        differences=first,
    )
    out = grouped_product(
        batch.y.double(),
        layer.down if plain else layer.down[:count],
        batch.rows,
        top_k=1,
        differences=second,
        topk_weights=batch.weights.double(),
    )
    return up, out


def weight_bytes(layer: Layer, rows: Tensor, stored: str) -> int:
    """Bytes of the rows that the picks name, each read once."""
    used = rows.unique()
    count = layer.shape.experts
    row = sum(part[0].numel() * part.element_size() for part in (layer.gate_up, layer.down))
    if stored == "full":
        return len(used) * row
    bases = layer.gate_up_differences.base_of[(used[used >= count] - count).long()]
    stored_row = sum(
        part[0].numel() * part.element_size()
        for d in (layer.gate_up_differences, layer.down_differences)
        for part in (d.packed, d.scales)
    )
    return len(torch.cat([used[used < count], bases]).unique()) * row + len(bases) * stored_row


def product_case(layer: Layer, tokens: int, use: str, stock: dict[int, float], draw: torch.Generator) -> list[Row]:
    """All systems on one batch. `stock` keeps, by tokens, the time of vLLM on the base alone: what all is held to."""
    cuda, shape = layer.table.is_cuda, layer.shape
    batch = Batch.of(layer, tokens, use, draw)
    like: dict[str, Any] = {"dtype": layer.down.dtype, "device": layer.table.device}
    outs = [torch.empty(batch.rows.numel(), width, **like) for width in (2 * shape.inner, shape.hidden)]
    systems: dict[str, tuple[Product, str]] = {}
    if cuda:
        name = "vLLM's kernel and alignment" if use == "base" else "vLLM's kernel, full rows"
        systems[name] = (vllm_s(layer, batch, "theirs" if use == "base" else "ours"), "full")
    for stored in ("full", "differences"):
        product, words = ours(layer, batch, stored)
        systems[f"ours, {stored} ({words})"] = (product, stored)
    found = list[Row]()
    wanted = {stored: reference(layer, batch, stored) for stored in ("full", "differences")}
    in_full: float | None = None
    for name, (product, stored) in systems.items():
        case = f"{tokens} tokens, {use}: {name}"
        for out in outs:
            out.fill_(float("nan"))
        product(*outs)
        pairs = zip(outs, wanted[stored], strict=True)
        error = max(float((out.double() - want).norm() / want.norm()) for out, want in pairs)
        worst = WORST_ERROR if cuda else 1e-5
        found.append(Row(case, "relative error", error, goal=f"below {worst:g}", met=error < worst))

        def step(product: Product = product) -> None:
            for _ in range(LAYERS if cuda else 1):
                product(*outs)

        value, low, high = (1000 * ms / (LAYERS if cuda else 1) for ms in timed(captured(step) if cuda else step, cuda))
        held, goal, met = stock.get(tokens), None, None
        if held is not None and use == "base":
            goal, met = "at most 1 % over vLLM's", value <= 1.01 * held
        elif held is not None and in_full is not None and stored == "differences":
            goal, met = "at most half of full rows' overhead", value - held <= (in_full - held) / 2
        found.append(Row(case, "both products", value, "us", low, high, held, goal, met))
        read = weight_bytes(layer, batch.rows, stored)
        found.append(Row(case, "weights read", read / 1e6, "MB"))
        found.append(Row(case, "weights read a second", read / value / 1e6, "TB/s"))
        if cuda and in_full is None:
            in_full = value
            stock.setdefault(tokens, value)
    return found


def align_case(tokens: int, num_rows: int, shape: Shape, device: str, draw: torch.Generator) -> list[Row]:
    """Our alignment and vLLM's of random picks over so many rows."""
    cuda, block = device == "cuda", blocks_of(tokens, 2048, False).m
    rows = torch.randint(0, num_rows, (tokens, shape.top_k), generator=draw, device=device, dtype=torch.int32)
    systems: dict[str, Callable[[], Any]] = {}
    if cuda:
        from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size

        systems["vLLM's"] = lambda: moe_align_block_size(rows, block, num_rows)
    systems["ours"] = lambda: align_rows(rows, block, num_rows)
    found: list[Row] = []
    theirs: float | None = None
    expected = align_rows_torch(rows.cpu(), block, num_rows)
    for name, system in systems.items():
        if not same(Alignment(*system()), expected, block):
            raise ValueError(f"{name} of {tokens} tokens over {num_rows} rows is not what it should be")

        def step(system: Callable[[], Any] = system) -> None:
            for _ in range(20 if cuda else 1):
                system()

        value, low, high = (1000 * ms / (20 if cuda else 1) for ms in timed(captured(step) if cuda else step, cuda))
        goal = "no slower than vLLM's" if theirs is not None else None
        case = f"{tokens} tokens, {num_rows} rows: {name}"
        met = value <= theirs if theirs is not None else None
        found.append(Row(case, "alignment", value, "us", low, high, theirs, goal, met))
        theirs = value if name != "ours" else theirs
    return found


def same(alignment: Alignment, expected: Alignment, block: int) -> bool:
    """Whether two alignments mean the same: equal blocks, and equal picks in each row's, in any order."""
    count = int(expected.padded)
    if int(alignment.padded) != count or alignment.block_rows[: count // block].tolist() != (
        expected.block_rows[: count // block].tolist()
    ):
        return False
    of_row = expected.block_rows[: count // block].repeat_interleave(block)
    mine, theirs = (a.sorted_ids[:count].cpu().long() + of_row.long() * 2**32 for a in (alignment, expected))
    return torch.equal(mine.sort().values, theirs.sort().values)


def main(
    seconds: Annotated[float, typer.Option(help="no further case is begun after so long")] = 100.0,
    blocks: Annotated[bool, typer.Option(help="which block sizes are best instead")] = False,
    dry: Annotated[bool, typer.Option(help="small shapes on the CPU, no results written")] = False,
    out: Annotated[Path, typer.Option(help="folder of the results")] = ROOT / "benchmarks" / "results",
) -> None:
    """Measure; prints a table and writes results/expert_rows.json."""
    if blocks:
        from benchmarks.expert_rows_blocks import measure_blocks

        measure_blocks(seconds, dry, out)
        return
    device, dtype = ("cpu", torch.float32) if dry else ("cuda", torch.bfloat16)
    shape = DRY if dry else LITE
    draw = torch.Generator(device).manual_seed(0)
    began = time.monotonic()
    rows: list[Row] = []

    def run(what: str, case: Callable[[], list[Row]]) -> None:
        if time.monotonic() - began > seconds:
            print(f"time is up before {what}")
            return
        try:
            rows.extend(case())
            print(f"{what} after {time.monotonic() - began:.0f} s", flush=True)
        except Exception as error:
            print(f"{what}: {type(error).__name__}: {error}"[:2000], flush=True)
        if rows and not dry:
            write_results("expert_rows", "python -m benchmarks.expert_rows", rows, out)

    with torch.inference_mode():
        for tokens in (1, 8) if dry else ALIGNED:
            for count in (shape.experts, RESERVED):
                run(f"alignment of {tokens} over {count}", partial(align_case, tokens, count, shape, device, draw))
        layer = make_layer(shape, device, dtype, draw)
        stock: dict[int, float] = {}
        for tokens in (1, 8) if dry else TOKENS:
            for use in ("base", "uniform", "skewed"):
                run(f"products of {tokens}, {use}", partial(product_case, layer, tokens, use, stock, draw))
    print_table(rows, "expert rows: one layer's alignment and products")


if __name__ == "__main__":
    typer.run(main)
