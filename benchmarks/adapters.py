"""1,000 loads, updates and unloads of adapters over HTTP, under steady traffic, on a real service with two replicas.

Every answer is held against the one that its adapter's version gives (see `adapter_versions`), and the version against
the time in which it was current: from its switch, as the API's record has it, until its successor was reported ready.
Run by `make bench-adapters`; some ten minutes on 2 cores.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import httpx
import psutil
import torch
import typer
import yaml
from rich.console import Console

from benchmarks.adapter_traffic import Asked, Traffic
from benchmarks.adapter_versions import Content, Contents, save_base
from benchmarks.report import ROOT, Row, print_table, write_results
from benchmarks.serving_processes import our_service, percentile
from signalbox.serving.embedded_valkey import EmbeddedValkey
from signalbox.serving.live_state import ReplicaState, live_key
from signalbox.serving.store import Store

WORK = ROOT / ".run" / "bench_adapters"
REPLICAS, SLOTS = 2, 8
FEWEST, MOST = 3, 6  # names at once; an update needs a second slot
POLL_S = 0.02
OP_LIMIT_S = 60.0
CLOCKS_S = 0.005  # by which two readings of one machine's clock may be rounded apart
WARM_UP = 100  # operations before memory is measured for the first time
GROWTH_MIB = 24.0  # of a replica after that: the allocator's noise; keeping what was unloaded would be some 100 MiB
console = Console(stderr=True)


@dataclass
class Life:
    """A version while requests may get it. `since`: not before; `until`: not after (Unix seconds)."""

    name: str
    number: int
    content: Content
    since: float
    until: float = float("inf")


class Operator:
    """Loads, updates and unloads, one at a time, and keeps the book of which version was current when."""

    def __init__(
        self, client: httpx.AsyncClient, contents: Contents, supply: Iterator[Content], traffic: Traffic, seed: int
    ) -> None:
        self._client, self._contents, self._traffic = client, contents, traffic
        self._supply = supply
        self._rng = random.Random(seed)
        self._made = 0
        self.lives: list[Life] = []
        self.current: dict[str, Life] = {}
        self.drained = 0  # requests that were being answered when their adapter was removed
        self.seconds: dict[str, list[float]] = {"load": [], "update": [], "unload": []}

    async def step(self) -> None:
        """One operation, done when the API says so. Raises `RuntimeError` where it fails."""
        count = len(self.current)
        kinds = ["load"] if count < FEWEST else ["update", "unload"] if count >= MOST else [*self.seconds]
        kind = self._rng.choice(kinds)
        if kind == "load":
            await self._register("load", f"adapter-{self._made}")
        elif kind == "update":
            await self._register("update", self._rng.choice(sorted(self.current)))
        else:
            await self._remove(self._rng.choice(sorted(self.current)))

    async def _register(self, kind: str, name: str) -> None:
        content = next(self._supply)
        folder = await asyncio.to_thread(self._contents.write, content, WORK / "incoming" / str(self._made))
        self._made += 1
        began, start = time.time(), time.perf_counter()
        reply = await self._client.post("/v1/adapters", json={"name": name, "base": "tiny", "path": str(folder)})
        if reply.status_code != 202:
            raise RuntimeError(f"{kind} of {name}: {reply.status_code} {reply.text}")
        number, record = reply.json()["version"], reply.json()
        while record["version"] != number or record["phase"] != "ready":
            own = next((v for v in record["versions"] if v["version"] == number), {"phase": "forgotten"})
            if own["phase"] not in ("validating", "staged", "ready") or time.time() - began > OP_LIMIT_S:
                raise RuntimeError(f"{kind} of {name}@{number} is {own}: {record}")
            await asyncio.sleep(POLL_S)
            record = (await self._client.get(f"/v1/adapters/{name}")).json()
        seen = time.time()
        self.seconds[kind].append(time.perf_counter() - start)
        switched = next(v["loaded_at"] for v in record["versions"] if v["version"] == number)
        if name in self.current:
            self.current[name].until = seen
        life = Life(name, number, content, max(began, switched - CLOCKS_S))
        self.lives.append(life)
        self.current[name] = life
        if kind == "load":
            self._traffic.names.append(name)
        await asyncio.to_thread(shutil.rmtree, folder)

    async def _remove(self, name: str) -> None:
        self.drained += await self._traffic.retire(name)
        began, start = time.time(), time.perf_counter()
        reply = await self._client.delete(f"/v1/adapters/{name}")
        if reply.status_code != 202:
            raise RuntimeError(f"unload of {name}: {reply.status_code} {reply.text}")
        life = self.current.pop(name)
        life.until = time.time()
        while (reply := await self._client.get(f"/v1/adapters/{name}")).status_code != 404:
            if reply.status_code == 200 and reply.json()["phase"] == "gone":
                break
            if time.time() - began > OP_LIMIT_S:
                raise RuntimeError(f"unload of {name} takes too long: {reply.text}")
            await asyncio.sleep(POLL_S)
        self.seconds["unload"].append(time.perf_counter() - start)


@dataclass
class Verdict:
    """What became of the requests."""

    right: int = 0
    failed: list[Asked] = field(default_factory=list)
    wrong: list[tuple[Asked, str]] = field(default_factory=list)


def judge(asked: Sequence[Asked], operator: Operator, contents: Contents) -> Verdict:
    """Hold each answer against the versions that were current at some moment between its begin and its end."""
    by_text = {text: life for life in operator.lives for text in life.content.texts}
    verdict = Verdict()
    for one in asked:
        base_text = contents.base_texts[one.long]
        life = by_text.get(one.text)
        if one.error:
            verdict.failed.append(one)
        elif one.name is None and one.text == base_text:
            verdict.right += 1
        elif life is None or one.text != life.content.texts[one.long]:
            verdict.wrong.append((one, "the base's text" if one.text == base_text else "no version's text"))
        elif life.name != one.name:
            verdict.wrong.append((one, f"the text of {life.name}@{life.number}"))
        elif life.since > one.ended or life.until < one.began:
            off = max(life.since - one.ended, one.began - life.until)
            verdict.wrong.append((one, f"version {life.number}, not current then by {off * 1000:.1f} ms"))
        else:
            verdict.right += 1
    return verdict


@dataclass
class Memory:
    """Resident memory of the service's processes by role, MiB (the greatest where there are several), and engines'."""

    resident: dict[str, float]
    engine: float
    held: list[int]


async def memory(service: int, store: Store) -> Memory:
    """Measured now; `held` is how many adapters each replica holds, by what it publishes."""
    resident: dict[str, float] = {}
    for process in psutil.Process(service).children(recursive=True):
        try:
            title = " ".join(process.cmdline())
            role = next((role for role in ("expert-tiny", "adapter-registry", "gateway") if role in title), None)
            if role is not None and "ServeReplica" in title:
                resident[role] = max(resident.get(role, 0.0), process.memory_full_info().uss / 2**20)
        except psutil.Error:
            continue
    states = [ReplicaState.loads(data).engine for data in (await store.hgetall(live_key("tiny"))).values()]
    return Memory(resident, max(s.memory_bytes for s in states) / 2**20, [len(s.adapters) for s in states])


def write_config(base: Path, store: str, gateways: int) -> Path:
    """The service: one tiny expert on two replicas, eight slots each."""
    expert = {
        "engine": "transformers",
        "model": str(base),
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "replicas": REPLICAS,
        "max_running": 32,
        "kv_cache_mib": 32,
        "max_adapters": SLOTS,
        "max_adapter_rank": 32,
    }
    config = {
        "server": {"gateways": gateways},
        "store": {"url": store},
        "experts": {"tiny": expert},
        "adapter_files": {"roots": [str(WORK / "incoming")]},
    }
    path = WORK / "service.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


async def bench(
    port: int, service: int, store_url: str, contents: Contents, supply: list[Content], ops: int, clients: int
) -> list[Row]:
    """Operations under traffic, then the verdict."""
    store, traffic = Store(store_url), Traffic(port, clients)
    warm = min(ops // 5, WARM_UP)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
        operator = Operator(client, contents, iter(supply), traffic, seed=1)
        running = asyncio.create_task(traffic.run())
        began, before = time.perf_counter(), None
        try:
            for number in range(ops):
                if number == warm:
                    before = await memory(service, store)
                await operator.step()
                if (number + 1) % 50 == 0:
                    so_far = judge(traffic.done, operator, contents)
                    console.print(
                        f"{number + 1} operations, {len(traffic.done)} requests, {len(so_far.failed)} failed, "
                        f"{len(so_far.wrong)} wrong, {time.perf_counter() - began:.0f} s"
                    )
            seconds = time.perf_counter() - began
        finally:
            traffic.stopping = True
            await running
        await asyncio.sleep(1.0)  # replicas publish what they hold
        after = await memory(service, store)
    await store.close()
    assert before is not None
    verdict = judge(traffic.done, operator, contents)
    for one in verdict.failed[:10]:
        console.print(f"failed: {one}", markup=False, style="red")
    for one, why in verdict.wrong[:10]:
        console.print(f"wrong: {why}: {one}", markup=False, style="red")
    kept = WORK / "cache" / "signalbox" / "adapters"
    copies = sum(1 for _ in kept.rglob("adapter_model.safetensors"))
    return rows_of(ops, seconds, traffic.done, verdict, operator, before, after, copies)


def rows_of(
    ops: int,
    seconds: float,
    asked: Sequence[Asked],
    verdict: Verdict,
    operator: Operator,
    before: Memory,
    after: Memory,
    copies: int,
) -> list[Row]:
    """One row a figure."""
    case = f"{REPLICAS} replicas, {SLOTS} slots"
    none, failed, wrong = "none", len(verdict.failed), len(verdict.wrong)
    rows = [
        Row(case, "operations", ops, "", goal="all succeed", met=sum(map(len, operator.seconds.values())) == ops),
        Row(case, "requests", len(asked), ""),
        Row(case, "requests failed", failed, "", goal=none, met=failed == 0),
        Row(case, "requests answered by a wrong version", wrong, "", goal=none, met=wrong == 0),
        Row(case, "requests under way when their adapter was removed", operator.drained, ""),
        Row(case, "traffic", len(asked) / seconds, "requests/s"),
    ]
    for kind, count in sorted(Counter(one.kind for one in asked).items()):
        rows.append(Row(case, f"requests, {kind}", count, ""))
    lasted = [one.ended - one.began for one in asked if not one.error]
    for name, values in {**operator.seconds, "request": lasted}.items():
        for share in (0.5, 0.99):
            rows.append(Row(case, f"{name} p{share * 100:g}", percentile(values, share) * 1000, "ms"))  # noqa: PERF401
    for role, mib in sorted(after.resident.items()):
        grown = mib - before.resident.get(role, mib)
        goal = f"at most {GROWTH_MIB:g}" if role == "expert-tiny" else None
        rows.append(Row(case, f"{role}: memory of its own", mib, "MiB", reference=before.resident.get(role)))
        rows.append(Row(case, f"{role}: growth after {min(ops // 5, WARM_UP)} operations", grown, "MiB", goal=goal))
        if goal:
            rows[-1] = Row(**{**rows[-1].__dict__, "met": grown <= GROWTH_MIB})
    names = len(operator.current)
    rows.append(Row(case, "engine: weights, KV cache and slots", after.engine, "MiB", reference=before.engine))
    rows.append(
        Row(
            case,
            "adapters held in the end, the fullest replica",
            max(after.held),
            "",
            reference=names,
            goal="those that are registered",
            met=after.held == [names] * REPLICAS,
        )
    )
    # Copies of contents that nobody uses are swept some minutes later: of a run of minutes most are there still.
    rows.append(Row(case, "copies of adapters on disk", copies, "", reference=names))
    return rows


def main(
    ops: Annotated[int, typer.Option(min=10, help="loads, updates and unloads together")] = 1000,
    clients: Annotated[int, typer.Option(min=1, help="requests in flight")] = 24,
    gateways: Annotated[int, typer.Option(min=1, help="gateway processes")] = 2,
    out: Annotated[str, typer.Option(help="name of the result file")] = "adapters",
) -> None:
    """Measure, print, write benchmarks/results/NAME.json; exit code 1 where a goal is missed."""
    torch.set_num_threads(1)
    shutil.rmtree(WORK, ignore_errors=True)
    (WORK / "incoming").mkdir(parents=True)
    base = save_base(WORK / "base")
    contents = Contents(base)
    supply = list(itertools.islice(contents, ops))  # computed beforehand: the machine shall be the service's
    valkey = EmbeddedValkey()
    os.environ["XDG_CACHE_HOME"] = str(WORK / "cache")  # so that copies of adapters can be counted there
    try:
        url = valkey.start()
        config = write_config(base, url, gateways)
        with our_service(config, WORK / "service.log") as (port, child):
            console.print(f"the service runs on port {port}")
            rows = asyncio.run(bench(port, child.pid, url, contents, supply, ops, clients))
    finally:
        valkey.stop()
    print_table(rows)
    command = f"python -m benchmarks.adapters {' '.join(sys.argv[1:])}".strip()
    console.print(f"wrote {write_results(out, command, rows)}")
    if any(row.met is False for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
