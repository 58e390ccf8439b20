"""Metrics in Prometheus' own parser's eyes: sums over gateways in a real Valkey, bounds, and a store that is lost."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from signalbox.serving import metrics as module
from signalbox.serving.embedded_valkey import EmbeddedValkey
from signalbox.serving.exchange import Exchange, Receive, Send
from signalbox.serving.metrics import Metrics
from signalbox.serving.store import Store, StoreUnavailable


class Bed:
    def __init__(self, server: EmbeddedValkey, url: str) -> None:
        self.server, self.url = server, url
        self.stores: list[Store] = []

    def metrics(self, **options: Any) -> Metrics:
        self.stores.append(Store(self.url, timeout_s=0.5, retry_after_s=0.05))
        return Metrics(self.stores[-1], **options)


@pytest.fixture
async def bed(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bed]:
    monkeypatch.setattr(module, "FRESH_S", 0.0)
    server = EmbeddedValkey()
    made = Bed(server, server.start())
    try:
        yield made
    finally:
        for store in made.stores:
            await store.close()
        server.stop()


def samples(text: bytes) -> dict[str, float]:
    """`name{label=value,...}` -> value, by Prometheus' parser."""
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        assert family.documentation, family.name
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


async def read(metrics: Metrics) -> dict[str, float]:
    return samples(await metrics.text())


async def test_all_that_is_counted_is_told(bed: Bed) -> None:
    metrics = bed.metrics(latency_errors=lambda: {"tiny": (0.12, None), "wide": (0.3, 0.05)})
    metrics.request("gold", "tiny", "ok")
    metrics.request("gold", "tiny", "ok")
    metrics.request("gold", "none", "shed_deadline")
    metrics.admission("queued", 2, 0.0)
    metrics.admission("admitted", 2, 0.3)
    metrics.admission("queue_full", -1, 0.0)
    metrics.ttft("gold", 0.3)
    metrics.slo("gold", kept=True)
    metrics.slo("gold", kept=False)
    metrics.budget_refusal("bronze", "budget_spent")
    found = await read(metrics)
    expected = {
        "signalbox_requests_total{expert=tiny,outcome=ok,policy=gold}": 2,
        "signalbox_requests_total{expert=none,outcome=shed_deadline,policy=gold}": 1,
        "signalbox_admission_total{priority=2,verdict=queued}": 1,
        "signalbox_admission_total{priority=2,verdict=admitted}": 1,
        "signalbox_admission_total{priority=-1,verdict=queue_full}": 1,
        "signalbox_admission_wait_seconds_count": 2,
        "signalbox_admission_wait_seconds_sum": 0.3,
        "signalbox_admission_wait_seconds_bucket{le=0.25}": 1,
        "signalbox_admission_wait_seconds_bucket{le=0.5}": 2,
        "signalbox_ttft_seconds_count{policy=gold}": 1,
        "signalbox_ttft_seconds_bucket{le=0.25,policy=gold}": 0,
        "signalbox_ttft_seconds_bucket{le=+Inf,policy=gold}": 1,
        "signalbox_slo_total{kept=true,policy=gold}": 1,
        "signalbox_slo_total{kept=false,policy=gold}": 1,
        "signalbox_latency_error_ratio{expert=tiny,what=ttft}": 0.12,
        "signalbox_latency_error_ratio{expert=wide,what=tpot}": 0.05,
        "signalbox_budget_refusals_total{policy=bronze,reason=budget_spent}": 1,
        "signalbox_store_available": 1,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert "signalbox_latency_error_ratio{expert=tiny,what=tpot}" not in found
    assert not any("created" in key for key in found)


async def test_any_gateway_tells_the_sum_of_all(bed: Bed) -> None:
    first, second, third = bed.metrics(), bed.metrics(), bed.metrics()
    key = "signalbox_requests_total{expert=tiny,outcome=ok,policy=gold}"
    for _ in range(3):
        first.request("gold", "tiny", "ok")
    second.request("gold", "tiny", "ok")
    second.ttft("gold", 2.0)
    await second.flush()
    for _ in range(3):  # telling counts nothing
        assert (await read(first))[key] == 4
    assert (await read(third))[key] == 4
    first.request("gold", "tiny", "ok")
    await first.close()  # what was counted last is not lost
    assert (await read(second))[key] == 5
    buckets = [k for k in await read(third) if k.startswith("signalbox_ttft_seconds_bucket{")]
    assert len(buckets) == 16, "the empty ones too, which nobody has stored"
    assert (await read(bed.metrics()))[key] == 5, "a gateway that starts anew goes on from there"


async def test_a_lost_store_loses_no_count(bed: Bed) -> None:
    metrics, other = bed.metrics(), bed.metrics()
    key = "signalbox_requests_total{expert=tiny,outcome=ok,policy=gold}"
    other.request("gold", "tiny", "ok")
    await other.flush()
    metrics.request("gold", "tiny", "ok")
    assert (await read(metrics))[key] == 2
    store = bed.stores[0]

    async def lost(*arguments: Any) -> Any:  # an injected fault
        raise StoreUnavailable("the store is lost")

    class Lost:
        script = hgetall = staticmethod(lost)
        available = False

    metrics._store = Lost()  # type: ignore[assignment]
    metrics.request("gold", "tiny", "ok")
    for _ in range(2):
        found = await read(metrics)
        assert found[key] == 3 and found["signalbox_store_available"] == 0, "what was known of the others, and its own"
    metrics._store = store
    metrics.request("gold", "tiny", "ok")
    await metrics.flush()
    assert (await read(metrics))[key] == 4 == (await read(other))[key]


async def test_a_flush_whose_reply_was_lost_counts_once(bed: Bed) -> None:
    metrics, other = bed.metrics(), bed.metrics()
    key = "signalbox_requests_total{expert=tiny,outcome=ok,policy=gold}"
    store = bed.stores[0]

    class Deaf:
        """The script runs, and its answer is lost on the way (an injected fault)."""

        available = True

        async def script(self, *arguments: Any) -> Any:
            await store.script(*arguments)
            raise StoreUnavailable("timed out")

    metrics.request("gold", "tiny", "ok")
    metrics._store = Deaf()  # type: ignore[assignment]
    await metrics.flush()
    metrics.request("gold", "tiny", "ok")
    metrics._store = store
    assert (await read(metrics))[key] == 2 == (await read(metrics))[key]
    assert (await read(other))[key] == 2


async def test_labels_are_bounded(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SERIES", 10)
    metrics = bed.metrics()
    for i in range(100):
        metrics.request(f"policy-{i}", "tiny", "ok")
        metrics.ttft(f"policy-{i}", 0.1)
        metrics.admission("admitted", i * 1000, 0.0)
    found = await read(metrics)
    requests = {k: v for k, v in found.items() if k.startswith("signalbox_requests_total")}
    assert len(requests) == 11 and sum(requests.values()) == 100
    assert requests["signalbox_requests_total{expert=other,outcome=other,policy=other}"] == 90
    assert found["signalbox_ttft_seconds_count{policy=other}"] == 90
    assert found["signalbox_admission_total{priority=10,verdict=admitted}"] == 99


async def test_the_sums_are_bounded_over_all_gateways(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_FIELDS", 5)
    first, second = bed.metrics(), bed.metrics()
    for i, metrics in enumerate((first, second)):
        for j in range(20):
            metrics.request(f"p{i}-{j}", "tiny", "ok")
        await metrics.flush()
    assert len(await bed.stores[0].hgetall("metrics:totals")) == 5


async def test_over_http(bed: Bed) -> None:
    metrics = bed.metrics()
    metrics.request('we"ird\\\n', "tiny", "ok")

    async def app(scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        await metrics.serve(Exchange(scope, receive, send))

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        reply = await client.get("/metrics")
        head = await client.head("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'signalbox_requests_total{expert=tiny,outcome=ok,policy=we"ird\\\n}' in samples(reply.content)
    assert head.content == b"" and head.headers["content-length"] == str(len(reply.content))


async def test_it_shares_by_itself(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    monkeypatch.setattr(module, "FLUSH_S", 0.01)
    metrics, other = bed.metrics(), bed.metrics()
    await metrics.start()
    metrics.request("gold", "tiny", "ok")
    for _ in range(500):
        if await bed.stores[1].hgetall("metrics:totals"):
            break
        await asyncio.sleep(0.01)
    assert (await read(other))["signalbox_requests_total{expert=tiny,outcome=ok,policy=gold}"] == 1
    await metrics.close()
