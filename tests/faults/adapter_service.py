"""A real service with two replicas of a tiny model, and the means to hurt it and to see whether it tells the truth."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import psutil

from signalbox.adapters.base import Phase
from tests.adapters.folders import make_lora
from tests.faults.running_service import RunningService
from tests.tiny_models import save_tiny

# Thirty seconds is what we promise, and took 5 to 16 s where it was measured; a machine that runs tests may be busy.
RECONCILED_S = 90.0
PROBER = Path(__file__).with_name("prober.py")
SAID: dict[str, Phase] = {"loading": "staged", "ready": "ready", "unloading": "draining"}


class AdapterService(RunningService):
    """`signalbox serve` with the expert `tiny`, two replicas of four slots; adapters lie below `root`."""

    def __init__(self, root: Path, *, max_adapters: int = 4) -> None:
        self.model = save_tiny(root / "model")
        super().__init__(
            root,
            f"experts:\n  tiny: {{engine: transformers, model: {self.model}, replicas: 2, "
            f"threads: 1, device: cpu, dtype: float32, kv_cache_mib: 64, max_adapters: {max_adapters}}}\n"
            f"adapter_files: {{roots: [{root}]}}\n",
        )

    def registry(self, within_s: float = RECONCILED_S) -> psutil.Process:
        """The registry's process; one that was killed gets a successor by and by."""
        deadline = time.monotonic() + within_s
        while not (found := self.replicas("adapter-registry")):
            assert time.monotonic() < deadline, f"there is no registry\n{self.tail()}"
            time.sleep(0.1)
        return found[0]

    # -- adapters ----------------------------------------------------------------------------------------------

    def make(self, seed: int) -> str:
        """A LoRA with weights large enough to change what the model says."""
        folder = self.root / f"adapter-{seed}"
        return str(folder if folder.exists() else make_lora(folder, self.model, seed=seed, scale=0.6))

    def add(self, name: str, seed: int) -> httpx.Response:
        body = {"name": name, "base": "tiny", "path": self.make(seed)}
        return self.client.post("/v1/adapters", json=body)

    def record(self, name: str) -> dict[str, Any]:
        reply = self.client.get(f"/v1/adapters/{name}")
        return reply.json() if reply.status_code == 200 else {"phase": "gone"}

    def listed(self, name: str) -> dict[str, Any]:
        """The adapter's record among all."""
        return {record["name"]: record for record in self.client.get("/v1/adapters").json()["data"]}[name]

    def until(
        self, name: str, *, version: int | None = None, phase: str = "ready", within_s: float = RECONCILED_S
    ) -> float:
        """Wait for a phase; returns the seconds that it took."""
        began = time.monotonic()
        while True:
            record = self.record(name)
            if record["phase"] == phase and version in (None, record.get("version")):
                return time.monotonic() - began
            assert time.monotonic() - began < within_s, f"{record}\n{self.tail()}"
            time.sleep(0.1)

    def ask(self, model: str, *, timeout_s: float = RECONCILED_S) -> httpx.Response:
        body = {"model": model, "prompt": "the fox and", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        body["signalbox"] = {"cache": {"mode": "off"}}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=timeout_s)

    def says(self, model: str) -> str:
        reply = self.ask(model)
        assert reply.status_code == 200, reply.text
        return str(reply.json()["choices"][0]["text"])


class Traffic:
    """Requests for one model all the time, by a few threads; every answer is kept with its start and end."""

    def __init__(self, service: AdapterService, model: str, *, threads: int = 3) -> None:
        self.answers: list[tuple[float, float, int, str]] = []
        self._service, self._model = service, model
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                reply = self._service.ask(self._model)
                status = reply.status_code
                text = reply.json()["choices"][0]["text"] if status == 200 else reply.text
            except httpx.HTTPError as error:
                status, text = 0, repr(error)
            self.answers.append((began, time.monotonic(), status, text))
            time.sleep(0.02)


class Truth:
    """Compares `GET /v1/adapters`, again and again, with what the replicas themselves say just before and just after.

    A replica that says the same in both must be told so in between, and `ready` must be true of every one of them.
    """

    def __init__(self, service: AdapterService) -> None:
        self.checks, self.phases, self.lies = 0, set[str](), list[str]()
        self.last: dict[str, dict[str, Any]] = {}
        self._service = service
        self._stop, self._asking = threading.Event(), threading.Lock()
        raylet = " ".join(service.pids("raylet")[0].cmdline())
        address = re.search(r"--gcs-address=([\d.:]+)", raylet)
        folder = re.search(r"/tmp/sbx-\w+", raylet)
        assert address and folder
        self._prober = subprocess.Popen(
            [sys.executable, str(PROBER), address[1], f"{folder[0]}/token", "tiny"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Truth:
        deadline = time.monotonic() + RECONCILED_S
        while not self.probe():
            assert time.monotonic() < deadline, "the prober reaches no replica"
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        assert self._prober.stdin
        self._prober.stdin.close()
        try:
            self._prober.wait(10)
        except subprocess.TimeoutExpired:
            self._prober.kill()
            self._prober.wait()

    def probe(self) -> dict[str, dict[str, Any]]:
        """What each replica says now, by its id."""
        assert self._prober.stdin and self._prober.stdout
        with self._asking:
            self._prober.stdin.write("\n")
            self._prober.stdin.flush()
            line = self._prober.stdout.readline()
            assert line, "the prober has ended"
            self.last = {report["replica_id"]: report for report in orjson.loads(line)}
            return self.last

    def _run(self) -> None:
        while not self._stop.is_set():
            before = self.probe()
            with contextlib.suppress(httpx.HTTPError, ValueError, KeyError):
                reply = httpx.get(f"{self._service.url}/v1/adapters", timeout=RECONCILED_S)
                records = reply.json()["data"]
                self._check(before, records, self.probe())
            time.sleep(0.05)

    def _check(
        self, before: dict[str, dict[str, Any]], records: list[dict[str, Any]], after: dict[str, dict[str, Any]]
    ) -> None:
        for record in records:
            self.checks += 1
            self.phases.add(record["phase"])
            self.lies += [f"{time.monotonic():.1f}: {lie}" for lie in _lies(before, record, after)]


def _lies(before: dict[str, Any], record: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """What a record says that was neither so before it was asked for nor after."""
    name, version = record["name"], f"{record['name']}@{record['version']}"
    same = [r for r in before if r in after and before[r]["nonce"] == after[r]["nonce"] and after[r]["ready"]]
    for replica in same:
        held = [
            {v: a["state"] for v, a in x[replica]["adapters"].items() if v.startswith(f"{name}@")}
            for x in (before, after)
        ]
        if record["phase"] == "ready" and all(states.get(version) != "ready" for states in held):
            yield f"{version} is said to be ready, and {replica} holds {held}"
        said = record["replicas"].get(replica)
        if held[0] == held[1] and said is not None and said["phase"] != "unreachable":
            told = {f"{name}@{number}": phase for number, phase in said["holds"].items()}
            if told != {v: SAID[state] for v, state in held[0].items()}:
                yield f"{replica} is said to hold {told}, and holds {held[0]}"
    reached = before or after  # or both probes came too late
    if (
        record["phase"] == "ready"
        and reached
        and not any(r["adapters"].get(version, {}).get("state") == "ready" for r in (*before.values(), *after.values()))
    ):
        yield f"{version} is said to be ready, and nobody holds it"
