"""Start and stop of the real thing (Ray, Serve, HAProxy, Valkey) around a tiny application: what is left afterwards.

Processes are found by a mark in their environment, which all that the service starts inherit, whatever becomes of
their parents, groups and sessions.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from signalbox.serving.haproxy_loopback import rewrite

pytestmark = [pytest.mark.service, pytest.mark.timeout(300)]

STANDIN = Path(__file__).with_name("serve_standin.py")
CONFIG = """\
server: {{port: {port}, gateways: {gateways}}}
experts:
  one: {{engine: openai, base_url: "http://127.0.0.1:9/v1", model: x}}
"""


class Service:
    """A running `serve_forever`, started as a terminal would: with a process group of its own."""

    def __init__(self, folder: Path, manner: str = "", port: int = 0, gateways: int = 1) -> None:
        self.mark = uuid.uuid4().hex
        config = folder / f"{self.mark}.yaml"
        config.write_text(CONFIG.format(port=port, gateways=gateways))
        self.errors = folder / f"{self.mark}.err"
        self.process = subprocess.Popen(
            [sys.executable, str(STANDIN), str(config), manner],
            stdout=subprocess.PIPE,
            stderr=self.errors.open("w"),
            text=True,
            start_new_session=True,
            env={**os.environ, "SBX_TEST_MARK": self.mark, "TMPDIR": str(folder)},  # long: sockets must not go there
        )

    def line(self) -> str:
        """The next line of its standard output, or '' at its end."""
        assert self.process.stdout
        return self.process.stdout.readline()

    def ready(self) -> str:
        """Wait for the ready line; returns the address."""
        line = self.line()
        said = re.fullmatch(r"Signalbox is ready at (http://127\.0\.0\.1:\d+)\n", line)
        assert said, f"{line!r}; {self.errors.read_text()}"
        return said[1]

    def said(self, text: str, timeout_s: float = 60) -> None:
        """Wait until standard error has the text."""
        wait_for(lambda: text in self.errors.read_text(), timeout_s, f"{text!r} in its output")

    def code(self, timeout_s: float = 60) -> int:
        return self.process.wait(timeout_s)

    def left(self) -> list[psutil.Process]:
        """What runs of it, the process itself included."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("SBX_TEST_MARK") == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def folders(self) -> set[Path]:
        """The folders of its sockets and logs, as far as a look at its processes tells."""
        found = set()
        for process in self.left():
            with contextlib.suppress(psutil.Error):
                found |= set(re.findall(r"/tmp/sbx-\w+", " ".join([process.cwd(), *process.cmdline()])))
        return {Path(name) for name in found}


def wait_for(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.05)


def remove_kept_logs(service: Service) -> None:
    """After a failure Ray's logs are kept, and the last line says where."""
    kept = re.fullmatch(r"Ray's logs are kept in (/tmp/sbx-\w+)", service.errors.read_text().splitlines()[-1])
    assert kept and Path(kept[1], "ray").is_dir()
    shutil.rmtree(kept[1])


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    services: list[Service] = []

    def start(manner: str = "", **options: int) -> Service:
        services.append(Service(tmp_path, manner, **options))
        return services[-1]

    yield start
    for service in services:
        for process in service.left():
            process.kill()
        service.process.wait(10)


def names(processes: list[psutil.Process]) -> set[str]:
    return {name for process in processes if (name := " ".join(process.cmdline()))}


def test_two_services_side_by_side_start_serve_and_leave_nothing(start: Callable[..., Service]) -> None:
    one, two = start(gateways=2), start()
    addresses = [one.ready(), two.ready()]
    assert addresses[0] != addresses[1]
    folders = one.folders() | two.folders()
    assert len(folders) == 2 and all(folder.stat().st_mode & 0o077 == 0 for folder in folders)

    parts = " ".join(names(one.left()))
    for part in ("gcs_server", "raylet", "haproxy", "valkey-server", "ray::ServeReplica", "ray::ServeController"):
        assert part in parts
    assert not any(part in parts for part in ("dashboard.py", "monitor.py"))

    # Each answers with its own expert and store, over the hop between deployments.
    replies = [httpx.get(f"{address}/hop", timeout=10).json() for address in addresses]
    assert {p.pid for p in one.left()} > {replies[0]["pid"]} and {p.pid for p in two.left()} > {replies[1]["pid"]}
    assert replies[0]["store"] != replies[1]["store"]

    # Everything that listens does so on loopback.
    for service in (one, two):
        bound = set()
        for process in service.left():
            with contextlib.suppress(psutil.NoSuchProcess):  # some live for a moment only
                connections = process.net_connections("inet")
                bound |= {c.laddr.ip for c in connections if c.status in (psutil.CONN_LISTEN, psutil.CONN_NONE)}
        assert bound <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}, bound

    # What replicas log is shown; what Ray prints is not.
    one.said("WARNING signalbox.standin: a line from a replica")
    for line in one.errors.read_text().splitlines():
        assert not re.search(r"INFO|raylet|Started Serve|RAY_", line), line

    os.killpg(one.process.pid, signal.SIGINT)  # Ctrl-C goes to the whole foreground group
    assert one.code() == 0
    assert names(one.left()) == set()
    assert httpx.get(f"{addresses[1]}/hop", timeout=10).json()["pid"] == replies[1]["pid"]

    two.process.kill()  # not even a chance to tidy up
    two.code()
    wait_for(lambda: not two.left(), 200, f"the end of {names(two.left())}")
    assert not any(folder.exists() for folder in folders)


def test_a_signal_during_the_start_stops_it(start: Callable[..., Service]) -> None:
    service = start()
    service.said("  store")  # Ray is being started
    folders = service.folders()
    assert len(folders) == 1
    time.sleep(1.5)
    service.process.terminate()
    assert service.line() == ""
    assert service.code() == 0
    assert names(service.left()) == set() and not any(folder.exists() for folder in folders)
    assert "Traceback" not in service.errors.read_text()


def test_what_ignores_the_request_to_stop_is_killed(start: Callable[..., Service]) -> None:
    service = start("stubborn")
    service.ready()
    folders = service.folders()
    assert any("sleep 1000" in name for name in names(service.left()))
    os.killpg(service.process.pid, signal.SIGINT)
    time.sleep(1)
    os.killpg(service.process.pid, signal.SIGINT)  # the second Ctrl-C
    assert service.code() == 130  # left to itself it would end by 0, or by nothing
    assert names(service.left()) == set() and not any(folder.exists() for folder in folders)


def test_when_the_inner_process_is_killed_the_outer_one_tidies_up(start: Callable[..., Service]) -> None:
    service = start()
    service.said("  store")
    (inner,) = psutil.Process(service.process.pid).children()
    wait_for(lambda: len(service.left()) > 3, 60, "Ray's first process")  # besides the two of us, and Valkey
    inner.kill()
    assert service.code() == 1
    assert names(service.left()) == set()
    remove_kept_logs(service)


def test_when_ray_dies_the_service_ends(start: Callable[..., Service]) -> None:
    service = start()
    service.ready()
    next(process for process in service.left() if process.name() == "raylet").kill()
    assert service.code() == 1
    assert names(service.left()) == set()
    text = service.errors.read_text()
    assert "a process of Ray has ended: raylet" in text
    remove_kept_logs(service)


def test_a_graph_that_cannot_be_built_is_a_message(start: Callable[..., Service]) -> None:
    service = start("broken")
    assert service.line() == ""
    assert service.code() == 1
    text = service.errors.read_text()
    assert "Signalbox has failed: ValueError: the graph cannot be built" in text and "Traceback" not in text
    assert names(service.left()) == set()
    remove_kept_logs(service)


def test_a_port_that_is_taken_is_said_before_anything_is_started(start: Callable[..., Service]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        service = start(port=port)
        assert service.code(20) == 1
        text = service.errors.read_text()
        assert f"Port {port} of 127.0.0.1 is taken" in text and "SIGNALBOX__SERVER__PORT" in text
        assert "store" not in text


def test_haproxy_binds() -> None:
    configuration = (
        "frontend prometheus\n    bind :9101\n    mode http\nfrontend http_frontend\n    bind 127.0.0.1:8000\n"
        "frontend grpc\n    bind *:9000 proto h2\nlisten stats\n  bind *:8404\n  # bind nothing:1 here\n"
    )
    inside = rewrite(configuration, "127.0.0.1", 8000)
    assert [line.strip() for line in inside.splitlines() if line.strip().startswith("bind")] == [
        "bind 127.0.0.1:9101",
        "bind 127.0.0.1:8000",
        "bind 127.0.0.1:9000 proto h2",
        "bind 127.0.0.1:8404",
    ]
    outside = rewrite(configuration, "10.0.0.5", 8000)
    assert outside == inside.replace("127.0.0.1:8000", "10.0.0.5:8000")
