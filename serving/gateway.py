"""The gateway: a plain ASGI application that speaks OpenAI's protocol, and the Serve application around it.

Routes are a dictionary, replies are bytes: nothing between the server and the dispatcher costs what a web framework
costs. Every reply carries `x-request-id`, every answer the decision headers, every error OpenAI's error object.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from signalbox.experts.base import ExpertError, InvalidRequest
from signalbox.serving.adapter_api import AdapterApi, takes_adapters
from signalbox.serving.adapter_registry import deploy_registry
from signalbox.serving.adapter_table import AdapterTable
from signalbox.serving.admission import Admission
from signalbox.serving.callers import Callers, require_admin
from signalbox.serving.completions import CompletionApi
from signalbox.serving.config import Config, policies_in_use
from signalbox.serving.dispatch import Dispatcher
from signalbox.serving.exchange import ClientGone, Exchange, Handler, Receive, Send
from signalbox.serving.expert_deployment import ExpertClient, deploy
from signalbox.serving.learner import Learner
from signalbox.serving.ledger import Ledger
from signalbox.serving.live_router import ArtifactWatch
from signalbox.serving.live_state import LiveState
from signalbox.serving.metrics import Metrics
from signalbox.serving.outcomes import MAX_BODY_BYTES, Outcomes, parse_feedback
from signalbox.serving.placement import gpu_shares, gpus_here
from signalbox.serving.policy_api import PolicyApi
from signalbox.serving.policy_table import PolicyTable
from signalbox.serving.pool import Pool
from signalbox.serving.protocols.openai import parse_json
from signalbox.serving.routing import routing_of
from signalbox.serving.service_info import ServiceInfo
from signalbox.serving.store import Store
from signalbox.serving.usage_api import UsageApi

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle

log = logging.getLogger(__name__)

_ADAPTERS = ("/v1/adapters", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")  # to be changed by an admin's key
MAX_ONGOING = 4096  # requests in one gateway process; the next ones wait in Serve


class GatewayApp:
    """The ASGI application. `experts` maps each expert's name to the handle of its deployment, and `registry` is the
    adapter registry's, None where no expert takes adapters.

    Raises `ValueError` where the configuration wants an API key and the environment has none.
    """

    def __init__(
        self,
        config: Config,
        store_url: str,
        experts: Mapping[str, DeploymentHandle[Any]],
        registry: DeploymentHandle[Any] | None = None,
    ) -> None:
        self._config = config
        self._callers = Callers(config)
        self._store = Store(store_url)
        self._live = LiveState(self._store, config.experts)
        self._routing = routing_of(config)
        self._outcomes = Outcomes(self._store, config.outcomes, config.default_router)
        self._learner = Learner(self._routing, self._outcomes)
        router = config.routers.get(config.default_router)
        self._watch = ArtifactWatch(self._routing, router.artifact, router.wanted) if router else None
        clients = {name: ExpertClient(name, handle, self._live.doubt) for name, handle in experts.items()}
        self._adapters = AdapterTable(self._store, registry, experts) if registry is not None else None
        pool = Pool(config, live=self._live, adapters=self._adapters)
        self._policies = PolicyTable(self._store, config.policies, protected=policies_in_use(config))
        self._metrics = Metrics(self._store, self._latency_errors)
        self._ledger = Ledger(self._store)
        self._admission = Admission(
            self._store,
            config.admission,
            config.experts,
            pool.capacity,
            gateways=config.server.gateways,
            on_verdict=self._metrics.admission,
        )
        self._dispatcher = Dispatcher(
            config,
            experts=clients,
            pool=pool,
            routing=self._routing,
            store=self._store,
            policies=self._policies,
            callers=self._callers,
            admission=self._admission,
            ledger=self._ledger,
        )
        self._adapter_api = AdapterApi(config, self._adapters)
        completions = CompletionApi(self._dispatcher, self._outcomes, self._metrics, config.server.max_body_bytes)
        policies = PolicyApi(self._policies, pool.names, lambda exchange: require_admin(exchange.caller))
        info = ServiceInfo(config, self._dispatcher.planner, pool, self._live, self._routing, self._store)
        usage = UsageApi(self._callers, self._policies, self._ledger)
        self._routes: dict[str, dict[str, Handler]] = {
            **completions.routes,
            **policies.routes,
            "/v1/usage": {"GET": usage.usage},
            "/v1/models": {"GET": info.models},
            "/v1/outcomes": {"POST": self._outcome},
            "/v1/routers": {"GET": self._routers},
            "/healthz": {"GET": info.healthz},
            "/readyz": {"GET": info.readyz},
            "/version": {"GET": info.version},
            "/metrics": {"GET": self._metrics.serve},
            **self._adapter_api.routes,
        }
        # Routes with a name at their end.
        self._prefixes: dict[str, dict[str, Handler]] = {
            "/v1/models/": {"GET": info.model},
            "/v1/decisions/": {"GET": self._decision},
            "/v1/adapters/": self._adapter_api.named,
            "/v1/policies/": policies.named,
        }

    # -- ASGI --------------------------------------------------------------------------------------------------

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """One connection: a request, or the lifespan."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            await self._serve(Exchange(scope, receive, send))
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1003})

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            await self.start()
        except Exception as error:
            log.exception("the gateway cannot start")
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def start(self) -> None:
        """Begin to follow the experts' state and to load the router."""
        self._routing.start()
        if self._watch is not None:
            self._watch.start()
        if self._config.outcomes.learn:
            self._learner.start()
        await self._live.start()
        await self._policies.start()
        await self._ledger.start()
        await self._admission.start()
        await self._metrics.start()
        if self._adapters is not None:
            await self._adapters.start()

    async def close(self) -> None:
        """Stop what `start` began, and close the store."""
        if self._watch is not None:
            await self._watch.close()
        await self._learner.close()
        await self._routing.close()
        if self._adapters is not None:
            await self._adapters.close()
        await self._admission.close()
        await self._metrics.close()
        await self._ledger.close()
        await self._policies.close()
        await self._live.close()
        await self._store.close()

    def _latency_errors(self) -> dict[str, tuple[float | None, float | None]]:
        states = {name: self._live.expert(name) for name in self._config.experts}
        return {name: (state.ttft_error, state.tpot_error) for name, state in states.items()}

    async def _serve(self, exchange: Exchange) -> None:
        try:
            try:
                await self._handler(exchange)(exchange)
            except ExpertError as error:
                await exchange.fail(error)
            except (ClientGone, asyncio.CancelledError):
                raise
            except Exception:
                log.exception("request %s failed", exchange.id)
                await exchange.fail(
                    ExpertError("an internal error; the service's log has it under the request's id", code="internal")
                )
        except ClientGone:
            pass

    def _handler(self, exchange: Exchange) -> Handler:
        """The route's handler. Raises `InvalidRequest` for unknown routes, wrong methods and wrong keys."""
        methods = self._routes.get(exchange.path)
        if methods is None:
            methods = next(
                (found for prefix, found in self._prefixes.items() if exchange.path.startswith(prefix)), None
            )
        if methods is None:
            raise InvalidRequest(f"there is no route {exchange.path[:256]}", code="not_found", status=404)
        handler = methods.get("GET" if exchange.method == "HEAD" else exchange.method)
        if handler is None:
            exchange.allow = ", ".join(methods)
            raise InvalidRequest(
                f"{exchange.path} takes {' or '.join(methods)}, not {exchange.method[:16]}",
                code="method_not_allowed",
                status=405,
            )
        if exchange.path.startswith("/v1/"):
            exchange.caller = self._callers.identify(exchange.headers)
            if exchange.path.startswith(_ADAPTERS) and exchange.method not in ("GET", "HEAD"):
                require_admin(exchange.caller)
        return handler

    # -- outcomes and routers -----------------------------------------------------------------------------------

    async def _outcome(self, exchange: Exchange) -> None:
        feedback = parse_feedback(parse_json(await exchange.body(MAX_BODY_BYTES)), exchange.headers)
        await exchange.reply(202, await self._outcomes.post(feedback))

    async def _decision(self, exchange: Exchange) -> None:
        await exchange.reply(200, await self._outcomes.decision(exchange.path.removeprefix("/v1/decisions/")))

    async def _routers(self, exchange: Exchange) -> None:
        """The router that serves, as this gateway has it, and those that are only declared."""
        serving = self._routing.describe()
        serving["learning"] = {"enabled": self._config.outcomes.learn, **(serving["learning"] or {})}
        data = []
        for name, router in self._config.routers.items():
            known = {"kind": None, "version": None, "loaded_at": None} | (serving if name == serving["name"] else {})
            kind = known["kind"] or router.kind
            data.append(known | {"name": name, "kind": kind, "default": name == self._config.default_router})
        await exchange.reply(200, {"object": "list", "data": data})


class Gateway:
    """The Serve deployment around `GatewayApp`; Serve builds the application inside the replica."""

    def __init__(
        self,
        config: Config,
        store_url: str,
        experts: dict[str, DeploymentHandle[Any]],
        registry: DeploymentHandle[Any] | None = None,
    ) -> None:
        self._arguments = (config, store_url, experts, registry)
        _leave_request_ids_to_us()

    def __serve_build_asgi_app__(self) -> GatewayApp:
        """Called by Serve once, in the replica's event loop."""
        return GatewayApp(*self._arguments)


def _leave_request_ids_to_us() -> None:
    """Serve's HTTP server adds `X-Request-ID` to every reply, beside ours: put nothing in that middleware's place.

    Ray 2.60 has no setting for it. What stands there must be a coroutine function, or uvicorn takes it for ASGI 2.
    """
    from ray.serve._private import http_util

    def pass_through(app: Any) -> Any:
        async def call(scope: Any, receive: Any, send: Any) -> None:
            await app(scope, receive, send)

        return call

    vars(http_util)["RequestIdMiddleware"] = pass_through


def build_app(config: Config, store_url: str) -> Application:
    """The whole Serve application: the gateway as ingress, one deployment an expert.

    Raises `ValueError` where the configuration wants an API key and the environment has none, `PlacementError`
    where the experts do not fit the GPUs.
    """
    from ray import serve

    Callers(config)  # says now which key is missing
    gpus = gpu_shares(config.experts, gpus_here())
    experts = {name: deploy(name, expert, store_url, gpus=gpus[name]) for name, expert in config.experts.items()}
    gateway = serve.deployment(
        name="gateway",
        num_replicas=config.server.gateways,
        ray_actor_options={"num_cpus": 0.01},
        max_ongoing_requests=MAX_ONGOING,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=10.0,
    )
    registry = deploy_registry(config, store_url, experts) if takes_adapters(config) else None
    return gateway(serve.ingress()(Gateway)).bind(config, store_url, experts, registry)
