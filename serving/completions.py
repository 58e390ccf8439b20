"""The routes that answer or decide: `/v1/chat/completions`, `/v1/completions`, `/v1/route`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Mapping
from typing import Any

from signalbox.experts.base import ExpertError, InvalidRequest
from signalbox.policies.explain import explain
from signalbox.serving.dispatch import AUTO, Dispatcher, Plan, Run, Terms
from signalbox.serving.exchange import Exchange, Handler, Headers
from signalbox.serving.metrics import Metrics
from signalbox.serving.outcomes import Outcomes
from signalbox.serving.protocols import openai_replies as replies
from signalbox.serving.protocols.openai import Call, parse_chat, parse_completion, parse_json

log = logging.getLogger(__name__)


REFUSALS = frozenset({"budget_spent", "rate_limited", "max_inflight"})


class CompletionApi:
    """Handlers of these routes, by path. `max_body_bytes` bounds a request's body."""

    def __init__(self, dispatcher: Dispatcher, outcomes: Outcomes, metrics: Metrics, max_body_bytes: int) -> None:
        self._dispatcher = dispatcher
        self._outcomes = outcomes
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes
        self.routes: dict[str, dict[str, Handler]] = {
            "/v1/chat/completions": {"POST": self._chat},
            "/v1/completions": {"POST": self._completion},
            "/v1/route": {"POST": self._route},
        }

    async def _chat(self, exchange: Exchange) -> None:
        body = parse_json(await exchange.body(self._max_body_bytes))
        await self._answer(exchange, parse_chat(body), f"chatcmpl-{uuid.uuid4().hex}")

    async def _completion(self, exchange: Exchange) -> None:
        body = parse_json(await exchange.body(self._max_body_bytes))
        await self._answer(exchange, parse_completion(body), f"cmpl-{uuid.uuid4().hex}")

    async def _answer(self, exchange: Exchange, call: Call, reply_id: str) -> None:
        """Answer, unless the client goes away first: then everything that runs for it is cancelled."""
        gone = False

        async def watch(answering: asyncio.Task[Any]) -> None:
            nonlocal gone
            await exchange.disconnected()
            gone = True
            answering.cancel()

        task = asyncio.current_task()
        assert task is not None
        watcher = asyncio.create_task(watch(task))
        outcome, run, recording, refused = "ok", None, None, None
        try:
            run = await self._dispatcher.open(call, reply_id, exchange.began, _terms(exchange))
            # On record before the last byte goes out, for then its outcome may be posted; meanwhile the expert writes.
            recording = asyncio.create_task(self._outcomes.record(exchange.id, call.model, run))
            await (self._stream if call.stream else self._whole)(exchange, call, run, reply_id, recording)
        except ExpertError as error:
            outcome, refused = error.code, error
            if error.param == "messages" and call.kind == "completion":
                error.param = "prompt"  # engines see one kind of request
            raise
        except asyncio.CancelledError:
            outcome = "client_gone" if gone else "cancelled"
            if not gone or task.uncancel() > 0:
                raise
        except BaseException:
            outcome = "failed"
            raise
        finally:
            watcher.cancel()
            if recording is not None:
                recording.cancel()
            if run is not None:
                await run.aclose()
            self._count(run, outcome, refused)
            _log_outcome(exchange, call, run, outcome)

    def _count(self, run: Run | None, outcome: str, refused: ExpertError | None) -> None:
        policy = run.plan.policy if run is not None else (refused and refused.policy) or "none"
        self._metrics.request(policy, run.expert if run is not None else "none", outcome)
        if outcome in REFUSALS:
            self._metrics.budget_refusal(policy, outcome)
        timing = run.timing() if run is not None else None
        if run is not None and timing is not None:
            self._metrics.ttft(policy, timing.ttft_ms / 1000)
            slo = run.plan.ruling.policy.slo
            if slo.max_ttft_ms or slo.max_tpot_ms or slo.max_total_ms:
                self._metrics.slo(policy, kept=timing.kept(slo))

    async def _whole(
        self, exchange: Exchange, call: Call, run: Run, reply_id: str, recording: asyncio.Task[None]
    ) -> None:
        async for _ in run:
            pass
        await self._dispatcher.settle(run)
        await recording
        body = replies.reply(
            call.kind,
            run.builder.answer(),
            reply_id=reply_id,
            created=int(time.time()),
            model=run.expert,
            logprobs=call.sampling.logprobs is not None,
        )
        await exchange.reply(200, body, _decision_headers(run))

    async def _stream(
        self, exchange: Exchange, call: Call, run: Run, reply_id: str, recording: asyncio.Task[None]
    ) -> None:
        events = replies.EventWriter(
            call.kind,
            reply_id=reply_id,
            created=int(time.time()),
            model=run.expert,
            logprobs=call.sampling.logprobs is not None,
            include_usage=call.include_usage,
        )
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        await exchange.start(200, headers + _decision_headers(run))
        async for index, chunks in run:
            data = events.events(index, chunks)
            if data:
                await exchange.send(data, more=True)
        await self._dispatcher.settle(run)
        await recording
        await exchange.send(events.usage(run.builder.usage()) + replies.DONE, more=False)

    async def _route(self, exchange: Exchange) -> None:
        body = parse_json(await exchange.body(self._max_body_bytes))
        parse = parse_chat if "messages" in body or "prompt" not in body else parse_completion
        plan = await self._dispatcher.plan(parse(body, model=AUTO), _terms(exchange))
        overhead = round((time.perf_counter() - exchange.began) * 1000, 3)
        await exchange.reply(200, describe_plan(plan) | {"overhead_ms": overhead})


def describe_plan(plan: Plan) -> dict[str, Any]:
    """A plan as `/v1/route` tells it. Money in USD, times in milliseconds."""
    decision = plan.decision
    return {
        "expert": plan.order[0],
        "policy": plan.policy,
        "router": plan.router,
        "confidence": plan.confidence,
        "fallbacks": plan.order[1:],
        "objective": decision.objective.model_dump() if decision else None,
        "flags": plan.flags,
        "intent": plan.ruling.intent,
        "samples": plan.samples,
        "priority": plan.priority,
        "violated": decision.violated if decision else [],
        "ratings": decision.ratings if decision else [],
        "constraints": explain(decision, plan.ruling.policy, plan.candidates) if decision else [],
    }


def _decision_headers(run: Run) -> Headers:
    plan = run.plan
    headers = [
        (b"x-signalbox-expert", run.expert.encode()),
        (b"x-signalbox-router", plan.router.encode()),
        (b"x-signalbox-policy", plan.policy.encode()),
        (b"x-signalbox-cache", run.cache.encode()),
        (b"x-signalbox-attempts", b"%d" % run.attempts),
        (b"x-signalbox-overhead-ms", b"%.2f" % ((run.hop - run.began) * 1000)),
    ]
    if plan.decision is not None and plan.decision.violated:
        headers.append((b"x-signalbox-violated", ", ".join(plan.decision.violated).encode()))
    if plan.ruling.intent is not None:
        headers.append((b"x-signalbox-intent", plan.ruling.intent.encode()))
    if plan.samples > 1:
        headers.append((b"x-signalbox-samples", b"%d" % plan.samples))
    if run.waited_s > 0:
        headers.append((b"x-signalbox-queue-ms", b"%.1f" % (run.waited_s * 1000)))
    if plan.confidence is not None:
        headers.append((b"x-signalbox-confidence", b"%.3f" % plan.confidence))
    return headers


def _terms(exchange: Exchange) -> Terms:
    return Terms(exchange.caller, _slo_ttft_ms(exchange.headers), exchange.headers)


def _slo_ttft_ms(headers: Mapping[bytes, bytes]) -> float | None:
    """The caller's ceiling for the time to first token. Raises `InvalidRequest`."""
    given = headers.get(b"x-slo-ttft-ms")
    if given is None:
        return None
    with contextlib.suppress(ValueError):
        ceiling = float(given)
        if 0 < ceiling < 1e9:
            return ceiling
    raise InvalidRequest("the header x-slo-ttft-ms must be a number of milliseconds above 0", param="x-slo-ttft-ms")


def _log_outcome(exchange: Exchange, call: Call, run: Run | None, outcome: str) -> None:
    """The one line of a request: who answered, how much, how long. No word of prompt or answer."""
    if not log.isEnabledFor(logging.INFO):
        return
    tokens = run.builder.usage() if run else None
    log.info(
        "request %s model=%s expert=%s cache=%s attempts=%d prompt_tokens=%d completion_tokens=%d ms=%.1f outcome=%s",
        exchange.id,
        call.model,
        run.expert if run else "-",
        run.cache if run else "-",
        run.attempts if run else 0,
        tokens.prompt_tokens if tokens else 0,
        tokens.completion_tokens if tokens else 0,
        (time.perf_counter() - exchange.began) * 1000,
        outcome,
    )
