"""The one table format: a row a prompt, a group of columns an expert.

Columns: `prompt_id, prompt, source, task`, then for each expert `score:<m>` in [0, 1], `cost:<m>` in US dollars,
`out_tok:<m>`, and `in_tok` or `in_tok:<m>`. Our collector adds `loss:<m>` (bits per byte of the reference),
`ms:<m>` (milliseconds), `reference`, and `text` (the user's own words where `prompt` wraps them in an instruction).
Read from parquet, CSV and JSON lines; other columns are passed over. An empty cell is a missing measurement.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray

from signalbox.router.base import quality_of_loss

Matrix = NDArray[np.float64]

# Each measured quantity: its lowest and highest value, and the unit that an error names.
BOUNDS: dict[str, tuple[float, float, str]] = {
    "score": (0.0, 1.0, "in [0, 1]"),
    "loss": (0.0, np.inf, "a finite number of bits per byte, 0 or more"),
    "cost": (0.0, np.inf, "a finite number of US dollars, 0 or more"),
    "in_tok": (0.0, np.inf, "a number of tokens, 0 or more"),
    "out_tok": (0.0, np.inf, "a number of tokens, 0 or more"),
    "ms": (0.0, np.inf, "a number of milliseconds, 0 or more"),
}
TEXT_COLUMNS = ("prompt_id", "prompt", "source", "task", "reference", "text")


class TableError(ValueError):
    """A table that cannot be used; the message names the column, the row (counted from 1), and what to do."""


def fraction_of(key: str, salt: str = "") -> float:
    """A number in [0, 1) that depends on `key` and `salt` alone: the same on every machine, for splits and samples."""
    digest = hashlib.blake2b(f"{salt}\0{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


@dataclass(frozen=True)
class Table:
    """Measurements of `models` on prompts, validated.

    `measures` maps "score", "loss", "cost", "in_tok", "out_tok" and "ms", as far as known, to float64 [n, models],
    NaN where missing. "score" is always there: where only losses are known it is 2**-loss.
    """

    models: tuple[str, ...]
    prompt_id: list[str]
    prompt: list[str]
    measures: dict[str, Matrix]
    source: list[str] = field(default_factory=list)
    task: list[str] = field(default_factory=list)
    reference: list[str] | None = None
    text: list[str] | None = None

    def __post_init__(self) -> None:
        """Check every value; raises `TableError`."""
        n, measures = len(self.prompt_id), dict(self.measures)
        object.__setattr__(self, "measures", measures)
        for name in ("source", "task"):
            if not getattr(self, name):
                object.__setattr__(self, name, [""] * n)
        for name in TEXT_COLUMNS:
            column = getattr(self, name)
            if column is not None and len(column) != n:
                raise TableError(f"column {name} has {len(column)} rows, prompt_id has {n}")
        if not self.models:
            raise TableError("the table has no model: it needs a column score:<model> or loss:<model> for each")
        _check_ids(self.prompt_id)
        for kind, values in measures.items():
            _check_bounds(kind, self.models, values, n)
        if "score" not in measures:
            if "loss" not in measures:
                raise TableError("the table has neither score:<model> nor loss:<model> columns")
            measures["score"] = quality_of_loss(measures["loss"]).astype(np.float64)
        elif "loss" in measures:  # a row may have been collected (loss) or judged (score): keep what is known
            derived = quality_of_loss(measures["loss"]).astype(np.float64)
            measures["score"] = np.where(np.isnan(measures["score"]), derived, measures["score"])

    def __len__(self) -> int:
        return len(self.prompt_id)

    @property
    def score(self) -> Matrix:
        """float64 [n, models] in [0, 1], NaN where missing."""
        return self.measures["score"]

    @property
    def loss(self) -> Matrix | None:
        """float64 [n, models] in bits per byte, NaN where missing; None where the table has no losses at all."""
        return self.measures.get("loss")

    @cached_property
    def sha256(self) -> str:
        """Hash of prompts and measurements: the same table gives the same hash in any file format."""
        digest = hashlib.sha256(orjson.dumps([self.models, self.prompt_id, self.prompt]))
        for kind in sorted(self.measures):
            digest.update(kind.encode())
            digest.update(np.ascontiguousarray(self.measures[kind].astype(np.float32)).tobytes())
        return digest.hexdigest()

    def rows(self, keep: NDArray[Any]) -> Table:
        """The rows at these positions (int [k]), or where a mask (bool [n]) is true."""
        index = np.arange(len(self))[keep]

        def taken(column: list[str]) -> list[str]:
            return [column[i] for i in index]

        return replace(
            self,
            prompt_id=taken(self.prompt_id),
            prompt=taken(self.prompt),
            source=taken(self.source),
            task=taken(self.task),
            reference=None if self.reference is None else taken(self.reference),
            text=None if self.text is None else taken(self.text),
            measures={kind: values[index] for kind, values in self.measures.items()},
        )

    def pool(self, names: Iterable[str] | None = None) -> Table:
        """The columns of these models, in this order (None: all). Raises `TableError` naming those it lacks."""
        wanted = tuple(names) if names is not None else self.models
        missing = [name for name in wanted if name not in self.models]
        if missing:
            hints = [m for name in missing for m in get_close_matches(name, self.models, n=1)]
            near = f"; did you mean {', '.join(hints)}?" if hints else ""
            raise TableError(
                f"the table has no column for {', '.join(missing)}{near} (it has: {', '.join(self.models)})"
            )
        if len(set(wanted)) != len(wanted):
            raise TableError(f"a model is named twice in the pool {', '.join(wanted)}")
        index = [self.models.index(name) for name in wanted]
        return replace(self, models=wanted, measures={kind: values[:, index] for kind, values in self.measures.items()})

    def complete(self) -> Table:
        """The rows where every model has been measured (the loss where the table has losses, else the score)."""
        values = self.score if self.loss is None else self.loss
        return self.rows(np.asarray(~np.isnan(values).any(axis=1)))

    def teaching_texts(self) -> tuple[list[str], NDArray[np.intp]]:
        """Texts to learn from, and the row that each comes from.

        All prompts; then, where `text` differs from it, the bare text too: once as the experts were asked (with an
        instruction), once as a user would type it.
        """
        bare = [i for i, text in enumerate(self.text or []) if text and text != self.prompt[i]]
        texts = self.prompt + [self.text[i] for i in bare] if self.text else list(self.prompt)
        return texts, np.array([*range(len(self)), *bare], dtype=np.intp)

    def sample(self, most: int) -> NDArray[np.intp]:
        """Positions int [k], ascending, of at most this many rows, chosen by the hash of their prompt."""
        order = np.argsort([fraction_of(p, "sample") for p in self.prompt], kind="stable")
        return np.sort(order[:most])

    def held_out(self, fraction: float, salt: str = "") -> NDArray[np.bool_]:
        """bool [n]: the rows that a split by hash of `prompt_id` keeps from training."""
        return np.array([fraction_of(i, salt) < fraction for i in self.prompt_id], dtype=bool)


def _check_ids(ids: list[str]) -> None:
    seen: dict[str, int] = {}
    for row, value in enumerate(ids, 1):
        if value in seen:
            raise TableError(f"column prompt_id, row {row}: {value!r} stands in row {seen[value]} already")
        seen[value] = row


def _check_bounds(kind: str, models: tuple[str, ...], values: Matrix, n: int) -> None:
    low, high, unit = BOUNDS[kind]
    if values.shape != (n, len(models)):
        raise TableError(f"{kind} has shape {values.shape}, expected {(n, len(models))}")
    bad = np.argwhere((values < low) | (values > high) | np.isinf(values))
    if len(bad):
        row, column = bad[0]
        raise TableError(f"column {kind}:{models[column]}, row {row + 1}: {values[row, column]:g} is not {unit}")


def read_table(path: str | Path) -> Table:
    """Read .parquet, .csv or .jsonl. Raises `TableError` naming the file, the column and the row."""
    path = Path(path)
    try:
        return from_columns(read_columns(path))
    except TableError as error:
        raise TableError(f"{path}: {error}") from None


def read_columns(path: Path) -> dict[str, list[Any]]:
    """The file's columns as Python lists, None where a cell is empty. Raises `TableError`."""
    if not path.is_file():
        raise TableError("there is no such file")
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            return pa.parquet.read_table(path).to_pydict()
        if suffix == ".csv":
            return _read_csv(path)
    except pa.ArrowException as error:
        raise TableError(f"not a readable {suffix[1:]} file: {error}") from None
    if suffix in (".jsonl", ".ndjson"):
        return _read_jsonl(path)
    raise TableError(f"unknown format {suffix or '(no suffix)'}: use .parquet, .csv or .jsonl")


def _read_csv(path: Path) -> dict[str, list[Any]]:
    parse = pa.csv.ParseOptions(newlines_in_values=True)
    # Texts stay texts (an id 007, a prompt "null"); only numbers may be empty.
    convert = pa.csv.ConvertOptions(
        column_types=dict.fromkeys((*TEXT_COLUMNS, "answer", "intent", "solution"), pa.string()),
        null_values=["", "NaN", "nan", "null"],
    )
    return pa.csv.read_csv(path, parse_options=parse, convert_options=convert).to_pydict()


def _read_jsonl(path: Path) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {}
    count = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise TableError(f"line {number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise TableError(f"line {number} is not a JSON object")
            for name in row:  # in the order of the file: it is the order of the models
                columns.setdefault(name, [None] * count)
            for name, values in columns.items():
                values.append(row.get(name))
            count += 1
    return columns


def from_columns(columns: dict[str, list[Any]]) -> Table:
    """Build a table from its columns by name. Raises `TableError` naming column and row."""
    for name in ("prompt_id", "prompt"):
        if name not in columns:
            raise TableError(f"column {name} is missing (it has: {', '.join(list(columns)[:12]) or 'no columns'})")
    n = len(columns["prompt_id"])
    if n == 0:
        raise TableError("it has no rows")
    texts = {name: _text_column(name, columns[name]) for name in TEXT_COLUMNS if name in columns}
    models = _models(columns)
    measures: dict[str, Matrix] = {}
    for kind in BOUNDS:
        present = [m for m in models if f"{kind}:{m}" in columns]
        if present:
            values = np.full((n, len(models)), np.nan)
            for m in present:
                values[:, models.index(m)] = _number_column(f"{kind}:{m}", columns[f"{kind}:{m}"])
            measures[kind] = values
    if "in_tok" in columns and "in_tok" not in measures:  # one count for all models
        shared = _number_column("in_tok", columns["in_tok"])
        measures["in_tok"] = np.repeat(shared[:, None], len(models), axis=1)
    return Table(models=models, measures=measures, **texts)


def _models(columns: dict[str, list[Any]]) -> tuple[str, ...]:
    """Models with a score or a loss, in the order of the columns; a cost of a model never scored is an error."""
    split = [name.split(":", 1) for name in columns if ":" in name]
    models = dict.fromkeys(model for kind, model in split if kind in ("score", "loss"))
    for kind, model in split:
        if kind in BOUNDS and model not in models:
            raise TableError(f"column {kind}:{model} has no column score:{model} or loss:{model} beside it")
    return tuple(models)


def _text_column(name: str, values: list[Any]) -> list[str]:
    required = name in ("prompt_id", "prompt")
    out = []
    for row, value in enumerate(values, 1):
        if value is None or value == "":
            if required:
                raise TableError(f"column {name}, row {row}: it is empty")
            value = ""
        elif name == "prompt_id" and isinstance(value, int):
            value = str(value)
        elif not isinstance(value, str):
            raise TableError(f"column {name}, row {row}: {value!r} is not text")
        out.append(value)
    return out


def _number_column(name: str, values: list[Any]) -> NDArray[np.float64]:
    try:
        return np.array([np.nan if v is None else v for v in values], dtype=np.float64)
    except (TypeError, ValueError):
        for row, value in enumerate(values, 1):
            if value is not None and not isinstance(value, (int, float)):
                raise TableError(f"column {name}, row {row}: {value!r} is not a number") from None
        raise


def write_table(table: Table, path: str | Path) -> None:
    """Write .parquet, .csv or .jsonl, by the suffix; the file appears whole or not at all. Raises `TableError`."""
    path = Path(path)
    columns: dict[str, Any] = {n: getattr(table, n) for n in TEXT_COLUMNS if getattr(table, n) is not None}
    for kind, values in table.measures.items():
        whole = kind in ("in_tok", "out_tok")
        for m, model in enumerate(table.models):
            cells = [None if np.isnan(v) else int(v) if whole and v == int(v) else float(v) for v in values[:, m]]
            columns[f"{kind}:{model}"] = cells
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.writing")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        pa.parquet.write_table(pa.table(columns), partial, compression="zstd")
    elif suffix == ".csv":
        pa.csv.write_csv(pa.table(columns), partial)
    elif suffix in (".jsonl", ".ndjson"):
        with partial.open("wb") as out:
            for i in range(len(table)):
                out.write(orjson.dumps({name: values[i] for name, values in columns.items()}) + b"\n")
    else:
        raise TableError(f"{path}: unknown format {suffix or '(no suffix)'}: use .parquet, .csv or .jsonl")
    partial.replace(path)
