"""A router without an encoder: each expert's quality from hashed n-grams and surface features, well under 1 ms.

Features (`ngrams.py`) -> auxiliary predictions -> quality of each expert (`stacking.py`). Scores are learned as they
are, losses in bits per byte as 2**-loss, as in Tryage. Lengths of answers and tasks, where the table has them, are
learned beside the scores and never read when predicting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from signalbox.router import heads
from signalbox.router.artifact import Artifact, ArtifactError, Report
from signalbox.router.base import Facts, Prediction, Prompt
from signalbox.router.encoder import Encoder, encode_all
from signalbox.router.ngrams import BITS, FAMILIES, FEATURES, SURFACE, Vocabulary, ngrams, surface, to_bytes
from signalbox.router.stacking import (
    AuxiliaryRidge,
    FloatMatrix,
    FourierFeatures,
    Matrix,
    QualityHead,
    fit_auxiliary,
    fit_head,
    groups_of,
    load_fourier,
    load_quality_head,
)
from signalbox.router.table import Table, TableError, fraction_of
from signalbox.router.teaching import quality_of, spread_of
from signalbox.router.uncertainty import DeviationHead, fit_deviation, load_deviation

FOLDS = 5
FOURIER = 256
# Weight of the surface features' kernel beside that of the n-grams.
SURFACE_SHARE = 0.3
# The first stage takes time in n^3 and memory in 8 n^2 bytes: 0.8 GB and a minute or two here.
MAX_TEXTS = 10_000
MAX_TASKS = 64


@dataclass(frozen=True)
class EmbeddingBlock:
    """Sentence embeddings beside the n-grams (`stacked.py`): centred, with a mean squared length of 1 in training.

    mean: float32 [d], the training texts' mean embedding; gain: float32 [1].
    """

    encoder: Encoder
    mean: FloatMatrix
    gain: FloatMatrix

    @classmethod
    def fit(cls, encoder: Encoder, embeddings: FloatMatrix) -> EmbeddingBlock:
        """From the training texts' embeddings [n, d]."""
        mean = embeddings.mean(axis=0)
        length = float(np.sqrt(((embeddings - mean) ** 2).sum(axis=1).mean()))
        return cls(encoder, mean, np.array([1 / max(length, 1e-6)], dtype=np.float32))

    def __call__(self, embeddings: FloatMatrix) -> FloatMatrix:
        """float32 [n, d]."""
        return (embeddings - self.mean) * self.gain


@dataclass(frozen=True)
class LexicalFeatures:
    """A prompt's text to the first stage's predictions."""

    vocabulary: Vocabulary
    surface: FourierFeatures
    auxiliary: AuxiliaryRidge
    embedding: EmbeddingBlock | None = None

    def __call__(self, texts: Sequence[str]) -> FloatMatrix:
        """Auxiliary predictions float32 [n, t]."""
        out = np.empty((len(texts), self.auxiliary.offset.size), dtype=np.float32)
        embedded = None if self.embedding is None else self.embedding(self.embedding.encoder.encode(texts))
        for i, text in enumerate(texts):
            raw = to_bytes(text)
            columns, weights = self.vocabulary.encode(ngrams(raw))
            dense = _kernel(self.surface, surface(raw))
            if embedded is not None:
                dense = np.concatenate([dense, embedded[i]])
            out[i] = self.auxiliary.one(columns, weights, dense)
        return out


class LexicalPredictor:
    """Two-stage ridge regression on n-grams; uncertainty as Tryage's, on the auxiliary predictions."""

    kind = "lexical"
    uses_encoder: ClassVar[bool] = False

    def __init__(
        self,
        experts: Sequence[str],
        features: LexicalFeatures,
        head: QualityHead,
        deviation: DeviationHead,
        spread: float,
        training: dict[str, Any] | None = None,
    ) -> None:
        self.experts = tuple(experts)
        self.features = features
        self.head = head
        self.deviation = deviation
        self.spread = spread
        self.training = training or {}
        # What `fit` learned from, not saved: rows of the table [n], and quality [n, E] as predicted without each.
        self.taught: NDArray[np.intp] = np.empty(0, dtype=np.intp)
        self.left_out: FloatMatrix | None = None

    @property
    def encoder_reference(self) -> str:
        """Of the sentence encoder, or nothing."""
        return "" if self.features.embedding is None else self.features.embedding.encoder.reference

    def predict(self, prompts: list[Prompt]) -> Prediction:
        """Predict all experts on all prompts; blocking, thread-safe, and without state. Reads the text alone."""
        return self.predict_with_features(prompts)[0]

    def predict_with_features(self, prompts: list[Prompt]) -> tuple[Prediction, FloatMatrix]:
        """As `predict`, and the second stage's inputs float32 [n, t], to which online learning adds its correction."""
        auxiliary = self.features([prompt.text for prompt in prompts])
        quality = quality_of(self.head(auxiliary))
        inputs = self.head.inputs(auxiliary)
        return Prediction(self.experts, quality, self.deviation(inputs), self.spread), inputs

    @classmethod
    def fit(
        cls,
        table: Table,
        encoder: Encoder | None = None,
        *,
        seed: int = 0,
        report: Report | None = None,
        facts: Facts | None = None,
    ) -> Self:
        """Learn from the rows of `table`, all of which must be complete; the encoder is used by `stacked` alone.

        Rows whose `text` differs from their `prompt` teach twice, as in Tryage. Of more than `MAX_TEXTS` texts a
        random part is learned from. `report(step, done, of)` is called as it goes. Raises `TableError` with too few.
        """
        notify = report or (lambda step, done, of: None)
        texts, origin = table.teaching_texts()
        keys = np.array(table.prompt)[origin]  # texts of one prompt are left out together
        distinct = np.unique(keys)
        if len(distinct) < 4 * FOLDS:
            raise TableError(
                f"{len(distinct)} different prompts are too few to train on: at least {4 * FOLDS} are needed"
            )
        kept = np.arange(len(texts))
        if len(texts) > MAX_TEXTS:
            kept = np.sort(np.random.default_rng(seed).permutation(len(texts))[:MAX_TEXTS])
        origin, keys = origin[kept], keys[kept]
        scores, groups = table.score[origin], groups_of(keys)
        folds = np.array([int(fraction_of(key, "fold") * FOLDS) for key in keys])

        encoded, found = [], np.empty((len(kept), SURFACE), dtype=np.float32)
        for number, row in enumerate(kept):
            raw = to_bytes(texts[row])
            encoded.append(ngrams(raw))
            found[number] = surface(raw)
            if number % 256 == 0:
                notify("reading prompts", number, len(kept))
        notify("reading prompts", len(kept), len(kept))
        vocabulary = Vocabulary.fit(encoded)
        fourier = FourierFeatures.fit(found, FOURIER, 1 / SURFACE, seed)
        targets = _targets(table)[origin]
        dense, embedding = _kernel(fourier, found), None
        if cls.uses_encoder and encoder is not None:
            embeddings = encode_all(encoder, [texts[row] for row in kept], notify)
            embedding = EmbeddingBlock.fit(encoder, embeddings)
            dense = np.hstack([dense, embedding(embeddings)])
        auxiliary, out_of_fold = fit_auxiliary(
            vocabulary.matrix(encoded),
            dense,
            targets,
            folds,
            lambda done, of: notify("first stage", done, of),
        )
        notify("second stage", 0, 2)
        head, guesses, mixture = fit_head(out_of_fold, scores, groups, count=FOURIER, seed=seed)
        notify("second stage", 1, 2)
        inputs = head.inputs(out_of_fold)
        data = heads.Data(inputs, scores, folds, plain=inputs.shape[1])
        deviation = fit_deviation(data, scores - np.clip(guesses, 0.0, 1.0))
        notify("second stage", 2, 2)
        figures = {
            "rows": len(table),
            "texts": len(texts),
            "texts_used": len(kept),
            "label": "score" if table.loss is None else "loss",
            "head": "stacked ridge",
            "mixture": mixture,
            "auxiliary_targets": targets.shape[1],
            "vocabulary": int(vocabulary.slots.size),
            "left_out_quality": float(scores[np.arange(len(scores)), guesses.argmax(axis=1)].mean()),
            "best_single_quality": float(scores.mean(axis=0).max()),
            "uncertainty": deviation.figures,
        }
        features = LexicalFeatures(vocabulary, fourier, auxiliary, embedding)
        fitted = cls(table.models, features, head, deviation, spread_of(table), figures)
        fitted.taught, fitted.left_out = origin, quality_of(guesses)
        return fitted

    def to_artifact(self) -> Artifact:
        """Everything `from_artifact` needs."""
        vocabulary, auxiliary = self.features.vocabulary, self.features.auxiliary
        block = self.features.embedding
        return Artifact(
            kind=self.kind,
            experts=self.experts,
            tensors={
                "vocabulary.slots": vocabulary.slots.astype(np.int32),
                "vocabulary.idf": vocabulary.idf,
                "auxiliary.weight": auxiliary.weight.astype(np.float16),
                "auxiliary.dense_weight": auxiliary.dense_weight,
                "auxiliary.offset": auxiliary.offset,
                **self.features.surface.tensors("surface."),
                **self.head.tensors("head."),
                **self.deviation.tensors("deviation."),
                **({} if block is None else {"embedding.mean": block.mean, "embedding.gain": block.gain}),
            },
            settings={"features": FEATURES},
            training=self.training,
            encoder=self.encoder_reference,
            spread=self.spread,
        )

    @classmethod
    def from_artifact(cls, artifact: Artifact, encoder: Encoder | None, experts: Sequence[str]) -> Self:
        """The predictor of these experts, a selection of the artifact's. Raises `ArtifactError` where it is damaged."""
        where = artifact.path or "router artifact"
        if artifact.settings.get("features") != FEATURES:
            raise ArtifactError(
                f"{where}: trained on the features {artifact.settings.get('features')!r}, this version has "
                f"{FEATURES!r}; train it again"
            )
        slots = artifact.tensors.get("vocabulary.slots", np.zeros(0))
        if slots.dtype != np.int32 or slots.ndim != 1 or not _ascending_slots(slots):
            raise ArtifactError(f"{where}: vocabulary.slots is not an ascending list of hash slots; train it again")
        width = artifact.tensors.get("auxiliary.offset", np.zeros(0)).size
        columns = [artifact.experts.index(name) for name in experts]
        block, dense = None, FOURIER
        if cls.uses_encoder and encoder is not None:
            d = encoder.dimension
            block = EmbeddingBlock(encoder, artifact.tensor("embedding.mean", d), artifact.tensor("embedding.gain", 1))
            dense += d
        features = LexicalFeatures(
            Vocabulary.of(slots.astype(np.int64), artifact.tensor("vocabulary.idf", slots.size)),
            load_fourier(artifact, "surface.", SURFACE, FOURIER),
            AuxiliaryRidge(
                artifact.tensor("auxiliary.weight", slots.size, width),
                artifact.tensor("auxiliary.dense_weight", dense, width),
                artifact.tensor("auxiliary.offset", width),
            ),
            block,
        )
        head = load_quality_head(artifact, "head.", width, FOURIER, columns)
        deviation = load_deviation(artifact, "deviation.", width, columns)
        return cls(experts, features, head, deviation, artifact.spread, artifact.training)


def _kernel(fourier: FourierFeatures, found: FloatMatrix) -> FloatMatrix:
    return fourier.waves(fourier.standardise(found)) * np.float32(SURFACE_SHARE**0.5)


def _ascending_slots(slots: Matrix) -> bool:
    return bool(slots.size and slots[0] >= 0 and slots[-1] < FAMILIES << BITS and (np.diff(slots) > 0).all())


def _targets(table: Table) -> FloatMatrix:
    """What the first stage learns, float32 [n, t]: scores, standardised log lengths of answers, tasks as one-hot."""
    blocks = [table.score]
    lengths = table.measures.get("out_tok")
    if lengths is not None:
        known = lengths[:, ~np.isnan(lengths).all(axis=0)]
        logs = np.log1p(known)
        logs = (logs - np.nanmean(logs, axis=0)) / (np.nanstd(logs, axis=0) + 1e-6)
        blocks.append(np.nan_to_num(logs))  # a length not measured is taken to be usual
    names, counts = np.unique(table.task, return_counts=True)
    if len(names) > 1:
        common = names[np.argsort(-counts, kind="stable")][:MAX_TASKS]
        blocks.append((np.array(table.task)[:, None] == common).astype(np.float64))
    return np.concatenate(blocks, axis=1).astype(np.float32)
