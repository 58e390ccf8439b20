"""A comparison as one HTML page that needs no network: verdict, plots, tables."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from signalbox.router import metrics
from signalbox.router.compare import Choice, Comparison, Contender
from signalbox.router.judge import Evaluation
from signalbox.router.plots import Axes, Series, bars, legend, plot

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5b6675; --line: #d8dde5; --paper: #ffffff; --band: #f4f6f9;
  --good: #17703a; --bad: #a63d17; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #9aa5b4; --line: #343c48; --paper: #14181e;
  --band: #1c222a; --good: #6fce93; --bad: #f0936b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 2.2rem 1.4rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.55rem; margin: 0 0 .2rem; } h2 { font-size: 1.1rem; margin: 2.4rem 0 .5rem; }
p { margin: .3rem 0 .8rem; max-width: 74ch; } .soft { color: var(--soft); }
.verdict { border-left: 4px solid var(--good); background: var(--band); padding: .7rem 1rem; margin: 1.1rem 0; }
.verdict.none { border-color: var(--bad); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; min-width: 40%; }
th, td { padding: .32rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; color: var(--soft); } th:first-child, td:first-child { text-align: left; }
tr.best td { background: var(--band); font-weight: 600; }
figure { margin: .4rem 0 0; } svg { max-width: 100%; height: auto; } svg text { fill: var(--ink); font-size: 12px; }
svg .tick { fill: var(--soft); } svg .grid { stroke: var(--line); } svg .frame { stroke: var(--soft); fill: none; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; font-size: 13px; color: var(--soft); }
.legend i { display: inline-block; width: 14px; height: 4px; margin-right: .4rem; vertical-align: middle; }
"""


def report(comparison: Comparison, choice: Choice, title: str) -> str:
    """The page: `title` is shown as it is; nothing in it loads anything."""
    fitted = comparison.fitted
    parts = [_head(comparison, choice, title), "<h2>Who chooses best</h2>", _quality(comparison, choice)]
    if fitted:
        parts += [_references(fitted[0].evaluation), _pareto(comparison), _calibration(fitted), _robustness(fitted)]
        parts += [_collapse(fitted), _by_task(fitted[0])]
    parts += [_failed(comparison)]
    body = "\n".join(part for part in parts if part)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body>\n{body}\n</body></html>\n"
    )


def _head(comparison: Comparison, choice: Choice, title: str) -> str:
    rows = comparison.rows
    how = f"{comparison.folds}-fold cross-validation" if comparison.folds else "rows of a table of their own"
    none = " none" if choice.kind == "single" else ""
    return (
        f"<h1>{escape(title)}</h1>"
        f'<p class="soft">{len(rows)} prompts, {len(rows.models)} experts, {how}; errors are standard errors, '
        f"of gains paired with the best single expert.</p>"
        f'<div class="verdict{none}">{escape(choice.reason[0].upper() + choice.reason[1:])}.</div>'
    )


def _quality(comparison: Comparison, choice: Choice) -> str:
    head = ["router", "mean quality", "gain over best single", "optimal", "regret", "AIQ", "APGR", "CPT 50 %"]
    head += ["CPT 80 %", "most chosen", "z rms", "decision p50", "p99", "fit"]
    lines = []
    for c in comparison.fitted:
        e = c.evaluation
        assert e is not None
        most, share = e.most_chosen
        ms = e.decision_ms or {}
        cells = [
            c.kind,
            f"{e.quality:.4f} ± {e.quality_se:.4f}",
            f"{e.gain:+.4f} ± {e.gain_se:.4f}",
            f"{e.optimal_selection:.1%}",
            f"{e.regret:.4f}",
            _number(e.aiq),
            _number(e.apgr),
            _share(e.cpt50),
            _share(e.cpt80),
            f"{most} {share:.0%}",
            f"{e.calibration['z_rms']:.2f}",
            _ms(ms.get("p50")),
            _ms(ms.get("p99")),
            "" if c.fit_s is None else f"{c.fit_s:.1f} s",
        ]
        lines.append((cells, c.kind == choice.kind))
    keep = [i for i in range(len(head)) if any(cells[i] for cells, _ in lines)]
    return _table([head[i] for i in keep], [([cells[i] for i in keep], best) for cells, best in lines]) + _bars(
        comparison
    )


def _references(e: Evaluation | None) -> str:
    assert e is not None
    lines = [
        (f"best single ({e.best_single_expert})", e.best_single),
        ("majority: most often optimal in training", e.majority),
        ("cheapest", e.cheapest),
        ("random", e.random),
        (f"kNN, tuned ({e.knn_rows} rows)", e.knn),
        ("told the task: each task's best in training", e.told_task),
        ("oracle", e.oracle),
    ]
    rows = [([name, _number(value) or "not known"], False) for name, value in lines]
    if e.aiq_hull is not None:
        rows.append((["AIQ of the single experts' hull", _number(e.aiq_hull)], False))
    return "<h2>Reference lines</h2>" + _table(["who chooses", "mean quality"], rows)


def _bars(comparison: Comparison) -> str:
    fitted = comparison.fitted
    if not fitted or fitted[0].evaluation is None:
        return ""
    first = fitted[0].evaluation
    values = [(c.kind, c.evaluation.gain, 1.96 * c.evaluation.gain_se) for c in fitted if c.evaluation is not None]
    marks = [("told the task", first.told_task), ("kNN", first.knn)]
    shown = [(name, value - first.best_single) for name, value in marks if value is not None]
    return (
        "<figure>"
        + bars(values, shown, "gain in mean quality over the best single expert, 95 % interval")
        + "</figure>"
    )


def _pareto(comparison: Comparison) -> str:
    rows = comparison.rows
    cost = rows.measures.get("cost")
    if cost is None or np.isnan(cost).any():
        return ""
    single_cost, single_quality = cost.mean(axis=0), rows.score.mean(axis=0)
    series = [Series("single experts' hull", _curve(single_cost, single_quality), dashed=True)]
    expected = comparison.lines.expected_cost
    for c in comparison.fitted[:8]:
        if c.prediction is not None:
            curve = metrics.cost_quality_curve(
                c.prediction.quality, single_cost if expected is None else expected, rows.score, cost
            )
            series.append(Series(c.kind, _curve(curve.cost, curve.quality)))
    points = list(zip(rows.models, single_cost, single_quality, strict=True))
    axes = Axes("mean cost of a prompt, US dollars (log scale)", "mean quality", log=bool(single_cost.min() > 0))
    return (
        "<h2>Cost against quality</h2><p>Each router's hull over all price weights, and the single experts. "
        "AIQ is the mean height between the cheapest and the dearest single expert.</p>"
        f"<figure>{plot(series, axes, points)}{legend(series)}</figure>"
    )


def _curve(cost: NDArray[np.float64], quality: NDArray[np.float64]) -> list[tuple[float, float]]:
    """The hull with points between its corners: what is straight in costs is not in their logarithms."""
    x, y = metrics.non_decreasing_hull(cost, quality)
    between = [np.linspace(a, b, 12, endpoint=False) for a, b in itertools.pairwise(x)]
    at = np.concatenate([*between, x[-1:]])
    return [(float(a), float(b)) for a, b in zip(at, np.interp(at, x, y), strict=True)]


def _calibration(fitted: Sequence[Contender]) -> str:
    series = []
    for c in fitted[:8]:
        assert c.evaluation is not None
        bins = c.evaluation.calibration["bins"]
        series.append(Series(c.kind, [(b["predicted"], b["observed"]) for b in bins], dots=True))
    top = max(max(x, y) for s in series for x, y in s.points)
    low = min(min(x, y) for s in series for x, y in s.points)
    series.insert(0, Series("calibrated", [(low, low), (top, top)], dashed=True))
    axes = Axes("predicted standard deviation", "observed root mean squared error")
    return (
        "<h2>Calibration</h2><p>In five groups of equal size by predicted uncertainty. On the dashed line what is "
        f"predicted is what is seen.</p><figure>{plot(series, axes)}{legend(series)}</figure>"
    )


def _robustness(fitted: Sequence[Contender]) -> str:
    lines, head = [], ["router"]
    for c in fitted:
        found = c.evaluation.robustness if c.evaluation else None
        if found:
            head = ["router", *(f"{name}: {what}" for name in found for what in ("quality", "same choice"))]
            cells = [text for f in found.values() for text in (f"{f['difference']:+.4f}", f"{f['same']:.0%}")]
            lines.append(([c.kind, *cells], False))
    if not lines:
        return ""
    return (
        "<h2>Robustness</h2><p>Prompts with changed case, with synonyms and mistyped letters, and with courtesies "
        "around them: change of the mean quality, and share of prompts that keep their expert.</p>"
        + _table(head, lines)
    )


def _collapse(fitted: Sequence[Contender]) -> str:
    able = [c for c in fitted if c.evaluation and c.evaluation.collapse]
    if not able:
        return ""
    first = able[0].evaluation
    assert first is not None and first.collapse is not None
    head = ["budget, US dollars a prompt", *(c.kind for c in able)]
    lines = []
    for i, point in enumerate(first.collapse):
        shares = []
        for c in able:
            assert c.evaluation is not None and c.evaluation.collapse is not None
            here = c.evaluation.collapse[i]
            shares.append(f"{here['share']:.0%} {here['most_chosen']}")
        lines.append(([f"{point['budget']:.2e}", *shares], False))
    return (
        "<h2>Collapse along the budget</h2><p>Share of the most chosen expert when the mean price may be at most the "
        "budget. Near 100 % a router has become a single expert.</p>" + _table(head, lines)
    )


def _by_task(best: Contender) -> str:
    e = best.evaluation
    if e is None or len(e.tasks) < 2:
        return ""
    lines = []
    for name, task in e.tasks.items():
        most, share = max(task["share"].items(), key=lambda item: item[1])
        cells = [name, str(task["rows"]), f"{task['quality']:.4f} ± {task['quality_se']:.4f}"]
        cells += [f"{task['best_single']:.4f} {task['best_single_expert']}", f"{task['random']:.4f}"]
        cells += [f"{task['oracle']:.4f}", f"{task['optimal_selection']:.0%}", f"{share:.0%} {most}"]
        lines.append((cells, False))
    head = ["task", "rows", "router", "best single", "random", "oracle", "optimal", "most chosen"]
    return f"<h2>By task: {escape(best.kind)}</h2>" + _table(head, lines)


def _failed(comparison: Comparison) -> str:
    lines = [([c.kind, c.error], False) for c in comparison.contenders if c.error]
    return "<h2>Not fitted</h2>" + _table(["router", "reason"], lines) if lines else ""


def _table(head: Sequence[str], rows: Iterable[tuple[Sequence[str], bool]]) -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = []
    for row, best in rows:
        mark = ' class="best"' if best else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>")
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} ms"
