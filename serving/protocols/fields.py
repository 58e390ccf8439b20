"""Reading typed fields of a JSON body; each error names the field and says what it must be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from signalbox.experts.base import InvalidRequest


def is_int(value: Any) -> bool:
    """Whether it is a JSON integer (in Python, true and false are integers too)."""
    return isinstance(value, int) and not isinstance(value, bool)


def boolean(body: Mapping[str, Any], name: str) -> bool:
    """An optional boolean, false where it is absent or null."""
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise InvalidRequest(f"'{name}' must be true or false, not {kind_of(value)}", param=name)
    return bool(value)


def integer(body: Mapping[str, Any], name: str, low: int, high: int, default: int | None = None) -> int:
    """An integer from `low` to `high`; `default`, if given, where it is absent or null."""
    value = body.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidRequest(f"'{name}' must be an integer, not {kind_of(value)}", param=name)
    if not low <= value <= high:
        raise InvalidRequest(f"'{name}' must be from {low} to {high}, not {value}", param=name)
    return value


def number(
    body: Mapping[str, Any], name: str, low: float, high: float, default: float, *, above: bool = False
) -> float:
    """A number from `low` to `high` (`above`: without `low` itself); `default` where it is absent or null."""
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(f"'{name}' must be a number, not {kind_of(value)}", param=name)
    if not low <= value <= high or (above and value == low):
        bounds = f"above {low} and at most {high}" if above else f"from {low} to {high}"
        raise InvalidRequest(f"'{name}' must be {bounds}, not {value}", param=name)
    return float(value)


def shown(value: Any) -> str:
    """A value for messages: short strings in quotes, of anything else only what kind it is."""
    return f"'{value[:32]}'" if isinstance(value, str) and value else kind_of(value)


def kind_of(value: Any) -> str:
    """What a JSON value is, for messages."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string" if value else "an empty string"
        case list():
            return "a list" if value else "an empty list"
    return "an object"
