"""What a sample of a data set's files says about it: decodable? right ids? a sound split?

Pairs, lists and folders are checked when the samples are listed (pipeline/data); here files are opened. The usual ways
to near-zero scores are looked for by name: ids off by one, background read as a class, 255 and 0 mixed up,
training images among the test images; and those to good scores that mean nothing: masks of 0 and 255 whose foreground
is ignored, palettes that give an index another class in each file, seen classes that never occur.

Axes: K classes.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.data.base import PARTS, BadImage, DataError, DataSet, MaskFacts, Sample
from pipeline.data.classes import PUBLISHED_COUNTS
from pipeline.ops.labels import IGNORE

WHITE = 255  # the raw id that is a class in black and white masks, and no label in others
BACKGROUND_NAMES = {"background", "bg", "void", "unlabeled", "unlabelled", "other", "none"}
MOST_LISTED = 3
DOMINANT, NEARLY_ALL = 0.5, 0.9  # share of labelled pixels; share of masks
ANSWERED = {"reduce_zero_label", "values"}  # keys that say what 0 is: then it isn't asked again
AT_ONCE = 512  # masks whose facts, 2 KiB each, are waited for together
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
class Palettes:
    """The colours that indices have in a part's masks, and the first two files that contradict each other."""

    first: dict[Any, tuple[Any, str]] = field(default_factory=dict)
    clash: str = ""

    def add(self, colours: Mapping[int, tuple[int, int, int]], file: str) -> None:
        num = Counter(colours.values())
        for index, colour in colours.items():
            ways = [(index, colour)] + ([(colour, index)] if num[colour] == 1 else [])
            for key, value in ways:
                other, where = self.first.setdefault(key, (value, file))
                if other != value and not self.clash:
                    what = f"index {key}" if key == index else f"the colour {list(colour)}"
                    said = [f"index {v}" if isinstance(v, int) else str(list(v)) for v in (other, value)]
                    self.clash = f"{where} and {file}: {what} is {said[0]} in the one, {said[1]} in the other"

    def join(self, other: Palettes) -> None:
        """Compares the colours of another part's masks."""
        for key, (value, file) in other.first.items():
            self.add({key: value} if isinstance(key, int) else {value: key}, file)


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
    num_unlabelled: int = 0  # of all samples, those without a mask
    doubts: list[str] = field(default_factory=list)  # pairs about which something can't be decided
    with_255: dict[int, int] = field(default_factory=dict)  # value -> masks that hold it and 255 alone
    first_with_255: str = ""  # a file of these
    num_several: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})  # with 255 or not
    palettes: Palettes = field(default_factory=lambda: Palettes())
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))  # by label, IGNORE last
    masks: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))  # that hold the label


def look(data: DataSet, part: str, most: int) -> Seen:
    """Opens up to `most` images and masks of a part, evenly spread. Raises: DataError of the listing."""
    samples = data.samples(part)
    seen = _begun(data, samples, part)
    for place in np.unique(np.linspace(0, len(samples) - 1, min(most, len(samples))).astype(int)):
        _look_at(data, samples[place], seen)
    return seen


def look_at_masks(
    data: DataSet, samples: Sequence[Sample], part: str, tick: Callable[[int], None] = lambda num: None
) -> Seen:
    """Opens the mask of every sample, in threads, and no image; `tick` is called with 1 for each."""
    seen = _begun(data, samples, part)

    def facts(sample: Sample) -> MaskFacts | DataError | None:
        try:
            return data.mask_facts(sample)
        except DataError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for first in range(0, len(samples), AT_ONCE):
            group = samples[first : first + AT_ONCE]
            for sample, found in zip(group, pool.map(facts, group), strict=True):
                _add(seen, sample, found)
                tick(1)
    return seen


def _begun(data: DataSet, samples: Sequence[Sample], part: str) -> Seen:
    none = np.zeros(len(data.classes) + 1, np.int64)
    num_unlabelled = sum(sample.mask is None for sample in samples)
    return Seen(part, len(samples), num_unlabelled=num_unlabelled, pixels=none, masks=none.copy())


def _look_at(data: DataSet, sample: Sample, seen: Seen) -> None:
    try:
        height, width = data.image(sample).shape[:2]
        seen.sides.append((width, height))
    except BadImage as error:
        seen.num_images += 1
        seen.bad.append(str(error))
        return
    try:
        _add(seen, sample, data.mask_facts(sample))
    except DataError as error:
        _add(seen, sample, error)


def _add(seen: Seen, sample: Sample, found: MaskFacts | DataError | None) -> None:
    """Counts what one mask holds, or is wrong with it."""
    seen.num_images += 1
    if isinstance(found, DataError):
        (seen.bad if isinstance(found, BadImage) else seen.wrong).append(str(found))
        return
    if found is None:
        return
    seen.num_masks += 1
    seen.pixels += found.pixels
    seen.masks += found.pixels > 0
    if found.doubt:
        seen.doubts.append(found.doubt)
    if found.colours is not None:
        seen.palettes.add(found.colours, str(sample.mask))
    if found.raw is not None:
        others = found.raw - {WHITE}
        has_255 = WHITE in found.raw
        if has_255 and len(others) == 1:
            seen.with_255[min(others)] = seen.with_255.get(min(others), 0) + 1
            seen.first_with_255 = seen.first_with_255 or str(sample.mask)
        elif len(others) > 1:
            seen.num_several[has_255] += 1


def complaints(data: DataSet, parts: Sequence[Seen], max_bad: int) -> list[Complaint]:
    """What is wrong, most basic first."""
    found = []
    for seen in parts:
        if seen.wrong:
            what = f"{len(seen.wrong)} of {seen.num_images} {seen.part} masks looked at, the first: {seen.wrong[0]}"
            found.append(Complaint("masks that can't be used", what, "All masks must be right; extract stops."))
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
    return found + _across(data, parts) + _overlap(data, {seen.part for seen in parts})


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


def _stated(data: DataSet) -> frozenset[str] | None:
    """The keys that a description states; None for a data set that has none, whose masks are as published."""
    return getattr(data, "stated", None)


def _all_ignored(data: DataSet, seen: Seen) -> Complaint | None:
    if not seen.num_masks or seen.pixels[:IGNORE].any():
        return None
    file = f" ({seen.first_with_255})" if seen.first_with_255 else ""
    values = "" if _stated(data) is None else " If 255 stands for a class, name it: `values: {255: ...}`."
    return Complaint(
        "nothing is labelled",
        f"all pixels of {seen.num_masks} {seen.part} masks{file} are ignored.",
        f"Are these the right masks, and is `ignore` the id of pixels without a label?{values}",
    )


def _black_and_white(data: DataSet, seen: Seen) -> Complaint | None:
    """Masks of one class and 255, while more are described: 255 is a class, and would be ignored.

    Where few masks hold several classes and none of these 255, the few were made by another tool.
    """
    stated, table = _stated(data), getattr(data, "table", None)
    if stated is None or table is None or "ignore" in stated or table[WHITE] != IGNORE:
        return None
    if len(seen.with_255) != 1 or seen.num_several[True]:
        return None
    ((value, num),) = seen.with_255.items()
    occur = set(np.flatnonzero(seen.masks[:IGNORE]).tolist())
    wanted = range(len(data.classes)) if seen.part == "test" else data.seen_ids
    missing = [i for i in wanted if i not in occur]
    several = seen.num_several[False]
    is_alone = len(occur) == 1 and missing
    is_mixed = len(data.classes) == 2 == len(occur) and 0 < several <= (1 - NEARLY_ALL) * (num + several)
    if not is_alone and not is_mixed:
        return None
    other = missing[0] if is_alone else 1 - int(table[value])
    return Complaint(
        "255 is ignored",
        f"{num} of {seen.num_masks} {seen.part} masks hold {value} and 255 alone (the first: {seen.first_with_255}), "
        f"and 255 is read as no label: {data.classes[other]!r} is never learned or measured there.",
        f"If 255 stands for it, set `values: {{255: {other}}}` in dataset.yaml; if it means no label, state "
        "`ignore: 255` there.",
    )


def _permuted(data: DataSet, seen: Seen) -> Complaint | None:
    """Indexed masks whose palettes contradict each other: what an index means differs between files."""
    if _stated(data) is None or not seen.palettes.clash:
        return None
    return Complaint(
        "palettes differ",
        f"{seen.palettes.clash}, so an index is not the same class in both.",
        "List the classes' colours as `palette` in dataset.yaml, and masks are read by colour; if colours mean nothing "
        "here, set `read_masks: by_index`.",
    )


def _across(data: DataSet, parts: Sequence[Seen]) -> list[Complaint]:
    """Palettes that are alike within each part and differ between the parts."""
    if any(seen.palettes.clash for seen in parts):
        return []
    both = Seen("train and test")
    for seen in parts:
        both.palettes.join(seen.palettes)
    return [*filter(None, [_permuted(data, both)])]


def no_labels(data: DataSet, seen: Seen) -> Complaint | None:
    """No training image has a mask."""
    if seen.part != "train" or seen.num_unlabelled < seen.num_samples:
        return None
    return Complaint(
        "nothing is labelled",
        f"none of the {seen.num_samples} training images has a mask, and names are learned from labels.",
        "Label some images, and give a pattern `masks` for the training part.",
    )


def _never_seen(data: DataSet, seen: Seen) -> Complaint | None:
    """Seen classes in no training mask, where all were looked at."""
    missing = never_seen(data, seen)
    if seen.part != "train" or not missing or any(check(data, seen) for check in SAYING_WHY):
        return None
    return Complaint(
        "seen classes without a training pixel",
        f"{', '.join(map(repr, missing[:MOST_LISTED]))} ({len(missing)} of {len(data.seen_ids)}) are in none of the "
        f"{seen.num_masks} training masks.",
        "They can't be learned: list them as unseen, take them out of the classes, or say which value they have "
        "(`values`).",
    )


def never_seen(data: DataSet, seen: Seen) -> list[str]:
    """The seen classes that no mask of a wholly looked-at part holds."""
    is_whole = seen.num_images == seen.num_samples and seen.pixels[:IGNORE].any()
    return [data.classes[i] for i in data.seen_ids if not seen.masks[i]] if is_whole else []


def _off_by_one(data: DataSet, seen: Seen) -> Complaint | None:
    """Class 0 never, and nearly all others: the ids may begin at 1."""
    num, occurs = len(data.classes), seen.masks[: len(data.classes)] > 0
    if ANSWERED & (_stated(data) or frozenset()):
        return None
    if seen.num_masks < MIN_MASKS or num < 3 or occurs[0] or occurs[1:].mean() < NEARLY_ALL:
        return None
    return Complaint(
        "off by one",
        f"no pixel of {seen.num_masks} {seen.part} masks is class 0, {data.classes[0]!r}, and the others "
        f"occur up to {int(np.flatnonzero(occurs)[-1])}, {data.classes[int(np.flatnonzero(occurs)[-1])]!r}.",
        "If ids begin at 1, set reduce_zero_label: true; if 0 is background without a pixel here, list it first. If "
        "all is right, say so: reduce_zero_label: false.",
    )


def _reduced_twice(data: DataSet, seen: Seen) -> Complaint | None:
    """With reduce_zero_label, nothing is 0 in the files and the last class never occurs: ids began at 0."""
    occurs = seen.masks[: len(data.classes)] > 0
    is_reduced = getattr(data, "reduce_zero_label", False)
    if not is_reduced or len(occurs) == 1 or seen.num_masks < MIN_MASKS or occurs[-1] or not occurs[:-1].all():
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
    if len(data.classes) == 1 or ANSWERED & (_stated(data) or frozenset()):
        return None
    share, spread = seen.pixels[0] / labelled, seen.masks[0] / seen.num_masks
    if share < DOMINANT or spread < NEARLY_ALL:
        return None
    return Complaint(
        "background read as a class",
        f"{data.classes[0]!r}, id 0, is {100 * share:.0f} % of the labelled pixels and in {100 * spread:.0f} % of "
        f"the {seen.part} masks.",
        "If 0 means background or no label, set reduce_zero_label: true (ids then begin at 1), or list it as a class. "
        f"If it is {data.classes[0]!r}, say so: reduce_zero_label: false.",
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


# What can't be right, so that no stage goes on with it; then what is likely to be wrong.
CERTAIN = (_all_ignored, _black_and_white, _permuted)
SAYING_WHY = (_black_and_white, _off_by_one, _reduced_twice)  # a class never occurs
LABEL_CHECKS = (*CERTAIN, _off_by_one, _reduced_twice, _background_as_class, _never_seen, _no_unseen)


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
