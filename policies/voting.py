"""Self-consistency: several answers to one question vote by their final answers (Wang et al., arXiv 2203.11171).

One of the arbiters of papers.md, section 8; the others are in `serving/parallel.py`.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from decimal import Decimal

from signalbox.experts.base import Chunk

MAX_CHARACTERS = 20_000  # of an answer that are looked at, from its end

# What announces a final answer: \boxed{...}, the last line of GSM8K's solutions, and the words.
_MARKER = re.compile(r"\\boxed\s*\{|####|\banswer\s*(?:is|:)\s*:?", re.IGNORECASE)
_FRACTION = re.compile(r"\\[dt]?frac\s?\{(\d{1,40})\}\s?\{(\d{1,40})\}")
_DRESSING = " \t*_`$\"'“”‘’:=~"
_OPTION = re.compile(r"\(([A-Ja-j])\)|([A-J])(?=\W*$|[).:,;*]|\s+(?:because|since|as)\b)")
_NUMBER = re.compile(r"(?<![\w.])[-−+]?[$€£]?\s?(\d{1,3}(?:,\d{3})+|\d{1,40})(\.\d{1,40})?(?:\s?/\s?(\d{1,40}))?(?!\w)")
_SENTENCE = re.compile(r"[.!?](?=\s|$)|\n")
_FOLDED = re.compile(r"[\W_]+")


def final_answer(text: str) -> str:
    """What two answers must share to count as the same.

    After the last `\\boxed{`, `####`, `answer is` or `answer:` the option letter that stands there, or else the last
    number of the sentence, written plainly (`$1,200.00` and `1200` are the same); without either the sentence. An
    answer without such a mark is its whole text. Texts are compared without case, punctuation and blanks.
    """
    text = text[-MAX_CHARACTERS:].strip()
    marker = _last(_MARKER, text)
    if marker is None:
        return _plain_number(_NUMBER.fullmatch(text.rstrip(" .%"))) or _fold(text)
    rest = text[marker.end() :]
    if marker[0].endswith("{"):
        said = _inside_braces(rest)
    else:
        said = _SENTENCE.split(rest.lstrip(_DRESSING + "\n"), 1)[0]
    said = _FRACTION.sub(r"\1/\2", said)
    if "\\" in said:  # a formula: any number in it is a part of the answer
        return _fold(said) or _fold(text)
    said = said.lstrip(_DRESSING)
    option = _OPTION.match(said)
    if option is not None:
        return (option[1] or option[2]).lower()
    return _plain_number(_last(_NUMBER, said)) or _fold(said) or _fold(text)


def vote(answers: Sequence[Sequence[Chunk]]) -> tuple[int, list[int]]:
    """The first answer of the largest group that agrees, and for each answer the size of its group.

    Of groups of one size the one of the greatest mean token log-probability, where all of them have it, or else the
    earliest. An empty answer has no vote while there is another.

    Raises:
        ValueError: no answers.
    """
    if not answers:
        raise ValueError("nobody to vote for")
    groups = _groups(answers)
    votes = [0] * len(answers)
    for members in groups:
        for i in members:
            votes[i] = len(members)
    largest = max(len(members) for members in groups)
    tied = [members for members in groups if len(members) == largest]
    if len(tied) > 1:
        scores = [_mean_logprob([answers[i] for i in members]) for members in tied]
        known = [score for score in scores if score is not None]
        if len(known) == len(tied):
            return tied[known.index(max(known))][0], votes
    return tied[0][0], votes


def is_settled(answers: Sequence[Sequence[Chunk]], pending: int) -> bool:
    """Whether the vote cannot turn any more, whatever the answers that are still being written will be."""
    if not answers or not any(map(text_of_answer, answers)):
        return False
    sizes = sorted((len(members) for members in _groups(answers)), reverse=True)
    return sizes[0] > (sizes[1] if len(sizes) > 1 else 0) + pending


def text_of_answer(chunks: Sequence[Chunk]) -> str:
    """The text that chunks add up to."""
    return "".join(chunk.text for chunk in chunks)


def _groups(answers: Sequence[Sequence[Chunk]]) -> list[list[int]]:
    """Indices of the answers that agree, in the order of each group's first."""
    groups: dict[str, list[int]] = {}
    empty: list[int] = []
    for i, chunks in enumerate(answers):
        text = text_of_answer(chunks)
        if text.strip():
            groups.setdefault(final_answer(text), []).append(i)
        else:
            empty.append(i)
    return list(groups.values()) or [empty]


def _mean_logprob(answers: Sequence[Sequence[Chunk]]) -> float | None:
    """Mean over all tokens of these answers; None where one of them came without."""
    values = [[token.logprob for chunk in chunks for token in chunk.logprobs] for chunks in answers]
    if not all(values):
        return None
    return sum(map(sum, values)) / sum(map(len, values))


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)


def _inside_braces(text: str) -> str:
    depth = 1
    for i, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return text[:i]
    return text.split("\n", 1)[0]


def _plain_number(match: re.Match[str] | None) -> str:
    """`-$1,200.50` -> `-1200.5`, `3 / 4` -> `3/4`; empty for no match."""
    if match is None:
        return ""
    sign = "-" if match[0][0] in "-−" else ""
    number = Decimal(match[1].replace(",", "") + (match[2] or ""))
    plain = f"{number.normalize():f}" if number else "0"
    return (sign if number else "") + plain + (f"/{int(match[3])}" if match[3] else "")


def _fold(text: str) -> str:
    return _FOLDED.sub(" ", text.casefold()).strip()
