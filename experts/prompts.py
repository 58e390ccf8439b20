"""From requests to token ids: tokenizer and chat template of a local model, the same for every engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from signalbox.experts.base import ContextLengthExceeded, ExpertUnavailable, GenerateRequest, InvalidRequest

# A prompt of more characters is tokenised on a thread, off the event loop.
LONG_PROMPT = 20_000


class PromptEncoder:
    """A transformers tokenizer with the chat template that counts: the configured one, or the model's.

    `answer_prefix` is what stands between the chat template's end and an answer's first letter: a space after
    `Answer:`. Tokens of such models begin with that space; it belongs to neither the client's text nor the reference.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None) -> None:
        """Raises `ExpertUnavailable` where the chat template does not render."""
        self.tokenizer = tokenizer
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        self.answer_prefix = self._answer_prefix()

    def _answer_prefix(self) -> str:
        if not self.tokenizer.chat_template:
            return ""
        probe = [{"role": "user", "content": "x"}]
        try:
            text = str(self.tokenizer.apply_chat_template(probe, add_generation_prompt=True, tokenize=False))
        except Exception as error:
            raise ExpertUnavailable(f"the chat template does not render: {error}") from error
        return "" if not text or text[-1].isspace() or text.endswith(">") else " "

    def encode_chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """Chat messages -> token ids by the chat template. Raises `InvalidRequest` where the template refuses."""
        if not self.tokenizer.chat_template:
            raise InvalidRequest("this model has no chat template; use /v1/completions", param="messages")
        try:
            text = str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        except Exception as error:  # templates raise what they like, jinja2's own errors among it
            raise InvalidRequest(f"the chat template refuses these messages: {error}", param="messages") from error
        return self.encode(text, special=not self._template_writes_bos(text))

    def _template_writes_bos(self, text: str) -> bool:
        bos = self.tokenizer.bos_token
        return bool(bos) and text.startswith(bos)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Text -> token ids, with the tokens that begin a prompt if `special`."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids

    def token_text(self, token_id: int) -> str:
        """One token as text (for logprobs)."""
        return str(self.tokenizer.decode([token_id]))

    def prefix_of(self, request: GenerateRequest) -> str:
        """What to take off the beginning of the request's answer."""
        return self.answer_prefix if request.messages is not None else ""


async def tokenise(name: str, encoder: PromptEncoder, vocab_size: int, request: GenerateRequest) -> list[int]:
    """A request's prompt as token ids. Raises `InvalidRequest`; `name` is the expert's, for the message."""
    if request.prompt_token_ids is not None:
        tokens = list(request.prompt_token_ids)
        if unknown := [i for i in tokens if not 0 <= i < vocab_size]:
            raise InvalidRequest(f"token {unknown[0]} does not exist in {name!r}", param="prompt")
    elif request.messages is not None:
        size = sum(len(m.get("content") or "") for m in request.messages)
        tokens = await _off_loop(size, encoder.encode_chat, request.messages)
    else:
        text = request.prompt or ""
        tokens = await _off_loop(len(text), encoder.encode, text)
    if not tokens:
        raise InvalidRequest("the prompt is empty", param="prompt" if request.messages is None else "messages")
    return tokens


async def tokenise_reference(encoder: PromptEncoder, request: GenerateRequest, reference: str) -> list[int]:
    """A reference answer as the tokens that would follow the request's prompt. Raises `InvalidRequest` if empty."""
    text = encoder.prefix_of(request) + reference
    answer = await _off_loop(len(text), lambda text: encoder.encode(text, special=False), text)
    if not reference or not answer:
        raise InvalidRequest("the reference is empty", param="reference")
    return answer


def check_logit_bias(name: str, vocab_size: int, request: GenerateRequest) -> None:
    """Raises `InvalidRequest` where a token of `logit_bias` does not exist."""
    if unknown := [i for i in request.sampling.logit_bias if not 0 <= i < vocab_size]:
        raise InvalidRequest(f"token {unknown[0]} does not exist in {name!r}", param="logit_bias")


def check_length(name: str, longest: int, prompt: int, answer: int) -> None:
    """Raises `ContextLengthExceeded` where prompt and answer together exceed `longest` tokens."""
    if prompt + answer > longest:
        raise ContextLengthExceeded(
            f"expert {name!r} holds {longest} tokens, but the prompt has {prompt} and up to {answer} "
            "are to be generated: shorten the prompt or lower max_tokens",
            param="messages",
        )


async def _off_loop(size: int, function: Callable[[Any], list[int]], argument: Any) -> list[int]:
    """Call at once, or on a thread where the text is long."""
    return await asyncio.to_thread(function, argument) if size > LONG_PROMPT else function(argument)
