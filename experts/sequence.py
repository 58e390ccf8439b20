"""One request inside the transformers engine, from queue to last token."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from signalbox.experts.base import Chunk, ExpertError, GenerateRequest, TokenLogprob, Usage
from signalbox.experts.detokenizer import Detokenizer
from signalbox.experts.sampler import Sampled, SamplerRow


@dataclass(slots=True, eq=False)
class Sequence:
    """State of one request. `computed` tokens of `tokens` have their keys and values in the cache."""

    request: GenerateRequest
    tokens: list[int]
    prompt_length: int
    limit: int
    sampler: SamplerRow
    detokenizer: Detokenizer
    loop: asyncio.AbstractEventLoop
    chunks: asyncio.Queue[Chunk | ExpertError]
    slot: int = -1  # of its adapter
    computed: int = 0
    aborted: bool = False
    arrived: float = field(default_factory=time.perf_counter)
    first_token_at: float | None = None
    last_token_at: float | None = None

    @property
    def pending(self) -> int:
        """Tokens that the model has not seen yet; 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def decoding(self) -> bool:
        """Whether only the newest generated token is left to compute."""
        return self.pending == 1 and len(self.tokens) > self.prompt_length

    @property
    def generated(self) -> int:
        """Number of tokens generated so far."""
        return len(self.tokens) - self.prompt_length

    @property
    def most_tokens(self) -> int:
        """Length of prompt and answer together at their longest."""
        return self.prompt_length + self.limit

    def accept(self, drawn: Sampled, eos: frozenset[int], token_text: Any) -> Chunk:
        """Append a drawn token and say what it means for the client; the chunk's finish reason ends the request."""
        now = time.perf_counter()
        self.first_token_at = self.first_token_at or now
        self.last_token_at = now
        self.tokens.append(drawn.token_id)
        self.sampler.counts[drawn.token_id] += 1
        chunk = Chunk(token_ids=[drawn.token_id])
        if drawn.token_id in eos and not self.request.sampling.ignore_eos:
            chunk.text, chunk.finish_reason = self.detokenizer.flush(), "stop"
        else:
            chunk.text, stopped = self.detokenizer.push(drawn.token_id)
            if stopped:
                chunk.finish_reason = "stop"
            elif self.generated >= self.limit:
                chunk.text += self.detokenizer.flush()
                chunk.finish_reason = "length"
            if drawn.logprob is not None:
                chunk.logprobs = [_logprob(drawn, token_text)]
        if chunk.finish_reason:
            chunk.usage = Usage(self.prompt_length, self.generated)
        return chunk


def _logprob(drawn: Sampled, token_text: Any) -> TokenLogprob:
    text = token_text(drawn.token_id)
    top = tuple((t := token_text(i), value, t.encode()) for i, value in drawn.top)
    return TokenLogprob(text, drawn.logprob or 0.0, text.encode(), top)
