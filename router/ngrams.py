"""Lexical and surface features of a prompt without an encoder, by vectorised byte arithmetic: about 0.3 ms a prompt.

* n-grams: words, pairs of words, and characters 3 to 5 long inside words, hashed (the hashing trick, Weinberger et
  al., arXiv 0902.2206), weighted (1 + log tf) * idf, each of the two families scaled to equal norm. Case is folded and
  every digit becomes `0`, so that numbers count by their shape.
* surface: 24 counts and ratios (length, lines, listed options, digits, mathematics, punctuation), which say what a
  prompt asks for without saying what about.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Slots = NDArray[np.int64]
# Hash slots, with repeats, of the two families: words and their pairs; characters.
Ngrams = tuple[Slots, Slots]

# Names what is computed here. An artifact records it: other features than it was trained on would be nonsense.
FEATURES = "ngrams-1"
MAX_BYTES = 6000  # a longer prompt is read as its first and last halves of this: it bounds the time of a decision
FAMILIES, BITS = 2, 18
SURFACE = 24

# Roots of a rolling hash modulo 2**64 and its odd, hence invertible, multiplier.
_ROOT = np.uint64(0x9E3779B97F4A7C15)
_MIX, _MIX_AGAIN, _CHARACTER = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB), np.uint64(0x100000001B3)
with np.errstate(over="ignore"):
    _POWER = np.cumprod(np.full(MAX_BYTES, _ROOT, dtype=np.uint64))  # _ROOT**(i + 1)
    _INVERSE = np.cumprod(np.full(MAX_BYTES, pow(int(_ROOT), -1, 2**64), dtype=np.uint64))

_SPACE, _WORD, _SIGN = 0, 1, 2
# Groups of characters that surface features count: group 0 is what stands in none of them, the last is non-ASCII.
_LOWER, _UPPER, _DIGIT, _FORMULA, _OPERATOR, _COMMA, _QUOTE = range(1, 8)
_BRACKET, _POINT, _QUESTION, _UNDERSCORE, _LINE, _BLANK, _FOREIGN = range(8, 15)
_MEMBERS = {
    _LOWER: "abcdefghijklmnopqrstuvwxyz",
    _UPPER: "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    _DIGIT: "0123456789",
    _FORMULA: "\\{}^$",
    _OPERATOR: "=+*/<>|",
    _COMMA: ",;:",
    _QUOTE: "'\"",
    _BRACKET: "()[]",
    _POINT: ".",
    _QUESTION: "?!",
    _UNDERSCORE: "_",
    _LINE: "\n",
    _BLANK: " \t",
}


def _byte_tables() -> tuple[Bytes, Bytes, NDArray[np.intp]]:
    """For each byte: what it is folded to, its kind (space, word, sign), its group."""
    fold = np.arange(256, dtype=np.uint8)
    kind = np.full(256, _SIGN, dtype=np.uint8)
    for byte in range(256):
        letter = chr(byte)
        if byte >= 128 or letter.isalnum() or letter == "'":
            kind[byte] = _WORD
        elif letter.isspace():
            kind[byte] = _SPACE
        if byte < 128:
            fold[byte] = ord("0" if letter.isdigit() else " " if letter.isspace() else letter.lower())
    group = np.zeros(256, dtype=np.intp)
    for number, members in _MEMBERS.items():
        group[np.frombuffer(members.encode(), dtype=np.uint8)] = number
    group[128:] = _FOREIGN
    return fold, kind, group


_FOLD, _KIND, _GROUP = _byte_tables()


def to_bytes(text: str) -> Bytes:
    """UTF-8 bytes, uint8 [at most MAX_BYTES]; a lone surrogate becomes `?`."""
    half = MAX_BYTES // 2
    if len(text) > MAX_BYTES:  # before encoding: a megabyte costs nothing
        text = text[:half] + text[-half:]
    raw = text.encode("utf-8", "replace")
    if len(raw) > MAX_BYTES:
        raw = raw[:half] + raw[-half:]
    return np.frombuffer(raw, dtype=np.uint8)


def ngrams(raw: Bytes) -> Ngrams:
    """Hash slots int64 in [0, 2**BITS), with repeats, of a prompt's words and pairs, and of its characters."""
    low, kind, n = _FOLD[raw], _KIND[raw], raw.size
    # A token starts where the kind changes, and at every sign.
    start = np.flatnonzero((kind != _SPACE) & ((kind == _SIGN) | (np.r_[np.uint8(_SPACE), kind[:-1]] != kind)))
    if start.size == 0:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    word = kind[start] == _WORD
    end = start + 1
    end[word] = np.flatnonzero(np.r_[kind[1:] != _WORD, True] & (kind == _WORD)) + 1
    with np.errstate(over="ignore"):
        prefix = np.r_[np.uint64(0), np.cumsum((low.astype(np.uint64) + np.uint64(1)) * _POWER[:n])]
        token = (prefix[end] - prefix[start]) * _INVERSE[start]  # the same wherever it stands
        pair = token[:-1] * _MIX + (token[1:] ^ (token[1:] >> np.uint64(29)))
        words = np.concatenate([_slots(token, 1), _slots(pair, 2)])
        return words, _character_slots(low, start[word], end[word])


def _character_slots(low: Bytes, start: NDArray[np.intp], end: NDArray[np.intp]) -> Slots:
    """3 to 5 characters of words that begin and end with a blank each."""
    length = end - start + 2
    total = int(length.sum())
    offset = np.arange(total) - np.repeat(np.cumsum(length) - length, length)
    length_here = np.repeat(length, length)
    inside = (offset > 0) & (offset < length_here - 1)
    source = np.clip(np.repeat(start, length) + offset - 1, 0, low.size - 1)
    characters = np.where(inside, low[source], ord(" ")).astype(np.uint64)
    left = length_here - offset  # characters from here to the end of the padded word
    found, rolling = [], characters
    for size in range(2, min(5, total) + 1):
        rolling = rolling[:-1] * _CHARACTER + characters[size - 1 :]
        if size > 2:
            found.append(_slots(rolling[left[: rolling.size] >= size], 10 + size))
    return np.concatenate(found) if found else np.empty(0, dtype=np.int64)


def _slots(hashed: NDArray[np.uint64], seed: int) -> Slots:
    hashed = (hashed ^ (hashed >> np.uint64(30)) ^ np.uint64(seed)) * _MIX
    hashed = (hashed ^ (hashed >> np.uint64(27))) * _MIX_AGAIN
    return (hashed >> np.uint64(64 - BITS)).astype(np.int64)


def surface(raw: Bytes) -> NDArray[np.float32]:
    """float32 [SURFACE], none negative: logarithms of lengths and counts, and shares of kinds of characters.

    A listed option is a line that starts with one capital or digit, a point, bracket or colon, and a blank. The body
    is the prompt without its options.
    """
    n = raw.size
    if n == 0:
        return np.zeros(SURFACE, dtype=np.float32)
    line = np.r_[0, np.flatnonzero(raw == ord("\n")) + 1]
    stop = np.r_[line[1:] - 1, n]
    first, second, third = (raw[np.minimum(line + i, n - 1)] for i in range(3))
    is_option = np.isin(_GROUP[first], (_UPPER, _DIGIT)) & np.isin(second, list(b".):")) & (third == ord(" "))
    options, ends = line[is_option], stop[is_option]
    size = ends - options - 3.0
    edges = np.zeros(n + 1, dtype=np.int64)
    np.add.at(edges, options, 1)
    np.add.at(edges, ends, -1)
    outside = np.cumsum(edges[:-1]) == 0
    whole = np.bincount(_GROUP[raw], minlength=15).astype(np.float64)
    body = np.bincount(_GROUP[raw[outside]], minlength=15).astype(np.float64)
    m = max(1, int(outside.sum()))
    digits = np.r_[0, np.cumsum(_GROUP[raw] == _DIGIT)]
    numeric = float(np.mean(digits[ends] > digits[np.minimum(options + 2, n)])) if len(options) else 0.0
    words = int((np.diff((_KIND[raw] == _WORD).astype(np.int8), prepend=0) == 1).sum())
    # The factors bring shares of rarer characters to the order of 1.
    out = [
        np.log1p(n),
        np.log1p(m),
        np.log1p(max(0.0, size.mean())) if len(options) else 0.0,
        np.log1p(size.std()) if len(options) else 0.0,
        min(len(options), 26),
        np.log1p(len(line)),
        numeric,
        whole[_DIGIT] / n * 10,
        body[_DIGIT] / m * 10,
        body[_UPPER] / m * 10,
        whole[_FORMULA] / n * 30,
        whole[_OPERATOR] / n * 30,
        body[_COMMA] / m * 30,
        body[_QUOTE] / m * 30,
        body[_BRACKET] / m * 30,
        body[_POINT] / m * 100,
        np.log1p(body[_QUESTION]),
        np.log1p(whole[_UNDERSCORE]),
        whole[_FOREIGN] / n * 30,
        np.log1p(body[_DIGIT]),
        n / max(1, words),
        np.log1p(words),
        whole[0] / n * 30,
        np.log1p(body[_LINE]),
    ]
    return np.array(out, dtype=np.float32)


@dataclass(frozen=True)
class Vocabulary:
    """The hash slots kept from training.

    slots: int64 [columns], ascending, in [0, FAMILIES << BITS); idf: float32 [columns];
    index: int32 [FAMILIES << BITS], a slot's column or -1.
    """

    slots: Slots
    idf: NDArray[np.float32]
    index: NDArray[np.int32]

    @classmethod
    def of(cls, slots: Slots, idf: NDArray[np.float32]) -> Vocabulary:
        """From what an artifact keeps."""
        index = np.full(FAMILIES << BITS, -1, dtype=np.int32)
        index[slots] = np.arange(slots.size)
        return cls(slots, idf, index)

    @classmethod
    def fit(cls, prompts: list[Ngrams]) -> Vocabulary:
        """Keep the slots that at least 2 prompts hold, 3 of more than a thousand: a rarer one cannot be learned."""
        frequency = np.zeros(FAMILIES << BITS, dtype=np.int64)
        for prompt in prompts:
            for family, slots in enumerate(prompt):
                frequency[np.unique(slots) + (family << BITS)] += 1
        least = min(3 if len(prompts) > 1000 else 2, max(1, int(frequency.max())))
        kept = np.flatnonzero(frequency >= least)
        idf = np.log((1 + len(prompts)) / (1.0 + frequency[kept])) + 1
        return cls.of(kept, idf.astype(np.float32))

    def encode(self, prompt: Ngrams) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Columns and weights [k] of one prompt; a family that it knows anything of has norm 1/sqrt(FAMILIES)."""
        columns, weights = [], []
        for family, slots in enumerate(prompt):
            known = self.index[slots + (family << BITS)]
            column, count = np.unique(known[known >= 0], return_counts=True)
            weight = (1 + np.log(count)) * self.idf[column]
            norm = float(np.sqrt(weight @ weight)) or 1.0
            columns.append(column)
            weights.append((weight / (norm * FAMILIES**0.5)).astype(np.float32))
        return np.concatenate(columns), np.concatenate(weights)

    def matrix(self, prompts: list[Ngrams]) -> sp.csr_matrix:
        """Sparse float32 [n, columns]."""
        rows = [self.encode(prompt) for prompt in prompts]
        starts = np.r_[0, np.cumsum([len(columns) for columns, _ in rows])]
        values, columns = np.concatenate([w for _, w in rows]), np.concatenate([c for c, _ in rows])
        return sp.csr_matrix((values, columns, starts), shape=(len(rows), self.slots.size))
