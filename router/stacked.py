"""The lexical router with the sentence encoder beside its n-grams: the slow way of the cascade (`cascade.py`).

Everything is as in `lexical.py`; the first stage sees the embedding too, with the n-grams' own weight. It costs one
forward pass of the encoder, and pays where a table is small or where prompts say one thing in many words.
"""

from __future__ import annotations

from typing import ClassVar

from signalbox.router.lexical import LexicalPredictor


class StackedPredictor(LexicalPredictor):
    """Two-stage ridge regression on n-grams and the embedding."""

    kind = "stacked"
    uses_encoder: ClassVar[bool] = True
