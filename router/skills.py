"""A profile of what each expert is good at, skill by skill, in the manner of Symbolic-MoE (Chen et al., 2503.05641).

There, a language model names the skills of a question, and an expert's profile counts what it got right of each. Here
skills are found without one: they are the table's tasks, or clusters of the training prompts' embeddings, named by
their most characteristic words, so that the profile is still for people to read. A prompt belongs to several skills in
part, by its cosine to their centres:

    share[s] = softmax(cosine(prompt, centre[s]) / temperature)
    quality[e] = mean[e] + sum over s of share[s] * (difficulty[s] + advantage[e, s])

Advantages are shrunk towards 0 (ridge regression on the shares; where a prompt has one skill alone, this is the mean
advantage times n / (n + penalty)). How many skills, the temperature and the penalties have the least error out of
fold.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from signalbox.router import heads
from signalbox.router.artifact import Artifact, ArtifactError, Report
from signalbox.router.base import Facts, Prediction, Prompt
from signalbox.router.encoder import Encoder
from signalbox.router.heads import PENALTIES, Matrix, RidgePath
from signalbox.router.table import Table
from signalbox.router.teaching import (
    Lessons,
    clearly_positive,
    difference_errors,
    lessons,
    quality_of,
    routed_quality,
    spread_of,
)
from signalbox.router.uncertainty import DeviationHead, fit_deviation, load_deviation

FloatMatrix = NDArray[np.float32]

COUNTS = (4, 8, 16, 32, 64, 128)
MAX_SKILLS = max(COUNTS)
# Prompts that a skill has on the mean, at least.
LEAST_PROMPTS = 10
TEMPERATURES = (0.2, 0.1, 0.05)
# Words that describe a skill, and the most that are looked at in a prompt.
WORDS, MAX_WORDS = 10, 400
_WORD = re.compile(r"[^\W\d_]{3,24}")


@dataclass(frozen=True)
class SkillMap:
    """Embeddings to shares of skills; centres: float32 [S, d], of length 1."""

    centres: FloatMatrix
    temperature: float

    def __call__(self, embeddings: Matrix) -> FloatMatrix:
        """float32 [n, S], rows sum to 1."""
        logits = embeddings @ self.centres.T / np.float32(self.temperature)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True)


@dataclass(frozen=True)
class Profile:
    """mean: float32 [E]; difficulty: float32 [S], common to all experts; advantage: float32 [S, E], rows sum to 0."""

    mean: FloatMatrix
    difficulty: FloatMatrix
    advantage: FloatMatrix

    def __call__(self, shares: Matrix) -> Matrix:
        """Shares [n, S] -> quality [n, E], not clipped."""
        return self.mean + shares @ (self.difficulty[:, None] + self.advantage)


class SkillsPredictor:
    """Quality as an expert's mean and the advantages that its skills give it; the profile is in `training`.

    Uncertainty is the standard deviation of out-of-fold residuals, regressed on the skills (`uncertainty.py`).
    """

    kind = "skills"
    uses_encoder: ClassVar[bool] = True

    def __init__(
        self,
        experts: Sequence[str],
        encoder: Encoder,
        skills: SkillMap,
        profile: Profile,
        deviation: DeviationHead,
        spread: float,
        training: dict[str, Any] | None = None,
    ) -> None:
        self.experts = tuple(experts)
        self.encoder = encoder
        self.skills = skills
        self.profile = profile
        self.deviation = deviation
        self.spread = spread
        self.training = training or {}

    def predict(self, prompts: list[Prompt]) -> Prediction:
        """Predict all experts on all prompts; blocking and thread-safe. Reads the text alone."""
        shares = self.skills(self.encoder.encode([prompt.text for prompt in prompts]))
        return Prediction(self.experts, quality_of(self.profile(shares)), self.deviation(shares), self.spread)

    @classmethod
    def fit(
        cls,
        table: Table,
        encoder: Encoder,
        *,
        seed: int = 0,
        report: Report | None = None,
        facts: Facts | None = None,
    ) -> SkillsPredictor:
        """Learn from the rows of `table`, all of which must be complete; texts teach as in Tryage.

        The table's tasks, where there are 2 to 128, are one way to find skills; they are not read when predicting.
        `report(step, done, of)` is called as it goes. Raises `TableError` with too few rows.
        """
        notify = report or (lambda step, done, of: None)
        known = lessons(table, encoder, notify)
        chosen: _Fit | None = None
        tried = []
        candidates = _candidates(table, known, seed)
        for number, (source, centres) in enumerate(candidates):
            notify("finding skills", number, len(candidates) + 1)
            fits = [_fit(source, SkillMap(centres, temperature), known) for temperature in TEMPERATURES]
            best = min(fits, key=lambda f: f.errors.mean())
            tried.append({"source": source, "skills": len(centres), **best.figures(known)})
            if chosen is None or _better(chosen, best, known):
                chosen = best
        assert chosen is not None
        shares = chosen.skills(known.embeddings)
        data = heads.Data(shares, known.scores, known.folds, plain=shares.shape[1])
        deviation = fit_deviation(data, known.scores - np.clip(chosen.left_out, 0.0, 1.0))
        notify("finding skills", len(candidates) + 1, len(candidates) + 1)
        figures = {
            "rows": len(table),
            "texts": len(known.texts),
            "label": "score" if table.loss is None else "loss",
            "head": f"{shares.shape[1]} skills from {chosen.source}",
            "temperature": chosen.skills.temperature,
            "penalty_difficulty": chosen.penalties[0],
            "penalty_advantage": chosen.penalties[1],
            "cross_validated": {"tried": tried, **chosen.figures(known)},
            "best_single_quality": float(known.scores.mean(axis=0).max()),
            "mean_quality": dict(zip(table.models, map(float, chosen.profile.mean), strict=True)),
            "profile": readable(chosen.profile, shares, known.texts, table.models),
            "uncertainty": deviation.figures,
        }
        return cls(table.models, encoder, chosen.skills, chosen.profile, deviation, spread_of(table), figures)

    def to_artifact(self) -> Artifact:
        """Everything `from_artifact` needs."""
        return Artifact(
            kind=self.kind,
            experts=self.experts,
            tensors={
                "skills.centres": self.skills.centres,
                "profile.mean": self.profile.mean,
                "profile.difficulty": self.profile.difficulty,
                "profile.advantage": self.profile.advantage,
                **self.deviation.tensors("deviation."),
            },
            settings={
                "skills": len(self.skills.centres),
                "temperature": self.skills.temperature,
                "dimension": self.encoder.dimension,
            },
            training=self.training,
            encoder=self.encoder.reference,
            spread=self.spread,
        )

    @classmethod
    def from_artifact(cls, artifact: Artifact, encoder: Encoder, experts: Sequence[str]) -> SkillsPredictor:
        """The predictor of these experts, a selection of the artifact's. Raises `ArtifactError` where it is damaged."""
        where, settings = artifact.path or "router artifact", artifact.settings
        if settings.get("dimension") != encoder.dimension:
            raise ArtifactError(
                f"{where}: trained on embeddings of {settings.get('dimension')} numbers, "
                f"the encoder {encoder.reference} gives {encoder.dimension}"
            )
        count, temperature = settings.get("skills"), settings.get("temperature")
        if type(count) is not int or not 1 <= count <= MAX_SKILLS:
            raise ArtifactError(f"{where}: {count!r} skills are not possible (1 to {MAX_SKILLS}); train it again")
        if not isinstance(temperature, float) or not 0 < temperature < np.inf:
            raise ArtifactError(f"{where}: temperature {temperature!r} is not a positive number; train it again")
        n, columns = len(artifact.experts), [artifact.experts.index(name) for name in experts]
        skills = SkillMap(artifact.tensor("skills.centres", count, encoder.dimension), temperature)
        profile = Profile(
            artifact.tensor("profile.mean", n)[columns],
            artifact.tensor("profile.difficulty", count),
            np.ascontiguousarray(artifact.tensor("profile.advantage", count, n)[:, columns]),
        )
        deviation = load_deviation(artifact, "deviation.", count, columns)
        return cls(experts, encoder, skills, profile, deviation, artifact.spread, artifact.training)


# Finding skills


def _candidates(table: Table, known: Lessons, seed: int) -> list[tuple[str, FloatMatrix]]:
    """(where from, centres): the tasks if there are some, then clusterings from few to many."""
    out = []
    tasks = np.array(table.task)[known.origin]
    names = sorted(set(tasks.tolist()) - {""})
    if 1 < len(names) <= min(MAX_SKILLS, known.prompts // LEAST_PROMPTS):
        out.append(("tasks", _unit(np.stack([known.embeddings[tasks == name].mean(axis=0) for name in names]))))
    most = max(2, known.prompts // LEAST_PROMPTS)
    counts = sorted({min(count, most) for count in COUNTS})
    return out + [("clusters", clusters(known.embeddings, count, seed)) for count in counts]


def clusters(embeddings: Matrix, count: int, seed: int, rounds: int = 15) -> FloatMatrix:
    """Centres float32 [at most count, d] of unit vectors, by spherical k-means (Dhillon & Modha 2001).

    Starts as k-means++ does; a cluster that empties is dropped.
    """
    rng = np.random.default_rng(seed)
    centres = embeddings[[rng.integers(len(embeddings))]]
    apart = 1 - embeddings @ centres[0]
    for _ in range(count - 1):
        weight = np.maximum(apart, 0.0).astype(np.float64)
        if weight.sum() <= 1e-9 * len(weight):  # fewer different texts than clusters
            break
        fresh = embeddings[rng.choice(len(embeddings), p=weight / weight.sum())]
        centres = np.vstack([centres, fresh])
        apart = np.minimum(apart, 1 - embeddings @ fresh)
    for _ in range(rounds):
        members = np.eye(len(centres), dtype=np.float32)[(embeddings @ centres.T).argmax(axis=1)]
        members = members[:, members.any(axis=0)]
        centres = _unit(members.T @ embeddings)
    return centres


def _unit(rows: Matrix) -> FloatMatrix:
    return (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)).astype(np.float32)


# The profile


@dataclass(frozen=True)
class _Fit:
    """A profile on all rows, what the same settings predict out of fold [n, E], and their errors [n]."""

    source: str
    skills: SkillMap
    profile: Profile
    penalties: tuple[float, float]
    left_out: Matrix
    errors: Matrix

    def figures(self, known: Lessons) -> dict[str, float]:
        return {
            "routed_quality": routed_quality(self.left_out, known.scores),
            "rmse_quality": float(np.sqrt(np.mean((self.left_out - known.scores) ** 2))),
            "rmse_differences": float(np.sqrt(self.errors.mean())),
        }


def _fit(source: str, skills: SkillMap, known: Lessons) -> _Fit:
    """Ridge on the shares; difficulty and advantages have a penalty each, as in `heads.py`."""
    shares, scores = skills(known.embeddings).astype(np.float64), known.scores
    mean = scores.mean(axis=1, keepdims=True)
    y = np.hstack([mean, scores - mean])
    data = heads.Data(shares, scores, known.folds, plain=shares.shape[1])
    guesses = heads.out_of_fold(lambda _: shares, y, data)
    errors = (guesses - y) ** 2
    at = [int(np.argmin(errors[..., c].sum(axis=(1, 2)))) for c in (slice(0, 1), slice(1, None))]
    path = RidgePath(shares, y)
    weight = np.hstack([path.weight(PENALTIES[at[0]])[:, :1], path.weight(PENALTIES[at[1]])[:, 1:]])
    weight -= path.x_mean @ weight  # shares sum to 1: a constant moves between skills and mean, and belongs to the mean
    parts = path.y_mean[0] + path.y_mean[1:], weight[:, 0], weight[:, 1:]
    profile = Profile(*(part.astype(np.float32) for part in parts))
    left_out = guesses[at[0]][:, :1] + guesses[at[1]][:, 1:]
    penalties = (float(PENALTIES[at[0]]), float(PENALTIES[at[1]]))
    return _Fit(source, skills, profile, penalties, left_out, difference_errors(left_out, scores))


def _better(simple: _Fit, other: _Fit, known: Lessons) -> bool:
    """Whether the other predicts differences better by more than one standard error of the paired difference."""
    return clearly_positive(simple.errors - other.errors, known.prompts)


def readable(profile: Profile, shares: Matrix, texts: Sequence[str], experts: Sequence[str]) -> list[dict[str, Any]]:
    """The profile for people, commonest skill first: name, words, rows, difficulty, the three best experts."""
    described = characteristic_words(texts, shares.argmax(axis=1), shares.shape[1])
    rows = shares.sum(axis=0)
    quality = profile.mean + profile.difficulty[:, None] + profile.advantage
    return [
        {
            "skill": ", ".join(described[s][:3]) or f"skill {s}",
            "words": described[s],
            "rows": round(float(rows[s]), 1),
            "difficulty": round(float(-profile.difficulty[s]), 4),
            "best": [
                {
                    "expert": experts[e],
                    "quality": round(float(quality[s, e]), 4),
                    "advantage": round(float(profile.advantage[s, e]), 4),
                }
                for e in np.argsort(-quality[s], kind="stable")[:3]
            ],
        }
        for s in np.argsort(-rows, kind="stable")
    ]


def words_of(text: str) -> list[str]:
    """Words of three letters and more, in lower case, from the beginning of a text."""
    return [match.group().lower() for match, _ in zip(_WORD.finditer(text), range(MAX_WORDS), strict=False)]


def characteristic_words(texts: Sequence[str], group: Matrix, count: int) -> list[list[str]]:
    """The words that tell each of `count` groups from the others, best first, at most `WORDS` of each.

    By class-based tf-idf: prompts of the group that have the word, against those of all (each prompt counts once, so
    that one long text does not name a group), weighed by the logarithm of how much commoner it is within.
    """
    inside: list[Counter[str]] = [Counter() for _ in range(count)]
    for text, g in zip(texts, group, strict=True):
        inside[g].update(set(words_of(text)))
    everywhere: Counter[str] = sum(inside, Counter())
    sizes = np.bincount(group, minlength=count)
    out = []
    for counts, size in zip(inside, sizes, strict=True):
        value = {
            word: n / size * np.log(n * len(texts) / (everywhere[word] * size))
            for word, n in counts.items()
            if n >= min(3, size)
        }
        out.append([word for word, v in sorted(value.items(), key=lambda item: (-item[1], item[0]))[:WORDS] if v > 0])
    return out
