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
TITLE, LEGEND, COLUMN = 30, 28, 190  # pixels
Lines = Mapping[str, Sequence[tuple[float, float]]]  # name -> [(load, value)]


def write_plot(
    path: Path, title: str, y: str, panels: Mapping[str, Lines], dashed: frozenset[str] = frozenset()
) -> None:
    """One file: panels below each other, each of lines against the load, with one legend: all have the same lines."""
    drawn = {}
    for name, lines in panels.items():
        series = [Series(line, points, dashed=line in dashed, dots=True) for line, points in lines.items() if points]
        if series:
            drawn[name] = series
    if not drawn:
        return
    height = TITLE + LEGEND + len(drawn) * (HEIGHT + TITLE)
    out = [f'<text x="70" y="20" style="font-size:15px;font-weight:600">{escape(title)}</text>']
    first = next(iter(drawn.values()))
    for i, one in enumerate(first):
        out.append(f'<rect x="{70 + i * COLUMN}" y="{TITLE + 4}" width="18" height="10" fill="{colour_of(first, i)}"/>')
        out.append(f'<text x="{94 + i * COLUMN}" y="{TITLE + 13}">{escape(one.name)}</text>')
    for row, (name, series) in enumerate(drawn.items()):
        top = TITLE + LEGEND + row * (HEIGHT + TITLE)
        out.append(f'<text x="70" y="{top + 14}" style="font-weight:600">{escape(name)}</text>')
        inner = plot(series, Axes("load, as a multiple of measured capacity", y))
        out.append(f'<g transform="translate(0 {top + 14})">{inner}</g>')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">'
        f'<style>{STYLE}</style><rect width="100%" height="100%" fill="#fff"/>{"".join(out)}</svg>\n'
    )
