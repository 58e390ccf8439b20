"""Faults while an adapter is loaded: the staging process killed, the device's memory full in the middle."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from signalbox.adapters.base import Limits
from signalbox.adapters.base_shape import base_shape
from signalbox.adapters.esft_format import EsftAdapter
from signalbox.experts.base import ExpertUnavailable
from signalbox.experts.expertweave import staging
from signalbox.experts.expertweave import weave as weaves
from signalbox.experts.expertweave import worker as worker_module
from signalbox.experts.expertweave.loading import Loader
from signalbox.experts.expertweave.settings import WeaveSettings
from signalbox.experts.expertweave.staging import FolderFeed, Staged, Stager, StagingLost
from signalbox.experts.expertweave.store import FullRows
from signalbox.experts.expertweave.weave import Weave
from signalbox.experts.expertweave.worker import ExpertWeaveWorker
from signalbox.experts.vllm_arguments import installed
from signalbox.kernels.virtual_tensor import row_tensor
from tests.moe_models import EXPERTS, moe_layers, save_esft_adapter, save_tiny_moe

HIDDEN, WIDTH, PLACE = 8, 4, 1 << 20


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_moe(tmp_path_factory.mktemp("faults") / "base", "olmoe")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    """Every expert of every layer: more than the staging process has places for."""
    return save_esft_adapter(base.parent / "all", base, {layer: range(EXPERTS) for layer in moe_layers(base)})


def feed_of(adapter: Path, base: Path, stager: Stager) -> FolderFeed:
    return FolderFeed(EsftAdapter(adapter, base_shape(base), Limits(roots=(adapter,))), stager)


@pytest.mark.parametrize("answers", [False, True])
def test_a_killed_staging_process_is_told_as_such(base: Path, adapter: Path, answers: bool) -> None:
    """Whether or not it had answered before, and those answers still count."""
    stager = Stager(PLACE, pinned=False)
    feed = feed_of(adapter, base, stager)
    try:
        if not answers:
            stager._process.send_signal(signal.SIGSTOP)
        feed.start([(layer, expert) for layer, ids in feed.experts.items() for expert in ids])
        time.sleep(1 if answers else 0)  # all places are filled, and nobody has looked
        stager._process.kill()
        stager._process.wait()
        found: list[Staged] = []
        with pytest.raises(StagingLost):
            while True:
                found += feed.ready()
        assert not found and len(feed.arrived) == (16 if answers else 0)
    finally:
        feed.close()
        stager.close()


def test_a_staging_process_that_hangs_is_given_up(base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stager = Stager(PLACE, pinned=False)
    feeds = [feed_of(adapter, base, stager) for _ in range(2)]
    try:
        monkeypatch.setattr(staging, "STALL_S", 0.2)
        time.sleep(0.4)
        assert not list(feeds[0].ready()) and stager.alive  # idle is not hanging
        monkeypatch.setattr(staging, "STALL_S", 60.0)
        stager._process.send_signal(signal.SIGSTOP)
        for feed in feeds:
            feed.start([(0, 1)])
        assert not list(feeds[0].ready()) and stager.alive
        monkeypatch.setattr(staging, "STALL_S", 0.2)
        time.sleep(0.4)
        for feed in feeds:
            with pytest.raises(StagingLost, match="hangs"):
                list(feed.ready())
        assert not stager.alive
        stager._process.wait(5)
    finally:
        for feed in feeds:
            feed.close()
        stager.close()


def test_the_next_model_of_a_process_has_its_own_staging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its experts may be larger than the places that the former model's were read into."""
    before = weaves.current()
    worker = ExpertWeaveWorker()
    stagers = []
    try:
        for hidden, width in ((32, 16), (64, 32)):
            base = save_tiny_moe(tmp_path / f"{hidden}", "olmoe", hidden_size=hidden, intermediate_size=width)
            path = save_esft_adapter(tmp_path / f"{hidden}-all", base, {layer: range(EXPERTS) for layer in range(3)})
            woven = woven_by_hand(base, width, hidden)
            worker.expertweave_load(0, str(path))
            while (report := worker.expertweave_poll(0))["state"] == "loading":
                time.sleep(0.005)
            assert report["state"] == "ready", report
            wanted = {key: value for file in path.glob("*.safetensors") for key, value in load_file(file).items()}
            for number, layer in woven.layers.items():
                for expert, row in enumerate(layer.table[1].tolist()):
                    parts = [
                        wanted[f"model.layers.{number}.mlp.experts.{expert}.{part}_proj.weight"]
                        for part in ("gate", "up", "down")
                    ]
                    assert torch.equal(layer.store.w13[row], torch.cat(parts[:2])), (number, expert)
                    assert torch.equal(layer.store.w2[row], parts[2]), (number, expert)
            stagers.append(worker_module._loads().stager())
        assert not stagers[0].alive and stagers[1].alive
    finally:
        worker_module._loads().close()
        monkeypatch.setattr(weaves, "_current", before)


def woven_by_hand(base: Path, width: int, hidden: int) -> Weave:
    """The current weave of this process: a base of zeros in float32 on the CPU, without vLLM."""
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(
            dtype=torch.float32, model=str(base), hf_text_config=SimpleNamespace(num_experts_per_tok=2)
        ),
        compilation_config=SimpleNamespace(max_cudagraph_capture_size=0),
    )
    woven = weaves.begin(WeaveSettings(2, EXPERTS), config, torch.device("cpu"), 8)
    for number in range(3):
        layer = woven.layer(number, list(range(EXPERTS)), (width, hidden))
        shapes = ((2 * width, hidden), (hidden, width))
        parts = [row_tensor((layer.total_rows, *shape), torch.float32, "cpu", None) for shape in shapes]
        for part in parts:
            part.map_rows(range(EXPERTS))
            part.tensor.zero_()
        layer.store = FullRows(parts, parts[0].tensor, parts[1].tensor, lambda w13, w2: (w13, w2))
    return woven


class Full(FullRows):
    """Whole rows on a device whose memory is full (an injected fault) after some writes."""

    left = 2

    def write(self, row: int, expert: int, w13: Tensor, w2: Tensor) -> None:
        if not self.left:
            raise torch.OutOfMemoryError("full")
        self.left -= 1
        super().write(row, expert, w13, w2)


class Given:
    """Experts that have all arrived."""

    def __init__(self, ids: tuple[int, ...]) -> None:
        self.experts, self.released, self.closed = {0: ids}, 0, False
        self._staged: list[Staged] = []

    def start(self, wanted: list[tuple[int, int]]) -> None:
        for layer, expert in wanted:
            draw = torch.Generator().manual_seed(expert)
            parts = {name: torch.randn(WIDTH, HIDDEN, generator=draw) for name in ("gate_proj", "up_proj")}
            parts["down_proj"] = torch.randn(HIDDEN, WIDTH, generator=draw)
            self._staged.append(Staged(layer, expert, parts, bytes([expert]) * 16, self._release))

    def ready(self) -> Iterator[Staged]:
        while self._staged:
            yield self._staged.pop()

    def close(self) -> None:
        self.closed = True

    def _release(self) -> None:
        self.released += 1


def test_memory_that_runs_out_in_the_middle_leaves_no_row_behind() -> None:
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(
            dtype=torch.float32, model="tiny", hf_text_config=SimpleNamespace(num_experts_per_tok=2)
        ),
        compilation_config=SimpleNamespace(max_cudagraph_capture_size=0),
    )
    weave = Weave(WeaveSettings(slots=2, experts_per_layer=4), config, torch.device("cpu"), 8)
    layer = weave.layer(0, list(range(4)), (WIDTH, HIDDEN))
    parts = [
        row_tensor((layer.total_rows, *shape), torch.float32, "cpu", None)
        for shape in ((2 * WIDTH, HIDDEN), (HIDDEN, WIDTH))
    ]
    store = layer.store = Full(parts, parts[0].tensor, parts[1].tensor, lambda w13, w2: (w13, w2))
    loader = Loader(weave)

    def load(slot: int) -> dict[str, Any]:
        feed = Given((0, 1, 3))
        loader.begin(slot, feed)
        while (report := loader.poll(slot))["state"] in ("loading", "unloading"):
            pass
        assert feed.closed
        return report

    assert load(0)["code"] == "adapter_memory_full" and weave.memory()["rows"] == 0
    store.left = 3
    assert load(0)["state"] == "ready" and weave.memory()["rows"] == 3
    store.left = 2  # its twins are shares of the first one's rows
    assert load(1)["code"] == "adapter_memory_full" and weave.memory()["rows"] == 3
    loader.unload(0)
    while loader.poll(0)["state"] != "gone":
        pass
    assert weave.memory()["rows"] == 0 and layer.rows.free == 8


@pytest.mark.skipif(not installed(), reason="vLLM is not installed here: make test-vllm")
@pytest.mark.timeout(300)
async def test_an_engine_whose_staging_process_is_killed(base: Path, adapter: Path) -> None:
    from tests.experts.woven_engines import make_woven, started

    def stagers() -> list[psutil.Process]:
        below = psutil.Process().children(recursive=True)
        return [process for process in below if any(word.endswith("stage.py") for word in process.cmdline())]

    async with started(make_woven(base, max_adapters=2, esft={"experts_per_layer": EXPERTS})) as engine:
        (idle,) = stagers()
        idle.kill()
        await engine.load("a@1", str(adapter))
        await engine.unload("a@1")
        (busy,) = stagers()
        busy.suspend()
        loading = asyncio.create_task(engine.load("a@2", str(adapter)))
        await asyncio.sleep(0.5)
        busy.kill()
        with pytest.raises(ExpertUnavailable, match="tried again"):
            await loading
        assert not engine.adapters()
        await engine.load("a@2", str(adapter))
        assert list(engine.adapters()) == ["a@2"]
        left = stagers()
    assert not [process for process in left if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
