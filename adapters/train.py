"""Trains weights on a table: the loop that all adapters share, and LoRA (Hu et al., 2021), written in the PEFT format.

The loss is the cross-entropy of the answer's tokens, the end of turn included; the prompt's tokens are only read.
peft puts the LoRA layers into the model. Their schedule is a linear warm-up and half a cosine; a limit in minutes bends
it, so that the rate has fallen to nothing when the time is up. The weights kept are those with the lowest loss on the
validation rows.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from signalbox.adapters.train_data import Codec, Encoded, TrainingError, length_batches, token_batches

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# Tokens, padding included, of one forward pass: activations and logits are what fills memory.
TOKENS_CPU, TOKENS_GPU = 1024, 16_384
VALIDATIONS = 8  # times in a run that the validation rows are looked at
IGNORED = -100


@dataclass(slots=True, frozen=True)
class Optimisation:
    """How weights are trained, whichever they are: AdamW with a linear warm-up. `rate`: the highest learning rate.

    The run ends after `steps`, or after `epochs` where no steps are given, or after `minutes`, whichever comes first,
    and where `patience` validations in a row brought nothing better. Without `dropout` the model stays in evaluation
    mode. `warmup`: a share of the steps.
    """

    rate: float = 1e-3
    batch: int = 32
    epochs: float = 5.0
    steps: int | None = None
    minutes: float | None = None
    warmup: float = 0.05
    schedule: Literal["cosine", "constant"] = "cosine"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    dropout: float = 0.0
    patience: int = 3
    longest: int = 768
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rate", "batch", "epochs", "longest", "patience"):
            if not getattr(self, name) > 0:
                raise TrainingError(f"{name} must be above 0")


@dataclass(slots=True, frozen=True)
class Hyperparameters(Optimisation):
    """How a LoRA adapter is trained. `targets`: names of linears, or `all-linear`."""

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    dropout: float = 0.05

    def __post_init__(self) -> None:
        Optimisation.__post_init__(self)
        for name in ("rank", "alpha"):
            if not getattr(self, name) > 0:
                raise TrainingError(f"{name} must be above 0")
        if not self.targets:
            raise TrainingError("targets must name at least one linear, or all-linear")


@dataclass(slots=True, frozen=True)
class Moment:
    """Where a run is: losses in nats per token, `left_s` seconds to its end; `validation` where just measured."""

    step: int
    steps: int
    loss: float
    rate: float
    seconds: float
    left_s: float
    validation: float | None = None


@dataclass(slots=True)
class Fit:
    """What a run came to. `best` is the lowest validation loss (nats per token) and `kept` the step it was at."""

    history: list[Moment] = field(default_factory=list)
    best: float = math.inf
    kept: int = 0
    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0


def attach(model: Any, options: Hyperparameters, reference: str) -> Any:
    """The model with fresh LoRA layers (a `peft.PeftModel`). Raises `TrainingError` where no linear is so named."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise TrainingError("training needs peft: pip install 'signalbox[train]'") from error
    torch.manual_seed(options.seed)
    targets: Any = "all-linear" if options.targets == ("all-linear",) else list(options.targets)
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,  # type: ignore[arg-type]
        target_modules=targets,
        lora_dropout=options.dropout,
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise TrainingError(f"the model has no linears named {', '.join(options.targets)}: {error}") from error
    config.base_model_name_or_path = reference
    return adapted


def fit(
    model: Any,
    train: Sequence[Encoded],
    validation: Sequence[Encoded],
    options: Optimisation,
    codec: Codec,
    report: Callable[[Moment], None] = lambda moment: None,
) -> Fit:
    """Train the parameters that require a gradient, in place, and leave the model with the best weights of the run.

    Raises `TrainingError` where the loss is no longer finite: the rate is too high.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.rate, weight_decay=options.weight_decay, betas=options.betas)
    per_epoch = math.ceil(len(train) / options.batch)
    total = options.steps or max(1, math.ceil(options.epochs * per_epoch))
    draw = random.Random(options.seed)
    torch.manual_seed(options.seed)
    result, best = Fit(), _weights(model)
    limit = math.inf if options.minutes is None else 60 * options.minutes
    started, seen, bad = time.perf_counter(), 0.0, 0
    recent: list[Tensor] = []
    cosine = options.schedule == "cosine"
    model.train(options.dropout > 0)
    for step, batch in enumerate(_endless(train, options.batch, draw), 1):
        seconds = time.perf_counter() - started
        done = min(1.0, max((step - 1) / total, seconds / limit))
        rate = options.rate * min(1.0, step / max(1.0, options.warmup * total)) * (_cosine(done) if cosine else 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = [train[i] for i in batch]
        count = sum(len(row.answer) for row in rows)
        total_loss = torch.zeros((), device=model.device)
        for part in token_batches(rows, token_limit(model)):
            loss = answer_loss(model, collate([rows[i] for i in part], codec.pad, model.device)).sum() / count
            if loss.requires_grad:  # not where no token was routed to an expert that is trained
                loss.backward()
            total_loss += loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(total_loss)
        result.tokens += sum(row.length for row in rows)
        seconds = time.perf_counter() - started
        done = max(step / total, seconds / limit)
        ends = done >= 1
        value = None
        if ends or done - seen >= 1 / VALIDATIONS:
            seen = done
            value = mean_loss(model, validation, codec)
            model.train(options.dropout > 0)
        if value is not None or len(recent) >= 10 or step == 1:
            # Looking at a loss waits for the GPU: not at every step.
            mean = float(torch.stack(recent).mean())
            recent.clear()
            if not math.isfinite(mean) or (value is not None and not math.isfinite(value)):
                raise TrainingError(f"the loss is no longer finite at step {step}; lower --lr ({options.rate:g})")
            left = max(0.0, seconds * (1 / done - 1))
            moment = Moment(step, total, mean, rate, seconds, left, value)
            result.history.append(moment)
            report(moment)
        if value is not None:
            if value < result.best:
                result.best, result.kept, best, bad = value, step, _weights(model), 0
            else:
                bad += 1
            ends = ends or bad >= options.patience
        if ends:
            break
    model.load_state_dict(best, strict=False)
    model.eval()
    result.steps, result.seconds = step, time.perf_counter() - started
    return result


def save(model: Any, folder: Path, dtype: torch.dtype = torch.float16) -> int:
    """Write the adapter in the PEFT format, weights as `dtype`; returns the bytes of the weights' file.

    The names in it are peft's: `base_model.model.<linear>.lora_A.weight` [rank, in] and `lora_B.weight` [out, rank].
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = model.peft_config["default"]
    written = {key: _plain(value) for key, value in config.to_dict().items()} | {"inference_mode": True}
    (folder / CONFIG_FILE).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
    tensors = {
        name: tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    return (folder / WEIGHTS_FILE).stat().st_size


# -- one forward pass ------------------------------------------------------------------------------------------


def token_limit(model: Any) -> int:
    """Tokens of one forward pass on the model's device."""
    return TOKENS_GPU if model.device.type == "cuda" else TOKENS_CPU


@dataclass(slots=True)
class Inputs:
    """A right-padded batch. input_ids, mask: int64 [B, T]; labels: int64 [B, K], the tokens that follow the positions
    `keep` (int64 [K]), `IGNORED` where they belong to no answer.
    """

    input_ids: Tensor
    mask: Tensor
    labels: Tensor
    keep: Tensor


def collate(rows: Sequence[Encoded], pad: int, device: torch.device) -> Inputs:
    """Rows as one batch; logits are computed from the shortest prompt's end on."""
    width = max(row.length for row in rows)
    first = min(len(row.prompt) for row in rows) - 1
    ids = [row.prompt + row.answer + [pad] * (width - row.length) for row in rows]
    labels = [[IGNORED] * (len(row.prompt) - 1 - first) + row.answer + [IGNORED] * (width - row.length) for row in rows]
    mask = [[1] * row.length + [0] * (width - row.length) for row in rows]
    return Inputs(
        input_ids=torch.tensor(ids, device=device),
        mask=torch.tensor(mask, device=device),
        labels=torch.tensor(labels, device=device),
        keep=torch.arange(first, width - 1, device=device),
    )


def answer_loss(model: Any, inputs: Inputs) -> Tensor:
    """Cross-entropy of each answer's tokens in nats, float32 [B, K], 0 where there is none."""
    with _autocast(model):
        output = model(
            input_ids=inputs.input_ids, attention_mask=inputs.mask, logits_to_keep=inputs.keep, use_cache=False
        )
    logits = output.logits.float()
    losses = functional.cross_entropy(
        logits.flatten(0, 1), inputs.labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view(inputs.labels.shape)


@torch.inference_mode()
def mean_loss(model: Any, rows: Sequence[Encoded], codec: Codec) -> float:
    """Mean loss of the answers' tokens in nats. Leaves the model in evaluation mode."""
    model.eval()
    total = torch.zeros((), device=model.device)
    for part in token_batches(rows, token_limit(model)):
        total += answer_loss(model, collate([rows[i] for i in part], codec.pad, model.device)).sum()
    return float(total) / sum(len(row.answer) for row in rows)


@contextmanager
def _autocast(model: Any) -> Iterator[None]:
    """bf16 products with peft's float32 weights where the base is bf16 on a GPU; else as the model is."""
    half = model.device.type == "cuda" and model.dtype == torch.bfloat16 and hasattr(model, "peft_config")
    with torch.autocast("cuda", torch.bfloat16) if half else nullcontext():
        yield


# -- details ---------------------------------------------------------------------------------------------------


def shortened(options: Hyperparameters, steps: int | None, minutes: float | None) -> Hyperparameters:
    """The same with other bounds, for a trial that compares hyperparameters."""
    return replace(options, steps=steps or options.steps, minutes=minutes or options.minutes)


def _endless(rows: Sequence[Encoded], size: int, draw: random.Random) -> Iterator[list[int]]:
    while True:
        yield from length_batches(rows, size, draw)


def _cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


def _weights(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def _plain(value: Any) -> Any:
    """What JSON holds: sets in order, enumerations by their value."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return getattr(value, "value", value)
