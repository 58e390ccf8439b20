"""Two routers in a row: the lexical one decides in under a millisecond, and where its margin is thin, the one with an
encoder has its say (`lexical.py`, `stacked.py`).

Only a prompt whose two best experts are predicted nearly alike can be decided otherwise by a better prediction, so the
margin between them says where an encoder's milliseconds may pay. How thin is thin is read off the left-out predictions
of both: the smallest share of prompts that takes the slow way and keeps the routed quality within `TOLERANCE` of asking
the slow one always. The share is bounded, so that the median decision never waits for the encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from signalbox.router.artifact import Artifact, ArtifactError, Report
from signalbox.router.base import Facts, Prediction, Prompt
from signalbox.router.encoder import Encoder
from signalbox.router.lexical import LexicalPredictor
from signalbox.router.metrics import taken
from signalbox.router.stacked import StackedPredictor
from signalbox.router.table import Table

Matrix = NDArray[np.floating]

MAX_SLOW_SHARE = 0.4
TOLERANCE = 0.001  # of mean quality: a fifth of what is promised (within .005), for shares are chosen on noisy rows
SHARES = np.linspace(0.0, MAX_SLOW_SHARE, 17)


class CascadePredictor:
    """`fast` always; `slow` too where the margin between the two best experts is below `threshold` (quality units)."""

    kind = "cascade"
    uses_encoder: ClassVar[bool] = True

    def __init__(
        self,
        fast: LexicalPredictor,
        slow: StackedPredictor,
        threshold: float,
        training: dict[str, Any] | None = None,
    ) -> None:
        self.experts = fast.experts
        self.fast, self.slow, self.threshold = fast, slow, threshold
        self.spread = fast.spread
        self.training = training or {}

    def predict(self, prompts: list[Prompt]) -> Prediction:
        """Predict all experts on all prompts; blocking, thread-safe. The thin ones are encoded in one batch."""
        first = self.fast.predict(prompts)
        thin = np.flatnonzero(self.is_thin(first.quality))
        if not len(thin):
            return first
        second = self.slow.predict([prompts[i] for i in thin])
        quality, uncertainty = first.quality.copy(), first.uncertainty.copy()
        quality[thin], uncertainty[thin] = second.quality, second.uncertainty
        return Prediction(self.experts, quality, uncertainty, self.spread)

    def is_thin(self, quality: Matrix) -> NDArray[np.bool_]:
        """bool [n]: which rows of the fast prediction [n, E] go the slow way."""
        return margin(quality) < self.threshold

    def slow_share(self, prompts: list[Prompt]) -> float:
        """The share of these prompts that goes the slow way."""
        return float(self.is_thin(self.fast.predict(prompts).quality).mean())

    @classmethod
    def fit(
        cls,
        table: Table,
        encoder: Encoder,
        *,
        seed: int = 0,
        report: Report | None = None,
        facts: Facts | None = None,
    ) -> CascadePredictor:
        """Fit both on the same rows and choose the threshold. Raises `TableError` with too few rows."""

        def named(way: str) -> Report | None:
            return (lambda step, done, of: report(f"{way}: {step}", done, of)) if report else None

        fast = LexicalPredictor.fit(table, encoder, seed=seed, report=named("fast"))
        slow = StackedPredictor.fit(table, encoder, seed=seed, report=named("slow"))
        assert fast.left_out is not None and slow.left_out is not None
        threshold, figures = choose_threshold(fast.left_out, slow.left_out, table.score[fast.taught])
        return cls(fast, slow, threshold, {"rows": len(table), "head": "cascade", **figures})

    def to_artifact(self) -> Artifact:
        """Everything `from_artifact` needs: the tensors of both, as `fast.NAME` and `slow.NAME`."""
        parts = {"fast": self.fast.to_artifact(), "slow": self.slow.to_artifact()}
        return Artifact(
            kind=self.kind,
            experts=self.experts,
            tensors={f"{way}.{name}": t for way, part in parts.items() for name, t in part.tensors.items()},
            settings={"threshold": self.threshold, **{way: part.settings for way, part in parts.items()}},
            training={**self.training, **{way: part.training for way, part in parts.items()}},
            encoder=self.slow.encoder_reference,
            spread=self.spread,
        )

    @classmethod
    def from_artifact(cls, artifact: Artifact, encoder: Encoder, experts: Sequence[str]) -> CascadePredictor:
        """The cascade of these experts, a selection of the artifact's. Raises `ArtifactError` where it is damaged."""
        threshold = artifact.settings.get("threshold")
        if not isinstance(threshold, float) or not np.isfinite(threshold):
            raise ArtifactError(f"{artifact.path or 'router artifact'}: settings have no threshold; train it again")
        fast = LexicalPredictor.from_artifact(_part(artifact, "fast"), None, experts)
        slow = StackedPredictor.from_artifact(_part(artifact, "slow"), encoder, experts)
        return cls(fast, slow, threshold, artifact.training)


def margin(quality: Matrix) -> NDArray[np.float64]:
    """Predicted quality [n, E] -> how far the best expert of each row is ahead of the second, float64 [n]."""
    if quality.shape[1] < 2:
        return np.full(len(quality), np.inf)
    two = np.partition(quality.astype(np.float64), -2, axis=1)[:, -2:]
    return two[:, 1] - two[:, 0]


def choose_threshold(fast: Matrix, slow: Matrix, scores: Matrix) -> tuple[float, dict[str, Any]]:
    """The margin below which the slow router is asked, from left-out predictions [n, E] of both and scores [n, E].

    Returns it with the figures behind it: routed quality of fast, slow and cascade, and the share of slow decisions.
    """
    gaps = margin(fast)
    got_fast, got_slow = (taken(scores, p.argmax(axis=1)) for p in (fast, slow))
    cuts = np.quantile(gaps, SHARES) if np.isfinite(gaps).all() else np.zeros(len(SHARES))  # inf: a lone expert
    quality = np.array([np.where(gaps < cut, got_slow, got_fast).mean() for cut in cuts])
    wanted = got_slow.mean() - TOLERANCE
    enough = np.flatnonzero(quality >= wanted)
    # Where no bounded share suffices, the one that comes nearest.
    at = int(enough[0]) if len(enough) else int(quality.argmax())
    share = float((gaps < cuts[at]).mean())
    figures = {
        "left_out_quality": float(quality[at]),
        "left_out_quality_fast": float(got_fast.mean()),
        "left_out_quality_slow": float(got_slow.mean()),
        "slow_share": share,
        "best_single_quality": float(scores.mean(axis=0).max()),
    }
    return float(cuts[at]) if share > 0 else 0.0, figures


def _part(artifact: Artifact, way: str) -> Artifact:
    """The artifact of one of the two routers."""
    prefix = f"{way}."
    tensors = {name.removeprefix(prefix): t for name, t in artifact.tensors.items() if name.startswith(prefix)}
    return replace(
        artifact,
        tensors=tensors,
        settings=dict(artifact.settings.get(way) or {}),
        training=dict(artifact.training.get(way) or {}),
    )
