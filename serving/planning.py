"""From a checked request to a plan: whose policy, which kind of request, who answers, and by when it must begin."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from signalbox.experts.base import ExpertError, ExpertUnavailable, InvalidRequest, Unsupported
from signalbox.experts.catalog import matches
from signalbox.policies.base import (
    Candidate,
    Decision,
    NoCandidate,
    Parallel,
    Policy,
    Rating,
    RequestShape,
    Slo,
)
from signalbox.policies.charges import Account
from signalbox.policies.decide import decide, rate, slack_ms
from signalbox.policies.explain import explain
from signalbox.policies.explore import explore
from signalbox.policies.flags import objective_of_flags, objective_of_tradeoff
from signalbox.policies.intents import IntentCache, apply_intent
from signalbox.serving.admission import Admission
from signalbox.serving.callers import UNBOUND, Caller, Callers
from signalbox.serving.config import Config
from signalbox.serving.options import Options, priority_of, take_flags
from signalbox.serving.parallel import samples_that_fit, samples_wanted
from signalbox.serving.policy_table import PolicyTable
from signalbox.serving.pool import Pool, Target
from signalbox.serving.protocols.openai import Call, text_of
from signalbox.serving.routing import Basis, Routing

AUTO = "auto"
# A policy broken by these alone may be kept a moment later.
_TRANSIENT = frozenset({"available", "max_ttft_ms", "max_tpot_ms", "max_total_ms"})
ANSWER_TOKENS = 256  # what an answer is taken to have where the request sets no max_tokens

_PLAIN = Policy()


@dataclass(slots=True, frozen=True)
class Terms:
    """What comes with a request besides its body: who asks, and the wishes in its headers."""

    caller: Caller = UNBOUND
    slo_ttft_ms: float | None = None
    headers: Mapping[bytes, bytes] = field(default_factory=dict)


@dataclass(slots=True, frozen=True)
class Ruling:
    """Whose policy it is, with all that the request, its caller and its kind change about it.

    `name` is the policy's, `etag` that of its version. `accounts` are all whose limits bind the request. `target` is
    the expert that the request names itself, None where the policy decides.
    """

    name: str
    policy: Policy
    etag: str = ""
    intent: str | None = None
    accounts: tuple[Account, ...] = ()
    target: Target | None = None


@dataclass(slots=True, frozen=True)
class Timing:
    """When an answer must begin and how long it then takes, in seconds.

    `slack_s` is the latest, by the policy and the caller; None: any time. `due_s` is the policy's alone: its place in
    the queue goes by that, or else everybody would be in a hurry.
    """

    slack_s: float | None
    service_s: float
    due_s: float | None = None


@dataclass(slots=True)
class Plan:
    """Who is to answer, and why. `order` has the chosen expert first, then whom to try when it fails.

    `decision`, `flags` and what follows are of `auto` requests only. `call` is the request as the experts are to see
    it. `explored` says that the policy's exploration chose, `propensity` with which probability it was to choose so.
    `samples` answers are drawn at once, and `parallel` says who chooses among them.
    """

    call: Call
    order: list[str]
    router: str
    ruling: Ruling
    confidence: float | None = None
    decision: Decision | None = None
    flags: list[str] = field(default_factory=list)
    basis: Basis | None = None
    explored: bool = False
    propensity: float = 1.0
    samples: int = 1
    priority: int = 0
    timings: dict[str, Timing] = field(default_factory=dict)
    candidates: list[Candidate] = field(default_factory=list)

    @property
    def policy(self) -> str:
        """The name of the policy that decided; `none` where the request named its expert."""
        return self.ruling.name if self.ruling.target is None else "none"

    @property
    def parallel(self) -> Parallel:
        """Who chooses among several answers."""
        return self.ruling.policy.parallel


class Planner:
    """Decides. One a gateway process."""

    def __init__(
        self,
        config: Config,
        *,
        pool: Pool,
        routing: Routing,
        policies: PolicyTable,
        callers: Callers,
        admission: Admission,
    ) -> None:
        self._config = config
        self._pool = pool
        self._routing = routing
        self._policies = policies
        self._callers = callers
        self._admission = admission
        self._intents = IntentCache()

    # -- who may be asked for ----------------------------------------------------------------------------------

    def model_names(self) -> list[str]:
        """Everything that `model` may be."""
        return [AUTO, *(f"{AUTO}:{policy}" for policy in self._policies.names()), *self._pool.names()]

    async def resolve(self, model: str, caller: Caller = UNBOUND) -> Ruling | Target:
        """The policy that an `auto` model asks for, or the expert that `model` names.

        Raises `InvalidRequest`: 404 where there is no such model, 403 where the caller may not name this policy.
        """
        head, colon, name = model.partition(":")
        if head == AUTO and (not colon or self._policies.get(name) is not None):
            ruling = self._ruling(caller, name if colon else None)
            await self._intents.ready(ruling.policy)
            return ruling
        target = await self._pool.find(model)
        if target is None:
            raise self._pool.unknown(model, (AUTO, *(f"{AUTO}:{policy}" for policy in self._policies.names())))
        return target

    def _ruling(self, caller: Caller, named: str | None) -> Ruling:
        name = self._callers.policy_of(caller, named, self._config.default_policy)
        accounts = tuple(self._callers.accounts(caller, named, self._policies.policies()))
        record = self._policies.get(name) if name is not None else None
        if record is None:
            return Ruling("default", _PLAIN, accounts=accounts)
        return Ruling(record.name, record.policy, record.etag, accounts=accounts)

    async def rule(self, call: Call, options: Options, terms: Terms) -> Ruling:
        """The policy for this very request: of the caller where an expert is named, and by the request's intent.

        Raises `InvalidRequest`: as `resolve`, 403 where the caller's policy forbids the named expert, 400 for an
        unknown intent.
        """
        asked = await self.resolve(call.model, terms.caller)
        if isinstance(asked, Target):
            ruling = self._ruling(terms.caller, None)
            if not _allows(ruling.policy, asked.name):
                raise _not_allowed(asked.name, f"policy '{ruling.name}'", "model")
            return replace(ruling, target=asked)
        intent = options.intent
        if intent is None and asked.policy.intents:
            intent = self._intents.of(asked.policy).match(last_text(call))
        if intent is None:
            return asked
        return replace(asked, policy=apply_intent(asked.policy, intent), intent=intent)

    # -- the decision ------------------------------------------------------------------------------------------

    async def plan(self, call: Call, ruling: Ruling, options: Options, terms: Terms, *, asking: bool = True) -> Plan:
        """Decide who answers, without asking anyone; `asking` False explores nothing.

        `call` is cut to the ruling's length already. Raises `InvalidRequest`, or `ExpertUnavailable` (503).
        """
        for name in options.fallbacks or ():
            await self._check_fallback(name, ruling, options)
        target = ruling.target
        priority = priority_of(terms.headers, ruling.policy)
        if target is None:
            plan = await self._decided(call, ruling, options, terms, priority, asking)
        elif options.allowed is not None and not matches(target.name, options.allowed):
            raise _not_allowed(target.name, "'signalbox.allowed' of this request", "signalbox.allowed")
        else:
            order = list(dict.fromkeys([target.name, *(options.fallbacks or ())]))
            plan = Plan(call, order, router="none", ruling=ruling)
        plan.priority = priority
        self._set_timings(plan, ruling.policy.slo, terms.slo_ttft_ms)
        return plan

    async def _check_fallback(self, fallback: str, ruling: Ruling, options: Options) -> None:
        """A caller's own fallback must be an expert that its policy and its `allowed` would let it have."""
        target = await self._pool.find(fallback)
        if target is None:
            raise InvalidRequest(
                f"'signalbox.fallbacks' names '{fallback[:64]}', which is no expert; "
                f"there are: {', '.join(self._pool.names())}",
                param="signalbox.fallbacks",
            )
        if not _allows(ruling.policy, target.name):
            raise _not_allowed(target.name, f"policy '{ruling.name}'", "signalbox.fallbacks")
        if options.allowed is not None and not matches(target.name, options.allowed):
            raise _not_allowed(target.name, "'signalbox.allowed' of this request", "signalbox.fallbacks")

    async def _decided(
        self, call: Call, ruling: Ruling, options: Options, terms: Terms, priority: int, asking: bool
    ) -> Plan:
        policy = self._tighten(ruling.policy, options, terms.slo_ttft_ms, call)
        ruling = replace(ruling, policy=policy)
        call, prompts, flags = take_flags(call)
        scores = await self._routing.predict(prompts)
        objective = policy.objective
        if options.cost_quality_tradeoff is not None:
            objective = objective_of_tradeoff(options.cost_quality_tradeoff)
        if flags:
            objective = objective_of_flags(flags, objective)
        shape = shape_of(call)
        candidates = [
            replace(c, wait_ms=self._admission.wait_ms(c.name.partition(":")[0], priority))
            for c in self._pool.candidates(shape)
        ]

        def decide_with(samples: int) -> Decision:
            return decide(
                scores.quality,
                candidates,
                replace(shape, samples=samples),
                policy,
                spread=scores.spread,
                objective=objective,
                policy_name=ruling.name,
            )

        try:
            samples, decision = samples_that_fit(
                policy, decide_with, samples_wanted(policy.parallel, call, options.samples)
            )
        except NoCandidate as error:
            error.constraints = explain(error, policy, candidates)
            refusal = _no_candidate(error, ruling.name)
            refusal.policy = ruling.name
            raise refusal from error
        explored, propensity = False, 1.0
        if asking and policy.explore.share > 0 and scores.basis is not None:
            found = explore(decision, scores.basis.deviation, policy, random.random(), spread=scores.spread)
            decision, explored, propensity = found.decision, found.explored, found.propensity
        fallbacks = decision.fallbacks if options.fallbacks is None else options.fallbacks
        order = list(dict.fromkeys([decision.expert, *fallbacks]))
        return Plan(
            call,
            order,
            scores.router,
            ruling,
            decision.confidence,
            decision,
            flags,
            scores.basis,
            explored,
            propensity,
            samples,
            candidates=candidates,
        )

    def _set_timings(self, plan: Plan, promised: Slo, slo_ttft_ms: float | None) -> None:
        """When each expert of the plan must begin, for the queue in front of it."""
        slo = _lowered(promised, slo_ttft_ms)
        rated = {r.expert: r for r in plan.decision.ratings} if plan.decision is not None else {}
        for name in plan.order:
            rating = rated.get(name) or self._rate(name, plan)
            if rating is not None:
                slack, due = slack_ms(rating, slo), slack_ms(rating, promised)
                plan.timings[name] = Timing(
                    slack_s=None if slack is None else slack / 1000,
                    service_s=(rating.total_ms - rating.wait_ms) / 1000,
                    due_s=None if due is None else due / 1000,
                )

    def _rate(self, name: str, plan: Plan) -> Rating | None:
        shape = shape_of(plan.call)
        candidate = self._pool.candidate(name, shape)
        return rate(candidate, {}, shape, _PLAIN) if candidate is not None else None

    def _tighten(self, policy: Policy, options: Options, slo_ttft_ms: float | None, call: Call) -> Policy:
        """The policy with the caller's ceiling and globs, and with the experts that understand the request."""
        updates: dict[str, Any] = {}
        if slo_ttft_ms is not None:
            updates["slo"] = _lowered(policy.slo, slo_ttft_ms)
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


def _lowered(slo: Slo, ttft_ms: float | None) -> Slo:
    """The ceilings with the caller's own for the first token, where that is lower."""
    if ttft_ms is None:
        return slo
    return slo.model_copy(update={"max_ttft_ms": min(ttft_ms, slo.max_ttft_ms or ttft_ms)})


def _allows(policy: Policy, expert: str) -> bool:
    return matches(expert, policy.allowed) and not matches(expert, policy.denied)


def _not_allowed(expert: str, by: str, param: str) -> InvalidRequest:
    return InvalidRequest(
        f"{by} does not allow expert '{expert[:128]}'", param=param, code="expert_not_allowed", status=403
    )


def shape_of(call: Call) -> RequestShape:
    """The request's size, before it is tokenised."""
    return RequestShape(call.prompt_bytes(), call.sampling.max_tokens or ANSWER_TOKENS, call.sampling.max_tokens)


def bounded(call: Call, policy: Policy) -> Call:
    """The request with its answer's length bounded by the policy."""
    wanted = call.sampling.max_tokens
    if policy.max_tokens is None or (wanted is not None and wanted <= policy.max_tokens):
        return call
    return replace(call, sampling=replace(call.sampling, max_tokens=policy.max_tokens))


def last_text(call: Call) -> str:
    """What the user said last, by which the request's intent is told."""
    if call.messages is None:
        return next((prompt for prompt in call.prompts if isinstance(prompt, str)), "")
    return next((text_of(message) for message in reversed(call.messages) if message["role"] == "user"), "")


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
