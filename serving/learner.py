"""What a gateway learns while it serves: it follows the log of outcomes, as all the others do, to the same state."""

from __future__ import annotations

import asyncio
import logging
import time

from signalbox.router.online import Event, OnlineRouter, Outcome
from signalbox.serving.outcomes import START, Outcomes
from signalbox.serving.routing import Routing
from signalbox.serving.store import StoreUnavailable

log = logging.getLogger(__name__)

PERIOD_S = 0.25
BATCH = 128  # outcomes learned from in one go, a few milliseconds in a thread
SNAPSHOT_OUTCOMES, SNAPSHOT_S = 100, 30.0  # between two snapshots: so many outcomes, or so long where there were any

_SAID = {
    "worse": "it did worse than the artifact on recent outcomes",
    "contradicted": "recent outcomes contradict what the artifact knows, as false ones would; "
    "if they are right, train the router again",
}


class Learner:
    """Feeds one `Routing`'s router from the log. With the store gone it serves on with what it has learned."""

    def __init__(self, routing: Routing, outcomes: Outcomes) -> None:
        self._routing = routing
        self._outcomes = outcomes
        self._following: OnlineRouter | None = None
        self._position = START
        self._unsaved = 0
        self._saved_at = 0.0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to follow the log."""
        self._task = asyncio.create_task(self._follow(), name="learner")

    async def close(self) -> None:
        """Stop."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(PERIOD_S)
            try:
                while await self.step():
                    pass
            except StoreUnavailable:
                pass  # the store says so itself
            except Exception:
                log.exception("outcomes could not be learned from")

    async def step(self) -> bool:
        """Read and learn what is new; says whether there may be more. Raises `StoreUnavailable`."""
        online = self._routing.online
        if online is None:
            return False
        if online is not self._following:
            await self._attach(online)
        position, outcomes = await self._outcomes.after(self._position, BATCH, online.version)
        if outcomes:
            events = await asyncio.to_thread(_learn, online, outcomes)
            self._unsaved += len(outcomes)
            for event in events:
                log.warning("what the router learned is rolled back: %s", _SAID[event])
        more = position != self._position
        self._position = position
        await self._save(online)
        return more

    async def _attach(self, online: OnlineRouter) -> None:
        """Go on where a gateway left off with this version, or read the log from its beginning."""
        found = await self._outcomes.snapshot(online.version)
        online.reset()
        self._position, self._unsaved, self._saved_at = START, 0, time.monotonic()
        if found is not None and online.restore(found[1]):
            self._position = found[0]
        self._following = online

    async def _save(self, online: OnlineRouter) -> None:
        due = self._unsaved >= SNAPSHOT_OUTCOMES or time.monotonic() - self._saved_at >= SNAPSHOT_S
        if not self._unsaved or not due or online.state is None:
            return
        await self._outcomes.keep(self._position, online.state)
        self._unsaved, self._saved_at = 0, time.monotonic()


def _learn(online: OnlineRouter, outcomes: list[Outcome]) -> list[Event]:
    return [event for outcome in outcomes if (event := online.learn(outcome))]
