"""What refining masks at pixels brings on a run's own maps: mIoU with the truth, and how many pixels are sure.

    python bench/refine.py runs/NAME            a run whose `cams` stage is complete, with full labels to compare with
    python bench/refine.py runs/NAME --images 200

Maps are those in the cache, after CAA and, if the run kept them (cams.debug), before; (1 - max CAM)^power is
the background's score. The labels are used for nothing but these numbers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from interleaved import heading
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from cache.store import Store
from pipeline.data.base import data_of
from pipeline.looking.facts import done_shards
from pipeline.looking.tagged import Tagged
from pipeline.ops import metrics, pamr
from pipeline.ops.labels import IGNORE
from pipeline.ops.masks import class_scores
from pipeline.running.manifests import run_config
from pipeline.teaching import crf
from pipeline.teaching.seeds import POWERS

REFINED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda image, scores: scores,
    "pamr": pamr.refine,
    "crf": lambda image, scores: torch.from_numpy(crf.refine(image.numpy(), scores.numpy())),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--images", type=int, help="only the first so many")
    parser.add_argument("--sure", type=float, default=0.95, help="a score from which a pixel counts as sure")
    chosen = parser.parse_args()
    config = run_config(chosen.run)
    data, store = data_of(config.data), Store.open(config.cache_path)
    done = done_shards(config, "cams")
    usable = [
        row
        for shard in sorted(done)
        for row, status in zip(store.rows(shard), store.read_shard("status", shard), strict=True)
        if status == 0
    ][: chosen.images]
    heading(f"{chosen.run}: {len(usable)} training images, {len(data.classes)} classes")
    tagged, samples, ids = Tagged(config, store, data, done), data.by_id("train"), store.samples
    background = data.background or 0
    for name in [name for name in ("cam_raw", "cam") if store.has(name)]:
        for power in POWERS:
            counts = {how: torch.zeros(2 * (len(data.classes),), dtype=torch.int64) for how in REFINED}
            sure: dict[str, list[float]] = {how: [] for how in REFINED}
            for row in usable:
                sample = samples[ids[row]]
                image, truth = data.image(sample), data.labels(sample)
                if truth is None:
                    continue
                tags, maps = tagged.maps(row, name)
                scores = class_scores(torch.from_numpy(maps), image.shape[:2], power)
                pixels = torch.from_numpy(np.array(image.transpose(2, 0, 1)))  # (3, H, W)
                for how, refine in REFINED.items():
                    confidence, best = refine(pixels, scores).max(0)
                    mask = torch.tensor([background, *tags])[best]
                    counts[how] += multiclass_confusion_matrix(
                        mask, torch.from_numpy(truth).long(), len(data.classes), ignore_index=IGNORE
                    )
                    sure[how].append(float((confidence >= chosen.sure).float().mean()))
            for how in REFINED:
                miou = 100 * np.nanmean(metrics.iou_per_class(counts[how]))
                print(f"{name:8} power {power:g}  {how:5} mIoU {miou:5.1f}  sure {100 * np.mean(sure[how]):3.0f} %")


if __name__ == "__main__":
    main()
