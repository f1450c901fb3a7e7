"""The teacher asked why: activations, gradients and attention of one forward and one backward pass.

Source: CLIP-ES, sections 3.1 and 3.3 (method section 11). The teacher is loaded at its own size; positions are
interpolated bilinearly to each image's grid.

Axes: B images of one size, K classes of an image at most, N background names, h x w token grid, L = h * w, D width,
C joint space.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from pipeline.models.teacher import CAN_EXPLAIN, Teacher, TeacherError
from pipeline.models.towers import projections


@dataclass(frozen=True)
class Explained:
    """activations (B, L, D), gradients (K, B, L, D), attention (B, L, L) mean over heads and blocks, scores (B, K)."""

    activations: Tensor
    gradients: Tensor
    attention: Tensor
    scores: Tensor


def explain(
    teacher: Teacher, images: Tensor, foreground: Tensor, present: Tensor, background: Tensor, blocks: int
) -> Explained:
    """One forward of all blocks, and a backward through the last for each of the K places, all images at once.

    foreground holds the features of each image's own classes, `present` says which of the K places are used;
    background features compete in every image's softmax. A class that isn't present has gradient 0.
    Shapes: images (B, 3, H, W) uint8 RGB, sides multiples of the patch; foreground (B, K, C) and background (N, C)
    unit norm, present (B, K) bool. Raises: TeacherError (`required`), ValueError for sides that are no
    multiple of the patch.
    """
    required(teacher)
    height, width = images.shape[2:]
    if height % teacher.patch or width % teacher.patch:
        raise ValueError(f"images of {height} x {width}: want multiples of the patch, {teacher.patch}.")
    visual = teacher.model.visual
    with torch.no_grad():
        tokens = _embedded(teacher, images)
        earlier, last = list(visual.transformer.resblocks[:-1]), visual.transformer.resblocks[-1]
        attention = tokens.new_zeros(len(images), tokens.shape[1] - 1, tokens.shape[1] - 1, dtype=torch.float32)
        for place, block in enumerate(earlier):
            if place < len(earlier) + 1 - blocks:
                tokens = block(tokens)
                continue
            mixed, weights = attended(block.attn, block.ln_1(tokens))
            attention += weights
            tokens = _finished(block, tokens, mixed)
        activations = last.ln_1(tokens)
    with torch.enable_grad():
        entering = activations.detach().requires_grad_(True)
        mixed, weights = attended(last.attn, entering)
        leaving = visual.ln_post(_finished(last, tokens, mixed))
        mean = leaving[:, 1:].mean(1)  # (B, D), patches only
        pooled = normalize((mean if visual.proj is None else mean @ visual.proj).float(), dim=-1)  # (B, C)
        scale = teacher.model.logit_scale.exp().float()
        own = torch.einsum("bc,bkc->bk", pooled, foreground).masked_fill(~present, -torch.inf)
        logits = scale * torch.cat([own, pooled @ background.T], dim=1)
        scores = logits.softmax(1)[:, : foreground.shape[1]]  # (B, K)
        # (K, B, K)
        wanted = torch.eye(scores.shape[1], device=scores.device)[:, None].expand(-1, len(scores), -1)
        (gradients,) = torch.autograd.grad(scores, entering, wanted * present, is_grads_batched=True)
    attention = (attention + weights.detach()) / min(blocks, len(earlier) + 1)
    return Explained(activations[:, 1:].float(), gradients[:, :, 1:].float(), attention, scores.detach())


def required(teacher: Teacher) -> Teacher:
    """The teacher, if it can be asked why. Raises: TeacherError that names those that can."""
    refuse_unexplained(teacher.description.name, teacher.can_explain)
    return teacher


def refuse_unexplained(model: str, can_explain: bool) -> None:
    """Raises: TeacherError for an image tower of which no CAMs can be made."""
    if not can_explain:
        raise TeacherError(
            f"teacher.model {model!r}: CAMs need attention and gradients of the last blocks, which this image tower "
            f"doesn't give. These do: {CAN_EXPLAIN}."
        )


def attended(attn: Any, entering: Tensor) -> tuple[Tensor, Tensor]:
    """A block's attention, written out so that its weights are seen.

    Shapes: entering (B, 1 + L, D) -> mixed (B, 1 + L, D), weights (B, L, L) float32, heads averaged, patches only.
    """
    query, key, value = projections(attn, entering)
    weights = (query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)).softmax(-1)
    mixed = (weights @ value).transpose(1, 2).reshape(entering.shape)
    return attn.out_proj(mixed), weights.mean(1, dtype=torch.float32)[:, 1:, 1:].detach()


def _finished(block: Any, tokens: Tensor, mixed: Tensor) -> Tensor:
    """The rest of a block after its attention."""
    tokens = tokens + block.ls_1(mixed)
    return tokens + block.ls_2(block.mlp(block.ln_2(tokens)))


def _embedded(teacher: Teacher, images: Tensor) -> Tensor:
    """What enters the first block: (B, 3, H, W) uint8 -> (B, 1 + L, D)."""
    visual, pixels = teacher.model.visual, teacher.normalised(images)
    patches = visual.conv1(pixels)  # (B, D, h, w)
    side = int((len(visual.positional_embedding) - 1) ** 0.5)
    of_cls, of_patches = visual.positional_embedding.float().split([1, side * side])
    grid = of_patches.T.reshape(1, -1, side, side)
    positions = interpolate(grid, patches.shape[2:], mode="bilinear", align_corners=False).flatten(2)[0].T
    cls = (visual.class_embedding + of_cls[0].to(teacher.dtype)).expand(len(images), 1, -1)
    return visual.ln_pre(torch.cat([cls, patches.flatten(2).transpose(1, 2) + positions.to(teacher.dtype)], dim=1))
