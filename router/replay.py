"""Replay of online learning on a table: what would have come of it, had outcomes been reported one after the other.

Rows come in random order as requests. The online router chooses by predicted quality (no costs, no ceilings), now and
then another expert by the posterior as `explore` and `max_loss` bound it, and learns the chosen expert's score alone.
The oracle and the frozen shipped artifact are judged on the same rows by all their scores, which nobody learns.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from signalbox.router.base import Predictor, Prompt
from signalbox.router.online import Event, Learning, OnlineRouter, Outcome, corrected, features_of, probability_best
from signalbox.router.table import Table, TableError

Poison = Literal["random", "inverted"]
ENCODE = 256  # prompts predicted at once


@dataclass(frozen=True)
class Poisoning:
    """False outcomes from a share `begin` of all requests to a share `end`: drawn from [0, 1], or 1 - score."""

    kind: Poison
    begin: float = 0.25
    end: float = 0.75


@dataclass(frozen=True)
class Window:
    """Means over successive requests. Regret is the oracle's score less that of the expert chosen."""

    requests: int
    quality: float
    regret: float
    frozen_regret: float
    gain: float
    gain_se: float
    explored: float
    poisoned: bool


@dataclass(frozen=True)
class Replay:
    """A replay's figures: in all, and in windows in the order of the requests. `gain` is over the frozen artifact."""

    requests: int
    quality: float
    frozen_quality: float
    oracle: float
    best_single: float
    gain: float
    gain_se: float
    explored: float
    rollbacks: list[tuple[int, Event]]
    windows: list[Window]
    learning: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)


def replay(
    base: Predictor,
    table: Table,
    *,
    version: str = "",
    rounds: int = 1,
    explore: float = 0.1,
    max_loss: float = 0.05,
    poisoning: Poisoning | None = None,
    windows: int = 10,
    seed: int = 0,
    learning: Learning | None = None,
) -> Replay:
    """Play the complete rows of `table` `rounds` times, each time in another random order.

    At most the share `explore` of requests goes to another expert than the one predicted best, one that is predicted
    to be worse by `max_loss` at most. Raises `TableError` where the table lacks an expert or has fewer rows than
    windows.
    """
    rows = table.pool(base.experts).complete()
    if len(rows) < windows:
        raise TableError(f"{len(rows)} complete rows are too few for {windows} windows")
    prompts = [Prompt(text) for text in rows.prompt]
    parts = [features_of(base, prompts[i : i + ENCODE]) for i in range(0, len(prompts), ENCODE)]
    features = np.concatenate([own for _, own in parts])
    quality = np.concatenate([shipped.quality for shipped, _ in parts])
    uncertainty = np.concatenate([shipped.uncertainty for shipped, _ in parts])
    template = parts[0][0]

    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(len(rows)) for _ in range(rounds)])
    router = OnlineRouter(base, version=version, learning=learning)
    frozen = quality.argmax(axis=1)
    chosen = np.empty(len(order), dtype=np.intp)
    explored = np.zeros(len(order), dtype=bool)
    false = np.zeros(len(order), dtype=bool)
    rollbacks: list[tuple[int, Event]] = []
    for number, row in enumerate(order):
        one = slice(row, row + 1)
        shipped = type(template)(template.experts, quality[one], uncertainty[one], template.spread)
        predicted = corrected(shipped, features[one], router.state, router.learning)
        means, deviations = predicted.prediction.quality[0], predicted.deviation[0]
        e = greedy = int(means.argmax())
        if explore:
            e = _explore(means, deviations, greedy, explore, max_loss, rng.random())
        chosen[number], explored[number] = e, e != greedy
        score = float(rows.score[row, e])
        if poisoning is not None and poisoning.begin <= number / len(order) < poisoning.end:
            false[number] = True
            score = float(rng.random()) if poisoning.kind == "random" else 1.0 - score
        event = router.learn(
            Outcome(router.experts[e], features[row], float(quality[row, e]), float(uncertainty[row, e]), score)
        )
        if event:
            rollbacks.append((number, event))

    got = rows.score[order, chosen]
    shipped_got = rows.score[order, frozen[order]]
    top = rows.score[order].max(axis=1)
    groups = np.array_split(np.arange(len(order)), windows)
    return Replay(
        requests=len(order),
        quality=float(got.mean()),
        frozen_quality=float(shipped_got.mean()),
        oracle=float(top.mean()),
        best_single=float(rows.score.mean(axis=0).max()),
        gain=float((got - shipped_got).mean()),
        gain_se=_standard_error(got - shipped_got),
        explored=float(explored.mean()),
        rollbacks=rollbacks,
        windows=[
            Window(
                requests=len(g),
                quality=float(got[g].mean()),
                regret=float((top - got)[g].mean()),
                frozen_regret=float((top - shipped_got)[g].mean()),
                gain=float((got - shipped_got)[g].mean()),
                gain_se=_standard_error((got - shipped_got)[g]),
                explored=float(explored[g].mean()),
                poisoned=bool(false[g].any()),
            )
            for g in groups
        ],
        learning=router.describe(),
    )


def _explore(
    means: NDArray[np.float32], deviations: NDArray[np.float32], greedy: int, share: float, max_loss: float, draw: float
) -> int:
    """Thompson sampling among the experts within `max_loss`, off the greedy one with a chance of `share` at most."""
    able = np.flatnonzero(means >= means[greedy] - max_loss)
    if len(able) == 1:
        return greedy
    chances = probability_best(means[able].tolist(), deviations[able].tolist())
    others = able != greedy
    total = float(chances[others].sum())
    scaled = np.cumsum(chances[others] * min(1.0, share / total if total > 0 else 1.0))
    position = int(np.searchsorted(scaled, draw, side="right"))
    return int(able[others][position]) if position < len(scaled) else greedy


def _standard_error(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
