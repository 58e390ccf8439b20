from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from signalbox.router.ngrams import BITS, MAX_BYTES, SURFACE, Vocabulary, ngrams, surface, to_bytes


def words_of(text: str) -> set[int]:
    return set(ngrams(to_bytes(text))[0].tolist())


def characters_of(text: str) -> set[int]:
    return set(ngrams(to_bytes(text))[1].tolist())


def test_a_word_is_the_same_wherever_it_stands() -> None:
    assert words_of("football") <= words_of("we play football") & words_of("Football, they say!")
    assert words_of("we play football") != words_of("football play we")  # pairs have an order
    assert len(words_of("a b")) == 3 and len(words_of("x + y")) == 5  # words and pairs; a sign is a word of its own


def test_case_and_digits_are_folded() -> None:
    assert words_of("Version 17") == words_of("VERSION 23") != words_of("version 170")


def test_characters_stay_inside_words() -> None:
    # " ab " has " ab", "ab " and " ab ".
    assert len(characters_of("ab")) == 3
    assert characters_of("ab cd") == characters_of("ab") | characters_of("cd")
    assert characters_of("play") & characters_of("player") and not characters_of("play") & characters_of("zoom")


def test_surface_features_by_hand() -> None:
    assert not surface(to_bytes("")).any()
    found = surface(to_bytes("Pick one?\nA. 12\nB. 345"))
    assert found.shape == (SURFACE,) and found[4] == 2 and found[6] == 1.0  # two options, both with digits
    assert found[0] == pytest.approx(np.log1p(22)) and found[5] == pytest.approx(np.log1p(3))
    assert found[2] == pytest.approx(np.log1p(2.5)) and found[7] == pytest.approx(50 / 22)
    assert found[16] == pytest.approx(np.log1p(1))  # one question mark
    assert surface(to_bytes("no options\nhere. at all"))[4] == 0


def test_a_long_prompt_is_cut_in_its_middle() -> None:
    raw = to_bytes("a" * 100_000 + "b" * 100_000)
    assert raw.size == MAX_BYTES and raw[0] == ord("a") and raw[-1] == ord("b")
    assert to_bytes("é" * 5000).size == MAX_BYTES


@given(st.text(max_size=200))
@settings(max_examples=150, deadline=None)
def test_any_text_has_features(text: str) -> None:
    raw = to_bytes(text)
    found = surface(raw)
    assert np.isfinite(found).all() and (found >= 0).all()
    for slots in ngrams(raw):
        assert ((slots >= 0) & (slots < 1 << BITS)).all()
    assert words_of(text + " end") >= words_of(text)


def test_the_vocabulary_keeps_what_recurs_and_weights_what_is_rare() -> None:
    texts = ["red apple", "red pear", "red plum", "green plum"]
    known = Vocabulary.fit([ngrams(to_bytes(t)) for t in texts])
    rows = known.matrix([ngrams(to_bytes(t)) for t in texts]).toarray()
    np.testing.assert_allclose((rows**2).sum(axis=1), 1.0, rtol=1e-5)  # both families at norm 1/sqrt(2)
    columns, weights = known.encode(ngrams(to_bytes("red plum apple")))
    (red,) = known.index[list(words_of("red"))]
    (plum,) = known.index[list(words_of("plum"))]
    assert known.index[list(words_of("apple"))] == -1  # seen once
    by_column = dict(zip(columns.tolist(), weights.tolist(), strict=True))
    assert by_column[int(plum)] > by_column[int(red)] > 0
    assert known.encode(ngrams(to_bytes("Жираф")))[0].size == 0
