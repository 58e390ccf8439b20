"""A router's new version takes over while requests are served; one that is damaged or does not fit is refused."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from signalbox.router.artifact import TENSORS, read_artifact, save_artifact
from signalbox.router.base import Prompt
from signalbox.router.lexical import LexicalPredictor
from signalbox.router.online import Outcome
from signalbox.serving import live_router
from signalbox.serving.live_router import ArtifactWatch
from signalbox.serving.routing import Routing, load_artifact
from tests.router.conftest import EXPERTS, planted
from tests.serving.conftest import make_config, serve_gateway, until_ready


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two versions for the same experts, and one that lacks the last expert."""
    root = tmp_path_factory.mktemp("versions")
    tables = [planted(60, seed=1, scores=True), planted(60, seed=2, scores=True)]
    tables.append(tables[0].pool(EXPERTS[:2]))
    for number, table in enumerate(tables):
        save_artifact(LexicalPredictor.fit(table).to_artifact(), root / f"{number}")
    return [root / f"{number}" for number in range(3)]


def version_of(path: Path) -> str:
    return read_artifact(path).version


@asynccontextmanager
async def watched(path: Path, **options: Any) -> AsyncIterator[tuple[Routing, ArtifactWatch]]:
    routing = Routing(EXPERTS, name="default", load=partial(load_artifact, path, "lexical"))
    routing.start()
    watch = ArtifactWatch(routing, path, "lexical", **options)
    try:
        await routing.predict([Prompt("wait until it is loaded")])
        yield routing, watch
    finally:
        await watch.close()
        await routing.close()


def point(link: Path, target: Path) -> None:
    """Re-point a symbolic link, as one does with `ln -sfn` and a rename: there is always one."""
    fresh = link.with_name(".fresh")
    fresh.symlink_to(target)
    fresh.replace(link)


async def test_a_link_pointed_elsewhere(versions: list[Path], tmp_path: Path) -> None:
    link = tmp_path / "current"
    point(link, versions[0])
    async with watched(link) as (routing, watch):
        assert not await watch.look(), "nothing is new"
        online = routing.online
        assert online is not None and online.dimension is not None
        online.learn(Outcome("cook", np.ones(online.dimension, np.float32), 0.5, 0.2, 1.0))
        learned, loaded_at = routing.generation, routing.describe()["loaded_at"]
        assert routing.describe()["learning"]["updates"] == 1
        point(link, versions[1])
        assert await watch.look() and not await watch.look()
        said = routing.describe()
        assert said["version"] == version_of(versions[1]) != online.version and said["loaded_at"] > loaded_at
        assert said["learning"]["updates"] == 0, "what was learned belongs to the old version"
        assert routing.generation != learned, "remembered decisions are of the old version"
        scores = await routing.predict([Prompt("Explain the oven to a beginner")])
        assert scores.basis is not None and scores.basis.version == said["version"]


async def test_a_folder_written_over(versions: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "router"
    shutil.copytree(versions[0], path)
    async with watched(path) as (routing, watch):
        save_artifact(read_artifact(versions[1]), path)
        assert await watch.look()
        assert routing.online is not None and routing.online.version == version_of(versions[1])
        (path / TENSORS).touch()
        assert not await watch.look(), "the same version"


async def test_what_cannot_be_used_is_refused(
    versions: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "router"
    shutil.copytree(versions[0], path)
    damaged, other = tmp_path / "damaged", tmp_path / "other"
    shutil.copytree(versions[1], damaged)
    with (damaged / TENSORS).open("r+b") as tensors:
        tensors.seek(-4, 2)
        tensors.write(b"\x00\x00\x80\x7f")
    shutil.copytree(versions[1], other)
    sheet = orjson.loads((other / "router.json").read_bytes())
    (other / "router.json").write_bytes(orjson.dumps(sheet | {"kind": "tryage"}))
    async with watched(path) as (routing, watch):
        for wrong, says in ((damaged, "damaged"), (other, "router"), (versions[2], "does not know coder")):
            shutil.rmtree(path)
            assert not await watch.look(), "for a moment there is nothing"
            shutil.copytree(wrong, path)
            caplog.clear()
            assert not await watch.look()
            assert "is refused" in caplog.text and routing.refused is not None
            if wrong is not damaged:
                assert says in caplog.text
            caplog.clear()
            assert not await watch.look() and not caplog.text, "said once"
            scores = await routing.predict([Prompt("Explain the oven to a beginner")])
            assert scores.router == "default" and scores.basis is not None
            assert scores.basis.version == version_of(versions[0]), "the old one serves on"
        shutil.rmtree(path)
        shutil.copytree(versions[1], path)
        assert await watch.look() and routing.refused is None


async def test_a_half_written_artifact_is_taken_when_it_is_whole(versions: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "router"
    shutil.copytree(versions[0], path)
    async with watched(path) as (routing, watch):
        shutil.copyfile(versions[1] / "router.json", path / "router.json")
        assert not await watch.look() and routing.refused is not None
        shutil.copyfile(versions[1] / TENSORS, path / TENSORS)
        assert await watch.look()


async def test_a_router_that_could_not_be_loaded_comes_to_life(versions: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "router"
    shutil.copytree(versions[0], path)
    (path / TENSORS).write_bytes(b"nonsense")
    async with watched(path) as (routing, watch):
        assert routing.error is not None
        assert (await routing.predict([Prompt("x")])).router == "fallback"
        shutil.copyfile(versions[0] / TENSORS, path / TENSORS)
        assert await watch.look() and routing.error is None
        assert (await routing.predict([Prompt("x")])).router == "default"


async def test_no_request_fails_or_waits_while_versions_change(
    versions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each load is held until requests were answered during it, by the version that still serves."""
    link = tmp_path / "current"
    point(link, versions[0])
    may_load = threading.Semaphore(0)

    def held(*arguments: Any) -> Any:
        assert may_load.acquire(timeout=30), "the requests waited for the load"
        return load_artifact(*arguments)

    monkeypatch.setattr(live_router, "load_artifact", held)
    async with watched(link, period_s=0.05) as (routing, watch):
        watch.start()
        answers: list[str] = []
        stop = False

        async def ask() -> None:
            while not stop:
                scores = await routing.predict([Prompt(f"Explain the oven to a beginner, number {len(answers)}")])
                assert scores.router == "default" and scores.basis is not None
                answers.append(scores.basis.version)
                await asyncio.sleep(0.005)

        async def answered(version: str, count: int) -> None:
            """Until so many more answers came, all of them by this version once it was seen."""
            async with asyncio.timeout(30):
                while version not in answers[-1:]:
                    await asyncio.sleep(0.01)
                seen = len(answers)
                while len(answers) < seen + count:
                    await asyncio.sleep(0.01)
            assert set(answers[seen:]) == {version}

        tasks = [asyncio.create_task(ask()) for _ in range(4)]
        for turn in range(1, 7):
            await answered(version_of(versions[(turn - 1) % 2]), 1)
            point(link, versions[turn % 2])
            await answered(version_of(versions[(turn - 1) % 2]), 20)
            may_load.release()
            await answered(version_of(versions[turn % 2]), 20)
        stop = True
        await asyncio.gather(*tasks)


async def test_over_http(
    models: dict[str, Path],
    router_artifact: Path,
    valkey: str,
    expert_handles: dict[str, Any],
    tmp_path: Path,
) -> None:
    """Answers go on through a swap; the next decision is the new version's, also where the old one was remembered."""
    old = read_artifact(router_artifact)
    flipped = {n: t[..., ::-1].copy() if t.shape[-1:] == (2,) else t for n, t in old.tensors.items()}
    save_artifact(replace(old, tensors=flipped), tmp_path / "flipped")
    link = tmp_path / "current"
    point(link, router_artifact)
    routers = {"swapped": {"kind": "tryage", "artifact": str(link)}}
    config = make_config(models, routers=routers, default_router="swapped")
    async with serve_gateway(config, valkey, expert_handles) as service:
        await until_ready(service)
        text = f"What is 31 plus 12? {time.time_ns()}"

        async def ask() -> Any:
            body = {"model": "auto", "max_tokens": 2, "messages": [{"role": "user", "content": text}], "temperature": 0}
            reply = await service.client.post("/v1/chat/completions", json=body)
            assert reply.status_code == 200 and reply.headers["x-signalbox-router"] == "swapped"
            return reply

        assert [(await ask()).json()["model"] for _ in range(2)] == ["tiny"] * 2
        point(link, tmp_path / "flipped")
        deadline = time.monotonic() + 10
        while (reply := await ask()).json()["model"] == "tiny":
            assert time.monotonic() < deadline
        assert reply.json()["model"] == "wide"
        listed = (await service.client.get("/v1/routers")).json()["data"][0]
        assert listed["version"] == version_of(tmp_path / "flipped") and listed["refused"] is None
        record = (await service.client.get(f"/v1/decisions/{reply.headers['x-request-id']}")).json()
        assert record["router_version"] == listed["version"]
