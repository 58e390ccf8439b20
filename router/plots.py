"""Plots as SVG text, with no library and no script: lines and points on two axes, and bars with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# Eight hues that keep apart on light and on dark paper, also for the colour-blind (after Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#8b5cf6", "#7f7f7f")
WIDTH, HEIGHT = 860, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 24, 16, 52
Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A line through points in order of x; `dots` marks them, `dashed` is for a reference."""

    name: str
    points: Sequence[Point]
    dashed: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Axes:
    """What the axes say; `log`: x by its logarithm."""

    x: str
    y: str
    log: bool = False


def colour_of(series: Sequence[Series], index: int) -> str:
    """References are grey; the others take the colours in order."""
    if series[index].dashed:
        return "var(--soft)"
    return COLOURS[sum(not s.dashed for s in series[:index]) % len(COLOURS)]


def plot(series: Sequence[Series], axes: Axes, labelled: Sequence[tuple[str, float, float]] = ()) -> str:
    """An `<svg>` of lines and of labelled points (name, x, y)."""
    xs = [x for s in series for x, _ in s.points] + [x for _, x, _ in labelled]
    ys = [y for s in series for _, y in s.points] + [y for _, _, y in labelled]
    across = _Scale(xs, LEFT, WIDTH - RIGHT, axes.log)
    up = _Scale(ys, HEIGHT - BOTTOM, TOP)
    out = [_frame(axes, across, up)]
    for i, s in enumerate(series):
        colour, path = colour_of(series, i), " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in s.points)
        dash = ' stroke-dasharray="6 5"' if s.dashed else ""
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        if s.dots:
            out += [f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="3.5" fill="{colour}"/>' for x, y in s.points]
    taken: list[tuple[float, float, float]] = []
    for name, x, y in labelled:
        px, py = across(x), up(y)
        end = px > WIDTH * 0.75
        left = px - 8 - 6.6 * len(name) if end else px + 8
        row = py + 4
        while any(abs(row - r) < 13 and left < b and a < left + 6.6 * len(name) for a, b, r in taken):
            row += 13
        taken.append((left, left + 6.6 * len(name), row))
        anchor = ' text-anchor="end"' if end else ""
        out.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" fill="var(--ink)"/>')
        out.append(f'<text x="{px - 8 if end else px + 8:.1f}" y="{row:.1f}"{anchor}>{escape(name)}</text>')
    return _svg(HEIGHT, out)


def bars(values: Sequence[tuple[str, float, float]], marks: Sequence[tuple[str, float]], title: str) -> str:
    """An `<svg>` of horizontal bars (name, value, half width of its interval), with vertical marks (name, value)."""
    step, left = 26, 120
    bottom = TOP + step * len(values)
    height = bottom + BOTTOM + 13 * len(marks)
    ends = [0.0, *(v + s * e for _, v, e in values for s in (-1, 1)), *(v for _, v in marks)]
    across = _Scale(ends, left, WIDTH - RIGHT)
    out = []
    for tick in across.ticks():
        x = across(tick)
        out.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
        out.append(_note(x, bottom + 16, across.label(tick)))
    zero = across(0.0)
    for row, (name, value, error) in enumerate(values):
        y = TOP + step * row + step / 2
        x, a, b = across(value), across(value - error), across(value + error)
        colour = COLOURS[0] if value > 0 else COLOURS[1]
        out.append(f'<text x="{left - 10}" y="{y + 4:.1f}" text-anchor="end">{escape(name)}</text>')
        out.append(
            f'<rect x="{min(zero, x):.1f}" y="{y - 8:.1f}" width="{abs(x - zero):.1f}" height="16" fill="{colour}"/>'
        )
        out.append(
            f'<line x1="{a:.1f}" x2="{b:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--ink)" stroke-width="1.5"/>'
        )
    for number, (name, value) in enumerate(marks):
        x = across(value)
        out.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}" stroke="var(--soft)" stroke-dasharray="4 4"/>'
        )
        right = x > WIDTH * 0.8
        at, anchor = (x - 4, "end") if right else (x + 4, "start")
        out.append(_note(at, bottom + 28 + 13 * number, f"{name} {value:+.4f}", anchor))
    out.append(f'<line class="frame" x1="{zero:.1f}" x2="{zero:.1f}" y1="{TOP}" y2="{bottom}"/>')
    out.append(_note((left + WIDTH - RIGHT) / 2, height - 12, title))
    return _svg(height, out)


def legend(series: Sequence[Series]) -> str:
    """The names beside their colours, as HTML."""
    items = (
        f'<span><i style="background:{colour_of(series, i)}"></i>{escape(s.name)}</span>' for i, s in enumerate(series)
    )
    return f'<div class="legend">{"".join(items)}</div>'


class _Scale:
    """Values to pixels, with a margin and round ticks."""

    def __init__(self, values: Sequence[float], start: float, stop: float, log: bool = False) -> None:
        self.log = log
        found = [self._in(v) for v in values]
        low, high = min(found), max(found)
        margin = 0.04 * (high - low) or 0.05 * abs(high) or 0.5
        self.low, self.high, self.start, self.stop = low - margin, high + margin, start, stop

    def _in(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def __call__(self, value: float) -> float:
        return self.start + (self._in(value) - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        if self.log:
            powers = range(math.floor(self.low), math.ceil(self.high) + 1)
            found = [m * 10.0**p for p in powers for m in (1, 2, 5) if self.low <= math.log10(m * 10.0**p) <= self.high]
            return found
        rough = (self.high - self.low) / 6
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(m * size for m in (1, 2, 5, 10) if m * size >= rough)
        first = math.ceil(self.low / step)
        return [i * step for i in range(first, math.floor(self.high / step) + 1)]

    def label(self, value: float) -> str:
        return f"{value:.0e}" if self.log else f"{round(value, 10):g}"


def _frame(axes: Axes, across: _Scale, up: _Scale) -> str:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    out = []
    for tick in across.ticks():
        x = across(tick)
        out.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
        out.append(_note(x, bottom + 16, across.label(tick)))
    for tick in up.ticks():
        y = up(tick)
        out.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(_note(LEFT - 8, y + 4, up.label(tick), "end"))
    out.append(f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{right - LEFT}" height="{bottom - TOP}"/>')
    middle = (TOP + bottom) / 2
    out.append(_note((LEFT + right) / 2, HEIGHT - 12, axes.x))
    out.append(f'<g transform="translate(16 {middle}) rotate(-90)">{_note(0, 0, axes.y)}</g>')
    return "".join(out)


def _note(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" height="{height:g}" role="img">{"".join(parts)}</svg>'
    )
