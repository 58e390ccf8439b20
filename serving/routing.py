"""The router inside the gateway: one worker thread, prompts of concurrent requests predicted together.

Prompts that arrive while a batch runs wait for the next one, so that the batch grows with the load and a lone
request waits for nobody. A router that is broken or overrun never fails a request: `predict` then says that
nothing is known, and the decision goes by the policy's other figures.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from signalbox.router.base import Prediction, Predictor, Prompt
from signalbox.serving.config import Config

log = logging.getLogger(__name__)

MAX_BATCH = 32
MAX_WAITING = 512  # prompts; beyond that requests are decided without a prediction
MAX_CHARACTERS = 16_384  # of a prompt that a predictor sees; encoders read a few hundred tokens at most
FALLBACK, NO_ROUTER = "fallback", "none"

# Said of every expert where nothing is predicted: equal quality, so that cost, latency and ceilings decide.
UNKNOWN_QUALITY = (0.5, 0.0)


@dataclass(slots=True, frozen=True)
class Scores:
    """Predicted quality of each expert, (mean, standard deviation) in [0, 1], for one request.

    `router` is the router's name, or `fallback` where it could not be asked, or `none` where none is declared.
    """

    quality: dict[str, tuple[float, float]]
    spread: float
    router: str


@dataclass(slots=True)
class _Waiting:
    prompts: list[Prompt]
    result: asyncio.Future[tuple[Prediction, int]]


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
        self._predictor: Predictor | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="router")
        self._waiting: deque[_Waiting] = deque()
        self._count = 0  # prompts in `_waiting`
        self._news = asyncio.Event()
        self._loaded = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._last_complaint = float("-inf")
        self.error: str | None = None

    @property
    def ready(self) -> bool:
        """Whether loading has come to its end, well or badly."""
        return self._load is None or self._loaded.is_set()

    def start(self) -> None:
        """Load and warm up the predictor in its thread; requests that come earlier wait for it."""
        if self._load is not None:
            self._task = asyncio.create_task(self._run(self._load), name="routing")

    async def close(self) -> None:
        """Stop; requests that wait are decided without a prediction."""
        self.error = "closed"
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
            prediction, first = await waiting.result
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return self._unknown(FALLBACK)  # the router was closed
        except Exception as error:
            self._complain(f"the router failed; requests are decided without it: {type(error).__name__}: {error}")
            return self._unknown(FALLBACK)
        return Scores(_mean(prediction, first, len(cut)), prediction.spread, self._name)

    def _unknown(self, router: str) -> Scores:
        return Scores(dict.fromkeys(self._experts, UNKNOWN_QUALITY), 1.0, router)

    async def _run(self, load: Callable[[], Predictor]) -> None:
        loop = asyncio.get_running_loop()
        try:
            started = time.monotonic()
            self._predictor = await loop.run_in_executor(self._worker, load)
            log.info("router %s is ready after %.1f s", self._name, time.monotonic() - started)
            missing = [name for name in self._experts if name not in self._predictor.experts]
            if missing:
                log.warning("router %s was not trained on %s: `auto` never chooses it", self._name, ", ".join(missing))
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"
            log.exception("router %s cannot be loaded; requests are decided without it", self._name)
            for waiting in self._take(None):
                _fail(waiting, error)
            return
        finally:
            self._loaded.set()
        while True:
            await self._news.wait()
            self._news.clear()
            while self._waiting:
                batch = self._take(MAX_BATCH)
                try:
                    await self._predict_batch(loop, self._predictor, batch)
                finally:
                    for waiting in batch:
                        waiting.result.cancel()  # only where the router was closed meanwhile

    async def _predict_batch(
        self, loop: asyncio.AbstractEventLoop, predictor: Predictor, batch: list[_Waiting]
    ) -> None:
        prompts = [prompt for waiting in batch for prompt in waiting.prompts]
        try:
            prediction = await loop.run_in_executor(self._worker, predictor.predict, prompts)
        except Exception as error:
            if len(batch) > 1:  # one prompt may be the cause: the others must not suffer for it
                for waiting in batch:
                    await self._predict_batch(loop, predictor, [waiting])
                return
            log.debug("router %s", self._name, exc_info=True)
            _fail(batch[0], error)
            return
        first = 0
        for waiting in batch:
            if not waiting.result.done():
                waiting.result.set_result((prediction, first))
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


def load_artifact(path: Path) -> Predictor:
    """Import, load and warm up the predictor of a router artifact; takes seconds."""
    from signalbox.router.artifact import load_predictor

    predictor = load_predictor(path)
    predictor.predict([Prompt("What is the capital of France?")])
    predictor.predict([Prompt("Write a Python function that reverses a list. " * n) for n in (1, 4)])
    return predictor


def routing_of(config: Config) -> Routing:
    """The default router of a configuration, not started yet."""
    router = config.routers.get(config.default_router)
    return Routing(
        [name for name, expert in config.experts.items() if expert.routable],
        name=config.default_router if router else NO_ROUTER,
        load=partial(load_artifact, router.artifact) if router else None,
    )


def artifact_version(path: Path) -> str:
    """What changes when the router is trained again; read without loading it."""
    try:
        return str(json.loads((path / "router.json").read_text())["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return "unreadable"


def _mean(prediction: Prediction, first: int, count: int) -> dict[str, tuple[float, float]]:
    if count == 1:
        return prediction.row(first)
    rows = slice(first, first + count)
    quality, uncertainty = prediction.quality[rows].mean(axis=0), prediction.uncertainty[rows].mean(axis=0)
    return {name: (float(quality[e]), float(uncertainty[e])) for e, name in enumerate(prediction.experts)}


def _fail(waiting: _Waiting, error: Exception) -> None:
    if not waiting.result.done():
        waiting.result.set_exception(error)
