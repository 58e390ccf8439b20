"""The gateway: a plain ASGI application that speaks OpenAI's protocol, and the Serve application around it.

Routes are a dictionary, replies are bytes: nothing between the server and the dispatcher costs what a web framework
costs. Every reply carries `x-request-id`, every answer the decision headers, every error OpenAI's error object.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import os
import time
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from signalbox.experts.base import ExpertError, InvalidRequest
from signalbox.serving.adapter_api import AdapterApi, takes_adapters
from signalbox.serving.adapter_registry import deploy_registry
from signalbox.serving.adapter_table import AdapterTable
from signalbox.serving.config import Config
from signalbox.serving.dispatch import AUTO, Dispatcher, Plan, Run
from signalbox.serving.exchange import ClientGone, Exchange, Handler, Headers, Receive, Send
from signalbox.serving.expert_deployment import ExpertClient, deploy
from signalbox.serving.learner import Learner
from signalbox.serving.live_router import ArtifactWatch
from signalbox.serving.live_state import LiveState
from signalbox.serving.outcomes import MAX_BODY_BYTES, Outcomes, parse_feedback
from signalbox.serving.placement import gpu_shares, gpus_here
from signalbox.serving.pool import Pool
from signalbox.serving.protocols import openai_replies as replies
from signalbox.serving.protocols.openai import Call, parse_chat, parse_completion, parse_json
from signalbox.serving.routing import routing_of
from signalbox.serving.service_info import ServiceInfo
from signalbox.serving.store import Store

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle

log = logging.getLogger(__name__)

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
        self._key_digest = _key_digest(config)
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
        self._dispatcher = Dispatcher(config, experts=clients, pool=pool, routing=self._routing, store=self._store)
        self._adapter_api = AdapterApi(config, self._adapters)
        info = ServiceInfo(config, self._dispatcher, pool, self._live, self._routing, self._store)
        self._routes: dict[str, dict[str, Handler]] = {
            "/v1/chat/completions": {"POST": self._chat},
            "/v1/completions": {"POST": self._completion},
            "/v1/route": {"POST": self._route},
            "/v1/models": {"GET": info.models},
            "/v1/outcomes": {"POST": self._outcome},
            "/v1/routers": {"GET": self._routers},
            "/healthz": {"GET": info.healthz},
            "/readyz": {"GET": info.readyz},
            "/version": {"GET": info.version},
            **self._adapter_api.routes,
        }
        # Routes with a name at their end.
        self._prefixes: dict[str, dict[str, Handler]] = {
            "/v1/models/": {"GET": info.model},
            "/v1/decisions/": {"GET": self._decision},
            "/v1/adapters/": self._adapter_api.named,
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
        await self._live.close()
        await self._store.close()

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
            raise InvalidRequest(
                f"{exchange.path} takes {' or '.join(methods)}, not {exchange.method[:16]}",
                code="method_not_allowed",
                status=405,
            )
        if exchange.path.startswith("/v1/"):
            self._authenticate(exchange)
        return handler

    def _authenticate(self, exchange: Exchange) -> None:
        if self._key_digest is None:
            return
        given = exchange.headers.get(b"x-api-key", b"")
        scheme, _, token = exchange.headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer":
            given = token.strip()
        if not hmac.compare_digest(hashlib.sha256(given).digest(), self._key_digest):
            said = "the API key is wrong" if given else "an API key is needed, as bearer token or x-api-key"
            raise InvalidRequest(said, code="invalid_api_key", status=401)

    # -- answers -----------------------------------------------------------------------------------------------

    async def _chat(self, exchange: Exchange) -> None:
        body = parse_json(await exchange.body(self._config.server.max_body_bytes))
        await self._answer(exchange, parse_chat(body), f"chatcmpl-{uuid.uuid4().hex}")

    async def _completion(self, exchange: Exchange) -> None:
        body = parse_json(await exchange.body(self._config.server.max_body_bytes))
        await self._answer(exchange, parse_completion(body), f"cmpl-{uuid.uuid4().hex}")

    async def _answer(self, exchange: Exchange, call: Call, reply_id: str) -> None:
        """Answer, unless the client goes away first: then everything that runs for it is cancelled."""
        gone = False

        async def watch(answering: asyncio.Task[Any]) -> None:
            nonlocal gone
            await exchange.disconnected()
            gone = True
            answering.cancel()

        task = asyncio.current_task()
        assert task is not None
        watcher = asyncio.create_task(watch(task))
        outcome, run, recording = "ok", None, None
        try:
            run = await self._dispatcher.open(
                call, reply_id, exchange.began, slo_ttft_ms=_slo_ttft_ms(exchange.headers)
            )
            # On record before the last byte goes out, for then its outcome may be posted; meanwhile the expert writes.
            recording = asyncio.create_task(self._outcomes.record(exchange.id, call.model, run))
            await (self._stream if call.stream else self._whole)(exchange, call, run, reply_id, recording)
        except ExpertError as error:
            outcome = error.code
            if error.param == "messages" and call.kind == "completion":
                error.param = "prompt"  # engines see one kind of request
            raise
        except asyncio.CancelledError:
            outcome = "client_gone" if gone else "cancelled"
            if not gone or task.uncancel() > 0:
                raise
        except BaseException:
            outcome = "failed"
            raise
        finally:
            watcher.cancel()
            if recording is not None:
                recording.cancel()
            if run is not None:
                await run.aclose()
            _log_outcome(exchange, call, run, outcome)

    async def _whole(
        self, exchange: Exchange, call: Call, run: Run, reply_id: str, recording: asyncio.Task[None]
    ) -> None:
        async for _ in run:
            pass
        await self._dispatcher.settle(run)
        await recording
        body = replies.reply(
            call.kind,
            run.builder.answer(),
            reply_id=reply_id,
            created=int(time.time()),
            model=run.expert,
            logprobs=call.sampling.logprobs is not None,
        )
        await exchange.reply(200, body, _decision_headers(run))

    async def _stream(
        self, exchange: Exchange, call: Call, run: Run, reply_id: str, recording: asyncio.Task[None]
    ) -> None:
        events = replies.EventWriter(
            call.kind,
            reply_id=reply_id,
            created=int(time.time()),
            model=run.expert,
            logprobs=call.sampling.logprobs is not None,
            include_usage=call.include_usage,
        )
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        await exchange.start(200, headers + _decision_headers(run))
        async for index, chunks in run:
            data = events.events(index, chunks)
            if data:
                await exchange.send(data, more=True)
        await self._dispatcher.settle(run)
        await recording
        await exchange.send(events.usage(run.builder.usage()) + replies.DONE, more=False)

    async def _route(self, exchange: Exchange) -> None:
        body = parse_json(await exchange.body(self._config.server.max_body_bytes))
        parse = parse_chat if "messages" in body or "prompt" not in body else parse_completion
        plan = await self._dispatcher.plan(parse(body, model=AUTO), slo_ttft_ms=_slo_ttft_ms(exchange.headers))
        overhead = round((time.perf_counter() - exchange.began) * 1000, 3)
        await exchange.reply(200, describe_plan(plan) | {"overhead_ms": overhead})

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


def describe_plan(plan: Plan) -> dict[str, Any]:
    """A plan as `/v1/route` tells it. Money in USD, times in milliseconds."""
    decision = plan.decision
    return {
        "expert": plan.order[0],
        "policy": plan.policy,
        "router": plan.router,
        "confidence": plan.confidence,
        "fallbacks": plan.order[1:],
        "objective": decision.objective.model_dump() if decision else None,
        "flags": plan.flags,
        "violated": decision.violated if decision else [],
        "ratings": decision.ratings if decision else [],
    }


def _decision_headers(run: Run) -> Headers:
    plan = run.plan
    headers = [
        (b"x-signalbox-expert", run.expert.encode()),
        (b"x-signalbox-router", plan.router.encode()),
        (b"x-signalbox-policy", plan.policy.encode()),
        (b"x-signalbox-cache", run.cache.encode()),
        (b"x-signalbox-attempts", b"%d" % run.attempts),
        (b"x-signalbox-overhead-ms", b"%.2f" % ((run.hop - run.began) * 1000)),
    ]
    if plan.confidence is not None:
        headers.append((b"x-signalbox-confidence", b"%.3f" % plan.confidence))
    return headers


def _slo_ttft_ms(headers: Mapping[bytes, bytes]) -> float | None:
    """The caller's ceiling for the time to first token. Raises `InvalidRequest`."""
    given = headers.get(b"x-slo-ttft-ms")
    if given is None:
        return None
    with contextlib.suppress(ValueError):
        ceiling = float(given)
        if 0 < ceiling < 1e9:
            return ceiling
    raise InvalidRequest("the header x-slo-ttft-ms must be a number of milliseconds above 0", param="x-slo-ttft-ms")


def _key_digest(config: Config) -> bytes | None:
    name = config.server.api_key_env
    if name is None:
        return None
    key = os.environ.get(name, "")
    if not key:
        raise ValueError(f"server.api_key_env names {name}, which is not set: set it, or leave api_key_env out")
    return hashlib.sha256(key.encode()).digest()


def _log_outcome(exchange: Exchange, call: Call, run: Run | None, outcome: str) -> None:
    """The one line of a request: who answered, how much, how long. No word of prompt or answer."""
    if not log.isEnabledFor(logging.INFO):
        return
    tokens = run.builder.usage() if run else None
    log.info(
        "request %s model=%s expert=%s cache=%s attempts=%d prompt_tokens=%d completion_tokens=%d ms=%.1f outcome=%s",
        exchange.id,
        call.model,
        run.expert if run else "-",
        run.cache if run else "-",
        run.attempts if run else 0,
        tokens.prompt_tokens if tokens else 0,
        tokens.completion_tokens if tokens else 0,
        (time.perf_counter() - exchange.began) * 1000,
        outcome,
    )


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

    _key_digest(config)
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
