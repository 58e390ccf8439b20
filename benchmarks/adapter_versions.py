"""A tiny random base and LoRA contents for it whose greedy answers are known beforehand and all differ.

The expected answers come from a plain transformers forward pass over weights with `scaling * B @ A` added: nothing of
our engine has a part in them. A content is only used where each of its tokens leads the runner-up by a clear margin,
so that the order of a sum in another batch cannot change it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

PROMPT = "the quick fox asks the signal box for a way over the river"
SHORT, LONG = 8, 24  # tokens of an answer
MARGIN = 0.02  # of logits, between the best token and the next
TARGETS = ("q_proj", "v_proj", "o_proj", "down_proj")
RANKS = (8, 16, 32)  # some 160 kB an adapter: a service that kept them all would grow by 100 MB
_CORPUS = ["the quick brown fox jumps over a lazy dog", "a signal box asks for the way over the river and waits"] * 8


@dataclass(frozen=True)
class Content:
    """One adapter's weights, by their seed, and the texts that they make of `PROMPT`: of SHORT and of LONG tokens."""

    seed: int
    rank: int
    texts: tuple[str, str]


def save_base(folder: Path) -> Path:
    """A random Llama of two layers, with a byte-level tokenizer of ASCII letters only: any tokens make whole text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=160, special_tokens=["<|end|>"], show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


class Contents:
    """An endless supply of contents whose answers differ from each other's and from the base's (`base_texts`)."""

    def __init__(self, base: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(base)
        self._model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        self._linears = {
            name: module
            for name, module in self._model.named_modules()
            if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in TARGETS
        }
        self._weights = {name: module.weight.detach().clone() for name, module in self._linears.items()}
        texts = self._answers()
        if texts is None:
            raise RuntimeError("the base itself has no clear answer; give it another seed")
        self.base_texts = texts

    def __iter__(self) -> Iterator[Content]:
        seen, seed = set(self.base_texts), 0
        while True:
            seed += 1
            rank = RANKS[seed % len(RANKS)]
            tensors, scaling = self._tensors(seed, rank), _alpha(rank) / rank
            with torch.no_grad():
                for name, module in self._linears.items():
                    key = f"base_model.model.{name}"
                    delta = tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
                    module.weight.copy_(self._weights[name] + scaling * delta)
            texts = self._answers()
            if texts is not None and not seen.intersection(texts):
                seen.update(texts)
                yield Content(seed, rank, texts)

    def write(self, content: Content, folder: Path) -> Path:
        """The content as peft would write it."""
        folder.mkdir(parents=True)
        save_file(self._tensors(content.seed, content.rank), folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": content.rank, "lora_alpha": _alpha(content.rank), "target_modules": TARGETS}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    def _tensors(self, seed: int, rank: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, weight in self._weights.items():
            outputs, inputs = weight.shape
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator) * 0.3
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator) * 0.3
        return tensors

    @torch.no_grad()
    def _answers(self) -> tuple[str, str] | None:
        """The greedy answers of the model as it is now; None where a margin is too small."""
        ids = self._tokenizer(PROMPT, return_tensors="pt")["input_ids"]
        start = ids.shape[1]
        for _ in range(LONG):
            values, tokens = self._model(ids).logits[0, -1].topk(2)
            if values[0] - values[1] < MARGIN:
                return None
            ids = torch.cat([ids, tokens[:1, None]], dim=1)
        answer = ids[0, start:]
        short, long = (str(self._tokenizer.decode(answer[:n], skip_special_tokens=True)) for n in (SHORT, LONG))
        return short, long


def _alpha(rank: int) -> int:
    return 2 * rank
