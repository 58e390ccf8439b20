"""The queue in front of an expert: order, bounds, fairness, shedding; and its Lua twin does the very same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgpack
import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from signalbox.policies.admission import AdmissionQueue, Event, Ticket
from signalbox.serving.admission_script import ADMISSION
from signalbox.serving.embedded_valkey import EmbeddedValkey


def ticket(name: str, now: float = 0.0, slack: float = 100.0, **fields: Any) -> Ticket:
    values = {"tenant": "t", "weight": 1.0, "priority": 0, "service": 1.0} | fields
    return Ticket(id=f"g/{name}", arrived=now, deadline=now + slack, **({"due": now + slack} | values))


def arrive(queue: AdmissionQueue, *tickets: Ticket) -> list[Event]:
    return [event for t in tickets for event in queue.arrive(t, t.arrived)]


def order(queue: AdmissionQueue, now: float = 1.0) -> list[str]:
    """The names in the order in which they start when one place is freed again and again."""
    names = []
    while queue.running:
        (running,) = queue.running
        names.append(running.removeprefix("g/"))
        queue.leave(running, now, completed=False)
    return names


def test_the_first_starts_and_the_next_wait() -> None:
    queue = AdmissionQueue(capacity=1, max_queued=8)
    assert arrive(queue, ticket("a")) == [Event("g/a")]
    assert arrive(queue, ticket("b")) == []
    assert queue.leave("g/a", 1.0, completed=True) == [Event("g/b")]


def test_priority_then_earliest_deadline_then_arrival() -> None:
    queue = AdmissionQueue(capacity=1, max_queued=8)
    arrive(
        queue,
        ticket("first"),
        ticket("late", slack=90),
        ticket("soon", slack=50),
        ticket("gold", slack=99, priority=1),
        ticket("same", slack=50, now=0.0),
    )
    assert order(queue) == ["first", "gold", "same", "soon", "late"]


def test_one_tenant_s_flood_does_not_starve_another() -> None:
    queue = AdmissionQueue(capacity=1, max_queued=100)
    arrive(queue, *(ticket(f"flood{i:02}", tenant="loud") for i in range(20)))
    arrive(queue, *(ticket(f"quiet{i}", tenant="quiet", now=0.001 * i) for i in range(5)))
    served = order(queue)
    assert {"quiet0", "quiet1", "quiet2", "quiet3", "quiet4"} <= set(served[:12]), served


def test_a_backlog_does_not_stand_before_another_tenant_s_first_request() -> None:
    """Nor does its age: the flood's requests are due earlier, and were served a lot while nobody else asked."""
    queue = AdmissionQueue(capacity=1, max_queued=1000)
    arrive(queue, *(ticket(f"flood{i:03}", tenant="loud", slack=500) for i in range(100)))
    now = 0.0
    for _ in range(20):
        (running,) = queue.running
        now += 1.0
        queue.leave(running, now, completed=True)
    queue.arrive(ticket("first", now, slack=900, tenant="quiet"), now)
    assert "first" in order(queue, now)[:3]


def test_a_flood_that_fills_the_queue_does_not_shut_others_out() -> None:
    queue = AdmissionQueue(capacity=1, max_queued=10)
    arrive(queue, *(ticket(f"flood{i:02}", tenant="loud") for i in range(30)))
    events = arrive(queue, ticket("first", tenant="quiet"))
    assert [(e.id, e.reason) for e in events] == [("g/flood10", "queue_full")]
    assert order(queue)[:3].count("first") == 1


def test_hurry_is_no_priority() -> None:
    """Who may be refused earlier is not served earlier."""
    queue = AdmissionQueue(capacity=1, max_queued=10)
    arrive(queue, ticket("run"), ticket("calm", slack=50), ticket("hasty", slack=20, due=60.0))
    assert order(queue) == ["run", "calm", "hasty"]


def test_weights_share_the_service() -> None:
    queue = AdmissionQueue(capacity=1, max_queued=100)
    for i in range(40):
        arrive(queue, ticket(f"a{i:02}", tenant="heavy", weight=3.0), ticket(f"b{i:02}", tenant="light", weight=1.0))
    first = order(queue)[:40]
    heavy = sum(name.startswith("a") for name in first)
    assert 28 <= heavy <= 32, first


def test_a_queue_of_each_priority_is_bounded() -> None:
    queue = AdmissionQueue(capacity=1, max_queued=2)
    arrive(queue, ticket("run"), ticket("a"), ticket("b"))
    (refused,) = arrive(queue, ticket("c", slack=101))
    assert (refused.id, refused.reason) == ("g/c", "queue_full") and refused.retry_after_s == pytest.approx(3.0)
    assert [e.id for e in arrive(queue, ticket("d", slack=20))] == ["g/b"], "the last in the queue is refused"
    assert arrive(queue, ticket("gold", priority=1)) == [], "another priority has room of its own"


def test_who_would_start_too_late_is_shed_at_once() -> None:
    queue = AdmissionQueue(capacity=2, max_queued=8)
    arrive(queue, ticket("a", service=10.0), ticket("b", service=4.0))
    (shed,) = arrive(queue, ticket("c", slack=3.0))
    assert shed.reason == "shed_deadline" and shed.retry_after_s == pytest.approx(1.0)
    assert arrive(queue, ticket("d", slack=4.5)) == []


def test_the_lowest_priority_is_shed_for_a_higher_one() -> None:
    queue = AdmissionQueue(capacity=1, max_queued=8)
    arrive(queue, ticket("run", service=4.0), ticket("bronze", slack=5.0, service=2.0))
    events = arrive(queue, ticket("gold", priority=2, slack=6.0, service=2.0))
    assert [(e.id, e.reason) for e in events] == [("g/bronze", "shed_priority")]
    assert [t.id for t in queue.waiting] == ["g/gold"]


def test_forecasts_learn_how_long_service_takes() -> None:
    queue = AdmissionQueue(capacity=1, max_queued=8)
    now = 0.0
    for i in range(200):  # predicted 1 s, takes 3
        queue.arrive(ticket(f"{i}", now), now)
        now += 3.0
        queue.leave(f"g/{i}", now, completed=True)
    queue.arrive(ticket("x", now), now)
    assert queue.forecast(ticket("y", now), now) == pytest.approx(3.0, rel=0.05)


def test_a_dead_gateway_s_places_are_free_again() -> None:
    queue = AdmissionQueue(capacity=1, max_queued=8)
    arrive(queue, ticket("a"))
    other = Ticket("h/b", "t", 1.0, 0, 1.0, 100.0, 100.0, 1.0)
    assert queue.arrive(other, 1.0) == []
    assert queue.sync("h", ["h/b"], 4.0) == []
    assert queue.sync("h", ["h/b"], 6.0) == [Event("h/b")], "g was last heard of at 0"


def test_sync_frees_what_its_gateway_does_not_know() -> None:
    queue = AdmissionQueue(capacity=1, max_queued=8)
    arrive(queue, ticket("lost"), ticket("next", slack=60))
    assert queue.sync("g", ["g/next"], 1.0) == [], "it may be on its way"
    assert queue.sync("g", ["g/next"], 3.0) == [Event("g/next")]


def test_an_answer_with_several_parts_takes_several_places() -> None:
    queue = AdmissionQueue(capacity=4, max_queued=8)
    assert arrive(queue, ticket("a", places=3)) == [Event("g/a")]
    assert arrive(queue, ticket("b", places=2)) == []
    assert queue.leave("g/a", 1.0, completed=True) == [Event("g/b")]
    queue.leave("g/b", 2.0, completed=True)
    assert queue.arrive(ticket("huge", 3.0, places=9), 3.0) == [Event("g/huge")], "more than there are means all"


# -- the twin ------------------------------------------------------------------------------------------------------

SCRIPT = ADMISSION.replace("tonumber(clock[1]) + tonumber(clock[2]) / 1000000", "tonumber(redis.call('GET', 'now'))")


@pytest.fixture(scope="module")
def server() -> Iterator[redis.Redis]:
    with EmbeddedValkey() as url:
        yield redis.Redis.from_url(url)


operations = st.lists(
    st.tuples(
        st.sampled_from(["arrive", "arrive", "arrive", "leave", "leave", "abandon", "sync", "pause"]),
        st.integers(0, 30),  # whose turn, or which ticket
        st.integers(0, 2),  # priority, tenant
        st.sampled_from([0.5, 2.0, 5.0, 30.0]),  # slack
        st.sampled_from([0.1, 1.0, 3.0]),  # service
        st.integers(1, 3),  # places
        st.sampled_from([0.0, 0.1, 1.0, 4.0]),  # time that passes
    ),
    min_size=1,
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(operations, st.integers(0, 4), st.integers(0, 5))
def test_the_script_does_what_the_reference_does(server: redis.Redis, steps: Any, capacity: int, bound: int) -> None:
    server.flushall()
    run = server.register_script(SCRIPT)
    queue = AdmissionQueue(capacity, bound)
    now, issued = 1000.0, 0
    for what, pick, kind, slack, service, places, pause in steps:
        now += pause
        server.set("now", repr(now))
        gateway = f"g{pick % 3}"
        known = [*queue.running, *(t.id for t in queue.waiting)]
        if what == "arrive":
            issued += 1
            tenant, weight = ("a", "b", "c")[pick % 3], (1.0, 1.0, 2.5)[pick % 3]
            due = slack + kind
            new = Ticket(f"{gateway}/{issued}", tenant, weight, kind, now, now + slack, now + due, service, places)
            events = queue.arrive(new, now)
            said = ["arrive", new.id, new.tenant, new.weight, new.priority, slack, due, service, places]
        elif what in ("leave", "abandon") and known:
            id = known[pick % len(known)]
            gateway = id.partition("/")[0]
            events = queue.leave(id, now, completed=what == "leave")
            said = ["leave", id, "1" if what == "leave" else "0"]
        elif what == "sync":
            ids = [id for i, id in enumerate(known) if id.startswith(gateway) and i % 4]
            events = queue.sync(gateway, ids, now)
            said = ["sync", *ids]
        else:
            continue
        operation, *rest = said
        _, told, runs, waits = run(
            keys=["state", "mail:"], args=[operation, "e", capacity, bound, gateway, *map(str, rest)]
        )
        mail = []
        for key in server.keys("mail:*"):
            mail += [msgpack.unpackb(item)[1:] for item in server.lrange(key, 0, -1)]
            server.delete(key)
        found = [(i.decode(), r.decode(), float(s)) for i, r, s in told] + [(i, r, float(s)) for i, r, s in mail]
        expected = [(e.id, e.reason or "", min(e.retry_after_s, 3600.0)) for e in events]
        assert sorted(f[:2] for f in found) == sorted(e[:2] for e in expected)
        assert [f[2] for f in sorted(found)] == pytest.approx([e[2] for e in sorted(expected)], abs=1e-6)
        state = msgpack.unpackb(server.get("state"))
        assert {t["id"] for t in state["running"]} == set(queue.running)
        assert {t["id"] for t in state["waiting"]} == {t.id for t in queue.waiting}
        assert dict(state["shares"] or {}) == pytest.approx(queue.shares)
        assert state["ratio"] == pytest.approx(queue.ratio)
        if operation == "sync":
            assert {i.decode() for i in runs} == {id for id in queue.running if id.startswith(gateway)}
            assert {i.decode() for i in waits} == {t.id for t in queue.waiting if t.gateway == gateway}
        used = sum(t.places for t in queue.running.values())
        assert used <= capacity or len(queue.running) == 1, "never more than there are places"
        if len(queue.running) and queue.waiting:
            assert capacity - used < min(queue.capacity, max(t.places for t in queue.waiting)), "no place stays empty"


@given(st.lists(st.tuples(st.integers(0, 2), st.floats(0.1, 50), st.floats(0.1, 5)), min_size=1, max_size=40))
def test_nobody_of_lower_priority_starts_while_a_higher_one_waits(rows: list[tuple[int, float, float]]) -> None:
    queue = AdmissionQueue(capacity=1, max_queued=100)
    for i, (priority, slack, service) in enumerate(rows):
        t = ticket(f"{i}", priority=priority, slack=slack, service=service)
        queue.arrive(t, 0.0)
    now = 0.0
    while queue.running:
        (id,) = queue.running
        now += queue.running[id].service
        for event in queue.leave(id, now, completed=True):
            if event.reason is None:
                started = queue.running[event.id]
                assert all(t.priority <= started.priority for t in queue.waiting)
                assert started.deadline >= now, "who starts is in time"
