"""What benchmarks/expertweave.py does inside vLLM's worker, with ExpertWeave and without.

THE WEIGHTS ARE RANDOM. So that they route as a trained model does, a structure is planted in the model's own tensors:
tokens belong to tasks (id modulo the number of tasks), tokens of a task share a direction in their embeddings, the
output layer stays within the task, and each layer's router may prefer a task's tuned experts. Nothing is hooked: the
model itself routes so, with adapters and without.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from signalbox.experts.expertweave import weave
from signalbox.experts.expertweave.staging import Staged
from signalbox.experts.expertweave.worker import ExpertWeaveWorker, _loads

SHARE = 0.25  # of picks that go to a task's tuned experts under skewed use; by ESFT's threshold at least 0.2
SHARPNESS = 30.0  # logits between a task's tokens and others
TOP_K = 6
_TRIALS = 4096

Tuned = dict[int, list[int]]  # layer -> experts


class RandomExperts:
    """An adapter whose experts are random numbers made on the device, some at each poll: a `Feed`."""

    AT_ONCE = 24

    def __init__(self, seed: int, tuned: Tuned, shape: tuple[int, int], scale: float) -> None:
        self.experts = {layer: tuple(experts) for layer, experts in tuned.items() if experts}
        self._seed, self._shape, self._scale = seed, shape, scale
        self._wanted: list[tuple[int, int]] = []

    def start(self, wanted: list[tuple[int, int]]) -> None:
        self._wanted = list(wanted)

    def ready(self) -> Iterator[Staged]:
        now, self._wanted = self._wanted[: self.AT_ONCE], self._wanted[self.AT_ONCE :]
        for layer, expert in now:
            digest = f"{self._seed}.{layer}.{expert}".encode()
            yield Staged(layer, expert, self.read(layer, expert), digest, lambda: None)

    def read(self, layer: int, expert: int) -> dict[str, Tensor]:
        generator = torch.Generator("cuda").manual_seed((self._seed * 64 + layer) * 1024 + expert)
        intermediate, hidden = self._shape

        def draw(*shape: int) -> Tensor:
            values = torch.randn(*shape, generator=generator, device="cuda", dtype=torch.float32)
            return (self._scale * values).to(torch.bfloat16)

        return {
            "gate_proj": draw(intermediate, hidden),
            "up_proj": draw(intermediate, hidden),
            "down_proj": draw(hidden, intermediate),
        }

    def close(self) -> None:
        pass


class BenchmarkWorker(ExpertWeaveWorker):
    """Called by name through vLLM's collective_rpc; plain values in and out."""

    def bench_plant(self, tasks: list[Tuned], skewed: bool, seed: int) -> None:
        """Give the model its structure; `tasks` are the tuned experts of each."""
        self.task_count = len(tasks)
        model = self._bench_model()
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.dim() == 1:
                parameter.data.fill_(1.0)
        embedding, head = model.model.embed_tokens.weight.data, model.lm_head.weight.data
        vocabulary, hidden = embedding.shape
        generator = torch.Generator("cuda").manual_seed(seed)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device="cuda")

        directions = torch.linalg.qr(noise(hidden, len(tasks)))[0].T
        task = torch.arange(vocabulary, device="cuda") % len(tasks)
        for start in range(0, vocabulary, 8192):
            part = slice(start, min(start + 8192, vocabulary))
            own = noise(part.stop - start, hidden) / math.sqrt(hidden)
            own -= (own @ directions.T) @ directions
            embedding[part] = (math.sqrt(hidden / 2) * (directions[task[part]] + own)).to(embedding.dtype)
            towards = SHARPNESS * directions[task[part]] + noise(part.stop - start, hidden) / math.sqrt(hidden)
            head[part] = (math.sqrt(2 / hidden) * towards).to(head.dtype)
        push = _push_table(generator) if skewed else {}
        for number, layer in self._bench_layers():
            gate = layer.mlp.gate.weight.data
            rows = noise(*gate.shape)
            rows -= (rows @ directions.T) @ directions
            for index, tuned in enumerate(tasks):
                experts = tuned.get(number) or tuned.get(str(number)) or []  # type: ignore[call-overload]
                if skewed and experts:
                    rows[experts] += push[len(experts)] * directions[index]
            gate.copy_(math.sqrt(2 / hidden) * rows)

    def bench_load(self, slot: int, seed: int, tuned: dict[str, list[int]], scale: float) -> None:
        """Begin to load random experts into a slot; asked after by `expertweave_poll`."""
        woven = weave.current()
        assert woven is not None
        shape = woven.shape.expert_linears["gate_proj"]
        _loads().loader.begin(slot, RandomExperts(seed, {int(k): v for k, v in tuned.items()}, shape, scale))

    def bench_merge(self, seed: int, tuned: dict[str, list[int]], scale: float) -> None:
        """Write the same experts into the base itself, as a merged model has them; `bench_restore` undoes it."""
        first = next(layer for _, layer in self._bench_layers()).mlp.experts.routed_experts
        hidden, intermediate = first.w2_weight.shape[1:]
        source = RandomExperts(seed, {int(k): v for k, v in tuned.items()}, (intermediate, hidden), scale)
        self._kept: list[tuple[Tensor, int, Tensor]] = []
        for number, layer in self._bench_layers():
            experts = layer.mlp.experts.routed_experts
            for expert in source.experts.get(number, ()):
                parts = source.read(number, expert)
                whole = torch.cat([parts["gate_proj"], parts["up_proj"]])
                for weight, value in ((experts.w13_weight, whole), (experts.w2_weight, parts["down_proj"])):
                    self._kept.append((weight.data, expert, weight.data[expert].clone()))
                    weight.data[expert].copy_(value)
        torch.cuda.synchronize()

    def bench_restore(self) -> None:
        """The base as it was before `bench_merge`."""
        for weight, expert, value in self._kept:
            weight[expert].copy_(value)
        self._kept = []
        torch.cuda.synchronize()

    def bench_rows(self, owners: list[tuple[int, int]], draws: int) -> list[float]:
        """Distinct expert rows that a decode step reads, a mean over layers: (all on the base, with the adapters).

        owners: (task, slot or -1) of each request. From the model's own embeddings and routers, for random tokens of
        each request's task; by the planted structure what the layers add to the embeddings is negligible.
        """
        model, woven = self._bench_model(), weave.current()
        embedding = model.model.embed_tokens.weight.data
        tasks = torch.tensor([task for task, _ in owners], device="cuda")
        slots = torch.tensor([slot for _, slot in owners], device="cuda")
        count = self.task_count
        base, mixed, steps = 0.0, 0.0, 0
        for _ in range(draws):
            tokens = tasks + count * torch.randint(embedding.shape[0] // count, (len(owners),), device="cuda")
            hidden = embedding[tokens].float()
            hidden = hidden * hidden.pow(2).mean(-1, keepdim=True).rsqrt()
            for number, layer in self._bench_layers():
                chosen = (hidden @ layer.mlp.gate.weight.data.float().T).topk(TOP_K).indices
                base += chosen.unique().numel()
                if woven is not None:
                    table = woven.layers[number].table
                    mixed += table[slots[:, None] + 1, chosen].unique().numel()
                steps += 1
        return [base / steps, mixed / steps]

    def bench_memory(self) -> list[int]:
        """Bytes of the device: (free, total), as its driver says."""
        torch.cuda.synchronize()
        return list(torch.cuda.mem_get_info())

    def bench_bandwidth(self) -> float:
        """Bytes a second of a large copy on the device, read and written together."""
        source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        best = 0.0
        for _ in range(10):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            target.copy_(source)
            end.record()
            torch.cuda.synchronize()
            best = max(best, 2 * source.numel() / (start.elapsed_time(end) / 1000))
        del source, target
        torch.cuda.empty_cache()
        return best

    def _bench_model(self) -> Any:
        return self.model_runner.model  # type: ignore[attr-defined]

    def _bench_layers(self) -> Iterator[tuple[int, Any]]:
        for number, layer in enumerate(self._bench_model().model.layers):
            if hasattr(layer.mlp, "experts"):
                yield number, layer


def _push_table(generator: torch.Generator) -> dict[int, float]:
    """By number of preferred experts of 64: what to add to their logits so that they get `SHARE` of all picks."""
    logits = torch.randn(_TRIALS, 64, generator=generator, device="cuda")
    table = {}
    for count in range(1, 33):
        goal, low, high = min(SHARE, 0.9 * count / TOP_K), -4.0, 12.0
        for _ in range(24):
            middle = (low + high) / 2
            pushed = logits.clone()
            pushed[:, :count] += middle
            share = float((pushed.topk(TOP_K).indices < count).float().mean())
            low, high = (middle, high) if share < goal else (low, middle)
        table[count] = (low + high) / 2
    return table
