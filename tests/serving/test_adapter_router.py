"""Which replicas a request may go to. The choice among Serve's own objects; tests/faults has it on a cluster."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve._private.request_router.common import PendingRequest, RequestRoutingContext
from ray.serve.config import RequestRouterConfig

from signalbox.experts.base import GenerateRequest
from signalbox.serving.adapter_replica import OneReplica
from signalbox.serving.adapter_router import AdapterRouter, set_holders, wanted_replicas

DEPLOYMENT = DeploymentID("expert-tiny", "signalbox")


@pytest.fixture(autouse=True)
def holders() -> Iterator[None]:
    set_holders({"bank@1": frozenset({"r2", "r3"}), "evicted@1": frozenset()})
    yield
    set_holders({})


def replicas(count: int) -> list[Any]:
    """What `choose_replicas` looks at of Serve's `RunningReplica`."""
    return [SimpleNamespace(replica_id=ReplicaID(f"r{i}", DEPLOYMENT)) for i in range(1, count + 1)]


async def chosen(first: object, count: int = 4, times: int = 200) -> Counter[str]:
    router = object.__new__(AdapterRouter)  # choosing needs no state of Serve's
    found: Counter[str] = Counter()
    for _ in range(times):
        pending: Any = SimpleNamespace(args=[first], routing_context=RequestRoutingContext())
        (ranked,) = await router.choose_replicas(replicas(count), pending)
        assert 1 <= len(ranked) <= 2 and len({id(r) for r in ranked}) == len(ranked)
        assert pending.routing_context.should_backoff  # or Serve would try again without a pause
        found.update([r.replica_id.unique_id for r in ranked])
        found["first " + ranked[0].replica_id.unique_id] += 1
    return found


async def test_a_request_goes_to_holders_of_its_adapter() -> None:
    found = await chosen(GenerateRequest("r", prompt="x", adapter="bank@1"))
    assert {name for name in found if not name.startswith("first")} == {"r2", "r3"}
    assert found["first r2"] > 50 and found["first r3"] > 50


@pytest.mark.parametrize("adapter", [None, "unknown@1", "evicted@1"])
async def test_others_go_anywhere(adapter: str | None) -> None:
    found = await chosen(GenerateRequest("r", prompt="x", adapter=adapter))
    assert {"r1", "r2", "r3", "r4"} <= set(found)


async def test_where_no_holder_is_left_anyone_is_asked() -> None:
    assert "r1" in await chosen(GenerateRequest("r", prompt="x", adapter="bank@1"), count=1)


async def test_a_call_for_one_replica() -> None:
    assert {name for name in await chosen(OneReplica("r4")) if not name.startswith("first")} == {"r4"}


def test_calls_without_arguments() -> None:
    assert wanted_replicas([]) is None and wanted_replicas(["x"]) is None


async def test_calls_of_one_http_request_each_get_a_replica() -> None:
    """`n`, several prompts, an ensemble: Serve gives all of them the HTTP request's id."""
    router = AdapterRouter(deployment_id=DEPLOYMENT, handle_source=DeploymentHandleSource.REPLICA)
    router._replicas_list = replicas(3)
    router._replicas = {replica.replica_id: replica for replica in router._replicas_list}
    for replica in router._replicas_list:
        replica.max_ongoing_requests = 8
        router._replica_queue_len_cache.update(replica.replica_id, 0)
    router._use_replica_queue_len_cache = True
    calls = [
        PendingRequest(
            [GenerateRequest(f"r{i}", prompt="x", adapter="bank@1")], {}, RequestMetadata("shared", "shared")
        )
        for i in range(6)
    ]
    async with asyncio.timeout(60):
        found = await asyncio.gather(*(router._choose_replica_for_request(call) for call in calls))
    assert {replica.replica_id.unique_id for replica in found} <= {"r2", "r3"}
    assert not any(call.future.cancelled() for call in calls)


ELSEWHERE = """
import asyncio, sys
from types import SimpleNamespace
from ray import cloudpickle
from signalbox.experts.base import GenerateRequest
from signalbox.serving.adapter_router import AdapterRouter, set_holders

handed_on = cloudpickle.loads(sys.stdin.buffer.read())
assert handed_on is not AdapterRouter
set_holders({"bank@1": frozenset({"r4"})})
replicas = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=f"r{i}")) for i in range(1, 5)]
request = SimpleNamespace(
    args=[GenerateRequest("r", prompt="x", adapter="bank@1")], routing_context=SimpleNamespace(should_backoff=False)
)
(chosen,) = asyncio.run(object.__new__(handed_on).choose_replicas(replicas, request))
print(*(replica.replica_id.unique_id for replica in chosen))
"""


def test_as_serve_hands_it_on_it_still_goes_by_that_processs_map() -> None:
    """Serve pickles the class by value: what a gateway unpickles has globals of its own."""
    config = RequestRouterConfig(request_router_class=AdapterRouter)
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE],
        input=config.get_serialized_request_router_cls(),
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stdout.split()) == (0, [b"r4"]), done.stderr.decode()[-2000:]
