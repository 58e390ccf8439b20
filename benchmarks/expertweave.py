"""`make bench-expertweave`, on a GPU machine: ESFT adapters over one base inside vLLM, against the base alone.

The shape is DeepSeek-V2-Lite's (16B), the weights are random with a planted structure (`expertweave_worker`), adapters
have the sizes of ExpertWeave's table 1 (arXiv 2508.17624). Stock vLLM and ours are two processes that hold the GPU
together and are measured in turn, so that what drifts, drifts for both.

    python -m benchmarks.expertweave              exactness, decode, prompts, Poisson arrivals, loading; then most of it
                                                  again with tuned experts as 4-bit differences to the base's
    python -m benchmarks.expertweave --rows full  whole rows alone
    python -m benchmarks.expertweave --parts poisson          arrivals alone, into a file of their own
    python -m benchmarks.expertweave --quick      few steps
    python -m benchmarks.expertweave --shape olmoe-1b-7b      exactness alone, for another family
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.expertweave_checks import check_exactness, measure_loading
from benchmarks.expertweave_setup import DEEPSEEK, E_MAX, OLMOE, SEED, Peer, Plan, mark
from benchmarks.expertweave_speed import measure_decode, measure_poisson, measure_prompts
from benchmarks.report import RESULTS, Row, print_table, write_results


def measure(plan: Plan, stock: Peer, ours: Peer, memory: Path, finished: Callable[[], object]) -> None:
    """Every part of the plan with one way to store rows."""
    slots = 20
    tuned = plan.shape.tuned_experts(slots)
    for use in plan.uses:
        for peer in (stock, ours):
            peer("plant", tuned, use == "skewed", SEED)
        if use == plan.uses[0]:
            ours("warm_up")
            stock("warm_up")
            if "exactness" in plan.parts:
                check_exactness(plan, stock, ours, tuned)
                mark("exactness")
            for slot, adapter in enumerate(tuned):
                ours("load", slot, slot, {str(layer): ids for layer, ids in adapter.items()}, 1e-3)
            mark(f"{slots} adapters: {ours('rpc', 'expertweave_memory')}")
            plan.bandwidth = plan.bandwidth or stock("rpc", "bench_bandwidth")
            plan.rows.append(Row("device copy", "bandwidth", plan.bandwidth / 1e12, "TB/s"))
        if "decode" in plan.parts:
            measure_decode(plan, stock, ours, use, plan.bandwidth)
            mark(f"decode, {use}")
        if "prompts" in plan.parts:
            measure_prompts(plan, stock, ours, use)
            mark(f"prompts, {use}")
        if "poisson" in plan.parts and use == plan.uses[-1]:
            measure_poisson(plan, stock, ours, use)
            mark(f"Poisson, {use}")
        finished()
    if "loading" in plan.parts:
        ours("unload", slots - 1)
        measure_loading(plan, ours, tuned[0], memory)
        mark("loading")
        finished()


def compare_formats(full: Path, differences: Plan) -> None:
    """How much of the overhead of whole rows is left with differences, at the same cases, each beside its own stock."""
    if not full.exists():
        return
    found = json.loads(full.read_text())["rows"]
    overhead = {row["case"]: row["value"] for row in found if row["metric"] == "overhead"}
    last = f"batch {differences.batches[-1]}"
    for row in list(differences.rows):
        whole = overhead.get(row.case, 0.0)
        if row.metric == "overhead" and row.case.startswith("20 adapters") and whole > 0:
            share, goal = row.value / whole, "at most 0.5" if row.case.endswith(last) else None
            met = share <= 0.5 if goal else None
            differences.rows.append(Row(row.case, "share of the overhead of whole rows", share, "", goal=goal, met=met))


def main(
    rows: Annotated[str, typer.Option(help="full, difference4, or both: full,difference4")] = "full,difference4",
    quick: Annotated[bool, typer.Option(help="few steps")] = False,
    shape: Annotated[str, typer.Option(help="deepseek-v2-lite, or olmoe-1b-7b for exactness alone")] = DEEPSEEK.name,
    parts: Annotated[str, typer.Option(help="only these: decode, prompts, poisson, exactness, loading")] = "",
    out: Annotated[Path, typer.Option(help="folder of the results")] = RESULTS,
    memory: Annotated[Path, typer.Option(help="folder in memory for the adapter's files")] = Path("/dev/shm/adapter"),
) -> None:
    """Measure and write benchmarks/results/expertweave.json and expertweave_difference4.json."""
    model = {found.name: found for found in (DEEPSEEK, OLMOE)}[shape]
    arguments = {
        "model": str(model.folder),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": 4608,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 8192,
        "kv_cache_memory_bytes": 3 << 30,
        "gpu_memory_utilization": 0.1,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        # Beyond vLLM's own 512 too, or prompts beside running requests wait for the host and not for the GPU.
        "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 544, 640, 1024, 1088],
        "seed": 0,
    }
    command = f"python -m benchmarks.expertweave --rows {rows} --shape {shape}" + (f" --parts {parts}" if parts else "")
    experts = sum(len(ids) for adapter in model.tuned_experts(20) for ids in adapter.values())
    stock = Peer("stock", arguments, None)
    plans: dict[str, Plan] = {}
    for name in rows.split(","):
        plan = plans[name] = Plan(model, difference=name == "difference4")
        if plan.difference:
            plan.counts, plan.alphas, plan.rates, plan.parts = (20,), (1.0,), (5,), ("exactness", "decode", "poisson")
        if model is OLMOE:
            plan.uses, plan.parts = ("uniform",), ("exactness",)
        if parts:
            plan.parts = tuple(parts.split(","))
            plan.alphas = plan.alphas if "decode" in plan.parts else plan.alphas[:1]
        if quick:
            plan.rounds, plan.steps, plan.batches, plan.counts = 1, 20, (1, 32, 256), (20,)
            plan.alphas, plan.rates, plan.poisson_s = (1.0,), (3,), 6.0
        room = int(experts * model.expert_bytes * (0.28 if plan.difference else 1.0) * 1.02) + (1 << 30)
        settings = {"slots": 20, "experts_per_layer": E_MAX, "memory_bytes": room, "rows": name}
        ours = Peer(f"ours, {name}", arguments, settings)
        if len(plans) == 1:
            mark(f"stock started in {stock.started():.0f} s")
        mark(f"ours, {name}, started in {ours.started():.0f} s")
        words = (shape, name, *parts.split(","))
        file = "_".join(["expertweave"] + [word for word in words if word not in (DEEPSEEK.name, "full", "")])
        measure(plan, stock, ours, memory, partial(write_results, file, command, plan.rows, out))
        ours.stop()
        if plan.difference:
            compare_formats(out / "expertweave.json", plan)
            write_results(file, command, plan.rows, out)
        print_table(plan.rows, f"ExpertWeave, rows {name}")
    stock.stop()


if __name__ == "__main__":
    typer.run(main)
