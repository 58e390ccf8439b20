"""Decisions on record, outcomes taken once, and one log from which all gateways learn: on a real Valkey, over HTTP."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import redis

from signalbox.experts.base import InvalidRequest
from signalbox.policies.base import Policy, RequestShape
from signalbox.policies.decide import decide
from signalbox.router.base import Prediction, Prompt
from signalbox.router.online import Learning, OnlineRouter
from signalbox.serving.config import OutcomesConfig
from signalbox.serving.dispatch import Plan, Run
from signalbox.serving.embedded_valkey import EmbeddedValkey
from signalbox.serving.learner import SNAPSHOT_OUTCOMES, Learner
from signalbox.serving.live_state import candidate
from signalbox.serving.outcomes import START, Feedback, Outcomes
from signalbox.serving.planning import Ruling
from signalbox.serving.routing import Basis, Routing
from signalbox.serving.store import PREFIX, Store
from tests.serving.conftest import Service, make_config, serve_gateway, until_ready

EXPERTS = ("tiny", "wide")


def unique(text: str = "hello") -> str:
    return f"{text} {time.time_ns()}"


async def ask(service: Service, text: str | None = None, **fields: Any) -> Any:
    body = {"model": "auto", "max_tokens": 2, "messages": [{"role": "user", "content": text or unique()}]} | fields
    reply = await service.client.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    return reply


async def post(service: Service, request_id: str, score: Any, key: str | None = None) -> Any:
    headers = {} if key is None else {"idempotency-key": key}
    return await service.client.post("/v1/outcomes", json={"request_id": request_id, "score": score}, headers=headers)


async def decision(service: Service, request_id: str) -> Any:
    return await service.client.get(f"/v1/decisions/{request_id}")


# -- over HTTP -----------------------------------------------------------------------------------------------------


async def test_a_decision_and_its_outcome(service: Service) -> None:
    secret = unique("What is 31 plus 12? xyzzy")
    reply = await ask(service, secret, model="auto:gold")
    request_id = reply.headers["x-request-id"]
    found = (await decision(service, request_id)).json()
    assert found["expert"] == found["chosen"] == reply.json()["model"] == reply.headers["x-signalbox-expert"]
    assert (found["policy"], found["router"], found["model"]) == ("gold", "default", "auto:gold")
    assert len(found["router_version"]) == 12 and found["cache"] == "bypass" and found["attempts"] == 1
    assert set(found["predictions"]) == set(EXPERTS)
    assert all(0 <= p["quality"] <= 1 and p["uncertainty"] > 0 for p in found["predictions"].values())
    assert (found["explored"], found["propensity"], found["outcome"]) == (False, 1.0, None)
    taken = await post(service, request_id, 0.75)
    assert taken.status_code == 202
    assert taken.json() == {
        "object": "outcome",
        "request_id": request_id,
        "expert": found["expert"],
        "score": 0.75,
        "status": "accepted",
    }
    assert (await decision(service, request_id)).json() == found | {"outcome": {"score": 0.75}}


async def test_no_word_of_the_prompt_is_kept(service: Service, valkey: str) -> None:
    reply = await ask(service, "the word is quetzalcoatl", signalbox={"cache": {"mode": "off"}})
    await post(service, reply.headers["x-request-id"], 1)
    with redis.Redis.from_url(valkey) as direct:
        record = direct.hgetall(f"{PREFIX}record:{reply.headers['x-request-id']}")
        log = direct.xrange(f"{PREFIX}outcomes:default")
    assert record and log
    assert b"quetzalcoatl" not in b"".join(record.values()) and "quetzalcoatl" not in str(log)


async def test_it_is_on_record_before_the_stream_ends(service: Service) -> None:
    for _ in range(20):
        request_id = uuid.uuid4().hex
        reply = await service.client.post(
            "/v1/chat/completions",
            json={
                "model": "auto",
                "max_tokens": 1,
                "stream": True,
                "messages": [{"role": "user", "content": unique()}],
            },
            headers={"x-request-id": request_id},
        )
        assert reply.text.endswith("data: [DONE]\n\n")
        assert (await post(service, request_id, 1)).status_code == 202


async def test_a_cached_answer_has_a_decision_of_its_own(service: Service) -> None:
    text = unique("What is 3 plus 4?")
    first, second = [await ask(service, text, temperature=0) for _ in range(2)]
    assert second.headers["x-signalbox-cache"] == "hit"
    one, other = [(await decision(service, r.headers["x-request-id"])).json() for r in (first, second)]
    assert (one["cache"], other["cache"]) == ("miss", "hit") and one["request_id"] != other["request_id"]
    for name in ("expert", "policy", "router", "router_version", "predictions", "confidence"):
        assert one[name] == other[name]
    assert (await post(service, other["request_id"], 0.5)).status_code == 202
    assert (await decision(service, one["request_id"])).json()["outcome"] is None


async def test_an_idempotency_key_counts_once(service: Service, valkey: str) -> None:
    def logged() -> int:
        with redis.Redis.from_url(valkey) as direct:
            return direct.xinfo_stream(f"{PREFIX}outcomes:default")["entries-added"]  # type: ignore[index,no-any-return]

    request_id, key = (await ask(service)).headers["x-request-id"], uuid.uuid4().hex
    first = await post(service, request_id, 0.25, key)
    before = logged()
    again = await post(service, request_id, 0.25, key)
    assert (again.status_code, again.content) == (first.status_code, first.content) == (202, first.content)
    assert (await post(service, request_id, 0.25)).content == first.content, "nor does the same outcome without a key"
    assert logged() == before, "counted once"
    other = (await ask(service)).headers["x-request-id"]
    for body in ((request_id, 0.5), (other, 0.25)):
        clash = await post(service, *body, key)
        assert clash.status_code == 409 and clash.json()["error"]["code"] == "idempotency_conflict"
        assert "new key" in clash.json()["error"]["message"]
    assert (await decision(service, other)).json()["outcome"] is None
    at_once = await asyncio.gather(*(post(service, other, 1, "k" * 255) for _ in range(8)))
    assert {r.status_code for r in at_once} == {202} and len({r.content for r in at_once}) == 1
    assert logged() == before + 1


async def test_an_outcome_is_final(service: Service) -> None:
    request_id = (await ask(service)).headers["x-request-id"]
    assert (await post(service, request_id, 0.1)).status_code == 202
    for key in (None, uuid.uuid4().hex):
        clash = await post(service, request_id, 0.9, key)
        assert clash.status_code == 409 and clash.json()["error"]["code"] == "outcome_conflict"
        assert "0.1" in clash.json()["error"]["message"]


async def test_only_auto_requests_have_one(service: Service) -> None:
    named = await ask(service, model="tiny")
    for request_id in (named.headers["x-request-id"], "never-seen", "a/b"):
        for reply in (await post(service, request_id, 0.5), await decision(service, request_id)):
            assert reply.status_code == 404 and reply.json()["error"]["code"] == "decision_not_found"
            assert "auto" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"request_id": "a"}, "score"),
        ({"score": 0.5}, "request_id"),
        ({"request_id": "a", "score": 1.01}, "score"),
        ({"request_id": "a", "score": -0.01}, "score"),
        ({"request_id": "a", "score": True}, "score"),
        ({"request_id": "a", "score": "1"}, "score"),
        ({"request_id": "a", "score": None}, "score"),
        ({"request_id": "", "score": 1}, "request_id"),
        ({"request_id": "a b", "score": 1}, "request_id"),
        ({"request_id": "x" * 200, "score": 1}, "request_id"),
        ({"request_id": 7, "score": 1}, "request_id"),
        ({"request_id": "a", "score": 1, "comment": "well done"}, "comment"),
    ],
)
async def test_bad_outcomes(service: Service, body: dict[str, Any], param: str) -> None:
    reply = await service.client.post("/v1/outcomes", json=body)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == param, reply.text


@pytest.mark.parametrize(
    "body", [b'{"request_id": "a", "score": NaN}', b"[]", b"", b'{"request_id": "a", "score": 1e999}']
)
async def test_malformed_outcomes(service: Service, body: bytes) -> None:
    assert (await service.client.post("/v1/outcomes", content=body)).status_code == 400


async def test_bad_keys_sizes_and_methods(service: Service) -> None:
    for key in ("", "k" * 256):
        reply = await post(service, "a", 1, key)
        assert reply.status_code == 400 and reply.json()["error"]["param"] == "Idempotency-Key"
    large = await service.client.post("/v1/outcomes", content=b" " * 5000)
    assert large.status_code == 413
    assert (await service.client.get("/v1/outcomes")).status_code == 405
    assert (await service.client.post("/v1/decisions/a")).status_code == 405


@asynccontextmanager
async def gateway(
    name: str, models: dict[str, Path], artifact: Path, valkey: str, handles: dict[str, Any], **changes: Any
) -> AsyncIterator[Service]:
    """A gateway whose router has a log of its own: what it learns bears on no other test."""
    routers = {name: {"kind": "tryage", "artifact": str(artifact)}}
    config = make_config(models, routers=routers, default_router=name, **changes)
    async with serve_gateway(config, valkey, handles) as service:
        await until_ready(service)
        yield service


async def test_the_router_learns_and_says_so(
    models: dict[str, Path], router_artifact: Path, valkey: str, expert_handles: dict[str, Any]
) -> None:
    story = "Tell me a story about a dragon and a knight."
    async with gateway("learner", models, router_artifact, valkey, expert_handles) as service:

        async def routers() -> dict[str, Any]:
            listed = (await service.client.get("/v1/routers")).json()
            assert listed["object"] == "list" and len(listed["data"]) == 1
            return listed["data"][0]  # type: ignore[no-any-return]

        async def qualities() -> dict[str, float]:
            body = {"messages": [{"role": "user", "content": story}]}
            plan = (await service.client.post("/v1/route", json=body)).json()
            return {r["expert"]: r["quality"] for r in plan["ratings"]}

        router, before = await routers(), await qualities()
        assert (router["name"], router["kind"], router["default"]) == ("learner", "tryage", True)
        assert len(router["version"]) == 12 and router["loaded_at"] and router["refused"] is None
        assert router["learning"]["enabled"] and not router["learning"]["active"]
        first = await ask(service, story, temperature=0)
        assert first.json()["model"] == "wide"
        await post(service, first.headers["x-request-id"], 0.0)
        for _ in range(120):
            reply = await ask(service, story, signalbox={"cache": {"mode": "off"}})
            await post(service, reply.headers["x-request-id"], 0.0 if reply.json()["model"] == "wide" else 1.0)
        for _ in range(100):
            learning = (await routers())["learning"]
            if learning["outcomes"] >= 121:
                break
            await asyncio.sleep(0.05)
        after = await qualities()
        assert learning["active"] and learning["rollbacks"] == 0
        assert learning["error_online"] < learning["error_shipped"]
        assert after["wide"] < before["wide"] - 0.05 and after["tiny"] > before["tiny"] + 0.05
        again = await ask(service, story, temperature=0)
        assert again.json()["model"] == "tiny" and again.headers["x-signalbox-cache"] == "miss", (
            "nor does the cache lag"
        )


async def test_exploration_is_bounded_recorded_and_not_remembered(
    models: dict[str, Path], router_artifact: Path, valkey: str, expert_handles: dict[str, Any]
) -> None:
    eager = {"explore": {"share": 0.5, "max_loss": 1.0}}
    policies = {"eager": eager, "strict": {"slo": {"max_cost_per_1m": 0.5}} | eager}
    async with gateway("explorer", models, router_artifact, valkey, expert_handles, policies=policies) as service:
        # As if the artifact were not sure of its qualities: then the posterior asks for exploration.
        service.app._routing.online.learning = Learning(prior_deviation=0.5)
        text, seen = unique("What is 5 plus 6?"), []
        while not seen or (seen[-1]["explored"] and len(seen) < 100):
            reply = await ask(service, text, model="auto:eager", temperature=0)
            seen.append((await decision(service, reply.headers["x-request-id"])).json())
        assert seen[-1]["expert"] == "tiny" and not seen[-1]["explored"]
        for _ in range(20):  # the greedy choice is remembered, what was explored was not
            reply = await ask(service, text, model="auto:eager", temperature=0)
            assert (reply.json()["model"], reply.headers["x-signalbox-cache"]) == ("tiny", "hit")
        fresh = [await ask(service, unique("What is 5 plus 6?"), model="auto:eager") for _ in range(60)]
        found = [(await decision(service, r.headers["x-request-id"])).json() for r in fresh]
        assert 0.05 < np.mean([d["explored"] for d in found]) < 0.75
        for d in found:
            assert d["expert"] == ("wide" if d["explored"] else "tiny")
            assert 0 < d["propensity"] <= 0.5 + 1e-9 if d["explored"] else 0.5 - 1e-9 <= d["propensity"] < 1
        strict = [await ask(service, unique("What is 5 plus 6?"), model="auto:strict") for _ in range(20)]
        assert {r.json()["model"] for r in strict} == {"tiny"}, "a ceiling holds for exploration too"
        body = {"model": "auto:eager", "prompt": "What is 5 plus 6?"}
        plans = [(await service.client.post("/v1/route", json=body)).json() for _ in range(20)]
        assert {plan["expert"] for plan in plans} == {"tiny"}, "asking who would answer explores nothing"


async def test_without_the_store_serving_goes_on(
    models: dict[str, Path], router_artifact: Path, expert_handles: dict[str, Any]
) -> None:
    server = EmbeddedValkey()
    try:
        async with serve_gateway(make_config(models, router_artifact), server.start(), expert_handles) as service:
            for _ in range(200):
                if service.app._routing.ready:
                    break
                await asyncio.sleep(0.05)
            # The experts publish to another store: without live state they count as ready once this one is gone.
            await service.app._live.close()  # or what it had read already would come back
            server.stop()
            service.app._live._current.clear()
            reply = await ask(service, unique("What is 2 plus 2?"))
            for refused in (
                await post(service, reply.headers["x-request-id"], 1),
                await decision(service, reply.headers["x-request-id"]),
            ):
                assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
                assert refused.json()["error"]["code"] == "store_unavailable"
            assert service.app._outcomes.unrecorded == 1
    finally:
        server.stop()


# -- the store's side ----------------------------------------------------------------------------------------------


class Even:
    """Two experts, equally good."""

    kind = "even"
    experts = EXPERTS

    def predict(self, prompts: list[Prompt]) -> Prediction:
        half = np.full((len(prompts), 2), 0.5, np.float32)
        return Prediction(self.experts, half, np.full_like(half, 0.3), 0.2)


@pytest.fixture
async def store(valkey: str) -> AsyncIterator[Store]:
    store = Store(valkey)
    yield store
    await store.close()


def a_run(expert: str = "tiny", version: str = "v1", features: int = 4) -> Run:
    """A run as the dispatcher leaves it, as far as a record reads it."""
    prediction = dict.fromkeys(EXPERTS, (0.5, 0.3))
    phi = np.full(features, 0.5, np.float32).tolist()
    basis = Basis(version, phi, prediction, prediction, dict.fromkeys(EXPERTS, 0.05))
    plan = Plan(None, [expert], "default", Ruling("gold", Policy()), 0.5, basis=basis)  # type: ignore[arg-type]
    return Run(plan, expert, "miss", 1, 0.0, 0.0, None, None)  # type: ignore[arg-type]


async def exists(outcomes: Outcomes, request_id: str) -> bool:
    try:
        await outcomes.decision(request_id)
    except InvalidRequest:
        return False
    return True


async def test_records_are_bounded_in_number_and_time(store: Store, valkey: str) -> None:
    with redis.Redis.from_url(valkey) as direct:
        direct.delete(f"{PREFIX}records")
    outcomes = Outcomes(store, OutcomesConfig(max_pending=3), "bounds")
    for i in range(5):
        await outcomes.record(f"bounded-{i}", "auto", a_run())
        await asyncio.sleep(0.002)
    assert [await exists(outcomes, f"bounded-{i}") for i in range(5)] == [False, False, True, True, True]
    short = Outcomes(store, OutcomesConfig(ttl_s=30), "bounds")
    await short.record("short", "auto", a_run())
    assert await exists(short, "short")
    with redis.Redis.from_url(valkey) as direct:
        assert 0 < direct.pttl(f"{PREFIX}record:short") <= 30_000
        direct.pexpire(f"{PREFIX}record:short", 1)
    await asyncio.sleep(0.1)
    assert not await exists(short, "short")
    with pytest.raises(InvalidRequest) as gone:
        await short.post(Feedback("short", 0.5, "key-of-short"))
    assert gone.value.status == 404
    with redis.Redis.from_url(valkey) as direct:
        assert direct.ttl(f"{PREFIX}records") > 0 or not direct.exists(f"{PREFIX}records")


async def test_the_log_is_bounded_and_reads_on(store: Store, valkey: str) -> None:
    outcomes = Outcomes(store, OutcomesConfig(log_length=100), "long")
    for i in range(400):
        await outcomes.record(f"log-{i}", "auto", a_run(version="v2" if i % 2 else "v1"))
        await outcomes.post(Feedback(f"log-{i}", i / 400, None))
    with redis.Redis.from_url(valkey) as direct:
        assert direct.xlen(f"{PREFIX}outcomes:long") < 250
    position, first = await outcomes.after(START, 50, "v1")
    assert len(first) == 25, "of the other version's outcomes nothing is learned"
    position, rest = await outcomes.after(position, 1000, "v1")
    scores = [o.score for o in [*first, *rest]]
    assert scores == sorted(scores) and scores[-1] == 398 / 400
    assert await outcomes.after(position, 1000, "v1") == (position, [])


async def test_entries_that_cannot_be_read_are_passed_over(store: Store, valkey: str) -> None:
    outcomes = Outcomes(store, OutcomesConfig(), "torn")
    with redis.Redis.from_url(valkey) as direct:
        for evidence in (b"not json", b"{}", b'{"version": "v1"}'):
            direct.xadd(f"{PREFIX}outcomes:torn", {"evidence": evidence, "score": "1"})
        direct.xadd(f"{PREFIX}outcomes:torn", {"other": "1"})
    await outcomes.record("torn-1", "auto", a_run())
    await outcomes.post(Feedback("torn-1", 1.0, None))
    _, found = await outcomes.after(START, 100, "v1")
    assert [o.score for o in found] == [1.0]


def a_gateway(outcomes: Outcomes, version: str = "v1") -> tuple[Routing, Learner]:
    routing = Routing(EXPERTS, name="default")
    online = OnlineRouter(Even(), version=version)
    online.predict([Prompt("warm up")])
    routing.swap(online)
    return routing, Learner(routing, outcomes)


async def exhaust(learner: Learner) -> None:
    while await learner.step():
        pass


async def test_all_gateways_reach_the_same_state_and_a_new_one_catches_up(store: Store) -> None:
    outcomes = Outcomes(store, OutcomesConfig(), f"fleet-{uuid.uuid4().hex}")
    (one, first), (other, second) = a_gateway(outcomes), a_gateway(outcomes)
    rng = np.random.default_rng(0)
    for i in range(SNAPSHOT_OUTCOMES + 50):
        request_id = uuid.uuid4().hex
        await outcomes.record(request_id, "auto", a_run(EXPERTS[int(rng.integers(2))]))
        await outcomes.post(Feedback(request_id, float(rng.random()), None))
        if i % 7 == 0:
            await exhaust(first)  # they read at their own pace
    await exhaust(first)
    await exhaust(second)
    states = [routing.online.state for routing in (one, other) if routing.online]
    assert states[0] is not None and states[1] is not None
    assert states[0].dumps() == states[1].dumps() and states[0].updates == SNAPSHOT_OUTCOMES + 50
    late, third = a_gateway(outcomes)
    found = await outcomes.snapshot("v1")
    assert found is not None and found[1].updates >= SNAPSHOT_OUTCOMES
    await exhaust(third)
    assert late.online is not None and late.online.state is not None
    assert late.online.state.dumps() == states[0].dumps(), "from the snapshot on"
    assert one.generation == late.generation == f"v1/0/{(SNAPSHOT_OUTCOMES + 50) // 100}"


async def test_a_new_version_starts_afresh(store: Store) -> None:
    outcomes = Outcomes(store, OutcomesConfig(), f"fresh-{uuid.uuid4().hex}")
    routing, learner = a_gateway(outcomes)
    for version in ("v1", "v1", "v2"):
        request_id = uuid.uuid4().hex
        await outcomes.record(request_id, "auto", a_run(version=version))
        await outcomes.post(Feedback(request_id, 1.0, None))
    await exhaust(learner)
    assert routing.online is not None and routing.online.describe()["updates"] == 2
    new = OnlineRouter(Even(), version="v2")
    new.predict([Prompt("warm up")])
    routing.swap(new)
    assert new.describe()["updates"] == 0
    await exhaust(learner)
    assert new.describe()["updates"] == 1, "what was said of the new version before this gateway had it"


async def test_a_rollback_is_logged_and_counted(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    outcomes = Outcomes(store, OutcomesConfig(), f"poison-{uuid.uuid4().hex}")
    routing, learner = a_gateway(outcomes)
    for i in range(300):  # all well at first, then the opposite of what was learned
        request_id = uuid.uuid4().hex
        await outcomes.record(request_id, "auto", a_run())
        await outcomes.post(Feedback(request_id, 0.9 if i < 150 else 0.1, None))
    before = routing.generation
    await exhaust(learner)
    assert caplog.text.count("rolled back: it did worse than the artifact") == 1
    said = routing.describe()["learning"]
    assert (said["rollbacks"], said["active"], said["outcomes"]) == (1, False, 300) and said["cool_down"] > 0
    assert routing.generation not in (before, "v1/0/0"), "decisions by what was learned are not repeated"
    scores = routing.online.predict([Prompt("x")]) if routing.online else None
    assert scores is not None and scores.quality.tolist() == [[0.5, 0.5]], "the shipped artifact serves"
    late, third = a_gateway(outcomes)
    await exhaust(third)
    assert late.describe()["learning"] == said, "nor does a restart undo it"


async def test_a_fallback_s_outcome_teaches_about_the_fallback(store: Store) -> None:
    outcomes = Outcomes(store, OutcomesConfig(), f"fallback-{uuid.uuid4().hex}")
    run = a_run("tiny")
    run.expert, run.attempts = "wide", 2
    await outcomes.record("fallback-1", "auto", run)
    assert (await outcomes.decision("fallback-1"))["chosen"] == "tiny"
    assert (await outcomes.post(Feedback("fallback-1", 1.0, None)))["expert"] == "wide"
    assert [o.expert for o in (await outcomes.after(START, 10, "v1"))[1]] == ["wide"]


async def test_without_a_router_an_outcome_is_kept_and_teaches_nothing(store: Store) -> None:
    outcomes = Outcomes(store, OutcomesConfig(), f"none-{uuid.uuid4().hex}")
    run = a_run()
    candidates = make_config({"tiny": Path("tiny"), "wide": Path("wide")}).experts
    pool = [candidate(name, expert) for name, expert in candidates.items()]
    run.plan.decision = decide(dict.fromkeys(EXPERTS, (0.5, 0.0)), pool, RequestShape(10, 10), Policy())
    run.plan.basis = None
    await outcomes.record("unrouted", "auto", run)
    assert (await outcomes.decision("unrouted"))["predictions"] is None
    await outcomes.post(Feedback("unrouted", 1.0, None))
    assert await outcomes.after(START, 10, "v1") == (START, [])
    assert orjson.dumps(await outcomes.decision("unrouted"))
