"""An engine of stated speed, for load tests and benchmarks. It computes nothing: its answers are made-up words.

Its times are those of `SimulatedBatch`, kept on the event loop's clock: each step's tokens are handed out when that
step ends, whatever else has delayed the loop before, so that an engine under load neither drifts nor catches up.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import orjson

from signalbox.experts.base import (
    Chunk,
    EngineState,
    ExpertUnavailable,
    GenerateRequest,
    InvalidRequest,
    QueueFull,
    Score,
    Unsupported,
    Usage,
)
from signalbox.experts.catalog import SimulatedExpert
from signalbox.experts.prompts import check_length
from signalbox.experts.speed import Speed
from signalbox.experts.speed_model import SimulatedBatch

WORDS = [
    first + last for first in ("ka", "lu", "mi", "no", "re", "su", "ta", "vo") for last in ("bo", "din", "fe", "gal")
]
_LENGTH_SPREAD = 0.5  # standard deviation of the logarithm of an answer's length
_LONGEST = 1 << 16  # tokens of an answer that sets no bound, at most


@dataclass(slots=True)
class _Answer:
    """One request's words and clock; a `Timed` for the moving averages."""

    words: _Words
    prompt_tokens: int
    length: int
    finish_reason: str
    arrived: float
    first_token_at: float | None = None
    last_token_at: float | None = None
    generated: int = 0
    chunks: asyncio.Queue[Chunk | ExpertUnavailable] = field(default_factory=asyncio.Queue)


class SimulatedEngine:
    """`Engine` that keeps the times of a batch engine and does none of its work.

    Prompts count one token for every `bytes_per_token` bytes. An answer has `max_tokens` tokens, or without that a
    length drawn by the prompt around `answer_tokens`. The same prompt gets the same words.
    """

    def __init__(self, name: str, config: SimulatedExpert) -> None:
        self.name, self.config = name, config
        self._batch = SimulatedBatch(config.speed_model(), config.max_running, seed=config.seed)
        self._answers: dict[str, _Answer] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._count = 0
        self._speed = Speed()

    # -- the Engine protocol -----------------------------------------------------------------------------

    async def start(self) -> None:
        """There is nothing to load."""
        self._loop = asyncio.get_running_loop()

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """Answer one request with made-up words, a token a step; see `Engine.generate`.

        Raises `Unsupported` for adapters, logprobs and fields beyond the common ones.
        """
        own_id, answer = self._submit(request)
        try:
            while True:
                item = await answer.chunks.get()
                if isinstance(item, ExpertUnavailable):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            if self._answers.pop(own_id, None) is not None:
                self._batch.cancel(own_id)

    async def count_tokens(self, request: GenerateRequest) -> int:
        """Tokens that the request's prompt counts."""
        return self._content(request)[1]

    async def score(self, request: GenerateRequest, reference: str) -> Score:
        """Raises `Unsupported`: there is no model."""
        raise Unsupported(f"expert {self.name!r} is simulated; it knows no likelihoods")

    async def load(self, name: str, path: str) -> None:
        """Raises `Unsupported`."""
        raise Unsupported(f"expert {self.name!r} is simulated and takes no adapters", param="model")

    async def unload(self, name: str) -> None:
        """Nothing happens: there is never one."""

    def adapters(self) -> Sequence[str]:
        """None, ever."""
        return ()

    def state(self) -> EngineState:
        """Requests that run and wait, and their speed as handed out."""
        return EngineState(
            running=self._batch.running,
            waiting=self._batch.waiting,
            max_running=self.config.max_running,
            max_waiting=self.config.max_waiting,
            ttft_ms=self._speed.ttft_ms,
            tpot_ms=self._speed.tpot_ms,
            healthy=self._loop is not None,
        )

    async def close(self) -> None:
        """End all requests with `ExpertUnavailable`."""
        self._loop = None
        if self._timer is not None:
            self._timer.cancel()
        for answer in self._answers.values():
            answer.chunks.put_nowait(ExpertUnavailable(f"expert {self.name!r} was shut down"))

    # -- inside ------------------------------------------------------------------------------------------

    def _submit(self, request: GenerateRequest) -> tuple[str, _Answer]:
        """Check and queue a request; raises what the client is to be told."""
        if self._loop is None:
            raise ExpertUnavailable(f"expert {self.name!r} is not running")
        self._check(request)
        config, limit = self.config, request.sampling.max_tokens
        content, prompt_tokens = self._content(request)
        if not prompt_tokens:
            raise InvalidRequest("the prompt is empty", param="prompt" if request.messages is None else "messages")
        draw = random.Random(hashlib.blake2b(content, digest_size=8).digest())
        length, longest = limit, config.context_length
        if length is None:
            mean_log = math.log(config.answer_tokens) - _LENGTH_SPREAD**2 / 2
            length = max(1, min(round(math.exp(draw.gauss(mean_log, _LENGTH_SPREAD))), _LONGEST))
            if longest is not None:
                length = max(1, min(length, longest - prompt_tokens))
        if longest is not None:
            check_length(self.name, longest, prompt_tokens, length)
        if len(self._answers) >= config.max_running + config.max_waiting:
            raise QueueFull(
                f"expert {self.name!r} is full: {config.max_running} requests run and {config.max_waiting} wait"
            )
        now = self._loop.time()
        self._deliver(now)
        words = _Words(draw, request.sampling.stop)
        length, stopped = words.length(length)
        answer = _Answer(words, prompt_tokens, length, "stop" if stopped or limit is None else "length", now)
        self._count += 1
        own_id = f"{request.request_id}#{self._count}"
        self._answers[own_id] = answer
        self._batch.submit(own_id, prompt_tokens, length, now)
        self._set_timer()
        return own_id, answer

    def _content(self, request: GenerateRequest) -> tuple[bytes, int]:
        """What the answer is drawn from, and how many tokens it counts."""
        if request.prompt_token_ids is not None:
            return orjson.dumps(request.prompt_token_ids), len(request.prompt_token_ids)
        texts = [request.prompt] if request.messages is None else [m.get("content") for m in request.messages]
        content = "\n".join(text for text in texts if isinstance(text, str)).encode()
        return content, math.ceil(len(content) / self.config.bytes_per_token)

    def _check(self, request: GenerateRequest) -> None:
        if request.extra:
            fields = sorted(request.extra)
            raise Unsupported(f"expert {self.name!r} does not support {', '.join(fields)}", param=fields[0])
        if request.adapter is not None:
            raise Unsupported(
                f"expert {self.name!r} has no adapter {request.adapter!r}: it is simulated", param="model"
            )
        if request.sampling.logprobs is not None:
            raise Unsupported(f"expert {self.name!r} is simulated; it knows no likelihoods", param="logprobs")

    def _set_timer(self) -> None:
        """Wake up at the end of the step under way."""
        ends = self._batch.next_at
        if self._loop is None or ends is None or (self._timer is not None and not self._timer.cancelled()):
            return
        self._timer = self._loop.call_at(ends, self._tick)

    def _tick(self) -> None:
        self._timer = None
        if self._loop is not None:
            self._deliver(self._loop.time())
            self._set_timer()

    def _deliver(self, now: float) -> None:
        """Hand out the tokens of all steps that have ended."""
        for token in self._batch.advance(now):
            answer = self._answers[token.request]
            answer.generated += 1
            answer.first_token_at = answer.first_token_at or now
            answer.last_token_at = now
            text, word = answer.words.next()
            chunk = Chunk(text, [word])
            if token.last:
                chunk.finish_reason = answer.finish_reason
                chunk.usage = Usage(answer.prompt_tokens, answer.generated)
                self._speed.finished(answer)
                del self._answers[token.request]
            answer.chunks.put_nowait(chunk)


class _Words:
    """The words of one answer, drawn as they are asked for; with stop strings, drawn at once to know where it ends."""

    def __init__(self, draw: random.Random, stop: tuple[str, ...]) -> None:
        self._draw = draw
        self._stop = tuple(s for s in stop if s)
        self._known: list[tuple[str, int]] = []
        self._at = 0

    def length(self, most: int) -> tuple[int, bool]:
        """Tokens of the answer, at most `most`, and whether a stop string ends it."""
        if not self._stop:
            return most, False
        self._known = [self._drawn(i) for i in range(most)]
        whole = "".join(text for text, _ in self._known)
        found = [(at + len(s), at) for s in self._stop if (at := whole.find(s)) >= 0]
        if not found:
            return most, False
        met, cut = min(found)  # the one that is complete first ends the answer, and its text with it
        kept: list[tuple[str, int]] = []
        begins = 0
        for text, word in self._known:
            if begins >= met:
                break
            kept.append((text[: max(0, cut - begins)], word))
            begins += len(text)
        self._known = kept
        return len(kept), True

    def next(self) -> tuple[str, int]:
        """The next piece of text and its token id."""
        found = self._known[self._at] if self._known else self._drawn(self._at)
        self._at += 1
        return found

    def _drawn(self, at: int) -> tuple[str, int]:
        word = self._draw.randrange(len(WORDS))
        return (" " if at else "") + WORDS[word], word
