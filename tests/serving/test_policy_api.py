"""The policy routes over HTTP, with a real table in a real Valkey."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx
import pytest

from signalbox.experts.base import ExpertError, InvalidRequest
from signalbox.policies.base import Policy
from signalbox.serving.config import Config
from signalbox.serving.embedded_valkey import EmbeddedValkey
from signalbox.serving.exchange import Exchange, Receive, Send
from signalbox.serving.policy_api import PolicyApi
from signalbox.serving.policy_table import PolicyTable
from signalbox.serving.store import Store
from tests.serving.conftest import serve_gateway

GOLD = {"slo": {"max_ttft_ms": 800.0}}


def _admin(exchange: Exchange) -> None:
    if exchange.headers.get(b"x-api-key") == b"guest":
        raise InvalidRequest("this key may not change policies", code="not_admin", status=403)


class Routes:
    """Leads a request to its handler as the gateway does."""

    def __init__(self, api: PolicyApi) -> None:
        self.api = api

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send)
        methods = self.api.routes.get(exchange.path, self.api.named)
        try:
            await methods["GET" if exchange.method == "HEAD" else exchange.method](exchange)
        except ExpertError as error:
            await exchange.fail(error)


class Bed:
    def __init__(self, client: httpx.AsyncClient, server: EmbeddedValkey, table: PolicyTable) -> None:
        self.client, self.server, self.table = client, server, table

    async def etag(self, name: str) -> str:
        return (await self.client.get(f"/v1/policies/{name}")).headers["etag"]


@pytest.fixture
async def bed() -> AsyncIterator[Bed]:
    server = EmbeddedValkey()
    store = Store(server.start(), timeout_s=0.5, retry_after_s=0.1)
    configured = {"gold": Policy.model_validate(GOLD), "base": Policy()}
    table = PolicyTable(store, configured, protected={"base": "default_policy"})
    await table.start()
    api = PolicyApi(table, lambda: ["smollm2", "gemma"], _admin)
    try:
        transport = httpx.ASGITransport(Routes(api))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield Bed(client, server, table)
    finally:
        await table.close()
        await store.close()
        server.stop()


def error_of(reply: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code), reply.text
    return dict(reply.json()["error"])


async def test_list_and_show(bed: Bed) -> None:
    reply = await bed.client.get("/v1/policies")
    assert reply.status_code == 200 and [p["name"] for p in reply.json()["data"]] == ["base", "gold"]
    again = await bed.client.get("/v1/policies", headers={"if-none-match": reply.headers["etag"]})
    assert again.status_code == 304 and again.content == b""
    shown = await bed.client.get("/v1/policies/gold")
    body = shown.json()
    assert (body["object"], body["version"], body["policy"]["slo"]) == ("policy", 1, GOLD["slo"])
    assert shown.headers["etag"] == f'"{body["etag"]}"', "strong and in quotes"
    head = await bed.client.head("/v1/policies/gold")
    assert head.status_code == 200 and head.content == b"" and head.headers["etag"] == shown.headers["etag"]
    assert head.headers["content-length"] == str(len(shown.content))
    error_of(await bed.client.get("/v1/policies/nobody"), 404, "policy_not_found")
    await bed.client.put("/v1/policies/new", json={})
    assert (await bed.client.get("/v1/policies", headers={"if-none-match": reply.headers["etag"]})).status_code == 200


async def test_put_creates_and_changes(bed: Bed) -> None:
    reply = await bed.client.put("/v1/policies/silver", json={"slo": {"max_ttft_ms": 1500}})
    assert reply.status_code == 201 and reply.headers["location"] == "/v1/policies/silver"
    assert reply.headers["etag"] == await bed.etag("silver")
    changed = await bed.client.put("/v1/policies/silver", json={"slo": {"max_ttft_ms": 1200}})
    assert changed.status_code == 200 and changed.json()["version"] == 2
    same = await bed.client.put("/v1/policies/silver", json={"slo": {"max_ttft_ms": 1200}, "priority": 0})
    assert same.status_code == 200 and same.headers["etag"] == changed.headers["etag"]
    assert bed.table.policies()["silver"].slo.max_ttft_ms == 1200


async def test_yaml(bed: Bed) -> None:
    text = "# for the evening\nslo:\n  max_ttft_ms: 900\nbudget: {usd: 5, window: 1d}\n"
    reply = await bed.client.put(
        "/v1/policies/silver", content=text, headers={"content-type": "application/yaml; charset=utf-8"}
    )
    assert reply.status_code == 201 and reply.json()["policy"]["budget"]["usd"] == 5.0

    async def refused(text: str | bytes) -> str:
        headers = {"content-type": "text/yaml"}
        reply = await bed.client.put("/v1/policies/silver", content=text, headers=headers)
        return str(error_of(reply, 400, "invalid_yaml")["message"])

    assert "line:3: slo: given twice, first on line 1" in await refused("slo:\n  max_ttft_ms: 1\nslo: {}\n")
    assert "line:2: not valid YAML" in await refused("slo: [\n")
    assert "UTF-8" in await refused(b"\xff")
    bomb = "a: &a [x, x]\n" + "\n".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]" for i in range(24)
    )
    assert "aliases" in await refused(bomb)
    assert "nested too deeply" in await refused("[" * 60_000)
    reply = await bed.client.put("/v1/policies/silver", content=text, headers={"content-type": "text/html"})
    error_of(reply, 415, "unsupported_media_type")


async def test_what_is_wrong_with_a_policy_is_told(bed: Bed) -> None:
    error = error_of(await bed.client.put("/v1/policies/x", json={"slo": {"max_ttft": 5}}), 400, "invalid_policy")
    assert error["param"] == "slo.max_ttft" and "did you mean 'max_ttft_ms'?" in error["message"]
    judged = {"parallel": {"samples": 3, "arbiter": "judge", "judge": "gema"}}
    error = error_of(await bed.client.put("/v1/policies/x", json=judged), 400, "invalid_policy")
    assert "did you mean 'gemma'?" in error["message"]
    error_of(await bed.client.put("/v1/policies/x", content=b"{"), 400, "invalid_json")
    error_of(await bed.client.put("/v1/policies/x", content=b"[]"), 400, "invalid_json")
    error_of(await bed.client.put("/v1/policies/x", content=b"x" * 140_000), 413, "body_too_large")
    large = {"intents": {f"i{n}": {"examples": ["x" * 3000]} for n in range(32)}}
    error_of(await bed.client.put("/v1/policies/x", json=large), 413, "policy_too_large")
    for name in ("auto", "a%20b", "-x", "x" * 65):
        error_of(await bed.client.put(f"/v1/policies/{name}", json={}), 400, "invalid_name")
    assert "x" not in bed.table.names()


async def test_conditional_changes(bed: Bed) -> None:
    old = await bed.etag("gold")
    reply = await bed.client.put("/v1/policies/gold", json={}, headers={"if-match": f'"other", W/"weak" , {old}'})
    assert reply.status_code == 200 and reply.json()["version"] == 2

    async def put(name: str, **headers: str) -> httpx.Response:
        said = {key.replace("_", "-"): value for key, value in headers.items()}
        return await bed.client.put(f"/v1/policies/{name}", json={"priority": 3}, headers=said)

    error = error_of(await put("gold", if_match=old), 412, "precondition_failed")
    assert "version 2" in error["message"]
    error_of(await put("gold", if_match=f"W/{await bed.etag('gold')}"), 412, "precondition_failed")
    error_of(await put("gold", if_match='"*"'), 412, "precondition_failed")
    error_of(await put("gold", if_none_match="*"), 412, "precondition_failed")
    error_of(await put("new", if_match="*"), 412, "precondition_failed")
    for broken in ("gold", '"a" "b"', "", '"a'):
        assert error_of(await put("gold", if_match=broken), 400, "invalid_request")["param"] == "If-Match"
    error_of(await put("gold", if_none_match=old), 400, "invalid_request")
    assert (await put("gold", if_match="*")).status_code == 200
    assert (await put("new", if_none_match="*")).status_code == 201
    fresh = await bed.etag("gold")
    kept = await bed.client.get("/v1/policies/gold", headers={"if-none-match": f'"x", W/{fresh}'})
    assert kept.status_code == 304 and kept.headers["etag"] == fresh
    assert (await bed.client.get("/v1/policies/gold", headers={"if-none-match": old})).status_code == 200
    error_of(await bed.client.delete("/v1/policies/gold", headers={"if-match": old}), 412, "precondition_failed")


async def test_delete(bed: Bed) -> None:
    reply = await bed.client.delete("/v1/policies/gold", headers={"if-match": await bed.etag("gold")})
    assert reply.status_code == 204 and reply.content == b""
    error_of(await bed.client.get("/v1/policies/gold"), 404, "policy_not_found")
    error_of(await bed.client.delete("/v1/policies/gold"), 404, "policy_not_found")
    error = error_of(await bed.client.delete("/v1/policies/base"), 409, "policy_in_use")
    assert "default_policy" in error["message"]


async def test_validate_changes_nothing(bed: Bed) -> None:
    before = bed.table.generation
    for path in ("/v1/policies/validate", "/v1/policies/gold/validate"):
        good = await bed.client.post(path, json={"allowed": ["smollm2", "gpt-*"]})
        assert good.status_code == 200
        body = good.json()
        assert (body["valid"], body["problems"]) == (True, []) and [w["param"] for w in body["warnings"]] == ["allowed"]
        bad = await bed.client.post(path, json={"slo": {"max_total_ms": 1, "max_ttft_ms": 5}})
        assert bad.status_code == 200 and not bad.json()["valid"]
        assert [p["param"] for p in bad.json()["problems"]] == ["slo.max_total_ms"]
        wrong = (await bed.client.post(path, json={"prioritty": 1, "fallback": 99})).json()
        assert not wrong["valid"] and {p["param"] for p in wrong["problems"]} == {"prioritty", "fallback"}
    error_of(await bed.client.post("/v1/policies/auto/validate", json={}), 400, "invalid_name")
    assert bed.table.generation == before


async def test_versions_and_rollback(bed: Bed) -> None:
    for ms in (700, 600):
        await bed.client.put("/v1/policies/gold", json={"slo": {"max_ttft_ms": ms}})
    reply = await bed.client.get("/v1/policies/gold/versions")
    assert [(v["version"], v["policy"]["slo"]["max_ttft_ms"]) for v in reply.json()["data"]] == [
        (3, 600),
        (2, 700),
        (1, 800),
    ]
    same = await bed.client.get("/v1/policies/gold/versions", headers={"if-none-match": reply.headers["etag"]})
    assert same.status_code == 304
    etag = await bed.etag("gold")
    back = await bed.client.post("/v1/policies/gold/rollback", json={"version": 1}, headers={"if-match": etag})
    assert back.status_code == 200 and back.json()["version"] == 4 and back.json()["policy"]["slo"] == GOLD["slo"]
    assert back.headers["etag"] == await bed.etag("gold") != etag
    reply = await bed.client.post("/v1/policies/gold/rollback", json={"version": 1}, headers={"if-match": etag})
    error_of(reply, 412, "precondition_failed")
    error_of(await bed.client.post("/v1/policies/gold/rollback", json={"version": 77}), 404, "version_not_found")
    error_of(await bed.client.post("/v1/policies/no/rollback", json={"version": 1}), 404, "policy_not_found")
    for body in ({}, {"version": "1"}, {"version": 0}, {"version": 1, "force": True}):
        assert (await bed.client.post("/v1/policies/gold/rollback", json=body)).status_code == 400
    await bed.client.delete("/v1/policies/gold")
    said = (await bed.client.get("/v1/policies/gold/versions")).json()["data"][0]
    assert said["deleted"] and said["version"] == 5
    assert (await bed.client.post("/v1/policies/gold/rollback", json={"version": 2})).json()["version"] == 6
    error_of(await bed.client.get("/v1/policies/no/versions"), 404, "policy_not_found")


async def test_routes_and_methods(bed: Bed) -> None:
    error_of(await bed.client.get("/v1/policies/gold/rollback"), 405, "method_not_allowed")
    error_of(await bed.client.post("/v1/policies/gold", json={}), 405, "method_not_allowed")
    error_of(await bed.client.put("/v1/policies/gold/versions", json={}), 405, "method_not_allowed")
    error_of(await bed.client.delete("/v1/policies/gold/versions/1"), 404, "not_found")
    error = error_of(await bed.client.get("/v1/policies/gold/version"), 404, "not_found")
    assert "did you mean 'versions'?" in error["message"]


async def test_only_an_admin_changes(bed: Bed) -> None:
    guest = {"x-api-key": "guest"}
    for reply in (
        await bed.client.put("/v1/policies/gold", json={}, headers=guest),
        await bed.client.delete("/v1/policies/gold", headers=guest),
        await bed.client.post("/v1/policies/gold/rollback", json={"version": 1}, headers=guest),
    ):
        error_of(reply, 403, "not_admin")
    assert (await bed.client.get("/v1/policies/gold", headers=guest)).status_code == 200
    assert (await bed.client.post("/v1/policies/validate", json={}, headers=guest)).json()["valid"]


async def test_with_the_store_lost_reading_goes_on(bed: Bed) -> None:
    bed.server.stop()
    assert (await bed.client.get("/v1/policies/gold")).status_code == 200
    for reply in (
        await bed.client.put("/v1/policies/gold", json={"priority": 2}),
        await bed.client.delete("/v1/policies/gold"),
        await bed.client.get("/v1/policies/gold/versions"),
    ):
        error_of(reply, 503, "store_unavailable")
        assert int(reply.headers["retry-after"]) >= 1


async def test_a_change_at_one_gateway_is_in_force_at_another() -> None:
    """Over HTTP with two real gateways; the expert is never asked."""
    expert = {"engine": "openai", "base_url": "http://127.0.0.1:9", "model": "m"}
    config = Config.model_validate({"experts": {"remote": expert}, "policies": {"gold": GOLD}})
    server = EmbeddedValkey()
    url = server.start()
    try:
        async with serve_gateway(config, url, {}) as one, serve_gateway(config, url, {}) as other:
            for change in ({"max_tokens": 7}, {"max_tokens": 8, "priority": 2}):
                etag = (await one.client.put("/v1/policies/night", json=change)).headers["etag"]
                deadline = time.monotonic() + 10
                while (await other.client.get("/v1/policies/night")).headers.get("etag") != etag:
                    assert time.monotonic() < deadline
                    await asyncio.sleep(0.01)
                said = (await other.client.get("/v1/models/auto:night")).json()["signalbox"]
                assert said == {"policy": "night", **change}, "what requests go by, not only what is shown"
            assert (await one.client.delete("/v1/policies/night")).status_code == 204
            deadline = time.monotonic() + 10
            while (await other.client.get("/v1/models/auto:night")).status_code != 404:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.01)
    finally:
        server.stop()
