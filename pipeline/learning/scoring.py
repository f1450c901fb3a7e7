"""A student's counts on the test images of a data set, image by image; scores and the worst and best images from them.

Axes: K classes, C channels, H x W an image, S the student's input side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config import Eval
from pipeline.data.base import BadImage, DataError, DataSet, Sample
from pipeline.learning.inference import Best, best_by_group, best_classes, class_logits, predicted, squashed
from pipeline.learning.loading import made_ahead
from pipeline.models.dense import DenseStudent
from pipeline.ops import metrics
from pipeline.ops.labels import IGNORE, LABEL
from pipeline.running.checked import check_masks
from pipeline.running.console import progress


@dataclass(frozen=True)
class Extreme:
    """One image, its truth and its prediction, all (H, W); the score is its own mean IoU, 0..1."""

    name: str
    score: float
    image: np.ndarray  # (H, W, 3) uint8
    truth: np.ndarray  # class ids and IGNORE
    guess: np.ndarray  # class ids


class Scored:
    """A student's counts on the test images of a data set; holds no image, one number an image.

    text (K, C) or (K, n, C); size: the student's input side in pixels.
    """

    def __init__(self, student: DenseStudent, text: Tensor, data: DataSet, size: int, section: Eval) -> None:
        self.student, self.text, self.data, self.size, self.section = student, text, data, size, section
        self.samples = data.samples("test")
        self.seen, self.unseen = list(data.seen_ids), list(data.unseen_ids)
        gammas = (*section.gamma_sweep, section.gamma)
        self.swept = metrics.SweptConfusion(len(data.classes), gammas, IGNORE)
        self.scores: list[float] = []  # each image's own mean IoU, 0..1, NaN without a labelled pixel

    def count_all(self) -> None:
        """Raises: DataError for an image without a mask, and for masks that can't be right."""
        bare = next((sample for sample in self.samples if sample.mask is None), None)
        if self.data.has_files and bare is None:
            check_masks(self.data, self.samples, "test")
        groups = batched(self.samples, self.section.batch)
        with progress("eval", len(self.samples)) as advance:
            for group in made_ahead(groups, lambda group: loaded(self.data, group, self.size)):
                for best, truth in self._predictions(group):
                    self.swept.update(truth, *best)
                    if self.section.pictures:
                        guess = predicted(best, self.section.gamma).numpy()
                        num = len(self.data.classes)
                        self.scores.append(metrics.image_iou(truth.numpy(), guess, num, IGNORE))
                    advance(1)

    def _predictions(self, group: list[Loaded]) -> Iterator[tuple[Best, Tensor]]:
        return predictions(self.student, self.text, group, self.size, self.section, self.seen, self.unseen)

    def summary(self) -> dict[str, Any]:
        """The scores at the configured gamma, those of the sweep, and how the images were looked at."""
        section, data = self.section, self.data
        summaries = {g: metrics.summary(self.swept.matrix(g), self.seen, self.unseen) for g in self.swept.gammas}
        chosen = summaries[section.gamma]
        return summary_of(chosen) | {
            "scored": chosen["scored"],
            "per_class": {data.classes[i]: rounded(v) for i, v in chosen["per_class"].items()},
            "gamma": section.gamma,
            "gamma_sweep": {str(g): summary_of(s) for g, s in summaries.items()},
            "best_of_sweep": best_of(summaries),
            "unseen": list(data.unseen),
            "num_images": len(self.samples),
            "mode": section.mode,
            "side": self.size,
            "stride": section.stride if section.mode == "slide" else None,
            "flip": section.flip,
            "scales": list(section.scales or (1.0,)),
            "pictures": section.pictures,
        }

    def extremes(self) -> Iterator[Extreme]:
        """The worst and the best images, read and predicted once more: none was kept."""
        worst, best = worst_and_best(self.scores, self.section.pictures)
        for kind, places in (("worst", worst), ("best", best)):
            for rank, place in enumerate(places, 1):
                group = loaded(self.data, [self.samples[place]], self.size)
                ((guess, truth),) = self._predictions(group)
                ids = predicted(guess, self.section.gamma).numpy().astype(LABEL)
                name = f"{kind}-{rank:02d}-{self.samples[place].id}"
                yield Extreme(name, self.scores[place], group[0].image, truth.numpy(), ids)


def worst_and_best(scores: Sequence[float], num: int) -> tuple[list[int], list[int]]:
    """The places of the `num` lowest scores, lowest first, and of the highest, highest first; NaN is left out.

    No place is in both: of few images half are worst, half best.
    """
    known = sorted((place for place, score in enumerate(scores) if not math.isnan(score)), key=scores.__getitem__)
    num_worst = min(num, math.ceil(len(known) / 2))
    return known[:num_worst], known[num_worst:][::-1][:num]


@dataclass(frozen=True)
class Loaded:
    """A test image, read by a thread while the student works on others."""

    image: np.ndarray  # (H, W, 3) uint8
    truth: Tensor  # (H, W) int16
    view: Tensor  # (3, S, S) uint8, the image squashed
    id: str = ""


def loaded(data: DataSet, samples: Sequence[Sample], size: int) -> list[Loaded]:
    """Raises: DataError for an image without a mask."""
    found = []
    for sample in samples:
        labels = data.labels(sample)
        if labels is None:
            raise DataError(f"test image {sample.id}: no mask, and eval needs one. Give test masks in the data set.")
        image = data.image(sample)
        found.append(Loaded(image, torch.from_numpy(labels), squashed(image, size), sample.id))
    return found


def predictions(
    student: Any, text: Tensor, group: list[Loaded], size: int, section: Eval, seen: list[int], unseen: list[int]
) -> Iterator[tuple[Best, Tensor]]:
    """The best seen and unseen classes of each image, and its truth."""
    if section.mode == "whole" and not section.is_averaged:
        sizes = [(item.image.shape[0], item.image.shape[1]) for item in group]
        views = torch.stack([item.view for item in group])
        bests = best_classes(student, text, views, sizes, seen, unseen)
        yield from zip(bests, (item.truth for item in group), strict=True)
        return
    for item in group:
        try:
            logits = class_logits(student, text, item.image, size, section)
        except BadImage as error:
            raise BadImage(f"test image {item.id}: {error}") from None
        yield best_by_group(logits, seen, unseen), item.truth


def batched(samples: Sequence[Sample], num: int) -> Iterator[Sequence[Sample]]:
    return (samples[first : first + num] for first in range(0, len(samples), num))


def rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 2)


def best_of(summaries: dict[float, dict[str, Any]]) -> dict[str, Any] | None:
    """The gamma of the highest hIoU and its scores; None where there is no hIoU."""
    scored = {gamma: s["hIoU"] for gamma, s in summaries.items() if not math.isnan(s["hIoU"])}
    if not scored:
        return None
    gamma = max(scored, key=scored.__getitem__)
    return {"gamma": gamma, **summary_of(summaries[gamma])}


def summary_of(summary: dict[str, Any]) -> dict[str, Any]:
    return {key: rounded(summary[key]) for key in ("pAcc", "mIoU_S", "mIoU_U", "hIoU")}
