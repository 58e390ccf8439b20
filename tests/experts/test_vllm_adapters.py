"""Adapters on vLLM: the tokens of the transformers engine, and slots that leave no trace (`make test-vllm`).

What every local engine must do with adapters is in test_engine_contract.
"""

from __future__ import annotations

import asyncio
import glob
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from signalbox.adapters.base import Limits
from signalbox.adapters.base_shape import base_shape
from signalbox.adapters.peft_format import read_lora
from signalbox.experts.base import (
    AdapterNotLoaded,
    ExpertUnavailable,
    GenerateRequest,
    InvalidRequest,
    QueueFull,
    SamplingParams,
    Unsupported,
)
from signalbox.experts.catalog import TransformersExpert, VllmExpert
from signalbox.experts.child_processes import kill
from signalbox.experts.engines import build_engine
from signalbox.experts.vllm_adapters import write_plain
from signalbox.experts.vllm_arguments import argument_problems, installed
from signalbox.experts.vllm_versions import lora_arguments
from tests.adapters.folders import ATTENTION, lora_config, lora_tensors, write_lora
from tests.tiny_models import save_tiny

VLLM = pytest.mark.skipif(not installed(), reason="vLLM is not installed here: make test-vllm")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
PROMPTS = ["the fox", "one two three", "a signal box sets the points", "seven six five four three two one"]
SLOTS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), head_dim=32)


@pytest.fixture(scope="module")
def kinds(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters that differ in rank, targets and scaling; `patterns` gives modules ranks and alphas of their own."""
    root = tmp_path_factory.mktemp("adapters")
    few = lora_tensors(folder, targets=("q_proj", "v_proj"), rank=4, seed=1, scale=0.3)
    every = lora_tensors(folder, targets=ALL, rank=8, seed=2, scale=0.2)
    mixed = lora_tensors(folder, targets=("q_proj", "o_proj"), rank=4, seed=3, scale=0.3)
    mixed |= lora_tensors(folder, targets=("up_proj",), rank=2, seed=4, scale=0.6)
    output = lora_tensors(folder, targets=("lm_head", "down_proj"), rank=3, seed=5, scale=0.3)
    patterns = {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"o_proj": 20}}
    return {
        "few": write_lora(root / "few", few, lora_config(r=4)),
        "rs": write_lora(root / "rs", every, lora_config(r=8, target_modules=list(ALL), use_rslora=True)),
        "output": write_lora(root / "output", output, lora_config(r=3, target_modules=["lm_head", "down_proj"])),
        "patterns": write_lora(
            root / "patterns", mixed, lora_config(r=4, target_modules=["q_proj", "o_proj", "up_proj"], **patterns)
        ),
    }


def make(folder: Path, engine: str = "vllm", **changes: object) -> Any:
    settings: dict[str, object] = {"engine": engine, "model": str(folder), "dtype": "float32", "max_running": 16}
    settings |= {"max_adapters": SLOTS, "max_adapter_rank": 8} | changes
    if engine == "transformers":
        return build_engine("tiny", TransformersExpert.model_validate(settings | {"threads": 1}))
    return build_engine("tiny", VllmExpert.model_validate(settings | {"gpus": 0, "enforce_eager": True}))


@pytest.fixture(scope="module")
async def running(folder: Path) -> AsyncIterator[Any]:
    engine = make(folder)
    await engine.start()
    yield engine
    await engine.close()


@pytest.fixture
async def engine(running: Any) -> AsyncIterator[Any]:
    """The module's engine, given back without adapters and without a trace of one."""
    yield running
    for name in running.adapters():
        await running.unload(name)
    assert await running._core.loras() == set() and not running._adapters._bound
    assert not glob.glob(f"{tempfile.gettempdir()}/signalbox-lora-*")  # noqa: PTH207 - pathlib blocks, says ASYNC240


def ask(prompt: str, adapter: str | None = None, tokens: int = 12) -> GenerateRequest:
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    return GenerateRequest("r", prompt=prompt, adapter=adapter, sampling=sampling)


async def tokens_of(engine: Any, request: GenerateRequest) -> list[int]:
    return [token async for chunk in engine.generate(request) for token in chunk.token_ids]


def version(kind: str) -> str | None:
    return None if kind == "base" else f"{kind}@1"


@VLLM
async def test_a_mixed_batch_has_the_tokens_of_the_transformers_engine(
    engine: Any, folder: Path, kinds: dict[str, Path]
) -> None:
    other = make(folder, "transformers")
    await other.start()
    try:
        for kind, path in kinds.items():
            await engine.load(f"{kind}@1", str(path))
            await other.load(f"{kind}@1", str(path))
        cases = [(prompt, version(kind)) for prompt in PROMPTS for kind in ("base", *kinds)]
        found = await asyncio.gather(*(tokens_of(engine, ask(*case)) for case in cases))
        wanted = await asyncio.gather(*(tokens_of(other, ask(*case)) for case in cases))
        for case, one, two in zip(cases, found, wanted, strict=True):
            assert one == two, case
        assert len({tuple(answer) for answer in found[:5]}) == 5  # or the test would prove nothing
        for kind in ("base", *kinds):
            request = ask("the fox", version(kind))
            one, two = await engine.score(request, "signal box"), await other.score(request, "signal box")
            assert one.nll_bits == pytest.approx(two.nll_bits, rel=1e-3), kind
    finally:
        await other.close()


def test_the_plain_form_is_the_same_adapter(folder: Path, kinds: dict[str, Path], tmp_path: Path) -> None:
    """Whatever the ranks and scalings, B A times scaling is the same for each module: without vLLM."""
    shape = base_shape(folder)
    for kind, path in kinds.items():
        adapter = read_lora(path, shape, Limits((path,)))
        (tmp_path / kind).mkdir()
        write_plain(adapter, tmp_path / kind)
        again = read_lora(tmp_path / kind, shape, Limits((tmp_path,)))
        assert again.modules.keys() == adapter.modules.keys()
        for name, module in again.modules.items():
            assert module.scaling == 1 and module.rank == adapter.facts.rank
            old = adapter.modules[name]
            torch.testing.assert_close(module.b @ module.a, old.scaling * old.b.float() @ old.a.float())
        assert all(t.dtype == torch.float32 for t in load_file(tmp_path / kind / "adapter_model.safetensors").values())


@VLLM
async def test_what_our_validation_refuses_never_reaches_vllm(engine: Any, folder: Path, tmp_path: Path) -> None:
    tensors = lora_tensors(folder)
    name = next(key for key in tensors if "q_proj.lora_A" in key)
    tensors[name][0, 0] = float("nan")
    path = write_lora(tmp_path / "broken", tensors)
    with pytest.raises(InvalidRequest) as caught:
        await engine.load("broken@1", str(path))
    assert caught.value.status == 422 and caught.value.param == name
    high = write_lora(tmp_path / "high", lora_tensors(folder, rank=16), lora_config(r=16))
    with pytest.raises(InvalidRequest, match="16"):
        await engine.load("high@1", str(high))
    assert engine.adapters() == [] and engine.state().adapters == {}


@VLLM
async def test_what_vllm_refuses_leaves_no_trace(engine: Any, folder: Path, tmp_path: Path) -> None:
    """An injected fault: our limit is raised above what vLLM was started with, so that only vLLM can refuse."""
    path = write_lora(tmp_path / "high", lora_tensors(folder, rank=16), lora_config(r=16))
    engine._adapters.max_rank = 64
    try:
        with pytest.raises(InvalidRequest, match="vLLM cannot serve adapter 'high@1'") as caught:
            await engine.load("high@1", str(path))
        assert caught.value.status == 422 and caught.value.code == "engine_refuses"
    finally:
        engine._adapters.max_rank = 8
    assert engine.adapters() == [] and len(await tokens_of(engine, ask("the fox"))) == 12


@VLLM
async def test_slots_run_out_and_come_back(engine: Any, kinds: dict[str, Path]) -> None:
    for i in range(SLOTS):
        await engine.load(f"few@{i}", str(kinds["few"]))
    assert engine.state().max_adapters == SLOTS and len(engine.adapters()) == SLOTS
    with pytest.raises(QueueFull, match="max_adapters"):
        await engine.load("rs@1", str(kinds["rs"]))
    with pytest.raises(InvalidRequest, match="loaded already"):
        await engine.load("few@0", str(kinds["few"]))
    await engine.unload("few@2")
    await engine.unload("few@2")  # again: nothing happens
    with pytest.raises(AdapterNotLoaded):
        await tokens_of(engine, ask("x", "few@2"))
    await engine.load("rs@1", str(kinds["rs"]))
    # With every slot held, and with slots held once, the base beside them is still the base.
    mixed = [ask("the fox"), *(ask("one two three", name) for name in engine.adapters())]
    alone = await tokens_of(engine, mixed[0])
    assert (await asyncio.gather(*(tokens_of(engine, request) for request in mixed)))[0] == alone
    same = {tuple(await tokens_of(engine, ask("the fox", f"few@{i}"))) for i in (0, 1, 3)}
    assert len(same) == 1 and tuple(await tokens_of(engine, ask("the fox", "rs@1"))) not in same


@VLLM
async def test_unload_waits_for_what_runs_and_takes_no_more(engine: Any, kinds: dict[str, Path]) -> None:
    await engine.load("few@1", str(kinds["few"]))
    wanted = await tokens_of(engine, ask("the fox", "few@1", 200))
    started = asyncio.Event()

    async def read() -> list[int]:
        found = []
        async for chunk in engine.generate(ask("the fox", "few@1", 200)):
            found += chunk.token_ids
            started.set()
        return found

    reading = asyncio.create_task(read())
    await started.wait()
    assert engine.state().adapters == {"few@1": 1}
    leaving = asyncio.create_task(engine.unload("few@1"))
    await asyncio.sleep(0.01)
    assert not leaving.done() and not reading.done()
    with pytest.raises(AdapterNotLoaded):
        await tokens_of(engine, ask("x", "few@1"))
    with pytest.raises(InvalidRequest):  # its name is taken until it has gone
        await engine.load("few@1", str(kinds["few"]))
    await leaving
    assert reading.done() and await reading == wanted
    assert await engine._core.loras() == set()


@VLLM
async def test_an_abandoned_stream_frees_its_adapter(engine: Any, kinds: dict[str, Path]) -> None:
    await engine.load("few@1", str(kinds["few"]))
    stream = engine.generate(ask("the fox", "few@1", 400))
    await anext(stream)
    await stream.aclose()
    async with asyncio.timeout(10):
        await engine.unload("few@1")


@VLLM
async def test_a_load_that_nobody_waits_for_is_undone(engine: Any, kinds: dict[str, Path]) -> None:
    loading = asyncio.create_task(engine.load("rs@1", str(kinds["rs"])))
    await asyncio.sleep(0.005)
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    assert engine.adapters() == []
    async with asyncio.timeout(10):
        await engine.unload("rs@1")
    await engine.load("rs@1", str(kinds["rs"]))
    assert engine.adapters() == ["rs@1"]


@VLLM
async def test_versions_come_and_go_under_traffic(engine: Any, kinds: dict[str, Path]) -> None:
    """Each answer is that of the version it names, whatever is loaded and unloaded beside it."""
    wanted = {"base": await tokens_of(engine, ask("the fox"))}
    for kind, path in kinds.items():
        await engine.load(f"{kind}@0", str(path))
        wanted[kind] = await tokens_of(engine, ask("the fox", f"{kind}@0"))
        await engine.unload(f"{kind}@0")
    await engine.load("rs@1", str(kinds["rs"]))
    stop = False

    async def traffic(kind: str) -> int:
        count = 0
        while not stop:
            assert await tokens_of(engine, ask("the fox", version(kind))) == wanted[kind]
            count += 1
        return count

    asking = [asyncio.create_task(traffic(kind)) for kind in ("base", "rs")]
    for i in range(20):
        kind = ("few", "patterns")[i % 2]
        name = f"{kind}@{i + 10}"
        await engine.load(name, str(kinds[kind]))
        assert await tokens_of(engine, ask("the fox", name)) == wanted[kind]
        await engine.unload(name)
    stop = True
    assert min(await asyncio.gather(*asking)) > 0
    assert await engine._core.loras() == {engine._adapters._bound["rs@1"].lora.lora_int_id}


@VLLM
async def test_a_core_that_dies_ends_a_load(folder: Path, kinds: dict[str, Path]) -> None:
    engine = make(folder)
    await engine.start()
    try:
        await engine.load("few@1", str(kinds["few"]))
        await asyncio.to_thread(kill, engine._processes)
        async with asyncio.timeout(20):
            with pytest.raises(ExpertUnavailable):
                await engine.load("rs@1", str(kinds["rs"]))
            await engine.unload("few@1")
        assert engine.adapters() == [] and not engine.state().healthy
    finally:
        await engine.close()


def test_arguments_of_adapters() -> None:
    assert lora_arguments(0, 16, on_cpu=True) == {}
    of_gpu = {"enable_lora": True, "max_loras": 3, "max_cpu_loras": 3, "max_lora_rank": 16}
    assert lora_arguments(3, 9, on_cpu=False) == of_gpu
    assert lora_arguments(3, 9, on_cpu=True) == of_gpu | {"max_loras": 4, "max_cpu_loras": 4}
    assert lora_arguments(1, 512, on_cpu=False)["max_lora_rank"] == 512
    problems = dict(argument_problems({"max_loras": 4, "max_lora_rank": 8, "lora_target_modules": ["q_proj"]}))
    assert "'max_adapters'" in problems["max_loras"] and "'max_adapter_rank'" in problems["max_lora_rank"]
    assert "lora_target_modules" in problems


async def test_an_engine_without_slots_takes_no_adapter(folder: Path, kinds: dict[str, Path]) -> None:
    engine = make(folder, max_adapters=0)
    with pytest.raises(ExpertUnavailable):  # not started
        await engine.load("few@1", str(kinds["few"]))
    engine._adapters.serve(object(), None)
    with pytest.raises(Unsupported, match="max_adapters"):
        await engine._adapters.add("few@1", str(kinds["few"]))
