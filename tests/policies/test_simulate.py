"""The simulation against what queueing theory says, and against what must always hold."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from signalbox.experts.catalog import Price
from signalbox.experts.speed_model import SpeedModel
from signalbox.policies.attainment import ALL
from signalbox.policies.base import Objective, Policy, Slo
from signalbox.policies.simulate import ExpertModel, Simulated, System, simulate
from signalbox.policies.simulate_load import Arrival, Bursts, Lengths, synthetic

STEADY = Bursts(factor=1.0)
MIX = {"gold": 0.2, "silver": 0.3, "bronze": 0.5}
TIERS = {
    name: Policy(
        slo=Slo(max_ttft_ms=ttft_ms, max_total_ms=ttft_ms + 2000),
        objective=Objective(quality=0, latency=1),
        priority=priority,
    )
    for name, ttft_ms, priority in (("gold", 800.0, 2), ("silver", 1600.0, 1), ("bronze", 3200.0, 0))
}
# 4 places, steps of 20 to 32 ms: some 7 requests/s of 16 tokens.
ENGINE = ExpertModel(
    "engine", SpeedModel(5000.0, 20.0, 4.0, jitter=0.1), Price(input=1.0, output=2.0), max_running=4, max_waiting=10_000
)
LENGTHS = Lengths((40, 400), (8, 24))
CAPACITY = ENGINE.speed.requests_per_s(4, 40, 14.5)


def run(factor: float, system: System = "signalbox", *, seconds: float = 120.0, seed: int = 1) -> Simulated:
    load = synthetic(factor * CAPACITY, seconds, MIX, lengths=LENGTHS, seed=seed)
    return simulate(load, [ENGINE], TIERS, system=system, seconds=seconds)


@pytest.mark.parametrize("use", [0.5, 0.8])
@pytest.mark.parametrize("system", ["fcfs", "signalbox"])
def test_one_place_waits_as_pollaczek_and_khinchine_say(use: float, system: System) -> None:
    """M/D/1: mean wait = use * service / (2 * (1 - use))."""
    service_s = 0.01
    expert = ExpertModel("one", SpeedModel(1e12, 1000 * service_s), max_running=1, max_waiting=10**6)
    load = synthetic(use / service_s, 600.0, {"plain": 1.0}, bursts=STEADY, lengths=Lengths((1, 1), (1, 1)), seed=3)
    done = simulate(load, [expert], {"plain": Policy()}, system=system, max_queued=10**6, max_wait_s=1e6)
    waits = [o.ttft_ms / 1000 - service_s for o in done.outcomes]
    assert all(o.status == "answered" for o in done.outcomes)
    assert sum(waits) / len(waits) == pytest.approx(use * service_s / (2 * (1 - use)), rel=0.05)


def test_a_batch_serves_what_its_arithmetic_says() -> None:
    """Far above capacity the engine finishes as many requests a second as `SpeedModel.requests_per_s` says."""
    expert = ExpertModel("engine", SpeedModel(1e9, 20.0, 2.0), max_running=8, max_waiting=10**6)
    load = synthetic(100.0, 60.0, {"plain": 1.0}, lengths=Lengths((4, 4), (10, 10)), seed=1)
    done = simulate(load, [expert], {"plain": Policy()}, system="fcfs", grace_s=0.0)
    answered = sum(o.status == "answered" for o in done.outcomes)
    assert answered / load[-1].at == pytest.approx(expert.speed.requests_per_s(8, 1, 10), rel=0.02)


@pytest.mark.parametrize("system", ["signalbox", "fcfs", "round_robin"])
@given(factor=st.floats(0.2, 3.0), seed=st.integers(0, 100), grace_s=st.sampled_from([0.0, 1.0, math.inf]))
@settings(max_examples=15, deadline=None)
def test_no_request_is_lost_or_doubled(system: System, factor: float, seed: int, grace_s: float) -> None:
    load = synthetic(factor * CAPACITY, 20.0, MIX, lengths=LENGTHS, seed=seed)
    experts = [ENGINE, ExpertModel("other", SpeedModel(1000.0, 50.0), max_running=2, max_waiting=5, replicas=2)]
    found = simulate(load, experts, TIERS, system=system, max_queued=8, grace_s=grace_s).figures(TIERS)
    for figures in found.values():
        shed = sum(figures.shed.values())
        assert figures.offered == figures.answered + shed + figures.unfinished
        assert figures.unfinished == 0 or grace_s < math.inf
        assert sum(figures.experts.values()) == figures.answered
        assert figures.kept <= figures.answered
    assert found[ALL].offered == len(load)
    assert found[ALL].offered == sum(f.offered for name, f in found.items() if name != ALL)
    assert found[ALL].kept == sum(f.kept for name, f in found.items() if name != ALL)


def test_the_same_seed_gives_the_same_result() -> None:
    assert run(1.5).outcomes == run(1.5).outcomes
    assert run(1.5).outcomes != run(1.5, seed=2).outcomes


def test_next_to_nothing_is_shed_well_below_capacity_and_much_well_above() -> None:
    def shed(factor: float) -> float:
        load = synthetic(factor * CAPACITY, 300.0, MIX, bursts=STEADY, lengths=LENGTHS, seed=5)
        found = simulate(load, [ENGINE], TIERS).figures(TIERS)[ALL]
        return sum(found.shed.values()) / found.offered

    assert shed(0.1) == 0.0
    assert shed(0.3) < 0.01
    assert shed(2.0) > 0.4


def test_the_lowest_tier_is_shed_first_and_the_highest_keeps_its_promise() -> None:
    found = run(1.5).figures(TIERS)
    assert found["gold"].attainment >= 0.95
    assert found["gold"].attainment > found["silver"].attainment > found["bronze"].attainment
    assert sum(found["bronze"].shed.values()) / found["bronze"].offered > 0.3
    assert found["gold"].ttft_p50_ms < found["bronze"].ttft_p50_ms


def test_those_of_greater_priority_start_first() -> None:
    """One place, taken; then bronze, silver and gold come, in this order, and none is in a hurry."""
    expert = ExpertModel("one", SpeedModel(1e9, 1000.0), max_running=1)
    names = ["bronze", "bronze", "silver", "gold"]
    load = [Arrival(at=0.1 * i, policy=p, prompt_bytes=4, max_tokens=1) for i, p in enumerate(names)]
    policies = {name: Policy(priority=i) for i, name in enumerate(("bronze", "silver", "gold"))}
    ended = [o.at + o.total_ms / 1000 for o in simulate(load, [expert], policies).outcomes]
    assert ended == pytest.approx([1.0, 4.0, 3.0, 2.0])


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5, 2.0])
def test_goodput_is_never_below_that_of_a_first_come_queue(factor: float) -> None:
    ours = run(factor, seconds=300.0).figures(TIERS)[ALL]
    theirs = run(factor, "fcfs", seconds=300.0).figures(TIERS)[ALL]
    assert ours.kept >= theirs.kept


def test_round_robin_takes_the_experts_in_turn() -> None:
    experts = [ExpertModel(name, SpeedModel(1e6, 10.0), max_waiting=10**6) for name in "ab"]
    load = synthetic(20.0, 10.0, MIX, lengths=LENGTHS)
    chosen = [o.expert for o in simulate(load, experts, TIERS, system="round_robin").outcomes]
    assert set(chosen[::2]) == {"a"} and set(chosen[1::2]) == {"b"}


@pytest.mark.parametrize(("look_s", "apart"), [(0.0, True), (0.25, False)])
def test_what_was_not_looked_at_since_is_not_known(look_s: float, apart: bool) -> None:
    """Two come within a moment: the second one knows of the first where the load is looked at for each."""
    experts = [ExpertModel(name, SpeedModel(1e6, 10.0, 5.0)) for name in "ab"]
    load = [Arrival(at=0.001 * i, policy="soon", prompt_bytes=4, max_tokens=8) for i in range(2)]
    policies = {"soon": Policy(objective=Objective(latency=1.0))}
    first, second = simulate(load, experts, policies, system="fcfs", look_s=look_s).outcomes
    assert (first.expert != second.expert) is apart


def test_predicted_quality_decides_where_the_policy_asks_for_it() -> None:
    experts = [
        ExpertModel("cheap", SpeedModel(1e6, 5.0), Price(output=1.0), quality=(0.4, 0.0)),
        ExpertModel("good", SpeedModel(1e6, 5.0), Price(output=9.0), quality=(0.8, 0.0)),
    ]
    policies = {"best": Policy(), "thrift": Policy(objective=Objective(quality=0.1, cost=1.0))}
    load = [
        Arrival(at=0.0, policy="best", prompt_bytes=40, max_tokens=4),
        Arrival(at=1.0, policy="thrift", prompt_bytes=40, max_tokens=4),
        Arrival(at=2.0, policy="best", prompt_bytes=40, max_tokens=4, quality={"cheap": 0.9, "good": 0.2}),
    ]
    done = simulate(load, experts, policies)
    assert [o.expert for o in done.outcomes] == ["good", "cheap", "cheap"]
    assert done.outcomes[0].cost_usd == pytest.approx(9.0 * 4 / 1e6)


def test_who_is_shed_at_one_expert_goes_to_the_next_that_has_a_place() -> None:
    """The cheap one is taken for a second; whoever cannot wait so long gets the dear one, if there may be a second."""
    experts = [
        ExpertModel("cheap", SpeedModel(1e9, 1000.0), Price(output=1.0), max_running=1),
        ExpertModel("dear", SpeedModel(1e9, 100.0), Price(output=9.0), max_running=1),
    ]
    load = [Arrival(at=0.0, policy="first", prompt_bytes=4, max_tokens=1)]
    load += [Arrival(at=0.1, policy="second", prompt_bytes=4, max_tokens=1)]
    for fallback in (0, 1):
        thrift = Policy(objective=Objective(cost=1.0), fallback=fallback)
        hasty = thrift.model_copy(update={"slo": Slo(max_total_ms=1500.0), "on_no_candidates": "cheapest"})
        hasty = hasty.model_copy(update={"min_quality": 0.9})  # nobody has it, so the cheapest is asked first
        second = simulate(load, experts, {"first": thrift, "second": hasty}).outcomes[1]
        assert (second.status, second.expert) == (("answered", "dear") if fallback else ("shed", ""))


def test_a_policy_that_would_rather_fail_is_refused() -> None:
    policy = Policy(slo=Slo(max_ttft_ms=1.0), on_no_candidates="fail")
    load = [Arrival(at=0.0, policy="hasty", prompt_bytes=40, max_tokens=4)]
    outcome = simulate(load, [ENGINE], {"hasty": policy}).outcomes[0]
    assert (outcome.status, outcome.reason) == ("shed", "no_candidate")


def test_a_pool_must_make_sense() -> None:
    with pytest.raises(ValueError, match="no expert"):
        simulate([], [], {})
    with pytest.raises(ValueError, match="one name"):
        simulate([], [ENGINE, ENGINE], {})
