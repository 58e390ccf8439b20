"""`make bench-expertweave`, on a GPU machine: ESFT adapters over one base inside vLLM, against the base alone.

The shape is DeepSeek-V2-Lite's (16B), the weights are random with a planted structure (`expertweave_worker`), adapters
have the sizes of ExpertWeave's table 1 (arXiv 2508.17624). Stock vLLM and ours are two processes that hold the GPU
together and are measured in turn, so that what drifts, drifts for both.

    python -m benchmarks.expertweave              exactness, decode, prompts, Poisson arrivals, loading; then most of it
                                                  again with tuned experts as 4-bit differences to the base's
    python -m benchmarks.expertweave --rows full  whole rows alone
    python -m benchmarks.expertweave --quick      few steps
"""

from __future__ import annotations

import json
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.expertweave_engine import Owner, serve
from benchmarks.report import RESULTS, ROOT, Row, print_table, write_results
from benchmarks.weave_memory import adapters as table_1

SHAPE = ROOT / "benchmarks" / "shapes" / "deepseek-v2-lite"
EXPERTS, E_MAX = 64, 13
EXPERT_BYTES = 3 * 2048 * 1408 * 2
MOE_LAYERS = 26
SEED = 7


@dataclass(slots=True)
class Plan:
    """What is measured, and how often."""

    batches: tuple[int, ...] = (1, 8, 32, 128, 256)
    counts: tuple[int, ...] = (5, 10, 20)
    alphas: tuple[float, ...] = (1.0, 0.3, 0.1)
    uses: tuple[str, ...] = ("uniform", "skewed")
    rounds: int = 2
    steps: int = 30
    prompts: tuple[int, ...] = (512, 1536)
    rates: tuple[int, ...] = (1, 3, 5)
    poisson_s: float = 12.0
    parts: tuple[str, ...] = ("decode", "prompts", "poisson", "exactness", "loading")
    difference: bool = False
    bandwidth: float = 0.0
    rows: list[Row] = field(default_factory=list)


class Peer:
    """An engine in a process of its own; calls wait for the answer."""

    def __init__(self, name: str, arguments: dict[str, Any], settings: dict[str, Any] | None) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, arguments, settings), name=name)
        self._process.start()
        theirs.close()
        self.name = name

    def started(self) -> float:
        """Seconds that the start took."""
        return float(self._answer())

    def __call__(self, method: str, *args: Any) -> Any:
        self._pipe.send((method, args))
        return self._answer()

    def _answer(self) -> Any:
        while not self._pipe.poll(1.0):
            if not self._process.is_alive():
                raise SystemExit(f"the engine {self.name} has died (exit code {self._process.exitcode})")
        kind, value = self._pipe.recv()
        if kind == "error":
            raise SystemExit(f"the engine {self.name}: {value}")
        return value

    def stop(self) -> None:
        """End the process."""
        self._pipe.send(None)
        self._process.join(20)
        self._process.kill()


def tuned_experts(count: int) -> list[dict[int, list[int]]]:
    """The tuned experts by layer (1 to 26) of the first adapters of table 1, chosen at random."""
    found = []
    for index, sizes in enumerate(table_1(count)):
        draw = random.Random(1000 + index)
        found.append({layer + 1: sorted(draw.sample(range(EXPERTS), size)) for layer, size in enumerate(sizes)})
    return found


def owners_of(batch: int, adapters: int, alpha: float, seed: int) -> list[Owner]:
    """Requests' adapters by popularity: adapter floor(N * u^(1/alpha)) with u uniform, stratified over the batch.

    alpha 1 is uniform; at 0.32 the first of two adapters has 80 % (the paper's section 5.3).
    """
    rng = np.random.default_rng(seed)
    u = (np.arange(batch) + rng.random(batch)) / batch
    chosen = np.minimum((adapters * u ** (1 / alpha)).astype(int), adapters - 1)
    return [Owner(int(a), int(a)) for a in rng.permutation(chosen)]


def on_base(owners: Sequence[Owner]) -> list[Owner]:
    """The same tasks without adapters."""
    return [Owner(owner.task) for owner in owners]


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, and the least and greatest of the rounds."""
    return statistics.median(values), min(values), max(values)


def measure_decode(plan: Plan, stock: Peer, ours: Peer, use: str, bandwidth: float) -> None:
    """Time per output token at full batches, everything on the base and with adapters."""
    cases: list[tuple[str, Any, list[Owner], int]] = []
    for batch in plan.batches:
        base = on_base(owners_of(batch, 20, 1.0, batch))
        cases += [("stock base", stock, base, batch), ("all on base", ours, base, batch)]
        for count in plan.counts:
            for alpha in plan.alphas:
                owners = owners_of(batch, count, alpha, batch)
                if use == "skewed":  # the base reads other rows for other tasks
                    cases.append((f"stock base, tasks of {count} alpha {alpha}", stock, on_base(owners), batch))
                cases.append((f"{count} adapters alpha {alpha}", ours, owners, batch))
    times: dict[tuple[str, int], list[float]] = {}
    for round_ in range(plan.rounds):
        for label, peer, owners, batch in cases if round_ % 2 == 0 else reversed(cases):
            found = peer("decode", owners, plan.steps, 32, 100 * round_ + batch)
            times.setdefault((label, batch), []).append(statistics.median(found))
    for label, peer, owners, batch in cases:
        if peer is stock:
            continue
        same = f"stock base, tasks of {label.replace(' adapters', '')}"
        if label == "all on base" or use == "uniform":
            same = "stock base"
        here, there = times[label, batch], times[same, batch]
        ratio = statistics.median([a / b for a, b in zip(here, there, strict=True)])
        value, low, high = spread(here)
        reference = statistics.median(there)
        case = f"{label}, {use} use, batch {batch}"
        plan.rows.append(Row(case, "time per token", value, "ms", low, high, reference))
        plan.rows.append(Row(case, "throughput", 1e3 * batch / value, "tokens/s", reference=1e3 * batch / reference))
        if label == "all on base":
            goal = "at most +1 %" if batch else None
            plan.rows.append(Row(case, "overhead", 100 * (ratio - 1), "%", goal=goal, met=ratio <= 1.01))
            continue
        distinct = ours("rpc", "bench_rows", [(o.task, o.slot) for o in owners], 8)
        more = (distinct[1] - distinct[0]) * MOE_LAYERS * EXPERT_BYTES
        explained = reference + 1e3 * more / bandwidth
        plan.rows.append(Row(case, "overhead", 100 * (ratio - 1), "%"))
        plan.rows.append(Row(case, "expert rows read a layer", distinct[1], "rows", reference=distinct[0]))
        full = batch == plan.batches[-1] and not plan.difference
        plan.rows.append(
            Row(
                case,
                "over what the extra bytes explain",
                100 * (value / explained - 1),
                "%",
                reference=explained,
                goal="at most 10 %" if full else None,
                met=value <= 1.1 * explained if full else None,
            )
        )


def measure_prompts(plan: Plan, stock: Peer, ours: Peer, use: str) -> None:
    """Time to the first token of one prompt on an idle engine."""
    for length in plan.prompts:
        cases = [("stock", stock, Owner(3)), ("all on base", ours, Owner(3)), ("one adapter", ours, Owner(3, 3))]
        times: dict[str, list[float]] = {}
        for round_ in range(plan.rounds):
            for label, peer, owner in cases:
                found = peer("first_token", owner, length, 6, 1000 * round_ + length)
                times.setdefault(label, []).append(statistics.median(found[1:]))
        for label in ("all on base", "one adapter"):
            value, low, high = spread(times[label])
            reference = statistics.median(times["stock"])
            case = f"{label}, {use} use, prompt of {length}"
            plan.rows.append(Row(case, "time to first token", value, "ms", low, high, reference))
            plan.rows.append(Row(case, "overhead", 100 * (value / reference - 1), "%"))


def measure_poisson(plan: Plan, stock: Peer, ours: Peer, use: str) -> None:
    """20 adapters under Poisson arrivals, against the base alone under the very same."""
    # Uniform popularity reads the most rows; the most uneven one at the highest rate alone, for the sake of time.
    for alpha in {plan.alphas[0], plan.alphas[-1]}:
        for rate in plan.rates if alpha == 1 else plan.rates[-1:]:
            rng = np.random.default_rng(SEED + rate)
            arrivals = np.cumsum(rng.exponential(1 / rate, int(3 * rate * plan.poisson_s)))
            arrivals = arrivals[arrivals < plan.poisson_s]
            owners = owners_of(len(arrivals), max(plan.counts), alpha, rate)
            here = ours("poisson", arrivals.tolist(), owners, 512, 128, rate)
            there = stock("poisson", arrivals.tolist(), on_base(owners), 512, 128, rate)
            for index, metric in enumerate(("time to first token", "time per token")):
                mine, theirs = (np.array([r[index] for r in results]) for results in (here, there))
                case = f"{max(plan.counts)} adapters alpha {alpha}, {use} use, {rate} requests/s"
                value, reference = float(mine.mean()), float(theirs.mean())
                draws = [_resampled(mine, theirs, i) for i in range(400)]
                low, high = np.percentile(draws, [2.5, 97.5])
                over = 100 * (value / reference - 1)
                plan.rows.append(Row(case, metric, value, "ms", reference=reference))
                plan.rows.append(
                    Row(
                        case, f"{metric}, overhead", over, "%", float(low), float(high), None, "at most +4 %", over <= 4
                    )
                )


def _resampled(mine: np.ndarray, theirs: np.ndarray, seed: int) -> float:
    index = np.random.default_rng(seed).integers(len(mine), size=len(mine))
    return float(100 * (mine[index].mean() / theirs[index].mean() - 1))


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
            layers = draw.sample(range(1, MOE_LAYERS + 1), 4)
            some = {layer: sorted(draw.sample(range(EXPERTS), draw.randint(1, 5))) for layer in layers}
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


_begun = time.perf_counter()


def _mark(text: str) -> None:
    print(f"[{time.perf_counter() - _begun:6.1f} s] {text}", flush=True)


def measure(plan: Plan, stock: Peer, ours: Peer, memory: Path, finished: Callable[[], object]) -> None:
    """Every part of the plan with one way to store rows."""
    slots = 20
    tuned = tuned_experts(slots)
    for use in plan.uses:
        for peer in (stock, ours):
            peer("plant", tuned, use == "skewed", SEED)
        if use == plan.uses[0]:
            ours("warm_up")
            stock("warm_up")
            if "exactness" in plan.parts:
                check_exactness(plan, stock, ours, tuned)
                _mark("exactness")
            for slot, adapter in enumerate(tuned):
                ours("load", slot, slot, {str(layer): ids for layer, ids in adapter.items()}, 1e-3)
            _mark(f"{slots} adapters: {ours('rpc', 'expertweave_memory')}")
            plan.bandwidth = plan.bandwidth or stock("rpc", "bench_bandwidth")
            plan.rows.append(Row("device copy", "bandwidth", plan.bandwidth / 1e12, "TB/s"))
        if "decode" in plan.parts:
            measure_decode(plan, stock, ours, use, plan.bandwidth)
            _mark(f"decode, {use}")
        if "prompts" in plan.parts:
            measure_prompts(plan, stock, ours, use)
            _mark(f"prompts, {use}")
        if "poisson" in plan.parts and use == plan.uses[-1]:
            measure_poisson(plan, stock, ours, use)
            _mark(f"Poisson, {use}")
        finished()
    if "loading" in plan.parts:
        ours("unload", slots - 1)
        measure_loading(plan, ours, tuned[0], memory)
        _mark("loading")
        finished()


def compare_formats(full: Path, differences: Plan) -> None:
    """How much of the overhead of whole rows is left with differences, at the same cases, each beside its own stock."""
    if not full.exists():
        return
    found = json.loads(full.read_text())["rows"]
    overhead = {row["case"]: row["value"] for row in found if row["metric"] == "overhead"}
    last = f"batch {differences.batches[-1]}"
    for row in list(differences.rows):
        whole = overhead.get(row.case, 0.0)
        if row.metric == "overhead" and row.case.startswith("20 adapters") and whole > 0:
            share, goal = row.value / whole, "at most 0.5" if row.case.endswith(last) else None
            met = share <= 0.5 if goal else None
            differences.rows.append(Row(row.case, "share of the overhead of whole rows", share, "", goal=goal, met=met))


def main(
    rows: Annotated[str, typer.Option(help="full, difference4, or both: full,difference4")] = "full,difference4",
    quick: Annotated[bool, typer.Option(help="few steps")] = False,
    out: Annotated[Path, typer.Option(help="folder of the results")] = RESULTS,
    memory: Annotated[Path, typer.Option(help="folder in memory for the adapter's files")] = Path("/dev/shm/adapter"),
) -> None:
    """Measure and write benchmarks/results/expertweave.json and expertweave_difference4.json."""
    arguments = {
        "model": str(SHAPE),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": 4608,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 8192,
        "kv_cache_memory_bytes": 3 << 30,
        "gpu_memory_utilization": 0.1,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 256, 512],
        "seed": 0,
    }
    command = f"python -m benchmarks.expertweave --rows {rows}"
    experts = sum(len(ids) for adapter in tuned_experts(20) for ids in adapter.values())
    stock = Peer("stock", arguments, None)
    plans: dict[str, Plan] = {}
    for name in rows.split(","):
        plan = plans[name] = Plan(difference=name == "difference4")
        if plan.difference:
            plan.counts, plan.alphas, plan.rates, plan.parts = (20,), (1.0,), (5,), ("exactness", "decode", "poisson")
        if quick:
            plan.rounds, plan.steps, plan.batches, plan.counts = 1, 20, (1, 32, 256), (20,)
            plan.alphas, plan.rates, plan.poisson_s = (1.0,), (3,), 6.0
        room = int(experts * EXPERT_BYTES * (0.28 if plan.difference else 1.0) * 1.02) + (1 << 30)
        settings = {"slots": 20, "experts_per_layer": E_MAX, "memory_bytes": room, "rows": name}
        ours = Peer(f"ours, {name}", arguments, settings)
        if len(plans) == 1:
            _mark(f"stock started in {stock.started():.0f} s")
        _mark(f"ours, {name}, started in {ours.started():.0f} s")
        file = "expertweave" if name == "full" else f"expertweave_{name}"
        measure(plan, stock, ours, memory, partial(write_results, file, command, plan.rows, out))
        ours.stop()
        if plan.difference:
            compare_formats(out / "expertweave.json", plan)
            write_results(file, command, plan.rows, out)
        print_table(plan.rows, f"ExpertWeave, rows {name}")
    stock.stop()


if __name__ == "__main__":
    typer.run(main)
