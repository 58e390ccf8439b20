"""Stacked regression in closed form: from features to auxiliary predictions, and from those to each expert's quality.

Stage 1 (`AuxiliaryRidge`). Ridge regression of everything that a training table knows of a prompt (experts' scores,
lengths of their answers, the task) on its features, solved in the dual. Stage 2 learns from its out-of-fold
predictions (stacked generalisation, Wolpert 1992).

Stage 2 (`QualityHead`). A prompt is now a few dozen well-estimated numbers. Ridge on these and on random Fourier
features of them (Rahimi & Recht, NIPS 2007), its penalty chosen by the left-out error of the *differences between
experts*, for only these decide a route (in closed form, the texts of one prompt left out together): once in the
experts' own coordinates, once in canonical coordinates with a penalty each (curds and whey, Breiman & Friedman 1997).
Non-negative least squares on left-out predictions weights the two, and shrinks both where there is nothing to predict.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg as sl
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls

from signalbox.router.artifact import Artifact
from signalbox.router.heads import Linear, load_linear

Matrix = NDArray[Any]
FloatMatrix = NDArray[np.float32]
# Rows left out together: int [groups, size], one array for each size.
Groups = list[NDArray[np.intp]]

DUAL_PENALTIES = (0.2, 0.6, 2.0, 6.0, 20.0)
PENALTIES = np.concatenate([np.geomspace(0.5, 3e3, 14), [1e4, 1e5, 1e7]])
CANONICAL_PENALTY = 100.0  # of the fit that finds the canonical directions; the penalties proper come after
PRIOR = 0.1  # pull of the mixture towards equal shares, relative to a head's own variance
CHOOSING_FOLDS = 2  # enough to choose a penalty; the other folds are spared three of five decompositions
DENSE_COLUMNS = 4096
CLIP = 4.0  # standard deviations: a prompt unlike all of training is taken to be just unusual


@dataclass(frozen=True)
class FourierFeatures:
    """Random Fourier features of a Gaussian kernel over standardised inputs.

    mean, gain: float32 [d], the gain 1 / standard deviation, 0 where an input is constant;
    projection: float32 [d, m]; phase: float32 [m].
    """

    mean: FloatMatrix
    gain: FloatMatrix
    projection: FloatMatrix
    phase: FloatMatrix

    @classmethod
    def fit(cls, x: Matrix, count: int, precision: float, seed: int) -> FourierFeatures:
        """The kernel is exp(-precision * |u - v|^2 / 2) of standardised rows u, v."""
        rng = np.random.default_rng(seed)
        deviation = x.std(axis=0)
        gain = np.where(deviation > 1e-6, 1 / np.maximum(deviation, 1e-6), 0.0)
        projection = rng.normal(size=(x.shape[1], count)) * np.sqrt(precision)
        phase = rng.uniform(0, 2 * np.pi, count)
        return cls(*(a.astype(np.float32) for a in (x.mean(axis=0), gain, projection, phase)))

    def standardise(self, x: Matrix) -> FloatMatrix:
        """float32 [..., d] within `CLIP` standard deviations."""
        return np.clip((x - self.mean) * self.gain, -CLIP, CLIP).astype(np.float32)

    def waves(self, standardised: FloatMatrix) -> FloatMatrix:
        """float32 [..., m]; the inner product of two rows approximates the kernel."""
        return np.cos(standardised @ self.projection + self.phase) * np.float32(np.sqrt(2 / len(self.phase)))

    def tensors(self, prefix: str) -> dict[str, Matrix]:
        """What an artifact keeps."""
        return {f"{prefix}{name}": getattr(self, name) for name in ("mean", "gain", "projection", "phase")}


def load_fourier(artifact: Artifact, prefix: str, width: int, count: int) -> FourierFeatures:
    """The features in an artifact. Raises `ArtifactError`."""
    return FourierFeatures(
        artifact.tensor(f"{prefix}mean", width),
        artifact.tensor(f"{prefix}gain", width),
        artifact.tensor(f"{prefix}projection", width, count),
        artifact.tensor(f"{prefix}phase", count),
    )


def groups_of(keys: Matrix) -> Groups:
    """Rows of one key are left out together."""
    _, member = np.unique(keys, return_inverse=True)
    order, sizes = np.argsort(member, kind="stable"), np.bincount(member)
    first = np.cumsum(sizes) - sizes
    return [order[first[sizes == s][:, None] + np.arange(s)] for s in np.unique(sizes)]


def _left_out(block: Callable[[NDArray[np.intp]], Matrix], values: Matrix, groups: Groups) -> Matrix:
    """Solve block(rows) @ residual = values[rows] for each group: label less the prediction without the group."""
    out = np.empty_like(values)
    for rows in groups:
        out[rows] = np.linalg.solve(block(rows), values[rows])
    return out


# Stage 1


@dataclass(frozen=True)
class AuxiliaryRidge:
    """sparse @ weight + dense @ dense_weight + offset: weight [columns, t], dense_weight [m, t], offset [t], float32.

    `weight` has been rounded to float16, in which an artifact keeps it.
    """

    weight: FloatMatrix
    dense_weight: FloatMatrix
    offset: FloatMatrix

    def one(self, columns: NDArray[np.int32], weights: FloatMatrix, dense: FloatMatrix) -> FloatMatrix:
        """float32 [t] for one prompt; reads only the rows of its own n-grams."""
        return weights @ self.weight[columns] + dense @ self.dense_weight + self.offset


def fit_auxiliary(
    x: sp.csr_matrix,
    dense: FloatMatrix,
    y: FloatMatrix,
    folds: NDArray[np.intp],
    notify: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[AuxiliaryRidge, FloatMatrix]:
    """The regression of y [n, t], and out-of-fold predictions [n, t].

    Each target has the penalty of least error in the first `CHOOSING_FOLDS` folds. Folds and not single rows are left
    out: the mean of all other rows tells a row's own label, and where there is no other signal stage 2 would find that
    one. Takes up to 8 n^2 bytes, and n^3 operations for each penalty.
    """
    gram = _gram(x)
    gram += dense @ dense.T
    guesses = np.empty((len(DUAL_PENALTIES), *y.shape), dtype=np.float32)
    names = np.unique(folds)
    best = np.zeros(y.shape[1], dtype=np.intp)
    for number, fold in enumerate(names):
        notify(number, len(names) + 1)
        known, held = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        mean, across = y[known].mean(axis=0), gram[np.ix_(held, known)]
        system = gram[np.ix_(known, known)]
        choosing = number < CHOOSING_FOLDS
        for i in range(len(DUAL_PENALTIES)) if choosing else np.unique(best):
            guesses[i, held] = across @ _dual(system, y[known] - mean, DUAL_PENALTIES[i]) + mean
        if choosing:
            tried = np.isin(folds, names[: number + 1])
            best = ((guesses[:, tried] - y[tried]) ** 2).mean(axis=1).argmin(axis=0)
    notify(len(names), len(names) + 1)
    mean, dual = y.mean(axis=0), np.empty_like(y)
    for i in np.unique(best):
        dual[:, best == i] = _dual(gram, (y - mean)[:, best == i], DUAL_PENALTIES[i])
    notify(len(names) + 1, len(names) + 1)
    weight = np.asarray(x.T @ dual, dtype=np.float32).astype(np.float16).astype(np.float32)
    ridge = AuxiliaryRidge(weight, (dense.T @ dual).astype(np.float32), mean.astype(np.float32))
    return ridge, np.take_along_axis(guesses, best[None, None, :], axis=0)[0]


def _gram(x: sp.csr_matrix) -> FloatMatrix:
    """x @ x.T, float32 [n, n]: columns that many rows share as dense products, the others as a sparse one."""
    shared = np.bincount(x.indices, minlength=x.shape[1]) > max(16.0, x.shape[0] / 50)
    columns = x.tocsc()
    gram = (columns[:, ~shared] @ columns[:, ~shared].T).toarray().astype(np.float32)
    common = np.flatnonzero(shared)
    for start in range(0, len(common), DENSE_COLUMNS):  # bounds the memory
        part = columns[:, common[start : start + DENSE_COLUMNS]].toarray()
        gram += part @ part.T
    return gram


def _dual(gram: FloatMatrix, y: FloatMatrix, penalty: float) -> FloatMatrix:
    """(gram + penalty)^-1 y, float32; by torch, whose Cholesky decomposition takes half the time of SciPy's."""
    system = torch.tensor(gram)
    system.diagonal().add_(penalty)
    factor, failed = torch.linalg.cholesky_ex(system)
    if int(failed):  # rounding; a little more penalty does
        return _dual(gram, y, 3 * penalty)
    return np.asarray(torch.cholesky_solve(torch.tensor(y), factor).numpy())


# Stage 2


@dataclass(frozen=True)
class QualityHead:
    """Auxiliary predictions [..., t] to the quality of each expert [..., E]."""

    fourier: FourierFeatures
    top: Linear

    def inputs(self, auxiliary: FloatMatrix) -> FloatMatrix:
        """float32 [..., t]: standardised predictions, with a variance of 1 in all."""
        return self.fourier.standardise(auxiliary) / np.float32(np.sqrt(auxiliary.shape[-1]))

    def __call__(self, auxiliary: FloatMatrix) -> FloatMatrix:
        """Predict, not clipped."""
        return self.top(self._features(auxiliary))

    def _features(self, auxiliary: FloatMatrix) -> FloatMatrix:
        waves = self.fourier.waves(self.fourier.standardise(auxiliary))
        return np.concatenate([waves, self.inputs(auxiliary)], axis=-1)

    def tensors(self, prefix: str) -> dict[str, Matrix]:
        """What an artifact keeps."""
        return {**self.fourier.tensors(f"{prefix}fourier."), **self.top.tensors(f"{prefix}top.")}


def fit_head(
    auxiliary: FloatMatrix, y: Matrix, groups: Groups, *, count: int, seed: int
) -> tuple[QualityHead, Matrix, dict[str, float]]:
    """The head for labels y [n, E], predictions [n, E] of rows whose group was left out, and each part's weight.

    `auxiliary` [n, t] are out-of-fold predictions of stage 1; `count` is the number of Fourier features.
    """
    width = auxiliary.shape[1]
    # Standardised rows are at a mean squared distance of 2 t: the kernel is exp(-1/2) there.
    fourier = FourierFeatures.fit(auxiliary, count, 0.5 / width, seed)
    blank = Linear(np.zeros((count + width, y.shape[1]), np.float32), np.zeros(y.shape[1], np.float32))
    z = QualityHead(fourier, blank)._features(auxiliary).astype(np.float64)
    ridge = _Ridge(z, y.astype(np.float64), groups)
    parts = {"plain": _plain(ridge), "canonical": _canonical(ridge)}
    share = _mixture([left_out for _, left_out in parts.values()], ridge.y)
    weight = sum(m * w for m, (w, _) in zip(share, parts.values(), strict=True))
    left_out = sum(m * p for m, (_, p) in zip(share, parts.values(), strict=True)) + ridge.y_mean
    bias = ridge.y_mean - ridge.z_mean @ weight
    top = Linear(np.asarray(weight, dtype=np.float32), np.asarray(bias, dtype=np.float32))
    return QualityHead(fourier, top), left_out, dict(zip(parts, map(float, share), strict=True))


def load_quality_head(artifact: Artifact, prefix: str, width: int, count: int, columns: Sequence[int]) -> QualityHead:
    """The head in an artifact, for the experts at these columns. Raises `ArtifactError`."""
    fourier = load_fourier(artifact, f"{prefix}fourier.", width, count)
    return QualityHead(fourier, load_linear(artifact, f"{prefix}top.", count + width, columns))


class _Ridge:
    """Centred ridge regression for all penalties from one eigendecomposition; y is kept less its mean."""

    def __init__(self, z: Matrix, y: Matrix, groups: Groups) -> None:
        self.z_mean, self.y_mean, self.groups = z.mean(axis=0), y.mean(axis=0), groups
        self.z, self.y = z - self.z_mean, y - self.y_mean
        values, self.vectors = np.linalg.eigh(self.z.T @ self.z)
        self.values = np.maximum(values, 0)
        self.u = self.z @ self.vectors

    def weight(self, y: Matrix, penalty: float) -> Matrix:
        """[d, E]."""
        return self.vectors @ ((self.u.T @ y) / (self.values + penalty)[:, None])

    def left_out(self, y: Matrix, penalty: float) -> Matrix:
        """Predictions [n, E], less the mean, of rows whose group was left out."""
        shrink = 1 / (self.values + penalty)
        fitted = self.u @ ((self.u.T @ y) * shrink[:, None])

        def block(rows: NDArray[np.intp]) -> Matrix:
            hat = (self.u[rows] * shrink) @ self.u[rows].swapaxes(1, 2) + 1 / len(y)
            return np.eye(rows.shape[1]) - hat

        return y - _left_out(block, y - fitted, self.groups)


def _differences(values: Matrix) -> Matrix:
    """Each expert's difference to the mean of its row; of a lone expert, its value."""
    return values - values.mean(axis=1, keepdims=True) if values.shape[1] > 1 else values


def _plain(ridge: _Ridge) -> tuple[Matrix, Matrix]:
    """One penalty for all experts. Returns (weight, left-out predictions)."""
    guesses = [ridge.left_out(ridge.y, penalty) for penalty in PENALTIES]
    best = int(np.argmin([(_differences(ridge.y - guess) ** 2).mean() for guess in guesses]))
    return ridge.weight(ridge.y, PENALTIES[best]), guesses[best]


def _canonical(ridge: _Ridge) -> tuple[Matrix, Matrix]:
    """A penalty for each direction, among the experts' space, that maximises signal over noise."""
    signal = ridge.z @ ridge.weight(ridge.y, CANONICAL_PENALTY)
    noise = (ridge.y - signal).T @ (ridge.y - signal)
    size = len(noise)
    floor = 1e-6 * max(np.trace(noise), 1e-12) * np.eye(size)  # experts may score alike
    _, directions = sl.eigh(signal.T @ signal, noise + floor)
    back = np.linalg.inv(directions)
    turned = ridge.y @ directions
    guesses = np.stack([ridge.left_out(turned, penalty) for penalty in PENALTIES])
    best = ((guesses - turned) ** 2).mean(axis=1).argmin(axis=0)
    weight = np.stack([ridge.weight(turned[:, [c]], PENALTIES[p])[:, 0] for c, p in enumerate(best)], axis=1)
    return weight @ back, guesses[best, :, np.arange(size)].T @ back


def _mixture(guesses: list[Matrix], y: Matrix) -> NDArray[np.float64]:
    """Weights, 0 or more, of the heads: least left-out error of the differences, pulled towards equal shares."""
    count = len(guesses)
    p = np.stack([_differences(guess).ravel() for guess in guesses], axis=1)
    gram, cross = p.T @ p, p.T @ _differences(y).ravel()
    pull = PRIOR * np.trace(gram) / count
    if pull <= 1e-12:  # nothing is predicted, whatever the weights
        return np.full(count, 1 / count)
    root = np.linalg.cholesky(gram + pull * np.eye(count))
    found, _ = nnls(root.T, np.linalg.solve(root, cross + pull / count))
    return np.asarray(found)
