"""The student on test images, those of its own data set or of another one: one confusion matrix a gamma.

    python cli.py eval --config config/demo.yaml                      # runs/<name>/eval/
    python cli.py eval --config config/demo.yaml --on demo_other      # runs/<name>/eval-on-demo_other/

Writes metrics.json (percent), per_class.csv, confusion.npy (rows truth, columns prediction), confusion.png and
pictures/ of the worst and best images. On another data set the split is that set's own, as in the paper's Table 2:
a class is unseen there whether or not the student had labels of one of that name; metrics.json says which it had.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config import Config, Eval, UserError, config_fingerprint, fingerprint
from pipeline.data.base import DataError, DataSet, Sample
from pipeline.data.words import names_of_classes
from pipeline.evidence.results import read_metrics, result_table
from pipeline.learning.batches import data_of
from pipeline.learning.checkpoint import Checkpoint, load_student
from pipeline.learning.inference import (
    Best,
    best_by_group,
    best_classes,
    class_logits,
    predicted,
    squashed,
)
from pipeline.learning.loading import made_ahead
from pipeline.learning.text import features_of_file, text_of_names
from pipeline.looking.confusion import confusion_picture
from pipeline.looking.extremes import Extreme, save_extremes, worst_and_best
from pipeline.models.student import DenseStudent
from pipeline.ops import metrics
from pipeline.tracking import progress, provenance, required_manifest, say

IGNORE = 255


@dataclass(frozen=True)
class Task:
    """One evaluation: the images, the classes' text features, where its results go and what is said beside them."""

    label: str
    data: DataSet
    text: Callable[[Checkpoint], Tensor]  # -> (K, C)
    folder: Path
    identity: str
    config: str  # what the config asks, hashed
    said: Callable[[Checkpoint], dict[str, Any]] = field(default=lambda checkpoint: {})


def evaluate(config: Config) -> dict[str, Any]:
    """Evaluates the finished training on every test image; returns and writes the metrics.

    Raises: MissingCache, StaleCache, DataError (a test image without a mask).
    """
    above = required_manifest(config, "train")
    data = data_of(config)
    identity = fingerprint(config, "eval", above["fingerprint"], {"test": data.identity("test")})
    own = config_fingerprint(config, "eval")
    folder = config.run_path / "eval"
    task = Task(config.name, data, lambda checkpoint: checkpoint.text, folder, identity, own)
    return _evaluated(config, above["student"], task)


def evaluate_on(config: Config, other: Config) -> dict[str, Any]:
    """The same student, not trained further, on the data set of another config: its class names, its split.

    Of `other` the sections data and text (features, synonyms) count; how to test is what `config` says.
    Raises: as evaluate, and UserError for a student that has learned its classes.
    """
    if config.student.classifier == "learned":
        raise UserError(
            f"--on {other.name}: the student of {config.name!r} has learned its classes and knows no others. "
            "Train with student.classifier text to evaluate it on another data set."
        )
    above = required_manifest(config, "train")
    data, text = data_of(other), other.text
    named = names_of_classes(data.classes, text.synonyms)
    moved = config.model_copy(update={"data": other.data})
    facts = {
        "images": data.identity("test"),
        "labels": data.identity("test", "labels"),
        "classes": [data.classes, data.unseen, named],
        "text": _bytes_digest(text.features),
    }

    def features(checkpoint: Checkpoint) -> Tensor:
        if text.features is None:
            return text_of_names(checkpoint, named)
        shape = (len(data.classes), checkpoint.text.shape[1])
        return torch.from_numpy(features_of_file(text.features, shape, data.name))

    def said(checkpoint: Checkpoint) -> dict[str, Any]:
        labelled = {checkpoint.classes[i] for i in checkpoint.seen_ids}
        known = {
            name: sorted(labelled & {name, *names}) for name, names in zip(data.classes, named, strict=True)
        }
        return {
            "trained": _described(config, checkpoint.classes, checkpoint.unseen),
            "on": _described(other, data.classes, data.unseen),
            "trained_on": {name: names for name, names in known.items() if names},
            "text": {
                "features": text.features,
                "templates": None if text.features else checkpoint.config.text.templates,
                "synonyms": text.synonyms,
            },
        }

    task = Task(
        f"{config.name} on {other.name}",
        data,
        features,
        config.run_path / f"eval-on-{other.name}",
        fingerprint(moved, "eval", above["fingerprint"], facts),
        config_fingerprint(moved, "eval"),
        said,
    )
    return _evaluated(config, above["student"], task)


def _described(config: Config, classes: Sequence[str], unseen: Sequence[str]) -> dict[str, Any]:
    """A data set, and how it was split."""
    options = config.data.options()
    return {
        "config": config.name,
        "data": config.data.kind,
        "split": options.get("split"),
        "num_classes": len(classes),
        "unseen": list(unseen),
    }


def _bytes_digest(path: str | None) -> str | None:
    if path is None or not Path(path).is_file():  # a missing file is an error where it is read
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _evaluated(config: Config, student_name: str, task: Task) -> dict[str, Any]:
    """Does the task unless its results are there; returns the metrics."""
    path, section = task.folder / "metrics.json", config.eval
    found = read_metrics(path)
    if (
        found is not None
        and found.get("fingerprint") == task.identity
        and found.get("pictures") == section.pictures
    ):
        say(f"eval: nothing to do, {path} is of this student, config and data")
        _say(task, found)
        return found
    student, checkpoint = load_student(config.run_path / "train" / student_name)
    if torch.cuda.is_available():
        student = student.cuda()
    scored = Scored(student, task.text(checkpoint), task.data, config.teacher.image_size, section)
    scored.count_all()
    result = scored.summary() | {
        "fingerprint": task.identity,
        "config": task.config,
        **task.said(checkpoint),
        "made": (made := provenance()) | {"revision": checkpoint.revision, "evaluated": made["revision"]},
    }
    task.folder.mkdir(parents=True, exist_ok=True)
    matrix = scored.swept.matrix(section.gamma)
    np.save(task.folder / "confusion.npy", matrix)
    _write_per_class(task.folder / "per_class.csv", matrix, task.data)
    confusion_picture(matrix, task.data.classes, task.data.unseen, task.folder / "confusion.png", task.label)
    save_extremes(task.folder / "pictures", scored.extremes(), task.data)
    partial = path.with_name(".metrics.json.partial")
    partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
    _say(task, result)
    return result


def _say(task: Task, result: dict[str, Any]) -> None:
    say(result_table({task.label: result}))
    if best := result.get("best_of_sweep"):
        say(f"best of the sweep, chosen on these images: gamma {best['gamma']:g}, hIoU {best['hIoU']:.1f}")


class Scored:
    """A student's counts on the test images of a data set; holds no image, one number an image.

    text (K, C); size: the student's input side in pixels.
    """

    def __init__(self, student: DenseStudent, text: Tensor, data: DataSet, size: int, section: Eval) -> None:
        self.student, self.text, self.data, self.size, self.section = student, text, data, size, section
        self.samples = data.samples("test")
        self.seen, self.unseen = list(data.seen_ids), list(data.unseen_ids)
        gammas = (*section.gamma_sweep, section.gamma)
        self.swept = metrics.SweptConfusion(len(data.classes), gammas, IGNORE)
        self.scores: list[float] = []  # each image's own mean IoU, 0..1, NaN without a labelled pixel

    def count_all(self) -> None:
        """Raises: DataError for an image without a mask."""
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
        summaries = {
            g: metrics.summary(self.swept.matrix(g), self.seen, self.unseen) for g in self.swept.gammas
        }
        chosen = summaries[section.gamma]
        return _rounded(chosen) | {
            "per_class": {data.classes[i]: _number(v) for i, v in chosen["per_class"].items()},
            "gamma": section.gamma,
            "gamma_sweep": {str(g): _rounded(s) for g, s in summaries.items()},
            "best_of_sweep": _best(summaries),
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
                ids = predicted(guess, self.section.gamma).numpy().astype(np.uint8)
                name = f"{kind}-{rank:02d}-{self.samples[place].id}"
                yield Extreme(name, self.scores[place], group[0].image, truth.numpy(), ids)


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
    if section.mode == "whole" and not section.is_averaged:
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


def _write_per_class(path: Path, matrix: np.ndarray, data: DataSet) -> None:
    """A line a class, in the order of the ids; what can't be scored (an absent class) stays empty."""
    iou, accuracy = metrics.iou_per_class(matrix), metrics.class_accuracy(matrix)
    with path.open("w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(("class", "group", "IoU", "accuracy", "pixels"))
        for i, name in enumerate(data.classes):
            group = "unseen" if name in data.unseen else "seen"
            lines.writerow((name, group, _number(100 * iou[i]), _number(100 * accuracy[i]), matrix[i].sum()))


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 2)


def _best(summaries: dict[float, dict[str, Any]]) -> dict[str, Any] | None:
    """The gamma of the highest hIoU and its scores; None where there is no hIoU."""
    scored = {gamma: s["hIoU"] for gamma, s in summaries.items() if not math.isnan(s["hIoU"])}
    if not scored:
        return None
    gamma = max(scored, key=scored.__getitem__)
    return {"gamma": gamma, **_rounded(summaries[gamma])}


def _rounded(summary: dict[str, Any]) -> dict[str, Any]:
    return {key: _number(summary[key]) for key in ("pAcc", "mIoU_S", "mIoU_U", "hIoU")}
