"""The pool as one gateway sees it: every expert that a request may name, or that `auto` may choose.

An expert is a deployment, or an adapter on one: `smollm2`, `smollm2:banking`, for short `banking`. Adapters come and go
while the service runs. So what is configured is known here for good, and an adapter is looked up anew for each request.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import orjson

from signalbox.experts.base import InvalidRequest
from signalbox.experts.catalog import ExpertConfig, LocalExpert
from signalbox.policies.base import Candidate, RequestShape
from signalbox.policies.latency import Latency
from signalbox.serving import live_state
from signalbox.serving.adapter_table import AdapterTable, ServedAdapter
from signalbox.serving.config import Config
from signalbox.serving.live_state import ExpertState, LiveState


@dataclass(slots=True, frozen=True)
class Target:
    """One expert to ask. `name` is its full name, `expert` the deployment's; `adapter` None is the base itself."""

    name: str
    expert: str
    config: ExpertConfig
    adapter: ServedAdapter | None = None


class Pool:
    """Names and facts of all experts. `adapters` is None where no expert takes any.

    `assume_adapters` takes those of the configuration as loaded, for decisions without a running service.
    """

    def __init__(
        self,
        config: Config,
        *,
        live: LiveState,
        adapters: AdapterTable | None = None,
        assume_adapters: bool = False,
    ) -> None:
        self._experts = config.experts
        self._live = live
        self._adapters = adapters
        self._declared = config.adapters
        self._assumed = assume_adapters
        self._queued_in_front = config.admission.enabled
        self._versions = {name: _version_of_expert(expert) for name, expert in config.experts.items()}

    # -- names -------------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Everything that can be asked for by its full name, as last seen."""
        return [*self._experts, *(target.name for target in self._adapted())]

    def known(self, name: str) -> Target | None:
        """The expert of this name, as last seen: cheap, for decisions and lists."""
        config = self._experts.get(name)
        if config is not None:
            return Target(name, name, config)
        return next((target for target in self._adapted() if _is_called(target, name)), None)

    async def find(self, name: str) -> Target | None:
        """The expert of this name. An adapter's version is the one that is current now, on every gateway alike."""
        config = self._experts.get(name)
        if config is not None:
            return Target(name, name, config)
        if self._adapters is None:
            return self.known(name)
        base, colon, short = name.partition(":")
        adapter = await self._adapters.current(short if colon else base)
        target = self._target(adapter) if adapter is not None else None
        return target if target is not None and _is_called(target, name) else None

    def _adapted(self) -> list[Target]:
        if self._assumed:
            return [Target(f"{a.base}:{name}", a.base, self._experts[a.base]) for name, a in self._declared.items()]
        if self._adapters is None:
            return []
        return [target for adapter in self._adapters.served() if (target := self._target(adapter)) is not None]

    def _target(self, adapter: ServedAdapter) -> Target | None:
        config = self._experts.get(adapter.base)
        if config is None:  # of an earlier configuration
            return None
        return Target(f"{adapter.base}:{adapter.name}", adapter.base, config, adapter)

    @contextlib.asynccontextmanager
    async def lease(self, name: str) -> AsyncIterator[Target]:
        """The expert as it is now, kept so while the block runs: what is in use is not unloaded.

        An adapter that was evicted is loaded again first. Raises `InvalidRequest` (404) where there is none of this
        name, `ExpertUnavailable` where an evicted one does not come back.
        """
        target = await self.find(name)
        if target is None:
            raise self.unknown(name)
        if target.adapter is None or self._adapters is None:
            yield target
            return
        short = target.adapter.name
        try:
            adapter = await self._adapters.ensure(short)
        except InvalidRequest:  # it has just been removed
            raise self.unknown(name) from None
        with self._adapters.hold(adapter):  # no await since `ensure` read it: it cannot be evicted between the two
            leased = self._target(adapter)
            if leased is None or leased.name != target.name:
                raise self.unknown(name)
            yield leased

    def unknown(self, name: str, also: tuple[str, ...] = ()) -> InvalidRequest:
        """The error of a name that is none; `also` are other names that may stand there."""
        return InvalidRequest(
            f"there is no model '{name[:128]}'; there are: {', '.join([*also, *self.names()])}",
            param="model",
            code="model_not_found",
            status=404,
        )

    # -- for the decision --------------------------------------------------------------------------------------

    def routable(self) -> list[str]:
        """The experts that `auto` may choose from."""
        names = [name for name, config in self._experts.items() if config.routable]
        return names + [target.name for target in self._adapted() if self._may_route(target)]

    def _may_route(self, target: Target) -> bool:
        """An adapter that is not in the configuration is routable; the router must know it in any case."""
        declared = self._declared.get(target.name.partition(":")[2])
        return declared is None or declared.routable

    def candidates(self, shape: RequestShape | None = None) -> list[Candidate]:
        """The routable experts with their live figures for a request of this shape; an adapter's are its base's."""
        return [found for name in self.routable() if (found := self.candidate(name, shape)) is not None]

    def candidate(self, name: str, shape: RequestShape | None = None) -> Candidate | None:
        """One expert, routable or not; None where there is none of this name."""
        target = self.known(name)
        if target is None:
            return None
        live = self._live.expert(target.expert)
        return live_state.candidate(name, target.config, live, shape, queued_in_front=self._queued_in_front)

    def capacity(self, expert: str) -> int:
        """How many requests a deployment takes at once, over its replicas that are ready; what is configured before."""
        config = self._experts[expert]
        replicas = config.replicas if isinstance(config, LocalExpert) else 1
        return self._live.expert(expert).capacity or config.max_running * replicas

    def latency(self, target: Target, shape: RequestShape) -> Latency:
        """What a request of this shape would see of an expert now, from when the expert gets it."""
        live = self._live.expert(target.expert)
        return live_state.latency(target.config, live, shape, queued_in_front=self._queued_in_front)

    def request_fields(self, name: str) -> frozenset[str] | None:
        """The request fields beyond the common ones that a known expert's engine understands, None for all."""
        target = self.known(name)
        return target.config.request_fields if target is not None else frozenset()

    def state(self, target: Target) -> ExpertState:
        """The live state of the deployment behind an expert."""
        return self._live.expert(target.expert)

    @property
    def generation(self) -> str:
        """Changes whenever an adapter comes, changes or goes."""
        return str(self._adapters.generation) if self._adapters is not None else ""

    def version(self, target: Target) -> str:
        """A hash of all that bears on the expert's answers: configuration, weights, adapter."""
        version = self._versions[target.expert] + self._live.expert(target.expert).fingerprint
        return version if target.adapter is None else f"{version}/{target.adapter.content_hash}"


def _is_called(target: Target, name: str) -> bool:
    return name in (target.name, target.name.partition(":")[2])


def _version_of_expert(config: ExpertConfig) -> str:
    """A hash of what in its configuration bears on its answers; what it is said to cost or to be does not."""
    said = {"price", "latency", "license", "description", "parameters", "released", "routable", "bytes_per_token"}
    room = {"max_adapters", "max_adapter_rank", "adapter_kinds"}  # for adapters, whatever their answers
    exclude: dict[str, Any] = dict.fromkeys(said | room, True) | {"esft": {"experts_per_layer", "memory_gib"}}
    return hash_of(config.model_dump(mode="json", exclude=exclude))


def hash_of(value: Any) -> str:
    """A hash of anything that JSON can hold."""
    return hashlib.blake2b(orjson.dumps(value, option=orjson.OPT_SORT_KEYS), digest_size=16).hexdigest()
