"""Regular expressions from an adapter's configuration, matched in bounded time.

PEFT lets a configuration name its modules by a regular expression. Python's `re` takes exponential time for some, and
engines with a time limit take unbounded memory to compile others; an adapter comes from outside. So the expression is
parsed by Python's own parser and run over sets of positions (Thompson, "Regular expression search algorithm", 1968):
no backtracking, and a bound on the steps. Look-ahead is supported, references to groups and flags are not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from re import _constants as ops  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

MAX_LENGTH = 4096  # characters
MAX_STEPS = 2_000_000  # a second or two; an ordinary pattern takes some two hundred for a name


class PatternError(ValueError):
    """An expression that is wrong, not supported, or takes too many steps."""


@dataclass(slots=True)
class Budget:
    """Steps that are left to all patterns of one adapter."""

    steps: int = MAX_STEPS


class NamePattern:
    """One expression; `match` and `fullmatch` as in `re`, but as a truth value. Raises `PatternError`."""

    def __init__(self, pattern: str, budget: Budget | None = None) -> None:
        self._budget = budget or Budget()
        if len(pattern) > MAX_LENGTH:
            raise PatternError(f"it has more than {MAX_LENGTH} characters")
        try:
            self._parsed = parser.parse(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise PatternError(f"it is no regular expression: {error}") from None
        if self._parsed.state.flags & ~re.UNICODE:
            raise PatternError("it sets flags, which is not supported")

    def match(self, text: str) -> bool:
        """Whether the expression fits a beginning of the text."""
        return bool(self._ends(text))

    def fullmatch(self, text: str) -> bool:
        """Whether the expression fits the whole text."""
        return len(text) in self._ends(text)

    def _ends(self, text: str) -> set[int]:
        try:
            return _Run(text, self._budget).sequence(self._parsed, {0})
        except RecursionError:
            raise PatternError("it is nested too deeply") from None


class _Run:
    """One match: from sets of positions in the text to the sets that the parts of the expression lead to."""

    def __init__(self, text: str, budget: Budget) -> None:
        self.text = text
        self.budget = budget

    def sequence(self, nodes: Iterable[tuple[Any, Any]], places: set[int]) -> set[int]:
        for op, value in nodes:
            self.budget.steps -= 1 + len(places)
            if self.budget.steps < 0:
                raise PatternError("it takes too long to match")
            places = self._node(op, value, places)
        return places

    def _node(self, op: Any, value: Any, places: set[int]) -> set[int]:
        text = self.text
        if op in (ops.LITERAL, ops.NOT_LITERAL, ops.ANY, ops.IN):
            return {place + 1 for place in places if place < len(text) and _fits(op, value, text[place])}
        if op is ops.BRANCH:
            return set().union(*(self.sequence(branch, places) for branch in value[1]))
        if op is ops.SUBPATTERN and not value[1] and not value[2]:
            return self.sequence(value[3], places)
        if op in (ops.MAX_REPEAT, ops.MIN_REPEAT):
            least, most, body = value
            return self._repeat(least, most, body, places)
        if op is ops.AT:
            return {place for place in places if self._at(value, place)}
        if op in (ops.ASSERT, ops.ASSERT_NOT) and value[0] > 0:
            return {place for place in places if bool(self.sequence(value[1], {place})) is (op is ops.ASSERT)}
        raise PatternError(f"it uses {str(op).lower()}, which is not supported")

    def _repeat(self, least: int, most: int, body: Any, places: set[int]) -> set[int]:
        reached: set[int] = places if least == 0 else set()
        seen: set[frozenset[int]] = set()
        count = 0
        while places and count < most:
            places = self.sequence(body, places)
            count += 1
            if count < least:
                continue
            reached = reached | places
            if (key := frozenset(places)) in seen:  # from here on it only goes round
                break
            seen.add(key)
        return reached

    def _at(self, where: Any, place: int) -> bool:
        text = self.text
        if where in (ops.AT_BEGINNING, ops.AT_BEGINNING_STRING):
            return place == 0
        if where is ops.AT_END:
            return place == len(text) or (place == len(text) - 1 and text[place] == "\n")
        if where is ops.AT_END_STRING:
            return place == len(text)
        before = place > 0 and _word(text[place - 1])
        after = place < len(text) and _word(text[place])
        return (before != after) is (where is ops.AT_BOUNDARY)


def _fits(op: Any, value: Any, char: str) -> bool:
    """Whether a character fits a literal, a dot or a set."""
    if op is ops.ANY:
        return char != "\n"
    if op is not ops.IN:
        return (ord(char) == value) is (op is ops.LITERAL)
    negated = value[0][0] is ops.NEGATE
    return any(_in(kind, what, char) for kind, what in value[negated:]) is not negated


def _in(kind: Any, what: Any, char: str) -> bool:
    if kind is ops.LITERAL:
        return bool(ord(char) == what)
    if kind is ops.RANGE:
        return bool(what[0] <= ord(char) <= what[1])
    tests = {
        ops.CATEGORY_DIGIT: char.isdecimal(),
        ops.CATEGORY_NOT_DIGIT: not char.isdecimal(),
        ops.CATEGORY_SPACE: char.isspace(),
        ops.CATEGORY_NOT_SPACE: not char.isspace(),
        ops.CATEGORY_WORD: _word(char),
        ops.CATEGORY_NOT_WORD: not _word(char),
    }
    return tests[what]


def _word(char: str) -> bool:
    return char.isalnum() or char == "_"
