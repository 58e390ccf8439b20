"""The response cache: what makes two requests the same, what is kept, and that a lost store only means misses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signalbox.experts.base import Chunk, TokenLogprob, Usage
from signalbox.serving.cache import CachedAnswer, ResponseCache
from signalbox.serving.config import CacheConfig
from signalbox.serving.embedded_valkey import EmbeddedValkey
from signalbox.serving.store import PREFIX, Store

BODY: dict[str, Any] = {
    "model": "auto",
    "messages": [{"role": "user", "content": "hi"}],
    "temperature": 0,
    "max_tokens": 8,
    "stop": ["\n"],
}


@pytest.fixture(scope="module")
async def store() -> AsyncIterator[Store]:
    with EmbeddedValkey() as url:
        store = Store(url)
        yield store
        await store.close()


@pytest.fixture
def cache(store: Store) -> ResponseCache:
    return ResponseCache(store, CacheConfig())


def answer(text: str = "hello", finish_reason: str = "stop") -> CachedAnswer:
    chunks = [Chunk(text=part, token_ids=[i]) for i, part in enumerate(text)]
    return CachedAnswer("smollm2", ((*chunks, Chunk(finish_reason=finish_reason, usage=Usage(3, len(text)))),))


def key(cache: ResponseCache, **changes: Any) -> str:
    return cache.key("chat", "smollm2", {**BODY, **changes})


def test_what_does_not_change_the_answer_does_not_change_the_key(cache: ResponseCache) -> None:
    same = [
        {"stream": True, "stream_options": {"include_usage": True}},
        {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
        {"model": "auto:gold", "signalbox": {"cost_quality_tradeoff": 3}},
        {"seed": None},
    ]
    assert {key(cache, **changes) for changes in same} == {key(cache)}
    backwards = dict(reversed(BODY.items()))
    assert cache.key("chat", "smollm2", backwards) == key(cache)


def test_what_changes_the_answer_changes_the_key(cache: ResponseCache) -> None:
    bodies = [
        {},
        {"messages": [{"role": "user", "content": "hi "}]},
        {"messages": [{"role": "system", "content": "hi"}]},
        {"messages": [{"role": "user", "content": "h"}, {"role": "user", "content": "i"}]},
        {"max_tokens": 9},
        {"stop": ["\n", "x"]},
        {"stop": "\n"},
        {"logprobs": True},
        {"n": 2},
        {"seed": 1},
        {"temperature": 0.1},
        {"logit_bias": {"1": 2}},
        {"logit_bias": {"12": 0}},
        {"some_new_field": 1},
    ]
    keys = [key(cache, **changes) for changes in bodies]
    keys += [
        cache.key("completion", "smollm2", BODY),
        cache.key("chat", "gemma", BODY),
        cache.key("chat", "smollm2", BODY, version="2"),
        cache.key("chat", "smollm2", BODY, namespace="tenant"),
        cache.key("chat", "smollm2", BODY, version="a", namespace="b"),
        cache.key("chat", "smollm2", BODY, version="ab"),
    ]
    assert len(set(keys)) == len(keys)
    assert all(len(k) == 64 for k in keys)


async def test_hit_and_miss(cache: ResponseCache) -> None:
    assert await cache.get(key(cache)) is None
    assert await cache.put(key(cache), answer())
    found = await cache.get(key(cache))
    assert found == CachedAnswer(
        "smollm2", ((Chunk(text="hello", token_ids=[0, 1, 2, 3, 4], finish_reason="stop", usage=Usage(3, 5)),),)
    )
    assert await cache.get(key(cache, max_tokens=9)) is None


async def test_everything_a_chunk_carries_comes_back(cache: ResponseCache) -> None:
    logprobs = [TokenLogprob("�", -0.5, b"\xf0\x9f", (("a", -1.0, b"a"), ("�", -2.0, b"\xff")))]
    call = {"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": "{}"}}]}
    chunks = (
        Chunk(text="a", token_ids=[1], logprobs=logprobs),
        Chunk(extra=call),
        Chunk(text="b", logprobs=logprobs),
        Chunk(finish_reason="tool_calls", usage=Usage(5, 7, 2)),
    )
    second = (Chunk(text="é🙂", finish_reason="length", usage=Usage(5, 1)),)
    assert await cache.put("k", CachedAnswer("gpt-4o", (chunks, second)))
    found = await cache.get("k")
    assert found == CachedAnswer(
        "gpt-4o",
        (
            (
                chunks[0],
                chunks[1],
                Chunk(text="b", logprobs=logprobs, finish_reason="tool_calls", usage=Usage(5, 7, 2)),
            ),
            second,
        ),
    )


@given(st.lists(st.text(), min_size=1), st.booleans())
def test_joining_chunks_keeps_the_text(parts: list[str], extra_in_the_middle: bool) -> None:
    from signalbox.serving.cache import _joined

    chunks = [Chunk(text=part, token_ids=[i]) for i, part in enumerate(parts)]
    if extra_in_the_middle:
        chunks.insert(len(chunks) // 2, Chunk(extra={"x": 1}))
    chunks.append(Chunk(finish_reason="stop", usage=Usage(1, 1)))
    before = "".join(chunk.text for chunk in chunks)
    joined = _joined(chunks)
    assert "".join(chunk.text for chunk in joined) == before == "".join(chunk.text for chunk in chunks)
    assert [i for chunk in joined for i in chunk.token_ids] == list(range(len(parts)))
    assert len(joined) <= 3 and joined[-1].finish_reason == "stop"


@pytest.mark.parametrize("finish_reason", ["abort", "error", None])
async def test_unfinished_answers_are_not_kept(cache: ResponseCache, finish_reason: Any) -> None:
    good = answer().choices[0]
    bad = answer(finish_reason=finish_reason).choices[0]
    assert not await cache.put("unfinished", CachedAnswer("smollm2", (good, bad)))
    assert not await cache.put("unfinished", CachedAnswer("smollm2", ()))
    assert await cache.get("unfinished") is None


async def test_long_answers_are_not_kept(store: Store) -> None:
    cache = ResponseCache(store, CacheConfig(max_entry_bytes=1024))
    assert await cache.put("long", answer("x" * 100))
    assert not await cache.put("longer", answer("x" * 1000))
    assert await cache.get("longer") is None


async def test_answers_end(store: Store) -> None:
    cache = ResponseCache(store, CacheConfig(ttl_s=100, max_ttl_s=60))
    await cache.put("asked", answer(), ttl_s=30)
    await cache.put("bounded", answer())
    asked, bounded = [await store._redis.pttl(f"{PREFIX}cache:{key}") for key in ("asked", "bounded")]
    assert 0 < asked <= 30_000 < bounded <= 60_000
    await cache.put("ends", answer(), ttl_s=0.05)
    await asyncio.sleep(0.1)
    assert await cache.get("ends") is None and await cache.get("bounded") is not None


@pytest.mark.parametrize(
    "entry", [b"", b"{", b"[]", b'{"expert": "x"}', b'{"expert": "x", "choices": [[{"usage": [1]}]]}']
)
async def test_an_entry_that_cannot_be_read_is_a_miss(store: Store, cache: ResponseCache, entry: bytes) -> None:
    await store.set("cache:odd", entry, 10)
    assert await cache.get("odd") is None


async def test_a_lost_store_only_means_misses() -> None:
    valkey = EmbeddedValkey()
    store = Store(valkey.start())
    cache = ResponseCache(store, CacheConfig())
    assert await cache.put("k", answer()) and await cache.get("k") is not None
    valkey.stop()
    assert await cache.get("k") is None
    assert not await cache.put("k", answer())
    await store.close()
