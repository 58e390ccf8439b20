"""The hop between gateway and expert, with a real engine in a real Serve deployment (local testing mode)."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from signalbox.experts.base import (
    Chunk,
    ExpertError,
    ExpertUnavailable,
    GenerateRequest,
    InvalidRequest,
    QueueFull,
    SamplingParams,
)
from signalbox.experts.catalog import SimulatedExpert
from signalbox.policies.latency import Latency, Load, predict
from signalbox.serving import expert_deployment, live_state
from signalbox.serving.expert_deployment import ExpertClient, ExpertDeployment
from signalbox.serving.live_state import ReplicaState
from signalbox.serving.store import Store
from tests.serving.conftest import make_config


def request(name: str, max_tokens: int = 8, **sampling: Any) -> GenerateRequest:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **sampling)
    return GenerateRequest(name, messages=[{"role": "user", "content": "hello"}], sampling=params)


@pytest.fixture
def client(expert_handles: dict[str, Any]) -> ExpertClient:
    return ExpertClient("tiny", expert_handles["tiny"])


async def idle(handle: Any) -> None:
    """Wait until the expert does nothing, well before a long generation could have ended by itself.

    For so many looks: a pause of the process is one of them.
    """
    for _ in range(200):
        engine = (await handle.state.remote()).engine
        if engine.running + engine.waiting == 0:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"still running: {engine}")


async def test_chunks_come_in_lists_and_the_last_has_the_end(client: ExpertClient) -> None:
    messages = [item async for item in client.generate(request("r1", 64, temperature=0.0))]
    chunks = [chunk for message in messages for chunk in message]
    assert all(messages), "no message is empty"
    assert len([c for c in chunks if c.token_ids]) == 64
    assert chunks[-1].finish_reason == "length" and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 64


async def test_what_is_ready_goes_in_one_message(models: dict[str, Path], valkey: str) -> None:
    """A reader that is slower than the engine gets few messages with many chunks, not one for each token."""
    replica = await started("batching", models["tiny"], valkey)
    try:
        sizes = []
        async for item in replica.generate(request("r", 100)):
            assert isinstance(item, list)
            sizes.append(len(item))
            await asyncio.sleep(0.05)
        assert sum(sizes) >= 100 and len(sizes) < 50
    finally:
        await replica.close()


async def test_errors_keep_what_the_client_is_told(client: ExpertClient) -> None:
    with pytest.raises(InvalidRequest) as caught:
        async for _ in client.generate(request("r2", logit_bias={100_000: 1.0})):
            pass
    assert caught.value.param == "logit_bias" and caught.value.status == 400 and not caught.value.retryable


async def test_a_full_queue(client: ExpertClient, expert_handles: dict[str, Any]) -> None:
    """8 run and 8 wait; of 20 more, every one is refused or answered, and none is lost."""

    async def one(i: int) -> str:
        try:
            async for _ in client.generate(request(f"q{i}", 200)):
                pass
        except QueueFull:
            return "refused"
        return "answered"

    outcomes = await asyncio.gather(*(one(i) for i in range(36)))
    assert outcomes.count("answered") >= 16 and outcomes.count("refused") >= 1
    assert len(outcomes) == 36
    await idle(expert_handles["tiny"])


async def test_closing_the_stream_stops_the_generation(client: ExpertClient, expert_handles: dict[str, Any]) -> None:
    async with aclosing(client.generate(request("r3", 8000))) as stream:
        async for _ in stream:
            break
        assert (await expert_handles["tiny"].state.remote()).engine.running == 1
    await idle(expert_handles["tiny"])


async def test_cancelling_the_reader_stops_the_generation(client: ExpertClient, expert_handles: dict[str, Any]) -> None:
    begun = asyncio.Event()

    async def read() -> None:
        async for _ in client.generate(request("r4", 8000)):
            begun.set()

    task = asyncio.create_task(read())
    await begun.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()
    await idle(expert_handles["tiny"])


async def test_abort_by_id(client: ExpertClient, expert_handles: dict[str, Any]) -> None:
    handle = expert_handles["tiny"]
    stream = client.generate(request("r5", 8000))
    await anext(stream)
    assert await handle.abort.remote("r5")
    with pytest.raises(ExpertError) as caught:
        async for _ in stream:
            pass
    assert caught.value.code == "aborted"
    assert not await handle.abort.remote("r5"), "it is not known any more"
    await idle(handle)


async def test_score(expert_handles: dict[str, Any]) -> None:
    score = await expert_handles["tiny"].score.remote(request("s"), "the quick brown fox")
    assert score.nll_bits > 0 and score.reference_bytes == 19
    refused = await expert_handles["tiny"].score.remote(request("s"), "")
    assert isinstance(refused, InvalidRequest)


async def test_state_is_published_with_the_model_s_facts(
    client: ExpertClient, expert_handles: dict[str, Any], valkey: str
) -> None:
    async for _ in client.generate(GenerateRequest("p", prompt="the quick brown fox " * 150)):
        pass
    store = Store(valkey)

    async def after(sequence: int) -> ReplicaState:
        async with asyncio.timeout(60):
            while True:
                [data] = (await store.hgetall(live_state.live_key("tiny"))).values()
                if (state := ReplicaState.loads(data)).sequence > sequence:
                    return state
                await asyncio.sleep(0.02)

    try:
        state = await after((await expert_handles["tiny"].state.remote()).sequence)
        later = await after(state.sequence)
    finally:
        await store.close()
    assert later.sequence > state.sequence and state.ready
    assert state.context_length == 8192 and state.parameters and state.parameters > 10_000
    assert len(state.fingerprint) == 16
    assert state.engine.ttft_ms and state.engine.ttft_ms > 0
    assert state.bytes_per_token and 0.5 <= state.bytes_per_token < 8.0
    assert state.latency and state.latency.ttft_count and state.latency.max_running == 8


async def test_its_speed_is_learnt_from_what_it_serves(models: dict[str, Path], valkey: str) -> None:
    replica = await started("learning", models["tiny"], valkey)
    try:
        before = (await replica.state()).latency

        async def one(i: int) -> None:
            items = [item async for item in replica.generate(request(f"l{i}", 40))]
            assert not any(isinstance(item, ExpertError) for item in items)

        for i in range(10):
            await asyncio.gather(*(one(4 * i + j) for j in range(1 + i % 4)))
        refused = [item async for item in replica.generate(request("bad", logit_bias={100_000: 1.0}))]
        assert isinstance(refused[0], ExpertError)
        state = await replica.state()
    finally:
        await replica.close()
    assert before is not None and before.ttft_count == 0 and before.ttft_error is None
    learnt = state.latency
    assert learnt is not None and learnt.ttft_count == learnt.tpot_count == 23
    assert learnt.ttft_error is not None and learnt.tpot_error is not None
    assert state.prompt_tokens_waiting == 0
    idle_ms = predict(learnt, Latency(500, 50), Load(), 10, 40)
    assert idle_ms.ttft_ms < 250 and idle_ms.tpot_ms < 25, "declared: 500 and 50; this model takes a few milliseconds"


async def started(name: str, model: Path, valkey: str) -> ExpertDeployment:
    replica = ExpertDeployment(name, make_config({"tiny": model, "wide": model}).experts["tiny"], valkey)
    for _ in range(600):
        if (await replica.state()).ready:
            return replica
        await asyncio.sleep(0.05)
    raise AssertionError(await replica.state())


async def test_a_simulated_expert_serves_and_is_learnt_like_any_other(valkey: str) -> None:
    stated = {"engine": "simulated", "prefill_tokens_per_s": 1000, "step_ms": 20, "step_ms_per_request": 5}
    replica = ExpertDeployment("stated", SimulatedExpert.model_validate(stated | {"max_running": 4}), valkey)
    try:
        while not (await replica.state()).ready:
            await asyncio.sleep(0.01)

        async def one(i: int) -> None:
            prompt = "x" * (40 if i // 4 % 2 else 400)
            sampling = SamplingParams(max_tokens=10, ignore_eos=True)
            async for item in replica.generate(GenerateRequest(f"s{i}", prompt=prompt, sampling=sampling)):
                assert not isinstance(item, ExpertError), item

        for i in range(24):  # one, two or three at once, all short or all long
            await asyncio.gather(*(one(4 * i + j) for j in range(1 + i % 3)))
        replica.check_health()
        learnt = (await replica.state()).latency
    finally:
        await replica.close()
    assert learnt is not None and learnt.max_running == 4
    short, long = (predict(learnt, Latency(500, 50), Load(), tokens, 10) for tokens in (10, 100))
    assert long.ttft_ms - short.ttft_ms > 45, "90 tokens more, at a thousand a second"
    crowd = predict(learnt, Latency(500, 50), Load(running=2), 10, 10)
    assert 15 < short.tpot_ms < crowd.tpot_ms < 100


@pytest.fixture
async def broken(
    models: dict[str, Path], tmp_path: Path, valkey: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[ExpertDeployment, Path]]:
    """An expert whose model is not there yet."""
    monkeypatch.setattr(expert_deployment, "FIRST_RETRY_S", 0.1)
    path = tmp_path / "model"
    config = make_config({"tiny": path, "wide": path}).experts["tiny"]
    replica = ExpertDeployment("broken", config, valkey)
    yield replica, path
    await replica.close()


async def test_an_expert_that_cannot_start_says_why_and_starts_when_it_can(
    broken: tuple[ExpertDeployment, Path], models: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    replica, path = broken
    while (state := await replica.state()).reason == "starting":
        await asyncio.sleep(0.02)
    assert not state.ready and str(path) in state.reason
    [item] = [item async for item in replica.generate(request("b"))]
    assert isinstance(item, ExpertUnavailable) and str(path) in item.message and item.retryable
    replica.check_health()  # Serve must not replace it: a new replica would fare no better
    whole = path.with_name("copy")
    shutil.copytree(models["tiny"], whole)
    whole.rename(path)  # at once: a half-copied model could be tried
    deadline = time.monotonic() + 60
    while not (await replica.state()).ready:
        assert time.monotonic() < deadline, await replica.state()
        await asyncio.sleep(0.05)
    chunks = [c for item in [item async for item in replica.generate(request("b"))] for c in item]  # type: ignore[union-attr]
    assert isinstance(chunks[-1], Chunk) and chunks[-1].finish_reason == "length"
    assert "cannot start" in caplog.text


async def test_a_dead_engine_is_noticed(models: dict[str, Path], valkey: str) -> None:
    replica = await started("mortal", models["tiny"], valkey)
    replica.check_health()
    assert replica._engine is not None
    await replica._engine.close()  # as when its thread dies
    with pytest.raises(RuntimeError, match="has stopped"):
        replica.check_health()
    assert not (await replica.state()).ready
    await replica.close()


async def test_closing_withdraws_the_state_and_ends_requests(models: dict[str, Path], valkey: str) -> None:
    replica = await started("leaving", models["tiny"], valkey)
    stream = replica.generate(request("l", 8000))
    await anext(stream)
    await replica.close()
    rest = [item async for item in stream]
    assert isinstance(rest[-1], ExpertError)
    store = Store(valkey)
    assert await store.hgetall(live_state.live_key("leaving")) == {}
    await store.close()


async def test_an_engine_s_fault_is_logged_and_told_without_its_insides(
    models: dict[str, Path], valkey: str, caplog: pytest.LogCaptureFixture
) -> None:
    replica = await started("faulty", models["tiny"], valkey)

    async def explode(_: GenerateRequest) -> AsyncIterator[Chunk]:  # an injected fault
        raise ZeroDivisionError("secret of the engine")
        yield Chunk()

    assert replica._engine is not None
    replica._engine.generate = explode  # type: ignore[method-assign]
    with caplog.at_level(logging.ERROR):
        [item] = [item async for item in replica.generate(request("f"))]
    assert isinstance(item, ExpertError) and item.status == 500 and "secret" not in item.message
    assert "secret of the engine" in caplog.text
    await replica.close()


class LostReplica:
    """An injected fault: a handle whose replica has died and has no successor yet, so that nobody takes the call."""

    def __init__(self) -> None:
        self.cancelled = False

    def options(self, **_: Any) -> LostReplica:
        return self

    def remote(self, _: GenerateRequest) -> LostReplica:
        return self

    async def _fetch_future_result_async(self) -> None:
        await asyncio.sleep(3600)

    def cancel(self) -> None:
        self.cancelled = True


async def test_a_call_that_no_replica_takes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_deployment, "ACCEPT_S", 0.1)
    handle, doubted = LostReplica(), list[str]()
    client = ExpertClient("tiny", handle, doubted.append)  # type: ignore[arg-type]
    with pytest.raises(ExpertUnavailable, match="cannot be reached") as caught:
        async for _ in client.generate(request("x")):
            pass
    assert caught.value.retryable and handle.cancelled and doubted == ["tiny"]
