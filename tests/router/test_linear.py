"""Plain heads: ridge on the embedding finds what is planted, and not what is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from signalbox.router.artifact import ArtifactError, load_predictor
from signalbox.router.base import Predictor, Prompt
from signalbox.router.encoder import SentenceEncoder
from signalbox.router.evaluate import evaluate
from signalbox.router.linear import LinearPredictor
from signalbox.router.table import TableError
from signalbox.router.train import Trained, save, train
from tests.router.conftest import planted


@pytest.fixture(scope="module")
def trained(encoder: SentenceEncoder) -> Trained:
    return train(planted(), encoder, kind="linear", holdout=0.3)


def test_a_planted_signal_is_found_and_calibrated(trained: Trained) -> None:
    assert isinstance(trained.predictor, Predictor)
    result = evaluate(trained.predictor, trained.held_out, None, decisions=5)
    assert result.wins and result.optimal_selection > 0.9
    assert result.quality > result.best_single + 0.9 * (result.oracle - result.best_single)
    assert 0.85 < result.calibration["z_rms"] < 1.2
    figures = trained.predictor.to_artifact().training
    assert set(figures["cross_validated"]) == {"ridge", "ridge+structure"}
    assert figures["left_out_quality"] == pytest.approx(result.quality, abs=0.03)


@pytest.mark.parametrize("seed", [1, 2])
def test_noise_is_no_win(encoder: SentenceEncoder, seed: int) -> None:
    noise = np.random.default_rng(seed).normal(2, 0.3, (360, 3))
    table = replace(planted(), measures={"loss": np.maximum(noise, 0)})
    trained = train(table, encoder, kind="linear")
    result = evaluate(trained.predictor, trained.held_out, None, decisions=5)
    assert not result.wins and result.gain > -3 * max(result.gain_se, 1e-9)


def test_it_is_the_same_after_saving(trained: Trained, encoder: SentenceEncoder, tmp_path: Path) -> None:
    save(trained, tmp_path / "router", neighbours=False)
    loaded = load_predictor(tmp_path / "router", encoder=encoder)
    prompts = [Prompt(p) for p in trained.held_out.prompt[:20]]
    before, after = trained.predictor.predict(prompts), loaded.predict(prompts)
    np.testing.assert_allclose(after.quality, before.quality, atol=1e-6)
    np.testing.assert_allclose(after.uncertainty, before.uncertainty, atol=1e-6)
    assert isinstance(loaded, LinearPredictor) and loaded.kind == "linear"
    some = load_predictor(tmp_path / "router", pool=["coder", "sporty"], encoder=encoder).predict(prompts)
    np.testing.assert_allclose(some.quality, before.quality[:, [2, 0]], atol=1e-6)
    np.testing.assert_allclose(some.uncertainty, before.uncertainty[:, [2, 0]], atol=1e-6)


def test_what_cannot_work_is_refused(trained: Trained, encoder: SentenceEncoder) -> None:
    with pytest.raises(TableError, match="8 different prompts are too few"):
        LinearPredictor.fit(planted().rows(np.arange(8)), encoder)
    good = trained.predictor.to_artifact()
    bad = replace(good, tensors={k: v for k, v in good.tensors.items() if k != "head.bias"})
    with pytest.raises(ArtifactError, match=r"no tensor head\.bias"):
        LinearPredictor.from_artifact(bad, encoder, good.experts)
