"""`signalbox router compare`: all kinds of router on one table, as tables and as an HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import orjson
import typer
from rich.markup import escape
from rich.table import Table as RichTable

from signalbox.serving.cli_common import (
    ENCODER,
    Budget,
    Descriptions,
    Parameters,
    Pool,
    console,
    facts_of,
    names_of,
    pair_of,
    progress_bars,
    reference_lines,
    told,
    training_report,
)

if TYPE_CHECKING:
    from signalbox.router.compare import Choice, Comparison, Objective


def compare_command(
    table: Annotated[Path, typer.Option(help="table of scores or losses")],
    test: Annotated[Path | None, typer.Option(help="table to judge on; without it, cross-validation")] = None,
    pool: Pool = "all",
    kinds: Annotated[str, typer.Option(help="kinds to compare, comma-separated, or `all`")] = "all",
    pair: Annotated[str | None, typer.Option(metavar="WEAK:STRONG", help="two experts, for APGR and CPT")] = None,
    objective: Annotated[str, typer.Option(help="what decides: quality, aiq or apgr")] = "quality",
    folds: Annotated[int, typer.Option(min=2, max=20, help="of the cross-validation")] = 5,
    parameters: Parameters = None,
    budget: Budget = None,
    descriptions: Descriptions = None,
    seed: Annotated[int, typer.Option(help="for the parts that draw at random")] = 0,
    encoder: Annotated[str, typer.Option(help="sentence encoder: pypi:, hf: or a path")] = ENCODER,
    html: Annotated[Path | None, typer.Option(help="page with plots and tables, in one file")] = None,
    json: Annotated[Path | None, typer.Option(help="file for the figures")] = None,
) -> None:
    """Fit every kind of router and judge them side by side; say which to serve, if any."""
    with told():
        from signalbox.router.artifact import predictor_class
        from signalbox.router.compare import all_kinds, choose, compare
        from signalbox.router.encoder import load_encoder
        from signalbox.router.report_html import report
        from signalbox.router.table import read_table

        chosen = all_kinds() if kinds == "all" else [k.strip() for k in kinds.split(",") if k.strip()]
        for kind in chosen or [""]:
            predictor_class(kind)  # raises before anything slow
        aim = objective_of(objective)
        rows = read_table(table)
        names = names_of(pool)
        facts = facts_of(names or rows.models, parameters, budget, descriptions)
        weak_strong = None if pair is None else pair_of(pair, names or rows.models)
        with progress_bars() as bar:
            found = compare(
                rows,
                load_encoder(encoder),
                kinds=list(dict.fromkeys(chosen)),
                test=None if test is None else read_table(test),
                pool=names,
                pair=weak_strong,
                folds=folds,
                seed=seed,
                facts=facts,
                report=training_report(bar),
            )
        choice = choose(found, aim, seed)
        show_comparison(found, choice)
        if html is not None:
            html.parent.mkdir(parents=True, exist_ok=True)
            judged = table.name if test is None else f"{test.name}, fitted on {table.name}"
            html.write_text(report(found, choice, f"Routers on {judged}"), encoding="utf-8")
            console.print(f"wrote {html}")
        if json is not None:
            json.parent.mkdir(parents=True, exist_ok=True)
            body = {"choice": {"kind": choice.kind, "reason": choice.reason}, "kinds": found.to_json()}
            json.write_bytes(orjson.dumps(body, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY) + b"\n")


def objective_of(text: str) -> Objective:
    """One of quality, aiq, apgr. Raises `typer.BadParameter`."""
    for name in ("quality", "aiq", "apgr"):
        if text == name:
            return name
    raise typer.BadParameter(f"--objective {text}: it may be quality, aiq or apgr")


def show_comparison(found: Comparison, choice: Choice) -> None:
    """Print the kinds, best first, the reference lines, and the verdict."""
    from rich.console import Console

    out = Console()
    lines = RichTable()
    for name in ("router", "quality", "gain over best single", "AIQ", "APGR", "decision p50", "fit"):
        # On a narrow terminal names are cut, figures never.
        figure = name != "router"
        lines.add_column(name, justify="right" if figure else "left", no_wrap=True, min_width=6 if figure else None)
    for c in found.fitted:
        e = c.evaluation
        if e is None:
            continue
        cells = (
            f"{e.quality:.4f}",
            f"{e.gain:+.4f} ± {e.gain_se:.4f}",
            "" if e.aiq is None else f"{e.aiq:.4f}",
            "" if e.apgr is None else f"{e.apgr:.4f}",
            "" if e.decision_ms is None else f"{e.decision_ms['p50']:.2f} ms",
            "" if c.fit_s is None else f"{c.fit_s:.1f} s",
        )
        lines.add_row(c.kind, *cells, style="bold" if c.kind == choice.kind else None)
    out.print(lines)
    if found.fitted and found.fitted[0].evaluation is not None:
        out.print(reference_lines(found.fitted[0].evaluation))
    for c in found.contenders:
        if c.error:
            out.print(f"{c.kind} was not fitted: {escape(c.error)}")
    out.print(f"[bold]{escape(choice.reason)}[/bold]")
