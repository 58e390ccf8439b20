"""Budgets on a real service with two gateways: N requests are charged, never N + 1, whoever is killed meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import orjson
import psutil
import pytest
import redis

from signalbox.serving.store import PREFIX
from tests.faults.running_service import RunningService
from tests.tiny_models import save_tiny

pytestmark = [pytest.mark.service, pytest.mark.timeout(420)]

N = 40
CLIENTS = 64
MAX_RUNNING = 8  # on a replica of `tiny`
TOKENS = {"tiny": 450, "paced": 100}  # of an answer
LIMIT_S = 240.0  # for what takes some twenty seconds on an idle machine
BUDGETS = ("calm", "replica", "gateway")  # keys with a budget for N requests each
METERS = tuple(f"meter{i}" for i in range(6))  # keys whose tokens are counted
SECONDS_A_TOKEN = 0.5  # of the expert `slow`


def token(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer sk-{key}"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    root = tmp_path_factory.mktemp("budgets")
    keys = [f"  {key}: {{env: SBX_{key.upper()}, policy: exact, policies: []}}\n" for key in BUDGETS]
    keys += [f"  {key}: {{env: SBX_{key.upper()}, policy: metered, policies: []}}\n" for key in METERS]
    configuration = (
        "experts:\n"
        f"  tiny: {{engine: transformers, model: {save_tiny(root / 'model')}, replicas: 2, threads: 1, device: cpu, "
        f"dtype: float32, kv_cache_mib: 64, max_running: {MAX_RUNNING}, price: {{input: 1, output: 2}}}}\n"
        f"  slow: {{engine: simulated, prefill_tokens_per_s: 100000, step_ms: {1000 * SECONDS_A_TOKEN}, "
        "price: {input: 1, output: 2}, routable: false}\n"
        "  paced: {engine: simulated, prefill_tokens_per_s: 100000, step_ms: 60, max_running: 16, routable: false}\n"
        "policies:\n"
        f"  exact: {{budget: {{requests: {N}, window: 30d}}, fallback: 0}}\n"
        "  metered: {budget: {tokens: 1000000, usd: 1000, window: 30d}}\n"
        "keys:\n" + "".join(keys)
    )
    environment = {f"SBX_{key.upper()}": f"sk-{key}" for key in (*BUDGETS, *METERS)}
    running = RunningService(root, configuration, server="gateways: 2", environment=environment)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def store(service: RunningService) -> Iterator[redis.Redis]:
    with service.store() as store:  # to find it takes too long to be done while clients wait
        yield store


@dataclass
class Tally:
    """What the clients of one key saw."""

    complete: int = 0
    cut: int = 0  # streams that had begun and were broken off
    tokens: int = 0  # of complete answers, by their usage
    other: dict[str, int] = field(default_factory=dict)  # refusals and failures
    most_on_the_books: int = 0
    spent: bool = False

    def count(self, what: str) -> None:
        self.other[what] = self.other.get(what, 0) + 1


def body(stream: bool, *, model: str, tokens: int | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"model": model, "prompt": "the fox and", "ignore_eos": True}
    found["max_tokens"] = tokens or TOKENS[model]
    return found | ({"stream": True, "stream_options": {"include_usage": True}} if stream else {})


async def events(reply: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The messages of a stream; raises `EOFError` where it ends before its end."""
    rest = b""
    async for data in reply.aiter_bytes():  # not by lines: httpx ends them at U+2028 too, which a random model writes
        *messages, rest = (rest + data).split(b"\n\n")
        for message in messages:
            if message == b"data: [DONE]":
                return
            event = orjson.loads(message.removeprefix(b"data: "))
            if "error" in event:
                raise EOFError(event["error"])
            yield event
    raise EOFError("no [DONE]")


async def ask(client: httpx.AsyncClient, key: str, model: str, stream: bool, tally: Tally) -> None:
    """One request, counted."""
    if not stream:
        reply = await client.post("/v1/completions", json=body(False, model=model), headers=token(key))
        refused(reply, tally)
        if reply.status_code == 200:
            tally.complete += 1
            tally.tokens += reply.json()["usage"]["total_tokens"]
        return
    async with client.stream("POST", "/v1/completions", json=body(True, model=model), headers=token(key)) as reply:
        if reply.status_code != 200:
            await reply.aread()
            refused(reply, tally)
            return
        begun, usage = False, None
        try:
            async for event in events(reply):
                begun = True
                usage = event.get("usage") or usage
        except (EOFError, httpx.HTTPError):
            tally.cut += begun
            tally.count("cut")
            return
        assert usage is not None
        tally.complete += 1
        tally.tokens += usage["total_tokens"]


def refused(reply: httpx.Response, tally: Tally) -> None:
    if reply.status_code == 200:
        return
    code = reply.json().get("error", {}).get("code") if "json" in reply.headers.get("content-type", "") else None
    tally.count(f"{reply.status_code} {code}")
    if reply.status_code == 402:
        assert code == "budget_spent"
        tally.spent |= "held by" not in reply.text


async def books(client: httpx.AsyncClient, key: str) -> dict[str, dict[str, Any]]:
    """The budget of a key, as any gateway has it."""
    deadline, said = time.monotonic() + LIMIT_S, ""
    while True:
        with contextlib.suppress(httpx.HTTPError):
            reply = await client.get("/v1/usage", headers=token(key))
            said = reply.text
            if reply.status_code == 200:
                (entry,) = reply.json()["data"]
                return entry["budget"]
        assert time.monotonic() < deadline, said
        await asyncio.sleep(0.2)


async def nothing(tally: Tally) -> bool:
    return True


async def storm(
    service: RunningService,
    key: str,
    model: str,
    hurt: Callable[[Tally], Awaitable[bool]] = nothing,
    *,
    streams: int = CLIENTS // 2,
) -> Tally:
    """64 clients ask, so many of them for streams, until the budget is spent.

    `hurt` is called again and again until it returns True.
    """
    tally, deadline = Tally(), time.monotonic() + LIMIT_S
    limits = httpx.Limits(max_connections=CLIENTS + 4, max_keepalive_connections=CLIENTS)

    async def loop(client: httpx.AsyncClient, stream: bool) -> None:
        while not tally.spent:
            assert time.monotonic() < deadline, f"{tally}\n{service.tail()}"
            try:
                await ask(client, key, model, stream, tally)
            except httpx.HTTPError as error:
                tally.count(type(error).__name__)
            await asyncio.sleep(0.1)

    async def watch(client: httpx.AsyncClient) -> None:
        while not tally.spent:
            said = (await books(client, key))["requests"]
            tally.most_on_the_books = max(tally.most_on_the_books, said["spent"] + said["reserved"])
            await asyncio.sleep(0.05)

    async def do_hurt() -> None:
        while not await hurt(tally):
            assert not tally.spent, "the budget was spent before anything was hurt"
            await asyncio.sleep(0.01)

    async with httpx.AsyncClient(base_url=service.url, timeout=120, limits=limits) as client:
        async with asyncio.TaskGroup() as group:
            group.create_task(watch(client))
            group.create_task(do_hurt())
            for i in range(CLIENTS):
                group.create_task(loop(client, stream=i < streams))
        while (said := await books(client, key))["requests"]["reserved"]:
            assert time.monotonic() < deadline, f"{said}\n{service.tail()}"
            await asyncio.sleep(0.2)
    assert said["requests"]["spent"] == N, f"{said} {tally}\n{service.tail()}"
    assert tally.most_on_the_books <= N
    # A whole answer may be charged and cut on its way; a stream may be cut before its first token was noted.
    broken = sum(count for what, count in tally.other.items() if not what.startswith(("402", "429")))
    assert tally.complete <= N <= tally.complete + broken, tally
    assert said["tokens"]["spent"] >= tally.tokens
    return tally


def noted_streams(store: redis.Redis) -> dict[tuple[int, bytes], bytes]:
    """What was sent of each stream that has begun and not ended, as gateways note it, by (gateway's pid, id)."""
    keys = [key.decode() for key in store.scan_iter(f"{PREFIX}ledger:sent:*")]
    return {(int(key.split("-")[1]), id): sent for key in keys for id, sent in store.hgetall(key).items()}


def streaming_gateway(service: RunningService, store: redis.Redis, streams: int) -> psutil.Process | None:
    """The gateway that has noted the most streams as begun, where these are so many at least."""
    ((pid, count),) = Counter(pid for pid, _ in noted_streams(store)).most_common(1) or [(0, 0)]
    return next((p for p in service.replicas("gateway") if p.pid == pid), None) if count >= streams else None


async def until_gateways(service: RunningService, count: int = 2) -> None:
    deadline = time.monotonic() + LIMIT_S
    while len(service.replicas("gateway")) < count or len(service.replicas("expert-tiny")) < 2:
        assert time.monotonic() < deadline, service.tail()
        await asyncio.sleep(0.2)
    async with httpx.AsyncClient(base_url=service.url, timeout=60) as client:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if (await client.get("/readyz")).status_code == 200:
                    return
            assert time.monotonic() < deadline, service.tail()
            await asyncio.sleep(0.2)


async def test_n_requests_are_charged(service: RunningService) -> None:
    assert len(service.replicas("gateway")) == 2
    tally = await storm(service, "calm", "tiny")
    assert tally.complete == N and tally.cut == 0, tally
    async with httpx.AsyncClient(base_url=service.url, timeout=60) as client:
        said = await books(client, "calm")
    assert said["tokens"]["spent"] == tally.tokens
    assert said["usd"]["spent"] == pytest.approx(
        1e-6 * (tally.tokens + TOKENS["tiny"] * N), rel=1e-9
    )  # answers cost double


async def test_n_requests_are_charged_while_a_replica_is_killed(service: RunningService, store: redis.Redis) -> None:
    await until_gateways(service)

    async def hurt(tally: Tally) -> bool:
        """Kills a replica in the middle of streams that the gateways have passed all of so far.

        With both replicas halted and everything passed on, more streams under way than one of them runs are of both.
        """
        if len(noted_streams(store)) <= MAX_RUNNING:
            return False
        replicas = service.replicas("expert-tiny")
        for replica in replicas:
            replica.suspend()
        before, under_way = None, noted_streams(store)
        while before != under_way:
            await asyncio.sleep(0.5)
            before, under_way = under_way, noted_streams(store)
        of_both = len(under_way) > MAX_RUNNING
        if of_both:
            replicas.pop().kill()
        for replica in replicas:
            replica.resume()
        return of_both

    tally = await storm(service, "replica", "tiny", hurt, streams=CLIENTS)
    assert tally.cut, tally


async def test_n_requests_are_charged_while_a_gateway_is_killed(service: RunningService, store: redis.Redis) -> None:
    await until_gateways(service)

    async def hurt(tally: Tally) -> bool:
        victim = streaming_gateway(service, store, 3) if tally.complete >= 4 else None
        if victim is not None:
            victim.kill()
        return victim is not None

    tally = await storm(service, "gateway", "paced", hurt)
    assert tally.cut, tally


async def test_streams_are_charged_by_what_was_sent(service: RunningService, store: redis.Redis) -> None:
    """To the end, cut by the client, and cut by the death of the gateway: within one message of what came."""
    await until_gateways(service)
    received, unread = dict.fromkeys(METERS, 0), dict.fromkeys(METERS, 0)
    first: dict[str, float] = {}
    ended: dict[str, str] = {}
    prompt_tokens = 0

    async def read(client: httpx.AsyncClient, key: str, tokens: int, until: int) -> None:
        nonlocal prompt_tokens
        asked = body(True, model="slow", tokens=tokens)
        async with client.stream("POST", "/v1/completions", json=asked, headers=token(key)) as reply:
            assert reply.status_code == 200, await reply.aread()
            try:
                async for event in events(reply):
                    if event.get("usage"):
                        prompt_tokens = event["usage"]["prompt_tokens"]
                        assert event["usage"]["completion_tokens"] == received[key]
                    elif event["choices"][0]["text"]:
                        received[key] += 1
                        first.setdefault(key, time.monotonic())
                        if received[key] == until:
                            ended[key] = "left"  # and what came while this process slept counts as sent
                            due = 1 + int((time.monotonic() - first[key]) / SECONDS_A_TOKEN)
                            unread[key] = max(0, due - until)
                            return
                ended[key] = "complete"
            except (EOFError, httpx.HTTPError):
                ended[key] = "cut"

    async with httpx.AsyncClient(base_url=service.url, timeout=120) as client:
        tasks = [
            asyncio.create_task(read(client, METERS[0], 10, 99)),
            asyncio.create_task(read(client, METERS[1], 60, 4)),
        ]
        tasks += [asyncio.create_task(read(client, key, 60, 99)) for key in METERS[2:]]
        await asyncio.wait(tasks[:2])
        while min(received[key] for key in METERS[2:]) < 4:
            await asyncio.sleep(0.01)
        newest = max(received[key] for key in METERS[2:])
        while max(received[key] for key in METERS[2:]) == newest:
            await asyncio.sleep(0.01)
        await asyncio.sleep(SECONDS_A_TOKEN / 2)  # between two tokens, when what was sent has been noted
        victim = streaming_gateway(service, store, 1)
        assert victim is not None
        victim.kill()
        await asyncio.wait(tasks)
        for task in tasks:
            task.result()
        assert (ended[METERS[0]], ended[METERS[1]]) == ("complete", "left")
        assert {"cut"} <= {ended[key] for key in METERS[2:]} <= {"cut", "complete"}, ended
        for key in METERS:
            while (said := await books(client, key))["requests"]["reserved"]:
                await asyncio.sleep(0.2)
            charged = said["tokens"]["spent"] - prompt_tokens
            assert said["requests"]["spent"] == 1
            if ended[key] == "complete":
                assert charged == received[key]
            else:
                most = received[key] + 1 + unread[key]
                assert received[key] - 1 <= charged <= most, (key, ended[key], charged, received[key])
            cost = 1e-6 * (prompt_tokens + 2 * charged)
            assert said["usd"]["spent"] == pytest.approx(cost, rel=1e-9)
