from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from signalbox.router.artifact import ArtifactError, load_predictor, read_artifact, save_artifact
from signalbox.router.base import Predictor, Prompt
from signalbox.router.encoder import SentenceEncoder
from signalbox.router.evaluate import evaluate
from signalbox.router.skills import SkillsPredictor, characteristic_words, clusters
from signalbox.router.table import Table, TableError
from signalbox.router.train import Trained, save, train
from tests.router.conftest import EXPERTS, planted


def untold(table: Table) -> Table:
    return replace(table, task=[""] * len(table))


@pytest.fixture(scope="module")
def trained(encoder: SentenceEncoder) -> Trained:
    return train(planted(), encoder, kind="skills")


@pytest.mark.parametrize("told", [True, False])
def test_a_planted_signal_is_found_with_tasks_and_without(
    trained: Trained, encoder: SentenceEncoder, told: bool
) -> None:
    if not told:
        trained = train(untold(planted()), encoder, kind="skills")
        assert "clusters" in trained.predictor.to_artifact().training["head"]
    assert isinstance(trained.predictor, Predictor)
    result = evaluate(trained.predictor, trained.held_out, encoder, decisions=5)
    assert result.wins and result.gain > 5 * result.gain_se and result.optimal_selection > 0.9
    assert result.quality > result.best_single + 0.9 * (result.oracle - result.best_single)


def test_the_profile_can_be_read(trained: Trained) -> None:
    """Three tasks, three skills: each is named by words of its subject, and its best expert is the one planted."""
    facts = trained.predictor.to_artifact().training
    assert facts["head"] == "3 skills from tasks" and len(facts["profile"]) == 3
    best = {skill["best"][0]["expert"]: skill["words"] for skill in facts["profile"]}
    assert set(best) == set(EXPERTS)
    assert {"football", "referee"} & set(best["sporty"])
    assert {"oven", "onion", "olive"} & set(best["cook"])
    assert {"compiler", "python", "regex"} & set(best["coder"])
    assert all(skill["best"][0]["advantage"] > 0.1 > skill["best"][1]["advantage"] for skill in facts["profile"])
    assert sum(skill["rows"] for skill in facts["profile"]) == pytest.approx(facts["texts"], abs=1)
    means = dict(zip(trained.training.models, trained.training.score.mean(axis=0), strict=True))
    assert facts["mean_quality"] == pytest.approx(means, abs=1e-5)


def test_the_prediction_is_the_mean_and_the_skills_advantages(trained: Trained) -> None:
    assert isinstance(trained.predictor, SkillsPredictor)
    texts = trained.held_out.prompt[:5]
    shares = trained.predictor.skills(trained.predictor.encoder.encode(texts))
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-5)
    profile = trained.predictor.profile
    by_hand = [
        [
            profile.mean[e] + sum(share[s] * (profile.difficulty[s] + profile.advantage[s, e]) for s in range(3))
            for e in range(3)
        ]
        for share in shares
    ]
    np.testing.assert_allclose(trained.predictor.predict([Prompt(t) for t in texts]).quality, by_hand, atol=1e-5)
    np.testing.assert_allclose(profile.advantage.sum(axis=1), 0, atol=1e-5)


@pytest.mark.parametrize("seed", [1, 2])
def test_noise_is_no_win(encoder: SentenceEncoder, seed: int) -> None:
    trained = train(planted(240, signal=0.0, noise=0.3, seed=seed), encoder, kind="skills")
    result = evaluate(trained.predictor, trained.held_out, encoder, decisions=5)
    assert not result.wins and result.gain > -3 * result.gain_se - 1e-9
    quality = trained.predictor.predict([Prompt(p) for p in trained.held_out.prompt]).quality
    assert quality.std(axis=0).max() < 0.02


def test_the_uncertainty_is_calibrated_and_knows_hard_prompts(encoder: SentenceEncoder) -> None:
    """Losses of one subject are far noisier than the others'."""

    def table(rows: int, seed: int) -> Table:
        rng = np.random.default_rng(seed)
        quiet = planted(rows, signal=0.5, noise=0.05, seed=seed)
        wild = np.array(quiet.task) == "kitchen"
        losses = quiet.measures["loss"] + np.where(wild, 0.25, 0.0)[:, None] * rng.normal(size=(rows, 3))
        return replace(quiet, measures={"loss": np.maximum(losses, 0)})

    trained = train(table(400, 5), encoder, kind="skills")
    fresh = table(400, 6)
    prediction = trained.predictor.predict([Prompt(p) for p in fresh.prompt])
    z = (fresh.score - prediction.quality) / prediction.uncertainty
    assert 0.9 < np.sqrt(np.mean(z**2)) < 1.1
    wild = np.array(fresh.task) == "kitchen"
    assert prediction.uncertainty[wild].mean() > 2 * prediction.uncertainty[~wild].mean()


def test_it_is_the_same_after_saving(trained: Trained, encoder: SentenceEncoder, tmp_path: Path) -> None:
    save(trained, tmp_path / "router")
    prompts = [Prompt(p) for p in trained.held_out.prompt[:20]]
    expected, loaded = trained.predictor.predict(prompts), load_predictor(tmp_path / "router", encoder=encoder)
    found = loaded.predict(prompts)
    np.testing.assert_array_equal(found.quality, expected.quality)
    np.testing.assert_array_equal(found.uncertainty, expected.uncertainty)
    assert found.spread == expected.spread and loaded.kind == "skills"
    assert read_artifact(tmp_path / "router").training["profile"] == trained.predictor.to_artifact().training["profile"]
    some = load_predictor(tmp_path / "router", pool=["coder", "sporty"], encoder=encoder).predict(prompts)
    np.testing.assert_allclose(some.quality, expected.quality[:, [2, 0]], atol=1e-6)
    np.testing.assert_allclose(some.uncertainty, expected.uncertainty[:, [2, 0]], atol=1e-6)


def test_training_twice_gives_the_same_router(encoder: SentenceEncoder) -> None:
    """On the same embeddings: in another batch, those differ by rounding."""
    table = untold(planted(120))
    encoder.encode(table.prompt)
    one, two = (train(table, encoder, kind="skills").predictor.to_artifact() for _ in range(2))
    assert one.version == two.version


def test_bad_artifacts_are_refused(trained: Trained, encoder: SentenceEncoder, tmp_path: Path) -> None:
    good = trained.predictor.to_artifact()
    for name, wrong, message in (
        ("skills.centres", good.tensors["skills.centres"][:2], "skills.centres has shape"),
        ("profile.advantage", good.tensors["profile.advantage"][:, :2], "profile.advantage has shape"),
        ("profile.mean", None, "no tensor profile.mean"),
        ("deviation.high", None, "no tensor deviation.high"),
    ):
        tensors = {k: v for k, v in (good.tensors | {name: wrong}).items() if v is not None}
        save_artifact(replace(good, tensors=tensors), tmp_path / "bad")
        with pytest.raises(ArtifactError, match=message):
            load_predictor(tmp_path / "bad", encoder=encoder)
    for setting, message in (
        ({"skills": 0}, "0 skills are not possible"),
        ({"skills": 4}, "skills.centres has shape"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"temperature": None}, "temperature None"),
        ({"dimension": 7}, "embeddings of 7 numbers"),
    ):
        save_artifact(replace(good, settings={**good.settings, **setting}), tmp_path / "bad")
        with pytest.raises(ArtifactError, match=message):
            load_predictor(tmp_path / "bad", encoder=encoder)


def test_few_rows_one_expert_and_odd_prompts(trained: Trained, encoder: SentenceEncoder) -> None:
    with pytest.raises(TableError, match="8 different prompts are too few"):
        train(planted(8), encoder, kind="skills", holdout=0.0)
    alone = train(untold(planted(40)), encoder, kind="skills", pool=["cook"]).predictor
    assert alone.predict([Prompt("an onion soup")]).quality.shape == (1, 1)
    prediction = trained.predictor.predict([Prompt(p) for p in ("", " ", "\x00", "a" * 100_000, "\ud800 lone")])
    assert np.isfinite(prediction.quality).all() and (prediction.uncertainty > 0).all()
    assert trained.predictor.predict([]).quality.shape == (0, 3)


def test_clusters_of_equal_texts_and_of_plain_groups() -> None:
    rng = np.random.default_rng(0)
    same = np.repeat(np.eye(3, dtype=np.float32)[:1], 10, axis=0)
    assert clusters(same, 4, 0).shape == (1, 3)
    rows = np.repeat(np.eye(8, dtype=np.float32), 20, axis=0) + rng.normal(0, 0.05, (160, 8)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    found = (rows @ clusters(rows, 8, 0).T).argmax(axis=1)
    assert len({tuple(found[i : i + 20]) for i in range(0, 160, 20)}) == 8


def test_words_tell_groups_apart_and_common_ones_do_not() -> None:
    texts = ["please boil the pasta", "please fry the onion", "please boil the onion"] * 3
    texts += ["please run the compiler", "please run the tests", "please test the compiler"] * 3
    words = characteristic_words(texts, np.repeat([0, 1], 9), 3)
    assert set(words[0][:2]) == {"boil", "onion"} and set(words[1][:2]) == {"compiler", "run"}
    assert "please" not in words[0] + words[1] and words[2] == []
