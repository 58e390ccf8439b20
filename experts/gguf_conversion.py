"""One-time conversion of a GGUF file into a folder of bf16 safetensors, by transformers' own GGUF loader."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Progress = Callable[[str, float], None]
"""Called with the name of the stage and the fraction of it that is done, from 0 to 1."""

# Elements dequantised in one numpy call. `gguf` itself takes 16 rows, mostly interpreter overhead on narrow rows.
_SLAB = 1 << 18
_converting = threading.Lock()  # the instrumentation below is process-wide


def convert(source: Path, target: Path, progress: Progress) -> dict[str, Any]:
    """Dequantise the GGUF file `source` into the existing empty folder `target`.

    `target` gets config.json, generation_config.json, model.safetensors (bf16), tokenizer.json,
    tokenizer_config.json and, where the file has one, chat_template.jinja. Returns the scalar entries of the
    file's `general.*` metadata without that prefix (name, license, ...). Raises ValueError on a file that is
    no GGUF, that transformers does not know, or that lacks weights of its architecture.
    """
    progress("loading libraries", 0.0)
    import torch
    import transformers
    from transformers.utils import logging

    # In a folder of its own, so that no neighbouring config.json is taken for this file's.
    inbox = target / ".source"
    inbox.mkdir()
    (inbox / "model.gguf").symlink_to(source.resolve())

    progress("reading", 0.0)
    reader = _open(inbox / "model.gguf")
    metadata = {name: field.contents() for name, field in reader.fields.items() if len(field.data) == 1}
    progress("reading", 1.0)
    with _converting, _instrumented(reader, inbox / "model.gguf", progress), _quiet(logging):
        progress("tokenizer", 0.0)
        tokenizer = _tokenizer(inbox, metadata)
        tokenizer.save_pretrained(target)
        progress("tokenizer", 1.0)
        progress("building", 0.0)
        loader: Any = transformers.AutoModelForCausalLM
        model, info = loader.from_pretrained(
            inbox,
            gguf_file="model.gguf",
            dtype=torch.bfloat16,
            quantization_config=transformers.GgufConfig(dequantize=True),
            local_files_only=True,
            output_loading_info=True,
        )
        # transformers fills missing weights with random numbers and only warns.
        if info["missing_keys"] or info["mismatched_keys"]:
            missing = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
            raise ValueError(f"the file lacks weights of its architecture: {', '.join(missing[:5])}")
        # It is a plain dense model from here on; left in place, these refuse to be saved.
        model.hf_quantizer = None
        model.is_quantized = False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        progress("saving", 0.0)
        model.save_pretrained(target)
        progress("saving", 1.0)

    (inbox / "model.gguf").unlink()
    inbox.rmdir()
    return {key.removeprefix("general."): value for key, value in metadata.items() if key.startswith("general.")}


def _tokenizer(folder: Path, metadata: dict[str, Any]) -> Any:
    """The file's tokenizer, with two things that transformers does not read from the metadata.

    Measured in nats on one paragraph with a list: without its BOS token Gemma's loss is 403 instead of 182,
    and without the digit rule SmolLM2's is 235 instead of 209.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    # llama.cpp's default where the key is absent: sentencepiece vocabularies ("llama") begin with BOS.
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", metadata.get("tokenizer.ggml.model") == "llama")
    tokenizer = AutoTokenizer.from_pretrained(
        folder,
        gguf_file="model.gguf",
        local_files_only=True,
        add_bos_token=bool(add_bos),
        add_eos_token=bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
    )
    if metadata.get("tokenizer.ggml.pre") == "smollm":  # llama.cpp, LLAMA_VOCAB_PRE_TYPE_SMOLLM: \p{N}, then GPT-2's
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return tokenizer


def _open(path: Path) -> Any:
    """A `gguf.GGUFReader` over a plain array: slicing a memmap costs several times as much, millions of times."""
    import gguf

    class ArrayReader(gguf.GGUFReader):
        @property  # type: ignore[override]
        def data(self) -> NDArray[np.uint8]:
            return self._array

        @data.setter
        def data(self, mapped: NDArray[np.uint8]) -> None:
            self._array = mapped.view(np.ndarray)

    return ArrayReader(path)


@contextmanager
def _instrumented(reader: Any, path: Path, progress: Progress) -> Iterator[None]:
    """Make `gguf` quick for the time of one conversion, and report the elements dequantised.

    The file's metadata is parsed once rather than three times, and dequantising takes large slabs (Gemma 3
    270M: 60 s become 21 s). transformers looks both names up in `gguf` at each use. Should it stop doing so, a
    conversion is slower and its progress coarser, but not wrong: the results are equal bit for bit.
    """
    import gguf

    original_reader, original_dequantize = gguf.GGUFReader, gguf.dequantize
    plain = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
    total = max(1, sum(int(tensor.n_elements) for tensor in reader.tensors))
    done = 0

    def open_once(other: Any, mode: Any = "r") -> Any:
        return reader if Path(other) == path and mode == "r" else original_reader(other, mode)

    def dequantize(data: NDArray[Any], kind: Any) -> NDArray[np.float32]:
        """[..., bytes of a row] of blocks of type `kind` -> float32 [..., elements of a row]."""
        nonlocal done
        if kind in plain:
            done += data.size
            progress("dequantising", min(1.0, done / total))
            return original_dequantize(data, kind)
        shape = gguf.quant_shape_from_byte_shape(data.shape, kind)
        rows = data.reshape(-1, data.shape[-1])
        values = np.empty((len(rows), shape[-1]), np.float32)
        step = max(1, _SLAB // shape[-1])
        for start in range(0, len(rows), step):
            slab = rows[start : start + step]
            # A row is a whole number of blocks, so many rows may be given as one long row.
            values[start : start + step] = original_dequantize(slab.reshape(1, -1), kind).reshape(len(slab), -1)
            done += len(slab) * shape[-1]
            progress("dequantising", min(1.0, done / total))
        return values.reshape(shape)

    with _swapped(gguf, "GGUFReader", open_once), _swapped(gguf, "dequantize", dequantize):
        yield


@contextmanager
def _swapped(module: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """No progress bars of transformers: the caller draws its own."""
    from transformers import modeling_gguf_pytorch_utils as loader

    shown = logging.is_progress_bar_enabled()
    verbosity = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with ExitStack() as stack:
            if hasattr(loader, "tqdm"):
                stack.enter_context(_swapped(loader, "tqdm", partial(loader.tqdm, disable=True)))
            yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
