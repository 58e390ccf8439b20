"""The caller's knobs that bear on policies: intent, samples, priority."""

from __future__ import annotations

from typing import Any

import pytest

from signalbox.experts.base import InvalidRequest
from signalbox.policies.base import Policy
from signalbox.serving.options import Options, parse_options, priority_of


def test_intent_and_samples() -> None:
    assert parse_options({"intent": "fraud", "samples": 3}) == Options(intent="fraud", samples=3)
    assert parse_options(None).intent is None and parse_options({}).samples is None


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ({"samples": 0}, "signalbox.samples"),
        ({"samples": 17}, "signalbox.samples"),
        ({"samples": True}, "signalbox.samples"),
        ({"samples": "3"}, "signalbox.samples"),
        ({"samples": 2.0}, "signalbox.samples"),
        ({"intent": ""}, "signalbox.intent"),
        ({"intent": 3}, "signalbox.intent"),
        ({"intent": "x" * 65}, "signalbox.intent"),
        ({"intents": "fraud"}, "signalbox.intents"),
    ],
)
def test_what_is_no_intent_or_number_of_samples(value: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_options(value)
    assert caught.value.status == 400 and caught.value.param == param


@pytest.mark.parametrize(
    ("header", "priority"),
    [(None, 2), (b"2", 2), (b"1", 1), (b"-10", -10), (b"+1", 1), (b"0", 0), (b"3", 2), (b"10", 2)],
)
def test_priority_can_only_be_lowered(header: bytes | None, priority: int) -> None:
    headers = {} if header is None else {b"x-priority": header}
    assert priority_of(headers, Policy(priority=2)) == priority


@pytest.mark.parametrize("header", [b"", b"high", b"1.0", b"11", b"-11", b"1e1", b"0x1", b" 1", b"\xff", b"9" * 5000])
def test_a_bad_priority(header: bytes) -> None:
    with pytest.raises(InvalidRequest) as caught:
        priority_of({b"x-priority": header}, Policy())
    assert caught.value.status == 400 and caught.value.param == "x-priority"
