from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from signalbox.router.artifact import ArtifactError, load_predictor, save_artifact
from signalbox.router.base import Facts, Predictor, Prompt
from signalbox.router.encoder import SentenceEncoder
from signalbox.router.evaluate import evaluate
from signalbox.router.glider import GliderPredictor
from signalbox.router.table import Table, TableError
from signalbox.router.train import Trained, save, train
from tests.router.conftest import EXPERTS, planted

WORDS = {
    "sporty": "Questions about sport: football, tennis, running, swimming, referees and leagues.",
    "cook": ["Questions about cooking and baking.", "Recipes, ovens, onions, olive oil, bread, cheese and pastry."],
    "coder": "Questions about programming: Python, SQL, compilers, unit tests, data structures and regex.",
}


def prompts_of(table: Table) -> list[Prompt]:
    return [Prompt(p) for p in table.prompt]


@pytest.fixture(scope="module")
def trained(encoder: SentenceEncoder) -> Trained:
    return train(planted(), encoder, kind="glider")


@pytest.fixture(scope="module")
def described(encoder: SentenceEncoder) -> Trained:
    return train(planted(), encoder, kind="glider", facts=Facts(descriptions=WORDS))


@pytest.mark.parametrize("given", [False, True])
def test_a_planted_signal_is_found(trained: Trained, described: Trained, encoder: SentenceEncoder, given: bool) -> None:
    router = described if given else trained
    assert isinstance(router.predictor, Predictor)
    result = evaluate(router.predictor, router.held_out, encoder, decisions=5)
    assert result.wins and result.gain > 5 * result.gain_se and result.optimal_selection > 0.9
    assert result.quality > result.best_single + 0.85 * (result.oracle - result.best_single)
    prediction = router.predictor.predict([Prompt("Explain the tennis final to a beginner")])
    assert prediction.experts == EXPERTS and prediction.quality.dtype == prediction.uncertainty.dtype == np.float32
    assert prediction.spread == pytest.approx(0.27, abs=0.05)


def test_the_descriptions_are_those_given_or_say_what_the_expert_does_best(
    trained: Trained, described: Trained
) -> None:
    facts = described.predictor.to_artifact().training
    assert facts["descriptions"]["cook"] == WORDS["cook"] and facts["descriptions"]["coder"] == [WORDS["coder"]]
    assert facts["head"] == "given descriptions" and min(facts["slopes"].values()) > 0
    found = {name: " ".join(texts) for name, texts in trained.predictor.to_artifact().training["descriptions"].items()}
    for name, mine, others in (
        ("sporty", ("football", "tennis", "marathon"), ("oven", "python")),
        ("cook", ("oven", "onion", "cheese"), ("football", "python")),
        ("coder", ("python", "compiler", "linked"), ("oven", "football")),
    ):
        assert any(word in found[name] for word in mine) and not any(word in found[name] for word in others)


def test_wrong_descriptions_do_no_harm(encoder: SentenceEncoder) -> None:
    """Each expert is described by what another is good at: slopes are never negative, so the matches count for
    nothing and the best on the mean is served."""
    wrong = dict(zip(EXPERTS, (WORDS["cook"], WORDS["coder"], WORDS["sporty"]), strict=True))
    trained = train(planted(), encoder, kind="glider", facts=Facts(descriptions=wrong))
    prediction = trained.predictor.predict(prompts_of(trained.held_out))
    assert prediction.quality.std(axis=0).max() < 0.01
    np.testing.assert_allclose(prediction.quality.mean(axis=0), trained.training.score.mean(axis=0), atol=0.01)


def test_a_query_unlike_every_description_gets_the_best_on_the_mean(encoder: SentenceEncoder) -> None:
    table = planted()
    losses = table.measures["loss"] - [0.0, 0.3, 0.0]
    cook = replace(table, measures={"loss": np.maximum(losses, 0)})
    predictor = train(cook, encoder, kind="glider", facts=Facts(descriptions=WORDS)).predictor
    assert isinstance(predictor, GliderPredictor)
    beta = predictor.calibration.beta
    strange = ["zxqv 8812 ## 00", "3 + 4 * 11 = ", "?!"]
    sport = "Why does the tennis final matter so much?"
    matches = predictor.matcher(encoder.encode([*strange, sport])).max(axis=1)
    assert (matches[:3] < beta).all() and matches[3] > beta > 0
    quality = predictor.predict([Prompt(t) for t in [*strange, sport]]).quality
    np.testing.assert_allclose(quality[:3], np.tile(predictor.calibration.mean, (3, 1)), atol=0.02)
    assert (quality[:3].argmax(axis=1) == 1).all() and quality[3].argmax() == 0


@pytest.mark.parametrize("seed", [1, 2])
def test_noise_is_no_win(encoder: SentenceEncoder, seed: int) -> None:
    trained = train(planted(240, signal=0.0, noise=0.3, seed=seed), encoder, kind="glider")
    result = evaluate(trained.predictor, trained.held_out, encoder, decisions=5)
    assert not result.wins and result.gain > -3 * result.gain_se - 1e-9
    assert trained.predictor.predict(prompts_of(trained.held_out)).quality.std(axis=0).max() < 0.02


@pytest.mark.parametrize("given", [False, True])
def test_the_uncertainty_is_calibrated(trained: Trained, described: Trained, given: bool) -> None:
    fresh = planted(400, seed=8)
    prediction = (described if given else trained).predictor.predict(prompts_of(fresh))
    z = (fresh.score - prediction.quality) / prediction.uncertainty
    assert 0.9 < np.sqrt(np.mean(z**2)) < 1.1


@pytest.mark.parametrize("given", [False, True])
def test_it_is_the_same_after_saving(
    trained: Trained, described: Trained, encoder: SentenceEncoder, tmp_path: Path, given: bool
) -> None:
    router = described if given else trained
    save(router, tmp_path / "router")
    prompts = prompts_of(router.held_out)[:20]
    expected, loaded = router.predictor.predict(prompts), load_predictor(tmp_path / "router", encoder=encoder)
    found = loaded.predict(prompts)
    np.testing.assert_array_equal(found.quality, expected.quality)
    np.testing.assert_array_equal(found.uncertainty, expected.uncertainty)
    assert found.spread == expected.spread and loaded.kind == "glider"
    some = load_predictor(tmp_path / "router", pool=["coder", "sporty"], encoder=encoder)
    np.testing.assert_allclose(some.predict(prompts).quality, expected.quality[:, [2, 0]], atol=1e-6)
    np.testing.assert_allclose(some.predict(prompts).uncertainty, expected.uncertainty[:, [2, 0]], atol=1e-6)
    assert isinstance(some, GliderPredictor)
    with pytest.raises(ArtifactError, match="selection"):
        some.to_artifact()


def test_bad_artifacts_are_refused(described: Trained, encoder: SentenceEncoder, tmp_path: Path) -> None:
    good = described.predictor.to_artifact()
    assert good.tensors["descriptions.first"].tolist() == [0, 1, 3]
    for name, wrong, message in (
        ("descriptions.first", np.array([0, 1, 4], np.int32), "descriptions.first"),
        ("descriptions.first", np.array([0, 2, 2], np.int32), "descriptions.first"),
        ("descriptions.first", np.array([1, 2, 3], np.int32), "descriptions.first"),
        ("descriptions.first", np.array([0.0, 1, 3], np.float32), "descriptions.first"),
        ("descriptions.first", None, "descriptions.first"),
        ("descriptions.vectors", np.ones((4, 7), np.float32), "descriptions.vectors has shape"),
        ("calibration.slope", np.ones(2, np.float32), "calibration.slope has shape"),
        ("calibration.mean", None, "no tensor calibration.mean"),
        ("deviation.low", None, "no tensor deviation.low"),
    ):
        tensors = {k: v for k, v in (good.tensors | {name: wrong}).items() if v is not None}
        save_artifact(replace(good, tensors=tensors), tmp_path / "bad")
        with pytest.raises(ArtifactError, match=message):
            load_predictor(tmp_path / "bad", encoder=encoder)
    for setting, message in (
        ({"beta": 2.0}, "beta 2.0"),
        ({"beta": None}, "beta None"),
        ({"dimension": 7}, "embeddings of 7 numbers"),
    ):
        save_artifact(replace(good, settings={**good.settings, **setting}), tmp_path / "bad")
        with pytest.raises(ArtifactError, match=message):
            load_predictor(tmp_path / "bad", encoder=encoder)


def test_bad_descriptions_and_few_rows_are_refused(encoder: SentenceEncoder) -> None:
    for change, message in (
        ({"cook": None}, "cook has no description"),
        ({"cook": []}, "cook has no description"),
        ({"cook": "  "}, "cook is empty"),
        ({"cook": "x" * 2001}, "longer than 2000"),
        ({"cook": ["ovens"] * 17}, "17 descriptions"),
    ):
        words = {k: v for k, v in {**WORDS, **change}.items() if v is not None}
        with pytest.raises(TableError, match=message):
            train(planted(40), encoder, kind="glider", facts=Facts(descriptions=words))
    with pytest.raises(TableError, match="8 different prompts are too few"):
        train(planted(8), encoder, kind="glider", holdout=0.0)


def test_one_expert_and_odd_prompts(trained: Trained, encoder: SentenceEncoder) -> None:
    alone = train(planted(40), encoder, kind="glider", pool=["cook"]).predictor
    assert alone.predict([Prompt("an onion soup")]).quality.shape == (1, 1)
    prediction = trained.predictor.predict([Prompt(p) for p in ("", " ", "\x00", "a" * 100_000, "\ud800 lone")])
    assert np.isfinite(prediction.quality).all() and (prediction.uncertainty > 0).all()
    assert trained.predictor.predict([]).quality.shape == (0, 3)
