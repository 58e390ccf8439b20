"""What the vLLM benchmarks start and ask: our service, vLLM's own server, the load generator."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks.load import Result
from benchmarks.report import ROOT

START_S = 420.0


def free_port() -> int:
    """A TCP port of loopback that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment() -> dict[str, str]:
    """Ours, with the repository's packages found by child processes too."""
    paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


@contextlib.contextmanager
def process(command: Sequence[str], log: Path, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process group that is told to stop in the end, and killed if it does not."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        child = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=environment() | variables, start_new_session=True
        )
    try:
        yield child
    finally:
        child.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def await_ready(child: subprocess.Popen[bytes], url: str, log: Path, ready: Any = lambda reply: True) -> None:
    """Until GET url answers 200 and `ready` likes the reply. Raises `RuntimeError` with the end of the log."""
    deadline = time.monotonic() + START_S
    with httpx.Client(trust_env=False, timeout=5.0) as client:
        while time.monotonic() < deadline and child.poll() is None:
            with contextlib.suppress(httpx.HTTPError, ValueError):
                reply = client.get(url)
                if reply.status_code == 200 and ready(reply):
                    return
            time.sleep(0.3)
    raise RuntimeError(f"{child.args!r} is not ready; the end of {log}:\n{log.read_text(errors='replace')[-6000:]}")


@contextlib.contextmanager
def our_service(config: Path, log: Path) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """`signalbox serve`, ready with all its experts; yields its port and process."""
    port = free_port()
    command = [sys.executable, "-c", "from signalbox.serving.cli import app; app()", "serve", str(config)]

    def all_ready(reply: httpx.Response) -> bool:
        return all(state["ready"] for state in reply.json()["experts"].values())

    with process(command, log, SIGNALBOX__SERVER__PORT=str(port)) as child:
        await_ready(child, f"http://127.0.0.1:{port}/readyz", log, all_ready)
        yield port, child


@contextlib.contextmanager
def vllm_server(arguments: dict[str, Any], log: Path) -> Iterator[int]:
    """vLLM's own OpenAI server with these engine arguments; yields its port."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", "model", "--disable-uvicorn-access-log"]
    for name, value in arguments.items():
        flag = f"--{name.replace('_', '-')}"
        command += [flag] if value is True else [] if value is False else [flag, str(value)]
    # As in our workers, so that the two differ in nothing but the server.
    variables = {
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    variables |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_HOST_IP": "127.0.0.1"}
    with process(command, log, **(variables | {k: os.environ[k] for k in variables if k in os.environ})) as child:
        await_ready(child, f"http://127.0.0.1:{port}/v1/models", log)
        yield port


def chat(model: str, prompt: str, tokens: int) -> dict[str, Any]:
    """A streaming chat request for exactly `tokens` tokens.

    Sampled: greedily, random weights may repeat one token for ever, a lone byte that has no text; and no cache answers.
    """
    return {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "temperature": 1.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def random_prompt(rng: random.Random, size: int) -> str:
    """Exactly `size` bytes, unlike all others: no prefix is ever cached."""
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz ") for _ in range(size))


async def generated(module: str, job: dict[str, Any]) -> list[dict[str, Any]]:
    """What a load generator, a module run in a process of its own, says of a job. Raises `RuntimeError`."""
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        module,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=environment(),
        cwd=ROOT,
    )
    out, _ = await child.communicate(json.dumps(job).encode())
    if child.returncode:
        raise RuntimeError(f"the load generator ended with exit code {child.returncode}")
    found: list[dict[str, Any]] = json.loads(out)
    return found


async def load(port: int, streams: int, bodies: list[tuple[str, dict[str, Any]]], seconds: float = 0) -> list[Result]:
    """Run the load generator in its own process."""
    job = {"port": port, "path": "/v1/chat/completions", "streams": streams, "bodies": bodies, "seconds": seconds}
    return [Result(**result) for result in await generated("benchmarks.load", job)]


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of them lie; the nearest one that was measured."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
