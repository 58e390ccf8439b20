"""Steady traffic for `benchmarks.adapters`: requests by adapters' names, streamed and whole, and what was answered."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.adapter_versions import LONG, PROMPT, SHORT


@dataclass
class Asked:
    """One request of the traffic; `name` is None for the base. Times are Unix seconds.

    `first` is when the first piece of a streamed answer came: the service has taken the request.
    """

    name: str | None
    began: float
    kind: str
    long: bool
    first: float = 0.0
    ended: float = 0.0
    status: int = 0
    text: str = ""
    error: str = ""


@dataclass
class Traffic:
    """Closed-loop clients that ask adapters by their names, and now and then the base, on 127.0.0.1.

    `names` are those that exist, `closing` those of them that are about to be removed.
    """

    port: int
    clients: int
    names: list[str] = field(default_factory=list)
    closing: set[str] = field(default_factory=set)
    running: dict[int, Asked] = field(default_factory=dict)
    done: list[Asked] = field(default_factory=list)
    stopping: bool = False

    async def run(self) -> None:
        """Ask until `stopping`."""
        limits = httpx.Limits(max_connections=self.clients, max_keepalive_connections=self.clients)
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{self.port}", timeout=60, limits=limits, trust_env=False
        ) as client:
            await asyncio.gather(*(self._client(client, i, random.Random(i)) for i in range(self.clients)))

    async def retire(self, name: str) -> int:
        """Ask `name` no more; returns how many answers of it are under way then.

        First only long streams ask it, so that whole answers, which show nothing before their end, can be waited for;
        then nothing does, and each stream gets its first piece. So whatever is under way when the adapter is removed
        has been taken by the service, and must end well.
        """
        self.closing.add(name)
        await self._until(name, lambda asked: asked.long)
        self.names.remove(name)
        self.closing.discard(name)
        return await self._until(name, lambda asked: asked.first > 0)

    async def _until(self, name: str, holds: Callable[[Asked], bool]) -> int:
        while not all(holds(asked) for asked in self.running.values() if asked.name == name):  # noqa: ASYNC110
            await asyncio.sleep(0.002)
        return sum(asked.name == name for asked in self.running.values())

    async def _client(self, client: httpx.AsyncClient, number: int, rng: random.Random) -> None:
        while not self.stopping:
            name = rng.choice(self.names) if self.names and rng.random() > 0.1 else None
            stream, cached = rng.random() < 0.5, rng.random() < 0.2
            long = stream and rng.random() < 0.5
            if name in self.closing:
                stream = long = True
            model = "tiny" if name is None else name if rng.random() < 0.5 else f"tiny:{name}"
            body: dict[str, Any] = {"model": model, "prompt": PROMPT, "temperature": 0, "ignore_eos": True}
            body |= {"stream": stream, "max_tokens": LONG if long else SHORT}
            if not cached:
                body["signalbox"] = {"cache": {"mode": "off"}}
            kind = f"{'streamed' if stream else 'whole'}{', long' if long else ''}{', cache' if cached else ''}"
            asked = self.running[number] = Asked(name, time.time(), kind, long)
            try:
                await (_streamed if stream else _whole)(client, body, asked)
            except httpx.HTTPError as error:
                asked.error = repr(error)
            asked.ended = time.time()
            self.done.append(self.running.pop(number))
            await asyncio.sleep(0.01 if not asked.error else 0.05)


async def _whole(client: httpx.AsyncClient, body: dict[str, Any], asked: Asked) -> None:
    reply = await client.post("/v1/completions", json=body)
    asked.status = reply.status_code
    if reply.status_code == 200:
        asked.text = reply.json()["choices"][0]["text"]
    else:
        asked.error = reply.text[:300]


async def _streamed(client: httpx.AsyncClient, body: dict[str, Any], asked: Asked) -> None:
    async with client.stream("POST", "/v1/completions", json=body) as reply:
        asked.status = reply.status_code
        if reply.status_code != 200:
            asked.error = (await reply.aread()).decode(errors="replace")[:300]
            return
        finished = False
        async for line in reply.aiter_lines():
            if line == "data: [DONE]":
                finished = True
            elif line.startswith("data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    asked.error = str(event["error"])[:300]
                for choice in event.get("choices", ()):
                    asked.text += choice["text"]
                asked.first = asked.first or time.time()
        if not finished and not asked.error:
            asked.error = "the stream ended early"
