"""Every adapter of the table is refused, with its reason, in bounded time and without a descriptor left open."""

from __future__ import annotations

import dataclasses
import os
import pickle
import time
from pathlib import Path

import pytest

from signalbox.adapters.base import AdapterError, Limits
from signalbox.adapters.base_shape import base_shape
from signalbox.adapters.validate import validate
from tests.adapters.broken import BROKEN
from tests.adapters.folders import esft_tensors, make_lora, write_esft


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def test_the_table_is_long_enough() -> None:
    assert len(BROKEN) >= 40


def test_the_valid_ones_that_the_table_breaks(base: Path, moe_base: Path, root: Path, limits: Limits) -> None:
    assert validate(make_lora(root / "lora", base), base_shape(base), limits).rank == 4
    assert validate(write_esft(root / "esft", esft_tensors(moe_base)), base_shape(moe_base), limits).kind == "esft"


@pytest.mark.parametrize("name", BROKEN)
def test_refused_with_its_reason(name: str, base: Path, moe_base: Path, root: Path, limits: Limits) -> None:
    broken = BROKEN[name]
    chosen = moe_base if broken.moe else base
    path, shape = broken.build(chosen, root / "adapter"), base_shape(chosen)
    before, started = descriptors(), time.monotonic()
    with pytest.raises(AdapterError) as caught:
        validate(path, shape, limits)
    error = caught.value
    assert (error.code, error.tensor) == (broken.code, broken.tensor), error.message
    assert broken.mentions in error.message
    assert len(error.message) < 1000 and error.message.isprintable(), "fit for a log line and an HTTP reply"
    assert time.monotonic() - started < 5
    assert descriptors() == before
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.message, copy.code, copy.tensor) == (error.message, error.code, error.tensor)


def test_a_kind_that_the_engine_does_not_serve(moe_base: Path, root: Path, limits: Limits) -> None:
    folder = write_esft(root / "esft", esft_tensors(moe_base))
    with pytest.raises(AdapterError, match=r"of kind 'esft'.* takes lora.* needs engine: vllm") as caught:
        validate(folder, base_shape(moe_base), dataclasses.replace(limits, kinds=("lora",)))
    assert (caught.value.code, caught.value.tensor) == ("unsupported_kind", "expert_cfg.json")
