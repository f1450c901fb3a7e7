"""Mask fusion: K-means finds too many regions, this merges the alike ones into potential objects.

Axes: B views, K centres, h x w tokens, L = h * w, C channels, P fused masks.
In a pseudo map 0 is annotated, 1..P are potential objects, 255 is padding (views.token_state).
"""

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from pipeline.ops.labels import IGNORE
from pipeline.ops.views import ANNOTATED, IGNORED, PADDING

THRESHOLD = 0.8  # lambda, CLIPTeacher, implementation details
PSEUDO_PADDING = 255  # cache schema, array `pseudo`
MAX_MASKS = 253  # ids are uint8; 254 is the cache's "never written" and 255 is padding
Pseudo = TypeVar("Pseudo", Tensor, np.ndarray)


def is_object(pseudo: Pseudo) -> Pseudo:
    """Where a pseudo map, of any shape, holds a potential object."""
    return (pseudo > ANNOTATED) & (pseudo <= MAX_MASKS)


def num_objects(pseudo: np.ndarray) -> int:
    """How many potential objects a view's pseudo map holds, of (h, w) uint8."""
    return len(np.unique(pseudo[is_object(pseudo)]))


def similar_pairs(centres: Tensor, alive: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """Which living centres are strictly more similar than `threshold`; each one is similar to itself.

    Shapes: centres (B, K, C) unit norm, alive (B, K) -> (B, K, K) bool, False off the living.
    Source: Algorithm 1, method section 3.3 (the diagonal is exactly 1, whatever rounding says).
    """
    centres = centres.float()
    similar = torch.bmm(centres, centres.transpose(1, 2)) > threshold
    similar |= torch.eye(alive.shape[1], dtype=torch.bool, device=alive.device)
    return similar & alive[:, :, None] & alive[:, None]


def fuse(similar: Tensor, alive: Tensor) -> Tensor:
    """Algorithm 1: the next unused centre takes every unused one similar *to it*; all of them are used up.

    Not transitive: with a~b, b~c and not a~c, in this order, the groups are {a, b} and {c}.

    Shapes: similar (K, K) bool, alive (K,) bool -> (K,) int64 on the CPU: group 1..P, 0 where not alive.
    """
    similar_rows = similar.cpu().numpy()
    unused = alive.cpu().numpy().copy()
    group = np.zeros(len(unused), np.int64)
    num_groups = 0
    for seed in range(len(unused)):
        if unused[seed]:
            members = similar_rows[seed] & unused
            members[seed] = True
            num_groups += 1
            group[members] = num_groups
            unused &= ~members
    return torch.from_numpy(group)


def pseudo_map(assign: Tensor, group: Tensor, state: Tensor) -> Tensor:
    """The pseudo labels of a view: every ignored token takes its centre's group.

    Shapes: assign (L,) or (h, w), -1 off the ignored area; group (K,); state (h, w)
    -> (h, w) uint8: 0 annotated, 1..P potential object, 255 padding.
    Raises: ValueError when an ignored token has no group, or groups don't fit into 1..253.
    """
    assign, group = assign.reshape(state.shape), group.to(assign.device)
    is_ignored = state == IGNORED
    owner = group[assign[is_ignored]]
    if bool((assign[is_ignored] < 0).any()) or bool((owner < 1).any()):
        raise ValueError("an ignored token has no living centre: assign and state are of different views.")
    if owner.numel() and int(owner.max()) > MAX_MASKS:
        raise ValueError(f"{int(owner.max())} masks in one view; at most {MAX_MASKS} fit into uint8.")
    pseudo = torch.full_like(state, ANNOTATED, dtype=torch.uint8)
    pseudo[is_ignored] = owner.to(torch.uint8)
    pseudo[state == PADDING] = PSEUDO_PADDING
    return pseudo


def mask_centroids(tokens: Tensor, pseudo: Tensor, num: int) -> Tensor:
    """The mean token of each fused mask, row p - 1 for mask p; NaN for a mask that isn't there.

    Shapes: tokens (h, w, C), pseudo (h, w) uint8 -> (num, C) float32.
    """
    owner = pseudo.flatten().long()
    owner = owner.where(owner <= num, 0)  # slot 0: annotated tokens and padding
    sums = torch.zeros(num + 1, tokens.shape[2], device=tokens.device)
    sums.index_add_(0, owner, tokens.flatten(0, 1).float())
    return sums[1:] / torch.bincount(owner, minlength=num + 1)[1:, None]  # 0 / 0 is the NaN


def purity(pseudo: Tensor, labels: Tensor) -> tuple[int, int]:
    """How well fused masks follow true classes: tokens of their mask's majority class, and all tokens.

    Counted over the ignored area, where truth is known: tokens without a label are left out.
    Divide the sums over many views for a token-weighted purity.

    Shapes: pseudo (h, w) uint8; labels (h, w), or (h * p, w * p) read at patch centres: true class ids.
    Source: method section 3.
    Raises: ValueError if labels are neither.
    """
    height, width = pseudo.shape
    patch = labels.shape[0] // height
    if patch < 1 or labels.shape != (height * patch, width * patch):
        raise ValueError(f"labels {tuple(labels.shape)}; a whole multiple of the map's {height} x {width} wanted.")
    truth = labels[patch // 2 :: patch, patch // 2 :: patch].long()  # (h, w)
    is_counted = is_object(pseudo) & (truth != IGNORE)
    if not bool(is_counted.any()):
        return 0, 0
    width = int(truth.max()) + 1  # classes
    pairs = width * pseudo[is_counted].long() + truth[is_counted]
    table = torch.bincount(pairs, minlength=width * (MAX_MASKS + 1)).view(-1, width)  # (mask, class)
    return int(table.amax(1).sum()), int(is_counted.sum())
