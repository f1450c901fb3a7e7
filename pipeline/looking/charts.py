"""Small charts as SVG text, styled by the page around them: numbers in, markup out.

Series are told apart by dash and by the name at their end, not by colour alone; every mark has a
<title> that says its numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]

STYLES = 6  # lines that the style sheet tells apart, by colour and dash
STEPS = 4  # between the numbers of an axis, or one more
MAX_POINTS = 300  # of a curve; more would only fatten the file
TOP, BOTTOM, LEFT = 16, 34, 46  # room in SVG units for the mark's word, the x axis and the y axis
NAME_HEIGHT = 13  # least distance of two names at the ends of lines


@dataclass(frozen=True)
class Frame:
    """From data to SVG units: x_low..x_high across, y_low..y_high up, inside the margins."""

    width: int
    height: int
    right: int
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        share = (value - self.x_low) / ((self.x_high - self.x_low) or 1)
        return LEFT + share * (self.width - LEFT - self.right)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / ((self.y_high - self.y_low) or 1)
        return self.height - BOTTOM - share * (self.height - TOP - BOTTOM)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) that span low..high, at most STEPS + 1 steps."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / STEPS))
    step = next((power * m for m in (1, 2, 5) if span / (power * m) <= STEPS), power * 10)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def thinned(points: Points, limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most `limit` points: the means of equal runs of neighbours."""
    size = max(1, -(-len(points) // limit))
    runs = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]


def line_chart(
    series: Mapping[str, Points],
    *,
    what: str,
    x_name: str,
    y_name: str = "",
    mark_x: tuple[float, str] | None = None,
    dots: bool = False,
    width: int = 360,
    height: int = 210,
) -> str:
    """Lines from zero up over a common x axis, named at their ends when there is more than one.

    `mark_x` draws a vertical line with a word; values that aren't finite are left out.
    Returns "" when nothing is left to draw.
    """
    finite = {name: [p for p in points if math.isfinite(p[1])] for name, points in series.items()}
    drawn = {name: thinned(points) for name, points in finite.items() if points}
    if not drawn:
        return ""
    xs, ys = zip(*(point for points in drawn.values() for point in points), strict=True)
    y_ticks = ticks(min(*ys, 0.0), max(*ys, 0.0))
    is_named = len(drawn) > 1
    right = 20 + 7 * max(map(len, drawn)) if is_named else 14
    frame = Frame(width, height, right, min(xs), max(xs), y_ticks[0], y_ticks[-1])
    parts = _axes(frame, y_ticks, x_name, y_name)
    inside = [tick for tick in ticks(min(xs), max(xs)) if min(xs) <= tick <= max(xs)] or [min(xs)]
    parts += [_text("tick", frame.x(t), height - BOTTOM + 14, short(t), "middle") for t in inside]
    if mark_x is not None:
        x = frame.x(mark_x[0])
        parts += [_line("mark", x, x, TOP, height - BOTTOM), _text("tick", x + 4, TOP - 4, mark_x[1])]
    for place, (name, points) in enumerate(drawn.items()):
        path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)
        parts.append(_titled(f'polyline class="line s{place % STYLES}" points="{path}"', name))
        for x, y in points if dots or len(points) == 1 else []:
            says = f"{name}: {y:.4g} at {x_name} {x:g}"
            at = f'cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}"'
            parts.append(_titled(f'circle class="dot s{place % STYLES}" {at} r="3"', says))
    return _svg(frame, what, parts + (_end_names(frame, drawn) if is_named else []))


def _end_names(frame: Frame, drawn: Mapping[str, Points]) -> list[str]:
    """The name of each line beside its last point, pushed down where they would overlap."""
    ends = [(frame.y(points[-1][1]), place, name) for place, (name, points) in enumerate(drawn.items())]
    parts, lowest = [], -math.inf
    for y, place, name in sorted(ends):
        lowest = max(y, lowest + NAME_HEIGHT)
        parts.append(_text(f"name t{place % STYLES}", frame.width - frame.right + 7, lowest + 4, name))
    return parts


def bar_chart(bars: Sequence[tuple[str, float]], *, what: str, x_name: str, y_name: str) -> str:
    """Vertical bars with their labels (thinned when they are many). Returns "" without bars."""
    if not bars:
        return ""
    y_ticks = ticks(0.0, max(value for _, value in bars))
    frame = Frame(560, 220, 10, 0, len(bars), y_ticks[0], y_ticks[-1])
    parts = _axes(frame, y_ticks, x_name, y_name)
    every = max(1, -(-len(bars) // 16))
    for place, (label, value) in enumerate(bars):
        x, wide = frame.x(place + 0.1), frame.x(place + 0.9) - frame.x(place + 0.1)
        y, tall = frame.y(value), frame.y(0) - frame.y(value)
        box = f'x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{tall:.1f}"'
        parts.append(_titled(f'rect class="bar" {box}', f"{label}: {value:g}"))
        if place % every == 0:
            parts.append(_text("tick", x + wide / 2, frame.height - BOTTOM + 14, label, "middle"))
    return _svg(frame, what, parts)


def short(value: float) -> str:
    """A number for a tick: 12000 -> 12k, 2500000 -> 2.5M."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _axes(frame: Frame, y_ticks: Sequence[float], x_name: str, y_name: str) -> list[str]:
    """Horizontal grid lines with their numbers, and the names of both axes."""
    parts = []
    for tick in y_ticks:
        y = frame.y(tick)
        parts.append(_line("grid", LEFT, frame.width - frame.right, y, y))
        parts.append(_text("tick", LEFT - 6, y + 4, short(tick), "end"))
    middle = (LEFT + frame.width - frame.right) / 2
    parts.append(_text("axis", middle, frame.height - 4, x_name, "middle"))
    turn = f' transform="rotate(-90 11 {frame.height / 2 - 10:.1f})"'
    return parts + ([_text("axis", 11, frame.height / 2 - 10, y_name, "middle", turn)] if y_name else [])


def _line(kind: str, x1: float, x2: float, y1: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def _text(kind: str, x: float, y: float, word: str, anchor: str = "start", more: str = "") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(word)}</text>'


def _titled(tag: str, says: str) -> str:
    return f"<{tag}><title>{escape(says)}</title></{tag.split()[0]}>"


def _svg(frame: Frame, what: str, parts: Sequence[str]) -> str:
    head = f'<svg viewBox="0 0 {frame.width} {frame.height}" role="img" aria-label="{escape(what)}">'
    return head + "".join(parts) + "</svg>"
