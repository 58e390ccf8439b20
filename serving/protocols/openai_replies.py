"""OpenAI's reply objects: `chat.completion`, `text_completion`, their stream chunks, usage, logprobs, errors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from signalbox.experts.base import Chunk, ExpertError, TokenLogprob, Usage
from signalbox.serving.protocols.openai import Kind

DONE = b"data: [DONE]\n\n"

# OpenAI's error types by status; other 4xx are `invalid_request_error`, other 5xx `server_error`.
_ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


@dataclass(slots=True)
class Choice:
    """One finished answer. `extra` holds message fields that only remote experts fill, e.g. tool calls."""

    text: str
    finish_reason: str
    logprobs: list[TokenLogprob] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Answer:
    """What an expert answered to one `Call`, every choice of it."""

    choices: list[Choice]
    usage: Usage


class AnswerBuilder:
    """Gathers the chunks of all choices of one call, `n` for each prompt, in any order between choices."""

    def __init__(self, choices: int, n: int) -> None:
        self._n = n
        self._texts: list[list[str]] = [[] for _ in range(choices)]
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in range(choices)]
        self._extras: list[dict[str, Any]] = [{} for _ in range(choices)]
        self._reasons: list[str | None] = [None] * choices
        self._usages: list[Usage | None] = [None] * choices

    def add(self, index: int, chunks: Iterable[Chunk]) -> None:
        """Take the next chunks of choice `index`."""
        for chunk in chunks:
            if chunk.text:
                self._texts[index].append(chunk.text)
            if chunk.logprobs:
                self._logprobs[index].extend(chunk.logprobs)
            if chunk.extra:
                _merge_delta(self._extras[index], chunk.extra)
            if chunk.finish_reason is not None:
                self._reasons[index] = chunk.finish_reason
            if chunk.usage is not None:
                self._usages[index] = chunk.usage

    @property
    def complete(self) -> bool:
        """Whether every choice has come to its end."""
        return None not in self._reasons

    def usage(self) -> Usage:
        """Tokens so far: a prompt counts once however many choices it has, as OpenAI bills it."""
        per_prompt = [usage for usage in self._usages[:: self._n] if usage]
        return Usage(
            prompt_tokens=sum(usage.prompt_tokens for usage in per_prompt),
            completion_tokens=sum(usage.completion_tokens for usage in self._usages if usage),
            cached_tokens=sum(usage.cached_tokens for usage in per_prompt),
        )

    def answer(self) -> Answer:
        """The whole answer; a choice whose stream ended without a reason counts as `stop`."""
        choices = [
            Choice("".join(texts), reason or "stop", logprobs, extra)
            for texts, reason, logprobs, extra in zip(
                self._texts, self._reasons, self._logprobs, self._extras, strict=True
            )
        ]
        return Answer(choices, self.usage())


def reply(kind: Kind, answer: Answer, *, reply_id: str, created: int, model: str, logprobs: bool) -> bytes:
    """The body of a reply that is not streamed. `logprobs`: whether the request asked for them."""
    head = {"id": reply_id, "created": created, "model": model}
    if kind == "chat":
        choices: list[dict[str, Any]] = [
            {
                "index": i,
                "message": {"role": "assistant", "content": _content(choice), "refusal": None, **choice.extra},
                "logprobs": chat_logprobs(choice.logprobs) if logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for i, choice in enumerate(answer.choices)
        ]
        return orjson.dumps({**head, "object": "chat.completion", "choices": choices, "usage": usage(answer.usage)})
    choices = [
        {
            "index": i,
            "text": choice.text,
            "logprobs": completion_logprobs(choice.logprobs) if logprobs else None,
            "finish_reason": choice.finish_reason,
        }
        for i, choice in enumerate(answer.choices)
    ]
    return orjson.dumps({**head, "object": "text_completion", "choices": choices, "usage": usage(answer.usage)})


def _content(choice: Choice) -> str | None:
    """OpenAI gives null as the content of a message that only calls tools."""
    return None if not choice.text and choice.extra.get("tool_calls") else choice.text


class EventWriter:
    """Builds the server-sent events of one stream. What all its events share is encoded once."""

    def __init__(
        self, kind: Kind, *, reply_id: str, created: int, model: str, logprobs: bool, include_usage: bool
    ) -> None:
        self._chat = kind == "chat"
        self._logprobs = logprobs
        self._include_usage = include_usage
        head = {
            "id": reply_id,
            "object": "chat.completion.chunk" if self._chat else "text_completion",
            "created": created,
            "model": model,
        }
        # {"id":...,"model":"..." + ,"choices":[{"index":0,"delta":{"content":"..."},"logprobs":null,...}]}
        self._head = b"data: " + orjson.dumps(head)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        # OpenAI opens each choice of a chat with a delta that names the role.
        self._opened: set[int] = set()
        self._offsets: dict[int, int] = {}

    def events(self, index: int, chunks: Sequence[Chunk]) -> bytes:
        """The events of these chunks of choice `index`; chunks that show nothing are passed over."""
        out: list[bytes] = []
        if self._chat and index not in self._opened:
            self._opened.add(index)
            out.append(
                self._event(index, b'"delta":{"role":"assistant","content":"","refusal":null}', b"null", b"null")
            )
        for chunk in chunks:
            if chunk.text or chunk.logprobs or chunk.extra:
                out.append(self._event(index, self._delta(chunk), self._logprobs_of(index, chunk), b"null"))
            if chunk.finish_reason is not None:
                empty = b'"delta":{}' if self._chat else b'"text":""'
                out.append(self._event(index, empty, b"null", orjson.dumps(chunk.finish_reason)))
        return b"".join(out)

    def usage(self, tokens: Usage) -> bytes:
        """The event with the usage and no choices, empty unless `stream_options.include_usage` asked for it."""
        if not self._include_usage:
            return b""
        return self._head + b'],"usage":' + orjson.dumps(usage(tokens)) + b"}\n\n"

    def _event(self, index: int, delta: bytes, logprobs: bytes, reason: bytes) -> bytes:
        return b'%b{"index":%d,%b,"logprobs":%b,"finish_reason":%b}%b' % (
            self._head,
            index,
            delta,
            logprobs,
            reason,
            self._tail,
        )

    def _delta(self, chunk: Chunk) -> bytes:
        if not self._chat:
            return b'"text":' + orjson.dumps(chunk.text)
        if chunk.extra:
            content = {"content": chunk.text} if chunk.text else {}
            return b'"delta":' + orjson.dumps({**content, **chunk.extra})
        return b'"delta":{"content":' + orjson.dumps(chunk.text) + b"}"

    def _logprobs_of(self, index: int, chunk: Chunk) -> bytes:
        if not self._logprobs or not chunk.logprobs:
            return b"null"
        if self._chat:
            return orjson.dumps(chat_logprobs(chunk.logprobs))
        offset = self._offsets.get(index, 0)
        self._offsets[index] = offset + sum(len(token.token) for token in chunk.logprobs)
        return orjson.dumps(completion_logprobs(chunk.logprobs, offset))


def error_object(error: ExpertError, *, request_id: str | None = None) -> dict[str, Any]:
    """`{"error": {message, type, param, code}}`, with the request's id where it helps to find the log line."""
    kind = _ERROR_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    fields = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    return {"error": fields | ({"request_id": request_id} if request_id else {})}


def error_event(error: ExpertError, *, request_id: str | None = None) -> bytes:
    """An error within a stream that has begun; no `[DONE]` follows it, so it cannot be taken for the end."""
    return b"data: " + orjson.dumps(error_object(error, request_id=request_id)) + b"\n\n"


def usage(tokens: Usage) -> dict[str, Any]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": tokens.prompt_tokens,
        "completion_tokens": tokens.completion_tokens,
        "total_tokens": tokens.prompt_tokens + tokens.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": tokens.cached_tokens},
    }


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The logprobs object of a chat choice."""

    def entry(token: str, logprob: float, raw: bytes) -> dict[str, Any]:
        return {"token": token, "logprob": logprob, "bytes": list(raw)}

    return {
        "content": [
            {**entry(t.token, t.logprob, t.raw), "top_logprobs": [entry(*alternative) for alternative in t.top]}
            for t in tokens
        ],
        "refusal": None,
    }


def completion_logprobs(tokens: Sequence[TokenLogprob], offset: int = 0) -> dict[str, Any]:
    """The logprobs object of a text completion; `offset` is where its first token starts in the text."""
    offsets = []
    for t in tokens:
        offsets.append(offset)
        offset += len(t.token)
    return {
        "tokens": [t.token for t in tokens],
        "token_logprobs": [t.logprob for t in tokens],
        "top_logprobs": [{token: logprob for token, logprob, _ in t.top} | {t.token: t.logprob} for t in tokens],
        "text_offset": offsets,
    }


def _merge_delta(into: dict[str, Any], delta: dict[str, Any]) -> None:
    """Add a stream's delta to the fields gathered so far: strings grow, tool calls are matched by their index."""
    for name, value in delta.items():
        seen = into.get(name)
        if isinstance(value, str) and isinstance(seen, str) and name not in ("id", "type", "role"):
            into[name] = seen + value
        elif isinstance(value, dict) and isinstance(seen, dict):
            _merge_delta(seen, value)
        elif isinstance(value, list) and all(isinstance(item, dict) and "index" in item for item in value):
            calls = into.setdefault(name, [])
            for item in value:
                _merge_call(calls, item)
        elif value is not None:
            into[name] = value


def _merge_call(calls: list[dict[str, Any]], item: dict[str, Any]) -> None:
    """One tool call's delta; the reply, unlike the stream, carries no `index`: the place in the list is it."""
    index = item["index"]
    if not isinstance(index, int) or not 0 <= index <= len(calls) or index >= 128:
        return
    if index == len(calls):
        calls.append({})
    _merge_delta(calls[index], {name: value for name, value in item.items() if name != "index"})
