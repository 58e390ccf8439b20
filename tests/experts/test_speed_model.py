"""The step arithmetic: against hand-computed times, and properties over random loads."""

from __future__ import annotations

import itertools
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from signalbox.experts.speed_model import SimulatedBatch, SpeedModel, Token

PLAIN = SpeedModel(prefill_tokens_per_s=1000, step_ms=10, step_ms_per_request=2, prefill_tokens=100)


def drain(batch: SimulatedBatch) -> list[Token]:
    tokens: list[Token] = []
    while batch.next_at is not None:
        tokens += batch.advance(batch.next_at)
    return tokens


def test_one_request_alone() -> None:
    batch = SimulatedBatch(PLAIN, 4)
    batch.submit("a", 150, 3, 1.0)
    assert (batch.running, batch.waiting, batch.prompt_tokens_waiting) == (1, 0, 150)
    tokens = drain(batch)
    # Two steps read the prompt, 100 and 50 tokens: 10 + 100 and 10 + 50 ms; then 10 ms a token.
    assert [t.at for t in tokens] == pytest.approx([1.17, 1.18, 1.19])
    assert [(t.first, t.last) for t in tokens] == [(True, False), (False, False), (False, True)]
    assert (batch.running, batch.waiting, batch.next_at) == (0, 0, None)


def test_a_later_request_joins_at_the_next_step_and_its_prompt_slows_the_other() -> None:
    batch = SimulatedBatch(PLAIN, 4)
    batch.submit("a", 10, 4, 0.0)  # first step: 10 + 10 ms
    batch.submit("b", 40, 1, 0.005)
    tokens = drain(batch)
    times = {(t.request, t.first): t.at for t in tokens}
    assert times["a", True] == pytest.approx(0.020)
    assert times["b", True] == pytest.approx(0.020 + 0.012 + 0.040)
    a = [t.at for t in tokens if t.request == "a"]
    assert a == pytest.approx([0.020, 0.072, 0.082, 0.092]), "a's second token comes with b's prompt; then alone"


def test_places_are_given_in_order_of_arrival_and_freed_by_cancelling() -> None:
    batch = SimulatedBatch(PLAIN, 1)
    for name in "abc":
        batch.submit(name, 10, 2, 0.0)
    assert (batch.running, batch.waiting, batch.prompt_tokens_waiting) == (1, 2, 30)
    assert batch.cancel("b") and not batch.cancel("b") and batch.waiting == 1
    assert [t.request for t in drain(batch)] == ["a", "a", "c", "c"]
    batch.submit("d", 10, 50, 9.0)
    batch.submit("e", 10, 1, 9.0)
    assert batch.cancel("d")
    assert [t.request for t in drain(batch)] == ["e"]
    assert not batch.cancel("e")


def test_misuse_is_told() -> None:
    batch = SimulatedBatch(PLAIN, 1)
    batch.submit("a", 10, 2, 0.0)
    with pytest.raises(ValueError, match="already"):
        batch.submit("a", 10, 2, 0.0)
    with pytest.raises(ValueError, match="advance"):
        batch.submit("b", 10, 2, 1.0)
    for wrong in ({"step_ms": 0}, {"prefill_tokens_per_s": 0}, {"jitter": 1.0}, {"prefill_tokens": 0}):
        with pytest.raises(ValueError):
            SpeedModel(**({"prefill_tokens_per_s": 1.0, "step_ms": 1.0} | wrong))  # type: ignore[arg-type]


def test_capacity_is_what_a_full_batch_finishes() -> None:
    speed = SpeedModel(prefill_tokens_per_s=5000, step_ms=10, step_ms_per_request=1, prefill_tokens=512)
    batch = SimulatedBatch(speed, 8)
    for i in range(800):
        batch.submit(str(i), 100, 20, 0.0)
    took = drain(batch)[-1].at
    assert 800 / took == pytest.approx(speed.requests_per_s(8, 100, 20), rel=0.08)


def test_jitter_has_its_spread_and_keeps_the_mean() -> None:
    batch = SimulatedBatch(SpeedModel(1e9, 10.0, jitter=0.2), 1, seed=3)
    batch.submit("a", 1, 20_000, 0.0)
    times = [t.at for t in drain(batch)]
    steps = [b - a for a, b in itertools.pairwise(times)]
    mean = sum(steps) / len(steps)
    deviation = (sum((s - mean) ** 2 for s in steps) / len(steps)) ** 0.5
    assert mean == pytest.approx(0.010, rel=0.01) and deviation / mean == pytest.approx(0.2, rel=0.05)
    assert min(steps) > 0


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 2), st.integers(1, 700), st.integers(1, 30), st.booleans()), min_size=1, max_size=25
    ),
    st.integers(1, 5),
)
def test_every_request_is_answered_once_and_in_full(load: list[tuple[float, int, int, bool]], places: int) -> None:
    batch = SimulatedBatch(PLAIN, places)
    tokens: list[Token] = []
    cancelled = set()
    for i, (at, prompt, answer, cancel) in enumerate(sorted(load)):
        tokens += batch.advance(at)
        batch.submit(str(i), prompt, answer, at)
        assert batch.running <= places
        if cancel and i and batch.cancel(str(i - 1)):
            cancelled.add(str(i - 1))
    tokens += drain(batch)
    assert (batch.running, batch.waiting, batch.prompt_tokens_waiting) == (0, 0, 0)
    assert [t.at for t in tokens] == sorted(t.at for t in tokens)
    found = defaultdict(list)
    for token in tokens:
        found[token.request].append(token)
    for i, (at, prompt, answer, _) in enumerate(sorted(load)):
        got = found[str(i)]
        if str(i) in cancelled:
            assert len(got) < answer and not any(t.last for t in got)
            continue
        assert len(got) == answer and got[0].first and got[-1].last
        assert got[0].at - at >= PLAIN.step_s(1) + prompt / PLAIN.prefill_tokens_per_s - 1e-9
        assert len({t.at for t in got}) == len(got), "one token a step"
