"""`GET /metrics` in Prometheus' text format: what all gateways together have counted.

Each gateway counts in a registry of its own, and adds what is new to one hash in the store every second; any of them
tells the sums. So counters go on over restarts, and it does not matter which gateway a scrape reaches. With the store
lost a gateway tells what it knew of the others, and its own.

Labels are names of policies and experts that exist, codes and numbers from -10 to 10, and bounded besides: beyond
`MAX_SERIES` combinations of a metric, all labels of a new one are `other`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping

import orjson
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from signalbox.serving.exchange import Exchange
from signalbox.serving.store import Store, StoreUnavailable

log = logging.getLogger(__name__)

FLUSH_S = 1.0
FRESH_S = 0.5  # for so long a text is told again, however many ask
MAX_SERIES = 512  # combinations of labels of one metric, in one gateway
MAX_FIELDS = 16_384  # samples that all gateways have together in the store
EXPIRY_S = 30 * 86400.0  # of the sums, when the last gateway is gone
TOTALS = "metrics:totals"
OTHER = "other"

# Seconds. A wait of none is usual, and one of a minute is the most that the configuration allows by default.
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 30.0, 60.0)
_BOUNDS = [floatToGoString(bound) for bound in (*_BUCKETS, float("inf"))]

Key = tuple[str, tuple[tuple[str, str], ...]]  # a sample's name, and its labels
Figures = tuple[float | None, float | None]

# A flush is known by its gateway's last number, so that it bears being repeated.
_FLUSH = """
if redis.call('GET', KEYS[2]) ~= ARGV[1] then
  redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[2])
  for i = 4, #ARGV, 2 do
    if redis.call('HEXISTS', KEYS[1], ARGV[i]) == 1 or redis.call('HLEN', KEYS[1]) < tonumber(ARGV[3]) then
      redis.call('HINCRBYFLOAT', KEYS[1], ARGV[i], ARGV[i + 1])
    end
  end
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
end
return redis.call('HLEN', KEYS[1])
"""


class Metrics:
    """What a gateway counts. The counting methods take microseconds and never wait.

    `latency_errors` gives each expert's median relative errors of TTFT and of time per token (None: not known yet), as
    the latency model's replicas publish them.
    """

    def __init__(self, store: Store, latency_errors: Callable[[], Mapping[str, Figures]] = dict) -> None:
        self._store = store
        self._latency_errors = latency_errors
        self._registry = CollectorRegistry(auto_describe=False)
        self._series: dict[str, set[tuple[str, ...]]] = {}
        self._requests = self._counter(
            "signalbox_requests",
            "requests by policy, the expert that answered, and how it ended",
            "policy",
            "expert",
            "outcome",
        )
        self._admission = self._counter("signalbox_admission", "verdicts of admission", "verdict", "priority")
        self._waits = Histogram(
            "signalbox_admission_wait_seconds", "time in the queue in front of an expert, until admitted or refused",
            registry=self._registry, buckets=_BUCKETS,
        )  # fmt: skip
        self._ttft = Histogram(
            "signalbox_ttft_seconds", "time to the first token, from the request's arrival", ("policy",),
            registry=self._registry, buckets=_BUCKETS,
        )  # fmt: skip
        self._slo = self._counter(
            "signalbox_slo", "answers whose policy has ceilings on time, by whether all were kept", "policy", "kept"
        )
        self._refusals = self._counter(
            "signalbox_budget_refusals", "requests refused by a budget, a rate or a limit", "policy", "reason"
        )
        self._id = uuid.uuid4().hex[:16]
        self._sequence = 0
        self._shared: dict[Key, float] = {}  # the sums as last read
        self._told: dict[Key, float] = {}  # of our own counts, those in the sums
        self._pending: dict[Key, float] = {}  # on the way; sent again until the store has said that it has them
        self._flushing, self._telling = asyncio.Lock(), asyncio.Lock()
        self._text, self._made = b"", float("-inf")
        self._task: asyncio.Task[None] | None = None

    # -- counting ----------------------------------------------------------------------------------------------

    def request(self, policy: str, expert: str, outcome: str) -> None:
        """A request ended: `ok`, its error's code, or that its client went away. A name that is not known is `none`."""
        self._count(self._requests, policy, expert, outcome)

    def admission(self, verdict: str, priority: int, waited_s: float) -> None:
        """A verdict of admission: `admitted`, `queued`, or the reason of a refusal, after so many seconds."""
        self._count(self._admission, verdict, str(max(-10, min(10, priority))))
        if verdict != "queued":
            self._waits.observe(waited_s)

    def ttft(self, policy: str, seconds: float) -> None:
        """The first token of an answer was there after so many seconds."""
        self._ttft.labels(*self._bounded("ttft", (policy,))).observe(seconds)

    def slo(self, policy: str, *, kept: bool) -> None:
        """An answer under a policy with ceilings on time has ended, and kept them all or not."""
        self._count(self._slo, policy, "true" if kept else "false")

    def budget_refusal(self, policy: str, reason: str) -> None:
        """A request was refused by a limit: `budget_spent`, `rate_limited`, `max_inflight`."""
        self._count(self._refusals, policy, reason)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self._registry)

    def _count(self, counter: Counter, *labels: str) -> None:
        counter.labels(*self._bounded(counter._name, labels)).inc()

    def _bounded(self, metric: str, labels: tuple[str, ...]) -> tuple[str, ...]:
        known = self._series.setdefault(metric, set())
        if labels in known:
            return labels
        if len(known) >= MAX_SERIES:
            return (OTHER,) * len(labels)
        known.add(labels)
        return labels

    # -- telling -----------------------------------------------------------------------------------------------

    async def serve(self, exchange: Exchange) -> None:
        """The route's handler."""
        data = await self.text()
        headers = [(b"content-type", CONTENT_TYPE_PLAIN_0_0_4.encode()), (b"content-length", b"%d" % len(data))]
        await exchange.start(200, headers)
        await exchange.send(b"" if exchange.method == "HEAD" else data, more=False)

    async def text(self) -> bytes:
        """All metrics, half a second old at most."""
        async with self._telling:
            if time.monotonic() - self._made > FRESH_S:
                await self.flush()
                async with self._flushing:  # or a count could be found both in the sums and here
                    if not self._pending:
                        with contextlib.suppress(StoreUnavailable):
                            self._shared = _parsed(await self._store.hgetall(TOTALS))
                    families = list(self._families(self._latency_errors(), self._store.available))
                self._text = await asyncio.to_thread(_rendered, families)
                self._made = time.monotonic()
            return self._text

    def _families(self, latency_errors: Mapping[str, Figures], available: bool) -> Iterator[Metric]:
        values = self._sum()
        for family in self._registry.collect():
            merged = Metric(family.name, family.documentation, family.type)
            if family.type == "histogram":  # another gateway's empty buckets are not in the sums
                for _, labels in [key for key in values if key[0] == f"{family.name}_count"]:
                    for bound in _BOUNDS:
                        values.setdefault((f"{family.name}_bucket", tuple(sorted([*labels, ("le", bound)]))), 0.0)
            names = {family.name + suffix for suffix in ("", "_total", "_bucket", "_count", "_sum")}
            for key in sorted((key for key in values if key[0] in names), key=_order):
                merged.add_sample(key[0], dict(key[1]), values[key])
            yield merged
        errors = GaugeMetricFamily(
            "signalbox_latency_error_ratio",
            "median relative error of the latency model of late",
            labels=("expert", "what"),
        )
        for expert, both in latency_errors.items():
            for what, error in zip(("ttft", "tpot"), both, strict=True):
                if error is not None:
                    errors.add_metric((expert, what), error)
        yield errors
        yield GaugeMetricFamily(
            "signalbox_store_available", "whether the store answers this gateway", value=float(available)
        )

    def _sum(self) -> dict[Key, float]:
        values = dict(self._shared)
        for key, value in self._own().items():
            values[key] = values.get(key, 0.0) + value - self._told.get(key, 0.0)
        return values

    def _own(self) -> dict[Key, float]:
        """All samples of this gateway."""
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in self._registry.collect()
            for sample in family.samples
            if not sample.name.endswith("_created")
        }

    # -- sharing -----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Keep adding to the sums until `close`."""
        self._task = asyncio.create_task(self._keep_flushing(), name="metrics")

    async def close(self) -> None:
        """Stop, and add what was counted last."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self.flush()

    async def _keep_flushing(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            try:
                await self.flush()
            except Exception:
                log.exception("metrics cannot be shared")

    async def flush(self) -> None:
        """Add what is new to the sums. With the store lost it is kept for the next time."""
        async with self._flushing:
            if not self._pending:
                self._sequence += 1
                own = self._own()
                self._pending = {key: value - self._told.get(key, 0.0) for key, value in own.items()}
                self._pending = {key: value for key, value in self._pending.items() if value}
            fields = [part for key, value in self._pending.items() for part in (orjson.dumps(key), repr(value))]
            try:
                await self._store.script(
                    _FLUSH,
                    [TOTALS, f"metrics:flush:{self._id}"],
                    [self._sequence, int(EXPIRY_S * 1000), MAX_FIELDS, *fields],
                )
            except StoreUnavailable:
                return
            for key, value in self._pending.items():
                self._told[key] = self._told.get(key, 0.0) + value
                self._shared[key] = self._shared.get(key, 0.0) + value
            self._pending = {}


class _Families(Collector):
    """Families that are made already, as a collector."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _rendered(families: Iterable[Metric]) -> bytes:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(families))
    return generate_latest(registry)


def _parsed(found: Mapping[str, bytes]) -> dict[Key, float]:
    shared: dict[Key, float] = {}
    for field, value in found.items():
        try:
            name, labels = orjson.loads(field)
            shared[name, tuple((str(label), str(said)) for label, said in labels)] = float(value)
        except (ValueError, TypeError):
            continue  # another version's
    return shared


def _order(key: Key) -> tuple[list[tuple[str, str]], str, float]:
    """By labels, a histogram's buckets by their bound."""
    name, labels = key
    bound = dict(labels).get("le")
    return [label for label in labels if label[0] != "le"], name, float(bound) if bound is not None else 0.0
