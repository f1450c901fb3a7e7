"""What a sample of a data set's files says about it: decodable? right ids? a sound split?

Pairs, lists and folders are checked when the samples are listed (pipeline/data); here files are opened. The usual ways
to near-zero scores are looked for by name: ids off by one, background read as a class, 255 and 0 mixed up,
training images among the test images.

Axes: K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.data.base import IGNORE, PARTS, BadImage, DataError, DataSet, Sample
from pipeline.data.classes import PUBLISHED_COUNTS

BACKGROUND_NAMES = {"background", "bg", "void", "unlabeled", "unlabelled", "other", "none"}
MOST_LISTED = 3
DOMINANT, NEARLY_ALL = 0.5, 0.9  # share of labelled pixels; share of masks
MIN_MASKS = 8  # fewer say nothing about which classes never occur


@dataclass(frozen=True)
class Complaint:
    """Something wrong with the data, by a name, and what to do."""

    kind: str
    what: str
    todo: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.what} {self.todo}"


@dataclass
class Seen:
    """What the looked-at samples of a part hold."""

    part: str
    num_samples: int = 0
    num_images: int = 0  # looked at
    num_masks: int = 0
    sides: list[tuple[int, int]] = field(default_factory=list)  # (width, height)
    bad: list[str] = field(default_factory=list)  # images that extract would quarantine
    wrong: list[str] = field(default_factory=list)  # masks that are errors
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))  # by label
    masks: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))  # that hold the label


def look(data: DataSet, part: str, most: int) -> Seen:
    """Opens up to `most` images and masks of a part, evenly spread. Raises: DataError of the listing."""
    samples = data.samples(part)
    seen = Seen(part, len(samples))
    for place in np.unique(np.linspace(0, len(samples) - 1, min(most, len(samples))).astype(int)):
        _look_at(data, samples[place], seen)
    return seen


def _look_at(data: DataSet, sample: Sample, seen: Seen) -> None:
    seen.num_images += 1
    try:
        height, width = data.image(sample).shape[:2]
        seen.sides.append((width, height))
    except BadImage as error:
        seen.bad.append(str(error))
        return
    try:
        labels = data.labels(sample)
    except DataError as error:
        seen.wrong.append(str(error))
        return
    if labels is not None:
        counts = np.bincount(labels.ravel(), minlength=256)
        seen.num_masks += 1
        seen.pixels += counts
        seen.masks += counts > 0


def complaints(data: DataSet, parts: Sequence[Seen], max_bad: int) -> list[Complaint]:
    """What is wrong, most basic first."""
    found = []
    for seen in parts:
        if seen.wrong:
            what = f"{len(seen.wrong)} of {seen.num_images} {seen.part} masks looked at, the first: {seen.wrong[0]}"
            found.append(
                Complaint("masks that can't be used", what, "All masks must be right; extract stops.")
            )
        expected = len(seen.bad) / max(seen.num_images, 1) * seen.num_samples
        if seen.bad and expected > max_bad:
            found.append(
                Complaint(
                    "images that can't be decoded",
                    f"{len(seen.bad)} of {seen.num_images} {seen.part} images looked at, the first: {seen.bad[0]}",
                    f"Some {expected:.0f} of {seen.num_samples} would be quarantined, more than cache.max_bad "
                    f"{max_bad}: mend them.",
                )
            )
        found += [*filter(None, (check(data, seen) for check in LABEL_CHECKS))]
    return found + _overlap(data, {seen.part for seen in parts})


def count_complaint(kind: str, options: Mapping[str, Any], seen: Seen) -> Complaint | None:
    """Another number of images than published, where the config asks for the published lists."""
    wanted = PUBLISHED_COUNTS.get(kind, {}).get(seen.part, ())
    if not wanted or seen.num_samples in wanted or options.get("limit") or options.get(f"{seen.part}_list"):
        return None
    return Complaint(
        "another number of images",
        f"{kind} has {' or '.join(f'{count:,}' for count in wanted)} {seen.part} images, found {seen.num_samples:,}.",
        "Complete the download; if the part is meant, set data.limit, or list it.",
    )


def _all_ignored(data: DataSet, seen: Seen) -> Complaint | None:
    if not seen.num_masks or seen.pixels[:IGNORE].any():
        return None
    return Complaint(
        "nothing is labelled",
        f"all pixels of {seen.num_masks} {seen.part} masks are {IGNORE}, ignored.",
        "Are these the right masks, and is `ignore` the id of pixels without a label?",
    )


def _off_by_one(data: DataSet, seen: Seen) -> Complaint | None:
    """Class 0 never, and nearly all others: the ids may begin at 1."""
    num, occurs = len(data.classes), seen.masks[: len(data.classes)] > 0
    if seen.num_masks < MIN_MASKS or num < 3 or occurs[0] or occurs[1:].mean() < NEARLY_ALL:
        return None
    return Complaint(
        "off by one",
        f"no pixel of {seen.num_masks} {seen.part} masks is class 0, {data.classes[0]!r}, and the others "
        f"occur up to {int(np.flatnonzero(occurs)[-1])}, {data.classes[int(np.flatnonzero(occurs)[-1])]!r}.",
        "If ids begin at 1, set reduce_zero_label: true; if 0 is background without a pixel here, list it first.",
    )


def _reduced_twice(data: DataSet, seen: Seen) -> Complaint | None:
    """With reduce_zero_label, nothing is 0 in the files and the last class never occurs: ids began at 0."""
    occurs = seen.masks[: len(data.classes)] > 0
    is_reduced = getattr(data, "reduce_zero_label", False)
    if not is_reduced or seen.num_masks < MIN_MASKS or occurs[-1] or not occurs[:-1].all():
        return None
    return Complaint(
        "off by one",
        f"reduce_zero_label is set, and no pixel of {seen.num_masks} {seen.part} masks is of the last class, "
        f"{data.classes[-1]!r}, while all others occur.",
        "If ids begin at 0, take reduce_zero_label away: class 0 is being thrown away as unlabelled.",
    )


def _background_as_class(data: DataSet, seen: Seen) -> Complaint | None:
    """Id 0 fills most of nearly every mask, and its class has no such name: it is the background's 0."""
    labelled = int(seen.pixels[:IGNORE].sum())
    if seen.num_masks < MIN_MASKS or data.classes[0].lower() in BACKGROUND_NAMES or not labelled:
        return None
    share, spread = seen.pixels[0] / labelled, seen.masks[0] / seen.num_masks
    if share < DOMINANT or spread < NEARLY_ALL:
        return None
    return Complaint(
        "background read as a class",
        f"{data.classes[0]!r}, id 0, is {100 * share:.0f} % of the labelled pixels and in {100 * spread:.0f} % of "
        f"the {seen.part} masks.",
        "If 0 means background or no label, set reduce_zero_label: true (ids then begin at 1), or list it as a class.",
    )


def _no_unseen(data: DataSet, seen: Seen) -> Complaint | None:
    """Unseen classes in no test mask: mIoU(U) has nothing to measure."""
    missing = [data.classes[i] for i in data.unseen_ids if not seen.masks[i]]
    is_whole = seen.num_images == seen.num_samples
    if seen.part != "test" or not is_whole or not seen.num_masks or not missing:
        return None
    return Complaint(
        "unseen classes without a test pixel",
        f"{', '.join(map(repr, missing[:MOST_LISTED]))} ({len(missing)} of {len(data.unseen_ids)}) are in none of "
        f"the {seen.num_masks} test masks.",
        "They can't be measured: test on more images, or choose other unseen classes.",
    )


LABEL_CHECKS = (_all_ignored, _off_by_one, _reduced_twice, _background_as_class, _no_unseen)


def _overlap(data: DataSet, parts: set[str]) -> list[Complaint]:
    """Test images that are training images: the same file, or the same id with the same content."""
    if parts != set(PARTS):
        return []
    train, test = ({sample.id: sample for sample in data.samples(part)} for part in PARTS)
    files = {sample.image for sample in train.values()}
    same = [i for i, sample in test.items() if sample.image in files]
    if not same:
        both = [i for i in test if i in train][:64]
        same = [i for i in both if data.stamp(train[i]) == data.stamp(test[i])]
    if not same:
        return []
    what = f"{len(same)} or more images are in both parts: {', '.join(map(repr, same[:MOST_LISTED]))}."
    return [Complaint("training images in the test part", what, "Take them out of one of the lists.")]
