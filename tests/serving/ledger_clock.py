"""The ledger's real scripts in a real Valkey, with a clock that a test sets and replies that a test loses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from signalbox.serving.store import Store

CLOCK = "test:clock"
# A budget's window and a gateway's silence are seconds to days: the scripts read this time instead of the server's.
_TIME = f"{{redis.call('HGET', 'signalbox:{CLOCK}', 's'), redis.call('HGET', 'signalbox:{CLOCK}', 'us')}}"


class ClockedStore(Store):
    """A store whose scripts take the time from a key. With `twice`, each script runs twice, as if every first reply
    had been lost on its way."""

    twice = False

    async def set_clock(self, us: int) -> None:
        """Microseconds since 1970."""
        await self.hset(CLOCK, {"s": us // 1_000_000, "us": us % 1_000_000})

    async def script(self, lua: str, keys: Sequence[str], arguments: Sequence[bytes | str | int | float]) -> Any:
        lua = lua.replace("redis.call('TIME')", _TIME)
        if self.twice:
            await super().script(lua, keys, arguments)
        return await super().script(lua, keys, arguments)
