"""The two pools of `benchmarks.sla`: their experts, their requests, and the weights of the three tiers."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.report import ROOT
from benchmarks.serving_processes import random_prompt
from signalbox.policies.simulate_load import Lengths
from signalbox.router.everyday_texts import THINGS, WHAT_IS

MIX = {"gold": 0.2, "silver": 0.3, "bronze": 0.5}
PRIORITIES = {"gold": 2, "silver": 1, "bronze": 0}
GATEWAYS = 2
QUEUE = 4096  # of each engine: with admission off everybody waits there, and nobody is refused


@dataclass(frozen=True)
class Pool:
    """A pool and its load. `places` of each expert; `seconds` of a run; `think` of the closed loop, seconds.

    `objectives` are the tiers' weights, `plain` those of the one policy that all ask for in a first-come queue.
    """

    name: str
    experts: dict[str, dict[str, Any]]
    places: dict[str, int]
    lengths: Lengths
    prompts: tuple[str, ...]
    objectives: Mapping[str, dict[str, float]]
    plain: dict[str, float]
    seconds: float
    think: float
    capacity_s: float
    router: Path | None = None

    def config(self, policies: Mapping[str, dict[str, Any]], *, admission: bool) -> dict[str, Any]:
        """A configuration file with these policies."""
        config: dict[str, Any] = {
            "server": {"gateways": GATEWAYS},
            "store": {"url": "embedded"},
            "experts": self.experts,
            "policies": dict(policies),
            "admission": {"enabled": admission},
        }
        if self.router is not None:
            config["routers"] = {"default": {"kind": "best", "artifact": str(self.router)}}
        return config


def quickstart() -> Pool:
    """The two models of examples/quickstart.yaml, without its adapters, each on a core of its own."""
    experts = yaml.safe_load((ROOT / "examples" / "quickstart.yaml").read_text())["experts"]
    places = {}
    for name, expert in experts.items():
        # Without stop strings, so that answers have the lengths that were asked for.
        expert |= {"threads": 1, "max_running": 8, "max_waiting": QUEUE, "max_adapters": 0, "stop": []}
        places[name] = 8
    return Pool(
        name="quickstart",
        experts=experts,
        places=places,
        lengths=Lengths(answer_tokens=(4, 16)),
        prompts=tuple(text.format(thing=thing) for thing in THINGS for text in WHAT_IS),
        objectives={
            "gold": {"quality": 1.0, "cost": 0.05},
            "silver": {"quality": 1.0, "cost": 0.3},
            "bronze": {"quality": 1.0, "cost": 1.0},
        },
        plain={"quality": 1.0, "latency": 1.0},
        seconds=25.0,
        think=0.2,
        capacity_s=10.0,
        router=ROOT / "routers" / "quickstart",
    )


def simulated() -> Pool:
    """Two engines of stated speed, which compute nothing: a fast dear one and a slow cheap one; no router."""
    engines = {
        "fast": {"prefill_tokens_per_s": 20_000, "step_ms": 15.0, "step_ms_per_request": 1.0},
        "slow": {"prefill_tokens_per_s": 10_000, "step_ms": 30.0, "step_ms_per_request": 1.0},
    }
    prices = {"fast": {"input": 0.5, "output": 1.0}, "slow": {"input": 0.1, "output": 0.2}}
    places = {"fast": 8, "slow": 16}
    latencies = {"fast": {"ttft_ms": 30, "tpot_ms": 15}, "slow": {"ttft_ms": 60, "tpot_ms": 30}}
    experts = {
        name: {"engine": "simulated", **speed, "jitter": 0.1, "price": prices[name], "latency": latencies[name]}
        | {"max_running": places[name], "max_waiting": QUEUE}
        for name, speed in engines.items()
    }
    rng = random.Random(0)
    return Pool(
        name="simulated",
        experts=experts,
        places=places,
        lengths=Lengths(answer_tokens=(8, 48)),
        prompts=tuple(random_prompt(rng, size) for size in range(40, 440, 2)),
        objectives={
            "gold": {"quality": 1.0, "latency": 1.0},
            "silver": {"quality": 1.0, "latency": 0.5, "cost": 0.5},
            "bronze": {"quality": 1.0, "cost": 1.0},
        },
        plain={"quality": 1.0, "latency": 1.0},
        seconds=20.0,
        think=0.05,
        capacity_s=6.0,
    )


POOLS = {"quickstart": quickstart, "simulated": simulated}
