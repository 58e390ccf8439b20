"""Plots of `benchmarks.sla` as SVG files that stand alone: attainment and goodput against load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from signalbox.router.plots import HEIGHT, WIDTH, Axes, Series, colour_of, plot

STYLE = (
    "svg{--ink:#1d2430;--soft:#5b6675;--line:#d8dde5;background:#fff;font-family:system-ui,sans-serif}"
    "text{fill:var(--ink);font-size:12px}.tick{fill:var(--soft)}.grid{stroke:var(--line)}"
    ".frame{stroke:var(--soft);fill:none}"
)
TITLE, ROW = 30, 18  # pixels
# system -> name -> [(load, value)]
Lines = Mapping[str, Sequence[tuple[float, float]]]


def write_plot(path: Path, title: str, y: str, lines: Lines, dashed: frozenset[str] = frozenset()) -> None:
    """One file: lines against the load as a multiple of capacity, with a legend below."""
    series = [Series(name, points, dashed=name in dashed, dots=True) for name, points in lines.items() if points]
    if not series:
        return
    inner = plot(series, Axes("load, as a multiple of measured capacity", y))
    columns = 3
    height = HEIGHT + TITLE + ROW * (1 + (len(series) - 1) // columns) + 12
    legend = []
    for i, one in enumerate(series):
        x, row = 70 + (i % columns) * 260, HEIGHT + TITLE + 12 + ROW * (i // columns)
        legend.append(f'<rect x="{x}" y="{row - 9}" width="18" height="10" fill="{colour_of(series, i)}"/>')
        legend.append(f'<text x="{x + 24}" y="{row}">{escape(one.name)}</text>')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">'
        f"<style>{STYLE}</style><rect width='100%' height='100%' fill='#fff'/>"
        f'<text x="70" y="20" style="font-size:15px;font-weight:600">{escape(title)}</text>'
        f'<g transform="translate(0 {TITLE})">{inner}</g>{"".join(legend)}</svg>\n'
    )
