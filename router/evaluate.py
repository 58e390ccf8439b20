"""Judging a trained router on a table: rows it has not seen, reference lines, speed, robustness."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from signalbox.router.artifact import Artifact
from signalbox.router.base import Predictor, Prompt
from signalbox.router.encoder import Encoder, encode_all
from signalbox.router.judge import Evaluation, Matrix, check_pair, judge, lines_of
from signalbox.router.knn import nearest
from signalbox.router.metrics import Vector, taken
from signalbox.router.robustness import robustness
from signalbox.router.table import Table, TableError
from signalbox.router.train import prompt_hash

NEIGHBOUR_COUNTS = (5, 10, 20, 40, 80, 160)
# Rows on which kNN is tried where the router itself needs no embedding: a slow CPU encodes some 50 of them a second.
KNN_ROWS = 2000
ROBUSTNESS_ROWS = {True: 300, False: 2000}  # by whether the router needs an encoder


def evaluate(
    predictor: Predictor,
    table: Table,
    encoder: Encoder | None,
    *,
    artifact: Artifact | None = None,
    neighbours: dict[str, NDArray[Any]] | None = None,
    pair: tuple[str, str] | None = None,
    decisions: int = 100,
    progress: Callable[[str, int, int], None] | None = None,
) -> Evaluation:
    """Judge `predictor` on the rows of `table` whose prompt is not among those that `artifact` was trained on.

    Args:
        predictor: any router; its experts must be columns of the table.
        table: measurements; rows that lack an expert are left out.
        encoder: for the kNN line and for emptying its cache before a decision is timed; None: no kNN line.
        artifact: gives the training prompts' hashes, the majority expert, each task's best and the mean costs.
        neighbours: training `embeddings` [n, d] and `scores` [n, E], experts as in `artifact`.
        pair: the weak and the strong expert for APGR and CPT.
        decisions: number of decisions to time; 0 leaves out these and the robustness.
        progress: called with (step, done, of).

    Raises:
        TableError: an expert has no column, no row is left, or `pair` is none: an expert that is not the router's,
            or a strong one that is not better on these rows.
    """
    if pair is not None:
        check_pair(pair, predictor.experts)
    pooled = table.pool(predictor.experts)
    complete = pooled.complete()
    rows = unseen(complete, artifact)
    if not len(rows):
        raise TableError(
            f"no row is left to judge on: {len(pooled) - len(complete)} of {len(pooled)} lack an expert, "
            f"and the others were trained on"
        )
    reads_embeddings = _needs_encoder(predictor)
    if encoder is not None:
        tried = rows.sample(len(rows) if reads_embeddings else KNN_ROWS)
        _encode(rows if reads_embeddings else rows.rows(tried), encoder, progress)
    prediction = predictor.predict([Prompt(p) for p in rows.prompt])
    knn = None
    if encoder is not None and neighbours is not None:
        knn = np.full(len(rows), np.nan)
        knn[tried] = _knn(rows.rows(tried), encoder, artifact.experts if artifact else predictor.experts, neighbours)
    facts = artifact.training if artifact else {}
    result = judge(rows, prediction, lines_of(rows, facts, knn), pair=pair)
    result = replace(
        result,
        bare_text_quality=_bare_text_quality(rows, predictor),
        excluded_seen=len(complete) - len(rows),
        excluded_incomplete=len(pooled) - len(complete),
    )
    return replace(result, **figures_of(predictor, rows, encoder, decisions, progress)) if decisions else result


def figures_of(
    predictor: Predictor,
    rows: Table,
    encoder: Encoder | None,
    decisions: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """What depends on the predictor and not on its predictions alone: robustness, speed, share of the slow way."""
    slow_share = getattr(predictor, "slow_share", None)
    some = rows.rows(rows.sample(ROBUSTNESS_ROWS[_needs_encoder(predictor)]))
    return {
        "slow_share": slow_share([Prompt(p) for p in rows.prompt]) if slow_share else None,
        "robustness": robustness(predictor, some, progress),
        "decision_ms": decision_ms(predictor, encoder, rows.prompt, decisions),
    }


def _needs_encoder(predictor: Predictor) -> bool:
    return bool(getattr(predictor, "uses_encoder", True))


def unseen(rows: Table, artifact: Artifact | None) -> Table:
    """The rows whose prompt is not among those that the artifact was trained on."""
    if artifact is None or "seen" not in artifact.tensors:
        return rows
    seen = set(artifact.tensors["seen"].tolist())
    return rows.rows(np.array([prompt_hash(p) not in seen for p in rows.prompt], dtype=bool))


def _encode(rows: Table, encoder: Encoder, progress: Callable[[str, int, int], None] | None) -> None:
    """Fill the encoder's cache, from which prediction and kNN then take what they need."""
    encode_all(encoder, rows.prompt, progress or (lambda step, done, of: None))


def _bare_text_quality(rows: Table, predictor: Predictor) -> float | None:
    """Mean score when the router sees the user's own words without the instruction that the experts were given."""
    if rows.text is None or not any(rows.text):
        return None
    texts = [text or prompt for text, prompt in zip(rows.text, rows.prompt, strict=True)]
    choice = predictor.predict([Prompt(t) for t in texts]).quality.argmax(axis=1)
    return float(taken(rows.score, choice).mean())


def _knn(rows: Table, encoder: Encoder, experts: Sequence[str], neighbours: dict[str, NDArray[Any]]) -> Vector:
    """Scores [n] that kNN reaches by `neighbours`, whose columns are `experts`."""
    columns = [list(experts).index(name) for name in rows.models]
    known, scores = neighbours["embeddings"].astype(np.float32), neighbours["scores"][:, columns].astype(np.float64)
    return taken(rows.score, knn_choice(encoder.encode(rows.prompt), known, scores))


def knn_choice(queries: NDArray[np.float32], known: NDArray[np.float32], scores: Matrix) -> NDArray[np.intp]:
    """The expert with the best mean score among the nearest of the `known` rows, int [n].

    How many neighbours is tuned by leave-one-out on the known rows. Deliberately plain: this is the reference line that
    other people's tables have; the kind `knn` is better tuned.
    """
    counts = [k for k in NEIGHBOUR_COUNTS if k < len(known)] or [max(1, len(known) - 1)]
    tuning = slice(0, 4096)  # enough to choose a small integer
    near = nearest(known[tuning], known, max(counts) + 1)[0][:, 1:]
    left_out = {k: taken(scores[tuning], scores[near[:, :k]].mean(axis=1).argmax(axis=1)).mean() for k in counts}
    best = max(counts, key=lambda k: (left_out[k], k))
    near = nearest(queries, known, best)[0]
    return np.asarray(scores[near].mean(axis=1).argmax(axis=1))


def decision_ms(predictor: Predictor, encoder: Encoder | None, prompts: Sequence[str], count: int) -> dict[str, float]:
    """Milliseconds of single predictions on one thread, with no embedding cached: percentiles p50 and p99."""
    timed = []
    with one_thread():
        predictor.predict([Prompt("warm up")])
        for i in range(count):
            prompt = [Prompt(prompts[i % len(prompts)])]
            if encoder is not None:
                encoder.clear()
            start = time.perf_counter()
            predictor.predict(prompt)
            timed.append((time.perf_counter() - start) * 1e3)
    return {"p50": float(np.percentile(timed, 50)), "p99": float(np.percentile(timed, 99))}


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread: what a decision costs a server that has other things to do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
