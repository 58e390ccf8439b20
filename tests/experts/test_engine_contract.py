"""What every local engine must do: on tiny models, by the transformers engine (two families) and by vLLM.

What is said of streams, cancelling, bounds and errors, the simulated engine must do as well, which has no model.
vLLM's part runs where vLLM can be imported: `make test-vllm`. Tests with "transformers" in their name are of that
engine alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from signalbox.experts.base import (
    AdapterNotLoaded,
    Chunk,
    ContextLengthExceeded,
    ExpertError,
    ExpertUnavailable,
    GenerateRequest,
    InvalidRequest,
    QueueFull,
    SamplingParams,
    Unsupported,
)
from signalbox.experts.catalog import SimulatedExpert, TransformersExpert, VllmExpert
from signalbox.experts.engines import build_engine
from signalbox.experts.vllm_arguments import installed
from tests.adapters.folders import lora_tensors, make_lora, write_lora
from tests.adapters.test_layers import make as make_kind
from tests.adapters.test_layers import merged
from tests.tiny_models import save_tiny

PROMPTS = [
    "the fox",
    "one two three",
    "a signal box sets the points and each train runs on the line that was set for it",
    "Ünïcödé ☃ and 数字",
    "x",
    "seven six five four three two one and then the fox came to the signal box again and again and again",
]


VLLM = pytest.mark.skipif(not installed(), reason="vLLM is not installed here: make test-vllm")


ENGINES = ["transformers-llama", "transformers-gemma3", pytest.param("vllm-llama", marks=VLLM)]
# For tests that need no model: what only the engine's side towards its clients does.
ALSO_SIMULATED = pytest.mark.parametrize("folder", [*ENGINES, "simulated-none"], indirect=True, scope="module")


@pytest.fixture(scope="module", params=ENGINES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    engine, _, family = request.param.partition("-")
    if engine == "simulated":
        return tmp_path_factory.mktemp(engine)
    # The folder's name says which engine is to run the model.
    return save_tiny(tmp_path_factory.mktemp(engine), family, head_dim=32 if engine == "vllm" else 8)


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def plain_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For what only the transformers engine has."""
    return save_tiny(tmp_path_factory.mktemp("transformers"), request.param)


def of_vllm(folder: Path) -> bool:
    return folder.name.startswith("vllm")


def make(name: str, folder: Path, **changes: object) -> Any:
    """An engine for the model in a folder, not started."""
    if folder.name.startswith("simulated"):
        speed = {"prefill_tokens_per_s": 100_000.0, "step_ms": 8.0, "step_ms_per_request": 0.2}
        stated = {"engine": "simulated", "max_running": 4, "context_length": 512, "bytes_per_token": 2.0} | speed
        return build_engine(name, SimulatedExpert.model_validate(stated | changes))
    settings: dict[str, object] = {"model": str(folder), "dtype": "float32", "max_running": 4}
    if of_vllm(folder):
        settings |= {"engine": "vllm", "gpus": 0, "enforce_eager": True}
        return build_engine(name, VllmExpert.model_validate(settings | changes))
    settings |= {"engine": "transformers", "threads": 1}
    return build_engine(name, TransformersExpert.model_validate(settings | changes))


@pytest.fixture(scope="module")
async def engine(folder: Path) -> AsyncIterator[Any]:
    engine = make("tiny", folder)
    await engine.start()
    yield engine
    await engine.close()


@pytest.fixture(scope="module")
async def plain_engine(plain_folder: Path) -> AsyncIterator[Any]:
    engine = make("tiny", plain_folder)
    await engine.start()
    yield engine
    await engine.close()


def ask(prompt: str = "the fox", request_id: str = "r", **sampling: object) -> GenerateRequest:
    settings: dict[str, object] = {"temperature": 0.0, "max_tokens": 12} | sampling
    return GenerateRequest(request_id, prompt=prompt, sampling=SamplingParams(**settings))  # type: ignore[arg-type]


async def collect(engine: Any, request: GenerateRequest) -> list[Chunk]:
    return [chunk async for chunk in engine.generate(request)]


async def text_of(engine: Any, request: GenerateRequest) -> str:
    return "".join(chunk.text for chunk in await collect(engine, request))


def tokens_of(chunks: list[Chunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]


async def idle(engine: Any) -> None:
    for _ in range(200):
        state = engine.state()
        if not state.running and not state.waiting:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"still busy: {engine.state()}")


def reference_tokens(folder: Path, prompt: str, count: int) -> list[int]:
    """Greedy tokens of transformers' own `generate` for one prompt alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    out = model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    return out[0, ids.shape[1] :].tolist()


async def test_batched_greedy_tokens_are_those_of_transformers_alone(folder: Path, engine: Any) -> None:
    """Six requests over four rows, joining and leaving at different times, past the sliding window of 16."""
    requests = [ask(p, f"r{i}", max_tokens=20 + 5 * i, ignore_eos=True) for i, p in enumerate(PROMPTS)]

    async def later(i: int) -> list[Chunk]:
        await asyncio.sleep(0.005 * i)
        return await collect(engine, requests[i])

    answers = await asyncio.gather(*(later(i) for i in range(len(requests))))
    for i, chunks in enumerate(answers):
        assert tokens_of(chunks) == reference_tokens(folder, PROMPTS[i], 20 + 5 * i), PROMPTS[i]
    await idle(engine)


async def test_a_long_prompt_is_read_in_pieces_with_the_same_result(folder: Path) -> None:
    prompt = " ".join(PROMPTS[2:6]) * 2
    pieces: dict[str, object] = {"prefill_tokens": 16}
    if of_vllm(folder):
        pieces = {"engine_args": {"max_num_batched_tokens": 16}}
    engine = make("pieces", folder, **pieces)
    await engine.start()
    try:
        answers = await asyncio.gather(
            *(collect(engine, ask(p, max_tokens=15, ignore_eos=True)) for p in (prompt, PROMPTS[0], PROMPTS[3]))
        )
        for p, chunks in zip((prompt, PROMPTS[0], PROMPTS[3]), answers, strict=True):
            assert tokens_of(chunks) == reference_tokens(folder, p, 15)
    finally:
        await engine.close()


@ALSO_SIMULATED
async def test_streams_tokens_as_they_come_and_ends_with_usage(folder: Path, engine: Any) -> None:
    chunks = await collect(engine, ask(max_tokens=9, ignore_eos=True))
    assert len(tokens_of(chunks)) == 9 and len(chunks) > 2 and all(c.token_ids for c in chunks)
    if not of_vllm(folder):  # vLLM may hand over several tokens at once
        assert all(len(c.token_ids) == 1 for c in chunks)
    assert [c.finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    usage = chunks[-1].usage
    assert usage is not None and usage.completion_tokens == 9 and usage.prompt_tokens > 0
    assert all(c.usage is None for c in chunks[:-1])


async def test_messages_go_through_the_chat_template(folder: Path, engine: Any) -> None:
    messages = [{"role": "user", "content": "the fox"}]
    chat = GenerateRequest("c", messages=messages, sampling=SamplingParams(temperature=0, max_tokens=8))
    plain = ask("<|im_start|>user\nthe fox<|im_end|>\n<|im_start|>assistant\n", max_tokens=8)
    assert tokens_of(await collect(engine, chat)) == tokens_of(await collect(engine, plain))


async def test_a_template_that_ends_in_a_word_costs_the_answer_no_space(folder: Path) -> None:
    """After `Answer:` a model writes ` 42`; the client gets `42`, and scoring takes the space for granted."""
    template = "{% for m in messages %}Question: {{ m.content }}\n{% endfor %}Answer:"
    engine = make("words", folder, chat_template=template)
    await engine.start()
    try:
        messages = [{"role": "user", "content": "the fox"}]
        chat = GenerateRequest("c", messages=messages, sampling=SamplingParams(temperature=0, max_tokens=8))
        raw = ask("Question: the fox\nAnswer:", max_tokens=8)
        assert await text_of(engine, chat) == (await text_of(engine, raw)).removeprefix(" ")
        scored = await engine.score(chat, "one")
        assert scored.nll_bits == pytest.approx((await engine.score(raw, " one")).nll_bits, rel=1e-5)
        assert scored.reference_bytes == 3
    finally:
        await engine.close()


async def test_seed_fixes_a_sample_whatever_runs_beside_it(engine: Any) -> None:
    def sampled(seed: int) -> GenerateRequest:
        return ask("one two", temperature=1.0, top_p=0.95, seed=seed, max_tokens=16, ignore_eos=True)

    alone = tokens_of(await collect(engine, sampled(7)))
    beside = await asyncio.gather(*(collect(engine, sampled(s)) for s in (7, 8, 9)))
    assert tokens_of(beside[0]) == alone
    assert len({tuple(tokens_of(chunks)) for chunks in beside}) == 3


@ALSO_SIMULATED
async def test_a_stop_string_ends_the_text_before_it(engine: Any) -> None:
    whole = await text_of(engine, ask(max_tokens=30, ignore_eos=True))
    stop = whole[10:13]
    at = whole.find(stop)
    chunks = await collect(engine, ask(max_tokens=30, ignore_eos=True, stop=(stop, "never there")))
    assert "".join(c.text for c in chunks) == whole[:at]
    assert chunks[-1].finish_reason == "stop"


async def test_logprobs_are_those_of_the_model(folder: Path, engine: Any) -> None:
    chunks = await collect(engine, ask("one two", max_tokens=4, ignore_eos=True, logprobs=3))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer("one two")["input_ids"]
    logprobs = [logprob for chunk in chunks for logprob in chunk.logprobs]
    for token, logprob in zip(tokens_of(chunks), logprobs, strict=True):
        with torch.inference_mode():
            expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert logprob.logprob == pytest.approx(float(expected.max()), abs=1e-4)
        assert [t[1] for t in logprob.top] == pytest.approx(expected.topk(3).values.tolist(), abs=1e-4)
        assert logprob.token == tokenizer.decode([token]) and logprob.raw == logprob.token.encode()
        ids.append(token)


async def test_score_is_the_likelihood_of_the_reference(folder: Path, engine: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    references = ["and the fox", "three", "☃"]
    scores = await asyncio.gather(*(engine.score(ask("one two"), r) for r in references))
    for reference, score in zip(references, scores, strict=True):
        prompt, answer = tokenizer("one two")["input_ids"], tokenizer(reference)["input_ids"]
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        nats = torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum")
        assert score.nll_bits == pytest.approx(float(nats) / 0.693147, rel=1e-4)
        assert score.reference_bytes == len(reference.encode())
        assert score.bits_per_byte == pytest.approx(score.nll_bits / len(reference.encode()))


@ALSO_SIMULATED
async def test_closing_the_stream_frees_the_row_at_once(engine: Any) -> None:
    streams = [engine.generate(ask(max_tokens=400, ignore_eos=True)) for _ in range(4)]
    for stream in streams:
        await anext(stream)
    assert engine.state().running == 4
    await streams[1].aclose()
    for _ in range(100):
        if engine.state().running == 3:
            break
        await asyncio.sleep(0.005)
    assert engine.state().running == 3
    assert len(tokens_of(await collect(engine, ask(max_tokens=5, ignore_eos=True)))) == 5
    for stream in streams:
        await stream.aclose()
    await idle(engine)


@ALSO_SIMULATED
async def test_a_cancelled_task_frees_its_row(engine: Any) -> None:
    task = asyncio.create_task(collect(engine, ask(max_tokens=400, ignore_eos=True)))
    while not engine.state().running:
        assert not task.done()
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await idle(engine)


@ALSO_SIMULATED
async def test_queue_is_bounded(folder: Path) -> None:
    engine = make("narrow", folder, max_running=1, max_waiting=2)
    await engine.start()
    try:
        tasks = [asyncio.create_task(collect(engine, ask(max_tokens=100, ignore_eos=True))) for _ in range(3)]
        while engine.state().running + engine.state().waiting < 3:
            await asyncio.sleep(0)
        with pytest.raises(QueueFull, match="full"):
            await collect(engine, ask())
        assert all(len(tokens_of(chunks)) == 100 for chunks in await asyncio.gather(*tasks))
        assert await collect(engine, ask())
    finally:
        await engine.close()


async def test_memory_budget_bounds_the_cache_of_transformers(plain_folder: Path) -> None:
    engine = make("small", plain_folder, kv_cache_mib=1, max_running=64)
    await engine.start()
    try:
        cache = engine.runner.cache
        answers = await asyncio.gather(
            *(collect(engine, ask(f"{i} two", max_tokens=180, ignore_eos=True)) for i in range(20))
        )
        assert all(len(chunks) == 180 for chunks in answers)
        assert 0 < cache.nbytes <= 2**20
    finally:
        await engine.close()


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (ask("x " * 600), ContextLengthExceeded, "shorten the prompt"),
        (ask("x", max_tokens=100_000), ContextLengthExceeded, "lower max_tokens"),
        (ask(""), InvalidRequest, "prompt is empty"),
        (GenerateRequest("i", prompt_token_ids=[1, 99_999]), InvalidRequest, "token 99999"),
        (ask(logit_bias={5000: 1.0}), InvalidRequest, "token 5000"),
        (GenerateRequest("a", prompt="x", adapter="none"), Unsupported, "no adapter 'none'"),
        (GenerateRequest("t", prompt="x", extra={"tools": []}), Unsupported, "tools"),
    ],
)
async def test_bad_requests_are_refused_with_a_reason(
    engine: Any, request_: GenerateRequest, error: type[ExpertError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        await collect(engine, request_)
    assert 400 <= caught.value.status < 500
    assert await text_of(engine, ask()) == await text_of(engine, ask())


async def test_a_fault_in_transformers_costs_one_request(plain_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An injected fault: the model fails whenever a certain token is in the batch."""
    engine = plain_engine
    prompts = ["the fox", "one two three", "POISON ☃", "a signal box"]
    requests = [ask(p, max_tokens=10, ignore_eos=True) for p in prompts]
    expected = [tokens_of(await collect(engine, r)) for r in requests]
    poison = engine.runner.encode("☃")[-1]
    real = engine.runner.forward

    def forward(batch, keep):  # type: ignore[no-untyped-def]
        if bool((batch.token_ids == poison).any()):
            raise RuntimeError("injected")
        return real(batch, keep)

    monkeypatch.setattr(engine.runner, "forward", forward)
    answers = await asyncio.gather(*(collect(engine, r) for r in requests), return_exceptions=True)
    assert isinstance(answers[2], ExpertError) and "injected" in answers[2].message
    for i in (0, 1, 3):
        chunks = answers[i]
        assert not isinstance(chunks, BaseException), chunks
        assert tokens_of(chunks) == expected[i]
    await idle(engine)


@ALSO_SIMULATED
async def test_closed_engine_says_so(folder: Path) -> None:
    engine = make("gone", folder)
    with pytest.raises(ExpertUnavailable, match="not running"):
        await collect(engine, ask())
    await engine.start()
    stream = engine.generate(ask(max_tokens=400, ignore_eos=True))
    await anext(stream)
    await engine.close()
    with pytest.raises(ExpertUnavailable, match="shut down"):
        async for _ in stream:
            pass


async def test_a_model_that_cannot_load_is_a_readable_error(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / folder.name
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    with pytest.raises(ExpertUnavailable, match="safetensors"):
        await make("broken", broken).start()


# -- adapters ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
async def adapted(folder: Path) -> AsyncIterator[Any]:
    """An engine with two slots, both free at a test's begin and end."""
    engine = make("adapted", folder, max_adapters=2, max_adapter_rank=8)
    await engine.start()
    yield engine
    await engine.close()


def of_adapter(adapter: str | None, prompt: str = "the fox", tokens: int = 16) -> GenerateRequest:
    request = ask(prompt, max_tokens=tokens, ignore_eos=True)
    request.adapter = adapter
    return request


async def test_adapters_and_base_answer_in_one_batch_as_merged_models(
    folder: Path, adapted: Any, tmp_path: Path
) -> None:
    """Two adapters of different rank and targets beside the base, against weights merged in plain transformers."""
    models = {"base": AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)}
    for kind in ("few", "all"):
        path = make_kind(tmp_path / kind, folder, kind, scale=0.3)
        models[kind] = merged(folder, path, kind)
        await adapted.load(f"{kind}@1", str(path))
    assert sorted(adapted.adapters()) == ["all@1", "few@1"]
    cases = [(kind, prompt) for prompt in PROMPTS[:3] for kind in models]
    answers = await asyncio.gather(
        *(collect(adapted, of_adapter(None if kind == "base" else f"{kind}@1", prompt)) for kind, prompt in cases)
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for (kind, prompt), chunks in zip(cases, answers, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        out = models[kind].generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert tokens_of(chunks) == out[0, ids.shape[1] :].tolist(), (kind, prompt)
    assert len({tuple(tokens_of(chunks)) for chunks in answers[:3]}) == 3
    for kind in ("few", "all"):
        await adapted.unload(f"{kind}@1")
    assert list(adapted.adapters()) == []


async def test_unloading_waits_for_open_requests_and_takes_no_more(folder: Path, adapted: Any, tmp_path: Path) -> None:
    await adapted.load("a@1", str(make_kind(tmp_path / "a", folder, "all", scale=0.3)))
    alone = tokens_of(await collect(adapted, of_adapter("a@1", tokens=300)))
    stream = adapted.generate(of_adapter("a@1", tokens=300))
    chunks = [await anext(stream)]
    assert adapted.state().adapters == {"a@1": 1} and adapted.state().max_adapters == 2
    unloading = asyncio.create_task(adapted.unload("a@1"))
    await asyncio.sleep(0.01)
    assert not unloading.done() and "a@1" not in adapted.adapters()
    with pytest.raises(AdapterNotLoaded):
        await collect(adapted, of_adapter("a@1"))
    chunks += [chunk async for chunk in stream]
    assert tokens_of(chunks) == alone
    await asyncio.wait_for(unloading, 10)
    assert adapted.state().adapters == {}
    await adapted.unload("a@1")  # nothing to do
    with pytest.raises(AdapterNotLoaded) as caught:
        await collect(adapted, of_adapter("a@1"))
    assert caught.value.status == 503


async def test_a_new_version_is_loaded_beside_the_old(folder: Path, adapted: Any, tmp_path: Path) -> None:
    paths = [str(make_kind(tmp_path / kind, folder, kind, scale=0.3)) for kind in ("all", "few")]
    await adapted.load("a@1", paths[0])
    old = tokens_of(await collect(adapted, of_adapter("a@1")))
    running = asyncio.create_task(collect(adapted, of_adapter("a@1", tokens=100)))
    await adapted.load("a@2", paths[1])
    new = tokens_of(await collect(adapted, of_adapter("a@2")))
    assert new != old and tokens_of(await running)[:16] == old
    await adapted.unload("a@1")
    assert tokens_of(await collect(adapted, of_adapter("a@2"))) == new
    await adapted.load("a@3", paths[0])  # into the slot that the first one had
    assert tokens_of(await collect(adapted, of_adapter("a@3"))) == old
    for version in ("a@2", "a@3"):
        await adapted.unload(version)


async def test_slots_are_bounded_and_names_are_used_once(folder: Path, adapted: Any, tmp_path: Path) -> None:
    path = str(make_lora(tmp_path / "a", folder))
    for name in ("a@1", "a@2"):
        await adapted.load(name, path)
    with pytest.raises(QueueFull) as full:
        await adapted.load("a@3", path)
    assert full.value.status == 429
    with pytest.raises(InvalidRequest):
        await adapted.load("a@2", path)
    assert sorted(adapted.adapters()) == ["a@1", "a@2"]
    for name in ("a@1", "a@2"):
        await adapted.unload(name)
    await adapted.load("a@3", path)
    await adapted.unload("a@3")


async def test_a_broken_adapter_is_refused_by_its_tensor(folder: Path, adapted: Any, tmp_path: Path) -> None:
    tensors = lora_tensors(folder)
    key = next(key for key in tensors if "layers.1." in key and "lora_B" in key)
    tensors[key][3, 2] = float("nan")
    for i in range(3):  # more often than there are slots
        with pytest.raises(InvalidRequest) as caught:
            await adapted.load(f"bad@{i}", str(write_lora(tmp_path / "bad", tensors)))
        assert caught.value.status == 422 and caught.value.param == key and not caught.value.retryable
    with pytest.raises(InvalidRequest) as caught:
        await adapted.load("high@1", str(make_lora(tmp_path / "high", folder, rank=9)))
    assert caught.value.status == 422
    with pytest.raises(InvalidRequest) as caught:
        await adapted.load("absent@1", str(tmp_path / "absent"))
    assert caught.value.status == 422
    assert list(adapted.adapters()) == []
    await adapted.load("good@1", str(make_lora(tmp_path / "good", folder)))
    await adapted.unload("good@1")


async def test_an_engine_without_slots_takes_no_adapters(folder: Path, engine: Any, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="max_adapters"):
        await engine.load("a@1", str(make_lora(tmp_path / "a", folder)))
    await engine.unload("a@1")
    assert list(engine.adapters()) == [] and engine.state().max_adapters == 0
