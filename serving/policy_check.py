"""Policies as they come in: read strictly, with the nearest right key, and held against the pool."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from signalbox.experts.base import InvalidRequest
from signalbox.experts.catalog import matches
from signalbox.policies.base import Policy, Slo
from signalbox.serving.config_source import ConfigSource, KeyPath, Problem, describe, dotted, nearest
from signalbox.serving.protocols.fields import kind_of

MAX_PROBLEMS = 20  # that a message lists
MAX_TEXT = 300  # characters of one of them: it may quote what was sent


@dataclass(slots=True)
class Findings:
    """What is wrong with a policy (it is refused), and what is odd but usable."""

    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)


def read_policy(value: Any) -> tuple[Policy | None, list[Problem]]:
    """The policy in plain types that a JSON or YAML document holds, or None and every problem found."""
    if not isinstance(value, dict):
        return None, [Problem((), f"a policy must be a mapping with keys such as `slo`, not {kind_of(value)}")]
    source = ConfigSource(Path("policy"), value)
    problems = [Problem(path, "must be a finite number") for path in _not_finite(value)]
    try:
        policy = Policy.model_validate(value)
    except ValidationError as error:
        found = error.errors(include_url=False)
        problems += [describe(Policy, source, item) for item in found[: 5 * MAX_PROBLEMS]]
        return None, problems
    return (None if problems else policy), problems


def parse_policy(value: Any, where: str = "policy") -> Policy:
    """The policy, strictly; `where` begins the message.

    Raises `InvalidRequest` (400, `invalid_policy`) that lists every problem; its `param` is the first one's key.
    """
    policy, problems = read_policy(value)
    if policy is None:
        raise invalid(problems, where)
    return policy


def invalid(problems: list[Problem], where: str = "policy") -> InvalidRequest:
    """The error that lists these problems."""
    shown = "; ".join(line_of(problem) for problem in problems[:MAX_PROBLEMS])
    if len(problems) > MAX_PROBLEMS:
        shown += f"; and {len(problems) - MAX_PROBLEMS} more"
    param = dotted(problems[0].path)[:MAX_TEXT] if problems[0].path else where
    return InvalidRequest(f"{where}: {shown}", param=param, code="invalid_policy")


def line_of(problem: Problem) -> str:
    """`slo.max_ttft: unknown key; did you mean 'max_ttft_ms'?`."""
    said = f"{dotted(problem.path)}: {problem.text}" if problem.path else problem.text
    return said if len(said) <= MAX_TEXT else said[: MAX_TEXT - 1] + "…"


def _not_finite(value: Any, path: KeyPath = ()) -> Iterator[KeyPath]:
    """Where YAML's .inf and .nan stand: no limit is one, and JSON cannot keep them."""
    if isinstance(value, float) and not math.isfinite(value):
        yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in children:
        yield from _not_finite(item, (*path, key))


def check_policy(policy: Policy, experts: Collection[str] | None) -> Findings:
    """What only the pool can tell, and contradictions: a policy that names nobody, or that nobody can keep.

    `experts` are all names that may be asked for, adapters' among them; None: not known, so not asked.
    """
    found = Findings()
    _check_globs(found, (), policy.allowed, policy.denied, experts)
    _check_slo(found, ("slo",), policy.slo)
    _check_judge(found, ("parallel",), policy.parallel.judge, experts)
    for name, intent in policy.intents.items():
        place = ("intents", name)
        if intent.allowed is not None:
            _check_globs(found, place, intent.allowed, policy.denied, experts)
        if intent.slo is not None:
            _check_slo(found, (*place, "slo"), intent.slo)
        if intent.parallel is not None:
            _check_judge(found, (*place, "parallel"), intent.parallel.judge, experts)
        if not intent.keywords and not intent.examples:
            text = "has neither keywords nor examples: only requests that name it (`signalbox.intent`) have it"
            found.warnings.append(Problem(place, text))
    return found


def _check_globs(
    found: Findings, place: KeyPath, allowed: tuple[str, ...], denied: tuple[str, ...], experts: Collection[str] | None
) -> None:
    if not allowed:
        found.problems.append(Problem((*place, "allowed"), "names no expert: no request could be answered"))
    if not allowed or experts is None:
        return
    globs = [("allowed", glob) for glob in allowed] + [("denied", glob) for glob in denied if not place]
    for key, glob in globs:
        if not any(matches(name, [glob]) for name in experts):
            text = f"'{glob}' fits none of the experts; {nearest(glob, sorted(experts))}"
            found.warnings.append(Problem((*place, key), text))
    wanted = [name for name in experts if matches(name, allowed)]
    if wanted and all(matches(name, denied) for name in wanted):
        text = "every expert that it names is denied: no request could be answered"
        found.problems.append(Problem((*place, "allowed"), text))


def _check_slo(found: Findings, place: KeyPath, slo: Slo) -> None:
    total = slo.max_total_ms
    for key in ("max_ttft_ms", "max_tpot_ms"):
        part = getattr(slo, key)
        if total is not None and part is not None and total < part:
            text = f"{total:g} is less than {key} ({part:g}): raise it, or leave {key} out"
            found.problems.append(Problem((*place, "max_total_ms"), text))


def _check_judge(found: Findings, place: KeyPath, judge: str | None, experts: Collection[str] | None) -> None:
    if judge is not None and experts is not None and judge not in experts:
        text = f"there is no expert '{judge[:64]}'; {nearest(judge, sorted(experts))}"
        found.problems.append(Problem((*place, "judge"), text))
