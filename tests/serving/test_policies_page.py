"""docs/policies.md is true: its examples load, it has every field, and its codes are those of the source."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel

from signalbox.policies import base
from signalbox.serving.access import AdmissionConfig, KeyConfig, TenantConfig
from signalbox.serving.cli import app
from signalbox.serving.config import Config, load_config
from signalbox.serving.embedded_valkey import EmbeddedValkey
from signalbox.serving.metrics import Metrics
from signalbox.serving.store import Store

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "policies.md").read_text()
EXAMPLES = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
EXPERT = {"engine": "openai", "base_url": "http://127.0.0.1:1/v1", "model": "any"}


def load(text: str, folder: Path) -> Config:
    path = folder / "config.yaml"
    path.write_text(text)
    return load_config(path, environment={}, on_warning=lambda _: None)


@pytest.mark.parametrize("example", EXAMPLES, ids=[text.split("\n")[0] for text in EXAMPLES])
def test_examples_are_configurations(example: str, tmp_path: Path) -> None:
    experts = yaml.safe_dump({"experts": {"smollm2": EXPERT, "gemma": EXPERT}})
    config = load(example + experts, tmp_path)
    assert config.policies or config.admission.max_queued == 128


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 4


@pytest.mark.parametrize(
    "model",
    [
        base.Policy,
        base.Slo,
        base.Objective,
        base.Budget,
        base.Rate,
        base.Parallel,
        base.Intent,
        base.Explore,
        TenantConfig,
        KeyConfig,
        AdmissionConfig,
    ],
)
def test_every_field_has_an_example(model: type[BaseModel]) -> None:
    shown = "\n".join(EXAMPLES)
    missing = [name for name in model.model_fields if not re.search(rf"\b{name}:", shown)]
    assert not missing


def test_the_codes_are_those_of_the_source() -> None:
    table = PAGE[PAGE.index("## Refusals") : PAGE.index("## Metrics")]
    rows = [re.match(r"\| (`.*?`) \|", line) for line in table.split("\n")]
    codes = [code for row in rows if row for code in re.findall(r"`(\w+)`", row[1])]
    source = "\n".join(p.read_text() for folder in ("serving", "policies") for p in (ROOT / folder).glob("*.py"))
    assert len(codes) >= 18
    assert not [code for code in codes if f'"{code}"' not in source]


async def test_the_metrics_are_those_that_are_told() -> None:
    with EmbeddedValkey() as url:
        store = Store(url)
        metrics = Metrics(store, lambda: {"smollm2": (0.1, 0.2)})
        text = await all_metrics(metrics)
        await store.close()
    told = text_string_to_metric_families(text)
    families = {family.name + ("_total" if family.type == "counter" else ""): family for family in told}
    rows = re.findall(r"^\| `(signalbox_\w+)` \| (.*?) \|", PAGE, re.MULTILINE)
    assert {name for name, _ in rows} == set(families)
    for name, labels in rows:
        found = {label for sample in families[name].samples for label in sample.labels if label != "le"}
        assert found == set(labels.split(", ")) - {"none"}, name


async def all_metrics(metrics: Metrics) -> str:
    metrics.request("gold", "smollm2", "ok")
    metrics.admission("admitted", 0, 0.1)
    metrics.ttft("gold", 0.1)
    metrics.slo("gold", kept=True)
    metrics.budget_refusal("gold", "budget_spent")
    return (await metrics.text()).decode()


def test_what_the_quickstart_has_commented_out_loads(tmp_path: Path) -> None:
    """Its examples of priority, budget, rate, tenants and keys, with their comment signs taken off."""
    lines = (ROOT / "examples" / "quickstart.yaml").read_text().replace("../routers", str(ROOT / "routers"))
    text = re.sub(r"^( *)# (priority|budget|rate): ", r"\1\2: ", lines, flags=re.MULTILINE)
    text = re.sub(r"^# ((?:tenants|keys):$|  \w+: \{.*)", r"\1", text, flags=re.MULTILINE)
    text = re.sub(r"path: adapters/", f"path: {ROOT}/examples/adapters/", text)
    config = load(text, tmp_path)
    assert config.policies["gold"].priority == 2 and config.policies["gold"].budget is not None
    assert config.policies["gold"].rate is not None
    assert set(config.keys) == {"web", "ci", "ops"} and config.keys["ops"].admin
    assert config.tenants["acme"].weight == 3


def test_the_commands_and_their_options_exist() -> None:
    policy: Any = typer.main.get_command(app).commands["policy"]  # type: ignore[attr-defined]
    used: dict[str, set[str]] = {}
    for line in re.findall(r"signalbox policy (.*)", PAGE + (ROOT / "README.md").read_text()):
        said = re.split(r"`|  +", line)[0]
        for part in re.split(r" \| (?=[a-z])", said):
            used.setdefault(part.split()[0], set()).update(re.findall(r"--[a-z-]+", part))
    assert set(used) == set(policy.commands)
    for name, options in used.items():
        known = {option for parameter in policy.commands[name].params for option in parameter.opts}
        assert options <= known, name
