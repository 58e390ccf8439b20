"""Predictions for every row of a table by routers that were fitted without it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from signalbox.router.artifact import Report, Trainable, predictor_class
from signalbox.router.base import Facts, Prediction, Prompt
from signalbox.router.encoder import Encoder, encode_all
from signalbox.router.evaluate import knn_choice
from signalbox.router.judge import Lines, lines_of
from signalbox.router.metrics import taken
from signalbox.router.table import Table, TableError, fraction_of
from signalbox.router.train import training_facts

FOLDS = 5


@dataclass(frozen=True)
class CrossValidated:
    """Predictions for all rows in the order of the table.

    `last` is the router of the last fold and `held` bool [n] the rows that it has not seen; `fit_s` is the mean
    number of seconds that a fit took.
    """

    prediction: Prediction
    last: Trainable
    held: NDArray[np.bool_]
    fit_s: float


def folds_of(table: Table, folds: int = FOLDS) -> NDArray[np.intp]:
    """int [n] in [0, folds), by the hash of the prompt: a prompt that stands in the table twice is in one fold.

    Raises `TableError` where a fold would be empty.
    """
    found = np.array(
        [int(fraction_of(p.strip().lower(), "cross-validation") * folds) for p in table.prompt], dtype=np.intp
    )
    if len(np.unique(found)) < folds:
        raise TableError(f"{len(table)} rows are too few for {folds} folds")
    return found


def cross_validate(
    kind: str,
    table: Table,
    encoder: Encoder | None,
    folds: NDArray[np.intp],
    *,
    seed: int = 0,
    facts: Facts | None = None,
    report: Report | None = None,
) -> CrossValidated:
    """Fit `kind` once for each of `folds` (int [n]) on the other rows of a complete table, and predict it.

    Raises `TableError` with too few rows.
    """
    cls = predictor_class(kind)
    quality = np.empty(table.score.shape, dtype=np.float32)
    uncertainty, spread, took = np.empty_like(quality), [], []
    names = np.unique(folds)
    for number, fold in enumerate(names):
        if report:
            report(kind, number, len(names))
        held = folds == fold
        started = time.perf_counter()
        last = cls.fit(table.rows(~held), encoder, seed=seed, facts=facts)
        took.append(time.perf_counter() - started)
        part = last.predict([Prompt(table.prompt[i]) for i in np.flatnonzero(held)])
        quality[held], uncertainty[held] = part.quality, part.uncertainty
        spread.append(part.spread)
    if report:
        report(kind, len(names), len(names))
    prediction = Prediction(table.models, quality, uncertainty, float(np.mean(spread)))
    return CrossValidated(prediction, last, held, float(np.mean(took)))


def lines_of_folds(
    table: Table, encoder: Encoder | None, folds: NDArray[np.intp], report: Report | None = None
) -> Lines:
    """The reference lines for every row, known from the other folds alone; kNN where there is an encoder."""
    embeddings = None
    if encoder is not None:
        embeddings = encode_all(encoder, table.prompt, report or (lambda step, done, of: None))
    parts, order = [], []
    for fold in np.unique(folds):
        held, known = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
        rows, training = table.rows(held), table.rows(known)
        knn = None
        if embeddings is not None:
            knn = taken(rows.score, knn_choice(embeddings[held], embeddings[known], training.score))
        parts.append(lines_of(rows, training_facts(training), knn))
        order.append(held)
    return Lines.joined(parts, np.concatenate(order))


def names_of(kinds: Sequence[str]) -> list[str]:
    """The kinds, each checked and named once. Raises `ArtifactError` where there is no such kind."""
    for kind in kinds:
        predictor_class(kind)
    return list(dict.fromkeys(kinds))
