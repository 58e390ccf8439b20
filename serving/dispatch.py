"""From a checked request to a running answer: who answers, what is cached, at what cost, and what if they fail.

The exact cache is read in two steps, so that a repeated `auto` request spends no time on the predictor and an
answer is kept once however it was asked for. `decision:<key>`, by policy and request, says which expert was chosen;
`cache:<key>`, by expert and request, holds its answer. A request that names the expert needs the second alone.

What is not in the cache is planned (`planning.py`); then each attempt reserves what it may cost (`ledger.py`), waits
for its place (`admission.py`), and asks the expert.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

import orjson

from signalbox.experts.base import (
    AdapterNotLoaded,
    ExpertError,
    ExpertUnavailable,
    GenerateRequest,
    ReplicaNotReady,
    SamplingParams,
    Usage,
)
from signalbox.policies.charges import Charge
from signalbox.serving.admission import Admission, Shed
from signalbox.serving.cache import CachedAnswer, ResponseCache
from signalbox.serving.callers import Caller, Callers
from signalbox.serving.charging import Seat
from signalbox.serving.config import Config
from signalbox.serving.expert_deployment import ExpertClient
from signalbox.serving.ledger import Ledger
from signalbox.serving.options import Options, parse_options, take_flags
from signalbox.serving.parallel import JUDGE_CHARACTERS, sample_calls, sampled
from signalbox.serving.planning import AUTO, Plan, Planner, Ruling, Terms, Timing, bounded, last_text
from signalbox.serving.policy_table import PolicyTable
from signalbox.serving.pool import Pool, Target, hash_of
from signalbox.serving.protocols.openai import Call
from signalbox.serving.protocols.openai_replies import AnswerBuilder
from signalbox.serving.routing import Basis, Routing
from signalbox.serving.run import Asked, Keep, Run
from signalbox.serving.store import Store, StoreUnavailable
from signalbox.serving.streams import Batch, close, merged, resume, single

__all__ = ["AUTO", "Dispatcher", "Plan", "Run", "Terms"]

log = logging.getLogger(__name__)

REPLICA_WAIT_S = 5.0  # to find a replica that is ready and holds the adapter, when one has just died or lost it
REPLICA_PAUSE_S = 0.05
RESERVE_WAIT_S = 10.0  # for the reservations of others to come out cheaper, near the end of a budget
UNBOUNDED_ANSWER = 8192  # tokens reserved for an answer that nothing bounds
TEMPLATE_TOKENS = 16  # that a chat template adds, where nobody can count them
JUDGE_TOKENS = 16


class Dispatcher:
    """Plans, reserves, waits, runs. One a gateway process.

    What is not given is made: a table of the configured policies, and doors and books that nobody else shares.
    """

    def __init__(
        self,
        config: Config,
        *,
        experts: Mapping[str, ExpertClient],
        pool: Pool,
        routing: Routing,
        store: Store,
        policies: PolicyTable | None = None,
        callers: Callers | None = None,
        admission: Admission | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        self._config = config
        self._experts = experts
        self._pool = pool
        self._routing = routing
        self._store = store
        self._cache = ResponseCache(store, config.cache)
        self._pool_version = _version_of_pool(config)
        self._admission = admission or Admission(store, config.admission, config.experts, pool.capacity)
        self._ledger = ledger or Ledger(store)
        self.planner = Planner(
            config,
            pool=pool,
            routing=routing,
            policies=policies or PolicyTable(store, config.policies, protected={}),
            callers=callers or Callers(config),
            admission=self._admission,
        )

    async def plan(self, call: Call, terms: Terms | None = None) -> Plan:
        """Decide who answers, without asking anyone. Raises `InvalidRequest`, or `ExpertUnavailable` (503)."""
        terms, options = terms or Terms(), parse_options(call.options)
        ruling = await self.planner.rule(call, options, terms)
        return await self.planner.plan(bounded(call, ruling.policy), ruling, options, terms, asking=False)

    # -- the answer --------------------------------------------------------------------------------------------

    async def open(self, call: Call, reply_id: str, began: float, terms: Terms | None = None) -> Run:
        """Start answering: from the cache, or by the first expert that gives a first token.

        A retryable error before anything has been handed on moves on to the next expert: for a stream until its
        first token, for a whole answer until its last. Raises the last `ExpertError` where none can answer.
        """
        terms = terms or Terms()
        options = parse_options(call.options)
        ruling = await self.planner.rule(call, options, terms)
        call = bounded(call, ruling.policy)
        cached = options.cache.mode == "exact" and call.sampling.temperature == 0 and ruling.policy.cache == "exact"
        keep: Keep | None = None
        plan: Plan | None = None
        if cached:
            keep = Keep(options.cache.namespace, options.cache.ttl, [[] for _ in range(call.choices)], None)
            if ruling.target is None:
                keep.decision_key = self._decision_key(call, options, terms.slo_ttft_ms, ruling)
                plan = await self._remembered(keep.decision_key, call, ruling)
        fresh = plan is None
        plan = plan or await self.planner.plan(call, ruling, options, terms)
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
                plan = await self.planner.plan(call, ruling, options, terms)
        return await self._execute(plan, reply_id, began, keep, terms.caller)

    async def _execute(self, plan: Plan, reply_id: str, began: float, keep: Keep | None, caller: Caller) -> Run:
        call = plan.call
        hop = time.perf_counter()
        failure: ExpertError | None = None
        for attempt, name in enumerate(plan.order, 1):
            asked = Asked()
            id = f"{reply_id}.{attempt}" if attempt > 1 else reply_id
            seat: Seat | None = None
            batches: AsyncIterator[Batch] | None = None
            try:
                seat = await self._seat(name, plan, id, caller, began)
                if attempt == 1:
                    hop = time.perf_counter() - seat.slot.waited_s  # waiting for a place is not the gateway's own time
                batches = self._ask(name, plan, id, asked)
                # A stream is committed to its expert by its first batch; a whole answer only by its last.
                held = [await anext(batches)] if call.stream else [batch async for batch in batches]
            except ExpertError as error:
                await self._give_up(batches, seat)
                failure = error
                if not error.retryable:
                    break
                if attempt < len(plan.order):
                    log.log(
                        logging.INFO if isinstance(error, Shed) else logging.WARNING,
                        "%s: expert %s failed (%s), trying %s",
                        reply_id,
                        name,
                        error,
                        plan.order[attempt],
                    )
                continue
            except BaseException:
                await self._give_up(batches, seat)
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
                asked=asked,
                source=batches,
                seat=seat,
                waited_s=seat.slot.waited_s,
            )
        failure = failure or ExpertUnavailable("no expert could be asked")
        failure.policy = failure.policy or plan.policy
        raise failure

    async def _give_up(self, batches: AsyncIterator[Batch] | None, seat: Seat | None) -> None:
        try:
            await close(batches)
        finally:
            if seat is not None:
                await seat.leave(None)

    async def _seat(self, name: str, plan: Plan, id: str, caller: Caller, began: float) -> Seat:
        """Reserve what this attempt may cost, then wait for a place. Raises what either refuses with."""
        target = self._pool.known(name)
        if target is None:
            raise self._pool.unknown(name)
        self._require_ready(target)
        accounts = plan.ruling.accounts
        prompt_tokens, most = 0, Charge()
        if any(account.limited for account in accounts):
            plan.call = self._bounded(target, plan.call)
            prompt_tokens, most = await self._most(target, plan, id)
        reservation = await self._ledger.reserve(accounts, most, id, wait_s=RESERVE_WAIT_S)
        timing = plan.timings.get(name, Timing(None, 1.0))
        # The ceilings count from the request's arrival: what deciding, and waiting for another expert, took is spent.
        slack_s = None if timing.slack_s is None else timing.slack_s - (time.perf_counter() - began)
        try:
            slot = await self._admission.enter(
                target.expert,
                tenant=caller.holder,
                weight=caller.weight,
                priority=plan.priority,
                slack_s=slack_s,
                due_s=timing.due_s,
                service_s=timing.service_s,
                places=plan.call.choices * plan.samples,
            )
        except BaseException:
            await reservation.cancel()
            raise
        return Seat(slot, reservation, target.config.price, prompt_tokens)

    def _require_ready(self, target: Target) -> None:
        state = self._pool.state(target)
        if not state.ready:
            raise ExpertUnavailable(f"expert '{target.name}' is not ready: {state.reason}")

    def _bounded(self, target: Target, call: Call) -> Call:
        """The request with a bound on its answer, where neither it nor the expert's context has one."""
        if call.sampling.max_tokens is not None or self._context(target) is not None:
            return call
        return replace(call, sampling=replace(call.sampling, max_tokens=UNBOUNDED_ANSWER))

    def _context(self, target: Target) -> int | None:
        return self._pool.state(target).context_length or target.config.context_length

    async def _most(self, target: Target, plan: Plan, id: str) -> tuple[int, Charge]:
        """Prompt tokens, and the most that this attempt can cost: each answer as long as it may become."""
        call = plan.call
        requests = call.requests(id, understood=target.config.request_fields)[:: call.n]
        counts = [await self._count(target, request, call) for request in requests]
        longest = call.sampling.max_tokens or (self._context(target) or UNBOUNDED_ANSWER) - min(counts)
        prompt_tokens = sum(counts) * plan.samples
        answer_tokens = max(1, longest) * call.choices * plan.samples
        if plan.samples > 1 and plan.parallel.judge is not None:
            prompt_tokens += JUDGE_CHARACTERS  # what a judge reads, at a token a character at most
            answer_tokens += JUDGE_TOKENS
        usd = target.config.price.usd(prompt_tokens, answer_tokens)
        return prompt_tokens, Charge(usd=usd, tokens=prompt_tokens + answer_tokens, requests=1)

    async def _count(self, target: Target, request: GenerateRequest, call: Call) -> int:
        """The prompt's tokens by the expert's own tokenizer; where it has none to ask, a token a byte at most."""
        counted = await self._experts[target.expert].count_tokens(request)
        return counted if counted is not None else call.prompt_bytes() + TEMPLATE_TOKENS

    async def _ask(self, name: str, plan: Plan, reply_id: str, asked: Asked) -> AsyncIterator[Batch]:
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
                    async with contextlib.aclosing(self._ask_target(target, plan, reply_id)) as batches:  # type: ignore[type-var]
                        async for batch in batches:
                            begun = True
                            asked.note(batch[1])
                            yield batch
                    return
            except (AdapterNotLoaded, ReplicaNotReady):
                deadline = deadline or time.monotonic() + REPLICA_WAIT_S
                if begun or time.monotonic() > deadline:
                    raise
            await asyncio.sleep(REPLICA_PAUSE_S)

    def _ask_target(self, target: Target, plan: Plan, reply_id: str) -> AsyncIterator[Batch]:
        self._require_ready(target)
        client = self._experts[target.expert]
        call = sample_calls(plan.call, plan.samples) if plan.samples > 1 else plan.call
        requests = call.requests(reply_id, understood=target.config.request_fields)
        for request in requests:
            request.adapter = target.adapter.version if target.adapter is not None else None
        streams = [client.generate(request) for request in requests]
        if plan.samples > 1:
            judge = plan.parallel.judge
            chosen = sampled(
                streams,
                plan.parallel,
                question=last_text(call),
                request_id=reply_id,
                ask_judge=None if judge is None else lambda messages: self._judge(judge, messages, reply_id),
            )
            return single(chosen)
        return single(streams[0]) if len(streams) == 1 else merged(streams)

    async def _judge(self, name: str, messages: list[dict[str, Any]], reply_id: str) -> tuple[str, Usage | None]:
        """What the judging expert replies, and what that took. Raises `ExpertError`."""
        async with self._pool.lease(name) as target:
            request = GenerateRequest(
                f"{reply_id}-judge",
                messages=messages,
                sampling=SamplingParams(max_tokens=JUDGE_TOKENS, temperature=0.0),
                adapter=target.adapter.version if target.adapter is not None else None,
            )
            text, usage = "", None
            async with contextlib.aclosing(self._experts[target.expert].generate(request)) as stream:  # type: ignore[type-var]
                async for chunks in stream:
                    text += "".join(chunk.text for chunk in chunks)
                    usage = next((chunk.usage for chunk in chunks if chunk.usage is not None), usage)
        return text, usage

    # -- the cache ---------------------------------------------------------------------------------------------

    async def settle(self, run: Run) -> None:
        """Charge the finished answer of a run that came to its proper end, and keep it. Call once."""
        await run.leave()
        target = run.asked.target if run.asked is not None else None
        if run.keep is None or target is None or not run.builder.complete:
            return
        answer = CachedAnswer(run.expert, tuple(tuple(chunks) for chunks in run.keep.choices))
        key = self._answer_key(target, run.plan.call, run.keep.namespace)
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

    def _decision_key(self, call: Call, options: Options, slo_ttft_ms: float | None, ruling: Ruling) -> str:
        knobs = [options.cost_quality_tradeoff, options.allowed, slo_ttft_ms, ruling.etag, ruling.intent]
        body = call.identity() | {"knobs": knobs}
        return self._cache.key(
            call.kind,
            f"{AUTO}:{ruling.name}",
            body,
            version=f"{self._pool_version}/{self._pool.generation}/{self._routing.generation}",
            namespace=options.cache.namespace,
        )

    async def _remembered(self, key: str, call: Call, ruling: Ruling) -> Plan | None:
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
        return Plan(call, [expert], router, ruling, confidence, flags=flags, basis=basis)

    async def _remember(self, keep: Keep, plan: Plan, expert: str) -> None:
        """Only the best choice by real predictions over the whole pool, which gave the answer, is worth repeating."""
        if keep.decision_key is None or plan.decision is None or plan.router != self._config.default_router:
            return
        if plan.explored:
            return
        passing = {"available", "max_ttft_ms", "max_tpot_ms", "max_total_ms"}
        if any(s.constraint in passing for rating in plan.decision.ratings for s in rating.strikes):
            return  # another moment's choice may be better
        if expert != plan.order[0]:
            return
        ttl_s = min(keep.ttl_s or self._config.cache.ttl_s, self._config.cache.max_ttl_s)
        data = orjson.dumps([expert, plan.router, plan.confidence, plan.basis])
        with contextlib.suppress(StoreUnavailable):
            await self._store.set(f"decision:{keep.decision_key}", data, ttl_s)


def _version_of_pool(config: Config) -> str:
    """A hash of what in the configuration bears on decisions, besides policies: experts and the router."""
    return hash_of(config.model_dump(mode="json", include={"experts", "default_router"}))
