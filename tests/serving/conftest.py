"""What the gateway's tests stand on: two tiny real models, a trained router, a real Valkey, the real application.

The models are random Llamas of two layers with a tokenizer trained here, served by the real transformers engine in
real Serve deployments. Serve's local testing mode keeps those in this process, so that a test takes milliseconds;
`test_service.py` runs the whole on a cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn

from signalbox.serving.config import Config
from signalbox.serving.embedded_valkey import EmbeddedValkey

CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
CORPUS = [
    "the quick brown fox jumps over the lazy dog and tells a story about it",
    "def reverse(items): return items[::-1]  # Python",
    "What is 12 * 7? 3 + 4 = 7, 100 / 5 = 20 and 9 - 2 = 7",
    "I lost my card, please block it: ¿dónde está? naïve façade über Straße 你好 🙂",
] * 8


def make_tokenizer(folder: Path) -> int:
    """A byte-level BPE trained on a few lines; returns its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return len(fast)


def make_model(folder: Path, *, seed: int, hidden: int) -> Path:
    """A random Llama of two layers as a folder of safetensors, with its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    size = make_tokenizer(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        initializer_range=0.5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "tiny": make_model(root / "tiny", seed=1, hidden=32),
        "wide": make_model(root / "wide", seed=2, hidden=64),
    }


@pytest.fixture(scope="session")
def router_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Tryage router trained on a planted signal: `tiny` is better at sums, `wide` at stories."""
    from signalbox.router.artifact import save_artifact
    from signalbox.router.encoder import load_encoder
    from signalbox.router.table import Table
    from signalbox.router.tryage import TryagePredictor

    rng = np.random.default_rng(0)
    things = ["fox", "king", "ship", "robot", "garden", "river", "teacher", "wizard"]
    prompts, losses = [], []
    for i in range(96):
        a, b = rng.integers(2, 99, 2)
        if i % 2:
            prompts.append(f"What is {a} {rng.choice(['plus', 'times', 'minus'])} {b}?")
        else:
            prompts.append(f"Tell me a story about a {rng.choice(things)} and a {rng.choice(things)}, number {i}.")
        noise = rng.normal(0, 0.05, 2)
        losses.append([(0.5 if i % 2 else 2.0) + noise[0], (1.5 if i % 2 else 1.0) + noise[1]])
    ids = [f"row-{i}" for i in range(len(prompts))]
    table = Table(("tiny", "wide"), ids, prompts, {"loss": np.array(losses)})
    path = tmp_path_factory.mktemp("router") / "router"
    save_artifact(TryagePredictor.fit(table, load_encoder()).to_artifact(), path)
    return path


@pytest.fixture(scope="session")
def valkey() -> Iterator[str]:
    server = EmbeddedValkey()
    try:
        yield server.start()
    finally:
        server.stop()


def make_config(models: dict[str, Path], router: Path | None = None, **changes: Any) -> Config:
    """The pool `tiny` and `wide`, cheap and dear, with policies; `changes` replace whole sections."""
    common = {"engine": "transformers", "threads": 1, "max_running": 8, "max_waiting": 8, "kv_cache_mib": 64}
    common |= {"default_max_tokens": 16, "device": "cpu", "dtype": "float32"}
    sections: dict[str, Any] = {
        "experts": {
            "tiny": {
                **common,
                "model": str(models["tiny"]),
                "price": {"input": 0.1, "output": 0.2},
                "released": "2024-01-01",
            },
            "wide": {
                **common,
                "model": str(models["wide"]),
                "price": {"input": 1.0, "output": 2.0},
                "released": "2025-01-01",
            },
        },
        "policies": {
            "gold": {"objective": {"quality": 1.0}},
            "bronze": {"objective": {"quality": 1.0, "cost": 20.0}},
            "impossible": {"slo": {"max_cost_per_1m": 0.001}, "on_no_candidates": "fail"},
            "fresh": {"cache": "off"},
        },
        "admission": {"max_queued": 8, "max_wait_s": 3600},  # bounds alone refuse, however slow the machine
    }
    if router is not None:
        sections["routers"] = {"default": {"kind": "tryage", "artifact": str(router)}}
    return Config.model_validate(sections | changes)


@pytest.fixture(scope="session")
def expert_handles(models: dict[str, Path], valkey: str) -> Iterator[dict[str, Any]]:
    """Real deployments with real engines, in Serve's local testing mode."""
    from ray import serve

    from signalbox.serving.expert_deployment import deploy

    config = make_config(models)
    handles = {}
    for name, expert in config.experts.items():
        handles[name] = serve.run(deploy(name, expert, valkey), name=f"app-{name}", _local_testing_mode=True)
        # One after the other: transformers cannot load two models in one process at the same time.
        deadline = time.monotonic() + 60
        while not (state := handles[name].state.remote().result()).ready:
            assert time.monotonic() < deadline, state.reason
            time.sleep(0.05)
    yield handles
    for handle in handles.values():  # before the store goes, to which they publish their state
        handle.close.remote().result()


@dataclass
class Service:
    """A gateway listening on loopback."""

    url: str
    client: httpx.AsyncClient
    handles: dict[str, Any]
    app: Any

    async def running(self, expert: str) -> int:
        """Requests that the expert's engine works on or holds at this moment."""
        state = (await self.handles[expert].state.remote()).engine
        return state.running + state.waiting


@contextlib.asynccontextmanager
async def serve_gateway(
    config: Config, store_url: str, handles: dict[str, Any], registry: Any = None
) -> AsyncIterator[Service]:
    """The real ASGI application under uvicorn on a free port of 127.0.0.1."""
    from signalbox.serving.gateway import GatewayApp

    app = GatewayApp(config, store_url, handles, registry)
    pool = app._store._redis.connection_pool  # a pause of the process is no loss of the store
    pool.timeout = 30.0
    pool.connection_kwargs |= {"socket_timeout": 30.0, "socket_connect_timeout": 30.0}
    # Named TCP, or asyncio leaves Nagle's algorithm on for its connections: 40 ms between headers and body.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            async with httpx.AsyncClient(base_url=url, timeout=60) as client:
                while not server.started:
                    assert not task.done(), "the server did not start"
                    await asyncio.sleep(0.01)
                yield Service(url, client, handles, app)
        finally:
            server.should_exit = True
            await task


async def until_ready(service: Service) -> dict[str, Any]:
    """Wait until every expert and the router are ready; returns the body of /readyz."""
    for _ in range(600):
        reply = await service.client.get("/readyz")
        body = reply.json()
        if reply.status_code == 200 and all(expert["ready"] for expert in body["experts"].values()):
            return body
        await asyncio.sleep(0.1)
    raise AssertionError(f"not ready: {body}")


@pytest.fixture(scope="session")
async def service(
    models: dict[str, Path], router_artifact: Path, valkey: str, expert_handles: dict[str, Any]
) -> AsyncIterator[Service]:
    async with serve_gateway(make_config(models, router_artifact), valkey, expert_handles) as running:
        await until_ready(running)
        yield running
