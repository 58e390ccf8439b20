"""How fast: decode at full batches, prompts, Poisson arrivals; see benchmarks/expertweave.py."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

from benchmarks.expertweave_engine import Owner
from benchmarks.expertweave_setup import SEED, Peer, Plan, on_base, owners_of, spread
from benchmarks.report import Row


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
        more = (distinct[1] - distinct[0]) * len(plan.shape.layers) * plan.shape.expert_bytes
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
    for alpha in dict.fromkeys((plan.alphas[0], plan.alphas[-1])):
        for rate in plan.rates if alpha == 1 else plan.rates[-1:]:
            here: list[tuple[float, float]] = []
            there: list[tuple[float, float]] = []
            for repeat in range(plan.repeats):
                seed = 100 * repeat + rate
                rng = np.random.default_rng(SEED + seed)
                arrivals = np.cumsum(rng.exponential(1 / rate, int(3 * rate * plan.poisson_s)))
                arrivals = arrivals[arrivals < plan.poisson_s]
                owners = owners_of(len(arrivals), max(plan.counts), alpha, seed)
                sides = [(here, ours, owners), (there, stock, on_base(owners))]
                for results, peer, whose in sides if repeat % 2 == 0 else reversed(sides):
                    results += peer("poisson", arrivals.tolist(), whose, 512, 128, seed)
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
