"""What a replica learns from the requests that it serves: its speed under load, and how its tokenizer counts."""

from __future__ import annotations

import time
from collections.abc import Callable

from signalbox.experts.base import Chunk, GenerateRequest, Usage
from signalbox.experts.catalog import ExpertConfig
from signalbox.policies.latency import Latency, LatencyModel, LatencyState, Load


class RequestWatch:
    """Follows every request of one replica, whatever its engine, and keeps the live latency model.

    It counts the requests itself, so that all engines are measured alike: those beyond `max_running` wait. Prompt
    lengths are estimated from bytes, for learning as for predicting: that is all that a gateway knows of a prompt.
    """

    def __init__(self, config: ExpertConfig, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._model = LatencyModel(config.latency, config.max_running)
        self._places = config.max_running
        self._bytes_per_token = config.bytes_per_token
        self._density = _Density()
        self._clock = clock
        self._open = 0
        self._unread = 0.0  # prompt tokens of requests without a first token
        self._crowd_s = 0.0  # requests in the batch, times seconds
        self._counted_until = clock()

    def begin(self, request: GenerateRequest) -> WatchedRequest:
        """A request has come. Its `close` must be called, however it ends."""
        size = prompt_bytes(request)
        if request.prompt_token_ids is not None:
            tokens = float(len(request.prompt_token_ids))
        else:
            tokens = size / (self._density.bytes_per_token or self._bytes_per_token)
        load = self.load()
        sampling = request.sampling
        # Most answers end before their limit: a longer one than usual is only expected where it is certain.
        answer = float(sampling.max_tokens) if sampling.max_tokens is not None else None
        if answer is not None and not sampling.ignore_eos:
            answer = min(answer, self._model.usual_answer_tokens)
        watched = WatchedRequest(self, size, tokens, load, self._model.predict(load, tokens, answer), self._clock())
        self._count(watched.arrived)
        self._open += 1
        self._unread += tokens
        return watched

    def load(self) -> Load:
        """The requests that are here now."""
        running = min(self._open, self._places)
        return Load(running, self._open - running, max(0.0, self._unread))

    def latency(self) -> LatencyState:
        """The model, for publication."""
        return self._model.state()

    @property
    def bytes_per_token(self) -> float | None:
        """Measured on recent prompts; None until some hundred tokens have been seen."""
        return self._density.bytes_per_token

    def _count(self, now: float) -> float:
        """The batch's size integrated over time until now, in request seconds."""
        self._crowd_s += min(self._open, self._places) * (now - self._counted_until)
        self._counted_until = now
        return self._crowd_s


class WatchedRequest:
    """One request on its way: told of each chunk, and of the end."""

    def __init__(
        self, watch: RequestWatch, size: int, prompt_tokens: float, load: Load, predicted: Latency, arrived: float
    ) -> None:
        self._watch, self._bytes, self._prompt_tokens = watch, size, prompt_tokens
        self.load, self.predicted, self.arrived = load, predicted, arrived
        self._first: float | None = None
        self._last = arrived
        self._first_tokens = 1
        self._crowd_s = 0.0
        self._closed = False

    def chunk(self, chunk: Chunk) -> None:
        """A chunk has come."""
        if chunk.token_ids or chunk.text or chunk.extra:
            self._last = self._watch._clock()
            if self._first is None:
                self._begun(self._last, len(chunk.token_ids) or 1)
        if chunk.usage is not None:
            self._ended(chunk.usage)

    def close(self) -> None:
        """The request is here no more; only the first call counts."""
        if self._closed:
            return
        self._closed = True
        watch = self._watch
        watch._count(watch._clock())
        watch._open -= 1
        if self._first is None:
            watch._unread -= self._prompt_tokens

    def _begun(self, now: float, tokens: int) -> None:
        watch = self._watch
        self._first, self._first_tokens = now, tokens
        self._crowd_s = watch._count(now)
        watch._unread -= self._prompt_tokens
        watch._model.observe_ttft(self.load, self._prompt_tokens, 1000 * (now - self.arrived), self.predicted)

    def _ended(self, usage: Usage) -> None:
        watch = self._watch
        watch._density.note(self._bytes, usage.prompt_tokens)
        further = usage.completion_tokens - self._first_tokens
        if self._first is None or further < 1 or self._last <= self._first:
            return
        now = watch._clock()
        mean_running = (watch._count(now) - self._crowd_s) / (now - self._first)
        tpot_ms = 1000 * (self._last - self._first) / further
        watch._model.observe_tpot(self._prompt_tokens, usage.completion_tokens, mean_running, tpot_ms, self.predicted)


def prompt_bytes(request: GenerateRequest) -> int:
    """UTF-8 bytes of a request's texts; 0 where it has token ids."""
    if request.messages is not None:
        return sum(len(m["content"].encode()) for m in request.messages if isinstance(m.get("content"), str))
    return len((request.prompt or "").encode())


class _Density:
    """UTF-8 bytes of prompt for each prompt token, over recent requests (long ones weigh more)."""

    def __init__(self) -> None:
        self._bytes = self._tokens = 0.0

    def note(self, size: int, prompt_tokens: int) -> None:
        """Count one finished request; token ids have no bytes and say nothing."""
        if size and prompt_tokens:
            self._bytes = 0.99 * self._bytes + size
            self._tokens = 0.99 * self._tokens + prompt_tokens

    @property
    def bytes_per_token(self) -> float | None:
        """None until some hundred tokens have been seen: the chat template outweighs the text of short prompts."""
        return max(0.5, self._bytes / self._tokens) if self._tokens >= 256 else None
