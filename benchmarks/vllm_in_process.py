"""vLLM's AsyncLLM without a server, under the closed-loop load of benchmarks/vllm.py, which starts this process.

A job as JSON on standard input; the last line of standard output is the result.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from typing import Any

from benchmarks.load import Result
from benchmarks.vllm import requests_of, summary
from signalbox.experts import vllm_versions
from signalbox.experts.base import SamplingParams

VOCABULARY = 250  # prompts are of the byte tokens, as over HTTP
TEMPLATE_TOKENS = 18  # that the shapes' chat template adds


async def run(core: vllm_versions.Core, streams: int, job: dict[str, Any], seed: int) -> list[Result]:
    """One run of one level."""
    rng = random.Random(seed)
    size = job["prompt"] + TEMPLATE_TOKENS
    prompts = [[rng.randrange(VOCABULARY) for _ in range(size)] for _ in range(requests_of(streams, job["dry"]))]
    params = vllm_versions.sampling_params(
        SamplingParams(temperature=1.0, ignore_eos=True), max_tokens=job["tokens"], stop=(), extra={}
    )
    results: list[Result] = []

    async def client() -> None:
        while prompts:
            result = Result("", time.monotonic())
            async for output in core.generate(prompts.pop(), params, f"{seed}-{len(prompts)}"):
                result.last = time.monotonic()
                result.first = result.first or result.last
                result.tokens += len(output.outputs[0].token_ids)
                result.reads += 1
            results.append(result)

    await asyncio.gather(*(client() for _ in range(streams)))
    return results


async def main(job: dict[str, Any]) -> None:
    """Every level, `rounds` times after a warm-up."""
    vllm_versions.prepare_environment()
    core = await asyncio.to_thread(vllm_versions.Core, job["arguments"], lambda *figures: None)
    await run(core, max(job["levels"]), job, 0)
    found: dict[int, Any] = {}
    for streams in job["levels"]:
        found[streams] = [summary(await run(core, streams, job, 100 * streams + i)) for i in range(job["rounds"])]
    print(json.dumps(found), flush=True)
    await asyncio.to_thread(core.shutdown)


if __name__ == "__main__":
    asyncio.run(main(json.load(sys.stdin)))
