"""The one format of all benchmark results, and the table printed of it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import orjson
import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "transformers", "ray", "vllm", "numpy", "starlette", "triton")


@dataclass(frozen=True)
class Row:
    """One measurement. `low` and `high` bound it (spread of runs, or a confidence interval: the case says which).

    `reference` is the value that it is held against, measured in the same run where it can be; `goal` says in
    words what it should be, and `met` whether it is. None: not known, or no goal.
    """

    case: str
    metric: str
    value: float
    unit: str = ""
    low: float | None = None
    high: float | None = None
    reference: float | None = None
    goal: str | None = None
    met: bool | None = None


def write_results(name: str, command: str, rows: Sequence[Row], folder: Path = RESULTS) -> Path:
    """Write `benchmarks/results/NAME.json`: {machine, versions, commit, command, rows}. Returns the file."""
    result = {
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "command": command,
        "rows": [asdict(row) for row in rows],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    partial = path.with_suffix(".json.writing")
    partial.write_bytes(orjson.dumps(result, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY) + b"\n")
    partial.replace(path)
    return path


def print_table(rows: Sequence[Row], title: str = "", console: Console | None = None) -> None:
    """Print the rows; a goal that was not met stands out."""
    table = Table(title=title or None, title_justify="left")
    for column in ("case", "metric"):
        table.add_column(column, overflow="fold")
    for column in ("value", "low", "high", "reference"):
        table.add_column(column, justify="right", no_wrap=True, min_width=7)
    for column in ("unit", "goal", "met"):
        table.add_column(column, overflow="fold")
    for row in rows:
        met = {None: "", True: "[green]yes[/green]", False: "[red]no[/red]"}[row.met]
        figures = [_figure(v) for v in (row.value, row.low, row.high, row.reference)]
        table.add_row(row.case, row.metric, *figures, row.unit, row.goal or "", met)
    # Piped into a file there is no width to keep to.
    (console or Console(width=None if sys.stdout.isatty() else 200)).print(table)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, memory, accelerators and load."""
    found: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "load_average": [round(x, 2) for x in psutil.getloadavg()],
    }
    try:
        import torch

        if torch.cuda.is_available():
            found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    except ImportError:
        pass
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Python and the packages that matter for a measurement, as installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit measured, with `+changes` where files differ from it; `unknown` outside a checkout."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
