"""Collection over the real engine, on tiny random models; faults are injected around it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import orjson
import pytest

from signalbox.experts.base import Chunk, Engine, ExpertUnavailable, GenerateRequest, Score, Unsupported
from signalbox.experts.catalog import Price, TransformersExpert
from signalbox.experts.engines import build_engine
from signalbox.router.collect import CollectError, collect
from signalbox.router.table import read_table, write_table
from signalbox.router.texts import Text, arithmetic_texts
from tests.tiny_models import save_tiny

TEXTS = arithmetic_texts(12)
PRICES = {"one": Price(input=1.0, output=2.0), "two": Price(input=10.0, output=20.0)}


@pytest.fixture(scope="module")
async def engines(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[dict[str, Engine]]:
    folder = tmp_path_factory.mktemp("models")
    found: dict[str, Engine] = {}
    for seed, name in enumerate(PRICES):
        model = save_tiny(folder / name, seed=seed)
        found[name] = build_engine(name, TransformersExpert(engine="transformers", model=str(model), threads=1))
        await found[name].start()
    yield found
    for engine in found.values():
        await engine.close()


class Flaky:
    """INJECTED FAULT around a real engine: raises on the calls that `fails` says, counts the others."""

    def __init__(self, engine: Engine, fails: dict[int, Exception] | None = None) -> None:
        self.engine, self.fails, self.calls, self.scored = engine, fails or {}, 0, 0

    async def score(self, request: GenerateRequest, reference: str) -> Score:
        self.calls += 1
        if self.calls in self.fails:
            raise self.fails[self.calls]
        self.scored += 1
        return await self.engine.score(request, reference)

    def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        return self.engine.generate(request)

    def __getattr__(self, name: str) -> object:
        return getattr(self.engine, name)


async def test_every_column_is_what_the_engine_said(engines: dict[str, Engine]) -> None:
    found = await collect(engines, TEXTS, prices=PRICES)
    table = found.table
    assert table.models == ("one", "two") and not found.failed and len(table.complete()) == len(TEXTS)
    request = GenerateRequest("r", messages=[{"role": "user", "content": TEXTS[3].prompt}])
    for column, (name, engine) in enumerate(engines.items()):
        score = await engine.score(request, TEXTS[3].reference)
        cell = {kind: values[3, column] for kind, values in table.measures.items()}
        assert cell["loss"] == pytest.approx(score.bits_per_byte, rel=1e-4)
        assert cell["score"] == pytest.approx(2**-score.bits_per_byte, rel=1e-3)
        assert (cell["in_tok"], cell["out_tok"]) == (score.prompt_tokens, score.reference_tokens)
        assert cell["cost"] == pytest.approx(PRICES[name].usd(score.prompt_tokens, score.reference_tokens))
        assert cell["ms"] > 0
    assert table.reference == [t.reference for t in TEXTS] and table.prompt_id == [t.prompt_id for t in TEXTS]
    assert np.abs(table.measures["loss"][:, 0] - table.measures["loss"][:, 1]).min() > 0  # two models, two opinions


async def test_a_failure_is_recorded_and_tried_again(engines: dict[str, Engine], tmp_path: Path) -> None:
    journal = tmp_path / "run" / "partial.jsonl"
    flaky = Flaky(engines["one"], {2: ExpertUnavailable("the engine hiccuped"), 5: ValueError("odd")})
    first = await collect({"one": flaky, "two": engines["two"]}, TEXTS, journal=journal)
    assert first.failed == 2
    assert [(f.expert, f.prompt_id) for f in first.failures] == [
        ("one", TEXTS[1].prompt_id),
        ("one", TEXTS[4].prompt_id),
    ]
    assert "the engine hiccuped" in first.failures[0].error
    assert np.isnan(first.table.measures["loss"]).sum() == 2 and len(first.table.complete()) == len(TEXTS) - 2
    path = tmp_path / "t.parquet"
    write_table(first.table, path)
    assert len(read_table(path).complete()) == len(TEXTS) - 2
    second = Flaky(engines["one"]), Flaky(engines["two"])
    again = await collect(dict(zip(("one", "two"), second, strict=True)), TEXTS, journal=journal)
    assert (second[0].scored, second[1].scored) == (2, 0) and again.resumed == 2 * len(TEXTS) - 2
    assert not again.failed and len(again.table.complete()) == len(TEXTS)


async def test_a_run_that_ended_early_goes_on_where_it_stopped(engines: dict[str, Engine], tmp_path: Path) -> None:
    journal = tmp_path / "partial.jsonl"
    seen: list[tuple[str, int]] = []

    def stop_at_five(expert: str, done: int, total: int, failed: int) -> None:
        seen.append((expert, done))
        if done == 5:
            raise RuntimeError("stopped here")

    with pytest.raises(ExceptionGroup, match="unhandled"):
        await collect({"one": engines["one"]}, TEXTS, journal=journal, report=stop_at_five)
    assert seen[0] == ("one", 0)
    with journal.open("ab") as file:  # killed in the middle of a line
        file.write(b'{"key": "abc", "loss": 1.')
    rest = Flaky(engines["one"])
    found = await collect({"one": rest}, TEXTS, journal=journal)
    assert rest.scored == len(TEXTS) - 5 and found.resumed == 5 and len(found.table.complete()) == len(TEXTS)
    fresh = await collect({"one": engines["one"]}, TEXTS)
    np.testing.assert_allclose(found.table.measures["loss"], fresh.table.measures["loss"], rtol=1e-4)
    whole = [line for line in journal.read_bytes().splitlines() if b'"ms"' in line]
    assert len(whole) == len(TEXTS) and all(orjson.loads(line) for line in whole)


async def test_what_changed_is_measured_again(engines: dict[str, Engine], tmp_path: Path) -> None:
    journal = tmp_path / "partial.jsonl"
    await collect({"one": engines["one"]}, TEXTS[:4], journal=journal, fingerprints={"one": "v1"})
    same, other = Flaky(engines["one"]), Flaky(engines["one"])
    await collect({"one": same}, TEXTS[:4], journal=journal, fingerprints={"one": "v1"})
    await collect({"one": other}, TEXTS[:4], journal=journal, fingerprints={"one": "v2"})
    assert (same.scored, other.scored) == (0, 4)
    reworded = Text(TEXTS[0].prompt_id, "Another prompt", TEXTS[0].reference, "t", "s", "Another prompt")
    changed = Flaky(engines["one"])
    await collect({"one": changed}, [reworded, *TEXTS[1:4]], journal=journal, fingerprints={"one": "v1"})
    assert changed.scored == 1


async def test_many_in_flight_give_the_same_losses(engines: dict[str, Engine]) -> None:
    alone = await collect(engines, TEXTS)
    together = await collect(engines, TEXTS, concurrency=6)
    np.testing.assert_allclose(together.table.measures["loss"], alone.table.measures["loss"], rtol=1e-4)


async def test_what_cannot_be_collected_says_so(engines: dict[str, Engine]) -> None:
    remote = Flaky(engines["one"], {1: Unsupported("no log-likelihoods over this API")})
    with pytest.raises(CollectError, match=r"expert far cannot score references \(no log-likelihoods.*--pool"):
        await collect({"far": remote}, TEXTS, concurrency=3)
    down = Flaky(engines["one"], {n: ExpertUnavailable("gone") for n in range(1, 99)})
    with pytest.raises(CollectError, match="12 failures, for instance one: ExpertUnavailable: gone"):
        await collect({"one": down}, TEXTS)
    with pytest.raises(CollectError, match="pool is empty"):
        await collect({}, TEXTS)
    with pytest.raises(CollectError, match="no text was given"):
        await collect(engines, [])


async def test_cancelling_ends_it(engines: dict[str, Engine]) -> None:
    many = arithmetic_texts(400)
    begun = asyncio.Event()
    told = lambda _, done, *__: done and begun.set()  # noqa: E731
    task = asyncio.create_task(collect({"one": engines["one"]}, many, concurrency=4, report=told))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0.05)
    score = await engines["one"].score(GenerateRequest("x", prompt="a"), "b")  # the engine is none the worse
    assert np.isfinite(score.nll_bits)
