"""Adapters inside a model: a batch of several against each one merged into plain transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from signalbox.adapters.base import AdapterError, AdapterFacts, Limits, LoraAdapter, LoraModule
from signalbox.adapters.base_shape import base_shape
from signalbox.adapters.layers import LoraLayers
from signalbox.adapters.peft_format import read_lora
from tests.adapters.folders import ATTENTION, lora_config, lora_tensors, write_lora
from tests.tiny_models import save_tiny

MLP = ("gate_proj", "up_proj", "down_proj")
ALL = (*ATTENTION, *MLP)
# Different ranks, scalings and targets: only query and value; all linears; rsLoRA; the output layer too.
KINDS: dict[str, tuple[int, tuple[str, ...], bool]] = {
    "few": (4, ("q_proj", "v_proj"), False),
    "all": (8, ALL, False),
    "rs": (16, ALL, True),
    "output": (3, (*MLP, "lm_head"), False),
}
IDS = torch.arange(1, 41)


def make(folder: Path, base: Path, kind: str, *, scale: float = 0.2) -> Path:
    rank, targets, rslora = KINDS[kind]
    tensors = lora_tensors(base, targets=targets, rank=rank, seed=len(kind), scale=scale)
    return write_lora(folder, tensors, lora_config(r=rank, target_modules=list(targets), use_rslora=rslora))


def plain(base: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).requires_grad_(False)


def merged(base: Path, folder: Path, kind: str) -> torch.nn.Module:
    """Plain transformers with W + scaling * B A in place of W, from the files, by none of our code."""
    rank, _, rslora = KINDS[kind]
    model, tensors = plain(base), load_file(folder / "adapter_model.safetensors")
    model.get_output_embeddings().weight = torch.nn.Parameter(model.get_output_embeddings().weight.clone())
    for key in tensors:
        if key.endswith("lora_A.weight"):
            linear = model.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            product = tensors[key.replace("lora_A", "lora_B")].float() @ tensors[key].float()
            linear.weight.data += 8 / (rank**0.5 if rslora else rank) * product
    return model


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def base_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("layers") / request.param, request.param)


def read(folder: Path, layers: LoraLayers) -> LoraAdapter:
    return read_lora(folder, layers.shape, Limits(roots=(folder.parent,), max_rank=layers.max_rank))


def test_each_row_has_the_logits_of_its_merged_model(base_folder: Path, tmp_path: Path) -> None:
    model = plain(base_folder)
    layers = LoraLayers(model, slots=6, max_rank=16)
    folders = {kind: make(tmp_path / kind, base_folder, kind) for kind in KINDS}
    slot_of = {"base": -1}
    for slot, kind in zip((5, 0, 3, 2), KINDS, strict=True):
        layers.load(slot, read(folders[kind], layers))
        slot_of[kind] = slot
    # Four prompts of eleven tokens for each, side by side; a linear sees all their rows as one packed batch.
    order = [kind for kind in ("base", "few", "all", "rs", "output") for _ in range(4)]
    ids = torch.stack([IDS.roll(7 * i)[:11] for i in range(len(order))])
    slots = [slot_of[kind] for kind in order for _ in range(11)]
    with layers.step(slots, list(range(len(slots)))):
        together = model(ids).logits
    references = {kind: merged(base_folder, folders[kind], kind) for kind in KINDS} | {"base": plain(base_folder)}
    for i, kind in enumerate(order):
        alone = references[kind](ids[i : i + 1]).logits[0]
        torch.testing.assert_close(together[i], alone, rtol=0, atol=1e-4)
        if kind != "base":
            assert (together[i] - references["base"](ids[i : i + 1]).logits[0]).abs().max() > 0.1
    assert torch.equal(model(ids).logits, references["base"](ids).logits)  # without `step` it is the base again


def test_the_output_layer_takes_the_kept_rows(base_folder: Path, tmp_path: Path) -> None:
    model = plain(base_folder)
    layers = LoraLayers(model, slots=2, max_rank=16)
    folder = make(tmp_path / "output", base_folder, "output")
    layers.load(1, read(folder, layers))
    reference = merged(base_folder, folder, "output")
    ids = torch.stack([IDS[:9], IDS[9:18], IDS[18:27]])
    # One prompt a row of the model's batch, of which the last two positions are kept.
    slots = [1] * 9 + [-1] * 9 + [1] * 9
    keep = [7, 8, 16, 17, 25, 26]
    with layers.step(slots, keep):
        kept = model(ids, logits_to_keep=torch.tensor([7, 8])).logits
    for i, expected in enumerate((reference, plain(base_folder), reference)):
        torch.testing.assert_close(kept[i], expected(ids[i : i + 1]).logits[0, 7:], rtol=0, atol=1e-4)


def test_a_slot_that_is_used_again_answers_by_the_new_adapter(base_folder: Path, tmp_path: Path) -> None:
    model = plain(base_folder)
    layers = LoraLayers(model, slots=1, max_rank=16)
    for kind in ("rs", "few", "output"):
        folder = make(tmp_path / kind, base_folder, kind)
        layers.load(0, read(folder, layers))
        with layers.step([0] * 10, list(range(10))):
            logits = model(IDS[None, :10]).logits
        torch.testing.assert_close(logits, merged(base_folder, folder, kind)(IDS[None, :10]).logits, rtol=0, atol=1e-4)


def test_shape_is_that_of_the_configuration(base_folder: Path) -> None:
    layers = LoraLayers(plain(base_folder), slots=2, max_rank=4)
    assert layers.shape.linears == base_shape(base_folder).linears
    columns = sum(out + inside for out, inside in layers.shape.linears.values())
    assert layers.nbytes == 2 * 4 * columns * 4


def adapter(name: str, module: LoraModule) -> LoraAdapter:
    facts = AdapterFacts("lora", "", "", module.rank, 0, (name,), 0)
    return LoraAdapter(facts, {name: module})


@pytest.mark.parametrize(
    ("name", "module", "code"),
    [
        ("model.layers.9.mlp.up_proj", LoraModule(torch.zeros(2, 32), torch.zeros(64, 2), 1.0), "unknown_module"),
        ("model.layers.0.mlp.up_proj", LoraModule(torch.zeros(2, 31), torch.zeros(64, 2), 1.0), "shape_mismatch"),
        ("model.layers.0.mlp.up_proj", LoraModule(torch.zeros(5, 32), torch.zeros(64, 5), 1.0), "rank_too_high"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(base_folder: Path, name: str, module: LoraModule, code: str) -> None:
    layers = LoraLayers(plain(base_folder), slots=2, max_rank=4)
    with pytest.raises(AdapterError) as caught:
        layers.load(0, adapter(name, module))
    assert caught.value.code == code and caught.value.tensor == name
