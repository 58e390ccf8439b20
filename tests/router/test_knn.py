"""kNN: planted experts found, noise not followed, the smoother chosen as it should be, calibration, saving."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from signalbox.router.artifact import ArtifactError, load_predictor
from signalbox.router.base import Predictor, Prompt
from signalbox.router.encoder import SentenceEncoder
from signalbox.router.evaluate import evaluate
from signalbox.router.knn import MAX_ROWS, KnnPredictor, Smoother, bounded_lessons, choose_smoothers, nearest, split
from signalbox.router.table import Table, TableError
from signalbox.router.train import Trained, save, train
from tests.router.conftest import EXPERTS, planted


@pytest.fixture(scope="module")
def trained(encoder: SentenceEncoder) -> Trained:
    return train(planted(), encoder, kind="knn")


def test_a_planted_signal_is_found(trained: Trained) -> None:
    assert isinstance(trained.predictor, Predictor)
    result = evaluate(trained.predictor, trained.held_out, None, decisions=5)
    assert result.wins and result.gain > 5 * result.gain_se
    assert result.quality > result.best_single + 0.9 * (result.oracle - result.best_single)
    prediction = trained.predictor.predict([Prompt("Explain the tennis final to a beginner")])
    assert prediction.experts == EXPERTS and prediction.quality.dtype == prediction.uncertainty.dtype == np.float32
    assert prediction.row(0)["sporty"][0] == pytest.approx(0.5, abs=0.06)  # 2 ** -1 bit per byte
    assert prediction.row(0)["coder"][0] == pytest.approx(0.25, abs=0.06)
    assert prediction.spread == pytest.approx(0.27, abs=0.05)


def with_losses(losses: np.ndarray) -> Table:
    """The prompts of `planted()`, whose embeddings are known already, with other losses."""
    table = planted()
    return replace(table, measures={"loss": np.maximum(losses, 0)})


@pytest.mark.parametrize("seed", [1, 2])
def test_noise_is_no_win_and_predicted_flat(encoder: SentenceEncoder, seed: int) -> None:
    noise = np.random.default_rng(seed).normal(2, 0.3, (360, 3))
    trained = train(with_losses(noise), encoder, kind="knn")
    result = evaluate(trained.predictor, trained.held_out, None, decisions=5)
    assert not result.wins and result.gain > -3 * max(result.gain_se, 1e-9)
    quality = trained.predictor.predict([Prompt(p) for p in trained.held_out.prompt]).quality
    assert quality.std(axis=0).max() < 0.4 * trained.held_out.score.std(axis=0).min()


def test_it_is_calibrated(encoder: SentenceEncoder) -> None:
    """One subject is five times as noisy as the others: its prompts are known to be uncertain."""
    table = planted(signal=0.5, noise=0.05)
    wild = np.array(table.task) == "kitchen"
    noise = np.where(wild, 0.25, 0.0)[:, None] * np.random.default_rng(0).normal(size=(360, 3))
    trained = train(with_losses(table.measures["loss"] + noise), encoder, kind="knn", holdout=0.4)
    held = trained.held_out
    prediction = trained.predictor.predict([Prompt(p) for p in held.prompt])
    z = (held.score - prediction.quality) / prediction.uncertainty
    assert 0.85 < np.sqrt((z**2).mean()) < 1.15
    wild_held = np.array(held.task) == "kitchen"
    assert prediction.uncertainty[wild_held].mean() > 2 * prediction.uncertainty[~wild_held].mean()


def test_it_is_the_same_after_saving(trained: Trained, encoder: SentenceEncoder, tmp_path: Path) -> None:
    save(trained, tmp_path / "router")
    loaded = load_predictor(tmp_path / "router", encoder=encoder)
    prompts = [Prompt(p) for p in trained.held_out.prompt[:20]]
    before, after = trained.predictor.predict(prompts), loaded.predict(prompts)
    np.testing.assert_allclose(after.quality, before.quality, atol=1e-6)
    np.testing.assert_allclose(after.uncertainty, before.uncertainty, atol=1e-6)
    assert after.spread == before.spread and loaded.kind == "knn"
    some = load_predictor(tmp_path / "router", pool=["coder", "sporty"], encoder=encoder)
    assert some.predict(prompts).experts == ("coder", "sporty")
    np.testing.assert_allclose(some.predict(prompts).quality, before.quality[:, [2, 0]], atol=1e-6)
    np.testing.assert_allclose(some.predict(prompts).uncertainty, before.uncertainty[:, [2, 0]], atol=1e-6)
    assert isinstance(some, KnnPredictor)  # a selection that is saved keeps what it stands on
    again = KnnPredictor.from_artifact(some.to_artifact(), encoder, ["sporty"])
    np.testing.assert_allclose(again.predict(prompts).quality, before.quality[:, :1], atol=1e-6)


def test_training_twice_gives_the_same_router(trained: Trained, encoder: SentenceEncoder) -> None:
    again = train(planted(), encoder, kind="knn").predictor.to_artifact()
    assert again.version == trained.predictor.to_artifact().version
    assert again.tensors["rows.embeddings"].dtype == np.float16


def test_damage_is_noticed(trained: Trained, encoder: SentenceEncoder) -> None:
    good = trained.predictor.to_artifact()
    for change, message in (
        ({"settings": good.settings | {"mean": {"neighbours": 5}}}, "how `mean` is averaged"),
        ({"settings": good.settings | {"differences": {"neighbours": 0, "bandwidth": 1, "prior": 0}}}, "no sense"),
        ({"settings": good.settings | {"dimension": 7}}, "embeddings of 7"),
        ({"tensors": {k: v for k, v in good.tensors.items() if k != "rows.scores"}}, "0 rows of scores"),
        ({"tensors": good.tensors | {"rows.embeddings": np.zeros((3, 3), np.float16)}}, "shape"),
    ):
        with pytest.raises(ArtifactError, match=message):
            KnnPredictor.from_artifact(replace(good, **change), encoder, EXPERTS)  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match="needs an encoder"):
        KnnPredictor.from_artifact(good, None, EXPERTS)


def test_many_threads_and_odd_prompts(trained: Trained) -> None:
    prompts = [Prompt(p) for p in trained.held_out.prompt[:8]]
    expected = trained.predictor.predict(prompts).quality
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(lambda p: trained.predictor.predict([p]).quality[0], prompts))
    np.testing.assert_allclose(rows, expected, atol=1e-5)
    prediction = trained.predictor.predict([Prompt(p) for p in ("", "\x00", "🦊" * 50, "\ud800")])
    assert np.isfinite(prediction.quality).all() and (prediction.uncertainty > 0).all()
    assert trained.predictor.predict([]).quality.shape == (0, 3)


def test_too_few_prompts_are_refused(encoder: SentenceEncoder) -> None:
    table = planted().rows(np.arange(19))
    again = replace(table, prompt_id=[f"again {i}" for i in table.prompt_id])
    twice = Table(
        table.models,
        table.prompt_id + again.prompt_id,
        table.prompt * 2,
        {"loss": np.tile(table.measures["loss"], (2, 1))},
    )
    with pytest.raises(TableError, match="19 different prompts are too few"):
        KnnPredictor.fit(twice, encoder)


def test_texts_beyond_the_bound_are_left_out(encoder: SentenceEncoder) -> None:
    """Every other row has a second text: 90 texts of 60 rows, of which 40 are wanted."""
    table = planted().rows(np.arange(60))
    table = replace(table, text=["bare words" if i % 2 else p for i, p in enumerate(table.prompt)])
    _, taught, rows = bounded_lessons(table, encoder, 40, 0, lambda *_: None)
    assert 38 <= len(rows.texts) == len(rows.embeddings) <= 40 and len(taught) == rows.prompts < 40
    assert set(taught.prompt) < set(table.prompt)
    assert [taught.prompt[i] for i in rows.origin[: len(taught)]] == rows.texts[: len(taught)]
    assert len(bounded_lessons(table, encoder, 90, 0, lambda *_: None)[2].texts) == 90
    assert MAX_ROWS * encoder.dimension * 2 < 13e6  # bytes of an artifact's embeddings


# Smoothing


def unit(rows: int, width: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True))


def test_nearest_is_a_sorted_search() -> None:
    known, queries = unit(900, 8), unit(700, 8, 1)
    index, cosines = nearest(queries, known, 6)
    np.testing.assert_array_equal(index, np.argsort(-(queries @ known.T), axis=1)[:, :6])
    np.testing.assert_allclose(cosines, -np.sort(-(queries @ known.T), axis=1)[:, :6], atol=1e-6)
    assert nearest(queries, known[:3], 6)[0].shape == (700, 3)


def test_out_of_fold_is_what_the_smoother_says_of_the_other_folds() -> None:
    rng = np.random.default_rng(2)
    x, folds = unit(300, 6), rng.integers(0, 5, 300)
    scores = np.stack([x[:, 0], x[:, 1]], axis=1) * 0.3 + 0.5 + 0.1 * rng.normal(size=(300, 2))
    values = split(scores)
    found = choose_smoothers(x, values, folds, [slice(0, 1), slice(1, None)])
    for fold in range(5):
        held = folds == fold
        known = values[~held]
        index, cosines = nearest(x[held], x[~held], 240)
        near = (known - known.mean(axis=0))[index]
        for group, smoother in zip((slice(0, 1), slice(1, None)), found.smoothers, strict=True):
            expected = known.mean(axis=0)[group] + smoother(cosines, near[:, :, group])
            np.testing.assert_allclose(found.out_of_fold[held][:, group], expected, atol=1e-4)
        np.testing.assert_array_equal(found.index[held], np.flatnonzero(~held)[index[:, : found.index.shape[1]]])
    error = ((found.out_of_fold - values)[:, 1:] ** 2).mean()
    assert found.errors[1] == pytest.approx(error, rel=1e-3) and error < 0.6 * values[:, 1:].var()


def test_the_smoother_fits_the_data() -> None:
    rng = np.random.default_rng(3)
    x, folds = unit(1500, 4), rng.integers(0, 5, 1500)
    fine = np.sign(np.sin(14 * x[:, :1])) * 0.5
    noise = rng.normal(size=(1500, 1))
    few, many = (choose_smoothers(x, v, folds, [slice(0, 1)]).smoothers[0] for v in (fine, noise))
    assert few.neighbours <= 40
    # On noise the mean weighs far more than all neighbours together.
    assert many.prior > 5 * many.neighbours * np.exp(-0.2 / many.bandwidth) or many.neighbours == 320
    far = Smoother(5, 0.1, 0.05)
    values = np.ones((1, 5, 1))
    assert far(np.full((1, 5), 0.95), values) > 0.9 and far(np.full((1, 5), 0.1), values) < 0.02
