"""What a caller may say about routing: the body's `signalbox` object, and flags typed in the prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from signalbox.experts.base import InvalidRequest
from signalbox.policies.base import Policy
from signalbox.policies.flags import parse_flags
from signalbox.router.base import Prompt
from signalbox.serving.protocols.openai import Call, text_of

_PRIORITY = re.compile(rb"[+-]?(?:\d|10)")


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class CacheOptions(_Options):
    """`signalbox.cache` of a request."""

    mode: Literal["off", "exact"] = "exact"
    ttl: float | None = Field(None, gt=0, description="seconds; bounded by the configuration")
    namespace: str = Field("", max_length=128, description="answers are shared within one namespace only")


class Options(_Options):
    """The `signalbox` object of a request body: the caller's knobs."""

    cost_quality_tradeoff: float | None = Field(None, ge=0, le=10)
    allowed: list[str] | None = Field(None, min_length=1, max_length=64)
    fallbacks: list[str] | None = Field(None, max_length=16)
    cache: CacheOptions = Field(default_factory=CacheOptions)
    intent: str | None = Field(None, min_length=1, max_length=64, description="which of the policy's intents it is")
    samples: int | None = Field(None, ge=1, le=16, description="answers drawn at once; lowers the policy's number only")


def parse_options(value: Any) -> Options:
    """The `signalbox` object, strictly. Raises `InvalidRequest` naming the key."""
    if value is None:
        return Options()
    try:
        return Options.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        path = ".".join(("signalbox", *map(str, first["loc"])))
        if first["type"] == "extra_forbidden":
            raise InvalidRequest(f"there is no key '{path}'", param=path) from None
        said = first["msg"][:1].lower() + first["msg"][1:]
        raise InvalidRequest(f"'{path}': {said}", param=path) from None


def priority_of(headers: Mapping[bytes, bytes], policy: Policy) -> int:
    """The request's priority: its policy's, or what `x-priority` asks for where that is lower.

    A caller may step back behind its own other requests, never ahead of others'. Raises `InvalidRequest`.
    """
    given = headers.get(b"x-priority")
    if given is None:
        return policy.priority
    if not _PRIORITY.fullmatch(given):
        raise InvalidRequest("the header x-priority must be a whole number from -10 to 10", param="x-priority")
    return min(policy.priority, int(given))


def take_flags(call: Call) -> tuple[Call, list[Prompt], list[str]]:
    """Take `[Flag: ...]` marks off all that the user wrote; those of the last turn are the wishes.

    Returns the request without them, what a predictor may see of it, and the wishes.
    """
    if call.messages is None:
        texts: list[str | list[int]] = []
        prompts: list[Prompt] = []
        wishes: list[str] = []
        for prompt in call.prompts:
            if not isinstance(prompt, str):
                raise InvalidRequest("token ids fit one expert's tokenizer only: name the expert", param="prompt")
            text, found = parse_flags(prompt)
            if not text:
                raise InvalidRequest("'prompt' is empty but for its flags", param="prompt")
            texts.append(text)
            prompts.append(Prompt(text))
            wishes += [wish for wish in found if wish not in wishes]
        plain = call if not wishes else replace(call, prompts=texts)
        return plain, prompts, wishes
    messages, wishes, last = [], [], None
    for message in call.messages:
        if message["role"] == "user":
            message, wishes = _without_flags(message)
            last = message
        messages.append(message)
    system = "\n".join(text_of(m) for m in messages if m["role"] == "system")
    return replace(call, messages=messages), [Prompt(text_of(last or messages[-1]), system)], wishes


def _without_flags(message: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    content = message.get("content")
    if isinstance(content, str):
        text, wishes = parse_flags(content)
        return ({**message, "content": text} if wishes else message), wishes
    parts, wishes = [], []
    for part in content or []:
        if part.get("type") == "text":
            text, found = parse_flags(part["text"])
            part, wishes = {**part, "text": text}, wishes + found
        parts.append(part)
    return {**message, "content": parts}, wishes
