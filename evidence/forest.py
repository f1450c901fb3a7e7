"""Contrasts as a picture: each variant's hIoU against the full method's, ours with its spread and the paper's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cache.files import whole_file
from evidence.verdicts import OPPOSITE, UNRESOLVED, Contrast

OURS, PAPER, FAINT = "#0072B2", "#D55E00", "#777777"  # Okabe and Ito's; told apart by their marks too
LINE, WIDTH, MARGIN = 0.32, 9.0, 1.1  # inches: a variant's height, the picture's width, room for the axis


@dataclass(frozen=True)
class Line:
    """A variant: its label, ours, and the paper's difference if it has one."""

    label: str
    ours: Contrast
    paper: float | None = None


def draw_forest(tables: Mapping[str, Sequence[Line]], path: Path) -> bool:
    """Writes a PNG; tables without a line are left out. Without any line there is no picture: False."""
    tables = {title: lines for title, lines in tables.items() if lines}
    if not tables:
        path.unlink(missing_ok=True)
        return False
    heights = [len(lines) + 0.7 for lines in tables.values()]
    figure = Figure((WIDTH, LINE * sum(heights) + 0.25 * len(heights) + MARGIN), layout="constrained")
    parts = figure.subplots(len(tables), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, lines) in zip(parts, tables.items(), strict=True):
        axes.axvline(0, color=FAINT, linewidth=0.8)
        for place, line in enumerate(lines):
            ours, is_sure = line.ours, not line.ours.verdict.startswith(UNRESOLVED)
            axes.errorbar(
                ours.difference,
                place,
                xerr=ours.spread,
                fmt="o",
                color=OURS,
                capsize=3,
                mfc=OURS if is_sure else "white",
            )
            if line.paper is not None:
                axes.plot(line.paper, place, "D", color=PAPER, mfc="none", markersize=6)
            axes.annotate(
                ours.verdict,
                (1.01, place),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=8,
                color=FAINT if not is_sure else "black",
                fontweight="bold" if ours.verdict == OPPOSITE else "normal",
            )
        axes.set_yticks(range(len(lines)), [line.label for line in lines], fontsize=8)
        axes.set_ylim(len(lines) - 0.5, -0.5)
        axes.set_title(title, fontsize=9, loc="left")
        axes.grid(axis="x", alpha=0.3)
    parts[-1].set_xlabel(
        "hIoU against the full method, points: dot ours (hollow: not resolved; bar: the larger spread)"
        + (", diamond the paper's" if any(line.paper is not None for part in tables.values() for line in part) else ""),
        fontsize=8,
    )
    FigureCanvasAgg(figure)
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    return True
