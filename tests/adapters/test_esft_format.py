"""ESFT adapters: whole retrained experts, read one tensor at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from signalbox.adapters.base import AdapterError, Limits
from signalbox.adapters.base_shape import base_shape
from signalbox.adapters.esft_format import EsftAdapter, read_esft_facts
from signalbox.adapters.validate import validate
from tests.adapters.folders import ESFT_EXPERTS, esft_tensors, write_esft


def test_facts(moe_base: Path, root: Path, limits: Limits) -> None:
    folder = write_esft(root / "adapter", esft_tensors(moe_base))
    facts = validate(folder, base_shape(moe_base), limits)
    assert facts == read_esft_facts(folder, base_shape(moe_base), limits)
    assert (facts.kind, facts.rank, facts.path) == ("esft", 0, str(folder))
    assert facts.modules == ("1.0", "1.5", "2.3")
    assert facts.parameters == 3 * 3 * 8 * 16 and facts.nbytes == 2 * facts.parameters


def test_tensors_are_read_when_asked_for(moe_base: Path, root: Path, limits: Limits) -> None:
    tensors = esft_tensors(moe_base)
    with EsftAdapter(write_esft(root / "adapter", tensors), base_shape(moe_base), limits) as adapter:
        assert adapter.experts == {1: (0, 5), 2: (3,)}
        for layer, ids in adapter.experts.items():
            for expert in ids:
                read = adapter.expert(layer, expert)
                assert list(read) == ["gate_proj", "up_proj", "down_proj"]
                for projection, tensor in read.items():
                    key = f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"
                    assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, tensors[key])
        with pytest.raises(KeyError):
            adapter.expert(1, 1)


def test_hash_is_of_the_content(moe_base: Path, root: Path, limits: Limits) -> None:
    shape, tensors = base_shape(moe_base), esft_tensors(moe_base)
    first = validate(write_esft(root / "a", tensors), shape, limits).content_hash
    for name, folder in {
        "other shards": write_esft(root / "b", tensors, shards=5),
        "first release's keys": write_esft(root / "c", esft_tensors(moe_base, prefix="")),
        "another order": write_esft(root / "d", dict(reversed(tensors.items())), {"experts": {"2": [3], "1": [5, 0]}}),
    }.items():
        assert validate(folder, shape, limits).content_hash == first, name
    assert validate(write_esft(root / "e", esft_tensors(moe_base, seed=1)), shape, limits).content_hash != first


def test_one_file_without_an_index(moe_base: Path, root: Path, limits: Limits) -> None:
    tensors = esft_tensors(moe_base)
    folder = write_esft(root / "adapter", tensors, shards=1)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model-00001-of-00001.safetensors").rename(folder / "model.safetensors")
    assert validate(folder, base_shape(moe_base), limits).modules == ("1.0", "1.5", "2.3")


def test_layers_without_experts_may_be_named(moe_base: Path, root: Path, limits: Limits) -> None:
    tensors = {key: tensor for key, tensor in esft_tensors(moe_base).items() if ".layers.1." in key}
    folder = write_esft(root / "adapter", tensors, {"experts": {"1": ESFT_EXPERTS["1"], "2": []}})
    assert validate(folder, base_shape(moe_base), limits).modules == ("1.0", "1.5")


def test_a_file_that_changes_after_the_check(moe_base: Path, root: Path, limits: Limits) -> None:
    """Gigabytes are read long after the headers: what came into the values meanwhile is found then."""
    folder = write_esft(root / "adapter", esft_tensors(moe_base), shards=1)
    with EsftAdapter(folder, base_shape(moe_base), limits) as adapter:
        file = folder / "model-00001-of-00001.safetensors"
        data = bytearray(file.read_bytes())
        data[-2 * 8 * 16 * 9 :] = b"\xff" * (2 * 8 * 16 * 9)
        with file.open("r+b") as opened:  # the same inode
            opened.write(data)
        with pytest.raises(AdapterError) as caught:
            adapter.expert(1, 5)
        assert caught.value.code == "not_finite"
        with file.open("r+b") as opened:
            opened.truncate(1000)
        with pytest.raises(AdapterError, match="shorter"):
            adapter.expert(2, 3)
