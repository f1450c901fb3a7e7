"""The large operations of `losses.py` with their gradients written out: same names, same values, less memory.

Autograd keeps every intermediate of a formula: for focal loss alone seven arrays of the logits' size, each
written to memory and read again. Here a formula is evaluated a chunk at a time, while the chunk is in the
processor's cache, and again in the backward pass: arithmetic is cheaper than memory. `losses.py` says what
each one computes; tests hold the two together.

Axes: B images, C channels, L = H * W positions, K label ids, S seen classes, P potential objects.
Positions come before channels (a view, whatever the memory format), and logits are made with K innermost.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pipeline.ops import losses
from pipeline.ops.losses import FOCAL_ALPHA, FOCAL_GAMMA, IGNORE, in_float32

# Elements of a chunk. CPU: 1 MiB of float32, a core's own cache; else few launches, 256 MiB.
CHUNK_ELEMENTS = {"cpu": 1 << 18}
CHUNK_ELSEWHERE = 1 << 26
NOT_THERE = -1.0e4  # a logit whose sigmoid, and its gradient, are exactly 0


def by_position(maps: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, L, C), a view for contiguous and channels_last tensors alike."""
    return maps.flatten(2).transpose(1, 2)


def has_channels_innermost(maps: Tensor) -> bool:
    return maps.stride(1) == 1 and maps.shape[1] > 1


def _product_like(maps: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """left (B, L, X) @ right (B, X, C) as (B, C, H, W), in the memory format of `maps`."""
    if has_channels_innermost(maps):
        return torch.bmm(left, right).transpose(1, 2).view(maps.shape)
    return torch.bmm(right.transpose(1, 2), left.transpose(1, 2)).view(maps.shape)


def _chunks(shape: torch.Size, device: torch.device) -> Iterator[tuple[int, slice]]:
    """Image and positions of every chunk of (B, L, K)."""
    num_images, length, width = shape
    step = max(CHUNK_ELEMENTS.get(device.type, CHUNK_ELSEWHERE) // max(width, 1), 1)
    for image in range(num_images):
        for start in range(0, length, step):
            yield image, slice(start, min(start + step, length))


def _wide(values: Tensor) -> torch.dtype:
    """What losses on these are computed in: float32, or float64 for float64."""
    return torch.promote_types(values.dtype, torch.float32)


def _num_pixels(ids: Tensor, num: int) -> Tensor:
    """Of each id in each image: (B, H, W) -> (B, num) float32."""
    flat = ids.flatten(1).where(ids.flatten(1) >= 0, num)  # ignored ones in a column that is cut off
    counts = torch.zeros(len(ids), num + 1, device=ids.device)
    return counts.scatter_add_(1, flat, torch.ones((), device=ids.device).expand(flat.shape))[:, :num]


# --- eq. 1 and 2 ---------------------------------------------------------------------------------


@in_float32
def pooled(cls: Tensor, dense: Tensor, how: str = "attention") -> Tensor:
    """`losses.pooled`; of its ways attention alone is made here."""
    if how != "attention" or cls.shape != dense.shape[:2]:
        return losses.pooled(cls, dense, how)
    found: Tensor = AttentionPool.apply(cls / sqrt(dense.shape[1]), dense)
    return found


class AttentionPool(Function):
    """Softmax over positions of query . features, then the weighted sum of the features.

    Shapes: query (B, C), constant, the scale included; features (B, C, H, W) -> (B, C).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, features: Tensor) -> Tensor:
        weight = _scores(query, features).softmax(1)  # (B, L, 1)
        ctx.save_for_backward(query, features, weight)
        return torch.bmm(weight.transpose(1, 2), by_position(features))[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        query, features, weight = ctx.saved_tensors
        by_weight = _scores(gradient, features)  # (B, L, 1)
        by_score = weight * (by_weight - (weight * by_weight).sum(1, keepdim=True))
        # Rank two: each position gets its weight times the gradient, its score's gradient times the query.
        left, right = torch.cat([weight, by_score], 2), torch.stack([gradient, query], 1)
        return None, _product_like(features, left, right)


def _scores(query: Tensor, features: Tensor) -> Tensor:
    """query (B, C) . features (B, C, H, W) -> (B, L, 1): a row times a matrix, on the CPU three times as fast as
    the matrix times a column."""
    return torch.bmm(query[:, None], features.flatten(2)).transpose(1, 2)


# --- eq. 7 ---------------------------------------------------------------------------------------


@in_float32
def centroids(features: Tensor, ids: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """`losses.centroids`, where channels are innermost as sums by index, which read the features once.

    Not on the GPU: index_add isn't deterministic there, and the plain product is what it is good at.
    """
    if features.device.type != "cpu" or not has_channels_innermost(features):
        return losses.centroids(features, ids, num)
    rows, index = (by_position(features).flatten(0, 1), ids.where(ids >= 0, num).flatten())  # (B * L, C), (B * L,)
    sums = features.new_zeros(num + 1, features.shape[1]).index_add(0, index, rows)[:num]
    counts = _num_pixels(ids, num).sum(0)
    return sums / counts.clamp(min=1)[:, None], counts > 0


# --- eq. 9 ---------------------------------------------------------------------------------------


def logits(features: Tensor, text_seen: Tensor, potential: Tensor) -> Tensor:
    """`losses.logits`, with K innermost."""
    kind = features.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else features.dtype
    product: Tensor = Logits.apply(features.to(dtype), text_seen.to(dtype), potential.to(dtype))
    return product


class Logits(Function):
    """Inner products of eq. 9; no gradient is computed for the text features, which are constants.

    Shapes: features (B, C, H, W), text_seen (S, C), potential (P, C), all of one dtype -> (B, S + P, H, W).
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, text_seen: Tensor, potential: Tensor) -> Tensor:
        classifier = torch.cat([text_seen, potential])  # (K, C)
        ctx.save_for_backward(features, classifier)
        ctx.num_seen = len(text_seen)
        batch, _, height, width = features.shape
        scores = torch.bmm(by_position(features), classifier.T.expand(batch, -1, -1))  # (B, L, K)
        return scores.transpose(1, 2).unflatten(2, (height, width))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        features, classifier = ctx.saved_tensors
        gradient = by_position(gradient)  # (B, L, K)
        to_features = to_potential = None
        if ctx.needs_input_grad[0]:
            to_features = _product_like(features, gradient, classifier.expand(len(features), -1, -1))
        if ctx.needs_input_grad[2]:
            of_potential = gradient[:, :, ctx.num_seen :].transpose(1, 2)  # (B, P, L)
            to_potential = torch.bmm(of_potential, by_position(features)).sum(0)
        return to_features, None, to_potential


# --- eq. 10 --------------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, ids: Tensor, competes: Tensor | None = None) -> Tensor:
    """`losses.cross_entropy`; of the softmax only its norm is kept."""
    total: Tensor = SoftmaxEntropy.apply(logits, ids, competes)
    return total / (ids != IGNORE).sum().clamp(min=1)


class SoftmaxEntropy(Function):
    """Sum over the pixels that have an id of -log softmax(logits)[id].

    Shapes: logits (B, K, H, W), any float dtype; ids (B, H, W), negative: no id; competes (B, K) bool or None
    -> scalar, at least float32.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, competes: Tensor | None) -> Tensor:
        scores, flat = by_position(logits), ids.flatten(1)
        norms = torch.empty(flat.shape, dtype=_wide(logits), device=logits.device)  # (B, L)
        for image, part in _chunks(scores.shape, scores.device):
            chunk = _competing(scores[image, part], competes, image)
            norms[image, part] = torch.logsumexp(chunk, 1)
        own = scores.gather(2, flat.clamp(min=0)[:, :, None])[:, :, 0].to(norms.dtype)
        ctx.save_for_backward(logits, ids, norms, competes)
        return torch.where(flat >= 0, norms - own, 0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, ids, norms, competes = ctx.saved_tensors
        result = torch.empty_like(logits)
        scores, out, flat = by_position(logits), by_position(result), ids.flatten(1)
        factor = torch.where(flat >= 0, gradient, 0)[:, :, None]  # (B, L, 1)
        own = flat.clamp(min=0)[:, :, None]
        for image, part in _chunks(scores.shape, scores.device):
            chunk = _competing(scores[image, part], competes, image) - norms[image, part, None]
            chunk.exp_().mul_(factor[image, part])
            out[image, part] = chunk.scatter_add_(1, own[image, part], -factor[image, part])
        return result, None, None


def _competing(chunk: Tensor, competes: Tensor | None, image: int) -> Tensor:
    """A chunk (l, K), minus infinity for ids that don't compete."""
    chunk = chunk.to(_wide(chunk))
    return chunk if competes is None else chunk.masked_fill(~competes[image], -torch.inf)


# --- focal and dice ------------------------------------------------------------------------------


def count_masks(ids: Tensor, num: int) -> Tensor:
    """`losses.count_masks`, without an array of a value for each pixel and id."""
    return (_num_pixels(ids, num) > 0).sum().float()


def focal_and_dice(
    logits: Tensor, ids: Tensor, num_masks: Tensor | None = None, competes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`losses.focal_and_dice` from one pass over the logits."""
    focal_sum, p, p_g = SigmoidSums.apply(logits, ids, competes)
    g = _num_pixels(ids, logits.shape[1])  # (B, K), as p and p_g
    num_masks = (count_masks(ids, logits.shape[1]) if num_masks is None else num_masks).clamp(min=1)
    scores = torch.where(g > 0, 1 - (2 * p_g + 1) / (p + g + 1), 0)
    return focal_sum * (ids != IGNORE).any() / ids[0].numel() / num_masks, scores.sum() / num_masks


class SigmoidSums(Function):
    """What focal and dice need of the logits: the focal terms' sum, and sum p and sum p g by image and id.

    p is the sigmoid, g one where the pixel has the id. Each pixel's own logit is left out of the negatives
    rather than subtracted from their sum, which avoids cancellation on confident pixels.

    Shapes: logits (B, K, H, W), any float dtype; ids (B, H, W), negative: no id; competes (B, K) bool or None
    (ids left out of the negatives) -> focal (), sum p (B, K), sum p g (B, K), at least float32.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, competes: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        scores, flat = by_position(logits), ids.flatten(1)
        has_id, own_id = flat >= 0, flat.clamp(min=0)
        negative = torch.zeros(logits.shape[:2], dtype=_wide(logits), device=logits.device)  # (B, K)
        total = torch.zeros_like(negative)
        for image, part in _chunks(scores.shape, scores.device):
            chunk = _others(scores[image, part], own_id[image, part], has_id[image, part])
            p, rest = torch.sigmoid(chunk), F.softplus(chunk)  # rest = -log(1 - p)
            total[image] += p.sum(0)
            negative[image] += rest.mul_(p.pow_(FOCAL_GAMMA)).sum(0)
        own = scores.gather(2, own_id[:, :, None])[:, :, 0].to(negative.dtype)  # (B, L)
        p_own = torch.where(has_id, torch.sigmoid(own), 0)
        hit = torch.zeros_like(total).scatter_add_(1, own_id, p_own)
        positive = torch.where(has_id, torch.sigmoid(-own).pow(FOCAL_GAMMA) * F.softplus(-own), 0).sum()
        if competes is not None:
            negative = negative * competes
        ctx.save_for_backward(logits, ids, competes)
        return FOCAL_ALPHA * positive + (1 - FOCAL_ALPHA) * negative.sum(), total + hit, hit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_focal: Tensor, of_total: Tensor, of_hit: Tensor) -> tuple[Tensor, None, None]:
        logits, ids, competes = ctx.saved_tensors
        result = torch.empty_like(logits)
        scores, out, flat = by_position(logits), by_position(result), ids.flatten(1)
        has_id, own_id = flat >= 0, flat.clamp(min=0)
        of_negative = (of_focal * (1 - FOCAL_ALPHA)).expand(of_total.shape)  # (B, K)
        if competes is not None:
            of_negative = of_negative * competes
        for image, part in _chunks(scores.shape, scores.device):
            chunk = _others(scores[image, part], own_id[image, part], has_id[image, part])
            p = torch.sigmoid(chunk)
            # d/dx p^gamma softplus(x) = p^gamma (gamma (1 - p) softplus(x) + p), and dp/dx = p (1 - p)
            left = 1 - p
            inner = F.softplus(chunk).mul_(left).mul_(FOCAL_GAMMA).add_(p).mul_(p.pow(FOCAL_GAMMA - 1))
            inner.mul_(of_negative[image]).addcmul_(left, of_total[image])
            out[image, part] = inner.mul_(p)
        own = scores.gather(2, own_id[:, :, None])[:, :, 0].to(of_total.dtype)
        p, q = torch.sigmoid(own), torch.sigmoid(-own)
        to_own = -of_focal * FOCAL_ALPHA * q.pow(FOCAL_GAMMA) * (FOCAL_GAMMA * p * F.softplus(-own) + q)
        to_own = to_own + (of_total + of_hit).gather(1, own_id) * p * q
        to_own = torch.where(has_id, to_own, 0).to(out.dtype)
        out.scatter_add_(2, own_id[:, :, None], to_own[:, :, None])
        return result, None, None


def _others(chunk: Tensor, own_id: Tensor, has_id: Tensor) -> Tensor:
    """A wide copy of a chunk (l, K) without each pixel's own logit."""
    chunk = chunk.to(_wide(chunk), copy=True)
    there = torch.where(has_id, NOT_THERE, chunk.gather(1, own_id[:, None])[:, 0])
    return chunk.scatter_(1, own_id[:, None], there[:, None])
