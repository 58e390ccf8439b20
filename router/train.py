"""Training a router from a table: pool, split by hash, fit, artifact."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from signalbox.router.artifact import ArtifactError, Report, Trainable, predictor_class, save_artifact
from signalbox.router.base import Facts
from signalbox.router.encoder import Encoder, encode_all
from signalbox.router.table import Table, TableError

HOLDOUT = 0.2
# Rows kept for the kNN line of a later `eval` (about 1 kB each with 10 experts), by whether the router itself needs
# their embeddings: where it does not, only the line pays for them, and a slow CPU encodes some 50 rows a second.
MAX_NEIGHBOURS = {True: 16384, False: 4096}


@dataclass(frozen=True)
class Trained:
    """A router and the rows that it was trained on and not trained on, complete and restricted to the pool."""

    predictor: Trainable
    training: Table
    held_out: Table
    figures: dict[str, Any]
    encoder: Encoder | None


def train(
    table: Table,
    encoder: Encoder | None,
    *,
    kind: str = "tryage",
    pool: Sequence[str] | None = None,
    holdout: float = HOLDOUT,
    seed: int = 0,
    report: Report | None = None,
    facts: Facts | None = None,
) -> Trained:
    """Fit a router of `kind` on the rows that the split does not hold out.

    Rows where an expert of the pool was not measured are left out. A prompt that stands in the table twice stays on
    one side: training rows whose prompt is also held out are dropped. `report(step, done, of)` is called as it goes;
    `facts` is handed on to the kinds that can use it. A kind without an encoder needs none; where one is given, it
    embeds rows for the kNN line of `save`. Raises `TableError` (columns, too few rows) and `ArtifactError` (no such
    kind, or its encoder is missing).
    """
    cls = predictor_class(kind)
    if encoder is None and cls.uses_encoder:
        raise ArtifactError(f"a router of kind {kind} needs an encoder")
    training, held_out = split(table, pool, holdout)
    predictor = cls.fit(training, encoder, seed=seed, report=report, facts=facts)
    figures = {
        "table_sha256": table.sha256,
        "table_rows": len(table),
        "incomplete_rows": len(table) - len(table.pool(pool).complete()),
        "training_rows": len(training),
        "held_out_rows": len(held_out),
        "holdout": holdout,
        "seed": seed,
        **training_facts(training),
    }
    return Trained(predictor, training, held_out, figures, encoder)


def split(table: Table, pool: Sequence[str] | None = None, holdout: float = HOLDOUT) -> tuple[Table, Table]:
    """Complete rows of the pool to train on, and those held out. Raises `TableError` where there is none."""
    if not 0.0 <= holdout < 1.0:
        raise TableError(f"holdout is {holdout:g}: it must be in [0, 1)")
    complete = table.pool(pool).complete()
    if not len(complete):
        raise TableError("no row has a measurement of every expert of the pool")
    held = complete.held_out(holdout)
    held_prompts = {p for p, h in zip(complete.prompt, held, strict=True) if h}
    kept = np.array([p not in held_prompts for p in complete.prompt])
    return complete.rows(kept & ~held), complete.rows(held)


def save(
    trained: Trained,
    path: str | Path,
    *,
    neighbours: bool | dict[str, NDArray[Any]] = True,
    report: Report | None = None,
) -> None:
    """Write the artifact directory.

    It holds the hashes of the training prompts, so that `evaluate` can leave those out of any table; and, unless
    `neighbours` is False or there was no encoder, embeddings and scores of training rows (`neighbours_of`, which may be
    given), with which it can tell what kNN would reach.
    """
    artifact = trained.predictor.to_artifact()
    seen = np.unique(np.array([prompt_hash(p) for p in trained.training.prompt], dtype=np.int64))
    artifact = replace(
        artifact,
        tensors={**artifact.tensors, "seen": seen},
        training={**artifact.training, **trained.figures},
    )
    kept = neighbours if isinstance(neighbours, dict) else neighbours_of(trained, report) if neighbours else None
    if kept is not None and trained.encoder is not None:
        artifact.training["neighbours_encoder"] = trained.encoder.reference
    save_artifact(artifact, path, neighbours=kept)


def neighbours_of(trained: Trained, report: Report | None = None) -> dict[str, NDArray[Any]] | None:
    """`embeddings` float16 [n, d] and `scores` float32 [n, E] of the training rows, `MAX_NEIGHBOURS` at most.

    None where the router was trained without an encoder.
    """
    if trained.encoder is None:
        return None
    rows, most = trained.training, MAX_NEIGHBOURS[trained.predictor.uses_encoder]
    if len(rows) > most:
        rows = rows.rows(np.random.default_rng(0).permutation(len(rows))[:most])
    embeddings = encode_all(trained.encoder, rows.prompt, report or (lambda step, done, of: None))
    return {"embeddings": embeddings.astype(np.float16), "scores": rows.score.astype(np.float32)}


def training_facts(training: Table) -> dict[str, Any]:
    """What the reference lines of an evaluation may know: majority, best single, best of each task, mean costs."""
    return {
        "majority": training.models[majority(training)],
        "best_single": training.models[int(training.score.mean(axis=0).argmax())],
        "best_of_task": best_of_task(training),
        "mean_cost": mean_cost(training),
    }


def prompt_hash(prompt: str) -> int:
    """64-bit hash (signed), blind to case and outer white space."""
    digest = hashlib.blake2b(prompt.strip().lower().encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def majority(rows: Table) -> int:
    """The expert that is most often optimal; ties on a prompt are shared."""
    top = rows.score >= rows.score.max(axis=1, keepdims=True) - 1e-9
    return int((top / top.sum(axis=1, keepdims=True)).sum(axis=0).argmax())


def best_of_task(rows: Table) -> dict[str, str]:
    """The expert with the best mean score on each task: what a router that was told the task would choose."""
    tasks = np.array(rows.task)
    named = sorted(set(rows.task) - {""})
    return {str(task): rows.models[int(rows.score[tasks == task].mean(axis=0).argmax())] for task in named}


def mean_cost(rows: Table) -> dict[str, float]:
    """US dollars that each expert costs on a prompt of this table; without those of which nothing is known."""
    cost = rows.measures.get("cost")
    if cost is None:
        return {}
    return {name: float(np.nanmean(c)) for name, c in zip(rows.models, cost.T, strict=True) if not np.isnan(c).all()}
