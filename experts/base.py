"""What an expert is: requests in, a stream of chunks out, behind one `Engine` protocol.

Everything that crosses the hop between gateway and expert is defined here, as plain dataclasses.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

FinishReason = Literal["stop", "length", "abort", "error"]


class ExpertError(Exception):
    """An error that a client is told about; `status` is the HTTP status it becomes.

    `param` names the request field at fault and `code` is the machine-readable reason, both as in
    OpenAI's error object. `retryable` says that another expert may be tried instead, and `retry_after_s` when the
    client may come again (`Retry-After`). `policy` names the policy that refused, where one did, for the metrics.
    """

    status = 500
    code = "expert_failed"
    retryable = True
    policy: str | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or type(self).code
        self.status = status or type(self).status
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> Any:  # keeps the fields when Ray carries the error from one process to another
        return (_rebuild, (type(self), self.message, self.param, self.code, self.status, self.retry_after_s))


def _rebuild(
    kind: type[ExpertError], message: str, param: str | None, code: str, status: int, retry_after_s: float | None
) -> ExpertError:
    return kind(message, param=param, code=code, status=status, retry_after_s=retry_after_s)


class InvalidRequest(ExpertError):
    """The request cannot be served by this expert as it stands (HTTP 400)."""

    status = 400
    code = "invalid_request"
    retryable = False


class ContextLengthExceeded(InvalidRequest):
    """Prompt, or prompt and answer, do not fit the expert's context (HTTP 400)."""

    code = "context_length_exceeded"


class QueueFull(ExpertError):
    """The expert's queue is at its bound (HTTP 429)."""

    status = 429
    code = "queue_full"


class ExpertUnavailable(ExpertError):
    """The expert is not running or cannot be reached (HTTP 503)."""

    status = 503
    code = "expert_unavailable"


class ReplicaNotReady(ExpertUnavailable):
    """This replica's engine is not running yet, or not any more; another replica's may be (HTTP 503)."""


class AdapterNotLoaded(ExpertError):
    """This replica does not hold the adapter that the request names: it is gone, or elsewhere (HTTP 503)."""

    status = 503
    code = "adapter_not_loaded"


class Unsupported(InvalidRequest):
    """The expert's engine has no such ability, e.g. adapters on a remote model (HTTP 400)."""

    code = "unsupported"


@dataclass(slots=True, frozen=True)
class SamplingParams:
    """How tokens are drawn; names and meaning as in OpenAI's API and vLLM.

    `temperature` 0 is greedy. `top_k` 0 keeps all tokens. `logprobs` is the number of alternatives to
    report for each token (0: only the chosen one's), or None for none. `max_tokens` None means as many as
    the context holds. `logit_bias` maps a token id to a number added to its logit.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    ignore_eos: bool = False


@dataclass(slots=True)
class GenerateRequest:
    """One request to an engine: exactly one of `messages`, `prompt` and `prompt_token_ids` is set.

    `messages` are OpenAI chat messages whose content is text; the engine applies the chat template.
    `adapter` names an adapter of the engine's base, or None for the base itself. `extra` holds request
    fields beyond these (tools, response_format, ...), unread so far: those that the expert's configuration class
    says its engine understands (`request_fields`).
    """

    request_id: str
    messages: list[dict[str, Any]] | None = None
    prompt: str | None = None
    prompt_token_ids: list[int] | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    adapter: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True, frozen=True)
class TokenLogprob:
    """Natural-log probability of one generated token and of the likeliest alternatives, best first."""

    token: str
    logprob: float
    raw: bytes
    top: tuple[tuple[str, float, bytes], ...] = ()


@dataclass(slots=True, frozen=True)
class Usage:
    """Token counts of one request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(slots=True)
class Chunk:
    """A piece of an answer. The last chunk of a stream has `finish_reason` and `usage`.

    `text` may be empty (bytes of an unfinished character, or text held back that may yet become a stop
    string). `extra` carries fields of remote replies that we do not interpret, such as tool calls.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | str | None = None
    usage: Usage | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True, frozen=True)
class Score:
    """How well an expert predicts a reference answer (the label that Tryage learns).

    `nll_bits` is the negative log2-likelihood of the reference given the prompt, summed over its tokens.
    """

    nll_bits: float
    reference_bytes: int
    reference_tokens: int
    prompt_tokens: int
    seconds: float

    @property
    def bits_per_byte(self) -> float:
        """Loss comparable between tokenizers."""
        return self.nll_bits / max(1, self.reference_bytes)


@dataclass(slots=True, frozen=True)
class EngineState:
    """What an engine reports of itself, published for the decision.

    `ttft_ms` and `tpot_ms` are exponentially weighted means over recent requests (NaN-free: None before the
    first one). `memory_bytes` counts weights and KV cache; `kv_cache_use` is the share of the cache's blocks in use,
    0 to 1, None where the engine does not say. `adapters` has each loaded adapter's requests that run or wait;
    `max_adapters` is how many fit.
    """

    running: int = 0
    waiting: int = 0
    max_running: int = 1
    max_waiting: int = 0
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    memory_bytes: int = 0
    kv_cache_use: float | None = None
    adapters: dict[str, int] = field(default_factory=dict)
    max_adapters: int = 0
    healthy: bool = True


@runtime_checkable
class Engine(Protocol):
    """One model that answers requests, many at once.

    `generate` and `score` raise `ExpertError`s before the first chunk where a request cannot be served.
    Closing the iterator early, or cancelling the task that reads it, frees the request's place at once.
    """

    async def start(self) -> None:
        """Load the model; returns when requests can be served. Raises `ExpertUnavailable` with the reason."""

    def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """Answer one request as a stream of chunks, the last of which has a finish reason and usage."""

    async def score(self, request: GenerateRequest, reference: str) -> Score:
        """Likelihood of `reference` as the answer to the request. Raises `Unsupported` where not to be had."""

    async def load(self, name: str, path: str) -> None:
        """Make the adapter in the folder `path` usable as `GenerateRequest.adapter`; returns when it is.

        The folder is checked again. Raises `InvalidRequest` (422, `param` the tensor at fault) where it does not fit,
        `QueueFull` where no slot is free, `Unsupported` on engines without adapters. A name that is loaded already is
        an error: a new version has a new name.
        """

    async def unload(self, name: str) -> None:
        """Take no more requests for an adapter, wait for those that run or wait, then free its slot.

        Nothing happens where it is not loaded. Requests that come later get `AdapterNotLoaded`.
        """

    def adapters(self) -> Sequence[str]:
        """Names of the adapters that are loaded now."""

    def state(self) -> EngineState:
        """Load and speed at this moment; cheap, never blocks."""

    async def close(self) -> None:
        """Abort what runs and give all memory back."""
