"""An engine is found again from what was measured of it."""

import itertools
import math
import random

import pytest

from signalbox.experts.speed_model import SimulatedBatch, SpeedModel
from signalbox.policies.calibrate import Observation, calibrate


def measured(speed: SpeedModel, together: int, count: int, overhead_ms: float, seed: int) -> list[Observation]:
    """A closed loop of `together` clients, which pause for a moment, against a simulated engine."""
    rng = random.Random(seed)
    batch = SimulatedBatch(speed, 64, seed=seed)
    sizes = [(rng.randint(10, 200), rng.randint(4, 40)) for _ in range(count)]
    coming = [(rng.uniform(0, 0.1), i) for i in range(together)]
    numbers = itertools.count(together)
    sent: dict[int, float] = {}
    first: dict[int, float] = {}
    found: list[Observation] = []
    while coming or batch.next_at is not None:
        comes, number = min(coming, default=(math.inf, 0))
        if comes < (batch.next_at or math.inf):
            coming.remove((comes, number))
            sent[number] = comes
            batch.submit(str(number), *sizes[number], comes)
            continue
        for token in batch.advance(batch.next_at or 0.0):
            number = int(token.request)
            if token.first:
                first[number] = token.at
            if token.last:
                prompt, answer = sizes[number]
                ttft_ms = 1000 * (first[number] - sent[number]) + overhead_ms
                tpot_ms = 1000 * (token.at - first[number]) / (answer - 1)
                found.append(Observation(together, prompt, answer, ttft_ms, tpot_ms))
                if (next_one := next(numbers)) < count:
                    coming.append((token.at + rng.uniform(0, 0.05), next_one))
    return found[: count - together]


@pytest.mark.parametrize("overhead_ms", [0.0, 8.0])
def test_a_simulated_engine_is_found_again(overhead_ms: float) -> None:
    true = SpeedModel(4000.0, 25.0, 3.0, jitter=0.1)
    seen = [o for b in (1, 2, 4, 8, 16) for o in measured(true, b, 80, overhead_ms, seed=b)]
    seen.append(Observation(4, 100, 20, 9000.0, 2000.0))  # the machine paused
    found = calibrate(seen)
    for together in (1, 4, 16):
        assert found.speed.step_s(together) == pytest.approx(true.step_s(together), rel=0.15)
    assert found.speed.requests_per_s(16, 100, 22) == pytest.approx(true.requests_per_s(16, 100, 22), rel=0.1)
    assert found.tpot_error < 0.15 and found.ttft_error < 0.25
    assert abs(found.overhead_ms - overhead_ms) < 15


def test_too_little_is_refused() -> None:
    with pytest.raises(ValueError, match="8 are needed"):
        calibrate([Observation(1, 10, 1, 5.0, 5.0)] * 20)
    with pytest.raises(ValueError, match="above 0"):
        calibrate([Observation(1, 10, 2, 0.0, 5.0)] * 20)
