"""`make bench-vllm`: our whole service over HTTP with `auto`, vLLM's own server, and vLLM in process, on one GPU.

The three serve the same model shape (random weights) with the same engine arguments, one after another, and answer
the same closed-loop load: N streams, fixed prompt and answer lengths, prompts that share no prefix. Each level is run
several times after a warm-up; figures are medians of the runs, with the least and the greatest.

    python -m benchmarks.vllm --shape llama-3.1-8b
    python -m benchmarks.vllm --dry                    a model of two layers on the CPU: whether it all works
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from benchmarks.load import Result
from benchmarks.report import ROOT, Row, print_table, write_results
from benchmarks.serving_processes import (
    chat,
    environment,
    load,
    our_service,
    percentile,
    random_prompt,
    vllm_server,
)
from benchmarks.shapes import write_router, write_shape

WORK = ROOT / ".run" / "bench-vllm"
SYSTEMS = ("server", "service", "inprocess")
NAMES = {"server": "vLLM's server", "service": "our service, auto", "inprocess": "vLLM in process"}
THROUGHPUT_GOAL, TTFT_GOAL_MS = 0.95, 3.0
DRY_CONFIG = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 2048}
DRY_CONFIG |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}


def requests_of(streams: int, dry: bool) -> int:
    """How many requests a run has: enough that the beginning and the end of the batch weigh little."""
    return 2 * streams if dry else max(8, 4 * streams)


def pool_config(model: Path, expert: dict[str, Any], gateways: int) -> Path:
    """Our service with the model and a second expert that the router never prefers: `auto` has to predict."""
    unused = {
        "engine": "openai",
        "base_url": "http://127.0.0.1:9/v1",
        "model": "never-chosen",
        "price": {"input": 9, "output": 9},
    }
    config = {
        "server": {"gateways": gateways},
        "experts": {"model": {"engine": "vllm", "model": str(model), **expert}, "unused": unused},
        "routers": {"default": {"kind": "lexical", "artifact": str(WORK / "router")}},
    }
    write_router(WORK / "router", {"model": "chat-8b", "unused": "none"})
    path = WORK / "service.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


async def measure(
    port: int, model: str, streams: int, *, prompt: int, tokens: int, seed: int, dry: bool
) -> list[Result]:
    """One run of one level; every answer complete, or an error."""
    rng = random.Random(seed)
    bodies = [("", chat(model, random_prompt(rng, prompt), tokens)) for _ in range(requests_of(streams, dry))]
    results = await load(port, streams, bodies)
    failed = [r for r in results if r.error or r.tokens != tokens]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(results)} answers failed: {failed[0]}")
    return results


def summary(results: list[Result]) -> dict[str, float]:
    """Throughput in tokens/s over the whole run, times in ms."""
    seconds = max(r.last for r in results) - min(r.began for r in results)
    ttft = [1000 * (r.first - r.began) for r in results]
    tpot = [1000 * (r.last - r.first) / max(1, r.tokens - 1) for r in results]
    return {
        "throughput": sum(r.tokens for r in results) / seconds,
        "TTFT p50": percentile(ttft, 0.5),
        "TTFT p99": percentile(ttft, 0.99),
        "time per token p50": percentile(tpot, 0.5),
        "tokens a read": sum(r.tokens for r in results) / max(1, sum(r.reads for r in results)),
    }


async def over_http(
    port: int, model: str, levels: list[int], rounds: int, *, warm: bool = True, seed: int = 0, **shape: Any
) -> dict[int, list[Any]]:
    """Every level, `rounds` times after a warm-up."""
    found: dict[int, list[Any]] = {}
    if warm:
        await measure(port, model, max(levels), seed=0, **shape)
    for streams in levels:
        runs = [await measure(port, model, streams, seed=100 * streams + seed + i, **shape) for i in range(rounds)]
        found[streams] = [summary(run) for run in runs]
        print(f"  {streams} streams: {found[streams][-1]}", flush=True)
    return found


def in_process(
    arguments: dict[str, Any], levels: list[int], rounds: int, shape: dict[str, Any]
) -> dict[int, list[Any]]:
    """vLLM's AsyncLLM without any server, in a fresh process."""
    job = json.dumps({"arguments": arguments, "levels": levels, "rounds": rounds, **shape})
    command = [sys.executable, "-m", "benchmarks.vllm_in_process"]
    with (WORK / "inprocess.log").open("wb") as log:
        done = subprocess.run(
            command, input=job.encode(), stdout=subprocess.PIPE, stderr=log, env=environment(), cwd=ROOT, check=False
        )
    if done.returncode:
        raise RuntimeError(f"vLLM in process failed:\n{(WORK / 'inprocess.log').read_text()[-4000:]}")
    return {int(streams): runs for streams, runs in json.loads(done.stdout.splitlines()[-1]).items()}


@contextlib.contextmanager
def our_port(config: Path, log: Path) -> Iterator[int]:
    """Our service; yields its port."""
    with our_service(config, log) as (port, _):
        yield port


def rows_of(shape: str, found: dict[str, dict[int, list[Any]]]) -> list[Row]:
    """Every figure with the server's as reference, and the goals of the service."""
    rows = []
    units = {"throughput": "tokens/s", "tokens a read": ""}
    for system, levels in found.items():
        for streams, runs in levels.items():
            case = f"{shape}, {streams} streams, {NAMES[system]}"
            for metric in runs[0]:
                values = [run[metric] for run in runs]
                theirs = [run[metric] for run in found.get("server", {}).get(streams, ()) if metric in run]
                reference = statistics.median(theirs) if theirs else None
                value, goal, met = statistics.median(values), None, None
                if system == "service" and reference is not None:
                    if metric == "throughput":
                        goal, met = f"at least {THROUGHPUT_GOAL} of the server's", value >= THROUGHPUT_GOAL * reference
                    elif metric == "TTFT p50":
                        goal, met = f"at most {TTFT_GOAL_MS:g} ms more", value <= reference + TTFT_GOAL_MS
                rows.append(
                    Row(case, metric, value, units.get(metric, "ms"), min(values), max(values), reference, goal, met)
                )
    return rows


def main(
    shape: Annotated[str, typer.Option(help="folder of benchmarks/shapes")] = "llama-3.1-8b",
    streams: Annotated[str, typer.Option(help="levels of load, separated by commas")] = "1,16,64,256",
    systems: Annotated[str, typer.Option(help=f"which to measure, of {', '.join(SYSTEMS)}")] = ",".join(SYSTEMS),
    prompt: Annotated[int, typer.Option(help="prompt tokens, before the chat template")] = 512,
    tokens: Annotated[int, typer.Option(help="tokens of each answer")] = 128,
    rounds: Annotated[int, typer.Option(help="runs of each level")] = 3,
    memory: Annotated[float, typer.Option(help="share of the GPU's memory")] = 0.9,
    gateways: Annotated[int, typer.Option(help="gateway processes of our service")] = 2,
    messages: Annotated[float, typer.Option(help="our max_messages_per_s")] = 4000.0,
    eager: Annotated[bool, typer.Option(help="no compilation, no CUDA graphs")] = False,
    together: Annotated[
        float, typer.Option(help="server and service side by side, each with this much KV cache, GiB; measured in turn")
    ] = 0.0,
    hold: Annotated[
        Path | None, typer.Option(help="with --together: once both are up, wait until this file is there")
    ] = None,
    dry: Annotated[bool, typer.Option(help="a tiny model on the CPU, short runs, no results written")] = False,
    out: Annotated[Path, typer.Option(help="folder of the results")] = ROOT / "benchmarks" / "results",
) -> None:
    """Measure; prints a table and writes results/vllm_SHAPE.json."""
    WORK.mkdir(parents=True, exist_ok=True)
    levels = [int(level) for level in streams.split(",")]
    chosen = systems.split(",")
    if dry:
        levels, rounds, prompt, tokens, eager, gateways = [1, 4], 1, 32, 16, True, 1
    model = write_shape(shape, WORK / "shapes", **(DRY_CONFIG if dry else {}))
    most = max(256, *levels)
    length = 1024 if dry else 4096
    arguments: dict[str, Any] = {"model": str(model), "load_format": "dummy", "max_model_len": length}
    arguments |= {"max_num_seqs": most, "enforce_eager": eager}
    expert: dict[str, Any] = {"load_format": "dummy", "max_model_len": length, "max_running": most}
    expert |= {"enforce_eager": eager, "max_messages_per_s": messages}
    if dry:
        arguments["dtype"] = expert["dtype"] = "float32"
        expert["gpus"] = 0
    else:
        expert["gpus"] = 1
        arguments["gpu_memory_utilization"] = expert["gpu_memory"] = 0.3 if together else memory
    if together:  # set, not measured: two that start at once would each count the other's memory as their own
        arguments["kv_cache_memory_bytes"] = int(together * 2**30)
        expert["engine_args"] = {"kv_cache_memory_bytes": int(together * 2**30)}
    said: dict[str, Any] = {"prompt": prompt, "tokens": tokens, "dry": dry}
    found: dict[str, dict[int, list[Any]]] = {}

    def keep(system: str, began: float) -> None:
        """After each system, in case that the machine's time ends."""
        print(f"  done after {time.monotonic() - began:.0f} s", flush=True)
        if dry:
            return
        options = f"--shape {shape} --streams {streams} --prompt {prompt} --tokens {tokens} --rounds {rounds}"
        options += f" --gateways {gateways} --messages {messages:g}" + " --eager" * eager
        options += f" --together {together:g}" if together else f" --memory {memory:g}"
        write_results(f"vllm_{shape}", f"python -m benchmarks.vllm {options}", rows_of(shape, found), out)

    def serve(system: str) -> contextlib.AbstractContextManager[int]:
        """One of the two that listen, on its way up; yields its port."""
        if system == "server":
            return vllm_server(arguments, WORK / "server.log")
        return our_port(pool_config(model, expert, gateways), WORK / "service.log")

    listening = [system for system in chosen if system != "inprocess"]
    models = {"server": "model", "service": "auto"}
    began = time.monotonic()
    if together and listening:
        with contextlib.ExitStack() as stack, ThreadPoolExecutor() as starting:
            print(f"{' and '.join(NAMES[system] for system in listening)}: starting", flush=True)
            contexts = [serve(system) for system in listening]
            ports = list(starting.map(stack.enter_context, contexts))
            print(f"  ready after {time.monotonic() - began:.0f} s", flush=True)
            while hold is not None and not hold.exists():
                time.sleep(0.5)
            for turn in range(rounds):  # in turn, so that what changes with time falls on both
                for system, port in zip(listening, ports, strict=True):
                    runs = asyncio.run(over_http(port, models[system], levels, 1, warm=not turn, seed=turn, **said))
                    for level, run in runs.items():
                        found.setdefault(system, {}).setdefault(level, []).extend(run)
                    keep(system, began)
    else:
        for system in listening:
            began = time.monotonic()
            print(f"{NAMES[system]}: starting", flush=True)
            with serve(system) as port:
                print(f"  ready after {time.monotonic() - began:.0f} s", flush=True)
                found[system] = asyncio.run(over_http(port, models[system], levels, rounds, **said))
            keep(system, began)
    if "inprocess" in chosen:
        began = time.monotonic()
        print(f"{NAMES['inprocess']}: starting", flush=True)
        found["inprocess"] = in_process(arguments, levels, rounds, said)
        keep("inprocess", began)
    print_table(rows_of(shape, found), f"{shape}: RANDOM WEIGHTS, {prompt} prompt tokens, {tokens} answer tokens")


if __name__ == "__main__":
    typer.run(main)
