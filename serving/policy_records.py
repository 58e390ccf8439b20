"""Policies in the store: one record a version, written by compare-and-set, each name's history beside it.

`policies:table` has the policies that are in force, by name; `policies:history` the last versions of each, by
NAME/VERSION; `policies:numbers` the last version number of each name, which stays when the policy is deleted
(`policies:deleted` knows since when), so that no number comes twice. `policies:seeded` has what the configuration said
last, as a hash. `policies:meta` has the `generation`, milliseconds of the server's clock or more, which changes with
every write, the `highest` number of all names, and the `floor` above which a name that is new or forgotten begins.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import orjson
from pydantic import ValidationError

from signalbox.policies.base import Policy
from signalbox.serving.store import Store

KEYS = [f"policies:{part}" for part in ("meta", "table", "numbers", "deleted", "seeded", "history")]

MAX_POLICIES = 256  # as many as the configuration may have
MAX_DELETED = 256  # names whose history is kept after they were deleted
KEPT_VERSIONS = 50
MAX_BYTES = 64 * 1024  # of a policy as JSON

Verdict = Literal["ok", "stale", "full", "lost", "seeded"]
Kind = Literal["put", "delete", "mark"]

_COMMON = """
local meta, live, numbers, deleted, seeded, history = unpack(KEYS)
local function last(name)
  return tonumber(redis.call('HGET', numbers, name) or redis.call('HGET', meta, 'floor') or 0)
end
local function bump(known)
  local time = redis.call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  local next = math.max(now, tonumber(known or 0) + 1)
  redis.call('HSET', meta, 'generation', string.format('%.0f', next))
end
local function raise(field, value)
  redis.call('HSET', meta, field, math.max(value, tonumber(redis.call('HGET', meta, field) or 0)))
end
"""

_READ = (
    _COMMON
    + """
local generation = redis.call('HGET', meta, 'generation')
if not generation then return {'', 0} end
if generation == ARGV[1] then return {generation, 0} end
return {generation, tonumber(redis.call('HGET', meta, 'highest') or 0), redis.call('HGETALL', live)}
"""
)

_LAST = _COMMON + "return {last(ARGV[1]), redis.call('HGET', live, ARGV[1])}"

_HISTORY = (
    _COMMON
    + """
local fields, newest = {}, last(ARGV[1])
for version = newest, math.max(1, newest - tonumber(ARGV[2]) + 1), -1 do
  fields[#fields + 1] = ARGV[1] .. '/' .. version
end
if #fields == 0 then return {} end
return redis.call('HMGET', history, unpack(fields))
"""
)

# name, the number it had, record, kind, hash of what the configuration says, bounds.
_WRITE = (
    _COMMON
    + """
local name, number, record, kind, seed = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4], ARGV[5]
local most, most_deleted, kept = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
local function entry(of, version) return of .. '/' .. version end
local generation = redis.call('HGET', meta, 'generation')
if not generation then return 'lost' end
-- The reply to this very write was lost, and it came again.
if kind ~= 'mark' and redis.call('HGET', history, entry(name, number + 1)) == record then return 'ok' end
if seed ~= '' and redis.call('HGET', seeded, name) == seed then return 'seeded' end
if last(name) ~= number then return 'stale' end
if kind == 'put' and redis.call('HEXISTS', live, name) == 0 and redis.call('HLEN', live) >= most then return 'full' end
if seed ~= '' then redis.call('HSET', seeded, name, seed) end
if kind == 'mark' then return 'ok' end
if kind == 'put' then
  redis.call('HSET', live, name, record)
  redis.call('HDEL', deleted, name)
else
  redis.call('HDEL', live, name)
  bump(generation)
  redis.call('HSET', deleted, name, redis.call('HGET', meta, 'generation'))
end
redis.call('HSET', numbers, name, number + 1)
redis.call('HSET', history, entry(name, number + 1), record)
redis.call('HDEL', history, entry(name, number + 1 - kept))
raise('highest', number + 1)
bump(redis.call('HGET', meta, 'generation'))
while redis.call('HLEN', deleted) > most_deleted do  -- the one deleted first is forgotten
  local all, first, since = redis.call('HGETALL', deleted), nil, math.huge
  for i = 1, #all, 2 do
    if tonumber(all[i + 1]) < since then first, since = all[i], tonumber(all[i + 1]) end
  end
  local newest = last(first)
  raise('floor', newest)
  for version = newest, math.max(1, newest - kept + 1), -1 do redis.call('HDEL', history, entry(first, version)) end
  redis.call('HDEL', numbers, first)
  redis.call('HDEL', deleted, first)
end
return 'ok'
"""
)

# generation known, highest number known, count of seeds, then name and hash of each, then name, number, record.
_RESTORE = (
    _COMMON
    + """
if redis.call('HGET', meta, 'generation') then return 'ok' end
local seeds = tonumber(ARGV[3])
for i = 4, 3 + 2 * seeds, 2 do redis.call('HSET', seeded, ARGV[i], ARGV[i + 1]) end
for i = 4 + 2 * seeds, #ARGV, 3 do
  redis.call('HSET', live, ARGV[i], ARGV[i + 2])
  redis.call('HSET', numbers, ARGV[i], ARGV[i + 1])
  redis.call('HSET', history, ARGV[i] .. '/' .. ARGV[i + 1], ARGV[i + 2])
  raise('highest', tonumber(ARGV[i + 1]))
end
if tonumber(ARGV[2]) > 0 then
  raise('highest', tonumber(ARGV[2]))
  raise('floor', tonumber(ARGV[2]))
end
bump(ARGV[1])
return 'ok'
"""
)


@dataclass(slots=True, frozen=True)
class PolicyRecord:
    """One version of a policy. `note` says where it came from; `updated_at` is in seconds since 1970.

    `version` counts from 1; 0 is the configuration's while the store has not been asked. A `deleted` one records that
    the policy was deleted, and has what it was. `etag` changes with every version (unquoted).
    """

    name: str
    version: int
    policy: Policy
    updated_at: float
    note: str
    etag: str
    deleted: bool = False

    @staticmethod
    def of(name: str, version: int, policy: Policy, note: str, *, deleted: bool = False) -> PolicyRecord:
        """A new version, made now."""
        # Drawn anew, so that a version of another life of the store (it was lost) is never taken for this one.
        etag = f"{version}-{uuid.uuid4().hex[:16]}"
        return PolicyRecord(name, version, policy, round(time.time(), 3), note, etag, deleted)

    def dumps(self) -> bytes:
        """As JSON."""
        said = {"name": self.name, "version": self.version, "updated_at": self.updated_at, "note": self.note}
        return orjson.dumps(said | {"etag": self.etag, "deleted": self.deleted, "policy": content(self.policy)})

    @staticmethod
    def loads(data: bytes) -> PolicyRecord:
        """From JSON. Raises `ValueError` where it is not what this version writes."""
        try:
            said = orjson.loads(data)
            policy = Policy.model_validate(said.pop("policy"))
            record = PolicyRecord(policy=policy, **said)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        except (TypeError, KeyError, AttributeError, orjson.JSONDecodeError) as error:
            raise ValueError(f"not a policy's record: {error}") from None
        if not isinstance(record.version, int) or not isinstance(record.name, str) or not isinstance(record.etag, str):
            raise ValueError("not a policy's record")
        return record


def content(policy: Policy) -> dict[str, Any]:
    """What a policy says, in plain types, without what is said by default. The order of its intents counts."""
    return policy.model_dump(mode="json", exclude_defaults=True)


def digest(policy: Policy) -> str:
    """A hash of `content`."""
    return hashlib.blake2b(orjson.dumps(content(policy)), digest_size=16).hexdigest()


class PolicyRecords:
    """The scripts, with Python's types around them. All methods raise `StoreUnavailable`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def read(self, generation: str) -> tuple[str, int, dict[str, bytes] | None]:
        """The generation now ('' where the store holds no policies), the highest number, and the table by name.

        The table is None where the generation is still the one given.
        """
        found = await self._store.script(_READ, KEYS, [generation])
        if len(found) < 3:
            return found[0].decode(), 0, None
        names = [name.decode() for name in found[2][::2]]
        return found[0].decode(), int(found[1]), dict(zip(names, found[2][1::2], strict=True))

    async def last(self, name: str) -> tuple[int, bytes | None]:
        """The last number that was given to this name, and its record where it is in force."""
        number, data = await self._store.script(_LAST, KEYS, [name])
        return int(number), data

    async def history(self, name: str) -> list[bytes]:
        """The last versions, newest first; none where the name is unknown."""
        found = await self._store.script(_HISTORY, KEYS, [name, KEPT_VERSIONS])
        return [data for data in found if data is not None]

    async def seeded(self) -> dict[str, str]:
        """What the configuration said last, as a hash, by name."""
        return {name: data.decode() for name, data in (await self._store.hgetall("policies:seeded")).items()}

    async def write(self, record: PolicyRecord, kind: Kind = "put", seed: str = "") -> Verdict:
        """Write a version if its name's last one is the one before it.

        `stale`: it is not. `full`: there are `MAX_POLICIES` already. `lost`: the store has lost its data, see
        `restore`. `seeded`: the configuration's word, of this hash, was taken before. `mark` writes nothing but that.
        """
        arguments: list[bytes | str | int] = [record.name, record.version - 1, record.dumps(), kind, seed]
        bounds = [MAX_POLICIES, MAX_DELETED, KEPT_VERSIONS]
        verdict: Verdict = (await self._store.script(_WRITE, KEYS, [*arguments, *bounds])).decode()
        return verdict

    async def restore(
        self, records: Iterable[PolicyRecord], seeds: Mapping[str, str], *, generation: str, highest: int
    ) -> None:
        """Fill a store that holds no policies; what another gateway has restored stays as it is."""
        known: list[bytes | str | int] = [
            generation or "0",
            highest,
            len(seeds),
            *(part for pair in seeds.items() for part in pair),
        ]
        entries: list[bytes | str | int] = [part for r in records for part in (r.name, r.version, r.dumps())]
        await self._store.script(_RESTORE, KEYS, [*known, *entries])
