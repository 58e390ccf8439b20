"""A load generator of its own process: closed-loop clients over HTTP/1.1, reading server-sent events cheaply.

It reads a job as JSON from standard input and writes a JSON list of results to standard output. A client sends its
next request when the last answer has ended. Nothing is parsed but what is measured: the first event with text, the
latest one, the usage at the end, and which expert answered. Targets 127.0.0.1 only.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

_TEXT = re.compile(rb'"(?:content|text)":\s*"(?!")')
_USAGE = re.compile(rb'"completion_tokens":\s*(\d+)')
_EXPERT = re.compile(rb"x-signalbox-expert: *([^\r\n]+)", re.IGNORECASE)
_LIMIT_S = 120.0


@dataclass
class Result:
    """One request. Times are seconds of `time.monotonic`, the same clock in all processes of a machine."""

    label: str
    began: float
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
    reads: int = 0
    expert: str = ""
    error: str = ""


class Connection(asyncio.Protocol):
    """One keep-alive connection, one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[None] | None = None
        self._result: Result | None = None
        self._tail = b""
        self._head = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    async def ask(self, request: bytes, result: Result) -> None:
        """Send a request and wait for the end of its answer."""
        self._result, self._tail, self._head = result, b"", True
        self._done = asyncio.get_running_loop().create_future()
        assert self._transport is not None
        self._transport.write(request)
        await asyncio.wait_for(self._done, _LIMIT_S)

    def data_received(self, data: bytes) -> None:
        result, now = self._result, time.monotonic()
        if result is None or self._done is None or self._done.done():
            return
        if self._head:
            head = self._tail + data
            if b"\r\n\r\n" not in head:
                self._tail = head
                return
            self._head, self._tail = False, b""
            if found := _EXPERT.search(head):
                result.expert = found[1].decode()
            if b" 200 " not in head.split(b"\r\n", 1)[0]:
                result.error = head[:20].decode(errors="replace") + head[-300:].decode(errors="replace")
                self._end(close=True)
                return
            data = head.partition(b"\r\n\r\n")[2]
        if _TEXT.search(data):
            result.last = now
            result.reads += 1
            result.first = result.first or now
        self._tail = (self._tail + data)[-2048:]
        if b"data: [DONE]" in self._tail and self._tail.endswith(b"0\r\n\r\n"):
            counts = _USAGE.findall(self._tail)
            result.tokens = int(counts[-1]) if counts else 0
            self._end()
        elif b'"error":' in data:
            result.error = data[-300:].decode(errors="replace")
            self._end(close=True)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._result is not None and self._done is not None and not self._done.done():
            self._result.error = f"connection lost: {exc}"
            self._done.set_result(None)
        self._transport = None

    @property
    def usable(self) -> bool:
        """Whether another request can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    def _end(self, *, close: bool = False) -> None:
        assert self._done is not None
        if close and self._transport is not None:
            self._transport.close()
        self._done.set_result(None)


async def _client(port: int, jobs: deque[tuple[str, bytes]], results: list[Result], until: float | None) -> None:
    connection: Connection | None = None
    while jobs and (until is None or time.monotonic() < until):
        label, request = jobs.popleft()
        if until is not None:
            jobs.append((label, request))
        result = Result(label, time.monotonic())
        try:
            if connection is None or not connection.usable:
                _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
            result.began = time.monotonic()
            await connection.ask(request, result)
        except (OSError, TimeoutError) as error:
            result.error, connection = repr(error), None
        results.append(result)
        if result.error:
            await asyncio.sleep(0.05)


def _request(path: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    return head.encode() + b"content-length: %d\r\n\r\n" % len(content) + content


async def run(job: dict[str, Any]) -> list[Result]:
    """`job`: {port, path, streams, bodies: [[label, body], ...], seconds}; with `seconds`, bodies are used again."""
    jobs = deque((label, _request(job["path"], body)) for label, body in job["bodies"])
    until = time.monotonic() + job["seconds"] if job.get("seconds") else None
    results: list[Result] = []
    await asyncio.gather(*(_client(job["port"], jobs, results, until) for _ in range(job["streams"])))
    return results


if __name__ == "__main__":
    try:
        import uvloop

        uvloop.install()
    except ImportError:
        pass
    json.dump([asdict(result) for result in asyncio.run(run(json.load(sys.stdin)))], sys.stdout)
