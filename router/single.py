"""No router: every prompt gets each expert's mean quality. What `--kind best` serves where no router beats it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from signalbox.router.artifact import Artifact, Report
from signalbox.router.base import Facts, FloatMatrix, Prediction, Prompt
from signalbox.router.encoder import Encoder
from signalbox.router.table import Table
from signalbox.router.teaching import spread_of


class SinglePredictor:
    """Predicts the mean score of each expert in training, with its standard deviation there.

    A policy of quality alone then chooses the best single expert; one that weighs cost may still trade it for a
    cheaper one.
    """

    kind = "single"
    uses_encoder: ClassVar[bool] = False

    def __init__(
        self,
        experts: Sequence[str],
        mean: FloatMatrix,
        deviation: FloatMatrix,
        spread: float,
        training: dict[str, Any] | None = None,
    ) -> None:
        self.experts = tuple(experts)
        self.mean, self.deviation, self.spread = mean, deviation, spread
        self.training = training or {}

    def predict(self, prompts: list[Prompt]) -> Prediction:
        """The same for all prompts: float32 [n, E]."""
        n = len(prompts)
        return Prediction(self.experts, np.tile(self.mean, (n, 1)), np.tile(self.deviation, (n, 1)), self.spread)

    @classmethod
    def fit(
        cls,
        table: Table,
        encoder: Encoder | None = None,
        *,
        seed: int = 0,
        report: Report | None = None,
        facts: Facts | None = None,
    ) -> SinglePredictor:
        """From complete rows."""
        score = table.score
        mean, deviation = (a.astype(np.float32) for a in (score.mean(axis=0), score.std(axis=0)))
        figures = {"rows": len(table), "best_single_quality": float(mean.max())}
        return cls(table.models, mean, np.maximum(deviation, 1e-6), spread_of(table), figures)

    def to_artifact(self) -> Artifact:
        """Everything `from_artifact` needs."""
        return Artifact(
            kind=self.kind,
            experts=self.experts,
            tensors={"mean": self.mean, "deviation": self.deviation},
            training=self.training,
            encoder="",
            spread=self.spread,
        )

    @classmethod
    def from_artifact(cls, artifact: Artifact, encoder: Encoder | None, experts: Sequence[str]) -> SinglePredictor:
        """For these experts, a selection of the artifact's. Raises `ArtifactError` where it is damaged."""
        n, columns = len(artifact.experts), [artifact.experts.index(name) for name in experts]
        mean, deviation = (artifact.tensor(name, n)[columns] for name in ("mean", "deviation"))
        return cls(experts, mean, deviation, artifact.spread, artifact.training)
