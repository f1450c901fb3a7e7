"""What the pixels of a training image are taught to be, by recipe.

clip_teacher: the labels of seen classes; potential objects and the CLS token come beside them, view by view.
clip_es: a mask made from what `cams` cached. The threshold of its confidence is applied here and nowhere else, so
that sweeping it recomputes nothing.

Axes: n classes of one image, H x W its own pixels, g_h x g_w its token grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.config import Config
from pipeline.data.base import IGNORE, DataError, DataSet, Sample
from pipeline.ops.masks import mask_and_confidence

NO_CLASS = 255  # cache schema, array `cam_class`: no further class
BEYOND = 255  # cache schema, array `mask`: beyond the image
CERTAIN = 200  # cache schema, array `confidence`: what stands for 1
Cached = Callable[[str], np.ndarray]  # the row of an array


@dataclass(frozen=True)
class Targets:
    """Where a recipe's labels come from.

    `arrays` are the cache's that it reads, beside the boxes; `by_view` those of them that have an entry for every
    view, and are parts of an item; `labels` makes (H, W) uint8 at the image's own size, or None for an image
    that has none.
    """

    arrays: tuple[str, ...]
    by_view: tuple[str, ...]
    labels: Callable[[Config, DataSet, Sample, Cached, tuple[int, int]], np.ndarray | None]


def seen_labels(
    config: Config, data: DataSet, sample: Sample, cached: Cached, size: tuple[int, int]
) -> np.ndarray | None:
    """The data set's labels of seen classes."""
    return data.seen_labels(sample)


def labels_of_cams(
    config: Config, data: DataSet, sample: Sample, cached: Cached, size: tuple[int, int]
) -> np.ndarray:
    """The mask that an image's CAMs make; pixels whose confidence is below the threshold are ignored."""
    ids, (height, width) = cached("cam_class"), cached("cam_shape")
    classes = [int(i) for i in ids[ids != NO_CLASS]]
    cam = torch.from_numpy(cached("cam")[: len(classes), :height, :width].astype(np.float32))
    mask, confidence = mask_and_confidence(cam, classes, _background(data), size, config.cams.power)
    return mask.where(confidence >= config.train.confidence, IGNORE).numpy()


def labels_of_masks(
    config: Config, data: DataSet, sample: Sample, cached: Cached, size: tuple[int, int]
) -> np.ndarray:
    """The refined mask, to the nearest pixel of the image; not confident ones are ignored."""
    mask, confidence = cached("mask"), cached("confidence")
    is_image = mask != BEYOND
    rows, columns = (
        _nearest(int(is_image.any(axis).sum()), side) for axis, side in zip((1, 0), size, strict=True)
    )
    at = np.ix_(rows, columns)
    return np.where(confidence[at] >= CERTAIN * config.train.confidence, mask[at], IGNORE).astype(np.uint8)


def _nearest(found: int, wanted: int) -> np.ndarray:
    """The pixel under each of `wanted` pixels' centres, of `found` along a side."""
    return (2 * np.arange(wanted) + 1) * found // (2 * wanted)


def _background(data: DataSet) -> int:
    if data.background is None:
        raise DataError(
            f"{data.name}: has no background class, and clip_es's masks have one: set data.background."
        )
    return data.background


def targets_of(config: Config, data: DataSet) -> Targets:
    """The recipe's. Raises: DataError when clip_es is to train on classes that are unseen, or on no background."""
    if config.recipe == "clip_es":
        _background(data)
        if data.unseen:
            raise DataError(
                f"{data.name}: {', '.join(data.unseen[:3])} are unseen, and clip_es learns all classes from images' labels: "
                "set data.unseen to []."
            )
    key = "masks" if config.recipe == "clip_es" and config.cams.refine != "none" else config.recipe
    return TARGETS[key]


TARGETS = {
    "clip_teacher": Targets(("cls", "pseudo"), ("cls", "pseudo"), seen_labels),
    "clip_es": Targets(("cam", "cam_class", "cam_shape"), (), labels_of_cams),
    "masks": Targets(("mask", "confidence"), (), labels_of_masks),  # clip_es with cams.refine
}
