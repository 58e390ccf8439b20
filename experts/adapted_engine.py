"""One adapter of a running engine, as an expert of its own: for code that runs over experts without a service."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator

from signalbox.experts.base import Chunk, Engine, GenerateRequest, Score


class AdaptedEngine:
    """What asks for answers and likelihoods of an `Engine`, always through one adapter; it loads and owns nothing."""

    def __init__(self, engine: Engine, adapter: str) -> None:
        self._engine = engine
        self._adapter = adapter

    def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """See `Engine.generate`."""
        return self._engine.generate(dataclasses.replace(request, adapter=self._adapter))

    async def score(self, request: GenerateRequest, reference: str) -> Score:
        """See `Engine.score`."""
        return await self._engine.score(dataclasses.replace(request, adapter=self._adapter), reference)
