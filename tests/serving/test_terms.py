"""What binds a request besides its model: its caller's policy, budgets, deadlines, and what it may ask for itself.

The experts are scripted, as in `test_dispatch.py`; the store, the books and the queues are real.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from signalbox.experts.base import GenerateRequest, InvalidRequest
from signalbox.serving.callers import Callers
from signalbox.serving.config import Config
from signalbox.serving.dispatch import Dispatcher, Run, Terms
from signalbox.serving.ledger import BudgetSpent, Ledger
from signalbox.serving.live_state import LiveState
from signalbox.serving.policy_table import PolicyTable
from signalbox.serving.pool import Pool
from signalbox.serving.protocols.openai import parse_chat
from signalbox.serving.store import Store
from tests.serving.conftest import make_config
from tests.serving.test_dispatch import CountingRouting, ScriptedExpert, measured

POLICIES: dict[str, Any] = {
    "narrow": {"denied": ["wide"], "fallback": 0},
    "quick": {"slo": {"max_ttft_ms": 2000, "max_total_ms": 9000}, "priority": 3},
    "short": {"max_tokens": 5},
}
ENVIRONMENT = {"KEY_A": "secret-a", "KEY_B": "secret-b"}


class CountedExpert(ScriptedExpert):
    """A scripted answer from an expert that can count a prompt's tokens, or cannot."""

    counted: int | None = 3

    async def count_tokens(self, request: GenerateRequest) -> int | None:
        return self.counted


class Bench:
    """A dispatcher with keys: `a` is bound by a policy of the test's choice, `b` by none."""

    def __init__(self, store: Store, policy: str = "narrow", **policies: Any) -> None:
        keys = {"a": {"env": "KEY_A", "policy": policy}, "b": {"env": "KEY_B"}}
        self.config: Config = make_config(
            {"tiny": Path("tiny"), "wide": Path("wide")}, policies={**POLICIES, **policies}, keys=keys
        )
        self.callers = Callers(self.config, ENVIRONMENT)
        self.experts = {"tiny": CountedExpert("t", "u", "v"), "wide": CountedExpert("w")}
        self.live = LiveState(store, self.config.experts)
        self.live.assume({"tiny": measured(100.0), "wide": measured(100.0)})
        self.ledger = Ledger(store)
        self.policies = PolicyTable(store, self.config.policies, protected={})
        self.dispatcher = Dispatcher(
            self.config,
            experts=self.experts,  # type: ignore[arg-type]
            pool=Pool(self.config, live=self.live),
            routing=CountingRouting({"tiny": (0.8, 0.05), "wide": (0.6, 0.05)}),
            store=store,
            policies=self.policies,
            callers=self.callers,
            ledger=self.ledger,
        )

    def terms(self, key: str = "secret-a", **fields: Any) -> Terms:
        return Terms(self.callers.identify({b"authorization": b"Bearer " + key.encode()}), **fields)

    async def open(self, terms: Terms | None = None, **fields: Any) -> Run:
        body = {"model": "auto", "messages": [{"role": "user", "content": "hello"}]} | fields
        return await self.dispatcher.open(parse_chat(body), "id", time.perf_counter(), terms or self.terms())

    async def run(self, terms: Terms | None = None, **fields: Any) -> Run:
        run = await self.open(terms, **fields)
        async for _ in run:
            pass
        await self.dispatcher.settle(run)
        await run.aclose()
        return run

    async def books(self, policy: str) -> dict[str, Any]:
        accounts = self.callers.accounts(self.terms().caller, policy, self.policies.policies())
        return next(found for found in await self.ledger.usage(accounts) if found["policy"] == policy)


@pytest.fixture
async def store(valkey: str) -> AsyncIterator[Store]:
    store = Store(valkey)
    await store.delete("admission:queue:tiny", "admission:queue:wide")  # what other tests have left undone
    yield store
    await store.close()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": "wide"}, "model"),
        ({"model": "tiny", "signalbox": {"fallbacks": ["wide"]}}, "signalbox.fallbacks"),
        ({"model": "auto", "signalbox": {"fallbacks": ["wide"]}}, "signalbox.fallbacks"),
        ({"model": "tiny", "signalbox": {"allowed": ["w*"]}}, "signalbox.allowed"),
        ({"model": "tiny", "signalbox": {"allowed": ["tiny"], "fallbacks": ["wide"]}}, "signalbox.fallbacks"),
    ],
)
async def test_an_expert_that_the_policy_denies_is_not_to_be_had(store: Store, fields: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await Bench(store).open(**fields)
    assert (caught.value.status, caught.value.code, caught.value.param) == (403, "expert_not_allowed", param)


async def test_a_key_without_a_policy_may_ask_for_any_expert(store: Store) -> None:
    bench = Bench(store)
    assert (await bench.run(bench.terms("secret-b"), model="wide")).expert == "wide"


async def test_a_named_policy_s_key_keeps_its_own_limits(store: Store) -> None:
    bench = Bench(store, "few", few={"budget": {"requests": 2, "window": "1h"}, "cache": "off"})
    for model in ("tiny", "auto:quick"):
        await bench.run(model=model)
    with pytest.raises(BudgetSpent) as caught:
        await bench.run(model="auto:quick")
    assert caught.value.policy == "few" and (await bench.books("few"))["budget"]["requests"]["spent"] == 2


async def test_usage_is_charged_and_the_rest_given_back(store: Store) -> None:
    bench = Bench(store, "paid", paid={"budget": {"tokens": 1000, "usd": 1, "window": "1h"}, "cache": "off"})
    before = (await bench.books("paid"))["budget"]
    await bench.run(model="tiny", max_tokens=100)
    after = (await bench.books("paid"))["budget"]
    assert after["tokens"]["spent"] - before["tokens"]["spent"] == 3 + 3
    assert after["usd"]["spent"] - before["usd"]["spent"] == pytest.approx((3 * 0.1 + 3 * 0.2) / 1e6)
    assert after["tokens"]["reserved"] == 0


async def test_a_stream_that_is_left_is_charged_by_what_was_sent(store: Store) -> None:
    bench = Bench(store, "left", left={"budget": {"tokens": 1000, "window": "1h"}, "cache": "off"})
    run = await bench.open(model="tiny", max_tokens=100, stream=True)
    async for _ in run:
        break
    await run.aclose()
    assert (await bench.books("left"))["budget"]["tokens"] == {"limit": 1000, "spent": 3 + 1, "reserved": 0}


async def test_an_answer_that_nothing_bounds_is_bounded_by_what_was_reserved(store: Store) -> None:
    bench = Bench(store, "bound", bound={"budget": {"tokens": 100_000, "window": "1h"}, "cache": "off"})
    await bench.run(model="tiny")
    assert bench.experts["tiny"].requests[-1].sampling.max_tokens == 8192
    free = Bench(store)
    await free.run(free.terms("secret-b"), model="tiny")
    assert free.experts["tiny"].requests[-1].sampling.max_tokens is None, "nobody counts this one"


async def test_where_nobody_can_count_a_byte_is_a_token(store: Store) -> None:
    bench = Bench(store, "blind", blind={"budget": {"tokens": 200, "window": "1h"}, "cache": "off"})
    bench.experts["tiny"].counted = None
    text = "ab" * 100
    with pytest.raises(BudgetSpent, match="may need"):
        await bench.run(model="tiny", messages=[{"role": "user", "content": text}], max_tokens=4)
    await bench.run(model="tiny", max_tokens=4)


async def test_answers_are_cut_to_the_policy_s_length(store: Store) -> None:
    bench = Bench(store, "short")
    await bench.run(model="tiny", max_tokens=50)
    await bench.run(model="auto:short")
    assert [r.sampling.max_tokens for r in bench.experts["tiny"].requests] == [5, 5]


async def test_a_caller_in_a_hurry_does_not_jump_the_queue(store: Store) -> None:
    """Its own ceiling says until when it waits, the policy's where it stands."""
    bench = Bench(store, "quick")
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 10}
    calm = (await bench.dispatcher.plan(parse_chat(body), bench.terms())).timings["tiny"]
    hasty = (await bench.dispatcher.plan(parse_chat(body), bench.terms(slo_ttft_ms=500.0))).timings["tiny"]
    assert calm.slack_s == calm.due_s == pytest.approx(0.9 * 2.0 - 0.1)
    assert hasty.slack_s == pytest.approx(0.9 * 0.5 - 0.1) and hasty.due_s == calm.due_s


async def test_priority_is_lowered_by_the_caller_and_never_raised(store: Store) -> None:
    bench = Bench(store, "quick")
    call = parse_chat({"model": "auto", "messages": [{"role": "user", "content": "hello"}]})
    for given, got in ((b"9", 3), (b"-2", -2), (None, 3)):
        headers = {} if given is None else {b"x-priority": given}
        assert (await bench.dispatcher.plan(call, bench.terms(headers=headers))).priority == got
