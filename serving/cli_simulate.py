"""`signalbox policy simulate`: what a load would get of its policies, without engines."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import orjson
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from signalbox.serving.cli_common import told

if TYPE_CHECKING:
    from signalbox.policies.attainment import Figures
    from signalbox.policies.base import Policy
    from signalbox.policies.simulate_load import Bursts

QUICKSTART = Path("examples/quickstart.yaml")
messages = Console(stderr=True, highlight=False, soft_wrap=True)


def simulate_command(
    config: Annotated[Path, typer.Option(help="configuration with the experts and policies")] = QUICKSTART,
    load: Annotated[Path | None, typer.Option(help="recorded load, JSON lines; else one is drawn")] = None,
    rate: Annotated[float, typer.Option(min=1e-6, help="mean requests a second of a drawn load")] = 2.0,
    duration: Annotated[float, typer.Option(min=1e-3, help="seconds of a drawn load")] = 300.0,
    burst: Annotated[
        str,
        typer.Option(help="FACTOR:SHARE:PERIOD: so many times the rate, this share of the time, once every PERIOD s"),
    ] = "3:0.1:10",
    mix: Annotated[
        str | None, typer.Option(help="policies and their shares, gold=0.2,bronze=0.8; default: all alike")
    ] = None,
    prompt_bytes: Annotated[str, typer.Option(help="LEAST-MOST bytes of drawn prompts, log-uniform")] = "40-800",
    answer_tokens: Annotated[str, typer.Option(help="LEAST-MOST tokens of drawn answers, log-uniform")] = "8-64",
    policies: Annotated[
        Path | None, typer.Option(help="file of policies by name, which replace the configuration's of that name")
    ] = None,
    speeds: Annotated[
        Path | None, typer.Option(help="file of measured engine speeds by expert (benchmarks.sla writes one)")
    ] = None,
    quality: Annotated[
        str | None, typer.Option(help="predicted qualities where no router knows: small=0.4,large=0.6:0.1 (mean:sd)")
    ] = None,
    system: Annotated[
        Literal["signalbox", "fcfs", "round_robin"],
        typer.Option(help="fcfs: no ceilings, priorities or admission; round_robin: the experts in turn besides"),
    ] = "signalbox",
    grace: Annotated[
        float | None, typer.Option(min=0, help="seconds waited after the last arrival; default: all")
    ] = None,
    seed: Annotated[int, typer.Option(help="of the load, of the engines' jitter and of drawn qualities")] = 0,
    json: Annotated[Path | None, typer.Option(help="file for the figures")] = None,
) -> None:
    """Replay a recorded or drawn load against policies, in virtual time, and print attainment and cost.

    A load file has one request a line:

    {"at": 1.25, "policy": "gold", "prompt_bytes": 320, "max_tokens": 64, "answer_tokens": 40, "quality": {"a": 0.4}}

    `at`: seconds since the load began. `prompt`: the text itself, in place of prompt_bytes; the router then predicts
    its qualities. `answer_tokens`: how many were written; default: max_tokens. `quality`: predictions by expert.
    """
    with told():
        from signalbox.policies.simulate import simulate
        from signalbox.policies.simulate_load import Lengths, LoadError, read_load, synthetic
        from signalbox.serving.config import load_config
        from signalbox.serving.simulated_pool import (
            left_out,
            read_policies,
            read_speeds,
            simulated_pool,
            with_predictions,
        )

        checked = load_config(config)
        tiers: dict[str, Policy] = dict(checked.policies) | (read_policies(policies) if policies is not None else {})
        if not tiers:
            raise typer.BadParameter(f"{config} has no policies: give --policies")
        try:
            if load is not None:
                arrivals, seconds = read_load(load), None
            else:
                shares = _numbers(mix, "--mix") if mix is not None else dict.fromkeys(tiers, 1.0)
                lengths = Lengths(_span(prompt_bytes, "--prompt-bytes"), _span(answer_tokens, "--answer-tokens"))
                arrivals = synthetic(rate, duration, shares, bursts=_bursts(burst), lengths=lengths, seed=seed)
                seconds = duration
        except LoadError as error:
            raise typer.BadParameter(str(error)) from None
        unknown = sorted({arrival.policy for arrival in arrivals} - set(tiers))
        if unknown:
            raise typer.BadParameter(f"there is no policy '{unknown[0]}'; there are: {', '.join(tiers)}")
        if not arrivals:
            raise typer.BadParameter("no request was drawn in so short a time: raise --rate or --duration")
        tiers = {name: tiers[name] for name in tiers if any(arrival.policy == name for arrival in arrivals)}
        pool, warnings = simulated_pool(checked, read_speeds(speeds) if speeds is not None else {}, _qualities(quality))
        arrivals, spread = with_predictions(arrivals, checked)
        for text in (*warnings, *left_out(tiers)):
            messages.print(f"warning: {text}", markup=False, style="yellow")
        done = simulate(
            arrivals,
            pool,
            tiers,
            system=system,
            max_queued=checked.admission.max_queued,
            max_wait_s=checked.admission.max_wait_s,
            grace_s=math.inf if grace is None else grace,
            spread=spread,
            seconds=seconds,
            seed=seed,
        )
        found = done.figures(tiers)
        _show(found, f"{system}: {len(arrivals)} requests in {done.seconds:.4g} s")
        if json is not None:
            json.parent.mkdir(parents=True, exist_ok=True)
            said: dict[str, Any] = {"system": system, "seconds": done.seconds, "seed": seed}
            said["figures"] = {name: asdict(figures) for name, figures in found.items()}
            json.write_bytes(orjson.dumps(said, option=orjson.OPT_INDENT_2) + b"\n")


def _show(found: Mapping[str, Figures], title: str) -> None:
    table = Table(title=escape(title), title_justify="left")
    table.add_column("policy", overflow="fold")
    for heading in ("offered", "answered", "kept", "95 %", "kept/s", "TTFT p50", "p99", "USD"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("shed", "by expert"):
        table.add_column(heading, overflow="fold")
    for name, f in found.items():
        table.add_row(
            escape(name),
            str(f.offered),
            str(f.answered),
            f"{f.attainment:.1%}",
            f"{f.low:.0%}-{f.high:.0%}",
            f"{f.goodput:.3g}",
            _duration(f.ttft_p50_ms),
            _duration(f.ttft_p99_ms),
            f"{f.cost_usd:.3g}",
            ", ".join(f"{reason} {count}" for reason, count in f.shed.items()) or "-",
            ", ".join(f"{expert} {count}" for expert, count in f.experts.items()) or "-",
        )
    out = Console()
    (out if out.is_terminal else Console(width=160)).print(table)


def _duration(ms: float) -> str:
    if math.isnan(ms):
        return "-"
    return f"{ms:.0f} ms" if ms < 10_000 else f"{ms / 1000:.1f} s"


def _numbers(text: str, option: str) -> dict[str, float]:
    """`a=1,b=2` -> {a: 1, b: 2}."""
    found: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = part.rpartition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            equals = ""
        if not math.isfinite(found.get(name.strip(), math.nan)):
            equals = ""
        if not equals or not name.strip():
            raise typer.BadParameter(f"{option}: '{part}' is not NAME=NUMBER")
    return found


def _qualities(text: str | None) -> dict[str, tuple[float, float]]:
    """`a=0.4,b=0.6:0.1` -> means and standard deviations."""
    found: dict[str, tuple[float, float]] = {}
    for part in filter(None, (part.strip() for part in (text or "").split(","))):
        name, equals, value = part.rpartition("=")
        mean, _, deviation = value.partition(":")
        try:
            pair = (float(mean), float(deviation or 0.0))
        except ValueError:
            pair = (-1.0, 0.0)
        if not equals or not (0 <= pair[0] <= 1 and 0 <= pair[1] <= 1):
            raise typer.BadParameter(f"--quality: '{part}' is not EXPERT=MEAN or EXPERT=MEAN:SD, each in [0, 1]")
        found[name.strip()] = pair
    return found


def _span(text: str, option: str) -> tuple[int, int]:
    """`8-64` or `8` -> least and most."""
    low, _, high = text.partition("-")
    try:
        return int(low), int(high or low)
    except ValueError:
        raise typer.BadParameter(f"{option}: '{text}' is not LEAST-MOST") from None


def _bursts(text: str) -> Bursts:
    from signalbox.policies.simulate_load import Bursts

    try:
        factor, share, period_s = (float(part) for part in text.split(":"))
    except ValueError:
        raise typer.BadParameter(f"--burst: '{text}' is not FACTOR:SHARE:PERIOD, as in 3:0.1:10") from None
    return Bursts(factor, share, period_s)
