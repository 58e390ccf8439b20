"""Training of selected experts: nothing else moves, what is written is what was trained, and it is worth something."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from signalbox.adapters import esft_train, esft_write
from signalbox.adapters.base import AdapterError, Limits
from signalbox.adapters.base_shape import base_shape
from signalbox.adapters.esft_format import EsftAdapter
from signalbox.adapters.esft_train import PAPER, TunedExperts, applied, attach_experts, detach_experts, tuned_weights
from signalbox.adapters.esft_write import write_esft
from signalbox.adapters.train import Fit, Optimisation, fit, mean_loss
from signalbox.adapters.train_data import Codec, Encoded, Example, TrainingError, encode
from signalbox.serving.training import Base, codec_of, load_base
from tests.moe_models import FAMILIES, Family, merge, save_tiny_moe

CPU = torch.device("cpu")
COLOURS = ("red", "green", "blue")
INPUT = torch.tensor([[5, 9, 200, 17, 17, 42, 3, 77, 78, 79, 80, 81]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Family, Path]:
    root = tmp_path_factory.mktemp("moe")
    return {family: save_tiny_moe(root / family, family) for family in FAMILIES}


def load(folder: Path) -> Any:
    return load_base(Base(folder, str(folder)), CPU, torch.float32)


def rows_of_colours(codec: Codec, count: int, seed: int = 0) -> list[Encoded]:
    draw = random.Random(seed)
    examples = [Example(f"{COLOURS[i % 3]} box {draw.randrange(10**4)}", f"is {COLOURS[i % 3]}") for i in range(count)]
    return encode(examples, codec, 512)


def trained(folder: Path, experts: dict[int, list[int]], **options: Any) -> tuple[Any, dict[int, TunedExperts], Fit]:
    codec = codec_of(Base(folder, str(folder)))
    rows = rows_of_colours(codec, 96)
    model = load(folder)
    tuned = attach_experts(model, experts)
    chosen = Optimisation(**({"rate": 3e-3, "steps": 8, "batch": 8, "weight_decay": 0.1} | options))
    return model, tuned, fit(model, rows[:80], rows[80:], chosen, codec)


def selection(family: Family) -> dict[int, list[int]]:
    """Most of the experts, so that every step meets them; layers may differ."""
    first = 1 if family == "deepseek_v2" else 0
    return {first: [0, 3, 4, 5, 9, 10, 11, 15], first + 2: list(range(2, 14))}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_module_that_trains_computes_what_the_familys_does(folders: dict[Family, Path], family: Family) -> None:
    model = load(folders[family])
    with torch.no_grad():
        wanted = model(INPUT).logits
        tuned = attach_experts(model, selection(family))
        torch.testing.assert_close(model(INPUT).logits, wanted, rtol=1e-5, atol=1e-4)
        detach_experts(model, tuned)
        assert torch.equal(model(INPUT).logits, wanted)


def test_gradients_are_those_of_the_whole_weights(folders: dict[Family, Path]) -> None:
    """Against autograd over the fused tensor of all experts, at the selected ones."""
    whole = load(folders["olmoe"])
    experts = whole.model.layers[1].mlp.experts
    experts.requires_grad_(True)
    whole(INPUT, labels=INPUT).loss.backward()
    model = load(folders["olmoe"])
    tuned = attach_experts(model, {1: list(range(0, 16, 2))})[1]
    model(INPUT, labels=INPUT).loss.backward()
    met = 0
    for n, i in enumerate(tuned.ids):
        for ours, theirs in (
            (tuned.gate_up[n], experts.gate_up_proj.grad[i]),
            (tuned.down[n], experts.down_proj.grad[i]),
        ):
            if ours.grad is None:  # no token chose it
                assert not theirs.any()
                continue
            met += 1
            torch.testing.assert_close(ours.grad, theirs, rtol=1e-4, atol=1e-6)
    assert met >= 4
    assert [p.grad for name, p in model.named_parameters() if not p.requires_grad] == [None] * sum(
        not p.requires_grad for p in model.parameters()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_but_the_selected_experts_moves(folders: dict[Family, Path], family: Family, tmp_path: Path) -> None:
    experts = selection(family)
    before = {name: tensor.clone() for name, tensor in load(folders[family]).state_dict().items()}
    model, tuned, fitted = trained(folders[family], experts)
    assert fitted.steps == 8 and not model.training
    moved = {(layer, i) for layer, ids in experts.items() for i in ids if _differs(tuned[layer], before, layer, i)}
    assert len(moved) >= 10
    # Only the selected experts have parameters to train, gradients and an optimiser's state.
    elements = sum(p.numel() for p in model.parameters() if p.requires_grad)
    linears = base_shape(folders[family]).expert_linears
    assert elements == sum(map(len, experts.values())) * sum(rows * columns for rows, columns in linears.values())
    detach_experts(model, tuned)
    after = model.state_dict()
    assert after.keys() == before.keys() and any("gate.weight" in name for name in after)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def _differs(tuned: TunedExperts, before: dict[str, torch.Tensor], layer: int, i: int) -> bool:
    return not torch.equal(
        tuned.gate_up[tuned.ids.index(i)], before[f"model.layers.{layer}.mlp.experts.gate_up_proj"][i]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_what_was_trained(folders: dict[Family, Path], family: Family, tmp_path: Path) -> None:
    """Merged by another program, and put into the base by ours: the trained model's answers."""
    base, out = folders[family], tmp_path / "adapter"
    model, tuned, _ = trained(base, selection(family))

    def weights(layer: int, expert: int) -> dict[str, torch.Tensor]:
        return tuned_weights(tuned, layer, expert)

    experts = selection(family)
    facts = write_esft(out, experts, weights, base_shape(base), dtype=torch.float32, shard_bytes=60_000)
    names = sorted(path.name for path in out.iterdir())
    shards = len(names) - 2
    files = [f"model-{n:05}-of-{shards:05}.safetensors" for n in range(1, shards + 1)]
    assert shards > 2 and names == ["expert_cfg.json", *files, "model.safetensors.index.json"]
    assert all((out / name).stat().st_size < 70_000 for name in names)
    config = json.loads((out / "expert_cfg.json").read_text())
    assert config["experts"] == {str(layer): ids for layer, ids in experts.items()}
    assert (config["shared_experts"], config["non_expert_modules"]) == (False, False)
    assert facts.kind == "esft" and facts.nbytes == 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        wanted = model(INPUT).logits
        merged = load(merge(base, out, tmp_path / "merged"))
        torch.testing.assert_close(merged(INPUT).logits, wanted, rtol=1e-5, atol=1e-4)
        plain = load(base)
        untouched = plain(INPUT).logits
        assert float((wanted - untouched).abs().max()) > 0.1
        with EsftAdapter(out, base_shape(base), Limits((tmp_path,))) as adapter, applied(plain, adapter):
            assert torch.equal(plain(INPUT).logits, merged(INPUT).logits)
        assert torch.equal(plain(INPUT).logits, untouched)


def test_training_lowers_the_loss_and_keeps_the_best(folders: dict[Family, Path]) -> None:
    base = folders["qwen3_moe"]
    codec = codec_of(Base(base, ""))
    unseen, validation = rows_of_colours(codec, 24, seed=7), rows_of_colours(codec, 96)[80:]
    before = mean_loss(load(base), unseen, codec)
    model, _, fitted = trained(base, {layer: list(range(16)) for layer in range(3)}, steps=40, batch=16)
    assert mean_loss(model, unseen, codec) < 0.1 * before
    assert mean_loss(model, validation, codec) == pytest.approx(fitted.best, rel=1e-3)
    assert fitted.best == min(m.validation for m in fitted.history if m.validation is not None)


def test_the_papers_options(folders: dict[Family, Path]) -> None:
    assert (PAPER.rate, PAPER.weight_decay, PAPER.betas, PAPER.batch) == (1e-5, 0.1, (0.9, 0.95), 32)
    _, _, fitted = trained(folders["olmoe"], {0: [1, 2, 3]}, schedule="constant", warmup=0.0, rate=1e-4)
    assert {moment.rate for moment in fitted.history} == {1e-4}


def test_small_steps_are_not_lost_in_bfloat16(folders: dict[Family, Path]) -> None:
    """A step of 1e-5 on a weight of 0.15, whose neighbours in bfloat16 are 1e-3 away."""
    model = load_base(Base(folders["olmoe"], ""), CPU, torch.bfloat16)
    tuned = attach_experts(model, {1: list(range(16))})[1]
    start = [p.detach().clone() for p in tuned.down]
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.0)
    for _ in range(3):
        model(INPUT, labels=INPUT).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    moved = max(float((p.detach() - old).abs().max()) for p, old in zip(tuned.down, start, strict=True))
    assert 1e-5 < moved < 1e-4 and tuned.down[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({7: [0]}, "layer 7 of the base has 0 routed experts"),
        ({0: [16]}, r"layer 0 of the base has 16 routed experts; \[16\]"),
        ({0: [-1, 2]}, "16 routed experts"),
        ({0: []}, "no expert is selected"),
    ],
)
def test_experts_that_are_not_there_are_refused(
    folders: dict[Family, Path], experts: dict[int, list[int]], message: str
) -> None:
    model = load(folders["olmoe"])
    with pytest.raises(TrainingError, match=message):
        attach_experts(model, experts)
    assert not any(isinstance(module, TunedExperts) for module in model.modules())


def test_an_adapter_is_there_whole_or_not_at_all(
    folders: dict[Family, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(folders["olmoe"])
    tuned = attach_experts(model, {0: [1, 2], 2: [3]})
    shape = base_shape(folders["olmoe"])
    out = tmp_path / "adapters" / "mine"

    def weights(layer: int, expert: int) -> dict[str, torch.Tensor]:
        found = tuned_weights(tuned, layer, expert)
        if (layer, expert) == fails:
            raise OSError(28, "No space left on device")  # injected
        return found

    fails = (2, 3)
    with pytest.raises(OSError, match="No space left"):
        write_esft(out, {0: [1, 2], 2: [3]}, weights, shape, shard_bytes=1)
    assert list(out.parent.iterdir()) == []
    fails = (-1, -1)
    tuned[0].down[0].data[0, 0] = float("inf")
    with pytest.raises(AdapterError, match="finite"):  # our own reader refuses it
        write_esft(out, {0: [1, 2], 2: [3]}, weights, shape)
    assert list(out.parent.iterdir()) == []
    tuned[0].down[0].data[0, 0] = 0.0
    out.mkdir()  # empty: as good as none
    write_esft(out, {0: [1, 2], 2: [3]}, weights, shape)
    assert [path.name for path in out.parent.iterdir()] == ["mine"]
    with safe_open(out / "model-00001-of-00001.safetensors", "pt") as file:
        stored = file.get_tensor("model.layers.2.mlp.experts.3.gate_proj.weight")
        assert len(list(file.keys())) == 9 and stored.dtype == torch.bfloat16
        assert torch.equal(stored, model.model.layers[2].mlp.experts.experts.gate_up_proj[3, :32].bfloat16())
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 9 * 32 * 64 * 2 and len(index["weight_map"]) == 9
    with pytest.raises(TrainingError, match="is there already"):
        write_esft(out, {0: [1, 2], 2: [3]}, weights, shape)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "later")
    for _ in range(2):  # to nothing, and to an empty folder
        write_esft(link, {0: [1]}, weights, shape)
        assert link.is_symlink() and len(list((tmp_path / "later").iterdir())) == 3
        for file in (tmp_path / "later").iterdir():
            file.unlink()
    monkeypatch.chdir(tmp_path / "later")
    for folder in (Path(), Path("/proc")):
        with pytest.raises(TrainingError, match=r"in use|is there already"):
            esft_write.check_free(folder)
    assert esft_write.SHARD_BYTES < 1 << 32 and esft_train.PAPER.dropout == 0
