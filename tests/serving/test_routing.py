"""Micro-batching around a predictor, and what becomes of requests when the predictor is slow, broken or overrun."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from signalbox.router.base import Prediction, Predictor, Prompt
from signalbox.serving import routing as module
from signalbox.serving.routing import UNKNOWN_QUALITY, Routing, Scores, artifact_version, load_artifact


class LengthPredictor:
    """A predictor whose answer tells which prompt it was for; it can be held up and can stumble over a word."""

    kind = "length"
    experts = ("short", "long")

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def predict(self, prompts: list[Prompt]) -> Prediction:
        self.batches.append([p.text for p in prompts])
        self.entered.set()
        assert self.gate.wait(10)
        if any("poison" in p.text for p in prompts):
            raise ValueError("cannot digest poison")
        share = np.array([[1 - len(p.text) / 100, len(p.text) / 100] for p in prompts], np.float32)
        return Prediction(self.experts, share, np.full_like(share, 0.1), 0.5)


@asynccontextmanager
async def running(load: Callable[[], Predictor]) -> AsyncIterator[Routing]:
    routing = Routing(["short", "long"], name="default", load=load)
    routing.start()
    try:
        yield routing
    finally:
        await routing.close()


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not come about")


async def test_requests_that_come_during_a_batch_go_together_in_the_next() -> None:
    predictor = LengthPredictor()
    async with running(lambda: predictor) as routing:
        predictor.gate.clear()
        first = asyncio.create_task(routing.predict([Prompt("x")]))
        await until(predictor.entered.is_set)
        rest = [asyncio.create_task(routing.predict([Prompt("x" * n)])) for n in range(2, 22)]
        await asyncio.sleep(0.05)
        predictor.gate.set()
        scores = await asyncio.gather(first, *rest)
    assert [len(batch) for batch in predictor.batches] == [1, 20]
    for n, score in enumerate(scores, 1):
        assert score.router == "default" and score.spread == 0.5
        assert score.quality["long"] == pytest.approx((n / 100, 0.1)), "each request gets its own prompt's row"


async def test_a_batch_is_bounded() -> None:
    predictor = LengthPredictor()
    async with running(lambda: predictor) as routing:
        predictor.gate.clear()
        tasks = [asyncio.create_task(routing.predict([Prompt("x")])) for _ in range(100)]
        await until(predictor.entered.is_set)
        predictor.gate.set()
        await asyncio.gather(*tasks)
    assert max(len(batch) for batch in predictor.batches) <= module.MAX_BATCH


async def test_several_prompts_of_one_request_are_averaged() -> None:
    async with running(LengthPredictor) as routing:
        scores = await routing.predict([Prompt("x" * 10), Prompt("x" * 30)])
    assert scores.quality["long"] == pytest.approx((0.2, 0.1))


async def test_a_prompt_that_breaks_the_predictor_harms_no_other() -> None:
    predictor = LengthPredictor()
    async with running(lambda: predictor) as routing:
        predictor.gate.clear()
        first = asyncio.create_task(routing.predict([Prompt("x")]))
        await until(predictor.entered.is_set)
        texts = ["x" * 5, "poison", "x" * 7]
        rest = [asyncio.create_task(routing.predict([Prompt(text)])) for text in texts]
        await asyncio.sleep(0.05)
        predictor.gate.set()
        await first
        good, bad, also_good = await asyncio.gather(*rest)
        again = await routing.predict([Prompt("x" * 9)])
    assert bad == Scores(dict.fromkeys(("short", "long"), UNKNOWN_QUALITY), 1.0, "fallback")
    assert (good.router, also_good.router, again.router) == ("default",) * 3


async def test_a_predictor_that_cannot_be_loaded(caplog: pytest.LogCaptureFixture) -> None:
    def load() -> Predictor:
        raise OSError("no such artifact")

    async with running(load) as routing:
        early = await routing.predict([Prompt("x")])  # came while it was loading
        assert early.router == "fallback" and routing.ready
        assert routing.error is not None and "no such artifact" in routing.error
        assert (await routing.predict([Prompt("x")])).router == "fallback"
    assert "no such artifact" in caplog.text


async def test_an_overrun_router_is_passed_by() -> None:
    predictor = LengthPredictor()
    async with running(lambda: predictor) as routing:
        predictor.gate.clear()
        tasks = [asyncio.create_task(routing.predict([Prompt("x")]))]
        await until(predictor.entered.is_set)
        tasks += [asyncio.create_task(routing.predict([Prompt("x")])) for _ in range(module.MAX_WAITING + 50)]
        await asyncio.sleep(0.05)
        extra = await asyncio.wait_for(routing.predict([Prompt("x")]), 1)  # at once, not when the others are through
        predictor.gate.set()
        scores = await asyncio.gather(*tasks)
    assert extra.router == "fallback"
    assert sum(s.router == "default" for s in scores) == 1 + module.MAX_WAITING


async def test_cancelled_requests_cost_nothing() -> None:
    predictor = LengthPredictor()
    async with running(lambda: predictor) as routing:
        predictor.gate.clear()
        first = asyncio.create_task(routing.predict([Prompt("first")]))
        await until(predictor.entered.is_set)
        gone = asyncio.create_task(routing.predict([Prompt("gone")]))
        stays = asyncio.create_task(routing.predict([Prompt("stays")]))
        await asyncio.sleep(0.05)
        gone.cancel()
        predictor.gate.set()
        await asyncio.gather(first, stays)
        assert gone.cancelled() or (await asyncio.gather(gone, return_exceptions=True))
    assert predictor.batches == [["first"], ["stays"]]


async def test_closing_leaves_nobody_waiting() -> None:
    predictor = LengthPredictor()
    routing = Routing(["short", "long"], name="default", load=lambda: predictor)
    routing.start()
    predictor.gate.clear()
    first = asyncio.create_task(routing.predict([Prompt("a")]))
    await until(predictor.entered.is_set)
    second = asyncio.create_task(routing.predict([Prompt("b")]))
    await asyncio.sleep(0.05)
    await routing.close()
    predictor.gate.set()
    scores = await asyncio.wait_for(asyncio.gather(first, second), 5)
    assert [s.router for s in scores] == ["fallback"] * 2


async def test_without_a_router_all_are_equal() -> None:
    routing = Routing(["a", "b"])
    routing.start()
    assert routing.ready
    assert await routing.predict([Prompt("x")]) == Scores(dict.fromkeys("ab", UNKNOWN_QUALITY), 1.0, "none")
    await routing.close()


async def test_a_trained_artifact(router_artifact: Path) -> None:
    async with running(lambda: load_artifact(router_artifact)) as routing:
        sums, story = await asyncio.gather(
            routing.predict([Prompt("What is 31 plus 12?")]),
            routing.predict([Prompt("Tell me a story about a knight and a dragon.")]),
        )
    assert sums.quality["tiny"][0] > sums.quality["wide"][0]
    assert story.quality["wide"][0] > story.quality["tiny"][0]
    assert len(artifact_version(router_artifact)) == 12
    assert artifact_version(router_artifact / "nothing") == "unreadable"
