"""`make bench-vllm_pool`: three different models on one GPU under a mixed load that a predictor routes.

Of the pool in examples/gpu.yaml (random weights): each engine's share of memory, of requests and tokens, and how much
slower it answers than alone, so that a starved one shows. Then one engine core is killed under load: what its
requests and the others' came to before, while it was away and after, and how long it was away.

    python -m benchmarks.vllm_pool
    python -m benchmarks.vllm_pool --dry        three tiny models on the CPU, no results written
"""

from __future__ import annotations

import asyncio
import random
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
import typer
import yaml

from benchmarks.load import Result
from benchmarks.report import ROOT, Row, print_table, write_results
from benchmarks.serving_processes import chat, load, our_service, percentile
from benchmarks.shapes import OUT, TOPICS, topical_prompt, write_router, write_shape
from benchmarks.vllm import DRY_CONFIG

WORK = ROOT / ".run" / "bench-vllm-pool"
KILLED = "chat-8b"
PROMPT_BYTES = 256


def pool_config(dry: bool) -> Path:
    """examples/gpu.yaml, its models and its router written; for a dry run with tiny models on the CPU."""
    source = yaml.safe_load((ROOT / "examples" / "gpu.yaml").read_text())
    shapes = WORK / "shapes" if dry else OUT
    for expert in source["experts"].values():
        name = Path(expert["model"]).name
        if dry:
            changes: dict[str, Any] = DRY_CONFIG if name.startswith("llama") else {}
            if not changes:  # MLA has no CPU kernel for small heads: a Llama in its stead
                name, changes = "llama-3.1-8b", {**DRY_CONFIG, "num_hidden_layers": 3}
            out = shapes / Path(expert["model"]).name
            expert |= {"model": str(write_shape(name, out, **changes)), "gpus": 0, "enforce_eager": True}
            expert |= {"dtype": "float32", "max_model_len": 1024}
            expert.pop("engine_args", None)
        else:
            expert["model"] = str(write_shape(name, shapes))
    router = write_router(shapes / "router", {name: name for name in TOPICS})
    source["routers"]["default"]["artifact"] = str(router)
    path = WORK / "pool.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(source))
    return path


def bodies(topics: Sequence[str], count: int, tokens: int, seed: int) -> list[tuple[str, dict[str, Any]]]:
    """Prompts of these topics in turn, asked of `auto:gold`; a label says which topic it was."""
    rng = random.Random(seed)
    asked = [topics[i % len(topics)] for i in range(count)]
    return [(topic, chat("auto:gold", topical_prompt(topic, rng, PROMPT_BYTES), tokens)) for topic in asked]


def cores(service: int) -> dict[str, psutil.Process]:
    """Each expert's engine core, by the title of the Serve replica above it."""
    found: dict[str, psutil.Process] = {}
    for process in psutil.Process(service).children(recursive=True):
        try:
            parent = process.parent()
            title, above = " ".join(process.cmdline()), " ".join(parent.cmdline()) if parent else ""
        except psutil.Error:
            continue
        if "EngineCore" in title:
            found |= {name: process for name in TOPICS if f"expert-{name}" in above}
    return found


def gpu_memory() -> dict[int, float]:
    """GiB of GPU memory by process, as far as the driver tells inside a container."""
    command = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        return {int(pid): float(mib) / 1024 for pid, mib in (line.split(",") for line in lines)}
    except (OSError, subprocess.CalledProcessError, ValueError):
        return {}


def figures(case: str, results: list[Result], seconds: float, alone: dict[str, float] | None = None) -> list[Row]:
    """Rows for each expert: requests, tokens, times; `alone` has each one's time per token without the others."""
    rows = []
    total = sum(r.tokens for r in results)
    for name in TOPICS:
        own = [r for r in results if r.expert == name and not r.error and r.tokens > 1]
        rows.append(Row(f"{case}, {name}", "answers", len(own)))
        if not own:
            continue
        tokens = sum(r.tokens for r in own)
        ttft = [1000 * (r.first - r.began) for r in own]
        tpot = 1000 * statistics.median((r.last - r.first) / (r.tokens - 1) for r in own)
        rows += [
            Row(f"{case}, {name}", "tokens a second", tokens / seconds, "tokens/s"),
            Row(f"{case}, {name}", "share of all tokens", tokens / total),
            Row(f"{case}, {name}", "TTFT p50", percentile(ttft, 0.5), "ms"),
            Row(f"{case}, {name}", "TTFT p99", percentile(ttft, 0.99), "ms"),
            Row(f"{case}, {name}", "time per token p50", tpot, "ms", reference=(alone or {}).get(name)),
        ]
    routed = statistics.mean(r.expert == r.label for r in results if r.expert)
    rows.append(Row(case, "answered by the topic's expert", routed, "share"))
    return rows


async def kill_under_load(
    port: int, service: int, job: list[tuple[str, dict[str, Any]]], streams: int, seconds: float, quiet: float
) -> list[Row]:
    """Load for `seconds`; after `quiet` of them the core of `KILLED` is killed."""
    began = time.monotonic()
    running = asyncio.create_task(load(port, streams, job, seconds))
    await asyncio.sleep(quiet)
    before = cores(service)
    before[KILLED].kill()
    killed = time.monotonic()
    back = None
    async with httpx.AsyncClient(trust_env=False, timeout=5.0) as client:
        gone = False
        while not running.done():
            state = (await client.get(f"http://127.0.0.1:{port}/readyz")).json()["experts"][KILLED]
            gone = gone or not state["ready"]
            if gone and state["ready"] and back is None:
                back = time.monotonic()
            await asyncio.sleep(0.1)
    results = await running
    after = cores(service)
    same = all(after[name].pid == before[name].pid for name in TOPICS if name != KILLED)
    ended = back or began + seconds
    phases = {
        "before the kill": [r for r in results if r.last < killed],
        "while it is away": [r for r in results if killed <= r.began < ended],
        "after": [r for r in results if back and r.began >= back],
    }
    cut = [r for r in results if r.error and r.began < killed]
    others = [r for r in results if r.error and r.expert not in ("", KILLED)]
    late = [r for r in results if r.error and r.began > killed + 1.0]
    case = f"{KILLED} killed under load"
    taken_over = sum(r.label == KILLED and r.expert != KILLED for r in phases["while it is away"] if not r.error)
    rows = [
        Row(case, "away", back - killed if back else float("nan"), "s", goal="back on its own", met=back is not None),
        Row(case, "answers cut that had begun to stream", len(cut)),
        Row(case, "its requests that others answered", taken_over, goal="above 0", met=taken_over > 0),
        Row(case, "failed requests that began a second later", len(late), goal="0", met=not late),
        Row(case, "failed requests of the others", len(others), goal="0", met=not others),
        Row(case, "the others' cores are the same", float(same), goal="1", met=same),
    ]
    for phase, part in phases.items():
        length = max(1e-3, {"before the kill": killed - began, "while it is away": ended - killed}.get(phase, 0) or 1)
        if phase == "after":
            length = max(1e-3, began + seconds - ended)
        rows += figures(phase, part, length) if part else []
    for result in (*late, *others)[:5]:
        print(f"failed: {result}")
    return rows


def main(
    streams: Annotated[int, typer.Option(help="clients of the mixed load")] = 96,
    seconds: Annotated[float, typer.Option(help="length of the mixed load")] = 30.0,
    after_kill: Annotated[float, typer.Option(help="length of the load with the kill")] = 150.0,
    tokens: Annotated[int, typer.Option(help="tokens of each answer")] = 128,
    dry: Annotated[bool, typer.Option(help="tiny models on the CPU, no results written")] = False,
    out: Annotated[Path, typer.Option(help="folder of the results")] = ROOT / "benchmarks" / "results",
) -> None:
    """Measure; prints a table and writes results/vllm_pool.json."""
    if dry:
        streams, seconds, after_kill, tokens = 6, 5.0, 60.0, 32
    config = pool_config(dry)
    began = time.monotonic()
    with our_service(config, WORK / "service.log") as (port, child):
        print(f"ready after {time.monotonic() - began:.0f} s", flush=True)
        rows: list[Row] = []
        memory = gpu_memory()
        declared = yaml.safe_load(config.read_text())["experts"]
        for name, core in cores(child.pid).items():
            if core.pid in memory:
                rows.append(Row(name, "GPU memory", memory[core.pid], "GiB"))
            rows.append(Row(name, "declared share of the GPU", declared[name]["gpus"]))
        each = max(2, streams // len(TOPICS))
        asyncio.run(load(port, streams, bodies(list(TOPICS), 2 * streams, tokens, 1)))  # warms up
        alone: dict[str, float] = {}
        for i, name in enumerate(TOPICS):
            part = asyncio.run(load(port, each, bodies([name], 4 * each, tokens, 10 + i)))
            own = figures(f"alone, {each} streams", part, max(r.last for r in part) - min(r.began for r in part))
            own = [row for row in own if row.case.endswith(name) and row.metric != "share of all tokens"]
            rows += own
            alone[name] = next((row.value for row in own if row.metric == "time per token p50"), float("nan"))
        job = bodies(list(TOPICS), 600, tokens, 2)
        mixed = asyncio.run(load(port, streams, job, seconds))
        rows += figures(f"mixed, {streams} streams", mixed, seconds, alone)
        rows += asyncio.run(kill_under_load(port, child.pid, job, streams, after_kill, min(15.0, after_kill / 4)))
    print_table(rows, "three models on one GPU: RANDOM WEIGHTS")
    if not dry:
        command = f"python -m benchmarks.vllm_pool --streams {streams} --seconds {seconds:g} --tokens {tokens}"
        print(write_results("vllm_pool", command, rows, out))


if __name__ == "__main__":
    typer.run(main)
