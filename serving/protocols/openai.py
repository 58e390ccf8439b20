"""OpenAI's `/v1/chat/completions` and `/v1/completions`: a request body, checked field by field, becomes a `Call`.

Replies are built in `signalbox.serving.protocols.openai_replies`. Field names, types and ranges are those of
OpenAI's API reference; what we refuse or add is said beside it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson

from signalbox.experts.base import GenerateRequest, InvalidRequest, SamplingParams, Unsupported
from signalbox.serving.protocols.fields import boolean, integer, is_int, kind_of, number, shown

Kind = Literal["chat", "completion"]

MAX_CHOICES = 128  # prompts x n of one request
MAX_MESSAGES = 4096
MAX_STOPS = 16  # OpenAI allows 4; local engines match strings themselves and need no lower bound
MAX_LOGIT_BIAS = 1024
MAX_INT = 2**63 - 1
ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})

_COMMON = {"model", "stream", "stream_options", "n", "stop", "temperature", "top_p", "top_k", "seed", "logprobs"}
_COMMON |= {"presence_penalty", "frequency_penalty", "logit_bias", "max_tokens", "ignore_eos", "signalbox"}
_KNOWN: dict[Kind, set[str]] = {
    "chat": _COMMON | {"messages", "max_completion_tokens", "top_logprobs"},
    "completion": _COMMON | {"prompt", "echo", "suffix", "best_of"},
}
# These change the answer, and not every engine can honour them: refused for experts whose engine does not say it can.
# From `min_p` on they are extensions of vLLM's.
_DEMANDING = {"tools", "tool_choice", "functions", "function_call", "response_format", "audio", "modalities"}
_DEMANDING |= {"prediction", "web_search_options", "min_p", "min_tokens", "repetition_penalty", "length_penalty"}
_DEMANDING |= {"use_beam_search", "stop_token_ids", "bad_words", "prompt_logprobs", "guided_json", "guided_regex"}
_DEMANDING |= {"guided_choice", "guided_grammar", "structured_outputs", "chat_template", "chat_template_kwargs"}
_DEMANDING |= {"add_generation_prompt", "continue_final_message"}
# Remote experts may make use of these; a local answer is the same without them.
_HINTS = {"reasoning_effort", "verbosity", "parallel_tool_calls", "service_tier"}
_IGNORED = {"user", "metadata", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "priority"}
_IGNORED |= {"request_id"}


@dataclass(slots=True)
class Call:
    """One checked request. Exactly one of `messages` and `prompts` is filled.

    `prompts` has several entries where `/v1/completions` was given a list; each yields `n` choices, in order.
    `demands` names the fields that not every engine can honour; `extra` holds those and hints.
    `options` is the body's `signalbox` object, unread.
    """

    kind: Kind
    model: str
    stream: bool = False
    include_usage: bool = False
    n: int = 1
    sampling: SamplingParams = field(default_factory=SamplingParams)
    messages: list[dict[str, Any]] | None = None
    prompts: list[str | list[int]] = field(default_factory=list)
    demands: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    options: Any = None

    @property
    def choices(self) -> int:
        """How many answers the request asks for."""
        return self.n * max(1, len(self.prompts))

    def prompt_bytes(self) -> int:
        """Size of the longest prompt in UTF-8 bytes (a token id counts as four)."""
        if self.messages is not None:
            return sum(len(text_of(message).encode()) + 8 for message in self.messages)
        return max(len(p.encode()) if isinstance(p, str) else 4 * len(p) for p in self.prompts)

    def unmet(self, understood: frozenset[str] | None) -> list[str]:
        """The demands beyond the fields that an engine understands (None: it understands all)."""
        return [] if understood is None else [name for name in self.demands if name not in understood]

    def requests(self, request_id: str, *, understood: frozenset[str] | None) -> list[GenerateRequest]:
        """One `GenerateRequest` a choice, with ids `<request_id>-<index>`.

        Choices of one prompt that share a seed would be equal, so choice i of a prompt draws from seed + i.
        Raises `Unsupported` where the request demands what is not among the fields that the expert's engine
        understands (`ExpertFacts.request_fields`; None: all).
        """
        if unmet := self.unmet(understood):
            raise Unsupported(
                f"'{unmet[0]}' is not supported by this expert, which runs locally; "
                "leave it out, or ask for an expert with `engine: openai`",
                param=unmet[0],
            )
        extra = self.extra if understood is None else {k: v for k, v in self.extra.items() if k in understood}
        built: list[GenerateRequest] = []
        prompts: list[Any] = self.prompts or [None]
        for prompt in prompts:
            for i in range(self.n):
                built.append(
                    GenerateRequest(
                        request_id=f"{request_id}-{len(built)}",
                        messages=self.messages,
                        prompt=prompt if isinstance(prompt, str) else None,
                        prompt_token_ids=prompt if isinstance(prompt, list) else None,
                        sampling=self._sampling(i),
                        extra=extra,
                    )
                )
        return built

    def _sampling(self, i: int) -> SamplingParams:
        params = self.sampling
        if i == 0 or params.seed is None:
            return params
        values = {name: getattr(params, name) for name in SamplingParams.__slots__}
        return SamplingParams(**{**values, "seed": (params.seed + i) & MAX_INT})

    def identity(self) -> dict[str, Any]:
        """Everything that determines the answer, defaults filled in, for the cache's key."""
        sampling = {name: getattr(self.sampling, name) for name in SamplingParams.__slots__}
        sampling["logit_bias"] = {str(token): bias for token, bias in sorted(self.sampling.logit_bias.items())}
        return {
            "messages": self.messages,
            "prompts": self.prompts,
            "n": self.n,
            "sampling": sampling,
            "extra": self.extra,
        }


def text_of(message: Mapping[str, Any]) -> str:
    """A chat message's text; the text parts of a list are joined by line breaks."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content or [] if part.get("type") == "text")


def parse_json(body: bytes) -> dict[str, Any]:
    """The body as a JSON object. Raises `InvalidRequest` that says where it is malformed."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise InvalidRequest(f"the body is not valid JSON: {error.msg} at {where}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {kind_of(value)}", code="invalid_json")
    return value


def parse_chat(body: dict[str, Any], *, model: str | None = None) -> Call:
    """A body of `/v1/chat/completions`. `model` stands in where the body has none. Raises `InvalidRequest`."""
    call = _parse_common("chat", body, model)
    call.messages = _messages(body.get("messages"), call.demands)
    return call


def parse_completion(body: dict[str, Any], *, model: str | None = None) -> Call:
    """A body of `/v1/completions`. `model` stands in where the body has none. Raises `InvalidRequest`."""
    call = _parse_common("completion", body, model)
    if boolean(body, "echo"):
        raise Unsupported("'echo' is not supported: the prompt is not returned", param="echo")
    if body.get("suffix") not in (None, ""):
        raise Unsupported("'suffix' is not supported: there is no insertion mode", param="suffix")
    if body.get("best_of") is not None and integer(body, "best_of", 1, 128) not in (1, call.n):
        raise Unsupported("'best_of' is not supported: ask for n answers and choose among them", param="best_of")
    call.prompts = _prompts(body.get("prompt"))
    if call.choices > MAX_CHOICES:
        raise InvalidRequest(
            f"prompts x n is {call.choices}; at most {MAX_CHOICES} are answered at once", param="prompt"
        )
    return call


def _parse_common(kind: Kind, body: dict[str, Any], model: str | None) -> Call:
    _check_names(kind, body)
    stream = boolean(body, "stream")
    extra = {name: body[name] for name in body if name in _DEMANDING | _HINTS and not _inert(name, body[name])}
    return Call(
        kind=kind,
        model=_model(body.get("model", model)),
        stream=stream,
        include_usage=_include_usage(body, stream),
        n=integer(body, "n", 1, 8, 1),
        sampling=_sampling(kind, body),
        demands=[name for name in extra if name in _DEMANDING],
        extra=extra,
        options=body.get("signalbox"),
    )


def _check_names(kind: Kind, body: dict[str, Any]) -> None:
    """Fields that we do not know are ignored, as clients send many; a misspelt known one is an error."""
    known = _KNOWN[kind]
    for name in body:
        if name in known or name in _DEMANDING or name in _HINTS or name in _IGNORED:
            continue
        near = difflib.get_close_matches(name[:64], known, n=1, cutoff=0.85)
        if near:
            raise InvalidRequest(f"there is no field '{name[:64]}'; did you mean '{near[0]}'?", param=name[:64])


def _inert(name: str, value: Any) -> bool:
    """Whether the field says what is so anyway: no tools, text as the format."""
    if value is None or value == [] or value == {}:
        return True
    match name:
        case "tool_choice" | "function_call":
            return value in ("none", "auto")
        case "response_format":
            return bool(value == {"type": "text"})
        case "modalities":
            return bool(value == ["text"])
        case "min_p" | "min_tokens":
            return bool(value == 0)
        case "repetition_penalty" | "length_penalty":
            return bool(value == 1)
        case "add_generation_prompt":
            return value is True
        case "use_beam_search" | "continue_final_message":
            return value is False
    return False


def _model(value: Any) -> str:
    if value is None:
        raise InvalidRequest(
            "'model' is missing: give an expert's name, or 'auto' to let the router choose", param="model"
        )
    if not isinstance(value, str) or not 0 < len(value) <= 256:
        raise InvalidRequest(f"'model' must be a string of 1 to 256 characters, not {kind_of(value)}", param="model")
    return value


def _include_usage(body: dict[str, Any], stream: bool) -> bool:
    options = body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise InvalidRequest(f"'stream_options' must be an object, not {kind_of(options)}", param="stream_options")
    if not stream:
        raise InvalidRequest("'stream_options' is only allowed when 'stream' is true", param="stream_options")
    value = options.get("include_usage")
    if value is not None and not isinstance(value, bool):
        raise InvalidRequest(
            f"'stream_options.include_usage' must be true or false, not {kind_of(value)}",
            param="stream_options.include_usage",
        )
    return bool(value)


def _sampling(kind: Kind, body: dict[str, Any]) -> SamplingParams:
    return SamplingParams(
        max_tokens=_max_tokens(kind, body),
        temperature=number(body, "temperature", 0, 2, 1.0),
        top_p=number(body, "top_p", 0, 1, 1.0, above=True),
        top_k=_top_k(body),
        seed=None if body.get("seed") is None else integer(body, "seed", -MAX_INT - 1, MAX_INT) & MAX_INT,
        stop=_stop(body.get("stop")),
        logprobs=_chat_logprobs(body) if kind == "chat" else _completion_logprobs(body),
        presence_penalty=number(body, "presence_penalty", -2, 2, 0.0),
        frequency_penalty=number(body, "frequency_penalty", -2, 2, 0.0),
        logit_bias=_logit_bias(body.get("logit_bias")),
        ignore_eos=boolean(body, "ignore_eos"),
    )


def _max_tokens(kind: Kind, body: dict[str, Any]) -> int | None:
    """`max_completion_tokens`, or its deprecated name `max_tokens`; both may stand there if they agree."""
    names = ("max_completion_tokens", "max_tokens") if kind == "chat" else ("max_tokens",)
    given = {name: integer(body, name, 1, 2**31 - 1) for name in names if body.get(name) is not None}
    if len(set(given.values())) > 1:
        raise InvalidRequest("'max_completion_tokens' and 'max_tokens' differ; send one of them", param="max_tokens")
    return next(iter(given.values()), None)


def _top_k(body: dict[str, Any]) -> int:
    """vLLM's extension; 0 and -1 both keep all tokens."""
    return max(0, integer(body, "top_k", -1, 2**31 - 1, 0))


def _stop(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(s, str) and 0 < len(s) <= 1024 for s in stops):
        raise InvalidRequest(
            "'stop' must be a string, or a list of strings, of 1 to 1024 characters each", param="stop"
        )
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(f"'stop' has {len(stops)} strings; at most {MAX_STOPS} are allowed", param="stop")
    return tuple(stops)


def _chat_logprobs(body: dict[str, Any]) -> int | None:
    wanted = boolean(body, "logprobs")
    if body.get("top_logprobs") is None:
        return 0 if wanted else None
    top = integer(body, "top_logprobs", 0, 20)
    if not wanted:
        raise InvalidRequest("'top_logprobs' needs 'logprobs': true", param="top_logprobs")
    return top


def _completion_logprobs(body: dict[str, Any]) -> int | None:
    return None if body.get("logprobs") is None else integer(body, "logprobs", 0, 20)


def _logit_bias(value: Any) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_LOGIT_BIAS:
        raise InvalidRequest(
            f"'logit_bias' must be an object of at most {MAX_LOGIT_BIAS} token ids with numbers", param="logit_bias"
        )
    biases: dict[int, float] = {}
    for token, bias in value.items():
        if not (token.isascii() and token.isdigit() and len(token) <= 10):
            raise InvalidRequest(f"'logit_bias' has the key '{token[:32]}', which is no token id", param="logit_bias")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise InvalidRequest(f"'logit_bias.{token}' must be a number from -100 to 100", param=f"logit_bias.{token}")
        biases[int(token)] = float(bias)
    return biases


def _messages(value: Any, demands: list[str]) -> list[dict[str, Any]]:
    """Checked copies of the messages; text parts become one string. What needs a remote expert is noted by its path."""
    if not isinstance(value, list) or not value:
        said = "is missing or empty" if value in (None, []) else f"must be a list, not {kind_of(value)}"
        raise InvalidRequest(
            f"'messages' {said}: send at least one message with 'role' and 'content'", param="messages"
        )
    if len(value) > MAX_MESSAGES:
        raise InvalidRequest(f"'messages' has {len(value)} entries; at most {MAX_MESSAGES}", param="messages")
    return [_message(message, f"messages[{i}]", demands) for i, message in enumerate(value)]


def _message(message: Any, path: str, demands: list[str]) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise InvalidRequest(f"'{path}' must be an object, not {kind_of(message)}", param=path)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidRequest(
            f"'{path}.role' must be system, developer, user, assistant or tool, not {shown(role)}",
            param=f"{path}.role",
        )
    demands += [f"{path}.{name}" for name in ("tool_calls", "function_call", "audio") if message.get(name)]
    content = message.get("content")
    if content is None and not (role == "assistant" and any(message.get(n) for n in ("tool_calls", "function_call"))):
        raise InvalidRequest(f"'{path}.content' is missing", param=f"{path}.content")
    # `developer` is the newer name of `system`; chat templates know only the latter.
    return {
        **message,
        "role": "system" if role == "developer" else role,
        "content": _content(content, path, demands),
    }


def _content(content: Any, path: str, demands: list[str]) -> Any:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise InvalidRequest(
            f"'{path}.content' must be a string or a list of parts, not {kind_of(content)}", param=f"{path}.content"
        )
    for i, part in enumerate(content):
        where = f"{path}.content[{i}]"
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise InvalidRequest(f"'{where}' must be an object with a 'type'", param=where)
        if part["type"] != "text":
            demands.append(where)
        elif not isinstance(part.get("text"), str):
            raise InvalidRequest(f"'{where}.text' must be a string, not {kind_of(part.get('text'))}", param=where)
    if any(part["type"] != "text" for part in content):
        return content
    return text_of({"content": content})


def _prompts(value: Any) -> list[str | list[int]]:
    """A string, a list of strings, a list of token ids, or a list of such lists."""
    if isinstance(value, str):
        prompts: list[Any] = [value]
    elif isinstance(value, list) and value and all(is_int(item) for item in value):
        prompts = [value]
    elif isinstance(value, list) and value:
        prompts = value
    else:
        said = "is missing" if value is None else f"must be a string or a list that is not empty, not {kind_of(value)}"
        raise InvalidRequest(f"'prompt' {said}", param="prompt")
    for i, prompt in enumerate(prompts):
        where = "prompt" if len(prompts) == 1 else f"prompt[{i}]"
        if isinstance(prompt, list) and prompt and all(is_int(t) for t in prompt):
            if not all(0 <= t < 2**31 for t in prompt):
                raise InvalidRequest(f"'{where}' has a token id that is negative or too large", param=where)
        elif not isinstance(prompt, str):
            raise InvalidRequest(f"'{where}' must be a string or a list of token ids", param=where)
        elif not prompt:
            raise InvalidRequest(f"'{where}' is empty", param=where)
    return prompts
