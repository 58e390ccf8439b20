"""Final answers and the vote over them."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signalbox.experts.base import Chunk, TokenLogprob
from signalbox.policies.voting import final_answer, is_settled, vote


def answer(text: str, logprob: float | None = None) -> list[Chunk]:
    """Two chunks, the last with a finish reason."""
    tokens = [] if logprob is None else [TokenLogprob("t", logprob, b"t")]
    return [Chunk(text[:3], logprobs=tokens), Chunk(text[3:], logprobs=tokens, finish_reason="stop")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3 + 4 = 7\n#### 7", "7"),
        ("#### 1,200", "1200"),
        ("The answer is $1,200.00.", "1200"),
        ("So the answer is 5 + 7 = 12. I hope that helps 99 times.", "12"),  # the sentence's last number
        ("The answer is 3. No: the answer is 4.", "4"),  # the last mark
        ("Therefore \\boxed{42} is it, out of 100.", "42"),
        ("\\boxed{\\frac{1}{2}}", "1/2"),
        ("\\boxed{2\\sqrt{3}}", "2 sqrt 3"),  # a formula, not its last number
        ("\\boxed{5", "5"),  # cut off
        ("$\\boxed{x = -3.50}$", "-3.5"),
        ("The final answer is: **-0.0**", "0"),
        ("Answer: (c)", "c"),
        ("answer is (B) because 12 > 7", "b"),
        ("The answer is B", "b"),
        ("The answer is **B**.", "b"),
        ("The answer is A because of 3 things", "a"),
        ("The answer is a lie", "a lie"),  # the article is no option
        ("The answer is 3/4 of it", "3/4"),
        ("The answer is 7 km, 50%", "50"),
        ("The answer is Paris!", "paris"),
        ("Answer:\n42", "42"),
        ("the answer is", "the answer is"),  # nothing follows
        ("  Hello,   WORLD!\n", "hello world"),
        ("3.50", "3.5"),
        ("12", "12"),
        ("12.", "12"),
        ("There are 12 of them", "there are 12 of them"),  # no mark: the whole text
        ("Straße", "strasse"),
        ("", ""),
    ],
)
def test_final_answer(text: str, expected: str) -> None:
    assert final_answer(text) == expected


@given(st.text(max_size=200) | st.text(alphabet="answer is:#{}\\boxed1,.(A)-/ \n", max_size=80))
def test_every_text_has_a_final_answer(text: str) -> None:
    assert isinstance(final_answer(text), str)
    assert final_answer(text) == final_answer(f"  {text.strip()}\n")


def test_it_is_found_in_linear_time() -> None:
    for text in ("1," * 100_000, "\\boxed{" * 30_000, "answer is " * 20_000, "#### " + "9" * 200_000, "-" * 200_000):
        began = time.perf_counter()
        final_answer(text)
        assert time.perf_counter() - began < 5  # tenths of a second; hours if it were quadratic in all of it


def test_the_largest_group_wins_and_in_it_the_first() -> None:
    answers = [answer("Paris"), answer("The answer is 7"), answer("I say: answer is 7.0"), answer("#### 7")]
    assert vote(answers) == (1, [1, 3, 3, 3])


def test_ties_go_to_the_likelier_group_where_all_say_how_likely() -> None:
    assert vote([answer("a", -2.0), answer("b", -0.5), answer("a", -1.0), answer("b", -0.9)]) == (1, [2, 2, 2, 2])
    assert vote([answer("a", -2.0), answer("b", -0.5), answer("c")]) == (0, [1, 1, 1]), "one does not say: the earliest"
    assert vote([answer("a", -9.0), answer("a", -9.0), answer("b", -0.1)])[0] == 0, "a majority needs no likelihood"


def test_empty_answers_have_no_vote_beside_others() -> None:
    assert vote([answer(""), answer("  "), answer("yes")]) == (2, [0, 0, 1])
    assert vote([answer(""), answer("")]) == (0, [2, 2])
    with pytest.raises(ValueError):
        vote([])


@pytest.mark.parametrize(
    ("texts", "pending", "settled"),
    [
        ([], 3, False),
        (["a"], 3, False),
        (["a", "a"], 3, False),  # three others could agree
        (["a", "a"], 2, False),  # a tie
        (["a", "a"], 1, True),
        (["a", "a", "b"], 1, False),
        (["a", "a", "b"], 0, True),
        (["a", "a", "a", "b"], 1, True),
        (["", "", ""], 1, False),
    ],
)
def test_settled(texts: list[str], pending: int, settled: bool) -> None:
    assert is_settled([answer(text) for text in texts], pending) is settled


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=7), st.lists(st.sampled_from("abcd"), max_size=6))
def test_a_settled_vote_never_turns(done: list[str], rest: list[str]) -> None:
    answers = [answer(text) for text in done]
    if is_settled(answers, len(rest)):
        index, _ = vote(answers)
        assert vote(answers + [answer(text) for text in rest])[0] == index
