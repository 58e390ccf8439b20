"""Prompts with a reference answer, from task files: what `signalbox router collect` runs the experts over.

A file is recognised by its columns; its name is the task. `prompt` is what the experts are asked, with an
instruction where the bare text does not say what to do with it (an intent, a piece of code). `text` is what a user
would type without one: the router learns from both, with the losses measured on the instructed form.

Free text ("prose") comes out of the narrative parts of other files, for none of ours holds plain prose: the
statement of a word problem or of an exam question, without its question, is a short story. Its first sentence is
the prompt and the rest the reference. A row gives either its own task or prose, never both.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from signalbox.router.table import TableError, fraction_of, read_columns

SUFFIXES = (".parquet", ".csv", ".jsonl", ".ndjson")
# Share of the word problems that become prose.
PROSE_SHARE = 0.3
PROSE_CHARACTERS = 400

# Several wordings a task, so that the router learns the task and not one phrase; the row's hash chooses.
INTENT = (
    "What is the intent of this message? Answer with a few words.\n\n{text}",
    "{text}\n\nName the intent of this message in a few words.",
    "Classify the intent of the user's message.\n\nMessage: {text}",
)
COMPLETE_CODE = (
    "Complete this Python function. Give only the code that follows.\n\n{text}",
    "{text}\n\nWrite the body of this function.",
)
WRITE_CODE = ("{text}", "{text} Reply with Python code only.", "Python task: {text}")
PROSE = (
    "Tell me a story that begins like this: {text}",
    "Write a short text. Its first sentence is: {text}",
    "Continue this text.\n\n{text}",
    "Write what happens next: {text}",
)
BARE = ("{text}",)
# Typed without an instruction these ask for a number, not for the name of an intent: no bare text is learned.
ARITHMETIC_INTENTS = ("calculator", "measurement conversion")
SUMS = ("What is {a}{op}{b}?", "{a} {op} {b} =", "Calculate {a} {op} {b}.", "How much is {a} {word} {b}?")


@dataclass(frozen=True)
class Text:
    """One prompt with its reference. `text` is the prompt without its instruction, or the same."""

    prompt_id: str
    prompt: str
    reference: str
    task: str
    source: str
    text: str

    @property
    def key(self) -> str:
        """Hash of what an expert is shown, 32 hex digits."""
        return hashlib.blake2b(f"{self.prompt}\0{self.reference}".encode(), digest_size=16).hexdigest()


def read_texts(paths: Iterable[str | Path], limit: int | None = None) -> list[Text]:
    """Texts of these files, or of all files in these folders, at most `limit` for each task.

    The choice goes by hash: it is the same on every machine, and a smaller limit takes a part of a larger one's.
    A prompt that stands in the files twice is taken once. Raises `TableError` naming the file and what it needs.
    """
    files = [file for path in paths for file in _expand(Path(path))]
    if not files:
        raise TableError("no file of texts was given")
    by_task: dict[str, dict[str, Text]] = {}
    for file in files:
        for text in _read(file):
            by_task.setdefault(text.task, {}).setdefault(text.prompt_id, text)
    chosen = []
    for _, texts in sorted(by_task.items()):
        ranked = sorted(texts.values(), key=lambda t: (fraction_of(t.prompt_id, "sample"), t.prompt_id))
        chosen += ranked[:limit]
    return chosen


def arithmetic_texts(count: int) -> list[Text]:
    """`count` sums of two numbers with their result, made here: no task file asks for one as users type it."""
    texts: dict[str, Text] = {}
    number = 0
    while len(texts) < count:
        number += 1
        a, b, wording, kind = (fraction_of(f"{number}-{part}", "sum") for part in ("a", "b", "wording", "kind"))
        op, word, largest = (("+", "plus", 999), ("-", "minus", 999), ("*", "times", 99))[int(kind * 3)]
        left, right = 2 + int(a * largest), 2 + int(b * largest)
        value = {"+": left + right, "-": left - right, "*": left * right}[op]
        prompt = SUMS[int(wording * len(SUMS))].format(a=left, b=right, op=op, word=word)
        made = made_text("arithmetic", prompt, f"{left} {op} {right} = {value}")
        texts.setdefault(made.prompt_id, made)
    return list(texts.values())


def made_text(task: str, prompt: str, reference: str) -> Text:
    """A text that stands in no file."""
    return _text({}, task, prompt, reference)[0]


def _expand(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return sorted(f for f in path.iterdir() if f.suffix.lower() in SUFFIXES)


def _read(file: Path) -> list[Text]:
    try:
        columns = read_columns(file)
        names = set(columns)
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        for needed, make in FORMATS:
            if needed <= names:
                return [text for number, row in enumerate(rows, 1) for text in _checked(make, row, file.stem, number)]
    except TableError as error:
        raise TableError(f"{file}: {error}") from None
    wanted = "; ".join(", ".join(sorted(needed)) for needed, _ in FORMATS)
    raise TableError(f"{file}: its columns ({', '.join(sorted(names)[:8])}) are of no known form: {wanted}")


def _checked(make: Callable[[Any, str], list[Text]], row: dict[str, Any], task: str, number: int) -> list[Text]:
    try:
        return make(row, task)
    except (AttributeError, TypeError):
        raise TableError(f"row {number}: a cell that should hold text is empty or holds something else") from None


def _text(row: dict[str, Any], task: str, bare: str, reference: str, wordings: Sequence[str] = BARE) -> list[Text]:
    """One text, worded by the row's hash; none where prompt or reference is empty."""
    bare, reference = bare.strip("\n"), reference.strip("\n")
    if not bare.strip() or not reference.strip():
        return []
    digest = hashlib.blake2b(f"{task}\0{bare}".encode(), digest_size=6).hexdigest()
    prompt = wordings[int(fraction_of(digest, "wording") * len(wordings))].format_map({"text": bare})
    return [Text(f"{task}-{digest}", prompt, reference, task, row.get("source") or task, bare)]


def _generic(row: dict[str, Any], task: str) -> list[Text]:
    task = row.get("task") or task
    made = _text(row, task, row["prompt"], row["reference"])
    return [
        Text(
            str(row["prompt_id"]) if row.get("prompt_id") is not None else t.prompt_id,
            t.prompt,
            t.reference,
            task,
            t.source,
            row.get("text") or t.prompt,
        )
        for t in made
    ]


def _intent(row: dict[str, Any], task: str) -> list[Text]:
    intent = "out of scope" if row["intent"] == "oos" else row["intent"].replace("_", " ").lower()
    texts = _text(row, task, row["text"], intent, INTENT)
    if intent in ARITHMETIC_INTENTS:
        return [replace(text, text=text.prompt) for text in texts]
    return texts


def _word_problem(row: dict[str, Any], task: str) -> list[Text]:
    if fraction_of(row["text"], "prose") < PROSE_SHARE:
        return _prose(row, row["text"], task)
    # <<48/2=24>> are notes for a calculator, not words of an answer.
    solution = re.sub(r"<<[^>]*>>", "", row["solution"])
    return _text(row, task, row["text"], re.sub(r"\n#### (.*)$", r"\nThe answer is \1.", solution))


def _complete_code(row: dict[str, Any], task: str) -> list[Text]:
    return _text(row, task, row["text"], row["canonical_solution"], COMPLETE_CODE)


def _write_code(row: dict[str, Any], task: str) -> list[Text]:
    return _text(row, task, row["text"], row["code"].replace("\r\n", "\n").expandtabs(4), WRITE_CODE)


def _short_answer(row: dict[str, Any], task: str) -> list[Text]:
    return _text(row, task, row["text"], row["answer"])


def _exam_question(row: dict[str, Any], task: str) -> list[Text]:
    """A table of multiple-choice questions: only its narratives are used, as prose."""
    return _prose(row, row["prompt"].split("\nA. ")[0], task)


def _prose(row: dict[str, Any], statement: str, source: str) -> list[Text]:
    """Opening sentence and continuation of a narrative of four sentences or more, without its closing question."""
    sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z\"'])", " ".join(statement.split()))
    letters = sum(c.isalpha() or c in " ,.'\"" for c in statement)
    if len(sentences) < 4 or letters < 0.93 * len(statement):
        return []
    continuation = ""
    for sentence in sentences[1:-1]:
        if len(continuation) + len(sentence) > PROSE_CHARACTERS:
            break
        continuation += f" {sentence}"
    return _text({"source": source}, "prose", sentences[0], continuation.strip(), PROSE)


# Columns that a form needs -> how its rows are read; the first that fits.
FORMATS: tuple[tuple[frozenset[str], Callable[[dict[str, Any], str], list[Text]]], ...] = (
    (frozenset({"prompt", "reference"}), _generic),
    (frozenset({"text", "intent"}), _intent),
    (frozenset({"text", "solution"}), _word_problem),
    (frozenset({"text", "canonical_solution"}), _complete_code),
    (frozenset({"text", "code"}), _write_code),
    (frozenset({"text", "answer"}), _short_answer),
    (frozenset({"prompt", "answer"}), _exam_question),
)
