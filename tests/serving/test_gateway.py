"""The gateway over HTTP, as clients see it: real engines, a real trained router, a real Valkey, OpenAI's own client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgpack
import openai
import orjson
import pytest

from signalbox.experts.base import Chunk, ExpertUnavailable, GenerateRequest
from signalbox.serving.embedded_valkey import EmbeddedValkey
from signalbox.serving.gateway import GatewayApp
from tests.serving.conftest import Service, make_config, serve_gateway, until_ready

DECISION_HEADERS = ["expert", "router", "policy", "confidence", "cache", "attempts", "overhead-ms"]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def unique(text: str = "hello") -> str:
    return f"{text} {time.time_ns()}"


@pytest.fixture
async def client(service: Service) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def idle(service: Service, expert: str) -> None:
    """Wait until the expert's engine does nothing, for so many looks: a pause of the process is one of them."""
    for _ in range(200):
        if (running := await service.running(expert)) == 0:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{running} requests still running")


# -- answers, by OpenAI's client -----------------------------------------------------------------------------------


async def test_chat(client: openai.AsyncOpenAI) -> None:
    reply = await client.chat.completions.create(
        model="auto",
        messages=user("What is 3 plus 4?"),
        max_tokens=8,
        temperature=0,  # type: ignore[arg-type]
    )
    assert reply.model == "tiny", "the reply's model is the expert that answered"
    assert reply.id.startswith("chatcmpl-") and reply.object == "chat.completion"
    assert abs(reply.created - time.time()) < 60
    choice = reply.choices[0]
    assert choice.message.role == "assistant" and choice.message.content
    assert choice.finish_reason == "length"
    assert reply.usage is not None and reply.usage.completion_tokens == 8
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 8


async def test_streamed_chat_is_the_same_chat(client: openai.AsyncOpenAI) -> None:
    ask: dict[str, Any] = {"model": "tiny", "messages": user(unique()), "max_tokens": 12, "temperature": 0}
    off = {"signalbox": {"cache": {"mode": "off"}}}
    whole = await client.chat.completions.create(**ask, extra_body=off)
    stream = await client.chat.completions.create(
        **ask, stream=True, stream_options={"include_usage": True}, extra_body=off
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    assert {c.id for c in chunks} == {chunks[0].id} and {c.model for c in chunks} == {"tiny"}


async def test_completions_of_several_prompts_and_choices(client: openai.AsyncOpenAI) -> None:
    reply = await client.completions.create(
        model="wide", prompt=["the quick", "What is"], n=2, max_tokens=6, seed=1, logprobs=3, temperature=1
    )
    assert [c.index for c in reply.choices] == [0, 1, 2, 3] and reply.object == "text_completion"
    assert reply.choices[0].text != reply.choices[1].text, "choices of one prompt differ, though the seed is given"
    logprobs = reply.choices[3].logprobs
    assert logprobs is not None and logprobs.tokens is not None and logprobs.top_logprobs is not None
    assert len(logprobs.tokens) == 6
    assert all(token in top for token, top in zip(logprobs.tokens, logprobs.top_logprobs, strict=True))
    again = await client.completions.create(
        model="wide", prompt=["the quick", "What is"], n=2, max_tokens=6, seed=1, logprobs=3, temperature=1
    )
    assert [c.text for c in again.choices] == [c.text for c in reply.choices], "a seed makes it repeatable"


async def test_streamed_choices_are_told_apart(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="tiny",
        messages=user("hello"),
        n=3,
        max_tokens=10,
        stream=True,
        seed=2,  # type: ignore[arg-type]
    )
    texts, reasons = ["", "", ""], ["", "", ""]
    async for chunk in stream:
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert reasons == ["length"] * 3 and len(set(texts)) == 3


async def test_logprobs(client: openai.AsyncOpenAI) -> None:
    reply = await client.chat.completions.create(
        model="tiny",
        messages=user("hello"),
        max_tokens=4,
        logprobs=True,
        top_logprobs=2,  # type: ignore[arg-type]
    )
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert len(logprobs.content) == 4 and all(len(t.top_logprobs) == 2 and t.logprob <= 0 for t in logprobs.content)


async def test_errors_are_those_of_openai_s_client(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        await client.chat.completions.create(model="gpt-5", messages=user("x"))  # type: ignore[arg-type]
    assert unknown.value.code == "model_not_found" and "auto" in str(unknown.value)
    with pytest.raises(openai.BadRequestError) as negative:
        await client.chat.completions.create(model="auto", messages=user("x"), max_tokens=-1)  # type: ignore[arg-type]
    assert negative.value.param == "max_tokens"
    with pytest.raises(openai.BadRequestError) as long:
        await client.chat.completions.create(model="tiny", messages=user("word " * 9000))  # type: ignore[arg-type]
    assert long.value.code == "context_length_exceeded" and long.value.param == "messages"
    with pytest.raises(openai.BadRequestError) as long:
        await client.completions.create(model="tiny", prompt="word " * 9000)
    assert long.value.param == "prompt"
    with pytest.raises(openai.BadRequestError) as tools:
        await client.chat.completions.create(
            model="tiny",
            messages=user("x"),
            tools=[{"type": "function", "function": {"name": "f"}}],  # type: ignore[arg-type]
        )
    assert tools.value.code == "unsupported" and tools.value.param == "tools"


async def test_sixteen_at_once(client: openai.AsyncOpenAI, service: Service) -> None:
    """More than the two pools' eight running places each; every one is answered, half of them streamed."""

    async def one(i: int) -> str:
        ask: dict[str, Any] = {"model": ["tiny", "wide"][i % 2], "messages": user(f"hello {i}"), "max_tokens": 20}
        if i % 4 < 2:
            return (await client.chat.completions.create(**ask)).choices[0].finish_reason
        stream = await client.chat.completions.create(**ask, stream=True)
        return [c.choices[0].finish_reason async for c in stream][-1] or ""

    reasons = await asyncio.gather(*(one(i) for i in range(16)))
    assert set(reasons) <= {"length", "stop"} and len(reasons) == 16
    await idle(service, "tiny")


# -- the decision --------------------------------------------------------------------------------------------------


async def test_decision_headers(service: Service) -> None:
    body = {"model": "auto:gold", "messages": user("What is 30 plus 12?"), "max_tokens": 4}
    for stream in (False, True):
        reply = await service.client.post("/v1/chat/completions", json=body | {"stream": stream})
        said = {name: reply.headers[f"x-signalbox-{name}"] for name in DECISION_HEADERS}
        assert said["expert"] == "tiny" and said["router"] == "default" and said["policy"] == "gold"
        assert said["cache"] == "bypass" and said["attempts"] == "1"
        assert 0.5 <= float(said["confidence"]) <= 1 and 0 < float(said["overhead-ms"]) < 5000


async def test_the_router_sends_prompts_to_different_experts(service: Service) -> None:
    async def expert(text: str, **fields: Any) -> str:
        body = {"model": "auto", "messages": user(text), "max_tokens": 2} | fields
        reply = await service.client.post("/v1/chat/completions", json=body)
        return str(reply.json()["model"])

    assert await expert("What is 55 times 13?") == "tiny"
    assert await expert("Tell me a story about a wizard and a garden.") == "wide"
    assert await expert("Tell me a story about a wizard. [Flag: lowest cost]") == "tiny"
    assert await expert("Tell me a story about a wizard.", model="auto:bronze") == "tiny"
    assert await expert("Tell me a story about a ship.", signalbox={"cost_quality_tradeoff": 10}) == "tiny"
    assert await expert("What is 55 times 13?", signalbox={"allowed": ["wide"]}) == "wide"


async def test_route_tells_the_whole_table(service: Service) -> None:
    reply = await service.client.post(
        "/v1/route", json={"prompt": "Tell me a story about a king. [Flag: lowest latency]"}
    )
    said = reply.json()
    assert reply.status_code == 200
    assert said["policy"] == "default" and said["router"] == "default" and said["flags"] == ["latency"]
    assert said["objective"]["latency"] > 0 and said["violated"] == [] and said["overhead_ms"] > 0
    assert {r["expert"] for r in said["ratings"]} == {"tiny", "wide"}
    fields = [
        "expert",
        "quality",
        "uncertainty",
        "cost_usd",
        "cost_per_1m",
        "ttft_ms",
        "tpot_ms",
        "total_ms",
        "utility",
        "wait_ms",
        "strikes",
    ]
    assert all(set(r) == set(fields) for r in said["ratings"])
    assert said["ratings"][0]["expert"] == said["expert"] and said["fallbacks"]
    chat = await service.client.post("/v1/route", json={"model": "auto:gold", "messages": user("What is 3 plus 4?")})
    assert chat.json()["expert"] == "tiny" and chat.json()["policy"] == "gold"
    forced = await service.client.post("/v1/route", json={"model": "wide", "messages": user("What is 3 plus 4?")})
    assert forced.json()["expert"] == "wide" and forced.json()["ratings"] == []


async def test_route_says_what_was_struck_out(service: Service) -> None:
    struck = await service.client.post("/v1/route", json={"prompt": "x", "signalbox": {"allowed": ["t*"]}})
    rating = next(r for r in struck.json()["ratings"] if r["expert"] == "wide")
    assert rating["strikes"] == [{"constraint": "allowed", "limit": "tiny", "value": "wide"}]
    nobody = await service.client.post("/v1/route", json={"prompt": "x", "model": "auto:impossible"})
    assert nobody.status_code == 400 and nobody.json()["error"]["code"] == "no_candidate"
    assert all(r["strikes"] for r in nobody.json()["ratings"])


async def test_measured_latency_is_used(service: Service, client: openai.AsyncOpenAI) -> None:
    """The declared 500 ms to the first token give way to what the engine measured."""
    await client.completions.create(model="tiny", prompt="hello", max_tokens=4)
    await asyncio.sleep(0.6)
    ratings = (await service.client.post("/v1/route", json={"prompt": "x"})).json()["ratings"]
    assert next(r for r in ratings if r["expert"] == "tiny")["ttft_ms"] != 500


async def test_slo_header(service: Service) -> None:
    body = {"model": "auto", "messages": user("What is 3 plus 4?"), "max_tokens": 2}
    tight = await service.client.post("/v1/chat/completions", json=body, headers={"x-slo-ttft-ms": "0.001"})
    assert tight.status_code == 200 and tight.headers["x-signalbox-violated"] == "max_ttft_ms"
    for bad in ("soon", "-5", "0", "nan", "inf", ""):
        reply = await service.client.post("/v1/chat/completions", json=body, headers={"x-slo-ttft-ms": bad})
        assert reply.status_code == 400 and reply.json()["error"]["param"] == "x-slo-ttft-ms", bad


# -- cache ---------------------------------------------------------------------------------------------------------


async def test_a_hit_takes_less_than_20_ms(service: Service) -> None:
    body = {"model": "auto", "messages": user(unique("What is")), "temperature": 0, "max_tokens": 16}
    first = await service.client.post("/v1/chat/completions", json=body)
    assert first.headers["x-signalbox-cache"] == "miss"
    times = []
    for _ in range(9):
        started = time.perf_counter()
        reply = await service.client.post("/v1/chat/completions", json=body)
        times.append(time.perf_counter() - started)
        assert reply.headers["x-signalbox-cache"] == "hit" and reply.headers["x-signalbox-attempts"] == "0"
        assert reply.headers["x-signalbox-expert"] == first.headers["x-signalbox-expert"]
        assert reply.json()["choices"] == first.json()["choices"] and reply.json()["usage"] == first.json()["usage"]
    assert min(times) < 0.020
    streamed = await service.client.post("/v1/chat/completions", json=body | {"stream": True})
    assert streamed.headers["x-signalbox-cache"] == "hit" and streamed.text.endswith("data: [DONE]\n\n")
    events = [orjson.loads(e[6:]) for e in streamed.text.split("\n\n") if e.startswith("data: {")]
    text = "".join(e["choices"][0]["delta"].get("content", "") for e in events)
    assert text == first.json()["choices"][0]["message"]["content"]


async def test_logprobs_come_out_of_the_cache_unchanged(service: Service) -> None:
    body = {"model": "tiny", "prompt": unique(), "temperature": 0, "max_tokens": 6, "logprobs": 2, "n": 2}
    first = await service.client.post("/v1/completions", json=body)
    second = await service.client.post("/v1/completions", json=body)
    assert second.headers["x-signalbox-cache"] == "hit" and second.json()["choices"] == first.json()["choices"]


# -- disconnects ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_stops_the_expert(service: Service, stream: bool, n: int) -> None:
    body = {"model": "tiny", "messages": user("hello"), "max_tokens": 8000, "ignore_eos": True, "n": n}
    async with httpx.AsyncClient(base_url=service.url, timeout=60) as client:
        task = asyncio.create_task(client.post("/v1/chat/completions", json=body | {"stream": stream}))
        deadline = time.monotonic() + 10
        while await service.running("tiny") < n:
            assert time.monotonic() < deadline and not task.done()
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await idle(service, "tiny")


async def test_a_client_that_goes_away_before_its_body_is_sent(service: Service) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", int(service.url.rsplit(":", 1)[1]))
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
    await writer.drain()
    writer.close()
    assert (await service.client.get("/healthz")).status_code == 200


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not valid JSON"),
        (b'{"model": "auto", "messages": [}', "line 1 column"),
        (b"[]", "must be a JSON object"),
        (b"\xff\xfe", "not valid JSON"),
    ],
)
async def test_malformed_bodies(service: Service, content: bytes, said: str) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/route"):
        reply = await service.client.post(path, content=content)
        error = reply.json()["error"]
        assert reply.status_code == 400 and said in error["message"]
        assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"


async def test_large_bodies(service: Service) -> None:
    limit = 4 * 1024 * 1024

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(5):
            yield b" " * (1024 * 1024)

    declared = await service.client.post("/v1/chat/completions", content=b" " * (limit + 1))
    chunked = await service.client.post("/v1/chat/completions", content=pieces())
    for reply in (declared, chunked):
        assert reply.status_code == 413 and str(limit) in reply.json()["error"]["message"]


async def test_unknown_routes_and_methods(service: Service) -> None:
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", "/", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/healthz", 405),
        ("GET", "/v1/models/gpt-5", 404),
    ):
        reply = await service.client.request(method, path)
        assert reply.status_code == status, path
        assert bool(reply.headers.get("allow")) == (status == 405)
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
        assert reply.headers["x-request-id"]


async def test_request_ids(service: Service) -> None:
    for given in ("abc-123", "x" * 128):
        reply = await service.client.get("/healthz", headers={"x-request-id": given})
        assert reply.headers.get_list("x-request-id") == [given]
    for odd in ("x" * 129, "a b", "ä".encode("latin-1"), ""):
        reply = await service.client.get("/healthz", headers={"x-request-id": odd})
        assert len(reply.headers["x-request-id"]) == 32


async def no_place_taken(service: Service, expert: str) -> None:
    """Wait until the store says so: places of clients that went away are freed within seconds."""
    async with asyncio.timeout(60):
        while True:
            state = await service.app._store.get(f"admission:queue:{expert}")
            queue = msgpack.unpackb(state) if state is not None else {"running": [], "waiting": []}
            if not queue["running"] and not queue["waiting"]:
                return
            await asyncio.sleep(0.1)


async def test_overload_is_429_with_retry_after(service: Service) -> None:
    await no_place_taken(service, "tiny")
    body = {"model": "tiny", "messages": user("hello"), "max_tokens": 300, "ignore_eos": True}
    replies = await asyncio.gather(*(service.client.post("/v1/chat/completions", json=body) for _ in range(40)))
    codes = [reply.status_code for reply in replies]
    assert set(codes) == {200, 429} and codes.count(200) >= 16
    refused = next(reply for reply in replies if reply.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "queue_full" and refused.json()["error"]["type"] == "rate_limit_error"


async def test_overload_of_one_expert_moves_auto_to_the_other(service: Service) -> None:
    await no_place_taken(service, "tiny")
    body = {"model": "tiny", "messages": user("hello"), "max_tokens": 8000, "ignore_eos": True}
    busy = [asyncio.create_task(service.client.post("/v1/chat/completions", json=body)) for _ in range(30)]
    async with asyncio.timeout(60):
        while True:  # as the store has it: those still on their way do not count
            state = await service.app._store.get("admission:queue:tiny")
            queue = msgpack.unpackb(state) if state is not None else {"running": (), "waiting": ()}
            if (len(queue["running"]), len(queue["waiting"])) == (8, 8):
                break
            await asyncio.sleep(0.005)
    auto = {"model": "auto", "messages": user("What is 3 plus 4?"), "max_tokens": 2}
    reply = await service.client.post("/v1/chat/completions", json=auto)
    for task in busy:
        task.cancel()
    await asyncio.gather(*busy, return_exceptions=True)
    assert reply.status_code == 200
    assert (reply.json()["model"], reply.headers["x-signalbox-attempts"]) == ("wide", "2")
    await idle(service, "tiny")


class FailingExpert:
    """An injected fault: some text, then the expert is gone."""

    async def generate(self, request: GenerateRequest) -> AsyncIterator[list[Chunk]]:
        yield [Chunk("half", [1])]
        raise ExpertUnavailable("expert 'tiny' cannot be reached")


async def test_a_stream_that_breaks_ends_with_an_error_event(
    service: Service, client: openai.AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(service.app._dispatcher._experts, "tiny", FailingExpert())
    body = {"model": "tiny", "messages": user("x"), "stream": True}
    reply = await service.client.post("/v1/chat/completions", json=body, headers={"x-request-id": "broken-1"})
    events = [e for e in reply.text.split("\n\n") if e]
    assert reply.status_code == 200 and '"content":"half"' in events[1]
    error = orjson.loads(events[-1].removeprefix("data: "))["error"]
    assert error["code"] == "expert_unavailable" and error["request_id"] == "broken-1"
    assert "[DONE]" not in reply.text
    with pytest.raises(openai.APIError, match="cannot be reached"):
        async for _ in await client.chat.completions.create(model="tiny", messages=user("x"), stream=True):  # type: ignore[arg-type]
            pass


async def test_our_own_faults_tell_the_id_and_nothing_else(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*_: Any, **__: Any) -> None:  # an injected fault
        raise RuntimeError("secret path /etc/shadow")

    monkeypatch.setattr(service.app._dispatcher, "open", broken)
    body = {"model": "tiny", "messages": user("x")}
    reply = await service.client.post("/v1/chat/completions", json=body, headers={"x-request-id": "fault-1"})
    assert reply.status_code == 500 and "secret" not in reply.text
    assert reply.json()["error"]["code"] == "internal" and reply.json()["error"]["request_id"] == "fault-1"
    assert "secret path" in caplog.text and "fault-1" in caplog.text


# -- about the service ---------------------------------------------------------------------------------------------


async def test_models(client: openai.AsyncOpenAI, service: Service) -> None:
    listed = [model.id async for model in client.models.list()]
    assert listed == ["auto", "auto:bronze", "auto:fresh", "auto:gold", "auto:impossible", "tiny", "wide"]
    model = (await client.models.retrieve("tiny")).model_dump()
    assert model["signalbox"]["price"] == {"input": 0.1, "output": 0.2}
    assert model["signalbox"]["context_length"] == 8192 and model["signalbox"]["state"]["ready"] is True
    assert (await client.models.retrieve("auto:gold")).id == "auto:gold"


async def test_health_readiness_version(service: Service) -> None:
    assert (await service.client.get("/healthz")).json() == {"status": "ok"}
    assert (await service.client.get("/version/")).json()["version"]
    head = await service.client.head("/healthz")
    assert head.status_code == 200 and head.content == b"" and head.headers["content-length"] == "15"
    ready = await service.client.get("/readyz")
    assert ready.status_code == 200 and ready.json()["ready"] and ready.json()["router"] == "ok"
    assert {name: e["ready"] for name, e in ready.json()["experts"].items()} == {"tiny": True, "wide": True}


async def test_not_ready_while_no_expert_is(models: dict[str, Path]) -> None:
    server = EmbeddedValkey()
    try:
        async with serve_gateway(make_config(models), server.start(), {}) as alone:
            reply = await alone.client.get("/readyz")
            assert reply.status_code == 503 and reply.json()["store"] == "ok"
            assert reply.json()["experts"]["tiny"] == {"ready": False, "replicas": 0, "reason": "starting"}
            body = {"model": "auto", "messages": user("x")}
            answer = await alone.client.post("/v1/chat/completions", json=body)
            assert answer.status_code == 503 and answer.headers["retry-after"]
            assert "not ready" in answer.json()["error"]["message"]
    finally:
        server.stop()


async def test_serving_goes_on_without_the_store(models: dict[str, Path], expert_handles: dict[str, Any]) -> None:
    server = EmbeddedValkey()
    try:
        url = server.start()
        server.stop()
        async with serve_gateway(make_config(models), url, expert_handles) as lost:
            body = {"model": "auto", "messages": user("x"), "max_tokens": 4, "temperature": 0}
            for _ in range(2):
                reply = await lost.client.post("/v1/chat/completions", json=body)
                assert reply.status_code == 200 and reply.headers["x-signalbox-cache"] == "miss"
            ready = await lost.client.get("/readyz")
            assert ready.status_code == 503 and "lost" in ready.json()["store"]
    finally:
        server.stop()


async def test_a_broken_router_is_told_and_passed_by(
    models: dict[str, Path], valkey: str, expert_handles: dict[str, Any], tmp_path: Path
) -> None:
    async with serve_gateway(make_config(models, tmp_path), valkey, expert_handles) as gateway:
        assert "ArtifactError" in (await until_ready(gateway))["router"]
        reply = await gateway.client.post("/v1/chat/completions", json={"model": "auto", "messages": user("x")})
        assert reply.status_code == 200 and reply.headers["x-signalbox-router"] == "fallback"


# -- keys ----------------------------------------------------------------------------------------------------------


async def test_api_key(
    models: dict[str, Path], valkey: str, expert_handles: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_KEY", "sesame")
    config = make_config(models, server={"api_key_env": "TEST_KEY"})
    async with serve_gateway(config, valkey, expert_handles) as gateway:
        await until_ready(gateway)  # the probes need no key
        for headers in ({}, {"authorization": "Bearer wrong"}, {"x-api-key": "sesam"}, {"authorization": "sesame"}):
            for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("POST", "/v1/route")):
                reply = await gateway.client.request(method, path, headers=headers)
                assert reply.status_code == 401 and reply.json()["error"]["code"] == "invalid_api_key"
                assert reply.headers["www-authenticate"] == "Bearer" and "sesame" not in reply.text
        for headers in (
            {"authorization": "Bearer sesame"},
            {"authorization": "bearer  sesame"},
            {"x-api-key": "sesame"},
        ):
            assert (await gateway.client.get("/v1/models", headers=headers)).status_code == 200


def test_a_key_that_is_not_set_stops_the_start(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEST_KEY", raising=False)
    config = make_config(models, server={"api_key_env": "TEST_KEY"})
    with pytest.raises(ValueError, match="TEST_KEY, which is not set"):
        GatewayApp(config, "redis://127.0.0.1:1", {})
