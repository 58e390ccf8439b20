"""One HTTP exchange over bare ASGI: reading a bounded body, sending a reply, a stream or an error."""

from __future__ import annotations

import math
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import orjson

from signalbox.experts.base import ExpertError, InvalidRequest
from signalbox.policies.base import NoCandidate
from signalbox.serving.callers import UNBOUND
from signalbox.serving.protocols.openai_replies import error_event, error_object

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

LONGEST_RETRY_S = 31 * 86400.0
RETRY_AFTER_S = {429: 1.0, 503: 2.0}  # where the error itself does not know
JSON: tuple[bytes, bytes] = (b"content-type", b"application/json")
SANE_ID = re.compile(r"[!-~]{1,128}")  # printable ASCII without spaces


class ClientGone(Exception):
    """The client closed the connection before it had sent its request."""


class Exchange:
    """One HTTP request and the sending of its reply."""

    def __init__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        self.began = time.perf_counter()
        self.method: str = scope["method"]
        self.path: str = scope["path"].rstrip("/") or "/"
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        given = self.headers.get(b"x-request-id", b"").decode("latin-1")
        self.id = given if SANE_ID.fullmatch(given) else uuid.uuid4().hex
        self.caller = UNBOUND  # who asks, once the key has been looked at
        self.allow = ""  # the methods that the route takes, where it was asked with another
        self.started = False  # whether the status line has been sent
        self._receive, self._send = receive, send

    async def body(self, limit: int) -> bytes:
        """The request's body. Raises `InvalidRequest` with status 413 beyond `limit` bytes, or `ClientGone`."""
        too_large = InvalidRequest(f"the body is larger than {limit} bytes", code="body_too_large", status=413)
        declared = self.headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limit:
            raise too_large
        parts: list[bytes] = []
        size = 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            part = message.get("body", b"")
            size += len(part)
            if size > limit:
                raise too_large
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)

    async def disconnected(self) -> None:
        """Return when the client has gone. Only after the body has been read."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def start(self, status: int, headers: Headers) -> None:
        """Send status and headers, `x-request-id` among them."""
        self.started = True
        headers = [*headers, (b"x-request-id", self.id.encode())]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def send(self, data: bytes, *, more: bool) -> None:
        """Send a piece of the body."""
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def reply(self, status: int, body: Any, headers: Headers | None = None) -> None:
        """Send a whole reply: `body` as JSON, or bytes that are JSON already."""
        data = body if isinstance(body, bytes) else orjson.dumps(body)
        await self.start(status, [JSON, (b"content-length", b"%d" % len(data)), *(headers or ())])
        await self.send(b"" if self.method == "HEAD" else data, more=False)

    async def fail(self, error: ExpertError) -> None:
        """Send an error: as a reply of its own, or as the last event of a stream that has begun."""
        if self.started:
            await self.send(error_event(error, request_id=self.id), more=False)
            return
        headers: Headers = []
        if error.status in RETRY_AFTER_S:
            seconds = error.retry_after_s or RETRY_AFTER_S[error.status]
            headers.append((b"retry-after", b"%d" % max(1, math.ceil(min(seconds, LONGEST_RETRY_S)))))
        if error.status == 405 and self.allow:
            headers.append((b"allow", self.allow.encode()))
        if error.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        body = error_object(error, request_id=self.id if error.status >= 500 else None)
        if isinstance(error.__cause__, NoCandidate):
            body |= {"ratings": error.__cause__.ratings, "constraints": error.__cause__.constraints}
        await self.reply(error.status, body, headers)


Handler = Callable[[Exchange], Awaitable[None]]  # of one route
