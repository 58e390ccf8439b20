"""Moving averages of an engine's speed, for the live state that decisions read."""

from __future__ import annotations

from typing import Protocol

# Weight of the newest request in the average: the last ten or so requests count.
NEWEST = 0.2


class Timed(Protocol):
    """A finished request's clock, in seconds of `time.perf_counter`."""

    arrived: float
    first_token_at: float | None
    last_token_at: float | None

    @property
    def generated(self) -> int:
        """Number of tokens generated."""


class Speed:
    """Exponentially weighted means of time to first token and time per further token, in milliseconds."""

    def __init__(self) -> None:
        self.ttft_ms: float | None = None
        self.tpot_ms: float | None = None

    def finished(self, request: Timed) -> None:
        """Count one finished request."""
        if request.first_token_at is None or request.last_token_at is None:
            return
        self.ttft_ms = _mean(self.ttft_ms, 1000 * (request.first_token_at - request.arrived))
        if request.generated > 1:
            per_token = 1000 * (request.last_token_at - request.first_token_at) / (request.generated - 1)
            self.tpot_ms = _mean(self.tpot_ms, per_token)


def _mean(old: float | None, new: float) -> float:
    return new if old is None else (1 - NEWEST) * old + NEWEST * new
