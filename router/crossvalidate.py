"""Predictions for every row of a table by routers that were fitted without it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from signalbox.router.artifact import Report, Trainable, predictor_class
from signalbox.router.base import Facts, Prediction, Prompt
from signalbox.router.cascade import CascadePredictor
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
) -> dict[str, CrossValidated]:
    """Fit `kind` once for each of `folds` (int [n]) on the other rows of a complete table, and predict it.

    Beside `kind` itself the answer has the kinds that it is made of (`parts_of`), which need no fit of their own; their
    `fit_s` is that of the whole. Raises `TableError` with too few rows.
    """
    cls = predictor_class(kind)
    quality: dict[str, NDArray[np.float32]] = {}
    uncertainty: dict[str, NDArray[np.float32]] = {}
    spread, took = [], []
    names = np.unique(folds)
    for number, fold in enumerate(names):
        if report:
            report(kind, number, len(names))
        held = folds == fold
        started = time.perf_counter()
        fitted = cls.fit(table.rows(~held), encoder, seed=seed, facts=facts)
        took.append(time.perf_counter() - started)
        prompts = [Prompt(table.prompt[i]) for i in np.flatnonzero(held)]
        last = parts_of(fitted)
        for name, predictor in last.items():
            part = predictor.predict(prompts)
            quality.setdefault(name, np.empty(table.score.shape, dtype=np.float32))[held] = part.quality
            uncertainty.setdefault(name, np.empty(table.score.shape, dtype=np.float32))[held] = part.uncertainty
        spread.append(part.spread)
    if report:
        report(kind, len(names), len(names))
    out = {}
    for name, predictor in last.items():
        prediction = Prediction(table.models, quality[name], uncertainty[name], float(np.mean(spread)))
        out[name] = CrossValidated(prediction, predictor, held, float(np.mean(took)))
    return out


def parts_of(predictor: Trainable) -> dict[str, Trainable]:
    """The predictor by its kind, and those that it is made of and that could serve alone."""
    if isinstance(predictor, CascadePredictor):
        return {predictor.kind: predictor, predictor.fast.kind: predictor.fast, predictor.slow.kind: predictor.slow}
    return {predictor.kind: predictor}


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
