"""Which replica gets a request: one that holds the adapter that the request names.

Serve makes one `AdapterRouter` for each handle and process. It goes by this process's map of versions to replicas,
which `AdapterTable` keeps. Its choice is a hint: a replica that does not hold the adapter says so, and the gateway
tries again.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from ray.serve._private.common import RequestMetadata
from ray.serve.request_router import LocalityMixin, PendingRequest, RequestRouter, RunningReplica

from signalbox.experts.base import GenerateRequest
from signalbox.serving.adapter_replica import OneReplica

_holders: dict[str, frozenset[str]] = {}  # version id -> Serve's unique ids of replicas; replaced as a whole


def set_holders(holders: Mapping[str, frozenset[str]]) -> None:
    """Tell this process's routers which replicas hold which version."""
    global _holders
    _holders = dict(holders)


def wanted_replicas(arguments: list[object]) -> frozenset[str] | None:
    """The replicas that a call is for, None for any."""
    first = arguments[0] if arguments else None
    if isinstance(first, OneReplica):
        return frozenset((first.replica_id,))
    if isinstance(first, GenerateRequest) and first.adapter is not None:
        return _holders.get(first.adapter)
    return None


class AdapterRouter(LocalityMixin, RequestRouter):
    """Power of two choices (Mitzenmacher, 2001) among the replicas that hold what the request needs.

    Without Serve's `FIFOMixin`, which may hand the replica chosen for one request to another one that waits longer.
    """

    def _get_pending_request_matching_internal_request_id(
        self, request_metadata: RequestMetadata | None = None
    ) -> PendingRequest | None:
        """The call for which a replica was chosen.

        Serve looks it up by the id of the HTTP request, which all calls made for that request share (several prompts,
        `n`, an ensemble): only the first would ever be found (Ray 2.60), and the others would wait for ever.
        """
        pending = self._pending_requests_to_fulfill
        return next((p for p in pending if p.metadata is request_metadata and not p.future.done()), None)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Two of the holders at random, or of all where none of the holders is known here."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # a second try comes after a pause
            # Serve pickles this class by value, with a copy of the globals above: the map is the module's own.
            from signalbox.serving import adapter_router

            wanted = adapter_router.wanted_replicas(pending_request.args)
            if wanted:
                holders = [replica for replica in candidate_replicas if replica.replica_id.unique_id in wanted]
                candidate_replicas = holders or candidate_replicas
        if len(candidate_replicas) > 2:
            candidate_replicas = random.sample(candidate_replicas, 2)
        elif len(candidate_replicas) == 2 and random.getrandbits(1):  # of two equally busy ones the first is taken
            candidate_replicas = candidate_replicas[::-1]
        return [list(candidate_replicas)]
