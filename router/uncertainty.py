"""How wrong a prediction may be: a standard deviation for each expert and prompt, calibrated on unseen rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from signalbox.router.artifact import Artifact
from signalbox.router.heads import PENALTIES, Data, Linear, Matrix, RidgePath, load_linear, out_of_fold, scaling


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
    shift, scale = scaling(data)
    x = (data.features - shift) * scale
    squares = residuals.astype(np.float64) ** 2
    floor = 1e-4 * squares.mean(axis=0) + 1e-10
    y = np.log(squares + floor)
    guesses = out_of_fold(lambda _: x, y, data)
    # exp(mean of a logarithm) is not the mean: one factor for each penalty and expert makes up for it.
    guesses += np.log(np.mean((squares + floor) / np.exp(guesses), axis=1, keepdims=True))
    likelihood = -0.5 * (guesses + (squares + floor) / np.exp(guesses)).mean(axis=(1, 2))
    best = int(np.argmax(likelihood))
    weight = RidgePath(x, y).weight(PENALTIES[best])
    # The final fit sees its own rows: only its slope is taken, the level comes from the out-of-fold calibration.
    level = guesses[best].mean(axis=0) - (x @ weight).mean(axis=0)
    low, high = np.quantile(guesses[best], [0.01, 0.99], axis=0)
    weight = weight * scale[:, None]
    line = Linear((weight / 2).astype(np.float32), ((level - shift @ weight) / 2).astype(np.float32))
    figures = {
        "penalty": float(PENALTIES[best]),
        "log_likelihood": float(likelihood[best]),
        "log_likelihood_constant": float(likelihood[-1]),
    }
    return DeviationHead(line, (low / 2).astype(np.float32), (high / 2).astype(np.float32), figures)


def load_deviation(artifact: Artifact, prefix: str, width: int, columns: Sequence[int]) -> DeviationHead:
    """The uncertainty head in an artifact, for the experts at these columns. Raises `ArtifactError`."""
    n, picked = len(artifact.experts), list(columns)
    low, high = artifact.tensor(f"{prefix}low", n)[picked], artifact.tensor(f"{prefix}high", n)[picked]
    return DeviationHead(load_linear(artifact, prefix, width, columns), low, high)
