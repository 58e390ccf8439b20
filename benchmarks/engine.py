"""`make bench-engine`: tokens per second of our engine against transformers' own padded `generate`, same run.

Both use the same weights in the same process, the same prompts, the same number of greedy tokens; rounds of the two
alternate. Time to first token is ours as a client of the engine sees it; `generate` has none to compare with until
it ends, so its first forward pass is timed by a stopping criterion.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.report import Row, print_table, write_results
from signalbox.experts.base import GenerateRequest, SamplingParams
from signalbox.experts.catalog import TransformersExpert
from signalbox.experts.model_runner import best_dtype
from signalbox.experts.packed_batch import ATTENTION
from signalbox.experts.transformers_engine import TransformersEngine
from signalbox.serving.config import load_config

COMMAND = "make bench-engine"
NEW_TOKENS = 64
ROUNDS = 3
GOAL = 0.9
PROMPTS = [
    "What is the capital of France?",
    "Write a Python function that returns the n-th Fibonacci number, and explain how it works in two sentences.",
    "I lost my card yesterday. What should I do now?",
    "Tell me a short story about a fox who lives near a railway line and watches the trains go by every evening.",
    "Solve: a train travels 120 km in 1.5 hours. What is its average speed in km/h? Show each step.",
    "List three uses of a signal box.",
    "Translate 'good morning' into German, French and Spanish.",
    "Why is the sky blue? Answer for a child of eight, without any technical term, in at most five sentences.",
]


async def ours(engine: TransformersEngine, prompts: list[str]) -> tuple[float, list[float]]:
    """Seconds for all prompts at once, and each one's milliseconds to the first token."""

    async def one(i: int, prompt: str) -> float:
        request = GenerateRequest(
            f"bench-{i}",
            prompt=prompt,
            sampling=SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True),
        )
        first = None
        async for chunk in engine.generate(request):
            if first is None:
                first = time.perf_counter()
            last = chunk
        assert first is not None and last.usage is not None and last.usage.completion_tokens == NEW_TOKENS
        return 1000 * (first - started)

    started = time.perf_counter()
    ttft = await asyncio.gather(*(one(i, p) for i, p in enumerate(prompts)))
    return time.perf_counter() - started, list(ttft)


def reference(model: Any, tokenizer: Any, prompts: list[str]) -> tuple[float, float]:
    """Seconds of transformers' padded `generate`, and milliseconds to the end of its first step."""
    first: list[float] = []

    def watch(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        first.append(time.perf_counter())
        return torch.zeros(ids.shape[0], dtype=torch.bool)

    started = time.perf_counter()
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    out = model.generate(
        **batch,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        stopping_criteria=[watch],
    )
    assert out.shape[1] == batch["input_ids"].shape[1] + NEW_TOKENS
    return time.perf_counter() - started, 1000 * (first[0] - started)


def spread(case: str, metric: str, values: list[float], unit: str = "", **rest: Any) -> Row:
    """Median, least and greatest of the rounds."""
    return Row(case, metric, statistics.median(values), unit, min(values), max(values), **rest)


async def bench(name: str, config: TransformersExpert) -> list[Row]:
    engine = TransformersEngine(name, config)
    await engine.start()
    runner = engine.runner
    if runner.tokenizer.pad_token is None:
        runner.tokenizer.pad_token = runner.tokenizer.eos_token
    rows = []
    for count in (1, 4, 16):
        prompts = (PROMPTS * 2)[:count]
        own, theirs, ttft, their_ttft = [], [], [], []
        for round_ in range(ROUNDS + 1):
            seconds, firsts = await ours(engine, prompts)
            runner.model.set_attn_implementation("sdpa")
            their_seconds, their_first = await asyncio.to_thread(reference, runner.model, runner.tokenizer, prompts)
            runner.model.set_attn_implementation(ATTENTION)
            if round_:  # the first round warms both up
                own.append(count * NEW_TOKENS / seconds)
                theirs.append(count * NEW_TOKENS / their_seconds)
                ttft += firsts
                their_ttft.append(their_first)
        case = f"{name} ({str(runner.dtype).removeprefix('torch.')}), {count} at once"
        ratios = [a / b for a, b in zip(own, theirs, strict=True)]
        share = statistics.median(ratios)
        rows += [
            spread(case, "throughput", own, "tokens/s", reference=statistics.median(theirs)),
            spread(case, "share of generate's throughput", ratios, goal=f"at least {GOAL}", met=share >= GOAL),
            spread(case, "time to first token", ttft, "ms", reference=statistics.median(their_ttft)),
        ]
    memory = engine.state().memory_bytes / 2**20
    rows.append(Row(case, "memory of weights and KV cache", memory, "MiB"))
    resident = psutil.Process().memory_info().rss / 2**20
    rows.append(Row(case, "resident memory of the process", resident, "MiB"))
    await engine.close()
    return rows


async def main() -> None:
    """Run every transformers expert of the quickstart pool."""
    pool = load_config(Path("examples/quickstart.yaml")).experts
    rows = []
    for name, config in pool.items():
        if isinstance(config, TransformersExpert) and (len(sys.argv) < 2 or name in sys.argv[1:]):
            native = best_dtype(torch.device("cpu"))
            for dtype in dict.fromkeys((native, torch.float32)):  # float32 is what CPUs without bf16 compute in
                settings = {"device": "cpu", "dtype": str(dtype).removeprefix("torch.")}
                rows += await bench(name, config.model_copy(update=settings))
                gc.collect()
    print_table(rows)
    write_results("engine", COMMAND, rows)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    asyncio.run(main())
