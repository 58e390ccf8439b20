"""Which experts a task uses: scores against the formula on three families, the selection by hand and by property."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from signalbox.adapters.esft_scores import (
    ExpertScores,
    ScoreFile,
    expert_layers,
    packed_samples,
    read_scores,
    score_experts,
    write_scores,
)
from signalbox.adapters.esft_select import most_relevant, read_selection, select_experts, write_selection
from signalbox.adapters.train_data import Encoded, TrainingError
from tests.moe_models import EXPERTS, FAMILIES, Family, save_tiny_moe

SAMPLES = [[5, 9, 200, 17, 17, 42, 3], [7, 8], [100, 250, 260, 11, 30, 31, 32, 33, 34, 35, 36]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Family, Path]:
    root = tmp_path_factory.mktemp("moe")
    return {family: save_tiny_moe(root / family, family) for family in FAMILIES}


def load(folder: Path, **changes: Any) -> Any:
    config = AutoConfig.from_pretrained(folder)
    for name, value in changes.items():
        setattr(config, name, value)
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()


def by_formula(model: Any, samples: list[list[int]]) -> tuple[dict[int, list[float]], dict[int, list[float]], int]:
    """Both scores from the routers' logits, token by token in Python, as the paper writes them."""
    config = model.config
    top_k = config.num_experts_per_tok
    logits: dict[int, torch.Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith(".mlp.gate"):
            layer = int(name.split(".")[2])
            module.register_forward_hook(lambda _, __, out, layer=layer: logits.__setitem__(layer, out[0]))
    gate: dict[int, list[float]] = {}
    token: dict[int, list[float]] = {}
    for sample in samples:
        with torch.no_grad():
            model(input_ids=torch.tensor([sample]))
        for layer, found in logits.items():
            g, r = gate.setdefault(layer, [0.0] * EXPERTS), token.setdefault(layer, [0.0] * EXPERTS)
            for row in torch.softmax(found.double(), -1).tolist():
                allowed = range(EXPERTS)
                if getattr(config, "topk_method", None) == "group_limited_greedy":
                    size = EXPERTS // config.n_group
                    best = [max(row[n * size : (n + 1) * size]) for n in range(config.n_group)]
                    groups = sorted(range(config.n_group), key=lambda n: -best[n])[: config.topk_group]
                    allowed = [i for i in allowed if i // size in groups]  # type: ignore[assignment]
                picked = sorted(allowed, key=lambda i: -row[i])[:top_k]
                whole = sum(row[i] for i in picked) if getattr(config, "norm_topk_prob", False) else 1.0
                for i in picked:
                    g[i] += row[i] / whole / len(sample) / len(samples)
                    r[i] += 1 / top_k / len(sample) / len(samples)
    return gate, token, top_k


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_papers(folders: dict[Family, Path], family: Family) -> None:
    scores = score_experts(load(folders[family]), SAMPLES)
    gate, token, top_k = by_formula(load(folders[family]), SAMPLES)
    assert scores.layers == tuple(gate) == ((1, 2, 3) if family == "deepseek_v2" else (0, 1, 2))
    assert (scores.top_k, scores.samples, scores.tokens) == (top_k, 3, 20)
    for n, layer in enumerate(scores.layers):
        assert scores.gate[n].tolist() == pytest.approx(gate[layer], abs=1e-5)
        assert scores.token[n].tolist() == pytest.approx(token[layer], abs=1e-12)
    assert scores.token.sum(1).tolist() == pytest.approx([1.0] * 3)
    renormalises = family == "qwen3_moe"
    assert all((abs(total - 1) < 1e-5) == renormalises for total in scores.gate.sum(1).tolist())
    assert scores.gate.dtype == torch.float64 and (scores.gate.amax(1) > 2 * scores.gate.mean(1)).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"routed_scaling_factor": 16.0},
        {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 2, "routed_scaling_factor": 2.5},
    ],
)
def test_a_gate_value_is_taken_before_it_is_scaled(folders: dict[Family, Path], changes: dict[str, Any]) -> None:
    scores = score_experts(load(folders["deepseek_v2"], **changes), SAMPLES)
    gate, token, _ = by_formula(load(folders["deepseek_v2"], **changes), SAMPLES)
    for n, layer in enumerate(scores.layers):
        assert scores.gate[n].tolist() == pytest.approx(gate[layer], abs=1e-5)
        assert scores.token[n].tolist() == pytest.approx(token[layer], abs=1e-12)
    assert float(scores.gate.sum(1).max()) < 1


def test_short_samples_weigh_as_much_as_long_ones(folders: dict[Family, Path]) -> None:
    model = load(folders["olmoe"])
    each = [score_experts(model, [sample]) for sample in SAMPLES]
    together = score_experts(model, SAMPLES)
    mean = sum(scores.gate for scores in each) / len(each)  # type: ignore[arg-type]
    torch.testing.assert_close(together.gate, mean)
    assert not model.model.layers[0].mlp.experts._forward_pre_hooks  # nothing stays in the model


def test_other_models_are_refused(folders: dict[Family, Path], base: Path) -> None:
    with pytest.raises(TrainingError, match=r"no routed experts; ESFT needs.*signalbox adapters train"):
        score_experts(AutoModelForCausalLM.from_pretrained(base), SAMPLES)
    model = load(folders["olmoe"])
    model.config.model_type = "mixtral"
    with pytest.raises(TrainingError, match="router of mixtral models is not known"):
        expert_layers(model)
    with pytest.raises(TrainingError, match="no samples"):
        score_experts(load(folders["olmoe"]), [])


def test_broken_weights_are_told(folders: dict[Family, Path]) -> None:
    model = load(folders["olmoe"])
    model.model.layers[1].mlp.gate.weight.data[3] = float("nan")
    with pytest.raises(TrainingError, match="not finite"):
        score_experts(model, SAMPLES)


def rows(*lengths: int) -> list[Encoded]:
    found, start = [], 0
    for length in lengths:
        found.append(Encoded(list(range(start, start + length - 1)), [start + length - 1], 1, "", ""))
        start += length
    return found


def test_samples_are_the_rows_end_to_end() -> None:
    given = rows(*range(2, 30))
    every = {(*row.prompt, *row.answer) for row in given}
    samples = packed_samples(given, 100, 20)
    joined = [token for sample in samples for token in sample]
    assert all(len(sample) == 20 for sample in samples[:-1]) and len(samples) == 22  # of 434
    assert len(set(joined)) == len(joined)  # no token twice
    assert any(tuple(joined[i : i + 29]) in every for i in range(len(joined)))  # whole rows, in order
    assert samples == packed_samples(given, 100, 20) != packed_samples(given, 100, 20, seed=1)
    assert packed_samples(given, 3, 20) == samples[:3]
    assert [len(sample) for sample in packed_samples(rows(9, 9, 9), 9, 10)] == [10, 10, 7]
    assert [len(sample) for sample in packed_samples(rows(3), 9, 10)] == [3]  # all that there is
    with pytest.raises(TrainingError, match="no rows"):
        packed_samples([], 3, 4)


# -- selection -----------------------------------------------------------------------------------------------------


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("scores", "threshold", "wanted"),
    [
        ((0.1, 0.4, 0.2, 0.3), 0.4, (1,)),
        ((0.1, 0.4, 0.2, 0.3), 0.41, (1, 3)),
        ((0.1, 0.4, 0.2, 0.3), 0.7, (1, 3)),  # 0.4 + 0.3, which binary rounding puts below 0.7
        ((0.1, 0.7, 0.2), 0.8, (1, 2)),
        ((0.1, 0.7, 0.1, 0.1), 0.8, (0, 1)),  # of equal ones, the lower
        ((0.0, 0.3, 0.0, 0.1), 1.0, (1, 3)),  # cannot be reached: all that were ever chosen
        ((0.0, 0.0), 0.5, ()),
        ((0.25, 0.25, 0.25, 0.25), 1.0, (0, 1, 2, 3)),
    ],
)
def test_the_most_relevant_by_hand(scores: tuple[float, ...], threshold: float, wanted: tuple[int, ...]) -> None:
    assert most_relevant(tensor(*scores), threshold) == wanted


# Distinct multiples of 1/1024: sums are exact, and no two experts are equal.
distinct = st.lists(st.integers(0, 4096), min_size=1, max_size=64, unique=True).map(lambda v: tensor(*v) / 1024)
limits = st.integers(1, 1024).map(lambda n: n / 1024)


@given(distinct, limits, limits, st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_a_selection_is_minimal_monotone_and_independent_of_the_order(
    scores: torch.Tensor, p: float, q: float, draw: Any
) -> None:
    taken = most_relevant(scores, p)
    total = float(scores[list(taken)].sum())
    assert total >= p or set(taken) == {i for i, value in enumerate(scores.tolist()) if value > 0}
    if taken:
        weakest = min(float(scores[i]) for i in taken)
        assert weakest > 0 and total - weakest < p  # one fewer would not do
        assert all(float(value) < weakest for i, value in enumerate(scores) if i not in taken)
    low, high = sorted((p, q))
    assert set(most_relevant(scores, low)) <= set(most_relevant(scores, high))
    order = list(range(len(scores)))
    draw.shuffle(order)
    assert {order[i] for i in most_relevant(scores[order], p)} == set(taken)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=64))
@settings(max_examples=100, deadline=None)
def test_all_of_a_layer_is_all_that_has_weight(counts: list[int]) -> None:
    scores = ExpertScores((4,), tensor(*counts)[None], tensor(*counts)[None], 2, 1, 1)
    found = select_experts(scores, "token", 1.0, "layer")
    if sum(counts):
        assert found == {4: tuple(i for i, count in enumerate(counts) if count)}


def example() -> ExpertScores:
    gate = torch.stack([tensor(0.04, 0.2, 0.06, 0.1), tensor(0.3, 0.02, 0.04, 0.04)])  # sums 0.4, as of a real router
    token = torch.stack([tensor(0.1, 0.4, 0.2, 0.3), tensor(0.15, 0.55, 0.2, 0.1)])
    return ExpertScores((1, 2), gate, token, 2, 32, 131072)


def test_thresholds_apply_within_each_layer() -> None:
    scores = example()
    assert select_experts(scores, "token") == {1: (1,), 2: (1,)}  # p = 0.2
    assert select_experts(scores, "token", 0.6) == {1: (1, 3), 2: (1, 2)}
    assert select_experts(scores, "gate") == {1: (1,), 2: (0,)}  # p = 0.1
    assert select_experts(scores, "gate", 0.25, "none") == {1: (1, 3), 2: (0,)}
    assert select_experts(scores, "gate", 0.25) == {1: (1,), 2: (0,)}  # 0.2 / 0.4 is enough
    # Across layers (the released script's slip) expert 1 of layer 1 has 0.2 / 0.22, expert 0 of layer 2 0.3 / 0.34.
    assert select_experts(scores, "gate", 0.8, "layer") == {1: (1, 2, 3), 2: (0, 2)}
    more = dataclasses.replace(scores, gate=scores.gate * 2)
    assert select_experts(more, "gate", 0.8, "layer") == select_experts(scores, "gate", 0.8, "layer")
    for threshold in (0, -1, 1.01, float("nan")):
        with pytest.raises(TrainingError, match="threshold"):
            select_experts(scores, "gate", threshold)


# -- files ---------------------------------------------------------------------------------------------------------


def test_files_of_scores_come_back_as_they_were(tmp_path: Path) -> None:
    file = ScoreFile(example(), "hf:some/base", "0123456789abcdef", {"file": "t.csv", "sha256": "00"})
    write_scores(tmp_path / "new" / "scores.json", file)
    back = read_scores(tmp_path / "new" / "scores.json")
    assert torch.equal(back.scores.gate, file.scores.gate) and torch.equal(back.scores.token, file.scores.token)
    assert back.scores.layers == (1, 2) and (back.base, back.fingerprint) == (file.base, file.fingerprint)
    assert (back.data, back.scores.tokens) == (file.data, 131072)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["scores.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(format="other"), "no file of expert scores"),
        (lambda raw: raw.pop("top_k"), "damaged"),
        (lambda raw: raw["layers"]["1"]["gate"].pop(), "damaged"),
        (lambda raw: raw["layers"]["1"].update(token=[0.1, -0.1, 0.5, 0.5]), "negative"),
        (lambda raw: raw["layers"].clear(), "damaged"),
        (lambda raw: raw.update(layers=[1]), "damaged"),
        (lambda raw: raw.update(top_k=math.inf), "damaged"),
        (lambda raw: raw["layers"]["1"]["gate"].__setitem__(0, 10**400), "damaged"),
        (lambda raw: raw["layers"].update({"01": raw["layers"]["1"]}), "'01' is no number of a layer"),
        (lambda raw: raw["layers"].update({"-1": raw["layers"]["1"]}), "'-1' is no number of a layer"),
    ],
)
def test_a_damaged_file_of_scores_is_told(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "scores.json"
    write_scores(path, ScoreFile(example(), "b", "f", {}))
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(TrainingError, match=message):
        read_scores(path)
    for text in ("{", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(TrainingError, match="no JSON"):
            read_scores(path)
        with pytest.raises(TrainingError, match="no JSON"):
            read_selection(path, {2: 8})
    path.unlink()
    with pytest.raises(TrainingError, match="signalbox esft score"):
        read_scores(path)


def test_the_configuration_is_the_released_one(tmp_path: Path) -> None:
    path = tmp_path / "expert_cfg.json"
    write_selection(path, {12: (3, 1), 2: (7,), 3: ()})
    assert json.loads(path.read_text()) == {
        "experts": {"2": [7], "12": [1, 3]},
        "shared_experts": False,
        "non_expert_modules": False,
    }
    assert read_selection(path, {2: 8, 3: 8, 12: 8}) == {2: (7,), 12: (1, 3)}
    with pytest.raises(TrainingError, match="layer 2 of the base has 7 routed experts"):
        read_selection(path, {2: 7, 12: 8})
    with pytest.raises(TrainingError, match="no expert is selected"):
        write_selection(path, {1: ()})
    for layer in ("02", "-1", "9" * 5000, "two"):
        path.write_text(json.dumps({"experts": {"2": [7], layer: [1]}}))
        with pytest.raises(TrainingError, match="is no number of a layer"):
            read_selection(path, {2: 8})
    path.write_text(json.dumps({"experts": {"2": [7]}, "shared_experts": True}))
    with pytest.raises(TrainingError, match="shared experts"):
        read_selection(path, {2: 8})
