"""What a page says of results in numbers and charts, of one run or of several side by side.

Axes: K classes. A confusion matrix is (K, K) pixel counts, rows truth, columns prediction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np
from markupsafe import Markup

from pipeline.config import Config
from pipeline.data.base import DataSet
from pipeline.looking import charts, facts
from pipeline.looking.confusion import confused_pairs, row_shares
from pipeline.looking.facts import SCORES, Run
from pipeline.looking.panels import data_uri, hex_colour, indexed
from pipeline.looking.tagged import percent_palette
from pipeline.running.manifests import found_manifest

SWEPT = tuple(SCORES)[1:]
LOSS_TERMS = {
    "total": "total",
    "global": "global (GLM)",
    "generate": "generate (VLA)",
    "ce": "cross-entropy",
    "focal": "focal",
    "dice": "dice",
    "lr": "learning rate",
    "potential": "potential objects a batch",
}
TAKEN_FOR = 4  # most frequent predictions listed for an unseen class
LARGEST = 10  # confusions listed beside a matrix
NO_PIXEL = 255  # code of a matrix's cell whose class has no test pixel


def per_class(runs: Sequence[Run], data: DataSet) -> list[dict[str, Any]]:
    """IoU class by class, the first run's best first, classes that occur nowhere last."""
    found = [(run.letter, run.metrics["per_class"]) for run in runs if run.metrics]
    if not found:
        return []
    colours = {name: hex_colour(data.palette[i]) for i, name in enumerate(data.classes)}
    unseen = runs[0].metrics["unseen"] if runs[0].metrics else ()
    rows = [
        {
            "name": name,
            "ious": [(letter, values.get(name)) for letter, values in found],
            "is_unseen": name in unseen,
            "colour": colours.get(name, "#888888"),
        }
        for name in found[0][1]
    ]
    return sorted(rows, key=lambda row: -1.0 if row["ious"][0][1] is None else row["ious"][0][1], reverse=True)


def confusion_of(config: Config, data: DataSet) -> np.ndarray | None:
    """The evaluation's matrix; None when there is none, or it is of other classes."""
    path = facts.metrics_path(config).with_name("confusion.npy")
    try:
        matrix = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):  # none, or none that can be read
        return None
    is_one = isinstance(matrix, np.ndarray) and np.issubdtype(matrix.dtype, np.integer)
    return matrix if is_one and matrix.shape == (len(data.classes),) * 2 else None


def confusions(runs: Sequence[Run], data: DataSet) -> list[dict[str, Any]]:
    """Run by run the matrix as a picture, the largest mistakes, and what unseen pixels are taken for."""
    found = []
    for run in runs:
        matrix = confusion_of(run.config, data) if run.metrics else None
        if matrix is None or not matrix.any():
            continue
        order = [*data.seen_ids, *data.unseen_ids]
        picture = indexed(shares(matrix)[np.ix_(order, order)], percent_palette(), clear=NO_PIXEL)
        found.append(
            {
                "letter": run.letter,
                "name": run.config.name,
                "uri": data_uri("image/png", picture),
                "largest": largest(matrix, data),
                "taken_for": taken_for(matrix, data),
            }
        )
    return found


def shares(matrix: np.ndarray) -> np.ndarray:
    """Each row in percent of its class's pixels: (K, K) uint8, NO_PIXEL in the rows of classes without any."""
    percent = np.round(100 * row_shares(matrix)).astype(np.uint8)
    return np.where(matrix.any(1, keepdims=True), percent, np.uint8(NO_PIXEL))


def largest(matrix: np.ndarray, data: DataSet) -> list[dict[str, Any]]:
    """The most frequent mistakes: truth, prediction, and the share of the truth's pixels in percent."""
    return [
        {
            "truth": data.classes[t],
            "guess": data.classes[p],
            "is_unseen": t in data.unseen_ids,
            "share": 100 * int(matrix[t, p]) / int(matrix[t].sum()),
            "pixels": int(matrix[t, p]),
        }
        for t, p in confused_pairs(matrix, LARGEST)
    ]


def taken_for(matrix: np.ndarray, data: DataSet) -> list[dict[str, Any]]:
    """For every unseen class, what its test pixels were predicted as: shares in percent, largest first."""
    rows = []
    for i in data.unseen_ids:
        total = int(matrix[i].sum())
        order = [int(j) for j in np.argsort(-matrix[i], kind="stable")[:TAKEN_FOR] if matrix[i][j]]
        found = [
            {
                "name": data.classes[j],
                "share": 100 * int(matrix[i][j]) / total,
                "is_right": j == i,
                "colour": hex_colour(data.palette[j]),
            }
            for j in order
        ]
        if total:
            rows.append({"name": data.classes[i], "shares": found})
    return rows


def gamma_charts(runs: Sequence[Run]) -> list[tuple[str, Markup]]:
    """The sweeps: of one run its three scores in one chart, of several a chart a score."""
    gammas = {run.metrics["gamma"] for run in runs if run.metrics}
    sweeps = {run.letter: _sweep(run.metrics) for run in runs if run.metrics and run.metrics["gamma_sweep"]}
    if not sweeps:
        return []
    if len(sweeps) == 1:
        ((_, sweep),) = sweeps.items()
        series = {SCORES[key]: sweep[key] for key in SWEPT}
        return [("", _gamma_chart(series, "mIoU of seen and unseen classes and hIoU over gamma", gammas))]
    drawn = []
    for key in SWEPT:
        series = {letter: sweep[key] for letter, sweep in sweeps.items()}
        drawn.append((SCORES[key], _gamma_chart(series, f"{SCORES[key]} over gamma, run by run", gammas)))
    return drawn


def _sweep(metrics: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
    points = sorted((float(gamma), values) for gamma, values in metrics["gamma_sweep"].items())
    return {key: [(gamma, v[key]) for gamma, v in points if v.get(key) is not None] for key in SWEPT}


def _gamma_chart(series: Mapping[str, charts.Points], what: str, gammas: Set[float]) -> Markup:
    return Markup(
        charts.line_chart(
            series,
            what=what,
            x_name="gamma",
            y_name="percent",
            mark_x=(next(iter(gammas)), "configured") if len(gammas) == 1 else None,
            dots=True,
            width=520,
            height=280,
        )
    )


def loss_charts(runs: Sequence[Run]) -> list[tuple[str, Markup]]:
    """A chart a term, a line a run."""
    curves = {run.letter: facts.losses(run.config) for run in runs}
    drawn = []
    for key, title in LOSS_TERMS.items():
        series = {
            letter or title: [(float(row["iteration"]), float(row[key])) for row in curve if key in row]
            for letter, curve in curves.items()
        }
        chart = charts.line_chart(series, what=f"{title} over iterations", x_name="iteration")
        if chart:
            drawn.append((title, Markup(chart)))
    return drawn


def time_shares(run: Run) -> list[tuple[str, float]]:
    """Where a training step's time went, in percent."""
    last = (facts.losses(run.config) or [{}])[-1]
    return [
        (key.removeprefix("time/"), 100 * value)
        for key, value in last.items()
        if key.startswith("time/") and key != facts.ELAPSED
    ]


def objects_chart(config: Config) -> Markup:
    summary = (found_manifest(config, "cluster") or {}).get("summary", {})
    histogram = summary.get("objects_histogram", {})
    counts = {int(num): views for num, views in histogram.items() if num.isdecimal()}
    bars = [(str(num), float(counts.get(num, 0))) for num in range(min(counts), max(counts) + 1)] if counts else []
    what = "views by number of potential objects"
    return Markup(charts.bar_chart(bars, what=what, x_name="potential objects in a view", y_name="views"))
