"""How good CAMs are as masks, where full labels are known: mIoU of seeds, before and after their refinement.

As CLIP-ES reports them: scored on training images with the background's score (1 - max CAM)^power, and with
constant scores. The labels are used for nothing but what is printed.

Axes: n classes of one image, g_h x g_w its token grid, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor
from torch.nn.functional import interpolate

from pipeline.data.base import DataSet, Sample
from pipeline.ops.labels import IGNORE
from pipeline.ops.masks import mask_and_confidence, thresholded
from pipeline.running.console import say

KINDS = ("CAM", "CAM + CAA")
POWERS = (1.0, 2.0)  # CLIP-ES's two; the better is reported
THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7)
BACKGROUNDS = (*(f"power {power:g}" for power in POWERS), *(f"threshold {value:g}" for value in THRESHOLDS))


def new_stats(num_classes: int) -> dict[str, np.ndarray]:
    """Counts that add up over shards; `seeds` by kind, background, (intersection, predicted, true) and class."""
    names = ("images", "maps", "empty", "untagged", "known")
    return {name: np.zeros(1, np.int64) for name in names} | {
        "seeds": np.zeros((len(KINDS), len(BACKGROUNDS), 3, num_classes), np.int64),
        "refined": np.zeros((3, num_classes), np.int64),
    }


def add_seeds(
    stats: dict[str, np.ndarray], data: DataSet, sample: Sample, tags: Sequence[int], raw: Tensor, maps: Tensor
) -> None:
    """Counts one image. Shapes: raw and maps (n, g_h, g_w)."""
    stats["images"] += 1
    stats["maps"] += len(tags)
    stats["untagged"] += not tags
    stats["empty"] += int((raw.flatten(1).amax(1) == 0).sum()) if len(raw) else 0
    labels = data.labels(sample)
    if labels is None:
        return
    stats["known"] += 1
    truth = torch.from_numpy(labels.astype(np.int64))
    counted = truth != IGNORE
    size, background = (truth.shape[0], truth.shape[1]), data.background or 0
    for kind, cam in enumerate((raw, maps)):
        masks = [mask_and_confidence(cam, tags, background, size, power)[0] for power in POWERS]
        masks += [thresholded(cam, tags, background, size, value) for value in THRESHOLDS]
        for place, mask in enumerate(masks):
            stats["seeds"][kind, place] += _counts(mask[counted].long(), truth[counted], len(data.classes))


def add_refined(stats: dict[str, np.ndarray], data: DataSet, sample: Sample, mask: Tensor) -> None:
    """Counts the mask of one image after cams.refine. Shapes: mask (H, W) int16, any size."""
    labels = data.labels(sample)
    if labels is None:
        return
    truth = torch.from_numpy(labels.astype(np.int64))
    full = interpolate(mask[None, None].float(), truth.shape, mode="nearest-exact")[0, 0].long()
    counted = truth != IGNORE
    stats["refined"] += _counts(full[counted], truth[counted], len(data.classes))


def _counts(predicted: Tensor, truth: Tensor, num_classes: int) -> np.ndarray:
    """Pixels of each class that both have, that are predicted, that are true: (3, K)."""
    parts = (truth[predicted == truth], predicted, truth)
    return np.stack([torch.bincount(part, minlength=num_classes).numpy() for part in parts])


def summarise(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `cams` prints at its end; seeds are mIoU in percent, None without full labels."""
    total = {name: np.sum([part[name] for part in parts], axis=0) for name in parts[0]}
    summary: dict[str, Any] = {name: int(total[name][0]) for name in ("images", "maps", "empty", "untagged")}
    if not total["known"][0]:
        return summary | {"seeds": None}
    miou = _miou(total["seeds"])  # (kinds, backgrounds)
    if total["refined"].any():
        summary["refined"] = round(float(_miou(total["refined"])), 2)
    return summary | {
        "seeds": {
            kind: {name: round(float(miou[i, j]), 2) for j, name in enumerate(BACKGROUNDS)}
            for i, kind in enumerate(KINDS)
        }
    }


def _miou(counts: np.ndarray) -> np.ndarray:
    """mIoU in percent from (..., 3, K): intersection, predicted, true."""
    both, predicted, true = np.moveaxis(counts.astype(np.float64), -2, 0)
    union = predicted + true - both
    return 100 * np.nanmean(np.divide(both, union, out=np.full(union.shape, np.nan), where=union > 0), axis=-1)


def print_summary(summary: dict[str, Any]) -> None:
    say(
        f"CAMs: {summary['images']} images, {summary['maps']} maps, {summary['empty']} of them empty; "
        f"{summary['untagged']} images without a label are background"
    )
    if summary["seeds"] is None:
        say("seeds: not scored, no full labels")
        return
    table = Table("seeds, mIoU on training images", *BACKGROUNDS)
    for kind, values in summary["seeds"].items():
        table.add_row(kind, *(f"{values[name]:.1f}" for name in BACKGROUNDS))
    say(table)
    if "refined" in summary:
        say(f"seeds after cams.refine: mIoU {summary['refined']:.1f}")
