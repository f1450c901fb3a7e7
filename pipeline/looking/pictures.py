"""A few training images as the student sees them now, for the tracker.

A row each: the image; its seen labels and potential objects; the seen class that the student predicts;
GLM's attention. No unseen name or label is shown, training has none.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pipeline.learning.batches import CachedViews
from pipeline.learning.objective import Learner
from pipeline.looking.panels import object_palette
from pipeline.models.glm import attention_over_largest
from pipeline.ops.labels import IGNORE
from pipeline.ops.losses import PSEUDO_IDS, logits

NUM_IMAGES = 4  # the first of the cache: the same ones whenever and wherever
OPTIONS: dict[str, dict[str, Any]] = {"tensorboard": {"dataformats": "NHWC"}}  # of a tracker's log_images


@torch.no_grad()
def pictures(learner: Learner, student: Any, views: CachedViews) -> np.ndarray:
    """(1, N S, 4 S, 3) uint8, an image a row: image, labels and potential objects, prediction, attention."""
    device = learner.text_seen.device
    items = [views.whole(row) for row in views.rows[:NUM_IMAGES]]
    was_training = student.training
    student.eval()
    rows = []
    for item in items:
        image, labels = item["image"], item["labels"]
        dense = student(image[None].to(device).float()).float()  # (1, C, H, W)
        best = logits(dense, learner.text_seen, learner.text_seen[:0]).argmax(1)[0]  # (H, W)
        weight = attention_over_largest(item["cls"].to(device), dense[0], views.config.train.glm_length)
        panels = [
            image.permute(1, 2, 0).numpy(),
            _labels(views, labels, item["pseudo"]),
            views.data.palette[learner.seen_ids[_enlarged(best, labels.shape)].cpu().numpy()],
            (255 * _enlarged(weight, labels.shape).cpu().numpy())[..., None].repeat(3, 2).astype(np.uint8),
        ]
        rows.append(np.concatenate(panels, axis=1))
    student.train(was_training)
    return np.concatenate(rows)[None]


def _enlarged(plane: Tensor, size: torch.Size) -> Tensor:
    """(H, W) -> (S, S) by nearest."""
    return interpolate(plane[None, None].float(), size, mode="nearest-exact")[0, 0].to(plane.dtype)


def _labels(views: CachedViews, labels: Tensor, pseudo: Tensor) -> np.ndarray:
    """Seen labels in the data set's colours, elsewhere potential objects in theirs; black for neither."""
    objects = _enlarged(pseudo, labels.shape).numpy()
    shown = object_palette()[np.where(objects < PSEUDO_IDS, objects, 0)]
    is_seen = (labels != IGNORE).numpy()
    shown[is_seen] = views.data.palette[labels.numpy()[is_seen]]
    return shown


def show(trackers: list[Any], images: np.ndarray, iteration: int) -> None:
    """Hands pictures to every tracker that takes some."""
    for tracker in trackers:
        if hasattr(tracker, "log_images"):
            tracker.log_images({"fixed batch": images}, step=iteration, **OPTIONS.get(tracker.name, {}))
