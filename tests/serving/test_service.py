"""First light, for real: `signalbox serve` on the quickstart file, with Ray, HAProxy, Valkey and both models.

One service for the whole file. What users do is done with what users have: the official client and plain HTTP.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
POOL = {"smollm2", "gemma", "smollm2:banking", "smollm2:clinc", "smollm2:gsm8k"}
START_LIMIT_S = 420  # a first start converts two models

pytestmark = [pytest.mark.service, pytest.mark.models, pytest.mark.timeout(600)]


@dataclass
class Running:
    url: str
    process: subprocess.Popen[str]
    output: Path
    artifact: Path  # a symbolic link to the router's folder

    @property
    def api(self) -> str:
        return f"{self.url}/v1"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    port = free_port()
    folder = tmp_path_factory.mktemp("service")
    output, artifact = folder / "output.txt", folder / "router"
    artifact.symlink_to(ROOT / "routers" / "quickstart")
    environment = {"SIGNALBOX__SERVER__PORT": str(port), "SIGNALBOX__ROUTERS__DEFAULT__ARTIFACT": str(artifact)}
    with output.open("w") as sink:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("signalbox")), "serve", "examples/quickstart.yaml"],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=sink,
            stderr=subprocess.STDOUT,
            text=True,
        )
    url = f"http://127.0.0.1:{port}"
    ready = f"Signalbox is ready at {url}"
    deadline = time.monotonic() + START_LIMIT_S
    try:
        while ready not in output.read_text().splitlines():
            assert process.poll() is None, output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.2)
        yield Running(url, process, output, artifact)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture(scope="module")
def client(service: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=service.api, api_key="unused", max_retries=0, timeout=120)


def chat(service: Running, **body: Any) -> httpx.Response:
    defaults = {"model": "auto", "max_tokens": 8, "temperature": 0, "messages": [{"role": "user", "content": "Hi!"}]}
    return httpx.post(f"{service.api}/chat/completions", json=defaults | body, timeout=120)


def route(service: Running, prompt: str, **options: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": prompt}], "signalbox": options}
    reply = httpx.post(f"{service.url}/v1/route", json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_ready_and_the_pool(service: Running) -> None:
    body = httpx.get(f"{service.url}/readyz").json()
    assert body["ready"] and body["router"] == "ok"
    assert all(expert["ready"] for expert in body["experts"].values())
    assert httpx.get(f"{service.url}/healthz").status_code == 200
    assert re.match(r"\d+\.\d+", httpx.get(f"{service.url}/version").json()["version"])
    listed = {m["id"] for m in httpx.get(f"{service.api}/models").json()["data"]}
    assert {"auto", "auto:gold", "auto:bronze", "smollm2", "gemma"} <= listed


def test_auto_says_who_answered_and_why(service: Running) -> None:
    reply = chat(service, messages=[{"role": "user", "content": "What is the capital of France?"}])
    assert reply.status_code == 200, reply.text
    body, headers = reply.json(), reply.headers
    assert body["model"] in POOL and headers["x-signalbox-expert"] == body["model"]
    assert body["choices"][0]["message"]["content"]
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + body["usage"]["completion_tokens"]
    assert headers["x-signalbox-router"] == "default" and 0 <= float(headers["x-signalbox-confidence"]) <= 1
    assert headers["x-signalbox-attempts"] == "1" and float(headers["x-signalbox-overhead-ms"]) > 0
    assert len(headers.get_list("x-request-id")) == 1  # two would mean that Serve's fallback proxy answered


@pytest.mark.parametrize("expert", ["smollm2", "gemma"])
def test_each_model_writes_sense(client: openai.OpenAI, expert: str) -> None:
    """Both know the capital of France; a broken conversion or template would not."""
    reply = client.chat.completions.create(
        model=expert,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        max_tokens=24,
    )
    assert "Paris" in (reply.choices[0].message.content or "")
    assert reply.model == expert


def test_the_official_client_streams(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="auto:gold",
        messages=[{"role": "user", "content": "Count from one to ten in words."}],
        max_tokens=20,
        stream=True,
        stream_options={"include_usage": True},
        temperature=0.7,
        seed=3,
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    assert len(texts) > 3, "token by token, not all at once"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] in ("stop", "length")
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens <= 20


def test_completions_and_logprobs(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model="smollm2", prompt="Once upon a time", max_tokens=6, temperature=0, logprobs=2
    )
    assert reply.choices[0].text
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None and len(logprobs.token_logprobs or []) == reply.usage.completion_tokens  # type: ignore[union-attr]


def test_sixteen_at_once(service: Running) -> None:
    def one(i: int) -> httpx.Response:
        return chat(service, messages=[{"role": "user", "content": f"Tell me about the number {i}."}], max_tokens=12)

    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(one, range(16)))
    assert [r.status_code for r in replies] == [200] * 16
    assert all(r.json()["choices"][0]["message"]["content"] for r in replies)


def test_the_same_question_again_is_a_cache_hit(service: Running) -> None:
    question = {"messages": [{"role": "user", "content": f"Name a colour. ({time.time_ns()})"}]}
    first, second = chat(service, **question), chat(service, **question)
    assert first.headers["x-signalbox-cache"] == "miss" and second.headers["x-signalbox-cache"] == "hit"
    assert first.json()["choices"] == second.json()["choices"]
    streamed = chat(service, **question, stream=True)
    assert streamed.headers["x-signalbox-cache"] == "hit" and streamed.text.endswith("data: [DONE]\n\n")
    assert chat(service, **question, temperature=0.5).headers["x-signalbox-cache"] == "bypass"


def test_the_router_tells_tasks_apart(service: Running) -> None:
    """At `tradeoff` 0 the choice follows the predicted quality, and an adapter gets the prompts of its task."""
    prompts = [
        "What is 37 + 58?",
        "Write a Python function that checks whether a string is a palindrome.",
        "Classify the intent of the user's message.\n\nMessage: I lost my card",
        "Tell me a story that begins like this: The last train had left an hour ago.",
        "Natalia sold clips to 48 friends in April and half as many in May. How many did she sell altogether?",
        "I still have not received my new card, when will it arrive?",
        "Please set an alarm for six in the morning",
    ]
    plans = [route(service, p, cost_quality_tradeoff=0) for p in prompts]
    for plan in plans:
        best = max(plan["ratings"], key=lambda r: r["quality"])
        assert plan["expert"] == best["expert"] and best["cost_usd"] > 0 and best["total_ms"] > 0
    assert plans[3]["expert"] == "gemma"
    assert [plan["expert"] for plan in plans[4:]] == ["smollm2:gsm8k", "smollm2:banking", "smollm2:clinc"]
    cheap = [route(service, p, cost_quality_tradeoff=10) for p in prompts]
    assert all(plan["expert"].startswith("smollm2") for plan in cheap)
    flagged = route(service, "Tell me a story. [Flag: smallest model]")
    assert flagged["flags"] and flagged["expert"].startswith("smollm2")


def test_a_ceiling_strikes_out_and_is_named(service: Running) -> None:
    body = {"model": "auto:bronze", "messages": [{"role": "user", "content": "Hi!"}]}
    plan = httpx.post(f"{service.url}/v1/route", json=body).json()
    struck = {r["expert"]: [s["constraint"] for s in r["strikes"]] for r in plan["ratings"]}
    assert struck["gemma"] == ["max_cost_per_1m"] and plan["expert"].startswith("smollm2")


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"model": "gpt-9"}, 404, "smollm2"),
        ({"model": "auto:platinum"}, 404, "auto:gold"),
        ({"max_tokens": -1}, 400, "max_tokens"),
        ({"temperature": 9}, 400, "temperature"),
        ({"messages": []}, 400, "messages"),
        ({"messages": "hi"}, 400, "messages"),
        ({"model": "smollm2", "messages": [{"role": "user", "content": "word " * 9000}]}, 400, "shorten the prompt"),
        ({"model": "smollm2", "tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools"),
        ({"signalbox": {"cost_quality": 3}}, 400, "cost_quality"),
        ({"signalbox": {"allowed": ["none-*"]}}, 400, "no expert"),
    ],
)
def test_bad_requests_get_a_reason(service: Running, body: dict[str, Any], status: int, says: str) -> None:
    reply = chat(service, **body)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert says in error["message"] and set(error) == {"message", "type", "param", "code"}


def test_malformed_json_and_unknown_routes(service: Running) -> None:
    reply = httpx.post(f"{service.api}/chat/completions", content=b'{"model": "auto", ')
    assert reply.status_code == 400 and "JSON" in reply.json()["error"]["message"]
    assert httpx.get(f"{service.api}/nothing").status_code == 404
    assert httpx.get(f"{service.api}/chat/completions").status_code == 405


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(service: Running, stream: bool) -> None:
    """A long answer is dropped while it is written; the expert stops working on it."""

    def working() -> int:
        model = httpx.get(f"{service.api}/models/smollm2").json()
        state = model["signalbox"]["state"]
        return int(state["running"] + state["waiting"])

    body = {"model": "smollm2", "messages": [{"role": "user", "content": "Write a very long story."}]}
    body |= {"max_tokens": 4000, "temperature": 1, "stream": stream, "logit_bias": {"2": -100}}  # 2 ends an answer
    deadline = time.monotonic() + 20
    with (
        contextlib.suppress(httpx.ReadTimeout),
        httpx.stream("POST", f"{service.api}/chat/completions", json=body, timeout=2) as reply,
    ):
        assert reply.status_code == 200 and stream
        lines = reply.iter_lines()  # kept: a dropped iterator closes the connection
        next(lines)
        while not working():
            assert time.monotonic() < deadline
            time.sleep(0.1)
    while working():
        assert time.monotonic() < deadline, "still generating for a client that has left"
        time.sleep(0.1)


def test_an_outcome_counts_once(service: Running) -> None:
    reply = chat(service, messages=[{"role": "user", "content": f"What is the capital of Peru? ({time.time_ns()})"}])
    request_id = reply.headers["x-request-id"]
    decision = httpx.get(f"{service.api}/decisions/{request_id}").json()
    assert decision["expert"] == reply.json()["model"] and set(decision["predictions"]) == POOL
    outcome = {"request_id": request_id, "score": 0.5}
    headers = {"idempotency-key": f"key-{time.time_ns()}"}
    taken = [httpx.post(f"{service.api}/outcomes", json=outcome, headers=headers) for _ in range(3)]
    assert [r.status_code for r in taken] == [202] * 3 and len({r.content for r in taken}) == 1
    clash = httpx.post(f"{service.api}/outcomes", json=outcome | {"score": 0.6}, headers=headers)
    assert clash.status_code == 409
    assert httpx.post(f"{service.api}/outcomes", json=outcome | {"request_id": "unknown"}).status_code == 404
    deadline = time.monotonic() + 60
    while not (router := httpx.get(f"{service.api}/routers").json()["data"][0])["learning"]["outcomes"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert router["learning"]["outcomes"] == 1 and router["learning"]["rollbacks"] == 0


def test_a_new_router_takes_over_under_traffic(service: Running, tmp_path: Path) -> None:
    from signalbox.router.artifact import read_artifact, save_artifact

    def version() -> str:
        return str(httpx.get(f"{service.api}/routers").json()["data"][0]["version"])

    old = read_artifact(service.artifact)
    new = replace(old, spread=old.spread * 1.01)
    save_artifact(new, tmp_path / "new")
    assert version() == old.version
    seen: list[tuple[int, str]] = []
    swapped = threading.Event()

    def ask(worker: int) -> None:
        while not swapped.is_set():
            text = f"Name a colour. ({worker}, {time.time_ns()})"
            reply = chat(service, messages=[{"role": "user", "content": text}], max_tokens=2)
            seen.append((reply.status_code, reply.headers.get("x-signalbox-router", "")))

    with ThreadPoolExecutor(3) as pool:
        tasks = [pool.submit(ask, worker) for worker in range(3)]
        try:
            fresh = service.artifact.with_name(".fresh")
            fresh.symlink_to(tmp_path / "new")
            fresh.replace(service.artifact)
            deadline = time.monotonic() + 120
            while version() != new.version:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        finally:
            swapped.set()
        for task in tasks:
            task.result()
    assert seen and set(seen) == {(200, "default")}
    learning = httpx.get(f"{service.api}/routers").json()["data"][0]["learning"]
    assert learning["outcomes"] == 0, "what was learned belonged to the old version"


def test_command_line_route(service: Running) -> None:
    command = [str(Path(sys.executable).with_name("signalbox")), "route", "What is 2+2?", "--url", service.url]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "smollm2" in done.stdout and "gemma" in done.stdout


def test_everything_listens_on_loopback_only(service: Running) -> None:
    family = [psutil.Process(service.process.pid), *psutil.Process(service.process.pid).children(recursive=True)]
    listening = {
        c.laddr.ip for process in family for c in process.net_connections(kind="tcp") if c.status == psutil.CONN_LISTEN
    }
    assert listening and listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_zz_ctrl_c_leaves_nothing_behind(service: Running) -> None:
    """Last, for it ends the service."""
    family = psutil.Process(service.process.pid).children(recursive=True)
    assert len(family) > 5
    service.process.send_signal(signal.SIGINT)
    assert service.process.wait(60) == 0, service.output.read_text()
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive, alive
