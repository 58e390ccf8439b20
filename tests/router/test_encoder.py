from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from signalbox.experts.models import resolve
from signalbox.router.encoder import DEFAULT_ENCODER, SentenceEncoder, _batches

TEXTS = ["What is 12*7?", "", "I lost my card " * 200, "def f(x):\n    return x", "Grüße, 你好", "Tell me a story."]


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve(DEFAULT_ENCODER).path


@pytest.fixture(scope="module")
def fp32(folder: Path) -> SentenceEncoder:
    return SentenceEncoder(folder, dtype=torch.float32)


def test_it_agrees_with_transformers_one_text_at_a_time(folder: Path, fp32: SentenceEncoder) -> None:
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    found = fp32.encode(TEXTS)
    assert found.shape == (len(TEXTS), 384) and found.dtype == np.float32
    for text, vector in zip(TEXTS, found, strict=True):
        with torch.inference_mode():
            inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=256)
            mean = model(**inputs).last_hidden_state[0].mean(0)
        expected = (mean / mean.norm()).numpy()
        np.testing.assert_allclose(vector, expected, atol=2e-5)


def test_the_default_precision_is_as_good(encoder: SentenceEncoder, fp32: SentenceEncoder) -> None:
    assert (encoder.encode(TEXTS) * fp32.encode(TEXTS)).sum(1).min() > 0.999


def test_similar_texts_are_near(encoder: SentenceEncoder) -> None:
    a, b, c = encoder.encode(["I lost my bank card", "my debit card is gone", "sort a list in python"])
    assert a @ b > a @ c + 0.3


def test_batching_changes_nothing(folder: Path, fp32: SentenceEncoder) -> None:
    small = SentenceEncoder(folder, dtype=torch.float32, batch_tokens=64)
    np.testing.assert_allclose(small.encode(TEXTS), fp32.encode(TEXTS), atol=2e-5)
    batches = _batches([5, 100, 7, 3, 90], 128)
    assert sorted(i for batch in batches for i in batch) == [0, 1, 2, 3, 4]
    assert all(len(b) == 1 or len(b) * max([5, 100, 7, 3, 90][i] for i in b) <= 128 for b in batches)


def test_many_threads_get_what_one_gets(folder: Path) -> None:
    encoder = SentenceEncoder(folder)
    texts = [f"prompt number {i} about {TEXTS[i % 6][:40]}" for i in range(24)]
    alone = np.concatenate([encoder.encode([t]) for t in texts])
    encoder.clear()
    with ThreadPoolExecutor(8) as pool:
        together = np.concatenate(list(pool.map(lambda t: encoder.encode([t]), texts * 2)))
    np.testing.assert_allclose(together, np.concatenate([alone, alone]), atol=1e-6)


def test_the_cache_is_used_and_bounded(folder: Path) -> None:
    encoder = SentenceEncoder(folder, cache_size=4)
    forwards = []
    inner = encoder._forward
    encoder._forward = lambda ids: forwards.append(len(ids)) or inner(ids)  # type: ignore[method-assign,func-returns-value]
    first = encoder.encode(["a", "b", "a"])
    np.testing.assert_array_equal(first[0], first[2])
    assert sum(forwards) == 2  # the same text twice is computed once
    np.testing.assert_array_equal(encoder.encode(["b"])[0], first[1])
    assert sum(forwards) == 2
    encoder.encode(["c", "d", "e"])
    assert len(encoder._cache) == 4
    encoder.encode(["b"])  # used since: kept; "a" went
    assert sum(forwards) == 5
    encoder.encode(["a"])
    assert sum(forwards) == 6
    encoder.clear()
    assert not encoder._cache


def test_progress_counts_every_text(encoder: SentenceEncoder) -> None:
    seen: list[int] = []
    encoder.encode(["x1", "x2", "x1", "x3 is longer"], progress=seen.append)
    encoder.encode(["x1", "x4"], progress=seen.append)
    assert sum(seen) == 6


def test_nothing_and_very_much(encoder: SentenceEncoder) -> None:
    assert encoder.encode([]).shape == (0, 384)
    vector = encoder.encode(["word " * 200_000])[0]
    assert abs(np.linalg.norm(vector) - 1) < 1e-4


def test_a_folder_that_is_no_encoder_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        SentenceEncoder(tmp_path)
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    save_file({"other": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="does not hold the weights"):
        SentenceEncoder(tmp_path)
