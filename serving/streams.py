"""Streams of chunks from the choices of one request, put together and taken apart."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from signalbox.experts.base import Chunk

Batch = tuple[int, list[Chunk]]  # the choice's index and its next chunks

MERGE_QUEUE = 64  # batches of several choices that may wait for a slow client


async def single(stream: AsyncIterator[list[Chunk]]) -> AsyncIterator[Batch]:
    """The stream of a request with one choice."""
    try:
        async for chunks in stream:
            yield 0, chunks
    finally:
        await close(stream)


async def merged(streams: Sequence[AsyncIterator[list[Chunk]]]) -> AsyncIterator[Batch]:
    """All choices side by side, in the order in which their chunks come. The first error ends them all."""
    queue: asyncio.Queue[Batch | Exception | None] = asyncio.Queue(MERGE_QUEUE)

    async def pump(index: int, stream: AsyncIterator[list[Chunk]]) -> None:
        try:
            async for chunks in stream:
                await queue.put((index, chunks))
            await queue.put(None)
        except Exception as error:
            await queue.put(error)
        finally:
            await close(stream)

    tasks = [asyncio.create_task(pump(i, stream)) for i, stream in enumerate(streams)]
    try:
        unfinished = len(tasks)
        while unfinished:
            item = await queue.get()
            if item is None:
                unfinished -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def resume(held: Sequence[Batch], rest: AsyncIterator[Batch] | None = None) -> AsyncIterator[Batch]:
    """The batches that were held back, then the rest of the stream, if there is one."""
    try:
        for batch in held:
            yield batch
        if rest is not None:
            async for batch in rest:
                yield batch
    finally:
        await close(rest)


async def close(stream: AsyncIterator[Any] | None) -> None:
    """Close a generator, and with it whatever it reads from; anything else is left alone."""
    aclose = getattr(stream, "aclose", None)
    if aclose is not None:
        await aclose()
