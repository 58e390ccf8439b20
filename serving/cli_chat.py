"""`signalbox chat`: a small terminal client that shows, beside each answer, who gave it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import orjson
import typer

from signalbox.serving.service_client import (
    DEFAULT_URL,
    ServiceError,
    Url,
    checked,
    connect,
    console,
    duration,
    messages,
)

# httpx is imported where it is used: `signalbox --help` must not wait for it.
if TYPE_CHECKING:
    import httpx


def chat_command(
    model: Annotated[str, typer.Option(help="`auto`, `auto:POLICY`, or an expert's name")] = "auto",
    policy: Annotated[str | None, typer.Option(help="policy for `auto`")] = None,
    system: Annotated[str | None, typer.Option(help="system prompt")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="0: greedy, cached")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="longest answer")] = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Talk to the service; beside each answer stands who gave it. /help lists what else can be typed."""
    settings = {"temperature": temperature, "max_tokens": max_tokens}
    with connect(url) as client:
        session = ChatSession(client, f"auto:{policy}" if policy else model, system, settings)
        try:
            session.check_model(session.model)
        except ServiceError as error:
            messages.print(str(error), style="red", markup=False)
            raise typer.Exit(1) from None
        if sys.stdin.isatty():
            console.print(
                f"Talking to {session.model} at {url}. /help for help, /quit or Ctrl-D to leave.", style="dim"
            )
        for line in _lines():
            if line.startswith("/"):
                if not session.command(line):
                    return
            elif line:
                session.say(line)
    if session.failed and not sys.stdin.isatty():
        raise typer.Exit(1)


def _lines() -> Iterator[str]:
    """What the user types, or what is piped in; piped lines are repeated, so that the output reads as a dialogue."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            if line.strip():
                console.print(f"> {line.strip()}", markup=False, soft_wrap=True)
            yield line.strip()
        return
    with suppress(ImportError):
        import readline  # noqa: F401  # gives input() its history and line editing
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print(" (/quit or Ctrl-D to leave)", style="dim")


_HELP = """/model NAME    ask an expert by name, or auto
/policy NAME   let the router choose under this policy
/new           forget the conversation
/quit          leave"""


@dataclass
class ChatSession:
    """One conversation with the service behind `client`, streamed to the terminal."""

    client: httpx.Client
    model: str
    system: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, str]] = field(default_factory=list)
    prices: dict[str, dict[str, float]] = field(default_factory=dict)
    failed: bool = False

    def check_model(self, name: str) -> None:
        """See that the service has this model, and learn the experts' prices. Raises `ServiceError`."""
        import httpx

        try:
            known = checked(self.client.get("/v1/models"))["data"]
        except httpx.ConnectError:
            raise ServiceError({"message": f"No service answers at {self.client.base_url}: signalbox serve"}) from None
        except httpx.HTTPError as error:
            raise ServiceError({"message": f"{self.client.base_url} does not answer properly: {error}"}) from None
        self.prices = {m["id"]: m["signalbox"]["price"] for m in known if "price" in m.get("signalbox", {})}
        if name not in {m["id"] for m in known}:
            raise ServiceError(
                {"message": f"there is no model '{name}'; there are: {', '.join(m['id'] for m in known)}"}
            )

    def command(self, line: str) -> bool:
        """Obey a line that starts with a slash; False to leave."""
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name in ("/quit", "/exit", "/q"):
            return False
        if name == "/new":
            self.history.clear()
            console.print("(a new conversation)", style="dim")
        elif name in ("/model", "/policy") and argument:
            wanted = f"auto:{argument}" if name == "/policy" else argument
            try:
                self.check_model(wanted)
            except ServiceError as error:
                messages.print(str(error), style="red", markup=False)
            else:
                self.model = wanted
                console.print(f"(now talking to {wanted})", style="dim", markup=False)
        else:
            if name != "/help":
                messages.print(f"there is no command {line}", style="red", markup=False)
            console.print(_HELP, style="dim", markup=False)
        return True

    def say(self, text: str) -> None:
        """Send a turn, print the answer as it comes, then who gave it. A turn that fails is forgotten."""
        import httpx

        self.history.append({"role": "user", "content": text})
        answer = _Answer()
        try:
            self._stream(answer)
        except KeyboardInterrupt:  # closing the connection stops the expert
            console.print(" (stopped)", style="dim")
        except (ServiceError, httpx.HTTPError) as error:
            self.failed = True
            self.history.pop()
            if answer.text:
                console.print()
            messages.print(f"error: {error}", style="red", markup=False)
            return
        self.history.append({"role": "assistant", "content": answer.text})
        console.print(answer.signature(self.prices.get(answer.expert)), style="dim", markup=False, soft_wrap=True)

    def _stream(self, answer: _Answer) -> None:
        opening = [{"role": "system", "content": self.system}] if self.system else []
        body = {"model": self.model, "messages": opening + self.history, "stream": True}
        body |= {"stream_options": {"include_usage": True}}
        body |= {name: value for name, value in self.settings.items() if value is not None}
        answer.sent = time.perf_counter()
        with self.client.stream("POST", "/v1/chat/completions", json=body) as reply:
            if reply.status_code != 200:
                reply.read()
                checked(reply)
            answer.headers = dict(reply.headers)
            for line in reply.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    piece = answer.take(orjson.loads(line[6:]))
                    if piece:
                        console.print(piece, end="", markup=False, soft_wrap=True)
        answer.done = time.perf_counter()
        console.print()


@dataclass
class _Answer:
    """An answer as it comes in; times by `time.perf_counter`."""

    text: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    usage: dict[str, int] | None = None
    sent: float = 0.0
    first: float = 0.0
    done: float = 0.0

    def take(self, event: dict[str, Any]) -> str:
        """The new text of one event. Raises `ServiceError` where the stream tells of an error."""
        if "error" in event:
            raise ServiceError(event["error"])
        self.usage = event.get("usage") or self.usage
        piece = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
        if piece and not self.first:
            self.first = time.perf_counter()
        self.text += piece
        return piece

    @property
    def expert(self) -> str:
        return self.headers.get("x-signalbox-expert", "?")

    def signature(self, price: dict[str, float] | None) -> str:
        """Who answered, why, how fast, and for how much."""
        said = [self.expert]
        confidence = self.headers.get("x-signalbox-confidence")
        policy = self.headers.get("x-signalbox-policy", "none")
        if confidence is None:
            said.append("asked for by name" if policy == "none" else f"policy {policy}")
        else:
            said.append(f"chosen under policy {policy}, confidence {float(confidence):.2f}")
        if self.headers.get("x-signalbox-attempts", "1") not in ("0", "1"):
            said.append(f"attempt {self.headers['x-signalbox-attempts']}")
        if self.headers.get("x-signalbox-cache") == "hit":
            said.append("from the cache")
        if self.first:
            said.append(f"first token {duration(1000 * (self.first - self.sent))}")
        if self.usage:
            tokens = self.usage["completion_tokens"]
            said.append(f"{tokens} tokens")
            if self.done > self.first > 0 and tokens > 1 and self.headers.get("x-signalbox-cache") != "hit":
                said.append(f"{(tokens - 1) / (self.done - self.first):.1f} tokens/s")
            if price:
                usd = (price["input"] * self.usage["prompt_tokens"] + price["output"] * tokens) / 1e6
                said.append(f"${usd:.2g}")
        return f"— {' · '.join(said)}"
