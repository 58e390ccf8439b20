"""The client commands: `signalbox route` shows a decision, `signalbox chat` (in `cli_chat`) talks to a service."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import orjson
import typer
from rich.markup import escape
from rich.table import Table

from signalbox.serving.cli_chat import chat_command
from signalbox.serving.service_client import (
    DEFAULT_URL,
    QUICKSTART,
    ServiceError,
    Url,
    checked,
    connect,
    console,
    duration,
    messages,
)

# The predictor and the dispatcher are imported where they are used: `signalbox --help` must not wait for them.
if TYPE_CHECKING:
    from signalbox.serving.config import Config

__all__ = ["chat_command", "route_command"]


def route_command(
    prompt: Annotated[str, typer.Argument(help="the request's text; flags such as `[Flag: smallest model]` count")],
    policy: Annotated[str | None, typer.Option(help="name of a policy in the configuration")] = None,
    tradeoff: Annotated[
        float | None,
        typer.Option(min=0, max=10, help="0: quality alone, 10: cost alone; replaces the weights"),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="longest answer, for cost and time")] = None,
    url: Url = DEFAULT_URL,
    config: Annotated[Path, typer.Option(help="configuration, to decide here when no service answers")] = QUICKSTART,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, as /v1/route gives it")] = False,
) -> None:
    """Show which expert a prompt would go to, and why, without generating anything."""
    body: dict[str, Any] = {"model": f"auto:{policy}" if policy else "auto", "prompt": prompt}
    if tradeoff is not None:
        body["signalbox"] = {"cost_quality_tradeoff": tradeoff}
    if max_tokens is not None:
        body["max_tokens"] = max_tokens
    try:
        plan = _ask_service(url, body)
        if plan is None:
            messages.print(
                f"No service answers at {url}: deciding here, by {config} and declared latencies.", style="yellow"
            )
            plan = _decide_here(config, body)
    except ServiceError as error:
        if as_json:
            print(orjson.dumps(error.body).decode())
        else:
            if error.body.get("ratings"):
                console.print(_score_table(error.body["ratings"], None))
            messages.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from None
    if as_json:
        print(orjson.dumps(plan, option=orjson.OPT_INDENT_2).decode())
    else:
        _show_plan(plan)


def _ask_service(url: str, body: dict[str, Any]) -> dict[str, Any] | None:
    """The service's decision; None where nothing listens there. Raises `ServiceError`."""
    import httpx

    with connect(url) as client:
        try:
            reply = client.post("/v1/route", json=body)
        except httpx.ConnectError:
            return None
        except httpx.HTTPError as error:
            raise ServiceError({"message": f"{url} does not answer properly: {error}"}) from None
    return checked(reply)


def _decide_here(path: Path, body: dict[str, Any]) -> dict[str, Any]:
    """The decision of a service that has just started, made in this process. Raises `ServiceError`, or exits."""
    import asyncio

    from signalbox.experts.base import ExpertError
    from signalbox.policies.base import NoCandidate
    from signalbox.serving.completions import describe_plan
    from signalbox.serving.config import ConfigError, load_config
    from signalbox.serving.dispatch import Dispatcher
    from signalbox.serving.live_state import ExpertState, LiveState
    from signalbox.serving.pool import Pool
    from signalbox.serving.protocols.openai import parse_completion
    from signalbox.serving.protocols.openai_replies import error_object
    from signalbox.serving.routing import routing_of
    from signalbox.serving.store import Store

    try:
        config = load_config(path)
    except ConfigError as error:
        for line in error.messages:
            messages.print(line, style="red", markup=False)
        raise typer.Exit(1) from None

    async def decide() -> dict[str, Any]:
        routing = routing_of(config)
        store = Store("redis://127.0.0.1:1")  # never asked: only answers are looked up in it
        live = LiveState(store, config.experts)
        live.assume({name: ExpertState(ready=True, **_local_facts(config, name)) for name in config.experts})
        pool = Pool(config, live=live, assume_adapters=True)
        dispatcher = Dispatcher(config, experts={}, pool=pool, routing=routing, store=store)
        routing.start()
        started = time.perf_counter()
        try:
            plan = await dispatcher.plan(parse_completion(body))
        finally:
            await routing.close()
            await store.close()
        spent = round((time.perf_counter() - started) * 1000, 3)
        return describe_plan(plan) | {"overhead_ms": spent}

    try:
        plan = asyncio.run(decide())
    except ExpertError as error:
        said: dict[str, Any] = error_object(error)
        if isinstance(error.__cause__, NoCandidate):
            said["ratings"] = error.__cause__.ratings
        said = orjson.loads(orjson.dumps(said))
        raise ServiceError(said["error"], said) from None
    return dict(orjson.loads(orjson.dumps(plan)))


def _local_facts(config: Config, name: str) -> dict[str, Any]:
    """Size and context of a model whose files are on this machine; nothing is downloaded or converted for it."""
    from signalbox.experts.base import ExpertError
    from signalbox.experts.catalog import LocalExpert
    from signalbox.experts.models import resolve

    class WouldTakeWork(Exception):
        pass

    def refuse(stage: str, fraction: float) -> None:
        raise WouldTakeWork

    expert = config.experts[name]
    if isinstance(expert, LocalExpert):
        with suppress(WouldTakeWork, ExpertError):
            model = resolve(expert.model, progress=refuse, weights=expert.has_weights)
            return {"parameters": model.parameters, "context_length": model.context_length}
    return {}


def _show_plan(plan: dict[str, Any]) -> None:
    console.print(_score_table(plan["ratings"], plan["expert"]))
    distances = _distance_table(plan.get("constraints") or [])
    if distances is not None:
        console.print(distances)
    said = [f"policy {plan['policy']}"]
    if plan["router"] == "fallback":
        said.append("the router could not be asked: quality is unknown")
    elif plan["router"] == "none":
        said.append("no router: quality is unknown")
    else:
        said.append(f"router {plan['router']}")
    if plan["confidence"] is not None:
        said.append(f"confidence {plan['confidence']:.2f}")
    if plan["flags"]:
        said.append(f"flags: {', '.join(plan['flags'])}")
    if plan["objective"]:
        weights = ", ".join(f"{name} {weight:g}" for name, weight in plan["objective"].items() if weight)
        said.append(f"weights: {weights or 'none'}")
    if plan["violated"]:
        said.append(f"breaks {', '.join(plan['violated'])}, as no expert keeps all ceilings")
    if plan["fallbacks"]:
        said.append(f"then {', '.join(plan['fallbacks'])}")
    console.print(f"→ {plan['expert']}  ({'; '.join(said)})", markup=False, soft_wrap=True)


def _score_table(ratings: list[dict[str, Any]], chosen: str | None) -> Table:
    """One row an expert, as the decision saw it; cost for this request and per million tokens, in US dollars."""
    from signalbox.policies.base import Strike

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("")
    table.add_column("expert", no_wrap=True)
    for heading in ("quality", "cost $", "$/1M", "TTFT", "TPOT", "total", "utility"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("struck out")
    for r in ratings:
        table.add_row(
            "→" if r["expert"] == chosen else "",
            r["expert"],
            f"{r['quality']:.3f} ± {r['uncertainty']:.3f}",
            f"{r['cost_usd']:.2g}",
            f"{r['cost_per_1m']:.3g}",
            duration(r["ttft_ms"]),
            duration(r["tpot_ms"]),
            duration(r["total_ms"]),
            f"{r['utility']:.3f}",
            ", ".join(str(Strike(**s)) for s in r["strikes"]),
            style="bold" if r["expert"] == chosen else ("dim" if r["strikes"] else ""),
        )
    return table


def _distance_table(rows: list[dict[str, Any]]) -> Table | None:
    """Each expert's distance to each constraint, as a share of the limit; None where the policy sets none.

    Below 0 there is room, above 0 the constraint is broken (in red).
    """
    limits = {
        said["constraint"]: said["limit"] for row in rows for said in row["constraints"] if said["distance"] is not None
    }
    if not limits:
        return None
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("distance to")
    for constraint, limit in limits.items():
        table.add_column(f"{constraint} {limit:g}", justify="right", no_wrap=True)
    for row in rows:
        known = {said["constraint"]: said for said in row["constraints"]}
        table.add_row(escape(row["expert"]), *(_distance(known.get(constraint)) for constraint in limits))
    return table


def _distance(said: dict[str, Any] | None) -> str:
    if said is None or said["distance"] is None:
        return ""
    # Far beyond a limit of next to nothing the share says no more than that.
    text = f"{said['distance']:+.0%}" if said["distance"] < 100 else "> +10000%"
    return text if said["kept"] else f"[red]{text}[/red]"
