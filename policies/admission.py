"""Who may start next: the queue in front of one expert, as a pure state machine.

An expert has `capacity` places. A request that finds one free starts; the others wait, in this order:

1. greater priority first;
2. then the tenant that has been served least, by weight (the counters of VTC, "Fairness in Serving Large Language
   Models", OSDI 2024), so that one tenant's backlog does not stand before another's first request;
3. of one tenant's requests, and between tenants that were served alike, the one that is due earliest (EDF).

After each change the queue forecasts when each waiting request would start, by list scheduling over the predicted ends
of those that run. One that would start after its deadline is shed at once, rather than when it is too late; since the
order has the lowest priority last, the lowest is shed first.

This is the reference. The gateways share their queues in Redis, where the same steps are a Lua script
(`serving/admission_script.py`); a test holds the two equal. It serves where there is no store: in the simulation, and
while the store is lost. Times are in seconds of any one clock.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Literal

GONE_S = 5.0  # after which a gateway that was not heard of is taken for dead, and its requests for ended
GRACE_S = 2.0  # in which a request that its gateway does not list may be on its way
LEARNING_RATE = 0.05  # of how far service takes longer than predicted
MAX_SHARES = 4096  # tenants whose service is remembered; the least served are forgotten first

Reason = Literal["queue_full", "shed_deadline", "shed_priority"]


@dataclass(slots=True)
class Ticket:
    """A request at an expert's door.

    `id` begins with its gateway's id and a slash. `deadline` is the latest moment at which it may start, and `due` the
    one that its place in the queue goes by: a caller in a hurry may be refused earlier, not served earlier.
    `service` is the predicted time in its place, in seconds, `places` how many it takes (one an answer; more than
    there are count as all), `started` when it got them (0: it waits).
    """

    id: str
    tenant: str
    weight: float
    priority: int
    arrived: float
    deadline: float
    due: float
    service: float
    places: int = 1
    started: float = 0.0

    @property
    def gateway(self) -> str:
        """Whose request it is."""
        return self.id.partition("/")[0]


@dataclass(slots=True, frozen=True)
class Event:
    """What became of a ticket: `reason` None says that it may start; else it was shed, to try again after a while."""

    id: str
    reason: Reason | None = None
    retry_after_s: float = 0.0


@dataclass(slots=True)
class AdmissionQueue:
    """The places and the queue of one expert.

    `shares` counts the service that tenants had, in seconds by weight; `seen` when each gateway was last heard of;
    `ratio` how many times longer than predicted service takes, learned from what has ended.
    """

    capacity: int
    max_queued: int
    running: dict[str, Ticket] = field(default_factory=dict)
    waiting: list[Ticket] = field(default_factory=list)
    shares: dict[str, float] = field(default_factory=dict)
    seen: dict[str, float] = field(default_factory=dict)
    ratio: float = 1.0

    # -- what happens ------------------------------------------------------------------------------------------

    def arrive(self, ticket: Ticket, now: float) -> list[Event]:
        """A request comes. The events may concern others too: those who may start, and those it displaces."""
        self._hear(ticket.gateway, now)
        events = self._advance(now)
        if ticket.id in self.running:  # the call was repeated
            return [*events, Event(ticket.id)]
        if not any(t.id == ticket.id for t in self.waiting):
            if not self.waiting and not self.running:
                self.shares.clear()  # what was served while nobody else wanted it is nobody's debt
            least = [self.shares.get(t.tenant, 0.0) for t in (*self.waiting, *self.running.values())]
            self.shares[ticket.tenant] = max(self.shares.get(ticket.tenant, 0.0), min(least, default=0.0))
            self.waiting.append(ticket)
            events += self._bound(ticket.priority, now)
        return events + self._advance(now)

    def leave(self, id: str, now: float, *, completed: bool) -> list[Event]:
        """A request ends, or stops waiting. Only a completed one tells how long service takes."""
        self._hear(id.partition("/")[0], now)
        ticket = self.running.pop(id, None)
        if ticket is None:
            self.waiting = [t for t in self.waiting if t.id != id]
        elif completed and ticket.service > 0:
            actual = (now - ticket.started) / ticket.service
            self.ratio += LEARNING_RATE * (min(max(actual, 0.05), 20.0) - self.ratio)
        return self._advance(now)

    def sync(self, gateway: str, ids: Collection[str], now: float) -> list[Event]:
        """A gateway is alive and has these requests, and no others but such as are just arriving."""
        self._hear(gateway, now)
        mine = set(ids)

        def stays(ticket: Ticket) -> bool:
            return ticket.gateway != gateway or ticket.id in mine or now - max(ticket.arrived, ticket.started) < GRACE_S

        self.running = {id: ticket for id, ticket in self.running.items() if stays(ticket)}
        self.waiting = [ticket for ticket in self.waiting if stays(ticket)]
        return self._advance(now)

    def forecast(self, ticket: Ticket, now: float) -> float:
        """How long this request would wait if it came now, in seconds."""
        return max(0.0, self._forecast(ticket, now) - now)

    # -- inside ------------------------------------------------------------------------------------------------

    def _hear(self, gateway: str, now: float) -> None:
        """Note a sign of life, and forget the dead with all that they held."""
        self.seen[gateway] = now
        dead = [name for name, at in self.seen.items() if now - at > GONE_S]
        if dead:
            for name in dead:
                del self.seen[name]
            self.running = {id: t for id, t in self.running.items() if t.gateway not in dead}
            self.waiting = [t for t in self.waiting if t.gateway not in dead]

    def _advance(self, now: float) -> list[Event]:
        """Let start who may, and shed who would start too late."""
        events: list[Event] = []
        order = self._ordered(self.waiting)
        free = self.capacity - sum(t.places for t in self.running.values())
        while order and 0 < free >= min(order[0].places, self.capacity):
            ticket = order[0]
            self.waiting.remove(ticket)
            if ticket.deadline < now:
                events.append(Event(ticket.id, "shed_deadline", ticket.service * self.ratio))
            else:
                ticket.started = now
                self.running[ticket.id] = ticket
                free -= ticket.places
                self._count(ticket)
                events.append(Event(ticket.id))
            order = self._ordered(self.waiting)
        if order:
            events += self._shed(order, now)
        return events

    def _bound(self, priority: int, now: float) -> list[Event]:
        """Where too many of a priority wait, refuse the last of them: of the tenant that asks for most."""
        free = self.capacity - sum(t.places for t in self.running.values())
        equals = [t for t in self.waiting if t.priority == priority]
        if len(equals) <= self.max_queued or free > 0:  # with a place free nobody stays waiting but for many places
            return []
        last = self._ordered(equals)[-1]
        self.waiting.remove(last)
        return [Event(last.id, "queue_full", self._forecast(last, now) - now)]

    def _count(self, ticket: Ticket) -> None:
        self.shares[ticket.tenant] = (
            self.shares.get(ticket.tenant, 0.0) + ticket.service * ticket.places / ticket.weight
        )
        if len(self.shares) > MAX_SHARES:
            present = {t.tenant for t in (*self.waiting, *self.running.values())}
            self.shares = {tenant: share for tenant, share in self.shares.items() if tenant in present}

    def _ordered(self, tickets: Iterable[Ticket]) -> list[Ticket]:
        """The waiting ones, who starts first first. What each will have been served counts for those behind it."""
        order: list[Ticket] = []
        served = dict(self.shares)
        by_due = sorted(tickets, key=lambda t: (-t.priority, *_standing(t)), reverse=True)
        while by_due:
            queues: dict[str, list[Ticket]] = {}
            priority = by_due[-1].priority
            equals = [t for t in by_due if t.priority == priority]
            del by_due[-len(equals) :]
            for ticket in equals:
                queues.setdefault(ticket.tenant, []).append(ticket)
            while queues:
                tenant = min(queues, key=lambda name: (served.get(name, 0.0), *_standing(queues[name][-1])))
                ticket = queues[tenant].pop()
                served[tenant] = served.get(tenant, 0.0) + _cost(ticket)
                order.append(ticket)
                if not queues[tenant]:
                    del queues[tenant]
        return order

    def _ends(self, now: float) -> list[float]:
        """A heap of when each place is free, by prediction; the first are those that are free now."""
        ends = []
        for t in self.running.values():
            ends += [max(now, t.started + t.service * self.ratio)] * t.places
        ends.sort(reverse=True)
        ends = ends[: self.capacity] + [now] * (self.capacity - len(ends))
        heapq.heapify(ends)
        return ends

    def _take(self, ends: list[float], ticket: Ticket, latest: float) -> float:
        """Give the ticket the places that are free first, unless that is too late; returns when it would start."""
        taken = [heapq.heappop(ends) for _ in range(min(ticket.places, len(ends)))]
        start = taken[-1]
        end = start + ticket.service * self.ratio
        for free in taken:
            heapq.heappush(ends, end if start <= latest else free)
        return start

    def _forecast(self, ticket: Ticket, now: float) -> float:
        """When a request that is not in the queue would start."""
        ends = self._ends(now)
        if not ends:
            return math.inf
        for other in self._ordered([*self.waiting, ticket]):
            start = self._take(ends, other, math.inf)
            if other is ticket:
                return start
        raise AssertionError("the ticket is in the order")

    def _shed(self, order: list[Ticket], now: float) -> list[Event]:
        ends = self._ends(now)
        events = []
        for ticket in order:
            # Without any place nobody can tell: it waits until its deadline.
            start = self._take(ends, ticket, ticket.deadline) if ends else now
            if start <= ticket.deadline:
                continue
            self.waiting.remove(ticket)
            reason: Reason = "shed_priority" if order[0].priority > ticket.priority else "shed_deadline"
            events.append(Event(ticket.id, reason, start - ticket.deadline))
        return events


def _cost(ticket: Ticket) -> float:
    """What a ticket adds to its tenant's service, by weight."""
    return ticket.service * ticket.places / ticket.weight


def _standing(ticket: Ticket) -> tuple[float, float, str]:
    """Who of two requests of tenants that were served alike goes first: the lesser."""
    return ticket.due, ticket.arrived, ticket.id
