"""The arithmetic of an engine that writes tokens in steps: what it would take, without computing anything.

`SpeedModel` says how long a step takes, `SimulatedBatch` which requests are in it. Neither has a clock: the caller
tells the time, in seconds from any beginning. So the simulated engine (real time) and the discrete-event simulation
of policies (virtual time) run the very same class.

The scheduling is that of continuous batching with chunked prefill: iteration-level scheduling as in Orca (Yu et al.,
OSDI 2022, section 4), pieces of prompts beside decoding requests as in Sarathi-Serve (Agrawal et al., OSDI 2024).
"""

from __future__ import annotations

import math
import random
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(slots=True, frozen=True)
class SpeedModel:
    """How long one step of an engine takes.

    `step_ms` is the time of a step for one request and `step_ms_per_request` what each further one adds; prompts are
    read at `prefill_tokens_per_s`, at most `prefill_tokens` a step. `jitter` is the relative standard deviation of a
    step's time.
    """

    prefill_tokens_per_s: float
    step_ms: float
    step_ms_per_request: float = 0.0
    prefill_tokens: int = 512
    jitter: float = 0.0

    def __post_init__(self) -> None:
        """Raises `ValueError` where a step could take no time or less."""
        if not (self.prefill_tokens_per_s > 0 and self.step_ms > 0 and self.step_ms_per_request >= 0):
            raise ValueError("prefill_tokens_per_s and step_ms are above 0, step_ms_per_request is not below")
        if self.prefill_tokens < 1 or not 0 <= self.jitter < 1:
            raise ValueError("prefill_tokens is at least 1 and jitter in [0, 1)")

    def step_s(self, batch: int, prefill_tokens: int = 0) -> float:
        """Seconds of a step over `batch` requests (at least 1) that reads so many prompt tokens; without jitter."""
        return (
            self.step_ms + self.step_ms_per_request * (batch - 1)
        ) / 1000 + prefill_tokens / self.prefill_tokens_per_s

    def requests_per_s(self, max_running: int, prompt_tokens: float, answer_tokens: float) -> float:
        """Capacity: requests of this size finished a second while every place is taken."""
        reading = prompt_tokens / self.prefill_tokens_per_s
        return 1.0 / (answer_tokens * self.step_s(max_running) / max_running + reading)


class Token(NamedTuple):
    """One token of one request; `at` is the end of the step that wrote it, seconds."""

    request: str
    at: float
    first: bool
    last: bool


@dataclass(slots=True, eq=False)
class _Request:
    id: str
    prompt_left: int
    answer_left: int
    begun: bool = False
    reading: int = 0  # prompt tokens that the step under way reads
    cancelled: bool = False


class SimulatedBatch:
    """`max_running` places, a queue in order of arrival, and the step under way.

    The times given to `submit`, `cancel` and `advance` never decrease, and what ends before a request comes is asked
    for (`advance`) before it is submitted. `seed` fixes the jitter.
    """

    def __init__(self, speed: SpeedModel, max_running: int, *, seed: int = 0) -> None:
        self._speed, self._max_running = speed, max_running
        self._random = random.Random(seed)
        self._known: dict[str, _Request] = {}
        self._running: list[_Request] = []
        self._waiting: deque[_Request] = deque()
        self._step: list[_Request] = []  # those that take part in the step under way
        self._ends: float | None = None

    @property
    def next_at(self) -> float | None:
        """When the step under way ends, seconds; None while idle."""
        return self._ends

    @property
    def running(self) -> int:
        """Requests that have a place."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests that have none yet."""
        return len(self._known) - len(self._running)

    @property
    def prompt_tokens_waiting(self) -> int:
        """Prompt tokens of all requests here that are not read yet."""
        return sum(request.prompt_left for request in self._known.values())

    def submit(self, request: str, prompt_tokens: int, answer_tokens: int, now: float) -> None:
        """A request arrives. Raises `ValueError` where its id is known, or a step has ended that was not asked for."""
        if request in self._known:
            raise ValueError(f"request {request} is here already")
        if self._ends is not None and now > self._ends:
            raise ValueError("advance to this moment first")
        known = self._known[request] = _Request(request, max(1, prompt_tokens), max(1, answer_tokens))
        self._waiting.append(known)
        if self._ends is None:
            self._begin(now)

    def cancel(self, request: str) -> bool:
        """Drop a request: its place is free from the next step on. Whether it was here."""
        known = self._known.pop(request, None)
        if known is None:
            return False
        known.cancelled = True
        if known in self._running:
            self._running.remove(known)
        return True

    def advance(self, now: float) -> list[Token]:
        """The tokens of all steps that end until `now`, in order of time."""
        tokens: list[Token] = []
        while self._ends is not None and self._ends <= now:
            ended = self._ends
            self._end(ended, tokens)
            self._begin(ended)
        return tokens

    def _begin(self, now: float) -> None:
        """Admit, choose the pieces of prompts, and time the step; idle where there is nothing to do."""
        waiting, running = self._waiting, self._running
        while waiting and len(running) < self._max_running:
            request = waiting.popleft()
            if not request.cancelled:
                running.append(request)
        while waiting and waiting[0].cancelled:
            waiting.popleft()
        if not running:
            self._step, self._ends = [], None
            return
        budget = self._speed.prefill_tokens
        step = []
        for request in running:
            request.reading = min(request.prompt_left, budget)
            budget -= request.reading
            if request.reading or not request.prompt_left:
                step.append(request)
        seconds = self._speed.step_s(len(step), self._speed.prefill_tokens - budget)
        if jitter := self._speed.jitter:
            # Log-normal with mean 1: never negative, and now and then a long step.
            spread = math.sqrt(math.log1p(jitter * jitter))
            seconds *= math.exp(spread * self._random.gauss(0.0, 1.0) - spread * spread / 2)
        self._step, self._ends = step, now + seconds

    def _end(self, at: float, tokens: list[Token]) -> None:
        """Each request that is decoding, or whose prompt has just been read to its end, gets a token."""
        finished = False
        for request in self._step:
            if request.cancelled:
                continue
            request.prompt_left -= request.reading
            if request.prompt_left:
                continue
            request.answer_left -= 1
            last = request.answer_left == 0
            tokens.append(Token(request.id, at, not request.begun, last))
            request.begun = True
            if last:
                finished = True
                del self._known[request.id]
        if finished:
            self._running = [request for request in self._running if request.answer_left]
