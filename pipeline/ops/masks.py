"""From CAMs to labels: a background score, a class for every pixel, and how sure that is.

Axes: n classes of one image, g_h x g_w its token grid, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pipeline.ops.labels import IGNORE

PSEUDO_VALUES = 256  # of the 8 bits of a pseudo label


def class_scores(cam: Tensor, size: tuple[int, int], power: float) -> Tensor:
    """Scores of the background, then of each class, that sum to 1 at every pixel.

    The background's is (1 - max CAM)^power before they are normalised, so that the sum is never zero: where all
    CAMs are 0, it is 1. Shapes: cam (n, g_h, g_w) in 0..1 -> (1 + n, H, W).
    Source: CLIP-ES, method section 11.
    """
    if len(cam):
        maps = interpolate(cam[None].float(), size, mode="bilinear", align_corners=False)[0]  # (n, H, W)
        highest = maps.amax(0, keepdim=True)
    else:
        maps = torch.zeros(0, *size, device=cam.device)
        highest = torch.zeros(1, *size, device=cam.device)
    scores = torch.cat([(1 - highest).clamp(min=0) ** power, maps])
    return scores / scores.sum(0, keepdim=True)


def mask_and_confidence(
    cam: Tensor, classes: Sequence[int], background: int, size: tuple[int, int], power: float
) -> tuple[Tensor, Tensor]:
    """The class of every pixel, and its score. An image without classes is background, confidence 1.

    Shapes: cam (n, g_h, g_w) in 0..1, n class ids -> ids (H, W) int16, confidence (H, W) float32.
    Raises: ValueError when there are not as many classes as maps.
    """
    if len(cam) != len(classes):
        raise ValueError(f"{len(cam)} maps for {len(classes)} classes.")
    confidence, best = class_scores(cam, size, power).max(0)
    ids = torch.tensor([background, *classes], dtype=torch.int16, device=cam.device)
    return ids[best], confidence


def thresholded(
    cam: Tensor, classes: Sequence[int], background: int, size: tuple[int, int], threshold: float
) -> Tensor:
    """The class of every pixel when the background has one constant score: (n, g_h, g_w) -> (H, W) int16."""
    ids = torch.tensor([background, *classes], dtype=torch.int16, device=cam.device)
    constant = torch.full((1, *size), threshold, device=cam.device)
    if not len(cam):
        return ids[torch.zeros(size, dtype=torch.long, device=cam.device)]
    maps = interpolate(cam[None].float(), size, mode="bilinear", align_corners=False)[0]
    return ids[torch.cat([constant, maps]).argmax(0)]


def named_labels(labels: Tensor, pseudo: Tensor, names: Tensor) -> tuple[Tensor, Tensor]:
    """Potential objects that have a name become labels where there was none, and are no potential objects any more.

    Shapes: labels (S, S), pseudo (h, w), names (K_c,), the class of mask p at p - 1 or IGNORE
    -> labels, pseudo of the same shapes, neither written into.
    """
    table = torch.full((PSEUDO_VALUES,), IGNORE, dtype=torch.int16)
    table[1 : 1 + len(names)] = names
    known = table[pseudo.long()]  # (h, w)
    wide = known.repeat_interleave(labels.shape[0] // len(known), 0).repeat_interleave(
        labels.shape[1] // known.shape[1], 1
    )
    return labels.where(labels != IGNORE, wide), pseudo.where(known == IGNORE, 0)


def fitted_size(height: int, width: int, max_side: int, patch: int) -> tuple[int, int]:
    """An image's size for CLIP-ES: its own, at most max_side long, each side rounded up to a multiple of the patch.

    Source: method section 11. max_side counts in whole patches, so that rounding up never exceeds it.
    """
    longest = max(max_side // patch, 1) * patch
    scale = min(1.0, longest / max(height, width))
    rows, columns = (max(-(-round(side * scale) // patch), 1) * patch for side in (height, width))
    return rows, columns
