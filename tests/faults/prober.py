"""Asks every replica of a running service what it holds, past its gateway and its registry.

A process of its own, because it joins the service's Ray. Usage: prober.py GCS_ADDRESS TOKEN_FILE EXPERT. For each line
on standard input it prints one line of JSON: the list of reports.
"""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import asdict


async def answer(expert: str) -> None:
    """Until the end of standard input."""
    import orjson
    from ray import serve

    from signalbox.serving.adapter_fleet import probe

    handle = serve.get_deployment_handle(f"expert-{expert}", "signalbox")
    loop = asyncio.get_running_loop()
    while await loop.run_in_executor(None, sys.stdin.readline):
        reports = await probe(handle)
        print(orjson.dumps([asdict(report) for report in reports]).decode(), flush=True)


def main(address: str, token: str, expert: str) -> None:
    os.environ.update(
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN_PATH=token,
        RAY_SERVE_THROUGHPUT_OPTIMIZED="1",
        RAY_USAGE_STATS_ENABLED="0",
        RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
    )
    import ray

    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    asyncio.run(answer(expert))


if __name__ == "__main__":
    main(*sys.argv[1:])
