"""From token ids back to text, a token at a time, with stop strings."""

from __future__ import annotations

from typing import Any

from tokenizers.decoders import DecodeStream


class Detokenizer:
    """Turns one request's tokens into text pieces.

    Characters whose bytes are not complete yet are held back, and so is a tail that may become a stop string.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...], prefix: str = "") -> None:
        """`tokenizer` is a `tokenizers.Tokenizer`; `prefix` is taken off the beginning of the text once."""
        self._tokenizer = tokenizer
        self._prefix = prefix
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(s for s in stop if s)
        self._held = ""
        self._undecoded: list[int] = []

    def push(self, token_id: int) -> tuple[str, bool]:
        """Text that is now certain, and whether a stop string was met (the text ends before it)."""
        piece = self._stream.step(self._tokenizer, token_id)
        if piece is None:
            self._undecoded.append(token_id)
            return "", False
        self._undecoded.clear()
        if piece and self._prefix:
            piece, self._prefix = piece.removeprefix(self._prefix), ""
        if not self._stop:
            return piece, False
        text = self._held + piece
        met = [at for s in self._stop if (at := text.find(s)) >= 0]
        if met:
            self._held = ""
            return text[: min(met)], True
        keep = self._tail(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back, when no more tokens come."""
        text = self._held
        if self._undecoded:
            text += self._tokenizer.decode(self._undecoded, skip_special_tokens=True)
        self._held = ""
        self._undecoded.clear()
        return text

    def _tail(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = min(len(text), max(len(s) for s in self._stop) - 1)
        for length in range(longest, 0, -1):
            end = text[-length:]
            if any(s.startswith(end) for s in self._stop):
                return length
        return 0
