"""Softmax-GradCAM and its class-aware attention-based affinity, for many images and classes at once.

Axes: B images of one size, K classes, L = h * w patch tokens, D width of the teacher.
Source: CLIP-ES, sections 3.1 and 3.3 (method section 11).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d


def activation_maps(activations: Tensor, gradients: Tensor) -> Tensor:
    """GradCAM: channels weighted by the mean of their gradient over the image, negative sums cut off, 0 to 1.

    Shapes: activations (B, L, D), gradients (K, B, L, D) -> (B, K, L).
    """
    weights = gradients.mean(2)  # (K, B, D)
    return min_max(torch.einsum("kbd,bld->bkl", weights, activations).relu())


def min_max(maps: Tensor) -> Tensor:
    """Each map from 0 to 1; one without any contrast, as an empty CAM, becomes 0. Shapes: (..., L) -> the same."""
    lowest, highest = maps.amin(-1, keepdim=True), maps.amax(-1, keepdim=True)
    span = highest - lowest
    return torch.where(span > 0, (maps - lowest) / torch.where(span > 0, span, 1), 0)


def affinity(attention: Tensor, rounds: int) -> Tensor:
    """How alike two patches are: attention made doubly stochastic, symmetric, and squared once.

    Shapes: attention (B, L, L), rows are queries -> (B, L, L).
    """
    found = attention
    for _ in range(rounds):
        found = found / found.sum(1, keepdim=True)  # columns
        found = found / found.sum(2, keepdim=True)  # rows
    found = (found + found.transpose(1, 2)) / 2
    return found @ found


def box_masks(maps: Tensor, threshold: float) -> Tensor:
    """The bounding boxes of all parts of a map above threshold times its maximum, as one mask.

    Parts are 8-connected. A map of zeros has none. Shapes: (..., h, w) -> (..., h, w) bool.
    """
    flat = maps.reshape(-1, *maps.shape[-2:])  # (M, h, w)
    num, height, width = flat.shape
    above = flat > threshold * flat.amax((1, 2), keepdim=True)
    part = _parts(above)  # (M, h, w), 0 outside
    length = height * width + 1
    rows = torch.arange(height, device=maps.device)[:, None].expand(num, height, width).reshape(num, -1)
    columns = torch.arange(width, device=maps.device).expand(num, height, width).reshape(num, -1)
    index, edges = part.reshape(num, -1), []
    for places, lowest in ((rows, True), (rows, False), (columns, True), (columns, False)):
        start = torch.full((num, length), length if lowest else -1, device=maps.device)
        edges.append(start.scatter_reduce(1, index, places, "amin" if lowest else "amax"))
    top, bottom, left, right = (edge[:, 1:] for edge in edges)  # (M, h * w), a part's in its own place
    is_part = bottom >= 0
    corners = torch.zeros(num, (height + 1) * (width + 1), dtype=torch.long, device=maps.device)
    for sign, y, x in ((1, top, left), (-1, top, right + 1), (-1, bottom + 1, left), (1, bottom + 1, right + 1)):
        place = torch.where(is_part, y * (width + 1) + x, 0)
        corners.scatter_add_(1, place, sign * is_part.long())
    covered = corners.view(num, height + 1, width + 1).cumsum(1).cumsum(2)[:, :height, :width] > 0
    return covered.view(maps.shape)


def _parts(mask: Tensor) -> Tensor:
    """8-connected parts: (M, h, w) bool -> (M, h, w) int64, each part numbered from 1, 0 outside."""
    num, height, width = mask.shape
    numbers = torch.arange(1, height * width + 1, dtype=torch.float64, device=mask.device)
    found = numbers.view(height, width).expand(num, -1, -1) * mask
    while True:  # the highest number of a part spreads to all of it
        spread = max_pool2d(found[:, None], 3, stride=1, padding=1)[:, 0] * mask
        if torch.equal(spread, found):
            return found.long()
        found = spread


def refined(maps: Tensor, affinity: Tensor, boxes: Tensor) -> Tensor:
    """Class-aware affinity: what a CAM says within its boxes, passed on to the patches that are alike; 0 to 1.

    Masking the affinity's columns for a class is the same as masking that class's map, so one product serves all
    classes. Shapes: maps (B, K, L), affinity (B, L, L), boxes (B, K, L) bool -> (B, K, L).
    """
    return min_max((maps * boxes) @ affinity.transpose(1, 2))
