"""What training minimises: the terms of eq. 11-12 for one batch, from the parts that learn or remember.

Axes: B images, C channels, H x W loss grid, S seen classes, P potential objects, K = S + P.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import interpolate

from pipeline.config import Train
from pipeline.models.glm import CachedNegatives, ClsBank, of_length
from pipeline.ops import closed_form, losses
from pipeline.ops.labels import IGNORE

# By train.losses: the plain definitions, or the same with their gradients written out.
LOSSES: dict[str, ModuleType] = {"plain": losses, "fused": closed_form}


@dataclass
class Learner:
    """The parts that learn or remember, and what the losses are handed: T_seen, never the rest."""

    student: Any  # DenseStudent, or accelerate's wrapper of it
    vla: nn.Module
    bank: ClsBank | CachedNegatives
    text_seen: Tensor  # (S, C), unit norm
    seen_ids: Tensor  # (S,)


def loss_terms(
    section: Train, learner: Learner, dense: Tensor, batch: dict[str, Tensor], accelerator: Accelerator | None = None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Every weighted term of eq. 11-12 for one batch, and counts worth a curve. Pushes into the CLS bank.

    Shapes: dense (B, C, H, W); batch: labels (B, S, S) int16, pseudo (B, h, w), cls (B, C), sample (B,).
    """
    weights, ways, dense, terms = section.weights, LOSSES[section.losses], dense.float(), {}
    if section.glm != "off":
        terms["global"] = weights.glm * _global_term(section, learner, dense, batch, accelerator)
    ids, owners, num_potential = losses.combined_labels(
        _on_grid(batch["labels"], dense, section), batch["pseudo"], learner.seen_ids, section.potential
    )
    if section.loss_grid == "full":
        dense = interpolate(dense, ids.shape[1:], mode="bilinear", align_corners=False)
    num_seen = len(learner.text_seen)
    means, present = ways.centroids(dense, ids, num_seen + num_potential)
    generated = learner.vla(means[present], batch["cls"])  # (M, C), seen ones first
    if section.generate:
        terms["generate"] = weights.generate * losses.generate_loss(generated, learner.text_seen, present)
    num_seen_present = int(present[:num_seen].sum())
    logits = ways.logits(dense, learner.text_seen, generated[num_seen_present:])  # (B, K, H, W)
    competes = losses.competing(owners, len(dense), num_seen, section.potentials)
    ce_ids = ids if section.potential_ce else ids.where(ids < num_seen, losses.IGNORE)
    terms["ce"] = weights.ce * ways.cross_entropy(logits, ce_ids, competes)
    if section.nel != "off":
        if section.nel == "seen":
            (logits, ids), competes = losses.seen_only(logits, ids, num_seen), None
        num_masks = ways.count_masks(ids, logits.shape[1])
        if accelerator is not None:
            num_masks = accelerator.reduce(num_masks, reduction="mean")
        focal, dice = ways.focal_and_dice(logits, ids, num_masks, competes)
        terms |= {"focal": weights.focal * focal, "dice": weights.dice * dice}
    return terms, {"potential": float(num_potential), "seen": float(num_seen_present)}


def closed_set_terms(
    section: Train, learner: Learner, dense: Tensor, batch: dict[str, Tensor], accelerator: Accelerator | None = None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """CLIP-ES's confidence-guided loss: cross-entropy over all classes, on the pixels that CAMs are sure of.

    Shapes: dense (B, C, H, W); batch: labels (B, S, S) int16, IGNORE where they aren't sure.
    Source: method section 11.
    """
    ids = _on_grid(batch["labels"], dense, section).long()
    if section.loss_grid == "full":
        dense = interpolate(dense, ids.shape[1:], mode="bilinear", align_corners=False)
    table = ids.new_full((losses.LABEL_VALUES,), losses.IGNORE)
    table[learner.seen_ids] = torch.arange(len(learner.seen_ids), device=ids.device)
    ways = LOSSES[section.losses]
    logits = ways.logits(dense, learner.text_seen, learner.text_seen[:0])
    share = float((ids != IGNORE).float().mean())
    return {"ce": section.weights.ce * ways.cross_entropy(logits, table[ids])}, {"labelled": share}


# By recipe: what a batch costs.
OBJECTIVES = {"clip_teacher": loss_terms, "clip_es": closed_set_terms}


def _global_term(
    section: Train, learner: Learner, dense: Tensor, batch: dict[str, Tensor], accelerator: Accelerator | None
) -> Tensor:
    """Eq. 3, and then the push: the current tokens are never in the bank of their own loss."""
    cls, samples = batch["cls"], batch["sample"]
    bank, bank_samples = learner.bank.entries()
    others, other_samples, all_cls, all_samples = bank, bank_samples, cls, samples
    if accelerator is not None and accelerator.num_processes > 1:
        all_cls, all_samples = accelerator.gather(cls), accelerator.gather(samples)
        mine = torch.zeros(len(all_cls), dtype=torch.bool, device=cls.device)
        mine[accelerator.process_index * len(cls) : (accelerator.process_index + 1) * len(cls)] = True
        others = torch.cat([bank, all_cls[~mine]])
        other_samples = torch.cat([bank_samples, all_samples[~mine]])
    predicted = LOSSES[section.losses].pooled(of_length(cls, section.glm_length), dense, section.glm)
    loss = losses.infonce(cls, predicted, others, other_samples, samples, section.tau)
    learner.bank.push(all_cls, all_samples)
    return loss


def _on_grid(labels: Tensor, dense: Tensor, section: Train) -> Tensor:
    """Labels by nearest on the loss grid: (B, S, S) -> (B, H, W)."""
    if section.loss_grid == "full":
        return labels
    return interpolate(labels[:, None].float(), dense.shape[2:], mode="nearest-exact")[:, 0].to(labels.dtype)
