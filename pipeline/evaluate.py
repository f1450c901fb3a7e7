"""The student on the test images: one confusion matrix a gamma, and everything from it.

    python cli.py eval --config config/demo.yaml

Writes runs/<name>/eval/metrics.json (percent) and confusion.npy (rows truth, columns prediction).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config import Config, Eval, config_fingerprint, fingerprint
from pipeline.data.base import DataError, DataSet, Sample
from pipeline.evidence.results import read_metrics, result_table
from pipeline.learning.batches import data_of
from pipeline.learning.checkpoint import load_student
from pipeline.learning.inference import Best, best_by_group, best_classes, class_logits, squashed
from pipeline.learning.loading import made_ahead
from pipeline.ops import metrics
from pipeline.tracking import progress, provenance, required_manifest, say

IGNORE = 255


def evaluate(config: Config) -> dict[str, Any]:
    """Evaluates the finished training on every test image; returns and writes the metrics.

    Raises: MissingCache, StaleCache, DataError (a test image without a mask).
    """
    above = required_manifest(config, "train")
    data = data_of(config)
    samples = data.samples("test")
    identity = fingerprint(config, "eval", above["fingerprint"], {"test": data.identity("test")})
    path = config.run_path / "eval" / "metrics.json"
    found = read_metrics(path)
    if found is not None and found.get("fingerprint") == identity:
        say(f"eval: nothing to do, {path} is of this student, config and data")
        say(result_table({config.name: found}))
        return found
    student, checkpoint = load_student(config.run_path / "train" / above["student"])
    if torch.cuda.is_available():
        student = student.cuda()
    seen, unseen, section = list(data.seen_ids), list(data.unseen_ids), config.eval
    swept = metrics.SweptConfusion(len(data.classes), (*section.gamma_sweep, section.gamma), IGNORE)
    size, text = config.teacher.image_size, checkpoint.text
    with progress("eval", len(samples)) as advance:
        for group in made_ahead(batched(samples, section.batch), lambda group: loaded(data, group, size)):
            for best, truth in predictions(student, text, group, size, section, seen, unseen):
                swept.update(truth, *best)
                advance(1)
    matrices = {gamma: swept.matrix(gamma) for gamma in swept.gammas}
    summaries = {gamma: metrics.summary(matrix, seen, unseen) for gamma, matrix in matrices.items()}
    result: dict[str, Any] = dict(_rounded(summaries[section.gamma]))
    result |= {
        "per_class": {data.classes[i]: _number(v) for i, v in summaries[section.gamma]["per_class"].items()},
        "gamma": section.gamma,
        "gamma_sweep": {str(g): _rounded(s) for g, s in summaries.items()},
        "unseen": list(data.unseen),
        "num_images": len(samples),
        "mode": section.mode,
        "fingerprint": identity,
        "config": config_fingerprint(config, "eval"),
        "made": provenance() | {"revision": checkpoint.revision},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path.parent / "confusion.npy", matrices[section.gamma])
    partial = path.with_name(".metrics.json.partial")
    partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
    say(result_table({config.name: result}))
    return result


@dataclass(frozen=True)
class Loaded:
    """A test image, read by a thread while the student works on others."""

    image: np.ndarray  # (H, W, 3) uint8
    truth: Tensor  # (H, W) uint8
    view: Tensor  # (3, S, S) uint8, the image squashed


def loaded(data: DataSet, samples: Sequence[Sample], size: int) -> list[Loaded]:
    """Raises: DataError for an image without a mask."""
    found = []
    for sample in samples:
        labels = data.labels(sample)
        if labels is None:
            raise DataError(
                f"test image {sample.id}: no mask, and eval needs one. Give test masks in the data set."
            )
        image = data.image(sample)
        found.append(Loaded(image, torch.from_numpy(labels), squashed(image, size)))
    return found


def predictions(
    student: Any,
    text: Tensor,
    group: list[Loaded],
    size: int,
    section: Eval,
    seen: list[int],
    unseen: list[int],
) -> Iterator[tuple[Best, Tensor]]:
    """The best seen and unseen classes of each image, and its truth."""
    if section.mode == "whole":
        sizes = [(item.image.shape[0], item.image.shape[1]) for item in group]
        views = torch.stack([item.view for item in group])
        bests = best_classes(student, text, views, sizes, seen, unseen)
        yield from zip(bests, (item.truth for item in group), strict=True)
        return
    for item in group:
        logits = class_logits(student, text, item.image, size, section)
        yield best_by_group(logits, seen, unseen), item.truth


def batched(samples: Sequence[Sample], num: int) -> Iterator[Sequence[Sample]]:
    return (samples[first : first + num] for first in range(0, len(samples), num))


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 2)


def _rounded(summary: dict[str, Any]) -> dict[str, float | None]:
    return {key: _number(summary[key]) for key in ("pAcc", "mIoU_S", "mIoU_U", "hIoU")}
