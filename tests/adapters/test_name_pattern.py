"""Our matcher finds what Python's `re` finds, and gives up where that would run for ever."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from signalbox.adapters.name_pattern import Budget, NamePattern, PatternError

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.11.mlp.down_proj", "lm_head", "q_proj", "", "model.h.3.x\n"]
ORDINARY = [
    r".*\.(q|v)_proj",
    r".*q_proj",
    r"model\.layers\.\d+\.self_attn\.[qkvo]_proj",
    r"model\.layers\.(?:[0-9]|1[0-5])\.mlp\.(?!gate).*",
    r"(.*\.)?(layers.0.*)$",
    r"^(?:model|lm).*?(head|proj)\Z",
    r"\bmodel\b.{3,40}",
    r"[^.]+(?:\.[^.]+){0,2}",
    r"\w+|(?=model).*\D",
    r"(?:model\.layers\.\d{1,}\.\S+)?",
]


@pytest.mark.parametrize("pattern", ORDINARY)
@pytest.mark.parametrize("name", NAMES)
def test_ordinary_patterns_as_re_has_them(pattern: str, name: str) -> None:
    ours = NamePattern(pattern)
    assert ours.match(name) is bool(re.match(pattern, name))
    assert ours.fullmatch(name) is bool(re.fullmatch(pattern, name))


ATOMS = st.sampled_from(["a", "b", ".", r"\.", "[ab]", "[^a]", r"\w", r"\d", "^", "$", r"\b", "(?=a)", "(?!b)"])
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "+?", "{2}", "{0,2}", "{1,3}?", "{2,}"])).map(
            lambda pair: f"({pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None)
@given(PATTERNS, st.text("ab.1\n", max_size=8))
def test_any_pattern_as_re_has_it(pattern: str, text: str) -> None:
    ours = NamePattern(pattern)
    assert ours.match(text) is bool(re.match(pattern, text))
    assert ours.fullmatch(text) is bool(re.fullmatch(pattern, text))


EXPLOSIVE = [
    r"((\w|\.|_)+)+!",  # exponential with backtracking
    "(a?){60}a{60}b",
    "((((a{1000}){1000}){1000}){1000})",  # of a terabyte when compiled
    "(?:" * 12 + ".{0,9}" + "){0,400}" * 12,
    "(?:" * 300 + "a" + ")*" * 300,
    "(" * 2000 + "a" + ")" * 2000,
    "(?:a|b|.)" * 400 + "!",
]


@pytest.mark.parametrize("pattern", EXPLOSIVE)
def test_explosive_patterns_end_in_bounded_time(pattern: str) -> None:
    started = time.process_time()
    budget = Budget()
    try:
        for _ in range(50):
            assert not NamePattern(pattern, budget).fullmatch(NAMES[0]) or not pattern.endswith("!")
    except PatternError as error:
        assert re.search("too long|deeply|recursion", str(error))
    assert time.process_time() - started < 20, "seconds at most, whatever the machine"


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (r"(a)\1", "groupref"),
        (r"(?P<x>a)(?P=x)", "groupref"),
        (r"(?<=a)b", "assert"),
        (r"(?i)Q_PROJ", "flags"),
        (r"(?i:Q)_proj", "subpattern"),
        (r"(a", "no regular expression"),
        ("a{99999999999}", "no regular expression"),
        ("a" * 5000, "4096"),
    ],
)
def test_what_is_not_supported_is_said(pattern: str, reason: str) -> None:
    with pytest.raises(PatternError, match=reason):
        NamePattern(pattern).match("a")
