"""Collecting labels: every expert's loss on every reference answer, with tokens, milliseconds and cost.

No judge is needed: the label is the loss itself, as in Tryage. One expert runs at a time, so that its timings are
its own. Each result is appended to a journal at once; a killed run goes on where it stopped.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import orjson

from signalbox.experts.base import GenerateRequest, Score, Unsupported
from signalbox.experts.catalog import Price
from signalbox.router.table import Table
from signalbox.router.texts import Text

# (expert, texts done, of how many, how many of them failed)
Report = Callable[[str, int, int, int], None]
MAX_REPORTED = 1000


class Scorer(Protocol):
    """What gives labels: an `Engine`, or one adapter of it."""

    async def score(self, request: GenerateRequest, reference: str) -> Score:
        """Likelihood of `reference` as the answer to the request. Raises `Unsupported` where not to be had."""


class CollectError(RuntimeError):
    """Collecting cannot give a table; the message says why and what to do."""


@dataclass(frozen=True)
class Failure:
    """One expert on one prompt, and why there is no label."""

    expert: str
    prompt_id: str
    error: str


@dataclass
class Collected:
    """The table, what failed (at most 1000 kept, `failed` counts all), and how many results the journal gave."""

    table: Table
    failed: int = 0
    failures: list[Failure] = field(default_factory=list)
    resumed: int = 0


@dataclass(frozen=True)
class Measurement:
    """One expert's result on one text. Loss in bits per byte of the reference."""

    loss: float
    in_tok: int
    out_tok: int
    ms: float


class Journal:
    """Append-only JSON lines of results, keyed by a hash of expert, its configuration, prompt and reference.

    So a changed configuration or text is measured again, and an unfinished last line is passed over. Failures are
    written too, for the record; a new run tries them again.
    """

    def __init__(self, path: Path | None) -> None:
        self.known: dict[str, Measurement] = {}
        self._file: IO[bytes] | None = None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = False
        if path.exists():
            for line in path.read_bytes().splitlines(keepends=True):
                unfinished = not line.endswith(b"\n")
                self._take(line)
        self._file = path.open("ab")
        if unfinished:
            self._file.write(b"\n")

    def _take(self, line: bytes) -> None:
        try:
            row = orjson.loads(line)
            if "loss" in row:
                self.known[row["key"]] = Measurement(row["loss"], row["in_tok"], row["out_tok"], row["ms"])
        except (orjson.JSONDecodeError, KeyError, TypeError):
            return  # the line that was being written when the run was killed

    def write(self, key: str, expert: str, prompt_id: str, result: Measurement | str) -> None:
        """Append a result, or the error in its place."""
        row: dict[str, Any] = {"key": key, "expert": expert, "prompt_id": prompt_id}
        if isinstance(result, Measurement):
            self.known[key] = result
            row |= {"loss": result.loss, "in_tok": result.in_tok, "out_tok": result.out_tok, "ms": result.ms}
        else:
            row["error"] = result
        if self._file:
            self._file.write(orjson.dumps(row) + b"\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()


async def collect(
    engines: Mapping[str, Scorer],
    texts: Sequence[Text],
    *,
    prices: Mapping[str, Price] | None = None,
    journal: Path | None = None,
    fingerprints: Mapping[str, str] | None = None,
    concurrency: int = 1,
    report: Report | None = None,
) -> Collected:
    """Score every text with every engine (started already) and return the table.

    Args:
        engines: expert name -> engine; the order of the table's columns.
        texts: prompts and references.
        prices: for the cost column, which counts prompt and reference tokens; without them there is none.
        journal: file to which each result is appended, and from which a former run's results are taken.
        fingerprints: expert name -> hash of its configuration, so that results of another one are not taken.
        concurrency: texts in flight at one expert; with more than 1, `ms` holds times under that load.
        report: called with (expert, done, total, failed) after each text.

    Raises:
        CollectError: an engine cannot score at all, or no text could be scored by all experts.
    """
    if not engines or not texts:
        raise CollectError("nothing to collect: " + ("no text was given" if engines else "the pool is empty"))
    book = Journal(journal)
    out = Collected(table=None)  # type: ignore[arg-type]  # filled in below
    found: dict[str, list[Measurement | None]] = {}
    try:
        for name, engine in engines.items():
            run = _Run(name, engine, texts, book, (fingerprints or {}).get(name, ""), report)
            await run.all(concurrency)
            found[name] = run.results
            out.failed += len(run.failures)
            out.failures += run.failures[: MAX_REPORTED - len(out.failures)]
            out.resumed += run.resumed
    finally:
        book.close()
    out.table = _table(texts, found, prices)
    if not len(out.table.complete()):
        first = f", for instance {out.failures[0].expert}: {out.failures[0].error}" if out.failures else ""
        raise CollectError(f"no text could be scored by every expert ({out.failed} failures{first})")
    return out


class _Run:
    """One expert over all texts."""

    def __init__(
        self, name: str, engine: Scorer, texts: Sequence[Text], book: Journal, fingerprint: str, report: Report | None
    ) -> None:
        self.name, self.engine, self.texts, self.book, self.report = name, engine, texts, book, report
        digests = (hashlib.blake2b(f"{fingerprint}\0{name}\0{t.key}".encode(), digest_size=16) for t in texts)
        self.keys = [d.hexdigest() for d in digests]
        self.results: list[Measurement | None] = [book.known.get(key) for key in self.keys]
        self.resumed = sum(r is not None for r in self.results)
        self.done, self.failures = self.resumed, list[Failure]()

    async def all(self, concurrency: int) -> None:
        self._notify()
        todo = iter([i for i, result in enumerate(self.results) if result is None])
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(max(1, concurrency)):
                    group.create_task(self._work(todo))
        except* Unsupported as errors:
            raise CollectError(
                f"expert {self.name} cannot score references ({errors.exceptions[0]}): leave it out with --pool, "
                "or bring a table with its scores"
            ) from None

    async def _work(self, todo: Iterator[int]) -> None:
        for i in todo:  # shared by the workers: each takes the next text
            text = self.texts[i]
            request = GenerateRequest(
                request_id=f"collect-{text.prompt_id}", messages=[{"role": "user", "content": text.prompt}]
            )
            try:
                result: Measurement | str = _measured(await self.engine.score(request, text.reference))
            except Unsupported:
                raise
            except Exception as error:  # one text must not end a run of hours, whatever its engine does
                result = f"{type(error).__name__}: {error}"
            self.book.write(self.keys[i], self.name, text.prompt_id, result)
            if isinstance(result, Measurement):
                self.results[i] = result
            else:
                self.failures.append(Failure(self.name, text.prompt_id, result))
            self.done += 1
            self._notify()

    def _notify(self) -> None:
        if self.report:
            self.report(self.name, self.done, len(self.texts), len(self.failures))


def _measured(score: Score) -> Measurement:
    if not math.isfinite(score.bits_per_byte) or score.bits_per_byte < 0:
        raise ValueError(f"the loss is {score.bits_per_byte}")
    return Measurement(score.bits_per_byte, score.prompt_tokens, score.reference_tokens, score.seconds * 1e3)


def _table(
    texts: Sequence[Text], found: Mapping[str, Sequence[Measurement | None]], prices: Mapping[str, Price] | None
) -> Table:
    shape = (len(texts), len(found))
    measures = {name: np.full(shape, np.nan) for name in ("loss", "in_tok", "out_tok", "ms")}
    if prices:
        measures["cost"] = np.full(shape, np.nan)
    for column, (expert, results) in enumerate(found.items()):
        for row, result in enumerate(results):
            if result is None:
                continue
            for name in ("loss", "in_tok", "out_tok", "ms"):
                measures[name][row, column] = getattr(result, name)
            if prices:
                measures["cost"][row, column] = prices[expert].usd(result.in_tok, result.out_tok)
    return Table(
        models=tuple(found),
        prompt_id=[t.prompt_id for t in texts],
        prompt=[t.prompt for t in texts],
        source=[t.source for t in texts],
        task=[t.task for t in texts],
        reference=[t.reference for t in texts],
        text=[t.text for t in texts],
        measures=measures,
    )
