"""`signalbox router describe`: a model of the pool writes what each expert is for, from a few of its best examples.

The file maps each expert to a text or to several: {"coder": "Questions about ...", "cook": ["...", "..."]}. It may be
written or mended by hand. A router of kind glider matches requests with it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import orjson
import typer
from rich.console import Console

from signalbox.serving.cli_common import Pool, console, names_of, progress_bars, told

if TYPE_CHECKING:
    from signalbox.experts.base import Engine
    from signalbox.router.table import Table

MAX_BYTES = 1 << 20
# Of an example shown to the writer, and of a description: a small model's context is short.
EXAMPLE_CHARACTERS, DESCRIPTION_CHARACTERS, DESCRIPTION_TOKENS = 400, 400, 60
# Short and after the texts: a model of 135 million parameters answers the texts themselves when asked for more.
ASK = "{examples}\n\nWhich subject do the texts above have in common? Answer in one short sentence."


def describe_command(
    config: Annotated[Path, typer.Option(help="configuration file that declares the writer")],
    table: Annotated[Path, typer.Option(help="table of scores or losses of the experts to describe")],
    writer: Annotated[str, typer.Option(help="expert of the configuration that writes the descriptions")],
    out: Annotated[Path, typer.Option(help="JSON file to write: expert -> description")],
    examples: Annotated[int, typer.Option(min=1, max=20, help="examples that each description is made from")] = 3,
    pool: Pool = "all",
) -> None:
    """Have a model of the pool describe each expert, from the prompts on which it did best beside the others.

    Decoding is greedy, so the same pool and table give the same file. Read it before it is used: a small model's
    descriptions are rough, and a line of your own may be better.
    """
    with told():
        from signalbox.experts.engines import build_engine
        from signalbox.router.table import read_table
        from signalbox.serving.config import load_config

        experts = load_config(config).experts
        if writer not in experts:
            raise typer.BadParameter(f"--writer {writer}: no such expert (there are: {', '.join(experts)})")
        rows = read_table(table).pool(names_of(pool)).complete()
        shown = {name: examples_of(rows, name, examples) for name in rows.models}
        with progress_bars() as bar:
            task = bar.add_task(f"loading {writer}", total=len(shown))

            def report(name: str, done: int) -> None:
                bar.update(task, completed=done, description=f"describing {name}")

            written = asyncio.run(_with_engine(build_engine(writer, experts[writer]), shown, report))
        write_descriptions(written, out)
        for name, text in written.items():
            Console().print(f"{name}: {text}", markup=False, soft_wrap=True)
        console.print(f"{len(written)} descriptions in {out}", markup=False)


async def _with_engine(
    engine: Engine, examples: Mapping[str, Sequence[str]], report: Callable[[str, int], None]
) -> dict[str, str]:
    try:
        await engine.start()
        return await describe(engine, examples, report)
    finally:
        await engine.close()


async def describe(
    engine: Engine, examples: Mapping[str, Sequence[str]], report: Callable[[str, int], None] | None = None
) -> dict[str, str]:
    """Expert -> one line, written greedily by an engine that has been started.

    Args:
        engine: the writer.
        examples: expert -> prompts that it does well.
        report: called with (expert, how many are done) before each.

    Raises:
        ExpertError: the engine's, or the writer wrote nothing.
    """
    from signalbox.experts.base import ExpertError, GenerateRequest, SamplingParams
    from signalbox.router.glider import cut

    out = {}
    for done, (name, prompts) in enumerate(examples.items()):
        if report:
            report(name, done)
        listed = "\n".join(f"- {cut(prompt, EXAMPLE_CHARACTERS)}" for prompt in prompts)
        request = GenerateRequest(
            request_id=f"describe-{done}",
            messages=[{"role": "user", "content": ASK.format(examples=listed)}],
            sampling=SamplingParams(max_tokens=DESCRIPTION_TOKENS, temperature=0.0),
        )
        text = cut("".join([chunk.text async for chunk in engine.generate(request)]), DESCRIPTION_CHARACTERS)
        if not text:
            raise ExpertError(f"the writer wrote nothing about {name}: take another --writer, or describe it by hand")
        out[name] = text
        if report:
            report(name, done + 1)
    return out


def examples_of(table: Table, expert: str, count: int) -> list[str]:
    """The `count` prompts on which the expert is most ahead of the others, of one task where tasks are known.

    The task is the one where it is most ahead on the mean (shrunk, so that a task of few rows does not win by
    chance): prompts of many tasks have no subject in common. Ties by hash of the id. Raises `TableError`.
    """
    import numpy as np

    from signalbox.router.glider import PRIOR_PROMPTS, advantages
    from signalbox.router.table import TableError, fraction_of

    if not len(table):
        raise TableError("no row has a measurement of every expert of the pool")
    ahead = advantages(table.score)[:, table.models.index(expert)]
    tasks = np.array(table.task)
    known = sorted(set(table.task) - {""})
    if known:
        mean = [ahead[tasks == task].sum() / ((tasks == task).sum() + PRIOR_PROMPTS) for task in known]
        ahead = np.where(tasks == known[int(np.argmax(mean))], ahead, -np.inf)
    tie = np.array([fraction_of(i, "describe") for i in table.prompt_id])
    best: list[str] = []
    for row in np.lexsort((tie, -np.round(ahead, 6))):
        if np.isfinite(ahead[row]) and table.prompt[row] not in best:
            best.append(table.prompt[row])
        if len(best) == count:
            break
    return best


def write_descriptions(descriptions: Mapping[str, str | Sequence[str]], path: Path) -> None:
    """Write the JSON file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.writing")
    partial.write_bytes(orjson.dumps(dict(descriptions), option=orjson.OPT_INDENT_2) + b"\n")
    partial.replace(path)


def descriptions_of(path: str | Path, experts: Sequence[str]) -> dict[str, list[str]]:
    """Expert -> its descriptions, for `Facts.descriptions`; experts of the file that are not asked for are left out.

    Raises `TableError` that says what to mend: the file is no JSON object of texts, an expert stands there twice, has
    no description, more than 16, or one that is empty or longer than 2,000 characters.
    """
    from difflib import get_close_matches

    from signalbox.router.glider import checked_descriptions
    from signalbox.router.table import TableError

    path = Path(path)
    if not path.is_file():
        raise TableError(f"{path}: there is no such file; `signalbox router describe` writes one")
    if path.stat().st_size > MAX_BYTES:
        raise TableError(f"{path}: longer than {MAX_BYTES} bytes, which descriptions are not")
    try:
        found = json.loads(path.read_bytes(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, or a name twice
        raise TableError(f"{path}: {error}") from None
    if not isinstance(found, dict) or not found:
        raise TableError(f'{path}: expected a JSON object, {{"expert": "what it is good at", ...}}')
    for name, value in found.items():
        texts = value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) for text in texts):
            raise TableError(f"{path}: {name!r} is neither a text nor a list of texts")
    for name in experts:
        near = get_close_matches(name, [other for other in found if other not in experts], n=1)
        if name not in found and near:
            raise TableError(f"{path}: {name} has no description; did you mean it by {near[0]!r}?")
    try:
        return checked_descriptions({name: found.get(name, "") for name in experts}, experts)
    except TableError as error:
        raise TableError(f"{path}: {error}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in pairs:
        if name in out:
            raise ValueError(f"{name!r} stands there twice")
        out[name] = value
    return out
