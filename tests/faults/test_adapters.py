"""Adapters while their service is hurt: what `GET /v1/adapters` says stays true, and all is well again soon."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest

from tests.faults.adapter_service import RECONCILED_S, AdapterService, Traffic, Truth

pytestmark = [pytest.mark.service, pytest.mark.timeout(420)]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdapterService]:
    running = AdapterService(tmp_path_factory.mktemp("faults"))
    yield running
    running.stop()


def test_a_replica_is_killed_during_a_load(service: AdapterService) -> None:
    with Truth(service) as truth:
        victim, other = service.replicas("expert-tiny")
        for seed in (1, 2, 3):
            reply = service.add(f"bank{seed}", seed)
            assert reply.status_code == 202 and reply.json()["phase"] == "staged", reply.text
        victim.send_signal(signal.SIGSTOP)  # the last load has begun, or is about to, and does not end
        time.sleep(1.0)
        victim.kill()
        for seed in (1, 2, 3):
            service.until(f"bank{seed}", version=1)
        deadline = time.monotonic() + RECONCILED_S
        while [r["phase"] for r in service.record("bank3")["replicas"].values()] != ["ready", "ready"]:
            assert time.monotonic() < deadline, service.record("bank3")  # Serve starts another one
            time.sleep(0.2)
        for seed in (1, 2, 3):
            service.until(f"bank{seed}", version=1)
        deadline = time.monotonic() + RECONCILED_S
        while [len(report["adapters"]) for report in truth.probe().values()] != [3, 3]:
            assert time.monotonic() < deadline, truth.last
            time.sleep(0.2)
        time.sleep(0.5)
    assert other.is_running()
    assert truth.lies == [] and truth.checks > 5 and "ready" in truth.phases
    assert len({service.says(model) for model in ("tiny", "bank1", "bank2", "bank3")}) == 4
    for seed in (1, 2, 3):
        assert service.client.delete(f"/v1/adapters/bank{seed}").status_code == 202
        service.until(f"bank{seed}", phase="gone")


def test_the_registry_is_killed_during_switches(service: AdapterService) -> None:
    """At several moments after an update was accepted; requests go on, and get the old version or the new one."""
    service.add("switch", 10)
    service.until("switch")
    texts = [service.says("switch")]
    with Truth(service) as truth, Traffic(service, "switch") as traffic:
        while not traffic.answers:  # of the version before the first update
            time.sleep(0.01)
        for round, delay_s in enumerate((0.0, 0.05, 0.15), 1):
            registry = service.registry()
            reply = service.add("switch", 10 + round)
            assert reply.status_code == 202, (reply.text, service.tail())
            time.sleep(delay_s)
            registry.kill()
            took = service.until("switch", version=reply.json()["version"])
            assert took < RECONCILED_S
            texts.append(service.says("switch"))
        time.sleep(1.0)
    assert truth.lies == [] and truth.checks > 5
    assert len(set(texts)) == 4  # each version says something else
    assert {status for _, _, status, _ in traffic.answers} == {200}, traffic.answers
    order = [texts.index(text) for _, _, _, text in sorted(traffic.answers)]
    assert set(order) == {0, 1, 2, 3}
    for began, _, _, text in traffic.answers:  # no request that began after an answer of a newer version got an older
        newer = [end for _, end, _, other in traffic.answers if texts.index(other) > texts.index(text)]
        assert all(end >= began for end in newer)
    with Truth(service) as truth:  # a registry that was killed last may leave the old version to its successor
        deadline = time.monotonic() + RECONCILED_S
        while len({v for r in truth.probe().values() for v in r["adapters"] if v.startswith("switch@")}) != 1:
            assert time.monotonic() < deadline, truth.last
            time.sleep(0.2)
    assert truth.lies == []


def test_the_store_stops_for_ten_seconds_during_traffic(service: AdapterService) -> None:
    service.add("steady", 20)
    service.until("steady")
    before = service.says("steady")
    with Truth(service) as truth, Traffic(service, "steady") as traffic:
        valkey = service.valkey()
        valkey.send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        refused = service.add("steady", 21)
        assert refused.status_code == 503 and "Retry-After" in refused.headers, refused.text
        while time.monotonic() - stopped < 10:
            time.sleep(0.2)
        during = [a for a in traffic.answers if stopped < a[0] and a[1] < time.monotonic()]
        assert during and {status for _, _, status, _ in during} == {200}
        assert {text for _, _, _, text in during} == {before}
        deadline = time.monotonic() + RECONCILED_S
        while (record := service.listed("steady"))["phase"] != "ready":
            assert time.monotonic() < deadline, record
            time.sleep(0.2)
        assert record["store"] == "lost"
        valkey.send_signal(signal.SIGCONT)
        back = time.monotonic()
        while (reply := service.add("steady", 22)).status_code == 503:
            assert time.monotonic() - back < RECONCILED_S
            time.sleep(0.5)
        assert reply.status_code == 202, (reply.text, service.tail())
        service.until("steady", version=reply.json()["version"])
        assert time.monotonic() - back < RECONCILED_S
        after = service.says("steady")
        time.sleep(1.0)
    assert truth.lies == [] and truth.checks > 5
    assert {status for _, _, status, _ in traffic.answers} == {200}
    assert after != before and {text for _, _, _, text in traffic.answers} >= {before, after}
