"""Plain heads: ridge regression of every expert's score on the embedding, the baseline of RouteLLM and RouterBench.

The row's mean and the experts' differences from it have a penalty each (`heads.py`). Structural features join where
they predict the differences better out of fold by more than a standard error. Saving, loading and predicting are
Tryage's, whose frozen form this is without its nonlinear heads.
"""

from __future__ import annotations

from signalbox.router import heads
from signalbox.router.artifact import Report
from signalbox.router.base import Facts
from signalbox.router.encoder import Encoder
from signalbox.router.knn import bounded_lessons
from signalbox.router.table import Table
from signalbox.router.teaching import quality_of, routed_quality, simplest_head, spread_of
from signalbox.router.tryage import TryagePredictor
from signalbox.router.uncertainty import fit_deviation

HEADS = ("ridge", "ridge+structure")
# One eigendecomposition a fold whatever the rows, so the bound is one of memory: 100 MB of features.
MAX_ROWS = 65_536


class LinearPredictor(TryagePredictor):
    """Ridge regression on a frozen embedding; uncertainty as Tryage's."""

    kind = "linear"

    @classmethod
    def fit(
        cls,
        table: Table,
        encoder: Encoder | None,
        *,
        seed: int = 0,
        report: Report | None = None,
        facts: Facts | None = None,
    ) -> LinearPredictor:
        """Learn from the rows of `table`, all of which must be complete; the shapes and errors are Tryage's."""
        notify = report or (lambda step, done, of: None)
        encoder, _, rows = bounded_lessons(table, encoder, MAX_ROWS, seed, notify)
        scores, data = rows.scores, rows.data
        fits = {}
        for number, name in enumerate(HEADS):
            notify("choosing the head", number, len(HEADS) + 1)
            fits[name] = heads.fit(name, data, seed)
        chosen = simplest_head({name: f.out_of_fold for name, f in fits.items()}, scores, rows.prompts)
        best = fits[chosen]
        deviation = fit_deviation(data, scores - quality_of(best.out_of_fold))
        notify("choosing the head", len(HEADS) + 1, len(HEADS) + 1)
        figures = {
            "rows": len(table),
            "texts": len(rows.texts),
            "label": "score" if table.loss is None else "loss",
            "head": chosen,
            "cross_validated": {
                name: {"routed_quality": routed_quality(f.out_of_fold, scores), **f.figures} for name, f in fits.items()
            },
            "left_out_quality": routed_quality(best.out_of_fold, scores),
            "best_single_quality": float(scores.mean(axis=0).max()),
            "uncertainty": deviation.figures,
        }
        return cls(table.models, encoder, best.head, deviation, spread_of(table), figures)
