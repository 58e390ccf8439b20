"""The adapter routes over HTTP: real gateway, registry and engine in one process, and the official `openai` client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, NotFoundError

from signalbox.serving.adapter_registry import AdapterRegistry
from signalbox.serving.config import Config
from tests.adapters.broken import BROKEN
from tests.adapters.folders import make_lora
from tests.serving.conftest import Service, make_config, serve_gateway, until_ready
from tests.serving.test_adapter_registry import (  # noqa: F401 (fixtures)
    InProcess,
    config,
    expert,
    root,
    store_url,
)

# ESFT is refused whatever is wrong with it: no engine serves it. tests/adapters/test_broken.py has its faults.
LORA_BROKEN = [name for name, broken in BROKEN.items() if not broken.moe and not name.startswith("esft")]


@pytest.fixture
async def api(
    config: Config,  # noqa: F811
    store_url: str,  # noqa: F811
    expert: Any,  # noqa: F811
    root: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Service]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "cache"))
    registry = InProcess(AdapterRegistry(config, store_url, {"tiny": expert}))
    async with serve_gateway(config, store_url, {"tiny": expert}, registry) as service:
        await until_ready(service)
        yield service
        for record in (await service.client.get("/v1/adapters")).json()["data"]:
            await service.client.post("/v1/unload_lora_adapter", json={"lora_name": record["name"]})
    await registry.object.close()


async def until(service: Service, name: str, phase: str) -> dict[str, Any]:
    deadline = time.monotonic() + 20
    while True:
        record = (await service.client.get(f"/v1/adapters/{name}")).json()
        if record.get("phase") == phase:
            return dict(record)
        assert time.monotonic() < deadline, record
        await asyncio.sleep(0.02)


async def say(service: Service, model: str) -> str:
    """Eight greedy tokens, never from the cache."""
    body = {"model": model, "prompt": "the fox", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    reply = await service.client.post("/v1/completions", json=body | {"signalbox": {"cache": {"mode": "off"}}})
    assert reply.status_code == 200, reply.text
    assert reply.json()["model"] == (model if model.startswith("tiny") else f"tiny:{model}")
    return str(reply.json()["choices"][0]["text"])


def lora(root: Path, models: dict[str, Path], seed: int) -> str:  # noqa: F811
    return str(make_lora(root / f"api{seed}", models["tiny"], seed=seed, scale=0.6))


async def test_a_life_by_http(api: Service, root: Path, models: dict[str, Path]) -> None:  # noqa: F811
    openai = AsyncOpenAI(base_url=f"{api.url}/v1", api_key="unused", max_retries=0)
    base = await say(api, "tiny")
    reply = await api.client.post("/v1/adapters", json={"name": "bank", "base": "tiny", "path": lora(root, models, 1)})
    assert reply.status_code == 202
    assert reply.json()["phase"] in ("validating", "staged", "ready") and reply.json()["version"] == 1
    record = await until(api, "bank", "ready")
    assert record["id"] == "tiny:bank" and record["kind"] == "lora" and record["rank"] == 4
    assert {state["phase"] for state in record["replicas"].values()} == {"ready"}
    assert record["events"][0]["phase"] == "ready"

    first = await say(api, "tiny:bank")
    assert first != base and await say(api, "bank") == first and await say(api, "tiny") == base
    listed = {model.id: model.model_dump() for model in (await openai.models.list()).data}
    for name in ("tiny:bank", "bank"):
        assert (listed[name]["parent"], listed[name]["root"]) == ("tiny", "tiny")
    assert (await openai.models.retrieve("bank")).id == "bank"
    stream = await openai.chat.completions.create(
        model="tiny:bank", messages=[{"role": "user", "content": "the fox"}], max_tokens=4, stream=True
    )
    assert {chunk.model async for chunk in stream} == {"tiny:bank"}

    again = await api.client.post("/v1/adapters", json={"name": "bank", "base": "tiny", "path": lora(root, models, 1)})
    assert again.status_code == 202 and again.json()["version"] == 1, "the same content is the same version"
    reply = await api.client.post("/v1/adapters", json={"name": "bank", "base": "tiny", "path": lora(root, models, 2)})
    assert reply.status_code == 202 and reply.json()["version"] == 2
    while (await api.client.get("/v1/adapters/bank")).json()["serving"] != 2:
        await asyncio.sleep(0.02)
    assert await say(api, "bank") not in (base, first)

    reply = await api.client.delete("/v1/adapters/bank")
    assert reply.status_code == 202
    with pytest.raises(NotFoundError, match="there is no model 'bank'"):
        await openai.completions.create(model="bank", prompt="the fox")
    assert await say(api, "tiny") == base
    await openai.close()


async def test_vllms_routes_answer_200_only_once_it_is_so(
    api: Service,
    root: Path,  # noqa: F811
    models: dict[str, Path],
) -> None:
    async def post(route: str, **body: Any) -> httpx.Response:
        return await api.client.post(f"/v1/{route}_lora_adapter", json=body)

    base = await say(api, "tiny")
    reply = await post("load", lora_name="fin", lora_path=lora(root, models, 3))
    assert (reply.status_code, reply.text) == (200, "Success: LoRA adapter 'fin' added successfully.")
    first = await say(api, "fin")
    assert first != base
    reply = await post("load", lora_name="fin", lora_path=lora(root, models, 4))
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "already_loaded")
    reply = await post("load", lora_name="fin", lora_path=lora(root, models, 4), load_inplace=True)
    assert reply.status_code == 200 and await say(api, "fin") not in (base, first)
    reply = await post("unload", lora_name="fin", lora_int_id=1)
    assert (reply.status_code, reply.text) == (200, "Success: LoRA adapter 'fin' removed successfully.")
    reply = await post("unload", lora_name="fin")
    assert reply.status_code == 404
    assert (await api.client.get("/v1/adapters")).json() == {"object": "list", "data": []}


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({}, 400, "'name' is missing"),
        ({"name": "a"}, 400, "'path' is missing"),
        ({"name": 7, "path": "x"}, 400, "'name' must be a non-empty string, not a number"),
        ({"name": "a", "path": "x", "replicas": 0}, 400, "'replicas' must be from 1"),
        ({"name": "a", "path": "x", "pinned": "yes"}, 400, "'pinned' must be true or false"),
        ({"name": "a", "path": "x", "bsae": "tiny"}, 400, "did you mean 'base'?"),
        ({"name": "a", "path": "x", "base": "tinny"}, 422, "did you mean 'tiny'?"),
        ({"name": "a", "path": "x", "base": "wide"}, 422, "there is no expert 'wide'"),
        ({"name": "a b", "path": "x"}, 400, "an adapter's name has letters"),
        ({"name": "tiny", "path": "x"}, 409, "'tiny'"),
        ({"name": "auto", "path": "x"}, 409, "'auto' is taken"),
        ({"name": "a", "path": "/etc"}, 422, "outside the folders"),
        ({"name": "a", "path": "../.."}, 422, "give the plain path"),
    ],
)
async def test_bad_requests_say_what_to_do(api: Service, body: dict[str, Any], status: int, said: str) -> None:
    reply = await api.client.post("/v1/adapters", json=body)
    assert (reply.status_code, said in reply.json()["error"]["message"]) == (status, True), reply.text
    assert (await api.client.get("/v1/adapters")).json()["data"] == []


async def test_routes_of_an_adapter_that_is_not_there(api: Service) -> None:
    for method in ("GET", "DELETE"):
        reply = await api.client.request(method, "/v1/adapters/nobody")
        assert reply.status_code == 404 and "nobody" in reply.json()["error"]["message"]
    reply = await api.client.put("/v1/adapters/nobody")
    assert reply.status_code == 405


async def test_every_broken_adapter_is_refused_and_the_service_goes_on(
    api: Service,
    root: Path,  # noqa: F811
    models: dict[str, Path],
) -> None:
    reply = await api.client.post(
        "/v1/load_lora_adapter", json={"lora_name": "sound", "lora_path": lora(root, models, 5)}
    )
    assert reply.status_code == 200
    answers = {name: await say(api, name) for name in ("tiny", "sound")}
    for name in LORA_BROKEN:
        broken = BROKEN[name]
        folder = broken.build(models["tiny"], root / f"broken-{name}")
        # Each a new version of the sound one: what is refused must not touch what serves.
        body = {"name": "sound", "base": "tiny", "path": str(folder)}
        reply = await api.client.post("/v1/adapters", json=body)
        error = reply.json()["error"]
        assert (reply.status_code, error["code"], error["param"]) == (422, broken.code, broken.tensor), (name, error)
        assert broken.mentions in error["message"]
    record = (await api.client.get("/v1/adapters/sound")).json()
    assert (record["phase"], record["serving"]) == ("ready", 1)
    assert {name: await say(api, name) for name in answers} == answers


async def test_a_service_without_adapters_says_so(
    models: dict[str, Path], valkey: str, expert_handles: dict[str, Any]
) -> None:
    async with serve_gateway(make_config(models), valkey, expert_handles) as service:
        assert (await service.client.get("/v1/adapters")).json() == {"object": "list", "data": []}
        reply = await service.client.post("/v1/adapters", json={"name": "a", "path": "x"})
        assert reply.status_code == 400 and "set max_adapters" in reply.json()["error"]["message"]
        assert (await service.client.get("/v1/adapters/a")).status_code == 404
