"""`signalbox policy simulate` from the outside, and what it takes of a configuration."""

from pathlib import Path

import orjson
import pytest
import typer
from typer.testing import CliRunner

from signalbox.policies.base import Policy, Rate
from signalbox.policies.simulate_load import Arrival, write_load
from signalbox.serving.cli_simulate import simulate_command
from signalbox.serving.config import ConfigError, load_config
from signalbox.serving.simulated_pool import left_out, read_policies, read_speeds, simulated_pool, with_predictions

CONFIG = """
experts:
  fast: {engine: simulated, prefill_tokens_per_s: 9000, step_ms: 10, max_running: 4, price: {output: 2}}
  slow: {engine: simulated, prefill_tokens_per_s: 9000, step_ms: 40, max_running: 4, replicas: 2, price: {output: 1}}
  far: {engine: openai, base_url: "http://127.0.0.1:9/v1", model: m, latency: {ttft_ms: 300, tpot_ms: 30}}
  hidden: {engine: simulated, prefill_tokens_per_s: 1, step_ms: 1, routable: false}
policies:
  gold: {slo: {max_ttft_ms: 400}, objective: {latency: 1}, priority: 1, denied: [far]}
  bronze: {slo: {max_ttft_ms: 1500}, objective: {cost: 1}, denied: [far]}
"""
app = typer.Typer()
app.command()(simulate_command)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "signalbox.yaml"
    file.write_text(CONFIG)
    return file


def run(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, result.output


def test_a_drawn_load_is_simulated_and_its_figures_written(config: Path, tmp_path: Path) -> None:
    drawn = ("--config", config, "--rate", 40, "--duration", 30, "--mix", "gold=0.3,bronze=0.7", "--seed", 3)
    for system in ("signalbox", "fcfs", "round_robin"):
        code, said = run(*drawn, "--system", system, "--json", tmp_path / f"{system}.json")
        assert code == 0, said
        assert f"{system}: " in said and "gold" in said
    ours, theirs = (orjson.loads((tmp_path / f"{s}.json").read_bytes()) for s in ("signalbox", "fcfs"))
    assert ours["seconds"] == 30.0
    for figures in ours["figures"].values():
        assert figures["offered"] == figures["answered"] + sum(figures["shed"].values()) + figures["unfinished"]
    assert ours["figures"]["gold"]["attainment"] > theirs["figures"]["gold"]["attainment"]
    assert "far" not in ours["figures"]["all"]["experts"]
    _, again = run(*drawn, "--json", tmp_path / "again.json")
    assert orjson.loads((tmp_path / "again.json").read_bytes()) == ours, again


def test_a_recorded_load_and_other_policies(config: Path, tmp_path: Path) -> None:
    load, policies = tmp_path / "load.jsonl", tmp_path / "policies.yaml"
    write_load(load, [Arrival(at=0.1 * i, policy="mine", prompt="Hello", max_tokens=8) for i in range(20)])
    policies.write_text("policies: {mine: {allowed: [slow]}}\n")
    code, said = run("--config", config, "--load", load, "--policies", policies, "--json", tmp_path / "out.json")
    assert code == 0, said
    assert orjson.loads((tmp_path / "out.json").read_bytes())["figures"]["mine"]["experts"] == {"slow": 20}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--mix", "silver=1"), "there is no policy 'silver'"),
        (("--mix", "gold"), "NAME=NUMBER"),
        (("--burst", "3"), "FACTOR:SHARE:PERIOD"),
        (("--burst", "30:0.5:10"), "can take"),
        (("--answer-tokens", "9-3"), "no more than the greatest"),
        (("--quality", "fast=2"), "EXPERT=MEAN"),
        (("--quality", "fst=0.5"), "did you mean 'fast'"),
        (("--load", "/nowhere/load.jsonl"), "No such file"),
        (("--speeds", "/nowhere/speeds.json"), "no such file"),
    ],
)
def test_what_cannot_be_simulated_is_said(config: Path, arguments: tuple[str, ...], said: str) -> None:
    code, output = run("--config", config, *arguments)
    assert code == 2
    assert said in " ".join(output.replace("│", " ").split())


def test_the_pool_as_configured(config: Path, tmp_path: Path) -> None:
    checked = load_config(config)
    pool, warnings = simulated_pool(checked, {}, {"fast": (0.7, 0.1)})
    found = {expert.name: expert for expert in pool}
    assert set(found) == {"fast", "slow", "far"}
    assert (found["slow"].replicas, found["slow"].speed.step_ms, found["slow"].price.output) == (2, 40.0, 1.0)
    assert found["fast"].quality == (0.7, 0.1)
    assert found["far"].speed.step_ms == 30.0
    assert ["far" in text for text in warnings] == [True]
    speeds = tmp_path / "speeds.json"
    speeds.write_bytes(orjson.dumps({"far": {"prefill_tokens_per_s": 100, "step_ms": 7, "overhead_ms": 3}}))
    pool, warnings = simulated_pool(checked, read_speeds(speeds), {})
    assert pool[2].speed.step_ms == 7.0 and pool[2].overhead_ms == 3.0 and not warnings


def test_files_are_read_strictly(tmp_path: Path) -> None:
    file = tmp_path / "policies.yaml"
    file.write_text("policies:\n  gold:\n    slo:\n      max_ttft: 3\n")
    with pytest.raises(ConfigError, match=r"policies\.yaml:4: gold\.slo\.max_ttft: .*did you mean 'max_ttft_ms'"):
        read_policies(file)
    file.write_text("gold: {priority: 3}\n")
    assert read_policies(file) == {"gold": Policy(priority=3)}
    file.write_text("gold: 3\n")
    with pytest.raises(ConfigError, match="must be a mapping"):
        read_policies(file)
    file.write_text("fast: {step_ms: 0, prefill_tokens_per_s: 1}\n")
    with pytest.raises(ConfigError, match=r"fast\.step_ms: must be greater than 0"):
        read_speeds(file)


def test_what_is_left_out_is_said() -> None:
    assert left_out({"a": Policy(), "b": Policy(rate=Rate(requests_per_minute=1))}) == ["`rate` of b is not simulated"]


def test_without_a_router_nothing_is_predicted(config: Path) -> None:
    load = [Arrival(at=0.0, policy="gold", prompt="Hello")]
    assert with_predictions(load, load_config(config)) == (load, 1.0)
