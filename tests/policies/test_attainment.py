"""Figures of a load by hand, and what their intervals cover."""

import math
import random

import pytest

from signalbox.policies.attainment import ALL, Outcome, figures, interval
from signalbox.policies.base import Policy, Slo

POLICIES = {"gold": Policy(slo=Slo(max_ttft_ms=100, max_tpot_ms=10, max_total_ms=500)), "bronze": Policy()}


def answered(policy: str, ttft_ms: float, tpot_ms: float = 5.0, total_ms: float = 300.0) -> Outcome:
    return Outcome(policy, 1.0, "answered", "", "a", ttft_ms, tpot_ms, total_ms, 0.5)


def test_figures_by_hand() -> None:
    outcomes = [
        answered("gold", 100.0),
        answered("gold", 101.0),
        answered("gold", 50.0, tpot_ms=11.0),
        answered("gold", 50.0, total_ms=501.0),
        Outcome("gold", 2.0, "shed", "shed_deadline"),
        Outcome("gold", 2.0, "unfinished"),
        answered("bronze", 1e6, 1e6, 1e6),
        Outcome("bronze", 3.0, "failed", "expert_failed"),
    ]
    found = figures(outcomes, POLICIES, 10.0)
    gold, bronze, whole = found["gold"], found["bronze"], found[ALL]
    assert (gold.offered, gold.answered, gold.unfinished, gold.shed, gold.kept) == (6, 4, 1, {"shed_deadline": 1}, 1)
    assert gold.attainment == pytest.approx(1 / 6)
    assert (gold.ttft_p50_ms, gold.cost_usd) == (100.0, 2.0)
    assert (bronze.attainment, bronze.failed) == (0.5, {"expert_failed": 1})
    assert (whole.offered, whole.kept, whole.goodput, whole.experts) == (8, 2, 0.2, {"a": 5})
    with pytest.raises(KeyError):
        figures([answered("silver", 1.0)], POLICIES, 1.0)
    assert math.isnan(figures([], POLICIES, 1.0)[ALL].attainment)


def test_the_interval_covers_where_requests_are_independent_and_where_they_come_in_runs() -> None:
    rng = random.Random(0)
    for together in (1, 10):
        covered = 0
        for _ in range(300):
            flags, times = [], []
            while len(flags) < 400:
                flag = float(rng.random() < 0.8)
                for _ in range(together):
                    times.append(len(flags) * 0.1)
                    flags.append(flag)
            low, high = interval(times, flags, 40.0)
            covered += low <= 0.8 <= high
        assert covered / 300 >= 0.9


def test_an_interval_of_all_kept_is_not_a_point() -> None:
    low, high = interval([0.0, 1.0, 2.0], [1.0, 1.0, 1.0], 3.0)
    assert 0.3 < low < 0.6
    assert high == 1.0
