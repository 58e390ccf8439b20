"""The remote engine against a real HTTP server on loopback.

The server is a fake of a remote provider, which cannot be had here: it speaks the OpenAI protocol, and does each
thing that a provider may do wrong when the request names that as its model.
"""

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from signalbox.experts.base import (
    Chunk,
    ContextLengthExceeded,
    Engine,
    ExpertError,
    ExpertUnavailable,
    GenerateRequest,
    InvalidRequest,
    QueueFull,
    SamplingParams,
    Unsupported,
)
from signalbox.experts.catalog import OpenAIExpert
from signalbox.experts.openai_engine import OpenAIEngine
from signalbox.experts.openai_wire import EventParser

KEY = "sk-a-secret-that-must-not-leak"
WORDS = ["Points", " are", " set", " for", " line", " 2 — ", "grün."]


@dataclass
class Upstream:
    """The fake provider: what it was asked, by whom, and what it noticed."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    ports: list[int] = field(default_factory=list)
    authorization: list[str | None] = field(default_factory=list)
    streaming: int = 0
    disconnects: int = 0
    release: threading.Event = field(default_factory=threading.Event)


def event(data: Any) -> bytes:
    return b"data: " + orjson.dumps(data) + b"\n\n"


def delta(index: int = 0, finish: str | None = None, **fields: Any) -> bytes:
    return event({"choices": [{"index": index, "delta": fields, "finish_reason": finish}]})


def text(piece: str, finish: str | None = None, **fields: Any) -> bytes:
    return event({"choices": [{"index": 0, "text": piece, "finish_reason": finish, **fields}]})


USAGE = event(
    {
        "choices": [],
        "usage": {"prompt_tokens": 11, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 4}},
    }
)
DONE = b"data: [DONE]\n\n"

REFUSALS: dict[str, tuple[int, Any, dict[str, str]]] = {
    "401": (401, {"error": {"message": f"Incorrect API key provided: {KEY}"}}, {}),
    "403": (403, {"error": {"message": f"{KEY} may not"}}, {}),
    "400": (400, {"error": {"message": f"top_p is odd, {KEY}", "param": "top_p", "code": "odd"}}, {}),
    "422": (422, {"detail": [{"loc": ["body", "messages"], "msg": "too few"}]}, {}),
    "context": (400, {"error": {"message": "too long", "param": "messages", "code": "context_length_exceeded"}}, {}),
    "404": (404, {"error": {"message": "no such model"}}, {}),
    "429": (429, {"error": {"message": "slow down"}}, {"retry-after": "7"}),
    "500": (500, {"error": "out of order"}, {}),
    "302": (302, {}, {"location": "http://127.0.0.1:9/elsewhere"}),
}


async def answer(upstream: Upstream, request: Request) -> Response:
    body = orjson.loads(await request.body())
    upstream.bodies.append(body)
    upstream.authorization.append(request.headers.get("authorization"))
    assert request.client is not None
    upstream.ports.append(request.client.port)
    model, chat = body["model"], request.url.path.endswith("/chat/completions")

    if model in REFUSALS:
        status, content, headers = REFUSALS[model]
        return JSONResponse(content, status, headers)
    if model == "html error":
        return PlainTextResponse("<html>" + "very bad gateway " * 100_000, 502)
    if model == "strict" and "stream_options" in body:
        return JSONResponse({"error": {"message": "Unrecognized request argument: stream_options"}}, 400)
    if model == "strict" and "max_tokens" in body:
        return JSONResponse({"error": {"message": "use 'max_completion_tokens' instead", "param": "max_tokens"}}, 400)
    if model == "silent before":
        while not await request.is_disconnected():
            await asyncio.sleep(0.01)
        return Response()
    if model == "not streamed":
        message = {"role": "assistant", "content": "All at once."}
        usage = {"prompt_tokens": 3, "completion_tokens": 4}
        return JSONResponse({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage})

    async def stream() -> AsyncIterator[bytes]:
        upstream.streaming += 1
        try:
            async for piece in pieces():
                yield piece
        except asyncio.CancelledError:
            upstream.disconnects += 1
            raise
        finally:
            upstream.streaming -= 1

    async def pieces() -> AsyncIterator[bytes]:
        yield b": a comment, as some providers send them to keep the connection\n\n"
        if not chat:
            for word in WORDS[:-1]:
                yield text(word)
            last = {"tokens": [WORDS[-1]], "token_logprobs": [-0.5], "top_logprobs": [{"x": -2.0, WORDS[-1]: -0.5}]}
            yield text(WORDS[-1], "length", logprobs=last)
            yield USAGE + DONE
            return
        yield delta(role="assistant", content="")
        if model == "tools":
            call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "points", "arguments": ""}}
            yield delta(tool_calls=[call], refusal=None)
            yield delta(tool_calls=[{"index": 0, "function": {"arguments": '{"line": 2}'}}])
            yield delta(reasoning_content="because")
            yield delta(finish="tool_calls") + USAGE + DONE
            return
        for number, word in enumerate(WORDS):
            if number == 3 and model == "cut":
                raise ConnectionError("the fake provider breaks the connection")
            if number == 3 and model == "ends early":
                return
            if number == 3 and model == "error within":
                yield event({"error": {"message": f"overloaded {KEY}", "code": 529}})
                return
            if number == 3 and model == "silent within":
                await asyncio.sleep(60)
            if number == 3 and model == "held":
                while not upstream.release.is_set():
                    await asyncio.sleep(0.01)
            if number == 3 and model == "garbage":
                yield b"data: {not json\n\n"
            yield delta(content=word)
            if model == "slow":
                await asyncio.sleep(0.02)
            if model == "forever":
                async for piece in endless():
                    yield piece
        final = delta(finish="stop") + (b"" if model in ("no usage", "strict") else USAGE)
        if model == "bytewise":
            for byte in final.replace(b"\n", b"\r\n"):
                yield bytes([byte])
            yield b"data: [DONE]"  # and no end of line
            return
        yield final + (b"" if model == "no done" else DONE)

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield delta(content="and ")
            await asyncio.sleep(0.01)

    return StreamingResponse(stream(), media_type="text/event-stream; charset=utf-8")


@pytest.fixture(scope="module")
def server() -> Iterator[Upstream]:
    upstream = Upstream()

    async def endpoint(request: Request) -> Response:
        return await answer(upstream, request)

    routes = [Route(f"/v1/{path}", endpoint, methods=["POST"]) for path in ("chat/completions", "completions")]
    listener = socket.create_server(("127.0.0.1", 0))
    upstream.url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    running = uvicorn.Server(
        uvicorn.Config(Starlette(routes=routes), log_level="critical", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    yield upstream
    upstream.release.set()
    running.should_exit = True
    thread.join()


@pytest.fixture
def upstream(server: Upstream) -> Upstream:
    while server.streaming:  # to one that has gone
        time.sleep(0.01)
    server.bodies.clear()
    server.ports.clear()
    server.authorization.clear()
    server.disconnects = 0
    server.release.clear()
    return server


@contextlib.asynccontextmanager
async def engine(upstream: Upstream, model: str = "m", **config: Any) -> AsyncIterator[OpenAIEngine]:
    config = {"base_url": upstream.url, "timeout_s": 10, "api_key_env": "TEST_UPSTREAM_KEY"} | config
    made = OpenAIEngine("remote", OpenAIExpert(engine="openai", model=model, **config))
    await made.start()
    try:
        yield made
    finally:
        await made.close()


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_UPSTREAM_KEY", KEY)


def chat(**fields: Any) -> GenerateRequest:
    return GenerateRequest("r1", messages=[{"role": "user", "content": "Which line?"}], **fields)


async def collect(engine: OpenAIEngine, request: GenerateRequest) -> list[Chunk]:
    return [chunk async for chunk in engine.generate(request)]


async def refused(upstream: Upstream, model: str, **config: Any) -> ExpertError:
    async with engine(upstream, model, **config) as remote:
        with pytest.raises(ExpertError) as caught:
            await collect(remote, chat())
        assert remote.state().running == remote.state().waiting == 0
    assert KEY not in str(caught.value) + repr(caught.value) + str(caught.value.__cause__)
    return caught.value


async def until(condition: Any) -> None:
    """Wait for what happens on the server's side."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def test_chat_streams_word_by_word_and_ends_with_reason_and_usage(upstream: Upstream) -> None:
    async with engine(upstream, "held") as remote:
        assert isinstance(remote, Engine)
        assert remote.state().ttft_ms is None
        stream = remote.generate(chat())
        chunks = [await anext(stream) for _ in range(3)]  # the server holds the rest back: these came by themselves
        assert remote.state().running == 1
        upstream.release.set()
        chunks += [chunk async for chunk in stream]
        state = remote.state()
    assert [chunk.text for chunk in chunks] == [*WORDS, ""]
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * len(WORDS)
    assert chunks[-1].finish_reason == "stop"
    usage = chunks[-1].usage
    assert usage is not None and (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (11, 7, 4)
    assert state.running == 0 and state.ttft_ms is not None and state.tpot_ms is not None
    assert state.ttft_ms > 0 and state.tpot_ms > 0


async def test_speed_is_a_moving_average(upstream: Upstream) -> None:
    async with engine(upstream, "slow") as remote:
        for _ in range(3):
            await collect(remote, chat())
        state = remote.state()
    assert state.tpot_ms is not None and state.ttft_ms is not None
    assert state.tpot_ms > 5, "20 ms after each word, less where a pause made several arrive at once"


async def test_text_completion_with_logprobs(upstream: Upstream) -> None:
    async with engine(upstream) as remote:
        chunks = await collect(remote, GenerateRequest("r", prompt="Once", sampling=SamplingParams(logprobs=2)))
    assert "".join(chunk.text for chunk in chunks) == "".join(WORDS)
    assert chunks[-1].finish_reason == "length"
    (logprob,) = chunks[-2].logprobs
    assert (logprob.token, logprob.logprob) == (WORDS[-1], -0.5)
    assert [top[:2] for top in logprob.top] == [(WORDS[-1], -0.5), ("x", -2.0)]
    assert upstream.bodies[0]["prompt"] == "Once" and upstream.bodies[0]["logprobs"] == 2
    assert "messages" not in upstream.bodies[0]


async def test_request_carries_what_was_set_and_nothing_else(upstream: Upstream) -> None:
    async with engine(upstream) as remote:
        await collect(remote, chat())
        sampling = SamplingParams(
            max_tokens=5, temperature=0.0, top_p=0.9, top_k=3, seed=1, stop=("\n",), logprobs=0, logit_bias={7: -1.0}
        )
        await collect(remote, chat(sampling=sampling, extra={"tools": [{"type": "function"}], "model": "other"}))
    plain, full = upstream.bodies
    assert plain == {
        "model": "m",
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [{"role": "user", "content": "Which line?"}],
    }
    assert full == plain | {
        "max_tokens": 5,
        "temperature": 0.0,
        "top_p": 0.9,
        "top_k": 3,
        "seed": 1,
        "stop": ["\n"],
        "logprobs": True,
        "top_logprobs": 0,
        "logit_bias": {"7": -1.0},
        "tools": [{"type": "function"}],
    }
    assert upstream.authorization == [f"Bearer {KEY}"] * 2


async def test_connection_is_used_again(upstream: Upstream) -> None:
    async with engine(upstream) as remote:
        for _ in range(5):
            await collect(remote, chat())
    # One, unless a busy machine takes longer than the engine waits for a reply's last byte.
    assert len(upstream.ports) == 5 and len(set(upstream.ports)) <= 2


async def test_tool_calls_and_unknown_fields_are_carried(upstream: Upstream) -> None:
    async with engine(upstream, "tools") as remote:
        chunks = await collect(remote, chat())
    assert chunks[0].extra["tool_calls"][0]["function"]["name"] == "points"
    assert chunks[1].extra == {"tool_calls": [{"index": 0, "function": {"arguments": '{"line": 2}'}}]}
    assert chunks[2].extra == {"reasoning_content": "because"}
    assert all("refusal" not in chunk.extra and "role" not in chunk.extra for chunk in chunks)
    assert chunks[-1].finish_reason == "tool_calls"


@pytest.mark.parametrize("model", ["bytewise", "no done"])
async def test_sloppy_framing_is_understood(upstream: Upstream, model: str) -> None:
    async with engine(upstream, model) as remote:
        chunks = await collect(remote, chat())
    assert "".join(chunk.text for chunk in chunks) == "".join(WORDS)
    assert chunks[-1].finish_reason == "stop" and chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == 11


async def test_reply_that_is_not_streamed(upstream: Upstream) -> None:
    async with engine(upstream, "not streamed") as remote:
        chunks = await collect(remote, chat())
    assert [chunk.text for chunk in chunks] == ["All at once.", ""]
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 4


async def test_usage_is_estimated_where_none_comes(upstream: Upstream) -> None:
    async with engine(upstream, "no usage", bytes_per_token=4.0) as remote:
        chunks = await collect(remote, chat())
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == 3  # 11 bytes
    assert chunks[-1].usage.completion_tokens == -(-len("".join(WORDS).encode()) // 4)


async def test_fields_that_an_upstream_refuses_are_left_out_from_then_on(upstream: Upstream) -> None:
    async with engine(upstream, "strict") as remote:
        for _ in range(2):
            chunks = await collect(remote, chat(sampling=SamplingParams(max_tokens=9)))
            assert "".join(chunk.text for chunk in chunks) == "".join(WORDS) and chunks[-1].usage is not None
    assert len(upstream.bodies) == 3 + 1
    assert "stream_options" not in upstream.bodies[-1] and "max_tokens" not in upstream.bodies[-1]
    assert upstream.bodies[-1]["max_completion_tokens"] == 9


@pytest.mark.parametrize(
    ("model", "kind", "status", "code", "says"),
    [
        ("401", ExpertUnavailable, 503, "expert_unavailable", "credentials refused"),
        ("403", ExpertUnavailable, 503, "expert_unavailable", "TEST_UPSTREAM_KEY"),
        ("400", InvalidRequest, 400, "odd", "top_p is odd, ***"),
        ("422", InvalidRequest, 400, "invalid_request", "too few"),
        ("context", ContextLengthExceeded, 400, "context_length_exceeded", "too long"),
        ("404", ExpertUnavailable, 503, "expert_unavailable", "no such model"),
        ("429", QueueFull, 429, "upstream_rate_limited", "try again in 7 s"),
        ("500", ExpertUnavailable, 503, "expert_unavailable", "out of order"),
        ("302", ExpertUnavailable, 503, "expert_unavailable", "302"),
        ("html error", ExpertUnavailable, 503, "expert_unavailable", "very bad gateway"),
    ],
)
async def test_refusals(upstream: Upstream, model: str, kind: type, status: int, code: str, says: str) -> None:
    error = await refused(upstream, model)
    assert type(error) is kind and (error.status, error.code) == (status, code)
    assert says in error.message and len(error.message) < 700
    assert error.retryable is not isinstance(error, InvalidRequest)
    if model == "400":
        assert error.param == "top_p"


@pytest.mark.parametrize("model", ["cut", "ends early", "error within", "garbage"])
async def test_stream_cut_in_the_middle_fails_after_what_came(upstream: Upstream, model: str) -> None:
    texts = []
    async with engine(upstream, model) as remote:
        with pytest.raises(ExpertUnavailable) as caught:
            async for chunk in remote.generate(chat()):
                texts.append(chunk.text)  # noqa: PERF401 - extend() would lose what came before the error
        assert remote.state().running == 0
    assert texts == WORDS[:3]
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("model", ["silent before", "silent within"])
async def test_silence_is_not_waited_for(upstream: Upstream, model: str) -> None:
    started = time.perf_counter()
    error = await refused(upstream, model, timeout_s=0.3)
    assert isinstance(error, ExpertUnavailable) and error.code == "upstream_timeout"
    assert time.perf_counter() - started < 30


async def test_unreachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:  # a port that nobody listens on after this
        port = taken.getsockname()[1]
    error = await refused(Upstream(url=f"http://127.0.0.1:{port}/v1"), "m")
    assert isinstance(error, ExpertUnavailable) and "cannot be reached" in error.message


@pytest.mark.parametrize("way", ["close the iterator", "cancel the task"])
async def test_server_notices_a_cancelled_request_at_once(upstream: Upstream, way: str) -> None:
    async with engine(upstream, "forever") as remote:
        stream = remote.generate(chat())
        if way == "close the iterator":
            await anext(stream)
            assert remote.state().running == 1
            await stream.aclose()  # type: ignore[attr-defined]
        else:
            task = asyncio.create_task(collect(remote, chat()))
            await until(lambda: upstream.streaming == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await until(lambda: upstream.disconnects == 1 and upstream.streaming == 0)
        assert remote.state().running == 0


async def test_queue_is_bounded_and_served_in_order(upstream: Upstream) -> None:
    async with engine(upstream, "held", max_running=1, max_waiting=2) as remote:
        finished: list[int] = []

        async def one(number: int) -> None:
            await collect(remote, chat())
            finished.append(number)

        tasks = []
        for number in range(3):
            tasks.append(asyncio.create_task(one(number)))
            await until(lambda n=number: remote.state().running + remote.state().waiting == n + 1)
        assert (remote.state().running, remote.state().waiting) == (1, 2)
        with pytest.raises(QueueFull) as caught:
            await collect(remote, chat())
        assert caught.value.status == 429 and caught.value.code == "queue_full"
        tasks[1].cancel()
        await until(lambda: remote.state().waiting == 1)
        upstream.release.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert finished == [0, 2]
        assert (remote.state().running, remote.state().waiting) == (0, 0)


async def test_many_at_once_keep_apart(upstream: Upstream) -> None:
    async with engine(upstream, "slow", max_running=8) as remote:
        answers = await asyncio.gather(*(collect(remote, chat()) for _ in range(24)))
    assert all("".join(chunk.text for chunk in chunks) == "".join(WORDS) for chunks in answers)
    assert len(set(upstream.ports)) <= 16  # 8, unless a pause kept some replies from being read to their end


async def test_close_aborts_what_runs(upstream: Upstream) -> None:
    async with engine(upstream, "forever", max_running=1) as remote:
        running, waiting = (asyncio.create_task(collect(remote, chat())) for _ in range(2))
        await until(lambda: upstream.streaming == 1 and remote.state().waiting == 1)
        await remote.close()
        for task in (running, waiting):
            with pytest.raises(ExpertUnavailable, match="not running"):
                await asyncio.wait_for(task, 5)
        await until(lambda: upstream.streaming == 0)
        assert not remote.state().healthy
        with pytest.raises(ExpertUnavailable, match="not running"):
            await collect(remote, chat())


async def test_key_is_read_at_start(monkeypatch: pytest.MonkeyPatch, upstream: Upstream) -> None:
    for value in ("", "  "):
        monkeypatch.setenv("TEST_UPSTREAM_KEY", value)
        with pytest.raises(ExpertUnavailable, match="TEST_UPSTREAM_KEY"):
            async with engine(upstream):
                pass
    monkeypatch.setenv("TEST_UPSTREAM_KEY", f"{KEY}\nx-injected: 1")
    with pytest.raises(ExpertUnavailable, match="not printable") as caught:
        async with engine(upstream):
            pass
    assert KEY not in str(caught.value)
    async with engine(upstream, api_key_env=None) as remote:
        await collect(remote, chat())
    assert upstream.authorization == [None]


async def test_address_without_a_host(upstream: Upstream) -> None:
    with pytest.raises(ExpertUnavailable, match="base_url"):
        async with engine(upstream, base_url="http://"):
            pass


async def test_key_stays_out_of_the_logs(upstream: Upstream, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        async with engine(upstream) as remote:
            await collect(remote, chat())
        for model in ("401", "400", "500", "cut", "error within"):
            async with engine(upstream, model) as remote:
                with pytest.raises(ExpertError) as caught:
                    await collect(remote, chat())
                logging.getLogger("test").error("failed", exc_info=caught.value)
    assert "HTTP Request: POST" in caplog.text, "nothing was logged, so nothing was tested"
    assert KEY not in caplog.text


async def test_what_a_remote_model_cannot_do(upstream: Upstream) -> None:
    async with engine(upstream) as remote:
        with pytest.raises(Unsupported):
            await remote.score(chat(), "Line 2.")
        with pytest.raises(Unsupported):
            await remote.load("a", "/nowhere")
        with pytest.raises(Unsupported):
            await remote.unload("a")
        assert list(remote.adapters()) == []
        for request in (chat(adapter="a"), chat(extra={"n": 2})):
            with pytest.raises(Unsupported):
                await collect(remote, request)
        for request in (GenerateRequest("r"), chat(prompt="both"), chat(extra={"x": object()})):
            with pytest.raises(InvalidRequest):
                await collect(remote, request)
    assert upstream.bodies == []


def test_events_survive_any_cut_of_the_bytes() -> None:
    stream = b': c\r\n\r\nevent: x\r\ndata: {"a":\r\ndata: 1}\r\n\r\ndata:2\n\n\n\ndata: \xc3\xbc\n\n'
    for first in range(len(stream)):
        for second in range(first, len(stream)):
            parser = EventParser()
            blocks = (stream[:first], stream[first:second], stream[second:])
            assert [data for block in blocks for data in parser.feed(block)] == [b'{"a":\n1}', b"2", "ü".encode()]


def test_events_are_bounded() -> None:
    parser = EventParser()
    with pytest.raises(ExpertUnavailable, match="exceeds"):
        for _ in range(100):
            list(parser.feed(b"x" * (1 << 20)))
    parser = EventParser()
    with pytest.raises(ExpertUnavailable, match="exceeds"):
        for _ in range(100):
            list(parser.feed(b"data: " + b"x" * (1 << 20) + b"\n"))
