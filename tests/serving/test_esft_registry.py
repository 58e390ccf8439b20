"""ESFT adapters by the registry, with vLLM, real files and a real Valkey, in Serve's local testing mode."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from signalbox.adapters.base import AdapterError
from signalbox.experts.vllm_arguments import installed
from signalbox.serving.config import Config
from signalbox.serving.embedded_valkey import EmbeddedValkey
from signalbox.serving.expert_deployment import deploy
from tests.adapters.folders import make_lora
from tests.moe_models import EXPERTS, save_esft_adapter, save_esft_adapters, save_tiny_moe
from tests.serving.test_adapter_registry import Bed, bed_of

pytestmark = [
    pytest.mark.skipif(not installed(), reason="vLLM is not installed here: make test-vllm"),
    pytest.mark.timeout(300),
]
SLOTS, ROWS = 4, 12  # slots, and tuned experts of an adapter in a layer: three adapters of all 16 experts fill a layer


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_moe(tmp_path_factory.mktemp("moe") / "tiny", "olmoe")


@pytest.fixture(scope="module")
def adapters(base: Path, root: Path) -> list[Path]:
    return save_esft_adapters(root, base, 4)


@pytest.fixture(scope="module")
def config(base: Path, root: Path) -> Config:
    expert = {"engine": "vllm", "model": str(base), "gpus": 0, "dtype": "float32", "enforce_eager": True}
    expert |= {"max_running": 16, "max_adapters": SLOTS, "adapter_kinds": ["esft"]}
    expert |= {"esft": {"experts_per_layer": ROWS}}
    return Config.model_validate({"experts": {"tiny": expert}, "adapter_files": {"roots": [str(root)]}})


@pytest.fixture(scope="module")
def store_url() -> Iterator[str]:
    with EmbeddedValkey() as url:
        yield url


@pytest.fixture(scope="module")
def expert(config: Config, store_url: str) -> Iterator[Any]:
    from ray import serve

    handle = serve.run(deploy("tiny", config.experts["tiny"], store_url), name="moe", _local_testing_mode=True)
    deadline = time.monotonic() + 120
    while not (state := handle.state.remote().result()).ready:
        assert time.monotonic() < deadline, state.reason
        time.sleep(0.1)
    yield handle
    handle.close.remote().result()


@pytest.fixture
async def bed(
    config: Config, store_url: str, expert: Any, root: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Bed]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "cache"))
    async with bed_of(config, store_url, expert, root, {"tiny": base}) as made:
        yield made


async def add(bed: Bed, name: str, path: Path, **options: Any) -> dict[str, Any]:
    return await bed.table.add(name=name, base="tiny", path=str(path), **options)


async def test_from_a_folder_to_answers_and_away_again(bed: Bed, adapters: list[Path]) -> None:
    record = await add(bed, "law", adapters[0])
    assert record["phase"] == "staged" and record["kind"] == "esft" and record["rank"] == 0
    assert record["bytes"] == 3 * 3 * 3 * 64 * 32 * 4  # three experts in three layers, three linears each
    ready = await bed.ready("law")
    assert ready["id"] == "tiny:law" and [r["phase"] for r in ready["replicas"].values()] == ["ready"]
    adapter = await bed.table.current("law")
    assert adapter is not None and adapter.kind == "esft" and adapter.nbytes == record["bytes"]
    assert await bed.says("law") != await bed.says(None)
    await bed.table.remove("law")
    assert (await bed.table.wait("law", timeout_s=10))["phase"] == "gone"
    assert await bed.held() == {}


async def test_an_update_is_loaded_beside_the_version_that_answers(bed: Bed, adapters: list[Path]) -> None:
    await add(bed, "law", adapters[0])
    await bed.ready("law")
    old = await bed.says("law")
    async with bed.table.lease("law") as before:
        assert before is not None
        record = await add(bed, "law", adapters[1])
        await bed.ready("law", record["version"])
        async with bed.table.lease("law") as after:
            assert after is not None and after.number == before.number + 1
        assert set(await bed.held()) == {before.version, after.version}
        assert await bed.generate(before.version) == old  # it may be finished
    await bed.until_held(after.version)
    assert await bed.says("law") != old
    again = await add(bed, "law", adapters[1])  # the same content
    assert again["version"] == after.number and again["phase"] == "ready"


async def test_short_of_slots_the_least_recently_used_goes_and_comes_back(bed: Bed, adapters: list[Path]) -> None:
    await add(bed, "pinned", adapters[0], pinned=True)
    await bed.ready("pinned")
    for i in range(1, SLOTS):
        await add(bed, f"a{i}", adapters[i])
        await bed.ready(f"a{i}")
    said = await bed.says("a1")
    await asyncio.sleep(1.1)
    for name in ("a2", "a3"):
        await bed.says(name)
    await add(bed, "more", adapters[0])
    await bed.ready("more")
    (record,) = await bed.table.describe("a1")
    assert record["evicted"] and len(await bed.held()) == SLOTS
    await asyncio.sleep(1.1)
    assert (await bed.table.ensure("a1")).holders
    assert await bed.says("a1") == said
    (record,) = await bed.table.describe("pinned")
    assert record["phase"] == "ready" and not record["evicted"]


async def test_short_of_rows_too(bed: Bed, base: Path, root: Path) -> None:
    """A slot is free, but no layer has rows for a fourth adapter of all its experts."""
    every = {0: list(range(EXPERTS)), 1: [3]}
    large = [save_esft_adapter(root / f"large-{i}", base, every, seed=50 + i) for i in range(4)]
    for i in range(3):
        await add(bed, f"large-{i}", large[i])
        await bed.ready(f"large-{i}")
    said = await bed.says("large-0")
    await asyncio.sleep(1.1)
    for i in (1, 2):
        await bed.says(f"large-{i}")
    await add(bed, "large-3", large[3])
    await bed.ready("large-3")
    (record,) = await bed.table.describe("large-0")
    assert record["evicted"] and "room" in record["reason"], record
    await asyncio.sleep(1.1)
    await bed.table.ensure("large-0")
    assert await bed.says("large-0") == said
    for i in range(4):
        await bed.table.remove(f"large-{i}")
        await bed.table.wait(f"large-{i}", timeout_s=10)
    for i in range(3):
        await add(bed, f"large-{i}", large[i], pinned=True)
        await bed.ready(f"large-{i}")
    record = await add(bed, "large-3", large[3])
    record = await bed.table.wait("large-3", record["version"], timeout_s=20)
    assert record["phase"] == "failed" and record["code"] == "adapter_slots_full", record
    assert "esft" in record["reason"] and len(await bed.held()) == 3


async def test_what_the_expert_does_not_take_is_refused(bed: Bed, base: Path, adapters: list[Path]) -> None:
    with pytest.raises(AdapterError, match=r"takes esft.* needs lora in its adapter_kinds") as caught:
        await add(bed, "lora", make_lora(bed.root / "lora", base))
    assert caught.value.code == "unsupported_kind"
    (adapters[3] / "expert_cfg.json").rename(adapters[3] / "kept")
    try:
        with pytest.raises(AdapterError) as caught:
            await add(bed, "bare", adapters[3])
        assert caught.value.code == "missing_file"
    finally:
        (adapters[3] / "kept").rename(adapters[3] / "expert_cfg.json")
    assert await bed.table.describe() == [] and await bed.held() == {}
