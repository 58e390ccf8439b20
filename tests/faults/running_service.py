"""`signalbox serve` on a configuration of the test's, with its processes at hand to be hurt."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import httpx
import psutil
import redis

from tests.ports import free_port

START_LIMIT_S = 180


class RunningService:
    """A real service whose files lie below `root`; `configuration` is YAML without `server`.

    Args:
        root: an empty folder.
        configuration: the rest of the file.
        server: further keys of `server`, as YAML within braces.
        environment: further variables of its processes.
    """

    def __init__(
        self, root: Path, configuration: str, *, server: str = "", environment: Mapping[str, str] | None = None
    ) -> None:
        self.root = root
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        config = root / "service.yaml"
        config.write_text(f"server: {{port: {port}{', ' if server else ''}{server}}}\n{configuration}")
        self.log = root / "service.log"
        own = {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(root / "cache")}
        self.process = subprocess.Popen(
            [str(Path(sys.executable).with_name("signalbox")), "serve", str(config)],
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            env={**os.environ, **own, **(environment or {})},
        )
        deadline = time.monotonic() + START_LIMIT_S
        while f"Signalbox is ready at {self.url}" not in self.log.read_text():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)
        self.client = httpx.Client(base_url=self.url, timeout=180)

    def stop(self) -> None:
        self.client.close()
        for process in self.pids("valkey-server"):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def tail(self) -> str:
        """The end of its log."""
        return self.log.read_text()[-6000:]

    def pids(self, part: str) -> list[psutil.Process]:
        """The service's processes whose command line has this part."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if part in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def replicas(self, deployment: str) -> list[psutil.Process]:
        """Processes of one Serve deployment: `gateway`, `expert-NAME`, `adapter-registry`."""
        return self.pids(f"ray::ServeReplica:signalbox:{deployment}")

    def valkey(self) -> psutil.Process:
        return self.pids("valkey-server")[0]

    def store(self) -> redis.Redis:
        """A connection to its embedded Valkey, to close after use."""
        sockets = [c.laddr for c in self.valkey().net_connections("unix") if str(c.laddr).endswith("valkey.sock")]
        return redis.Redis(unix_socket_path=str(sockets[0]))
