"""Learning on line: a shipped predictor, and for each expert a correction learned from the outcomes of its requests.

The correction of expert e on a prompt is w_e . phi, with phi a short vector that the shipped predictor yields on the
way (`features_of`) and w_e ~ N(0, prior) before any outcome, so that the router starts as the shipped one. Each outcome
(score less shipped quality, its noise the shipped uncertainty) is one step of recursive least squares, that is exact
Bayesian linear regression (Bishop 2006, section 3.3), by the Sherman-Morrison formula in O(d^2). From the same
posterior comes the chance that an expert is the best one (`probability_best`): drawing by it is Thompson sampling
(Agrawal & Goyal, arXiv 1209.3352) with propensities that are known.

`learn` is a pure function of (state, outcome): gateways that read one ordered log of outcomes reach the same state.

The guard. Every outcome judges before it teaches (prequentially, Dawid 1984). Two statistics, both exponentially
weighted over a short and a long past, roll the correction back:

* *worse*: the mean of the paired difference of squared errors, online less shipped, on the expert that answered. Its
  square is what the correction minimises, and pairing takes out how hard the prompts are. More than `guard_errors`
  standard errors above `TOLERANCE`: what was learned misleads.
* *contradicted*: the slope of scores on shipped qualities within each expert, 1 if the outcomes are of the kind that
  the artifact was made for, 0 for scores at random, negative for adversarial ones. A correction fits such outcomes
  better than the artifact does, so no comparison of errors can find them; but they deny what the artifact was shown
  to know, and drift rarely does that: it moves whole experts, which the slope within them does not see. Significantly
  below `LEAST_SLOPE` is taken for poison; where the world did turn over, the remedy is to train again. The power of
  this test grows with how much the artifact knows: scores at random deny little to one that knows little.

After a rollback the shipped artifact serves alone for `cool_down` outcomes, and for as many again while their slope is
below `LEAST_SLOPE`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from statistics import NormalDist
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import orjson
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save
from scipy.special import ndtr

from signalbox.router.base import FloatMatrix, Prediction, Predictor, Prompt

Vector = NDArray[np.float64]
Event = Literal["worse", "contradicted"]

# phi: bias, mean quality, each expert's quality less the mean (MOST_QUALITIES), the predictor's own (MOST_FEATURES).
PHI = "phi-1"  # names what it holds: a state learned on another is refused
MOST_QUALITIES, MOST_FEATURES = 16, 32
QUALITY_UNIT = 0.1  # a gap in predicted quality that counts as 1
CLIP = 3.0
# Noise of a score: never taken to be smaller, or a predictor that is too sure of itself would learn from one outcome.
LEAST_NOISE = 0.1

TOLERANCE = 1e-3  # squared error that the online one may be worse by
LEAST_SLOPE = 0.25
# Weight of an outcome after n others: decay**n. Long memory sees what is small, short memory what is new.
ERROR_DECAYS, SLOPE_DECAYS = (0.998, 0.98), (0.9995, 0.995)
NODES = np.array([NormalDist().inv_cdf((i + 0.5) / 32) for i in range(32)])


@runtime_checkable
class FeaturePredictor(Protocol):
    """A predictor that hands out what it made of a prompt, besides what it predicts."""

    def predict_with_features(self, prompts: list[Prompt]) -> tuple[Prediction, FloatMatrix]:
        """As `predict`, and features float32 [n, k] of the prompts, of about unit length."""


@dataclass(slots=True, frozen=True)
class Learning:
    """How fast to learn, and when to give up.

    prior_deviation: standard deviation of each weight before any outcome, in quality; forgetting: weight of the past
    after one more outcome of the same expert, in [.99, 1]; guard_errors: standard errors that roll back; evidence:
    outcomes that either statistic needs at least; cool_down: outcomes after a rollback that teach nothing.
    """

    prior_deviation: float = 0.03
    forgetting: float = 0.9998
    guard_errors: float = 3.0
    evidence: int = 50
    cool_down: int = 300

    def __post_init__(self) -> None:
        """Raises `ValueError`."""
        if not 0.99 <= self.forgetting <= 1 or self.prior_deviation <= 0 or self.evidence < 10 or self.cool_down < 1:
            raise ValueError(f"{self}: forgetting must be in [.99, 1], evidence 10 or more, the others positive")


@dataclass(slots=True, frozen=True)
class Outcome:
    """What came of one request: the expert that answered, how well, and what was known before.

    features: float32 [d], as predicted with; quality, uncertainty: the shipped prediction for that expert;
    score: in [0, 1].
    """

    expert: str
    features: NDArray[np.float32]
    quality: float
    uncertainty: float
    score: float


@dataclass(slots=True, frozen=True)
class Running:
    """Exponentially weighted mean of a series and the standard error of that mean."""

    weight: float = 0.0
    squares: float = 0.0
    mean: float = 0.0
    scatter: float = 0.0

    def add(self, value: float, decay: float) -> Running:
        """With one more value."""
        weight = decay * self.weight + 1.0
        mean = self.mean + (value - self.mean) / weight
        scatter = decay * self.scatter + (value - self.mean) * (value - mean)
        return Running(weight, decay * decay * self.squares + 1.0, mean, scatter)

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return math.sqrt(self.scatter * self.squares / self.weight) / self.weight if self.weight else math.inf


@dataclass(slots=True, frozen=True)
class Slope:
    """Exponentially weighted regression of y on x within groups: group -> (weight, mean x, mean y), and the sums."""

    groups: tuple[tuple[float, float, float], ...]
    weight: float = 0.0
    xx: float = 0.0
    xy: float = 0.0
    yy: float = 0.0

    def add(self, group: int, x: float, y: float, decay: float) -> Slope:
        """With one more pair."""
        weight, mean_x, mean_y = self.groups[group]
        weight = decay * weight + 1.0
        dx, dy = x - mean_x, y - mean_y
        mean_x, mean_y = mean_x + dx / weight, mean_y + dy / weight
        groups = (*self.groups[:group], (weight, mean_x, mean_y), *self.groups[group + 1 :])
        return Slope(
            groups,
            decay * self.weight + 1.0,
            decay * self.xx + dx * (x - mean_x),
            decay * self.xy + dx * (y - mean_y),
            decay * self.yy + dy * (y - mean_y),
        )

    @property
    def value(self) -> float:
        """The slope; 1 while nothing speaks against it."""
        return self.xy / self.xx if self.xx > 1e-9 else 1.0

    @property
    def error(self) -> float:
        """Its standard error."""
        freedom = self.weight - 1 - sum(weight > 0 for weight, _, _ in self.groups)
        if self.xx <= 1e-9 or freedom <= 0:
            return math.inf
        return math.sqrt(max(self.yy - self.value * self.xy, 1e-12) / freedom / self.xx)


@dataclass(frozen=True)
class OnlineState:
    """All that was learned: the posterior of each expert and the guard's statistics. Never changed, only replaced.

    mean: each expert's weights float64 [d]; covariance: float64 [d, d] each; `version` is the artifact's.
    `updates` counts outcomes learned from since the start or the last rollback, `outcomes` all that were seen.
    """

    version: str
    experts: tuple[str, ...]
    mean: tuple[Vector, ...]
    covariance: tuple[Vector, ...]
    slope: tuple[Slope, Slope]
    worse: tuple[Running, Running] = (Running(), Running())
    error_online: Running = field(default_factory=Running)
    error_shipped: Running = field(default_factory=Running)
    outcomes: int = 0
    updates: int = 0
    rollbacks: int = 0
    cool_down: int = 0

    @property
    def dimension(self) -> int:
        """Length of phi."""
        return len(self.mean[0])

    def dumps(self) -> bytes:
        """As safetensors."""
        numbers = {
            "outcomes": self.outcomes,
            "updates": self.updates,
            "rollbacks": self.rollbacks,
            "cool_down": self.cool_down,
        }
        said = orjson.dumps({"phi": PHI, "version": self.version, "experts": self.experts, **numbers})
        guard = [*self.worse, self.error_online, self.error_shipped]
        tensors = {
            "mean": np.stack(self.mean),
            "covariance": np.stack(self.covariance),
            "running": np.array([[r.weight, r.squares, r.mean, r.scatter] for r in guard]),
            "slope": np.array([[s.weight, s.xx, s.xy, s.yy] for s in self.slope]),
            "groups": np.array([s.groups for s in self.slope]),
        }
        return save(tensors, metadata={"online": said.decode()})

    @classmethod
    def loads(cls, data: bytes) -> OnlineState:
        """The inverse of `dumps`. Raises `ValueError` on anything else."""
        try:
            tensors = load(data)
            header = orjson.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            said = orjson.loads(header["__metadata__"]["online"])
            if said.pop("phi") != PHI:
                raise ValueError(f"it was learned on other features than {PHI}")
            experts, mean, covariance = tuple(said.pop("experts")), tensors["mean"], tensors["covariance"]
            if mean.ndim != 2 or len(mean) != len(experts) or covariance.shape != (*mean.shape, mean.shape[1]):
                raise ValueError("shapes of mean and covariance do not fit")
            if not all(np.isfinite(tensor).all() for tensor in tensors.values()):
                raise ValueError("a value is not finite")
            if tensors["groups"].shape != (2, len(experts), 3):
                raise ValueError("shape of groups does not fit")
            groups = [tuple((w, x, y) for w, x, y in table) for table in tensors["groups"].tolist()]
            long, short = (Slope(g, *map(float, row)) for g, row in zip(groups, tensors["slope"], strict=True))
            *worse, online, shipped = (Running(*map(float, row)) for row in tensors["running"])
            return cls(
                experts=experts,
                mean=tuple(mean),
                covariance=tuple(covariance),
                slope=(long, short),
                worse=(worse[0], worse[1]),
                error_online=online,
                error_shipped=shipped,
                **said,
            )
        except (SafetensorError, KeyError, TypeError, IndexError, orjson.JSONDecodeError) as error:
            raise ValueError(f"not an online state: {type(error).__name__}: {error}") from None


def fresh(version: str, experts: Sequence[str], dimension: int, learning: Learning) -> OnlineState:
    """The state that changes nothing."""
    count = len(experts)
    prior = np.eye(dimension) * learning.prior_deviation**2
    slope = Slope(((0.0, 0.0, 0.0),) * count)
    return OnlineState(version, tuple(experts), (np.zeros(dimension),) * count, (prior,) * count, (slope, slope))


def learn(state: OnlineState, outcome: Outcome, learning: Learning) -> tuple[OnlineState, Event | None]:
    """The state after one more outcome, and what the guard found, if it rolled back. Pure and deterministic.

    An outcome that does not fit (unknown expert, another length of phi, not finite, a score outside [0, 1]) changes
    nothing.
    """
    phi = np.asarray(outcome.features, dtype=np.float64)
    figures = (outcome.quality, outcome.uncertainty, outcome.score)
    if outcome.expert not in state.experts or phi.shape != (state.dimension,):
        return state, None
    if not np.isfinite(phi).all() or not all(map(math.isfinite, figures)) or not 0 <= outcome.score <= 1:
        return state, None
    e = state.experts.index(outcome.expert)
    predicted = min(max(outcome.quality + float(state.mean[e] @ phi), 0.0), 1.0)
    online, shipped = (outcome.score - predicted) ** 2, (outcome.score - outcome.quality) ** 2
    (long, short), (slow, fast) = state.slope, state.worse
    if not state.cool_down:
        slow, fast = slow.add(online - shipped, ERROR_DECAYS[0]), fast.add(online - shipped, ERROR_DECAYS[1])
    pair = (e, outcome.quality, outcome.score)
    state = replace(
        state,
        outcomes=state.outcomes + 1,
        slope=(long.add(*pair, SLOPE_DECAYS[0]), short.add(*pair, SLOPE_DECAYS[1])),
        worse=(slow, fast),
        error_online=state.error_online.add(online, ERROR_DECAYS[0]),
        error_shipped=state.error_shipped.add(shipped, ERROR_DECAYS[0]),
    )
    if state.cool_down:
        if state.cool_down > 1 or state.slope[0].value >= LEAST_SLOPE:
            return replace(state, cool_down=state.cool_down - 1), None
        # The outcomes since the rollback do not look right: wait for as many fresh ones.
        blank = fresh(state.version, state.experts, state.dimension, learning)
        return replace(state, slope=blank.slope, cool_down=learning.cool_down), None
    found = _guard(state, learning)
    if found:
        blank = fresh(state.version, state.experts, state.dimension, learning)
        kept = {"outcomes": state.outcomes, "rollbacks": state.rollbacks + 1, "cool_down": learning.cool_down}
        errors = {"error_online": state.error_online, "error_shipped": state.error_shipped}
        return replace(blank, **kept, **errors), found  # type: ignore[arg-type]
    return _step(state, e, phi, outcome, learning), None


def _guard(state: OnlineState, learning: Learning) -> Event | None:
    sure = learning.guard_errors
    if state.worse[0].weight >= learning.evidence and any(w.mean - sure * w.error > TOLERANCE for w in state.worse):
        return "worse"
    if state.slope[0].weight >= learning.evidence and any(s.value + sure * s.error < LEAST_SLOPE for s in state.slope):
        return "contradicted"
    return None


def _step(state: OnlineState, e: int, phi: Vector, outcome: Outcome, learning: Learning) -> OnlineState:
    """One step of recursive least squares for expert `e`."""
    mean, covariance = state.mean[e], state.covariance[e]
    noise, keep = max(outcome.uncertainty, LEAST_NOISE) ** 2, learning.forgetting
    direction = covariance @ phi
    variance = float(phi @ direction)
    if variance <= 0:
        return state
    mean = mean + direction * ((outcome.score - outcome.quality - mean @ phi) / (keep * noise + variance))
    # Forgetting widens the direction of phi alone, by 1 / keep (Kulhavy 1984): others would grow without bound. Then
    # the outcome narrows it. In sum it never grows.
    factor = (1 / keep - 1) / variance - 1 / (keep * (keep * noise + variance))
    covariance = covariance + min(factor, 0.0) * np.outer(direction, direction)
    covariance = (covariance + covariance.T) / 2
    return replace(
        state,
        mean=(*state.mean[:e], mean, *state.mean[e + 1 :]),
        covariance=(*state.covariance[:e], covariance, *state.covariance[e + 1 :]),
        updates=state.updates + 1,
    )


@dataclass(slots=True, frozen=True)
class OnlinePrediction:
    """What is predicted with what was learned, and what it was made of.

    prediction: corrected; shipped: as the artifact says; features: phi float32 [n, d]; deviation: float32 [n, E], one
    standard deviation of the *mean* quality (how much the correction may still move), which exploration is drawn from.
    """

    prediction: Prediction
    shipped: Prediction
    features: FloatMatrix
    deviation: FloatMatrix


class OnlineRouter:
    """A shipped predictor with what was learned since; itself a `Predictor`.

    `state` is replaced as a whole, so that predicting in one thread while another learns is safe.
    """

    def __init__(self, base: Predictor, *, version: str = "", learning: Learning | None = None) -> None:
        self.base = base
        self.kind = base.kind
        self.experts = tuple(base.experts)
        self.version = version
        self.learning = learning or Learning()
        self.state: OnlineState | None = None  # None: nothing was ever learned
        self.dimension: int | None = None  # of phi, known from the first prediction on

    def predict(self, prompts: list[Prompt]) -> Prediction:
        """Predict all experts on all prompts; blocking and thread-safe."""
        return self.predict_online(prompts).prediction

    def predict_online(self, prompts: list[Prompt]) -> OnlinePrediction:
        """As `predict`, with what the prediction was made of."""
        shipped, features = features_of(self.base, prompts)
        self.dimension = features.shape[1]
        return corrected(shipped, features, self.state, self.learning)

    def restore(self, state: OnlineState) -> bool:
        """Go on from this state; False, and nothing is done, where it belongs to another artifact."""
        if (state.version, state.experts) != (self.version, self.experts):
            return False
        if self.dimension not in (None, state.dimension):
            return False
        self.state = state
        return True

    def reset(self) -> None:
        """Forget all that was learned."""
        self.state = None

    def learn(self, outcome: Outcome) -> Event | None:
        """Learn from one outcome; returns why everything was rolled back, if it was. One caller at a time."""
        state = self.state
        if state is None:
            state = fresh(self.version, self.experts, self.dimension or len(outcome.features), self.learning)
        self.state, event = learn(state, outcome, self.learning)
        return event

    def describe(self) -> dict[str, Any]:
        """How learning goes, for people: counts, and mean squared errors of late."""
        state = self.state
        if state is None:
            return {"outcomes": 0, "updates": 0, "rollbacks": 0, "active": False, "cool_down": 0}
        said: dict[str, Any] = {
            "outcomes": state.outcomes,
            "updates": state.updates,
            "rollbacks": state.rollbacks,
            "active": state.updates > 0,
            "cool_down": state.cool_down,
        }
        if state.outcomes:
            said |= {"error_online": state.error_online.mean, "error_shipped": state.error_shipped.mean}
            said |= {"slope": state.slope[0].value}
        return said


def features_of(base: Predictor, prompts: list[Prompt]) -> tuple[Prediction, FloatMatrix]:
    """The shipped prediction and phi float32 [n, d], d <= 50: its qualities, and features where `base` has any."""
    if isinstance(base, FeaturePredictor):
        shipped, own = base.predict_with_features(prompts)
    else:
        shipped, own = base.predict(prompts), np.zeros((len(prompts), 0), dtype=np.float32)
    level = shipped.quality.mean(axis=1, keepdims=True)
    gaps = np.clip((shipped.quality - level) / QUALITY_UNIT, -CLIP, CLIP) / np.sqrt(shipped.quality.shape[1])
    blocks = [
        np.ones_like(level),
        (level - 0.5) / (2 * QUALITY_UNIT),
        _narrow(gaps, MOST_QUALITIES),
        np.clip(_narrow(own, MOST_FEATURES), -CLIP, CLIP),
    ]
    return shipped, np.concatenate(blocks, axis=1).astype(np.float32)


def _narrow(x: NDArray[Any], most: int) -> NDArray[Any]:
    """At most `most` columns: as they are, or a fixed random projection that keeps lengths (Johnson-Lindenstrauss)."""
    return x if x.shape[1] <= most else x @ _projection(x.shape[1], most)


@lru_cache(maxsize=16)
def _projection(width: int, most: int) -> FloatMatrix:
    signs = np.random.default_rng(width).integers(0, 2, (width, most)) * 2 - 1
    return (signs / np.sqrt(most)).astype(np.float32)


def corrected(
    shipped: Prediction, features: FloatMatrix, state: OnlineState | None, learning: Learning
) -> OnlinePrediction:
    """Add what was learned.

    The shipped uncertainty was calibrated with the errors that the correction is there to mend, so the posterior
    variance takes the place of the prior's: nothing learned, nothing changed. It is at least half the shipped one.
    """
    phi = features.astype(np.float64)
    prior = learning.prior_deviation**2 * (phi**2).sum(axis=1)
    if state is None:
        deviation = np.repeat(np.sqrt(prior)[:, None], len(shipped.experts), axis=1).astype(np.float32)
        return OnlinePrediction(shipped, shipped, features, deviation)
    shift = phi @ np.stack(state.mean, axis=1)
    variance = np.stack([np.einsum("nd,nd->n", phi @ c, phi) for c in state.covariance], axis=1)
    squares = shipped.uncertainty.astype(np.float64) ** 2
    uncertainty = np.sqrt(np.maximum(squares + variance - prior[:, None], squares / 4))
    prediction = replace(
        shipped,
        quality=np.clip(shipped.quality + shift, 0.0, 1.0).astype(np.float32),
        uncertainty=uncertainty.astype(np.float32),
    )
    return OnlinePrediction(prediction, shipped, features, np.sqrt(np.maximum(variance, 0.0)).astype(np.float32))


def probability_best(mean: Sequence[float], deviation: Sequence[float]) -> Vector:
    """float64 [n], summing to 1: chances that each of n independent normals is the greatest.

    By equally probable points of each normal, against the others' distribution functions.
    """
    m, s = np.asarray(mean, dtype=np.float64), np.maximum(np.asarray(deviation, dtype=np.float64), 1e-9)
    points = m[:, None] + s[:, None] * NODES  # [n, nodes]
    below = ndtr((points[:, :, None] - m) / s)  # [n, nodes, n]
    own = np.arange(len(m))
    below[own, :, own] = 1.0
    chances = below.prod(axis=2).mean(axis=1)
    return chances / chances.sum()
