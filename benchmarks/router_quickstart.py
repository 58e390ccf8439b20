"""Rebuilds routers/quickstart: collects the quickstart pool's losses, trains, reports on rows not seen.

Run by `make router-quickstart`. The texts are those of ../shared/data (no row of it is kept in the repository: the
table stays in .run/, and the artifact goes without the training rows' embeddings).
"""

from __future__ import annotations

import asyncio
import datetime
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks.report import ROOT, Row, print_table, write_results
from signalbox.adapters.train_data import held_out
from signalbox.adapters.train_report import wilson
from signalbox.router import train as training
from signalbox.router.artifact import load_predictor, read_artifact
from signalbox.router.base import Predictor, Prompt
from signalbox.router.encoder import load_encoder
from signalbox.router.evaluate import evaluate
from signalbox.router.everyday_texts import everyday_texts
from signalbox.router.judge import Evaluation
from signalbox.router.table import Table, read_table, write_table
from signalbox.router.texts import Text, arithmetic_texts, read_texts
from signalbox.serving.cli_router import collect_pool, pool_members, show, training_report
from signalbox.serving.config import load_config

DATA = ROOT.parent / "shared" / "data"
# mmlu_pro gives prose alone: the narratives of its questions.
TEXTS = (DATA / "tasks", DATA / "routing" / "mmlu_pro.parquet")
ADAPTED = {"banking77": "smollm2:banking", "clinc150": "smollm2:clinc", "gsm8k": "smollm2:gsm8k"}  # task -> its adapter
MOST_SENT = 400  # rows of a task that are routed to see where they go
console = Console(stderr=True)


def gather_texts(rows_per_task: int) -> list[Text]:
    """The tasks' texts, as many sums, and everyday questions.

    Of the adapters' tasks only rows that they were not trained on. Raises `TableError` where ../shared/data is absent.
    """
    chosen: dict[str, list[Text]] = {}
    for text in read_texts(TEXTS):
        if text.task not in ADAPTED or held_out(text.text):
            chosen.setdefault(text.task, []).append(text)
    files = [text for texts in chosen.values() for text in texts[:rows_per_task]]
    return [*files, *arithmetic_texts(rows_per_task), *everyday_texts(rows_per_task)]


def results(result: Evaluation, name: str) -> list[Row]:
    """The evaluation in the format of all benchmarks; low and high are 95 % confidence limits."""
    bound = 1.96 * result.quality_se
    rows = [
        Row(
            name,
            "mean quality",
            result.quality,
            "2**-bits per byte",
            result.quality - bound,
            result.quality + bound,
            reference=result.best_single,
            goal="above best single by two standard errors of the paired difference",
            met=result.wins,
        ),
        Row(
            name,
            "gain over best single",
            result.gain,
            "2**-bits per byte",
            result.gain - 1.96 * result.gain_se,
            result.gain + 1.96 * result.gain_se,
            reference=0.0,
        ),
        Row(
            name,
            "optimal-selection accuracy",
            result.optimal_selection,
            "share of prompts",
            reference=result.majority_optimal_selection,
            goal="above majority",
            met=result.optimal_selection > (result.majority_optimal_selection or 0.0),
        ),
        Row(name, "regret", result.regret, "2**-bits per byte"),
    ]
    for metric, value in (
        ("best single", result.best_single),
        ("majority", result.majority),
        ("cheapest", result.cheapest),
        ("random", result.random),
        ("kNN", result.knn),
        ("told the task", result.told_task),
        ("oracle", result.oracle),
        ("bare text", result.bare_text_quality),
    ):
        if value is not None:
            rows.append(Row(name, f"mean quality, {metric}", value, "2**-bits per byte"))
    if result.regret_bits is not None:
        rows.append(Row(name, "regret", result.regret_bits, "bits per byte"))
    calibration = result.calibration
    rows += [
        Row(name, "uncertainty, rms of residual / deviation", calibration["z_rms"], "", reference=1.0),
        Row(name, "residuals within one deviation", calibration["within_1sd"], "share", reference=0.683),
    ]
    if result.decision_ms is not None:
        rows += [Row(name, f"decision {p}, one thread", result.decision_ms[p], "ms") for p in ("p50", "p99")]
    rows += [Row(name, f"share of {expert}", share, "share of prompts") for expert, share in result.share.items()]
    for task, figures in result.tasks.items():
        rows.append(
            Row(
                f"{name}: {task}",
                f"mean quality ({figures['rows']} rows)",
                figures["quality"],
                "2**-bits per byte",
                figures["quality"] - 1.96 * figures["quality_se"],
                figures["quality"] + 1.96 * figures["quality_se"],
                reference=figures["best_single"],
            )
        )
    return rows


def sent(predictor: Predictor, collected: Table, name: str) -> list[Row]:
    """Where `auto` sends texts of the adapters' tasks that neither adapter nor router has seen; 95 % intervals."""
    seen = set(collected.prompt_id)
    rows = []
    for task, expert in ADAPTED.items():
        texts = [t for t in read_texts(TEXTS) if t.task == task and held_out(t.text) and t.prompt_id not in seen]
        for form, prompts in (
            ("bare text", [t.text for t in texts[:MOST_SENT]]),
            ("instructed text", [t.prompt for t in texts[:MOST_SENT] if t.prompt != t.text]),
        ):
            if not prompts:
                continue
            predicted = predictor.predict([Prompt(text) for text in prompts])
            hits = sum(predicted.experts[i] == expert for i in predicted.quality.argmax(axis=1))
            metric = f"sent to {expert}, {form} ({len(prompts)} rows)"
            rows.append(Row(f"{name}: {task}", metric, hits / len(prompts), "share", *wilson(hits, len(prompts))))
    return rows


def main(
    config: Annotated[Path, typer.Option(help="configuration of the pool")] = ROOT / "examples" / "quickstart.yaml",
    rows_per_task: Annotated[int, typer.Option(min=10, help="most texts of a task")] = 250,
    out: Annotated[Path, typer.Option(help="folder of the artifact")] = ROOT / "routers" / "quickstart",
    table: Annotated[Path, typer.Option(help="table of losses")] = ROOT / ".run" / "router_quickstart.parquet",
    reuse: Annotated[bool, typer.Option(help="train on the table as it is there, without collecting")] = False,
    kind: Annotated[str, typer.Option(help="which router; `router train --kind best` chose this one")] = "cascade",
    concurrency: Annotated[int, typer.Option(min=1, help="texts in flight at one expert")] = 8,
    name: Annotated[str, typer.Option(help="name of the result file")] = "router_quickstart",
) -> None:
    """Collect, train, evaluate; a run that was stopped goes on where it was."""
    started = time.perf_counter()
    if not reuse:
        if not DATA.is_dir():
            console.print(f"error: {DATA} is absent; the texts to collect losses on are read from there", style="red")
            raise typer.Exit(2)
        experts = {n: m for n, m in pool_members(load_config(config)).items() if m.config.routable}
        texts = gather_texts(rows_per_task)
        console.print(f"{len(texts)} texts of {len({t.task for t in texts})} tasks, {len(experts)} experts")
        # Kept after the run: a later one with more rows a task measures only the new ones.
        journal = table.with_name(f"{table.name}.partial.jsonl")
        collected = asyncio.run(collect_pool(experts, texts, journal, concurrency))
        write_table(collected.table, table)
        for failure in collected.failures[:5]:
            console.print(f"failed: {failure.expert} on {failure.prompt_id}: {failure.error}", markup=False)
        console.print(f"collected in {datetime.timedelta(seconds=round(time.perf_counter() - started))}")
    encoder = load_encoder()
    with Progress(console=console) as bar:
        trained = training.train(read_table(table), encoder, kind=kind, report=training_report(bar))
    training.save(trained, out, neighbours=False)
    # What is judged is what was written.
    predictor = load_predictor(out, encoder=encoder)
    result = evaluate(
        predictor,
        trained.held_out,
        encoder,
        artifact=read_artifact(out),
        neighbours=training.neighbours_of(trained),
    )
    show(result, f"{result.rows} rows that the router has not seen")
    rows = results(result, "quickstart, rows held out")
    rows += sent(predictor, read_table(table), "quickstart")
    print_table(rows)
    path = write_results(name, f"python -m benchmarks.router_quickstart {' '.join(sys.argv[1:])}".strip(), rows)
    console.print(f"wrote {out} and {path}")


if __name__ == "__main__":
    typer.run(main)
