"""`python -m benchmarks.expert_rows --blocks`: which block sizes of our grouped product are best at full batches.

The shape, the adapters and how tokens use them are those of benchmarks/expert_rows.py. A step is what a decode step
does in several layers, each with weights, differences and picks of its own: the alignment and both products, in one
CUDA graph. References: vLLM's kernel and alignment on the base alone, vLLM's kernel on rows stored in full. Candidates:
rows in full by our kernel, differences in the base's blocks and in a launch of their own. The first of these are
measured with one second launch, the best of them then with others. Each candidate's results are compared with float64
at skewed use, and those of the base with what they are alone, bit by bit. Kernels are compiled ahead by other
processes, as most of the time would be theirs.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.expert_rows import (
    DRY,
    LITE,
    WORST_ERROR,
    Batch,
    Layer,
    Product,
    Shape,
    in_words,
    make_layer,
    ours,
    reference,
    vllm_s,
)
from benchmarks.report import Row, print_table, write_results
from benchmarks.segmented_lora import captured, timed
from signalbox.kernels.difference_rows import Apart, Blocks, Differences, align_picks, blocks_of, woven_product

TOKENS = (256, 128, 64, 512, 1024, 2048, 32)
USES = ("base", "uniform", "skewed")
LAYERS = 3  # of one step
TOGETHER = {
    32: [Blocks(16, 128, 64, 4, 4)],
    64: [Blocks(16, 64, 128, 4, 4)],
    128: [Blocks(16, 64, 128, 4, 4)],
    256: [Blocks(32, 64, 128, 4, 3)],
    512: [Blocks(64, 128, 64, 4, 3, added=True)],
    1024: [Blocks(128, 128, 64, 8, 3, added=True)],
    2048: [Blocks(128, 128, 64, 8, 3, added=True)],
}
BASE = {
    32: [Blocks(16, 64, 128, 4, 4)],
    64: [Blocks(16, 64, 128, 4, 4), Blocks(32, 64, 128, 4, 3)],
    128: [Blocks(16, 64, 128, 4, 4), Blocks(32, 64, 128, 4, 3), Blocks(32, 128, 64, 4, 3)],
    256: [Blocks(32, 128, 64, 4, 3), Blocks(64, 128, 64, 4, 3), Blocks(64, 128, 64, 8, 3)],
    512: [Blocks(64, 128, 64, 8, 3), Blocks(128, 128, 64, 8, 3)],
    1024: [Blocks(128, 128, 64, 8, 3)],
    2048: [Blocks(128, 128, 64, 8, 3)],
}
APART = [
    Apart(8, 128, 1, 3, 8),
    Apart(8, 64, 1, 3, 16),
    Apart(8, 128, 2, 4, 5),
    Apart(16, 128, 2, 3, 4),
    Apart(16, 256, 4, 3, 2),
    Apart(32, 128, 4, 3, 3),
    Apart(64, 128, 4, 3, 2),
    Apart(64, 128, 8, 3, 2),
]


def both(blocks: Blocks, shape: Shape) -> tuple[Blocks, Blocks]:
    """The blocks for the two linears, whose input features they have to divide."""
    first, second = (blocks._replace(k=min(blocks.k, k & -k)) for k in (shape.hidden, shape.inner))
    return first, second


def compile_ahead(blocks: Blocks, whole: bool, device: str) -> float:
    """In another process: one small product as those to be measured, for the compiler's cache. Seconds taken."""
    began = time.monotonic()
    shape, reserved = LITE, LITE.adapters * LITE.tuned
    rows = torch.zeros(4, shape.top_k, dtype=torch.int32, device=device)
    base_of = torch.zeros(reserved, dtype=torch.int32, device=device)
    wide, narrow = both(blocks, shape)
    linears = ((2 * shape.inner, shape.hidden, shape.top_k, wide), (shape.hidden, shape.inner, 1, narrow))
    for features, inner, top_k, of in linears:
        full = torch.zeros(1, features, inner, dtype=torch.bfloat16, device=device)
        full = full.expand(shape.experts + (reserved if whole else 0), -1, -1)  # as many rows, one in memory
        packed = torch.zeros(1, features, inner // 2, dtype=torch.uint8, device=device)
        scales = torch.zeros(1, inner // 64, features, dtype=torch.bfloat16, device=device)
        differences = None if whole else Differences(packed, scales, base_of)
        woven_product(
            torch.zeros(rows.numel() // top_k, inner, dtype=torch.bfloat16, device=device),
            full,
            rows,
            torch.empty(rows.numel(), features, dtype=torch.bfloat16, device=device),
            align_picks(rows, len(full), of, differences),
            top_k=top_k,
            blocks=of,
            differences=differences,
            topk_weights=torch.ones_like(rows, dtype=torch.float32) if top_k == 1 else None,
            usual_rows=shape.experts,
        )
    if device == "cuda":
        torch.cuda.synchronize()
    return time.monotonic() - began


def compile_all(tokens: Sequence[int], seconds: float, device: str) -> None:
    """Compile what the candidates need, side by side. What fails here fails again, and is reported, where it is due."""
    jobs = {(blocks, True) for t in tokens for blocks in BASE[t]}
    jobs |= {(blocks, False) for t in tokens for blocks in [*TOGETHER[t], blocks_of(t, LITE.hidden, True)]}
    jobs |= {(blocks._replace(apart=APART[0]), False) for t in tokens for blocks in BASE[t]}
    jobs |= {(BASE[tokens[0]][0]._replace(apart=apart), False) for apart in APART}
    workers = min(12, os.cpu_count() or 1)
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        futures = {pool.submit(compile_ahead, *job, device): job for job in sorted(jobs, key=str)}
        if device == "cuda":  # takes long too
            attempt("vLLM", lambda: import_module("vllm.model_executor.layers.fused_moe.fused_moe"))
        for future in as_completed(futures, timeout=seconds):
            if error := future.exception():
                print(f"compiling {in_words(futures[future][0])}: {type(error).__name__}: {error}"[:500], flush=True)
    except TimeoutError:
        print("compiling takes long; the rest is compiled where it is needed", flush=True)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class Cases:
    """The steps of one number of tokens at all uses, and what was measured of them."""

    def __init__(self, layers: Sequence[Layer], tokens: int, draw: torch.Generator) -> None:
        self.layers, self.tokens = layers, tokens
        self.cuda = layers[0].table.is_cuda
        shape, like = layers[0].shape, layers[0].down
        self.batches = {use: [Batch.of(layer, tokens, use, draw) for layer in layers] for use in USES}
        picks = tokens * shape.top_k
        self.outs = [like.new_empty(picks, width) for width in (2 * shape.inner, shape.hidden)]
        self.wanted: dict[str, tuple[Tensor, Tensor]] = {}
        self.rows: list[Row] = []
        self.times: dict[str, dict[str, float]] = {}  # by name of system, by use
        self.failed: set[str] = set()

    def distinct(self, use: str) -> float:
        """Different rows that the picks of a layer name."""
        return sum(len(batch.rows.unique()) for batch in self.batches[use]) / len(self.layers)

    def measure(
        self, name: str, product: Callable[[Layer, Batch], Product], stored: str, uses: Sequence[str] = USES
    ) -> None:
        """Check and time one system at these uses."""
        if "skewed" in uses:
            self.check(name, product, stored)
        for use in uses:
            products = [product(layer, batch) for layer, batch in zip(self.layers, self.batches[use], strict=True)]

            def step(products: list[Product] = products) -> None:
                for each in products:
                    each(*self.outs)

            run = captured(step) if self.cuda else step
            value, low, high = (1000 * ms / len(self.layers) for ms in timed(run, self.cuda))
            self.times.setdefault(name, {})[use] = value
            case = f"{self.tokens} tokens, {use}: {name}"
            self.rows.append(Row(case, "a layer", value, "us", low, high, self.times.get("vLLM's, base", {}).get(use)))

    def check(self, name: str, product: Callable[[Layer, Batch], Product], stored: str) -> None:
        """Raises ValueError where results differ from float64's by more than rounding, or the base's by adapters."""
        layer, batch = self.layers[0], self.batches["skewed"][0]
        if stored not in self.wanted:
            self.wanted[stored] = reference(layer, batch, stored)
        for out in self.outs:
            out.fill_(float("nan"))
        product(layer, batch)(*self.outs)
        worst = WORST_ERROR if self.cuda else 1e-5
        pairs = zip(self.outs, self.wanted[stored], strict=True)
        error = max(float((out.double() - want).norm() / want.norm()) for out, want in pairs)
        if not error < worst:
            raise ValueError(f"{name} is wrong: relative error {error:g}")
        if stored != "differences":
            return
        of_base = (batch.rows < layer.shape.experts).flatten()
        found = [out[of_base] for out in self.outs]
        product(layer, replace(batch, rows=batch.experts))(*self.outs)
        for out, before in zip(self.outs, found, strict=True):
            apart = float((out[of_base].double() - before.double()).abs().max())
            if apart > (0 if self.cuda else worst):  # the reference on a CPU rounds by how many rows there are
                raise ValueError(f"{name} changes the base's results beside adapters' by up to {apart:g}")

    def conclude(self) -> None:
        """Rows that say which candidate with differences is best at each use and at all, and whether it is enough."""
        found = {name: at for name, at in self.times.items() if "differences" in name and len(at) == len(USES)}
        if not found:
            return
        for use in USES:
            self.conclude_one("best", use, min(found, key=lambda name: found[name][use]))
        best = min(found, key=lambda name: sum(found[name].values()))
        for use in USES:
            self.conclude_one("best of all uses", use, best)

    def conclude_one(self, what: str, use: str, name: str) -> None:
        """One of these rows. All on the base is held to vLLM's base, adapters to what rows in full cost."""
        value, base = self.times[name][use], self.times.get("vLLM's, base", {}).get("base")
        case = f"{self.tokens} tokens, {use}: {what.upper()}: {name}"
        if use == "base":
            met = None if base is None else value <= base
            self.rows.append(Row(case, "a layer", value, "us", reference=base, goal="no slower than vLLM's", met=met))
            return
        whole = self.times.get("vLLM's, full rows", {}).get(use)
        self.rows.append(Row(case, "a layer", value, "us", reference=whole))
        if base is not None and whole is not None:
            share = (value - base) / (whole - base)
            self.rows.append(Row(case, "overhead, of full rows'", share, goal="at most half", met=share <= 0.5))


def measure_tokens(cases: Cases, left: Callable[[str], bool]) -> None:
    """All systems at one number of tokens, as far as time is left."""
    tokens, shape = cases.tokens, cases.layers[0].shape
    for use in USES:
        case = f"{tokens} tokens, {use}"
        cases.rows.append(Row(case, "different rows a layer", cases.distinct(use), "rows"))

    def candidate(stored: str, blocks: Blocks) -> str:
        name = f"ours, {stored} {in_words(blocks)}"
        if name in cases.times or name in cases.failed or not left(name):
            return name
        product = partial(
            lambda layer, batch, pair: ours(layer, batch, stored, pair, True)[0], pair=both(blocks, shape)
        )
        if not attempt(name, lambda: cases.measure(name, product, stored)):
            cases.failed.add(name)
        return name

    if cases.cuda:
        stock = partial(vllm_s, assigned="theirs", align=True)
        full = partial(vllm_s, assigned="ours", align=True)
        attempt("vLLM's, base", lambda: cases.measure("vLLM's, base", stock, "full", ("base",)))
        attempt("vLLM's, full rows", lambda: cases.measure("vLLM's, full rows", full, "full"))
    candidate("differences", blocks_of(tokens, shape.hidden, True))
    # The first second launch that gives right results, for all base blocks alike.
    tried = ((candidate("differences", BASE[tokens][0]._replace(apart=apart)), apart) for apart in APART)
    first = next((apart for name, apart in tried if len(cases.times.get(name, ())) == len(USES)), APART[0])
    apart = [(candidate("differences", blocks._replace(apart=first)), blocks) for blocks in BASE[tokens]]
    for blocks in TOGETHER[tokens]:
        candidate("differences", blocks)
    measured = [
        (sum(cases.times[name].values()), blocks)
        for name, blocks in apart
        if len(cases.times.get(name, ())) == len(USES)
    ]
    if measured:
        best = min(measured)[1]
        for other in APART:
            candidate("differences", best._replace(apart=other))
        candidate("full", best)
        align = partial(aligning, blocks=best)
        attempt("alignment", lambda: cases.measure("alignment alone, apart", align, "none", ("base", "uniform")))
    cases.conclude()


def aligning(layer: Layer, batch: Batch, blocks: Blocks) -> Product:
    """Both alignments that differences apart need, and no product."""
    blocks, stored = blocks._replace(apart=APART[0]), layer.gate_up_differences

    def align(up: Tensor, out: Tensor) -> None:
        align_picks(batch.rows, layer.shape.experts, blocks, stored)

    return align


def attempt(name: str, case: Callable[[], Any]) -> bool:
    """Run a case; one that fails is said, and is no result. Whether it went well."""
    try:
        case()
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {error}"[:1000], flush=True)
        return False
    return True


def measure_blocks(seconds: float, dry: bool, out: Path) -> None:
    """Measure all candidates; prints a table and writes expert_rows_blocks.json."""
    began = time.monotonic()
    device, dtype = ("cpu", torch.float32) if dry else ("cuda", torch.bfloat16)
    draw = torch.Generator(device).manual_seed(0)
    rows: list[Row] = []

    def left(what: str) -> bool:
        if time.monotonic() - began < seconds:
            return True
        print(f"time is up before {what}", flush=True)
        return False

    compile_all(TOKENS[-1:] if dry else TOKENS, seconds / 2, device)
    print(f"compiled after {time.monotonic() - began:.0f} s", flush=True)
    with torch.inference_mode():
        layers = [make_layer(DRY if dry else LITE, device, dtype, draw) for _ in range(1 if dry else LAYERS)]
        for tokens in TOKENS[-1:] if dry else TOKENS:
            if not left(f"{tokens} tokens"):
                break
            cases = Cases(layers, tokens, draw)
            measure_tokens(cases, left)
            rows += cases.rows
            print_table(cases.rows, f"expert rows: block sizes for {tokens} tokens")
            print(f"{tokens} tokens after {time.monotonic() - began:.0f} s", flush=True)
            if not dry:
                write_results("expert_rows_blocks", "python -m benchmarks.expert_rows --blocks", rows, out)
