"""Regression heads over frozen features, and their cross-validation.

Fitting uses `features` float [n, d] whose first `plain` columns are the embedding and whose others are
structural features; a head that leaves the latter out has zero weights there, so all heads are called alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from signalbox.router.artifact import Artifact, ArtifactError

Matrix = NDArray[Any]
# Features of all rows [n, k], made with no more than the training rows in the mask.
Basis = Callable[[Matrix], Matrix]

# From simple to elaborate: the order in which a tie is broken.
KINDS = ("ridge", "ridge+structure", "kernel", "mlp")
PENALTIES = np.logspace(-3, 5, 25)
LANDMARKS = 256
# Rows among which landmarks are sought: enough for as many centres, and it bounds the time.
MAX_CLUSTERED = 4096
# Embeddings have length 1, so squared distances lie between 0 and 2 (and twice that with structural features).
GAMMA = 1.0
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
        """`linear`, `kernel` or `mlp`."""

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
class Kernel:
    """A linear function of Gaussian similarities to landmarks: scale float32 [d], landmarks float32 [m, d] (scaled)."""

    scale: NDArray[np.float32]
    landmarks: NDArray[np.float32]
    top: Linear
    kind: str = "kernel"

    def __call__(self, features: Matrix) -> NDArray[np.float32]:
        """Predict."""
        return self.top(_similarity(features * self.scale, self.landmarks))

    def tensors(self, prefix: str) -> dict[str, Matrix]:
        """What an artifact keeps."""
        return {
            f"{prefix}scale": self.scale,
            f"{prefix}landmarks": self.landmarks,
            **self.top.tensors(f"{prefix}top."),
        }


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
    if name == "kernel":
        return _fit_kernel(data, seed)
    return _fit_linear(data, structure=name == "ridge+structure")


# Ridge regression in closed form


class RidgePath:
    """Ridge solutions for all penalties from one eigendecomposition; the intercept is not penalised."""

    def __init__(self, x: Matrix, y: Matrix) -> None:
        self.x_mean, self.y_mean = x.mean(axis=0), y.mean(axis=0)
        centred = x - self.x_mean
        self.values, self.vectors = np.linalg.eigh(centred.T @ centred)
        self.projected = self.vectors.T @ (centred.T @ (y - self.y_mean))

    def weight(self, penalty: float) -> Matrix:
        """float [d, E]."""
        shrunk = self.projected / (np.maximum(self.values, 0.0) + penalty)[:, None]
        return self.vectors @ shrunk

    def predict(self, x: Matrix, penalty: float) -> Matrix:
        """float [n, E]."""
        return (x - self.x_mean) @ self.weight(penalty) + self.y_mean


def out_of_fold(basis: Basis, y: Matrix, data: Data) -> Matrix:
    """Ridge predictions [penalties, n, k] for rows that each was not fitted on."""
    guesses = np.empty((len(PENALTIES), *y.shape))
    for training, held in data.splits():
        x = basis(training)
        path = RidgePath(x[training], y[training])
        for i, penalty in enumerate(PENALTIES):
            guesses[i, held] = path.predict(x[held], penalty)
    return guesses


def scaling(data: Data, structure: bool = True) -> tuple[Matrix, Matrix]:
    """Shift and scale [d]. The embedding keeps its own scale; structural features get as much variance as all of it."""
    x = data.features.astype(np.float64)
    shift, scale = x.mean(axis=0), np.ones(x.shape[1])
    deviation = x[:, data.plain :].std(axis=0)
    usable = (deviation > 1e-6) & structure
    embedded = np.sqrt(x[:, : data.plain].var(axis=0).sum() / max(1, len(deviation)))
    scale[data.plain :] = np.where(usable, embedded / np.maximum(deviation, 1e-6), 0.0)
    return shift, scale


def _ridge(basis: Basis, data: Data) -> tuple[Linear, Matrix, dict[str, Any]]:
    """Ridge on a basis: the head on it, out-of-fold predictions, figures.

    A row's mean over experts (how hard the prompt is) and each expert's difference from it (who should have it)
    have a penalty each, the one with the least out-of-fold squared error: the differences decide the routing, and
    are far fainter.
    """
    e = data.labels.shape[1]
    mean = data.labels.mean(axis=1, keepdims=True)
    y = np.hstack([mean, data.labels - mean])
    guesses = out_of_fold(basis, y, data)
    errors = (guesses - y) ** 2
    at_mean, at_differences = (int(np.argmin(errors[..., c].sum(axis=(1, 2)))) for c in (slice(0, 1), slice(1, e + 1)))
    x = basis(np.ones(len(y), dtype=bool))
    path = RidgePath(x, y)
    weight = path.weight(PENALTIES[at_mean])[:, :1] + path.weight(PENALTIES[at_differences])[:, 1:]
    bias = path.y_mean[:1] + path.y_mean[1:] - path.x_mean @ weight
    figures = {
        "penalty_mean": float(PENALTIES[at_mean]),
        "penalty_differences": float(PENALTIES[at_differences]),
    }
    return Linear(weight, bias), guesses[at_mean][:, :1] + guesses[at_differences][:, 1:], figures


def _fit_linear(data: Data, structure: bool) -> Fit:
    shift, scale = scaling(data, structure)
    x = (data.features - shift) * scale
    found, guesses, figures = _ridge(lambda _: x, data)
    weight = found.weight * scale[:, None]
    bias = found.bias - shift @ weight
    return Fit(Linear(weight.astype(np.float32), bias.astype(np.float32)), guesses, figures)


# Kernel ridge by the Nyström method, with k-means centres as landmarks (Zhang et al., ICML 2008)


def _fit_kernel(data: Data, seed: int) -> Fit:
    """Gaussian kernel ridge: linear near the training rows, and at their mean where nothing is known."""
    _, scale = scaling(data)
    x = data.features * scale

    def landmarks(rows: Matrix) -> tuple[Matrix, Matrix]:
        """Landmarks [m, d], and the matrix [m, k] that makes similarities to them orthonormal features."""
        some = np.random.default_rng(seed).permutation(np.flatnonzero(rows))[:MAX_CLUSTERED]
        centres = _k_means(x[some], min(LANDMARKS, max(2, len(some) // 4)))
        values, vectors = np.linalg.eigh(_similarity(centres, centres))
        kept = values > 1e-5 * values[-1]
        return centres, vectors[:, kept] / np.sqrt(values[kept])

    def basis(rows: Matrix) -> Matrix:
        centres, whiten = landmarks(rows)
        return _similarity(x, centres) @ whiten

    found, guesses, figures = _ridge(basis, data)
    centres, whiten = landmarks(np.ones(len(x), dtype=bool))
    top = Linear((whiten @ found.weight).astype(np.float32), found.bias.astype(np.float32))
    head = Kernel(scale.astype(np.float32), centres.astype(np.float32), top)
    return Fit(head, guesses, {"landmarks": len(centres), **figures})


def _k_means(x: Matrix, count: int, rounds: int = 10) -> Matrix:
    """Centres [count, d] of rows in random order (Lloyd's algorithm; by matrix products, 100 times SciPy's speed)."""
    centres = x[:count].copy()
    for _ in range(rounds):
        nearest = np.argmin((centres**2).sum(axis=1) - 2 * x @ centres.T, axis=1)
        members = np.eye(count)[nearest]
        sizes = members.sum(axis=0)
        filled = sizes > 0
        centres[filled] = (members.T @ x)[filled] / sizes[filled, None]
    return centres


def _similarity(a: Matrix, b: Matrix) -> Matrix:
    """exp(-GAMMA * squared distance), [n, m]."""
    squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T
    return np.exp(-GAMMA * np.maximum(squares, 0.0))


# A small MLP


def _fit_mlp(data: Data, seed: int) -> Fit:
    """Each fold stops early on a tenth of its own training rows; the final fit runs for the median of their epochs."""
    shift, scale = scaling(data)
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
    with torch.random.fork_rng(devices=[]), _one_thread():
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


@contextmanager
def _one_thread() -> Iterator[None]:
    """Batches this small only lose by more threads: on a busy machine, a factor of ten and more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _export(net: torch.nn.Sequential) -> Mlp:
    state = {name: tensor.detach().numpy().copy() for name, tensor in net.state_dict().items()}
    return Mlp(Linear(state["1.weight"].T, state["1.bias"]), Linear(state["4.weight"].T, state["4.bias"]))


# Loading


def load_head(artifact: Artifact, prefix: str, kind: str, width: int, columns: Sequence[int]) -> Head:
    """The head in an artifact, for the experts at these columns. Raises `ArtifactError`."""
    if kind == "linear":
        return load_linear(artifact, prefix, width, columns)
    if kind == "kernel":
        count = len(artifact.tensors.get(f"{prefix}landmarks", ()))
        return Kernel(
            artifact.tensor(f"{prefix}scale", width),
            artifact.tensor(f"{prefix}landmarks", count, width),
            load_linear(artifact, f"{prefix}top.", count, columns),
        )
    if kind == "mlp":
        first = Linear(
            artifact.tensor(f"{prefix}first.weight", width, HIDDEN), artifact.tensor(f"{prefix}first.bias", HIDDEN)
        )
        return Mlp(first, load_linear(artifact, f"{prefix}second.", HIDDEN, columns))
    raise ArtifactError(f"{artifact.path or 'router artifact'}: unknown head {kind!r}; train it again")


def load_linear(artifact: Artifact, prefix: str, width: int, columns: Sequence[int]) -> Linear:
    """A linear head, or the last layer of another. Raises `ArtifactError`."""
    n, picked = len(artifact.experts), list(columns)
    weight = artifact.tensor(f"{prefix}weight", width, n)[:, picked]
    return Linear(np.ascontiguousarray(weight), artifact.tensor(f"{prefix}bias", n)[picked])
