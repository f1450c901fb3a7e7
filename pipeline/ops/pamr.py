"""Pixel-adaptive mask refinement (PAMR): class scores passed on, again and again, to nearby pixels of like colour.

Without parameters to learn: weights come from the image once, then every round replaces a pixel's scores by
the weighted mean of its neighbours'. Scores that sum to 1 at every pixel keep doing so.

Source: Araslanov and Roth, "Single-Stage Semantic Segmentation from Image Labels", CVPR 2020; constants are
those of its published code.

Axes: H x W pixels, n + 1 scores (background first), P = 8 neighbours a dilation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

DILATIONS = (1, 2, 4, 8, 12, 24)  # pixels from the centre to its eight neighbours (the published code)
ROUNDS = 10  # (the published code)
SPREAD = 0.1  # a difference of this many local standard deviations weighs 1/e (the published code)
SMALLEST = 1e-8  # a flat neighbourhood's deviation is 0, and so are all its differences (the published code)
AROUND = tuple((y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0))


def refine(image: Tensor, scores: Tensor, *, dilations: Sequence[int] = DILATIONS, rounds: int = ROUNDS) -> Tensor:
    """Scores after `rounds` of passing them on. Beyond the edge, the edge's pixels are repeated.

    Shapes: image (3, H, W) uint8, scores (n + 1, H, W) -> (n + 1, H, W) float32, on the scores' device.
    Raises: ValueError for another image type, or when image and scores differ in size.
    """
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"image is {tuple(image.shape)} {image.dtype}; (3, H, W) uint8 wanted.")
    if scores.shape[1:] != image.shape[1:]:
        raise ValueError(f"scores {tuple(scores.shape)} and image {tuple(image.shape)} differ in size.")
    found = scores.float()
    weights = affinities(image.to(scores.device), dilations)  # (P, H, W)
    for _ in range(rounds):
        total = torch.zeros_like(found)
        for weight, shifted in zip(weights, _neighbours(found, dilations), strict=True):
            total.addcmul_(shifted, weight)
        found = total
    return found


def affinities(image: Tensor, dilations: Sequence[int]) -> Tensor:
    """How much each neighbour counts at each pixel; they sum to 1 over the neighbours of all dilations.

    A softmax over minus the absolute difference in units of SPREAD local deviations, averaged over the
    colours. Shapes: image (3, H, W) uint8 -> (P, H, W) float32, P in the order of `_neighbours`.
    """
    values = image.to(torch.int32)
    deviation = _deviation(values, dilations)  # (3, H, W)
    logits = [
        -((values - shifted).abs() / (SPREAD * deviation + SMALLEST)).mean(0)
        for shifted in _neighbours(values, dilations)
    ]
    return torch.stack(logits).softmax(0)


def _deviation(values: Tensor, dilations: Sequence[int]) -> Tensor:
    """Standard deviation over the 3 x 3 windows of all dilations together, each of which counts its centre.

    Sums of at most 6 x 9 bytes and of their squares are exact, so a flat neighbourhood's deviation is 0.
    Shapes: (3, H, W) int32 -> (3, H, W) float32, in grey levels.
    """
    number = 9 * len(dilations)
    total, squares = values * len(dilations), values * values * len(dilations)
    for shifted in _neighbours(values, dilations):
        total, squares = total + shifted, squares + shifted * shifted
    return ((number * squares - total * total).float() / (number * (number - 1))).sqrt()


def _neighbours(maps: Tensor, dilations: Sequence[int]) -> Iterator[Tensor]:
    """The maps as seen from each of the P neighbours: (c, H, W) -> P times (c, H, W), views of one copy."""
    reach = max(dilations)
    height, width = maps.shape[1:]
    rows, columns = (
        torch.arange(-reach, side + reach, device=maps.device).clamp(0, side - 1) for side in (height, width)
    )
    larger = maps[:, rows][:, :, columns]
    for dilation in dilations:
        for y, x in AROUND:
            top, left = reach + dilation * y, reach + dilation * x
            yield larger[:, top : top + height, left : left + width]
