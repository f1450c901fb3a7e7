"""Potential objects given names: of the unseen classes that an image is tagged with, the one that CAMs see there.

Both teachers as one: CLIPTeacher's masks say where, CLIP-ES's maps say what. With it training is told which unseen
classes an image holds, so it is weakly supervised and no longer zero-shot.

Axes: n samples, V views, h = w tokens a side, K_c masks of a view at most, T tags of one image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from pipeline.config import Config
from pipeline.data.base import DataError, DataSet, Sample
from pipeline.ops.labels import IGNORE, LABEL
from pipeline.teaching.maps import explained_maps, explained_teacher, fitted


def object_names(
    config: Config,
    data: DataSet,
    samples: Sequence[Sample],
    boxes: np.ndarray,
    pseudo: np.ndarray,
    usable: np.ndarray,
    text: Tensor,
    most: int,
) -> np.ndarray:
    """The class of each potential object, of which the image's tags name one: (n, V, K_c) int16, IGNORE without.

    An object is named when the refined map of a tag, which competes with the other tags and with the seen classes
    labelled in the image, has a mean of at least cluster.named_above over it; else it stays a potential object.
    Shapes: boxes (n, V, 4), pseudo (n, V, h, w), usable (n,) bool, text (K, C) unit norm; most is K_c.
    Raises: DataError for a tag that is no class, or an image without tags to read.
    """
    names = np.full((*pseudo.shape[:2], most), IGNORE, LABEL)
    for row, sample in enumerate(samples):
        if not usable[row]:
            continue
        tags = [tag for tag in checked_tags(data, sample) if tag in data.unseen_ids]
        if not tags:
            continue
        image, labels = data.image(sample), data.seen_labels(sample)
        labelled = [] if labels is None else [int(i) for i in np.unique(labels) if i != IGNORE]
        maps = _maps(config, image, tags, labelled or data.seen_ids, text)
        for view, box in enumerate(boxes[row]):
            seen_there = on_tokens(maps, box, image.shape[:2], pseudo.shape[-1])
            names[row, view] = named(
                pseudo[row, view], seen_there.numpy(), tags, most, config.cluster.named_above or 0.0
            )
    return names


def named(pseudo: np.ndarray, maps: np.ndarray, tags: Sequence[int], most: int, above: float) -> np.ndarray:
    """The tag of each mask 1..most with the highest mean over it, IGNORE where that lies below `above` or no mask is.

    Shapes: pseudo (h, w), maps (T, h, w), 0 to 1 -> (most,) int16.
    """
    names = np.full(most, IGNORE, LABEL)
    for mask in range(1, most + 1):
        inside = pseudo == mask
        if inside.any():
            means = maps[:, inside].mean(1)
            if means.max() >= above:
                names[mask - 1] = tags[int(means.argmax())]
    return names


def on_tokens(maps: Tensor, box: np.ndarray, size: tuple[int, ...], side: int) -> Tensor:
    """Maps of a whole image, read bilinearly at the centres of a view's tokens: (T, g_h, g_w) -> (T, side, side).

    `box` in pixels of the image, whose size is (H, W); beyond the image the nearest value counts.
    """
    x0, y0, x1, y1 = (float(value) for value in box)
    centre = (torch.arange(side) + 0.5) / side
    rows = 2 * (y0 + centre * (y1 - y0)) / size[0] - 1  # -1 and 1 are the image's edges
    columns = 2 * (x0 + centre * (x1 - x0)) / size[1] - 1
    grid = torch.stack([columns.expand(side, side), rows[:, None].expand(side, side)], 2)
    return grid_sample(maps[None], grid[None], padding_mode="border", align_corners=False)[0]


def _maps(config: Config, image: np.ndarray, tags: Sequence[int], others: Sequence[int], text: Tensor) -> Tensor:
    """The refined maps of an image's tags, which compete with one another and with `others`: (T, g_h, g_w)."""
    teacher = explained_teacher(config.teacher, config.cams)
    text = text.to(teacher.device)
    pixels = fitted(image, config.cams, teacher.patch)[None]
    maps, _ = explained_maps(teacher, config.cams, pixels, [tags], text, text[list(others)])
    return maps[0]


def checked_tags(data: DataSet, sample: Sample) -> tuple[int, ...]:
    """The image-level labels of an image. Raises: DataError for one that is no class, or is the background."""
    tags = data.tags(sample)
    strange = [tag for tag in tags if not 0 <= tag < len(data.classes) or tag == data.background]
    if strange:
        raise DataError(
            f"{data.name}: image {sample.id} has the label {strange[0]}, which is none of its "
            f"{len(data.classes) - (data.background is not None)} foreground classes. Correct its list of labels."
        )
    return tuple(tags)
