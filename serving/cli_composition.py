"""`signalbox router plan`: which experts are worth their parameters, and what each budget buys.

`parameters_of` reads the experts' sizes for this command and for `router train --budget`.
"""

from __future__ import annotations

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

from signalbox.serving.cli_common import ENCODER, Pool, console, names_of, progress_bars, told, training_report

# NumPy, SciPy and the encoder are imported inside the commands: `signalbox --help` must not wait for them.
if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from signalbox.router.category_map import CategoryMap
    from signalbox.router.table import Table

UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
# 7B, 1.5b, 350M, 8x7B, within a name: not part of a longer word or number (A22B: the active part of a mixture).
_IN_NAME = re.compile(r"(?<![A-Za-z0-9.])(?:(\d+)x)?(\d+(?:\.\d+)?)([bm])(?![A-Za-z0-9])", re.IGNORECASE)
_SIZE = re.compile(r"(?:(\d+)x)?(\d+(?:\.\d*)?(?:e\+?\d+)?)([kmbgt]?)", re.IGNORECASE)
MAX_FILE = 1 << 20
# Rows of the curve that are printed; --json has them all.
SHOWN = 20


def parameters_of(text: str | None, experts: Sequence[str]) -> dict[str, float]:
    """Number of parameters of each expert.

    `text` is the path of a JSON file that maps names to sizes, or `name=8e9,name2=7B`; a size is a number, or one with
    a unit (M, B), and `8x7B` is nominal, 56e9: mixtures share layers, so the true number is less (Mixtral-8x7B has
    46.7e9). An expert that is not mentioned is taken at the size in its name, as in `Meta-Llama-3_1-8B`.
    Raises `typer.BadParameter` for a name that no expert has, a size that is none, and experts of unknown size.
    """
    found = stated_sizes(text, experts, "--parameters")
    for name in experts:
        size = size_in_name(name)
        if name not in found and size is not None:
            found[name] = size
    unknown = [name for name in experts if name not in found]
    if unknown:
        raise typer.BadParameter(
            f"the names of {', '.join(unknown)} do not say how many parameters they have: "
            f"give it, --parameters {','.join(f'{name}=7e9' for name in unknown)}"
        )
    return {name: found[name] for name in experts}


def stated_sizes(text: str | None, experts: Sequence[str], option: str) -> dict[str, float]:
    """The sizes that `text` itself states, in any order; see `parameters_of`. Raises `typer.BadParameter`."""
    if text is None or not text.strip():
        return {}
    given = _json_sizes(Path(text), option) if _is_file(text) else _listed_sizes(text, experts, option)
    sizes = {}
    for name, value in given.items():
        if name not in experts:
            near = get_close_matches(name, experts, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise typer.BadParameter(f"{option}: the pool has no expert {name!r}{hint} (it has: {', '.join(experts)})")
        size = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else size_of(str(value))
        if size is None or not 0 < size < float("inf"):
            raise typer.BadParameter(f"{option}: {name}={value} is no number of parameters; write 8e9 or 8B")
        sizes[name] = size
    return sizes


def _is_file(text: str) -> bool:
    return "=" not in text or text.lower().endswith(".json")


def _json_sizes(path: Path, option: str) -> Mapping[str, Any]:
    if not path.is_file():
        raise typer.BadParameter(f"{option}: there is no file {path}; name a JSON file, or write name=8e9,name2=7B")
    if path.stat().st_size > MAX_FILE:
        raise typer.BadParameter(f"{option}: {path} is larger than a list of sizes ever is (1 MiB)")
    try:
        found = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise typer.BadParameter(f"{option}: {path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise typer.BadParameter(f'{option}: {path} must hold an object, {{"name": 8e9, ...}}')
    return found


def _listed_sizes(text: str, experts: Sequence[str], option: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for item in filter(None, (item.strip() for item in text.split(","))):
        name, equals, value = item.rpartition("=")
        name = name.strip()
        if not equals or not name:
            raise typer.BadParameter(f"{option}: {item!r} is not name=size (experts: {', '.join(experts)})")
        if name in found:
            raise typer.BadParameter(f"{option}: {name} is given twice")
        found[name] = value.strip()
    return found


def size_of(text: str) -> float | None:
    """`8e9`, `7B`, `350M`, `8x7B` (nominal) -> parameters; None where it is no size."""
    match = _SIZE.fullmatch(text.strip())
    return None if match is None else int(match[1] or 1) * float(match[2]) * UNITS[match[3].lower()]


def size_in_name(name: str) -> float | None:
    """The largest size that a model's name tells; None where it tells none."""
    sizes = [int(many or 1) * float(number) * UNITS[unit.lower()] for many, number, unit in _IN_NAME.findall(name)]
    return max(sizes, default=None) or None


def is_nominal(name: str, size: float) -> bool:
    """Whether `size` is the product in a mixture's name, such as 8x7B."""
    return size == size_in_name(name) and any(many for many, _, _ in _IN_NAME.findall(name))


# The plan


@dataclass(frozen=True)
class Point:
    """A map on the curve, and what maps made without a row's fold score on it under the same budget."""

    map: CategoryMap
    held_out: float
    held_out_se: float

    def described(self, experts: Sequence[str]) -> dict[str, Any]:
        """Plain types."""
        return {
            "budget": self.map.resident,
            "quality": self.map.quality,
            "held_out": self.held_out,
            "held_out_se": self.held_out_se,
            "resident": self.map.resident,
            "average_active": self.map.average_active,
            "kept": [experts[e] for e in self.map.kept],
        }


@dataclass(frozen=True)
class Plan:
    """Categories with their shares, the curve over all useful budgets, and the maps at some of them."""

    experts: tuple[str, ...]
    categories: tuple[str, ...]
    frequency: NDArray[np.float64]
    best_single: str
    best_single_quality: float
    curve: list[Point]
    chosen: dict[str, tuple[float | None, Point]]


def plan(
    scores: NDArray[np.float64],
    experts: Sequence[str],
    categories: tuple[str, ...],
    labels: NDArray[Any],
    folds: NDArray[Any],
    sizes: NDArray[np.float64],
    active: NDArray[np.float64],
    budget: float | None = None,
) -> Plan:
    """Solve the map at every useful budget, and at a tight one (a quarter of what all useful experts take), a middle
    one (half) and none; at `budget` too, where given.

    Args:
        scores: float [n, E] in [0, 1].
        experts: names of the columns.
        categories: names of the C categories.
        labels: int [n], each row's category.
        folds: int [n], for the quality held out.
        sizes: resident parameters [E].
        active: parameters that one token uses [E].
        budget: in parameters.

    Raises:
        TableError: the budget holds no expert.
    """
    from signalbox.router.category_map import (
        budget_curve,
        category_quality,
        frequencies,
        routed_score,
        solve_map,
    )
    from signalbox.router.metrics import standard_error

    count = len(categories)
    quality, frequency = category_quality(scores, labels, count), frequencies(labels, count)

    def point(found: CategoryMap, limit: float | None) -> Point:
        routed = routed_score(scores, labels, count, folds, lambda q, f: solve_map(q, f, sizes, limit, active))
        return Point(found, float(routed.mean()), standard_error(routed))

    curve = [point(found, found.resident) for found in budget_curve(quality, frequency, sizes, active)]
    most = curve[-1].map.resident
    limits: dict[str, float | None] = {"tight": max(most / 4, sizes.min()), "middle": max(most / 2, sizes.min())}
    limits["none"] = None
    if budget is not None:
        limits["given"] = budget
    chosen = {
        name: (limit, point(solve_map(quality, frequency, sizes, limit, active), limit))
        for name, limit in limits.items()
    }
    best = int(scores.mean(axis=0).argmax())
    return Plan(tuple(experts), categories, frequency, experts[best], float(scores[:, best].mean()), curve, chosen)


def plan_command(
    table: Annotated[Path, typer.Option(help="table of scores or losses")],
    pool: Pool = "all",
    parameters: Annotated[
        str | None, typer.Option(help="JSON file, or name=8e9,name2=7B; else sizes are read from the names")
    ] = None,
    active: Annotated[
        str | None, typer.Option(help="parameters that one token uses, where fewer (mixtures); as --parameters")
    ] = None,
    budget: Annotated[str | None, typer.Option(help="most resident parameters, such as 30e9 or 30B")] = None,
    encoder: Annotated[str, typer.Option(help="sentence encoder, for tables without tasks")] = ENCODER,
    seed: Annotated[int, typer.Option(help="for clusters, in tables without tasks")] = 0,
    json: Annotated[Path | None, typer.Option(help="file for the figures")] = None,
) -> None:
    """Print what each budget on resident parameters buys: the quality, and which experts serve which category.

    Categories are the table's tasks, taken as known; a router that has to recognise them reaches somewhat less
    (`router train --kind composition --budget N` trains it and says how much).
    """
    with told():
        import numpy as np

        from signalbox.router.table import TableError, fraction_of, read_table
        from signalbox.router.teaching import FOLDS

        limit = None if budget is None else size_of(budget)
        if budget is not None and not limit:
            raise typer.BadParameter(f"--budget {budget} is no number of parameters; write 30e9 or 30B")
        rows = read_table(table).pool(names_of(pool)).complete()
        sizes = parameters_of(parameters, rows.models)
        used = {**sizes, **stated_sizes(active, rows.models, "--active")}
        if len(set(rows.prompt)) < 4 * FOLDS:
            raise TableError(
                f"{len(set(rows.prompt))} different prompts are too few to plan with: {4 * FOLDS} at least"
            )
        folds = np.array([int(fraction_of(p, "fold") * FOLDS) for p in rows.prompt])
        categories, labels, what = categories_of(rows, folds, encoder, seed)
        found = plan(
            rows.score,
            rows.models,
            categories,
            labels,
            folds,
            np.array(list(sizes.values())),
            np.array([used[name] for name in rows.models]),
            limit,
        )
        for name, size in sizes.items():
            if is_nominal(name, size):
                console.print(
                    f"{name}: {_billions(size)} is nominal, from its name; a mixture shares layers, so it has fewer. "
                    f"Give the true number by --parameters {name}=...",
                    style="yellow",
                    markup=False,
                )
        show_plan(found, f"{len(rows)} rows of {table.name}, {len(set(labels.tolist()))} categories ({what})")
        if json is not None:
            json.parent.mkdir(parents=True, exist_ok=True)
            json.write_bytes(orjson.dumps(described(found, sizes, used, what), option=orjson.OPT_INDENT_2) + b"\n")


def categories_of(
    rows: Table, folds: NDArray[Any], encoder: str, seed: int
) -> tuple[tuple[str, ...], NDArray[Any], str]:
    """Names, the label of each row, and what they are."""
    import numpy as np

    from signalbox.router.category_router import UNLABELLED, found_categories, task_categories

    given = task_categories(rows.task)
    if given is not None:
        names, labels = given
        return names, np.where(labels == UNLABELLED, len(names) - 1, labels), "the table's tasks"
    from signalbox.router.encoder import encode_all, load_encoder

    with progress_bars() as bar:
        embeddings = encode_all(load_encoder(encoder), rows.prompt, training_report(bar))
    names, labels, _ = found_categories(embeddings, rows.score, folds, seed)
    return names, labels, "clusters, for the table has no tasks"


def described(found: Plan, sizes: Mapping[str, float], active: Mapping[str, float], what: str) -> dict[str, Any]:
    """The plan in plain types, for `--json`."""
    return {
        "experts": list(found.experts),
        "parameters": dict(sizes),
        "active": dict(active),
        "nominal": [name for name, size in sizes.items() if is_nominal(name, size)],
        "categories_from": what,
        "categories": dict(zip(found.categories, found.frequency.tolist(), strict=True)),
        "best_single": {"expert": found.best_single, "quality": found.best_single_quality},
        "curve": [point.described(found.experts) for point in found.curve],
        "budgets": {
            name: {
                **point.described(found.experts),
                "budget": limit,
                "experts": {
                    category: found.experts[e] for category, e in zip(found.categories, point.map.experts, strict=True)
                },
            }
            for name, (limit, point) in found.chosen.items()
        },
    }


def show_plan(found: Plan, title: str, out: Console | None = None) -> None:
    """Print the curve, then who serves which category at the chosen budgets."""
    out = out or Console()
    out.print(f"[bold]{escape(title)}[/bold]")
    out.print(f"best single: {escape(found.best_single)} {found.best_single_quality:.4f}")
    curve = RichTable(title="quality over the budget on resident parameters", title_justify="left")
    for column in ("budget from", "quality", "held out", "active on average"):
        curve.add_column(column, justify="right", no_wrap=True)
    curve.add_column("experts kept")
    last, steps = len(found.curve) - 1, max(1, min(SHOWN, len(found.curve)) - 1)
    shown = sorted({round(last * i / steps) for i in range(steps + 1)})
    for i in shown:
        _curve_row(curve, found.curve[i], found.experts)
    out.print(curve)
    if len(shown) < len(found.curve):
        out.print(f"{len(found.curve)} useful budgets, of which {len(shown)} are shown; --json has all")
    chosen = RichTable(title="who serves which category", title_justify="left")
    chosen.add_column("category")
    chosen.add_column("share", justify="right")
    for name, (limit, _) in found.chosen.items():
        chosen.add_column(f"{name}: " + ("no limit" if limit is None else _billions(limit)))
    for c, category in enumerate(found.categories):
        if found.frequency[c] > 0:
            names = [escape(found.experts[point.map.experts[c]]) for _, point in found.chosen.values()]
            chosen.add_row(escape(category), f"{found.frequency[c]:.1%}", *names)
    for label, values in (
        ("quality", [f"{p.map.quality:.4f}" for _, p in found.chosen.values()]),
        ("held out", [f"{p.held_out:.4f} ± {p.held_out_se:.4f}" for _, p in found.chosen.values()]),
        ("resident", [_billions(p.map.resident) for _, p in found.chosen.values()]),
        ("active on average", [_billions(p.map.average_active) for _, p in found.chosen.values()]),
    ):
        chosen.add_row(f"[bold]{label}[/bold]", "", *values)
    out.print(chosen)


def _curve_row(table: RichTable, point: Point, experts: Sequence[str]) -> None:
    table.add_row(
        _billions(point.map.resident),
        f"{point.map.quality:.4f}",
        f"{point.held_out:.4f} ± {point.held_out_se:.4f}",
        _billions(point.map.average_active),
        escape(", ".join(experts[e] for e in point.map.kept)),
    )


def _billions(size: float) -> str:
    return f"{size / 1e9:.4g}B" if size >= 1e8 else f"{size:.4g}"
