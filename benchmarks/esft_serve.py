"""`python -m benchmarks.esft_serve`: the base and the adapters that `benchmarks.esft` left, served by one engine.

Every kept row is asked of the base and of its task's adapter, all in one mixed load on our vLLM engine; what it answers
is held against what transformers answered with the same weights, and scored. In the environment with vLLM:

    .venv-vllm/bin/python -m benchmarks.esft_serve --folder .run/bench_esft
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.esft_base import TASKS
from benchmarks.report import ROOT, Row, print_table, write_results
from signalbox.adapters.train_evaluate import is_correct
from signalbox.experts.base import GenerateRequest, SamplingParams
from signalbox.experts.catalog import VllmExpert
from signalbox.experts.engines import build_engine

WHO = ("base", "adapter")


@dataclass(frozen=True)
class Asked:
    """One row as kept by `benchmarks.esft`: what transformers answered (`wanted`), and what the engine does."""

    task: str
    who: str
    wanted: str
    reference: str
    said: str


def main(
    folder: Annotated[Path, typer.Option(help="`--out` of benchmarks.esft")] = ROOT / ".run/bench_esft",
    results: Annotated[Path | None, typer.Option(help="folder for esft_served.json")] = None,
    dtype: Annotated[str, typer.Option(help="of the engine; answers were made in float32")] = "float32",
    gpus: Annotated[int, typer.Option(help="0: on the CPU")] = 0,
    rows: Annotated[int, typer.Option(min=1, help="most rows of a task")] = 256,
) -> None:
    """Serve, ask, compare."""
    asked = asyncio.run(serve(folder, dtype, gpus, rows))
    found = []
    for task in TASKS:
        for who in WHO:
            mine = [row for row in asked if (row.task, row.who) == (task, who)]
            here = sum(is_correct(row.said, row.reference, "exact") for row in mine) / len(mine)
            there = sum(is_correct(row.wanted, row.reference, "exact") for row in mine) / len(mine)
            equal = sum(row.said == row.wanted for row in mine) / len(mine)
            case = f"{task}, {who}, served with all others"
            goal = "as in transformers"
            found.append(Row(case, "accuracy", here, reference=there, goal=goal, met=abs(here - there) < 0.01))
            found.append(Row(case, "answers equal to transformers'", 100 * equal, "%"))
    print_table(found, f"ESFT adapters on one base, {dtype}")
    told = {} if results is None else {"folder": results}
    print(f"wrote {write_results('esft_served', f'python -m benchmarks.esft_serve --dtype {dtype}', found, **told)}")


async def serve(folder: Path, dtype: str, gpus: int, most: int) -> list[Asked]:
    """Answers of one engine to all rows at once, each from the base and from its adapter."""
    adapters = [folder / f"{task}-esft" for task in TASKS]
    per_layer = max(
        len(ids) for path in adapters for ids in json.loads((path / "expert_cfg.json").read_text())["experts"].values()
    )
    settings: dict[str, Any] = {
        "engine": "vllm",
        "model": str(folder / "base"),
        "dtype": dtype,
        "gpus": gpus,
        "enforce_eager": gpus == 0,
        "max_running": 64,
        "max_adapters": len(adapters),
        "adapter_kinds": ["esft"],
        "esft": {"experts_per_layer": per_layer},
    }
    engine: Any = build_engine("moe", VllmExpert.model_validate(settings))
    try:
        await engine.start()
        for task, path in zip(TASKS, adapters, strict=True):
            await engine.load(f"{task}@1", str(path))
        work = []
        for task in TASKS:
            told = json.loads((folder / f"{task}-answers.json").read_text())
            longest = told["max_new_tokens"]
            kept = enumerate(told["rows"][:most])
            work += [_ask(engine, f"{task}-{n}-{who}", task, who, row, longest) for n, row in kept for who in WHO]
        return list(await asyncio.gather(*work))
    finally:
        await engine.close()


async def _ask(engine: Any, request_id: str, task: str, who: str, row: dict[str, str], longest: int) -> Asked:
    request = GenerateRequest(
        request_id,
        messages=[{"role": "user", "content": row["text"]}],
        adapter=f"{task}@1" if who == "adapter" else None,
        sampling=SamplingParams(temperature=0.0, max_tokens=longest),
    )
    text = "".join([chunk.text async for chunk in engine.generate(request)])
    return Asked(task, who, row[who], row["reference"], text.strip())


if __name__ == "__main__":
    typer.run(main)
