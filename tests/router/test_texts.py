from __future__ import annotations

import re
from pathlib import Path

import orjson
import pytest

from signalbox.router.everyday_texts import everyday_texts
from signalbox.router.table import TableError
from signalbox.router.texts import arithmetic_texts, read_texts
from tests.router.conftest import DATA


def write(path: Path, *rows: dict[str, object]) -> Path:
    path.write_bytes(b"\n".join(map(orjson.dumps, rows)))
    return path


def test_intents_are_asked_for_and_learned_bare(tmp_path: Path) -> None:
    file = write(
        tmp_path / "bank.jsonl",
        {"text": "I lost my card", "intent": "Lost_or_stolen_card"},
        {"text": "sing to me", "intent": "oos"},
        {"text": "what is 3 times 4", "intent": "calculator"},
    )
    by_text = {t.reference: t for t in read_texts([file])}
    card = by_text["lost or stolen card"]
    assert card.task == "bank" and card.text == "I lost my card" and "I lost my card" in card.prompt
    assert "intent" in card.prompt and card.prompt != card.text
    assert "out of scope" in by_text
    assert by_text["calculator"].text == by_text["calculator"].prompt  # bare, it asks for a number


def test_solutions_lose_the_calculator_notes(tmp_path: Path) -> None:
    rows = [
        {
            "text": f"Ann has {i} pens and 2 caps. How many things?",
            "solution": f"{i}+2=<<{i}+2={i + 2}>>{i + 2}\n#### {i + 2}",
        }
        for i in range(20)
    ]
    texts = read_texts([write(tmp_path / "sums.jsonl", *rows)])
    assert texts and all(t.task == "sums" for t in texts)  # two sentences are no story
    for text in texts:
        assert "<<" not in text.reference and "####" not in text.reference
        assert re.search(r"\nThe answer is \d+\.$", text.reference)


def test_a_narrative_becomes_prose_without_its_question(tmp_path: Path) -> None:
    story = "A woman stood on the platform. A man took her purse. He ran up the stairs. He was caught. Is he guilty?"
    texts = read_texts([write(tmp_path / "exam.jsonl", {"prompt": f"{story}\nA. Yes\nB. No", "answer": "A"})])
    assert len(texts) == 1
    prose = texts[0]
    assert prose.task == "prose" and prose.source == "exam" and prose.text == "A woman stood on the platform."
    assert prose.reference == "A man took her purse. He ran up the stairs. He was caught."
    assert "guilty" not in prose.prompt + prose.reference


def test_code_and_short_answers(tmp_path: Path) -> None:
    code = write(tmp_path / "code.jsonl", {"text": "Add two numbers.", "code": "def f(a, b):\r\n\treturn a + b"})
    body = write(tmp_path / "body.jsonl", {"text": "def f():\n", "canonical_solution": "    return 1\n"})
    answer = write(tmp_path / "logic.jsonl", {"text": "not True is", "answer": "False", "task": "booleans"})
    by_task = {t.task: t for t in read_texts([code, body, answer])}
    assert by_task["code"].reference == "def f(a, b):\n    return a + b"
    assert by_task["body"].reference == "    return 1" and "def f():" in by_task["body"].prompt
    assert by_task["logic"].prompt == "not True is"  # the task is the file's name


def test_a_table_of_prompts_and_references(tmp_path: Path) -> None:
    file = write(
        tmp_path / "own.jsonl",
        {"prompt": "Say hello", "reference": "hello", "prompt_id": 7, "task": "greet"},
        {"prompt": "Say bye", "reference": "bye"},
        {"prompt": "Say nothing", "reference": ""},
    )
    texts = sorted(read_texts([file]), key=lambda t: t.reference)
    assert [(t.task, t.reference) for t in texts] == [("own", "bye"), ("greet", "hello")]
    assert texts[1].prompt_id == "7"


def test_the_sample_is_the_same_everywhere_and_nested(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "answer": str(i)} for i in range(60)]
    one = read_texts([write(tmp_path / "a.jsonl", *rows)], 20)
    (tmp_path / "b").mkdir()
    two = read_texts([write(tmp_path / "b" / "a.jsonl", *reversed(rows), rows[0])], 30)
    assert len(one) == 20 and len(two) == 30
    assert {t.prompt_id for t in one} < {t.prompt_id for t in two}
    assert len(read_texts([tmp_path / "b"])) == 60  # a folder; the duplicate is taken once


def test_files_of_no_known_form_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="of no known form"):
        read_texts([write(tmp_path / "x.jsonl", {"a": 1})])
    with pytest.raises(TableError, match="row 2: a cell that should hold text"):
        read_texts([write(tmp_path / "y.jsonl", {"text": "a", "answer": "b"}, {"text": None, "answer": "b"})])
    with pytest.raises(TableError, match="no such file"):
        read_texts([tmp_path / "absent.jsonl"])
    with pytest.raises(TableError, match="no file of texts"):
        read_texts([])


def test_sums_are_right() -> None:
    texts = arithmetic_texts(200)
    assert len({t.prompt for t in texts}) == 200
    words = {"plus": "+", "minus": "-", "times": "*"}
    for text in texts:
        a, op, b, value = re.fullmatch(r"(\d+) ([-+*]) (\d+) = (-?\d+)", text.reference).groups()  # type: ignore[union-attr]
        assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[op] == int(value)
        asked = re.search(r"(\d+) ?([-+*]|plus|minus|times) ?(\d+)", text.prompt)
        assert asked and (asked[1], words.get(asked[2], asked[2]), asked[3]) == (a, op, b)


@pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is absent")
def test_the_shared_tasks_give_eight_kinds_of_text() -> None:
    texts = read_texts([DATA / "tasks", DATA / "routing" / "mmlu_pro.parquet"], 40)
    counts: dict[str, int] = {}
    for text in texts:
        counts[text.task] = counts.get(text.task, 0) + 1
    assert counts == dict.fromkeys(("banking77", "bbh", "clinc150", "gsm8k", "humaneval", "mbpp", "prose"), 40)
    assert len({t.prompt_id for t in texts}) == len(texts)


def test_everyday_texts_are_many_and_each_has_its_answer() -> None:
    texts = everyday_texts(1000)
    assert len(texts) >= 250 and len({t.prompt_id for t in texts}) == len({t.prompt for t in texts}) == len(texts)
    assert all(t.task == "everyday" and t.reference.strip() and t.text == t.prompt for t in texts)
    assert everyday_texts(50) == texts[:50], "a smaller table is a part of a larger one"
