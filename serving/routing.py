"""The router inside the gateway: one worker thread, prompts of concurrent requests predicted together.

Prompts that arrive while a batch runs wait for the next one, so that the batch grows with the load and a lone
request waits for nobody. A router that is broken or overrun never fails a request: `predict` then says that
nothing is known, and the decision goes by the policy's other figures.

Between two batches `swap` puts another predictor in place (`live_router.py` watches for new artifacts), and what was
learned from outcomes (`learner.py`) corrects it.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from signalbox.router.base import Predictor, Prompt
from signalbox.router.online import OnlinePrediction, OnlineRouter
from signalbox.serving.config import Config

log = logging.getLogger(__name__)

MAX_BATCH = 32
MAX_WAITING = 512  # prompts; beyond that requests are decided without a prediction
LEARNED = 100  # outcomes after which remembered decisions are made anew
MAX_CHARACTERS = 16_384  # of a prompt that a predictor sees; encoders read a few hundred tokens at most
FALLBACK, NO_ROUTER = "fallback", "none"
CLOSED = "closed"

# Said of every expert where nothing is predicted: equal quality, so that cost, latency and ceilings decide.
UNKNOWN_QUALITY = (0.5, 0.0)


@dataclass(slots=True, frozen=True)
class Basis:
    """What a prediction was made of: all that is needed to learn from its outcome, and no word of the prompt.

    version: the artifact's; features: phi of `router/online.py`; shipped and predicted: expert -> (quality, standard
    deviation) without and with what was learned; deviation: expert -> standard deviation of the mean quality.
    """

    version: str
    features: list[float]
    shipped: dict[str, tuple[float, float]]
    predicted: dict[str, tuple[float, float]]
    deviation: dict[str, float]


@dataclass(slots=True, frozen=True)
class Scores:
    """Predicted quality of each expert, (mean, standard deviation) in [0, 1], for one request.

    `router` is the router's name, or `fallback` where it could not be asked, or `none` where none is declared;
    `basis` is there where it was asked.
    """

    quality: dict[str, tuple[float, float]]
    spread: float
    router: str
    basis: Basis | None = None


@dataclass(slots=True)
class _Waiting:
    prompts: list[Prompt]
    result: asyncio.Future[tuple[OnlinePrediction, int, str]]


class Routing:
    """Micro-batching around one predictor, which `load` imports, reads and warms up in the worker thread.

    Without `load` it knows nothing and says so. `experts` are those that `auto` may choose from.
    """

    def __init__(
        self, experts: Sequence[str], *, name: str = NO_ROUTER, load: Callable[[], Predictor] | None = None
    ) -> None:
        self._experts = tuple(experts)
        self._name = name
        self._load = load
        self._online: OnlineRouter | None = None
        self._loaded_at: str | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="router")
        self._waiting: deque[_Waiting] = deque()
        self._count = 0  # prompts in `_waiting`
        self._news = asyncio.Event()
        self._loaded = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._last_complaint = float("-inf")
        self.error: str | None = None
        self.refused: str | None = None  # why the newest artifact was not taken

    @property
    def online(self) -> OnlineRouter | None:
        """The predictor that serves now, and what it has learned; None before it is loaded."""
        return self._online

    @property
    def generation(self) -> str:
        """What a remembered decision must agree with: the artifact's version, and about how much was learned since."""
        if self._online is None:
            return ""
        state = self._online.state
        learned = (state.rollbacks, state.updates // LEARNED) if state else (0, 0)
        return f"{self._online.version}/{learned[0]}/{learned[1]}"

    @property
    def experts(self) -> tuple[str, ...]:
        """Those that `auto` may choose from."""
        return self._experts

    @property
    def ready(self) -> bool:
        """Whether loading has come to its end, well or badly."""
        return self._load is None or self._loaded.is_set()

    def start(self) -> None:
        """Load and warm up the predictor in its thread; requests that come earlier wait for it."""
        if self._load is not None:
            self._task = asyncio.create_task(self._run(self._load), name="routing")

    def swap(self, online: OnlineRouter) -> None:
        """Predict with another router from the next batch on. It must be loaded and warm. On the event loop only."""
        self._online = online
        self._loaded_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        self.refused = None
        if self.error != CLOSED:
            self.error = None

    def describe(self) -> dict[str, Any]:
        """For `/v1/routers`."""
        online = self._online
        return {
            "name": self._name,
            "kind": online.kind if online else None,
            "version": online.version if online else None,
            "loaded_at": self._loaded_at,
            "experts": list(online.experts) if online else [],
            "error": self.error,
            "refused": self.refused,
            "learning": online.describe() if online else None,
        }

    async def close(self) -> None:
        """Stop; requests that wait are decided without a prediction."""
        self.error = CLOSED
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for waiting in self._waiting:
            waiting.result.cancel()
        self._waiting.clear()
        self._worker.shutdown(wait=False, cancel_futures=True)

    async def predict(self, prompts: Sequence[Prompt]) -> Scores:
        """The experts' mean quality over the prompts of one request."""
        if self._load is None:
            return self._unknown(NO_ROUTER)
        if self.error is not None:
            return self._unknown(FALLBACK)
        if self._count + len(prompts) > MAX_WAITING:
            self._complain(f"{self._count} prompts wait for the router; this request is decided without it")
            return self._unknown(FALLBACK)
        cut = [Prompt(p.text[:MAX_CHARACTERS], p.system[:MAX_CHARACTERS]) for p in prompts]
        waiting = _Waiting(cut, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._count += len(cut)
        self._news.set()
        try:
            prediction, first, version = await waiting.result
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return self._unknown(FALLBACK)  # the router was closed
        except Exception as error:
            self._complain(f"the router failed; requests are decided without it: {type(error).__name__}: {error}")
            return self._unknown(FALLBACK)
        basis = _basis(prediction, first, len(cut), version)
        return Scores(basis.predicted, prediction.shipped.spread, self._name, basis)

    def _unknown(self, router: str) -> Scores:
        return Scores(dict.fromkeys(self._experts, UNKNOWN_QUALITY), 1.0, router)

    async def _run(self, load: Callable[[], Predictor]) -> None:
        loop = asyncio.get_running_loop()
        try:
            started = time.monotonic()
            loaded = await loop.run_in_executor(self._worker, load)
            online = loaded if isinstance(loaded, OnlineRouter) else OnlineRouter(loaded)
            self.swap(online)
            log.info("router %s is ready after %.1f s", self._name, time.monotonic() - started)
            missing = [name for name in self._experts if name not in online.experts]
            if missing:
                log.warning("router %s was not trained on %s: `auto` never chooses it", self._name, ", ".join(missing))
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"
            log.exception("router %s cannot be loaded; requests are decided without it", self._name)
            for waiting in self._take(None):
                _fail(waiting, error)
        finally:
            self._loaded.set()
        while True:  # also after a failure: a sound artifact may be swapped in later
            await self._news.wait()
            self._news.clear()
            while self._waiting and self._online is not None:
                batch = self._take(MAX_BATCH)
                try:
                    await self._predict_batch(loop, self._online, batch)
                finally:
                    for waiting in batch:
                        waiting.result.cancel()  # only where the router was closed meanwhile

    async def _predict_batch(
        self, loop: asyncio.AbstractEventLoop, online: OnlineRouter, batch: list[_Waiting]
    ) -> None:
        prompts = [prompt for waiting in batch for prompt in waiting.prompts]
        try:
            prediction = await loop.run_in_executor(self._worker, online.predict_online, prompts)
        except Exception as error:
            if len(batch) > 1:  # one prompt may be the cause: the others must not suffer for it
                for waiting in batch:
                    await self._predict_batch(loop, online, [waiting])
                return
            log.debug("router %s", self._name, exc_info=True)
            _fail(batch[0], error)
            return
        first = 0
        for waiting in batch:
            if not waiting.result.done():
                waiting.result.set_result((prediction, first, online.version))
            first += len(waiting.prompts)

    def _take(self, most: int | None) -> list[_Waiting]:
        """The next requests, up to `most` prompts (at least one request); those that were cancelled are dropped."""
        taken: list[_Waiting] = []
        size = 0
        while self._waiting and (most is None or not taken or size + len(self._waiting[0].prompts) <= most):
            waiting = self._waiting.popleft()
            self._count -= len(waiting.prompts)
            if not waiting.result.done():
                taken.append(waiting)
                size += len(waiting.prompts)
        return taken

    def _complain(self, message: str) -> None:
        """Log, but not for each of a thousand requests."""
        now = time.monotonic()
        if now - self._last_complaint > 10:
            self._last_complaint = now
            log.error("%s", message)


def load_artifact(path: Path, kind: str | None = None) -> OnlineRouter:
    """Import, load and warm up the predictor of a router artifact; takes seconds.

    Raises `ArtifactError` where it is damaged, replaced while it is read, of another kind than `kind`, or predicts
    what is no number.
    """
    from signalbox.router.artifact import ArtifactError, load_predictor

    folder = path.resolve()  # a link may be pointed elsewhere meanwhile
    version = artifact_version(folder)
    predictor = load_predictor(folder)
    if artifact_version(folder) != version:
        raise ArtifactError(f"{path} was replaced while it was read")
    if kind is not None and predictor.kind != kind:
        raise ArtifactError(f"the router in {path} is of kind '{predictor.kind}', the configuration says '{kind}'")
    online = OnlineRouter(predictor, version=version)
    online.predict([Prompt("What is the capital of France?")])
    tried = online.predict([Prompt("Write a Python function that reverses a list. " * n) for n in (1, 4)])
    if not (np.isfinite(tried.quality).all() and np.isfinite(tried.uncertainty).all()):
        raise ArtifactError(f"{path}: its predictions are not finite; train it again")
    return online


def routing_of(config: Config) -> Routing:
    """The default router of a configuration, not started yet."""
    router = config.routers.get(config.default_router)
    return Routing(
        [name for name, expert in config.experts.items() if expert.routable],
        name=config.default_router if router else NO_ROUTER,
        load=partial(load_artifact, router.artifact, router.wanted) if router else None,
    )


def artifact_version(path: Path) -> str:
    """What changes when the router is trained again; read without loading it."""
    try:
        return str(json.loads((path / "router.json").read_text())["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return "unreadable"


def _basis(online: OnlinePrediction, first: int, count: int, version: str) -> Basis:
    """Means over the prompts of one request; the correction is linear, so those of the features fit."""
    rows = slice(first, first + count)
    experts = online.shipped.experts

    def means(values: np.ndarray[Any, Any]) -> list[float]:
        return values[rows].mean(axis=0).tolist() if count > 1 else values[first].tolist()

    shipped, predicted = online.shipped, online.prediction
    return Basis(
        version=version,
        features=means(online.features),
        shipped=dict(zip(experts, zip(means(shipped.quality), means(shipped.uncertainty), strict=True), strict=True)),
        predicted=dict(
            zip(experts, zip(means(predicted.quality), means(predicted.uncertainty), strict=True), strict=True)
        ),
        deviation=dict(zip(experts, means(online.deviation), strict=True)),
    )


def _fail(waiting: _Waiting, error: Exception) -> None:
    if not waiting.result.done():
        waiting.result.set_exception(error)
