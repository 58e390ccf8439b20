"""What the service says of itself: `/v1/models`, `/healthz`, `/readyz`, `/version`."""

from __future__ import annotations

import time
from typing import Any

from signalbox import __version__
from signalbox.serving import live_state
from signalbox.serving.config import Config
from signalbox.serving.exchange import Exchange
from signalbox.serving.live_state import LiveState
from signalbox.serving.planning import Planner
from signalbox.serving.pool import Pool, Target
from signalbox.serving.routing import Routing
from signalbox.serving.store import Store, StoreUnavailable


class ServiceInfo:
    """Handlers of the routes that only tell."""

    def __init__(
        self, config: Config, planner: Planner, pool: Pool, live: LiveState, routing: Routing, store: Store
    ) -> None:
        self._config = config
        self._planner = planner
        self._pool = pool
        self._live = live
        self._routing = routing
        self._store = store

    async def models(self, exchange: Exchange) -> None:
        """Everything that `model` may be; an adapter stands there under both its names."""
        data = [await self._describe(name) for name in self._planner.model_names()]
        short = [model | {"id": model["signalbox"]["adapter"]} for model in data if "adapter" in model["signalbox"]]
        await exchange.reply(200, {"object": "list", "data": data + short})

    async def model(self, exchange: Exchange) -> None:
        """One of them."""
        name = exchange.path.removeprefix("/v1/models/")
        await exchange.reply(200, await self._describe(name) | {"id": name})

    async def _describe(self, name: str) -> dict[str, Any]:
        """OpenAI's model object; what only we tell stands under `signalbox`. Raises where there is no such model."""
        model: dict[str, Any] = {"id": name, "object": "model", "created": 0, "owned_by": "signalbox"}
        model |= {"root": name, "parent": None}
        found = await self._planner.resolve(name)
        if isinstance(found, Target):
            return model | self._describe_expert(found)
        said = found.policy.model_dump(mode="json", exclude_defaults=True)
        return {**model, "signalbox": {"policy": found.name, **said}}

    def _describe_expert(self, target: Target) -> dict[str, Any]:
        expert, model = target.config, dict[str, Any]()
        if expert.released:
            model["created"] = int(time.mktime(expert.released.timetuple()))
        live = self._pool.state(target)
        facts = expert.model_dump(mode="json", include={"engine", "price", "license", "description", "routable"})
        candidate = live_state.candidate(target.name, expert, live)
        facts |= {"parameters": candidate.parameters, "context_length": candidate.context_length}
        adapter = target.adapter
        if adapter is not None:
            model |= {"parent": adapter.base, "root": adapter.base, "created": int(adapter.loaded_at)}
            facts |= {"adapter": adapter.name, "version": adapter.number, "kind": adapter.kind, "rank": adapter.rank}
            facts |= {"routable": target.name in self._pool.routable(), "description": ""}
        return {**model, "signalbox": facts | {"state": live_state.describe(live)}}

    async def healthz(self, exchange: Exchange) -> None:
        """This process answers."""
        await exchange.reply(200, {"status": "ok"})

    async def readyz(self, exchange: Exchange) -> None:
        """200 when requests can be answered: the store answers, the router is loaded, and an expert is ready."""
        try:
            await self._store.ping()
            store = "ok"
        except StoreUnavailable as error:
            store = str(error)
        states = {name: self._live.expert(name) for name in self._config.experts}
        if not self._routing.ready:
            router = "loading"
        else:
            router = self._routing.error or "ok"
        ready = store == "ok" and self._routing.ready and any(state.ready for state in states.values())
        body = {
            "ready": ready,
            "store": store,
            "router": router,
            "experts": {name: live_state.describe(state) for name, state in states.items()},
        }
        await exchange.reply(200 if ready else 503, body)

    async def version(self, exchange: Exchange) -> None:
        """The package's version."""
        await exchange.reply(200, {"version": __version__})
