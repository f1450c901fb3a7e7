"""Sharpness-based prompt selection: how evenly a template spreads its scores over the classes of an image.

Axes: n images, T templates, K classes, N background names, C joint space.
Source: CLIP-ES, section 3.2 (method section 11).
"""

from __future__ import annotations

import torch
from torch import Tensor


def sharpness(features: Tensor, present: Tensor, classes: Tensor, background: Tensor, scale: float) -> Tensor:
    """The sum over images of var(s) / mean(s), s being the softmax scores of an image's own classes; low is good.

    Own classes and all background names compete in an image's softmax. The variance is the population's, so an
    image with one class adds 0, as does one with none. All templates at once.
    Shapes: features (n, C), classes (T, K, C) and background (T, N, C) of unit norm, present (n, K) bool
    -> (T,) float64.
    """
    names = torch.cat([classes, background], dim=1)  # (T, K + N, C)
    competes = torch.cat([present, present.new_ones(len(present), background.shape[1])], dim=1)  # (n, K + N)
    logits = scale * torch.einsum("nc,tkc->tnk", features, names)
    # (T, n, K)
    scores = logits.masked_fill(~competes, -torch.inf).softmax(2)[..., : classes.shape[1]].double()
    count = present.sum(1).clamp(min=1)  # (n,)
    mean = scores.sum(2) / count  # a class that isn't there scores 0
    squares = ((scores - mean[..., None]) ** 2 * present).sum(2) / count
    return torch.where(mean > 0, squares / torch.where(mean > 0, mean, 1), 0).sum(1)
