"""The command `signalbox`. Torch and Ray are imported by what needs them, not here: `--help` answers at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from signalbox import __version__
from signalbox.experts.catalog import ExpertConfig, LocalExpert
from signalbox.serving import logs
from signalbox.serving.cli_adapters import adapters_app
from signalbox.serving.cli_client import chat_command, route_command
from signalbox.serving.cli_esft import esft_app
from signalbox.serving.cli_policy import policy_app
from signalbox.serving.cli_router import router_app
from signalbox.serving.config import Config, ConfigError, load_config, missing_environment

QUICKSTART = Path("examples/quickstart.yaml")

app = typer.Typer(
    name="signalbox",
    help="Routers predict, policies decide, experts generate: many language models behind one API.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,  # they may hold keys
)
app.add_typer(router_app, name="router")
app.add_typer(adapters_app, name="adapters")
app.add_typer(esft_app, name="esft")
app.add_typer(policy_app, name="policy")
app.command("route")(route_command)
app.command("chat")(chat_command)

console = Console(highlight=False)
messages = Console(stderr=True, highlight=False, soft_wrap=True)

ConfigPath = Annotated[Path, typer.Argument(help="configuration file", metavar="CONFIG")]


def _print_version(wanted: bool) -> None:
    if wanted:
        console.print(f"signalbox {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="show the version and exit")
    ] = False,
) -> None:
    """Set up what all commands share."""
    logs.configure()


@app.command()
def serve(config: ConfigPath = QUICKSTART) -> None:
    """Start the service; Ctrl-C stops it and every process it started."""
    checked = _load(config, check_artifacts=True)
    key = checked.server.api_key_env
    absent = missing_environment(checked)
    if key in absent:
        _fail([f"{config}: server.api_key_env: the environment variable {key} is not set"])
    for name in absent:
        _warn(f"the environment variable {name} is not set; the experts that need it will not start")
    from signalbox.serving.graph import serve_forever

    raise typer.Exit(serve_forever(config, checked))


@app.command()
def check(
    config: Annotated[Path | None, typer.Argument(help="configuration file", metavar="CONFIG")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="print the JSON schema of configuration files")] = False,
) -> None:
    """Validate a configuration without starting anything; exit code 1 if it cannot be used."""
    if schema:
        print(json.dumps(Config.model_json_schema(), indent=2))
        return
    checked = _load(config or QUICKSTART, check_artifacts=True)
    for name in missing_environment(checked):
        _warn(f"the environment variable {name} is not set")
    counts = (
        _counted(len(checked.experts), "expert"),
        _counted(len(checked.routers), "router"),
        _counted(len(checked.policies), "policy", "policies"),
    )
    console.print(f"{config or QUICKSTART}: {', '.join(counts)}. No problem found.", soft_wrap=True, markup=False)


@app.command()
def models(
    config: Annotated[Path, typer.Option("--config", help="configuration file")] = QUICKSTART,
) -> None:
    """Show the pool: models, sizes, prices, licences, and whether they are on this machine."""
    checked = _load(config)
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("expert", "engine", "model"):
        table.add_column(heading, overflow="fold")
    for heading in ("parameters", "context", "$ per M, in", "out"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("licence", "here"):
        table.add_column(heading, overflow="fold")
    for name, expert in checked.experts.items():
        facts = _Facts(expert)
        table.add_row(
            name,
            expert.engine,
            escape(expert.model),
            _short(facts.parameters),
            f"{facts.context_length:,}" if facts.context_length else "?",
            f"{expert.price.input:g}",
            f"{expert.price.output:g}",
            escape(facts.license or "?"),
            escape(facts.here),
        )
    (console if console.is_terminal else Console(width=160)).print(table)


class _Facts:
    """What the configuration declares of an expert, completed from its weights where they are on this machine."""

    def __init__(self, expert: ExpertConfig) -> None:
        self.parameters, self.context_length = expert.parameters, expert.context_length
        self.license, self.here = expert.license, "simulated" if expert.engine == "simulated" else "remote"
        if not isinstance(expert, LocalExpert):
            return
        from signalbox.experts.models import ModelUnavailable, resolve

        try:
            local = resolve(expert.model, progress=_refuse_work, weights=expert.has_weights)
        except _WouldTakeWork:
            self.here = "from the first start on"
        except ModelUnavailable as error:
            self.here = f"no: {error}"
        else:
            self.here = "yes" if expert.has_weights else "RANDOM WEIGHTS"
            self.parameters = self.parameters or local.parameters
            self.context_length = self.context_length or local.context_length
            self.license = self.license or local.license


class _WouldTakeWork(Exception):
    """A model must first be downloaded or converted."""


def _refuse_work(stage: str, fraction: float) -> None:
    """Progress callback that ends `resolve` where it would begin to download or convert."""
    raise _WouldTakeWork


def _load(path: Path, *, check_artifacts: bool = False) -> Config:
    try:
        return load_config(path, on_warning=_warn, check_artifacts=check_artifacts)
    except ConfigError as error:
        _fail(error.messages)


def _warn(text: str) -> None:
    messages.print(f"warning: {text}", markup=False, style="yellow")


def _fail(lines: list[str]) -> NoReturn:
    for line in lines:
        messages.print(line, markup=False, style="red")
    raise typer.Exit(1)


def _counted(count: int, one: str, many: str = "") -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"


def _short(parameters: int | None) -> str:
    """135000000 -> 135M."""
    if parameters is None:
        return "?"
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if parameters >= size:
            return f"{parameters / size:.3g}{unit}"
    return str(parameters)
