"""From a checked request to a running answer: who may answer, who shall, what is cached, and what if they fail.

The exact cache is read in two steps, so that a repeated `auto` request spends no time on the predictor and an
answer is kept once however it was asked for. `decision:<key>`, by policy and request, says which expert was chosen;
`cache:<key>`, by expert and request, holds its answer. A request that names the expert needs the second alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson

from signalbox.experts.base import (
    AdapterNotLoaded,
    Chunk,
    ExpertError,
    ExpertUnavailable,
    InvalidRequest,
    ReplicaNotReady,
    Unsupported,
)
from signalbox.experts.catalog import matches
from signalbox.policies.base import Decision, NoCandidate, Policy, RequestShape
from signalbox.policies.decide import decide
from signalbox.policies.explore import explore
from signalbox.policies.flags import objective_of_flags, objective_of_tradeoff
from signalbox.serving.cache import CachedAnswer, ResponseCache
from signalbox.serving.config import Config
from signalbox.serving.expert_deployment import ExpertClient
from signalbox.serving.options import Options, parse_options, take_flags
from signalbox.serving.pool import Pool, Target, hash_of
from signalbox.serving.protocols.openai import Call
from signalbox.serving.protocols.openai_replies import AnswerBuilder
from signalbox.serving.routing import Basis, Routing
from signalbox.serving.store import Store, StoreUnavailable
from signalbox.serving.streams import Batch, close, merged, resume, single

log = logging.getLogger(__name__)

AUTO = "auto"
REPLICA_WAIT_S = 5.0  # to find a replica that is ready and holds the adapter, when one has just died or lost it
REPLICA_PAUSE_S = 0.05
ANSWER_TOKENS = 256  # what an answer is taken to have where the request sets no max_tokens

# A policy broken by these alone may be kept a moment later.
_TRANSIENT = frozenset({"available", "max_ttft_ms", "max_tpot_ms", "max_total_ms"})

CacheVerdict = Literal["hit", "miss", "bypass"]


@dataclass(slots=True)
class Plan:
    """Who is to answer, and why. `order` has the chosen expert first, then whom to try when it fails.

    `decision`, `flags` and what follows are of `auto` requests only. `call` is the request as the experts are to see
    it. `explored` says that the policy's exploration chose, `propensity` with which probability it was to choose so.
    """

    call: Call
    order: list[str]
    router: str
    policy: str
    confidence: float | None = None
    decision: Decision | None = None
    flags: list[str] = field(default_factory=list)
    basis: Basis | None = None
    explored: bool = False
    propensity: float = 1.0


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
    keep: _Keep | None = None
    asked: Target | None = None
    source: AsyncIterator[Batch] | None = None

    async def __aiter__(self) -> AsyncIterator[Batch]:
        keep = self.keep
        async for index, chunks in self.batches:
            self.builder.add(index, chunks)
            if keep is not None:
                keep.choices[index].extend(chunks)
            yield index, chunks

    async def aclose(self) -> None:
        """Stop the expert if it still generates."""
        await close(self.batches)
        await close(self.source)  # a generator that nobody has begun to read closes nothing below it


@dataclass(slots=True)
class _Asked:
    """Which expert answers: an adapter's version is settled when it is asked."""

    target: Target | None = None


@dataclass(slots=True)
class _Keep:
    """An answer on its way into the cache."""

    namespace: str
    ttl_s: float | None
    choices: list[list[Chunk]]
    decision_key: str | None


class Dispatcher:
    """Resolves, decides, runs. One a gateway process."""

    def __init__(
        self,
        config: Config,
        *,
        experts: Mapping[str, ExpertClient],
        pool: Pool,
        routing: Routing,
        store: Store,
    ) -> None:
        self._config = config
        self._experts = experts
        self._pool = pool
        self._routing = routing
        self._store = store
        self._cache = ResponseCache(store, config.cache)
        self._pool_version = _version_of_pool(config)

    # -- who may be asked for ----------------------------------------------------------------------------------

    def model_names(self) -> list[str]:
        """Everything that `model` may be."""
        return [AUTO, *(f"{AUTO}:{policy}" for policy in self._config.policies), *self._pool.names()]

    async def resolve(self, model: str) -> tuple[str, Policy] | Target:
        """Name and content of the policy that an `auto` model asks for, or the expert that `model` names.

        Raises `InvalidRequest` with status 404 where there is no such model.
        """
        head, colon, name = model.partition(":")
        if head == AUTO and not colon:
            default = self._config.default_policy
            return (default, self._config.policies[default]) if default else ("default", Policy())
        if head == AUTO and name in self._config.policies:
            return name, self._config.policies[name]
        target = await self._pool.find(model)
        if target is None:
            raise self._pool.unknown(model, (AUTO, *(f"{AUTO}:{policy}" for policy in self._config.policies)))
        return target

    # -- the decision ------------------------------------------------------------------------------------------

    async def plan(self, call: Call, *, slo_ttft_ms: float | None = None) -> Plan:
        """Decide who answers, without asking anyone. Raises `InvalidRequest`, or `ExpertUnavailable` (503)."""
        return await self._plan(call, parse_options(call.options), slo_ttft_ms, asking=False)

    async def _plan(self, call: Call, options: Options, slo_ttft_ms: float | None, *, asking: bool = True) -> Plan:
        for name in options.fallbacks or ():
            if await self._pool.find(name) is None:
                raise InvalidRequest(
                    f"'signalbox.fallbacks' names '{name[:64]}', which is no expert; "
                    f"there are: {', '.join(self._pool.names())}",
                    param="signalbox.fallbacks",
                )
        asked = await self.resolve(call.model)
        if isinstance(asked, Target):
            order = list(dict.fromkeys([asked.name, *(options.fallbacks or ())]))
            return Plan(call, order, router="none", policy="none")
        name, policy = asked
        policy = self._tighten(policy, options, slo_ttft_ms, call)
        call, prompts, flags = take_flags(call)
        scores = await self._routing.predict(prompts)
        objective = policy.objective
        if options.cost_quality_tradeoff is not None:
            objective = objective_of_tradeoff(options.cost_quality_tradeoff)
        if flags:
            objective = objective_of_flags(flags, objective)
        answer_tokens = call.sampling.max_tokens or ANSWER_TOKENS
        try:
            decision = decide(
                scores.quality,
                self._pool.candidates(),
                RequestShape(call.prompt_bytes(), answer_tokens, call.sampling.max_tokens),
                policy,
                spread=scores.spread,
                objective=objective,
                policy_name=name,
            )
        except NoCandidate as error:
            raise _no_candidate(error, name) from error
        explored, propensity = False, 1.0
        if asking and policy.explore.share > 0 and scores.basis is not None:
            found = explore(decision, scores.basis.deviation, policy, random.random(), spread=scores.spread)
            decision, explored, propensity = found.decision, found.explored, found.propensity
        fallbacks = decision.fallbacks if options.fallbacks is None else options.fallbacks
        order = list(dict.fromkeys([decision.expert, *fallbacks]))
        confidence = decision.confidence
        return Plan(call, order, scores.router, name, confidence, decision, flags, scores.basis, explored, propensity)

    def _tighten(self, policy: Policy, options: Options, slo_ttft_ms: float | None, call: Call) -> Policy:
        """The policy with the caller's ceiling and globs, and with the experts that understand the request."""
        updates: dict[str, Any] = {}
        if slo_ttft_ms is not None:
            ceiling = min(slo_ttft_ms, policy.slo.max_ttft_ms or slo_ttft_ms)
            updates["slo"] = policy.slo.model_copy(update={"max_ttft_ms": ceiling})
        names = self._pool.routable()
        if options.allowed is not None:
            names = [name for name in names if matches(name, options.allowed)]
        if call.demands:
            able = [name for name in names if not call.unmet(self._pool.request_fields(name))]
            if not able:
                raise Unsupported(
                    f"'{call.demands[0]}' needs an expert whose engine understands it, e.g. one with "
                    "`engine: openai`, and the router may choose none",
                    param=call.demands[0],
                )
            names = able
        if options.allowed is not None or call.demands:
            updates["allowed"] = tuple(name for name in names if matches(name, policy.allowed))
        return policy.model_copy(update=updates) if updates else policy

    # -- the answer --------------------------------------------------------------------------------------------

    async def open(self, call: Call, reply_id: str, began: float, *, slo_ttft_ms: float | None = None) -> Run:
        """Start answering: from the cache, or by the first expert that gives a first token.

        A retryable error before anything has been handed on moves on to the next expert: for a stream until its
        first token, for a whole answer until its last. Raises the last `ExpertError` where none can answer.
        """
        options = parse_options(call.options)
        asked = await self.resolve(call.model)
        policy = None if isinstance(asked, Target) else asked
        cached = options.cache.mode == "exact" and call.sampling.temperature == 0
        cached = cached and (policy is None or policy[1].cache == "exact")
        keep: _Keep | None = None
        plan: Plan | None = None
        if cached:
            keep = _Keep(options.cache.namespace, options.cache.ttl, [[] for _ in range(call.choices)], None)
            if policy is not None:
                keep.decision_key = self._decision_key(call, options, slo_ttft_ms, *policy)
                plan = await self._remembered(keep.decision_key, call, policy[0])
        fresh = plan is None
        plan = plan or await self._plan(call, options, slo_ttft_ms)
        if keep is not None:
            first = await self._pool.find(plan.order[0])
            answer = None
            if first is not None:
                answer = await self._cache.get(self._answer_key(first, plan.call, keep.namespace))
            if answer is not None and len(answer.choices) == call.choices:
                if fresh:
                    await self._remember(keep, plan, plan.order[0])
                return self._replay(answer, plan, began)
            if not fresh:  # the answer is gone: who should give it is decided anew
                plan = await self._plan(call, options, slo_ttft_ms)
        return await self._execute(plan, reply_id, began, keep)

    async def _execute(self, plan: Plan, reply_id: str, began: float, keep: _Keep | None) -> Run:
        call = plan.call
        hop = time.perf_counter()
        failure: ExpertError | None = None
        for attempt, name in enumerate(plan.order, 1):
            asked = _Asked()
            batches = self._ask(name, call, f"{reply_id}.{attempt}" if attempt > 1 else reply_id, asked)
            try:
                # A stream is committed to its expert by its first batch; a whole answer only by its last.
                held = [await anext(batches)] if call.stream else [batch async for batch in batches]
            except ExpertError as error:
                await close(batches)
                failure = error
                if not error.retryable:
                    break
                if attempt < len(plan.order):
                    log.warning("%s: expert %s failed (%s), trying %s", reply_id, name, error, plan.order[attempt])
                continue
            except BaseException:
                await close(batches)
                raise
            if keep is not None:
                keep.choices = [[] for _ in range(call.choices)]
            return Run(
                plan=plan,
                expert=name,
                cache="bypass" if keep is None else "miss",
                attempts=attempt,
                began=began,
                hop=hop,
                batches=resume(held, batches),
                builder=AnswerBuilder(call.choices, call.n),
                keep=keep,
                asked=asked.target,
                source=batches,
            )
        raise failure or ExpertUnavailable("no expert could be asked")

    async def _ask(self, name: str, call: Call, reply_id: str, asked: _Asked) -> AsyncIterator[Batch]:
        """All choices from one expert; `asked` learns which it was. Raises `ExpertUnavailable` where it is not ready.

        An adapter stays loaded while it answers. Where a replica has lost it, or is only just starting beside others
        that are ready, another is asked, for a while.
        """
        deadline: float | None = None  # counted from the first refusal: an evicted adapter may have to be loaded first
        while True:
            begun = False
            try:
                async with self._pool.lease(name) as target:
                    asked.target = target
                    async with contextlib.aclosing(self._ask_target(target, call, reply_id)) as batches:  # type: ignore[type-var]
                        async for batch in batches:
                            begun = True
                            yield batch
                    return
            except (AdapterNotLoaded, ReplicaNotReady):
                deadline = deadline or time.monotonic() + REPLICA_WAIT_S
                if begun or time.monotonic() > deadline:
                    raise
            await asyncio.sleep(REPLICA_PAUSE_S)

    def _ask_target(self, target: Target, call: Call, reply_id: str) -> AsyncIterator[Batch]:
        state = self._pool.state(target)
        if not state.ready:
            raise ExpertUnavailable(f"expert '{target.name}' is not ready: {state.reason}")
        client = self._experts[target.expert]
        requests = call.requests(reply_id, understood=target.config.request_fields)
        for request in requests:
            request.adapter = target.adapter.version if target.adapter is not None else None
        streams = [client.generate(request) for request in requests]
        return single(streams[0]) if len(streams) == 1 else merged(streams)

    # -- the cache ---------------------------------------------------------------------------------------------

    async def settle(self, run: Run) -> None:
        """Keep the finished answer of a run that came to its proper end. Call once."""
        if run.keep is None or run.asked is None or not run.builder.complete:
            return
        answer = CachedAnswer(run.expert, tuple(tuple(chunks) for chunks in run.keep.choices))
        key = self._answer_key(run.asked, run.plan.call, run.keep.namespace)
        if await self._cache.put(key, answer, run.keep.ttl_s):
            await self._remember(run.keep, run.plan, run.expert)

    def _replay(self, answer: CachedAnswer, plan: Plan, began: float) -> Run:
        call = plan.call
        batches = [(i, list(chunks)) for i, chunks in enumerate(answer.choices)]
        builder = AnswerBuilder(call.choices, call.n)
        return Run(plan, answer.expert, "hit", 0, began, time.perf_counter(), resume(batches), builder)

    def _answer_key(self, target: Target, call: Call, namespace: str) -> str:
        version = self._pool.version(target)
        return self._cache.key(call.kind, target.name, call.identity(), version=version, namespace=namespace)

    def _decision_key(self, call: Call, options: Options, slo_ttft_ms: float | None, name: str, policy: Policy) -> str:
        knobs = [options.cost_quality_tradeoff, options.allowed, slo_ttft_ms]
        body = call.identity() | {"knobs": knobs}
        return self._cache.key(
            call.kind,
            f"{AUTO}:{name}",
            body,
            version=f"{self._pool_version}/{self._pool.generation}/{self._routing.generation}",
            namespace=options.cache.namespace,
        )

    async def _remembered(self, key: str, call: Call, policy: str) -> Plan | None:
        """The decision made earlier for this very request."""
        try:
            data = await self._store.get(f"decision:{key}")
            if data is None:
                return None
            expert, router, confidence, said = orjson.loads(data)
            basis = Basis(**said) if said is not None else None
        except (StoreUnavailable, ValueError, TypeError):
            return None
        if self._pool.known(expert) is None:
            return None
        call, _, flags = take_flags(call)
        return Plan(call, [expert], router, policy, confidence, flags=flags, basis=basis)

    async def _remember(self, keep: _Keep, plan: Plan, expert: str) -> None:
        """Only the best choice by real predictions over the whole pool, which gave the answer, is worth repeating."""
        if keep.decision_key is None or plan.decision is None or plan.router != self._config.default_router:
            return
        if plan.explored:
            return
        missing = any(s.constraint == "available" for rating in plan.decision.ratings for s in rating.strikes)
        if missing or expert != plan.order[0]:
            return
        ttl_s = min(keep.ttl_s or self._config.cache.ttl_s, self._config.cache.max_ttl_s)
        data = orjson.dumps([expert, plan.router, plan.confidence, plan.basis])
        with contextlib.suppress(StoreUnavailable):
            await self._store.set(f"decision:{keep.decision_key}", data, ttl_s)


def _version_of_pool(config: Config) -> str:
    """A hash of what in the configuration bears on decisions: experts, policies, router."""
    return hash_of(config.model_dump(mode="json", include={"experts", "policies", "default_policy", "default_router"}))


def _no_candidate(error: NoCandidate, policy: str) -> ExpertError:
    """Nobody may answer: the request's fault (400) where it stays so, ours (503) where it may pass."""
    ratings = error.ratings
    reasons = "; ".join(f"{r.expert}: {', '.join(map(str, r.strikes))}" for r in ratings) or "the pool is empty"
    message = f"no expert can answer under policy '{policy}' ({reasons})"
    if ratings and all(any(s.constraint == "context_length" for s in r.strikes) for r in ratings):
        return InvalidRequest(message, param="messages", code="context_length_exceeded")
    if any(all(s.constraint in _TRANSIENT for s in r.strikes) for r in ratings):
        return ExpertUnavailable(message, code="no_candidate")
    return InvalidRequest(message, param="model", code="no_candidate")
