"""What one attempt at a request costs: reserved before, noted while the expert writes, settled at the end."""

from __future__ import annotations

from collections.abc import Sequence

from signalbox.experts.base import Chunk, Usage
from signalbox.experts.catalog import Price
from signalbox.policies.charges import Charge
from signalbox.serving.admission import Slot
from signalbox.serving.ledger import Reservation


class Seat:
    """The place and the money of one attempt, given back once.

    Args:
        slot: the place at the expert.
        reservation: what was set aside for it.
        price: of the expert's tokens.
        prompt_tokens: of all prompts together, counted or estimated.
    """

    def __init__(self, slot: Slot, reservation: Reservation, price: Price, prompt_tokens: int) -> None:
        self.slot = slot
        self._reservation = reservation
        self._price = price
        self._prompt_tokens = prompt_tokens
        self._sent_tokens = 0

    def note(self, chunks: Sequence[Chunk]) -> None:
        """Count what goes out to a streaming client: what is charged if the stream is cut."""
        for chunk in chunks:
            self._sent_tokens += len(chunk.token_ids) or bool(chunk.text)
        if self._sent_tokens and self._reservation.booked:
            self._reservation.sent(self._charge(self._prompt_tokens, self._sent_tokens))

    async def leave(self, usage: Usage | None) -> None:
        """Give the place back and settle: by `usage` where the answer is complete, else by what was sent."""
        self.slot.leave(completed=usage is not None)
        if usage is not None:
            await self._reservation.settle(self._charge(usage.prompt_tokens, usage.completion_tokens))
        elif self._sent_tokens:
            await self._reservation.settle(self._charge(self._prompt_tokens, self._sent_tokens))
        else:
            await self._reservation.cancel()

    def _charge(self, prompt_tokens: int, completion_tokens: int) -> Charge:
        usd = self._price.usd(prompt_tokens, completion_tokens)
        return Charge(usd=usd, tokens=prompt_tokens + completion_tokens, requests=1)
