"""Learning from outcomes: exact against a closed form, the same everywhere, bounded, and undone when it misleads."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from signalbox.router.base import FloatMatrix, Prediction, Prompt
from signalbox.router.lexical import LexicalPredictor
from signalbox.router.online import (
    LEAST_NOISE,
    Learning,
    OnlineRouter,
    OnlineState,
    Outcome,
    corrected,
    features_of,
    fresh,
    learn,
)
from tests.router.conftest import planted

EXPERTS = ("a", "b", "c")
D = 5
LEARNING = Learning(forgetting=1.0)


def outcomes(n: int, seed: int = 0, weights: float = 0.1, noise: float = 0.1) -> list[Outcome]:
    """Shipped qualities that are right but for a linear error."""
    rng = np.random.default_rng(seed)
    error = rng.normal(0, weights, (len(EXPERTS), D))
    found = []
    for _ in range(n):
        e, phi = rng.integers(len(EXPERTS)), rng.normal(0, 1, D).astype(np.float32)
        quality = float(rng.uniform(0.3, 0.7))
        score = float(np.clip(quality + error[e] @ phi + rng.normal(0, noise), 0, 1))
        found.append(Outcome(EXPERTS[e], phi, quality, 0.2, score))
    return found


def learned(stream: list[Outcome], learning: Learning = LEARNING) -> OnlineState:
    state = fresh("v", EXPERTS, D, learning)
    for outcome in stream:
        state, _ = learn(state, outcome, learning)
    return state


def same(one: OnlineState, other: OnlineState) -> bool:
    return one.dumps() == other.dumps()


# -- the regression ------------------------------------------------------------------------------------------------


def test_recursive_least_squares_is_the_bayesian_regression_in_closed_form() -> None:
    stream = outcomes(300)
    state = learned(stream)
    for e, name in enumerate(EXPERTS):
        mine = [o for o in stream if o.expert == name]
        x = np.array([o.features for o in mine], dtype=np.float64)
        y = np.array([o.score - o.quality for o in mine])
        precision = x.T @ x / 0.2**2 + np.eye(D) / LEARNING.prior_deviation**2
        np.testing.assert_allclose(state.mean[e], np.linalg.solve(precision, x.T @ y / 0.2**2), atol=1e-10)
        np.testing.assert_allclose(state.covariance[e], np.linalg.inv(precision), atol=1e-12)


def test_noise_has_a_floor() -> None:
    sure = replace(outcomes(1)[0], uncertainty=0.0)
    floor = replace(sure, uncertainty=LEAST_NOISE)
    assert same(learned([sure]), learned([floor]))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.99, 1.0))
def test_forgetting_stays_bounded(seed: int, forgetting: float) -> None:
    learning = Learning(forgetting=forgetting)
    phi = np.array([1, 0, 0, 0, 0], dtype=np.float32)  # one direction only: the others are never narrowed
    rng = np.random.default_rng(seed)
    state = fresh("v", EXPERTS, D, learning)
    for _ in range(2000):
        state, _ = learn(state, Outcome("a", phi, 0.5, 0.2, float(rng.uniform(0.4, 0.6))), learning)
    covariance = state.covariance[0]
    assert np.trace(covariance) <= learning.prior_deviation**2 * D * (1 + 1e-9)
    assert np.linalg.eigvalsh(covariance).min() > 0


def test_forgetting_follows_a_change() -> None:
    phi = np.ones(D, dtype=np.float32)
    high, low = Outcome("a", phi, 0.5, 0.2, 0.7), Outcome("a", phi, 0.5, 0.2, 0.3)
    stream = [high] * 1500 + [low] * 150
    off = {"guard_errors": 1e9}
    keeping, forgetting = (learned(stream, Learning(forgetting=f, **off)) for f in (1.0, 0.99))
    assert keeping.mean[0] @ phi > 0.1 and forgetting.mean[0] @ phi < 0


@pytest.mark.parametrize(
    "change",
    [
        {"expert": "nobody"},
        {"features": np.zeros(D + 1, np.float32)},
        {"features": np.full(D, np.nan, np.float32)},
        {"score": float("nan")},
        {"score": 1.5},
        {"score": -0.1},
        {"quality": float("inf")},
    ],
)
def test_what_does_not_fit_changes_nothing(change: dict[str, object]) -> None:
    before = learned(outcomes(20))
    after, event = learn(before, replace(outcomes(1)[0], **change), LEARNING)  # type: ignore[arg-type]
    assert after is before and event is None


def test_settings_are_checked() -> None:
    for wrong in ({"forgetting": 0.9}, {"forgetting": 1.1}, {"prior_deviation": 0}, {"evidence": 1}, {"cool_down": 0}):
        with pytest.raises(ValueError, match="forgetting"):
            Learning(**wrong)  # type: ignore[arg-type]


# -- state ---------------------------------------------------------------------------------------------------------


def test_replicas_converge_and_a_snapshot_goes_on() -> None:
    stream = outcomes(400)
    whole = learned(stream)
    assert same(whole, learned(stream)), "the same log, the same state, to the bit"
    half = OnlineState.loads(learned(stream[:200]).dumps())
    for outcome in stream[200:]:
        half, _ = learn(half, outcome, LEARNING)
    assert same(whole, half)
    assert (whole.outcomes, whole.updates, whole.rollbacks) == (400, 400, 0)


def test_a_damaged_state_is_refused() -> None:
    data = learned(outcomes(20)).dumps()
    for wrong in (b"", b"no safetensors", data[:-8], data.replace(b"phi-1", b"phi-0")):
        with pytest.raises(ValueError, match=r"online state|phi"):
            OnlineState.loads(wrong)
    nan = replace(learned(outcomes(20)), mean=(np.full(D, np.nan),) * 3)
    with pytest.raises(ValueError, match="finite"):
        OnlineState.loads(nan.dumps())


class Flat:
    """A predictor without features of its own, for many experts."""

    kind = "flat"

    def __init__(self, count: int) -> None:
        self.experts = tuple(f"e{i}" for i in range(count))

    def predict(self, prompts: list[Prompt]) -> Prediction:
        quality = np.tile(np.linspace(0.2, 0.8, len(self.experts), dtype=np.float32), (len(prompts), 1))
        return Prediction(self.experts, quality, np.full_like(quality, 0.2), 0.3)


class Wide(Flat):
    """The same with features, more of them than are kept."""

    def predict_with_features(self, prompts: list[Prompt]) -> tuple[Prediction, FloatMatrix]:
        own = np.array([[len(p.text) % (i + 2) for i in range(400)] for p in prompts], np.float32) / 400
        return self.predict(prompts), own


def test_phi_is_bounded_whatever_the_pool() -> None:
    for base, width in ((Flat(2), 4), (Flat(200), 18), (Wide(200), 50), (Wide(3), 37)):
        _, phi = features_of(base, [Prompt("x" * n) for n in range(1, 5)])
        assert phi.shape == (4, width) and phi.dtype == np.float32 and np.abs(phi).max() <= 16
        again = features_of(base, [Prompt("xx")])[1]
        np.testing.assert_allclose(again[0], phi[1], atol=1e-6)


def test_it_starts_as_the_shipped_router_and_learns_where_it_errs() -> None:
    base = Flat(3)
    router = OnlineRouter(base, version="v1")
    prompts = [Prompt("a"), Prompt("bb")]
    shipped = base.predict(prompts)
    first = router.predict_online(prompts)
    np.testing.assert_array_equal(first.prediction.quality, shipped.quality)
    np.testing.assert_array_equal(first.prediction.uncertainty, shipped.uncertainty)
    assert (first.deviation > 0).all()
    for _ in range(200):  # the worst expert by the artifact is always right
        router.learn(Outcome("e0", first.features[0], float(shipped.quality[0, 0]), 0.2, 1.0))
    after = router.predict_online(prompts)
    assert after.prediction.quality[0].argmax() == 0 and after.prediction.quality.max() <= 1
    np.testing.assert_array_equal(after.prediction.quality[:, 1:], shipped.quality[:, 1:])
    assert after.deviation[0, 0] < first.deviation[0, 0] / 2, "well known now"
    assert after.prediction.uncertainty[0, 0] < shipped.uncertainty[0, 0]
    assert (after.prediction.uncertainty >= shipped.uncertainty / 2).all()
    assert router.describe()["active"] and router.describe()["error_online"] < router.describe()["error_shipped"]


def test_a_state_of_another_artifact_is_refused() -> None:
    router = OnlineRouter(Flat(3), version="v1")
    phi = router.predict_online([Prompt("a")]).features[0]
    router.learn(Outcome("e0", phi, 0.5, 0.2, 1.0))
    state = router.state
    assert state is not None
    assert OnlineRouter(Flat(3), version="v1").restore(state)
    assert not OnlineRouter(Flat(3), version="v2").restore(state)
    assert not OnlineRouter(Flat(4), version="v1").restore(state)
    wide = OnlineRouter(Wide(3), version="v1")
    wide.predict([Prompt("a")])
    assert not wide.restore(state), "another phi"


def test_trained_kinds_hand_out_features() -> None:
    """Predicting with features is predicting."""
    table = planted(120, scores=True)
    predictor = LexicalPredictor.fit(table)
    prompts = [Prompt(text) for text in table.prompt[:3]]
    prediction, own = predictor.predict_with_features(prompts)
    np.testing.assert_array_equal(prediction.quality, predictor.predict(prompts).quality)
    assert own.shape[0] == 3 and np.linalg.norm(own, axis=1).mean() == pytest.approx(1, abs=0.5)
    assert corrected(prediction, features_of(predictor, prompts)[1], None, LEARNING).prediction is prediction


# -- the guard -----------------------------------------------------------------------------------------------------


def stream_of(n: int, seed: int, kind: str, shift: float = 0.0) -> list[Outcome]:
    """Outcomes of a good artifact (slope 1, noise as calibrated): honest, honest but `shift`ed, or false."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        phi, quality = rng.normal(0, 1, D).astype(np.float32), float(rng.uniform(0.2, 0.8))
        phi[0] = 1  # the bias
        score = float(np.clip(quality + shift + rng.normal(0, 0.2), 0, 1))
        if kind == "random":
            score = float(rng.random())
        elif kind == "inverted":
            score = 1 - score
        found.append(Outcome(EXPERTS[rng.integers(3)], phi, quality, 0.2, score))
    return found


def run(stream: list[Outcome], learning: Learning = LEARNING) -> tuple[OnlineState, list[tuple[int, str]]]:
    state, events = fresh("v", EXPERTS, D, learning), []
    for number, outcome in enumerate(stream):
        state, event = learn(state, outcome, learning)
        if event:
            events.append((number, event))
    return state, events


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shift", [0.0, -0.15, 0.15])
def test_honest_outcomes_never_roll_back(seed: int, shift: float) -> None:
    _, events = run(stream_of(3000, seed, "honest", shift))
    assert not events


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("kind", "within"), [("random", 1500), ("inverted", 400)])
def test_false_outcomes_are_rolled_back_and_stay_out(kind: str, within: int, seed: int) -> None:
    honest = stream_of(500, seed, "honest")
    state, events = run([*honest, *stream_of(2500, seed + 10, kind)])
    assert events and events[0][0] < 500 + within and {why for _, why in events} == {"contradicted"}
    assert state.rollbacks == len(events) == 1, "it does not begin again while outcomes contradict the artifact"
    assert state.updates == 0 and state.cool_down > 0
    assert all((mean == 0).all() for mean in state.mean), "the shipped artifact serves"


def test_it_begins_again_when_the_poison_is_gone() -> None:
    stream = [*stream_of(200, 0, "honest"), *stream_of(800, 1, "inverted"), *stream_of(6000, 2, "honest", 0.1)]
    state, events = run(stream)
    assert len(events) == 1 and state.cool_down == 0 and state.updates > 500
    assert state.error_online.mean < state.error_shipped.mean


def test_a_correction_that_misleads_is_rolled_back_by_its_errors() -> None:
    """Outcomes that pull one way, then the other: learned, then wrong, with a slope of 1 throughout."""
    learning = Learning(forgetting=1.0, prior_deviation=0.1)
    up = [replace(o, features=np.ones(D, np.float32)) for o in stream_of(600, 0, "honest", 0.2)]
    down = [replace(o, features=np.ones(D, np.float32)) for o in stream_of(600, 1, "honest", -0.2)]
    _, events = run([*up, *down], learning)
    assert [why for _, why in events] == ["worse"] and 600 < events[0][0] < 900


def test_few_outcomes_prove_nothing() -> None:
    _, events = run(stream_of(LEARNING.evidence - 1, 0, "inverted"))
    assert not events
