"""Regression heads over frozen features, and their cross-validation.

Fitting uses `features` float [n, d] whose first `plain` columns are the embedding and whose others are
structural features; a head that leaves the latter out has zero weights there, so all heads are called alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from signalbox.router.artifact import Artifact, ArtifactError

Matrix = NDArray[Any]

# From simple to elaborate: the order in which a tie is broken.
KINDS = ("ridge", "ridge+structure", "mlp")
PENALTIES = np.logspace(-2, 5, 22)
HIDDEN = 64
MAX_EPOCHS, PATIENCE, BATCH = 60, 6, 128


@dataclass(frozen=True)
class Data:
    """features [n, d], labels [n, E], folds int [n] (texts of one prompt share a fold), embedding width `plain`."""

    features: Matrix
    labels: Matrix
    folds: Matrix
    plain: int

    def splits(self) -> Iterator[tuple[Matrix, Matrix]]:
        """(training mask, held-out mask) for each fold that has rows."""
        for fold in np.unique(self.folds):
            held = self.folds == fold
            yield ~held, held


class Head(Protocol):
    """float [n, d] -> float32 [n, E]."""

    @property
    def kind(self) -> str:
        """`linear` or `mlp`."""

    def __call__(self, features: Matrix) -> NDArray[np.float32]:
        """Predict."""

    def tensors(self, prefix: str) -> dict[str, Matrix]:
        """What an artifact keeps."""


@dataclass(frozen=True)
class Linear:
    """features @ weight + bias: weight float32 [d, E], bias float32 [E]."""

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    kind: str = "linear"

    def __call__(self, features: Matrix) -> NDArray[np.float32]:
        """Predict."""
        return features @ self.weight + self.bias

    def tensors(self, prefix: str) -> dict[str, Matrix]:
        """What an artifact keeps."""
        return {f"{prefix}weight": self.weight, f"{prefix}bias": self.bias}


@dataclass(frozen=True)
class Mlp:
    """One hidden layer of rectified units: first [d, h] and [h], then [h, E] and [E], float32."""

    first: Linear
    second: Linear
    kind: str = "mlp"

    def __call__(self, features: Matrix) -> NDArray[np.float32]:
        """Predict."""
        return self.second(np.maximum(self.first(features), 0.0))

    def tensors(self, prefix: str) -> dict[str, Matrix]:
        """What an artifact keeps."""
        return {**self.first.tensors(f"{prefix}first."), **self.second.tensors(f"{prefix}second.")}


@dataclass(frozen=True)
class Fit:
    """A head fitted on all rows, and what its kind predicts for rows it was not fitted on, float [n, E]."""

    head: Head
    out_of_fold: Matrix
    figures: dict[str, Any]


def fit(name: str, data: Data, seed: int) -> Fit:
    """Fit one of `KINDS`; deterministic for a seed."""
    if name == "mlp":
        return _fit_mlp(data, seed)
    return _fit_ridge(data, structure=name == "ridge+structure")


# Ridge regression in closed form


class _RidgePath:
    """Ridge solutions for all penalties from one eigendecomposition; the intercept is not penalised."""

    def __init__(self, x: Matrix, y: Matrix) -> None:
        self.x_mean, self.y_mean = x.mean(axis=0), y.mean(axis=0)
        centred = x - self.x_mean
        self.values, self.vectors = np.linalg.eigh(centred.T @ centred)
        self.projected = self.vectors.T @ (centred.T @ (y - self.y_mean))

    def weight(self, penalty: float) -> Matrix:
        shrunk = self.projected / (np.maximum(self.values, 0.0) + penalty)[:, None]
        return self.vectors @ shrunk

    def predict(self, x: Matrix, penalty: float) -> Matrix:
        return (x - self.x_mean) @ self.weight(penalty) + self.y_mean


def _scaling(data: Data, structure: bool) -> tuple[Matrix, Matrix]:
    """Shift and scale [d]. The embedding keeps its own scale; structural features get as much variance as all of it."""
    x = data.features.astype(np.float64)
    shift, scale = x.mean(axis=0), np.ones(x.shape[1])
    deviation = x[:, data.plain :].std(axis=0)
    usable = (deviation > 1e-6) & structure
    embedded = np.sqrt(x[:, : data.plain].var(axis=0).sum() / max(1, len(deviation)))
    scale[data.plain :] = np.where(usable, embedded / np.maximum(deviation, 1e-6), 0.0)
    return shift, scale


def _split_labels(labels: Matrix) -> tuple[Matrix, Matrix]:
    """A row's mean over experts (how hard the prompt is) and what each expert is off it (who should have it)."""
    mean = labels.mean(axis=1, keepdims=True)
    return mean, labels - mean


def _fit_ridge(data: Data, structure: bool) -> Fit:
    """Difficulty and differences have a penalty each: the differences decide the routing and are far fainter."""
    shift, scale = _scaling(data, structure)
    x = (data.features - shift) * scale
    weight: Matrix = np.zeros((x.shape[1], data.labels.shape[1]))
    bias: Matrix = np.zeros(data.labels.shape[1])
    out: Matrix = np.zeros(data.labels.shape)
    penalties = []
    for part in _split_labels(data.labels):
        guesses, penalty = _cross_validate(x, part, data)
        path = _RidgePath(x, part)
        solution = path.weight(penalty)
        weight = weight + solution
        bias = bias + path.y_mean - path.x_mean @ solution
        out = out + guesses
        penalties.append(float(penalty))
    weight = weight * scale[:, None]
    bias = bias - shift @ weight
    figures = {"penalty_mean": penalties[0], "penalty_differences": penalties[1]}
    return Fit(Linear(weight.astype(np.float32), bias.astype(np.float32)), out, figures)


def _cross_validate(x: Matrix, y: Matrix, data: Data) -> tuple[Matrix, float]:
    """Out-of-fold predictions [n, k] at the penalty with the least out-of-fold squared error, and that penalty."""
    guesses = _out_of_fold(x, y, data)
    best = int(np.argmin(((guesses - y) ** 2).sum(axis=(1, 2))))
    return guesses[best], float(PENALTIES[best])


def _out_of_fold(x: Matrix, y: Matrix, data: Data) -> Matrix:
    """Predictions [penalties, n, k] for rows that each was not fitted on."""
    guesses = np.empty((len(PENALTIES), *y.shape))
    for training, held in data.splits():
        path = _RidgePath(x[training], y[training])
        for i, penalty in enumerate(PENALTIES):
            guesses[i, held] = path.predict(x[held], penalty)
    return guesses


# A small MLP


def _fit_mlp(data: Data, seed: int) -> Fit:
    """Each fold stops early on a tenth of its own training rows; the final fit runs for the median of their epochs."""
    shift, scale = _scaling(data, structure=True)
    x = (data.features - shift) * scale
    # The usual initialisation expects features of unit variance.
    unit = np.sqrt(x.shape[1] / max(float(x.var(axis=0).sum()), 1e-12))
    x, scale = x * unit, scale * unit
    y_mean, y_scale = data.labels.mean(axis=0), max(float(data.labels.std()), 1e-6)
    y = (data.labels - y_mean) / y_scale
    out = np.empty(data.labels.shape)
    epochs = []
    rng = np.random.default_rng(seed)
    for training, held in data.splits():
        rows = rng.permutation(np.flatnonzero(training))
        stop = rows[: max(1, len(rows) // 10)]
        net, epoch = _train_mlp(x, y, rows[len(stop) :], stop, seed, MAX_EPOCHS)
        epochs.append(epoch)
        out[held] = net(x[held]) * y_scale + y_mean
    net, _ = _train_mlp(x, y, np.arange(len(x)), None, seed, max(1, int(np.median(epochs))))
    weight = net.first.weight * scale[:, None]
    first = Linear(weight.astype(np.float32), (net.first.bias - shift @ weight).astype(np.float32))
    second = Linear(
        (net.second.weight * y_scale).astype(np.float32), (net.second.bias * y_scale + y_mean).astype(np.float32)
    )
    return Fit(Mlp(first, second), out, {"hidden": HIDDEN, "epochs": int(np.median(epochs))})


def _train_mlp(x: Matrix, y: Matrix, rows: Matrix, stop: Matrix | None, seed: int, epochs: int) -> tuple[Mlp, int]:
    """Train on `rows`; with `stop` rows, keep the epoch that predicts them best. Returns the net and that epoch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = torch.nn.Sequential(
            torch.nn.Dropout(0.1),
            torch.nn.Linear(x.shape[1], HIDDEN),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.2),
            torch.nn.Linear(HIDDEN, y.shape[1]),
        )
        optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.05)
        inputs, labels = torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)
        best, best_loss, best_epoch = _export(net), np.inf, 0
        order = torch.as_tensor(rows)
        for epoch in range(1, epochs + 1):
            net.train()
            for batch in order[torch.randperm(len(order))].split(BATCH):
                optimiser.zero_grad()
                torch.nn.functional.mse_loss(net(inputs[batch]), labels[batch]).backward()
                optimiser.step()
            if stop is None:
                continue
            net.eval()
            with torch.inference_mode():
                loss = float(torch.nn.functional.mse_loss(net(inputs[stop]), labels[stop]))
            if loss < best_loss:
                best, best_loss, best_epoch = _export(net), loss, epoch
            elif epoch - best_epoch >= PATIENCE:
                break
        return (_export(net), epochs) if stop is None else (best, best_epoch)


def _export(net: torch.nn.Sequential) -> Mlp:
    state = {name: tensor.detach().numpy().copy() for name, tensor in net.state_dict().items()}
    return Mlp(Linear(state["1.weight"].T, state["1.bias"]), Linear(state["4.weight"].T, state["4.bias"]))


# Uncertainty


@dataclass(frozen=True)
class DeviationHead:
    """Standard deviation of the quality: exp of a linear function of the features, within the range seen in training.

    `low` and `high` are float32 [E], natural logarithms of standard deviations.
    """

    line: Linear
    low: NDArray[np.float32]
    high: NDArray[np.float32]
    figures: dict[str, Any] = field(default_factory=dict)

    def __call__(self, features: Matrix) -> NDArray[np.float32]:
        """float32 [n, E], positive."""
        return np.exp(np.clip(self.line(features), self.low, self.high))

    def tensors(self, prefix: str) -> dict[str, Matrix]:
        """What an artifact keeps."""
        return {**self.line.tensors(prefix), f"{prefix}low": self.low, f"{prefix}high": self.high}


def fit_deviation(data: Data, residuals: Matrix) -> DeviationHead:
    """Regress the logarithm of squared out-of-fold residuals [n, E], again out of fold, and calibrate its scale.

    The penalty is the one with the greatest Gaussian likelihood of the residuals; the greatest penalty is as good
    as a constant deviation for each expert, so heteroscedasticity has to earn its place.
    """
    shift, scale = _scaling(data, structure=True)
    x = (data.features - shift) * scale
    squares = residuals.astype(np.float64) ** 2
    floor = 1e-4 * squares.mean(axis=0) + 1e-10
    y = np.log(squares + floor)
    guesses = _out_of_fold(x, y, data)
    # exp(mean of a logarithm) is not the mean: one factor for each penalty and expert makes up for it.
    guesses += np.log(np.mean((squares + floor) / np.exp(guesses), axis=1, keepdims=True))
    likelihood = -0.5 * (guesses + (squares + floor) / np.exp(guesses)).mean(axis=(1, 2))
    best = int(np.argmax(likelihood))
    path = _RidgePath(x, y)
    weight = path.weight(PENALTIES[best])
    fitted = x @ weight
    # The final fit sees its own rows: only its slope is taken, the level comes from the out-of-fold calibration.
    level = guesses[best].mean(axis=0) - fitted.mean(axis=0)
    low, high = np.quantile(guesses[best], [0.01, 0.99], axis=0)
    weight = weight * scale[:, None]
    line = Linear((weight / 2).astype(np.float32), ((level - shift @ weight) / 2).astype(np.float32))
    figures = {
        "penalty": float(PENALTIES[best]),
        "log_likelihood": float(likelihood[best]),
        "log_likelihood_constant": float(likelihood[-1]),
    }
    return DeviationHead(line, (low / 2).astype(np.float32), (high / 2).astype(np.float32), figures)


# Loading


def load_head(artifact: Artifact, prefix: str, kind: str, width: int, columns: Sequence[int]) -> Head:
    """The head in an artifact, for the experts at these columns. Raises `ArtifactError`."""
    if kind == "linear":
        return _load_linear(artifact, prefix, width, columns)
    if kind == "mlp":
        first = Linear(
            artifact.tensor(f"{prefix}first.weight", width, HIDDEN), artifact.tensor(f"{prefix}first.bias", HIDDEN)
        )
        return Mlp(first, _load_linear(artifact, f"{prefix}second.", HIDDEN, columns))
    raise ArtifactError(f"{artifact.path or 'router artifact'}: unknown head {kind!r}; train it again")


def load_deviation(artifact: Artifact, prefix: str, width: int, columns: Sequence[int]) -> DeviationHead:
    """The uncertainty head in an artifact, for the experts at these columns. Raises `ArtifactError`."""
    n, picked = len(artifact.experts), list(columns)
    low, high = artifact.tensor(f"{prefix}low", n)[picked], artifact.tensor(f"{prefix}high", n)[picked]
    return DeviationHead(_load_linear(artifact, prefix, width, columns), low, high)


def _load_linear(artifact: Artifact, prefix: str, width: int, columns: Sequence[int]) -> Linear:
    n, picked = len(artifact.experts), list(columns)
    weight = artifact.tensor(f"{prefix}weight", width, n)[:, picked]
    return Linear(np.ascontiguousarray(weight), artifact.tensor(f"{prefix}bias", n)[picked])
