"""A real encoder, and tables whose losses are planted: what a router should find in them is known."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from signalbox.router.encoder import DEFAULT_ENCODER, SentenceEncoder, load_encoder
from signalbox.router.table import Table

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
EXPERTS = ("sporty", "cook", "coder")
SUBJECTS = {
    "sport": ("football", "the referee", "a marathon runner", "the tennis final", "her swimming coach", "the league"),
    "kitchen": ("an onion soup", "the oven", "a sourdough loaf", "the pastry chef", "olive oil", "a cheese sauce"),
    "code": ("a python function", "the compiler", "a linked list", "the unit test", "an SQL query", "the regex"),
}
FRAMES = (
    "Explain {} to a beginner, number {}",
    "What should I know about {}? ({})",
    "Write two sentences about {} for issue {}",
    "Why does {} matter so much in case {}?",
)


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="session")
def encoder() -> SentenceEncoder:
    return load_encoder(DEFAULT_ENCODER)


def planted(rows: int = 360, *, signal: float = 1.0, noise: float = 0.15, seed: int = 0, scores: bool = False) -> Table:
    """Losses (bits per byte): 2 each, less `signal` for the expert whose subject the prompt has, plus noise."""
    rng = np.random.default_rng(seed)
    tasks = rng.choice(list(SUBJECTS), rows).tolist()
    prompts = [
        FRAMES[rng.integers(len(FRAMES))].format(SUBJECTS[task][rng.integers(6)], number)
        for number, task in enumerate(tasks)
    ]
    good = np.array([list(SUBJECTS).index(task) for task in tasks])
    losses = np.full((rows, 3), 2.0) + rng.normal(0, noise, (rows, 3))
    losses[np.arange(rows), good] -= signal
    measures = {"score": np.clip(0.2 + (2 - losses) * 0.5, 0, 1)} if scores else {"loss": np.maximum(losses, 0)}
    return Table(
        models=EXPERTS,
        prompt_id=[f"p{seed}-{i}" for i in range(rows)],
        prompt=prompts,
        task=tasks,
        measures=measures,
    )
