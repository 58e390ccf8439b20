"""Intents, samples and priority through the whole gateway: what a client asks for, and what the reply says of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.serving.conftest import Service, make_config, serve_gateway, until_ready

POLICIES = {
    "plain": {"max_tokens": 8, "cache": "off", "priority": 2},
    "several": {
        "max_tokens": 8,
        "cache": "off",
        "parallel": {"samples": 3, "arbiter": "vote"},
        "intents": {
            "alone": {"keywords": ["quickly"], "parallel": {"samples": 1}, "max_tokens": 3},
            "judged": {"parallel": {"samples": 3, "arbiter": "judge", "judge": "wide"}},
        },
    },
    "thrifty": {
        "max_tokens": 8,
        "cache": "off",
        # One answer of `tiny` costs some 3e-6 USD, of `wide` ten times that.
        "slo": {"max_cost_per_request": 0.000009},
        "parallel": {"samples": 16, "arbiter": "none"},
    },
}


@pytest.fixture(scope="module")
async def gateway(
    models: dict[str, Path], router_artifact: Path, valkey: str, expert_handles: dict[str, Any]
) -> AsyncIterator[Service]:
    config = make_config(models, router_artifact, policies=POLICIES)
    async with serve_gateway(config, valkey, expert_handles) as running:
        await until_ready(running)
        yield running


async def ask(gateway: Service, policy: str, text: str = "Tell me a story", **more: Any) -> tuple[dict[str, Any], Any]:
    headers = more.pop("headers", {})
    body = {"model": f"auto:{policy}", "messages": [{"role": "user", "content": text}], "temperature": 1.0, **more}
    reply = await gateway.client.post("/v1/chat/completions", json=body, headers=headers)
    return reply.json(), reply


async def test_several_answers_are_drawn_one_is_given_and_all_are_in_the_usage(gateway: Service) -> None:
    one, reply = await ask(gateway, "plain", seed=1)
    assert "x-signalbox-samples" not in reply.headers
    body, reply = await ask(gateway, "several", seed=1)
    assert reply.status_code == 200, body
    assert reply.headers["x-signalbox-samples"] == "3" and len(body["choices"]) == 1
    assert body["choices"][0]["message"]["content"]
    # Random models do not agree, so all three are awaited; each has its prompt and some of 8 tokens.
    if reply.headers["x-signalbox-expert"] == one["model"]:
        assert body["usage"]["prompt_tokens"] == 3 * one["usage"]["prompt_tokens"]
    assert 3 <= body["usage"]["completion_tokens"] <= 24


async def test_a_request_can_lower_the_number(gateway: Service) -> None:
    _, reply = await ask(gateway, "several", signalbox={"samples": 2})
    assert reply.headers["x-signalbox-samples"] == "2"
    _, reply = await ask(gateway, "several", signalbox={"samples": 16})
    assert reply.headers["x-signalbox-samples"] == "3"
    for more in ({"temperature": 0}, {"n": 2}, {"signalbox": {"samples": 1}}):
        _, reply = await ask(gateway, "several", **more)
        assert reply.status_code == 200 and "x-signalbox-samples" not in reply.headers
    body, reply = await ask(gateway, "several", signalbox={"samples": 0})
    assert reply.status_code == 400 and body["error"]["param"] == "signalbox.samples"


async def test_no_more_samples_than_the_ceiling_on_cost_allows(gateway: Service) -> None:
    body, reply = await ask(gateway, "thrifty", max_tokens=8)
    samples = int(reply.headers.get("x-signalbox-samples", "1"))
    assert reply.status_code == 200 and 1 <= samples < 16 and "x-signalbox-violated" not in reply.headers
    assert body["model"] == "tiny", "of `wide` not even one fits"


async def test_streams_get_the_chosen_answer(gateway: Service) -> None:
    client = openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="unused")
    stream = await client.chat.completions.create(
        model="auto:several",
        messages=[{"role": "user", "content": "Tell me a story"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    text, reasons, usage = "", [], None
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert choice.index == 0
            text += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
    await client.close()
    assert text and len(reasons) == 1 and usage is not None and usage.completion_tokens >= 3


async def test_an_intent_by_keyword_and_by_name(gateway: Service) -> None:
    body, reply = await ask(gateway, "several", "Tell me a story, QUICKLY!")
    assert reply.headers["x-signalbox-intent"] == "alone" and "x-signalbox-samples" not in reply.headers
    assert body["usage"]["completion_tokens"] <= 3, "its own bound on the answer"
    _, reply = await ask(gateway, "several", "Tell me a story")
    assert "x-signalbox-intent" not in reply.headers
    _, reply = await ask(gateway, "several", "A story, quickly", signalbox={"intent": "judged"})
    assert reply.headers["x-signalbox-intent"] == "judged" and reply.headers["x-signalbox-samples"] == "3"
    body, reply = await ask(gateway, "several", signalbox={"intent": "poetry"})
    assert reply.status_code == 400 and body["error"]["param"] == "signalbox.intent"
    assert "alone, judged" in body["error"]["message"]


async def test_the_judges_tokens_are_in_the_usage(gateway: Service) -> None:
    voted, _ = await ask(gateway, "several", "A story about a fox", seed=3)
    judged, reply = await ask(gateway, "several", "A story about a fox", seed=3, signalbox={"intent": "judged"})
    assert reply.status_code == 200, judged
    # The judge reads the question and all three answers, in a prompt far longer than theirs together.
    assert judged["usage"]["prompt_tokens"] > voted["usage"]["prompt_tokens"] + 100


async def test_route_tells_intent_samples_and_priority(gateway: Service) -> None:
    body = {"messages": [{"role": "user", "content": "Tell me a story, quickly"}], "temperature": 1.0}
    said = (await gateway.client.post("/v1/route", json={"model": "auto:several", **body})).json()
    assert (said["intent"], said["samples"], said["priority"]) == ("alone", 1, 0)
    for header, priority in ((None, 2), ("-3", -3), ("7", 2)):
        headers = {} if header is None else {"x-priority": header}
        reply = await gateway.client.post("/v1/route", json={"model": "auto:plain", **body}, headers=headers)
        assert (reply.json()["intent"], reply.json()["priority"]) == (None, priority)
    reply = await gateway.client.post("/v1/route", json={"model": "auto:plain", **body}, headers={"x-priority": "high"})
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "x-priority"
