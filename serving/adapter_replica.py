"""One replica's side of the adapters: loads them into its engine, tries each out, and tells what it holds."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from signalbox.adapters.base import AdapterError
from signalbox.adapters.lifecycle import Holding, HoldingState, ReplicaReport
from signalbox.experts.base import (
    Engine,
    ExpertError,
    ExpertUnavailable,
    GenerateRequest,
    InvalidRequest,
    QueueFull,
    SamplingParams,
)

log = logging.getLogger(__name__)

CANARY_S = 60.0  # for one token
CANARY_PAUSE_S = 0.2  # between two attempts where the engine's queue is full
_CANARY = SamplingParams(max_tokens=1, temperature=0.0, logprobs=0, ignore_eos=True)


@dataclass(slots=True, frozen=True)
class OneReplica:
    """First argument of a call that is meant for one replica; another one that gets it refuses."""

    replica_id: str


@dataclass(slots=True)
class _Held:
    state: HoldingState
    content_hash: str
    loading: asyncio.Task[ExpertError | None]
    unloading: asyncio.Task[ExpertError | None] | None = None
    in_flight: int = 0
    ready_at: float = 0.0
    used_at: float = 0.0
    nbytes: int = 0


@dataclass(slots=True)
class ReplicaAdapters:
    """The adapters in one engine. Methods return errors instead of raising them, as all that crosses the hop.

    An engine that was started anew has forgotten its adapters: `use` it, and so has this.
    """

    replica_id: str
    max_adapters: int
    _engine: Engine | None = None
    _nonce: str = ""
    _held: dict[str, _Held] = field(default_factory=dict)

    def use(self, engine: Engine | None) -> None:
        """Hold nothing, in this engine (None: there is none at the moment)."""
        for held in self._held.values():
            held.loading.cancel()
            if held.unloading is not None:
                held.unloading.cancel()
        self._engine, self._nonce, self._held = engine, uuid.uuid4().hex, {}

    async def load(self, version: str, path: str, content_hash: str) -> ExpertError | None:
        """Load a version and have it answer a canary request; joins a load of it that is under way."""
        engine = self._engine
        if engine is None:
            return ExpertUnavailable(f"replica {self.replica_id} has no engine at the moment")
        held = self._held.get(version)
        if held is not None and held.unloading is not None:
            await asyncio.wait([held.unloading])
            held = self._held.get(version)
        if held is None:
            if len(self._held) >= self.max_adapters:
                return QueueFull(f"all {self.max_adapters} adapter slots of replica {self.replica_id} are taken")
            load = asyncio.create_task(self._load(engine, version, path), name=f"load-{version}")
            held = self._held[version] = _Held("loading", content_hash, load)
        elif held.content_hash != content_hash:
            return InvalidRequest(f"{version} is loaded with another content", code="version_conflict", status=409)
        return await self._outcome(held.loading)

    async def unload(self, version: str) -> ExpertError | None:
        """Unload a version once its requests have ended; joins an unload that is under way."""
        engine, held = self._engine, self._held.get(version)
        if engine is None or held is None:
            return None
        if held.unloading is None:
            held.unloading = asyncio.create_task(self._unload(engine, version, held), name=f"unload-{version}")
        return await self._outcome(held.unloading)

    @contextlib.contextmanager
    def using(self, version: str | None) -> Iterator[None]:
        """Count a request that names this version (None: the base)."""
        held = self._held.get(version) if version is not None else None
        if held is None:
            yield
            return
        held.in_flight += 1
        try:
            yield
        finally:
            held.in_flight -= 1
            held.used_at = time.monotonic()

    def report(self, *, ready: bool, reason: str) -> ReplicaReport:
        """What is held at this moment."""
        now = time.monotonic()
        running = self._engine.state().adapters if self._engine is not None else {}
        return ReplicaReport(
            replica_id=self.replica_id,
            nonce=self._nonce,
            ready=ready,
            reason=reason,
            max_adapters=self.max_adapters,
            adapters={
                version: Holding(
                    state="unloading" if held.unloading is not None else held.state,
                    content_hash=held.content_hash,
                    nbytes=held.nbytes,
                    in_flight=max(held.in_flight, running.get(version, 0)),
                    idle_s=now - held.used_at if held.used_at else 0.0,
                    age_s=now - held.ready_at if held.ready_at else 0.0,
                )
                for version, held in self._held.items()
            },
        )

    # -- inside ------------------------------------------------------------------------------------------------

    async def _outcome(self, task: asyncio.Task[ExpertError | None]) -> ExpertError | None:
        """What the task came to; it goes on where the caller does not wait for it."""
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                return ExpertUnavailable(f"the engine of replica {self.replica_id} was started anew meanwhile")
            raise

    async def _load(self, engine: Engine, version: str, path: str) -> ExpertError | None:
        error = await self._try_load(engine, version, path)
        held = self._held.get(version)
        if engine is not self._engine or held is None:
            return ExpertUnavailable(f"the engine of replica {self.replica_id} was started anew meanwhile")
        if error is not None:
            with contextlib.suppress(ExpertError):
                await engine.unload(version)
            self._held.pop(version, None)
            return error
        held.state, held.ready_at, held.used_at = "ready", time.monotonic(), time.monotonic()
        held.nbytes = await asyncio.to_thread(_tensor_bytes, path)
        return None

    async def _try_load(self, engine: Engine, version: str, path: str) -> ExpertError | None:
        try:
            await engine.load(version, path)
            async with asyncio.timeout(CANARY_S):
                while True:
                    try:
                        return await canary(engine, version)
                    except QueueFull:
                        await asyncio.sleep(CANARY_PAUSE_S)
        except TimeoutError:
            return ExpertUnavailable(f"{version} gave no token within {CANARY_S:.0f} s")
        except AdapterError as error:
            return InvalidRequest(error.message, param=error.tensor, code=error.code, status=422)
        except ExpertError as error:
            return error
        except Exception as error:
            log.exception("adapter %s cannot be loaded", version)
            return InvalidRequest(f"the engine cannot load it: {type(error).__name__}: {error}", code="load_failed")

    async def _unload(self, engine: Engine, version: str, held: _Held) -> ExpertError | None:
        await asyncio.wait([held.loading])
        try:
            await engine.unload(version)
        except ExpertError as error:
            held.unloading = None
            return error
        except Exception as error:
            log.exception("adapter %s cannot be unloaded", version)
            held.unloading = None
            return ExpertUnavailable(f"{version} cannot be unloaded: {type(error).__name__}: {error}")
        if engine is self._engine:
            self._held.pop(version, None)
        return None


def _tensor_bytes(path: str) -> int:
    return sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))


async def canary(engine: Engine, version: str) -> ExpertError | None:
    """One greedy token through an adapter, which must have a finite log-probability; None where it has."""
    request = GenerateRequest(f"canary-{uuid.uuid4().hex[:12]}", prompt="Hello", sampling=_CANARY, adapter=version)
    logprobs: list[float] = []
    tokens = 0
    async for chunk in engine.generate(request):
        tokens += len(chunk.token_ids)
        logprobs += [token.logprob for token in chunk.logprobs]
    if not tokens or not logprobs or not all(math.isfinite(value) for value in logprobs):
        return InvalidRequest(
            f"the canary request through {version} gave {tokens} tokens with log-probabilities {logprobs}: "
            "the adapter makes the model compute values that are not finite",
            code="canary_failed",
            status=422,
        )
    return None
