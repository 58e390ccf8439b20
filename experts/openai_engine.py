"""A remote model behind any OpenAI-compatible address, as an engine.

Protocol: the OpenAI API reference, "Create chat completion" and "Create completion" with `stream`.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import orjson

from signalbox.experts.base import (
    Chunk,
    ContextLengthExceeded,
    EngineState,
    ExpertError,
    ExpertUnavailable,
    GenerateRequest,
    InvalidRequest,
    QueueFull,
    Score,
    Unsupported,
    Usage,
)
from signalbox.experts.catalog import OpenAIExpert
from signalbox.experts.openai_wire import EventParser, read_error, read_logprobs, read_usage
from signalbox.experts.speed import Speed

_MAX_ERROR = 64 << 10  # bytes read of an error reply
_MAX_MESSAGE = 500  # characters handed on of the upstream's message
_CONNECT_S = 10.0
_DONE = b"[DONE]"
_DRAIN_S = 0.2  # wait for the end of a reply after [DONE]: a connection read to its end can be used again


@dataclass(slots=True)
class _Answer:
    """What is known so far of one request's answer; a `Timed` for the moving averages."""

    arrived: float = field(default_factory=time.perf_counter)
    first_token_at: float | None = None
    last_token_at: float | None = None
    text_bytes: int = 0
    finish_reason: str | None = None
    usage: Usage | None = None

    @property
    def generated(self) -> int:
        return self.usage.completion_tokens if self.usage else 0


class OpenAIEngine:
    """`Engine` over HTTP: one pooled client, and a place of `max_running` for each request in flight.

    Closing `generate`'s iterator, or cancelling the task that reads it, closes the upstream connection at once;
    that is how OpenAI-compatible servers learn that an answer is no longer wanted.
    """

    def __init__(self, name: str, config: OpenAIExpert) -> None:
        self.name = name
        self._config = config
        self._client: httpx.AsyncClient | None = None
        self._key: str | None = None
        self._places = asyncio.Semaphore(config.max_running)
        self._running = 0
        self._waiting = 0
        self._replies: set[httpx.Response] = set()
        self._speed = Speed()
        # What this upstream accepts, learnt from its refusals.
        self._stream_options = True
        self._max_tokens = "max_tokens"

    async def start(self) -> None:
        """Read the key and open the pool. The upstream is not called: its outage need not delay a start.

        Raises `ExpertUnavailable` when the key's environment variable is not set or the address is none.
        """
        config = self._config
        headers = {"accept": "text/event-stream", "content-type": "application/json", "accept-encoding": "identity"}
        if config.api_key_env is not None:
            self._key = os.environ.get(config.api_key_env, "").strip()
            if not self._key:
                raise ExpertUnavailable(f"{self.name}: the environment variable {config.api_key_env} holds no API key")
            if not (self._key.isascii() and self._key.isprintable()):
                raise ExpertUnavailable(f"{self.name}: the API key in {config.api_key_env} is not printable ASCII")
            headers["authorization"] = f"Bearer {self._key}"
        try:
            if not httpx.URL(config.base_url).host:
                raise httpx.InvalidURL("no host")
        except httpx.InvalidURL as error:
            raise ExpertUnavailable(f"{self.name}: base_url is no address: {error}") from None
        self._client = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(config.timeout_s, connect=min(_CONNECT_S, config.timeout_s), pool=None),
            limits=httpx.Limits(max_connections=config.max_running, max_keepalive_connections=config.max_running),
        )

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """Answer one request; see `Engine.generate`. Usage is estimated where the upstream reports none.

        Raises `InvalidRequest` with the upstream's message for what it calls the client's fault, `QueueFull`
        for its 429 (code `upstream_rate_limited`) and for too many requests here, `ExpertUnavailable` for 5xx,
        refused credentials, silence and lost connections; the latter also after the chunks that came, when an
        answer is cut in the middle.
        """
        _check(request)
        answer, events = _Answer(), EventParser()
        with self._translated():
            async with self._place(), self._reply(request) as response:
                streamed = response.headers.get("content-type", "").partition(";")[0].strip() != "application/json"
                blocks = response.aiter_bytes()
                ended = False
                async for block in blocks:
                    for data in events.feed(block) if streamed else events.gather(block):
                        if ended := data == _DONE:
                            break
                        if chunk := self._chunk(data, answer):
                            yield chunk
                    if ended:
                        break
                if ended:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(_DRAIN_S):
                            async for _ in blocks:
                                pass
                elif rest := events.rest():
                    ended = rest == _DONE
                    if not ended and (chunk := self._chunk(rest, answer)):
                        yield chunk
                if not ended and answer.finish_reason is None:
                    raise ExpertUnavailable(f"{self.name}: the upstream cut its answer short", code="upstream_cut")
        answer.usage = answer.usage or self._estimate(request, answer)
        self._speed.finished(answer)
        yield Chunk(finish_reason=answer.finish_reason or "stop", usage=answer.usage)

    async def score(self, request: GenerateRequest, reference: str) -> Score:
        """Raises `Unsupported`: bits per byte need the likelihood of a given text, which this API does not tell."""
        raise Unsupported(f"{self.name} is a remote model; scoring a reference needs local likelihoods")

    async def load(self, name: str, path: str) -> None:
        """Raises `Unsupported`."""
        raise Unsupported(f"{self.name} is a remote model and takes no adapters", param="model")

    async def unload(self, name: str) -> None:
        """Raises `Unsupported`."""
        raise Unsupported(f"{self.name} is a remote model and has no adapters", param="model")

    def adapters(self) -> Sequence[str]:
        """None, ever."""
        return ()

    def state(self) -> EngineState:
        """Requests in flight and queued here, and the speed that this side sees, queueing included."""
        return EngineState(
            running=self._running,
            waiting=self._waiting,
            max_running=self._config.max_running,
            max_waiting=self._config.max_waiting,
            ttft_ms=self._speed.ttft_ms,
            tpot_ms=self._speed.tpot_ms,
            healthy=self._client is not None,
        )

    async def close(self) -> None:
        """Close every connection. Requests in flight and queued fail with `ExpertUnavailable`."""
        client, self._client = self._client, None
        for reply in list(self._replies):
            await reply.aclose()
        if client is not None:
            await client.aclose()

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        """A place among the requests in flight, waited for in order of arrival."""
        if self._places.locked():
            if self._waiting >= self._config.max_waiting:
                raise QueueFull(f"{self.name}: {self._running} requests run and {self._waiting} wait; try again later")
            self._waiting += 1
            try:
                await self._places.acquire()
            finally:
                self._waiting -= 1
        else:
            await self._places.acquire()
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            self._places.release()

    @asynccontextmanager
    async def _reply(self, request: GenerateRequest) -> AsyncIterator[httpx.Response]:
        """The upstream's reply to a request, its head read. Closed, with its connection, if left unread."""
        response = await self._send(request)
        self._replies.add(response)
        try:
            yield response
        finally:
            self._replies.discard(response)
            await response.aclose()

    async def _send(self, request: GenerateRequest) -> httpx.Response:
        url = self._config.base_url + ("/completions" if request.messages is None else "/chat/completions")
        while True:
            if self._client is None:
                raise ExpertUnavailable(f"{self.name} is not running")
            body = self._body(request)
            try:
                content = orjson.dumps(body)
            except TypeError as error:
                raise InvalidRequest(f"the request is no JSON: {error}") from None
            response = await self._client.send(self._client.build_request("POST", url, content=content), stream=True)
            if response.is_success:
                return response
            reply = b""
            try:
                async for block in response.aiter_bytes():
                    reply += block
                    if len(reply) > _MAX_ERROR:
                        break
            finally:
                await response.aclose()
            # Each round drops one field of this body, so that there are three at most.
            if response.status_code in (400, 422) and b"stream_options" in reply and "stream_options" in body:
                self._stream_options = False
            elif response.status_code in (400, 422) and b"max_completion_tokens" in reply and "max_tokens" in body:
                self._max_tokens = "max_completion_tokens"
            else:
                raise self._refusal(response, reply)

    def _body(self, request: GenerateRequest) -> dict[str, Any]:
        """The upstream's request: what the client set, and nothing that is a default anyway."""
        sampling, chat = request.sampling, request.messages is not None
        body = {**request.extra, "model": self._config.model, "stream": True}
        body.pop("stream_options", None)
        if self._stream_options:
            body["stream_options"] = {"include_usage": True}
        if chat:
            body["messages"] = request.messages
        else:
            body["prompt"] = request.prompt if request.prompt is not None else request.prompt_token_ids
        if sampling.max_tokens is not None:
            body[self._max_tokens if chat else "max_tokens"] = sampling.max_tokens
        if sampling.temperature != 1.0:
            body["temperature"] = sampling.temperature
        if sampling.top_p != 1.0:
            body["top_p"] = sampling.top_p
        if sampling.top_k:
            body["top_k"] = sampling.top_k
        if sampling.seed is not None:
            body["seed"] = sampling.seed
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if sampling.logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": sampling.logprobs} if chat else {"logprobs": sampling.logprobs}
        if sampling.presence_penalty:
            body["presence_penalty"] = sampling.presence_penalty
        if sampling.frequency_penalty:
            body["frequency_penalty"] = sampling.frequency_penalty
        if sampling.logit_bias:
            body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
        if sampling.ignore_eos:
            body["ignore_eos"] = True
        return body

    def _chunk(self, data: bytes, answer: _Answer) -> Chunk | None:
        """What one event says, None if nothing to hand on; its finish reason and usage go to the last chunk."""
        try:
            event = orjson.loads(data)
            if error := event.get("error"):
                message = error.get("message") if isinstance(error, dict) else error
                raise ExpertUnavailable(f"{self.name}: the upstream failed: {self._clean(str(message))}")
            if usage := event.get("usage"):
                answer.usage = read_usage(usage)
            choice = next((choice for choice in event.get("choices") or () if choice.get("index", 0) == 0), None)
            if choice is None:
                return None
            answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
            delta = choice.get("delta") or choice.get("message") or {}
            chunk = Chunk(
                text=delta.get("content") or choice.get("text") or "",
                logprobs=read_logprobs(choice.get("logprobs") or {}),
                extra={key: value for key, value in delta.items() if key not in ("role", "content") and value},
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ExpertUnavailable(
                f"{self.name}: the upstream does not speak the OpenAI protocol ({type(error).__name__})",
                code="upstream_malformed",
            ) from None
        if not (chunk.text or chunk.extra or chunk.logprobs):
            return None
        answer.last_token_at = time.perf_counter()
        answer.first_token_at = answer.first_token_at or answer.last_token_at
        answer.text_bytes += len(chunk.text.encode("utf-8", "surrogatepass"))
        return chunk

    def _estimate(self, request: GenerateRequest, answer: _Answer) -> Usage:
        """Token counts from byte counts, for an upstream that reports none."""
        if request.prompt_token_ids is not None:
            prompt = len(request.prompt_token_ids)
        else:
            texts = [request.prompt] if request.messages is None else [m.get("content") for m in request.messages]
            size = sum(len(text.encode()) for text in texts if isinstance(text, str))
            prompt = math.ceil(size / self._config.bytes_per_token)
        return Usage(prompt, math.ceil(answer.text_bytes / self._config.bytes_per_token))

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """httpx's errors as ours. Their cause is dropped: it carries the request, and that the key."""
        try:
            yield
        except ExpertError:
            raise
        except httpx.ConnectTimeout:
            raise ExpertUnavailable(f"{self.name}: the upstream cannot be reached (timeout)") from None
        except httpx.TimeoutException:
            silence = f"{self._config.timeout_s:g} s"
            raise ExpertUnavailable(
                f"{self.name}: no word of the upstream in {silence}", code="upstream_timeout"
            ) from None
        except (httpx.HTTPError, httpx.StreamError, OSError) as error:
            if self._client is None:
                raise ExpertUnavailable(f"{self.name} is not running") from None
            reached = "cannot be reached" if isinstance(error, httpx.ConnectError) else "broke the connection"
            raise ExpertUnavailable(f"{self.name}: the upstream {reached} ({type(error).__name__})") from None

    def _refusal(self, response: httpx.Response, reply: bytes) -> ExpertError:
        """The error that an upstream's status means, with its message where that is for the client."""
        status, config = response.status_code, self._config
        message, param, code = read_error(reply)
        message = self._clean(message) or response.reason_phrase or "no message"
        if status in (401, 403):  # upstreams quote the key in these messages
            where = config.api_key_env or "none: set api_key_env"
            return ExpertUnavailable(f"{self.name}: credentials refused by the upstream (key: {where})")
        if status == 429:
            after = response.headers.get("retry-after", "")
            wait = f"; try again in {after} s" if after.isdigit() else ""
            return QueueFull(
                f"{self.name}: the upstream limits its rate: {message}{wait}", code="upstream_rate_limited"
            )
        if code == "context_length_exceeded":
            return ContextLengthExceeded(message, param=param)
        if status in (402, 404, 405, 408) or not 400 <= status < 500:  # no request of this client's would do
            return ExpertUnavailable(f"{self.name}: the upstream answered {status}: {message}")
        return InvalidRequest(f"{self.name}: {message}", param=param, code=code)

    def _clean(self, message: str) -> str:
        """An upstream's message, on one line, short, and without the key."""
        if self._key:
            message = message.replace(self._key, "***")
        message = " ".join(message.split())
        return message if len(message) <= _MAX_MESSAGE else message[:_MAX_MESSAGE] + "…"


def _check(request: GenerateRequest) -> None:
    if request.adapter is not None:
        raise Unsupported("a remote model takes no adapters", param="model")
    if request.extra.get("n") not in (None, 1):
        raise Unsupported("n must be 1: one answer for each request", param="n")
    if sum(form is not None for form in (request.messages, request.prompt, request.prompt_token_ids)) != 1:
        raise InvalidRequest("exactly one of messages, prompt and prompt_token_ids must be given")
