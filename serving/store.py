"""Shared state in Valkey or Redis, and what happens without it.

The service answers requests with the store gone: every failure is a `StoreUnavailable` that the caller expects,
and after one failure the next callers are refused at once instead of each waiting for a timeout.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from redis import exceptions as redis_errors
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

log = logging.getLogger(__name__)

T = TypeVar("T")

PREFIX = "signalbox:"

_LOST = (redis_errors.ConnectionError, redis_errors.TimeoutError, OSError)
# The server answers, but not with what was asked: full, read-only, restarting, refusing us.
_REFUSED = (
    redis_errors.OutOfMemoryError,
    redis_errors.ReadOnlyError,
    redis_errors.NoPermissionError,
    redis_errors.ClusterDownError,
    redis_errors.TryAgainError,
    redis_errors.AuthenticationWrongNumberOfArgsError,
)


class StoreUnavailable(Exception):
    """The store cannot be used at this moment; the message holds no password."""


def redact(url: str) -> str:
    """The address without user name, password and options, fit for a log."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        if parts.port:
            host += f":{parts.port}"
    except ValueError:
        return "(an address that cannot be read)"
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


class Store:
    """Keys, hashes and expiry in a Redis-compatible server, for use within one event loop.

    Keys are prefixed `signalbox:`. At most `max_connections` are open; getting one, and each of two attempts at the
    command, take at most `timeout_s` seconds. After a failure the store counts as lost for `retry_after_s` seconds:
    callers get `StoreUnavailable` at once, then one of them tries again for all. Loss and return are each logged once.
    Raises `ValueError` on an address that cannot be read.
    """

    def __init__(
        self, url: str, *, max_connections: int = 32, timeout_s: float = 1.0, retry_after_s: float = 1.0
    ) -> None:
        self.url = redact(url)
        try:
            pool = BlockingConnectionPool.from_url(
                url,
                max_connections=max_connections,
                timeout=timeout_s,
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                # One immediate retry: a pooled connection may have been closed by the server meanwhile, and a timeout
                # may only mean that this process's event loop stood still (a model being loaded holds it up).
                # All commands here can be repeated without harm.
                retry=Retry(NoBackoff(), 1, supported_errors=(redis_errors.ConnectionError, redis_errors.TimeoutError)),
            )
        except (ValueError, TypeError, redis_errors.RedisError):  # their text may quote a password
            raise ValueError("the store's address cannot be read; it is redis://[:PASSWORD@]HOST:PORT/DB") from None
        self._redis: Redis = Redis.from_pool(pool)
        self._retry_after_s = retry_after_s
        self._lost = False
        self._closed_until = 0.0

    @property
    def available(self) -> bool:
        """Whether the last command got through."""
        return not self._lost

    async def get(self, key: str) -> bytes | None:
        """The value, or None where there is none."""
        return await self._run(lambda: self._redis.get(PREFIX + key))

    async def set(self, key: str, value: bytes | str, ttl_s: float | None = None) -> None:
        """Store a value, for `ttl_s` seconds or for good."""
        await self._run(lambda: self._redis.set(PREFIX + key, value, px=None if ttl_s is None else _ms(ttl_s)))

    async def delete(self, *keys: str) -> int:
        """Remove keys; returns how many there were."""
        if not keys:
            return 0
        return await self._run(lambda: self._redis.delete(*(PREFIX + key for key in keys)))

    async def expire(self, key: str, ttl_s: float) -> bool:
        """Let a key end in `ttl_s` seconds; False where there is none."""
        return bool(await self._run(lambda: self._redis.pexpire(PREFIX + key, _ms(ttl_s))))

    async def hset(self, key: str, fields: Mapping[str, bytes | str | int | float], ttl_s: float | None = None) -> None:
        """Set fields of a hash, and in the same round trip the time to live of the whole hash."""
        if not fields:
            return

        mapping: dict[Any, Any] = dict(fields)

        async def command() -> None:
            async with self._redis.pipeline(transaction=False) as pipe:
                pipe.hset(PREFIX + key, mapping=mapping)
                if ttl_s is not None:
                    pipe.pexpire(PREFIX + key, _ms(ttl_s))
                await pipe.execute()

        await self._run(command)

    async def hget(self, key: str, field: str) -> bytes | None:
        """One field of a hash, or None where there is none."""
        return await self._run(lambda: self._redis.hget(PREFIX + key, field))

    async def hgetall(self, key: str) -> dict[str, bytes]:
        """All fields of a hash; empty where there is none."""
        found = await self._run(lambda: self._redis.hgetall(PREFIX + key))
        return {name.decode(): value for name, value in found.items()}

    async def hdel(self, key: str, *fields: str) -> int:
        """Remove fields of a hash; returns how many there were."""
        if not fields:
            return 0
        return await self._run(lambda: self._redis.hdel(PREFIX + key, *fields))

    async def script(self, lua: str, keys: Sequence[str], arguments: Sequence[bytes | str | int | float]) -> Any:
        """Run a Lua script, which is one atomic step. It must bear being run twice: a lost reply makes it repeat."""
        names = [PREFIX + key for key in keys]
        digest = _digest(lua)

        async def command() -> Any:
            try:
                return await self._redis.evalsha(digest, len(names), *names, *arguments)
            except redis_errors.NoScriptError:  # the server has been started anew
                return await self._redis.eval(lua, len(names), *names, *arguments)

        return await self._run(command)

    async def take(self, key: str, wait_s: float) -> bytes | None:
        """Take the first element off a list, waiting for one for less than a second; None where none has come."""
        found = await self._run(lambda: self._redis.blpop([PREFIX + key], timeout=wait_s))
        return found[1] if found else None

    async def entries(self, key: str, after: str, count: int) -> list[tuple[str, dict[str, bytes]]]:
        """The next entries of a stream, up to `count`, after the one with this id (`0-0`: from its beginning)."""
        found = await self._run(lambda: self._redis.xrange(PREFIX + key, min=f"({after}", count=count))
        return [(id.decode(), {name.decode(): value for name, value in fields.items()}) for id, fields in found]

    async def ping(self) -> None:
        """Return if the server answers."""
        await self._run(self._redis.ping)

    async def close(self) -> None:
        """Close all connections."""
        await self._redis.aclose(close_connection_pool=True)
        await self._redis.connection_pool.aclose()

    async def _run(self, command: Callable[[], Awaitable[Any]]) -> Any:
        now = time.monotonic()
        if now < self._closed_until:
            raise StoreUnavailable(f"the store {self.url} is lost; trying again in {self._closed_until - now:.1f} s")
        if self._lost:  # this caller tries for all: the others go on being refused until it knows
            self._closed_until = now + self._retry_after_s
        asked_to_stop = _cancellations()
        try:
            answer = await command()
        except _LOST as error:
            _stop_if(asked_to_stop)
            self._note_loss(error)
            raise StoreUnavailable(f"the store {self.url} is lost: {_reason(error)}") from error
        except _REFUSED as error:
            raise StoreUnavailable(f"the store {self.url} refused: {_reason(error)}") from error
        self._closed_until = 0.0
        if self._lost:
            self._lost = False
            log.warning("the store %s is back", self.url)
        _stop_if(asked_to_stop)
        return answer

    def _note_loss(self, error: Exception) -> None:
        self._closed_until = time.monotonic() + self._retry_after_s
        if not self._lost:
            self._lost = True
            log.warning("the store %s is lost (%s); serving goes on without it", self.url, _reason(error))


@functools.lru_cache(maxsize=64)
def _digest(lua: str) -> str:
    return hashlib.sha1(lua.encode(), usedforsecurity=False).hexdigest()  # what EVALSHA goes by


def _cancellations() -> int:
    task = asyncio.current_task()
    return task.cancelling() if task is not None else 0


def _stop_if(asked_before: int) -> None:
    """Raise the cancellation that redis-py swallowed, if any: its timeouts lose one that comes as they end."""
    if _cancellations() > asked_before:
        raise asyncio.CancelledError


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
