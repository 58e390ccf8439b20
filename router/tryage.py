"""Tryage (Hari & Thomson, arXiv 2308.11601): regress every expert's loss on the prompt, choose by the prediction.

One forward pass on top of a frozen sentence encoder predicts all experts. The label is the loss of a reference
answer in bits per byte, for tokenizers differ; where a table has judged scores and no losses, the score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from signalbox.router import heads
from signalbox.router.artifact import Artifact, ArtifactError
from signalbox.router.base import Prediction, Prompt, quality_of_loss
from signalbox.router.encoder import Encoder
from signalbox.router.features import STRUCTURE, structure
from signalbox.router.heads import Head, Matrix
from signalbox.router.table import Table, TableError, fraction_of

FOLDS = 5
# A uniform guess over bytes costs 8 bits; one reference of a few bytes must not outweigh hundreds of others.
MAX_LOSS = 8.0


class TryagePredictor:
    """Loss (or score) regression on a frozen embedding.

    `target` is "loss" (bits per byte; quality is 2**-loss) or "score". The head is chosen by 5-fold
    cross-validation among ridge regressions with and without structural features and a small MLP (`heads.py`).
    Uncertainty is the standard deviation of out-of-fold residuals in quality units, regressed on the prompt
    and scaled so that its square has the mean of the squared residuals, for each expert.
    """

    kind = "tryage"

    def __init__(
        self,
        experts: Sequence[str],
        encoder: Encoder,
        target: str,
        head: Head,
        deviation: heads.DeviationHead,
        spread: float,
        training: dict[str, Any] | None = None,
    ) -> None:
        self.experts = tuple(experts)
        self.encoder = encoder
        self.target = target
        self.head = head
        self.deviation = deviation
        self.spread = spread
        self.training = training or {}

    def predict(self, prompts: list[Prompt]) -> Prediction:
        """Predict all experts on all prompts; blocking and thread-safe.

        Reads the text alone: it was trained on user turns, and a system prompt, the same for all requests of an
        application, would only move all of them by the same step.
        """
        texts = [prompt.text for prompt in prompts]
        return self.from_embeddings(self.encoder.encode(texts), texts)

    def from_embeddings(self, embeddings: Matrix, texts: Sequence[str]) -> Prediction:
        """Predict from embeddings float32 [n, d] of the texts that are known already."""
        features = np.hstack([embeddings, structure(texts)])
        quality = _quality(self.head(features), self.target)
        return Prediction(self.experts, quality, self.deviation(features), self.spread)

    @classmethod
    def fit(
        cls,
        table: Table,
        encoder: Encoder,
        *,
        seed: int = 0,
        report: Callable[[str, int, int], None] | None = None,
    ) -> TryagePredictor:
        """Learn from the rows of `table`, all of which must be complete.

        Rows whose `text` differs from their `prompt` teach twice, with the same label: once as the experts were
        asked (with an instruction), once as a user would type it. `report(step, done, of)` is called as it goes.
        Raises `TableError` with too few rows.
        """
        if len(table) < 4 * FOLDS:
            raise TableError(f"{len(table)} complete rows are too few to train on: at least {4 * FOLDS} are needed")
        texts, origin = _with_bare_texts(table)
        encoder.reserve(len(texts))
        notify = report or (lambda step, done, of: None)
        done = 0

        def encoded(count: int) -> None:
            nonlocal done
            done += count
            notify("encoding prompts", done, len(texts))

        embeddings = encoder.encode(texts, progress=encoded)
        features = np.hstack([embeddings, structure(texts)])
        target = "score" if table.loss is None else "loss"
        labels = table.score if table.loss is None else np.minimum(table.loss, MAX_LOSS)
        folds = np.array([int(fraction_of(i, "fold") * FOLDS) for i in table.prompt_id])
        data = heads.Data(features, labels[origin], folds[origin], plain=embeddings.shape[1])

        scores, fits = table.score[origin], {}
        for number, name in enumerate(heads.KINDS):
            notify("choosing the head", number, len(heads.KINDS) + 1)
            fits[name] = heads.fit(name, data, seed)
        routed = {name: _routed(scores, _quality(f.out_of_fold, target)) for name, f in fits.items()}
        chosen = _choose(routed, origin)
        best = fits[chosen]
        residuals = scores - _quality(best.out_of_fold, target)
        deviation = heads.fit_deviation(data, residuals)
        notify("choosing the head", len(heads.KINDS) + 1, len(heads.KINDS) + 1)
        figures = {
            "rows": len(table),
            "texts": len(texts),
            "target": target,
            "head": chosen,
            "cross_validated": {
                name: {
                    "routed_quality": float(routed[name].mean()),
                    f"rmse_{target}": float(np.sqrt(np.mean((f.out_of_fold - data.labels) ** 2))),
                    **f.figures,
                }
                for name, f in fits.items()
            },
            "best_single_quality": float(scores.mean(axis=0).max()),
            "uncertainty": deviation.figures,
        }
        spread = float(np.mean(table.score.max(axis=1) - table.score.min(axis=1)))
        return cls(table.models, encoder, target, best.head, deviation, spread, figures)

    def to_artifact(self) -> Artifact:
        """Everything `from_artifact` needs."""
        return Artifact(
            kind=self.kind,
            experts=self.experts,
            tensors={**self.head.tensors("head."), **self.deviation.tensors("deviation.")},
            settings={
                "target": self.target,
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
        if settings.get("target") not in ("loss", "score"):
            raise ArtifactError(f"{where}: settings.target is {settings.get('target')!r}, not loss or score")
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
        deviation = heads.load_deviation(artifact, "deviation.", width, columns)
        return cls(experts, encoder, settings["target"], head, deviation, artifact.spread, artifact.training)


def _quality(prediction: Matrix, target: str) -> Matrix:
    """Predicted label -> quality float32 [n, E] in [0, 1]."""
    if target == "loss":
        return quality_of_loss(np.clip(prediction, 0.0, MAX_LOSS))
    return np.clip(prediction, 0.0, 1.0).astype(np.float32)


def _with_bare_texts(table: Table) -> tuple[list[str], np.ndarray]:
    """Texts to learn from, and the row that each comes from."""
    origin = list(range(len(table)))
    texts = list(table.prompt)
    for i, text in enumerate(table.text or []):
        if text and text != table.prompt[i]:
            texts.append(text)
            origin.append(i)
    return texts, np.array(origin)


def _routed(scores: Matrix, quality: Matrix) -> np.ndarray:
    """Score float64 [n] of the expert that these predictions choose."""
    return scores[np.arange(len(scores)), quality.argmax(axis=1)]


def _choose(routed: dict[str, np.ndarray], origin: np.ndarray) -> str:
    """The simplest head, unless another is better by more than one standard error of the paired difference."""
    names = list(routed)
    chosen = names[0]
    rows = len(np.unique(origin))  # two texts of one row are not two independent observations
    for name in names[1:]:
        gain = routed[name] - routed[chosen]
        if gain.mean() > gain.std() / np.sqrt(rows):
            chosen = name
    return chosen
