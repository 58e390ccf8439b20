"""`signalbox policy plan`: the pool to run, for a memory budget and the traffic that it must bear."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import orjson
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from signalbox.serving.cli_common import ENCODER, Pool, console, names_of, told

# NumPy, SciPy and the encoder are imported inside the command: `signalbox --help` must not wait for them.
if TYPE_CHECKING:
    from numpy.typing import NDArray

    from signalbox.policies.pool_plan import PoolPlan
    from signalbox.router.table import Table

_BYTES = re.compile(r"(\d+(?:\.\d+)?(?:e\+?\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
MAX_FILE = 1 << 20


@dataclass(frozen=True)
class Problem:
    """What is to be planned. C categories, E experts; sizes in bytes of a replica, traffic in requests a second."""

    experts: tuple[str, ...]
    categories: tuple[str, ...]
    quality: NDArray[Any]
    frequency: NDArray[Any]
    sizes: NDArray[Any]
    demand: NDArray[Any]
    traffic: NDArray[Any] | None
    utilization: float  # of a replica's throughput, which `demand` counts as all of it
    from_what: str

    def best_single(self, budget: float) -> tuple[str, float] | None:
        """The one expert that is best alone within the memory, and its expected quality; None where none fits."""
        replicas = (self.demand.sum(axis=0) - 1e-6).clip(min=1)
        quality = self.frequency @ self.quality
        fitting = [e for e, n in enumerate(replicas) if self.sizes[e] * math.ceil(n) <= budget]
        best = max(fitting, key=lambda e: float(quality[e]), default=None)
        return None if best is None else (self.experts[best], float(quality[best]))


def plan_command(
    table: Annotated[Path, typer.Option(help="table of scores or losses")],
    memory: Annotated[str, typer.Option(help="memory for all replicas, such as 16GiB")],
    pool: Pool = "all",
    rps: Annotated[
        float | None, typer.Option(min=0, help="requests a second, in the table's mix of categories")
    ] = None,
    traffic: Annotated[
        Path | None, typer.Option(help="YAML or JSON file: requests a second by category, {math: 2.5, code: 1}")
    ] = None,
    throughput: Annotated[
        str | None, typer.Option(help="answer tokens a second of one replica, under load: name=300,other=90, or 200")
    ] = None,
    answer_tokens: Annotated[float, typer.Option(min=1, help="mean length of an answer, tokens")] = 256.0,
    utilization: Annotated[
        float, typer.Option(min=0.05, max=1, help="share of a replica's throughput that is planned for")
    ] = 0.7,
    parameters: Annotated[
        str | None, typer.Option(help="JSON file, or name=8e9,name2=7B; else sizes are read from the names")
    ] = None,
    bytes_per_parameter: Annotated[float, typer.Option(min=0.1, help="2 for bf16, 1 for 8 bits, 0.5 for 4")] = 2.0,
    overhead: Annotated[str, typer.Option(help="memory of each replica besides its weights: KV cache and so on")] = "0",
    encoder: Annotated[str, typer.Option(help="sentence encoder, for tables without tasks")] = ENCODER,
    seed: Annotated[int, typer.Option(help="for clusters, in tables without tasks")] = 0,
    json: Annotated[Path | None, typer.Option(help="file for the figures")] = None,
) -> None:
    """Print the pool to run: which experts to keep, which serves which category, and how many replicas it takes.

    It is the one of greatest expected quality that fits the memory (Composition of Experts' map); with traffic, each
    expert has the replicas that its categories need. Exit code 1 where nothing fits, with the least memory that would.
    """
    with told():
        budget, extra = _bytes(memory, "--memory"), _bytes(overhead, "--overhead")
        if rps is not None and traffic is not None:
            raise typer.BadParameter("give --rps or --traffic, not both: the file says how much of each category")
        rows, categories, labels, what = _read(table, pool, encoder, seed)
        by_category = _traffic(traffic, rps, categories, labels)
        problem = _problem(
            rows,
            categories,
            labels,
            what,
            sizes=_sizes(rows.models, parameters, bytes_per_parameter) + extra,
            traffic=by_category,
            utilization=utilization,
            replica_rps=None if by_category is None else _speeds(throughput, rows.models) * utilization / answer_tokens,
        )
        plan, fits = _solved(problem, budget)
        without = plan if by_category is None else _without_traffic(problem, budget)
        show_plan(problem, plan, budget, fits=fits)
        if fits and without is not None and without.quality > plan.quality + 1e-9:
            console.print(
                f"The traffic costs {without.quality - plan.quality:.4f} of quality: without it the same memory has "
                f"{without.quality:.4f}.",
                markup=False,
            )
        if json is not None:
            json.parent.mkdir(parents=True, exist_ok=True)
            said = described(problem, plan, budget, fits=fits)
            json.write_bytes(orjson.dumps(said, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY) + b"\n")
    if not fits:
        raise typer.Exit(1)


def _read(table: Path, pool: str, encoder: str, seed: int) -> tuple[Table, tuple[str, ...], NDArray[Any], str]:
    """The table's rows for the pool, names of categories, each row's, and where they are from."""
    import numpy as np

    from signalbox.router.table import fraction_of, read_table
    from signalbox.router.teaching import FOLDS
    from signalbox.serving.cli_composition import categories_of

    rows = read_table(table).pool(names_of(pool)).complete()
    folds = np.array([int(fraction_of(prompt, "fold") * FOLDS) for prompt in rows.prompt])
    categories, labels, what = categories_of(rows, folds, encoder, seed)
    return (
        rows,
        categories,
        labels,
        f"{len(rows)} rows of {table.name}, {len(set(labels.tolist()))} categories ({what})",
    )


def _problem(
    rows: Table,
    categories: tuple[str, ...],
    labels: NDArray[Any],
    what: str,
    *,
    sizes: NDArray[Any],
    traffic: NDArray[Any] | None,
    replica_rps: NDArray[Any] | None,
    utilization: float,
) -> Problem:
    import numpy as np

    from signalbox.router.category_map import category_quality, frequencies

    count = len(categories)
    quality = category_quality(rows.score, labels, count)
    if traffic is None or replica_rps is None:
        frequency, demand = frequencies(labels, count), np.zeros(quality.shape)
    else:
        frequency, demand = traffic / traffic.sum(), traffic[:, None] / replica_rps[None]
    return Problem(tuple(rows.models), categories, quality, frequency, sizes, demand, traffic, utilization, what)


def _solved(problem: Problem, budget: float) -> tuple[PoolPlan, bool]:
    """The best plan that fits, or else the smallest, and which of the two it is."""
    from signalbox.policies.pool_plan import DoesNotFit, least_memory, solve_pool

    arguments = (problem.quality, problem.frequency, problem.sizes, problem.demand)
    try:
        try:
            return solve_pool(*arguments, budget), True
        except DoesNotFit:
            return least_memory(*arguments), False
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _without_traffic(problem: Problem, budget: float) -> PoolPlan | None:
    import numpy as np

    from signalbox.policies.pool_plan import DoesNotFit, solve_pool

    try:
        demand = np.zeros(problem.quality.shape)
        return solve_pool(problem.quality, problem.frequency, problem.sizes, demand, budget)
    except DoesNotFit:
        return None


# What the options say


def _sizes(experts: Sequence[str], parameters: str | None, bytes_per_parameter: float) -> NDArray[Any]:
    """Bytes of each expert's weights."""
    import numpy as np

    from signalbox.serving.cli_composition import is_nominal, parameters_of

    counts = parameters_of(parameters, experts)
    for name, count in counts.items():
        if is_nominal(name, count):
            console.print(
                f"{name}: {count / 1e9:g}B is nominal, from its name; give the true number by --parameters {name}=...",
                style="yellow",
                markup=False,
            )
    return np.array([counts[name] for name in experts]) * bytes_per_parameter


def _speeds(text: str | None, experts: Sequence[str]) -> NDArray[Any]:
    """Answer tokens a second of one replica of each expert."""
    import numpy as np

    found: dict[str, float] = {}
    for item in filter(None, (item.strip() for item in (text or "").split(","))):
        name, _, value = item.rpartition("=")
        speed = _number(value)
        if speed is None or speed <= 0:
            raise typer.BadParameter(f"--throughput: '{item}' is not NAME=TOKENS_PER_SECOND")
        if name and name.strip() not in experts:
            raise typer.BadParameter(f"--throughput: the pool has no expert '{name}'{_near(name, experts)}")
        for expert in [name.strip()] if name else experts:
            if name or expert not in found:
                found[expert] = speed
    missing = [name for name in experts if name not in found]
    if missing:
        wanted = ",".join(f"{name}=..." for name in missing)
        raise typer.BadParameter(
            f"traffic needs to know how fast the experts are: --throughput {wanted} "
            "(answer tokens a second of one replica, under load)"
        )
    return np.array([found[name] for name in experts])


def _traffic(
    file: Path | None, rps: float | None, categories: Sequence[str], labels: NDArray[Any]
) -> NDArray[Any] | None:
    """Requests a second of each category; None where traffic is not to be counted."""
    import numpy as np

    from signalbox.router.category_map import frequencies
    from signalbox.serving.config_source import ConfigError, read_yaml

    if file is None:
        return None if not rps else rps * frequencies(labels, len(categories))
    try:
        if file.is_file() and file.stat().st_size > MAX_FILE:
            raise ConfigError([f"{file}: is larger than a list of categories ever is (1 MiB)"])
        source = read_yaml(file)
    except ConfigError as error:
        raise typer.BadParameter("; ".join(error.messages)) from None
    found = np.zeros(len(categories))
    for name, value in source.data.items():
        if name not in categories:
            raise typer.BadParameter(f"{file}: the table has no category '{name}'{_near(name, categories)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise typer.BadParameter(f"{file}: {name}: must be a number of requests a second")
        found[list(categories).index(name)] = value
    if not found.sum() > 0:
        raise typer.BadParameter(f"{file}: no category has any traffic")
    return found


def _bytes(text: str, option: str) -> float:
    """`16GiB`, `80GB`, `5e9` -> bytes."""
    match = _BYTES.fullmatch(text.strip())
    if match is None or (match[3] and not match[2]):
        raise typer.BadParameter(f"{option}: '{text}' is no size; write 16GiB, 80GB or 5e9 (bytes)")
    return float(match[1]) * (1024.0 if match[3] else 1000.0) ** _POWERS[match[2].lower()]


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _near(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name.strip(), known, n=1, cutoff=0.4)
    return f"; did you mean {near[0]}?" if near else f" (there are: {', '.join(known)})"


# What is told


def described(problem: Problem, plan: PoolPlan, budget: float, *, fits: bool) -> dict[str, Any]:
    """The plan in plain types, for `--json`. Memory in bytes, traffic in requests a second."""
    served, single = _served(problem, plan), problem.best_single(budget)
    return {
        "fits": fits,
        "memory": budget,
        "memory_used": plan.memory,
        "quality": plan.quality,
        "best_single": {"expert": single[0], "quality": single[1]} if single else None,
        "experts": {
            name: {
                "replicas": plan.replicas[e],
                "bytes_per_replica": problem.sizes[e],
                "busy": plan.busy[e] * problem.utilization if problem.traffic is not None else None,
                "categories": served[e],
            }
            for e, name in enumerate(problem.experts)
            if plan.replicas[e]
        },
        "left_out": [name for e, name in enumerate(problem.experts) if not plan.replicas[e]],
        "categories": {
            name: {
                "expert": problem.experts[plan.experts[c]],
                "share": problem.frequency[c],
                "requests_per_second": problem.traffic[c] if problem.traffic is not None else None,
                "quality": problem.quality[c, plan.experts[c]],
            }
            for c, name in enumerate(problem.categories)
        },
    }


def _served(problem: Problem, plan: PoolPlan) -> Mapping[int, list[str]]:
    """Which categories each kept expert serves, the greatest first; those without traffic are left out."""
    order = sorted(range(len(problem.categories)), key=lambda c: -problem.frequency[c])
    return {
        e: [problem.categories[c] for c in order if plan.experts[c] == e and problem.frequency[c] > 0]
        for e in range(len(problem.experts))
    }


def show_plan(problem: Problem, plan: PoolPlan, budget: float, *, fits: bool, out: Console | None = None) -> None:
    """Print who is kept, on how many replicas, and for which categories."""
    out = out or Console()
    out = out if out.is_terminal else Console(width=160)
    table = RichTable(title=escape(problem.from_what), title_justify="left")
    table.add_column("expert", overflow="fold")
    for heading in ("replicas", "GiB each", "GiB", "requests/s", "busy", "share", "quality"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("serves", overflow="fold")
    served = _served(problem, plan)
    for e, name in enumerate(problem.experts):
        mine = [c for c in range(len(problem.categories)) if plan.experts[c] == e]
        share = float(sum(problem.frequency[c] for c in mine))
        if not plan.replicas[e]:
            continue
        rate = "" if problem.traffic is None else f"{sum(problem.traffic[c] for c in mine):.3g}"
        quality = sum(problem.frequency[c] * problem.quality[c, e] for c in mine) / share if share else math.nan
        table.add_row(
            escape(name),
            str(plan.replicas[e]),
            f"{problem.sizes[e] / 2**30:.2f}",
            f"{problem.sizes[e] * plan.replicas[e] / 2**30:.2f}",
            rate,
            "" if problem.traffic is None else f"{plan.busy[e] * problem.utilization:.0%}",
            f"{share:.1%}",
            f"{quality:.4f}" if share else "",
            escape(", ".join(served[e])),
        )
    out.print(table)
    if fits:
        said = f"{plan.memory / 2**30:.2f} of {budget / 2**30:.2f} GiB, expected quality {plan.quality:.4f}"
        single = problem.best_single(budget)
        said += f" (best single expert that fits, {single[0]}: {single[1]:.4f})" if single else ""
        out.print(said, markup=False)
        return
    reason = "and this traffic" if problem.traffic is not None else ""
    out.print(
        f"Nothing fits {budget / 2**30:.2f} GiB {reason}".rstrip() + f": the plan above is the one that takes least, "
        f"{plan.memory / 2**30:.2f} GiB.",
        style="red",
        markup=False,
    )
