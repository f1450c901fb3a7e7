"""The step's large operations with their gradients written out: no plane is kept but the logits themselves.

Autograd keeps every intermediate of a formula: for focal loss alone seven planes of the logits' size, each
written to memory and read again. Here a formula is evaluated a chunk at a time, while the chunk is in the
processor's cache, and again in the backward pass: arithmetic is cheaper than memory. `losses.py` says what
each one computes; tests hold them against the plain definitions.

Axes: B images, C channels, L = H * W positions, K label ids, S seen classes, P potential objects.
Positions come before channels (a view, whatever the memory format), and logits are made with K innermost.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

# Elements of a chunk. CPU: 1 MiB of float32, a core's own cache; else few launches, 256 MiB.
CHUNK_ELEMENTS = {"cpu": 1 << 18}
CHUNK_ELSEWHERE = 1 << 26
NOT_THERE = -1.0e4  # a logit whose sigmoid, and its gradient, are exactly 0 in float32


def by_position(planes: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, L, C), a view for contiguous and channels_last tensors alike."""
    return planes.flatten(2).transpose(1, 2)


def has_channels_innermost(planes: Tensor) -> bool:
    return planes.stride(1) == 1 and planes.shape[1] > 1


def _product_like(planes: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """left (B, L, X) @ right (B, X, C) as (B, C, H, W), in the memory format of `planes`."""
    if has_channels_innermost(planes):
        return torch.bmm(left, right).transpose(1, 2).view(planes.shape)
    return torch.bmm(right.transpose(1, 2), left.transpose(1, 2)).view(planes.shape)


def _chunks(shape: torch.Size, device: torch.device) -> Iterator[tuple[int, slice]]:
    """Image and positions of every chunk of (B, L, K)."""
    num_images, length, width = shape
    step = max(CHUNK_ELEMENTS.get(device.type, CHUNK_ELSEWHERE) // max(width, 1), 1)
    for image in range(num_images):
        for start in range(0, length, step):
            yield image, slice(start, min(start + step, length))


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
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        features, classifier = ctx.saved_tensors
        slope = by_position(slope)  # (B, L, K)
        to_features = to_potential = None
        if ctx.needs_input_grad[0]:
            to_features = _product_like(features, slope, classifier.expand(len(features), -1, -1))
        if ctx.needs_input_grad[2]:
            of_potential = slope[:, :, ctx.num_seen :].transpose(1, 2)  # (B, P, L)
            to_potential = torch.bmm(of_potential, by_position(features)).sum(0)
        return to_features, None, to_potential


class SegmentSums(Function):
    """Sums of features by label id, one pass over memory: for channels_last features on the CPU.

    Shapes: features (B, C, H, W) float32, ids (B, H, W) in 0..num, `num` for those left out
    -> (num, C), and the features handed on (`_added_to`).
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, ids: Tensor, num: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.strides = features.shape, features.stride()
        ctx.set_materialize_grads(False)
        sums = features.new_zeros(num + 1, features.shape[1])
        sums.index_add_(0, ids.flatten(), by_position(features).flatten(0, 1))
        return sums[:num], features.view_as(features)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, slope: Tensor | None, handed_on: Tensor | None
    ) -> tuple[Tensor | None, None, None]:
        if slope is None:
            return handed_on, None, None
        (ids,) = ctx.saved_tensors
        rows, flat = F.pad(slope, (0, 0, 0, 1)), ids.flatten(1)  # (num + 1, C), (B, L)
        result = _added_to(handed_on, ctx.shape, ctx.strides, slope)
        out = by_position(result)
        for image, part in _chunks(out.shape, out.device):
            out[image, part].add_(rows.index_select(0, flat[image, part]))
        return result, None, None


def _added_to(handed_on: Tensor | None, shape: torch.Size, strides: tuple[int, ...], like: Tensor) -> Tensor:
    """What a slope of the features is added to: the slope of whatever used the features handed on, in place.

    A term that sums over the features also hands them on, to the next term, so that backward the terms stand in
    a row: the last one makes the array of the slopes and the others add to it. Side by side, each would make an
    array of the features' size, and autograd another for each sum: most of such a term's time is the memory's.
    The last one must make its array for nobody else, as all operations do whose slope isn't a view.
    """
    if handed_on is None:
        return torch.empty_strided(shape, strides, dtype=like.dtype, device=like.device).zero_()
    return handed_on.clone() if 0 in handed_on.stride() else handed_on


class AttentionPool(Function):
    """Eq. 1 and 2: softmax over positions of query . features, then the weighted sum of the features.

    Shapes: query (B, C), constant, the scale included; features (B, C, H, W) float32
    -> (B, C), and the features handed on (`_added_to`).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        dense = by_position(features)  # (B, L, C)
        weight = torch.bmm(dense, query[:, :, None]).softmax(1)  # (B, L, 1)
        ctx.save_for_backward(query, features, weight)
        ctx.set_materialize_grads(False)
        return torch.bmm(weight.transpose(1, 2), dense)[:, 0], features.view_as(features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor | None, handed_on: Tensor | None) -> tuple[None, Tensor | None]:
        if slope is None:
            return None, handed_on
        query, features, weight = ctx.saved_tensors
        by_weight = torch.bmm(by_position(features), slope[:, :, None])  # (B, L, 1)
        by_score = weight * (by_weight - (weight * by_weight).sum(1, keepdim=True))
        # Rank two: each position gets its weight times the slope and its score's slope times the query.
        left, right = torch.cat([weight, by_score], 2), torch.stack([slope, query], 1)
        if handed_on is None:
            return None, _product_like(features, left, right)
        result = _added_to(handed_on, features.shape, features.stride(), slope)
        if has_channels_innermost(result):
            by_position(result).baddbmm_(left, right)
        else:
            result.flatten(2).baddbmm_(right.transpose(1, 2), left.transpose(1, 2))
        return None, result


class SoftmaxEntropy(Function):
    """Sum over the pixels that have an id of -log softmax(logits)[id]; of the softmax only its norm is kept.

    Shapes: logits (B, K, H, W), any float dtype; ids (B, H, W), negative: no id; planes (B, K) bool or None
    -> float32 scalar.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, planes: Tensor | None) -> Tensor:
        scores, flat = by_position(logits), ids.flatten(1)
        norms = torch.empty(flat.shape, dtype=torch.float32, device=logits.device)  # (B, L)
        for image, part in _chunks(scores.shape, scores.device):
            chunk = _competing(scores[image, part], planes, image)
            norms[image, part] = torch.logsumexp(chunk, 1)
        own = scores.gather(2, flat.clamp(min=0)[:, :, None])[:, :, 0].float()
        ctx.save_for_backward(logits, ids, norms, *([] if planes is None else [planes]))
        return torch.where(flat >= 0, norms - own, 0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        logits, ids, norms, *rest = ctx.saved_tensors
        planes = rest[0] if rest else None
        result = torch.empty_like(logits)
        scores, out, flat = by_position(logits), by_position(result), ids.flatten(1)
        factor = torch.where(flat >= 0, slope, 0)[:, :, None]  # (B, L, 1)
        plane = flat.clamp(min=0)[:, :, None]
        for image, part in _chunks(scores.shape, scores.device):
            chunk = _competing(scores[image, part], planes, image) - norms[image, part, None]
            chunk.exp_().mul_(factor[image, part])
            out[image, part] = chunk.scatter_add_(1, plane[image, part], -factor[image, part])
        return result, None, None


def _competing(chunk: Tensor, planes: Tensor | None, image: int) -> Tensor:
    """A float32 chunk (l, K), minus infinity in planes that don't compete."""
    return chunk.float() if planes is None else chunk.float().masked_fill(~planes[image], -torch.inf)


class SigmoidSums(Function):
    """What focal and dice need of the logits: the focal terms' sum, and per plane sum p and sum p g.

    p is the sigmoid, g one where the pixel's id is the plane's. Each pixel's own logit is moved out of the
    negatives rather than subtracted from their sum: what remains of a confident right answer isn't rounding.

    Shapes: logits (B, K, H, W), any float dtype; ids (B, H, W), negative: no id; planes (B, K) bool or None
    (planes left out of the negatives) -> focal () , sum p (B, K), sum p g (B, K), float32.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ids: Tensor, planes: Tensor | None, alpha: float, gamma: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        scores, flat = by_position(logits), ids.flatten(1)
        has_id, plane = flat >= 0, flat.clamp(min=0)
        negative = torch.zeros(logits.shape[:2], device=logits.device)  # (B, K)
        total = torch.zeros_like(negative)
        for image, part in _chunks(scores.shape, scores.device):
            chunk = _others(scores[image, part], plane[image, part], has_id[image, part])
            p, rest = torch.sigmoid(chunk), F.softplus(chunk)  # rest = -log(1 - p)
            total[image] += p.sum(0)
            negative[image] += rest.mul_(p.pow_(gamma)).sum(0)
        own = scores.gather(2, plane[:, :, None])[:, :, 0].float()  # (B, L)
        p_own = torch.where(has_id, torch.sigmoid(own), 0)
        hit = torch.zeros_like(total).scatter_add_(1, plane, p_own)
        positive = torch.where(has_id, torch.sigmoid(-own).pow(gamma) * F.softplus(-own), 0).sum()
        if planes is not None:
            negative = negative * planes
        ctx.save_for_backward(logits, ids, *([] if planes is None else [planes]))
        ctx.alpha, ctx.gamma = alpha, gamma
        return alpha * positive + (1 - alpha) * negative.sum(), total + hit, hit

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, slope: Tensor, of_total: Tensor, of_hit: Tensor
    ) -> tuple[Tensor, None, None, None, None]:
        logits, ids, *rest = ctx.saved_tensors
        alpha, gamma = ctx.alpha, ctx.gamma
        result = torch.empty_like(logits)
        scores, out, flat = by_position(logits), by_position(result), ids.flatten(1)
        has_id, plane = flat >= 0, flat.clamp(min=0)
        of_negative = (slope * (1 - alpha)).expand(of_total.shape)  # (B, K)
        if rest:
            of_negative = of_negative * rest[0]
        for image, part in _chunks(scores.shape, scores.device):
            chunk = _others(scores[image, part], plane[image, part], has_id[image, part])
            p = torch.sigmoid(chunk)
            # d/dx p^gamma softplus(x) = p^gamma (gamma (1 - p) softplus(x) + p), and dp/dx = p (1 - p)
            left = 1 - p
            inner = F.softplus(chunk).mul_(left).mul_(gamma).add_(p).mul_(p.pow(gamma - 1))
            inner.mul_(of_negative[image]).addcmul_(left, of_total[image])
            out[image, part] = inner.mul_(p)
        own = scores.gather(2, plane[:, :, None])[:, :, 0].float()
        p, q = torch.sigmoid(own), torch.sigmoid(-own)
        to_own = -slope * alpha * q.pow(gamma) * (gamma * p * F.softplus(-own) + q)
        to_own = to_own + (of_total + of_hit).gather(1, plane) * p * q
        to_own = torch.where(has_id, to_own, 0).to(out.dtype)
        out.scatter_add_(2, plane[:, :, None], to_own[:, :, None])
        return result, None, None, None, None


def _others(chunk: Tensor, plane: Tensor, has_id: Tensor) -> Tensor:
    """A float32 copy of a chunk (l, K) without each pixel's own logit."""
    own = chunk.gather(1, plane[:, None])[:, 0].float()
    there = torch.where(has_id, NOT_THERE, own)
    return chunk.to(torch.float32, copy=True).scatter_(1, plane[:, None], there[:, None])
