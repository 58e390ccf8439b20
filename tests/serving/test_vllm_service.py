"""`signalbox serve` with vLLM experts on the CPU: answers, a failed start, killed processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from signalbox.experts.vllm_arguments import installed
from tests.ports import free_port
from tests.tiny_models import save_tiny

pytestmark = [
    pytest.mark.service,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not installed(), reason="vLLM is not installed here: make test-vllm"),
]
ROOT = Path(__file__).resolve().parents[2]
START_S = 300.0


@dataclass
class Running:
    url: str
    process: subprocess.Popen[bytes]
    output: Path

    def experts(self) -> dict[str, Any]:
        return httpx.get(f"{self.url}/readyz", timeout=10).json()["experts"]

    def chat(self, **body: Any) -> httpx.Response:
        defaults = {"model": "good", "max_tokens": 8, "messages": [{"role": "user", "content": "the fox"}]}
        return httpx.post(f"{self.url}/v1/chat/completions", json=defaults | body, timeout=60)

    def core(self, expert: str) -> psutil.Process | None:
        """The expert's engine core, by the title of the replica above it."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                parent = process.parent()
                title, above = " ".join(process.cmdline()), " ".join(parent.cmdline()) if parent else ""
            except psutil.Error:
                continue
            if "EngineCore" in title and f"expert-{expert}" in above:
                return process
        return None

    def until(self, what: Any, limit_s: float = START_S) -> None:
        deadline = time.monotonic() + limit_s
        while not what():
            assert self.process.poll() is None and time.monotonic() < deadline, self.output.read_text()[-4000:]
            time.sleep(0.1)


@contextmanager
def serving(folder: Path, config: dict[str, Any]) -> Iterator[Running]:
    """`signalbox serve` with a configuration, ready; afterwards no process of it is left."""
    (folder / "c.yaml").write_text(yaml.safe_dump(config))
    port = free_port()
    output = folder / "output.txt"
    with output.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-c", "from signalbox.serving.cli import app; app()", "serve", str(folder / "c.yaml")],
            env=os.environ | {"SIGNALBOX__SERVER__PORT": str(port)},
            stdout=sink,
            stderr=subprocess.STDOUT,
        )
    running = Running(f"http://127.0.0.1:{port}", process, output)
    try:
        running.until(lambda: "Signalbox is ready" in output.read_text())
        yield running
    finally:
        below = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        process.wait(60)
        assert not [p for p in below if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("service")
    model = save_tiny(folder / "tiny", head_dim=32)
    vllm = {"engine": "vllm", "model": str(model), "gpus": 0, "dtype": "float32", "enforce_eager": True}
    plain = {"engine": "transformers", "model": str(model), "dtype": "float32", "threads": 1, "device": "cpu"}
    experts = {"good": vllm, "broken": {**vllm, "max_model_len": 99_999}, "plain": plain}
    with serving(folder, {"experts": experts}) as running:
        yield running


def test_one_expert_that_cannot_start_says_why_and_the_rest_serves(service: Running) -> None:
    experts = service.experts()
    assert experts["good"]["ready"] and experts["plain"]["ready"] and not experts["broken"]["ready"]
    assert "cannot start: Value error, User-specified max_model_len (99999)" in experts["broken"]["reason"]
    reply = service.chat(model="broken")
    assert reply.status_code == 503 and "max_model_len" in reply.json()["error"]["message"]
    output = service.output.read_text()
    assert "expert good: loading the weights" in output and "expert good is ready" in output


def test_both_engines_give_the_same_greedy_answer(service: Running) -> None:
    answers = [service.chat(model=m, temperature=0, max_tokens=24).json() for m in ("good", "plain")]
    contents = [answer["choices"][0]["message"]["content"] for answer in answers]
    # Of a character that the answer's end cuts in two, vLLM gives nothing.
    assert contents[0] == contents[1].rstrip("\ufffd") and answers[0]["usage"] == answers[1]["usage"]


def test_structured_outputs_are_for_engines_that_know_them(service: Running) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    reply = service.chat(response_format=form, max_tokens=200, temperature=0)
    assert reply.status_code == 200, reply.text
    if reply.json()["choices"][0]["finish_reason"] == "stop":  # white space may go on to the end
        assert json.loads(reply.json()["choices"][0]["message"]["content"])["n"] in (1, 2)
    reply = service.chat(model="plain", response_format=form)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "response_format"
    auto = service.chat(model="auto", response_format=form)
    assert auto.status_code == 200 and auto.headers["x-signalbox-expert"] == "good"
    assert service.chat(tools=[{"type": "function", "function": {"name": "f"}}]).status_code == 400


def test_a_killed_core_comes_back_and_the_others_do_not_notice(service: Running) -> None:
    core = service.core("good")
    assert core is not None
    below = [core, *core.children(recursive=True)]
    core.kill()
    service.until(lambda: not service.experts()["good"]["ready"], 10)
    assert service.chat(model="plain").status_code == 200
    reply = service.chat()
    assert reply.status_code == 503 and "starting again" in reply.json()["error"]["message"]
    assert service.chat(signalbox={"fallbacks": ["plain"]}).headers["x-signalbox-expert"] == "plain"
    service.until(lambda: service.experts()["good"]["ready"])
    assert service.chat().status_code == 200
    assert not [p for p in below if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_a_killed_replica_leaves_no_core_and_comes_back(service: Running) -> None:
    core = service.core("good")
    assert core is not None
    replica, below = core.parent(), [core, *core.children(recursive=True)]
    assert replica is not None
    replica.kill()
    service.until(lambda: not [p for p in below if p.is_running() and p.status() != psutil.STATUS_ZOMBIE], 15)
    assert service.chat(model="plain").status_code == 200
    service.until(lambda: service.core("good") is not None and service.experts()["good"]["ready"])
    service.until(lambda: service.chat().status_code == 200, 30)
