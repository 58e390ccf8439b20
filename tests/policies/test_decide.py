"""`decide` keeps its promises, for any pool (hypothesis) and in the cases that users meet."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signalbox.policies import (
    Candidate,
    NoCandidate,
    Objective,
    Policy,
    RequestShape,
    Slo,
    decide,
    objective_of_flags,
    objective_of_tradeoff,
    parse_flags,
)
from signalbox.policies.decide import slack_ms

SHAPE = RequestShape(prompt_bytes=400, answer_tokens=100)


def candidate(name: str, **changes: object) -> Candidate:
    facts: dict[str, object] = {
        "price_input": 1.0,
        "price_output": 2.0,
        "ttft_ms": 100.0,
        "tpot_ms": 10.0,
        "context_length": 8192,
        "parameters": 10**9,
        "released_ordinal": 739_000,
    }
    return Candidate(name=name, **(facts | changes))  # type: ignore[arg-type]


SMALL = candidate("small", price_input=0.1, price_output=0.2, ttft_ms=20, tpot_ms=2, parameters=10**8)
LARGE = candidate("large", price_input=5, price_output=15, parameters=10**11, released_ordinal=739_500)
QUALITY = {"small": (0.5, 0.05), "large": (0.7, 0.05)}

pools = st.lists(
    st.tuples(
        st.floats(0, 1), st.floats(0, 20), st.floats(1, 2000), st.floats(0.5, 200), st.booleans(), st.floats(0, 0.3)
    ),
    min_size=1,
    max_size=6,
).map(
    lambda rows: (
        [
            candidate(f"e{i}", price_input=cost, price_output=2 * cost, ttft_ms=ttft, tpot_ms=tpot, available=up)
            for i, (_, cost, ttft, tpot, up, _) in enumerate(rows)
        ],
        {f"e{i}": (row[0], row[5]) for i, row in enumerate(rows)},
    )
)
weights = st.builds(
    Objective,
    quality=st.floats(0, 2),
    cost=st.floats(0, 5),
    latency=st.floats(0, 5),
    size=st.floats(0, 1),
    age=st.floats(0, 1),
)
ceilings = st.builds(
    Slo,
    max_ttft_ms=st.none() | st.floats(1, 2000),
    max_total_ms=st.none() | st.floats(50, 20000),
    max_cost_per_1m=st.none() | st.floats(0, 20),
)


@given(pools, weights, ceilings, st.sampled_from(["fail", "cheapest", "best", "least_violated"]))
def test_no_ceiling_is_broken_while_an_expert_keeps_it(pool, objective, slo, on_none) -> None:
    candidates, prediction = pool
    policy = Policy(slo=slo, objective=objective, on_no_candidates=on_none)
    try:
        decision = decide(prediction, candidates, SHAPE, policy)
    except NoCandidate as none:
        assert all(r.strikes for r in none.ratings)
        return
    keepers = [r for r in decision.ratings if not r.strikes]
    chosen = next(r for r in decision.ratings if r.expert == decision.expert)
    if keepers:
        assert not chosen.strikes and not decision.violated
        assert chosen.utility == max(r.utility for r in keepers)
        assert all(name in {r.expert for r in keepers} for name in decision.fallbacks)
    else:
        assert decision.violated == [s.constraint for s in chosen.strikes]
        assert all(s.constraint.startswith("m") for s in chosen.strikes), "only ceilings and floors may bend"
    assert 0.0 <= decision.confidence <= 1.0


@given(pools, weights, ceilings, st.floats(0.01, 5))
def test_more_weight_on_cost_never_raises_cost(pool, objective, slo, more) -> None:
    candidates, prediction = pool
    dearer = objective.model_copy(update={"cost": objective.cost + more})
    try:
        before = decide(prediction, candidates, SHAPE, Policy(slo=slo, objective=objective))
    except NoCandidate:
        return
    after = decide(prediction, candidates, SHAPE, Policy(slo=slo, objective=dearer))
    cost = {r.expert: r.cost_usd for r in before.ratings}
    assert cost[after.expert] <= cost[before.expert] * (1 + 1e-6) + 1e-15


@given(pools, weights, ceilings, st.randoms())
def test_the_order_of_experts_does_not_matter(pool, objective, slo, random) -> None:
    candidates, prediction = pool
    shuffled = list(candidates)
    random.shuffle(shuffled)
    policy = Policy(slo=slo, objective=objective, on_no_candidates="cheapest", fallback=8)
    try:
        one = decide(prediction, candidates, SHAPE, policy)
    except NoCandidate:
        with pytest.raises(NoCandidate):
            decide(prediction, shuffled, SHAPE, policy)
        return
    assert one == decide(prediction, shuffled, SHAPE, policy)


def test_tradeoff_walks_from_the_best_to_the_cheapest() -> None:
    def choice(tradeoff: float) -> str:
        objective = objective_of_tradeoff(tradeoff)
        return decide(QUALITY, [SMALL, LARGE], SHAPE, Policy(), spread=0.2, objective=objective).expert

    assert choice(0) == "large"
    assert choice(10) == "small"
    choices = [choice(t / 2) for t in range(21)]
    assert choices == sorted(choices), "one change, from large to small"


@pytest.mark.parametrize("tradeoff", [-0.1, 10.1])
def test_tradeoff_has_bounds(tradeoff: float) -> None:
    with pytest.raises(ValueError, match="between 0"):
        objective_of_tradeoff(tradeoff)


@pytest.mark.parametrize(
    ("policy", "constraint"),
    [
        (Policy(slo=Slo(max_ttft_ms=50)), "max_ttft_ms"),
        (Policy(slo=Slo(max_tpot_ms=5)), "max_tpot_ms"),
        (Policy(slo=Slo(max_total_ms=500)), "max_total_ms"),
        (Policy(slo=Slo(max_cost_per_1m=1)), "max_cost_per_1m"),
        (Policy(slo=Slo(max_cost_per_request=0.0001)), "max_cost_per_request"),
        (Policy(denied=("lar*",)), "denied"),
        (Policy(allowed=("small",)), "allowed"),
    ],
)
def test_each_constraint_strikes_and_is_named(policy: Policy, constraint: str) -> None:
    decision = decide(QUALITY, [SMALL, LARGE], SHAPE, policy)
    assert decision.expert == "small"
    large = next(r for r in decision.ratings if r.expert == "large")
    assert [s.constraint for s in large.strikes] == [constraint]
    assert decision.fallbacks == []


def test_min_quality_context_and_readiness_strike() -> None:
    assert decide(QUALITY, [SMALL, LARGE], SHAPE, Policy(min_quality=0.6)).expert == "large"
    short = candidate("large", context_length=50)
    assert decide(QUALITY, [SMALL, short], SHAPE, Policy()).expert == "small"
    assert decide(QUALITY, [SMALL, candidate("large", available=False)], SHAPE, Policy()).expert == "small"
    assert decide({"small": (0.1, 0)}, [SMALL, LARGE], SHAPE, Policy()).expert == "small"


def test_nobody_left() -> None:
    impossible = Slo(max_ttft_ms=1)
    with pytest.raises(NoCandidate, match=r"small: max_ttft_ms 20 > 1"):
        decide(QUALITY, [SMALL, LARGE], SHAPE, Policy(slo=impossible, on_no_candidates="fail"))
    cheapest = decide(QUALITY, [SMALL, LARGE], SHAPE, Policy(slo=impossible, on_no_candidates="cheapest"))
    assert (cheapest.expert, cheapest.violated) == ("small", ["max_ttft_ms"])
    best = decide(QUALITY, [SMALL, LARGE], SHAPE, Policy(slo=impossible, on_no_candidates="best"))
    assert best.expert == "large"
    least = decide(QUALITY, [SMALL, LARGE], SHAPE, Policy(slo=impossible))
    assert (least.expert, least.violated) == ("small", ["max_ttft_ms"]), "20 ms are nearer to 1 ms than 100 ms"
    with pytest.raises(NoCandidate):
        decide(QUALITY, [], SHAPE, Policy())


def test_how_long_a_request_may_wait() -> None:
    """The nearest ceiling counts, less a tenth; one that cannot be kept by hurrying does not."""
    (small,) = decide(QUALITY, [SMALL], SHAPE, Policy()).ratings  # 20 ms, then 99 tokens of 2 ms: 218 ms
    assert slack_ms(small, Slo()) is None
    assert slack_ms(small, Slo(max_ttft_ms=100)) == pytest.approx(90 - 20)
    assert slack_ms(small, Slo(max_ttft_ms=1000, max_total_ms=500)) == pytest.approx(450 - 218)
    assert slack_ms(small, Slo(max_ttft_ms=21)) == 0, "it can be kept, but there is no time to lose"
    assert slack_ms(small, Slo(max_ttft_ms=10)) is None
    assert slack_ms(small, Slo(max_ttft_ms=10, max_total_ms=500)) == pytest.approx(450 - 218)
    (queued,) = decide(QUALITY, [candidate("small", ttft_ms=20, tpot_ms=2, wait_ms=500.0)], SHAPE, Policy()).ratings
    assert queued.ttft_ms == 520 and slack_ms(queued, Slo(max_ttft_ms=100)) == pytest.approx(70)


def test_confidence_grows_with_the_gap() -> None:
    narrow = decide({"small": (0.69, 0.1), "large": (0.7, 0.1)}, [SMALL, LARGE], SHAPE, Policy())
    wide = decide({"small": (0.2, 0.1), "large": (0.7, 0.1)}, [SMALL, LARGE], SHAPE, Policy())
    assert 0.5 < narrow.confidence < 0.6 < 0.99 < wide.confidence


@pytest.mark.parametrize(
    ("typed", "text", "wishes"),
    [
        ("What is 2+2? [Flag: smallest model]", "What is 2+2?", ["size"]),
        ("[flag: Lowest  Latency] hi", "hi", ["latency"]),
        ("hi [Flag: most recent] [Flag: cheapest]", "hi", ["age", "cost"]),
        ("hi [Flag: smallest model, lowest latency]", "hi", ["size", "latency"]),
        ("find it: [Flag: CTF{x}]", "find it: [Flag: CTF{x}]", []),
        ("no flags  here ", "no flags  here ", []),
    ],
)
def test_flags_are_parsed_off(typed: str, text: str, wishes: list[str]) -> None:
    assert parse_flags(typed) == (text, wishes)


def test_flags_decide() -> None:
    def choice(*wishes: str) -> str:
        objective = objective_of_flags(wishes, Objective())
        return decide(QUALITY, [SMALL, LARGE], SHAPE, Policy(), spread=0.2, objective=objective).expert

    assert choice() == "large"
    assert choice("size") == choice("latency") == choice("cost") == "small"
    assert choice("age") == "large"
    priced = objective_of_flags(["quality"], Objective(cost=9))
    assert decide(QUALITY, [SMALL, LARGE], SHAPE, Policy(), spread=0.2, objective=priced).expert == "large"
