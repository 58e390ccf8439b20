"""The simulated engine: its times under load against the arithmetic, and what it writes and refuses.

Its side towards clients is tested with the other engines' in test_engine_contract.py.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from statistics import mean, median
from typing import Any

import pytest

from signalbox.experts.base import (
    Chunk,
    ContextLengthExceeded,
    ExpertError,
    GenerateRequest,
    InvalidRequest,
    SamplingParams,
    Unsupported,
)
from signalbox.experts.catalog import ExpertConfig, SimulatedExpert
from signalbox.experts.engines import build_engine
from signalbox.experts.simulated_engine import SimulatedEngine
from signalbox.experts.speed_model import SimulatedBatch

SPEED = {"engine": "simulated", "prefill_tokens_per_s": 20_000.0, "step_ms": 8.0, "step_ms_per_request": 0.5}


def config(**changes: object) -> SimulatedExpert:
    return SimulatedExpert.model_validate(SPEED | changes)


def ask(prompt: str = "a signal box", name: str = "r", **sampling: object) -> GenerateRequest:
    return GenerateRequest(name, prompt=prompt, sampling=SamplingParams(**sampling))  # type: ignore[arg-type]


@pytest.fixture
async def engine() -> AsyncIterator[SimulatedEngine]:
    engine = SimulatedEngine("stated", config())
    await engine.start()
    yield engine
    await engine.close()


async def collect(engine: SimulatedEngine, request: GenerateRequest) -> list[Chunk]:
    return [chunk async for chunk in engine.generate(request)]


class LeapingLoop(asyncio.SelectorEventLoop):
    """Its time leaps to the next timer where nothing is ready: no pause of the machine is seen."""

    def __init__(self) -> None:
        super().__init__()
        self._now, select = 0.0, self._selector.select  # type: ignore[attr-defined]

        def leap(timeout: float | None) -> Any:
            self._now += timeout or 0.0
            return select(0)

        self._selector.select = leap  # type: ignore[attr-defined]

    def time(self) -> float:
        return self._now


def test_times_under_load_are_those_of_the_arithmetic() -> None:
    with asyncio.Runner(loop_factory=LeapingLoop) as runner:
        runner.run(times_under_load())


async def times_under_load() -> None:
    """Sixty requests over eight places, some of which wait: each token within a few milliseconds of its time."""
    stated = config(max_running=8, jitter=0.1, seed=4)
    engine, batch = SimulatedEngine("stated", stated), SimulatedBatch(stated.speed_model(), 8, seed=4)
    await engine.start()
    rnd, loop = random.Random(1), asyncio.get_running_loop()
    arrivals: list[tuple[float, str, int, int]] = []
    seen: dict[str, list[float]] = {}

    async def one(name: str, prompt: int, answer: int) -> None:
        stream = engine.generate(GenerateRequest(name, prompt_token_ids=[1] * prompt, sampling=SamplingParams(answer)))
        arrivals.append((loop.time(), name, prompt, answer))
        seen[name] = [loop.time() async for _ in stream]

    begun = loop.time()
    tasks = []
    for i in range(60):
        tasks.append(asyncio.create_task(one(str(i), rnd.randint(10, 400), rnd.randint(5, 40))))
        await asyncio.sleep(rnd.expovariate(50))
    await asyncio.gather(*tasks)
    assert loop.time() - begun < 10
    expected: dict[str, list[float]] = {name: [] for _, name, _, _ in arrivals}
    for at, name, prompt, answer in arrivals:
        for token in batch.advance(at):
            expected[token.request].append(token.at)
        batch.submit(name, prompt, answer, at)
    while batch.next_at is not None:
        for token in batch.advance(batch.next_at):
            expected[token.request].append(token.at)
    assert all(len(seen[name]) == len(times) for name, times in expected.items())
    late = [s - e for name, times in expected.items() for s, e in zip(seen[name], times, strict=True)]
    # The arrival that is noted lies a moment before the engine's own: a request may join one step apart.
    assert abs(median(late)) < 0.005 and mean(abs(x) for x in late) < 0.03
    await engine.close()


async def test_an_answer_has_its_length_and_words_from_the_prompt(engine: SimulatedEngine) -> None:
    exact = await collect(engine, ask(max_tokens=7))
    assert exact[-1].finish_reason == "length" and exact[-1].usage is not None
    assert (exact[-1].usage.prompt_tokens, exact[-1].usage.completion_tokens, len(exact)) == (3, 7, 7)
    again = await collect(engine, ask(max_tokens=7, temperature=0.3))
    assert [c.text for c in again] == [c.text for c in exact]
    assert [c.text for c in await collect(engine, ask("another", max_tokens=7))] != [c.text for c in exact]
    free = await collect(engine, ask())
    assert free[-1].finish_reason == "stop" and len(await collect(engine, ask())) == len(free)


async def test_lengths_are_drawn_around_the_stated_mean() -> None:
    engine = SimulatedEngine("stated", config(answer_tokens=50, step_ms=0.001, step_ms_per_request=0, max_waiting=1000))
    await engine.start()
    answers = await asyncio.gather(*(collect(engine, ask(f"prompt {i}")) for i in range(300)))
    lengths = [len(chunks) for chunks in answers]
    assert mean(lengths) == pytest.approx(50, rel=0.12) and len(set(lengths)) > 40
    await engine.close()


async def test_a_stop_string_across_words_ends_the_text_before_it(engine: SimulatedEngine) -> None:
    whole = "".join(c.text for c in await collect(engine, ask(max_tokens=30)))
    stop = whole[9:14]
    assert " " in stop
    chunks = await collect(engine, ask(max_tokens=30, stop=("never there", stop)))
    assert "".join(c.text for c in chunks) == whole[: whole.find(stop)]
    assert chunks[-1].finish_reason == "stop" and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(chunks) < 30


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (ask("x" * 1000), ContextLengthExceeded, "shorten the prompt"),
        (ask("x", max_tokens=500), ContextLengthExceeded, "lower max_tokens"),
        (ask(""), InvalidRequest, "prompt is empty"),
        (GenerateRequest("m", messages=[]), InvalidRequest, "prompt is empty"),
        (GenerateRequest("a", prompt="x", adapter="none"), Unsupported, "no adapter 'none'"),
        (GenerateRequest("t", prompt="x", extra={"tools": []}), Unsupported, "tools"),
        (ask("x", logprobs=2), Unsupported, "likelihoods"),
    ],
)
async def test_bad_requests_are_refused_with_a_reason(
    request_: GenerateRequest, error: type[ExpertError], message: str
) -> None:
    engine = SimulatedEngine("stated", config(context_length=200))
    await engine.start()
    with pytest.raises(error, match=message) as caught:
        await collect(engine, request_)
    assert 400 <= caught.value.status < 500 and not caught.value.retryable
    assert engine.state().running == engine.state().waiting == 0
    free = await collect(engine, ask("x" * 780))
    assert len(free) <= 5, "a length that is drawn keeps to the context"
    await engine.close()


async def test_it_has_neither_likelihoods_nor_adapters(engine: SimulatedEngine) -> None:
    with pytest.raises(Unsupported):
        await engine.score(ask(), "x")
    with pytest.raises(Unsupported):
        await engine.load("a@1", "/nowhere")
    await engine.unload("a@1")
    assert list(engine.adapters()) == []
    assert await engine.count_tokens(GenerateRequest("m", messages=[{"role": "user", "content": "12345"}])) == 2


def test_it_is_declared_like_any_other() -> None:
    from pydantic import TypeAdapter, ValidationError

    declared = {**SPEED, "price": {"input": 1.0}, "latency": {"ttft_ms": 20, "tpot_ms": 9}, "replicas": 2}
    expert = TypeAdapter(ExpertConfig).validate_python(declared)
    assert isinstance(expert, SimulatedExpert) and isinstance(build_engine("s", expert), SimulatedEngine)
    with pytest.raises(ValidationError, match="step"):
        TypeAdapter(ExpertConfig).validate_python(declared | {"step": 5})
