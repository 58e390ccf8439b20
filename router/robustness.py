"""Whether a router's choice survives what does not change the question: case, small noise in the wording, padding."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from signalbox.router.base import Predictor, Prompt
from signalbox.router.metrics import taken
from signalbox.router.table import Table, fraction_of

# Words that a paraphrase would drop or exchange without changing what is asked.
_FILLERS = frozenset({"a", "an", "the", "of", "to", "please", "that", "very", "just", "so", "then", "also", "quite"})
_SYNONYMS = {
    "what": "which thing",
    "which": "what",
    "following": "listed",
    "calculate": "compute",
    "compute": "calculate",
    "find": "determine",
    "determine": "find",
    "explain": "describe",
    "describe": "explain",
    "write": "produce",
    "correct": "right",
    "best": "most suitable",
    "most": "the most",
    "because": "since",
    "however": "but",
}
_OPENINGS = ("Hi! Could you help me with this? ", "Question for you: ", "I was wondering: ", "Please help. ")
_CLOSINGS = (" Thanks a lot!", " Thank you in advance.", "\n\nI would be grateful for any help.", " Cheers")
_WORD = re.compile(r"[A-Za-z]+")


def change_case(text: str, dice: random.Random) -> str:
    """All small, or all capitals for one prompt in four."""
    return text.upper() if dice.random() < 0.25 else text.lower()


def add_noise(text: str, dice: random.Random) -> str:
    """Synonyms for common words, fillers dropped, and one letter in 100 mistyped (two letters exchanged)."""

    def word(match: re.Match[str]) -> str:
        found = match.group()
        if found.lower() in _FILLERS and dice.random() < 0.3:
            return ""
        other = _SYNONYMS.get(found.lower())
        if other is not None and dice.random() < 0.5:
            return other.capitalize() if found[0].isupper() else other
        if len(found) > 3 and dice.random() < len(found) / 100:
            i = dice.randrange(1, len(found) - 1)
            return found[:i] + found[i + 1] + found[i] + found[i + 2 :]
        return found

    return _WORD.sub(word, text)


def pad(text: str, dice: random.Random) -> str:
    """Courtesies around the prompt, and blank space."""
    return "\n" * dice.randrange(3) + dice.choice(_OPENINGS) + text + dice.choice(_CLOSINGS) + " " * dice.randrange(20)


CHANGES: dict[str, Callable[[str, random.Random], str]] = {"case": change_case, "noise": add_noise, "padding": pad}


def robustness(
    predictor: Predictor, rows: Table, progress: Callable[[str, int, int], None] | None = None
) -> dict[str, dict[str, float]]:
    """For each kind of change: `quality`, the `unchanged` prompts' quality on the same rows, their `difference`, the
    share of choices that are the `same`, and the number of `rows`. The changes are the same on every machine.
    """
    plain = predictor.predict([Prompt(p) for p in rows.prompt]).quality.argmax(axis=1)
    unchanged = float(taken(rows.score, plain).mean())
    out = {}
    for number, (name, change) in enumerate(CHANGES.items()):
        if progress:
            progress("robustness", number, len(CHANGES))
        texts = [change(p, random.Random(fraction_of(p, name))) for p in rows.prompt]
        choice = predictor.predict([Prompt(t) for t in texts]).quality.argmax(axis=1)
        quality = float(taken(rows.score, choice).mean())
        out[name] = {
            "quality": quality,
            "unchanged": unchanged,
            "difference": quality - unchanged,
            "same": float((choice == plain).mean()),
            "rows": len(rows),
        }
    if progress:
        progress("robustness", len(CHANGES), len(CHANGES))
    return out
