"""The adapter registry's records in the store, written under a fence.

`adapters:writer` has the epoch of the one registry that may write, and the number of its writes (compare and set: a
write that was held up on the way and arrives late changes nothing). `adapters:records` has everything by name,
`adapters:table` what gateways need to know, `adapters:generation` changes with the table. Epoch and generation are
milliseconds of the server's clock or more, so that they grow even over the loss of all data.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import orjson

from signalbox.adapters.lifecycle import Numbers, Record, ServedAdapter
from signalbox.adapters.registry_protocols import DataLost, Fenced, GatewayReport, StaleWrite, StoreLost
from signalbox.serving.adapter_table import GATEWAYS, GENERATION, RECORDS, TABLE
from signalbox.serving.store import Store, StoreUnavailable

log = logging.getLogger(__name__)

WRITER = "adapters:writer"
NUMBERS = "adapters:numbers"
FORGET_GATEWAY_S = 60.0

_NOW = """
local function later(value)
  local time = redis.call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  return string.format('%.0f', math.max(tonumber(value or 0) + 1, now))
end
"""

# The table and its generation may be older than the writer's loss of data: they stay as they are.
_TAKE_OVER = (
    _NOW
    + """
if redis.call('HGET', KEYS[1], 'last') == ARGV[1] then return redis.call('HGET', KEYS[1], 'epoch') end
local epoch = later(redis.call('HGET', KEYS[1], 'epoch'))
redis.call('HSET', KEYS[1], 'epoch', epoch, 'revision', 0, 'last', ARGV[1])
if not redis.call('GET', KEYS[2]) then redis.call('SET', KEYS[2], later(0)) end
return epoch
"""
)

_FENCE = """
local writer = redis.call('HMGET', KEYS[1], 'epoch', 'revision', 'last')
if not writer[1] then return {'lost'} end
if writer[1] ~= ARGV[1] then return {'fenced'} end
"""

_READ = (
    _FENCE
    + """
return {'ok', writer[2], redis.call('HGETALL', KEYS[2]), redis.call('GET', KEYS[3]), redis.call('GET', KEYS[4])}
"""
)

_WRITE = (
    _NOW
    + _FENCE
    + """
if writer[3] == ARGV[3] then return {'ok', redis.call('GET', KEYS[4]), writer[2]} end
if writer[2] ~= ARGV[2] then return {'stale'} end
local revision = redis.call('HINCRBY', KEYS[1], 'revision', 1)
redis.call('HSET', KEYS[1], 'last', ARGV[3])
if ARGV[5] == '' then redis.call('HDEL', KEYS[2], ARGV[4]) else redis.call('HSET', KEYS[2], ARGV[4], ARGV[5]) end
redis.call('SET', KEYS[5], ARGV[8])
if ARGV[6] == '1' then
  if ARGV[7] == '' then redis.call('HDEL', KEYS[3], ARGV[4]) else redis.call('HSET', KEYS[3], ARGV[4], ARGV[7]) end
  redis.call('SET', KEYS[4], later(redis.call('GET', KEYS[4])))
end
return {'ok', redis.call('GET', KEYS[4]), tostring(revision)}
"""
)

_RESTORE = (
    _NOW
    + """
local epoch = redis.call('HGET', KEYS[1], 'epoch')
if epoch and epoch ~= ARGV[1] then return {'fenced'} end
redis.call('DEL', KEYS[2], KEYS[3])
redis.call('HSET', KEYS[1], 'epoch', ARGV[1], 'revision', 0, 'last', '')
redis.call('SET', KEYS[5], ARGV[2])
local records = tonumber(ARGV[4])
for i = 5, #ARGV, 2 do
  redis.call('HSET', (i - 5) / 2 < records and KEYS[2] or KEYS[3], ARGV[i], ARGV[i + 1])
end
redis.call('SET', KEYS[4], later(ARGV[3]))
return {'ok', redis.call('GET', KEYS[4])}
"""
)


class AdapterRecords:
    """A `RecordStore` in the shared store. One object is one registry: `take_over` gives it its epoch."""

    def __init__(self, store: Store, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._epoch = b""
        self._revision = b"0"
        self._generation = 0
        self._gateways: dict[str, tuple[int, float]] = {}  # sequence of the last report, and when it was first seen

    @property
    def epoch(self) -> int:
        """Of this registry; 0 before `take_over`."""
        return int(self._epoch or 0)

    async def take_over(self) -> None:
        """See `RecordStore.take_over`."""
        self._epoch = bytes(await self._script(_TAKE_OVER, [WRITER, GENERATION], [uuid.uuid4().hex]))

    async def read(self) -> tuple[dict[str, Record], Numbers, int]:
        """See `RecordStore.read`. A record that cannot be read is left out and said so in the log."""
        revision, flat, numbers, generation = self._heed(
            await self._script(_READ, [WRITER, RECORDS, NUMBERS, GENERATION], [self._epoch])
        )
        records = {}
        for name, data in zip(flat[::2], flat[1::2], strict=True):
            try:
                records[name.decode()] = Record.loads(data)
            except ValueError as error:
                log.error("the record of adapter %r is passed over: %s", name, error)
        self._revision, self._generation = revision, int(generation or 0)
        return records, Numbers.loads(numbers) if numbers else Numbers(), self._generation

    async def write(
        self, name: str, record: Record | None, entry: ServedAdapter | None, numbers: Numbers, *, table: bool
    ) -> int:
        """See `RecordStore.write`."""
        answer = await self._script(
            _WRITE,
            [WRITER, RECORDS, TABLE, GENERATION, NUMBERS],
            [
                self._epoch,
                self._revision,
                uuid.uuid4().hex,
                name,
                record.dumps() if record is not None else b"",
                int(table),
                entry.dumps() if entry is not None else b"",
                numbers.dumps(),
            ],
        )
        generation, self._revision = self._heed(answer)
        self._generation = int(generation or 0)
        return self._generation

    async def restore(self, records: Iterable[Record], entries: Iterable[ServedAdapter], numbers: Numbers) -> int:
        """See `RecordStore.restore`."""
        pairs = [(record.name, record.dumps()) for record in records]
        count = len(pairs)
        pairs += [(entry.name, entry.dumps()) for entry in entries]
        answer = await self._script(
            _RESTORE,
            [WRITER, RECORDS, TABLE, GENERATION, NUMBERS],
            [self._epoch, numbers.dumps(), self._generation, count, *(part for pair in pairs for part in pair)],
        )
        self._revision, self._generation = b"0", int(self._heed(answer)[0])
        return self._generation

    async def gateways(self) -> dict[str, GatewayReport]:
        """See `RecordStore.gateways`."""
        try:
            found, epoch = await asyncio.gather(self._store.hgetall(GATEWAYS), self._store.hget(WRITER, "epoch"))
        except StoreUnavailable as error:
            raise StoreLost(str(error)) from error
        if epoch is None:
            raise DataLost
        if epoch != self._epoch:
            raise Fenced("a newer adapter registry has taken over")
        now = self._clock()
        reports, gone = {}, []
        for name, data in found.items():
            said = _report(data)
            if said is None:
                gone.append(name)
                continue
            sequence, since = self._gateways.get(name, (None, now))
            if sequence != said["sequence"]:
                since = now
            self._gateways[name] = (said["sequence"], since)
            reports[name] = GatewayReport(said["generation"], said["in_flight"], now - since)
            if now - since > FORGET_GATEWAY_S:
                gone.append(name)
        self._gateways = {name: seen for name, seen in self._gateways.items() if name in found}
        if gone:
            try:
                await self._store.hdel(GATEWAYS, *gone)
            except StoreUnavailable as error:
                raise StoreLost(str(error)) from error
        return reports

    async def _script(self, lua: str, keys: list[str], arguments: list[Any]) -> Any:
        try:
            return await self._store.script(lua, keys, arguments)
        except StoreUnavailable as error:
            raise StoreLost(str(error)) from error

    @staticmethod
    def _heed(answer: list[Any]) -> list[Any]:
        verdict = answer[0]
        if verdict == b"fenced":
            raise Fenced("a newer adapter registry has taken over")
        if verdict == b"lost":
            raise DataLost
        if verdict == b"stale":
            raise StaleWrite
        return answer[1:]


def _report(data: bytes) -> Mapping[str, Any] | None:
    try:
        said = orjson.loads(data)
        return {
            "sequence": int(said["sequence"]),
            "generation": int(said["generation"]),
            "in_flight": {str(version): int(count) for version, count in said["in_flight"].items()},
        }
    except (orjson.JSONDecodeError, TypeError, KeyError, ValueError, AttributeError):
        return None
