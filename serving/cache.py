"""The exact response cache: the same request at temperature 0 gets the answer it got before, from the store.

What is kept is the engine's output, chunks and all, so that a hit takes the same way to the client as an answer
that is being generated, streamed or whole.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import orjson

from signalbox.experts.base import Chunk, TokenLogprob, Usage
from signalbox.serving.config import CacheConfig
from signalbox.serving.store import Store, StoreUnavailable

log = logging.getLogger(__name__)

_FORMAT = 1  # of key and entry; raise it with either
# How an answer is delivered, who asked and what for: none of it changes the tokens. `model` and `signalbox` only
# matter through the expert and the namespace, which are in the key by themselves.
_IRRELEVANT = frozenset(
    ("model", "signalbox", "stream", "stream_options", "user", "safety_identifier", "metadata", "store", "service_tier")
)
_COMPLETE = frozenset(("stop", "length", "tool_calls", "function_call", "content_filter"))


@dataclass(slots=True, frozen=True)
class CachedAnswer:
    """A finished answer: for each choice its chunks, the last of which has finish reason and usage."""

    expert: str
    choices: tuple[tuple[Chunk, ...], ...]

    def dumps(self) -> bytes:
        """As JSON bytes."""
        return orjson.dumps(
            {"expert": self.expert, "choices": [[_plain(chunk) for chunk in choice] for choice in self.choices]}
        )

    @classmethod
    def loads(cls, data: bytes) -> CachedAnswer:
        """The inverse of `dumps`. Raises ValueError, KeyError or TypeError on anything else."""
        plain = orjson.loads(data)
        return cls(plain["expert"], tuple(tuple(_chunk(chunk) for chunk in choice) for choice in plain["choices"]))


class ResponseCache:
    """Finished answers by request. A lost store makes every look-up a miss and every `put` a no-op."""

    def __init__(self, store: Store, config: CacheConfig) -> None:
        self._store = store
        self._config = config

    def key(
        self,
        kind: Literal["chat", "completion"],
        expert: str,
        body: Mapping[str, Any],
        *,
        version: str = "",
        namespace: str = "",
    ) -> str:
        """The key of everything that determines the answer, as 64 hexadecimal digits.

        `body` is the request as parsed from JSON: prompt or messages and all sampling fields (fields that are null
        count as absent). `version` tells states of an expert apart (weights, template), `namespace` callers that
        must not see each other's answers.
        """
        relevant = {k: v for k, v in body.items() if v is not None and k not in _IRRELEVANT}
        canonical = orjson.dumps([_FORMAT, kind, expert, version, namespace, relevant], option=orjson.OPT_SORT_KEYS)
        return hashlib.blake2b(canonical, digest_size=32).hexdigest()

    async def get(self, key: str) -> CachedAnswer | None:
        """The answer kept under `key`, or None."""
        try:
            data = await self._store.get(f"cache:{key}")
        except StoreUnavailable:
            return None
        if data is None:
            return None
        try:
            return CachedAnswer.loads(data)
        except (ValueError, KeyError, TypeError):
            log.warning("cache entry %s cannot be read; it counts as a miss", key)
            return None

    async def put(self, key: str, answer: CachedAnswer, ttl_s: float | None = None) -> bool:
        """Keep a finished answer, `ttl_s` seconds within the configured bound; says whether it was kept.

        Not kept: answers without a proper end in any of their choices, and those that are too long.
        """
        if not answer.choices or not all(c and c[-1].finish_reason in _COMPLETE for c in answer.choices):
            return False
        data = CachedAnswer(answer.expert, tuple(_joined(choice) for choice in answer.choices)).dumps()
        if len(data) > self._config.max_entry_bytes:
            return False
        ttl_s = min(self._config.ttl_s if ttl_s is None else ttl_s, self._config.max_ttl_s)
        try:
            await self._store.set(f"cache:{key}", data, ttl_s)
        except StoreUnavailable:
            return False
        return True


def _joined(chunks: Sequence[Chunk]) -> tuple[Chunk, ...]:
    """The same answer in fewer chunks: neighbours become one, except around fields that we do not interpret."""
    joined: list[Chunk] = []
    for chunk in chunks:
        last = joined[-1] if joined else None
        if last is None or last.extra or chunk.extra or last.finish_reason:
            joined.append(replace(chunk))
        else:
            joined[-1] = Chunk(
                text=last.text + chunk.text,
                token_ids=last.token_ids + chunk.token_ids,
                logprobs=last.logprobs + chunk.logprobs,
                finish_reason=chunk.finish_reason,
                usage=chunk.usage or last.usage,
            )
    return tuple(joined)


def _plain(chunk: Chunk) -> dict[str, Any]:
    """A chunk as JSON types; fields at their default are left out."""
    plain: dict[str, Any] = {}
    if chunk.text:
        plain["text"] = chunk.text
    if chunk.token_ids:
        plain["token_ids"] = chunk.token_ids
    if chunk.logprobs:
        plain["logprobs"] = [
            [t.token, t.logprob, _text(t.raw), [[token, logprob, _text(raw)] for token, logprob, raw in t.top]]
            for t in chunk.logprobs
        ]
    if chunk.finish_reason:
        plain["finish_reason"] = chunk.finish_reason
    if chunk.usage:
        plain["usage"] = [chunk.usage.prompt_tokens, chunk.usage.completion_tokens, chunk.usage.cached_tokens]
    if chunk.extra:
        plain["extra"] = chunk.extra
    return plain


def _chunk(plain: dict[str, Any]) -> Chunk:
    return Chunk(
        text=plain.get("text", ""),
        token_ids=plain.get("token_ids", []),
        logprobs=[
            TokenLogprob(token, logprob, _bytes(raw), tuple((t, p, _bytes(r)) for t, p, r in top))
            for token, logprob, raw, top in plain.get("logprobs", ())
        ],
        finish_reason=plain.get("finish_reason"),
        usage=Usage(*plain["usage"]) if "usage" in plain else None,
        extra=plain.get("extra", {}),
    )


# Bytes that may be half a character travel as Latin-1 text: one character a byte, both ways.
def _text(raw: bytes) -> str:
    return raw.decode("latin-1")


def _bytes(text: str) -> bytes:
    return text.encode("latin-1")
