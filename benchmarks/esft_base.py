"""A small mixture of experts, trained from nothing on general text: the base of `benchmarks.esft`.

Text: questions, worked solutions and programs of the tables in `../shared/data`, and the bare utterances of the two
tasks, without a label. What is held out, is so by its first words, so that variants of a question stay together.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, OlmoeConfig, PreTrainedTokenizerFast

from signalbox.adapters.esft_scores import expert_layers
from signalbox.adapters.train_data import Encoded, hash_of, held_out

BEGIN, END = "<|endoftext|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TASKS = {"clinc150": "intent", "banking77": "intent"}  # table -> column of its labels
LONGEST = 3000  # characters of a document
HELD_OUT_CHARACTERS = 1000
BALANCE = 0.01  # weight of the loss that keeps the experts of a layer in use


@dataclass(frozen=True)
class Size:
    """What the base is and how long it learns. `seconds` bound the pretraining, whatever its `steps`."""

    layers: int = 8
    hidden: int = 256
    intermediate: int = 96
    experts: int = 32
    top_k: int = 4
    heads: int = 4
    vocabulary: int = 8192
    context: int = 1024
    documents: int = 100_000
    steps: int = 2500
    seconds: float = 70.0
    batch: int = 64
    length: int = 512
    rate: float = 2e-3


# Of a machine without a GPU, where ten million tokens take 40 minutes on two cores.
ON_CPU = replace(Size(), layers=4, vocabulary=4096, batch=16, length=256)
QUICK = Size(2, 64, 32, 8, 2, 2, 1024, 1024, 2500, 1000, 15.0, 4, 128, 4e-3)


@dataclass(frozen=True)
class Corpus:
    """General documents, the ones in chats already in the chat's template."""

    train: list[str]
    held_out: list[str]


def read_corpus(data: Path, most: int) -> Corpus:
    """Documents of all tables; no label of a task is among them, and no text that a task holds out."""
    import pyarrow.parquet as pq

    def columns(name: str, *wanted: str) -> Iterator[tuple[str, ...]]:
        table = pq.read_table(data / f"{name}.parquet", columns=list(wanted))
        yield from zip(*(table[column].to_pylist() for column in wanted), strict=True)

    plain = [text for name in ("mmlu_pro", "routellm_pair") for (text,) in columns(f"routing/{name}", "prompt")]
    chats = [(text, re.sub(r"<<.*?>>", "", answer)) for text, answer in columns("tasks/gsm8k", "text", "solution")]
    chats += columns("tasks/bbh", "text", "answer")  # type: ignore[arg-type]
    chats += columns("tasks/mbpp", "text", "code")  # type: ignore[arg-type]
    documents = plain + [text + code for text, code in columns("tasks/humaneval", "text", "canonical_solution")]
    documents += [chat(text) + answer + END for text, answer in chats]
    bare = [text for name in TASKS for (text,) in columns(f"tasks/{name}", "text") if not held_out(text)]
    order = sorted({text[:LONGEST] for text in documents}, key=hash_of)[:most]
    kept = [text for text in order if held_out(_first_words(text), 0.05)]
    train = [text for text in order if not held_out(_first_words(text), 0.05)]
    return Corpus(train + sorted(set(bare), key=hash_of)[:most], kept)


def chat(text: str) -> str:
    """A user's text as the chat template has it, up to where the answer begins."""
    return f"<|im_start|>user\n{text}{END}\n<|im_start|>assistant\n"


def _first_words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.removeprefix(chat("").split(END)[0]))[:12])


def train_tokenizer(corpus: Corpus, size: Size) -> Any:
    """A byte-level BPE tokenizer of the corpus, with the chat's template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size.vocabulary,
        special_tokens=[BEGIN, "<|im_start|>", END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.train, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=BEGIN,
        chat_template=CHAT_TEMPLATE,
        model_max_length=size.context,
    )


def stream_of(tokenizer: Any, documents: Sequence[str]) -> Tensor:
    """All documents end to end as tokens, int32 [N], each after a token that begins it."""
    begin = tokenizer.bos_token_id
    encoded = tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in (begin, *ids)], dtype=torch.int32)


def general_rows(tokenizer: Any, corpus: Corpus, count: int, context: int) -> list[Encoded]:
    """Held-out documents, their beginnings, as rows of which every byte is predicted."""
    texts = [text[:HELD_OUT_CHARACTERS] for text in corpus.held_out[:count]]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [
        Encoded([tokenizer.bos_token_id], [*ids, tokenizer.eos_token_id], len(text.encode()), text, "")
        for text, ids in zip(texts, encoded, strict=True)
        if ids and len(ids) + 2 <= context
    ]


def new_model(tokenizer: Any, size: Size, seed: int = 0) -> Any:
    """An OLMoE with random weights: softmax router, weights not renormalised, no shared experts."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(
        OlmoeConfig(
            vocab_size=-(-len(tokenizer) // 64) * 64,
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads,
            num_experts=size.experts,
            num_experts_per_tok=size.top_k,
            max_position_embeddings=size.context,
            norm_topk_prob=False,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def pretrain(model: Any, stream: Tensor, size: Size, say: Callable[[str], None]) -> dict[str, float]:
    """Train all weights in place, in bf16 with float32 copies for the optimiser. Returns what it came to."""
    device = model.device
    stream = stream.to(device)
    parameters = list(model.parameters())
    masters = [p.detach().float().clone().requires_grad_() for p in parameters]
    optimiser = torch.optim.AdamW(masters, lr=size.rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    draw = torch.Generator().manual_seed(0)
    window = torch.arange(size.length + 1, device=device)
    started, step, done, losses = time.perf_counter(), 0, 0.0, []
    model.train()
    model.set_experts_implementation("grouped_mm")  # a tenth faster than the others on a CPU, too
    with _balanced(model) as balance:
        while done < 1:
            rate = size.rate * min(1.0, (step + 1) / 50) * (0.05 + 0.475 * (1 + math.cos(math.pi * done)))
            for group in optimiser.param_groups:
                group["lr"] = rate
            starts = torch.randint(0, len(stream) - size.length, (size.batch, 1), generator=draw).to(device)
            tokens = stream[starts + window].long()
            balance.clear()
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
            (loss + BALANCE * torch.stack(balance).mean()).backward()
            for master, parameter in zip(masters, parameters, strict=True):
                master.grad, parameter.grad = parameter.grad.float(), None
            torch.nn.utils.clip_grad_norm_(masters, 1.0)
            optimiser.step()
            with torch.no_grad():
                torch._foreach_copy_(parameters, masters)
            losses.append(loss.detach())
            step += 1
            if step % 100 == 0:
                mean = float(torch.stack(losses[-100:]).mean())
                say(f"pretraining: step {step}, loss {mean:.3f}, {time.perf_counter() - started:.0f} s")
            done = max(step / size.steps, (time.perf_counter() - started) / size.seconds)
    model.eval()
    return {
        "steps": step,
        "tokens": float(step * size.batch * size.length),
        "seconds": time.perf_counter() - started,
        "loss": float(torch.stack(losses[-50:]).mean()),
        "balance": float(torch.stack(balance).detach().mean()),
    }


@contextmanager
def _balanced(model: Any) -> Iterator[list[Tensor]]:
    """Each layer's load balancing loss of the last pass: 1 where all its experts are chosen alike.

    Source: Fedus et al., Switch Transformers (2021), equation 4; of every layer by itself.
    """
    found: list[Tensor] = []

    def record(router: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        logits, _, chosen = output
        experts = logits.shape[-1]
        share = torch.bincount(chosen.flatten(), minlength=experts) / chosen.numel()
        found.append(experts * (share * torch.softmax(logits.float(), -1).mean(0)).sum())

    names = {name: module for name, module in model.named_modules() if name.endswith(".mlp.gate")}
    if len(names) != len(expert_layers(model)):
        raise RuntimeError("this model's routers are not where they are looked for")
    handles = [module.register_forward_hook(record) for module in names.values()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
