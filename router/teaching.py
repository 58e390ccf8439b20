"""What kinds that learn on frozen embeddings have in common: the rows to learn from, and figures of a prediction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from signalbox.router import heads
from signalbox.router.encoder import Encoder, encode_all
from signalbox.router.features import structure
from signalbox.router.table import Table, TableError, fraction_of

Matrix = NDArray[Any]
FOLDS = 5


@dataclass(frozen=True)
class Lessons:
    """Texts to learn from (`Table.teaching_texts`) with their features and scores; k texts of n rows.

    origin: int [k], the row of each text; embeddings: float32 [k, d]; scores: float64 [k, E]; folds: int [k], by hash
    of the prompt, so that all texts of one prompt share a fold; prompts: number of different prompts.
    """

    texts: list[str]
    origin: NDArray[np.intp]
    embeddings: NDArray[np.float32]
    scores: NDArray[np.float64]
    folds: NDArray[np.intp]
    prompts: int

    @property
    def data(self) -> heads.Data:
        """For `heads.fit`: the embedding and structural features."""
        features = np.hstack([self.embeddings, structure(self.texts)])
        return heads.Data(features, self.scores, self.folds, plain=self.embeddings.shape[1])

    def splits(self) -> list[tuple[Matrix, Matrix]]:
        """(training mask, held-out mask) [k] for each fold that has texts."""
        return [(self.folds != fold, self.folds == fold) for fold in np.unique(self.folds)]


def lessons(table: Table, encoder: Encoder, notify: Callable[[str, int, int], None]) -> Lessons:
    """Encode a table of complete rows. Raises `TableError` with fewer than 20 different prompts."""
    prompts = len(set(table.prompt))
    if prompts < 4 * FOLDS:
        raise TableError(f"{prompts} different prompts are too few to train on: at least {4 * FOLDS} are needed")
    texts, origin = table.teaching_texts()
    embeddings = encode_all(encoder, texts, notify)
    fold = np.array([int(fraction_of(prompt, "fold") * FOLDS) for prompt in table.prompt])
    return Lessons(texts, origin, embeddings, table.score[origin], fold[origin], prompts)


def difference_errors(prediction: Matrix, scores: Matrix) -> Matrix:
    """Mean squared error [n] in how far each expert is from the prompt's mean: the part that decides a choice."""
    error = prediction - scores
    return ((error - error.mean(axis=1, keepdims=True)) ** 2).mean(axis=1)


def clearly_positive(gain: Matrix, prompts: int) -> bool:
    """Whether the mean of paired differences exceeds one standard error.

    `prompts` is the number of different ones: two texts of one prompt are not two independent observations.
    """
    return bool(gain.mean() > gain.std() / np.sqrt(prompts))


def simplest_head(predictions: dict[str, Matrix], scores: Matrix, prompts: int) -> str:
    """The first of these, simple before elaborate, unless another clearly predicts the differences better out of fold.

    Judged by these errors and not by the quality of the choices, which is what is wanted but far noisier.
    """
    errors = {name: difference_errors(prediction, scores) for name, prediction in predictions.items()}
    chosen, *others = errors
    for name in others:
        if clearly_positive(errors[chosen] - errors[name], prompts):
            chosen = name
    return chosen


def routed_quality(prediction: Matrix, scores: Matrix) -> float:
    """Mean score of the experts that these predictions choose."""
    return float(scores[np.arange(len(scores)), prediction.argmax(axis=1)].mean())


def spread_of(table: Table) -> float:
    """Mean over rows of best less worst score (`Prediction.spread`)."""
    return float(np.mean(table.score.max(axis=1) - table.score.min(axis=1)))


def quality_of(prediction: Matrix) -> NDArray[np.float32]:
    """Regression output -> quality float32 [n, E] in [0, 1]."""
    return np.clip(prediction, 0.0, 1.0).astype(np.float32)
