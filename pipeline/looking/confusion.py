"""A confusion matrix as a picture: the matrix where its names can be read, else the most frequent confusions.

Axes: K classes; matrix[t, p] counts pixels of true class t predicted as p.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cache.files import whole_file

READABLE = 40  # classes up to which a page-wide matrix's names can be read
NUM_PAIRS = 30  # bars: a page of them
CELL, MARGIN = 0.3, 2.2  # inches: a class's row, and the room for names
ANNOTATED = 24  # classes up to which a cell has room for its number
# A perceptually uniform colour map that survives grey printing and colour blindness (matplotlib's cividis).
COLOURS = "cividis"


def confusion_picture(
    matrix: np.ndarray, classes: Sequence[str], unseen: Collection[str], path: Path, title: str
) -> None:
    """Writes a PNG: rows divided by their sums up to READABLE classes, else bars of confused pairs.

    Shapes: matrix (K, K) counts. Unseen classes carry a star.
    """
    names = [f"{name}*" if name in unseen else name for name in classes]
    draw = _matrix if len(names) <= READABLE else _pairs
    figure = draw(np.asarray(matrix, np.float64), names)
    figure.suptitle(title + (" (* unseen)" if unseen else ""), fontsize=10)
    FigureCanvasAgg(figure)
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})


def _matrix(matrix: np.ndarray, names: Sequence[str]) -> Figure:
    side = MARGIN + CELL * max(len(names), 6)
    figure = Figure((side + 0.8, side), layout="constrained")
    axes = figure.add_subplot()
    shares = row_shares(matrix)
    shown = axes.imshow(100 * shares, cmap=COLOURS, vmin=0, vmax=100)
    places = np.arange(len(names))
    axes.set_xticks(places, names, rotation=90, fontsize=8)
    axes.set_yticks(places, names, fontsize=8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("truth")
    for truth, guess in np.argwhere(shares >= 0.005) if len(names) <= ANNOTATED else ():
        share = shares[truth, guess]
        ink = "black" if share > 0.5 else "white"
        axes.text(guess, truth, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=ink)
    figure.colorbar(shown, ax=axes, shrink=0.6, label="percent of the true class's pixels")
    return figure


def _pairs(matrix: np.ndarray, names: Sequence[str]) -> Figure:
    pairs = confused_pairs(matrix, NUM_PAIRS)
    figure = Figure((8, 1.2 + 0.24 * max(len(pairs), 3)), layout="constrained")
    axes = figure.add_subplot()
    total, of_class = matrix.sum(), row_shares(matrix)
    shares = [100 * matrix[pair] / total for pair in pairs]
    bars = axes.barh(range(len(pairs)), shares, color="#0072B2")  # blue of Okabe and Ito's set
    axes.bar_label(bars, [f"{100 * of_class[pair]:.0f} % of its class" for pair in pairs], fontsize=7, padding=3)
    axes.set_yticks(range(len(pairs)), [f"{names[t]} → {names[p]}" for t, p in pairs], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.2, y=0.01)
    axes.set_xlabel("percent of all labelled pixels: truth → predicted")
    return figure


def row_shares(matrix: np.ndarray) -> np.ndarray:
    """Each row divided by its sum; 0 in the row of a class without pixels. (K, K), 0..1."""
    sums = matrix.sum(1, keepdims=True)
    return np.divide(matrix, sums, out=np.zeros(matrix.shape), where=sums > 0)


def confused_pairs(matrix: np.ndarray, num: int) -> list[tuple[int, int]]:
    """The (truth, prediction) pairs of different classes with most pixels, most first; none without any."""
    wrong = np.array(matrix, np.float64)
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:num]
    places = zip(*np.unravel_index(order, wrong.shape), strict=True)
    return [(int(t), int(p)) for t, p in places if wrong[t, p]]
