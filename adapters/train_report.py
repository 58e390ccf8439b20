"""What an adapter is worth: scores of base and adapter on the same rows, with 95 % intervals and paired tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from signalbox.adapters.train_evaluate import RowScore

Z = 1.959964  # two-sided 95 %
RESAMPLES = 4000


def wilson(hits: int, rows: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927)."""
    if rows == 0:
        return 0.0, 1.0
    share, spread = hits / rows, Z * Z / rows
    middle = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(share * (1 - share) / rows + spread / (4 * rows))
    # Exact at the ends, where rounding would leave the share itself outside.
    return (max(0.0, middle - half) if hits else 0.0), (min(1.0, middle + half) if hits < rows else 1.0)


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> dict[str, Any]:
    """Exact paired test of two shares: rows gained, rows lost, two-sided p (McNemar, 1947, with the binomial)."""
    from scipy.stats import binomtest

    gained = sum(a and not b for b, a in zip(before, after, strict=True))
    lost = sum(b and not a for b, a in zip(before, after, strict=True))
    p = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return {"gained": gained, "lost": lost, "p": p}


def paired_bootstrap(
    before: NDArray[np.float64], after: NDArray[np.float64], weights: NDArray[np.float64], seed: int = 0
) -> dict[str, tuple[float, float, float]]:
    """Ratio of sums `before`, `after` (both over `weights`) and their difference: (value, low, high), rows redrawn.

    All arrays are float64 [rows]; the percentile bootstrap over `RESAMPLES` draws.
    """
    rows = len(weights)
    generator = np.random.default_rng(seed)
    drawn = np.empty((RESAMPLES, 3))
    stacked = np.stack([before, after, weights], axis=1)
    for i in range(RESAMPLES):
        drawn[i] = generator.multinomial(rows, np.full(rows, 1 / rows)) @ stacked
    first, second = drawn[:, 0] / drawn[:, 2], drawn[:, 1] / drawn[:, 2]
    total = stacked.sum(0)
    values = {
        "base": (total[0] / total[2], first),
        "adapter": (total[1] / total[2], second),
        "difference": ((total[1] - total[0]) / total[2], second - first),
    }
    return {
        name: (float(value), float(np.quantile(draws, 0.025)), float(np.quantile(draws, 0.975)))
        for name, (value, draws) in values.items()
    }


def compare(base: Sequence[RowScore], adapter: Sequence[RowScore]) -> dict[str, Any]:
    """Base and adapter on the same rows: accuracy, bits per byte and, where asked, the choice among all labels.

    Every figure is {base, adapter: [value, low, high], ...}; `beats` where the paired test leaves no doubt at 95 %.
    """
    figures: dict[str, Any] = {"rows": len(base), "accuracy": _shares([r.correct for r in base], _hits(adapter))}
    bits = paired_bootstrap(
        np.array([r.bits for r in base]),
        np.array([r.bits for r in adapter]),
        np.array([float(max(1, r.nbytes)) for r in base]),
    )
    figures["bits_per_byte"] = {name: list(value) for name, value in bits.items()} | {
        "beats": bits["difference"][2] < 0
    }
    chosen = [(b.chosen, a.chosen) for b, a in zip(base, adapter, strict=True) if b.chosen is not None]
    if chosen:
        figures["label_choice"] = _shares([bool(b) for b, _ in chosen], [bool(a) for _, a in chosen])
        figures["label_choice"]["rows"] = len(chosen)
    return figures


def _hits(rows: Sequence[RowScore]) -> list[bool]:
    return [row.correct for row in rows]


def _shares(before: list[bool], after: list[bool]) -> dict[str, Any]:
    test = mcnemar(before, after)
    out: dict[str, Any] = {
        name: [sum(hits) / len(hits), *wilson(sum(hits), len(hits))]
        for name, hits in (("base", before), ("adapter", after))
    }
    return out | {"mcnemar": test, "beats": test["p"] < 0.05 and test["gained"] > test["lost"]}
