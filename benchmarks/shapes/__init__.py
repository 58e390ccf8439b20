"""Models of real shapes for `load_format: dummy`: a config.json each, and a tokenizer that needs no hub.

THEIR WEIGHTS ARE RANDOM: they cost what the real model costs and answer nonsense. `python -m benchmarks.shapes`
writes them, with a router over them, into .run/shapes, where examples/gpu.yaml looks for them.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

from benchmarks.report import ROOT

SHAPES = Path(__file__).resolve().parent
OUT = ROOT / ".run" / "shapes"
# The router's synthetic topics: a prompt with these words is one that the expert is said to be best at.
TOPICS = {
    "chat-8b": ["poem", "story", "letter", "dialogue", "rhyme", "hero", "village", "dream", "river", "winter"],
    "moe-16b": [
        "integral",
        "matrix",
        "theorem",
        "proof",
        "kernel",
        "compiler",
        "pointer",
        "thread",
        "derivative",
        "tensor",
    ],
    "small-1b": ["yes", "no", "date", "name", "city", "colour", "count", "day", "unit", "price"],
}
_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte-level tokenizer with `vocab_size` entries, so that every id has a text.

    It knows no merges: a prompt has as many tokens as UTF-8 bytes. Ids above the bytes (and three special tokens)
    are made-up words, which only come out of a model, never in.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|end|>", "<|begin|>", "<|start|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *special]
    tokens += [f"\u0120w{i:x}" for i in range(len(tokens), vocab_size)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|end|>",
        chat_template=_TEMPLATE,
    ).save_pretrained(folder)


def write_shape(name: str, out: Path = OUT, **changes: object) -> Path:
    """The folder of a shape, with its tokenizer; `changes` overrule its config (a dry run's few layers)."""
    folder = out / name
    config = json.loads((SHAPES / name / "config.json").read_text()) | changes
    if (folder / "config.json").is_file() and json.loads((folder / "config.json").read_text()) == config:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_tokenizer(folder, config["vocab_size"])
    (folder / "config.json").write_text(json.dumps(config, indent=2))  # last: it says that the folder is whole
    return folder


def topical_prompt(topic: str, rng: random.Random, size: int = 200) -> str:
    """A prompt of exactly `size` bytes about an expert's topic (`TOPICS`), unlike all others."""
    words = [f"{rng.getrandbits(48):x}", *(rng.choice(TOPICS[topic]) for _ in range(size // 3))]
    return " ".join(words)[:size]


def write_router(path: Path, experts: dict[str, str], rows: int = 240) -> Path:
    """A lexical router, trained on a synthetic table: each expert is best at the prompts of its topic.

    `experts` maps names to topics; the prompts of topics that no expert has are left out.
    """
    import numpy as np

    from signalbox.router.table import Table
    from signalbox.router.train import save, train

    rng = random.Random(0)
    names = list(experts)
    topics = [topic for topic in TOPICS if topic in experts.values()]
    asked = [topics[i % len(topics)] for i in range(rows)]
    score = np.array([[0.9 if experts[name] == topic else 0.3 for name in names] for topic in asked])
    table = Table(
        models=tuple(names),
        prompt_id=[f"p{i}" for i in range(rows)],
        prompt=[topical_prompt(topic, rng) for topic in asked],
        measures={"score": np.clip(score + np.random.default_rng(0).normal(0, 0.02, score.shape), 0, 1)},
        task=asked,
    )
    save(train(table, None, kind="lexical"), path, neighbours=False)
    return path


def main() -> None:
    """Write every shape, and the router of examples/gpu.yaml."""
    for config in sorted(SHAPES.glob("*/config.json")):
        print(write_shape(config.parent.name))
    print(write_router(OUT / "router", {name: name for name in TOPICS}))
