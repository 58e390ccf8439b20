"""GLIDER's global half (Li et al., arXiv 2410.07172): experts described in words, each query sent by what they say.

Each expert has one or more descriptions, given by the user, written by a model of the pool (`signalbox router
describe`), or, without either, put together from the training prompts on which it did relatively best. They are
embedded once; a query is embedded as it comes, where the paper's code embeds a whole evaluation suite. An expert's
match is its greatest cosine, and what counts is by how much it exceeds the mean over experts.

The paper adds the match to the logits of a local router with the weight gamma = 100 where the greatest match reaches
a threshold beta ("held in"), else 3. Here there is no local router: a match must become a quality, so each expert's is
calibrated on the training table by a line through its mean quality with a slope of 0 or more,

    quality[e] = mean[e] + weight * slope[e] * (match[e] - mean over experts of match - centre[e])

with weight 1 where the greatest match reaches beta, else 3/100: a query unlike every description gets what is the best
expert on the mean. Beta is a property of the embedder and of the descriptions, so it is fitted, not set to the paper's
.8: the quantile of the training prompts' greatest matches with the least error out of fold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from signalbox.router import heads
from signalbox.router.artifact import Artifact, ArtifactError, Report
from signalbox.router.base import Facts, Prediction, Prompt
from signalbox.router.encoder import Encoder
from signalbox.router.heads import Matrix
from signalbox.router.skills import characteristic_words, clusters
from signalbox.router.table import Table, TableError
from signalbox.router.teaching import Lessons, difference_errors, lessons, quality_of, routed_quality, spread_of
from signalbox.router.uncertainty import DeviationHead, fit_deviation, load_deviation

FloatMatrix = NDArray[np.float32]
Descriptions = Mapping[str, Sequence[str]]

# The paper's weights of the match: small / gamma.
HELD_OUT_WEIGHT = 3 / 100
# Quantiles of the training prompts' greatest matches that beta is sought among.
QUANTILES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
# Bounds of what a user may give, and what is put together where nothing is given.
MAX_DESCRIPTIONS, MAX_CHARACTERS = 16, 2000
REGIONS, ROWS_A_REGION, REGIONS_AN_EXPERT, EXAMPLES, EXAMPLE_CHARACTERS = 32, 25, 8, 8, 80
# Prompts of a region that its mean advantage is shrunk by.
PRIOR_PROMPTS = 20.0


@dataclass(frozen=True)
class Matcher:
    """Embedded descriptions: vectors float32 [T, d], those of one expert together; first: int [E], where each begins.

    Every expert has one at least, so `first` ascends strictly from 0.
    """

    vectors: FloatMatrix
    first: NDArray[np.int32]

    def __call__(self, embeddings: Matrix) -> FloatMatrix:
        """Greatest cosine of each expert's descriptions, float32 [n, E]."""
        cosines = embeddings @ self.vectors.T
        return np.maximum.reduceat(cosines, self.first, axis=1) if len(cosines) else cosines[:, self.first]

    @classmethod
    def of(cls, descriptions: Descriptions, experts: Sequence[str], encoder: Encoder) -> Matcher:
        """Embed the descriptions."""
        counts = [len(descriptions[name]) for name in experts]
        vectors = encoder.encode([text for name in experts for text in descriptions[name]])
        return cls(vectors, np.cumsum([0, *counts[:-1]]).astype(np.int32))


@dataclass(frozen=True)
class Calibration:
    """From matches to quality: mean, slope, centre float32 [E], and the threshold beta."""

    mean: FloatMatrix
    slope: FloatMatrix
    centre: FloatMatrix
    beta: float

    def __call__(self, matches: Matrix) -> Matrix:
        """Matches [n, E] -> quality [n, E], not clipped."""
        held_in = matches.max(axis=1, keepdims=True) >= self.beta
        return self.mean + np.where(held_in, 1.0, HELD_OUT_WEIGHT) * self.slope * (relative(matches) - self.centre)


class GliderPredictor:
    """Match of a query with the experts' descriptions, calibrated to quality.

    Uncertainty is the standard deviation of out-of-fold residuals, regressed on the matches (`uncertainty.py`).
    """

    kind = "glider"
    uses_encoder: ClassVar[bool] = True

    def __init__(
        self,
        experts: Sequence[str],
        encoder: Encoder,
        matcher: Matcher,
        calibration: Calibration,
        deviation: DeviationHead,
        spread: float,
        training: dict[str, Any] | None = None,
        columns: Sequence[int] | None = None,
    ) -> None:
        """`columns`: which of the matcher's experts these are (None: all); matches are relative to all of them."""
        self.experts = tuple(experts)
        self.encoder = encoder
        self.matcher = matcher
        self.calibration = calibration
        self.deviation = deviation
        self.spread = spread
        self.training = training or {}
        self.columns = list(columns) if columns is not None else list(range(len(self.experts)))

    def predict(self, prompts: list[Prompt]) -> Prediction:
        """Predict all experts on all prompts; blocking and thread-safe. Reads the text alone."""
        matches = self.matcher(self.encoder.encode([prompt.text for prompt in prompts]))
        quality = quality_of(self.calibration(matches))[:, self.columns]
        return Prediction(self.experts, quality, self.deviation(matches)[:, self.columns], self.spread)

    @classmethod
    def fit(
        cls,
        table: Table,
        encoder: Encoder,
        *,
        seed: int = 0,
        report: Report | None = None,
        facts: Facts | None = None,
    ) -> GliderPredictor:
        """Calibrate on the rows of `table`, all of which must be complete; texts teach as in Tryage.

        `facts.descriptions` describe the experts; of none, they are put together from the rows (for each fold from
        the others, so that the calibration is honest). `report(step, done, of)` is called as it goes. Raises
        `TableError` with too few rows, or where some experts are described and others are not.
        """
        notify = report or (lambda step, done, of: None)
        known = lessons(table, encoder, notify)
        given = checked_descriptions(facts.descriptions if facts else {}, table.models)
        splits = known.splits()
        notify("describing experts", 0, len(splits) + 1)
        if given:
            descriptions = given
            matcher = Matcher.of(given, table.models, encoder)
            matches = by_others = matcher(known.embeddings)
        else:
            descriptions = assemble(known, table.models, np.ones(len(known.texts), dtype=bool), seed)
            matcher = Matcher.of(descriptions, table.models, encoder)
            matches = matcher(known.embeddings)
            by_others = np.empty_like(matches)
            for number, (training, held) in enumerate(splits, 1):
                of_fold = assemble(known, table.models, training, seed)
                by_others[held] = Matcher.of(of_fold, table.models, encoder)(known.embeddings[held])
                notify("describing experts", number, len(splits) + 1)
        calibration, guesses, figures = _calibrate(by_others, known)
        data = heads.Data(by_others, known.scores, known.folds, plain=by_others.shape[1])
        deviation = fit_deviation(data, known.scores - np.clip(guesses, 0.0, 1.0))
        notify("describing experts", len(splits) + 1, len(splits) + 1)
        facts_of_training = {
            "rows": len(table),
            "texts": len(known.texts),
            "label": "score" if table.loss is None else "loss",
            "head": "given descriptions" if given else "descriptions from training prompts",
            "descriptions": {name: list(descriptions[name]) for name in table.models},
            "slopes": dict(zip(table.models, map(float, calibration.slope), strict=True)),
            "beta": calibration.beta,
            "below_beta": float((matches.max(axis=1) < calibration.beta).mean()),
            "cross_validated": figures,
            "best_single_quality": float(known.scores.mean(axis=0).max()),
            "uncertainty": deviation.figures,
        }
        return cls(table.models, encoder, matcher, calibration, deviation, spread_of(table), facts_of_training)

    def to_artifact(self) -> Artifact:
        """Everything `from_artifact` needs. Raises `ArtifactError` of a selection of experts: save the whole."""
        if len(self.columns) != len(self.matcher.first) or self.columns != sorted(self.columns):
            raise ArtifactError("a selection of a glider router's experts cannot be saved: save the router itself")
        return Artifact(
            kind=self.kind,
            experts=self.experts,
            tensors={
                "descriptions.vectors": self.matcher.vectors,
                "descriptions.first": self.matcher.first,
                "calibration.mean": self.calibration.mean,
                "calibration.slope": self.calibration.slope,
                "calibration.centre": self.calibration.centre,
                **self.deviation.tensors("deviation."),
            },
            settings={"beta": self.calibration.beta, "dimension": self.encoder.dimension},
            training=self.training,
            encoder=self.encoder.reference,
            spread=self.spread,
        )

    @classmethod
    def from_artifact(cls, artifact: Artifact, encoder: Encoder, experts: Sequence[str]) -> GliderPredictor:
        """The predictor of these experts, a selection of the artifact's. Raises `ArtifactError` where it is damaged."""
        where, settings, n = artifact.path or "router artifact", artifact.settings, len(artifact.experts)
        if settings.get("dimension") != encoder.dimension:
            raise ArtifactError(
                f"{where}: trained on embeddings of {settings.get('dimension')} numbers, "
                f"the encoder {encoder.reference} gives {encoder.dimension}"
            )
        beta = settings.get("beta")
        if not isinstance(beta, float) or not -1.001 <= beta <= 1.001:
            raise ArtifactError(f"{where}: beta {beta!r} is not a cosine; train it again")
        first = artifact.tensors.get("descriptions.first", np.zeros(0))
        total = len(artifact.tensors.get("descriptions.vectors", ()))
        if first.dtype != np.int32 or first.shape != (n,) or first[0] != 0 or (np.diff([*first, total]) < 1).any():
            raise ArtifactError(f"{where}: descriptions.first does not give each expert a description; train it again")
        matcher = Matcher(artifact.tensor("descriptions.vectors", total, encoder.dimension), first)
        mean, slope, centre = (artifact.tensor(f"calibration.{part}", n) for part in ("mean", "slope", "centre"))
        deviation = load_deviation(artifact, "deviation.", n, range(n))
        return cls(
            experts,
            encoder,
            matcher,
            Calibration(mean, slope, centre, beta),
            deviation,
            artifact.spread,
            artifact.training,
            [artifact.experts.index(name) for name in experts],
        )


def relative(matches: Matrix) -> Matrix:
    """By how much each expert's match exceeds the mean over experts, [n, E]."""
    return matches - matches.mean(axis=1, keepdims=True)


# Descriptions


def checked_descriptions(given: Mapping[str, str | Sequence[str]], experts: Sequence[str]) -> dict[str, list[str]]:
    """Expert -> texts, all experts or none. Raises `TableError` saying what is missing or too long."""
    if not given:
        return {}
    missing = [name for name in experts if not given.get(name)]
    if missing:
        raise TableError(
            f"{', '.join(missing)} has no description: describe all experts of the pool "
            f"(signalbox router describe), or none, and they are described by the prompts they did best on"
        )
    out: dict[str, list[str]] = {}
    for name in experts:
        one_or_more = given[name]
        out[name] = [one_or_more] if isinstance(one_or_more, str) else list(one_or_more)
    for name, texts in out.items():
        if len(texts) > MAX_DESCRIPTIONS:
            raise TableError(f"{name} has {len(texts)} descriptions: {MAX_DESCRIPTIONS} are the most")
        for text in texts:
            if not isinstance(text, str) or not text.strip() or len(text) > MAX_CHARACTERS:
                raise TableError(f"a description of {name} is empty or longer than {MAX_CHARACTERS} characters")
    return out


def assemble(known: Lessons, experts: Sequence[str], rows: Matrix, seed: int) -> dict[str, list[str]]:
    """Descriptions from the texts in the mask `rows` [k]: for each expert, the regions where it did relatively best.

    A region is a cluster of embeddings; it is described by its characteristic words and the expert's best examples.
    An expert that is nowhere better than the others gets the region where it is worse by least.
    """
    embeddings, texts = known.embeddings[rows], [text for text, kept in zip(known.texts, rows, strict=True) if kept]
    centres = clusters(embeddings, int(np.clip(len(texts) // ROWS_A_REGION, 2, REGIONS)), seed)
    cosines = embeddings @ centres.T
    region = cosines.argmax(axis=1)
    words = characteristic_words(texts, region, len(centres))
    advantage = advantages(known.scores[rows])
    members = np.eye(len(centres))[region]
    by_region = members.T @ advantage / (members.sum(axis=0)[:, None] + PRIOR_PROMPTS)
    out: dict[str, list[str]] = {}
    for e, name in enumerate(experts):
        order = np.argsort(-by_region[:, e], kind="stable")[:REGIONS_AN_EXPERT]
        chosen = [r for r in order if by_region[r, e] > 0] or list(order[:1])
        out[name] = []
        for r in chosen:
            inside = np.flatnonzero(region == r)
            best = inside[np.lexsort((-cosines[inside, r], -np.round(advantage[inside, e], 6)))][:EXAMPLES]
            examples = " ".join(cut(texts[i], EXAMPLE_CHARACTERS) for i in best)
            out[name].append(f"{', '.join(words[r])}: {examples}")
    return out


def advantages(scores: Matrix) -> Matrix:
    """How much better each expert was on a prompt than the others, less how much better it is on the mean, [n, E]."""
    over_others = scores - scores.mean(axis=1, keepdims=True)
    return over_others - over_others.mean(axis=0)


def cut(text: str, characters: int) -> str:
    """The beginning of a text in one line, cut at a word."""
    line = " ".join(text[: 4 * characters].split())
    return line if len(line) <= characters else line[:characters].rsplit(" ", 1)[0] + " ..."


# Calibration


def _calibrate(matches: Matrix, known: Lessons) -> tuple[Calibration, Matrix, dict[str, float]]:
    """The calibration on all texts, what it predicts out of fold [n, E], and its figures."""
    scores = known.scores
    strength = matches.max(axis=1)
    found: list[tuple[float, float, Matrix]] = []
    for beta in sorted({float(b) for b in np.quantile(strength, QUANTILES)}):
        guesses = np.empty_like(scores)
        for training, held in known.splits():
            guesses[held] = _lines(matches[training], scores[training], beta)(matches[held])
        found.append((float(difference_errors(guesses, scores).mean()), beta, guesses))
    error, beta, guesses = min(found, key=lambda one: one[:2])
    figures = {
        "routed_quality": routed_quality(guesses, scores),
        "rmse_quality": float(np.sqrt(np.mean((guesses - scores) ** 2))),
        "rmse_differences": float(np.sqrt(error)),
    }
    return _lines(matches, scores, beta), guesses, figures


def _lines(matches: Matrix, scores: Matrix, beta: float) -> Calibration:
    """Least squares in the differences between experts, on the prompts that reach beta.

    Slopes are drawn to their mean by how well each is known (random effects: DerSimonian & Laird 1986): an expert
    with little to go by is taken to be like the others.
    """
    mean, x = scores.mean(axis=0), relative(matches).astype(np.float64)
    centre = x.mean(axis=0)
    held_in = matches.max(axis=1) >= beta
    x = (x - centre)[held_in]
    y = (scores - mean)[held_in]
    y = y - y.mean(axis=1, keepdims=True)
    power = (x**2).sum(axis=0) + 1e-9
    slope = (x * y).sum(axis=0) / power
    variance = ((y - x * slope) ** 2).sum(axis=0) / max(1, len(y) - 1) / power + 1e-12
    weight = 1 / variance
    common = float((weight * slope).sum() / weight.sum())
    surplus = (weight * (slope - common) ** 2).sum() - (len(slope) - 1)
    between = max(0.0, surplus / max(weight.sum() - (weight**2).sum() / weight.sum(), 1e-12))
    trust = between / (between + variance)
    slope = np.maximum(trust * slope + (1 - trust) * common, 0.0)
    return Calibration(mean.astype(np.float32), slope.astype(np.float32), centre.astype(np.float32), beta)
