"""`signalbox router replay`: how regret would have fallen, had a table's outcomes been reported one by one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import orjson
import typer
from rich.console import Console
from rich.table import Table as RichTable

from signalbox.serving.cli_common import told

if TYPE_CHECKING:
    from signalbox.router.replay import Replay


def replay_command(
    artifact: Annotated[Path, typer.Option(help="folder of the trained router")],
    table: Annotated[Path, typer.Option(help="table with the router's experts; rows it was trained on are left out")],
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="how often each row comes as a request")] = 1,
    explore: Annotated[float, typer.Option(min=0.0, max=0.5, help="greatest share of requests that explore")] = 0.1,
    max_loss: Annotated[float, typer.Option(min=0.0, max=1.0, help="predicted quality that exploring may cost")] = 0.05,
    poison: Annotated[
        Literal["none", "random", "inverted"], typer.Option(help="report false scores for the middle half")
    ] = "none",
    windows: Annotated[int, typer.Option(min=1, max=1000, help="lines of the printed table")] = 10,
    seed: Annotated[int, typer.Option(help="of the order of requests, and of exploration")] = 0,
    json: Annotated[Path | None, typer.Option(help="file for the figures")] = None,
) -> None:
    """Replay a table as requests, each with the outcome of the chosen expert alone, and learn from it."""
    with told():
        import numpy as np

        from signalbox.router.artifact import load_predictor, read_artifact
        from signalbox.router.replay import Poisoning, replay
        from signalbox.router.table import read_table
        from signalbox.router.train import prompt_hash

        found = read_artifact(artifact)
        rows = read_table(table).pool(found.experts)
        if "seen" in found.tensors:
            seen = set(found.tensors["seen"].tolist())
            rows = rows.rows(np.array([prompt_hash(prompt) not in seen for prompt in rows.prompt]))
        result = replay(
            load_predictor(artifact),
            rows,
            version=found.version,
            rounds=rounds,
            explore=explore,
            max_loss=max_loss,
            poisoning=None if poison == "none" else Poisoning(poison),
            windows=windows,
            seed=seed,
        )
        show(result, f"{found.kind} {found.version}, {result.requests} requests from {table.name}")
        if json is not None:
            json.parent.mkdir(parents=True, exist_ok=True)
            figures = {"version": found.version, **result.to_json()}
            json.write_bytes(orjson.dumps(figures, option=orjson.OPT_INDENT_2) + b"\n")


def show(result: Replay, title: str, out: Console | None = None) -> None:
    """Print a replay: windows in the order of the requests, then all of them."""
    out = out or Console()
    lines = RichTable(title=title, title_justify="left")
    for column in ("up to", "quality", "regret", "if frozen", "gain", "explored", "outcomes"):
        lines.add_column(column, justify="right", no_wrap=True)
    reached = 0
    for w in result.windows:
        reached += w.requests
        gain = f"{w.gain:+.3f}±{w.gain_se:.3f}"
        note = "poisoned" if w.poisoned else "true"
        lines.add_row(
            str(reached),
            f"{w.quality:.4f}",
            f"{w.regret:.4f}",
            f"{w.frozen_regret:.4f}",
            gain,
            f"{w.explored:.1%}",
            note,
        )
    out.print(lines)
    out.print(
        f"quality {result.quality:.4f}, frozen artifact {result.frozen_quality:.4f}, best single "
        f"{result.best_single:.4f}, oracle {result.oracle:.4f}; gain {result.gain:+.4f} ± {result.gain_se:.4f} (paired)"
    )
    for number, event in result.rollbacks[:10]:
        out.print(f"rolled back after request {number + 1}: {event}")
