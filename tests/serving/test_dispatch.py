"""Who answers, what if they fail, and what comes from the cache.

Experts here are scripted: faults that a healthy engine does not have are what is tested, and the fakes inject them.
Store, cache, policies and decision are the real ones. With real engines the same is tested in `test_gateway.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from signalbox.experts.base import (
    Chunk,
    ExpertError,
    ExpertUnavailable,
    GenerateRequest,
    InvalidRequest,
    QueueFull,
    ReplicaNotReady,
    Unsupported,
    Usage,
)
from signalbox.policies.base import NoCandidate
from signalbox.policies.latency import Load
from signalbox.router.base import Prompt
from signalbox.serving.config import Config
from signalbox.serving.dispatch import Dispatcher, Run, Terms
from signalbox.serving.live_state import ExpertState, LiveState, ReplicaSpeed
from signalbox.serving.pool import Pool
from signalbox.serving.protocols.openai import parse_chat, parse_completion
from signalbox.serving.routing import Routing, Scores
from signalbox.serving.store import Store
from tests.serving.conftest import make_config


class ScriptedExpert:
    """An injected fault, or an answer: yields its script's chunks and raises its errors, and counts what happens."""

    def __init__(self, *script: str | Exception) -> None:
        self.script = script
        self.requests: list[GenerateRequest] = []
        self.closed = 0
        self.pause = 0.0

    async def generate(self, request: GenerateRequest) -> AsyncIterator[list[Chunk]]:
        self.requests.append(request)
        try:
            for step in self.script:
                if self.pause:
                    await asyncio.sleep(self.pause)
                if isinstance(step, Exception):
                    raise step
                yield [Chunk(step, [1])]
            yield [Chunk("", [], finish_reason="stop", usage=Usage(3, len(self.script)))]
        finally:
            self.closed += 1


class CountingRouting(Routing):
    """The router's place, with fixed predictions; counts how often it was asked."""

    def __init__(self, quality: dict[str, tuple[float, float]]) -> None:
        super().__init__(list(quality))
        self.quality = quality
        self.asked: list[list[Prompt]] = []

    async def predict(self, prompts: Any) -> Scores:
        self.asked.append(list(prompts))
        return Scores(self.quality, 0.5, "default")


@pytest.fixture
async def store(valkey: str) -> AsyncIterator[Store]:
    store = Store(valkey)
    await store.delete("admission:queue:tiny", "admission:queue:wide")  # what other tests have left undone
    yield store
    await store.close()


class Bench:
    """A dispatcher over scripted experts. `tiny` is predicted to be better, and is cheaper, unless told otherwise."""

    def __init__(self, store: Store, config: Config | None = None, **experts: ScriptedExpert) -> None:
        self.config = config or make_config({"tiny": Path("tiny"), "wide": Path("wide")})
        self.experts = {"tiny": ScriptedExpert("t"), "wide": ScriptedExpert("w")} | experts
        self.routing = CountingRouting({"tiny": (0.8, 0.05), "wide": (0.6, 0.05)})
        self.live = LiveState(store, self.config.experts)
        self.dispatcher = Dispatcher(
            self.config,
            experts=self.experts,  # type: ignore[arg-type]
            pool=Pool(self.config, live=self.live),
            routing=self.routing,
            store=store,
        )

    async def run(self, *, slo: float | None = None, text: str = "hello", **fields: Any) -> tuple[Run, str]:
        """Answer to the end and settle, as the gateway does; returns the run and its text."""
        body = {"model": "auto", "messages": [{"role": "user", "content": text}]} | fields
        run = await self.dispatcher.open(parse_chat(body), "id", time.perf_counter(), Terms(slo_ttft_ms=slo))
        async for _ in run:
            pass
        await self.dispatcher.settle(run)
        await run.aclose()
        return run, "|".join(choice.text for choice in run.builder.answer().choices)


def measured(ttft_ms: float) -> ExpertState:
    """A replica that is ready and answers at this speed."""
    return ExpertState(True, speeds=(ReplicaSpeed(Load(), None, ttft_ms, 5.0),))


# -- names ---------------------------------------------------------------------------------------------------------


async def test_models_by_name(store: Store) -> None:
    bench = Bench(store)
    run, text = await bench.run(model="wide")
    assert (run.expert, text, run.plan.router, run.plan.policy) == ("wide", "w", "none", "none")
    assert not bench.routing.asked, "nothing is predicted for a request that names its expert"
    run, text = await bench.run(model="auto:gold")
    assert (run.expert, text, run.plan.router, run.plan.policy) == ("tiny", "t", "default", "gold")
    assert run.plan.confidence is not None and run.plan.confidence > 0.9


@pytest.mark.parametrize("model", ["gpt-5", "auto:silver", "auto:", "tiny:banking", "AUTO", "gold"])
async def test_unknown_models_are_told_what_there_is(store: Store, model: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await Bench(store).run(model=model)
    error = caught.value
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
    for name in ("auto", "auto:gold", "auto:bronze", "tiny", "wide"):
        assert name in error.message


async def test_default_policy(store: Store) -> None:
    config = make_config({"tiny": Path("tiny"), "wide": Path("wide")}, default_policy="bronze")
    run, _ = await Bench(store, config).run()
    assert run.plan.policy == "bronze"


# -- knobs ---------------------------------------------------------------------------------------------------------


async def test_tradeoff_and_flags_move_the_choice(store: Store) -> None:
    bench = Bench(store)
    bench.routing.quality = {"tiny": (0.5, 0.01), "wide": (0.9, 0.01)}
    assert (await bench.run(signalbox={"cost_quality_tradeoff": 0}))[0].expert == "wide"
    assert (await bench.run(signalbox={"cost_quality_tradeoff": 10}))[0].expert == "tiny"
    run, _ = await bench.run(text="hello [Flag: lowest cost]")
    assert run.expert == "tiny" and run.plan.flags == ["cost"]
    assert bench.experts["tiny"].requests[-1].messages == [{"role": "user", "content": "hello"}]
    assert bench.routing.asked[-1] == [Prompt("hello")]
    run, _ = await bench.run(model="wide", text="hello [Flag: lowest cost]")
    assert bench.experts["wide"].requests[-1].messages == [{"role": "user", "content": "hello [Flag: lowest cost]"}], (
        "with the expert named, there is nothing to wish for and the prompt is the expert's"
    )


async def test_allowed_globs_narrow_the_policy_s(store: Store) -> None:
    bench = Bench(store)
    run, _ = await bench.run(signalbox={"allowed": ["w*"]})
    assert run.expert == "wide" and run.plan.order == ["wide"], "fallbacks keep to them too"
    with pytest.raises(InvalidRequest, match="not allowed") as caught:
        await bench.run(signalbox={"allowed": ["gpt-*"]})
    assert caught.value.code == "no_candidate" and isinstance(caught.value.__cause__, NoCandidate)


async def test_slo_header_tightens_the_ceiling_and_never_loosens_it(store: Store) -> None:
    bench = Bench(store)
    bench.live.assume({"tiny": measured(900.0), "wide": measured(100.0)})
    assert (await bench.run())[0].expert == "tiny"
    assert (await bench.run(slo=500))[0].expert == "wide"
    run, _ = await bench.run(slo=50)
    assert run.expert == "wide" and run.plan.decision is not None, "the least violated one"
    assert run.plan.decision.violated == ["max_ttft_ms"]
    config = make_config(
        {"tiny": Path("tiny"), "wide": Path("wide")}, policies={"strict": {"slo": {"max_ttft_ms": 200}}}
    )
    strict = Bench(store, config)
    strict.live.assume({"tiny": measured(900.0), "wide": measured(100.0)})
    assert (await strict.run(model="auto:strict", slo=5000))[0].expert == "wide"
    failing = {"strict": {"slo": {"max_ttft_ms": 50}, "on_no_candidates": "fail"}}
    strict = Bench(store, make_config({"tiny": Path("tiny"), "wide": Path("wide")}, policies=failing))
    strict.live.assume({"tiny": measured(900.0), "wide": measured(100.0)})
    with pytest.raises(ExpertUnavailable) as caught:  # it may be kept a moment later
        await strict.run(model="auto:strict")
    assert caught.value.code == "no_candidate" and "max_ttft_ms 900 > 50" in caught.value.message


async def test_a_policy_that_no_expert_can_keep(store: Store) -> None:
    with pytest.raises(InvalidRequest, match=r"max_cost_per_1m .* > 0\.001") as caught:
        await Bench(store).run(model="auto:impossible")
    assert caught.value.status == 400 and caught.value.code == "no_candidate"


async def test_a_prompt_over_every_context(store: Store) -> None:
    bench = Bench(store)
    bench.live.assume({name: ExpertState(True, context_length=100) for name in ("tiny", "wide")})
    with pytest.raises(InvalidRequest) as caught:
        await bench.run(text="word " * 1000)
    assert caught.value.code == "context_length_exceeded"


async def test_unknown_fallbacks_and_keys(store: Store) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await Bench(store).run(signalbox={"fallbacks": ["gpt-5"]})
    assert caught.value.param == "signalbox.fallbacks" and "tiny, wide" in caught.value.message
    with pytest.raises(InvalidRequest, match=r"signalbox\.alowed"):
        await Bench(store).run(signalbox={"alowed": ["*"]})


async def test_token_ids_cannot_be_routed(store: Store) -> None:
    call = parse_completion({"model": "auto", "prompt": [1, 2, 3]})
    with pytest.raises(InvalidRequest, match="name the expert"):
        await Bench(store).dispatcher.plan(call)


async def test_what_only_remote_experts_can_do_goes_to_one(store: Store) -> None:
    tools = {"tools": [{"type": "function", "function": {"name": "f"}}]}
    with pytest.raises(Unsupported) as caught:
        await Bench(store).run(**tools)
    assert caught.value.param == "tools"
    base = make_config({"tiny": Path("tiny"), "wide": Path("wide")})
    remote = {"engine": "openai", "base_url": "https://127.0.0.1:1/v1", "model": "m"}
    config = Config.model_validate(
        base.model_dump(mode="json") | {"experts": {"tiny": base.experts["tiny"], "wide": remote}}
    )
    bench = Bench(store, config)
    run, _ = await bench.run(**tools)
    assert run.expert == "wide" and bench.experts["wide"].requests[0].extra == tools
    run, _ = await bench.run(parallel_tool_calls=False)
    assert run.expert == "tiny" and bench.experts["tiny"].requests[0].extra == {}


# -- failures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("error", [QueueFull("full"), ExpertUnavailable("down"), ExpertError("broken")])
async def test_the_next_expert_answers_where_the_first_fails(store: Store, error: Exception, stream: bool) -> None:
    bench = Bench(store, tiny=ScriptedExpert(error))
    run, text = await bench.run(stream=stream)
    assert (run.expert, run.attempts, text) == ("wide", 2, "w")
    assert bench.experts["tiny"].closed == 1


async def test_a_wrong_request_is_not_tried_elsewhere(store: Store) -> None:
    bench = Bench(store, tiny=ScriptedExpert(InvalidRequest("too long")))
    with pytest.raises(InvalidRequest, match="too long"):
        await bench.run()
    assert not bench.experts["wide"].requests


async def test_a_whole_answer_moves_on_in_the_middle_a_stream_does_not(store: Store) -> None:
    def bench() -> Bench:
        return Bench(store, tiny=ScriptedExpert("half", ExpertUnavailable("died")))

    run, text = await bench().run()
    assert (run.expert, text, run.attempts) == ("wide", "w", 2), "nothing of the broken answer is left"
    broken = bench()
    call = parse_chat({"model": "auto", "stream": True, "messages": [{"role": "user", "content": "x"}]})
    run = await broken.dispatcher.open(call, "id", time.perf_counter())
    seen = []
    with pytest.raises(ExpertUnavailable, match="died"):
        async for _, chunks in run:
            seen += [chunk.text for chunk in chunks]
    assert seen == ["half"] and not broken.experts["wide"].requests


async def test_when_all_fail_the_last_error_is_told(store: Store) -> None:
    bench = Bench(store, tiny=ScriptedExpert(ExpertUnavailable("a")), wide=ScriptedExpert(QueueFull("b")))
    with pytest.raises(QueueFull, match="b"):
        await bench.run()


async def test_a_policy_says_how_many_are_tried_and_the_caller_whom(store: Store) -> None:
    policies = {"alone": {"fallback": 0}}
    config = make_config({"tiny": Path("tiny"), "wide": Path("wide")}, policies=policies)
    broken = ScriptedExpert(ExpertUnavailable("down"))
    with pytest.raises(ExpertUnavailable):
        await Bench(store, config, tiny=broken).run(model="auto:alone")
    run, _ = await Bench(store, config, tiny=broken).run(model="auto:alone", signalbox={"fallbacks": ["wide"]})
    assert run.expert == "wide"
    with pytest.raises(ExpertUnavailable):
        await Bench(store, tiny=broken).run(model="tiny")
    run, _ = await Bench(store, tiny=broken).run(model="tiny", signalbox={"fallbacks": ["wide"]})
    assert (run.expert, run.attempts) == ("wide", 2)


async def test_an_expert_known_not_to_be_ready_is_not_asked(store: Store) -> None:
    bench = Bench(store)
    bench.live.assume({"tiny": ExpertState(False, reason="out of memory"), "wide": ExpertState(True)})
    assert (await bench.run())[0].expert == "wide"
    with pytest.raises(ExpertUnavailable, match="out of memory") as caught:
        await bench.run(model="tiny")
    assert caught.value.status == 503 and not bench.experts["tiny"].requests
    bench.live.assume({"wide": ExpertState(False, reason="starting")})
    with pytest.raises(ExpertUnavailable, match="tiny: not ready; wide: not ready"):
        await bench.run()


async def test_several_choices_stop_together(store: Store) -> None:
    class OneFails(ScriptedExpert):
        async def generate(self, request: GenerateRequest) -> AsyncIterator[list[Chunk]]:
            try:
                await asyncio.sleep(0.05 if request.request_id.endswith("-1") else 3600)
                raise ExpertUnavailable("down")
                yield []
            finally:
                self.closed += 1

    bench = Bench(store, tiny=OneFails())
    async with asyncio.timeout(60):  # nobody waits for the others
        run, text = await bench.run(n=3)
    assert (run.expert, text) == ("wide", "w|w|w") and run.builder.usage() == Usage(3, 3)
    assert bench.experts["tiny"].closed == 3


async def test_cancelling_closes_every_choice(store: Store) -> None:
    slow = ScriptedExpert(*"abcdefgh")
    slow.pause = 0.2
    bench = Bench(store, tiny=slow)
    task = asyncio.create_task(bench.run(n=4))
    async with asyncio.timeout(30):
        while len(slow.requests) < 4:
            await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert slow.closed == 4


# -- cache ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh() -> Callable[[], str]:
    """A text that no test has asked before."""
    return lambda: f"hello at {time.time_ns()}"


async def test_a_repeated_auto_request_hits_without_a_prediction(store: Store, fresh: Callable[[], str]) -> None:
    bench, text = Bench(store), fresh()
    first, answer = await bench.run(text=text, temperature=0)
    second, again = await bench.run(text=text, temperature=0)
    assert (first.cache, second.cache, again) == ("miss", "hit", answer)
    assert len(bench.routing.asked) == 1 and len(bench.experts["tiny"].requests) == 1
    assert second.expert == "tiny" and second.plan.confidence == first.plan.confidence
    assert second.builder.usage() == first.builder.usage()
    assert second.plan.router == "default" and second.plan.policy == "default" and second.attempts == 0
    streamed, again = await bench.run(text=text, temperature=0, stream=True, user="someone")
    assert (streamed.cache, again) == ("hit", answer)


async def test_a_decision_without_the_whole_pool_is_not_remembered(store: Store, fresh: Callable[[], str]) -> None:
    bench, text = Bench(store), fresh()
    bench.live.assume({"tiny": ExpertState(False, reason="starting"), "wide": ExpertState(True)})
    assert (await bench.run(text=text, temperature=0))[0].expert == "wide"
    bench.live.assume({"tiny": ExpertState(True), "wide": ExpertState(True)})
    assert (await bench.run(text=text, temperature=0))[0].expert == "tiny"


async def test_an_answer_is_kept_once_however_it_was_asked_for(store: Store, fresh: Callable[[], str]) -> None:
    bench, text = Bench(store), fresh()
    await bench.run(text=text, temperature=0, model="tiny")
    run, _ = await bench.run(text=text, temperature=0, model="auto")
    assert run.cache == "hit" and len(bench.experts["tiny"].requests) == 1
    run, _ = await bench.run(text=f"{text} [Flag: lowest cost]", temperature=0)
    assert run.cache == "hit", "flags are for the router; the expert saw the same prompt"
    assert (await bench.run(text=text, temperature=0, model="wide"))[0].cache == "miss"


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.1},
        {},
        {"temperature": 0, "signalbox": {"cache": {"mode": "off"}}},
        {"temperature": 0, "model": "auto:fresh"},
    ],
)
async def test_what_is_not_cached(store: Store, fresh: Callable[[], str], fields: dict[str, Any]) -> None:
    bench, text = Bench(store), fresh()
    for _ in range(2):
        assert (await bench.run(text=text, **fields))[0].cache == "bypass"
    assert len(bench.experts["tiny"].requests) == 2


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 5},
        {"stop": "x"},
        {"n": 2},
        {"logprobs": True},
        {"seed": 4},
        {"signalbox": {"cache": {"namespace": "other"}}},
    ],
)
async def test_what_changes_the_answer_misses(store: Store, fresh: Callable[[], str], fields: dict[str, Any]) -> None:
    bench, text = Bench(store), fresh()
    await bench.run(text=text, temperature=0)
    assert (await bench.run(text=text, temperature=0, **fields))[0].cache == "miss"
    assert (await bench.run(text=text, temperature=0, **fields))[0].cache == "hit"


async def test_new_weights_miss(store: Store, fresh: Callable[[], str]) -> None:
    bench, text = Bench(store), fresh()
    bench.live.assume({"tiny": ExpertState(True, fingerprint="one")})
    await bench.run(text=text, temperature=0)
    bench.live.assume({"tiny": ExpertState(True, fingerprint="two")})
    assert (await bench.run(text=text, temperature=0))[0].cache == "miss"


async def test_a_changed_pool_decides_anew(store: Store, fresh: Callable[[], str]) -> None:
    text = fresh()
    await Bench(store).run(text=text, temperature=0)
    base = make_config({"tiny": Path("tiny"), "wide": Path("wide")})
    dearer = base.experts["tiny"].model_copy(update={"price": base.experts["wide"].price})
    bench = Bench(store, base.model_copy(update={"experts": {**base.experts, "tiny": dearer}}))
    run, _ = await bench.run(text=text, temperature=0)
    assert run.cache == "hit" and len(bench.routing.asked) == 1, "decided anew, and the answer was there"


async def test_a_broken_answer_is_not_kept(store: Store, fresh: Callable[[], str]) -> None:
    text = fresh()
    bench = Bench(store, tiny=ScriptedExpert("half", ExpertUnavailable("died")))
    run, _ = await bench.run(text=text, temperature=0)
    assert run.expert == "wide"
    bench.experts["tiny"].script = ("well",)
    run, answer = await bench.run(text=text, temperature=0)
    assert (run.cache, run.expert, answer) == ("miss", "tiny", "well"), "a fallback's answer is not the chosen one's"


async def test_ttl(store: Store, fresh: Callable[[], str]) -> None:
    bench, text = Bench(store), fresh()
    knobs = {"signalbox": {"cache": {"ttl": 1.5}}}
    await bench.run(text=text, temperature=0, **knobs)
    assert (await bench.run(text=text, temperature=0, **knobs))[0].cache == "hit"
    await asyncio.sleep(1.6)
    assert (await bench.run(text=text, temperature=0, **knobs))[0].cache == "miss"


async def test_a_lost_store_is_a_miss_and_no_error() -> None:
    store = Store("redis://127.0.0.1:1", timeout_s=0.1)
    bench = Bench(store)
    for _ in range(2):
        run, answer = await bench.run(temperature=0)
        assert (run.cache, answer) == ("miss", "t")
    await store.close()


class Starting(ScriptedExpert):
    """The first `times` requests get to a replica whose engine is still starting; the others' are ready."""

    def __init__(self, times: int) -> None:
        super().__init__("t")
        self.times = times

    async def generate(self, request: GenerateRequest) -> AsyncIterator[list[Chunk]]:
        if self.times:
            self.times -= 1
            raise ReplicaNotReady("starting")
        async for chunks in super().generate(request):
            yield chunks


async def test_another_replica_is_asked_while_one_is_starting(store: Store) -> None:
    run, text = await Bench(store, tiny=Starting(2)).run(model="tiny")
    assert (run.expert, text, run.attempts) == ("tiny", "t", 1)


async def test_an_expert_of_which_no_replica_comes_falls_back(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("signalbox.serving.dispatch.REPLICA_WAIT_S", 0.2)
    bench = Bench(store, tiny=Starting(10**6))
    run, text = await bench.run(model="tiny", signalbox={"fallbacks": ["wide"]})
    assert (run.expert, text, run.attempts) == ("wide", "w", 2)
    with pytest.raises(ReplicaNotReady):
        await bench.run(model="tiny")
