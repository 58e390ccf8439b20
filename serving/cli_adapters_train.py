"""`signalbox adapters train`: a small LoRA adapter from a table, with progress and a held-out score."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable

from signalbox.serving.cli_common import console, told

if TYPE_CHECKING:
    from signalbox.adapters.train import Moment
    from signalbox.serving.training import Watcher

QUICKSTART = Path("examples/quickstart.yaml")


def train_command(
    base: Annotated[str, typer.Option(help="expert of the configuration, or a model: pypi:, hf: or a path")],
    data: Annotated[Path, typer.Option(help="table of texts and labels or answers: .parquet, .csv or .jsonl")],
    out: Annotated[Path, typer.Option(help="folder for the adapter")],
    config: Annotated[Path, typer.Option(help="configuration that declares the expert")] = QUICKSTART,
    kind: Annotated[str, typer.Option(help="classification, completion or auto")] = "auto",
    text: Annotated[str | None, typer.Option(help="column of the texts")] = None,
    label: Annotated[str | None, typer.Option(help="column of the labels or answers")] = None,
    rank: Annotated[int, typer.Option(min=1, max=256)] = 8,
    alpha: Annotated[float, typer.Option(min=0.01)] = 16.0,
    targets: Annotated[str, typer.Option(help="linears to adapt, comma-separated, or all-linear")] = (
        "q_proj,k_proj,v_proj,o_proj"
    ),
    epochs: Annotated[float, typer.Option(min=0.001)] = 5.0,
    steps: Annotated[int | None, typer.Option(min=1, help="instead of epochs")] = None,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="most minutes of training")] = None,
    lr: Annotated[float, typer.Option(help="highest learning rate")] = 1e-3,
    batch: Annotated[int, typer.Option(min=1)] = 32,
    holdout: Annotated[float, typer.Option(min=0.01, max=0.5, help="share of texts that only the score sees")] = 0.1,
    seed: Annotated[int, typer.Option()] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="torch threads on CPU")] = None,
    eval_rows: Annotated[int | None, typer.Option(min=1, help="most held-out rows to score")] = None,
) -> None:
    """Train a LoRA adapter and report what it is worth on rows held out."""
    from pydantic import ValidationError

    from signalbox.adapters.base import AdapterError
    from signalbox.adapters.train_data import TrainingError
    from signalbox.experts.models import ModelUnavailable
    from signalbox.serving.train_adapter import Recipe, train_adapter
    from signalbox.serving.training import Effort, base_of

    with told():
        try:
            recipe = Recipe.model_validate(
                {
                    "data": str(data),
                    "kind": kind,
                    "text": text,
                    "label": label,
                    "rank": rank,
                    "alpha": alpha,
                    "targets": tuple(name.strip() for name in targets.split(",") if name.strip()),
                    "epochs": epochs,
                    "steps": steps,
                    "minutes": minutes,
                    "rate": lr,
                    "batch": batch,
                    "holdout": holdout,
                    "seed": seed,
                }
            )
            with watched() as watcher:
                report = train_adapter(
                    base_of(base, config), recipe, out, Effort(device, threads, eval_rows=eval_rows), watcher
                )
        except ValidationError as error:
            first = error.errors()[0]
            raise typer.BadParameter(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        except (TrainingError, AdapterError, ModelUnavailable) as error:
            console.print(f"error: {error}", markup=False, style="red", soft_wrap=True)
            raise typer.Exit(2) from None
        show(report)
        console.print(f"wrote {out}; to serve it: signalbox adapters add NAME {out}", markup=False)


class watched:
    """Progress of a run: bars on a terminal, a line at each validation elsewhere."""

    def __init__(self, out: Console = console, prefix: str = "") -> None:
        self._out, self._prefix = out, prefix
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        self._bars = Progress(*columns, console=out, disable=not out.is_terminal)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Watcher:
        from signalbox.serving.training import Watcher

        self._bars.start()
        return Watcher(self._say, self._trained, self._scored)

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def _say(self, text: str) -> None:
        self._out.print(f"{self._prefix}{text}", markup=False, soft_wrap=True)

    def _bar(self, name: str, total: float) -> TaskID:
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=total, note="")
        return self._tasks[name]

    def _trained(self, name: str, moment: Moment) -> None:
        note = f"loss {moment.loss:.3f} rate {moment.rate:.1e}"
        # By time where minutes end the run before its steps do.
        share = moment.seconds / max(1e-9, moment.seconds + moment.left_s)
        self._bars.update(self._bar(name, 1.0), completed=share, note=note)
        if moment.validation is not None and not self._out.is_terminal:
            self._say(
                f"{name}: step {moment.step} of {moment.steps}, {note}, validation {moment.validation:.4f}, "
                f"{moment.seconds:.0f} s, {moment.left_s:.0f} s left"
            )

    def _scored(self, name: str, done: int, total: int) -> None:
        self._bars.update(self._bar(f"scoring {name}", total), completed=done, note=f"{done} of {total}")


def show(report: dict[str, Any], out: Console | None = None) -> None:
    """Print the scores of a report: base and adapter, with 95 % intervals."""
    for name in ("bare", "instructed"):
        scores = report["scores"].get(name)
        if scores is None:
            continue
        lines = RichTable(title=f"{report['data']['file']}, {scores['rows']} rows held out, {name} texts")
        for column in ("score", "base", "adapter", ""):
            lines.add_column(column, justify="left" if column == "score" else "right")
        for metric in ("accuracy", "label_choice", "bits_per_byte"):
            if metric not in scores:
                continue
            figures = scores[metric]
            lines.add_row(
                metric.replace("_", " ") + (f" ({figures['rows']} rows)" if "rows" in figures else ""),
                _interval(figures["base"]),
                _interval(figures["adapter"]),
                "[green]better[/green]" if figures["beats"] else "[yellow]not clearly better[/yellow]",
            )
        (out or Console()).print(lines)


def _interval(value: list[float]) -> str:
    return f"{value[0]:.4f} [{value[1]:.4f}, {value[2]:.4f}]".replace("[", "\\[")
