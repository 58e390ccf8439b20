"""`signalbox serve`: from a configuration to a running service, and back to nothing.

In this order: the models (converted where they must be), the store, Ray, the Serve graph, readiness. Everything is
bound to loopback, unless `server.host` says otherwise for the service's own port.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.spinner import Spinner

from signalbox.experts.catalog import LocalExpert
from signalbox.serving import local_ray, logs
from signalbox.serving.config import Config
from signalbox.serving.embedded_valkey import EmbeddedValkey, ValkeyError
from signalbox.serving.placement import PlacementError
from signalbox.serving.store import redact
from signalbox.serving.supervisor import Stop, run_supervised, stop_on_signals

if TYPE_CHECKING:
    from ray.serve import Application

BuildApp = Callable[[Config, str], "Application"]

_EXPERTS_WAIT_S = 600.0  # for a model to load
_LISTENERS_WAIT_S = 5.0
_FAILED_WAIT_S = 20.0  # when every expert has failed: they try again by themselves, once or twice in this time
_LAST_LINES = 15


class StartError(Exception):
    """The service cannot start; the message is for the operator."""


@dataclass(slots=True)
class _Step:
    """One step of the start: `detail` is what it came to, `show` what is being done."""

    show: Callable[[str], None]
    detail: str = ""


class _Terminal:
    """What the operator sees: a line for each step of the start, and the service's log."""

    def __init__(self) -> None:
        # Copies, because 1 and 2 themselves are given to Ray, which prints what no one wants to read.
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        self.console = Console(file=os.fdopen(os.dup(2), "w", buffering=1), highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def step(self, name: str, doing: str) -> Iterator[_Step]:
        """Show what is being done, then what it came to and the time it took."""
        started = time.monotonic()
        spinner = Spinner("dots", f"{name}: {doing}")
        # Not console.status(): it would show what Ray writes to sys.stderr.
        live = Live(spinner, console=self.console, transient=True, redirect_stdout=False, redirect_stderr=False)
        step = _Step(show=lambda text: spinner.update(text=f"{name}: {escape(text)}"))
        with live if self.console.is_terminal else contextlib.nullcontext():
            yield step
        self.console.print(f"  {name:<8}{escape(step.detail)} [dim]({time.monotonic() - started:.1f} s)[/]")

    def say(self, text: str) -> None:
        """A line on standard output, as it is."""
        self._out.write(text + "\n")

    def log(self, text: str) -> None:
        """A line of the service's log."""
        self.console.print(text, markup=False)


def serve_forever(path: Path, config: Config, *, build_app: BuildApp | None = None) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit code: 0 stopped as asked, 1 failed, 130 killed in the end.

    `build_app(config, store_url)` makes the Serve application; the default is the gateway's. When this returns, no
    process that was started is left, nor a file, except Ray's logs after a failure.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    config, lock = _claim_port(config)
    if lock is None:
        console.print(
            f"Port {config.server.port} of {config.server.host} is taken. Stop what listens there, or choose another: "
            f"server.port in {path}, or SIGNALBOX__SERVER__PORT=8001",
            markup=False,
        )
        return 1
    # A short path: Ray and HAProxy put Unix sockets below it, and those paths end at 107 bytes.
    base = tempfile.gettempdir()
    folder = Path(tempfile.mkdtemp(prefix="sbx-", dir=base if len(base) <= 16 else "/tmp"))
    try:
        code = run_supervised(lambda: _Service(path, config, folder, build_app or _gateway).run())
        if code == 1 and (folder / "ray").exists():
            console.print(f"Ray's logs are kept in {folder}", markup=False)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        lock.close()
    return code


def _gateway(config: Config, store_url: str) -> Application:
    from signalbox.serving.gateway import build_app

    return build_app(config, store_url)


def _claim_port(config: Config) -> tuple[Config, socket.socket | None]:
    """The configuration with its port settled, and a lock on the port (None where it is taken)."""
    host, port = config.server.host, config.server.port
    if port == 0:
        with socket.socket() as probe:
            probe.bind((host, 0))
            port = probe.getsockname()[1]
        config = config.model_copy(update={"server": config.server.model_copy(update={"port": port})})
    return config, local_ray.claim(f"port-{port}") if local_ray.is_free(host, port) else None


class _Service:
    """The start, the life and the end of one service, in the supervised process."""

    def __init__(self, path: Path, config: Config, folder: Path, build_app: BuildApp) -> None:
        self._path = path
        self._config = config
        self._folder = folder
        self._build_app = build_app
        self._terminal = _Terminal()
        # HAProxy listens there; on 0.0.0.0 too the service answers on loopback.
        self._host = "127.0.0.1" if config.server.host == "0.0.0.0" else config.server.host
        self._url = f"http://{self._host}:{config.server.port}"

    def run(self) -> int:
        """Start, wait, stop; returns the exit code."""
        stop_on_signals()
        console = self._terminal.console
        try:
            with ExitStack() as stack:
                self._start(stack)
                self._terminal.say(f"Signalbox is ready at {self._url}")
                self._wait()
        except (Stop, SystemExit):  # SystemExit: Ray's own handler of SIGTERM, during its start
            shutil.rmtree(self._folder, ignore_errors=True)  # here as well, in case the supervisor was killed
            console.print("Stopped.")
            return 0
        except (StartError, ValkeyError) as error:
            console.print(f"[bold red]Signalbox cannot start:[/] {escape(str(error))}")
        except Exception as error:
            console.print(f"[bold red]Signalbox has failed:[/] {escape(f'{type(error).__name__}: {error}')}")
            for line in self._noise():
                console.print(f"  {line}", markup=False, style="dim")
        return 1

    def _start(self, stack: ExitStack) -> None:
        started = time.monotonic()
        self._terminal.console.print(f"Signalbox, {self._path}", markup=False)
        self._prepare_models()
        store_url = self._start_store(stack)
        receiver = logs.LogReceiver(self._folder / "log.sock", self._terminal.log)
        stack.callback(receiver.close)
        os.environ[logs.SOCKET_ENV] = str(receiver.path)
        self._start_ray(stack)
        with self._terminal.step("graph", "starting gateway and experts") as step:
            try:
                application = self._build_app(self._config, store_url)
            except PlacementError as error:
                raise StartError(str(error)) from None
            self._ray.serve(application, self._config.server.port)
            gateways, experts = self._config.server.gateways, len(self._config.experts)
            step.detail = f"{gateways} gateway{'s' * (gateways > 1)}, {experts} expert{'s' * (experts > 1)}"
        with self._terminal.step("experts", "loading") as step:
            step.detail = self._await_readiness(step.show)
        self._check_listeners()
        self._terminal.console.print(f"  started in {time.monotonic() - started:.1f} s", style="dim")

    def _prepare_models(self) -> None:
        """Resolve every local model, in a process of its own: converting one takes memory for good."""
        experts = self._config.experts
        references = {name: (e.model, e.has_weights) for name, e in experts.items() if isinstance(e, LocalExpert)}
        if not references:
            return
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = resolve_models(references, self._terminal.console)
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        if status != 0:
            raise StartError("a model is not to be had, see above")
        names = ", ".join(references)
        self._terminal.console.print(f"  {'models':<8}{names} [dim]({time.monotonic() - started:.1f} s)[/]")

    def _start_store(self, stack: ExitStack) -> str:
        store = self._config.store
        with self._terminal.step("store", "starting") as step:
            if store.url != "embedded":
                step.detail = redact(store.url)
                return store.url
            valkey = EmbeddedValkey(
                folder=self._folder, data_dir=store.data_dir, max_memory_mib=self._config.cache.max_memory_mib
            )
            url = valkey.start()
            stack.callback(valkey.stop)
            step.detail = "Valkey, embedded"
            return url

    def _start_ray(self, stack: ExitStack) -> None:
        with self._terminal.step("ray", "starting") as step:
            noise = os.open(self._folder / "noise.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(noise, 1)
            os.dup2(noise, 2)
            os.close(noise)
            ports = local_ray.PortBlock()
            stack.callback(ports.release)
            local_ray.prepare(self._folder, ports, self._config.server.host, self._config.server.port)
            self._ray = local_ray.LocalRay(self._folder)
            stack.callback(self._ray.stop)
            self._ray.start()
            stop_on_signals()  # Ray has put its own handler of SIGTERM in place
            step.detail = "on this machine"

    def _await_readiness(self, show: Callable[[str], None]) -> str:
        """Wait until every expert is ready or has failed and at least one is ready; returns what they said."""
        states, hopeless_since = "", None
        deadline = time.monotonic() + _EXPERTS_WAIT_S
        with httpx.Client(timeout=5.0, trust_env=False) as client:
            while time.monotonic() < deadline:
                with contextlib.suppress(httpx.HTTPError, ValueError):
                    reply = client.get(f"{self._url}/readyz")
                    said = _readiness(reply.json())
                    states = ", ".join(f"{name} {state}" for name, state in said.items())
                    starting = any(state.startswith("starting") for state in said.values())
                    # Serve's own proxy answers until HAProxy takes the port over, with an id beside ours. What is
                    # said to be ready then would refuse connections a moment later.
                    for_good = len(reply.headers.get_list("x-request-id")) < 2
                    if reply.status_code == 200 and not starting and for_good:
                        return states
                    show(states)
                    hopeful = not said or starting or "ready" in said.values()
                    hopeless_since = None if hopeful else hopeless_since or time.monotonic()
                if hopeless_since and time.monotonic() - hopeless_since > _FAILED_WAIT_S:
                    raise StartError(f"no expert can be used: {states}")
                self._check_ray()
                time.sleep(0.1)
        raise StartError(f"not ready within {_EXPERTS_WAIT_S:.0f} s: {states or 'the gateway does not answer'}")

    def _check_listeners(self) -> None:
        """Nothing of ours but the service itself may be reachable from outside, and the service must be ours."""
        server = self._config.server
        deadline, found = time.monotonic() + _LISTENERS_WAIT_S, local_ray.listeners()
        while not any(port == server.port for _, port, _ in found):
            # HAProxy hands the port from process to process when Serve reloads it, and a look may miss both.
            if time.monotonic() > deadline:
                raise StartError(f"another process took port {server.port} meanwhile")
            time.sleep(0.1)
            found = local_ray.listeners()
        strays = [
            f"{process} on {address}:{port}"
            for address, port, process in found
            if not address.startswith("127.") and address != "::1" and port != server.port
        ]
        if strays:
            raise StartError(f"these would be reachable from outside this machine: {', '.join(strays)}")

    def _wait(self) -> None:
        while True:
            time.sleep(1.0)
            self._check_ray()

    def _check_ray(self) -> None:
        dead = self._ray.dead()
        if dead:
            raise RuntimeError(f"a process of Ray has ended: {', '.join(dead)}")

    def _noise(self) -> list[str]:
        with contextlib.suppress(OSError):
            return (self._folder / "noise.log").read_text(errors="replace").splitlines()[-_LAST_LINES:]
        return []


def _readiness(body: Any) -> dict[str, str]:
    """Expert -> `ready`, `starting` or the reason why not, from the body of /readyz."""
    return {
        name: "ready" if state.get("ready") else str(state.get("reason") or "starting")
        for name, state in body.get("experts", {}).items()
    }


def resolve_models(references: dict[str, tuple[str, bool]], console: Console) -> int:
    """Make every model loadable, with a progress bar where there is something to convert; 0, or 1 with a message.

    `references` maps each expert to its model's reference and whether its weights are wanted.
    """
    from signalbox.experts.models import ModelUnavailable, resolve

    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        for name, (reference, weights) in references.items():
            task, last = None, ""

            def show(stage: str, fraction: float, name: str = name) -> None:
                nonlocal task, last
                if task is None:
                    task = progress.add_task(name, total=1.0)
                progress.update(task, completed=fraction, description=f"{name}: {stage}")
                if not console.is_terminal and stage != last:  # no bar in a log file: a line for each stage
                    console.print(f"  {name}: {stage}", markup=False)
                last = stage

            try:
                resolve(reference, progress=show, weights=weights)
            except ModelUnavailable as error:
                console.print(f"{name}: {error}", markup=False, style="red")
                return 1
    return 0
