"""What a replica learns of its requests, by a clock that is set by hand."""

from __future__ import annotations

import pytest

from signalbox.experts.base import Chunk, GenerateRequest, SamplingParams, Usage
from signalbox.experts.catalog import OpenAIExpert
from signalbox.policies.latency import Load
from signalbox.serving.request_watch import RequestWatch, WatchedRequest, prompt_bytes

CONFIG = OpenAIExpert.model_validate(
    {"engine": "openai", "base_url": "http://127.0.0.1:1/v1", "model": "m", "max_running": 2, "bytes_per_token": 4.0}
    | {"latency": {"ttft_ms": 100.0, "tpot_ms": 10.0}}
)


class Clock:
    now = 5.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watch(clock: Clock) -> RequestWatch:
    return RequestWatch(CONFIG, clock=clock)


def ask(size: int, **sampling: object) -> GenerateRequest:
    return GenerateRequest("r", prompt="x" * size, sampling=SamplingParams(**sampling))  # type: ignore[arg-type]


def answer(watched: WatchedRequest, clock: Clock, ttft_s: float, tpot_s: float, tokens: int, prompt: int) -> None:
    clock.now += ttft_s
    watched.chunk(Chunk("a", [1]))
    for _ in range(tokens - 2):
        clock.now += tpot_s
        watched.chunk(Chunk("a", [1]))
    clock.now += tpot_s
    watched.chunk(Chunk("a", [1], finish_reason="length", usage=Usage(prompt, tokens)))
    watched.close()


def test_load_is_what_is_here(watch: RequestWatch) -> None:
    first, second, third = watch.begin(ask(40)), watch.begin(ask(400)), watch.begin(ask(80))
    assert (first.load, second.load, third.load) == (Load(0, 0, 0), Load(1, 0, 10), Load(2, 0, 110))
    assert watch.load() == Load(2, 1, 130), "one more than there are places"
    second.chunk(Chunk())
    assert watch.load().prompt_tokens_waiting == 130, "a chunk without anything is no first token"
    second.chunk(Chunk("a"))
    assert watch.load() == Load(2, 1, 30)
    for watched in (first, second, third, third):
        watched.close()
    assert watch.load() == Load(0, 0, 0)


def test_times_are_learnt_and_errors_are_of_what_was_predicted_before(watch: RequestWatch, clock: Clock) -> None:
    watched = watch.begin(ask(400))
    assert (watched.predicted.ttft_ms, watched.predicted.tpot_ms) == pytest.approx((100, 10))
    answer(watched, clock, 0.2, 0.02, 11, 100)
    state = watch.latency()
    assert (state.ttft_error, state.tpot_error) == pytest.approx((0.5, 0.5))
    assert (state.ttft_count, state.tpot_count, state.max_running) == (1, 1, 2)
    for _ in range(30):
        answer(watch.begin(ask(400)), clock, 0.2, 0.02, 11, 100)
    said = watch.begin(ask(400)).predicted
    assert (said.ttft_ms, said.tpot_ms) == pytest.approx((200, 20), rel=0.05)


def test_several_tokens_in_the_first_chunk_and_an_empty_end(watch: RequestWatch, clock: Clock) -> None:
    """As from vLLM under load, and as from remote engines, whose last chunk has no text and comes late."""
    for _ in range(40):
        watched = watch.begin(ask(400))
        clock.now += 0.1
        watched.chunk(Chunk("abc", [1, 2, 3]))
        clock.now += 0.3
        watched.chunk(Chunk("defghi", [4, 5, 6, 7, 8, 9]))
        clock.now += 5.0
        watched.chunk(Chunk(finish_reason="stop", usage=Usage(100, 9)))
        watched.close()
    assert watch.begin(ask(400)).predicted.tpot_ms == pytest.approx(50, rel=0.05)


def test_the_batch_is_the_mean_over_the_answer(watch: RequestWatch, clock: Clock) -> None:
    """Alone for half of the answer and with another for the other half: 1.5, so half a request beside it is usual."""
    first = watch.begin(ask(40))
    clock.now += 0.1
    first.chunk(Chunk("a", [1]))
    clock.now += 1.0
    other = watch.begin(ask(40))
    clock.now += 1.0
    first.chunk(Chunk("a", [1], finish_reason="length", usage=Usage(10, 2)))
    first.close()
    other.close()
    # The first request weighs a half against the beginning's 0.
    assert watch.latency().others == pytest.approx(0.5 * 0.5)


def test_what_is_cut_short_teaches_no_time_per_token(watch: RequestWatch, clock: Clock) -> None:
    watched = watch.begin(ask(40))
    watched.close()  # refused, or cancelled before its first token
    watched = watch.begin(ask(40))
    clock.now += 0.1
    watched.chunk(Chunk("a", [1]))
    watched.close()
    only = watch.begin(ask(40))
    clock.now += 0.1
    only.chunk(Chunk("a", [1], finish_reason="stop", usage=Usage(10, 1)))
    only.close()
    state = watch.latency()
    assert (state.ttft_count, state.tpot_count) == (2, 0) and watch.load() == Load(0, 0, 0)


def test_prompt_tokens_are_estimated_from_bytes(watch: RequestWatch, clock: Clock) -> None:
    watch.begin(ask(400))
    assert watch.load().prompt_tokens_waiting == 100 and watch.bytes_per_token is None
    for _ in range(3):
        answer(watch.begin(ask(400)), clock, 0.1, 0.01, 4, 200)
    assert watch.bytes_per_token == pytest.approx(2.0)
    before = watch.load().prompt_tokens_waiting
    watch.begin(ask(400))
    watch.begin(GenerateRequest("i", prompt_token_ids=[1] * 7))
    assert watch.load().prompt_tokens_waiting == pytest.approx(before + 207)
    messages = [{"role": "user", "content": "abü"}, {"role": "assistant", "content": None}]
    assert prompt_bytes(GenerateRequest("m", messages=messages)) == 4


def test_a_limit_counts_as_the_length_only_where_it_is_certain(watch: RequestWatch, clock: Clock) -> None:
    for batch in (1, 2) * 30:
        others = [watch.begin(ask(40)) for _ in range(batch - 1)]
        answer(watch.begin(ask(40)), clock, 0.1, 0.01 * batch, 11, 10)
        for other in others:
            other.close()

    def predicted(**sampling: object) -> float:
        watched = watch.begin(ask(40, **sampling))
        watched.close()
        return watched.predicted.tpot_ms

    certain, likely = (predicted(max_tokens=1000, ignore_eos=ignore) for ignore in (True, False))
    assert certain == pytest.approx(15, rel=0.1), "a long answer sees the usual batch of 1.5"
    assert likely < 0.9 * certain and likely == pytest.approx(predicted()), "one of usual length that of its beginning"
    assert predicted(max_tokens=2) < likely
