"""`signalbox policy`: on files, and against the real gateway with a real store (its experts are never asked)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from signalbox.router.table import Table, write_table
from signalbox.serving.cli import app
from signalbox.serving.config import Config
from signalbox.serving.embedded_valkey import EmbeddedValkey
from tests.serving.conftest import Service, serve_gateway

NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens there
EXPERT = {"engine": "openai", "base_url": NOBODY, "model": "m"}
CONFIG = {
    "experts": {
        "small": {**EXPERT, "price": {"input": 0.1, "output": 0.1}, "latency": {"ttft_ms": 100, "tpot_ms": 10}},
        "large": {**EXPERT, "price": {"input": 2.0, "output": 2.0}, "latency": {"ttft_ms": 900, "tpot_ms": 30}},
    },
    "policies": {"gold": {"slo": {"max_ttft_ms": 800}}, "base": {}},
    "default_policy": "base",
}


@pytest.fixture
async def gateway() -> AsyncIterator[Service]:
    server = EmbeddedValkey()
    try:
        async with serve_gateway(Config.model_validate(CONFIG), server.start(), {}) as running:
            yield running
    finally:
        server.stop()


def run(*arguments: Any) -> click.testing.Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "160"})


async def policy(gateway: Service, *arguments: Any, code: int = 0) -> str:
    """Run the command; returns all that it printed."""
    result = await asyncio.to_thread(run, "policy", *arguments, "--url", gateway.url)
    assert result.exit_code == code, result.output
    return str(result.output)


def written(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return path


# -- files -----------------------------------------------------------------------------------------------------


def test_check_names_file_line_key_and_remedy(tmp_path: Path) -> None:
    text = (
        "policies:\n  gold:\n    slo: {max_ttft: 800}\n    prioritty: 1\n  'a b': {}\n  iron:\n    budget: {usd: -1}\n"
    )
    file = written(tmp_path / "p.yaml", text)
    result = run("policy", "check", file)
    assert result.exit_code == 1
    lines = result.output.splitlines()
    assert [line.split(": ")[0].rpartition(":")[2] for line in lines] == ["3", "4", "5", "7"]
    assert f"{file}:3: policies.gold.slo.max_ttft: unknown key; did you mean 'max_ttft_ms'?" in lines
    assert "did you mean 'priority'?" in lines[1] and "cannot be called 'a b'" in lines[2]
    assert "policies.iron.budget.usd" in lines[3]


def test_check_of_one_policy_and_of_json(tmp_path: Path) -> None:
    single = written(tmp_path / "silver.yaml", "slo:\n  max_ttft_ms: 1500\n")
    result = run("policy", "check", single)
    assert result.exit_code == 0 and "1 policy (silver). No problem found." in result.output
    as_json = written(tmp_path / "x.json", json.dumps({"policies": {"a": {"priority": 1}, "b": {}}}))
    assert "2 policies (a, b)" in run("policy", "check", as_json).output
    broken = run("policy", "check", written(tmp_path / "y.yaml", "slo: {max_ttft_ms: 0}\n"))
    assert broken.exit_code == 1 and f"{tmp_path}/y.yaml:1: slo.max_ttft_ms: must be greater than 0" in broken.output
    for text in ("policies: {}\n", "policies: [a]\n", "", "[", "- 1"):
        assert run("policy", "check", written(tmp_path / "z.yaml", text)).exit_code == 1
    assert run("policy", "check", tmp_path / "absent.yaml").exit_code == 1
    no_mapping = run("policy", "check", written(tmp_path / "z.yaml", "policies: {a: 5}"))
    assert "z.yaml:1: policies.a: a policy must be a mapping" in no_mapping.output


def test_check_against_a_pool(tmp_path: Path) -> None:
    config = written(tmp_path / "config.yaml", CONFIG)
    file = written(
        tmp_path / "p.yaml", {"allowed": ["small", "gpt-*"], "parallel": {"arbiter": "judge", "judge": "lrge"}}
    )
    assert run("policy", "check", file).exit_code == 0, "without a pool nobody knows"
    result = run("policy", "check", file, "--config", config)
    assert result.exit_code == 1 and "did you mean 'large'?" in result.output
    file = written(tmp_path / "p.yaml", {"allowed": ["small", "gpt-*"]})
    result = run("policy", "check", file, "--config", config)
    assert result.exit_code == 0 and "warning" in result.output and "'gpt-*' fits none of the experts" in result.output
    contradiction = written(tmp_path / "p.yaml", {"slo": {"max_total_ms": 5, "max_ttft_ms": 10}})
    assert run("policy", "check", contradiction).exit_code == 1


# -- a service -------------------------------------------------------------------------------------------------


async def test_apply_says_what_it_did(gateway: Service, tmp_path: Path) -> None:
    file = written(tmp_path / "p.yaml", {"policies": {"gold": {"slo": {"max_ttft_ms": 700}}, "silver": {}, "base": {}}})
    lines = (await policy(gateway, "apply", file)).splitlines()
    assert [line.split(" (")[0] for line in lines] == ["gold: changed", "silver: created", "base: unchanged"]
    assert "version 2" in lines[0]
    models = (await gateway.client.get("/v1/models")).json()["data"]
    assert "auto:silver" in [m["id"] for m in models], "in force at once"
    etag = (await gateway.client.get("/v1/policies/gold")).json()["etag"]
    single = written(tmp_path / "gold.yaml", {"slo": {"max_ttft_ms": 650}})
    assert "has changed" in await policy(gateway, "apply", single, "--if-match", "1-stale", code=1)
    assert "gold: changed (version 3" in await policy(gateway, "apply", single, "--if-match", etag)
    assert "iron: created" in await policy(gateway, "apply", single, "--name", "iron")
    assert "--if-match is for one policy" in await policy(gateway, "apply", file, "--if-match", etag, code=1)
    assert "--name is for a file with one" in await policy(gateway, "apply", file, "--name", "x", code=1)
    bad = written(tmp_path / "bad.yaml", {"policies": {"new": {}, "worse": {"priority": 99}}})
    assert "bad.yaml:4: policies.worse.priority" in await policy(gateway, "apply", bad, code=1)
    assert "new" not in await policy(gateway, "list"), "all or none"
    judged = written(tmp_path / "j.yaml", {"parallel": {"samples": 2, "arbiter": "judge", "judge": "lrge"}})
    assert "did you mean 'large'?" in await policy(gateway, "apply", judged, code=1), "the service knows its pool"


async def test_list_show_rollback_delete(gateway: Service, tmp_path: Path) -> None:
    listed = await policy(gateway, "list")
    gold = next(line for line in listed.splitlines() if line.startswith("gold"))
    assert "slo.max_ttft_ms 800" in gold and "configuration" in gold
    assert json.loads(await policy(gateway, "list", "--json"))["data"][1]["name"] == "gold"

    shown = await policy(gateway, "show", "gold")
    assert shown.startswith("# gold, version 1, ") and yaml.safe_load(shown) == {"slo": {"max_ttft_ms": 800.0}}
    again = written(tmp_path / "gold.yaml", shown)
    assert "gold: unchanged" in await policy(gateway, "apply", again), "what is shown can be applied"

    await policy(gateway, "apply", written(tmp_path / "gold.yaml", {"priority": 3}))
    assert yaml.safe_load(await policy(gateway, "show", "gold", "--version", 1)) == {"slo": {"max_ttft_ms": 800.0}}
    assert "there are: 2, 1" in await policy(gateway, "show", "gold", "--version", 9, code=1)
    history = (await policy(gateway, "show", "gold", "--history")).splitlines()
    assert "priority 3" in history[1] and "slo.max_ttft_ms 800" in history[2]

    assert "version 3 is what version 1 was" in await policy(gateway, "rollback", "gold", 1)
    assert "has no version 77" in await policy(gateway, "rollback", "gold", 77, code=1)
    etag = (await gateway.client.get("/v1/policies/gold")).json()["etag"]
    assert "has changed" in await policy(gateway, "rollback", "gold", 2, "--if-match", "2-x", code=1)
    assert "has changed" in await policy(gateway, "delete", "gold", "--if-match", "2-x", code=1)
    assert await policy(gateway, "delete", "gold", "--if-match", etag) == "gold: deleted\n"
    assert "there is no policy 'gold'" in await policy(gateway, "show", "gold", code=1)
    assert "deleted" in (await policy(gateway, "show", "gold", "--history")).splitlines()[1]
    assert "version 5 is what version 2 was" in await policy(gateway, "rollback", "gold", 2)
    assert "is in use" in await policy(gateway, "delete", "base", code=1)


def test_without_a_service(tmp_path: Path) -> None:
    file = written(tmp_path / "p.yaml", {"priority": 1})
    for arguments in (("list",), ("show", "x"), ("apply", file), ("delete", "x"), ("rollback", "x", 1)):
        result = run("policy", *arguments, "--url", NOBODY)
        assert result.exit_code == 1 and "No service answers" in result.output


def test_route_shows_the_distance_to_each_constraint(tmp_path: Path) -> None:
    config = written(tmp_path / "config.yaml", CONFIG)
    result = run("route", "Hello there", "--policy", "gold", "--config", config, "--url", NOBODY)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("distance to"))
    assert "max_ttft_ms 800" in lines[head]
    assert {line.split()[0]: line.split()[1] for line in lines[head + 1 : head + 3]} == {
        "small": "-88%",
        "large": "+12%",
    }
    plain = run("route", "Hello there", "--policy", "base", "--config", config, "--url", NOBODY)
    assert plain.exit_code == 0 and "distance to" not in plain.output


# -- plan ------------------------------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """`big-70B` is best at everything, `small-7B` next to it at sums, `code-7B` at code; `bad-7B` at nothing."""
    rng = np.random.default_rng(0)
    names = ("big-70B", "small-7B", "code-7B", "bad-7B")
    means = {"sums": (0.9, 0.8, 0.4, 0.2), "code": (0.9, 0.3, 0.85, 0.2)}
    tasks = ["sums", "code"] * 200
    scores = np.array([rng.random(4) < means[task] for task in tasks], dtype=float)
    prompts = [f"{task} {i}" for i, task in enumerate(tasks)]
    path = tmp_path / "scores.parquet"
    write_table(Table(names, [f"r{i}" for i in range(400)], prompts, {"score": scores}, task=tasks), path)
    return path


def planned(tmp_path: Path, table: Path, *arguments: Any, code: int = 0) -> tuple[dict[str, Any], str]:
    out = tmp_path / "plan.json"
    result = run("policy", "plan", "--table", table, *arguments, "--json", out)
    assert result.exit_code == code, result.output
    return json.loads(out.read_bytes()) if out.exists() else {}, result.output


def replicas(plan: dict[str, Any]) -> dict[str, int]:
    return {name: expert["replicas"] for name, expert in plan["experts"].items()}


def test_plan_by_memory_alone(tmp_path: Path, table: Path) -> None:
    plan, out = planned(tmp_path, table, "--memory", "200GB")
    assert replicas(plan) == {"big-70B": 1} and plan["memory_used"] == 140e9 and plan["fits"]
    plan, out = planned(tmp_path, table, "--memory", "30GB")
    assert replicas(plan) == {"small-7B": 1, "code-7B": 1} and plan["left_out"] == ["big-70B", "bad-7B"]
    assert plan["categories"]["sums"]["expert"] == "small-7B" and plan["categories"]["code"]["expert"] == "code-7B"
    assert 0.77 < plan["quality"] < 0.87 and plan["quality"] > plan["best_single"]["quality"] + 0.1
    assert "26.08 of 27.94 GiB" in out and "code-7B" in out
    plan, _ = planned(tmp_path, table, "--memory", "30GB", "--overhead", "2GB")
    assert len(replicas(plan)) == 1, "no room for two with their KV caches"
    plan, _ = planned(tmp_path, table, "--memory", "40GB", "--bytes-per-parameter", "0.5")
    assert replicas(plan) == {"big-70B": 1}, "in four bits it fits"


def test_plan_with_traffic(tmp_path: Path, table: Path) -> None:
    # One replica of a 7B answers 700 / 100 * 0.7 = 4.9 requests a second within what is planned for.
    speeds = ("--throughput", "700,big-70B=70", "--answer-tokens", 100)
    plan, out = planned(tmp_path, table, "--memory", "60GB", "--rps", 12, *speeds)
    assert replicas(plan) == {"small-7B": 2, "code-7B": 2}
    assert plan["experts"]["small-7B"]["busy"] == pytest.approx(6 / (2 * 7))
    traffic = written(tmp_path / "traffic.yaml", {"sums": 9, "code": 1})
    plan, out = planned(tmp_path, table, "--memory", "60GB", "--traffic", traffic, *speeds)
    assert replicas(plan) == {"small-7B": 2, "code-7B": 1}
    assert plan["categories"]["sums"]["requests_per_second"] == 9
    plan, out = planned(tmp_path, table, "--memory", "150GB", "--rps", 1, *speeds)
    assert replicas(plan) == {"small-7B": 1, "code-7B": 1} and "The traffic costs" in out, "too slow, the big one"
    plan, out = planned(tmp_path, table, "--memory", "20GB", "--rps", 12, *speeds, code=1)
    assert not plan["fits"] and "Nothing fits 18.63 GiB and this traffic" in out
    assert plan["memory_used"] == 42e9, "three replicas of a 7B bear it"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--memory", "much"), "write 16GiB"),
        (("--memory", "16GB", "--rps", 1), "--throughput big-70B=..."),
        (("--memory", "16GB", "--rps", 1, "--throughput", "smal-7B=5"), "did you mean small-7B?"),
        (("--memory", "16GB", "--rps", 1, "--throughput", "small-7B=fast"), "NAME=TOKENS_PER_SECOND"),
        (("--memory", "16GB", "--rps", 1, "--traffic", "traffic.yaml"), "not both"),
        (("--memory", "16GB", "--traffic", "traffic.yaml"), "there is no such file"),
        (("--memory", "16GB", "--pool", "nobody"), "nobody"),
    ],
)
def test_plan_with_wrong_options(table: Path, arguments: tuple[Any, ...], said: str) -> None:
    result = run("policy", "plan", "--table", table, *arguments)
    assert result.exit_code == 2
    plain = " ".join(result.output.replace("│", " ").split())
    assert said in plain, plain


def test_plan_with_a_wrong_traffic_file(tmp_path: Path, table: Path) -> None:
    for content, said in (
        ({"sum": 1}, "did you mean sums?"),
        ({"sums": -1}, "must be a number"),
        ({"sums": 0}, "traffic"),
    ):
        file = written(tmp_path / "traffic.yaml", content)
        result = run("policy", "plan", "--table", table, "--memory", "16GB", "--traffic", file, "--throughput", 9)
        assert result.exit_code == 2 and said in " ".join(result.output.replace("│", " ").split())
