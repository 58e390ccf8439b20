"""A load replayed against policies without engines: discrete events in virtual time.

The parts that decide are the service's own (`decide`, `AdmissionQueue`), and the engines are `SimulatedBatch`, which
`engine: simulated` runs in real time. What is left out: the network, what one gateway does not know of
another, budgets and rates, caches, failures, and answers drawn in parallel.

Three systems, for comparison:

- `signalbox`: each request's policy decides, by forecasts for this very request; admission in front of each expert.
- `fcfs`: the policies' weights decide, ceilings and priorities count for nothing, and requests wait in the engines'
  queues, first come, first served.
- `round_robin`: the experts in turn, and the engines' queues.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from signalbox.experts.catalog import Price
from signalbox.experts.speed_model import SimulatedBatch, SpeedModel, Token
from signalbox.policies.admission import AdmissionQueue, Event, Ticket
from signalbox.policies.attainment import Figures, Outcome, figures
from signalbox.policies.base import Candidate, NoCandidate, Policy, Rating, RequestShape, Slo
from signalbox.policies.decide import decide, slack_ms
from signalbox.policies.simulate_load import Arrival

System = Literal["signalbox", "fcfs", "round_robin"]

ANSWER_TOKENS = 256  # what an answer is taken to have where the request sets no max_tokens, as in the service
GATEWAY, TENANT = "simulation", "anonymous"
LOOK_S = 0.25  # as `serving/live_state.py` and `serving/admission.py`
NEWEST = 0.05  # weight of the newest request in the mean time that requests spend in their places


@dataclass(slots=True, frozen=True)
class ExpertModel:
    """One expert of the simulated pool.

    `speed` is of each of `replicas` engines with `max_running` places and a queue of `max_waiting`. `quality` is the
    mean and the standard deviation of the predicted quality, for requests that bring none. `overhead_ms` is added to
    each request's times: what gateway and network take.
    """

    name: str
    speed: SpeedModel
    price: Price = field(default_factory=Price)
    max_running: int = 16
    max_waiting: int = 256
    replicas: int = 1
    bytes_per_token: float = 4.0
    context_length: int | None = None
    parameters: int | None = None
    quality: tuple[float, float] = (0.5, 0.0)
    overhead_ms: float = 0.0


@dataclass(slots=True, frozen=True)
class Simulated:
    """What became of each request, in the order in which they came, over `seconds` of offered load."""

    system: System
    seconds: float
    outcomes: list[Outcome]

    def figures(self, policies: Mapping[str, Policy]) -> dict[str, Figures]:
        """By policy, and under `all`."""
        return figures(self.outcomes, policies, self.seconds)


def simulate(
    load: Sequence[Arrival],
    experts: Iterable[ExpertModel],
    policies: Mapping[str, Policy],
    *,
    system: System = "signalbox",
    deciding: Mapping[str, Policy] | None = None,
    max_queued: int = 128,
    max_wait_s: float = 60.0,
    grace_s: float = math.inf,
    look_s: float = LOOK_S,
    spread: float = 1.0,
    seconds: float | None = None,
    seed: int = 0,
) -> Simulated:
    """Run a load through a system, in virtual time. The same arguments give the same result.

    Args:
        load: in the order of time.
        experts: the pool; the order is that of `round_robin`.
        policies: by the name in the load; their ceilings, priorities and weights.
        system: which one to simulate.
        deciding: policies that decide in place of those of the same name, as where all ask for one policy.
        max_queued: requests of one priority that wait for one expert, in `signalbox`.
        max_wait_s: how long a request waits at most where its policy promises no time, seconds.
        grace_s: seconds after the last arrival at which what still runs counts as unfinished; default: never.
        look_s: how often a gateway looks at the experts' load and queues, seconds; 0: at each request.
        spread: the router's typical quality gap.
        seconds: for how long the load was offered; default: until its last arrival.
        seed: of the engines' jitter and of drawn qualities.

    Raises:
        KeyError: a request names a policy that is not there.
        ValueError: there is no expert, or two of one name.
    """
    pool = [_Server(expert, max_queued, f"{seed}") for expert in experts]
    if not pool:
        raise ValueError("the pool has no expert")
    if len({server.name for server in pool}) < len(pool):
        raise ValueError("two experts have one name")
    run = _Run(system, pool, dict(policies) | dict(deciding or {}), max_wait_s, look_s, spread, seed)
    outcomes = run.play(load, grace_s)
    length = seconds if seconds is not None else (load[-1].at if load else 0.0)
    return Simulated(system, length, outcomes)


@dataclass(slots=True)
class _Request:
    """A request under way. `order` are the experts to try from here on, of which the first has it now."""

    number: int
    arrival: Arrival
    order: list[_Server]
    priority: int = 0
    ratings: dict[str, Rating] = field(default_factory=dict)
    slo: Slo = field(default_factory=Slo)
    batch: int = 0
    started: float = 0.0
    first: float = 0.0

    @property
    def server(self) -> _Server:
        return self.order[0]


@dataclass(slots=True)
class _View:
    """What a gateway knows of an expert's load since it last looked; `waits` are forecasts by priority, ms."""

    at: float
    running: int
    waiting: int
    prompt_tokens: int
    waits: dict[int, float] = field(default_factory=dict)


class _Server:
    """One expert: its engines, and the queue in front of them."""

    def __init__(self, expert: ExpertModel, max_queued: int, seed: str) -> None:
        self.expert, self.name = expert, expert.name
        seeds = random.Random(f"{seed}/{expert.name}")
        self.batches = [
            SimulatedBatch(expert.speed, expert.max_running, seed=seeds.getrandbits(32)) for _ in range(expert.replicas)
        ]
        self.queue = AdmissionQueue(expert.max_running * expert.replicas, max_queued)
        self._service_s: float | None = None
        self._view: _View | None = None

    def prompt_tokens(self, arrival: Arrival) -> int:
        return max(1, math.ceil(arrival.size / self.expert.bytes_per_token))

    def least_loaded(self) -> int:
        return min(range(len(self.batches)), key=lambda i: (self.batches[i].running + self.batches[i].waiting, i))

    def full(self) -> bool:
        """Whether the engine that would get the next request has no room left in its own queue."""
        batch = self.batches[self.least_loaded()]
        return batch.running + batch.waiting >= self.expert.max_running + self.expert.max_waiting

    def served(self, seconds: float) -> None:
        """A request was this long in its place."""
        old = self._service_s
        self._service_s = seconds if old is None else (1 - NEWEST) * old + NEWEST * seconds

    def look(self, now: float, look_s: float) -> _View:
        """The expert as a gateway sees it, which looks this often."""
        if self._view is None or now - self._view.at >= look_s:
            batch = self.batches[self.least_loaded()]
            self._view = _View(now, batch.running, batch.waiting, batch.prompt_tokens_waiting)
        return self._view

    def wait_ms(self, view: _View, priority: int, max_wait_s: float, now: float) -> float:
        """Predicted wait in the queue of admission, for any request of this priority."""
        if priority not in view.waits:
            ticket = Ticket("forecast/", TENANT, 1.0, priority, now, now + max_wait_s, now + max_wait_s, 1.0)
            view.waits[priority] = 1000 * self.queue.forecast(ticket, now)
        return view.waits[priority]

    def latency_ms(self, view: _View, prompt_tokens: int) -> tuple[float, float]:
        """Predicted time to first token and per further token of a request that is given to the engine now."""
        expert = self.expert
        step_s = expert.speed.step_s(min(view.running + 1, expert.max_running))
        # The step under way is half over when a request comes, on average; then its prompt is read after the others'.
        steps = 1.5 if view.running else 1.0
        first_s = steps * step_s + (view.prompt_tokens + prompt_tokens) / expert.speed.prefill_tokens_per_s
        admitted = bool(self.queue.running)  # then the wait for a place is the queue's, not the engine's
        if view.running >= expert.max_running and self._service_s is not None and not admitted:
            first_s += (view.waiting + 1) * self._service_s / expert.max_running
        return 1000 * first_s + expert.overhead_ms, 1000 * step_s


class _Run:
    def __init__(
        self,
        system: System,
        pool: list[_Server],
        deciding: Mapping[str, Policy],
        max_wait_s: float,
        look_s: float,
        spread: float,
        seed: int,
    ) -> None:
        self._system, self._pool, self._spread, self._seed = system, pool, spread, seed
        self._deciding, self._max_wait_s, self._look_s = deciding, max_wait_s, look_s
        self._servers = {server.name: server for server in pool}
        self._requests: dict[str, _Request] = {}  # those under way
        self._outcomes: dict[int, Outcome] = {}
        self._turn = 0

    def play(self, load: Sequence[Arrival], grace_s: float) -> list[Outcome]:
        end = (load[-1].at if load else 0.0) + grace_s
        number = 0
        while True:
            arrives = load[number].at if number < len(load) else math.inf
            busy = [(at, i, s) for i, s in enumerate(self._pool) for b in s.batches if (at := b.next_at) is not None]
            steps, _, server = min(busy, default=(math.inf, 0, None))
            if min(arrives, steps) > end or (math.isinf(arrives) and server is None):
                break
            if server is not None and steps <= arrives:
                self._step(server, steps)
            else:
                self._arrive(number, load[number])
                number += 1
        for i, arrival in enumerate(load):
            if i not in self._outcomes:
                self._outcomes[i] = Outcome(arrival.policy, arrival.at, "unfinished")
        return [self._outcomes[i] for i in range(len(load))]

    # -- a request comes ---------------------------------------------------------------------------------------

    def _arrive(self, number: int, arrival: Arrival) -> None:
        id = f"{GATEWAY}/{number}"
        if self._system == "round_robin":
            request = _Request(number, arrival, [self._pool[self._turn % len(self._pool)]])
            self._turn += 1
        else:
            try:
                request = self._decide(number, arrival)
            except NoCandidate:
                self._outcomes[number] = Outcome(arrival.policy, arrival.at, "shed", "no_candidate")
                return
        if self._system == "signalbox":
            self._requests[id] = request
            self._admit(id, request, arrival.at)
        elif request.server.full():
            self._outcomes[number] = Outcome(arrival.policy, arrival.at, "shed", "queue_full")
        else:
            self._requests[id] = request
            self._start(id, arrival.at)

    def _decide(self, number: int, arrival: Arrival) -> _Request:
        """Whom to ask, and whom next where that one has no place in time."""
        policy = self._deciding[arrival.policy]
        if self._system == "fcfs":
            policy = policy.model_copy(update={"slo": Slo(), "min_quality": 0.0})
        answer_tokens = arrival.max_tokens or ANSWER_TOKENS
        quality = {server.name: (self._quality(number, arrival, server), 0.0) for server in self._pool}
        candidates = [self._candidate(arrival, server, policy) for server in self._pool]
        shape = RequestShape(arrival.size, answer_tokens, arrival.max_tokens)
        decision = decide(quality, candidates, shape, policy, spread=self._spread)
        order = [self._servers[name] for name in (decision.expert, *decision.fallbacks)]
        ratings = {rating.expert: rating for rating in decision.ratings}
        return _Request(number, arrival, order, policy.priority, ratings, policy.slo)

    def _quality(self, number: int, arrival: Arrival, server: _Server) -> float:
        if arrival.quality is not None:
            return arrival.quality.get(server.name, 0.0)
        mean, deviation = server.expert.quality
        if deviation == 0:
            return mean
        drawn = random.Random(f"{self._seed}/{number}/{server.name}").gauss(mean, deviation)
        return min(1.0, max(0.0, drawn))

    def _candidate(self, arrival: Arrival, server: _Server, policy: Policy) -> Candidate:
        expert, wait_ms = server.expert, 0.0
        view = server.look(arrival.at, self._look_s)
        ttft_ms, tpot_ms = server.latency_ms(view, server.prompt_tokens(arrival))
        if self._system == "signalbox":
            wait_ms = server.wait_ms(view, policy.priority, self._max_wait_s, arrival.at)
        return Candidate(
            name=server.name,
            price_input=expert.price.input,
            price_output=expert.price.output,
            ttft_ms=ttft_ms,
            tpot_ms=tpot_ms,
            context_length=expert.context_length,
            parameters=expert.parameters,
            bytes_per_token=expert.bytes_per_token,
            wait_ms=wait_ms,
        )

    # -- waits -------------------------------------------------------------------------------------------------

    def _admit(self, id: str, request: _Request, now: float) -> None:
        """To the door of its expert, to start before the ceilings cannot be kept any more."""
        rating = request.ratings[request.server.name]
        slack = slack_ms(rating, request.slo)
        latest = now + self._max_wait_s
        if slack is not None:
            latest = min(latest, request.arrival.at + slack / 1000)
        service_s = max((rating.total_ms - rating.wait_ms) / 1000, 0.001)
        ticket = Ticket(id, TENANT, 1.0, request.priority, now, latest, latest, service_s)
        self._happened(request.server.queue.arrive(ticket, now), now)

    def _happened(self, events: list[Event], now: float) -> None:
        for event in events:
            if event.reason is None:
                self._start(event.id, now)
            else:
                self._refuse(event.id, event.reason, now)

    def _refuse(self, id: str, reason: str, now: float) -> None:
        """On to the next expert, if there is one."""
        request = self._requests[id]
        if len(request.order) > 1:
            request.order.pop(0)
            self._admit(id, request, now)
            return
        del self._requests[id]
        self._outcomes[request.number] = Outcome(request.arrival.policy, request.arrival.at, "shed", reason)

    # -- runs --------------------------------------------------------------------------------------------------

    def _start(self, id: str, now: float) -> None:
        request = self._requests[id]
        server, arrival = request.server, request.arrival
        request.batch, request.started = server.least_loaded(), now
        answer = arrival.answer_tokens or arrival.max_tokens or ANSWER_TOKENS
        server.batches[request.batch].submit(id, server.prompt_tokens(arrival), answer, now)

    def _step(self, server: _Server, now: float) -> None:
        """A step of one of the expert's engines ends."""
        for batch in server.batches:
            if batch.next_at is not None and batch.next_at <= now:
                for token in batch.advance(now):
                    self._written(server, token)

    def _written(self, server: _Server, token: Token) -> None:
        request = self._requests[token.request]
        if token.first:
            request.first = token.at
        if not token.last:
            return
        del self._requests[token.request]
        self._outcomes[request.number] = _answered(request, token.at)
        server.served(token.at - request.started)
        if self._system == "signalbox":
            self._happened(server.queue.leave(token.request, token.at, completed=True), token.at)


def _answered(request: _Request, ended: float) -> Outcome:
    arrival, expert = request.arrival, request.server.expert
    tokens = arrival.answer_tokens or arrival.max_tokens or ANSWER_TOKENS
    return Outcome(
        policy=arrival.policy,
        at=arrival.at,
        status="answered",
        expert=expert.name,
        ttft_ms=1000 * (request.first - arrival.at) + expert.overhead_ms,
        tpot_ms=1000 * (ended - request.first) / (tokens - 1) if tokens > 1 else 0.0,
        total_ms=1000 * (ended - arrival.at) + expert.overhead_ms,
        cost_usd=expert.price.usd(request.server.prompt_tokens(arrival), tokens),
    )
