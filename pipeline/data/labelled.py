"""What labelling tools export, one image at a time: the classes, and for each image what makes its labels.

Each reader (coco.py, coded.py, label_studio.py, supervisely.py) gives a `Labelled`; `cli.py prepare folder` writes its
masks and describes it. Listing opens no image, and what is made in `Item.make` holds one image in memory.

Axes: H, W pixels of one image.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.data.base import FORMATS, DataError, check_names, refuse_alike
from pipeline.data.classes import BACKGROUND
from pipeline.data.patterns import files_below
from pipeline.ops.labels import IGNORE, LABEL

MEANING = 1  # of a stamp: to be raised when the same annotations give other labels
ENDINGS = tuple(ending for endings in FORMATS.values() for ending in endings)
MASK_ENDINGS = (".png", ".bmp", ".tif", ".tiff")
# What folders of an export are called, by the part that they are taken for; the first that is there counts.
PART_FOLDERS = {"train": ("train", "training"), "test": ("test", "val", "valid", "validation")}
PREPARED = "prepared_masks"  # the folder of what `prepare folder` makes, in which no image or mask is looked for
SHOWN = 5  # of wrong values, in an error


@dataclass(frozen=True)
class Item:
    """An image and its labels: `make` gives (H, W) int16 class ids and IGNORE, `stamp` what they are made of."""

    image: Path
    stamp: Callable[[], str]
    make: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Labelled:
    """An export: its classes in the order of their ids, and the items of each part, no two with one stem.

    `passed_over`: what is no label here, counted while labels are made. `remarks`: lines for the user.
    """

    classes: tuple[str, ...]
    parts: Mapping[str, Sequence[Item]]
    palette: Sequence[Sequence[int]] | None = None
    passed_over: Counter[str] = field(default_factory=lambda: Counter())
    remarks: Sequence[str] = ()


class WrongValues(DataError):
    """A mask holds colours or values that mean nothing: `counts` by what they are shown as, `todo` for the user."""

    def __init__(self, file: str, counts: Mapping[str, int], todo: str) -> None:
        self.file, self.counts, self.todo = file, dict(counts), todo
        super().__init__(told([self]))


def told(errors: Sequence[WrongValues]) -> str:
    """One line on all the wrong values of several masks: each with its pixels, and a file that holds it."""
    pixels, first = Counter[str](), dict[str, str]()
    for error in errors:
        pixels.update(error.counts)
        for value in error.counts:
            first.setdefault(value, error.file)
    shown = [f"{value} ({num:,} pixels, first in {first[value]})" for value, num in pixels.most_common(SHOWN)]
    more = f" and {len(pixels) - SHOWN} more" if len(pixels) > SHOWN else ""
    masks = "1 mask" if len(errors) == 1 else f"{len(errors)} masks"
    return f"{errors[0].file}: no class for {', '.join(shown)}{more}, in {masks} of those looked at. {errors[0].todo}"


def stamp_of(*facts: object) -> str:
    """What labels are made of, as text for their file."""
    return hashlib.blake2b(repr((MEANING, *facts)).encode(), digest_size=16).hexdigest()


def stem_of(path: str | Path, suffix: str = "") -> str:
    """A file's name without its ending and without `suffix`, composed (NFC): how images and masks are paired."""
    stem = unicodedata.normalize("NFC", os.path.splitext(os.path.basename(path))[0])
    return stem.removesuffix(suffix)


def by_stem(paths: Iterable[Path], what: str, suffix: str = "") -> dict[str, Path]:
    """Stem -> path. Raises: DataError for two files of one stem, and names that a list of stems can't hold."""
    found: dict[str, Path] = {}
    for path in paths:
        stem = stem_of(path, suffix)
        if stem != stem.strip() or not stem or len(stem.splitlines()) != 1:
            raise DataError(f"{path}: blanks around the name, or nothing in it; rename the file.")
        other = found.setdefault(stem, path)
        if other != path:
            raise DataError(
                f"{other} and {path}: two {what} with one stem, {stem!r}, by which pairs are found. Rename one."
            )
    return found


def pictures_below(folder: Path, option: str, endings: Sequence[str] = ENDINGS) -> list[Path]:
    """The files of a folder and below with one of these endings, in any case, sorted. Raises: DataError for none."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder. {option} names the one to read.")
    below = (name for name in files_below(folder, str(folder)) if PREPARED not in Path(name).parts)
    names = sorted(name for name in below if name.lower().endswith(tuple(endings)))
    if not names:
        raise DataError(
            f"{folder}: holds no file that ends in {', '.join(endings)}. Does {option} name the right folder?"
        )
    return [folder / name for name in names]


def checked_classes(where: object, names: Sequence[object]) -> tuple[str, ...]:
    """Class names: text, none blank, repeated or read alike by CLIP. Raises: DataError."""
    if not names:
        raise DataError(f"{where}: names no class. Label something first, and export it again.")
    found = check_names(f"{where}: classes", names, [str(name) for name in names])
    refuse_alike(f"{where}: classes", found)
    return found


def with_background(classes: tuple[str, ...], *, is_class: bool) -> tuple[tuple[str, ...], int]:
    """The classes, and what a pixel gets that nothing was drawn on: IGNORE, or the class background, then the first."""
    if not is_class:
        return classes, IGNORE
    classes = classes if BACKGROUND in classes else (BACKGROUND, *classes)
    return classes, classes.index(BACKGROUND)


@dataclass(frozen=True)
class Shape:
    """One object's pixels: `mask` (h, w) bool, with its first row and column in the image."""

    label: int
    mask: np.ndarray
    top: int
    left: int

    @classmethod
    def of(cls, label: int, mask: np.ndarray) -> Shape:
        """Of a mask of the whole image, (H, W) bool, cut to what it covers: an image may have hundreds."""
        rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        if not rows.size:
            return cls(label, np.zeros((0, 0), bool), 0, 0)
        top, left = int(rows[0]), int(columns[0])
        return cls(label, mask[top : rows[-1] + 1, left : columns[-1] + 1].copy(), top, left)

    @property
    def num_pixels(self) -> int:
        return int(np.count_nonzero(self.mask))


def painted(size: tuple[int, int], shapes: Iterable[Shape], unlabelled: int) -> np.ndarray:
    """Labels of an image, (H, W) int16: shapes in their order, a later one on top, on `unlabelled`."""
    labels = np.full(size, unlabelled, LABEL)
    for shape in shapes:
        height, width = shape.mask.shape
        labels[shape.top : shape.top + height, shape.left : shape.left + width][shape.mask] = shape.label
    return labels


def smaller_on_top(shapes: Iterable[Shape]) -> list[Shape]:
    """Largest first; those without a label (crowds) below all others. Of equals the order stays."""
    return sorted(shapes, key=lambda shape: (shape.label != IGNORE, -shape.num_pixels))


def parts_by_folder(names: Iterable[str]) -> dict[str, str]:
    """Part -> the folder that is taken for it, if there is one for training: train, and test or else val."""
    lower = {name.lower(): name for name in names}
    found = {}
    for part, known in PART_FOLDERS.items():
        if (name := next((name for name in known if name in lower), None)) is not None:
            found[part] = lower[name]
    return found if "train" in found else {}
