"""The hop between gateway and expert: `ExpertDeployment`, a Serve deployment around one `Engine`, and `ExpertClient`.

Answers cross the hop as lists of chunks: all that is ready goes in one message, so that a busy expert sends few
large messages rather than one for each token. An `ExpertError` crosses it as an item like any other, the last one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, cast

from signalbox.adapters.lifecycle import ReplicaReport
from signalbox.experts.base import (
    Chunk,
    Engine,
    EngineState,
    ExpertError,
    ExpertUnavailable,
    GenerateRequest,
    InvalidRequest,
    QueueFull,
    ReplicaNotReady,
)
from signalbox.experts.base import Score as ExpertScore
from signalbox.experts.catalog import ExpertConfig, LocalExpert, OpenAIExpert
from signalbox.serving import live_state
from signalbox.serving.adapter_replica import OneReplica, ReplicaAdapters
from signalbox.serving.live_state import ReplicaState
from signalbox.serving.request_watch import RequestWatch
from signalbox.serving.store import Store, StoreUnavailable

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

log = logging.getLogger(__name__)

FIRST_RETRY_S, LAST_RETRY_S = 2.0, 60.0  # between attempts to start an engine that did not
LOOK_S = 0.5  # between two looks at an engine that has processes of its own
ACCEPT_S = 3.0  # within which a replica has to take a request; how long the answer takes is another matter
_ROUTER = "signalbox.serving.adapter_router.AdapterRouter"
CLOSE_S = 5.0  # that a replica has to end its requests when it is stopped


class ExpertDeployment:
    """One replica of an expert. It is reachable at once and says why while its engine is not ready.

    Serve gives a deployment up whose constructor raises, and the application with it. So the engine starts in the
    background, is tried again with growing pauses, and requests meanwhile get `ExpertUnavailable` with the reason:
    one expert that cannot start never keeps the others from serving.
    """

    def __init__(self, name: str, config: ExpertConfig, store_url: str) -> None:
        self._name, self._config = name, config
        self._engine: Engine | None = None
        self._newest: Engine | None = None  # the one that is being started
        self._reason = "starting"
        self._running: dict[str, asyncio.Task[ExpertError | None]] = {}
        self._facts: dict[str, Any] = {}
        self._watch = RequestWatch(config)
        self._published = 0
        self._store = Store(store_url)
        self._rank = _replica_rank()
        self._adapters = ReplicaAdapters(_replica_id(), config.max_adapters if isinstance(config, LocalExpert) else 0)
        self._tasks = [asyncio.create_task(self._keep_engine()), asyncio.create_task(self._keep_publishing())]
        # Serve calls this before it ends the replica. On the class, garbage collection would call it again.
        self.__del__ = self.close

    # -- what gateways call ------------------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest) -> AsyncIterator[list[Chunk] | ExpertError]:
        """Answer one request: lists of chunks as they become ready; an `ExpertError`, if any, is the last item.

        Closing the iterator (Serve does it when the caller cancels) aborts the generation at once.
        """
        if self._engine is None:
            yield self._unavailable()
            return
        ready: list[Chunk] = []
        news = asyncio.Event()
        pump = asyncio.create_task(self._pump(self._engine, request, ready, news))
        pump.add_done_callback(lambda _: news.set())
        self._running[request.request_id] = pump
        try:
            with self._adapters.using(request.adapter):
                while not pump.done():
                    await news.wait()
                    news.clear()
                    if ready:
                        chunks, ready[:] = list(ready), []
                        yield chunks
                if ready:
                    yield ready
                error = ExpertError("the request was aborted", code="aborted") if pump.cancelled() else pump.result()
                if error is not None:
                    yield error
        finally:
            self._running.pop(request.request_id, None)
            pump.cancel()

    async def score(self, request: GenerateRequest, reference: str) -> ExpertScore | ExpertError:
        """Likelihood of `reference` as the answer; an `ExpertError` is returned, not raised."""
        if self._engine is None:
            return self._unavailable()
        try:
            return await self._engine.score(request, reference)
        except ExpertError as error:
            return error

    async def count_tokens(self, request: GenerateRequest) -> int | ExpertError | None:
        """Tokens of the prompt; None where the engine cannot tell. An `ExpertError` is returned, not raised."""
        if self._engine is None:
            return self._unavailable()
        count = getattr(self._engine, "count_tokens", None)
        try:
            return int(await count(request)) if count is not None else None
        except ExpertError as error:
            return error

    async def abort(self, request_id: str) -> bool:
        """Stop a request; whether it was running here."""
        pump = self._running.get(request_id)
        if pump is not None:
            pump.cancel()
        return pump is not None

    async def state(self) -> ReplicaState:
        """Load, speed and facts at this moment."""
        return self._state()

    # -- what the adapter registry calls -----------------------------------------------------------------------

    async def probe_adapters(self) -> ReplicaReport:
        """What this replica holds at this moment."""
        ready = self._engine is not None and self._engine.state().healthy
        return self._adapters.report(ready=ready, reason="" if ready else self._why_not())

    async def load_adapter(self, target: OneReplica, version: str, path: str, content_hash: str) -> ExpertError | None:
        """Load an adapter's version from a folder that does not change, and have it answer a canary request.

        Nothing happens where it is loaded. Errors are returned: `InvalidRequest` where it can never be loaded,
        `QueueFull` where no slot is free, `ExpertUnavailable` where it may work later or on another replica.
        """
        return self._mistaken(target) or await self._adapters.load(version, path, content_hash)

    async def unload_adapter(self, target: OneReplica, version: str) -> ExpertError | None:
        """Unload an adapter's version once its requests here have ended. Nothing happens where it is not loaded."""
        return self._mistaken(target) or await self._adapters.unload(version)

    def _mistaken(self, target: OneReplica) -> ExpertUnavailable | None:
        if target.replica_id == self._adapters.replica_id:
            return None
        return ExpertUnavailable(f"replica {target.replica_id} of expert {self._name!r} is gone")

    # -- what Serve calls --------------------------------------------------------------------------------------

    def check_health(self) -> None:
        """Raise when an engine in this process has died, so that Serve replaces the replica.

        A remote expert that is down is not cured by a new replica, one that never started is tried again here, and so
        is one that computes in processes of its own: a new engine in this replica is ready sooner than a new replica.
        """
        if self._engine is None or not isinstance(self._config, LocalExpert) or self._config.own_process:
            return
        if not self._engine.state().healthy:
            raise RuntimeError(f"the engine of expert {self._name!r} has stopped")

    async def close(self) -> None:
        """Abort what runs, withdraw the published state and close the engine."""
        for task in (*self._tasks, *self._running.values()):
            task.cancel()
        await asyncio.gather(*self._tasks, *self._running.values(), return_exceptions=True)
        with contextlib.suppress(StoreUnavailable):
            await self._store.hdel(live_state.live_key(self._name), str(self._rank))
        await self._store.close()
        engine, self._engine, self._reason = self._engine, None, "stopped"
        self._adapters.use(None)
        if engine is not None:
            await engine.close()

    # -- inside ------------------------------------------------------------------------------------------------

    async def _pump(
        self, engine: Engine, request: GenerateRequest, ready: list[Chunk], news: asyncio.Event
    ) -> ExpertError | None:
        """Move chunks from the engine into `ready` as they come; returns the error that ended them, if any."""
        chunks = engine.generate(request)
        watched = self._watch.begin(request)
        try:
            async for chunk in chunks:
                ready.append(chunk)
                news.set()
                watched.chunk(chunk)
        except ExpertError as error:
            return error
        except Exception:
            log.exception("expert %s failed on request %s", self._name, request.request_id)
            return ExpertError(f"expert {self._name!r} failed on this request")
        finally:
            watched.close()
            close = getattr(chunks, "aclose", None)
            if close is not None:
                await close()
        return None

    async def _keep_engine(self) -> None:
        """Start the engine; when one that has its own processes dies or hangs, end what is left and start another."""
        own_process = isinstance(self._config, LocalExpert) and self._config.own_process
        await self._start_engine()
        while own_process:
            await asyncio.sleep(LOOK_S)
            engine = self._engine
            if engine is None or engine.state().healthy:
                continue
            reason = getattr(engine, "ailment", lambda: None)() or "the engine has stopped"
            log.error("expert %s: %s; starting it again", self._name, reason)
            self._engine, self._reason = None, f"starting again: {reason}"
            self._adapters.use(None)
            await self._publish()
            with contextlib.suppress(Exception):
                await engine.close()
            await self._start_engine()

    async def _start_engine(self) -> None:
        """Build and start the engine, again and again until it starts."""
        pause = FIRST_RETRY_S
        while True:
            engine: Engine | None = None
            try:
                self._newest = engine = await asyncio.to_thread(_build, self._name, self._config)
                await engine.start()
                self._facts = await asyncio.to_thread(_facts, engine, self._config)
            except Exception as error:
                # An `ExpertUnavailable` says why in its own words; of anything else the log has the traceback.
                known = isinstance(error, ExpertError)
                self._reason = error.message if isinstance(error, ExpertError) else f"{type(error).__name__}: {error}"
                log.error(
                    "expert %s cannot start, next try in %.0f s: %s",
                    self._name,
                    pause,
                    self._reason,
                    exc_info=None if known else error,
                )
                if engine is not None:
                    with contextlib.suppress(Exception):
                        await engine.close()
                await asyncio.sleep(pause)
                pause = min(2 * pause, LAST_RETRY_S)
            else:
                self._engine, self._reason = engine, ""
                self._adapters.use(engine)
                await self._publish()
                log.info("expert %s is ready", self._name)
                return

    async def _keep_publishing(self) -> None:
        while True:
            await self._publish()
            await asyncio.sleep(live_state.PERIOD_S)

    async def _publish(self) -> None:
        self._published += 1
        try:
            await live_state.publish(self._store, self._name, self._rank, self._state())
        except StoreUnavailable:
            pass  # the store logs its loss; gateways go on with what they saw last
        except Exception:
            log.exception("the state of expert %s could not be published", self._name)

    def _state(self) -> ReplicaState:
        engine = self._engine.state() if self._engine else EngineState(healthy=False)
        return ReplicaState(
            ready=self._engine is not None and engine.healthy,
            reason=self._why_not() if self._engine is None else ("" if engine.healthy else "the engine is not healthy"),
            engine=engine,
            **self._facts,
            bytes_per_token=self._watch.bytes_per_token,
            prompt_tokens_waiting=self._watch.load().prompt_tokens_waiting,
            latency=self._watch.latency(),
            sequence=self._published,
        )

    def _why_not(self) -> str:
        """Why there is no engine; while a first one starts, how far it has come."""
        if self._reason == "starting":
            return str(getattr(self._newest, "progress", self._reason))
        return self._reason

    def _unavailable(self) -> ReplicaNotReady:
        return ReplicaNotReady(f"expert {self._name!r} is not ready: {self._why_not()}")


def _build(name: str, config: ExpertConfig) -> Engine:
    """Import and build the engine, which may take seconds: off the event loop."""
    from signalbox.experts.engines import build_engine

    return build_engine(name, config)


def _facts(engine: Engine, config: ExpertConfig) -> dict[str, Any]:
    """Parameter count, context length and fingerprint of a local model, from its files and engine."""
    if not isinstance(config, LocalExpert):
        return {}
    from signalbox.experts.models import fingerprint, resolve

    model = resolve(config.model, weights=config.has_weights)
    longest = getattr(engine, "longest", None)  # the model's context, or less where the cache's memory is less
    return {
        "parameters": model.parameters,
        "context_length": int(longest or model.context_length),
        "fingerprint": fingerprint(config.model, weights=config.has_weights),
    }


def _replica_rank() -> int:
    """This replica's number among those of its expert; 0 outside of a Serve cluster."""
    from ray import serve

    try:
        return int(serve.get_replica_context().rank.rank)
    except Exception:  # local testing mode has no ranks
        return 0


def _replica_id() -> str:
    """Serve's id of this replica; any other unique one outside of a Serve cluster."""
    from ray import serve

    try:
        return str(serve.get_replica_context().replica_id.unique_id)
    except Exception:  # local testing mode has no such context
        return uuid.uuid4().hex[:8]


class ExpertClient:
    """The gateway's side of the hop: an `Engine`-like `generate` over a deployment's handle.

    `on_unreachable` is called with the expert's name when a replica could not be reached or was lost on the way.
    """

    def __init__(
        self, name: str, handle: DeploymentHandle[Any], on_unreachable: Callable[[str], None] | None = None
    ) -> None:
        self.name = name
        self._on_unreachable = on_unreachable
        self._handle = handle
        self._generate = handle.options(method_name="generate", stream=True)
        self._aborts: set[asyncio.Task[None]] = set()

    async def generate(self, request: GenerateRequest) -> AsyncIterator[list[Chunk]]:
        """Lists of chunks, the last with a finish reason. Raises the `ExpertError` that the expert reports.

        Closing the iterator before its end, or cancelling the task that reads it, stops the generation.
        """
        from ray.serve.exceptions import BackPressureError

        finished = False
        response = cast("DeploymentResponseGenerator[Any]", self._generate.remote(request))
        try:
            # When a replica has died, Serve waits for its successor; another expert may answer before that.
            async with asyncio.timeout(ACCEPT_S):
                await response._fetch_future_result_async()
            async for item in response:
                if isinstance(item, ExpertError):
                    finished = True
                    raise item
                finished = bool(item) and item[-1].finish_reason is not None
                yield item
            if not finished:
                finished = True
                raise ExpertUnavailable(f"expert {self.name!r} ended its answer too early")
        except (ExpertError, asyncio.CancelledError, GeneratorExit):
            raise
        except BackPressureError as error:
            finished = True
            raise QueueFull(f"expert {self.name!r} has too many requests queued") from error
        except Exception as error:  # Ray's and gRPC's: the replica died, is being replaced, or cannot be reached
            task = asyncio.current_task()
            if task is not None and task.cancelling():  # some handles tell a cancellation by an error of their own
                raise asyncio.CancelledError from None
            log.warning("request %s: expert %s cannot be reached: %r", request.request_id, self.name, error)
            if self._on_unreachable is not None:
                self._on_unreachable(self.name)
            raise ExpertUnavailable(f"expert {self.name!r} cannot be reached") from error
        finally:
            if not finished:
                response.cancel()
                self._abort_soon(request.request_id)

    async def count_tokens(self, request: GenerateRequest) -> int | None:
        """Tokens of the request's prompt by the expert's tokenizer; None where it cannot tell, or not in time.

        Raises `InvalidRequest` where the request can never be served.
        """
        try:
            async with asyncio.timeout(ACCEPT_S):
                counted = await self._handle.count_tokens.remote(request)
        except Exception as error:
            log.warning("request %s: expert %s did not count its tokens: %r", request.request_id, self.name, error)
            return None
        if isinstance(counted, InvalidRequest):
            raise counted
        return None if isinstance(counted, ExpertError) else counted

    def _abort_soon(self, request_id: str) -> None:
        """Cancelling the call is enough where it reached the replica; this also stops one that is just arriving."""
        task = asyncio.get_running_loop().create_task(self._abort(request_id))
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)

    async def _abort(self, request_id: str) -> None:
        with contextlib.suppress(Exception):  # the replica may be gone, and its requests with it
            await self._handle.broadcast("abort", request_id).results_async(timeout_s=2.0)


def deploy(name: str, config: ExpertConfig, store_url: str, *, gpus: float = 0.0) -> Application:
    """The Serve application node of one expert. `gpus` is the share of a GPU that each replica gets."""
    from ray import serve

    places = config.max_running + config.max_waiting
    options: dict[str, Any] = {}
    if isinstance(config, LocalExpert) and config.max_adapters:
        from ray.serve.config import RequestRouterConfig

        options["request_router_config"] = RequestRouterConfig(request_router_class=_ROUTER)  # type: ignore[arg-type]
    deployment = serve.deployment(
        name=f"expert-{name}",
        num_replicas=1 if isinstance(config, OpenAIExpert) else config.replicas,
        ray_actor_options={"num_cpus": 0.01} | ({"num_gpus": gpus} if gpus else {}),
        # The engine bounds its queue and answers 429 itself; Serve's bounds lie beyond, in case it cannot.
        max_ongoing_requests=2 * places + 64,
        max_queued_requests=2 * places + 64,
        health_check_period_s=5.0,
        health_check_timeout_s=30.0,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=CLOSE_S,
        **options,
    )
    return deployment(ExpertDeployment).bind(name, config, store_url)
