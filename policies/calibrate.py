"""An engine's `SpeedModel` from measurements of it, so that it can be simulated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from signalbox.experts.speed_model import SpeedModel

FEWEST = 8  # observations, for four unknowns
HUBER = 2.0  # residuals of more than so many times the usual size count less
ROUNDS = 8


@dataclass(slots=True, frozen=True)
class Observation:
    """One request that was measured while `batch` requests ran at a time, all of like size, itself included.

    Times in ms; `ttft_ms` from when the request was sent, with a place free.
    """

    batch: float
    prompt_tokens: float
    answer_tokens: int
    ttft_ms: float
    tpot_ms: float


@dataclass(slots=True, frozen=True)
class Calibration:
    """The fitted engine; what each request takes beside it, in ms; and how far off the fit is.

    The errors are medians of the relative error, over the observations it was fitted to.
    """

    speed: SpeedModel
    overhead_ms: float
    ttft_error: float
    tpot_error: float


def calibrate(observations: Sequence[Observation], *, prefill_tokens: int = 512) -> Calibration:
    """Fit a `SpeedModel` by least squares on relative errors, robustly, with no parameter below zero.

    With s the time of a step of the batch b, s = step + more * (b - 1), r the time to read a prompt token, P and A the
    prompt's and the answer's tokens, and o the overhead:

        tpot = s + (b - 1) P r / A        (in an answer's time each of the others reads about one prompt)
        ttft = o + 1.5 s + P r            (s where alone: half a step is under way when it comes)

    Raises:
        ValueError: there are too few observations with more than one token, or they are no positive numbers.
    """
    usable = [o for o in observations if o.answer_tokens > 1]
    if len(usable) < FEWEST:
        raise ValueError(f"{len(usable)} answers of two tokens or more were measured; {FEWEST} are needed")
    if not all(math.isfinite(x) and x > 0 for o in usable for x in (o.batch, o.prompt_tokens, o.ttft_ms, o.tpot_ms)):
        raise ValueError("batches, prompt tokens and times are numbers above 0")
    rows, targets = [], []
    for o in usable:
        others = max(0.0, o.batch - 1)
        rows.append([1.0, others, others * o.prompt_tokens / o.answer_tokens, 0.0])
        steps = 1 + 0.5 * min(1.0, others)
        rows.append([steps, steps * others, o.prompt_tokens, 1.0])
        targets += [o.tpot_ms, o.ttft_ms]
    y = np.array(targets)
    scaled = np.array(rows) / y[:, None]
    found = _robust_nnls(scaled)
    residuals = scaled @ found - 1
    step_ms, more_ms, read_ms, overhead_ms = (float(x) for x in found)
    spread = 1.4826 * float(np.median(np.abs(residuals[::2])))
    speed = SpeedModel(
        prefill_tokens_per_s=1000 / max(read_ms, 1e-6),
        step_ms=max(step_ms, 1e-3),
        step_ms_per_request=more_ms,
        prefill_tokens=prefill_tokens,
        jitter=min(0.5, spread),
    )
    errors = np.abs(residuals)
    return Calibration(speed, overhead_ms, float(np.median(errors[1::2])), float(np.median(errors[::2])))


def _robust_nnls(scaled: np.ndarray) -> np.ndarray:
    """x >= 0 with `scaled` @ x near 1 in every row; rows far off count less (Huber's weights, reweighted)."""
    weights = np.ones(len(scaled))
    found = np.zeros(scaled.shape[1])
    for _ in range(ROUNDS):
        root = np.sqrt(weights)
        found, _ = nnls(scaled * root[:, None], root)
        size = np.abs(scaled @ found - 1)
        usual = max(1e-9, 1.4826 * float(np.median(size)))
        weights = np.minimum(1.0, HUBER * usual / np.maximum(size, 1e-12))
    return found
