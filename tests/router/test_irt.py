from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from signalbox.router.artifact import ArtifactError, load_predictor, save_artifact
from signalbox.router.base import Predictor, Prompt
from signalbox.router.encoder import SentenceEncoder
from signalbox.router.evaluate import evaluate
from signalbox.router.irt import IrtPredictor
from signalbox.router.table import Table, TableError
from signalbox.router.train import Trained, save, train
from tests.router.conftest import EXPERTS, planted

NAMES = ("sporty", "cook", "coder", "all-round", "no-code", "sport-and-code")
# Quality of each expert on prompts of sport, kitchen and code.
ABILITY = np.array(
    [[0.9, 0.3, 0.3], [0.3, 0.9, 0.3], [0.3, 0.3, 0.9], [0.6, 0.6, 0.6], [0.7, 0.7, 0.2], [0.8, 0.2, 0.8]]
)


def with_abilities(rows: int, seed: int = 0, noise: float = 0.15) -> Table:
    """Prompts of three subjects, six experts whose quality depends on the subject."""
    base = planted(rows, seed=seed)
    subject = np.array([["sport", "kitchen", "code"].index(task) for task in base.task])
    scores = ABILITY[:, subject].T + np.random.default_rng(seed).normal(0, noise, (rows, len(NAMES)))
    return replace(base, models=NAMES, measures={"score": np.clip(scores, 0, 1)})


@pytest.fixture(scope="module")
def trained(encoder: SentenceEncoder) -> Trained:
    return train(planted(), encoder, kind="irt")


@pytest.fixture(scope="module")
def five(encoder: SentenceEncoder) -> Trained:
    return train(with_abilities(400), encoder, kind="irt", pool=NAMES[:5])


def prompts_of(table: Table) -> list[Prompt]:
    return [Prompt(p) for p in table.prompt]


def test_a_planted_signal_is_found_with_two_traits(trained: Trained, encoder: SentenceEncoder) -> None:
    assert isinstance(trained.predictor, Predictor)
    result = evaluate(trained.predictor, trained.held_out, encoder, decisions=5)
    assert result.wins and result.gain > 5 * result.gain_se and result.optimal_selection > 0.9
    assert result.quality > result.best_single + 0.9 * (result.oracle - result.best_single)
    # Three subjects, each with an expert of its own: their differences span a plane.
    assert trained.predictor.to_artifact().training["rank"] in (2, 3)
    prediction = trained.predictor.predict([Prompt("Explain the tennis final to a beginner")])
    assert prediction.experts == EXPERTS and prediction.quality.dtype == prediction.uncertainty.dtype == np.float32
    assert prediction.spread == pytest.approx(0.27, abs=0.05)


def test_prompts_hard_for_all_are_a_trait_too(encoder: SentenceEncoder) -> None:
    """Nobody is better than another, but the kitchen is hard for all: a rank is taken for that alone."""
    table = planted(240, signal=0.0, seed=3)
    losses = table.measures["loss"] + np.where(np.array(table.task) == "kitchen", 1.5, 0.0)[:, None]
    predictor = train(replace(table, measures={"loss": losses}), encoder, kind="irt").predictor
    easy, hard = predictor.predict(
        [Prompt("Explain the regex to a beginner, number 3"), Prompt("Explain the oven to a beginner, number 3")]
    ).quality
    assert (easy - hard > 0.08).all() and np.ptp(easy) < 0.05


@pytest.mark.parametrize("seed", [1, 2])
def test_noise_is_no_win(encoder: SentenceEncoder, seed: int) -> None:
    trained = train(planted(240, signal=0.0, noise=0.3, seed=seed), encoder, kind="irt")
    result = evaluate(trained.predictor, trained.held_out, encoder, decisions=5)
    assert not result.wins and result.gain > -3 * result.gain_se - 1e-9
    assert trained.predictor.predict(prompts_of(trained.held_out)).quality.std(axis=0).max() < 0.02


def test_where_one_expert_is_best_for_all_it_gets_all(encoder: SentenceEncoder) -> None:
    table = planted(240, signal=0.0, noise=0.2, seed=4)
    losses = table.measures["loss"] - [0.0, 0.9, 0.0]
    better = Table(table.models, table.prompt_id, table.prompt, {"loss": np.maximum(losses, 0)})
    trained = train(better, encoder, kind="irt")
    result = evaluate(trained.predictor, trained.held_out, encoder, decisions=5)
    assert result.share["cook"] == 1.0 and result.gain == 0.0


def test_the_uncertainty_is_calibrated(five: Trained) -> None:
    fresh = with_abilities(400, seed=7)
    prediction = five.predictor.predict(prompts_of(fresh))
    z = (fresh.pool(NAMES[:5]).score - prediction.quality) / prediction.uncertainty
    assert 0.9 < np.sqrt(np.mean(z**2)) < 1.1


def test_an_expert_joins_with_a_few_scored_prompts(five: Trained) -> None:
    """The one left out is like none of the others, yet lies in the space that their abilities span."""
    assert isinstance(five.predictor, IrtPredictor)
    few, fresh = with_abilities(30, seed=11), with_abilities(400, seed=12)
    prompts, scores = prompts_of(few), few.score[:, 5]
    more = five.predictor.add_expert(NAMES[5], prompts, scores)
    assert more.experts == NAMES and five.predictor.experts == NAMES[:5]
    before, after = five.predictor.predict(prompts_of(fresh)), more.predict(prompts_of(fresh))
    np.testing.assert_array_equal(after.quality[:, :5], before.quality)
    np.testing.assert_allclose(after.uncertainty[:, :5], before.uncertainty, rtol=1e-5)
    truth = fresh.score[:, 5]
    rmse = np.sqrt(np.mean((after.quality[:, 5] - truth) ** 2))
    of_the_mean = np.sqrt(np.mean((scores.mean() - truth) ** 2))
    assert rmse < 0.22 and rmse < 0.7 * of_the_mean  # the noise alone is .14
    z = (truth - after.quality[:, 5]) / after.uncertainty[:, 5]
    assert 0.8 < np.sqrt(np.mean(z**2)) < 1.2
    # It is doubted more than those trained in full, and less with more prompts.
    many = with_abilities(200, seed=13)
    surer = five.predictor.add_expert(NAMES[5], prompts_of(many), many.score[:, 5])
    doubt = [np.trace(p.abilities.covariance[5]) for p in (more, surer)]
    assert doubt[0] > 3 * doubt[1] > 0 and not more.abilities.covariance[:5].any()
    assert more.training["added"][NAMES[5]]["rows"] == 30


def test_with_few_prompts_a_new_expert_is_taken_to_be_like_the_others(five: Trained) -> None:
    """Eight prompts of one subject on which it is always wrong: they do not make it wrong by 1 on all others."""
    assert isinstance(five.predictor, IrtPredictor)
    prompts = [Prompt(f"Why does the oven matter so much in case {i}?") for i in range(8)]
    prediction = five.predictor.add_expert("new", prompts, np.zeros(8)).predict(
        [Prompt("What should I know about a linked list? (3)"), prompts[0]]
    )
    assert prediction.quality[1, 5] < 0.2 < prediction.quality[0, 5]
    assert prediction.uncertainty[0, 5] > prediction.uncertainty[0, :5].mean()


def test_it_is_the_same_after_saving(five: Trained, encoder: SentenceEncoder, tmp_path: Path) -> None:
    assert isinstance(five.predictor, IrtPredictor)
    few = with_abilities(30, seed=11)
    more = five.predictor.add_expert(NAMES[5], prompts_of(few), few.score[:, 5])
    save(replace(five, predictor=more), tmp_path / "router", neighbours=False)
    prompts = prompts_of(five.held_out)[:20]
    expected = more.predict(prompts)
    loaded = load_predictor(tmp_path / "router", encoder=encoder)
    found = loaded.predict(prompts)
    np.testing.assert_array_equal(found.quality, expected.quality)
    np.testing.assert_array_equal(found.uncertainty, expected.uncertainty)
    assert found.spread == expected.spread and loaded.kind == "irt"
    order = [5, 0, 3]
    some = load_predictor(tmp_path / "router", pool=[NAMES[i] for i in order], encoder=encoder)
    np.testing.assert_allclose(some.predict(prompts).quality, expected.quality[:, order], atol=1e-6)
    np.testing.assert_allclose(some.predict(prompts).uncertainty, expected.uncertainty[:, order], atol=1e-6)
    # Of a selection, what is added is what it would be of all.
    assert isinstance(some, IrtPredictor)
    again = some.add_expert("again", prompts_of(few), few.score[:, 5]).predict(prompts)
    np.testing.assert_allclose(again.quality[:, 3], expected.quality[:, 5], atol=1e-6)
    np.testing.assert_allclose(again.uncertainty[:, 3], expected.uncertainty[:, 5], atol=1e-5)


def test_bad_artifacts_are_refused(five: Trained, encoder: SentenceEncoder, tmp_path: Path) -> None:
    good = five.predictor.to_artifact()
    for name, wrong, message in (
        ("abilities.mean", good.tensors["abilities.mean"][:, :-1], "abilities.mean has shape"),
        ("abilities.covariance", None, "no tensor abilities.covariance"),
        ("prior.covariance", np.zeros((1, 1), np.float32), "prior.covariance has shape"),
        ("prior.typical.bias", np.zeros(2, np.float32), "bias has shape"),
        ("deviation.low", None, "no tensor deviation.low"),
    ):
        tensors = {k: v for k, v in (good.tensors | {name: wrong}).items() if v is not None}
        save_artifact(replace(good, tensors=tensors), tmp_path / "bad")
        with pytest.raises(ArtifactError, match=message):
            load_predictor(tmp_path / "bad", encoder=encoder)
    for setting, message in (
        ({"rank": 99}, "rank 99"),
        ({"rank": "2"}, "rank '2'"),
        ({"known": -1}, "known -1"),
        ({"head": "forest"}, "unknown head 'forest'"),
        ({"structure": []}, "structural features"),
        ({"dimension": 7}, "embeddings of 7 numbers"),
    ):
        save_artifact(replace(good, settings={**good.settings, **setting}), tmp_path / "bad")
        with pytest.raises(ArtifactError, match=message):
            load_predictor(tmp_path / "bad", encoder=encoder)


def test_what_cannot_be_added_is_refused(five: Trained, encoder: SentenceEncoder) -> None:
    assert isinstance(five.predictor, IrtPredictor)
    prompts = prompts_of(five.held_out)[:10]
    for name, scores, message in (
        ("cook", np.ones(10), "knows an expert 'cook' already"),
        ("", np.ones(10), "needs a name"),
        ("new", np.ones(9), "as many scores"),
        ("new", np.full(10, 1.5), r"in \[0, 1\]"),
        ("new", np.full(10, np.nan), r"in \[0, 1\]"),
    ):
        with pytest.raises(TableError, match=message):
            five.predictor.add_expert(name, prompts, scores)
    with pytest.raises(TableError, match="3 scored prompts are too few"):
        five.predictor.add_expert("new", prompts[:3], np.ones(3))
    pair = train(planted(60), encoder, kind="irt", pool=EXPERTS[:2]).predictor
    assert isinstance(pair, IrtPredictor)
    with pytest.raises(TableError, match="trained on 2 experts"):
        pair.add_expert("new", prompts, np.ones(10))


def test_few_rows_one_expert_and_odd_prompts(encoder: SentenceEncoder, five: Trained) -> None:
    with pytest.raises(TableError, match="8 different prompts are too few"):
        train(planted(8), encoder, kind="irt", holdout=0.0)
    alone = train(planted(60), encoder, kind="irt", pool=["cook"]).predictor
    assert alone.predict([Prompt("an onion soup")]).quality.shape == (1, 1)
    prediction = five.predictor.predict([Prompt(p) for p in ("", " ", "\x00", "a" * 100_000, "\ud800 lone")])
    assert np.isfinite(prediction.quality).all() and (prediction.uncertainty > 0).all()
    assert five.predictor.predict([]).quality.shape == (0, 5)
