"""An engine's child processes: all of them found, ended for good, and started one engine at a time on a GPU."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import psutil


def kill(processes: list[Any]) -> None:
    """Kill these children and all below them, and wait until they are gone."""
    for victim in with_children(processes):
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    for process in processes:
        process.join(timeout=5.0)


def with_children(processes: list[Any]) -> list[psutil.Process]:
    """Those that live, and all below them. (What is below a dead one ends by itself, see `vllm_process`.)"""
    found: list[psutil.Process] = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_alive():  # else its number may be another's by now
                own = psutil.Process(process.pid)
                found += [own, *own.children(recursive=True)]
    return found


@contextlib.asynccontextmanager
async def alone_on_gpus(on_wait: Callable[[str], None]) -> AsyncIterator[None]:
    """Hold the right to start an engine on this process's GPUs; no matter on CPU.

    vLLM sizes its KV cache by the memory that is free before and after a trial run: another engine that starts on
    the same GPU meanwhile would spoil the sum. The locks (bound abstract Unix sockets) end with this process.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    async with contextlib.AsyncExitStack() as stack:
        for gpu in sorted(gpu.strip() for gpu in visible.split(",") if gpu.strip()):
            lock = stack.enter_context(socket.socket(socket.AF_UNIX))
            while True:
                try:
                    lock.bind(f"\0signalbox-gpu-{gpu}")
                    break
                except OSError:
                    on_wait(gpu)
                    await asyncio.sleep(0.5)
        yield
