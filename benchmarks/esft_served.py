"""The adapters of bench-esft served together on one base, against each model alone.

Takes what `benchmarks.esft` left in its folder: the base, an adapter for each task, and what base and adapted model
answer to rows held out, computed by transformers in float32. Here one vLLM engine holds base and adapters; every row of
every task is asked with the base and with the task's adapter, all in one mixed batch.

    python -m benchmarks.esft_served --folder .run/bench_esft           in the environment that has vLLM
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from benchmarks.report import ROOT, Row, print_table, write_results
from signalbox.adapters.train_evaluate import is_correct
from signalbox.experts.base import GenerateRequest, SamplingParams
from signalbox.experts.catalog import VllmExpert
from signalbox.experts.engines import build_engine

RUNNING = 64  # requests in one batch


class Asked(NamedTuple):
    """One row asked of the base or of its task's adapter, and what that model answers by itself."""

    task: str
    adapted: bool
    text: str
    reference: str
    alone: str
    max_new_tokens: int


def read_asked(folder: Path, rows: int | None) -> list[Asked]:
    """The first rows of each task's file of answers, in an order that mixes tasks and adapters."""
    files = sorted(folder.glob("*-answers.json"))
    if not files:
        raise typer.BadParameter(f"there are no answers in {folder}: run `python -m benchmarks.esft --out {folder}`")
    asked: list[tuple[int, Asked]] = []
    for file in files:
        told = json.loads(file.read_text())
        task, limit = file.name.removesuffix("-answers.json"), told["max_new_tokens"]
        for i, row in enumerate(told["rows"][:rows]):
            for adapted in (False, True):
                alone = row["adapter" if adapted else "base"]
                asked.append((i, Asked(task, adapted, row["text"], row["reference"], alone, limit)))
    return [each for _, each in sorted(asked, key=lambda pair: pair[0])]


async def serve(folder: Path, asked: list[Asked], rows: str, settings: dict[str, Any]) -> tuple[list[str], float]:
    """What the engine answers to each, and the seconds for all; `rows`: how it stores those of adapters."""
    tasks = sorted({each.task for each in asked})
    fixed = {"engine": "vllm", "model": str(folder / "base"), "max_running": RUNNING, "max_waiting": len(asked)}
    fixed |= {"max_adapters": len(tasks), "adapter_kinds": ["esft"], "esft": {"experts_per_layer": 32, "rows": rows}}
    engine = build_engine("esft", VllmExpert.model_validate(fixed | settings))
    await engine.start()
    try:
        for task in tasks:
            await engine.load(f"{task}@1", str(folder / f"{task}-esft"))
        began = time.perf_counter()
        answers = await asyncio.gather(*(answer(engine, number, each) for number, each in enumerate(asked)))
        return list(answers), time.perf_counter() - began
    finally:
        await engine.close()


async def answer(engine: Any, number: int, asked: Asked) -> str:
    """The greedy answer to one row."""
    request = GenerateRequest(
        f"row-{number}",
        messages=[{"role": "user", "content": asked.text}],
        sampling=SamplingParams(temperature=0.0, max_tokens=asked.max_new_tokens),
        adapter=f"{asked.task}@1" if asked.adapted else None,
    )
    return "".join([chunk.text async for chunk in engine.generate(request)]).strip()


def rows_of(asked: list[Asked], rows: str, said: list[str], seconds: float) -> list[Row]:
    """Scores of each task with and without its adapter, served and alone, and how many answers are the same."""
    found = [Row(f"{rows}, all rows in one mixed batch", "requests a second", len(asked) / seconds, "1/s")]
    for task in sorted({each.task for each in asked}):
        for adapted in (False, True):
            pairs = [(e, s) for e, s in zip(asked, said, strict=True) if (e.task, e.adapted) == (task, adapted)]
            same = sum(each.alone == answer for each, answer in pairs) / len(pairs)
            served, alone = (
                sum(is_correct(text, each.reference, "exact") for each, text in texts) / len(pairs)
                for texts in (pairs, [(each, each.alone) for each, _ in pairs])
            )
            case = f"{rows}, {task}, {'adapter' if adapted else 'base'}, {len(pairs)} rows"
            score = Row(case, "accuracy", served, "", reference=alone)
            answers = Row(case, "same answers", same, "", reference=1.0)
            if rows == "full" or not adapted:
                score = replace(score, goal="as the model alone", met=served == alone)
                answers = replace(answers, goal="all", met=same == 1.0)
            found += [score, answers]
    return found


def main(
    folder: Annotated[Path, typer.Option(help="what `benchmarks.esft` wrote")] = ROOT / ".run/bench_esft",
    rows: Annotated[int | None, typer.Option(help="rows of each task; default: all")] = None,
    dtype: Annotated[str, typer.Option(help="float32 as the answers to compare with; bfloat16 rounds otherwise")] = (
        "float32"
    ),
    gpus: Annotated[float, typer.Option(help="0: on the CPU")] = 0.0,
    out: Annotated[Path | None, typer.Option(help="folder of the results; without it none are written")] = None,
) -> None:
    """Serve and compare; prints a table, and writes esft_served.json."""
    asked = read_asked(folder, rows)
    settings = {"dtype": dtype, "gpus": gpus, "enforce_eager": not gpus}
    found = []
    for stored in ("full", "difference4"):
        found += rows_of(asked, stored, *asyncio.run(serve(folder, asked, stored, settings)))
    if out is not None:
        write_results("esft_served", "python -m benchmarks.esft_served", found, out)
    print_table(found, "ESFT adapters served together, against each model alone")


if __name__ == "__main__":
    typer.run(main)
