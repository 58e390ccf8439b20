"""One vLLM in one process for benchmarks/expertweave.py: stock, or with ExpertWeave; commands come through a pipe.

Steps are made and timed here, by vLLM's own synchronous engine, so that nothing but the engine is in the times.
"""

from __future__ import annotations

import gc
import os
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

Answer = tuple[list[int], list[float]]
WORKER = "benchmarks.expertweave_worker.BenchmarkWorker"


@dataclass(frozen=True)
class Owner:
    """Whose request it is: the task of its tokens, and the slot of its adapter, -1 for the base's."""

    task: int
    slot: int = -1


def serve(pipe: Connection, arguments: dict[str, Any], settings: dict[str, Any] | None) -> None:
    """Start the engine, say so, then answer (method, arguments) until None comes. Runs in a process of its own."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "VLLM_HOST_IP": "127.0.0.1",
    }
    try:
        engine = Engine(arguments, settings)
        pipe.send(("started", engine.start_s))
        while (command := pipe.recv()) is not None:
            method, given = command
            try:
                pipe.send(("done", getattr(engine, method)(*given)))
            except Exception as error:
                traceback.print_exc()
                pipe.send(("error", f"{type(error).__name__}: {error}"))
    except BaseException as error:
        traceback.print_exc()
        pipe.send(("error", f"{type(error).__name__}: {error}"))


class Engine:
    """A vLLM engine and what is measured with it. Prompts are random tokens of a request's task."""

    def __init__(self, arguments: dict[str, Any], settings: dict[str, Any] | None) -> None:
        started = time.perf_counter()
        from vllm import LLM

        from signalbox.experts.expertweave.settings import SLOT_KEY, WeaveSettings

        self._slot_key = SLOT_KEY
        if settings is not None:
            arguments = arguments | WeaveSettings(**settings).engine_arguments(on_cpu=False)
        self._llm = LLM(**(arguments | {"worker_extension_cls": WORKER}))
        self._engine = self._llm.llm_engine
        self._vocabulary = self._engine.model_config.get_vocab_size()
        self._count = 0
        self._names: list[str] = []
        self._tasks = 1
        if settings is not None:
            self.rpc("expertweave_check")
        self.start_s = time.perf_counter() - started
        gc.collect()
        gc.freeze()

    def rpc(self, method: str, *args: Any) -> Any:
        """The first worker's answer."""
        return self._llm.collective_rpc(method, args=args)[0]

    def plant(self, tasks: list[dict[int, list[int]]], skewed: bool, seed: int) -> None:
        """See `BenchmarkWorker.bench_plant`."""
        self._tasks = len(tasks)
        self.rpc("bench_plant", tasks, skewed, seed)

    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        cache = self._engine.vllm_config.cache_config
        return int(cache.num_gpu_blocks * cache.block_size)

    def load(self, slot: int, seed: int, tuned: dict[int, list[int]], scale: float) -> dict[str, Any]:
        """Random experts into a slot; returns the loader's report."""
        self.rpc("bench_load", slot, seed, tuned, scale)
        return self._settled(slot)

    def load_folder(self, slot: int, path: str, busy: int) -> dict[str, Any]:
        """An adapter's folder into a slot while `busy` requests decode: its report, and the steps' times around it.

        Milliseconds of the steps before and while it loads, and the longest pause between two tokens of a stream.
        """
        self._add([Owner(0)] * busy, 64, 4000, 1.0)
        for _ in range(60):
            self._engine.step()
        before = self._steps(200)
        self.rpc("expertweave_load", slot, path)
        during, started, report = [], time.perf_counter(), {"state": "loading"}
        last = started
        while report["state"] == "loading":
            self._engine.step()
            report = self.rpc("expertweave_poll", slot)
            now = time.perf_counter()
            during.append(1e3 * (now - last))  # with the poll: what a stream's client sees
            last = now
        seconds = last - started
        unloading = []
        last = time.perf_counter()
        self.rpc("expertweave_unload", slot)
        while self.rpc("expertweave_poll", slot)["state"] != "gone":
            self._engine.step()
            now = time.perf_counter()
            unloading.append(1e3 * (now - last))
            last = now
        self._drop()
        return report | {"wall_s": seconds, "before": before, "during": during, "unloading": unloading}

    def unload(self, slot: int) -> None:
        """Free a slot."""
        self.rpc("expertweave_unload", slot)
        self._settled(slot)

    def decode(self, owners: Sequence[Owner], steps: int, prompt: int, seed: int) -> list[float]:
        """Milliseconds of each of `steps` decode steps with one request for each owner."""
        self._add(owners, prompt, steps + 12, 1.0, seed)
        waiting = len(owners)
        while waiting:  # prompts
            outputs = self._engine.step()
            waiting -= sum(len(o.outputs[0].token_ids) == 1 for o in outputs)
        for _ in range(4):
            self._engine.step()
        times = self._steps(steps)
        self._drop()
        return times

    def warm_up(self) -> None:
        """Let vLLM compile its own kernels for steps of these sizes."""
        for length in (8, 24, 48, 80, 112, 200, 400, 512, 540, 700, 1100, 1536):
            self.first_token(Owner(0), length, 2, length)

    def first_token(self, owner: Owner, prompt: int, repeats: int, seed: int) -> list[float]:
        """Milliseconds from a request to its first token, on an idle engine."""
        times = []
        for i in range(repeats):
            self._names = []
            self._add([owner], prompt, 1, 1.0, seed + i)
            started = time.perf_counter()
            while self._engine.has_unfinished_requests():
                self._engine.step()
            times.append(1e3 * (time.perf_counter() - started))
        return times

    def poisson(
        self, arrivals: Sequence[float], owners: Sequence[Owner], prompt: int, tokens: int, seed: int
    ) -> list[tuple[float, float]]:
        """(ms to the first token, ms a token after it) of each request, arriving at these seconds."""
        rng = np.random.default_rng(seed)
        prompts = [self._prompt(rng, owner.task, prompt) for owner in owners]
        arrived: dict[str, float] = {}
        first: dict[str, float] = {}
        found: dict[str, tuple[float, float]] = {}
        upcoming = 0
        started = time.perf_counter()
        while len(found) < len(arrivals):
            now = time.perf_counter() - started
            while upcoming < len(arrivals) and arrivals[upcoming] <= now:
                name = self._submit(prompts[upcoming], owners[upcoming], tokens, 1.0, seed + upcoming)
                arrived[name] = started + arrivals[upcoming]
                upcoming += 1
            if not self._engine.has_unfinished_requests():
                time.sleep(max(0.0, min(1e-3, arrivals[upcoming] - (time.perf_counter() - started))))
                continue
            outputs = self._engine.step()
            now = time.perf_counter()
            for output in outputs:
                first.setdefault(output.request_id, now)
                if output.finished:
                    begun = first[output.request_id]
                    name = output.request_id
                    found[name] = (1e3 * (begun - arrived[name]), 1e3 * (now - begun) / (tokens - 1))
        return [found[name] for name in arrived]

    def answers(
        self, owners: Sequence[Owner], prompt: int, tokens: int, seed: int
    ) -> list[tuple[list[int], list[float]]]:
        """Greedy tokens and their log-probabilities, all requests in one batch."""
        names = self._add(owners, prompt, tokens, 0.0, seed, logprobs=0)
        found: dict[str, Answer] = {}
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                answer = output.outputs[0]
                chosen = [known[token].logprob for token, known in zip(answer.token_ids, answer.logprobs, strict=True)]
                found[output.request_id] = (list(answer.token_ids), chosen)
        return [found[name] for name in names]

    # -- inside --------------------------------------------------------------------------------------------

    def _settled(self, slot: int) -> dict[str, Any]:
        while True:
            report: dict[str, Any] = self.rpc("expertweave_poll", slot)
            if report["state"] == "failed":
                raise RuntimeError(report["error"])
            if report["state"] not in ("loading", "unloading"):
                return report

    def _prompt(self, rng: np.random.Generator, task: int, length: int) -> list[int]:
        tokens = task + self._tasks * rng.integers(self._vocabulary // self._tasks, size=length)
        return tokens.tolist()

    def _add(
        self,
        owners: Sequence[Owner],
        prompt: int,
        tokens: int,
        temperature: float,
        seed: int = 0,
        logprobs: int | None = None,
    ) -> list[str]:
        rng = np.random.default_rng(seed)
        return [
            self._submit(self._prompt(rng, owner.task, prompt), owner, tokens, temperature, seed + i, logprobs)
            for i, owner in enumerate(owners)
        ]

    def _submit(
        self,
        prompt: list[int],
        owner: Owner,
        tokens: int,
        temperature: float,
        seed: int,
        logprobs: int | None = None,
    ) -> str:
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=tokens,
            temperature=temperature,
            ignore_eos=True,
            detokenize=False,
            logprobs=logprobs,
            extra_args=None if owner.slot < 0 else {self._slot_key: owner.slot},
        )
        self._count += 1
        name = f"r{self._count}"
        self._names.append(name)
        self._engine.add_request(name, {"prompt_token_ids": prompt}, params)
        return name

    def _steps(self, count: int) -> list[float]:
        times = []
        last = time.perf_counter()
        for _ in range(count):
            self._engine.step()
            now = time.perf_counter()
            times.append(1e3 * (now - last))
            last = now
        return times

    def _drop(self) -> None:
        """End all requests."""
        self._engine.abort_request(self._names)
        self._names = []
        while self._engine.has_unfinished_requests():
            self._engine.step()
        self._engine.step()
