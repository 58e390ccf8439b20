from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from signalbox.router.artifact import ArtifactError, load_predictor, read_artifact, save_artifact
from signalbox.router.base import Prompt
from signalbox.router.cascade import MAX_SLOW_SHARE, TOLERANCE, CascadePredictor, choose_threshold, margin
from signalbox.router.encoder import SentenceEncoder
from signalbox.router.evaluate import evaluate
from signalbox.router.lexical import LexicalPredictor
from signalbox.router.metrics import taken
from signalbox.router.stacked import StackedPredictor
from signalbox.router.train import Trained, save, train
from tests.router.conftest import EXPERTS, planted


@pytest.fixture(scope="module")
def cascade(encoder: SentenceEncoder) -> Trained:
    return train(planted(200), encoder, kind="cascade")


@pytest.fixture(scope="module")
def half(cascade: Trained) -> CascadePredictor:
    """The same cascade with a threshold that sends half of the rows the slow way."""
    assert isinstance(cascade.predictor, CascadePredictor)
    prompts = [Prompt(p) for p in cascade.held_out.prompt]
    cut = float(np.median(margin(cascade.predictor.fast.predict(prompts).quality)))
    return CascadePredictor(cascade.predictor.fast, cascade.predictor.slow, cut)


def test_it_finds_what_is_planted(cascade: Trained) -> None:
    result = evaluate(cascade.predictor, cascade.held_out, cascade.encoder, decisions=5)
    assert result.wins and result.optimal_selection > 0.9


def test_thin_rows_are_the_slow_routers_and_the_others_the_fast_ones(cascade: Trained, half: CascadePredictor) -> None:
    prompts = [Prompt(p) for p in cascade.held_out.prompt]
    got, fast, slow = (router.predict(prompts) for router in (half, half.fast, half.slow))
    thin = half.is_thin(fast.quality)
    assert 0.3 < thin.mean() < 0.7 and half.slow_share(prompts) == thin.mean()
    assert np.array_equal(got.quality[~thin], fast.quality[~thin])
    assert np.allclose(got.quality[thin], slow.quality[thin], atol=1e-3)  # bf16 embeddings depend on the batch
    assert np.allclose(got.uncertainty[thin], slow.uncertainty[thin], atol=1e-3)
    assert not np.allclose(fast.quality[thin], slow.quality[thin], atol=1e-3)


def test_the_threshold_asks_the_slow_one_where_it_pays() -> None:
    """Fast knows the best expert except where its margin is thin; slow always knows it."""
    rng = np.random.default_rng(0)
    n = 4000
    best = rng.integers(3, size=n)
    scores = np.eye(3)[best]
    thin = rng.random(n) < 0.2
    guess = np.where(thin, rng.integers(3, size=n), best)
    gap = np.where(thin, rng.uniform(0.001, 0.05, n), rng.uniform(0.1, 0.5, n))
    fast = 0.3 + np.eye(3)[guess] * gap[:, None]
    slow = 0.3 + np.eye(3)[best] * 0.3
    cut, figures = choose_threshold(fast, slow, scores)
    assert 0.04 < cut < 0.15 and 0.17 < figures["slow_share"] < 0.25
    assert figures["left_out_quality_fast"] < 0.9
    assert figures["left_out_quality"] >= figures["left_out_quality_slow"] - TOLERANCE


def test_the_slow_way_is_not_taken_where_it_knows_no_better() -> None:
    rng = np.random.default_rng(1)
    scores = rng.random((1000, 3))
    fast = scores + rng.normal(0, 0.1, scores.shape)
    slow = scores + rng.normal(0, 0.3, scores.shape)
    cut, figures = choose_threshold(fast, slow, scores)
    assert cut == 0 and figures["slow_share"] == 0
    assert figures["left_out_quality"] == taken(scores, fast.argmax(axis=1)).mean()


def test_the_share_of_the_slow_way_is_bounded() -> None:
    rng = np.random.default_rng(2)
    scores = rng.random((1000, 3))
    _, figures = choose_threshold(rng.random((1000, 3)), scores, scores)
    assert 0.3 < figures["slow_share"] <= MAX_SLOW_SHARE + 0.01


def test_saved_and_loaded_it_predicts_alike(cascade: Trained, tmp_path: Path) -> None:
    save(cascade, tmp_path / "router", neighbours=False)
    prompts = [Prompt(p) for p in cascade.held_out.prompt[:20]]
    loaded = load_predictor(tmp_path / "router")
    assert isinstance(loaded, CascadePredictor) and loaded.threshold == cascade.predictor.threshold  # type: ignore[attr-defined]
    mine, its = cascade.predictor.predict(prompts), loaded.predict(prompts)
    assert np.allclose(mine.quality, its.quality, atol=2e-3)
    some = load_predictor(tmp_path / "router", pool=["coder", "cook"]).predict(prompts)
    assert some.experts == ("coder", "cook")
    assert np.allclose(some.quality, its.quality[:, [2, 1]], atol=2e-3)


def test_a_damaged_artifact_is_refused(cascade: Trained, tmp_path: Path) -> None:
    artifact = cascade.predictor.to_artifact()
    save_artifact(replace(artifact, settings=artifact.settings | {"threshold": None}), tmp_path / "a")
    with pytest.raises(ArtifactError, match="threshold"):
        load_predictor(tmp_path / "a")
    tensors = {k: v for k, v in artifact.tensors.items() if k != "slow.embedding.mean"}
    save_artifact(replace(artifact, tensors=tensors), tmp_path / "b")
    with pytest.raises(ArtifactError, match=r"embedding\.mean"):
        load_predictor(tmp_path / "b")


def test_stacked_reads_the_embedding(encoder: SentenceEncoder) -> None:
    """Words it has never seen: the n-grams know nothing, the embedding does."""
    table = planted(200)
    stacked, lexical = StackedPredictor.fit(table, encoder), LexicalPredictor.fit(table)
    unseen = {"a goalkeeper kicking": "sporty", "boil spaghetti": "cook", "debugging java software": "coder"}
    texts = [Prompt(t) for t in unseen]
    picked = [EXPERTS[e] for e in stacked.predict(texts).quality.argmax(axis=1)]
    assert picked == list(unseen.values())
    sure = [margin(router.predict(texts).quality).mean() for router in (stacked, lexical)]
    assert sure[0] > 1.5 * sure[1]


def test_a_single_is_the_same_for_all(tmp_path: Path) -> None:
    table = planted(100)
    save(train(table, None, kind="single", holdout=0), tmp_path / "router")
    router = load_predictor(tmp_path / "router", pool=["cook", "sporty"])
    prediction = router.predict([Prompt("a"), Prompt("b")])
    assert np.allclose(prediction.quality, table.score.mean(axis=0)[[1, 0]], atol=1e-6)
    assert np.allclose(prediction.uncertainty, table.score.std(axis=0)[[1, 0]], atol=1e-6)
    assert read_artifact(tmp_path / "router").encoder == ""
