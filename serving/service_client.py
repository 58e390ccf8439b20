"""What the client commands share: talking to a running service, and to the person at the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import orjson
import typer
from rich.console import Console
from rich.table import Table

# httpx is imported where it is used: `signalbox --help` must not wait for it.
if TYPE_CHECKING:
    import httpx

DEFAULT_URL = "http://127.0.0.1:8000"
QUICKSTART = Path("examples/quickstart.yaml")
API_KEY_ENV = "SIGNALBOX_API_KEY"

console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
messages = Console(stderr=True, highlight=False, soft_wrap=True)

Url = Annotated[str, typer.Option(help=f"address of the service; the key, if it wants one, in {API_KEY_ENV}")]


class ServiceError(Exception):
    """What the service answered instead of what was asked, as its error object tells it."""

    def __init__(self, error: dict[str, Any], body: dict[str, Any] | None = None) -> None:
        super().__init__(str(error.get("message") or error))
        self.body = body or {}


def connect(url: str) -> httpx.Client:
    """A client of the service at this address, with the key of the environment if there is one."""
    import httpx

    key = os.environ.get(API_KEY_ENV)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    # An answer may take long to begin on a busy machine, but connecting to it may not.
    timeout = httpx.Timeout(600.0, connect=5.0)
    return httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=timeout, trust_env=False)


@contextmanager
def service(url: str) -> Iterator[httpx.Client]:
    """A client; errors of the service become a line and exit code 1."""
    import httpx

    try:
        with connect(url) as client:
            yield client
    except ServiceError as error:
        fail(str(error))
    except httpx.ConnectError:
        fail(f"No service answers at {url}; `signalbox serve` starts one.")
    except httpx.HTTPError as error:
        fail(f"{url} does not answer properly: {error}")


def checked(reply: httpx.Response) -> dict[str, Any]:
    """The reply's JSON. Raises `ServiceError` on an error status, or on what is not JSON."""
    try:
        body = orjson.loads(reply.content)
    except orjson.JSONDecodeError:
        body = None
    if not isinstance(body, dict):
        raise ServiceError({"message": f"{reply.url} answered {reply.status_code} and no JSON; is it a Signalbox?"})
    if not reply.is_success:
        raise ServiceError(body.get("error") or {"message": f"{reply.url} answered {reply.status_code}"}, body)
    return body


def duration(ms: float) -> str:
    """Milliseconds for people to read."""
    return f"{ms / 1000:.1f} s" if ms >= 1000 else f"{ms:.0f} ms"


def time_of(at: float | None) -> str:
    """Seconds since 1970 as local time for people to read; empty where there is none."""
    with suppress(TypeError, ValueError, OverflowError, OSError):
        return datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M:%S")  # type: ignore[arg-type]
    return ""


def plain_table(*headings: str) -> Table:
    """A table without lines; headings that begin with `>` are of numbers."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for heading in headings:
        table.add_column(
            heading.removeprefix(">"), justify="right" if heading.startswith(">") else "left", overflow="fold"
        )
    return table


def fail(message: str) -> NoReturn:
    """Say what is wrong, and end with exit code 1."""
    messages.print(message, style="red", markup=False)
    raise typer.Exit(1)
