"""One request being answered: its batches, what is kept of them, and what it gives back at its end."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal

from signalbox.experts.base import Chunk
from signalbox.policies.attainment import Outcome
from signalbox.serving.charging import Seat
from signalbox.serving.planning import Plan
from signalbox.serving.pool import Target
from signalbox.serving.protocols.openai_replies import AnswerBuilder
from signalbox.serving.streams import Batch, close

CacheVerdict = Literal["hit", "miss", "bypass"]


@dataclass(slots=True)
class Asked:
    """Which expert answers (an adapter's version is settled when it is asked), and when tokens came.

    Times are of `time.perf_counter`, in seconds.
    """

    target: Target | None = None
    first_at: float | None = None
    last_at: float | None = None

    def note(self, chunks: list[Chunk]) -> None:
        """Some chunks came now."""
        if any(chunk.text or chunk.token_ids for chunk in chunks):
            self.last_at = time.perf_counter()
            self.first_at = self.first_at or self.last_at


@dataclass(slots=True)
class Run:
    """One request being answered: iterate for batches of chunks, then `settle`; close it whatever happens.

    `builder` has gathered all that came through. Times are of `time.perf_counter`, in seconds.
    """

    plan: Plan
    expert: str
    cache: CacheVerdict
    attempts: int
    began: float
    hop: float
    batches: AsyncIterator[Batch]
    builder: AnswerBuilder
    keep: Keep | None = None
    asked: Asked | None = None
    source: AsyncIterator[Batch] | None = None
    seat: Seat | None = None
    waited_s: float = 0.0

    async def __aiter__(self) -> AsyncIterator[Batch]:
        keep = self.keep
        async for index, chunks in self.batches:
            self.builder.add(index, chunks)
            if self.seat is not None and self.plan.call.stream:
                self.seat.note(chunks)
            if keep is not None:
                keep.choices[index].extend(chunks)
            yield index, chunks

    def timing(self) -> Outcome | None:
        """How fast it was, for the policy's ceilings; None of what came from the cache, or did not come to its end."""
        if self.asked is None or self.asked.first_at is None or self.asked.last_at is None or not self.builder.complete:
            return None
        further = max(1, self.builder.usage().completion_tokens - 1)
        return Outcome(
            policy=self.plan.policy,
            at=0.0,
            status="answered",
            expert=self.expert,
            ttft_ms=1000 * (self.asked.first_at - self.began),
            tpot_ms=1000 * (self.asked.last_at - self.asked.first_at) / further,
            total_ms=1000 * (self.asked.last_at - self.began),
        )

    async def leave(self) -> None:
        """Give the place at the expert back, and settle what the answer cost; the first call counts."""
        seat, self.seat = self.seat, None
        if seat is not None:
            await seat.leave(self.builder.usage() if self.builder.complete else None)

    async def aclose(self) -> None:
        """Stop the expert if it still generates, and give all back."""
        try:
            await close(self.batches)
            await close(self.source)  # a generator that nobody has begun to read closes nothing below it
        finally:
            await self.leave()


@dataclass(slots=True)
class Keep:
    """An answer on its way into the cache."""

    namespace: str
    ttl_s: float | None
    choices: list[list[Chunk]]
    decision_key: str | None
