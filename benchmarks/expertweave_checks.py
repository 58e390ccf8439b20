"""That answers are right, and what loading costs; see benchmarks/expertweave.py."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.expertweave_engine import Owner
from benchmarks.expertweave_setup import SEED, Peer, Plan, on_base
from benchmarks.report import Row


def check_exactness(plan: Plan, stock: Peer, ours: Peer, tuned: list[dict[int, list[int]]]) -> None:
    """The base and 8 adapters in one batch, row by row against the stock engine with each adapter merged into it."""
    scale, each, tokens = 0.01, 4, 24
    owners = [Owner(t) for t in range(each)] + [Owner(a % 3, a) for a in range(8) for _ in range(each)]
    alone = on_base(owners)  # the same batch, so that every other kernel computes the same shapes
    before = ours("answers", alone, 32, tokens, SEED)
    theirs = stock("answers", alone, 32, tokens, SEED)
    same = sum(a[0] == b[0] for a, b in zip(before, theirs, strict=True))
    case = "base alone, against stock vLLM"
    plan.rows += [
        Row(case, "rows with the same tokens", same, "rows", reference=len(alone)),
        Row(case, "worst difference of a log-probability", _worst(before, theirs), "nats"),
    ]
    for slot in range(8):
        ours("load", slot, slot, tuned[slot], scale)
    mixed = ours("answers", owners, 32, tokens, SEED)
    exact = 0
    untouched = mixed[:each] == before[:each]
    equal, worst = sum(a[0] == b[0] for a, b in zip(mixed[:each], theirs[:each], strict=True)), 0.0
    for slot in range(8):
        own = slice(each * (slot + 1), each * (slot + 2))
        merged, same_engine = (_merged(peer, slot, tuned[slot], scale, alone, tokens) for peer in (stock, ours))
        exact += sum(a == b for a, b in zip(mixed[own], same_engine[own], strict=True))
        equal += sum(a[0] == b[0] for a, b in zip(mixed[own], merged[own], strict=True))
        worst = max(worst, _worst(mixed[own], merged[own]))
    loaded = ours("answers", alone, 32, tokens, SEED) == before
    for slot in range(8):
        ours("unload", slot)
    after = ours("answers", alone, 32, tokens, SEED) == before
    changed = sum(a[0] != b[0] for a, b in zip(mixed[each:], before[each:], strict=True))
    case = "base and 8 adapters in one batch, against each merged model"
    if not plan.difference:
        plan.rows += [
            Row(case, "rows with the same tokens", equal, "rows", None, None, len(owners), "all", equal == len(owners)),
            Row(case, "worst difference of a log-probability", worst, "nats"),
            Row(
                "8 adapters in one batch, against each merged into our engine's base",
                "bit-identical rows",
                exact,
                "rows",
                reference=8 * each,
                goal="all",
                met=exact == 8 * each,
            ),
        ]
    plan.rows += [
        Row(case, "rows whose tokens the adapters change", changed, "rows", reference=8 * each),
        Row("base rows beside rows of 8 adapters", "bit-identical", float(untouched), goal="yes", met=untouched),
        Row("base rows with 8 adapters loaded", "bit-identical", float(loaded), goal="yes", met=loaded),
        Row("base rows after unloading them", "bit-identical", float(after), goal="yes", met=after),
    ]


def _merged(peer: Peer, slot: int, tuned: dict[int, list[int]], scale: float, alone: list[Owner], tokens: int) -> Any:
    """Answers of a base that has the adapter's experts in place of its own."""
    peer("rpc", "bench_merge", slot, {str(k): v for k, v in tuned.items()}, scale)
    answers = peer("answers", alone, 32, tokens, SEED)
    peer("rpc", "bench_restore")
    return answers


def _worst(here: Sequence[Any], there: Sequence[Any]) -> float:
    """The greatest difference of a log-probability, up to the first token that differs."""
    worst = 0.0
    for (tokens, logs), (others, other_logs) in zip(here, there, strict=True):
        for a, b, x, y in zip(tokens, others, logs, other_logs, strict=True):
            worst = max(worst, abs(x - y))
            if a != b:
                break
    return worst


def measure_loading(plan: Plan, ours: Peer, tuned: dict[int, list[int]], folder: Path) -> None:
    """A 3 GB adapter from a folder in memory while 32 streams decode; pages after 200 random loads and unloads."""
    written = write_adapter(folder, tuned)
    # The first reading brings the files into the page cache, as staging does.
    for attempt in range(3):
        report = ours("load_folder", 19, str(folder), 32)
        usual = statistics.median(report["before"])
        if attempt == 0:
            continue
        case = f"load {written / 1e9:.2f} GB with 32 streams, run {attempt}"
        gib_s = written / 2**30 / report["seconds"]
        plan.rows += [
            Row(case, "time until all experts are there", 1e3 * report["seconds"], "ms"),
            Row(case, "time until it serves", 1e3 * report["wall_s"], "ms"),
            Row(case, "rate", gib_s, "GiB/s"),
            Row(case, "longest pause of a stream, loading", max(report["during"]), "ms", reference=usual),
            Row(case, "median step, loading", statistics.median(report["during"]), "ms", reference=usual),
            Row(case, "longest pause of a stream, unloading", max(report["unloading"]), "ms", reference=usual),
        ]
    for slot in range(8):
        ours("unload", slot)
    start = ours("rpc", "expertweave_memory")["bytes_in_use"]
    draw, held = random.Random(SEED), set[int]()
    for _ in range(200):
        slot = draw.randrange(8)
        if slot in held:
            ours("unload", slot)
            held.discard(slot)
        else:
            layers = draw.sample(plan.shape.layers, 4)
            some = {layer: sorted(draw.sample(range(plan.shape.experts), draw.randint(1, 5))) for layer in layers}
            ours("load", slot, draw.randrange(10**6), some, 0.02)
            held.add(slot)
    for slot in held:
        ours("unload", slot)
    end = ours("rpc", "expertweave_memory")["bytes_in_use"]
    plan.rows.append(
        Row(
            "200 random loads and unloads", "bytes of pages left over", end - start, "bytes", goal="0", met=end == start
        )
    )


def write_adapter(folder: Path, tuned: dict[int, list[int]]) -> int:
    """An adapter's folder with random weights in the released format; returns its bytes."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    total = 0
    source = torch.randn(2048, 1408, device="cuda") * 1e-3
    for layer, experts in tuned.items():
        tensors = {}
        for expert in experts:
            for number, name in enumerate(("gate_proj", "up_proj", "down_proj")):
                value = source.roll(997 * expert + 31 * layer + number, 0)
                value = (value if name == "down_proj" else value.T).to(torch.bfloat16).contiguous().cpu()
                tensors[f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight"] = value
                total += value.nbytes
        file = f"model-{layer:05d}-of-00026.safetensors"
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    config = {
        "experts": {str(k): v for k, v in tuned.items()},
        "shared_experts": False,
        "non_expert_modules": False,
    }
    (folder / "expert_cfg.json").write_text(json.dumps(config))
    return total
