"""Live state: each replica of an expert publishes its load, speed and facts; every gateway reads them all.

The hash `live:<expert>` has one field a replica, named by the replica's rank, so that a restarted replica takes
over its field and the hash stays small. A gateway reads it in the background into plain memory: a decision never
waits for the store.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from signalbox.experts.base import EngineState
from signalbox.experts.catalog import ExpertConfig
from signalbox.policies.base import Candidate, RequestShape
from signalbox.policies.latency import WINDOW, Latency, LatencyState, Load, predict
from signalbox.serving.store import Store, StoreUnavailable

log = logging.getLogger(__name__)

PERIOD_S = 0.25  # between two publications, and between two readings
STALE_S = 5.0  # a replica that has published nothing new for so long is not counted on
EXPIRY_S = 30.0  # of the hash, when the last replica is gone


@dataclass(slots=True, frozen=True)
class ReplicaState:
    """What one replica says of itself. `reason` says why it is not ready.

    `bytes_per_token` is measured on its recent prompts and `fingerprint` names the weights' content; facts are None
    or empty while unknown. `prompt_tokens_waiting` are those of requests that have no first token yet, and `latency`
    is the live latency model with its errors. `sequence` grows with each publication: a reader tells fresh from stale
    by its change, so the clocks of two machines need not agree.
    """

    ready: bool
    reason: str = ""
    engine: EngineState = field(default_factory=EngineState)
    parameters: int | None = None
    context_length: int | None = None
    bytes_per_token: float | None = None
    fingerprint: str = ""
    sequence: int = 0
    prompt_tokens_waiting: float = 0.0
    latency: LatencyState | None = None

    def dumps(self) -> bytes:
        """As JSON."""
        return orjson.dumps(self)

    @staticmethod
    def loads(data: bytes) -> ReplicaState:
        """From JSON, of this version or another: fields that are not known are passed over, what is missing is unknown.

        Raises `ValueError` where it is no replica's state at all.
        """
        try:
            said = orjson.loads(data)
            known = {name: said[name] for name in _REPLICA_FIELDS & said.keys()}
            known["engine"] = EngineState(
                **{name: said["engine"][name] for name in _ENGINE_FIELDS & said["engine"].keys()}
            )
            return ReplicaState(**known | {"latency": LatencyState.of(said.get("latency"))})
        except (TypeError, KeyError, AttributeError, orjson.JSONDecodeError) as error:
            raise ValueError(f"not a replica's state: {error}") from None


_REPLICA_FIELDS = {f.name for f in dataclasses.fields(ReplicaState)}
_ENGINE_FIELDS = {f.name for f in dataclasses.fields(EngineState)}


@dataclass(slots=True, frozen=True)
class ReplicaSpeed:
    """What one replica has to do and how fast it is: its latency model, or without one the means that it measured."""

    load: Load
    model: LatencyState | None
    ttft_ms: float | None = None
    tpot_ms: float | None = None


@dataclass(slots=True, frozen=True)
class ExpertState:
    """An expert as a gateway sees it now: over its replicas that have reported lately.

    `capacity` is how many requests run at once, over all of them. The errors are those of the latency model: means over
    the replicas' medians, weighted by their requests of late; the counts are of all requests that were predicted.
    """

    ready: bool
    reason: str = ""
    replicas: int = 0
    running: int = 0
    waiting: int = 0
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    parameters: int | None = None
    context_length: int | None = None
    bytes_per_token: float | None = None
    fingerprint: str = ""
    capacity: int = 0
    ttft_error: float | None = None
    tpot_error: float | None = None
    ttft_count: int = 0
    tpot_count: int = 0
    speeds: tuple[ReplicaSpeed, ...] = ()


def live_key(expert: str) -> str:
    """The store's key of an expert's live state."""
    return f"live:{expert}"


async def publish(store: Store, expert: str, rank: int, state: ReplicaState) -> None:
    """Write one replica's state. Raises `StoreUnavailable`."""
    await store.hset(live_key(expert), {str(rank): state.dumps()}, ttl_s=EXPIRY_S)


@dataclass(slots=True)
class _Seen:
    """A replica's latest state and when, by this process's clock, it last changed."""

    state: ReplicaState
    changed: float


class LiveState:
    """A gateway's view of all experts, refreshed in the background."""

    def __init__(
        self, store: Store, experts: Mapping[str, ExpertConfig], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._clock = clock
        self._experts = experts
        self._seen: dict[str, dict[str, _Seen]] = {name: {} for name in experts}
        self._current: dict[str, ExpertState] = {}
        self._task: asyncio.Task[None] | None = None
        self.store_error: str | None = "not asked yet"

    async def start(self) -> None:
        """Read once, then keep reading until `close`."""
        await self.refresh()
        self._task = asyncio.create_task(self._keep_refreshing(), name="live-state")

    async def close(self) -> None:
        """Stop reading."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def refresh(self) -> None:
        """Read every expert's state. With the store lost, what was seen last stays and does not age."""
        lost = self.store_error is not None
        try:
            hashes = await asyncio.gather(*(self._store.hgetall(live_key(name)) for name in self._experts))
        except StoreUnavailable as error:
            self.store_error = str(error)
            return
        self.store_error = None
        now = self._clock()
        for name, fields in zip(self._experts, hashes, strict=True):
            seen = self._seen[name]
            for rank, data in fields.items():
                self._note(seen, name, rank, data, now)
            for rank in list(seen):
                if rank not in fields:
                    del seen[rank]
                elif lost:  # its silence was the store's
                    seen[rank].changed = now
            self._current[name] = self._combined(name, now)

    def _note(self, seen: dict[str, _Seen], name: str, rank: str, data: bytes, now: float) -> None:
        try:
            state = ReplicaState.loads(data)
        except ValueError as error:
            log.warning("live state of %s, replica %s: %s", name, rank, error)
            return
        known = seen.get(rank)
        if known is None or known.state.sequence != state.sequence:
            seen[rank] = _Seen(state, now)

    async def _keep_refreshing(self) -> None:
        while True:
            await asyncio.sleep(PERIOD_S)
            try:
                await self.refresh()
            except Exception:
                log.exception("live state could not be refreshed")

    def _combined(self, name: str, now: float) -> ExpertState:
        seen = self._seen[name]
        return _combine([s.state for s in seen.values() if now - s.changed <= STALE_S], bool(seen))

    def doubt(self, name: str) -> None:
        """An expert could not be reached: do not count on it until one of its replicas reports again.

        With the store lost there is nothing better to go by than what was seen last, so nothing changes.
        """
        if self.store_error is None:
            for seen in self._seen[name].values():
                seen.changed = float("-inf")
            self._current[name] = self._combined(name, self._clock())

    def assume(self, states: Mapping[str, ExpertState]) -> None:
        """Take these states for granted until the next `refresh`; for decisions without a running service."""
        self._current.update(states)

    def expert(self, name: str) -> ExpertState:
        """The expert's state now. Where the store has never answered, it is taken to be ready."""
        return self._current.get(name) or ExpertState(ready=True, reason="unknown: the store does not answer")

    def candidates(self, names: list[str] | None = None) -> list[Candidate]:
        """The experts that `auto` may choose from (default: all routable ones), live figures over declared ones."""
        if names is None:
            names = [name for name, config in self._experts.items() if config.routable]
        return [candidate(name, self._experts[name], self.expert(name)) for name in names]


def _combine(states: list[ReplicaState], was_seen: bool) -> ExpertState:
    ready = [s for s in states if s.ready]
    if not ready:
        if states:
            reason = states[0].reason or "not ready"
        else:
            reason = "no replica reports any more" if was_seen else "starting"
        return ExpertState(ready=False, reason=reason, replicas=len(states))
    newest = max(ready, key=lambda s: s.sequence)
    models = [s.latency for s in ready if s.latency is not None]
    return ExpertState(
        ready=True,
        replicas=len(ready),
        running=sum(s.engine.running for s in ready),
        waiting=sum(s.engine.waiting for s in ready),
        ttft_ms=_mean([s.engine.ttft_ms for s in ready]),
        tpot_ms=_mean([s.engine.tpot_ms for s in ready]),
        parameters=newest.parameters,
        context_length=newest.context_length,
        bytes_per_token=_mean([s.bytes_per_token for s in ready]),
        fingerprint=newest.fingerprint,
        capacity=sum(s.engine.max_running for s in ready),
        ttft_error=_error([(m.ttft_error, m.ttft_count) for m in models]),
        tpot_error=_error([(m.tpot_error, m.tpot_count) for m in models]),
        ttft_count=sum(m.ttft_count for m in models),
        tpot_count=sum(m.tpot_count for m in models),
        speeds=tuple(
            ReplicaSpeed(
                Load(s.engine.running, s.engine.waiting, s.prompt_tokens_waiting),
                s.latency,
                s.engine.ttft_ms,
                s.engine.tpot_ms,
            )
            for s in ready
        ),
    )


def _error(of_replicas: list[tuple[float | None, int]]) -> float | None:
    known = [(error, min(count, WINDOW)) for error, count in of_replicas if error is not None and count]
    return sum(error * count for error, count in known) / sum(count for _, count in known) if known else None


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def candidate(
    name: str,
    config: ExpertConfig,
    live: ExpertState | None = None,
    shape: RequestShape | None = None,
    *,
    queued_in_front: bool = False,
) -> Candidate:
    """One expert for the decision: declared facts, overruled by what has been measured. Times in milliseconds.

    The times are those of a request of this shape (see `latency`); without one, the means over recent requests.
    Without live state the declared figures stand and the expert counts as available.
    """
    live = live or ExpertState(ready=True)
    if shape is not None:
        said = latency(config, live, shape, queued_in_front=queued_in_front)
        ttft_ms, tpot_ms = said.ttft_ms, said.tpot_ms
    else:
        ttft_ms = config.latency.ttft_ms if live.ttft_ms is None else live.ttft_ms
        tpot_ms = config.latency.tpot_ms if live.tpot_ms is None else live.tpot_ms
    return Candidate(
        name=name,
        price_input=config.price.input,
        price_output=config.price.output,
        ttft_ms=ttft_ms,
        tpot_ms=tpot_ms,
        context_length=live.context_length or config.context_length,
        parameters=config.parameters or live.parameters,
        released_ordinal=config.released.toordinal() if config.released else None,
        bytes_per_token=live.bytes_per_token or config.bytes_per_token,
        available=live.ready,
    )


def latency(config: ExpertConfig, live: ExpertState, shape: RequestShape, *, queued_in_front: bool = False) -> Latency:
    """What a request of this shape would see of an expert now: the mean over its replicas' models.

    `queued_in_front` says that it is only sent to a replica that has a place free, so that no wait in the engine is
    predicted. The other samples of the same request count as load, shared evenly by the replicas.
    """
    prompt_tokens = shape.prompt_bytes / (live.bytes_per_token or config.bytes_per_token)
    siblings = (shape.samples - 1) / max(1, len(live.speeds))
    found = [
        _latency_of(speed, config, prompt_tokens, shape.answer_tokens, siblings, queued_in_front)
        for speed in live.speeds or (ReplicaSpeed(Load(), None),)
    ]
    if len(found) == 1:
        return found[0]
    return Latency(sum(f.ttft_ms for f in found) / len(found), sum(f.tpot_ms for f in found) / len(found))


def _latency_of(
    speed: ReplicaSpeed,
    config: ExpertConfig,
    prompt_tokens: float,
    answer_tokens: float,
    siblings: float,
    queued_in_front: bool,
) -> Latency:
    load, model = speed.load, speed.model
    running, waiting = load.running + siblings, load.waiting
    if queued_in_front and model is not None and model.max_running is not None:
        running, waiting = min(running + waiting, model.max_running - 1.0), 0.0
    declared = config.latency
    known = Latency(speed.ttft_ms or declared.ttft_ms, speed.tpot_ms or declared.tpot_ms)
    return predict(model, known, Load(running, waiting, load.prompt_tokens_waiting), prompt_tokens, answer_tokens)


def describe(state: ExpertState) -> dict[str, Any]:
    """For `/readyz` and `/v1/models`."""
    said: dict[str, Any] = {"ready": state.ready, "replicas": state.replicas}
    if state.reason:
        said["reason"] = state.reason
    if state.ready:
        said |= {"running": state.running, "waiting": state.waiting}
        said |= {"ttft_ms": state.ttft_ms, "tpot_ms": state.tpot_ms}
        said["capacity"] = state.capacity
        said["latency_model"] = {
            "ttft_error": _rounded(state.ttft_error),
            "tpot_error": _rounded(state.tpot_error),
            "ttft_requests": state.ttft_count,
            "tpot_requests": state.tpot_count,
        }
    return said


def _rounded(error: float | None) -> float | None:
    return None if error is None else round(error, 4)
