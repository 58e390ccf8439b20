"""Tryage (Hari & Thomson, arXiv 2308.11601): regress every expert's loss on the prompt, choose by the prediction.

One forward pass on top of a frozen sentence encoder predicts all experts. The label is the loss L of a reference
answer in bits per byte, for tokenizers differ. The paper minimises a divergence D(L, L') between losses and leaves
open which. Here it is D = (2**-L - 2**-L')**2, squared error in the geometric mean probability of a byte: a loss of
2 against 2.5 bits weighs less than .8 against .9, as it does in what the choice is judged by. On the quickstart
table this chose better than squared error in bits (mean quality out of fold .4858 against .4835, ridge). Where a
table has judged scores in place of losses, the same regression learns those.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from signalbox.router import heads
from signalbox.router.artifact import Artifact, ArtifactError, Report
from signalbox.router.base import Facts, Prediction, Prompt
from signalbox.router.encoder import Encoder, encode_all
from signalbox.router.features import STRUCTURE, structure
from signalbox.router.heads import Head, Matrix
from signalbox.router.table import Table, TableError, fraction_of
from signalbox.router.teaching import difference_errors, quality_of, routed_quality, simplest_head, spread_of
from signalbox.router.uncertainty import DeviationHead, fit_deviation, load_deviation

FOLDS = 5
# Below this quality a predicted loss says no more than "a uniform guess over bytes or worse".
LEAST_QUALITY = 2.0**-8


class TryagePredictor:
    """Loss (or score) regression on a frozen embedding.

    The head is chosen by 5-fold cross-validation among ridge regressions with and without structural features,
    kernel ridge, and a small MLP (`heads.py`). Uncertainty is the standard deviation of out-of-fold residuals in
    quality units, regressed on the prompt and calibrated for each expert (`uncertainty.py`).
    """

    kind = "tryage"
    uses_encoder: ClassVar[bool] = True

    def __init__(
        self,
        experts: Sequence[str],
        encoder: Encoder,
        head: Head,
        deviation: DeviationHead,
        spread: float,
        training: dict[str, Any] | None = None,
    ) -> None:
        self.experts = tuple(experts)
        self.encoder = encoder
        self.head = head
        self.deviation = deviation
        self.spread = spread
        self.training = training or {}

    def predict(self, prompts: list[Prompt]) -> Prediction:
        """Predict all experts on all prompts; blocking and thread-safe.

        Reads the text alone: it was trained on user turns, and a system prompt, the same for all requests of an
        application, would only move all of them by the same step.
        """
        return self.predict_with_features(prompts)[0]

    def predict_with_features(self, prompts: list[Prompt]) -> tuple[Prediction, Matrix]:
        """As `predict`, and the embeddings float32 [n, d], to which online learning adds its correction."""
        texts = [prompt.text for prompt in prompts]
        embeddings = self.encoder.encode(texts)
        return self.from_embeddings(embeddings, texts), embeddings

    def from_embeddings(self, embeddings: Matrix, texts: Sequence[str]) -> Prediction:
        """Predict from embeddings float32 [n, d] of the texts that are known already."""
        features = np.hstack([embeddings, structure(texts)])
        return Prediction(self.experts, quality_of(self.head(features)), self.deviation(features), self.spread)

    def losses(self, prompts: list[Prompt]) -> Matrix:
        """Predicted losses in bits per byte, float32 [n, E] in [0, 8]; of a table without losses, -log2(score)."""
        return -np.log2(np.maximum(self.predict(prompts).quality, LEAST_QUALITY))

    @classmethod
    def fit(
        cls,
        table: Table,
        encoder: Encoder,
        *,
        seed: int = 0,
        report: Report | None = None,
        facts: Facts | None = None,
    ) -> TryagePredictor:
        """Learn from the rows of `table`, all of which must be complete.

        Rows whose `text` differs from their `prompt` teach twice, with the same label: once as the experts were
        asked (with an instruction), once as a user would type it. `report(step, done, of)` is called as it goes.
        Raises `TableError` with too few rows.
        """
        if len(table) < 4 * FOLDS:
            raise TableError(f"{len(table)} complete rows are too few to train on: at least {4 * FOLDS} are needed")
        texts, origin = table.teaching_texts()
        notify = report or (lambda step, done, of: None)
        embeddings = encode_all(encoder, texts, notify)
        features = np.hstack([embeddings, structure(texts)])
        scores = table.score[origin]
        folds = np.array([int(fraction_of(i, "fold") * FOLDS) for i in table.prompt_id])
        data = heads.Data(features, scores, folds[origin], plain=embeddings.shape[1])

        fits = {}
        for number, name in enumerate(heads.KINDS):
            notify("choosing the head", number, len(heads.KINDS) + 1)
            fits[name] = heads.fit(name, data, seed)
        chosen = simplest_head({name: f.out_of_fold for name, f in fits.items()}, scores, len(table))
        best = fits[chosen]
        deviation = fit_deviation(data, scores - quality_of(best.out_of_fold))
        notify("choosing the head", len(heads.KINDS) + 1, len(heads.KINDS) + 1)
        figures = {
            "rows": len(table),
            "texts": len(texts),
            "label": "score" if table.loss is None else "loss",
            "head": chosen,
            "cross_validated": {
                name: {
                    "routed_quality": routed_quality(f.out_of_fold, scores),
                    "rmse_quality": float(np.sqrt(np.mean((f.out_of_fold - scores) ** 2))),
                    "rmse_differences": float(np.sqrt(difference_errors(f.out_of_fold, scores).mean())),
                    **f.figures,
                }
                for name, f in fits.items()
            },
            "best_single_quality": float(scores.mean(axis=0).max()),
            "uncertainty": deviation.figures,
        }
        return cls(table.models, encoder, best.head, deviation, spread_of(table), figures)

    def to_artifact(self) -> Artifact:
        """Everything `from_artifact` needs."""
        return Artifact(
            kind=self.kind,
            experts=self.experts,
            tensors={**self.head.tensors("head."), **self.deviation.tensors("deviation.")},
            settings={
                "head": self.head.kind,
                "structure": list(STRUCTURE),
                "dimension": self.encoder.dimension,
            },
            training=self.training,
            encoder=self.encoder.reference,
            spread=self.spread,
        )

    @classmethod
    def from_artifact(cls, artifact: Artifact, encoder: Encoder, experts: Sequence[str]) -> TryagePredictor:
        """The predictor of these experts, a selection of the artifact's. Raises `ArtifactError` where it is damaged."""
        where = artifact.path or "router artifact"
        settings = artifact.settings
        if settings.get("structure") != list(STRUCTURE):
            raise ArtifactError(f"{where}: trained on other structural features than this version has; train it again")
        if settings.get("dimension") != encoder.dimension:
            raise ArtifactError(
                f"{where}: trained on embeddings of {settings.get('dimension')} numbers, "
                f"the encoder {encoder.reference} gives {encoder.dimension}"
            )
        columns = [artifact.experts.index(name) for name in experts]
        width = encoder.dimension + len(STRUCTURE)
        head = heads.load_head(artifact, "head.", str(settings.get("head")), width, columns)
        deviation = load_deviation(artifact, "deviation.", width, columns)
        return cls(experts, encoder, head, deviation, artifact.spread, artifact.training)
