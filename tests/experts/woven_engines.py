"""Engines of tiny mixtures of experts with ESFT adapters, and what each of their models answers by itself."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from signalbox.experts.base import (
    GenerateRequest,
    SamplingParams,
)
from signalbox.experts.catalog import VllmExpert
from signalbox.experts.engines import build_engine
from tests.moe_models import (
    Family,
    merge,
    save_esft_adapters,
    save_tiny_moe,
)

GPUS = int(os.environ.get("SIGNALBOX_TEST_GPUS", "0"))  # to run the engines on
if GPUS:  # or Triton's products of float32 round to ten bits, and a router's close choices fall otherwise
    os.environ["TRITON_F32_DEFAULT"] = "ieee"
TOLERANCE = 2e-3 if GPUS else 2e-4  # of a log-probability
LATENT = {"dtype": "bfloat16"} if GPUS else {}  # what vLLM's kernels for latent attention take on a GPU
ADAPTERS = 8
PROMPTS = ["the fox", "one two three", "a signal box sets the points", "seven six five four three two one"]
TOKENS = 16
ESFT = {"experts_per_layer": 6}


class Answer(NamedTuple):
    """Tokens and their log-probabilities."""

    tokens: list[int]
    logprobs: list[float]


class Woven(NamedTuple):
    """A base with its adapters' folders, and an engine that has loaded none of them."""

    base: Path
    adapters: list[Path]
    merged: list[Path]
    engine: Any

    @property
    def folders(self) -> dict[str | None, Path]:
        """The model that a row must be answered as, by the name of its adapter; None for the base."""
        return {None: self.base} | {f"esft-{i}@1": path for i, path in enumerate(self.merged)}

    async def load(self, *numbers: int) -> None:
        for i in numbers or range(len(self.adapters)):
            await self.engine.load(f"esft-{i}@1", str(self.adapters[i]))

    async def rows(self) -> int:
        """Rows of adapters that are in use, over all layers."""
        (memory,) = await self.engine._core.workers("expertweave_memory")
        return int(memory["rows"])


def make(model: Path, **changes: object) -> Any:
    settings: dict[str, object] = {"engine": "vllm", "model": str(model), "dtype": "float32", "max_running": 64}
    settings |= {"gpus": min(GPUS, 1), "enforce_eager": not GPUS} | changes
    if GPUS:  # of a size given ahead, so that engines can start beside each other
        own = {"kv_cache_memory_bytes": 256 << 20, "cudagraph_capture_sizes": [1, 8, 64]}
        settings |= {"gpu_memory": 0.1, "engine_args": own | dict(changes.get("engine_args", {}))}
    return build_engine("moe", VllmExpert.model_validate(settings))


def make_woven(model: Path, **changes: object) -> Any:
    return make(model, **({"max_adapters": 9, "adapter_kinds": ["esft"], "esft": ESFT} | changes))


@contextlib.asynccontextmanager
async def started(engine: Any) -> AsyncIterator[Any]:
    try:
        await engine.start()
        yield engine
    finally:
        await engine.close()


@contextlib.asynccontextmanager
async def weave(folder: Path, family: Family) -> AsyncIterator[Woven]:
    base = save_tiny_moe(folder / "base", family)
    adapters = save_esft_adapters(folder, base, ADAPTERS)
    merged = [merge(base, path, folder / f"merged-{i}") for i, path in enumerate(adapters)]
    async with started(make_woven(base)) as engine:
        yield Woven(base, adapters, merged, engine)


def ask(prompt: str, adapter: str | None = None, tokens: int = TOKENS) -> GenerateRequest:
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, logprobs=1, ignore_eos=True)
    return GenerateRequest("r", prompt=prompt, adapter=adapter, sampling=sampling)


async def answer(engine: Any, prompt: str, adapter: str | None = None, tokens: int = TOKENS) -> Answer:
    ids: list[int] = []
    logprobs: list[float] = []
    async for chunk in engine.generate(ask(prompt, adapter, tokens)):
        ids += chunk.token_ids
        logprobs += [token.logprob for token in chunk.logprobs]
    return Answer(ids, logprobs)


@lru_cache(maxsize=32)
def transformers_of(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


@lru_cache(maxsize=1024)
def alone(model: Path, prompt: str, tokens: int = TOKENS) -> Answer:
    """What a model answers by itself in transformers."""
    ids = torch.tensor([AutoTokenizer.from_pretrained(model)(prompt).input_ids])
    with torch.inference_mode():
        found = transformers_of(model).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    made = found.sequences[0, ids.shape[1] :].tolist()
    logprobs = [step[0].float().log_softmax(-1)[token].item() for step, token in zip(found.logits, made, strict=True)]
    return Answer(made, logprobs)


def agree(found: Answer, wanted: Answer, case: object) -> None:
    same = next(
        (i for i, (a, b) in enumerate(zip(*(x.tokens for x in (found, wanted)), strict=True)) if a != b), TOKENS
    )
    assert found.logprobs[: same + 1] == pytest.approx(wanted.logprobs[: same + 1], abs=TOLERANCE), case
    assert found.tokens == wanted.tokens, case
