"""The replicas of every base as the adapter registry and `/v1/adapters` reach them: all at once, or one by its id."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Mapping
from typing import TYPE_CHECKING, Any

from signalbox.adapters.base import AdapterError
from signalbox.adapters.lifecycle import ReplicaReport
from signalbox.adapters.registry_protocols import NoRoom, NoSlot, ReplicaLost
from signalbox.experts.base import ExpertError, InvalidRequest, QueueFull
from signalbox.serving.adapter_replica import OneReplica

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

log = logging.getLogger(__name__)

PROBE_S = 1.5  # a replica that does not answer within it does not count as alive
LOAD_S = 600.0  # for an adapter of gigabytes from a slow disk
UNLOAD_S = 600.0  # requests in flight are waited for
OUT_OF_ROOM = ("adapter_slots_full", "adapter_memory_full")  # what an engine says that holds too much already


async def probe(handle: DeploymentHandle[Any], timeout_s: float = PROBE_S) -> list[ReplicaReport]:
    """What each replica of a deployment says at this moment; those that do not answer in time are missing."""
    try:
        async with asyncio.timeout(timeout_s):
            # Not `results_async`: there one replica that hangs makes the answers of all others be lost.
            calls = await handle.broadcast("probe_adapters")._fetch_replica_results_async()
    except Exception as error:  # no replica is running, or Serve's controller cannot be reached
        log.debug("no replica can be probed: %r", error)
        return []
    answers = await asyncio.gather(*(_answer(call.get_async(), timeout_s) for call in calls))
    return [answer for answer in answers if isinstance(answer, ReplicaReport)]


async def _answer(call: Awaitable[Any], timeout_s: float) -> Any:
    try:
        async with asyncio.timeout(timeout_s):
            return await call
    except Exception as error:
        log.debug("a replica does not answer: %r", error)
        return None


class ServeFleet:
    """The registry's `Fleet`, over handles of the experts' deployments, by the expert's name."""

    def __init__(self, experts: Mapping[str, DeploymentHandle[Any]]) -> None:
        self._experts = experts

    async def probe(self, base: str) -> list[ReplicaReport]:
        """See `Fleet.probe`."""
        return await probe(self._experts[base])

    async def load(self, base: str, replica_id: str, version: str, path: str, content_hash: str) -> None:
        """See `Fleet.load`."""
        await self._call(base, "load_adapter", LOAD_S, OneReplica(replica_id), version, path, content_hash)

    async def unload(self, base: str, replica_id: str, version: str) -> None:
        """See `Fleet.unload`."""
        await self._call(base, "unload_adapter", UNLOAD_S, OneReplica(replica_id), version)

    async def _call(self, base: str, method: str, timeout_s: float, target: OneReplica, *arguments: Any) -> None:
        response = self._experts[base].options(method_name=method).remote(target, *arguments)
        try:
            async with asyncio.timeout(timeout_s):
                answer = await response
        except Exception as error:  # the replica died or was stopped meanwhile, or does not answer
            response.cancel()
            raise ReplicaLost(f"replica {target.replica_id} of '{base}': {error!r}") from error
        if isinstance(answer, QueueFull) and answer.code in OUT_OF_ROOM:
            raise NoRoom(answer.message, answer.code)
        if isinstance(answer, QueueFull):
            raise NoSlot(answer.message)
        if isinstance(answer, InvalidRequest):
            raise AdapterError(answer.message, code=answer.code, tensor=answer.param)
        if isinstance(answer, ExpertError):
            raise ReplicaLost(answer.message)
