"""Places in front of the experts, shared by all gateways: who may start, who waits, who is told to come again.

The queues are in the store and change in atomic steps (`admission_script.py`), so every gateway's verdict is the same.
A gateway is told through its mailbox, a list that it waits on, when a request of its own may start. Once a second it
says which requests it has: what it does not list was lost on the way, and what the store does not know comes again.
With the store lost each gateway goes on with a queue of its own and its share of the places.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import msgpack

from signalbox.experts.base import ExpertError
from signalbox.policies.admission import AdmissionQueue, Event, Ticket
from signalbox.serving.access import AdmissionConfig
from signalbox.serving.admission_script import ADMISSION
from signalbox.serving.store import Store, StoreUnavailable

log = logging.getLogger(__name__)

MAIL_S = 0.5  # that one look into the mailbox waits for news
SYNC_S = 1.0
LOOK_S = 0.25  # between two readings of the queues, for forecasts
SETTLE_S = 10.0  # after a change of a queue until nothing of ours can be left in it by mistake
LONGEST_RETRY_S = 60.0
LEAST_SLACK_S = 0.05  # no prediction is so exact that a request without any slack should not take a free place
MAX_HELD = 8192  # tickets of one gateway at once

_SAID = {
    "queue_full": "too many requests of this priority wait for expert '{expert}'",
    "shed_deadline": "the service is busy: expert '{expert}' could not begin in the time that was promised",
    "shed_priority": "the service is busy with requests of greater priority: expert '{expert}' could not begin in time",
}


class Shed(ExpertError):
    """There is no place in time (HTTP 429, with the time after which to try again); `code` says why."""

    status = 429
    code = "queue_full"


@dataclass(slots=True, eq=False)
class _Held:
    """A ticket of this gateway. `since` is of this process's clock; `running` is done when it may start."""

    ticket: Ticket
    expert: str
    slack_s: float
    since: float
    running: asyncio.Future[None]
    local: bool = False


@dataclass(slots=True, eq=False)
class Slot:
    """A place at an expert, to be given back by `leave`. `waited_s` is the time in the queue."""

    admission: Admission | None
    held: _Held | None
    waited_s: float = 0.0

    def leave(self, *, completed: bool) -> None:
        """Give the place back, without waiting; only the first call counts."""
        if self.admission is not None and self.held is not None:
            self.admission._leave_soon(self.held, completed)
        self.admission = None


@dataclass(slots=True)
class _View:
    """An expert's queue as last read, and what was forecast from it."""

    queue: AdmissionQueue
    now: float
    waits: dict[int, float] = field(default_factory=dict)


class Admission:
    """One gateway's door to all queues. `capacity` tells how many requests an expert takes at once, over its replicas.

    `on_verdict` is told (`admitted`, `queued` or the reason of a refusal, priority, seconds waited).
    """

    def __init__(
        self,
        store: Store,
        config: AdmissionConfig,
        experts: Iterable[str],
        capacity: Callable[[str], int],
        *,
        gateways: int = 1,
        on_verdict: Callable[[str, int, float], None] | None = None,
    ) -> None:
        self._store = store
        self._config = config
        self._experts = tuple(experts)
        self._capacity = capacity
        self._gateways = gateways
        self._on_verdict = on_verdict
        self.gateway = uuid.uuid4().hex[:12]
        self._numbers = itertools.count(1)
        self._held: dict[str, _Held] = {}
        self._local: dict[str, AdmissionQueue] = {}
        self._views: dict[str, _View] = {}
        self._touched: dict[str, float] = {}  # expert -> when its queue was last changed from here
        self._tasks: list[asyncio.Task[None]] = []
        self._leaving: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen for news of this gateway's requests until `close`."""
        if self._config.enabled:
            self._tasks = [
                asyncio.create_task(self._keep_reading_mail(), name="admission-mail"),
                asyncio.create_task(self._keep_in_step(), name="admission-sync"),
                asyncio.create_task(self._keep_looking(), name="admission-look"),
            ]

    async def close(self) -> None:
        """Stop; what this gateway still holds is given back."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for held in list(self._held.values()):
            held.running.cancel()
            self._leave_soon(held, completed=False)
        await asyncio.gather(*self._leaving, return_exceptions=True)

    # -- for requests ------------------------------------------------------------------------------------------

    async def enter(
        self,
        expert: str,
        *,
        tenant: str = "",
        weight: float = 1.0,
        priority: int = 0,
        slack_s: float | None = None,
        due_s: float | None = None,
        service_s: float = 1.0,
        places: int = 1,
    ) -> Slot:
        """Wait for a place. The caller gives it back, whatever happens.

        Args:
            expert: the deployment that will answer.
            tenant, weight: whose share of the service it counts to.
            priority: greater is sooner.
            slack_s: seconds from now in which it must start; None: as long as the configuration lets it wait.
            due_s: seconds from now that its place in the queue goes by; None: `slack_s`.
            service_s: predicted seconds until its answer is complete, once it has started.
            places: answers drawn at once.

        Raises:
            Shed: it could not start in time, or too many wait.
        """
        if not self._config.enabled:
            return Slot(None, None)
        slack_s = self._config.max_wait_s if slack_s is None else min(slack_s, self._config.max_wait_s)
        slack_s = max(slack_s, LEAST_SLACK_S)
        due_s = slack_s if due_s is None else min(due_s, self._config.max_wait_s)
        now = time.monotonic()
        if len(self._held) >= MAX_HELD:
            raise _shed("queue_full", expert, 1.0)
        ticket = Ticket(
            id=f"{self.gateway}/{next(self._numbers)}",
            tenant=tenant,
            weight=weight,
            priority=priority,
            arrived=now,
            deadline=now + slack_s,
            due=now + due_s,
            service=max(service_s, 0.001),
            places=max(1, places),
        )
        held = _Held(ticket, expert, slack_s, now, asyncio.get_running_loop().create_future())
        self._held[ticket.id] = held
        try:
            await self._arrive(held)
            if not held.running.done():
                self._tell("queued", priority, 0.0)
            await held.running
        except BaseException as error:
            if isinstance(error, Shed):
                self._held.pop(ticket.id, None)
                self._tell(error.code, priority, time.monotonic() - now)
            else:
                self._leave_soon(held, completed=False)
            raise
        waited = time.monotonic() - now
        self._tell("admitted", priority, waited)
        return Slot(self, held, waited)

    def wait_ms(self, expert: str, priority: int) -> float:
        """How long a request of this priority would wait for the expert, by the queue as last read."""
        view = self._views.get(expert)
        if view is None:
            return 0.0
        if priority not in view.waits:
            last = view.now + self._config.max_wait_s
            far = Ticket("?/", "", 1.0, priority, view.now, last, last, 1.0)
            view.waits[priority] = 1000 * min(view.queue.forecast(far, view.now), 3600.0)
        return view.waits[priority]

    # -- the store's queue -------------------------------------------------------------------------------------

    async def _arrive(self, held: _Held) -> None:
        ticket = held.ticket
        gone = time.monotonic() - held.since
        slack, due = held.slack_s - gone, ticket.due - ticket.arrived - gone
        arguments = (ticket.tenant, ticket.weight, ticket.priority, slack, due, ticket.service, ticket.places)
        try:
            await self._ask("arrive", held.expert, ticket.id, *arguments)
        except StoreUnavailable:
            self._go_on_alone(held)

    async def _ask(self, operation: str, expert: str, *arguments: Any) -> tuple[list[str], list[str]]:
        """One step of the shared queue; returns the ids that run and that wait (`sync` only)."""
        head = (operation, expert, self._places(expert), self._config.max_queued, self.gateway)
        if operation != "sync":
            self._touched[expert] = time.monotonic()
        keys = [f"admission:queue:{expert}", "admission:mail:"]
        _, told, runs, waits = await self._store.script(ADMISSION, keys, [*head, *arguments])
        for id, reason, retry in told:
            self._learn(Event(id.decode(), reason.decode() or None, float(retry)), expert)
        return [id.decode() for id in runs], [id.decode() for id in waits]

    def _learn(self, event: Event, expert: str) -> None:
        held = self._held.get(event.id)
        if held is None or held.running.done():
            return  # it has stopped waiting; the next `sync` frees its place
        if event.reason is None:
            held.running.set_result(None)
        else:
            held.running.set_exception(_shed(event.reason, expert, event.retry_after_s))

    def _leave_soon(self, held: _Held, completed: bool) -> None:
        self._held.pop(held.ticket.id, None)
        if held.local:
            self._apply(
                held.expert, self._local[held.expert].leave(held.ticket.id, time.monotonic(), completed=completed)
            )
            return
        task = asyncio.get_running_loop().create_task(self._leave(held, completed))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _leave(self, held: _Held, completed: bool) -> None:
        try:
            await self._ask("leave", held.expert, held.ticket.id, "1" if completed else "0")
        except StoreUnavailable:
            pass  # `sync` will not list it
        except Exception:
            log.exception("a place at expert %s could not be given back", held.expert)

    async def _keep_reading_mail(self) -> None:
        mailbox = f"admission:mail:{self.gateway}"
        while True:
            try:
                mail = await self._store.take(mailbox, MAIL_S)
                if mail is not None:
                    expert, id, reason, retry = msgpack.unpackb(mail)
                    self._learn(Event(id, reason or None, float(retry)), expert)
            except StoreUnavailable:
                await asyncio.sleep(LOOK_S)
            except Exception:
                log.exception("the mailbox of admission could not be read")
                await asyncio.sleep(LOOK_S)

    async def _keep_in_step(self) -> None:
        while True:
            await asyncio.sleep(SYNC_S)
            now = time.monotonic()
            # Also where nothing is held: a request that left before its arrival was noted holds a place.
            by_expert: dict[str, list[_Held]] = {e: [] for e, at in self._touched.items() if now - at < SETTLE_S}
            for held in self._held.values():
                by_expert.setdefault(held.expert, []).append(held)
            for expert, all_held in by_expert.items():
                try:
                    await self._synchronise(expert, all_held)
                except Exception:
                    log.exception("the queue of expert %s could not be brought in step", expert)

    async def _synchronise(self, expert: str, all_held: list[_Held]) -> None:
        now = time.monotonic()
        if expert in self._local:
            queue = self._local[expert]
            queue.capacity = self._places(expert, alone=True)
            self._apply(expert, queue.sync(self.gateway, {h.ticket.id for h in all_held if h.local}, now))
        shared = [held for held in all_held if not held.local]
        try:
            runs, waits = await self._ask("sync", expert, *(held.ticket.id for held in shared))
        except StoreUnavailable:
            for held in shared:
                if not held.running.done():
                    self._go_on_alone(held)
            return
        known = {*runs, *waits}
        for id in runs:
            self._learn(Event(id), expert)
        for held in shared:
            if held.ticket.id not in known and not held.running.done() and now - held.since > SYNC_S:
                await self._arrive(held)  # the store has forgotten it: it was emptied, or took us for dead

    async def _keep_looking(self) -> None:
        while True:
            try:
                states = await asyncio.gather(*(self._store.get(f"admission:queue:{e}") for e in self._experts))
                now = time.time()
                for expert, state in zip(self._experts, states, strict=True):
                    self._see(expert, state, now)
            except StoreUnavailable:
                now = time.monotonic()
                self._views = {expert: _View(queue, now) for expert, queue in self._local.items()}
            except Exception:
                log.exception("the queues of admission could not be read")
            await asyncio.sleep(LOOK_S)

    def _see(self, expert: str, state: bytes | None, now: float) -> None:
        if state is None:
            self._views.pop(expert, None)
            return
        data = msgpack.unpackb(state)
        queue = AdmissionQueue(self._places(expert), self._config.max_queued)
        queue.running = {t["id"]: Ticket(**t) for t in data["running"] or ()}
        queue.waiting = [Ticket(**t) for t in data["waiting"] or ()]
        queue.shares, queue.ratio = dict(data["shares"] or {}), data["ratio"]
        # Its clock may differ from ours: it stands at its latest mark, or later.
        marks = [max(t.arrived, t.started) for t in (*queue.running.values(), *queue.waiting)]
        latest = max([*marks, *dict(data["seen"] or {}).values()], default=now)
        self._views[expert] = _View(queue, max(latest, min(now, latest + SYNC_S)))

    # -- without the store -------------------------------------------------------------------------------------

    def _go_on_alone(self, held: _Held) -> None:
        queue = self._local.get(held.expert)
        if queue is None:
            queue = self._local[held.expert] = AdmissionQueue(0, self._config.max_queued)
        queue.capacity = self._places(held.expert, alone=True)
        held.local = True
        self._apply(held.expert, queue.arrive(held.ticket, time.monotonic()))

    def _apply(self, expert: str, events: list[Event]) -> None:
        for event in events:
            self._learn(event, expert)

    def _places(self, expert: str, *, alone: bool = False) -> int:
        places = max(1, self._capacity(expert))
        return max(1, places // self._gateways) if alone else places

    def _tell(self, verdict: str, priority: int, waited_s: float) -> None:
        if self._on_verdict is not None:
            self._on_verdict(verdict, priority, waited_s)


def _shed(reason: str, expert: str, retry_after_s: float) -> Shed:
    retry = min(max(retry_after_s, 1.0), LONGEST_RETRY_S)
    return Shed(_SAID[reason].format(expert=expert), code=reason, retry_after_s=retry)
