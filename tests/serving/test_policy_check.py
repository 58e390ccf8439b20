"""Policies read strictly and held against a pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from signalbox.experts.base import InvalidRequest
from signalbox.policies.base import Policy
from signalbox.serving.config_source import ConfigError, dotted, parse_yaml
from signalbox.serving.policy_check import check_policy, parse_policy, read_policy

POOL = ["smollm2", "gemma", "smollm2:banking"]


@pytest.mark.parametrize(
    ("value", "param", "text"),
    [
        ({"slo": {"max_ttft": 800}}, "slo.max_ttft", "did you mean 'max_ttft_ms'?"),
        ({"prioritty": 1}, "prioritty", "did you mean 'priority'?"),
        ({"slo": {"max_ttft_ms": 0}}, "slo.max_ttft_ms", "must be greater than 0"),
        ({"cache": "semantic"}, "cache", "must be 'off' or 'exact'"),
        ({"budget": {"window": "1d"}}, "budget", "give usd, tokens or requests"),
        ({"budget": {"usd": 1, "window": "1 fortnight"}}, "budget.window", "30s, 15m, 1h, 1d"),
        ({"parallel": {"arbiter": "judge"}}, "parallel", "needs `judge: EXPERT`"),
        ({"intents": {"a b": {}}}, "intents.a b", "pattern"),
        ({"intents": {"sum": {"keyword": ["x"]}}}, "intents.sum.keyword", "did you mean 'keywords'?"),
        ({"allowed": "*"}, "allowed", "must be a list"),
        ({"slo": 5}, "slo", "must be a mapping"),
        ({"slo": {"max_ttft_ms": float("inf")}}, "slo.max_ttft_ms", "must be a finite number"),
        ({"objective": {"cost": float("nan")}}, "objective.cost", "must be a finite number"),
        (["gold"], "policy", "must be a mapping with keys such as `slo`, not a list"),
        ("gold", "policy", "not a string"),
    ],
)
def test_what_is_wrong_is_named(value: Any, param: str, text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_policy(value)
    error = caught.value
    assert (error.status, error.code, error.param) == (400, "invalid_policy", param)
    assert error.message.startswith("policy: ") and text in error.message


def test_all_problems_are_told_within_a_bound() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_policy({"slo": {"max_ttft_ms": -1}, "fallback": 99, "nonsense": 1}, where="policy 'gold'")
    for key in ("slo.max_ttft_ms", "fallback", "nonsense"):
        assert key in caught.value.message
    assert caught.value.message.startswith("policy 'gold': ")
    with pytest.raises(InvalidRequest) as caught:
        parse_policy({f"{'k' * 400}{i}": i for i in range(1000)})
    assert len(caught.value.message) < 8000 and "more" in caught.value.message


def test_a_good_one_is_read() -> None:
    policy, problems = read_policy({"budget": {"usd": 5, "window": "1d"}, "rate": {"requests_per_minute": 60}})
    assert problems == [] and policy is not None and policy.budget is not None and policy.budget.window == 86400


def findings(**said: Any) -> tuple[list[str], list[str]]:
    found = check_policy(Policy.model_validate(said), POOL)
    return [dotted(p.path) for p in found.problems], [dotted(p.path) for p in found.warnings]


def test_the_pool_is_asked() -> None:
    assert findings() == ([], [])
    assert findings(allowed=["smollm2*"]) == ([], [])
    assert findings(allowed=["gpt-*", "gemma"], denied=["clawde"]) == ([], ["allowed", "denied"])
    assert findings(allowed=["gemma"], denied=["g*"]) == (["allowed"], [])
    assert findings(allowed=[]) == (["allowed"], [])
    judge = {"samples": 3, "arbiter": "judge"}
    assert findings(parallel={**judge, "judge": "gemma"}) == ([], [])
    assert findings(parallel={**judge, "judge": "gema"}) == (["parallel.judge"], [])
    (problem,) = check_policy(Policy.model_validate({"parallel": {**judge, "judge": "gema"}}), POOL).problems
    assert "did you mean 'gemma'?" in problem.text


def test_ceilings_that_contradict_each_other() -> None:
    assert findings(slo={"max_total_ms": 500, "max_ttft_ms": 800}) == (["slo.max_total_ms"], [])
    assert findings(slo={"max_total_ms": 50, "max_tpot_ms": 80}) == (["slo.max_total_ms"], [])
    assert findings(slo={"max_total_ms": 800, "max_ttft_ms": 800}) == ([], [])


def test_intents_are_checked_as_what_they_replace() -> None:
    intent = {"keywords": ["sum"], "allowed": ["gpt*"], "slo": {"max_total_ms": 1, "max_ttft_ms": 2}}
    problems, warnings = findings(intents={"sums": intent, "empty": {}})
    assert problems == ["intents.sums.slo.max_total_ms"]
    assert warnings == ["intents.sums.allowed", "intents.empty"]
    assert findings(denied=["gemma"], intents={"x": {"keywords": ["x"], "allowed": ["gemma"]}})[0] == [
        "intents.x.allowed"
    ]


@pytest.mark.parametrize("text", ["a: \x00", "[" * 5000, "a: [", "- a", ""])
def test_texts_that_are_no_yaml_mapping(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, Path("f.yaml"))
    assert "f.yaml" in caught.value.messages[0]
