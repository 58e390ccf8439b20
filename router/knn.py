"""k nearest neighbours on a sentence embedding: simple, hard to beat, and the reference for every other router.

A prompt's quality is the mean score of similar training prompts, each weighing exp((cosine - 1) / bandwidth), with
some weight for the overall mean of the expert: where neighbours are few or far, that is the prediction. As for the
linear heads, a row's mean over experts and the experts' differences from it are smoothed apart, for the differences,
which decide the routing, are far fainter. Number of neighbours, bandwidth and weight of the mean have the least
squared error out of fold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from signalbox.router import heads
from signalbox.router.artifact import Artifact, ArtifactError, Report
from signalbox.router.base import Facts, Prediction, Prompt
from signalbox.router.encoder import Encoder
from signalbox.router.table import Table
from signalbox.router.teaching import Lessons, lessons, quality_of, routed_quality, spread_of
from signalbox.router.uncertainty import DeviationHead, fit_deviation, load_deviation

Matrix = NDArray[Any]

MAX_ROWS = 16_384
NEIGHBOURS = (5, 10, 20, 40, 80, 160, 320)
# Cosines of MiniLM lie mostly between 0 and .8: the first weighs the near ones far more, the last all alike.
BANDWIDTHS = (0.05, 0.1, 0.2, np.inf)
# Weight of the overall mean, in units of the typical weight of the neighbours.
PRIORS = (0.0, 0.03, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 20.0, 100.0)
# Rows of a block of similarities, which bounds the memory: 32 MB with MAX_ROWS.
BLOCK = 512
# What the uncertainty may read beside the embedding: cosine of the nearest and mean cosine of the chosen neighbours,
# and the standard deviation of their scores, mean over experts.
LOCAL = 3


@dataclass(frozen=True)
class Smoother:
    """How neighbours are averaged: their number, the bandwidth of their weights, and the weight of the mean."""

    neighbours: int
    bandwidth: float
    prior: float

    def __call__(self, similarity: Matrix, values: Matrix) -> Matrix:
        """Smoothed deviations from the mean, float [n, t].

        Args:
            similarity: cosines [n, k], descending, of at least `neighbours` neighbours (fewer: all that there are).
            values: their values, less the overall mean, [n, k, t].
        """
        k = min(self.neighbours, similarity.shape[1])
        weights = weights_of(similarity[:, :k], self.bandwidth)
        return np.einsum("nk,nkt->nt", weights, values[:, :k]) / (weights.sum(axis=1) + self.prior)[:, None]

    def figures(self) -> dict[str, Any]:
        """Plain types; a bandwidth of None weighs all alike."""
        bandwidth = self.bandwidth if np.isfinite(self.bandwidth) else None
        return {"neighbours": self.neighbours, "bandwidth": bandwidth, "prior": self.prior}


def weights_of(similarity: Matrix, bandwidth: float) -> Matrix:
    """exp((cosine - 1) / bandwidth): 1 for the same text."""
    return np.exp((similarity - 1.0) / bandwidth)


def nearest(queries: Matrix, known: Matrix, k: int) -> tuple[NDArray[np.intp], Matrix]:
    """Positions int [n, k] of the most similar rows of `known`, nearest first, and their cosines float32 [n, k]."""
    k = min(k, len(known))
    index, cosines = np.empty((len(queries), k), dtype=np.intp), np.empty((len(queries), k), dtype=np.float32)
    for start in range(0, len(queries), BLOCK):
        here = slice(start, start + BLOCK)
        similarity = queries[here] @ known.T
        part = np.argpartition(similarity, len(known) - k, axis=1)[:, len(known) - k :]
        found = np.take_along_axis(similarity, part, axis=1)
        order = np.argsort(-found, axis=1, kind="stable")
        index[here] = np.take_along_axis(part, order, axis=1)
        cosines[here] = np.take_along_axis(found, order, axis=1)
    return index, cosines


@dataclass(frozen=True)
class Chosen:
    """Smoothers for groups of columns, and what they predict for rows they did not see, float64 [n, t].

    errors: mean squared error of each group; index int [n, k] and cosines float32 [n, k]: each row's neighbours in
    the other folds, nearest first.
    """

    smoothers: tuple[Smoother, ...]
    out_of_fold: Matrix
    errors: tuple[float, ...]
    index: NDArray[np.intp]
    cosines: Matrix


def choose_smoothers(
    embeddings: Matrix,
    values: Matrix,
    folds: Matrix,
    groups: Sequence[slice],
    notify: Callable[[int, int], None] | None = None,
) -> Chosen:
    """The smoother with the least out-of-fold squared error, for each group of columns.

    Args:
        embeddings: unit vectors float32 [n, d].
        values: what to predict, [n, t].
        folds: int [n]; a row's neighbours are sought in the other folds.
        groups: slices of the columns of `values`, each smoothed in its own way; together they are all columns.
        notify: called with (folds done, folds).
    """
    n, t = values.shape
    every = np.unique(folds)
    smallest = min(int((folds != fold).sum()) for fold in every)
    counts = sorted({min(k, smallest) for k in NEIGHBOURS})
    # Weighted sums over the first k neighbours for all bandwidths and k, from which every prior follows.
    sums = np.zeros((len(BANDWIDTHS), len(counts), n, t), dtype=np.float32)
    totals = np.zeros((len(BANDWIDTHS), len(counts), n), dtype=np.float32)
    means = np.empty((n, t))
    index, cosines = np.empty((n, counts[-1]), dtype=np.intp), np.empty((n, counts[-1]), dtype=np.float32)
    edges = [0, *counts[:-1]]
    for number, fold in enumerate(every):
        held, training = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
        mean = values[training].mean(axis=0)
        means[held] = mean
        centred = (values[training] - mean).astype(np.float32)
        found, cosines[held] = nearest(embeddings[held], embeddings[training], counts[-1])
        index[held] = training[found]
        for start in range(0, len(held), BLOCK // 2):
            here = slice(start, start + BLOCK // 2)
            rows, near = held[here], centred[found[here]]
            for b, bandwidth in enumerate(BANDWIDTHS):
                weights = weights_of(cosines[rows], bandwidth)
                parts = np.add.reduceat(weights[:, :, None] * near, edges, axis=1).cumsum(axis=1)
                sums[b, :, rows] = parts.transpose(0, 1, 2)
                totals[b, :, rows] = np.add.reduceat(weights, edges, axis=1).cumsum(axis=1)
        if notify:
            notify(number + 1, len(every))
    smoothers, errors, guesses = [], [], np.empty((n, t))
    for group in groups:
        best = (np.inf, Smoother(counts[-1], np.inf, np.inf))
        wanted = (values[:, group] - means[:, group]).astype(np.float32)
        for b, bandwidth in enumerate(BANDWIDTHS):
            for c, count in enumerate(counts):
                typical = float(np.median(totals[b, c]))
                for share in PRIORS:
                    prior = share * typical
                    guess = sums[b, c, :, group] / (totals[b, c] + prior)[:, None]
                    error = float(((guess - wanted) ** 2).mean())
                    if error < best[0]:
                        best = (error, Smoother(count, float(bandwidth), prior))
                        guesses[:, group] = guess
        errors.append(best[0])
        smoothers.append(best[1])
    return Chosen(tuple(smoothers), guesses + means, tuple(errors), index, cosines)


@dataclass(frozen=True)
class Memory:
    """Training rows: embeddings float32 [m, d], scores float32 [m, E], and how their neighbourhood is averaged."""

    embeddings: Matrix
    scores: Matrix
    mean: Smoother
    differences: Smoother

    def __post_init__(self) -> None:
        """What every prediction needs."""
        values = split(self.scores)
        overall = values.mean(axis=0)
        object.__setattr__(self, "_overall", overall)
        object.__setattr__(self, "_values", (values - overall).astype(np.float32))

    def __call__(self, embeddings: Matrix) -> tuple[Matrix, Matrix]:
        """Smoothed scores [n, E], not clipped, and local features [n, 3] of unit vectors [n, d]."""
        index, cosines = nearest(embeddings, self.embeddings, max(self.mean.neighbours, self.differences.neighbours))
        values = self._values[index]  # type: ignore[attr-defined]
        overall = self._overall  # type: ignore[attr-defined]
        level = overall[:1] + self.mean(cosines, values[:, :, :1])
        guess = level + overall[1:] + self.differences(cosines, values[:, :, 1:])
        width = min(self.differences.neighbours, cosines.shape[1])
        return guess, local_features(cosines[:, :width], self.scores[index[:, :width]])


def split(scores: Matrix) -> Matrix:
    """A row's mean over experts, and each expert's difference from it: [n, E] -> [n, 1 + E]."""
    mean = scores.mean(axis=1, keepdims=True)
    return np.hstack([mean, scores - mean])


def local_features(cosines: Matrix, scores: Matrix) -> Matrix:
    """Cosine of the nearest, mean cosine, mean deviation of the scores: float32 [n, 3] of [n, k] and [n, k, E]."""
    return np.stack([cosines[:, 0], cosines.mean(axis=1), scores.std(axis=1).mean(axis=1)], axis=1).astype(np.float32)


def bounded_lessons(
    table: Table, encoder: Encoder | None, most: int, seed: int, notify: Callable[[str, int, int], None]
) -> tuple[Encoder, Table, Lessons]:
    """The encoder, and lessons of at most `most` texts with their rows (a random part where there are more).

    Raises `TableError` with too few prompts and `ArtifactError` without an encoder.
    """
    if encoder is None:
        raise ArtifactError("this kind of router needs an encoder")
    texts = np.bincount(table.teaching_texts()[1], minlength=len(table))
    if texts.sum() > most:
        order = np.random.default_rng(seed).permutation(len(table))
        table = table.rows(np.sort(order[texts[order].cumsum() <= most]))
    return encoder, table, lessons(table, encoder, notify)


def fitting_encoder(artifact: Artifact, encoder: Encoder | None) -> Encoder:
    """The encoder, if its embeddings are as wide as those trained on. Raises `ArtifactError`."""
    where = artifact.path or "router artifact"
    if encoder is None:
        raise ArtifactError(f"{where}: a router of kind {artifact.kind} needs an encoder")
    if artifact.settings.get("dimension") != encoder.dimension:
        raise ArtifactError(
            f"{where}: trained on embeddings of {artifact.settings.get('dimension')} numbers, "
            f"the encoder {encoder.reference} gives {encoder.dimension}"
        )
    return encoder


def load_smoother(artifact: Artifact, name: str) -> Smoother:
    """The smoother in an artifact's settings. Raises `ArtifactError`."""
    try:
        found = dict(artifact.settings[name])
        bandwidth = found["bandwidth"]
        smoother = Smoother(
            int(found["neighbours"]), np.inf if bandwidth is None else float(bandwidth), float(found["prior"])
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{artifact.path or 'router artifact'}: settings do not say how `{name}` is averaged "
            f"({type(error).__name__}: {error}); train it again"
        ) from None
    if not (0 < smoother.neighbours <= NEIGHBOURS[-1] and smoother.bandwidth > 0 and 0 <= smoother.prior < np.inf):
        raise ArtifactError(f"{artifact.path or 'router artifact'}: `{name}` makes no sense; train it again")
    return smoother


class KnnPredictor:
    """Smoothed scores of similar training prompts; uncertainty as Tryage's, on the embedding and the neighbours."""

    kind = "knn"
    uses_encoder: ClassVar[bool] = True

    def __init__(
        self,
        experts: Sequence[str],
        encoder: Encoder,
        memory: Memory,
        deviation: DeviationHead,
        spread: float,
        *,
        known: Sequence[str] | None = None,
        training: dict[str, Any] | None = None,
    ) -> None:
        """`known`: the experts of `memory` and `deviation`, of which `experts` is a selection (None: the same)."""
        self.experts = tuple(experts)
        self.known = tuple(known or experts)
        self.encoder = encoder
        self.memory = memory
        self.deviation = deviation
        self.spread = spread
        self.training = training or {}
        self._columns = [self.known.index(name) for name in self.experts]

    def predict(self, prompts: list[Prompt]) -> Prediction:
        """Predict all experts on all prompts; blocking, thread-safe, without state. Reads the text alone.

        With 10,000 rows in memory one prompt takes 2 to 4 ms of one core beside its encoding.
        """
        embeddings = self.encoder.encode([prompt.text for prompt in prompts])
        quality = np.empty((len(prompts), len(self.experts)), dtype=np.float32)
        uncertainty = np.empty_like(quality)
        for start in range(0, len(prompts), BLOCK):  # bounds the memory
            here = slice(start, start + BLOCK)
            guess, local = self.memory(embeddings[here])
            quality[here] = quality_of(guess[:, self._columns])
            uncertainty[here] = self.deviation(np.hstack([embeddings[here], local]))[:, self._columns]
        return Prediction(self.experts, quality, uncertainty, self.spread)

    @classmethod
    def fit(
        cls,
        table: Table,
        encoder: Encoder | None,
        *,
        seed: int = 0,
        report: Report | None = None,
        facts: Facts | None = None,
    ) -> KnnPredictor:
        """Learn from the rows of `table`, all of which must be complete.

        Rows whose `text` differs from their `prompt` teach twice, as in Tryage. With more than `MAX_ROWS` texts, a
        random part of the rows is kept. `report(step, done, of)` is called as it goes. Raises `TableError` with too
        few prompts.
        """
        notify = report or (lambda step, done, of: None)
        encoder, _, rows = bounded_lessons(table, encoder, MAX_ROWS, seed, notify)
        scores = rows.scores
        # As the artifact keeps them, so that a router predicts the same before and after it was saved.
        embeddings = rows.embeddings.astype(np.float16).astype(np.float32)
        values = split(scores)
        groups = (slice(0, 1), slice(1, None))
        found = choose_smoothers(
            embeddings, values, rows.folds, groups, lambda done, of: notify("choosing the neighbours", done, of)
        )
        guesses = found.out_of_fold[:, :1] + found.out_of_fold[:, 1:]
        memory = Memory(embeddings, scores.astype(np.float32), *found.smoothers)
        width = min(found.smoothers[1].neighbours, found.cosines.shape[1])
        local = np.concatenate(
            [
                local_features(found.cosines[i : i + BLOCK, :width], memory.scores[found.index[i : i + BLOCK, :width]])
                for i in range(0, len(scores), BLOCK)
            ]
        )
        data = heads.Data(np.hstack([embeddings, local]), scores, rows.folds, plain=embeddings.shape[1])
        deviation = fit_deviation(data, scores - quality_of(guesses))
        figures = {
            "rows": len(table),
            "texts": len(scores),
            "label": "score" if table.loss is None else "loss",
            "head": f"{found.smoothers[1].neighbours} neighbours",
            "mean": {**memory.mean.figures(), "rmse": float(np.sqrt(found.errors[0]))},
            "differences": {**memory.differences.figures(), "rmse": float(np.sqrt(found.errors[1]))},
            "rmse_differences_unread": float(values[:, 1:].std(axis=0).mean()),
            "left_out_quality": routed_quality(guesses, scores),
            "best_single_quality": float(scores.mean(axis=0).max()),
            "uncertainty": deviation.figures,
        }
        return cls(table.models, encoder, memory, deviation, spread_of(table), training=figures)

    def to_artifact(self) -> Artifact:
        """Everything `from_artifact` needs."""
        return Artifact(
            kind=self.kind,
            experts=self.known,
            tensors={
                "rows.embeddings": self.memory.embeddings.astype(np.float16),
                "rows.scores": self.memory.scores,
                **self.deviation.tensors("deviation."),
            },
            settings={
                "dimension": self.encoder.dimension,
                "mean": self.memory.mean.figures(),
                "differences": self.memory.differences.figures(),
            },
            training=self.training,
            encoder=self.encoder.reference,
            spread=self.spread,
        )

    @classmethod
    def from_artifact(cls, artifact: Artifact, encoder: Encoder | None, experts: Sequence[str]) -> KnnPredictor:
        """The predictor of these experts, a selection of the artifact's. Raises `ArtifactError` where it is damaged."""
        encoder = fitting_encoder(artifact, encoder)
        count = len(artifact.tensors.get("rows.scores", ()))
        if not 0 < count <= MAX_ROWS:
            raise ArtifactError(f"{artifact.path or 'router artifact'}: {count} rows of scores; train it again")
        memory = Memory(
            artifact.tensor("rows.embeddings", count, encoder.dimension),
            artifact.tensor("rows.scores", count, len(artifact.experts)),
            load_smoother(artifact, "mean"),
            load_smoother(artifact, "differences"),
        )
        everyone = range(len(artifact.experts))
        deviation = load_deviation(artifact, "deviation.", encoder.dimension + LOCAL, everyone)
        return cls(
            experts,
            encoder,
            memory,
            deviation,
            artifact.spread,
            known=artifact.experts,
            training=artifact.training,
        )
