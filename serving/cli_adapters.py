"""`signalbox adapters add | list | show | remove | check`: adapters of a running service, and one on this disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import orjson
import typer
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from signalbox.serving.cli_adapters_train import train_command
from signalbox.serving.service_client import (
    DEFAULT_URL,
    QUICKSTART,
    ServiceError,
    Url,
    checked,
    console,
    duration,
    fail,
    messages,
    plain_table,
    service,
    time_of,
)

# httpx, torch and transformers are imported where they are used: `signalbox --help` must not wait for them.
if TYPE_CHECKING:
    import httpx

    from signalbox.adapters.base import AdapterFacts, Limits

POLL_S = 0.25
SILENCE_S = 30.0  # how long a service may be unreachable while something is waited for

adapters_app = typer.Typer(
    name="adapters", help="Register, show, remove, check and train adapters.", no_args_is_help=True
)

Name = Annotated[str, typer.Argument(help="the adapter's name")]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="wait until it is done, showing each step")]
Timeout = Annotated[float, typer.Option(min=0.1, help="longest wait, seconds")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON, as the service gives it")]


@adapters_app.command("add")
def add_command(
    name: Name,
    path: Annotated[Path, typer.Argument(help="its folder, as the service sees it")],
    base: Annotated[str | None, typer.Option(help="the expert that it adapts; needed where several could be")] = None,
    pinned: Annotated[bool, typer.Option("--pinned", help="never evicted when slots are short")] = False,
    replicas: Annotated[int | None, typer.Option(min=1, help="replicas of the base that hold it; default: all")] = None,
    wait: Wait = True,
    timeout: Timeout = 600.0,
    url: Url = DEFAULT_URL,
) -> None:
    """Register an adapter, or a new version of one; done once every replica that shall hold it has answered with it."""
    body: dict[str, Any] = {"name": name, "path": str(path.expanduser().absolute()), "pinned": pinned}
    body |= {"base": base} if base is not None else {}
    body |= {"replicas": replicas} if replicas is not None else {}
    with service(url) as client:
        record = checked(client.post("/v1/adapters", json=body))
        version = record["version"]
        if not wait:
            console.print(f"{name}@{version}: {record['phase']}", markup=False)
            return
        last = _follow(client, name, timeout, lambda record: _outcome(record, version))
        rank = f" of rank {last['rank']}" if last["rank"] else ""
        console.print(
            f"{last['id']} is ready: version {version}, {last['kind']}{rank}, {_size(last['bytes'])}, "
            f"on {_ready_of(last)} replicas",
            markup=False,
        )


@adapters_app.command("list")
def list_command(url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Show all adapters and what their replicas say of them at this moment."""
    with service(url) as client:
        body = checked(client.get("/v1/adapters"))
    if as_json:
        print(orjson.dumps(body, option=orjson.OPT_INDENT_2).decode())
        return
    if not body["data"]:
        console.print("No adapters. `signalbox adapters add NAME PATH` registers one.", markup=False)
        return
    table = plain_table(
        "adapter", "base", "kind", "phase", ">version", ">rank", ">size", ">ready on", "pinned", "reason"
    )
    for record in body["data"]:
        table.add_row(
            escape(record["name"]),
            escape(record["base"]),
            record["kind"],
            _colored(record["phase"]),
            str(record["version"]),
            str(record["rank"] or ""),
            _size(record["bytes"]),
            _ready_of(record),
            "yes" if record["pinned"] else "",
            escape(record["reason"] or ""),
        )
    console.print(table)


@adapters_app.command("show")
def show_command(name: Name, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Show one adapter: its versions, its replicas, and what has happened to it."""
    with service(url) as client:
        record = checked(client.get(f"/v1/adapters/{name}"))
    if as_json:
        print(orjson.dumps(record, option=orjson.OPT_INDENT_2).decode())
        return
    console.print(Text.assemble((record["id"], "bold"), "  ", Text.from_markup(_colored(record["phase"]))))
    for key in ("reason", "path", "kind", "rank", "bytes", "content_hash", "pinned"):
        if record.get(key) not in (None, "", False):
            console.print(f"  {key}: {record[key]}", markup=False)
    versions = plain_table(">version", "phase", "since", "reason")
    for version in record["versions"]:
        versions.add_row(
            str(version["version"]),
            _colored(version["phase"]),
            time_of(version.get("created_at")),
            escape(version.get("reason") or ""),
        )
    replicas = plain_table("replica", "phase", ">version")
    for replica, state in sorted(record["replicas"].items()):
        replicas.add_row(escape(replica), _colored(state["phase"]), str(state["version"] or ""))
    events = plain_table("at", "phase", ">version", "event")
    for event in record["events"]:
        events.add_row(
            time_of(event["at"]), _colored(event["phase"]), str(event["version"]), escape(event["reason"] or "")
        )
    for table in (versions, replicas, events):
        if table.row_count:
            console.print(table)


@adapters_app.command("remove")
def remove_command(name: Name, wait: Wait = True, timeout: Timeout = 600.0, url: Url = DEFAULT_URL) -> None:
    """Remove an adapter; requests that it is answering are finished first."""
    with service(url) as client:
        checked(client.delete(f"/v1/adapters/{name}"))
        if not wait:
            console.print(f"{name} is being removed", markup=False)
            return
        _follow(client, name, timeout, lambda record: record["phase"] == "gone")
    console.print(f"{name} is gone", markup=False)


@adapters_app.command("check")
def check_command(
    path: Annotated[Path, typer.Argument(help="folder of the adapter")],
    base: Annotated[str, typer.Option(help="expert of the configuration, or a model: pypi:, hf: or a path")],
    config: Annotated[Path, typer.Option(help="configuration that declares the expert")] = QUICKSTART,
    as_json: AsJson = False,
) -> None:
    """Check an adapter against a base here, without a service; exit code 1 and the reason if it cannot be used."""
    from signalbox.adapters.base import AdapterError

    try:
        facts = _check_here(path.expanduser().absolute(), base, config)
    except AdapterError as error:
        if as_json:
            print(orjson.dumps({"message": error.message, "code": error.code, "tensor": error.tensor}).decode())
        else:
            messages.print(f"{error.message} ({error.code})", style="red", markup=False)
        raise typer.Exit(1) from None
    if as_json:
        print(orjson.dumps(facts, option=orjson.OPT_INDENT_2).decode())
        return
    rank = f" of rank {facts.rank}" if facts.rank else ""
    console.print(
        f"{facts.path}: {facts.kind}{rank}, {len(facts.modules)} modules, {facts.parameters:,} parameters, "
        f"{_size(facts.nbytes)}. No problem found.",
        markup=False,
        soft_wrap=True,
    )


adapters_app.command("train")(train_command)


# What the commands stand on


def _follow(
    client: httpx.Client, name: str, timeout_s: float, done: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """Ask until `done`, showing phase and replicas as they change; returns the last record.

    A record that is not there counts as one whose phase is `gone`. A service that cannot be reached for a while is
    asked again. Raises `ServiceError` where it takes longer than `timeout_s`.
    """
    started = heard = time.monotonic()
    record: dict[str, Any] = {"name": name, "phase": "", "version": "", "reason": "", "replicas": {}}
    with _progress() as show:
        while True:
            try:
                record = _record(client, name)
                heard = time.monotonic()
            except ServiceError:
                if time.monotonic() - heard > SILENCE_S:
                    raise
            show(record, time.monotonic() - started)
            if done(record):
                return record
            if time.monotonic() - started > timeout_s:
                why = f": {record['reason']}" if record.get("reason") else ""
                still = f"'{name}' is still {record['phase']} after {timeout_s:g} s{why}"
                raise ServiceError(
                    {"message": f"{still}. The service goes on; `signalbox adapters show {name}` says how far it is"}
                )
            time.sleep(POLL_S)


def _record(client: httpx.Client, name: str) -> dict[str, Any]:
    import httpx

    try:
        reply = client.get(f"/v1/adapters/{name}", timeout=10.0)
    except httpx.HTTPError as error:
        raise ServiceError({"message": f"the service does not answer any more: {error}"}) from None
    if reply.status_code == 404:
        return {"name": name, "phase": "gone", "version": "", "reason": "", "replicas": {}, "versions": []}
    return checked(reply)


def _outcome(record: dict[str, Any], version: int) -> bool:
    """Whether this version is ready. Raises `ServiceError` where it never will be."""
    name = record["name"]
    ours = next((v for v in record["versions"] if v["version"] == version), None)
    if record["phase"] == "gone" or ours is None or ours["phase"] in ("draining", "gone"):
        newer = f": version {record['version']} came after it" if record["version"] != version else ""
        raise ServiceError({"message": f"'{name}' was removed while it was loaded{newer}"})
    if ours["phase"] == "failed":
        raise ServiceError({"message": f"'{name}' version {version} failed: {ours['reason'] or 'no reason given'}"})
    if record["version"] == version and record["phase"] == "ready":
        return True
    # Slots are short: it was ready, and already made room for others that are in use.
    return bool(record.get("evicted") and record.get("serving") == version and ours.get("loaded_at"))


@contextmanager
def _progress() -> Iterator[Callable[[dict[str, Any], float], None]]:
    """Shows a record as it changes: one live line on a terminal, else a line for each change."""
    if console.is_terminal:
        with Live(console=console, transient=True, refresh_per_second=8) as live:
            yield lambda record, seconds: live.update(
                Text.from_markup(f"{_line(record, colored=True)}  [dim]{duration(seconds * 1000)}[/dim]")
            )
        return
    last = ""

    def print_change(record: dict[str, Any], seconds: float) -> None:
        nonlocal last
        if (line := _line(record)) != last:
            last = line
            console.print(f"{seconds:6.1f} s  {line}", markup=False, soft_wrap=True)

    yield print_change


def _line(record: dict[str, Any], *, colored: bool = False) -> str:
    """`banking@3 staged (tiny#a ready, tiny#b staged)`; with `colored`, as rich's markup."""
    paint: Callable[[str], str] = _colored if colored else str
    plain: Callable[[str], str] = escape if colored else str
    said = f"{plain(record['name'])}@{record['version']} {paint(record['phase'])}"
    states = ", ".join(
        f"{plain(replica)} {paint(state['phase'])}" for replica, state in sorted(record["replicas"].items())
    )
    return f"{said} ({states})" if states else said


def _check_here(path: Path, base: str, config: Path) -> AdapterFacts:
    from signalbox.adapters.base import AdapterError
    from signalbox.adapters.base_shape import base_shape
    from signalbox.adapters.validate import validate
    from signalbox.experts.models import ModelUnavailable, resolve

    reference, limits = _base_of(base, path, config)
    try:
        model = resolve(reference, weights=False)
    except ModelUnavailable as error:
        raise AdapterError(error.message, code="unknown_base") from None
    return validate(path, base_shape(model.path), limits)


def _base_of(base: str, path: Path, config: Path) -> tuple[str, Limits]:
    """Model reference and limits: of an expert in the configuration, or of a model as it is given.

    An expert's limits are the service's own; a model alone says nothing of where adapters may lie.
    """
    from signalbox.adapters.base import Limits
    from signalbox.experts.catalog import LocalExpert
    from signalbox.serving.config import ConfigError, adapter_limits, load_config

    if ":" in base or Path(base).exists():
        return base, Limits.of_any_size(Path(path.anchor))
    try:
        loaded = load_config(config, on_warning=lambda _: None)  # of other parts than this expert
    except ConfigError as error:
        fail("\n".join(error.messages))
    expert = loaded.experts.get(base)
    if not isinstance(expert, LocalExpert):
        local = ", ".join(name for name, e in loaded.experts.items() if isinstance(e, LocalExpert)) or "none"
        fail(f"--base {base}: {config} has no expert of this name that adapters could fit; those that could: {local}")
    return expert.model, adapter_limits(loaded, base)


_COLORS = {"ready": "green", "failed": "red", "gone": "dim", "absent": "dim", "unreachable": "red"}


def _colored(phase: str) -> str:
    return f"[{color}]{phase}[/{color}]" if (color := _COLORS.get(phase, "yellow" if phase else "")) else phase


def _ready_of(record: dict[str, Any]) -> str:
    """`1/2`: replicas that hold the version, of those there are."""
    ready = sum(
        state["phase"] == "ready" and state["version"] == record["version"] for state in record["replicas"].values()
    )
    return f"{ready}/{len(record['replicas'])}"


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB" if count else ""
