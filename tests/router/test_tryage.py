from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from signalbox.router import heads
from signalbox.router.artifact import load_predictor
from signalbox.router.base import Predictor, Prompt, quality_of_loss
from signalbox.router.encoder import SentenceEncoder
from signalbox.router.evaluate import evaluate
from signalbox.router.features import STRUCTURE, structure
from signalbox.router.table import Table, TableError
from signalbox.router.teaching import routed_quality, simplest_head
from signalbox.router.train import Trained, save, train
from signalbox.router.tryage import TryagePredictor
from signalbox.router.uncertainty import fit_deviation
from tests.router.conftest import EXPERTS, planted


@pytest.fixture(scope="module")
def trained(encoder: SentenceEncoder) -> Trained:
    return train(planted(), encoder)


def test_a_planted_signal_is_found(trained: Trained, encoder: SentenceEncoder) -> None:
    assert isinstance(trained.predictor, Predictor)
    result = evaluate(trained.predictor, trained.held_out, encoder, decisions=5)
    assert result.wins and result.gain > 5 * result.gain_se
    assert result.optimal_selection > 0.9
    assert result.quality > result.best_single + 0.9 * (result.oracle - result.best_single)


def test_it_predicts_the_loss_in_its_unit(trained: Trained) -> None:
    prompts = ["Explain the tennis final to a beginner", "Why does the compiler matter so much?"]
    prediction = trained.predictor.predict([Prompt(p) for p in prompts])
    assert prediction.experts == EXPERTS
    assert prediction.quality.dtype == prediction.uncertainty.dtype == np.float32
    best = float(quality_of_loss(1.0))
    assert prediction.row(0)["sporty"][0] == pytest.approx(best, abs=0.1)
    assert prediction.row(0)["coder"][0] == pytest.approx(0.25, abs=0.07)
    assert prediction.row(1)["coder"][0] == pytest.approx(best, abs=0.1)
    assert ((prediction.quality >= 0) & (prediction.quality <= 1)).all() and (prediction.uncertainty > 0).all()
    # The mean gap between best and worst: a loss of 1 against 2, and the noise of three draws.
    assert prediction.spread == pytest.approx(0.27, abs=0.05)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_noise_is_no_win(encoder: SentenceEncoder, seed: int) -> None:
    trained = train(planted(240, signal=0.0, noise=0.3, seed=seed), encoder)
    result = evaluate(trained.predictor, trained.held_out, encoder, decisions=5)
    assert not result.wins
    assert result.optimal_selection < 0.6


def test_where_one_expert_is_best_for_all_it_gets_all(encoder: SentenceEncoder) -> None:
    table = planted(240, signal=0.0, noise=0.2, seed=4)
    table.measures["loss"][:, 1] -= 1.0
    better = Table(table.models, table.prompt_id, table.prompt, {"loss": np.maximum(table.measures["loss"], 0)})
    trained = train(better, encoder)
    result = evaluate(trained.predictor, trained.held_out, encoder, decisions=5)
    assert result.share["cook"] == 1.0 and result.gain == 0.0 and not result.wins


def test_scores_are_learned_where_there_are_no_losses(encoder: SentenceEncoder) -> None:
    trained = train(planted(scores=True), encoder)
    assert isinstance(trained.predictor, TryagePredictor)
    assert trained.predictor.to_artifact().training["label"] == "score"
    result = evaluate(trained.predictor, trained.held_out, encoder, decisions=5)
    assert result.wins and result.regret_bits is None and result.optimal_selection > 0.9


def test_the_uncertainty_is_calibrated_and_knows_hard_prompts(encoder: SentenceEncoder) -> None:
    """Losses of one subject are five times as noisy as the others'."""
    table = planted(700, signal=0.5, noise=0.05, seed=5)
    rng = np.random.default_rng(0)
    wild = np.array(table.task) == "kitchen"
    losses = table.measures["loss"] + np.where(wild, 0.25, 0.0)[:, None] * rng.normal(size=(700, 3))
    table = Table(table.models, table.prompt_id, table.prompt, {"loss": np.maximum(losses, 0)}, task=table.task)
    trained = train(table, encoder)
    held = trained.held_out
    result = evaluate(trained.predictor, held, encoder, decisions=5)
    assert 0.8 < result.calibration["z_rms"] < 1.25
    assert 0.55 < result.calibration["within_1sd"] < 0.85
    deviation = trained.predictor.predict([Prompt(p) for p in held.prompt]).uncertainty.mean(axis=1)
    wild_held = np.array(held.task) == "kitchen"
    assert deviation[wild_held].mean() > 2 * deviation[~wild_held].mean()


def test_the_bare_text_is_learned_beside_the_instructed_one(encoder: SentenceEncoder) -> None:
    """Wrapped in one long instruction, the subjects differ little; typed bare, they are what was meant."""
    table = planted(240)
    wrapped = [
        f"Please read the following carefully, think, and then answer in one short line.\n\n{p}" for p in table.prompt
    ]
    both = Table(table.models, table.prompt_id, wrapped, table.measures, task=table.task, text=table.prompt)
    trained = train(both, encoder)
    result = evaluate(trained.predictor, trained.held_out, encoder, decisions=5)
    assert result.bare_text_quality is not None and result.bare_text_quality > result.best_single + 0.05
    assert trained.predictor.to_artifact().training["texts"] == 2 * len(trained.training)


def test_it_is_the_same_after_saving(trained: Trained, encoder: SentenceEncoder, tmp_path: Path) -> None:
    save(trained, tmp_path / "router")
    loaded = load_predictor(tmp_path / "router", encoder=encoder)
    prompts = [Prompt(p) for p in trained.held_out.prompt[:20]]
    before, after = trained.predictor.predict(prompts), loaded.predict(prompts)
    np.testing.assert_allclose(after.quality, before.quality, atol=1e-6)
    np.testing.assert_allclose(after.uncertainty, before.uncertainty, atol=1e-6)
    assert after.spread == before.spread and loaded.kind == "tryage"
    some = load_predictor(tmp_path / "router", pool=["coder", "sporty"], encoder=encoder).predict(prompts)
    assert some.experts == ("coder", "sporty")
    np.testing.assert_allclose(some.quality, before.quality[:, [2, 0]], atol=1e-6)
    np.testing.assert_allclose(some.uncertainty, before.uncertainty[:, [2, 0]], atol=1e-6)


def test_training_twice_gives_the_same_router(trained: Trained, encoder: SentenceEncoder) -> None:
    again = train(planted(), encoder).predictor.to_artifact()
    assert again.version == trained.predictor.to_artifact().version


def test_many_threads_may_ask(trained: Trained) -> None:
    prompts = [Prompt(p) for p in trained.held_out.prompt[:16]]
    expected = trained.predictor.predict(prompts).quality
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(lambda p: trained.predictor.predict([p]).quality[0], prompts))
    np.testing.assert_allclose(rows, expected, atol=1e-5)


def test_odd_prompts_get_a_finite_answer(trained: Trained) -> None:
    odd = ["", " ", "\x00", "🦊" * 5000, "a" * 1_000_000, "\ud800 lone surrogate"]
    prediction = trained.predictor.predict([Prompt(p) for p in odd])
    assert np.isfinite(prediction.quality).all() and np.isfinite(prediction.uncertainty).all()
    assert trained.predictor.predict([]).quality.shape == (0, 3)


def test_too_few_rows_are_refused(encoder: SentenceEncoder) -> None:
    with pytest.raises(TableError, match="8 complete rows are too few"):
        train(planted(8), encoder, holdout=0.0)


# The heads


def regression(seed: int = 0, rows: int = 300) -> heads.Data:
    """Unit vectors of 10 numbers and two structural columns, the first of which counts as much as all of those."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 12)).astype(np.float32)
    x[:, :10] /= np.linalg.norm(x[:, :10], axis=1, keepdims=True)
    y = x[:, :10] @ rng.normal(size=(10, 2)) + x[:, 10:11] + 0.1 * rng.normal(size=(rows, 2)) + 5
    return heads.Data(x, y, rng.integers(0, 5, rows), plain=10)


def test_ridge_is_the_closed_form() -> None:
    data = regression()
    path = heads.RidgePath(data.features.astype(np.float64), data.labels)
    x = data.features - data.features.mean(axis=0)
    y = data.labels - data.labels.mean(axis=0)
    np.testing.assert_allclose(
        path.weight(7.0), np.linalg.solve(x.T @ x + 7.0 * np.eye(12), x.T @ y), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", heads.KINDS)
def test_every_head_beats_the_mean_out_of_fold(name: str) -> None:
    data = regression()
    fit = heads.fit(name, data, seed=0)
    error = ((fit.out_of_fold - data.labels) ** 2).mean()
    variance = data.labels.var(axis=0).mean()
    # Without the structural columns (10 and 11) the part they carry cannot be explained.
    assert (0.4 if name == "ridge" else 0.0) * variance < error < (0.75 if name == "ridge" else 0.4) * variance
    assert error > 0.005  # the noise: less would be a leak
    np.testing.assert_allclose(fit.head(data.features).mean(axis=0), data.labels.mean(axis=0), atol=0.6)
    if name == "ridge":
        assert not fit.head.tensors("")["weight"][10:].any()


def test_the_kernel_finds_what_no_line_can_and_is_chosen() -> None:
    """Which expert is better is the exclusive or of two things that the embedding says."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2, (400, 2))
    corners = rng.normal(size=(4, 32))
    corners[3] = corners[1] + corners[2] - corners[0]  # as far as a line can see, the two things add up
    x = corners[bits[:, 0] * 2 + bits[:, 1]] + 0.3 * rng.normal(size=(400, 32))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    first = (bits[:, 0] ^ bits[:, 1]).astype(float)
    y = np.stack([first, 1 - first], axis=1) * 0.5 + 0.05 * rng.normal(size=(400, 2)) + 0.2
    data = heads.Data(x.astype(np.float32), y, rng.integers(0, 5, 400), plain=32)
    found = {name: heads.fit(name, data, 0).out_of_fold for name in ("ridge", "kernel")}
    assert routed_quality(found["kernel"], y) > routed_quality(found["ridge"], y) + 0.02
    assert simplest_head(found, y, 400) == "kernel"


def test_a_tie_goes_to_the_simplest_head() -> None:
    rng = np.random.default_rng(0)
    scores = rng.random((500, 3))
    guess = scores + rng.normal(0, 0.2, (500, 3))
    same = dict.fromkeys(heads.KINDS, guess)
    assert simplest_head(same, scores, 250) == "ridge"
    # How hard a prompt is bears on no choice: a head that knows only that better is not preferred.
    assert simplest_head(same | {"mlp": guess - (guess - scores).mean(axis=1, keepdims=True)}, scores, 250) == "ridge"
    assert simplest_head(same | {"kernel": (guess + scores) / 2}, scores, 250) == "kernel"


def test_losses_are_predicted_in_bits_per_byte(trained: Trained) -> None:
    assert isinstance(trained.predictor, TryagePredictor)
    losses = trained.predictor.losses([Prompt(p) for p in trained.held_out.prompt])
    assert trained.held_out.loss is not None
    assert np.sqrt(np.mean((losses - trained.held_out.loss) ** 2)) < 0.35  # of which .15 is noise


def test_a_deviation_never_leaves_what_was_seen() -> None:
    data = regression()
    residuals = np.exp(data.features[:, 11:]) * np.random.default_rng(1).normal(size=(300, 2))
    deviation = fit_deviation(data, residuals)
    seen = deviation(data.features)
    wild = deviation(data.features * 1e3)
    assert wild.max() <= seen.max() * 1.5 and wild.min() > 0
    assert np.corrcoef(np.log(seen[:, 0]), data.features[:, 11])[0, 1] > 0.9


def test_structure_of_texts() -> None:
    rows = structure(["", "What is 12*7?", "def f():\n    return [1]\n", "你好"])
    assert rows.shape == (4, len(STRUCTURE)) and not rows[0].any()
    by_name = [dict(zip(STRUCTURE, map(float, row), strict=True)) for row in rows]
    assert by_name[1]["question"] == 1 and by_name[1]["digits"] == pytest.approx(3 / 13)
    assert by_name[2]["code_punctuation"] > 0.1 and by_name[2]["log_lines"] == pytest.approx(np.log(3))
    assert by_name[3]["non_ascii"] == 1
