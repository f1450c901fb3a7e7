"""ADE20K for evaluation: its 150 classes as published (SceneParse150), or 847 of the full release, converted once.

    150   root/images/{training,validation}/*.jpg  root/annotations/{training,validation}/*.png    0 (other), 1-150
    847   root/images/ADE/{training,validation}/**/ADE_*.jpg      the full release, ADE20K_2021_17_01
          root/annotations_full/{training,validation}/*.png       16 bits: 0 (no label), 1-3688, the release's numbers
          root/classes847.txt                                     `number: name` a line: those that are classes

The 847 classes are the objects that occur both in the training and in the validation images (MaskFormer, Cheng et al.
2021, appendix). Which they are, the release's own files say, so `cli.py prepare ade847` finds them there.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.base import DataError, Sample, key_of
from pipeline.data.classes import ADE20K_CLASSES, ADE20K_FULL
from pipeline.data.files import (
    FileDataSet,
    files_by_id,
    folder_of,
    paired,
    raw_table,
    read_ids,
    refuse_missing,
    root_of,
    stored_mask,
)
from pipeline.ops.labels import IGNORE, LABEL

FOLDERS = {"train": "training", "test": "validation"}
FULL_IMAGES, FULL_MASKS, FULL_NAMES = Path("images", "ADE"), "annotations_full", "classes847.txt"
NUMBERS = 26 * 256  # that red, 0 to 250 in tens, and green can say
PREPARE = "`cli.py prepare ade847` makes it, and the masks."


class Ade20k(FileDataSet):
    """Raw 0 (other objects) has no label, 1..K -> 0..K-1. All are seen unless `unseen` says otherwise.

    Raises: see FileDataSet; DataError for another number of classes, or without the names of 847.
    """

    name = "ade20k"
    names: Sequence[str] = ADE20K_CLASSES
    table = raw_table(len(ADE20K_CLASSES), shift=1, ignored=(0, 255))

    def __init__(self, root: str, *, num_classes: int = len(ADE20K_CLASSES), **shared: Any) -> None:
        if num_classes not in (len(ADE20K_CLASSES), ADE20K_FULL):
            raise DataError(f"data.num_classes is {num_classes!r}; ADE20K's are 150, or 847 of the full release.")
        self.is_full = num_classes == ADE20K_FULL
        super().__init__(root, **shared)

    def describe(self, root: str) -> dict[str, Any]:
        if not self.is_full:
            return super().describe(root)
        numbers = read_numbers(root_of(root, self.name) / FULL_NAMES)
        self.names = list(numbers.values())
        self.table = np.full(NUMBERS, IGNORE, LABEL)
        self.table[list(numbers)] = np.arange(len(numbers))
        return super().describe(root)

    def list_samples(self, part: str) -> list[Sample]:
        if self.is_full:
            images = {path.stem: str(path) for path in full_images(self.root, part)}
            folder = folder_of(self.root / FULL_MASKS / FOLDERS[part], PREPARE)
            masks = files_by_id(folder, ".png")
            refuse_missing(images, masks, "images have no mask", folder, "`cli.py prepare ade847` makes those missing.")
            return [Sample(i, images[i], masks[i]) for i in sorted(images)]
        todo = "data.root must be ADEChallengeData2016, which holds images/ and annotations/."
        images_, masks_ = (self.root / kind / FOLDERS[part] for kind in ("images", "annotations"))
        return paired(images_, ".jpg", masks_, todo)

    def description_files(self, part: str) -> list[Path]:
        return [self.root / FULL_NAMES] if self.is_full else []

    def label_hint(self, raw: set[int]) -> str:
        if self.is_full:
            return f" Masks of {FULL_MASKS} hold the numbers of the full release."
        return " Masks hold 0 (other) and 1-150: those of SceneParse150, not the full ADE20K's."


# ---- the full release ------------------------------------------------------------------------------------------------


def full_images(root: Path, part: str) -> list[Path]:
    """The photographs of a part of the full release, sorted. Raises: DataError."""
    top = folder_of(root / FULL_IMAGES / FOLDERS[part], "data.root must be ADE20K_2021_17_01, which holds images/ADE.")
    found = []
    for at, folders, names in os.walk(top):
        folders[:] = [name for name in folders if not name.startswith("ADE_")]  # each image's objects, one file each
        found += [Path(at, name) for name in names if name.startswith("ADE_") and name.lower().endswith(".jpg")]
    return sorted(found, key=lambda path: path.name)


def read_numbers(path: Path) -> dict[int, str]:
    """The 847 classes, `number: name` a line, the number that of the full release. Raises: DataError."""
    found: dict[int, str] = {}
    for line in read_ids(path, PREPARE):
        number, colon, name = line.partition(":")
        is_number = number.strip().isdigit() and 0 < int(number) < NUMBERS and int(number) not in found
        if not colon or not is_number or not name.strip():
            raise DataError(f"{path}: {line!r} is no `number: name`, or its number stands there twice. Correct it.")
        found[int(number)] = name.strip()
    if len(found) != ADE20K_FULL:
        raise DataError(f"{path}: {len(found)} names; want those of {ADE20K_FULL} classes.")
    return found


def full_classes(root: Path, tick: Callable[[], None] = lambda: None) -> dict[int, str]:
    """Number and name of the objects that occur in both parts, by number. `tick` is called once an image.

    A name that several numbers have is told apart by what it is a kind of, or else by its number. Raises: DataError.
    """
    names: dict[int, str] = {}
    kinds: dict[int, str] = {}
    parts = []
    for part in FOLDERS:
        there: set[int] = set()
        for image in full_images(root, part):
            for number, name, kind in _objects(image.with_suffix(".json")):
                names.setdefault(number, name)
                kinds.setdefault(number, kind)
                there.add(number)
            tick()
        parts.append(there)
    found = {number: names[number] for number in sorted(set.intersection(*parts))}
    found |= {number: f"{found[number]} ({kinds[number]})" for number in _alike(found)}
    return found | {number: f"{found[number]} {number}" for number in _alike(found)}


def _alike(names: Mapping[int, str]) -> list[int]:
    """The numbers whose names CLIP can't tell from another's."""
    num = Counter(key_of(name) for name in names.values())
    return [number for number, name in names.items() if num[key_of(name)] > 1]


def _objects(path: Path) -> Iterator[tuple[int, str, str]]:
    """Number, name and kind of the whole objects of an image. Raises: DataError."""
    try:
        for thing in json.loads(path.read_bytes().decode(errors="replace"))["annotation"]["object"]:
            if int(thing["parts"]["part_level"]) == 0:
                kinds = thing.get("hypernym") or []
                kind = str(kinds[1] if len(kinds) > 1 else "").partition(",")[0]
                yield int(thing["name_ndx"]), " ".join(str(thing["name"]).split()), kind
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror}. Complete the download.") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: not the full ADE20K's ({type(error).__name__}: {error}). Replace it.") from None


def full_mask(image: Path) -> np.ndarray:
    """The numbers of an image's objects, 0 where there is none: (H, W) uint16.

    In NAME_seg.png red and green say the object's number: red / 10 x 256 + green (the release's own utils_ade20k.py).
    Raises: DataError.
    """
    path = image.with_name(f"{image.stem}_seg.png")
    pixels = stored_mask(path).pixels
    if pixels.ndim != 3:
        raise DataError(f"{path}: has no colours; want the full ADE20K's, whose colours are numbers. Replace it.")
    return pixels[..., 0].astype(np.uint16) // 10 * 256 + pixels[..., 1]
