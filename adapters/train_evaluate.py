"""Scores a model on rows it has not seen: what it answers greedily, and how many bits the right answer costs it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from signalbox.adapters.train import answer_loss, collate, token_limit
from signalbox.adapters.train_data import Codec, Encoded, token_batches

Metric = Literal["exact", "final_number"]
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_CLOSES = re.compile(r"(?:####|answer is)\s*\$?-?\d[\d,]*(?:\.\d+)?\.?\s*$", re.IGNORECASE)


@dataclass(slots=True, frozen=True)
class RowScore:
    """One row: `correct` by its greedy answer `said`; `bits` to encode the reference of `nbytes` bytes.

    `chosen`: whether the right label was the likeliest of all labels; None where that was not asked.
    """

    correct: bool
    bits: float
    nbytes: int
    said: str
    chosen: bool | None = None


def metric_of(references: Sequence[str]) -> Metric:
    """`final_number` where nearly all references close with a number as their result, else `exact`."""
    closing = sum(bool(_CLOSES.search(reference)) for reference in references)
    return "final_number" if references and closing >= 0.95 * len(references) else "exact"


def is_correct(said: str, reference: str, metric: Metric) -> bool:
    """Whether an answer counts: the same words without regard to case, space and final dot, or the same last number."""
    if metric == "final_number":
        wanted = final_number(reference)
        return wanted is not None and final_number(said) == wanted
    return _normal(said) == _normal(reference)


def final_number(text: str) -> float | None:
    """The last number of a text, or None."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _normal(text: str) -> str:
    return " ".join(text.split()).casefold().rstrip(".")


def score_rows(
    model: Any,
    rows: Sequence[Encoded],
    codec: Codec,
    metric: Metric,
    *,
    max_new_tokens: int,
    batch: int,
    labels: Sequence[str] = (),
    label_rows: int = 0,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[RowScore]:
    """Score every row; of the first `label_rows` also say whether the right label is the likeliest of `labels`."""
    said = greedy_answers(model, rows, codec, max_new_tokens=max_new_tokens, batch=batch, report=report)
    bits = reference_bits(model, rows, codec)
    chosen = choose_labels(model, rows[:label_rows], codec, labels) if labels else []
    return [
        RowScore(
            correct=is_correct(said[i], row.reference, metric),
            bits=bits[i],
            nbytes=row.nbytes,
            said=said[i],
            chosen=chosen[i] == row.reference if i < len(chosen) else None,
        )
        for i, row in enumerate(rows)
    ]


@torch.inference_mode()
def greedy_answers(
    model: Any,
    rows: Sequence[Encoded],
    codec: Codec,
    *,
    max_new_tokens: int,
    batch: int,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """The answer to each row's prompt, greedily, up to `max_new_tokens`."""
    answers = [""] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        width = max(len(rows[i].prompt) for i in part)
        pads = [width - len(rows[i].prompt) for i in part]
        ids = [[codec.pad] * pad + rows[i].prompt for i, pad in zip(part, pads, strict=True)]
        mask = [[0] * pad + [1] * (width - pad) for pad in pads]
        tokens = model.generate(
            input_ids=torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(codec.stops),
            pad_token_id=codec.pad,
        )
        for i, row in zip(part, tokens[:, width:].tolist(), strict=True):
            end = next((n for n, token in enumerate(row) if token in codec.stops), len(row))
            answers[i] = codec.decode(row[:end]).strip()
        report(min(start + batch, len(order)), len(order))
    return answers


@torch.inference_mode()
def reference_bits(model: Any, rows: Sequence[Encoded], codec: Codec, *, closing: bool = False) -> list[float]:
    """Bits to encode each reference given its prompt; its end of turn is counted where `closing`."""
    bits = [0.0] * len(rows)
    for part in token_batches(rows, token_limit(model)):
        inputs = collate([rows[i] for i in part], codec.pad, model.device)
        losses = answer_loss(model, inputs)
        first = min(len(rows[i].prompt) for i in part)
        starts = torch.tensor([len(rows[i].prompt) - first for i in part], device=model.device)
        counted = torch.tensor([len(rows[i].answer) - (not closing) for i in part], device=model.device)
        place = torch.arange(losses.shape[1], device=model.device)[None]
        inside = (place >= starts[:, None]) & (place < (starts + counted)[:, None])
        for i, nats in zip(part, (losses * inside).sum(1).tolist(), strict=True):
            bits[i] = nats / math.log(2)
    return bits


def choose_labels(model: Any, rows: Sequence[Encoded], codec: Codec, labels: Sequence[str]) -> list[str]:
    """The likeliest label of each row: what a model could reach that is told what may be answered."""
    answers = [[*codec.encode_answer(label), codec.eos] for label in labels]
    candidates = [
        Encoded(row.prompt, answer, 0, row.text, label)
        for row in rows
        for label, answer in zip(labels, answers, strict=True)
    ]
    bits = reference_bits(model, candidates, codec, closing=True)
    size = len(labels)
    return [labels[min(range(size), key=lambda j: bits[i * size + j])] for i in range(len(rows))]
