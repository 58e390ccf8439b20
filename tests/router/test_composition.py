"""Composition of Experts: both steps, the unsure, the budget, tables without tasks, saving."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from signalbox.router.artifact import ArtifactError, load_predictor
from signalbox.router.base import Facts, Predictor, Prompt
from signalbox.router.category_map import category_quality, frequencies, solve_map
from signalbox.router.category_router import (
    GENERAL,
    UNLABELLED,
    assigned,
    entropy,
    fit_category_router,
    found_categories,
    task_categories,
)
from signalbox.router.composition import CompositionPredictor, sizes_of
from signalbox.router.encoder import SentenceEncoder
from signalbox.router.evaluate import evaluate
from signalbox.router.table import Table, TableError
from signalbox.router.train import Trained, save, train
from tests.router.conftest import EXPERTS, SUBJECTS, planted

SIZES = {"sporty": 7e9, "cook": 8e9, "coder": 34e9}


@pytest.fixture(scope="module")
def trained(encoder: SentenceEncoder) -> Trained:
    return train(planted(), encoder, kind="composition", holdout=0.3)


@pytest.fixture(scope="module")
def budgeted(encoder: SentenceEncoder) -> Trained:
    return train(planted(), encoder, kind="composition", holdout=0.3, facts=Facts(parameters=SIZES, budget=20e9))


def composition(trained: Trained) -> CompositionPredictor:
    assert isinstance(trained.predictor, CompositionPredictor)
    return trained.predictor


def prompts_of(table: Table) -> list[Prompt]:
    return [Prompt(p) for p in table.prompt]


def test_the_subjects_go_to_their_experts(trained: Trained) -> None:
    predictor = composition(trained)
    assert isinstance(predictor, Predictor)
    result = evaluate(predictor, trained.held_out, None, decisions=5)
    assert result.wins and result.optimal_selection > 0.9
    assert result.quality > result.best_single + 0.9 * (result.oracle - result.best_single)
    assert 0.85 < result.calibration["z_rms"] < 1.2
    names = {"sport": "sporty", "kitchen": "cook", "code": "coder"}
    mapped = predictor.described()["categories"]
    assert {task: mapped[task]["expert"] for task in SUBJECTS} == names
    assert predictor.router.names == ("code", "kitchen", "sport", GENERAL)
    assert predictor.training["left_out_quality"] == pytest.approx(result.quality, abs=0.03)
    told = predictor.categories(prompts_of(trained.held_out))
    right = np.mean([found[0] == task for found, task in zip(told, trained.held_out.task, strict=True)])
    assert right > 0.93 and all(0 <= found[2] <= 1 for found in told)
    assert predictor.described()["expected_quality"] == pytest.approx(result.quality, abs=0.03)


def test_the_best_predicted_expert_is_the_mapped_one(trained: Trained, budgeted: Trained) -> None:
    for predictor in (composition(trained), composition(budgeted)):
        prediction = predictor.predict(prompts_of(trained.held_out))
        categories = [name for name, _, _ in predictor.categories(prompts_of(trained.held_out))]
        mapped = predictor.described()["categories"]
        chosen = [predictor.experts[e] for e in prediction.quality.argmax(axis=1)]
        assert chosen == [mapped[name]["expert"] for name in categories]
        assert prediction.quality.dtype == prediction.uncertainty.dtype == np.float32
        assert ((prediction.quality >= 0) & (prediction.quality <= 1)).all() and (prediction.uncertainty > 0).all()


def test_the_unsure_go_to_general(trained: Trained) -> None:
    strange = ["zxq vvkl 0xDEADBEEF ;;; 77", "今天天气怎么样", "", "lorem ipsum dolor sit amet", "The treaty of 1648"]
    sure = prompts_of(trained.held_out)
    predictor = composition(trained)
    doubt = [h for _, _, h in predictor.categories([Prompt(p) for p in strange])]
    assert np.mean(doubt) > 3 * np.mean([h for _, _, h in predictor.categories(sure)])
    told = [name for name, _, _ in predictor.categories([Prompt(p) for p in strange])]
    assert told.count(GENERAL) >= 4
    general = predictor.predict([Prompt(strange[told.index(GENERAL)])]).quality[0]
    np.testing.assert_allclose(general, trained.training.score.mean(axis=0), atol=0.08)  # shrunk towards that


def test_a_budget_keeps_what_fits(budgeted: Trained, trained: Trained) -> None:
    predictor = composition(budgeted)
    assert predictor.excluded == ("coder",) and predictor.map.resident == 15e9
    described = predictor.described()
    assert described["kept"] == ["sporty", "cook"] and described["budget"] == 20e9
    assert 7e9 < described["average_active"] < 8e9
    held = budgeted.held_out
    prediction = predictor.predict(prompts_of(held))
    assert not prediction.quality[:, 2].any() and (prediction.quality[:, :2] > 0).all()
    z = (held.score - prediction.quality) / prediction.uncertainty  # a 0 that is known to be wrong
    assert 0.85 < np.sqrt((z[:, 2] ** 2).mean()) < 1.15 and 0.85 < np.sqrt((z[:, :2] ** 2).mean()) < 1.2
    result = evaluate(predictor, held, None, decisions=5)
    assert result.share["coder"] == 0.0
    two = held.pool(["sporty", "cook"])
    assert result.quality > two.score.mean(axis=0).max() + 0.04  # better than one of the two alone
    assert result.quality < evaluate(composition(trained), held, None, decisions=5).quality - 0.04


@pytest.mark.parametrize("budget", [7e9, 10e9, 41e9, 42e9, 49e9])
def test_the_map_in_the_router_is_the_solved_one(trained: Trained, encoder: SentenceEncoder, budget: float) -> None:
    """Loaded under another budget, the artifact's map is that of `solve_map` on its qualities."""
    good = composition(trained).to_artifact()
    limited = replace(good, settings=good.settings | {"budget": budget, "parameters": list(SIZES.values())})
    found = CompositionPredictor.from_artifact(limited, encoder, EXPERTS)
    pool = found.pool
    expected = solve_map(pool.quality, pool.frequency, np.array(list(SIZES.values())), budget)
    assert found.map.experts == expected.experts and found.map.resident <= budget
    assert limited.version != good.version


def test_a_budget_that_holds_nobody_is_refused(encoder: SentenceEncoder, budgeted: Trained) -> None:
    with pytest.raises(TableError, match=r"smallest budget that works is 7e\+09"):
        CompositionPredictor.fit(planted(), encoder, facts=Facts(parameters=SIZES, budget=6e9))
    with pytest.raises(ArtifactError, match=r"smallest budget that works is 3.4e\+10"):
        CompositionPredictor.from_artifact(budgeted.predictor.to_artifact(), encoder, ["coder"])


def test_sizes() -> None:
    sizes, active, budget = sizes_of(EXPERTS, Facts())
    assert sizes.tolist() == active.tolist() == [1, 1, 1] and budget is None
    sizes, active, budget = sizes_of(EXPERTS, Facts(SIZES | {"other": 1}, active={"coder": 3e9}, budget=9e9))
    assert sizes.tolist() == [7e9, 8e9, 34e9] and active.tolist() == [7e9, 8e9, 3e9] and budget == 9e9
    with pytest.raises(TableError, match="parameters of cook, coder is not known"):
        sizes_of(EXPERTS, Facts(parameters={"sporty": 7e9}))
    with pytest.raises(TableError, match="cook has -1 parameters"):
        sizes_of(EXPERTS, Facts(parameters=SIZES | {"cook": -1}))


def test_without_tasks_clusters_are_found(encoder: SentenceEncoder) -> None:
    table = planted()
    trained = train(replace(table, task=[""] * len(table)), encoder, kind="composition", holdout=0.3)
    result = evaluate(trained.predictor, trained.held_out, None, decisions=5)
    assert composition(trained).training["clusters"] >= 2
    assert result.wins and result.quality > result.best_single + 0.7 * (result.oracle - result.best_single)


@pytest.mark.parametrize("tasks", [True, False])
def test_noise_is_no_win(encoder: SentenceEncoder, tasks: bool) -> None:
    table = planted()
    noise = np.random.default_rng(1).normal(2, 0.3, (360, 3))
    table = replace(table, measures={"loss": np.maximum(noise, 0)}, task=table.task if tasks else [""] * 360)
    trained = train(table, encoder, kind="composition")
    result = evaluate(trained.predictor, trained.held_out, None, decisions=5)
    assert not result.wins and result.gain > -3 * max(result.gain_se, 1e-9)
    quality = trained.predictor.predict(prompts_of(trained.held_out)).quality
    assert quality.std(axis=0).max() < 0.3 * trained.held_out.score.std(axis=0).min()


def test_rows_without_a_task_are_labelled_by_the_others(encoder: SentenceEncoder) -> None:
    """Half of the rows lose their task; a rare task is `general`."""
    table = planted()
    task = [name if i % 2 == 0 else "" for i, name in enumerate(table.task)]
    task[3] = task[7] = "rare"
    found = task_categories(task)
    assert found is not None
    names, labels = found
    assert names == ("code", "kitchen", "sport", GENERAL) and labels[3] == 3 and (labels == UNLABELLED).sum() == 178
    trained = train(replace(table, task=task), encoder, kind="composition", holdout=0.3)
    told = composition(trained).categories(prompts_of(trained.held_out))
    truth = dict(zip(table.prompt_id, table.task, strict=True))
    right = [found[0] == truth[i] for found, i in zip(told, trained.held_out.prompt_id, strict=True)]
    assert np.mean(right) > 0.9
    assert composition(trained).training["category_router"]["unlabelled"] > 100


def test_what_is_no_category() -> None:
    assert task_categories(["a"] * 50) is None and task_categories([""] * 50) is None
    assert task_categories([str(i) for i in range(50)]) is None  # all are rare
    many = [f"t{i}" for i in range(80) for _ in range(20)] + [f"t{i}" for i in range(63)]
    found = task_categories(many)
    assert found is not None and len(found[0]) == 64 and found[0][-1] == GENERAL
    assert sorted(set(many) - set(found[0])) == [f"t{i}" for i in range(63, 80)]  # the frequent ones stay


def blobs(count: int, rows: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, count, rows)
    x = rng.normal(size=(count, 16))[labels] + 0.6 * rng.normal(size=(rows, 16))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), labels, rng.integers(0, 5, rows)


def test_probabilities_are_calibrated_and_made_out_of_fold() -> None:
    rng = np.random.default_rng(0)
    x, labels, folds = blobs(4, 2000)
    wrong = rng.random(2000) < 0.3  # of which a quarter happens to be right again
    noisy = np.where(wrong, rng.integers(0, 4, 2000), labels)
    router, probabilities = fit_category_router(("a", "b", "c", "d", GENERAL), noisy, x, folds)
    assert np.allclose(probabilities.sum(axis=1), 1) and not probabilities[:, 4].any()
    right = (probabilities.argmax(axis=1) == noisy).mean()
    assert 0.7 < right < 0.8 and probabilities.max(axis=1).mean() == pytest.approx(right, abs=0.02)
    assert router.figures["accuracy"][router.settings()["classifier"]] == pytest.approx(right)
    again = router.probabilities(x)
    assert not again[:, 4].any() and (again.argmax(axis=1) == labels).mean() > 0.97


def test_the_classifier_is_the_one_that_is_right_more_often() -> None:
    x, labels, folds = blobs(12, 900)
    kinds = set()
    for grouped in (labels % 2, (x[:, 0] > 0).astype(int)):  # unions of blobs, and a half space
        router, _ = fit_category_router(("a", "b", GENERAL), grouped, x, folds)
        kinds.add(router.settings()["classifier"])
        accuracy = router.figures["accuracy"]
        assert accuracy[router.settings()["classifier"]] == max(accuracy.values())
    assert kinds == {"knn", "ridge"}


def test_entropy_and_assignment() -> None:
    p = np.array([[1.0, 0.0, 0.0, 0.0], [0.25] * 4, [0.6, 0.4, 0.0, 0.0]])
    np.testing.assert_allclose(entropy(p), [0.0, 1.0, 0.6730 / np.log(4)], atol=1e-4)
    assert assigned(p, 0.5).tolist() == [0, 3, 0] and assigned(p, 0.4).tolist() == [0, 3, 3]
    assert entropy(np.ones((2, 1))).tolist() == [0, 0]


def test_clusters_are_as_many_as_help() -> None:
    x, labels, folds = blobs(4, 1200, seed=1)
    rng = np.random.default_rng(0)
    scores = np.eye(4)[labels] * 0.4 + 0.3 + 0.1 * rng.normal(size=(1200, 4))
    names, found, _ = found_categories(x, scores, folds, seed=0)
    assert 4 <= len(names) - 1 <= 8
    quality = category_quality(scores, found, len(names))
    assert solve_map(quality, frequencies(found, len(names)), np.ones(4)).quality > 0.62
    names, _, _ = found_categories(x, rng.random((1200, 4)), folds, seed=0)
    assert names == (GENERAL,)


@pytest.mark.parametrize("which", ["trained", "budgeted"])
def test_it_is_the_same_after_saving(
    which: str, request: pytest.FixtureRequest, encoder: SentenceEncoder, tmp_path: Path
) -> None:
    trained: Trained = request.getfixturevalue(which)
    save(trained, tmp_path / "router", neighbours=False)
    loaded = load_predictor(tmp_path / "router", encoder=encoder)
    prompts = prompts_of(trained.held_out)[:20]
    before, after = trained.predictor.predict(prompts), loaded.predict(prompts)
    np.testing.assert_allclose(after.quality, before.quality, atol=1e-6)
    np.testing.assert_allclose(after.uncertainty, before.uncertainty, atol=1e-6)
    assert isinstance(loaded, CompositionPredictor) and loaded.excluded == composition(trained).excluded
    some = load_predictor(tmp_path / "router", pool=["cook", "sporty"], encoder=encoder).predict(prompts)
    np.testing.assert_allclose(some.quality, before.quality[:, [1, 0]], atol=1e-6)
    np.testing.assert_allclose(some.uncertainty, before.uncertainty[:, [1, 0]], atol=1e-6)


def test_an_expert_that_left_makes_room(budgeted: Trained, encoder: SentenceEncoder) -> None:
    """Sporty and coder do not fit together in 20e9, sporty alone is kept; with 41e9 both are."""
    good = budgeted.predictor.to_artifact()
    alone = CompositionPredictor.from_artifact(good, encoder, ["sporty", "coder"])
    assert alone.excluded == ("coder",)
    more = replace(good, settings=good.settings | {"budget": 41e9})
    assert CompositionPredictor.from_artifact(more, encoder, ["sporty", "coder"]).excluded == ()
    assert len(CompositionPredictor.from_artifact(more, encoder, EXPERTS).excluded) == 1


def test_damage_is_noticed(trained: Trained, encoder: SentenceEncoder) -> None:
    good = trained.predictor.to_artifact()
    prefix = "category."
    broken: Sequence[tuple[dict[str, object], str]] = (
        ({"settings": good.settings | {"categories": ["sport"]}}, "ends with general"),
        ({"settings": good.settings | {"temperature": "hot"}}, "makes no sense"),
        ({"settings": good.settings | {"temperature": 0}}, "makes no sense"),
        ({"settings": good.settings | {"classifier": "oracle"}}, "unknown classifier"),
        ({"settings": good.settings | {"parameters": [1.0]}}, "train it again for this pool"),
        ({"settings": good.settings | {"parameters": [1.0, -1.0, 1.0]}}, "sizes must be positive"),
        ({"settings": good.settings | {"budget": "much"}}, "train it again for this pool"),
        ({"tensors": {k: v for k, v in good.tensors.items() if not k.startswith(prefix)}}, "category."),
        ({"tensors": {k: v for k, v in good.tensors.items() if k != "map.quality"}}, "no tensor map.quality"),
    )
    for change, message in broken:
        with pytest.raises(ArtifactError, match=message):
            CompositionPredictor.from_artifact(replace(good, **change), encoder, EXPERTS)  # type: ignore[arg-type]


def test_few_rows_and_odd_prompts(trained: Trained, encoder: SentenceEncoder) -> None:
    with pytest.raises(TableError, match="8 different prompts are too few"):
        CompositionPredictor.fit(planted().rows(np.arange(8)), encoder)
    small = CompositionPredictor.fit(planted().rows(np.arange(24)), encoder)
    assert np.isfinite(small.predict([Prompt("the oven")]).quality).all()
    prediction = trained.predictor.predict([Prompt(p) for p in ("", "\x00", "🦊" * 50, "\ud800")])
    assert np.isfinite(prediction.quality).all() and (prediction.uncertainty > 0).all()
    assert trained.predictor.predict([]).quality.shape == (0, 3)


def test_a_vote_of_remote_neighbours_is_not_trusted() -> None:
    """All neighbours of a far point are of one class; still it may be of any."""
    x, labels, folds = blobs(12, 900)
    router, _ = fit_category_router(("a", "b", GENERAL), (labels > 2).astype(int), x, folds)  # 1 to 3
    assert router.settings()["classifier"] == "knn"
    centre = x[labels == 0].mean(axis=0)
    near, far = centre / np.linalg.norm(centre), -x.mean(axis=0) / np.linalg.norm(x.mean(axis=0))
    h = entropy(router.probabilities(np.stack([near, far]).astype(np.float32)))
    assert h[0] < 0.2 and h[1] > 0.9 * np.log(2) / np.log(3)  # of three categories, one has no rows
