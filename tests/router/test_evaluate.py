from __future__ import annotations

import numpy as np
import orjson
import pytest

from signalbox.router.artifact import Artifact
from signalbox.router.base import Prediction, Prompt
from signalbox.router.encoder import SentenceEncoder
from signalbox.router.evaluate import evaluate
from signalbox.router.judge import calibration
from signalbox.router.table import Table, TableError
from signalbox.router.train import best_of_task, majority, mean_cost, prompt_hash, train


class Fixed:
    """A predictor that knows its answers by heart: what `evaluate` makes of known choices can be counted by hand."""

    kind = "fixed"

    def __init__(self, table: Table, choice: list[int]) -> None:
        self.experts = table.models
        self.choice = dict(zip(table.prompt, choice, strict=True))

    def predict(self, prompts: list[Prompt]) -> Prediction:
        quality = np.zeros((len(prompts), len(self.experts)), dtype=np.float32)
        for row, prompt in zip(quality, prompts, strict=True):
            row[self.choice.get(prompt.text, 0)] = 1.0
        return Prediction(self.experts, quality, np.ones_like(quality), 1.0)


def table(**changes: object) -> Table:
    base: dict[str, object] = {
        "models": ("a", "b"),
        "prompt_id": list("1234"),
        "prompt": ["first", "second", "third", "fourth"],
        "task": ["t", "t", "u", "u"],
        "measures": {
            "loss": np.array([[1.0, 2.0], [1.0, 3.0], [2.0, 1.0], [0.0, 0.0]]),
            "cost": np.array([[2.0, 1.0]] * 4),
        },
    }
    return Table(**(base | changes))  # type: ignore[arg-type]


def test_the_figures_by_hand(encoder: SentenceEncoder) -> None:
    rows = table()
    result = evaluate(Fixed(rows, [0, 1, 1, 1]), rows, encoder, decisions=3)
    got = np.array([0.5, 0.125, 0.5, 1.0])
    assert result.quality == pytest.approx(got.mean()) and result.quality_se == pytest.approx(got.std(ddof=1) / 2)
    assert (result.best_single, result.best_single_expert) == (pytest.approx(2.25 / 4), "a")
    assert result.cheapest == pytest.approx((0.25 + 0.125 + 0.5 + 1) / 4)
    assert result.oracle == pytest.approx(2.5 / 4)
    assert result.random == pytest.approx((2.25 + 1.875) / 8)
    assert result.optimal_selection == 0.75  # the tie counts
    assert result.regret == pytest.approx(0.375 / 4) and result.regret_bits == pytest.approx(0.5)
    gain = got - np.array([0.5, 0.5, 0.25, 1.0])
    assert result.gain == pytest.approx(gain.mean()) and result.gain_se == pytest.approx(gain.std(ddof=1) / 2)
    assert not result.wins
    assert result.share == {"a": 0.25, "b": 0.75}
    assert result.tasks["t"]["optimal_selection"] == 0.5 and result.tasks["u"]["best_single_expert"] == "b"
    assert result.majority is result.knn is result.told_task is None
    assert result.decision_ms is not None and result.decision_ms["p50"] > 0
    assert result.robustness is not None and set(result.robustness) == {"case", "noise", "padding"}
    for key in ("quality", "quality_se", "best_single", "random", "oracle", "knn", "optimal_selection", "regret"):
        assert key in orjson.loads(orjson.dumps(result.to_json()))


def test_rows_that_were_trained_on_are_left_out(encoder: SentenceEncoder) -> None:
    rows = table()
    seen = np.array([prompt_hash("First "), prompt_hash("third")], dtype=np.int64)
    artifact = Artifact(
        "fixed", ("a", "b"), {"seen": seen}, training={"majority": "b", "best_of_task": {"t": "a", "u": "b"}}
    )
    result = evaluate(Fixed(rows, [0, 0, 0, 0]), rows, encoder, artifact=artifact, decisions=1)
    assert (result.rows, result.excluded_seen) == (2, 2)
    assert result.majority == pytest.approx((0.125 + 1) / 2) and result.majority_optimal_selection == 0.5
    assert result.told_task == pytest.approx((0.5 + 1) / 2)
    everything = Artifact("fixed", ("a", "b"), {"seen": np.array([prompt_hash(p) for p in rows.prompt])})
    with pytest.raises(TableError, match="no row is left"):
        evaluate(Fixed(rows, [0] * 4), rows, encoder, artifact=everything)


def test_cost_and_pair_figures_by_hand(encoder: SentenceEncoder) -> None:
    rows = table()
    result = evaluate(Fixed(rows, [0, 0, 1, 1]), rows, encoder, pair=("b", "a"), decisions=1)
    # "a" costs 2 and scores .5625 on the mean, "b" 1 and .46875; this router pays 1.5 for .625, then more is no use.
    low, high = (0.25 + 0.125 + 0.5 + 1) / 4, (0.5 + 0.5 + 0.5 + 1) / 4
    assert result.aiq_hull == pytest.approx((low + 2.25 / 4) / 2)
    assert result.aiq == pytest.approx(((low + high) / 2 + high) / 2)
    assert result.collapse is not None and len(result.collapse) == 11
    assert (result.collapse[0]["most_chosen"], result.collapse[0]["share"]) == ("b", 1.0)
    assert result.collapse[-1]["share"] == 0.5
    # To "a" go first the two prompts on which it is better by .25 and .375, of a gap of .375 in all.
    assert result.pair == ["b", "a"] and result.cpt50 == result.cpt80 == 0.25
    # Predictions tie within each pair of prompts: 5/6, 5/3, then (5/3 + 1) / 2, 1.
    assert result.apgr == pytest.approx((0 / 2 + 5 / 6 + 5 / 3 + 4 / 3 + 1 / 2) / 4)
    assert result.to_json()["collapse"][0]["budget"] == 1.0


def test_the_router_knows_the_costs_of_training_alone(encoder: SentenceEncoder) -> None:
    """In training "b" was the dear one: the router that then saves money by "a" pays more on these rows."""
    rows = table()
    artifact = Artifact("fixed", ("a", "b"), {}, training={"mean_cost": {"a": 1.0, "b": 2.0}})
    informed = evaluate(Fixed(rows, [1] * 4), rows, encoder, decisions=1)
    misled = evaluate(Fixed(rows, [1] * 4), rows, encoder, artifact=artifact, decisions=1)
    assert informed.collapse is not None and misled.collapse is not None
    assert informed.collapse[-1]["most_chosen"] == misled.collapse[0]["most_chosen"] == "b"
    assert mean_cost(rows) == {"a": 2.0, "b": 1.0} and mean_cost(table(measures={"loss": np.ones((4, 2))})) == {}


def test_a_pair_that_is_none(encoder: SentenceEncoder) -> None:
    rows = table()
    for pair, message in (
        (("a", "c"), "no expert 'c'"),
        (("a", "a"), "on both sides"),
        (("a", "b"), r"not better.*0\.5625 and 0\.4688"),
    ):
        with pytest.raises(TableError, match=message):
            evaluate(Fixed(rows, [0] * 4), rows, encoder, pair=pair, decisions=1)


def test_rows_that_lack_an_expert_are_left_out(encoder: SentenceEncoder) -> None:
    losses = np.array([[1.0, np.nan], [1.0, 3.0], [2.0, 1.0], [0.0, 0.0]])
    rows = table(measures={"loss": losses})
    result = evaluate(Fixed(rows, [0] * 4), rows, encoder, decisions=1)
    assert (result.rows, result.excluded_incomplete, result.cheapest) == (3, 1, None)
    assert result.aiq is result.aiq_hull is result.collapse is result.apgr is None


def test_knn_finds_what_is_near(encoder: SentenceEncoder) -> None:
    topics = ["the football match was long", "boil the soup slowly"]
    prompts = [f"{topics[i % 2]} {i}" for i in range(60)]
    scores = np.array([[1.0, 0.0] if i % 2 == 0 else [0.0, 1.0] for i in range(60)])
    neighbours = {"embeddings": encoder.encode(prompts).astype(np.float16), "scores": scores.astype(np.float32)}
    fresh = [f"{topics[i % 2]}, again {i}" for i in range(10)]
    rows = Table(("a", "b"), list("abcdefghij"), fresh, {"score": scores[:10]})
    result = evaluate(Fixed(rows, [0] * 10), rows, encoder, neighbours=neighbours, decisions=1)
    assert result.knn == 1.0 and result.quality == 0.5
    # Columns are matched by name, not by place.
    turned = Table(("b", "a"), list("abcdefghij"), fresh, {"score": scores[:10, ::-1]})
    artifact = Artifact("fixed", ("a", "b"), {})
    again = evaluate(Fixed(turned, [0] * 10), turned, encoder, artifact=artifact, neighbours=neighbours, decisions=1)
    assert again.knn == 1.0


def test_calibration_of_known_errors() -> None:
    rng = np.random.default_rng(0)
    deviation = rng.uniform(0.05, 0.2, (4000, 2)).astype(np.float32)
    quality = np.full((4000, 2), 0.5, np.float32)
    truth = quality + deviation * rng.normal(size=(4000, 2))
    good = calibration(Prediction(("a", "b"), quality, deviation, 1.0), truth)
    assert good["z_rms"] == pytest.approx(1, abs=0.03) and good["within_1sd"] == pytest.approx(0.683, abs=0.02)
    assert all(b["predicted"] == pytest.approx(b["observed"], rel=0.1) for b in good["bins"])
    sure = calibration(Prediction(("a", "b"), quality, deviation / 3, 1.0), truth)
    assert sure["z_rms"] > 2.5 and sure["within_1sd"] < 0.4


def test_reference_lines_of_training() -> None:
    rows = table()
    assert majority(rows) == 0  # two wins and a shared tie against one and a shared tie
    assert best_of_task(rows) == {"t": "a", "u": "b"}


def test_a_prompt_is_never_on_both_sides(encoder: SentenceEncoder) -> None:
    n = 120
    prompts = [f"prompt {i // 2}" for i in range(n)]  # each stands there twice, under two ids
    rows = Table(("a", "b"), [f"id{i}" for i in range(n)], prompts, {"score": np.random.default_rng(0).random((n, 2))})
    trained = train(rows, encoder)
    assert len(trained.held_out) > 5 and not set(trained.training.prompt) & set(trained.held_out.prompt)
    with pytest.raises(TableError, match="holdout"):
        train(rows, encoder, holdout=1.0)
