"""Tables to train adapters on: texts with the answers that belong to them, split by a hash of the text.

Two kinds: *classification* (a text and its label; the answer is the label in words, `card_arrival` -> `card arrival`)
and *completion* (a text and its answer, as it stands). The text is shown as a user types it, without an instruction.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["classification", "completion"]
SUFFIXES = (".parquet", ".csv", ".jsonl", ".ndjson")
TEXT_COLUMNS = ("text", "prompt", "question", "input")
LABEL_COLUMNS = ("label", "intent", "category")
ANSWER_COLUMNS = ("solution", "answer", "completion", "reference", "output")
HOLDOUT = 0.1
VALIDATION_EVERY = 20  # one row in so many of those that are not held out chooses between weights
_POOL = 32  # batches that are sorted by length together


class TrainingError(Exception):
    """A table, an option or a model that an adapter cannot be trained with; the message says what to do."""


@dataclass(slots=True, frozen=True)
class Example:
    """One text and the answer that the adapter is to give."""

    text: str
    answer: str


@dataclass(slots=True, frozen=True)
class TaskTable:
    """A table's examples, each text once. `sha256` is the file's; `labels` the distinct answers of a classification."""

    name: str
    kind: Kind
    examples: tuple[Example, ...]
    sha256: str
    labels: tuple[str, ...] = ()


@dataclass(slots=True, frozen=True)
class Split:
    """`train` is learned from, `validation` chooses weights and hyperparameters, `held_out` is only scored."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    held_out: tuple[Example, ...]


@dataclass(slots=True, frozen=True)
class Codec:
    """Between texts and token ids, as the service does it: the caller brings the expert's own tokenizer and template.

    encode_prompt: a user's text -> the whole chat up to where the answer begins. encode_answer: an answer's text ->
    tokens that follow it, without the end of turn. eos: the token that ends an answer; stops: all that do.
    """

    encode_prompt: Callable[[str], list[int]]
    encode_answer: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    eos: int
    stops: frozenset[int]
    pad: int
    context_length: int


@dataclass(slots=True, frozen=True)
class Encoded:
    """One example in tokens. `answer` ends with the end of turn; `nbytes` counts the answer's text in UTF-8."""

    prompt: list[int]
    answer: list[int]
    nbytes: int
    text: str
    reference: str

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt) + len(self.answer)


def hash_of(text: str) -> int:
    """64 bits of blake2b(text): the same on every machine, so that a split never changes."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def held_out(text: str, share: float = HOLDOUT) -> bool:
    """Whether a text is kept from training: `blake2b(text) % 10 == 0` at the share 0.1, without newlines around it.

    Equal texts go together, on every machine and in every table.
    """
    return share > 0 and hash_of(text.strip("\n")) % round(1 / share) == 0


def split(table: TaskTable, share: float = HOLDOUT) -> Split:
    """Divide a table by the hash of its texts. Raises `TrainingError` where a part comes out empty."""
    parts: tuple[list[Example], list[Example], list[Example]] = ([], [], [])
    for example in table.examples:
        if held_out(example.text, share):
            parts[2].append(example)
        else:
            validates = hash_of("validation\0" + example.text) % VALIDATION_EVERY == 0
            parts[1 if validates else 0].append(example)
    for name, part in zip(("train on", "validate with", "hold out"), parts, strict=True):
        if not part:
            raise TrainingError(f"{table.name}: of {len(table.examples)} rows none is left to {name}; give more rows")
    return Split(*(tuple(part) for part in parts))


def read_table(
    path: Path,
    kind: Kind | Literal["auto"] = "auto",
    *,
    text: str | None = None,
    answer: str | None = None,
    edits: Sequence[tuple[str, str]] = (),
) -> TaskTable:
    """The examples of a .parquet, .csv or .jsonl file.

    `text` and `answer` name the columns, by default the first of `TEXT_COLUMNS`, and of `LABEL_COLUMNS` and
    `ANSWER_COLUMNS`. `edits` are (regular expression, replacement) pairs that every answer goes through. A text that
    stands there twice is taken once, with its first answer. Raises `TrainingError` naming the file, column or row.
    """
    columns = _columns(path)
    text_column = _column(path, columns, text, TEXT_COLUMNS, "--text")
    among = {"classification": LABEL_COLUMNS, "completion": ANSWER_COLUMNS, "auto": LABEL_COLUMNS + ANSWER_COLUMNS}
    answer_column = _column(path, columns, answer, among[kind], "--label")
    texts, answers = columns[text_column], columns[answer_column]
    if kind == "auto":
        kind = "classification" if _are_labels(answers) else "completion"
    compiled = []
    for pattern, replacement in edits:
        try:
            compiled.append((re.compile(pattern), replacement))
        except re.error as error:
            raise TrainingError(f"the edit {pattern!r} is no regular expression: {error}") from error
    found: dict[str, str] = {}
    for number, (shown, value) in enumerate(zip(texts, answers, strict=True), 1):
        if not isinstance(shown, str) or not shown.strip() or value is None or not str(value).strip():
            raise TrainingError(f"{path}: row {number} has no {text_column!r} or no {answer_column!r}")
        said = label_words(str(value)) if kind == "classification" else str(value).strip("\n")
        for expression, replacement in compiled:
            said = expression.sub(replacement, said)
        found.setdefault(shown.strip("\n"), said)
    labels = tuple(sorted(set(found.values()))) if kind == "classification" else ()
    return TaskTable(
        name=path.name,
        kind=kind,
        examples=tuple(Example(shown, said) for shown, said in found.items()),
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        labels=labels,
    )


def label_words(label: str) -> str:
    """A label as an answer: `card_arrival` -> `card arrival`."""
    return " ".join(re.split(r"[_\s]+", label.strip())).lower()


def encode(
    examples: Iterable[Example], codec: Codec, longest: int, prompts: Sequence[str] = ("{text}",)
) -> list[Encoded]:
    """Examples as tokens, the text put into the wording that its hash chooses; those over `longest` are left out."""
    encoded = []
    for example in examples:
        wording = prompts[hash_of("wording\0" + example.text) % len(prompts)]
        shown = wording.replace("{text}", example.text)
        answer = [*codec.encode_answer(example.answer), codec.eos]
        row = Encoded(codec.encode_prompt(shown), answer, len(example.answer.encode()), shown, example.answer)
        if row.length <= longest:
            encoded.append(row)
    return encoded


def length_batches(rows: Sequence[Encoded], size: int, draw: random.Random) -> list[list[int]]:
    """One pass over all rows as batches of row numbers, rows of like length together, batches in random order."""
    order = list(range(len(rows)))
    draw.shuffle(order)
    batches: list[list[int]] = []
    for start in range(0, len(order), size * _POOL):
        pool = sorted(order[start : start + size * _POOL], key=lambda i: rows[i].length)
        batches += [pool[i : i + size] for i in range(0, len(pool), size)]
    draw.shuffle(batches)
    return batches


def token_batches(rows: Sequence[Encoded], limit: int) -> list[list[int]]:
    """Row numbers in batches of like length, none of more than `limit` tokens with its padding (or of one row)."""
    batches: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lambda i: rows[i].length):
        # In order of length, the newest row is the widest.
        if batches and (len(batches[-1]) + 1) * rows[i].length <= limit:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _columns(path: Path) -> dict[str, list[Any]]:
    import pyarrow as pa

    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            table = pyarrow.parquet.read_table(path)
        elif path.suffix == ".csv":
            import pyarrow.csv

            table = pyarrow.csv.read_csv(path)
        elif path.suffix in (".jsonl", ".ndjson"):
            import pyarrow.json

            table = pyarrow.json.read_json(path)
        else:
            raise TrainingError(f"{path}: a table ends in {', '.join(SUFFIXES)}")
    except (OSError, pa.ArrowInvalid) as error:
        raise TrainingError(f"cannot read {path}: {error}") from error
    if table.num_rows == 0:
        raise TrainingError(f"{path} has no rows")
    return {str(name): values for name, values in table.to_pydict().items()}


def _column(path: Path, columns: dict[str, Any], wanted: str | None, usual: Sequence[str], option: str) -> str:
    there = ", ".join(columns)
    if wanted is not None:
        if wanted not in columns:
            raise TrainingError(f"{path} has no column {wanted!r}; there are: {there}")
        return wanted
    for name in usual:
        if name in columns:
            return name
    raise TrainingError(f"{path} has none of the columns {', '.join(usual)}; name one of {there} with {option}")


def _are_labels(answers: Sequence[Any]) -> bool:
    """Few distinct short answers that come back again and again."""
    distinct = {str(value) for value in answers}
    return 5 * len(distinct) <= len(answers) and max(map(len, distinct)) <= 64
