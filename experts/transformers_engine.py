"""The built-in engine: transformers models with continuous admission, computed on a thread of its own.

This file is the side that faces the event loop; `scheduler` decides what each step computes, `packed_batch` and
`adapters.layers` how; `engine_adapters` loads and unloads adapters. transformers' own continuous batching was tried
first: it is slower on CPU and leaves no place for per-row adapters (docs/architecture.md, "Engines").
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as Seq
from typing import Any

from signalbox.experts.base import (
    Chunk,
    EngineState,
    ExpertError,
    ExpertUnavailable,
    GenerateRequest,
    QueueFull,
    Score,
    Unsupported,
)
from signalbox.experts.catalog import TransformersExpert
from signalbox.experts.detokenizer import Detokenizer
from signalbox.experts.engine_adapters import EngineAdapters
from signalbox.experts.model_runner import ModelRunner
from signalbox.experts.models import resolve
from signalbox.experts.packed_batch import PackedBatch, Segment
from signalbox.experts.prompts import check_length, check_logit_bias, tokenise, tokenise_reference
from signalbox.experts.sampler import SamplerRow
from signalbox.experts.scheduler import Result, Scheduler
from signalbox.experts.sequence import Sequence
from signalbox.experts.speed import Speed

log = logging.getLogger(__name__)

# Scoring packs texts into one pass up to this many tokens, and this many reference tokens (their logits are kept).
SCORE_TOKENS, SCORE_ANSWER_TOKENS = 1024, 512
# After this long without work the KV cache's memory is given back, in seconds.
IDLE_RELEASE = 10.0

ScoreJob = tuple[list[int], list[int], int, "asyncio.Future[tuple[float, float]]"]


class TransformersEngine:
    """`Engine` over one transformers model."""

    def __init__(self, name: str, config: TransformersExpert) -> None:
        self.name, self.config = name, config
        self._speed = Speed()
        self._wake = threading.Condition()
        self._scheduler: Scheduler | None = None
        self._score_jobs: deque[ScoreJob] = deque()
        self._open = 0  # requests that run or wait
        self._closing = False
        self._thread: threading.Thread | None = None
        self._boundaries: list[asyncio.Future[None]] = []
        self._stopped = False
        self._adapters = EngineAdapters(name, config.max_adapters, config.max_adapter_rank, self._step_boundary)

    # -- the Engine protocol -----------------------------------------------------------------------------

    async def start(self) -> None:
        """Resolve, convert if need be, load and warm up the model."""
        try:
            self._scheduler = await asyncio.to_thread(self._load)
        except ExpertError:
            raise
        except Exception as error:
            raise ExpertUnavailable(f"expert {self.name!r} cannot start: {error}") from error
        self._thread = threading.Thread(target=self._loop, name=f"engine-{self.name}", daemon=True)
        self._thread.start()

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """Answer one request; see `Engine.generate`."""
        self._ready()
        with self._adapters.open(request.adapter) as slot:
            sequence = await self._submit(request, slot)
            try:
                while True:
                    item = await sequence.chunks.get()
                    if isinstance(item, ExpertError):
                        raise item
                    yield item
                    if item.finish_reason is not None:
                        return
            finally:
                self._open -= 1
                sequence.aborted = True  # before its next step the thread frees the row; no matter once finished
                self._notify()

    async def count_tokens(self, request: GenerateRequest) -> int:
        """Tokens of the request's prompt, chat template included."""
        runner = self._ready().runner
        return len(await tokenise(self.name, runner, runner.vocab_size, request))

    async def score(self, request: GenerateRequest, reference: str) -> Score:
        """Negative log-likelihood of `reference` as the answer, by a forward pass without the cache."""
        runner = self._ready().runner
        with self._adapters.open(request.adapter) as slot:
            prompt = await tokenise(self.name, runner, runner.vocab_size, request)
            answer = await tokenise_reference(runner, request, reference)
            check_length(self.name, self.longest, len(prompt), len(answer))
            if len(self._score_jobs) >= max(1, self.config.max_waiting):
                raise QueueFull(f"expert {self.name!r} has {len(self._score_jobs)} texts to score already")
            future: asyncio.Future[tuple[float, float]] = asyncio.get_running_loop().create_future()
            self._score_jobs.append((prompt, answer, slot, future))
            self._notify()
            bits, seconds = await future
        return Score(bits, len(reference.encode()), len(answer), len(prompt), seconds)

    async def load(self, name: str, path: str) -> None:
        """See `Engine.load`: reading and copying are done by another thread, while requests run on."""
        await self._adapters.load(name, path, self._ready().runner.lora)

    async def unload(self, name: str) -> None:
        """See `Engine.unload`. A caller that stops waiting does not stop the unloading."""
        await self._adapters.unload(name)

    def adapters(self) -> Seq[str]:
        """Adapters that requests may name now; one that is being unloaded is not among them."""
        return self._adapters.accepting()

    def state(self) -> EngineState:
        """Load and speed now."""
        scheduler = self._scheduler
        running = len(scheduler.running) if scheduler else 0
        memory = 0
        if scheduler is not None:
            runner = scheduler.runner
            memory = runner.weight_bytes + runner.cache.nbytes + (runner.lora.nbytes if runner.lora else 0)
        return EngineState(
            running=running,
            waiting=max(0, self._open - running),
            max_running=self.config.max_running,
            max_waiting=self.config.max_waiting,
            ttft_ms=self._speed.ttft_ms,
            tpot_ms=self._speed.tpot_ms,
            memory_bytes=memory,
            adapters=self._adapters.open_requests(),
            max_adapters=self.config.max_adapters,
            healthy=self._thread is not None and self._thread.is_alive() and not self._closing,
        )

    async def close(self) -> None:
        """Abort everything and free the model."""
        self._closing = True
        self._notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        self._scheduler = None

    @property
    def runner(self) -> ModelRunner:
        """The loaded model. Raises `ExpertUnavailable` before `start` and after `close`."""
        return self._ready().runner

    @property
    def longest(self) -> int:
        """Most tokens of prompt and answer together: the model's context, the configured one, the cache's memory."""
        scheduler = self._ready()
        context = scheduler.runner.context_length
        return min(context, self.config.context_length or context, scheduler.budget_tokens)

    # -- admission, on the event loop --------------------------------------------------------------------

    def _load(self) -> Scheduler:
        config = self.config
        runner = ModelRunner(
            resolve(config.model).path,
            device=config.device,
            dtype=config.dtype,
            threads=config.threads,
            chat_template=config.chat_template,
            max_adapters=config.max_adapters,
            max_adapter_rank=config.max_adapter_rank,
        )
        warm = runner.tensor([0] * 8)
        runner.forward(PackedBatch(warm, warm, runner.tensor(range(8)), [], 0, [Segment(0, 8, 0, 0)], None), [7])
        return Scheduler(
            runner,
            max_running=config.max_running,
            prefill_tokens=config.prefill_tokens,
            budget_tokens=config.kv_cache_mib * 2**20 // runner.cache.bytes_per_token,
        )

    def _ready(self) -> Scheduler:
        if self._scheduler is None or self._closing:
            raise ExpertUnavailable(f"expert {self.name!r} is not running")
        return self._scheduler

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify()

    async def _step_boundary(self) -> None:
        """Returns once no step computes that had begun before: what was aborted till now is used no more."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        with self._wake:
            if self._stopped or self._thread is None or not self._thread.is_alive():
                return
            self._boundaries.append(future)
            self._wake.notify()
        await future

    async def _submit(self, request: GenerateRequest, slot: int) -> Sequence:
        """Tokenise, check and queue a request; raises what the client is to be told."""
        scheduler, config, sampling = self._ready(), self.config, request.sampling
        runner = scheduler.runner
        if request.extra:
            fields = sorted(request.extra)
            raise Unsupported(f"expert {self.name!r} does not support {', '.join(fields)}", param=fields[0])
        check_logit_bias(self.name, runner.vocab_size, request)
        tokens = await tokenise(self.name, runner, runner.vocab_size, request)
        check_length(self.name, self.longest, len(tokens), sampling.max_tokens or 1)
        limit = sampling.max_tokens or min(config.default_max_tokens, self.longest - len(tokens))
        sequence = Sequence(
            request=request,
            tokens=tokens,
            prompt_length=len(tokens),
            limit=limit,
            sampler=SamplerRow.of(sampling, runner.device),
            detokenizer=Detokenizer(
                runner.tokenizer.backend_tokenizer,
                (*sampling.stop, *config.stop),
                runner.prefix_of(request),
            ),
            loop=asyncio.get_running_loop(),
            chunks=asyncio.Queue(),
            slot=slot,
        )
        if self._open >= config.max_running + config.max_waiting:
            raise QueueFull(
                f"expert {self.name!r} is full: {config.max_running} requests run and {config.max_waiting} wait"
            )
        self._open += 1
        scheduler.waiting.append(sequence)
        self._notify()
        return sequence

    # -- the engine's thread -----------------------------------------------------------------------------

    def _loop(self) -> None:
        scheduler = self._scheduler
        assert scheduler is not None
        while not self._closing:
            with self._wake:
                idle = not (scheduler.busy or self._score_jobs or self._boundaries or self._closing)
                if idle and not self._wake.wait(IDLE_RELEASE):
                    scheduler.runner.cache.release()
                self._pass_boundaries()
            if scheduler.busy:
                self._deliver(scheduler.step())
            if self._score_jobs:
                self._score_some(scheduler)
        gone = ExpertUnavailable(f"expert {self.name!r} was shut down")
        self._deliver([(s, gone) for s in (*scheduler.running, *scheduler.waiting)])
        for *_, future in self._score_jobs:
            _complete(future, gone)
        with self._wake:
            self._stopped = True
            self._pass_boundaries()

    def _pass_boundaries(self) -> None:
        """Between two steps: the next one begins with dropping what was aborted."""
        for future in self._boundaries:
            _complete(future, None)
        self._boundaries.clear()

    def _deliver(self, results: Seq[Result]) -> None:
        """Hand a step's results to the event loop, in one call for all of them."""

        def put(batch: Seq[Result]) -> None:
            for sequence, item in batch:
                sequence.chunks.put_nowait(item)

        for sequence, item in results:
            if isinstance(item, Chunk) and item.finish_reason is not None:
                self._speed.finished(sequence)
        for loop in {s.loop for s, _ in results}:
            _call_on(loop, put, [r for r in results if r[0].loop is loop])

    def _score_some(self, scheduler: Scheduler) -> None:
        """Run waiting scoring jobs, as many as fit one pass."""
        jobs: list[ScoreJob] = []
        total = answers = 0
        while self._score_jobs:
            prompt, answer, slot, future = self._score_jobs[0]
            total, answers = total + len(prompt) + len(answer), answers + len(answer)
            if jobs and (total > SCORE_TOKENS or answers > SCORE_ANSWER_TOKENS):
                break
            self._score_jobs.popleft()
            if not future.cancelled():
                jobs.append((prompt, answer, slot, future))
        if not jobs:
            return
        try:
            bits, seconds = scheduler.score([(prompt, answer, slot) for prompt, answer, slot, _ in jobs])
        except Exception as error:
            log.exception("expert %s cannot score", self.name)
            for *_, future in jobs:
                _complete(future, ExpertError(f"expert {self.name!r} cannot score this text: {error}"))
            return
        # Every text pays for its share of the pass, by its tokens.
        computed = sum(len(prompt) + len(answer) for prompt, answer, *_ in jobs)
        for (prompt, answer, _, future), value in zip(jobs, bits, strict=True):
            _complete(future, (value, seconds * (len(prompt) + len(answer)) / computed))


def _call_on(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: Any) -> None:
    """Call on an event loop from another thread; the loop may be gone."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(function, *args)


def _complete(future: asyncio.Future[Any], result: Any) -> None:
    """Complete a future of an event loop from another thread."""

    def complete() -> None:
        if not future.done():
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)

    _call_on(future.get_loop(), complete)
