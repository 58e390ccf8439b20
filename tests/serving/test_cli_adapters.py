"""`signalbox adapters`: against a scripted HTTP server that stands in for the service, and (check) without any.

What the stand-in answers is written here, by the API's contract; the real registry has its own tests.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from signalbox.serving.cli import app
from tests.adapters.broken import BROKEN
from tests.adapters.folders import make_lora
from tests.tiny_models import save_tiny

NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens there


@dataclass
class StandIn:
    """Scripted replies by `METHOD path`, in turn, the last one again and again; `None` closes the connection."""

    url: str = ""
    replies: dict[str, list[tuple[int, Any] | None]] = field(default_factory=dict)
    asked: list[tuple[str, Any]] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)


@pytest.fixture
def service() -> Iterator[StandIn]:
    stand_in = StandIn()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            asked = f"{self.command} {self.path}"
            stand_in.asked.append((asked, json.loads(body) if body else None))
            stand_in.keys.add(self.headers.get("authorization"))
            script = stand_in.replies[asked]
            reply = script.pop(0) if len(script) > 1 else script[0]
            if reply is None:
                self.connection.close()
                return
            data = json.dumps(reply[1]).encode()
            self.send_response(reply[0])
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = answer

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    stand_in.url = f"http://127.0.0.1:{server.server_port}"
    yield stand_in
    server.shutdown()
    server.server_close()


def run(*arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    result = CliRunner().invoke(app, ["adapters", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def record(phase: str, version: int = 1, *, replicas: dict[str, str] | None = None, **changes: Any) -> dict[str, Any]:
    """An adapter as `/v1/adapters` gives it; `replicas` maps a replica to its phase."""
    said = {name: {"phase": state, "version": version} for name, state in (replicas or {}).items()}
    own = {
        "version": version,
        "phase": phase,
        "reason": changes.get("reason", ""),
        "created_at": 1e9,
        "loaded_at": None,
    }
    return {
        "object": "adapter",
        "name": "banking",
        "base": "tiny",
        "id": "tiny:banking",
        "phase": phase,
        "reason": "",
        "version": version,
        "serving": None,
        "content_hash": "ab" * 32,
        "kind": "lora",
        "rank": 8,
        "bytes": 3 << 20,
        "path": "/adapters/banking",
        "pinned": False,
        "evicted": False,
        "replicas": said,
        "versions": [own],
        "events": [{"at": 1e9, "phase": phase, "reason": "it happened", "version": version}],
    } | changes


GONE = (404, {"error": {"message": "there is no adapter 'banking'", "code": "adapter_not_found"}})


def test_add_waits_until_every_replica_is_ready(
    service: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    service.replies["POST /v1/adapters"] = [(202, record("validating", 3))]
    service.replies["GET /v1/adapters/banking"] = [
        (200, record("validating", 3)),
        (200, record("staged", 3, replicas={"tiny#a": "ready", "tiny#b": "staged"})),
        (200, record("staged", 3, replicas={"tiny#a": "ready", "tiny#b": "ready"})),  # loaded, not yet switched
        (200, record("ready", 3, replicas={"tiny#a": "ready", "tiny#b": "ready"})),
    ]
    code, out, err = run(
        "add", "banking", "here", "--base", "tiny", "--pinned", "--replicas", "2", "--url", service.url
    )
    assert (code, err) == (0, "")
    posted = {"name": "banking", "base": "tiny", "path": str(tmp_path / "here"), "pinned": True, "replicas": 2}
    assert service.asked[0] == ("POST /v1/adapters", posted)
    assert len(service.asked) == 5
    steps = [line.split("s  ", 1)[1] for line in out.splitlines()[:-1]]
    assert steps == [
        "banking@3 validating",
        "banking@3 staged (tiny#a ready, tiny#b staged)",
        "banking@3 staged (tiny#a ready, tiny#b ready)",
        "banking@3 ready (tiny#a ready, tiny#b ready)",
    ]
    assert out.splitlines()[-1] == "tiny:banking is ready: version 3, lora of rank 8, 3.0 MiB, on 2/2 replicas"


def test_add_without_waiting_leaves_out_what_was_not_said(service: StandIn) -> None:
    service.replies["POST /v1/adapters"] = [(202, record("validating"))]
    code, out, _ = run("add", "banking", "/adapters/banking", "--no-wait", "--url", service.url)
    assert code == 0 and out == "banking@1: validating\n"
    assert service.asked == [("POST /v1/adapters", {"name": "banking", "path": "/adapters/banking", "pinned": False})]


def test_add_of_a_bad_adapter(service: StandIn) -> None:
    said = {"error": {"message": "tensor 'q.lora_A' has 3 values that are not finite", "code": "not_finite"}}
    service.replies["POST /v1/adapters"] = [(422, said)]
    code, out, err = run("add", "banking", "/a", "--base", "tiny", "--url", service.url)
    assert (code, out) == (1, "") and err.strip() == said["error"]["message"]


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (
            (200, record("failed", reason="replica tiny#a: no slot is free")),
            "version 1 failed: replica tiny#a: no slot",
        ),
        (GONE, "'banking' was removed while it was loaded"),
        (
            (200, record("ready", 2, versions=[{"version": 2, "phase": "ready"}, {"version": 1, "phase": "gone"}])),
            "version 2 came after it",
        ),
    ],
)
def test_add_that_comes_to_nothing(last: tuple[int, Any], message: str, service: StandIn) -> None:
    service.replies["POST /v1/adapters"] = [(202, record("validating"))]
    service.replies["GET /v1/adapters/banking"] = [(200, record("staged")), last]
    code, _, err = run("add", "banking", "/a", "--url", service.url)
    assert code == 1 and message in err and "Traceback" not in err


def test_another_version_being_ready_is_not_ours(service: StandIn) -> None:
    """While version 2 is loaded, requests still get version 1: that is not what was asked for."""
    old = record("ready", 1, versions=[{"version": 2, "phase": "validating"}, {"version": 1, "phase": "ready"}])
    service.replies["POST /v1/adapters"] = [(202, record("validating", 2))]
    service.replies["GET /v1/adapters/banking"] = [(200, old), (200, old), (200, record("ready", 2))]
    code, out, _ = run("add", "banking", "/a", "--url", service.url)
    assert code == 0 and "version 2" in out and len(service.asked) == 4


def test_add_that_takes_too_long(service: StandIn) -> None:
    service.replies["POST /v1/adapters"] = [(202, record("validating"))]
    service.replies["GET /v1/adapters/banking"] = [(200, record("staged", reason="tiny#b is starting"))]
    code, _, err = run("add", "banking", "/a", "--timeout", "0.6", "--url", service.url)
    assert code == 1 and "still staged after 0.6 s: tiny#b is starting" in err and "adapters show banking" in err


def test_a_service_that_is_away_for_a_moment(service: StandIn) -> None:
    away = (503, {"error": {"message": "the adapter registry cannot be reached"}})
    service.replies["POST /v1/adapters"] = [(202, record("validating"))]
    service.replies["GET /v1/adapters/banking"] = [(200, record("staged")), None, away, (200, record("ready"))]
    code, out, err = run("add", "banking", "/a", "--url", service.url)
    assert (code, err) == (0, "") and "is ready" in out


def test_remove_waits_for_the_last_request(service: StandIn) -> None:
    service.replies["DELETE /v1/adapters/banking"] = [(202, record("draining"))]
    service.replies["GET /v1/adapters/banking"] = [
        (200, record("draining", replicas={"tiny#a": "draining"})),
        GONE,
    ]
    code, out, _ = run("remove", "banking", "--url", service.url)
    assert code == 0 and out.splitlines()[-1] == "banking is gone"
    assert "draining (tiny#a draining)" in out
    service.replies["DELETE /v1/adapters/banking"] = [GONE]
    assert run("remove", "banking", "--url", service.url) == (1, "", "there is no adapter 'banking'\n")


def test_list_and_show(service: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIGNALBOX_API_KEY", "the-key")
    ready = record("ready", 2, replicas={"tiny#a": "ready", "tiny#b": "staged"}, pinned=True)
    failed = record("failed", name="law [x]", reason="no [slot] is free", bytes=0, rank=0)
    service.replies["GET /v1/adapters"] = [(200, {"object": "list", "data": [ready, failed]})]
    service.replies["GET /v1/adapters/banking"] = [(200, ready)]
    code, out, _ = run("list", "--url", service.url)
    assert code == 0
    heading, first, second = out.splitlines()
    assert heading.split() == "adapter base kind phase version rank size ready on pinned reason".split()  # noqa: SIM905
    assert first.split() == ["banking", "tiny", "lora", "ready", "2", "8", "3.0", "MiB", "1/2", "yes"]
    assert "law [x]" in second and "no [slot] is free" in second, "brackets are no markup"
    code, out, _ = run("show", "banking", "--url", service.url)
    assert code == 0 and out.startswith("tiny:banking  ready\n")
    for part in ("path: /adapters/banking", "content_hash: abab", "tiny#a", "staged", "it happened", "2001-09-0"):
        assert part in out
    for arguments in (("list",), ("show", "banking")):
        assert json.loads(run(*arguments, "--json", "--url", service.url)[1])["object"] in ("list", "adapter")
    assert service.keys == {"Bearer the-key"}
    service.replies["GET /v1/adapters"] = [(200, {"object": "list", "data": []})]
    assert "No adapters" in run("list", "--url", service.url)[1]


@pytest.mark.parametrize("arguments", [("add", "x", "/x"), ("list",), ("show", "x"), ("remove", "x")])
def test_no_service(arguments: tuple[str, ...]) -> None:
    code, out, err = run(*arguments, "--url", NOBODY)
    assert (code, out) == (1, "") and err == f"No service answers at {NOBODY}; `signalbox serve` starts one.\n"


# check: the real validation


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration with a tiny Llama, beside it a folder for adapters."""
    root = tmp_path_factory.mktemp("pool")
    model = save_tiny(root / "model")
    expert = {"engine": "transformers", "model": str(model), "max_adapters": 4, "max_adapter_rank": 8}
    remote = {"engine": "openai", "base_url": "http://127.0.0.1:9/v1", "model": "far"}
    sections = {"experts": {"tiny": expert, "far": remote}, "adapter_files": {"roots": [str(root / "adapters")]}}
    (root / "pool.yaml").write_text(yaml.safe_dump(sections))
    (root / "adapters").mkdir()
    return root


def test_check_by_the_configuration(pool: Path, tmp_path: Path) -> None:
    adapter = make_lora(pool / "adapters" / "good", pool / "model")
    by_config = ("--base", "tiny", "--config", pool / "pool.yaml")
    code, out, err = run("check", adapter, *by_config)
    assert (code, err) == (0, "")
    assert out.strip().endswith("good: lora of rank 4, 6 modules, 1,344 parameters, 0.0 MiB. No problem found.")
    facts = json.loads(run("check", adapter, *by_config, "--json")[1])
    assert facts["rank"] == 4 and len(facts["content_hash"]) == 64
    too_high = make_lora(pool / "adapters" / "high", pool / "model", rank=9)
    code, _, err = run("check", too_high, *by_config)
    assert code == 1 and "rank 9" in err and "(rank_too_high)" in err
    elsewhere = make_lora(tmp_path / "elsewhere", pool / "model")
    code, _, err = run("check", elsewhere, *by_config)
    assert code == 1 and str(pool / "adapters") in err and "(outside_roots)" in err


def test_check_against_a_model_alone(pool: Path, tmp_path: Path) -> None:
    adapter = make_lora(tmp_path / "anywhere", pool / "model")
    assert run("check", adapter, "--base", pool / "model")[0] == 0
    broken = BROKEN["a_with_nan"]
    code, out, _ = run("check", broken.build(pool / "model", tmp_path / "nan"), "--base", pool / "model", "--json")
    said = json.loads(out)
    assert (code, said["code"], said["tensor"]) == (1, broken.code, broken.tensor)


@pytest.mark.parametrize(
    ("base", "message"), [("far", "tiny"), ("nobody", "tiny"), ("pypi:of-no-package", "of-no-package")]
)
def test_check_against_no_base(base: str, message: str, pool: Path, tmp_path: Path) -> None:
    code, _, err = run("check", tmp_path, "--base", base, "--config", pool / "pool.yaml")
    assert code == 1 and message in err and "Traceback" not in err
