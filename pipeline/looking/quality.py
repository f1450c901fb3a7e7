"""Coverage and purity before training: how much of the views is ignored area, and how well objects follow classes.

Axes: h x w the token grid. Truth is read for this picture alone.
"""

from __future__ import annotations

import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas

from cache.store import SIDES, Store
from pipeline.data.base import BadImage, DataError, DataSet
from pipeline.looking.gallery import spread
from pipeline.ops.fusion import PSEUDO_PADDING, is_object, num_objects
from pipeline.ops.labels import IGNORE
from pipeline.teaching.pseudo import token_states

PROBED = 400  # images looked at: a percent or two of error in a share
MOST_CLASSES = 30  # bars whose names can be read
LEAST_SHARE = 0.01  # of the ignored tokens: below it a bar would speak of a few tokens at an edge
SEEN, UNSEEN = "#0072B2", "#D55E00"  # blue and vermilion of Okabe and Ito's set


def quality_picture(store: Store, data: DataSet, done: set[int]) -> tuple[str, bytes]:
    """Caption and PNG: objects a view, ignored area a view, and purity class by class where labels are known."""
    rows = [row for shard in sorted(done) for row in store.rows(shard)]
    rows = [rows[i] for i in spread(len(rows), PROBED)]
    usable = [row for row, status in zip(rows, store.read_rows("status", rows), strict=True) if status == 0]
    maps = store.read_rows("pseudo", usable)[:, 0]
    followed, tokens = purity_by_class(store, data, usable, maps)
    canvas = Canvas((9.5, 3.1), layout="constrained")
    left, middle, right = canvas.subplots(1, 3, width_ratios=(1, 1, 1.3))
    nums = [num_objects(pseudo) for pseudo in maps]
    left.bar(*np.unique(nums, return_counts=True), color=SEEN)
    left.set_xlabel("potential objects in a view")
    left.set_ylabel("views")
    middle.hist(100 * coverage(maps), bins=20, range=(0, 100), color=SEEN)
    middle.set_xlabel("ignored area, percent of a view")
    _purity_bars(right, data, followed, tokens)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    caption = f"Before training, {len(usable)} training images, whole views: potential objects, ignored area"
    if tokens.sum():
        caption += (
            f", and purity by hidden class ({100 * followed.sum() / tokens.sum():.1f} % in all; striped: unseen): the "
            "share of a class's ignored tokens that lie in an object of which it is the majority; classes with "
            f"{100 * LEAST_SHARE:.0f} % of the tokens or more"
        )
    FigureCanvasAgg(canvas)
    out = io.BytesIO()
    canvas.savefig(out, dpi=110, metadata={"Software": None})
    return caption + ".", out.getvalue()


def coverage(maps: np.ndarray) -> np.ndarray:
    """Share of ignored area in each view, padding apart: (N, h, w) uint8 -> (N,), 0 to 1."""
    inside = maps != PSEUDO_PADDING
    return is_object(maps).sum((1, 2)) / np.maximum(inside.sum((1, 2)), 1)


def purity_by_class(store: Store, data: DataSet, rows: list[int], maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By true class, ignored tokens in an object whose majority it is, and all of them; zeros without labels."""
    num, side = len(data.classes), maps.shape[-1]
    size = store.fact(SIDES, "views", "size")
    followed, tokens = np.zeros(num, np.int64), np.zeros(num, np.int64)
    listed, ids, boxes = data.by_id("train"), store.samples, store.read_rows("view", rows)
    for pseudo, row, box in zip(maps, rows, boxes, strict=True):
        sample = listed.get(ids[row])
        try:
            truth = None if sample is None else token_states(data, sample, box[:1], side, size)[1]
        except (BadImage, DataError):
            continue
        if truth is not None:
            one, all_ = majorities(pseudo, truth[0].numpy(), num)
            followed, tokens = followed + one, tokens + all_
    return followed, tokens


def majorities(pseudo: np.ndarray, truth: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray]:
    """One view of `purity_by_class`: pseudo (h, w) uint8 and truth (h, w) int16 -> two (num,) counts."""
    is_counted = is_object(pseudo) & (truth != IGNORE)
    table = np.zeros((256, num), np.int64)  # (object, class) token counts
    np.add.at(table, (pseudo[is_counted], truth[is_counted]), 1)
    followed = np.where(np.arange(num) == table.argmax(1)[:, None], table, 0).sum(0)
    return followed, table.sum(0)


def _purity_bars(axes: Axes, data: DataSet, followed: np.ndarray, tokens: np.ndarray) -> None:
    order = sorted(np.flatnonzero(tokens > LEAST_SHARE * tokens.sum()), key=lambda i: -tokens[i])[:MOST_CLASSES]
    if not order:
        axes.text(0.5, 0.5, "no full labels: purity unknown", ha="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    names = [data.classes[i] for i in order]
    bars = axes.bar(names, 100 * followed[order] / tokens[order], color=SEEN)
    for bar, i in zip(bars, order, strict=True):
        if i in data.unseen_ids:
            bar.set(facecolor=UNSEEN, hatch="//", edgecolor="white")
    axes.tick_params(axis="x", rotation=90 if len(order) > 6 else 30, labelsize=8)
    axes.set_ylabel("purity, percent")
    axes.set_ylim(0, 100)
