"""The registry with real engines, real files and a real Valkey, in Serve's local testing mode (one replica a base).

What needs several replicas and processes that die is in tests/faults.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import AsyncIterator, Coroutine, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from signalbox.adapters.base import AdapterError
from signalbox.experts.base import AdapterNotLoaded, ExpertUnavailable, GenerateRequest, InvalidRequest, SamplingParams
from signalbox.serving import adapter_watch
from signalbox.serving.adapter_registry import AdapterRegistry, storage_folder
from signalbox.serving.adapter_table import AdapterTable
from signalbox.serving.config import Config
from signalbox.serving.embedded_valkey import EmbeddedValkey
from signalbox.serving.expert_deployment import ExpertClient, deploy
from signalbox.serving.store import Store
from tests.adapters.folders import lora_tensors, make_lora, write_lora
from tests.serving.conftest import make_config

SLOTS = 2


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def config(models: dict[str, Path], root: Path) -> Config:
    made = make_config(models, adapter_files={"roots": [str(root)], "watch": str(root / "watched")})
    tiny = made.experts["tiny"].model_copy(update={"max_adapters": SLOTS})
    (root / "watched").mkdir()
    return made.model_copy(update={"experts": {"tiny": tiny}})


@pytest.fixture(scope="module")
def store_url() -> Iterator[str]:
    with EmbeddedValkey() as url:
        yield url


@pytest.fixture(scope="module")
def expert(config: Config, store_url: str) -> Iterator[Any]:
    from ray import serve

    handle = serve.run(deploy("tiny", config.experts["tiny"], store_url), name="adapted", _local_testing_mode=True)
    deadline = time.monotonic() + 60
    while not (state := handle.state.remote().result()).ready:
        assert time.monotonic() < deadline, state.reason
        time.sleep(0.05)
    yield handle
    handle.close.remote().result()


class InProcess:
    """In the place of Serve's handle to the registry, which has no replicas to find here: calls the object itself."""

    def __init__(self, object: AdapterRegistry) -> None:
        self.object = object
        self.method = ""

    def options(self, *, method_name: str) -> InProcess:
        handle = InProcess(self.object)
        handle.method = method_name
        return handle

    def remote(self, *arguments: Any) -> Response:
        return Response(getattr(self.object, self.method)(*arguments))


class Response:
    """In the place of Serve's `DeploymentResponse`."""

    def __init__(self, work: Coroutine[Any, Any, Any]) -> None:
        self._task = asyncio.create_task(work)

    async def _fetch_future_result_async(self) -> None:
        pass

    def __await__(self) -> Generator[Any, None, Any]:
        return self._task.__await__()

    def cancel(self) -> None:
        self._task.cancel()


@dataclass
class Bed:
    table: AdapterTable
    expert: Any
    registry: InProcess
    root: Path
    model: Path

    def make(self, seed: int, **options: Any) -> str:
        return str(make_lora(self.root / f"a{seed}", self.model, seed=seed, scale=0.6, **options))

    async def add(self, name: str, seed: int, **options: Any) -> dict[str, Any]:
        return await self.table.add(name=name, base="tiny", path=self.make(seed), **options)

    async def ready(self, name: str, version: int | None = None) -> dict[str, Any]:
        record = await self.table.wait(name, version, timeout_s=20)
        assert record["phase"] == "ready", record
        return record

    async def says(self, name: str | None) -> str:
        """Eight greedy tokens of an adapter, or of the base."""
        async with contextlib.AsyncExitStack() as stack:
            version = None
            if name is not None:
                adapter = await stack.enter_async_context(self.table.lease(name))
                assert adapter is not None
                version = adapter.version
            return await self.generate(version)

    async def generate(self, version: str | None) -> str:
        sampling = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
        request = GenerateRequest(f"r{time.monotonic_ns()}", prompt="the fox", sampling=sampling, adapter=version)
        client = ExpertClient("tiny", self.expert)
        return "".join([chunk.text async for chunks in client.generate(request) for chunk in chunks])

    async def held(self) -> dict[str, str]:
        report = await self.expert.probe_adapters.remote()
        return {version: holding.state for version, holding in report.adapters.items()}

    async def until_held(self, *versions: str) -> None:
        deadline = time.monotonic() + 10
        while (held := await self.held()) != dict.fromkeys(versions, "ready"):
            assert time.monotonic() < deadline, held
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def bed_of(
    config: Config, store_url: str, expert: Any, root: Path, models: dict[str, Path]
) -> AsyncIterator[Bed]:
    registry = InProcess(AdapterRegistry(config, store_url, {"tiny": expert}))
    store = Store(store_url)
    table = AdapterTable(store, registry, {"tiny": expert})
    await table.start()
    try:
        yield Bed(table, expert, registry, root, models["tiny"])
    finally:
        for record in await table.describe():
            with contextlib.suppress(InvalidRequest, ExpertUnavailable):
                await table.remove(record["name"])
                await table.wait(record["name"], timeout_s=10)
        await table.close()
        await registry.object.close()
        await store.close()


@pytest.fixture
async def bed(
    config: Config, store_url: str, expert: Any, root: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Bed]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "cache"))
    async with bed_of(config, store_url, expert, root, models) as made:
        yield made


async def test_from_a_folder_to_answers_and_away_again(bed: Bed) -> None:
    record = await bed.add("bank", 1)
    assert record["phase"] == "staged" and record["version"] == 1 and record["kind"] == "lora" and record["rank"] == 4
    ready = await bed.ready("bank", 1)
    assert ready["id"] == "tiny:bank" and ready["serving"] == 1 and ready["path"] == bed.make(1)
    assert [r["phase"] for r in ready["replicas"].values()] == ["ready"]
    assert await bed.says("bank") != await bed.says(None)
    (described,) = await bed.table.describe("bank")
    assert described["phase"] == "ready" and described["store"] == "ok"
    removed = await bed.table.remove("bank")
    assert removed["phase"] == "draining"
    assert (await bed.table.wait("bank", timeout_s=10))["phase"] == "gone"
    assert await bed.held() == {} and await bed.table.describe("bank") == []
    with pytest.raises(AdapterNotLoaded):
        await bed.generate("bank@1")
    with pytest.raises(InvalidRequest) as caught:
        await bed.table.remove("bank")
    assert caught.value.status == 404


async def test_an_update_is_switched_while_the_old_version_still_answers(bed: Bed) -> None:
    await bed.add("bank", 1)
    await bed.ready("bank")
    old = await bed.says("bank")
    async with bed.table.lease("bank") as before:
        assert before is not None
        record = await bed.add("bank", 2)
        await bed.ready("bank", record["version"])
        async with bed.table.lease("bank") as after:
            assert after is not None and after.number == before.number + 1
        await asyncio.sleep(1.0)
        assert set(await bed.held()) == {before.version, after.version}
        assert await bed.generate(before.version) == old  # it may be finished
    await bed.until_held(after.version)
    assert await bed.says("bank") != old
    again = await bed.add("bank", 2)  # the same content
    assert again["version"] == after.number and again["phase"] == "ready"


async def test_what_users_do_with_their_folder_afterwards_does_not_matter(bed: Bed, config: Config) -> None:
    await bed.add("bank", 3)
    await bed.ready("bank")
    said = await bed.says("bank")
    shutil.rmtree(bed.make(3))
    version = (await bed.table.describe("bank"))[0]["version"]
    report = await bed.expert.probe_adapters.remote()
    from signalbox.serving.adapter_replica import OneReplica

    await bed.expert.unload_adapter.remote(OneReplica(report.replica_id), f"bank@{version}")  # as a restart would
    assert (await bed.table.describe("bank"))[0]["phase"] == "staged"  # the truth, before anyone has noticed
    await bed.until_held(f"bank@{version}")
    assert await bed.says("bank") == said


async def test_a_broken_adapter_is_refused_and_leaves_nothing(bed: Bed) -> None:
    tensors = lora_tensors(bed.model, seed=5)
    name = next(iter(tensors))
    tensors[name][0, 0] = torch.nan
    path = write_lora(bed.root / "broken", tensors)
    with pytest.raises(AdapterError) as caught:
        await bed.table.add(name="broken", base="tiny", path=str(path))
    assert caught.value.code == "not_finite" and caught.value.tensor == name
    with pytest.raises(AdapterError) as caught:
        await bed.table.add(name="outside", base="tiny", path="/etc")
    assert caught.value.code == "outside_roots"
    assert await bed.table.describe() == [] and await bed.held() == {}


async def test_weights_that_are_finite_but_answers_that_are_not(bed: Bed) -> None:
    """The files are fine, and the canary finds it: products beyond the range of float32."""
    tensors = {name: tensor * 0 + 1e30 for name, tensor in lora_tensors(bed.model, seed=6).items()}
    path = write_lora(bed.root / "overflow", tensors)
    record = await bed.table.add(name="overflow", base="tiny", path=str(path))
    record = await bed.table.wait("overflow", record["version"], timeout_s=20)
    assert record["phase"] == "failed" and record["code"] == "canary_failed" and record["serving"] is None, record
    await bed.until_held()


async def test_short_of_slots_the_least_recently_used_goes_and_comes_back(bed: Bed) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        await bed.add(name, seed)
        await bed.ready(name)
    said = await bed.says("a")
    await asyncio.sleep(1.1)
    await bed.says("b")
    await bed.add("c", 3)
    await bed.ready("c")
    (record,) = await bed.table.describe("a")
    assert record["evicted"] and record["phase"] == "staged" and len(await bed.held()) == SLOTS
    adapter = await bed.table.current("a")
    assert adapter is not None and not adapter.holders
    await asyncio.sleep(1.1)
    assert (await bed.table.ensure("a")).holders
    assert await bed.says("a") == said and len(await bed.held()) == SLOTS


async def test_names_and_bases_that_cannot_be_had(bed: Bed) -> None:
    for name, base, status in (("tiny", "tiny", 409), ("auto", "tiny", 409), ("a/b", "tiny", 400), ("x", "wide", 422)):
        with pytest.raises(InvalidRequest) as caught:
            await bed.table.add(name=name, base=base, path=bed.make(1))
        assert caught.value.status == status


async def test_a_successor_takes_over(
    bed: Bed, config: Config, store_url: str, expert: Any, root: Path, models: dict[str, Path]
) -> None:
    await bed.add("bank", 1)
    await bed.ready("bank")
    async with bed_of(config, store_url, expert, root, models) as second:
        epochs = [(await each.registry.object.info())["epoch"] for each in (bed, second)]
        assert epochs[0] < epochs[1]
        with pytest.raises(ExpertUnavailable):
            await bed.add("other", 2)
        assert (await second.ready("bank"))["version"] == (await bed.table.describe("bank"))[0]["version"]
        with pytest.raises(Exception, match="superseded"):
            for _ in range(50):
                await asyncio.sleep(0.1)
                bed.registry.object.check_health()


async def test_a_watched_folder(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_watch, "LOOK_S", 0.1)
    folder = bed.root / "watched" / "tiny" / "seen"
    make_lora(folder, bed.model, seed=8, scale=0.6)
    deadline = time.monotonic() + 20
    while not (found := await bed.table.describe("seen")) or found[0]["phase"] != "ready":
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.1)
    assert found[0]["origin"] == "watch" and found[0]["version"] == 1
    make_lora(folder, bed.model, seed=9, scale=0.6)
    while (found := await bed.table.describe("seen"))[0]["serving"] != 2:
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.1)
    shutil.rmtree(folder)
    while await bed.table.describe("seen"):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)


def test_copies_of_services_that_are_gone_are_deleted(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "sock").touch()
    first = storage_folder(config, f"unix://{tmp_path}/sock?db=0")
    (first / "copy").mkdir()
    (tmp_path / "other").touch()
    assert storage_folder(config, f"unix://{tmp_path}/other?db=0") != first and first.is_dir()
    (tmp_path / "sock").unlink()
    storage_folder(config, f"unix://{tmp_path}/other?db=0")
    assert not first.exists()
