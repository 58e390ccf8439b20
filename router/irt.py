"""Item-response theory over experts: latent traits of a prompt, a vector and a bias for each expert.

quality[n, e] = bias[e] + traits(x_n) . vector[e], the linear form of a multidimensional two-parameter model (Reckase,
"Multidimensional Item Response Theory", 2009): an expert's vector is its ability along each trait, the bias its mean.
Traits are regressed on the prompt, so they are known of a prompt that nobody has answered yet. All in closed form:
the best of the plain heads (`heads.py`) predicts every expert; the leading principal directions of its out-of-fold
predictions are the traits (reduced-rank regression: Izenman 1975; Mukherjee & Zhu 2011); least squares of the scores
on the out-of-fold traits gives the experts' side. Rank and head are the simplest that no other
clearly beats out of fold.

A new expert is one vector and one bias: with a few dozen scored prompts they have a Bayesian ridge regression on the
traits of these, whose prior is the mean and covariance of the known experts'. Nothing else is trained again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from signalbox.router import heads
from signalbox.router.artifact import Artifact, ArtifactError, Report
from signalbox.router.base import Facts, Prediction, Prompt
from signalbox.router.encoder import Encoder
from signalbox.router.features import STRUCTURE, structure
from signalbox.router.heads import Head, Linear, Matrix
from signalbox.router.table import Table, TableError
from signalbox.router.teaching import (
    Lessons,
    clearly_positive,
    difference_errors,
    lessons,
    quality_of,
    routed_quality,
    spread_of,
)
from signalbox.router.uncertainty import DeviationHead, fit_deviation, load_deviation

FloatMatrix = NDArray[np.float32]

# From simple to elaborate.
HEADS = ("ridge+structure", "kernel")
MAX_RANK = 16
# Directions of which the predictions' standard deviation is less than this are rounding, in quality.
LEAST_TRAIT = 1e-4
# Known experts that make a prior, and scored prompts that tell anything beside it.
MIN_KNOWN, MIN_PROMPTS = 3, 8
# Scored prompts that the known experts' typical residual counts for in a new expert's.
PRIOR_RESIDUALS = 50.0


@dataclass(frozen=True)
class Abilities:
    """The experts' side: row e is (bias, vector) of expert e over traits of mean 0 and variance 1 in training.

    mean: float32 [E, 1 + k]; covariance: float32 [E, 1 + k, 1 + k], what is left uncertain in the row, 0 for the
    experts that were trained in full (their residuals hold it already).
    """

    mean: FloatMatrix
    covariance: FloatMatrix


@dataclass(frozen=True)
class Prior:
    """What `known` experts tell of a new one before it has answered anything.

    mean float32 [1 + k] and covariance float32 [1 + k, 1 + k] of its row; `typical` is the known experts' geometric
    mean of residual deviations on a prompt, float32 [n, 1].
    """

    mean: FloatMatrix
    covariance: FloatMatrix
    typical: DeviationHead
    known: int

    @classmethod
    def of(cls, rows: Matrix, deviation: DeviationHead) -> Prior:
        """From the known experts' rows [E, 1 + k] and residual deviations.

        Correlations are shrunk towards none, as an inverse-Wishart prior with 2 + k degrees of freedom does: the
        experts are few.
        """
        known, size = rows.shape
        mean = rows.mean(axis=0)
        scatter = (rows - mean).T @ (rows - mean) / max(1, known - 1)
        diagonal = np.diag(np.diag(scatter))
        share = (known - 1) / (known - 1 + size + 1)
        covariance = (share * scatter + (1 - share) * diagonal) * (1 + 1 / known)
        line = deviation.line
        typical = DeviationHead(
            Linear(line.weight.mean(axis=1, keepdims=True), line.bias.mean(keepdims=True)),
            deviation.low.mean(keepdims=True),
            deviation.high.mean(keepdims=True),
        )
        return cls(mean.astype(np.float32), covariance.astype(np.float32), typical, known)


class IrtPredictor:
    """Latent traits of prompts times vectors of experts; `add_expert` takes up another from a few scored prompts.

    Uncertainty is the standard deviation of out-of-fold residuals (`uncertainty.py`); of an added expert, the known
    experts' typical one on such a prompt, and what is uncertain in its vector.
    """

    kind = "irt"
    uses_encoder: ClassVar[bool] = True

    def __init__(
        self,
        experts: Sequence[str],
        encoder: Encoder,
        traits: Head,
        abilities: Abilities,
        prior: Prior,
        deviation: DeviationHead,
        spread: float,
        training: dict[str, Any] | None = None,
    ) -> None:
        self.experts = tuple(experts)
        self.encoder = encoder
        self.traits = traits
        self.abilities = abilities
        self.prior = prior
        self.deviation = deviation
        self.spread = spread
        self.training = training or {}

    def predict(self, prompts: list[Prompt]) -> Prediction:
        """Predict all experts on all prompts; blocking and thread-safe. Reads the text alone."""
        features = self._features(prompts)
        z = _with_one(self.traits(features))
        deviation = self.deviation(features)
        if self.abilities.covariance.any():
            doubt = np.einsum("ni,eij,nj->ne", z, self.abilities.covariance, z, optimize=True)
            deviation = np.sqrt(deviation**2 + np.maximum(doubt, 0.0))
        quality = quality_of(z @ self.abilities.mean.T)
        return Prediction(self.experts, quality, deviation.astype(np.float32), self.spread)

    def _features(self, prompts: Sequence[Prompt]) -> FloatMatrix:
        texts = [prompt.text for prompt in prompts]
        return np.hstack([self.encoder.encode(texts), structure(texts)])

    def add_expert(self, name: str, prompts: Sequence[Prompt], scores: Sequence[float] | Matrix) -> IrtPredictor:
        """A new predictor with one more expert, last, from its scores on a few dozen prompts; the others stay.

        Prompts that the router was trained on may be used as well as new ones.

        Args:
            name: of the expert, new.
            prompts: m of them.
            scores: [m], each in [0, 1].

        Raises:
            TableError: the name is taken, a score is out of range, the prompts are fewer than 8, or the router knows
                fewer than 3 experts, which are too few to tell how experts differ.
        """
        y = np.asarray(scores, dtype=np.float64)
        if name in self.experts or not name:
            raise TableError(f"the router knows an expert {name!r} already" if name else "the expert needs a name")
        if y.shape != (len(prompts),):
            raise TableError(f"{len(prompts)} prompts need as many scores, got shape {y.shape}")
        if len(y) < MIN_PROMPTS:
            raise TableError(f"{len(y)} scored prompts are too few to add an expert: at least {MIN_PROMPTS} are needed")
        if not ((y >= 0) & (y <= 1)).all():
            raise TableError(f"the scores of {name} must lie in [0, 1]")
        if self.prior.known < MIN_KNOWN:
            raise TableError(
                f"the router was trained on {self.prior.known} experts: to add one from a few prompts, at least "
                f"{MIN_KNOWN} must show how experts differ; train it with more, or all again with {name}"
            )
        features = self._features(prompts)
        z = _with_one(self.traits(features)).astype(np.float64)
        noise = self.prior.typical(features)[:, 0].astype(np.float64) ** 2
        mean, covariance, factor = _fit_one(z, y, noise, self.prior)
        abilities = Abilities(
            np.vstack([self.abilities.mean, mean[None].astype(np.float32)]),
            np.concatenate([self.abilities.covariance, covariance[None].astype(np.float32)]),
        )
        added = {
            "rows": len(y),
            "mean_score": float(y.mean()),
            "bias": float(mean[0]),
            "bias_sd": float(np.sqrt(covariance[0, 0])),
            "residual_factor": float(factor),
        }
        training = {**self.training, "added": {**self.training.get("added", {}), name: added}}
        experts, deviation = (*self.experts, name), _joined(self.deviation, self.prior.typical, np.log(factor))
        return IrtPredictor(experts, self.encoder, self.traits, abilities, self.prior, deviation, self.spread, training)

    @classmethod
    def fit(
        cls,
        table: Table,
        encoder: Encoder,
        *,
        seed: int = 0,
        report: Report | None = None,
        facts: Facts | None = None,
    ) -> IrtPredictor:
        """Learn from the rows of `table`, all of which must be complete; texts teach as in Tryage.

        `report(step, done, of)` is called as it goes. Raises `TableError` with too few rows.
        """
        notify = report or (lambda step, done, of: None)
        known = lessons(table, encoder, notify)
        data, scores = known.data, known.scores
        fits = {}
        for number, name in enumerate(HEADS):
            notify("finding traits", number, len(HEADS) + 1)
            fits[name] = heads.fit(name, data, seed)
        errors = {name: _errors(f.out_of_fold, scores) for name, f in fits.items()}
        simple, other = HEADS
        chosen = other if _improves(errors[simple], errors[other], known.prompts) else simple
        head, left_out = fits[chosen].head, fits[chosen].out_of_fold
        centre, directions = _directions(left_out)
        z = _with_one((left_out - centre) @ directions)
        guesses, rank, by_rank = _choose_rank(z, known)
        rows = _least_squares(z[:, : 1 + rank], scores).T
        deviation = fit_deviation(data, scores - np.clip(guesses, 0.0, 1.0))
        notify("finding traits", len(HEADS) + 1, len(HEADS) + 1)
        figures = {
            "rows": len(table),
            "texts": len(known.texts),
            "label": "score" if table.loss is None else "loss",
            "head": chosen,
            "rank": rank,
            "cross_validated": {
                "rmse_differences": {name: float(np.sqrt(e[0].mean())) for name, e in errors.items()},
                "rmse_differences_of_rank": [float(np.sqrt(e)) for e in by_rank],
                "routed_quality": routed_quality(guesses, scores),
                "rmse_quality": float(np.sqrt(np.mean((guesses - scores) ** 2))),
            },
            "best_single_quality": float(scores.mean(axis=0).max()),
            "abilities": {n: [round(float(v), 4) for v in row] for n, row in zip(table.models, rows, strict=True)},
            "uncertainty": deviation.figures,
        }
        size = 1 + rank
        abilities = Abilities(rows.astype(np.float32), np.zeros((len(rows), size, size), dtype=np.float32))
        traits = _project(head, centre, directions[:, :rank])
        prior = Prior.of(rows, deviation)
        return cls(table.models, encoder, traits, abilities, prior, deviation, spread_of(table), figures)

    def to_artifact(self) -> Artifact:
        """Everything `from_artifact` needs."""
        return Artifact(
            kind=self.kind,
            experts=self.experts,
            tensors={
                **self.traits.tensors("traits."),
                **self.deviation.tensors("deviation."),
                "abilities.mean": self.abilities.mean,
                "abilities.covariance": self.abilities.covariance,
                "prior.mean": self.prior.mean,
                "prior.covariance": self.prior.covariance,
                **self.prior.typical.tensors("prior.typical."),
            },
            settings={
                "head": self.traits.kind,
                "rank": len(self.prior.mean) - 1,
                "known": self.prior.known,
                "structure": list(STRUCTURE),
                "dimension": self.encoder.dimension,
            },
            training=self.training,
            encoder=self.encoder.reference,
            spread=self.spread,
        )

    @classmethod
    def from_artifact(cls, artifact: Artifact, encoder: Encoder, experts: Sequence[str]) -> IrtPredictor:
        """The predictor of these experts, a selection of the artifact's. Raises `ArtifactError` where it is damaged.

        Of a selection too, an expert can be added: the prior is that of all experts it was trained on.
        """
        where = artifact.path or "router artifact"
        settings = artifact.settings
        if settings.get("structure") != list(STRUCTURE):
            raise ArtifactError(f"{where}: trained on other structural features than this version has; train it again")
        if settings.get("dimension") != encoder.dimension:
            raise ArtifactError(
                f"{where}: trained on embeddings of {settings.get('dimension')} numbers, "
                f"the encoder {encoder.reference} gives {encoder.dimension}"
            )
        rank, known = settings.get("rank"), settings.get("known")
        if type(rank) is not int or type(known) is not int or not (0 <= rank <= MAX_RANK and known >= 0):
            raise ArtifactError(f"{where}: rank {rank!r} or known {known!r} is not possible; train it again")
        n, size, width = len(artifact.experts), 1 + rank, encoder.dimension + len(STRUCTURE)
        columns = [artifact.experts.index(name) for name in experts]
        # The head that gives the traits has a column for each of them, as other heads have for each expert.
        of_traits = replace(artifact, experts=tuple(f"trait {i}" for i in range(rank)))
        traits = heads.load_head(of_traits, "traits.", str(settings.get("head")), width, range(rank))
        abilities = Abilities(
            artifact.tensor("abilities.mean", n, size)[columns],
            artifact.tensor("abilities.covariance", n, size, size)[columns],
        )
        typical = load_deviation(replace(artifact, experts=("typical",)), "prior.typical.", width, [0])
        prior = Prior(
            artifact.tensor("prior.mean", size), artifact.tensor("prior.covariance", size, size), typical, known
        )
        deviation = load_deviation(artifact, "deviation.", width, columns)
        return cls(experts, encoder, traits, abilities, prior, deviation, artifact.spread, artifact.training)


def _with_one(traits: Matrix) -> Matrix:
    """[n, k] -> [n, 1 + k], a column of ones first: the bias."""
    return np.hstack([np.ones((len(traits), 1), dtype=traits.dtype), traits])


def _directions(predictions: Matrix) -> tuple[Matrix, Matrix]:
    """Centre [E] and matrix [E, k] that make the predictions' principal components, of variance 1."""
    centre = predictions.mean(axis=0)
    values, vectors = np.linalg.eigh(np.atleast_2d(np.cov(predictions.T, bias=True)))
    deviations = np.sqrt(np.maximum(values[::-1], 0.0))
    kept = int((deviations[:MAX_RANK] > LEAST_TRAIT).sum())
    return centre, vectors[:, ::-1][:, :kept] / deviations[:kept]


def _least_squares(z: Matrix, scores: Matrix) -> Matrix:
    """Coefficients [1 + k, E]."""
    return np.linalg.lstsq(z, scores, rcond=None)[0]


def _errors(prediction: Matrix, scores: Matrix) -> Matrix:
    """[2, n]: squared errors in the differences between experts, which decide a choice, and in their quality."""
    return np.stack([difference_errors(prediction, scores), ((prediction - scores) ** 2).mean(axis=1)])


def _improves(before: Matrix, after: Matrix, prompts: int) -> bool:
    """Whether one of the two `_errors` falls by more than one standard error of the paired difference."""
    return any(clearly_positive(gain, prompts) for gain in before - after)


def _choose_rank(z: Matrix, known: Lessons) -> tuple[Matrix, int, list[float]]:
    """Predictions left out by fold [n, E] at the rank chosen, that rank, and the difference error at each from 0.

    The smallest rank, unless a greater one improves on it.
    """
    scores = known.scores
    best, chosen, errors = scores, 0, []
    for rank in range(z.shape[1]):
        guesses = np.empty_like(scores)
        for training, held in known.splits():
            guesses[held] = z[held, : 1 + rank] @ _least_squares(z[training, : 1 + rank], scores[training])
        errors.append(_errors(guesses, scores))
        if rank == 0 or _improves(errors[chosen], errors[rank], known.prompts):
            best, chosen = guesses, rank
    return best, chosen, [float(e[0].mean()) for e in errors]


def _project(head: Head, centre: Matrix, directions: Matrix) -> Head:
    """The head whose columns are traits in place of experts."""
    if isinstance(head, heads.Kernel):
        return replace(head, top=_projected(head.top, centre, directions))
    assert isinstance(head, Linear)
    return _projected(head, centre, directions)


def _projected(line: Linear, centre: Matrix, directions: Matrix) -> Linear:
    weight, bias = line.weight @ directions, (line.bias - centre) @ directions
    return Linear(weight.astype(np.float32), bias.astype(np.float32))


def _fit_one(z: Matrix, y: Matrix, noise: Matrix, prior: Prior) -> tuple[Matrix, Matrix, float]:
    """A new expert's row: mean [1 + k], covariance, and the factor of its residual deviation to the typical one.

    Gaussian prior and noise of variance `noise` [m] times the factor squared, which is found from the left-out
    residuals (in closed form) and shrunk towards 1.
    """
    size, factor = z.shape[1], 1.0
    start, scatter = prior.mean.astype(np.float64), prior.covariance.astype(np.float64)
    for _ in range(3):
        variance = noise * factor**2
        weighted = z / variance[:, None]
        covariance = np.linalg.solve(np.eye(size) + scatter @ (z.T @ weighted), scatter)
        mean = start + covariance @ (weighted.T @ (y - z @ start))
        kept = 1 - np.einsum("ni,ij,nj->n", z, covariance, weighted)  # 1 - leverage
        squares = (y - z @ mean) ** 2 / (noise * np.maximum(kept, 1e-6))
        factor = float(np.sqrt((PRIOR_RESIDUALS + squares.sum()) / (PRIOR_RESIDUALS + len(y))))
    return mean, (covariance + covariance.T) / 2, factor


def _joined(first: DeviationHead, second: DeviationHead, shift: float) -> DeviationHead:
    """The columns of both, the second's standard deviations times exp(shift)."""
    by = np.float32(shift)
    line = Linear(
        np.hstack([first.line.weight, second.line.weight]), np.concatenate([first.line.bias, second.line.bias + by])
    )
    low, high = np.concatenate([first.low, second.low + by]), np.concatenate([first.high, second.high + by])
    return DeviationHead(line, low, high, first.figures)
