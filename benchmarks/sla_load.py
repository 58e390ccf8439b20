"""The load generator of `benchmarks.sla`, in a process of its own: open loop by a schedule, or closed loop.

Requests of a schedule are sent at their time whether or not earlier ones were answered, and every time is counted
from when a request should have been sent: a generator that is late makes the service look slow, never fast (no
coordinated omission). It reads a job as JSON from standard input and writes a JSON list of results to standard output.
Nothing of an answer is parsed but what is measured. Targets 127.0.0.1 only.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.serving_processes import generated

_TEXT = re.compile(rb'"(?:content|text)":\s*"(?!")')
_COMPLETION = re.compile(rb'"completion_tokens":\s*(\d+)')
_PROMPT = re.compile(rb'"prompt_tokens":\s*(\d+)')
_EXPERT = re.compile(rb"x-signalbox-expert: *([^\r\n]+)", re.IGNORECASE)
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_RETRY = re.compile(rb"retry-after: *([^\r\n]+)", re.IGNORECASE)
_CODE = re.compile(rb'"code":\s*"([^"]+)"')
MAX_CONNECTIONS = 4096


@dataclass
class Sent:
    """One request. Times are seconds of `time.monotonic`; 0: it did not happen.

    `label` is the job's; `due` when it should have been sent, `sent` when it was; `first` and `last` of the pieces
    of text; `ended` when all was there. `status` 0: no reply, or none to its end; `error` says why, or the error's
    machine-readable code.
    """

    label: str
    due: float
    sent: float = 0.0
    first: float = 0.0
    last: float = 0.0
    ended: float = 0.0
    status: int = 0
    error: str = ""
    retry_after: str = ""
    expert: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Connection(asyncio.Protocol):
    """One keep-alive connection, one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[None] | None = None
        self._sent = Sent("", 0.0)
        self._tail = b""
        self._head = True
        self._left = 0  # bytes of a reply that is no stream

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    @property
    def usable(self) -> bool:
        """Whether another request can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    async def ask(self, request: bytes, sent: Sent) -> None:
        """Send a request and wait for the end of its answer; a cancelled wait closes the connection."""
        assert self._transport is not None
        self._sent, self._tail, self._head, self._left = sent, b"", True, 0
        self._done = asyncio.get_running_loop().create_future()
        sent.sent = time.monotonic()
        self._transport.write(request)
        try:
            await self._done
        except asyncio.CancelledError:
            self._transport.abort()
            raise

    def data_received(self, data: bytes) -> None:
        now, sent = time.monotonic(), self._sent
        if self._done is None or self._done.done():
            return
        if self._head:
            head, end, data = (self._tail + data).partition(b"\r\n\r\n")
            if not end:
                self._tail = head
                return
            self._head, self._tail = False, b""
            sent.status = int(head.split(b" ", 2)[1])
            if found := _EXPERT.search(head):
                sent.expert = found[1].decode()
            if found := _RETRY.search(head):
                sent.retry_after = found[1].decode()
            if found := _LENGTH.search(head):
                self._left = int(found[1])
        if self._left:
            self._tail += data
            if len(self._tail) >= self._left:
                code = _CODE.search(self._tail)
                sent.error = code[1].decode() if code else self._tail[:200].decode(errors="replace")
                self._end(now)
            return
        if _TEXT.search(data):
            sent.last = now
            sent.first = sent.first or now
        self._tail = (self._tail + data)[-2048:]
        if b'"error":' in data:
            code = _CODE.search(data)
            sent.error = code[1].decode() if code else "error in the stream"
            if self._transport is not None:
                self._transport.close()
            self._end(now)
        elif self._tail.endswith(b"0\r\n\r\n"):
            if b"data: [DONE]" not in self._tail:
                sent.error = "the stream ended early"
            for pattern, name in ((_PROMPT, "prompt_tokens"), (_COMPLETION, "completion_tokens")):
                if counts := pattern.findall(self._tail):
                    setattr(sent, name, int(counts[-1]))
            self._end(now)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._done is not None and not self._done.done():
            self._sent.error = f"connection lost: {exc or 'closed'}"
            self._sent.status = 0
            self._end(0.0)

    def _end(self, now: float) -> None:
        self._sent.ended = now
        if self._done is not None:
            self._done.set_result(None)


class Client:
    """Connections, opened as they are needed and used again."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[Connection] = []
        self._open = 0

    async def ask(self, request: bytes, sent: Sent) -> None:
        """Send and wait. What goes wrong stands in `sent`."""
        connection = None
        while self._idle and (connection is None or not connection.usable):
            connection = self._idle.pop()
        try:
            if connection is None or not connection.usable:
                if self._open >= MAX_CONNECTIONS:
                    sent.error = "too many connections"
                    return
                self._open += 1
                loop = asyncio.get_running_loop()
                _, connection = await loop.create_connection(Connection, "127.0.0.1", self._port)
            await connection.ask(request, sent)
        except OSError as error:
            sent.error = repr(error)
        if connection is not None and connection.usable:
            self._idle.append(connection)
        elif connection is not None:
            self._open -= 1


def _request(path: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    return head.encode() + b"content-length: %d\r\n\r\n" % len(content) + content


async def open_loop(job: dict[str, Any]) -> list[Sent]:
    """`job`: {port, path, requests: [[at, label, body], ...] in order of time, grace}.

    Whoever has no full answer `grace` seconds after the last one was due is given up, with no status.
    """
    client = Client(job["port"])
    ready = [(at, label, _request(job["path"], body)) for at, label, body in job["requests"]]
    results: list[Sent] = []
    tasks: list[asyncio.Task[None]] = []
    gc.collect()
    gc.disable()
    start = time.monotonic() + 0.2
    for at, label, request in ready:
        due = start + at
        if (wait := due - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        sent = Sent(label, due)
        results.append(sent)
        tasks.append(asyncio.create_task(client.ask(request, sent)))
    if tasks:
        await asyncio.wait(tasks, timeout=max(0.0, start + ready[-1][0] + job["grace"] - time.monotonic()))
    await _stop(tasks)
    return results


async def closed_loop(job: dict[str, Any]) -> list[Sent]:
    """`job`: {port, path, seconds, think, groups: [{streams, label, bodies}, ...]}.

    Each client of a group sends its next request, one of the group's bodies at random, some random time of at most
    `think` seconds after the last answer. Requests are begun for `seconds`; what then runs is given up.
    """
    client = Client(job["port"])
    until = time.monotonic() + job["seconds"]
    results: list[Sent] = []

    async def run(group: dict[str, Any], number: int) -> None:
        rng = random.Random(f"{group['label']}/{number}")
        bodies = [_request(job["path"], body) for body in group["bodies"]]
        while True:
            await asyncio.sleep(rng.uniform(0, job["think"]))
            sent = Sent(group["label"], time.monotonic())
            results.append(sent)
            await client.ask(rng.choice(bodies), sent)
            if sent.error:
                await asyncio.sleep(0.05)

    tasks = [asyncio.create_task(run(group, i)) for group in job["groups"] for i in range(group["streams"])]
    await asyncio.sleep(until - time.monotonic())
    await _stop(tasks)
    return results


async def _stop(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def generate(job: dict[str, Any]) -> list[Sent]:
    """Run a job in a process of its own. Raises `RuntimeError` where that fails."""
    return [Sent(**sent) for sent in await generated("benchmarks.sla_load", job)]


if __name__ == "__main__":
    try:
        import uvloop

        uvloop.install()
    except ImportError:
        pass
    the_job = json.load(sys.stdin)
    results = asyncio.run(open_loop(the_job) if "requests" in the_job else closed_loop(the_job))
    json.dump([asdict(sent) for sent in results], sys.stdout)
