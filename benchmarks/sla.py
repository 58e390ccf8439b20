"""`make bench-sla`: promises under load. Three tiers, 0.5 to 2 times the capacity, against first come and round robin.

For each pool (the two models of the quickstart; two simulated engines of stated speed) real services are started and
asked over HTTP by an open-loop generator in a process of its own (`sla_load`), its requests Poisson with bursts: a
tenth of the time at three times the rate, one burst every ten seconds. All systems get the same arrivals:

- first come: the same service with admission off, `auto` under one policy without ceilings;
- round robin: the same, the client names the experts in turn;
- signalbox: `auto:gold`, `auto:silver`, `auto:bronze` (20, 30 and 50 % of the requests).

Capacity is measured first (`sla_measure.measure_capacity`), the tiers' ceilings follow from it (`tiers_of`), and engine
models are fitted to the same measurement: `simulate` then plays the very same arrivals, to be held against the run.
A request has kept its promise when it was answered within the ceilings of its tier, by the client's clock, from the
moment when it should have been sent; the shed and the failed have not.

    python -m benchmarks.sla --pool simulated --loads 0.5,1.5
"""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import orjson
import psutil
import typer
import yaml
from rich.console import Console

from benchmarks.report import RESULTS, ROOT, Row, print_table, write_results
from benchmarks.serving_processes import our_service
from benchmarks.sla_measure import (
    Capacity,
    Played,
    System,
    bytes_per_token,
    calibrated,
    load_of,
    measure_capacity,
    play,
    tiers_of,
)
from benchmarks.sla_plots import write_plot
from benchmarks.sla_pools import POOLS, Pool
from signalbox.policies.attainment import ALL, T95, Figures, Outcome, figures
from signalbox.policies.base import Policy
from signalbox.policies.simulate import simulate
from signalbox.policies.simulate_load import Arrival, write_load
from signalbox.serving.config import load_config
from signalbox.serving.simulated_pool import EngineSpeed, simulated_pool, with_predictions

WORK = ROOT / ".run" / "bench_sla"
LOADS = "0.5,1,1.5,2"
WARM_UP_S = 10.0
GRACE_S = 2.0  # beyond the longest promise; whoever is not answered then has missed it anyhow
MARGIN = 0.05  # by which the simulation may be off
BLOCKS = 20
SIMULATED = {"signalbox": "signalbox", "first come": "fcfs", "round robin": "round_robin"}
console = Console(stderr=True, highlight=False)


@dataclass
class Run:
    """Everything measured of one pool so far; rows are written after each step."""

    pool: Pool
    seconds: float
    rows: list[Row] = field(default_factory=list)
    capacity: Capacity | None = None
    tiers: dict[str, Policy] = field(default_factory=dict)
    loads: dict[float, list[Arrival]] = field(default_factory=dict)
    outcomes: dict[tuple[System, float], list[Outcome]] = field(default_factory=dict)
    real: dict[tuple[System, float], dict[str, Figures]] = field(default_factory=dict)
    forecast: dict[tuple[System, float], dict[str, Figures]] = field(default_factory=dict)

    def add(self, case: str, metric: str, value: float, unit: str = "", **more: Any) -> None:
        """A row, written at once."""
        self.rows.append(Row(f"{self.pool.name}: {case}", metric, value, unit, **more))

    def save(self) -> Path:
        """What there is so far."""
        return write_results(f"sla_{self.pool.name}", f"python -m benchmarks.sla {' '.join(sys.argv[1:])}", self.rows)


def write_config(pool: Pool, name: str, policies: Mapping[str, dict[str, Any]], *, admission: bool) -> Path:
    path = WORK / f"{pool.name}-{name}.yaml"
    path.write_text(yaml.safe_dump(pool.config(policies, admission=admission), sort_keys=False))
    return path


def note_capacity(run: Run, capacity: Capacity) -> None:
    """Rows of the closed loop, and of the ceilings that follow from it."""
    for level in capacity.levels:
        case = "closed loop of " + ", ".join(f"{n} on {name}" for name, n in level.streams.items())
        for name, rate in level.rate.items():
            run.add(case, f"{name}: finished", rate, "requests/s")
    run.add("capacity", "the experts' best rates, summed", capacity.requests_per_s, "requests/s")
    run.add("capacity", "time to first token, unloaded, the slowest expert", capacity.unloaded_ttft_ms, "ms")
    run.add("capacity", "an answer with all places taken, median", capacity.answer_ms, "ms")
    for name, tier in run.tiers.items():
        run.add(f"tier {name}", "max_ttft_ms", tier.slo.max_ttft_ms or math.nan, "ms")
        run.add(f"tier {name}", "max_total_ms", tier.slo.max_total_ms or math.nan, "ms")


def note_load(run: Run, system: System, factor: float, played: Played) -> None:
    """Rows of one load through one system."""
    found = run.real[system, factor] = figures(played.outcomes, run.tiers, run.seconds)
    run.outcomes[system, factor] = played.outcomes
    kept = b"".join(orjson.dumps(asdict(o)) + b"\n" for o in played.outcomes)
    (WORK / f"{run.pool.name}-{factor:g}-{system.replace(' ', '-')}.jsonl").write_bytes(kept)
    case = f"{factor:g} x capacity, {system}"
    for name, f in found.items():
        gold = system == "signalbox" and name == "gold" and factor == 1.5
        goal: dict[str, Any] = {"goal": "at least 0.95", "met": f.attainment >= 0.95} if gold else {}
        run.add(case, f"{name}: attainment", f.attainment, low=f.low, high=f.high, **goal)
        run.add(case, f"{name}: TTFT p50", f.ttft_p50_ms, "ms")
        run.add(case, f"{name}: TTFT p99", f.ttft_p99_ms, "ms")
        for reason, count in (f.shed | f.failed).items():
            run.add(case, f"{name}: not answered, {reason}", count / f.offered)
    whole = found[ALL]
    run.add(case, "goodput", whole.goodput, "requests/s", **_against_first_come(run, system, factor))
    run.add(case, "offered", whole.offered)
    run.add(case, "unfinished", whole.unfinished)
    run.add(case, "cost", 1000 * whole.cost_usd, "USD/1000")
    for name, count in whole.experts.items():
        run.add(case, f"answered by {name}", count / max(1, whole.answered))
    run.add(case, "generator's lag p99", played.lag_p99_ms, "ms")
    run.add(case, "cores that other programs kept busy", played.others_cores, "cores")
    run.add(case, "answers of another length than asked for", played.other_lengths)
    tiers = ", ".join(f"{n} {f.attainment:.1%}" for n, f in found.items())
    console.print(
        f"{run.pool.name} {case}: kept {tiers}; goodput {whole.goodput:.3g}/s; lag {played.lag_p99_ms:.1f} ms"
    )
    console.print(f"    shed {whole.shed} failed {whole.failed} unfinished {whole.unfinished} by {whole.experts}")


def _against_first_come(run: Run, system: System, factor: float) -> dict[str, Any]:
    """Reference and goal of goodput: the two got the same arrivals, so the difference is taken block by block."""
    theirs = run.real.get(("first come", factor))
    if theirs is None or system == "first come":
        return {}
    reference = theirs[ALL].goodput
    if system != "signalbox":
        return {"reference": reference}
    difference, error = paired(run.outcomes[system, factor], run.outcomes["first come", factor], run.tiers, run.seconds)
    ours = run.real[system, factor][ALL].goodput
    return {
        "reference": reference,
        "low": ours - error,
        "high": ours + error,
        "goal": "not below first come's (95 % interval of the paired difference)",
        "met": difference + error >= 0,
    }


def paired(
    ours: Sequence[Outcome], theirs: Sequence[Outcome], tiers: Mapping[str, Policy], seconds: float
) -> tuple[float, float]:
    """Difference of goodput, requests/s, and half its 95 % interval, from blocks of time."""
    blocks = [0.0] * BLOCKS
    for sign, outcomes in ((1, ours), (-1, theirs)):
        for o in outcomes:
            if o.kept(tiers[o.policy].slo):
                blocks[min(BLOCKS - 1, int(o.at / seconds * BLOCKS))] += sign * BLOCKS / seconds
    mean = sum(blocks) / BLOCKS
    variance = sum((b - mean) ** 2 for b in blocks) / (BLOCKS - 1)
    return mean, T95 * math.sqrt(variance / BLOCKS)


async def measure(run: Run, factors: Sequence[float], port: int, systems: Sequence[System]) -> None:
    """All loads through these systems of one running service, after a warm-up."""
    assert run.capacity is not None
    longest = max(tier.slo.max_total_ms or 0.0 for tier in run.tiers.values()) / 1000
    warm = load_of(run.pool, run.capacity.requests_per_s, WARM_UP_S, seed=1)
    await play(run.pool, port, systems[0], warm, GRACE_S + longest)
    for factor in factors:
        for system in systems:
            played = await play(run.pool, port, system, run.loads[factor], GRACE_S + longest)
            note_load(run, system, factor, played)
            run.save()


def measure_pool(run: Run, factors: Sequence[float], seed: int) -> None:
    """The two services one after the other, and between them nothing but what the first has taught."""
    pool = run.pool
    plain = {"plain": {"objective": dict(pool.plain), "cache": "off"}}
    first = write_config(pool, "first-come", plain, admission=False)
    with our_service(first, WORK / f"{pool.name}-first-come.log") as (port, _):
        capacity = run.capacity = asyncio.run(measure_capacity(pool, port))
        tiers = tiers_of(pool, capacity)
        run.tiers = {name: Policy.model_validate(tier) for name, tier in tiers.items()}
        note_capacity(run, capacity)
        console.print(
            f"{pool.name}: capacity {capacity.requests_per_s:.3g} requests/s {capacity.by_expert}; "
            + ", ".join(f"{n} {t['slo']}" for n, t in tiers.items())
        )
        run.loads = {f: load_of(pool, f * capacity.requests_per_s, run.seconds, seed) for f in factors}
        run.save()
        asyncio.run(measure(run, factors, port, ("first come", "round robin")))
    ours = write_config(pool, "signalbox", tiers, admission=True)
    with our_service(ours, WORK / f"{pool.name}-signalbox.log") as (port, _):
        asyncio.run(measure(run, factors, port, ("signalbox",)))


def forecast(run: Run) -> None:
    """The same arrivals, simulated with engines fitted to the closed loop, against what was measured."""
    assert run.capacity is not None
    sizes = bytes_per_token(run.pool, run.capacity)
    speeds = {}
    for name, found in calibrated(run.pool, run.capacity).items():
        speeds[name] = EngineSpeed(**asdict(found.speed), overhead_ms=found.overhead_ms, bytes_per_token=sizes[name])
        case = f"calibrated {name}"
        run.add(case, "median relative error of TTFT", found.ttft_error)
        run.add(case, "median relative error of time per token", found.tpot_error)
        run.add(case, "step of one request", found.speed.step_ms, "ms")
        run.add(case, "each further request", found.speed.step_ms_per_request, "ms")
        run.add(case, "beside the engine", found.overhead_ms, "ms")
    (WORK / f"{run.pool.name}-speeds.json").write_bytes(
        orjson.dumps({name: speed.model_dump() for name, speed in speeds.items()}, option=orjson.OPT_INDENT_2)
    )
    config = load_config(WORK / f"{run.pool.name}-signalbox.yaml")
    experts, _ = simulated_pool(config, speeds, {})
    plain = dict.fromkeys(run.tiers, Policy.model_validate({"objective": dict(run.pool.plain)}))
    grace_s = GRACE_S + max(tier.slo.max_total_ms or 0.0 for tier in run.tiers.values()) / 1000
    predicted = {}
    for factor, load in run.loads.items():
        predicted[factor] = with_predictions(load, config)
        write_load(WORK / f"{run.pool.name}-{factor:g}-load.jsonl", predicted[factor][0])
    for (system, factor), real in run.real.items():
        load, spread = predicted[factor]
        done = simulate(
            load,
            experts,
            run.tiers,
            system=SIMULATED[system],  # type: ignore[arg-type]
            deciding=plain if system == "first come" else None,
            max_queued=config.admission.max_queued,
            max_wait_s=config.admission.max_wait_s,
            grace_s=grace_s,
            spread=spread,
            seconds=run.seconds,
        )
        run.forecast[system, factor] = found_here = done.figures(run.tiers)
        for name, f in found_here.items():
            goal: dict[str, Any] = {}
            if system == "signalbox":
                goal = {"goal": "within 0.05", "met": abs(f.attainment - real[name].attainment) <= MARGIN}
            case, metric = f"{factor:g} x capacity, {system}, simulated", f"{name}: attainment"
            run.add(case, metric, f.attainment, reference=real[name].attainment, **goal)
    run.save()


def draw(run: Run) -> None:
    """The plots of one pool."""
    systems = sorted({system for system, _ in run.real}, key=list(SIMULATED).index)
    factors = sorted({factor for _, factor in run.real})

    def line(found: Mapping[tuple[System, float], dict[str, Figures]], system: System, name: str, what: str) -> Any:
        return [(f, getattr(found[system, f][name], what)) for f in factors if name in found.get((system, f), {})]

    kept: dict[str, Any] = {
        tier: {system: line(run.real, system, tier, "attainment") for system in systems} for tier in run.tiers
    }
    write_plot(RESULTS / f"sla_{run.pool.name}_attainment.svg", f"Promises kept, {run.pool.name} pool", "share", kept)
    goodput: dict[str, Any] = {system: line(run.real, system, ALL, "goodput") for system in systems}
    goodput["offered"] = [(f, len(load) / run.seconds) for f, load in run.loads.items() if f in factors]
    title = f"Goodput, {run.pool.name} pool"
    dashed = frozenset({"offered"})
    write_plot(RESULTS / f"sla_{run.pool.name}_goodput.svg", title, "kept requests/s", {"": goodput}, dashed)
    if any(system == "signalbox" for system, _ in run.forecast):
        pairs = {
            tier: {
                "measured": line(run.real, "signalbox", tier, "attainment"),
                "simulated": line(run.forecast, "signalbox", tier, "attainment"),
            }
            for tier in run.tiers
        }
        title = f"Promises kept by signalbox, measured and simulated, {run.pool.name} pool"
        write_plot(RESULTS / f"sla_{run.pool.name}_simulated.svg", title, "share", pairs)


def main(
    pool: Annotated[str, typer.Option(help="quickstart, simulated, or both")] = "both",
    seconds: Annotated[float | None, typer.Option(min=2, help="of each load; default: 25 and 20")] = None,
    loads: Annotated[str, typer.Option(help="multiples of capacity")] = LOADS,
    seed: Annotated[int, typer.Option(help="of the arrivals")] = 7,
) -> None:
    """Measure, simulate, draw; write benchmarks/results/sla_POOL.json; exit code 1 where a goal is missed."""
    names = list(POOLS) if pool == "both" else [pool]
    if not set(names) <= set(POOLS):
        raise typer.BadParameter(f"--pool is one of {', '.join(POOLS)}, both")
    factors = [float(part) for part in loads.split(",")]
    WORK.mkdir(parents=True, exist_ok=True)
    for log in WORK.glob("*.log"):
        log.unlink()
    missed = False
    load_average = psutil.getloadavg()[0]
    if load_average > 0.5:
        console.print(f"The load average is {load_average:.1f}: other work will bear on the figures.", style="yellow")
    for name in names:
        chosen = POOLS[name]()
        run = Run(chosen, seconds or chosen.seconds)
        run.add("machine", "load average before", psutil.getloadavg()[0])
        try:
            measure_pool(run, factors, seed)
        except Exception:
            console.print_exception()
            missed = True
        try:
            if run.real:
                forecast(run)
                draw(run)
        except Exception:
            console.print_exception()
            missed = True
        if run.rows:
            print_table(run.rows)
            console.print(f"wrote {run.save()}")
        missed = missed or any(row.met is False for row in run.rows)
    if missed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
