"""`signalbox route` and `signalbox chat` as processes of their own, against the real gateway, and without one."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from signalbox.serving.cli_client import route_command
from tests.serving.conftest import Service, make_config

NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens there


async def signalbox(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
    """Run the command as a user would; returns exit code, standard output and standard error."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "from signalbox.serving.cli import app; app()", *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"COLUMNS": "160"},
    )
    out, err = await asyncio.wait_for(process.communicate(stdin.encode()), 240)
    return process.returncode or 0, out.decode(), err.decode()


async def test_route_asks_the_service(service: Service) -> None:
    code, out, err = await signalbox("route", "What is 3 plus 4?", "--url", service.url)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    for heading in ("expert", "quality", "cost", "TTFT", "total", "utility", "struck out"):
        assert heading in lines[0]
    assert lines[1].split()[:2] == ["→", "tiny"], "the chosen one is first and marked"
    assert "±" in lines[1] and "wide" in lines[2]
    assert lines[3].startswith("→ tiny  (policy default; router default; confidence")


async def test_route_shows_what_moves_the_choice(service: Service) -> None:
    story = "Tell me a story about a fox."
    answers = await asyncio.gather(
        signalbox("route", story, "--url", service.url, "--tradeoff", "0"),
        signalbox("route", story, "--url", service.url, "--tradeoff", "10"),
        signalbox("route", f"{story} [Flag: lowest cost]", "--url", service.url),
        signalbox("route", story, "--url", service.url, "--policy", "bronze"),
        signalbox("route", story, "--url", service.url, "--json"),
    )
    chosen = [out.splitlines()[-1].split()[1] for _, out, _ in answers[:4]]
    assert chosen == ["wide", "tiny", "tiny", "tiny"]
    assert "flags: cost" in answers[2][1] and "policy bronze" in answers[3][1]
    assert json.loads(answers[4][1])["expert"] == "wide"


async def test_route_shows_who_was_struck_out_and_why(service: Service) -> None:
    code, out, err = await signalbox("route", "hello", "--policy", "impossible", "--url", service.url)
    assert code == 1 and "no expert can answer" in err
    assert out.count("max_cost_per_1m") == 2
    code, out, err = await signalbox("route", "hello", "--policy", "silver", "--url", service.url)
    assert code == 1 and "there is no model 'auto:silver'" in err and "Traceback" not in err


async def test_route_without_a_service_decides_by_the_configuration(
    models: dict[str, Path], router_artifact: Path, tmp_path: Path
) -> None:
    config = tmp_path / "pool.yaml"
    config.write_text(yaml.safe_dump(make_config(models, router_artifact).model_dump(mode="json", exclude_none=True)))
    arguments = ("--url", NOBODY, "--config", str(config))
    code, out, err = await signalbox("route", "What is 12 times 9?", *arguments)
    assert code == 0 and out.splitlines()[-1].startswith("→ tiny")
    assert f"No service answers at {NOBODY}" in err and "500 ms" in out, "declared latency"

    # The same in this process, where the encoder is loaded already.
    command = typer.Typer()
    command.command()(route_command)
    invoke = CliRunner().invoke
    story = await asyncio.to_thread(invoke, command, ["Tell me a story about a queen.", *arguments, "--json"])
    assert json.loads(story.stdout)["expert"] == "wide" and json.loads(story.stdout)["router"] == "default"
    nobody = await asyncio.to_thread(invoke, command, ["x", "--policy", "impossible", "--json", *arguments])
    said = json.loads(nobody.stdout)
    assert nobody.exit_code == 1 and said["error"]["code"] == "no_candidate" and len(said["ratings"]) == 2


async def test_route_without_service_and_configuration(tmp_path: Path) -> None:
    code, _, err = await signalbox("route", "hello", "--url", NOBODY, "--config", str(tmp_path / "none.yaml"))
    assert code == 1 and "none.yaml" in err and "Traceback" not in err


async def test_chat_piped(service: Service) -> None:
    typed = "/model wide\nhello\n\n/policy gold\nWhat is 3 plus 4?\n/new\n/model gpt-5\n/dance\n/quit\nnever said\n"
    code, out, err = await signalbox("chat", "--url", service.url, "--max-tokens", "6", stdin=typed)
    assert code == 0, err
    assert "> hello" in out and "(now talking to wide)" in out
    wide, gold = (line for line in out.splitlines() if line.startswith("— "))
    assert wide.startswith("— wide · asked for by name · first token") and " tokens/s · $" in wide
    assert gold.startswith("— tiny · chosen under policy gold, confidence")
    assert "(a new conversation)" in out and "never said" not in out
    assert "there is no model 'gpt-5'" in err and "there is no command /dance" in err


async def test_chat_says_when_an_answer_is_from_the_cache(service: Service) -> None:
    say = "tell me something about caches\n"
    first = await signalbox("chat", "--url", service.url, "--temperature", "0", "--max-tokens", "5", stdin=say)
    second = await signalbox("chat", "--url", service.url, "--temperature", "0", "--max-tokens", "5", stdin=say)
    assert "from the cache" not in first[1] and "from the cache" in second[1]
    assert first[1].splitlines()[1] == second[1].splitlines()[1], "the same answer"


async def test_chat_shows_errors_and_goes_on(service: Service) -> None:
    typed = f"{'word ' * 9000}\nhello\n"
    code, out, err = await signalbox("chat", "--model", "tiny", "--url", service.url, "--max-tokens", "4", stdin=typed)
    assert code == 1 and "error: expert 'tiny' holds 8192 tokens" in err
    assert "— tiny" in out, "the turn that failed is forgotten, the next one is answered"


@pytest.mark.parametrize("model", ["gpt-5", "auto:silver"])
async def test_chat_with_an_unknown_model(service: Service, model: str) -> None:
    code, _, err = await signalbox("chat", "--model", model, "--url", service.url)
    assert code == 1 and f"there is no model '{model}'; there are: auto" in err


async def test_chat_without_a_service() -> None:
    code, _, err = await signalbox("chat", "--url", NOBODY)
    assert code == 1 and "No service answers" in err and "Traceback" not in err


async def test_help_is_quick() -> None:
    """No command's help may wait for torch or Ray."""
    code, out, _ = await signalbox("route", "--help")
    assert code == 0 and "--tradeoff" in out
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "import sys, signalbox.serving.cli_client; print({'torch', 'ray', 'httpx', 'numpy'} & set(sys.modules))",
        stdout=asyncio.subprocess.PIPE,
    )
    assert (await process.communicate())[0].decode().strip() == "set()"
