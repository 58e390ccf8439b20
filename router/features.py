"""Cheap structural features of a prompt: what a mean-pooled sentence embedding blurs."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

STRUCTURE = ("log_length", "digits", "code_punctuation", "non_ascii", "log_lines", "question")
# As for the encoder: the beginning of a long prompt says what it is.
MAX_CHARACTERS = 8192
_DIGIT = re.compile(r"\d")
_CODE = re.compile(r"[{}()\[\]<>=;_`#/\\|*]")


def structure(texts: Sequence[str]) -> NDArray[np.float32]:
    """float32 [n, 6]: log(1+characters), shares of digits, code punctuation and non-ASCII characters (0 to 1),
    log(1+line breaks), and 1 where the text asks (ends with a question mark), else 0.
    """
    out = np.zeros((len(texts), len(STRUCTURE)), dtype=np.float32)
    for row, text in zip(out, texts, strict=True):
        text = text[:MAX_CHARACTERS]
        n = max(1, len(text))
        row[:] = (
            np.log1p(len(text)),
            len(_DIGIT.findall(text)) / n,
            len(_CODE.findall(text)) / n,
            0.0 if text.isascii() else sum(not c.isascii() for c in text) / n,
            np.log1p(text.count("\n")),
            text.rstrip().endswith("?"),
        )
    return out
