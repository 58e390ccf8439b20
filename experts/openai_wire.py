"""What OpenAI-compatible servers send: events of a stream, token counts, log-probabilities, errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson

from signalbox.experts.base import ExpertUnavailable, TokenLogprob, Usage

_MAX_EVENT = 8 << 20  # bytes of one event, and of a reply that is not streamed


class EventParser:
    """Server-sent events from blocks of bytes (HTML standard, section 9.2): the data of each event.

    Comments and other fields are skipped. Raises `ExpertUnavailable` on an event of more than 8 MiB.
    """

    def __init__(self) -> None:
        self._line = b""
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, block: bytes) -> Iterator[bytes]:
        """The data of every event that `block` completes."""
        *lines, self._line = (self._line + block).replace(b"\r\n", b"\n").split(b"\n")
        self._bound(len(self._line))
        for line in lines:
            if data := self._take(line.rstrip(b"\r")):
                yield data

    def gather(self, block: bytes) -> tuple[()]:
        """Keep a reply that is one JSON object rather than a stream, for `rest`."""
        self._line += block
        self._bound(len(self._line))
        return ()

    def rest(self) -> bytes:
        """What lacks its end when the reply ends: the whole of a JSON reply, or an event without a blank line."""
        if self._line.startswith(b"data:"):
            self._take(self._line.rstrip(b"\r"))
            self._line = b""
        return self._take(b"") or self._line.strip()

    def _take(self, line: bytes) -> bytes:
        """The event that a line ends, empty if it ends none."""
        if line.startswith(b"data:"):
            self._data.append(line[5:].removeprefix(b" "))
            self._size += len(line)
            self._bound(self._size)
        elif not line:
            data, self._data, self._size = b"\n".join(self._data), [], 0
            return data
        return b""

    @staticmethod
    def _bound(size: int) -> None:
        if size > _MAX_EVENT:
            raise ExpertUnavailable(f"an event of the upstream exceeds {_MAX_EVENT} bytes", code="upstream_malformed")


def read_usage(usage: dict[str, Any]) -> Usage:
    """Token counts of a `usage` object."""
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Usage(int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0), int(cached))


def read_logprobs(logprobs: dict[str, Any]) -> list[TokenLogprob]:
    """Of a chat (`content`) or of a text completion (`tokens`, `token_logprobs`, `top_logprobs`)."""

    def raw(item: dict[str, Any]) -> bytes:
        return bytes(item["bytes"]) if item.get("bytes") is not None else str(item["token"]).encode()

    found = [
        TokenLogprob(
            token=item["token"],
            logprob=float(item["logprob"]),
            raw=raw(item),
            top=tuple((top["token"], float(top["logprob"]), raw(top)) for top in item.get("top_logprobs") or ()),
        )
        for item in logprobs.get("content") or ()
    ]
    tokens = logprobs.get("tokens") or ()
    tops = logprobs.get("top_logprobs") or [None] * len(tokens)
    for token, logprob, top in zip(tokens, logprobs.get("token_logprobs") or (), tops, strict=False):
        ranked = sorted((top or {}).items(), key=lambda pair: -pair[1])
        if logprob is not None:  # the first token of an echoed prompt has none
            found.append(
                TokenLogprob(token, float(logprob), token.encode(), tuple((t, float(p), t.encode()) for t, p in ranked))
            )
    return found


def read_error(reply: bytes) -> tuple[str, str | None, str | None]:
    """(message, param, code) of an error reply in any of the forms that servers of this protocol use."""
    try:
        body = orjson.loads(reply)
    except ValueError:
        return reply.decode("utf-8", "replace"), None, None
    error = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(error, dict):
        return str(error), None, None
    message = error.get("message") or error.get("detail") or error.get("msg") or ""
    param, code = error.get("param"), error.get("code")
    return str(message), param if isinstance(param, str) else None, code if isinstance(code, str) else None
