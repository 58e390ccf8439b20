"""Which replicas a request may go to. The choice among Serve's own objects; tests/faults has it on a cluster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.request_router.common import RequestRoutingContext

from signalbox.experts.base import GenerateRequest
from signalbox.serving.adapter_replica import OneReplica
from signalbox.serving.adapter_router import AdapterRouter, set_holders, wanted_replicas


@pytest.fixture(autouse=True)
def holders() -> Iterator[None]:
    set_holders({"bank@1": frozenset({"r2", "r3"}), "evicted@1": frozenset()})
    yield
    set_holders({})


def replicas(count: int) -> list[Any]:
    """What `choose_replicas` looks at of Serve's `RunningReplica`."""
    return [SimpleNamespace(replica_id=SimpleNamespace(unique_id=f"r{i}")) for i in range(1, count + 1)]


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
