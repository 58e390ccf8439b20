"""`/v1/policies`: read, put, delete, validate, list the versions and go back to one.

Every reply about a policy has its ETag; `If-Match` and `If-None-Match` are as in RFC 9110, section 13.1.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import yaml

from signalbox.experts.base import InvalidRequest
from signalbox.policies.base import Policy
from signalbox.serving.config_source import ConfigError, Problem, dotted, nearest, parse_yaml
from signalbox.serving.exchange import Exchange, Handler, Headers
from signalbox.serving.policy_check import MAX_PROBLEMS, MAX_TEXT, check_policy, invalid, read_policy
from signalbox.serving.policy_records import MAX_BYTES, content
from signalbox.serving.policy_table import PolicyRecord, PolicyTable, check_name, not_found
from signalbox.serving.protocols.fields import integer
from signalbox.serving.protocols.openai import parse_json

MAX_BODY_BYTES = 2 * MAX_BYTES  # with YAML's comments and spaces
MAX_DEPTH = 16  # of YAML

_YAML = frozenset({"application/yaml", "application/x-yaml", "text/yaml", "text/x-yaml"})
_JSON = frozenset({"application/json", "application/x-www-form-urlencoded", ""})  # curl's default says nothing
_ROOT = "/v1/policies/"
_ETAG = re.compile(r'\s*((?:W/)?"[\x21\x23-\x7e]*")\s*(?:,|$)')


class PolicyApi:
    """Handlers of the policy routes: `routes` by path, `named` for what is below `/v1/policies/`.

    `experts` gives the names that may be asked for now, `admin` raises `InvalidRequest` (403) where a caller may not
    change policies; reading and validating is everybody's who may ask at all.
    """

    def __init__(
        self, table: PolicyTable, experts: Callable[[], Collection[str]], admin: Callable[[Exchange], None]
    ) -> None:
        self._table = table
        self._experts = experts
        self._admin = admin
        self.routes: dict[str, dict[str, Handler]] = {
            "/v1/policies": {"GET": self._list},
            "/v1/policies/validate": {"POST": self._validate},
        }
        self.named: dict[str, Handler] = {
            "GET": self._get,
            "PUT": self._put,
            "DELETE": self._delete,
            "POST": self._post,
        }

    # -- reading -----------------------------------------------------------------------------------------------

    async def _list(self, exchange: Exchange) -> None:
        tag = f"table-{self._table.generation}"
        if _unchanged(exchange, tag):
            await _not_modified(exchange, tag)
            return
        found = (self._table.get(name) for name in self._table.names())
        data = [_described(record) for record in found if record is not None]
        await exchange.reply(200, {"object": "list", "data": data}, [_etag(tag)])

    async def _get(self, exchange: Exchange) -> None:
        name, action = _place(exchange)
        if action == "versions":
            records = await self._table.versions(name)
            tag, body = f"versions-{records[0].etag}", {"object": "list", "data": [_described(r) for r in records]}
        elif action:
            raise _no_route(exchange, action, ("versions",))
        else:
            record = self._record(name)
            tag, body = record.etag, _described(record)
        if _unchanged(exchange, tag):
            await _not_modified(exchange, tag)
        else:
            await exchange.reply(200, body, [_etag(tag)])

    def _record(self, name: str) -> PolicyRecord:
        record = self._table.get(name)
        if record is None:
            raise not_found(name)
        return record

    # -- changing ----------------------------------------------------------------------------------------------

    async def _put(self, exchange: Exchange) -> None:
        self._admin(exchange)
        name, action = _place(exchange)
        if action:
            raise _no_route(exchange, action, ())
        policy, problems, _ = await self._read(exchange)
        check_name(name)
        if policy is None or problems:
            raise invalid(problems, f"policy '{name}'")
        none_match = exchange.headers.get(b"if-none-match")
        if none_match is not None and none_match.strip() != b"*":
            raise InvalidRequest(
                "If-None-Match takes * alone here; to change a certain version use If-Match", param="If-None-Match"
            )
        record, created = await self._table.put(
            name, policy, if_match=_if_match(exchange), if_none_match=none_match is not None
        )
        headers: Headers = [_etag(record.etag)]
        if created:
            headers.append((b"location", f"{_ROOT}{name}".encode()))
        await exchange.reply(201 if created else 200, _described(record), headers)

    async def _delete(self, exchange: Exchange) -> None:
        self._admin(exchange)
        name, action = _place(exchange)
        if action:
            raise _no_route(exchange, action, ())
        await self._table.delete(name, if_match=_if_match(exchange))
        await exchange.start(204, [])
        await exchange.send(b"", more=False)

    async def _post(self, exchange: Exchange) -> None:
        name, action = _place(exchange)
        if action == "validate":
            check_name(name)
            await self._validate(exchange)
        elif action == "rollback":
            await self._rollback(exchange, name)
        else:
            raise _no_route(exchange, action, ("rollback", "validate"))

    async def _rollback(self, exchange: Exchange, name: str) -> None:
        self._admin(exchange)
        body = parse_json(await exchange.body(MAX_BODY_BYTES))
        for field in body:
            if field != "version":
                raise InvalidRequest(
                    f"there is no field '{field[:64]}'; {nearest(field, ['version'])}", param=field[:64]
                )
        version = integer(body, "version", low=1, high=1 << 53)
        record = await self._table.rollback(name, version, if_match=_if_match(exchange))
        await exchange.reply(200, _described(record), [_etag(record.etag)])

    async def _validate(self, exchange: Exchange) -> None:
        policy, problems, warnings = await self._read(exchange)
        valid = policy is not None and not problems
        said = {"valid": valid, "problems": _listed(problems), "warnings": _listed(warnings)}
        await exchange.reply(200, said)

    async def _read(self, exchange: Exchange) -> tuple[Policy | None, list[Problem], list[Problem]]:
        """The body's policy, its problems and its warnings. Raises `InvalidRequest` on what is no document at all."""
        data = await exchange.body(MAX_BODY_BYTES)
        kind = exchange.headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
        if kind in _YAML:
            value = await asyncio.to_thread(_parse_yaml, data)  # in pure Python: too slow for the event loop
        elif kind in _JSON:
            value = parse_json(data)
        else:
            raise InvalidRequest(
                f"a policy is sent as application/json or application/yaml, not as {kind[:64]}",
                param="Content-Type",
                code="unsupported_media_type",
                status=415,
            )
        policy, problems = read_policy(value)
        if policy is None:
            return None, problems, []
        found = check_policy(policy, self._experts())
        return policy, found.problems, found.warnings


def _place(exchange: Exchange) -> tuple[str, str]:
    """NAME and ACTION of `/v1/policies/NAME[/ACTION]`."""
    name, _, action = exchange.path.removeprefix(_ROOT).partition("/")
    return name, action


def _no_route(exchange: Exchange, action: str, known: tuple[str, ...]) -> InvalidRequest:
    """404 for a path that is none, 405 for one that takes another method."""
    path = exchange.path[:256]
    if action in ("versions", "rollback", "validate", ""):
        exchange.allow = {"": "GET, PUT, DELETE", "versions": "GET"}.get(action, "POST")
        text = f"{path} takes {exchange.allow}, not {exchange.method[:16]}"
        return InvalidRequest(text, code="method_not_allowed", status=405)
    hint = f"; {nearest(action[:64], list(known))}" if known else ""
    return InvalidRequest(f"there is no route {path}{hint}", code="not_found", status=404)


def _described(record: PolicyRecord) -> dict[str, Any]:
    """A version as the API tells it. Time in seconds since 1970."""
    return {
        "object": "policy",
        "name": record.name,
        "version": record.version,
        "etag": record.etag,
        "updated_at": record.updated_at or None,
        "note": record.note,
        "deleted": record.deleted,
        "policy": content(record.policy),
    }


def _listed(problems: list[Problem]) -> list[dict[str, str]]:
    return [{"param": dotted(p.path)[:MAX_TEXT], "message": p.text[:MAX_TEXT]} for p in problems[: 5 * MAX_PROBLEMS]]


def _parse_yaml(data: bytes) -> dict[str, Any]:
    """Raises `InvalidRequest`."""
    try:
        text = data.decode()
        _refuse_bombs(text)
    except UnicodeDecodeError:
        raise InvalidRequest("the body is not UTF-8 text", code="invalid_yaml") from None
    except yaml.YAMLError:
        pass  # told below, with its line
    try:
        return parse_yaml(text, Path("line")).data
    except ConfigError as error:
        said = "; ".join(message[:MAX_TEXT] for message in error.messages[:MAX_PROBLEMS])
        raise InvalidRequest(f"the body cannot be read as YAML: {said}", code="invalid_yaml") from None


def _refuse_bombs(text: str) -> None:
    """What is small to send and takes long, or much memory, to read. Raises `InvalidRequest`."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            text = "the body has YAML aliases (*name): write out what they stand for"
            raise InvalidRequest(text, code="invalid_yaml")
        if depth > MAX_DEPTH:
            raise InvalidRequest("the body is nested too deeply", code="invalid_yaml")


# -- conditions ------------------------------------------------------------------------------------------------


def _etag(tag: str) -> tuple[bytes, bytes]:
    return b"etag", f'"{tag}"'.encode()


def _if_match(exchange: Exchange) -> tuple[str, ...] | None:
    """The etags that the current version must have one of, `*` among them for any. Weak ones match nothing here."""
    given = exchange.headers.get(b"if-match")
    if given is None:
        return None
    tags = _tags(given, "If-Match")
    return ("*",) if tags == ["*"] else tuple(t[1:-1] for t in tags if not t.startswith("W/") and t != '"*"')


def _unchanged(exchange: Exchange, tag: str) -> bool:
    """Whether the client has it already (`If-None-Match`)."""
    given = exchange.headers.get(b"if-none-match")
    if given is None:
        return False
    return any(found in ("*", f'"{tag}"') for found in (t.removeprefix("W/") for t in _tags(given, "If-None-Match")))


def _tags(header: bytes, name: str) -> list[str]:
    """`*`, or the entity tags of a list, in their quotes. Raises `InvalidRequest`."""
    text = header.decode("latin-1").strip()
    if text == "*":
        return ["*"]
    tags, place = [], 0
    while place < len(text):
        match = _ETAG.match(text, place)
        if match is None:
            break
        tags.append(match[1])
        place = match.end()
    if not tags or place < len(text):
        raise InvalidRequest(f'{name} has * or ETags in double quotes, "a", "b", as the replies have them', param=name)
    return tags


async def _not_modified(exchange: Exchange, tag: str) -> None:
    await exchange.start(304, [_etag(tag)])
    await exchange.send(b"", more=False)
