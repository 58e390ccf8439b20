"""OpenAI's protocol: every field's bounds, and replies that OpenAI's own client library reads."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from signalbox.experts.base import (
    Chunk,
    ExpertError,
    ExpertUnavailable,
    InvalidRequest,
    QueueFull,
    SamplingParams,
    TokenLogprob,
    Unsupported,
    Usage,
)
from signalbox.serving.options import parse_options, take_flags
from signalbox.serving.protocols import openai_replies as replies
from signalbox.serving.protocols.openai import Call, parse_chat, parse_completion, parse_json

HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> Call:
    return parse_chat({"model": "auto", "messages": HELLO} | fields)


def completion(**fields: Any) -> Call:
    return parse_completion({"model": "auto", "prompt": "hello"} | fields)


# -- requests ------------------------------------------------------------------------------------------------------


def test_defaults_are_openai_s() -> None:
    call = chat()
    assert (call.stream, call.n, call.include_usage) == (False, 1, False)
    assert call.sampling == SamplingParams()
    assert call.sampling.temperature == 1.0 and call.sampling.max_tokens is None


def test_every_field_arrives() -> None:
    call = chat(
        max_completion_tokens=7,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        seed=3,
        stop=["\n", "END"],
        presence_penalty=-2,
        frequency_penalty=2,
        logit_bias={"5": -100, "7": 1.5},
        logprobs=True,
        top_logprobs=4,
        stream=True,
        stream_options={"include_usage": True},
        n=2,
        ignore_eos=True,
    )
    assert call.sampling == SamplingParams(
        max_tokens=7,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        seed=3,
        stop=("\n", "END"),
        logprobs=4,
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        logit_bias={5: -100.0, 7: 1.5},
        ignore_eos=True,
    )
    assert call.stream and call.include_usage and call.n == 2


def test_null_means_absent() -> None:
    names = (
        "max_tokens temperature top_p seed stop presence_penalty logit_bias logprobs top_logprobs stream n tools user"
    )
    assert chat(**dict.fromkeys(names.split())) == chat()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"model": ""}, "model"),
        ({"model": 3}, "model"),
        ({"model": "m" * 257}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
        ({"messages": [*HELLO, {"role": "user"}]}, "messages[1].content"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0]"),
        ({"messages": HELLO * 5000}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": False}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"seed": "x"}, "seed"),
        ({"seed": 1e30}, "seed"),
        ({"stop": 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": ["x", 5]}, "stop"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {"dog": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {"5": None}}, "logit_bias.5"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"logprobs": 5}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": 1}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"temprature": 0}, "temprature"),
        ({"max_token": 5}, "max_token"),
    ],
)
def test_bad_chat_fields_are_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(**fields)
    assert caught.value.status == 400
    assert (caught.value.param or "").startswith(param)
    assert caught.value.message and len(caught.value.message) < 400


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt[1]"),
        ({"prompt": ["a", 5]}, "prompt[1]"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": [2**31]}, "prompt"),
        ({"prompt": [[1], [True]]}, "prompt[1]"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": ["a"] * 17, "n": 8}, "prompt"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"echo": True}, "echo"),
        ({"suffix": "the end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"best_of": "x"}, "best_of"),
    ],
)
def test_bad_completion_fields_are_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        completion(**fields)
    assert (caught.value.param or "").startswith(param)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not valid JSON"),
        (b'{"model": "auto",}', "line 1 column"),
        (b'{\n "model": auto}', "line 2 column"),
        (b"[1, 2]", "must be a JSON object, not a list"),
        (b'"x"', "must be a JSON object, not a string"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b'{"a": NaN}', "not valid JSON"),
        (b"[" * 5000 + b"]" * 5000, "not valid JSON"),
    ],
)
def test_malformed_json_says_where(body: bytes, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said) as caught:
        parse_json(body)
    assert caught.value.code == "invalid_json"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
FIELDS = "model messages prompt n stop temperature top_p top_k seed logit_bias logprobs top_logprobs max_tokens stream"
FIELDS += " stream_options echo suffix best_of tools response_format signalbox presence_penalty max_completion_tokens"


@given(st.dictionaries(st.sampled_from(FIELDS.split()), json_values, max_size=6))
def test_any_json_is_either_served_or_refused_in_words(body: dict[str, Any]) -> None:
    """No body, however odd, may end in anything but a `Call` or an `InvalidRequest`."""
    for parse, base in ((parse_chat, {"messages": HELLO}), (parse_completion, {"prompt": "x"})):
        try:
            call = parse({"model": "auto"} | base | body)
            parse_options(call.options)
            call.requests("r", understood=None)
            call.prompt_bytes()
            orjson.dumps(call.identity())
            take_flags(call)
        except InvalidRequest as error:
            assert error.message and error.status == 400


def test_roles_and_parts() -> None:
    call = parse_chat(
        {
            "model": "auto",
            "messages": [
                {"role": "developer", "content": "be brief"},
                {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
                {"role": "assistant", "content": "three"},
                {"role": "tool", "content": "four", "tool_call_id": "c"},
            ],
        }
    )
    assert call.messages is not None
    assert [(m["role"], m["content"]) for m in call.messages] == [
        ("system", "be brief"),
        ("user", "one\ntwo"),
        ("assistant", "three"),
        ("tool", "four"),
    ]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"min_p": 0.1}, "min_p"),
        ({"repetition_penalty": 1.2}, "repetition_penalty"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": [*HELLO, {"role": "assistant", "tool_calls": [{"id": "c"}]}]}, "messages[1].tool_calls"),
    ],
)
def test_what_only_remote_experts_can_do(fields: dict[str, Any], param: str) -> None:
    call = chat(**fields)
    with pytest.raises(Unsupported) as caught:
        call.requests("r", understood=frozenset())
    assert caught.value.param == param and f"'{param}'" in caught.value.message
    [request] = call.requests("r", understood=None)
    for name, value in fields.items():
        assert request.extra.get(name) == value or name == "messages"


def test_harmless_fields_are_ignored() -> None:
    fields: dict[str, Any] = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "parallel_tool_calls": True,
        "service_tier": "auto",
        "reasoning_effort": "low",
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "top_a": 0.5,
        "something_new": [1],
    }
    [request] = chat(**fields).requests("r", understood=frozenset())
    assert request.extra == {}


def test_choices_of_one_prompt_draw_from_different_seeds() -> None:
    call = completion(prompt=["a", "b"], n=3, seed=2**63 - 1)
    requests = call.requests("r", understood=frozenset())
    assert [r.request_id for r in requests] == [f"r-{i}" for i in range(6)]
    assert [r.prompt for r in requests] == ["a"] * 3 + ["b"] * 3
    assert [r.sampling.seed for r in requests] == [2**63 - 1, 0, 1] * 2
    assert {r.sampling.seed for r in completion(n=3).requests("r", understood=frozenset())} == {None}


def test_token_ids() -> None:
    [request] = completion(prompt=[1, 2, 3]).requests("r", understood=frozenset())
    assert request.prompt_token_ids == [1, 2, 3] and request.prompt is None
    assert [r.prompt_token_ids for r in completion(prompt=[[1], [2, 3]]).requests("r", understood=frozenset())] == [
        [1],
        [2, 3],
    ]


def test_identity_tells_apart_what_changes_the_answer_and_nothing_else() -> None:
    def identity(**fields: Any) -> bytes:
        return orjson.dumps(chat(**fields).identity(), option=orjson.OPT_SORT_KEYS)

    assert identity() == identity(stream=True, user="u", temperature=1, n=1, signalbox={"cache": {"mode": "off"}})
    different = [{"temperature": 0}, {"seed": 1}, {"n": 2}, {"stop": "x"}, {"logprobs": True}, {"max_tokens": 3}]
    different += [{"messages": [{"role": "user", "content": "hallo"}]}, {"logit_bias": {"1": 1}}, {"tools": [{}]}]
    assert len({identity(), *(identity(**fields) for fields in different)}) == len(different) + 1


# -- the caller's knobs --------------------------------------------------------------------------------------------


def test_options() -> None:
    options = parse_options(
        {
            "cost_quality_tradeoff": 3,
            "allowed": ["gpt-*"],
            "fallbacks": ["a"],
            "cache": {"mode": "off", "ttl": 5, "namespace": "n"},
        }
    )
    assert options.cost_quality_tradeoff == 3 and options.cache.mode == "off" and options.cache.ttl == 5
    assert parse_options(None) == parse_options({})


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ("cheap", "signalbox"),
        ([], "signalbox"),
        ({"tradeoff": 3}, "signalbox.tradeoff"),
        ({"cost_quality_tradeoff": 11}, "signalbox.cost_quality_tradeoff"),
        ({"cost_quality_tradeoff": -1}, "signalbox.cost_quality_tradeoff"),
        ({"cost_quality_tradeoff": "3"}, "signalbox.cost_quality_tradeoff"),
        ({"allowed": "gpt-*"}, "signalbox.allowed"),
        ({"allowed": []}, "signalbox.allowed"),
        ({"allowed": [3]}, "signalbox.allowed.0"),
        ({"fallbacks": ["x"] * 17}, "signalbox.fallbacks"),
        ({"cache": {"mode": "semantic"}}, "signalbox.cache.mode"),
        ({"cache": {"ttl": 0}}, "signalbox.cache.ttl"),
        ({"cache": {"age": 5}}, "signalbox.cache.age"),
    ],
)
def test_bad_options_are_named(value: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_options(value)
    assert caught.value.param == param and param in caught.value.message


def test_flags_are_taken_off_what_the_user_wrote_and_the_last_turn_s_count() -> None:
    call = parse_chat(
        {
            "model": "auto",
            "messages": [
                {"role": "system", "content": "[Flag: most recent] stays: the system wrote it"},
                {"role": "user", "content": "first [Flag: lowest latency]"},
                {"role": "assistant", "content": "[Flag: lowest cost] stays"},
                {"role": "user", "content": "last [Flag: smallest model] [Flag: paint it red]"},
            ],
        }
    )
    plain, [prompt], wishes = take_flags(call)
    assert wishes == ["size"]
    assert plain.messages is not None
    assert [m["content"] for m in plain.messages][1:] == [
        "first",
        "[Flag: lowest cost] stays",
        "last [Flag: paint it red]",
    ]
    assert prompt.text == "last [Flag: paint it red]" and prompt.system.startswith("[Flag: most recent]")
    assert call.messages is not None and "smallest" in call.messages[3]["content"], "the request itself is left alone"


def test_flags_in_completions() -> None:
    plain, prompts, wishes = take_flags(completion(prompt=["a [Flag: cheapest]", "b"]))
    assert plain.prompts == ["a", "b"] and [p.text for p in prompts] == ["a", "b"] and wishes == ["cost"]
    with pytest.raises(InvalidRequest, match="token ids"):
        take_flags(completion(prompt=[1, 2]))
    with pytest.raises(InvalidRequest, match="but for its flags"):
        take_flags(completion(prompt="[Flag: cheapest]"))


# -- replies -------------------------------------------------------------------------------------------------------

TOKENS = [
    TokenLogprob("na", -0.1, b"na", (("na", -0.1, b"na"), ("no", -2.5, b"no"))),
    TokenLogprob("ï", -0.2, "ï".encode(), (("ï", -0.2, "ï".encode()),)),
]
CHUNKS = [
    Chunk("na", [1], [TOKENS[0]]),
    Chunk("ï", [2], [TOKENS[1]]),
    Chunk("", [3]),
    Chunk('ve "x"\n', [4], [], "stop", Usage(5, 4, 1)),
]
HEAD: dict[str, Any] = {"reply_id": "id-1", "created": 1700000000, "model": "tiny"}


def built(chunks: list[Chunk], choices: int = 1) -> replies.Answer:
    builder = replies.AnswerBuilder(choices, choices)
    for i in range(choices):
        assert not builder.complete
        builder.add(i, chunks)
    assert builder.complete
    return builder.answer()


def events(data: bytes) -> list[dict[str, Any]]:
    assert data.endswith(b"\n\n")
    return [orjson.loads(line.removeprefix(b"data: ")) for line in data.split(b"\n\n") if line]


def test_chat_completion_object() -> None:
    body = orjson.loads(replies.reply("chat", built(CHUNKS, 2), logprobs=True, **HEAD))
    parsed = ChatCompletion.model_validate(body, strict=True)
    assert body["object"] == "chat.completion" and parsed.id == "id-1" and parsed.model == "tiny"
    assert [c.index for c in parsed.choices] == [0, 1]
    assert parsed.choices[1].message.content == 'naïve "x"\n' and parsed.choices[1].finish_reason == "stop"
    assert parsed.usage is not None
    assert (parsed.usage.prompt_tokens, parsed.usage.completion_tokens, parsed.usage.total_tokens) == (5, 8, 13)
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}
    logprobs = parsed.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert logprobs.content[0].top_logprobs[1].token == "no" and logprobs.content[1].bytes == [0xC3, 0xAF]
    assert orjson.loads(replies.reply("chat", built(CHUNKS), logprobs=False, **HEAD))["choices"][0]["logprobs"] is None


def test_text_completion_object() -> None:
    body = orjson.loads(replies.reply("completion", built(CHUNKS), logprobs=True, **HEAD))
    parsed = Completion.model_validate(body, strict=True)
    assert body["object"] == "text_completion" and parsed.choices[0].text == 'naïve "x"\n'
    logprobs = parsed.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["na", "ï"] and logprobs.text_offset == [0, 2]
    assert logprobs.top_logprobs == [{"na": -0.1, "no": -2.5}, {"ï": -0.2}]


def test_prompt_tokens_count_once_for_each_prompt() -> None:
    builder = replies.AnswerBuilder(4, 2)  # two prompts, two choices each
    for i, prompt_tokens in enumerate((5, 5, 7, 7)):
        builder.add(i, [Chunk("x", [1], finish_reason="length", usage=Usage(prompt_tokens, 3))])
    assert builder.usage() == Usage(12, 12, 0)


def test_chat_stream() -> None:
    writer = replies.EventWriter("chat", logprobs=True, include_usage=True, **HEAD)
    parsed = [writer.events(0, CHUNKS[:2]), writer.events(1, CHUNKS[:1]), writer.events(0, CHUNKS[2:])]
    seen = [event for data in parsed for event in events(data)]
    for event in seen:
        ChatCompletionChunk.model_validate(event, strict=True)
        assert event["object"] == "chat.completion.chunk" and event["usage"] is None
    first = [e for e in seen if e["choices"][0]["index"] == 0]
    assert first[0]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert [e["choices"][0]["delta"].get("content") for e in first[1:]] == ["na", "ï", 've "x"\n', None]
    assert [e["choices"][0]["finish_reason"] for e in first] == [None] * 4 + ["stop"]
    assert first[-1]["choices"][0]["delta"] == {}
    assert first[1]["choices"][0]["logprobs"]["content"][0]["token"] == "na"
    [last] = events(writer.usage(Usage(5, 4)))
    assert last["choices"] == [] and last["usage"]["total_tokens"] == 9
    assert last.keys() == first[0].keys()


def test_stream_without_usage_and_logprobs() -> None:
    writer = replies.EventWriter("chat", logprobs=False, include_usage=False, **HEAD)
    seen = events(writer.events(0, CHUNKS))
    assert all("usage" not in event and event["choices"][0]["logprobs"] is None for event in seen)
    assert writer.usage(Usage(1, 1)) == b""


def test_completion_stream() -> None:
    writer = replies.EventWriter("completion", logprobs=True, include_usage=False, **HEAD)
    seen = events(writer.events(0, CHUNKS[:1])) + events(writer.events(0, CHUNKS[1:]))
    for event in seen:
        Completion.model_validate({**event, "choices": [{**event["choices"][0], "finish_reason": "stop"}]}, strict=True)
    assert "".join(e["choices"][0]["text"] for e in seen) == 'naïve "x"\n'
    assert [e["choices"][0]["logprobs"]["text_offset"] for e in seen[:2]] == [[0], [2]]
    assert seen[-1]["choices"][0]["finish_reason"] == "stop"


def test_tool_calls_of_a_remote_expert_are_put_together() -> None:
    def delta(**function: Any) -> Chunk:
        return Chunk(extra={"tool_calls": [{"index": 0, "function": function}]})

    opening = {"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": ""}}
    chunks = [Chunk(extra={"tool_calls": [opening], "reasoning_content": "let "})]
    chunks += [delta(arguments='{"a"'), delta(arguments=": 1}"), Chunk(extra={"reasoning_content": "me"})]
    second = {"index": 1, "id": "c2", "type": "function", "function": {"name": "g", "arguments": "{}"}}
    chunks += [Chunk(extra={"tool_calls": [second]}), Chunk(finish_reason="tool_calls", usage=Usage(1, 2))]
    writer = replies.EventWriter("chat", logprobs=False, include_usage=False, **HEAD)
    seen = events(writer.events(0, chunks))
    assert seen[2]["choices"][0]["delta"] == {"tool_calls": [{"index": 0, "function": {"arguments": '{"a"'}}]}
    body = orjson.loads(replies.reply("chat", built(chunks), logprobs=False, **HEAD))
    message = body["choices"][0]["message"]
    assert message["content"] is None and message["reasoning_content"] == "let me"
    assert message["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
        {"id": "c2", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ]
    ChatCompletion.model_validate(body, strict=True)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InvalidRequest("m", param="p"), "invalid_request_error"),
        (InvalidRequest("m", status=401), "authentication_error"),
        (InvalidRequest("m", status=404, code="model_not_found"), "invalid_request_error"),
        (QueueFull("m"), "rate_limit_error"),
        (ExpertUnavailable("m"), "server_error"),
        (ExpertError("m"), "server_error"),
    ],
)
def test_error_objects(error: ExpertError, kind: str) -> None:
    body = replies.error_object(error)
    assert body == {"error": {"message": "m", "type": kind, "param": error.param, "code": error.code}}
    [event] = events(replies.error_event(error, request_id="r"))
    assert event["error"]["request_id"] == "r"
