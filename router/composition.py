"""Composition of Experts (Jain et al., arXiv 2412.01868): prompt -> category -> expert, within a parameter budget.

Step 1 (`category_router.py`) says what category a prompt belongs to, `general` where it is unsure. Step 2
(`category_map.py`) decides which expert serves which category, so that the expected quality is greatest and the kept
experts fit the budget on resident parameters. The qualities that step 2 maximises are those of the categories as
step 1 assigns them out of fold, its mistakes included: what the map promises is what the two steps together reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from signalbox.router import heads
from signalbox.router.artifact import Artifact, ArtifactError, Report
from signalbox.router.base import Facts, Prediction, Prompt
from signalbox.router.category_map import (
    CategoryMap,
    category_quality,
    cross_fitted,
    frequencies,
    routed_score,
    solve_map,
)
from signalbox.router.category_router import (
    CategoryRouter,
    assigned,
    entropy,
    fit_category_router,
    found_categories,
    load_category_router,
    task_categories,
    with_threshold,
)
from signalbox.router.encoder import Encoder
from signalbox.router.knn import MAX_ROWS, bounded_lessons, fitting_encoder
from signalbox.router.table import Table, TableError
from signalbox.router.teaching import clearly_positive, spread_of
from signalbox.router.uncertainty import DeviationHead, fit_deviation, load_deviation

Matrix = NDArray[Any]

# Shares of the training prompts that may be sure. The first is the default: of what was trained on, all but the
# strangest hundredth keep their category; the others have to earn it.
SURE_SHARES = (0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5)
# A kept expert's quality is never below this, an excluded one's is 0: no tie lets an excluded one win.
LEAST_KEPT = 1e-6


@dataclass(frozen=True)
class Pool:
    """What step 2 knows of experts: quality [C, E], sizes, active sizes and root mean square scores [E].

    Also frequency [C] of the categories and the budget in the unit of the sizes (None: no limit).
    """

    quality: Matrix
    frequency: Matrix
    sizes: Matrix
    active: Matrix
    rms: Matrix
    budget: float | None

    def selected(self, columns: Sequence[int]) -> Pool:
        """The same for some of the experts."""
        picked = list(columns)
        return Pool(
            self.quality[:, picked],
            self.frequency,
            self.sizes[picked],
            self.active[picked],
            self.rms[picked],
            self.budget,
        )

    def solve(self) -> CategoryMap:
        """The map for these experts under the budget. Raises `TableError` where it holds none of them."""
        return solve_map(self.quality, self.frequency, self.sizes, self.budget, self.active)


class CompositionPredictor:
    """Quality of each expert on the prompt's category.

    The best predicted expert is the one that the map assigns to the category, always. Under a budget, experts that
    were not kept (`excluded`) are not meant to be resident: their quality is given as 0, below that of all kept ones,
    and not as what they would reach; their uncertainty as the root mean square of their scores, which is how wrong
    that 0 is. Where a policy weighs prices, leave them out of the pool: at a high enough weight a cheap expert wins
    with any quality. For a part of the experts the map is solved anew under the same budget.
    """

    kind = "composition"
    uses_encoder: ClassVar[bool] = True

    def __init__(
        self,
        experts: Sequence[str],
        encoder: Encoder,
        router: CategoryRouter,
        pool: Pool,
        deviation: DeviationHead,
        spread: float,
        *,
        training: dict[str, Any] | None = None,
    ) -> None:
        self.experts = tuple(experts)
        self.encoder = encoder
        self.router = router
        self.pool = pool
        self.deviation = deviation
        self.spread = spread
        self.training = training or {}
        self.map = pool.solve()
        limited = pool.budget is not None and pool.sizes.sum() > pool.budget
        kept = np.isin(np.arange(len(self.experts)), self.map.kept) if limited else np.ones(len(self.experts), bool)
        self.excluded = tuple(name for name, k in zip(self.experts, kept, strict=True) if not k)
        self._kept = kept
        self._quality = np.where(kept, np.clip(pool.quality, LEAST_KEPT, 1.0), 0.0).astype(np.float32)

    def predict(self, prompts: list[Prompt]) -> Prediction:
        """Predict all experts on all prompts; blocking, thread-safe, without state. Reads the text alone."""
        embeddings = self.encoder.encode([prompt.text for prompt in prompts])
        category = self.router.assign(self.router.probabilities(embeddings))
        uncertainty = np.where(self._kept, self.deviation(embeddings), self.pool.rms).astype(np.float32)
        return Prediction(self.experts, self._quality[category], uncertainty, self.spread)

    def categories(self, prompts: list[Prompt]) -> list[tuple[str, float, float]]:
        """For each prompt: its category, the probability of the most probable one, and the entropy in [0, 1]."""
        probabilities = self.router.probabilities(self.encoder.encode([prompt.text for prompt in prompts]))
        names = [self.router.names[c] for c in self.router.assign(probabilities)]
        return list(zip(names, probabilities.max(axis=1).tolist(), entropy(probabilities).tolist(), strict=True))

    @classmethod
    def fit(
        cls,
        table: Table,
        encoder: Encoder | None,
        *,
        seed: int = 0,
        report: Report | None = None,
        facts: Facts | None = None,
    ) -> CompositionPredictor:
        """Learn from the rows of `table`, all of which must be complete.

        Categories are the table's tasks; rows without one are assigned as any other prompt. Without two tasks they
        are clusters of embeddings. `facts` gives the sizes of the experts (without any, each counts 1) and the budget.
        With more than 16,384 texts, a random part of the rows is learned from. Raises `TableError` with too few
        prompts, where the size of an expert is missing, or where the budget holds no expert.
        """
        notify = report or (lambda step, done, of: None)
        sizes, active, budget = sizes_of(table.models, facts or Facts())
        solve_map(np.zeros((1, len(sizes))), np.ones(1), sizes, budget)  # a budget too small is told before the work
        encoder, taught, rows = bounded_lessons(table, encoder, MAX_ROWS, seed, notify)
        scores, folds = rows.scores, rows.folds
        embeddings = rows.embeddings.astype(np.float16).astype(np.float32)  # as an artifact keeps them
        given = task_categories([taught.task[i] for i in rows.origin])
        clusters: dict[str, Any] = {}
        if given is None:
            names, labels, tried = found_categories(embeddings, scores, folds, seed)
            clusters = {"clusters": len(names) - 1, "rms_differences_by_clusters": tried}
        else:
            names, labels = given
        router, probabilities = fit_category_router(
            names, labels, embeddings, folds, lambda done, of: notify("learning the categories", done, of)
        )

        def solve(quality: Matrix, frequency: Matrix) -> CategoryMap:
            return solve_map(quality, frequency, sizes, budget, active)

        threshold, tried_shares, left_out = _threshold(probabilities, scores, folds, solve, rows.prompts)
        router = with_threshold(router, threshold, {"routed_quality_by_share_sure": tried_shares})
        category = router.assign(probabilities)
        pool = Pool(
            quality=category_quality(scores, category, len(names)).clip(0.0, 1.0).astype(np.float32),
            frequency=frequencies(category, len(names)).astype(np.float32),
            sizes=sizes,
            active=active,
            rms=np.sqrt((scores**2).mean(axis=0)).astype(np.float32),
            budget=budget,
        )
        residuals = scores - cross_fitted(scores, category, len(names), folds).clip(0.0, 1.0)
        deviation = fit_deviation(heads.Data(embeddings, scores, folds, plain=embeddings.shape[1]), residuals)
        made = cls(table.models, encoder, router, pool, deviation, spread_of(table))
        made.training.update(
            {
                "rows": len(table),
                "texts": len(scores),
                "label": "score" if table.loss is None else "loss",
                "head": f"{router.settings()['classifier']}, {len(names)} categories",
                **clusters,
                "category_router": router.figures,
                "general_share": float((category == len(names) - 1).mean()),
                "left_out_quality": left_out,
                "best_single_quality": float(scores.mean(axis=0).max()),
                "map": made.described(),
                "uncertainty": deviation.figures,
            }
        )
        return made

    def described(self) -> dict[str, Any]:
        """The map for people: each category's share, expert and expected quality; what is resident, what is active."""
        found = self.map
        return {
            "categories": {
                name: {
                    "share": float(self.pool.frequency[c]),
                    "expert": self.experts[found.experts[c]],
                    "quality": float(self.pool.quality[c, found.experts[c]]),
                }
                for c, name in enumerate(self.router.names)
            },
            "kept": [self.experts[e] for e in found.kept],
            "excluded": list(self.excluded),
            "expected_quality": found.quality,
            "budget": self.pool.budget,
            "resident": found.resident,
            "average_active": found.average_active,
        }

    def to_artifact(self) -> Artifact:
        """Everything `from_artifact` needs."""
        return Artifact(
            kind=self.kind,
            experts=self.experts,
            tensors={
                "map.quality": self.pool.quality,
                "map.frequency": self.pool.frequency,
                "map.rms": self.pool.rms,
                **self.router.tensors("category."),
                **self.deviation.tensors("deviation."),
            },
            settings={
                "dimension": self.encoder.dimension,
                "parameters": self.pool.sizes.tolist(),
                "active": self.pool.active.tolist(),
                "budget": self.pool.budget,
                **self.router.settings(),
            },
            training=self.training,
            encoder=self.encoder.reference,
            spread=self.spread,
        )

    @classmethod
    def from_artifact(cls, artifact: Artifact, encoder: Encoder | None, experts: Sequence[str]) -> CompositionPredictor:
        """The predictor of these experts, a selection of the artifact's: the map is solved for them under the budget.

        Raises `ArtifactError` where the artifact is damaged, or the budget holds none of these experts.
        """
        where = artifact.path or "router artifact"
        encoder = fitting_encoder(artifact, encoder)
        router = load_category_router(artifact, "category.", encoder.dimension)
        c, e = len(router.names), len(artifact.experts)
        columns = [artifact.experts.index(name) for name in experts]
        try:
            budget = artifact.settings.get("budget")
            pool = Pool(
                artifact.tensor("map.quality", c, e),
                artifact.tensor("map.frequency", c),
                np.array(artifact.settings.get("parameters"), dtype=np.float64).reshape(e),
                np.array(artifact.settings.get("active"), dtype=np.float64).reshape(e),
                artifact.tensor("map.rms", e),
                None if budget is None else float(budget),
            ).selected(columns)
            deviation = load_deviation(artifact, "deviation.", encoder.dimension, columns)
            return cls(experts, encoder, router, pool, deviation, artifact.spread, training=artifact.training)
        except ArtifactError:
            raise
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"{where}: {error}; train it again for this pool") from None


def sizes_of(experts: Sequence[str], facts: Facts) -> tuple[Matrix, Matrix, float | None]:
    """Parameters and active parameters float64 [E], and the budget. Without any size given, every expert counts 1.

    Raises `TableError` where some but not all sizes are known, or one is not a positive number.
    """
    missing = [name for name in experts if name not in facts.parameters]
    if facts.parameters and missing:
        raise TableError(f"the number of parameters of {', '.join(missing)} is not known: give it, or give none at all")
    sizes = np.array([float(facts.parameters.get(name, 1.0)) for name in experts])
    active = np.array([float(facts.active.get(name, size)) for name, size in zip(experts, sizes, strict=True)])
    for name, size, used in zip(experts, sizes, active, strict=True):
        if not (0 < size < np.inf and 0 < used < np.inf):
            raise TableError(f"{name} has {size:g} parameters, {used:g} active: both must be positive, finite numbers")
    return sizes, active, facts.budget


def _threshold(
    probabilities: Matrix, scores: Matrix, folds: Matrix, solve: Any, prompts: int
) -> tuple[float, dict[str, float], float]:
    """Entropy above which a prompt is `general`, routed quality by share of the sure, and that of the chosen one.

    Chosen by the score of the experts that maps made without a row's fold give it: `SURE_SHARES`' first, unless a
    smaller share of sure prompts gains more than a standard error. No row but those trained on is looked at.
    """
    unsure, count = entropy(probabilities), probabilities.shape[1]
    chosen, best, tried = float("nan"), scores[:, 0], {}
    for share in SURE_SHARES:
        threshold = float(np.quantile(unsure, share))
        routed = routed_score(scores, assigned(probabilities, threshold), count, folds, solve)
        tried[f"{share:g}"] = float(routed.mean())
        gain = routed - best
        if np.isnan(chosen) or clearly_positive(gain, prompts):
            chosen, best = threshold, routed
    return chosen, tried, float(best.mean())
