"""Line plots as SVG, small multiples, without a library: text that a browser, GitHub and a diff can read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#555555", "#d1495b", "#2e86ab", "#3a7d44", "#e0a030")
WIDTH, HEIGHT = 300, 210  # of a panel, with its margins
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 30, 36
SPREAD = 1.6  # pixels between the marks of series at the same x


@dataclass(frozen=True, slots=True)
class Series:
    """A line: points (x, y, half the width of y's interval)."""

    name: str
    points: Sequence[tuple[float, float, float]]


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot; `log` for a logarithmic y axis."""

    title: str
    series: Sequence[Series]
    log: bool = False


def draw(panels: Sequence[Panel], *, columns: int, x_label: str) -> str:
    """The SVG document: panels in rows, one legend below."""
    rows = -(-len(panels) // columns)
    width, height = columns * WIDTH, rows * HEIGHT + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for place, panel in enumerate(panels):
        parts.append(f'<g transform="translate({place % columns * WIDTH},{place // columns * HEIGHT})">')
        parts += _panel(panel, x_label)
        parts.append("</g>")
    for place, series in enumerate(panels[0].series):
        x, y, colour = LEFT + place * 110, height - 12, COLOURS[place]
        parts.append(f'<line x1="{x}" y1="{y - 4}" x2="{x + 18}" y2="{y - 4}" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{x + 24}" y="{y}">{escape(series.name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel, x_label: str) -> Iterable[str]:
    xs = sorted({x for series in panel.series for x, _, _ in series.points})
    lows = [y - half for series in panel.series for _, y, half in series.points]
    highs = [y + half for series in panel.series for _, y, half in series.points]
    positive = min(y for series in panel.series for _, y, _ in series.points)
    # no line of an interval leads below 0 where every point is above
    floor = positive / 3 if panel.log else 0.0 if positive >= 0 else -math.inf
    low, high, ticks = _axis(max(min(lows), floor), max(highs), panel.log)
    inner_width, inner_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    pad = 0.06 * (xs[-1] - xs[0])

    def at_x(x: float) -> float:
        return LEFT + (x - xs[0] + pad) / (xs[-1] - xs[0] + 2 * pad) * inner_width

    def at_y(y: float) -> float:
        share = math.log(max(y, low) / low) / math.log(high / low) if panel.log else (max(y, low) - low) / (high - low)
        return TOP + (1 - share) * inner_height

    yield f'<text x="{LEFT}" y="18" font-weight="bold">{escape(panel.title)}</text>'
    for tick in ticks:
        y = at_y(tick)
        yield f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="#e4e4e4"/>'
        yield f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end" fill="#444">{tick:,.6g}</text>'
    for x in xs:
        yield f'<text x="{at_x(x):.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle" fill="#444">{x:g}</text>'
    yield f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end" fill="#444">{escape(x_label)}</text>'
    for place, series in enumerate(panel.series):
        shift = (place - (len(panel.series) - 1) / 2) * SPREAD
        points = [(at_x(x) + shift, at_y(y), at_y(y - half), at_y(y + half)) for x, y, half in series.points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in points)
        yield f'<polyline points="{line}" fill="none" stroke="{COLOURS[place]}" stroke-width="2"/>'
        for x, y, below, above in points:
            yield f'<line x1="{x:.1f}" y1="{below:.1f}" x2="{x:.1f}" y2="{above:.1f}" stroke="{COLOURS[place]}"/>'
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{COLOURS[place]}"/>'


def _axis(low: float, high: float, log: bool) -> tuple[float, float, list[float]]:
    """Round ends and ticks around the values."""
    if log:
        ends = 10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high))
        ticks = [10.0**e for e in range(round(math.log10(ends[0])), round(math.log10(ends[1])) + 1)]
        return ends[0], ends[1], ticks
    low = 0.0 if 0 <= low < 0.6 * high else low
    step = 10.0 ** math.floor(math.log10((high - low) or 1.0))
    step *= next(f for f in (0.2, 0.5, 1.0, 2.0) if (high - low) / (f * step) <= 6)
    first, last = math.floor(low / step), math.ceil(high / step)
    return first * step, last * step, [n * step for n in range(first, last + 1)]
