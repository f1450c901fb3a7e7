"""How well the student does on held-out training images, seen classes alone: no unseen label chooses a model.

Axes: S seen classes, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchmetrics.classification import MulticlassConfusionMatrix

from pipeline.learning.batches import CachedViews
from pipeline.ops.labels import IGNORE
from pipeline.ops.losses import LABEL_VALUES, logits
from pipeline.ops.metrics import iou_per_class


@dataclass
class Best:
    """The best validation so far; travels in the checkpoint, so that a resumed run decides alike."""

    score: float = -1.0  # percent
    iteration: int = 0
    num_worse: int = 0  # validations since

    def better(self, score: float, iteration: int) -> bool:
        """Takes a validation into account; whether it is the best one."""
        if score > self.score:
            self.score, self.iteration, self.num_worse = score, iteration, 0
            return True
        self.num_worse += 1
        return False


@torch.no_grad()
def seen_miou(student: nn.Module, views: CachedViews, text_seen: Tensor, seen_ids: Tensor) -> float:
    """mIoU in percent over the seen classes, on the held-out images' pixels with a seen label.

    The student chooses among the seen classes. Classes that occur neither in labels nor in predictions
    are left out; 0 when there is no labelled pixel at all.
    Shapes: text_seen (S, C), seen_ids (S,).
    """
    device = text_seen.device
    index = torch.full((LABEL_VALUES,), IGNORE, device=device)
    index[seen_ids] = torch.arange(len(seen_ids), device=device)
    num = max(len(seen_ids), 2)  # what torchmetrics asks for; one that never occurs is left out
    matrix = MulticlassConfusionMatrix(num, ignore_index=IGNORE).to(device)
    was_training = student.training
    student.eval()
    for row in views.held_out:
        item = views.whole(row)
        dense = student(item["image"][None].to(device).float()).float()
        scores = logits(dense, text_seen, text_seen[:0])  # (1, S, H, W)
        scores = interpolate(scores, item["labels"].shape, mode="bilinear", align_corners=False)
        matrix.update(scores.argmax(1)[0], index[item["labels"].to(device).long()])
    student.train(was_training)
    iou = iou_per_class(matrix.compute())
    known = iou[~np.isnan(iou)]
    return 100 * float(known.mean()) if known.size else 0.0
