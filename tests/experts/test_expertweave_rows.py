"""ESFT adapters on vLLM: they come and go under requests, rows and slots run out, what cannot be is refused."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig

from signalbox.experts.base import (
    AdapterNotLoaded,
    ExpertUnavailable,
    InvalidRequest,
    QueueFull,
)
from signalbox.experts.vllm_arguments import installed
from tests.adapters.folders import make_lora
from tests.experts.woven_engines import (
    ADAPTERS,
    PROMPTS,
    Woven,
    agree,
    alone,
    answer,
    ask,
    make_woven,
    started,
    weave,
)
from tests.moe_models import (
    EXPERTS,
    merge,
    save_esft_adapter,
    save_tiny_moe,
)
from tests.tiny_models import save_tiny, tiny_tokenizer

pytestmark = [
    pytest.mark.skipif(not installed(), reason="vLLM is not installed here: make test-vllm"),
    pytest.mark.timeout(300),
]


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
