"""Text comes out whole: multi-byte characters, stop strings, and nothing lost at the end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signalbox.experts.detokenizer import Detokenizer
from tests.tiny_models import tiny_tokenizer

TOKENIZER = tiny_tokenizer().backend_tokenizer


def run(text: str, stop: tuple[str, ...] = ()) -> tuple[str, bool]:
    detokenizer = Detokenizer(TOKENIZER, stop)
    out = ""
    for token in TOKENIZER.encode(text, add_special_tokens=False).ids:
        piece, stopped = detokenizer.push(token)
        out += piece
        if stopped:
            return out, True
    return out + detokenizer.flush(), False


@given(st.text(max_size=60))
def test_any_text_comes_back(text: str) -> None:
    assert run(text) == (text, False)


@given(st.text("ab ☃x", max_size=40), st.lists(st.text("ab ☃x", min_size=1, max_size=4), max_size=3))
def test_stop_strings_cut_at_the_first_and_lose_nothing_else(text: str, stops: list[str]) -> None:
    out, stopped = run(text, tuple(stops))
    places = [at for s in stops if (at := text.find(s)) >= 0]
    if places:
        # A longer stop string may begin earlier than one that was complete first; text never runs past a stop.
        assert stopped and text.startswith(out) and not any(s in out for s in stops)
    else:
        assert (out, stopped) == (text, False)


def test_text_that_cannot_become_a_stop_string_is_not_held_back() -> None:
    detokenizer = Detokenizer(TOKENIZER, ("STOP",))
    pieces = [detokenizer.push(t)[0] for t in TOKENIZER.encode("fox S fox", add_special_tokens=False).ids]
    assert "".join(pieces) == "fox S fox"


@pytest.mark.parametrize("text", ["☃", "数字"])
def test_an_unfinished_character_is_shown_at_the_end(text: str) -> None:
    detokenizer = Detokenizer(TOKENIZER, ())
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    shown = "".join(detokenizer.push(t)[0] for t in ids[:-1])
    assert "\ufffd" not in shown
    assert detokenizer.flush().endswith("\ufffd")
