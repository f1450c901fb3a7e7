"""Small charts as SVG text, styled by the page around them: numbers in, markup out.

Series are told apart by dash and by the name at their end, not by colour alone; every mark has a
<title> that says its numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]

MAX_POINTS = 300  # of a curve; more would only fatten the file


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) that span low..high, about `wanted` steps apart."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / wanted))
    step = next((power * m for m in (1, 2, 5) if span / (power * m) <= wanted), power * 10)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def thinned(points: Points, limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most `limit` points: the means of equal runs of neighbours."""
    size = -(-len(points) // limit)
    runs = [points[i : i + size] for i in range(0, len(points), max(size, 1))]
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]


def line_chart(
    series: Mapping[str, Points],
    *,
    what: str,
    x_name: str,
    y_name: str = "",
    mark_x: tuple[float, str] | None = None,
    from_zero: bool = False,
    dots: bool = False,
    width: int = 360,
    height: int = 210,
) -> str:
    """Lines over a common x axis, named at their ends when there is more than one.

    `mark_x` draws a vertical line with a word; values that aren't finite are left out.
    Returns "" when nothing is left to draw.
    """
    drawn = {name: [p for p in points if math.isfinite(p[1])] for name, points in series.items()}
    drawn = {name: points for name, points in drawn.items() if points}
    if not drawn:
        return ""
    every = [point for points in drawn.values() for point in points]
    low = min(y for _, y in every)
    y_ticks = ticks(min(low, 0.0) if from_zero else low, max(y for _, y in every))
    x_low, x_high = min(x for x, _ in every), max(x for x, _ in every)
    x_ticks = [t for t in ticks(x_low, x_high) if x_low - 1e-9 <= t <= x_high + 1e-9] or [x_low]
    left, right, top, bottom = 46, 64 if len(drawn) > 1 else 14, 16, 34

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / ((x_high - x_low) or 1)
        up = (y - y_ticks[0]) / ((y_ticks[-1] - y_ticks[0]) or 1)
        return left + across * (width - left - right), height - bottom - up * (height - top - bottom)

    parts = [_frame(at, x_low, x_high, x_ticks, y_ticks, x_name, y_name, width, height)]
    if mark_x is not None:
        x, _ = at(mark_x[0], y_ticks[0])
        side = "end" if x > (left + width - right) / 2 else "start"
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - bottom}"/>')
        shift = -4 if side == "end" else 4
        parts.append(f'<text class="tick" x="{x + shift:.1f}" y="{top - 4}" text-anchor="{side}">{escape(mark_x[1])}</text>')
    ends: list[tuple[float, float, str, int]] = []
    for place, (name, points) in enumerate(drawn.items()):
        thin = thinned(points)
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*p) for p in thin))
        parts.append(f'<polyline class="line s{place % 4}" points="{path}"><title>{escape(name)}</title></polyline>')
        for point in thin if dots or len(thin) == 1 else []:
            x, y = at(*point)
            says = f"{name}: {point[1]:.4g} at {x_name} {point[0]:g}"
            parts.append(f'<circle class="dot s{place % 4}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{escape(says)}</title></circle>')
        ends.append((*at(*thin[-1]), name, place))
    if len(drawn) > 1:
        lowest = -math.inf
        for x, y, name, place in sorted(ends, key=lambda end: end[1]):
            lowest = max(y, lowest + 13)  # names keep a line's distance
            parts.append(f'<text class="name t{place % 4}" x="{x + 7:.1f}" y="{lowest + 4:.1f}">{escape(name)}</text>')
    return _svg(width, height, what, parts)


def bar_chart(
    bars: Sequence[tuple[str, float]], *, what: str, x_name: str, y_name: str, width: int = 560, height: int = 220
) -> str:
    """Vertical bars with a label each (thinned when they are many). Returns "" without bars."""
    if not bars:
        return ""
    y_ticks = ticks(0.0, max(value for _, value in bars))
    left, right, top, bottom = 46, 10, 12, 34
    room = (width - left - right) / len(bars)

    def at(x: float, y: float) -> tuple[float, float]:
        return left + x * room, height - bottom - y / y_ticks[-1] * (height - top - bottom)

    parts = [_frame(at, 0, len(bars), [], y_ticks, x_name, y_name, width, height)]
    every = max(1, -(-len(bars) // 16))
    for place, (label, value) in enumerate(bars):
        x, y = at(place, value)
        tall = height - bottom - y
        parts.append(
            f'<rect class="bar" x="{x + room * 0.1:.1f}" y="{y:.1f}" width="{room * 0.8:.1f}" height="{tall:.1f}">'
            f"<title>{escape(f'{label}: {value:g}')}</title></rect>"
        )
        if place % every == 0:
            parts.append(
                f'<text class="tick" x="{x + room / 2:.1f}" y="{height - bottom + 14}" text-anchor="middle">'
                f"{escape(label)}</text>"
            )
    return _svg(width, height, what, parts)


def _frame(
    at, x_low: float, x_high: float, x_ticks: Sequence[float], y_ticks: Sequence[float], x_name: str, y_name: str,
    width: int, height: int,
) -> str:  # fmt: skip
    """Grid lines, tick labels and the names of the axes."""
    parts = []
    for tick in y_ticks:
        (x1, y), (x2, _) = at(x_low, tick), at(x_high, tick)
        parts.append(f'<line class="grid" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{x1 - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in x_ticks:
        x, y = at(tick, y_ticks[0])
        parts.append(f'<text class="tick" x="{x:.1f}" y="{y + 14:.1f}" text-anchor="middle">{short(tick)}</text>')
    middle = (at(x_low, 0)[0] + at(x_high, 0)[0]) / 2
    parts.append(f'<text class="axis" x="{middle:.1f}" y="{height - 4}" text-anchor="middle">{escape(x_name)}</text>')
    if y_name:
        parts.append(
            f'<text class="axis" transform="translate(11 {height / 2 - 10:.0f}) rotate(-90)" text-anchor="middle">'
            f"{escape(y_name)}</text>"
        )
    return "".join(parts)


def _svg(width: int, height: int, what: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(what)}">{"".join(parts)}</svg>'
    )


def short(value: float) -> str:
    """A number for a tick: 12000 -> 12k, 2500000 -> 2.5M."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
