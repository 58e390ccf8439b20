"""vLLM as an engine: `AsyncLLM` in this process, its engine core in a child process.

Tokenised here, by the same code as for the transformers engine; detokenised once, by vLLM. What differs between
vLLM's versions is in `vllm_versions`, what its child processes do for us in `vllm_process`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import multiprocessing
import os
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from signalbox.adapters.base_shape import base_shape
from signalbox.experts import vllm_versions
from signalbox.experts.base import (
    Chunk,
    EngineState,
    ExpertError,
    ExpertUnavailable,
    GenerateRequest,
    QueueFull,
    Score,
    TokenLogprob,
    Unsupported,
    Usage,
)
from signalbox.experts.catalog import VllmExpert
from signalbox.experts.child_processes import alone_on_gpus, kill, with_children
from signalbox.experts.expertweave.settings import WeaveSettings
from signalbox.experts.models import resolve
from signalbox.experts.prompts import PromptEncoder, check_length, check_logit_bias, tokenise, tokenise_reference
from signalbox.experts.speed import Speed
from signalbox.experts.vllm_adapters import VllmAdapters
from signalbox.experts.vllm_arguments import installed
from signalbox.experts.vllm_process import Reports

log = logging.getLogger(__name__)

CLOSE_S = 3.0  # that vLLM has to end its processes by its own rules
_SHORTEST_PAUSE = 0.002  # seconds between two messages of a stream; not worth a timer below
# What vLLM logs on its way up, and what we say of it.
_MILESTONES = [
    (re.compile(r"Starting to load model|Loading model"), "loading the weights"),
    (re.compile(r"(?:Loading weights|Model loading) took (.+)"), "weights loaded: {}"),
    (re.compile(r"Dynamo bytecode transform|Compiling a graph|torch\.compile took"), "compiling"),
    (re.compile(r"(?:GPU|CPU) KV cache size: ([\d,]+ tokens)"), "KV cache of {}"),
    (re.compile(r"[Cc]aptur\w* (?:CUDA|cudagraph)"), "capturing CUDA graphs"),
    (re.compile(r"Graph capturing finished in (.+?),"), "CUDA graphs captured in {}"),
]
_starting = threading.Lock()  # the environment and the list of children are the process's: one start at a time


@dataclass(slots=True)
class _Request:
    """One request's clock and count: a `Timed` for the moving averages."""

    prompt_tokens: int
    prefix: str
    alternatives: int
    arrived: float = field(default_factory=time.perf_counter)
    first_token_at: float | None = None
    last_token_at: float | None = None
    generated: int = 0
    cached: int = 0

    def left_s(self, limit: int) -> float:
        """Seconds until `limit` tokens are there, at its pace so far: its end is not to be slept through."""
        if self.first_token_at is None or self.last_token_at is None or self.generated < 2:
            return math.inf
        return (limit - self.generated) * (self.last_token_at - self.first_token_at) / (self.generated - 1)


class VllmEngine:
    """`Engine` over one model in vLLM."""

    def __init__(self, name: str, config: VllmExpert) -> None:
        self.name, self.config = name, config
        self.progress = "starting"  # what the start is at, for those who wait
        self._core: vllm_versions.Core | None = None
        self._encoder: PromptEncoder | None = None
        self._reports: Reports | None = None
        self._processes: list[Any] = []
        self._speed = Speed()
        self._open: set[str] = set()  # vLLM's ids of requests that run or wait
        self._count = 0
        self._running = 0
        self._kv_cache_use = 0.0
        self._memory = 0
        self._last_step = time.monotonic()
        self._closing = False
        self._adapters = VllmAdapters(name, config.max_adapters, config.max_adapter_rank, config.adapter_kinds)

    # -- the Engine protocol -----------------------------------------------------------------------------

    async def start(self) -> None:
        """Resolve the model and start vLLM with it; engines that share a GPU start one after another."""
        if not installed():
            raise ExpertUnavailable(
                f"expert {self.name!r} cannot start: vLLM is not installed; on a GPU machine "
                "`pip install 'signalbox[vllm]'`, on CPU see `make test-vllm`"
            )
        try:
            path = (await asyncio.to_thread(resolve, self.config.model, weights=self.config.has_weights)).path
            async with alone_on_gpus(lambda gpu: self._say(f"waiting for the engine that starts on GPU {gpu}")):
                self._say("starting vLLM")
                await asyncio.to_thread(self._load, path)
                if "esft" in self.config.adapter_kinds:
                    await self._ready()[0].workers("expertweave_check")
        except ExpertError:
            await self.close()
            raise
        except (Exception, asyncio.CancelledError) as error:
            cause = (self._reports and self._reports.first_error) or vllm_versions.reason_of(error)
            await self.close()
            if isinstance(error, asyncio.CancelledError):
                raise
            raise ExpertUnavailable(f"expert {self.name!r} cannot start: {cause}") from error
        self._last_step = time.monotonic()
        self.progress = "ready"

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """Answer one request; see `Engine.generate`. A chunk has as many tokens as have come since the last."""
        core, encoder = self._ready()
        config, sampling = self.config, request.sampling
        if strange := sorted(set(request.extra) - (config.request_fields or frozenset())):
            raise Unsupported(f"expert {self.name!r} does not support {', '.join(strange)}", param=strange[0])
        check_logit_bias(self.name, core.vocab_size, request)
        tokens = await tokenise(self.name, encoder, core.vocab_size, request)
        check_length(self.name, core.longest, len(tokens), sampling.max_tokens or 1)
        limit = sampling.max_tokens or min(config.default_max_tokens, core.longest - len(tokens))
        params = vllm_versions.sampling_params(
            sampling, max_tokens=limit, stop=(*sampling.stop, *config.stop), extra=request.extra
        )
        known = _Request(len(tokens), encoder.prefix_of(request), sampling.logprobs or 0)
        with (
            self._adapters.open(request.adapter),
            self._place(request.request_id) as own_id,
            vllm_versions.translated(self.name, request.extra),
        ):
            outputs = core.generate(tokens, params, own_id, self._adapters.bound(request.adapter))
            async with contextlib.aclosing(outputs):  # type: ignore[type-var]
                async for output in outputs:
                    chunk = self._chunk(output, known)
                    if chunk.finish_reason is not None:
                        self._speed.finished(known)
                        yield chunk
                        return
                    if chunk.token_ids:
                        yield chunk
                    # Tokens that come meanwhile are gathered by vLLM: under load one message carries several.
                    pause = min(len(self._open) / config.max_messages_per_s, known.left_s(limit))
                    if pause > _SHORTEST_PAUSE:
                        await asyncio.sleep(pause)
        raise ExpertUnavailable(f"expert {self.name!r} ended its answer too early")

    async def count_tokens(self, request: GenerateRequest) -> int:
        """Tokens of the request's prompt, chat template included."""
        core, encoder = self._ready()
        return len(await tokenise(self.name, encoder, core.vocab_size, request))

    async def score(self, request: GenerateRequest, reference: str) -> Score:
        """Negative log-likelihood of `reference` as the answer, from vLLM's log-probabilities of prompt tokens."""
        core, encoder = self._ready()
        prompt = await tokenise(self.name, encoder, core.vocab_size, request)
        answer = await tokenise_reference(encoder, request, reference)
        check_length(self.name, core.longest, len(prompt), len(answer) + 1)  # vLLM must generate one token
        started = time.perf_counter()
        bits = 0.0
        with (
            self._adapters.open(request.adapter),
            self._place(request.request_id) as own_id,
            vllm_versions.translated(self.name, {}),
        ):
            bound, params = self._adapters.bound(request.adapter), vllm_versions.scoring_params()
            async for output in core.generate(prompt + answer, params, own_id, bound):
                if output.prompt_logprobs:
                    scored = zip(answer, output.prompt_logprobs[len(prompt) :], strict=True)
                    bits = sum(vllm_versions.bits(known[token].logprob) for token, known in scored)
        seconds = time.perf_counter() - started
        return Score(bits, len(reference.encode()), len(answer), len(prompt), seconds)

    async def load(self, name: str, path: str) -> None:
        """See `Engine.load`; requests run on, vLLM loads it between two steps."""
        self._ready()
        await self._adapters.add(name, path)

    async def unload(self, name: str) -> None:
        """See `Engine.unload`. A caller that stops waiting does not stop the unloading."""
        await self._adapters.unload(name)

    def adapters(self) -> Sequence[str]:
        """Adapters that requests may name now; one that is being unloaded is not among them."""
        return self._adapters.accepting()

    def state(self) -> EngineState:
        """Load and speed now, as of vLLM's latest step."""
        busy = len(self._open)
        running = min(self._running, busy) if busy > self.config.max_running else busy
        return EngineState(
            running=running,
            waiting=busy - running,
            max_running=self.config.max_running,
            max_waiting=self.config.max_waiting,
            ttft_ms=self._speed.ttft_ms,
            tpot_ms=self._speed.tpot_ms,
            memory_bytes=self._memory,
            kv_cache_use=self._kv_cache_use if busy else 0.0,
            adapters=self._adapters.open_requests(),
            max_adapters=self.config.max_adapters,
            healthy=self._core is not None and not self._closing and self.ailment() is None,
        )

    def ailment(self) -> str | None:
        """What is wrong with the engine core: dead, or hung for `stall_s`; None when nothing is."""
        if self._core is not None and (self._core.dead or not all(p.is_alive() for p in self._processes)):
            return "the engine core has died"
        if self._open and time.monotonic() - self._last_step > self.config.stall_s:
            return f"the engine core has made no progress for {self.config.stall_s:g} s"
        return None

    async def close(self) -> None:
        """Abort everything, end vLLM's processes and whatever is left of them."""
        ailing = self.ailment() is not None
        self._closing = True
        core, self._core = self._core, None
        if core is not None:
            with contextlib.suppress(Exception):
                await core.abort(list(self._open))
            if ailing:  # it would not listen
                kill(self._processes)
            with contextlib.suppress(Exception):
                async with asyncio.timeout(CLOSE_S):
                    await asyncio.to_thread(core.shutdown)
        await asyncio.to_thread(kill, self._processes)
        if self._reports is not None:
            self._reports.close()

    @property
    def longest(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._ready()[0].longest

    # -- inside --------------------------------------------------------------------------------------------

    def _load(self, path: Path) -> None:
        """Start vLLM; in a thread."""
        with _starting:
            vllm_versions.prepare_environment()
            self._reports = Reports(self.name, self._on_report)
            os.environ.update(self._reports.environment)
            before = set(multiprocessing.active_children())
            try:
                with vllm_versions.compilation(not self.config.enforce_eager):
                    self._core = vllm_versions.Core(self._arguments(path), self._on_stats)
            finally:
                self._processes = [p for p in multiprocessing.active_children() if p not in before]
                if self._closing:  # nobody waits for this start any more
                    kill(self._processes)
        from transformers import AutoTokenizer

        self._encoder = PromptEncoder(AutoTokenizer.from_pretrained(path), self.config.chat_template)
        self._adapters.serve(self._core, base_shape(path) if self.config.max_adapters else None)
        total = vllm_versions.device_memory()
        if total is not None:
            self._memory = int(total * self.config.memory_share) * self.config.parallel
        else:
            own = with_children(self._processes)
            self._memory = sum(process.memory_info().rss for process in own)

    def _arguments(self, path: Path) -> dict[str, Any]:
        config = self.config
        arguments: dict[str, Any] = {
            "model": str(path),
            "tokenizer": str(path),
            "load_format": "safetensors" if config.has_weights else "dummy",  # never a pickle
            "trust_remote_code": False,
            "dtype": config.dtype,
            "max_model_len": config.max_model_len or config.context_length,
            "max_num_seqs": config.max_running,
            "tensor_parallel_size": config.parallel,
            "distributed_executor_backend": "mp" if config.parallel > 1 else "uni",  # Ray would place them anew
            "enable_prefix_caching": config.enable_prefix_caching,
            "enable_chunked_prefill": True,
            "enforce_eager": config.enforce_eager,
        }
        if vllm_versions.device_memory() is not None:
            arguments["gpu_memory_utilization"] = config.memory_share
        elif config.dtype == "auto":
            import torch

            from signalbox.experts.model_runner import best_dtype

            arguments["dtype"] = str(best_dtype(torch.device("cpu"))).removeprefix("torch.")
        on_cpu = vllm_versions.device_memory() is None
        if "lora" in config.adapter_kinds:
            arguments |= vllm_versions.lora_arguments(config.max_adapters, config.max_adapter_rank, on_cpu=on_cpu)
            shape = base_shape(path)
            if shape.experts:  # all linears that an adapter may have: the routed experts are none, and stay vLLM's own
                arguments["lora_target_modules"] = sorted({name.rpartition(".")[2] for name in shape.linears})
        if "esft" in config.adapter_kinds:
            arguments |= self._weave().engine_arguments(on_cpu=on_cpu)
        return arguments | config.engine_args

    def _weave(self) -> WeaveSettings:
        esft = self.config.esft
        assert esft is not None, "the configuration gives it where ESFT is served"
        memory = int((esft.memory_gib or 0) * 2**30) // self.config.parallel
        return WeaveSettings(self.config.max_adapters, esft.experts_per_layer, memory, esft.rows)

    def _ready(self) -> tuple[vllm_versions.Core, PromptEncoder]:
        if self._core is None or self._encoder is None or self._closing:
            raise ExpertUnavailable(f"expert {self.name!r} is not running")
        return self._core, self._encoder

    @contextlib.contextmanager
    def _place(self, request_id: str) -> Iterator[str]:
        """A place among the requests that run or wait; yields the request's id in vLLM, unique here."""
        config = self.config
        if len(self._open) >= config.max_running + config.max_waiting:
            raise QueueFull(
                f"expert {self.name!r} is full: {config.max_running} requests run and {config.max_waiting} wait"
            )
        if not self._open:  # an idle core makes no steps: from here on it has to
            self._last_step = time.monotonic()
        self._count += 1
        own_id = f"{request_id}#{self._count}"
        self._open.add(own_id)
        try:
            yield own_id
        finally:
            self._open.discard(own_id)

    def _chunk(self, output: Any, known: _Request) -> Chunk:
        """What vLLM hands over, as a chunk. Raises `ExpertUnavailable` where it gave the request up."""
        answer = output.outputs[0]
        if answer.finish_reason in ("abort", "error"):
            doing = "was shut down" if self._closing else "gave this request up"
            raise ExpertUnavailable(f"expert {self.name!r} {doing}")
        tokens = list(answer.token_ids)
        if tokens:
            known.last_token_at = time.perf_counter()
            known.first_token_at = known.first_token_at or known.last_token_at
            known.generated += len(tokens)
        known.cached = max(known.cached, output.num_cached_tokens or 0)
        text = answer.text
        if text and known.prefix:
            text, known.prefix = text.removeprefix(known.prefix), ""
        chunk = Chunk(text, tokens)
        if answer.finish_reason is not None:
            chunk.finish_reason = "length" if answer.finish_reason == "length" else "stop"
            chunk.usage = Usage(known.prompt_tokens, known.generated, known.cached)
        if answer.logprobs:
            # The token that ended the answer is no part of it.
            ended = chunk.finish_reason == "stop" and not isinstance(answer.stop_reason, str)
            pairs = list(zip(tokens, answer.logprobs, strict=False))
            chunk.logprobs = [self._logprob(*pair, known.alternatives) for pair in (pairs[:-1] if ended else pairs)]
        return chunk

    def _logprob(self, token: int, found: Any, alternatives: int) -> TokenLogprob:
        """`found` maps token ids to vLLM's Logprob: the drawn token's, and those of the likeliest."""
        assert self._encoder is not None
        text_of = self._encoder.token_text
        best = sorted((i for i in found if found[i].rank <= alternatives), key=lambda i: found[i].rank)
        text = text_of(token)
        top = tuple((t := text_of(i), found[i].logprob, t.encode()) for i in best)
        return TokenLogprob(text, found[token].logprob, text.encode(), top)

    def _on_stats(self, running: int, waiting: int, kv_cache_use: float) -> None:
        self._running, self._kv_cache_use = running, kv_cache_use
        self._last_step = time.monotonic()

    def _on_report(self, level: int, text: str) -> None:
        """A record of vLLM's log; in the thread of the reports."""
        if level >= logging.ERROR:
            log.error("expert %s: vLLM: %s", self.name, text)
            return
        log.debug("expert %s: vLLM: %s", self.name, text)
        if self.progress != "ready":
            for pattern, said in _MILESTONES:
                if found := pattern.search(text):
                    self._say(said.format(*found.groups()))
                    break

    def _say(self, progress: str) -> None:
        if f"starting: {progress}" != self.progress:
            self.progress = f"starting: {progress}"
            log.info("expert %s: %s", self.name, progress)
