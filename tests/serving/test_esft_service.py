"""ESFT adapters from the configuration and by the command line, at a service of its own processes, on the CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from typer.testing import CliRunner

from signalbox.experts.vllm_arguments import installed
from signalbox.serving.cli import app
from tests.moe_models import merge, save_esft_adapters, save_tiny_moe
from tests.serving.test_vllm_service import Running, serving

pytestmark = [
    pytest.mark.service,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not installed(), reason="vLLM is not installed here: make test-vllm"),
]


class Served(NamedTuple):
    """A service with the base `moe`, and the expert `merged`: adapter 1 merged into it."""

    running: Running
    adapters: list[Path]

    def cli(self, *arguments: str, code: int = 0) -> str:
        found = CliRunner().invoke(app, [*arguments, "--url", self.running.url])
        assert found.exit_code == code, (found.output, found.exception)
        return found.output

    def says(self, model: str) -> str:
        answer = self.running.chat(model=model, temperature=0, max_tokens=16)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["message"]["content"])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("esft")
    base = save_tiny_moe(folder / "moe", "qwen3_moe")
    adapters = save_esft_adapters(folder / "adapters", base, 3)
    common: dict[str, Any] = {"gpus": 0, "dtype": "float32", "enforce_eager": True, "engine": "vllm", "max_running": 8}
    woven = {"max_adapters": 3, "adapter_kinds": ["esft"], "esft": {"experts_per_layer": 5}}
    config = {
        "experts": {
            "moe": common | woven | {"model": str(base)},
            "merged": common | {"model": str(merge(base, adapters[1], folder / "merged"))},
        },
        "adapters": {"first": {"base": "moe", "path": str(adapters[0]), "pinned": True}},
        "adapter_files": {"roots": [str(folder / "adapters")]},
    }
    with serving(folder, config) as running:
        yield Served(running, adapters)


def test_an_adapters_life(served: Served) -> None:
    """Of the configuration, added, listed, asked, updated, removed."""
    served.cli("adapters", "add", "law", str(served.adapters[1]), "--base", "moe")
    listed = {entry["name"]: entry for entry in json.loads(served.cli("adapters", "list", "--json"))["data"]}
    assert {name: (entry["kind"], entry["phase"]) for name, entry in listed.items()} == {
        "first": ("esft", "ready"),
        "law": ("esft", "ready"),
    }
    assert "esft" in served.cli("adapters", "list") and "esft" in served.cli("adapters", "show", "law")
    models = {entry["id"]: entry for entry in httpx.get(f"{served.running.url}/v1/models").json()["data"]}
    law = models["moe:law"]
    assert law["parent"] == "moe" and law["signalbox"]["kind"] == "esft" and law["signalbox"]["version"] == 1
    answers = {model: served.says(model) for model in ("moe", "law", "first", "merged")}
    assert answers["law"] == answers["merged"] and len(set(answers.values())) == 3
    assert served.says("moe:law") == answers["law"]

    served.cli("adapters", "add", "law", str(served.adapters[2]), "--base", "moe")
    assert served.says("law") not in answers.values() and served.says("moe") == answers["moe"]
    served.cli("adapters", "add", "law", str(served.adapters[1]), "--base", "moe")
    assert served.says("law") == answers["law"]
    served.cli("adapters", "remove", "law")
    assert served.running.chat(model="law").status_code == 404
    assert served.says("first") == answers["first"] and served.says("moe") == answers["moe"]


def test_what_cannot_be_added(served: Served, tmp_path: Path) -> None:
    outside = served.cli("adapters", "add", "x", str(tmp_path), "--base", "moe", code=1)
    assert "outside the folders" in outside
    said = served.cli("adapters", "add", "x", str(served.adapters[2]), "--base", "merged", code=1)
    assert "takes no adapters" in said


def test_a_killed_core_comes_back_with_its_adapters(served: Served) -> None:
    wanted = {model: served.says(model) for model in ("first", "moe")}
    core = served.running.core("moe")
    assert core is not None
    core.kill()
    served.running.until(lambda: not served.running.experts()["moe"]["ready"], 10)
    served.running.until(lambda: served.running.experts()["moe"]["ready"])

    def loaded() -> bool:
        return bool(httpx.get(f"{served.running.url}/v1/adapters/first").json()["phase"] == "ready")

    served.running.until(loaded, 30)
    assert {model: served.says(model) for model in wanted} == wanted
