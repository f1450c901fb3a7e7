"""The student on test images, those of its own data set or of another one: one confusion matrix a gamma.

    python cli.py eval --config config/demo.yaml                      # runs/<name>/eval/
    python cli.py eval --config config/demo.yaml --on demo_other      # runs/<name>/eval-on-demo_other/

Writes metrics.json (percent), per_class.csv, confusion.npy (rows truth, columns prediction), confusion.png and
pictures/ of the worst and best images. On another data set (Table 2) the split is that set's own (docs/method.md):
a class is unseen there whether or not the student had labels of one of that name; metrics.json says which it had.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache.errors import CacheError, StaleCache
from cache.files import whole_file, write_text
from pipeline.config import Config, UserError
from pipeline.data.base import DataError, DataSet, data_of
from pipeline.data.words import SEVERAL, key_of, names_of_classes
from pipeline.learning.checkpoint import Checkpoint, load_student
from pipeline.learning.scoring import Scored, rounded
from pipeline.learning.text import features_of_file, labelled_words, text_of_names
from pipeline.looking.confusion import confusion_picture
from pipeline.looking.extremes import save_extremes
from pipeline.looking.results import read_metrics, result_table
from pipeline.ops import metrics
from pipeline.running.console import mention, say
from pipeline.running.manifests import found_manifest, required_manifest
from pipeline.running.provenance import provenance
from pipeline.running.rows import check_current, different_classes
from pipeline.running.table import config_fingerprint, fingerprint, labels_stage


@dataclass(frozen=True)
class Task:
    """One evaluation: the images, the classes' text features, where its results go and what is said beside them."""

    label: str
    data: DataSet
    text: Callable[[Checkpoint], Tensor]  # -> (K, C) or (K, n, C)
    folder: Path
    identity: str
    config: str  # what the config asks, hashed
    said: Callable[[Checkpoint], dict[str, Any]] = field(default=lambda checkpoint: {})


def evaluate(config: Config) -> dict[str, Any]:
    """Evaluates the finished training on every test image; returns and writes the metrics.

    Raises: MissingCache, StaleCache, DataError (a test image without a mask).
    """
    data = data_of(config.data)  # what is wrong with it is said before what is stale
    above = required_manifest(config, "train")
    check_student(config, data, above)
    facts = {"test": data.identity("test")}
    labels = data.identity("test", "labels")
    if labels != facts["test"]:  # masks of their own, not made with the images
        facts["labels"] = labels
    identity = fingerprint(config, "eval", above["fingerprint"], facts)
    own = config_fingerprint(config, "eval")
    folder = config.run_path / "eval"
    task = Task(config.name, data, lambda checkpoint: checkpoint.text, folder, identity, own)
    return _evaluated(config, above, task)


def check_student(config: Config, data: DataSet, manifest: dict[str, Any]) -> None:
    """Compares a finished training with the data set and the cache as they are now.

    Raises: StaleCache for a student of other classes or another split, or of labels that were made again since. That
    training images or masks have changed since is said, and no error: the student is what it is.
    """
    for what, was, now in (
        ("classes", manifest.get("classes") or [], data.classes),
        ("unseen classes", manifest.get("unseen") or [], data.unseen),
    ):
        if list(was) != list(now):
            raise StaleCache(
                f"{config.run_path}: the student was trained with other {what} than {data.name} has now: "
                f"{different_classes(was, now)}. Run `cli.py extract`, `{labels_stage(config)}` and `train` "
                "again; what is unchanged is not made again."
            )
    stage = labels_stage(config)
    labels = found_manifest(config, stage)
    if labels is None:
        return  # the cache is not here
    if labels.get("content") != manifest.get("upstream"):
        raise StaleCache(
            f"{config.run_path}: the labels in {config.cache_path} were made again since this student was trained. Run "
            "`cli.py train` again."
        )
    try:
        check_current(config.cache_path, stage, data, str(labels["fingerprint"]))
    except StaleCache as error:
        say(f"eval: the training part is not what this student was trained on: {error}")
    except (DataError, CacheError):
        pass  # there is no training part here to compare


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
    data, text = data_of(other.data), other.text
    above = required_manifest(config, "train")
    named = names_of_classes(data.classes, text.synonyms)
    several = SEVERAL if text.features is None else None
    moved = config.model_copy(update={"data": other.data})
    facts = {
        "images": data.identity("test"),
        "labels": data.identity("test", "labels"),
        "classes": [data.classes, data.unseen, named],
        "several_names": several,
        "text": _bytes_digest(text.features),
    }

    def features(checkpoint: Checkpoint) -> Tensor:
        if text.features is None:
            return text_of_names(checkpoint, named)
        shape = (len(data.classes), checkpoint.text.shape[1])
        return torch.from_numpy(features_of_file(text.features, shape, data.name))

    def said(checkpoint: Checkpoint) -> dict[str, Any]:
        labelled = labelled_words(checkpoint)
        known = {
            name: sorted(word for word in {name, *names} if key_of(word) in labelled)
            for name, names in zip(data.classes, named, strict=True)
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
            "several_names": several,
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
    return _evaluated(config, above, task)


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


def _evaluated(config: Config, above: dict[str, Any], task: Task) -> dict[str, Any]:
    """Does the task unless its results are there; returns the metrics."""
    path, section = task.folder / "metrics.json", config.eval
    found = read_metrics(path)
    if found is not None and found.get("fingerprint") == task.identity and found.get("pictures") == section.pictures:
        mention(f"eval: nothing to do, {path} is of this student, config and data")
        _say(task, found)
        return found
    student, checkpoint = load_student(config.run_path / "train" / above["student"])
    if torch.cuda.is_available():
        student = student.cuda()
    scored = Scored(student, task.text(checkpoint), task.data, config.teacher.image_size, section)
    began = time.perf_counter()
    scored.count_all()
    seconds = round(time.perf_counter() - began, 2)
    result = scored.summary() | {
        "fingerprint": task.identity,
        "student": above["fingerprint"],
        "config": task.config,
        **task.said(checkpoint),
        "made": (made := provenance())
        | {"revision": checkpoint.revision, "evaluated": made["revision"], "seconds": seconds},
    }
    matrix = scored.swept.matrix(section.gamma)
    with whole_file(task.folder / "confusion.npy") as file:
        np.save(file, matrix)
    _write_per_class(task.folder / "per_class.csv", matrix, task.data)
    confusion_picture(matrix, task.data.classes, task.data.unseen, task.folder / "confusion.png", task.label)
    save_extremes(task.folder / "pictures", scored.extremes(), task.data)
    write_text(path, json.dumps(result, indent=2) + "\n")
    _say(task, result)
    return result


def _say(task: Task, result: dict[str, Any]) -> None:
    say(result_table({task.label: result}).drawn())
    if best := result.get("best_of_sweep"):
        say(f"best of the sweep, chosen on these images: gamma {best['gamma']:g}, hIoU {best['hIoU']:.1f}")


def _write_per_class(path: Path, matrix: np.ndarray, data: DataSet) -> None:
    """A line a class, in the order of the ids; what can't be scored (an absent class) stays empty."""
    iou, accuracy = metrics.iou_per_class(matrix), metrics.class_accuracy(matrix)
    page = io.StringIO()
    lines = csv.writer(page, lineterminator="\n")
    lines.writerow(("class", "group", "IoU", "accuracy", "pixels"))
    for i, name in enumerate(data.classes):
        group = "unseen" if name in data.unseen else "seen"
        lines.writerow((name, group, rounded(100 * iou[i]), rounded(100 * accuracy[i]), matrix[i].sum()))
    write_text(path, page.getvalue())
