"""What a router is: a predictor of every expert's quality on a prompt. It knows no price and no SLA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

FloatMatrix = NDArray[np.float32]


@dataclass(slots=True, frozen=True)
class Prompt:
    """What a predictor may see of a request: the text to answer (the last user turn) and the system prompt.

    Flags such as `[Flag: smallest model]` have been taken off before.
    """

    text: str
    system: str = ""


@dataclass(slots=True, frozen=True)
class Prediction:
    """Predicted quality of each expert on each prompt.

    quality: float32 [n, E] in [0, 1]; uncertainty: float32 [n, E], one standard deviation in the same unit.
    `spread` is the typical gap between best and worst expert on a prompt (mean over the training rows, same
    unit): it puts a cost weight and a quality weight on one scale.
    """

    experts: tuple[str, ...]
    quality: FloatMatrix
    uncertainty: FloatMatrix
    spread: float

    def row(self, i: int) -> dict[str, tuple[float, float]]:
        """Expert name -> (quality, uncertainty) of prompt `i`."""
        return {name: (float(self.quality[i, e]), float(self.uncertainty[i, e])) for e, name in enumerate(self.experts)}


@dataclass(slots=True, frozen=True)
class Facts:
    """What is known of the experts beside the table: their size and what they are said to be for.

    parameters: expert -> number of parameters, all of which must be resident; active: expert -> parameters that one
    token uses, where fewer (mixtures of experts); descriptions: expert -> text, or several; budget: most resident
    parameters of all experts that a router may choose from, None for no limit. Kinds that need none of it pass it over.
    """

    parameters: Mapping[str, float] = field(default_factory=dict)
    active: Mapping[str, float] = field(default_factory=dict)
    descriptions: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    budget: float | None = None


@runtime_checkable
class Predictor(Protocol):
    """Every router: Tryage, Composition of Experts, GLIDER's global half, kNN, plain heads."""

    kind: str
    experts: tuple[str, ...]

    def predict(self, prompts: list[Prompt]) -> Prediction:
        """Predict all experts on all prompts. Blocking and thread-safe; call it off the event loop."""


def quality_of_loss(bits_per_byte: NDArray[np.floating] | float) -> NDArray[np.float32]:
    """Loss in bits per byte -> quality in [0, 1]: the geometric mean probability of a reference byte, 2**-loss.

    Monotone, so ordering experts by quality is ordering them by loss (Tryage's label).
    """
    return np.exp2(-np.asarray(bits_per_byte, dtype=np.float64)).astype(np.float32)
