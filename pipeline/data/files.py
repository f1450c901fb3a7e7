"""Data sets of files: images, indexed masks, lists of ids, and how they are found and paired."""

from __future__ import annotations

import hashlib
import os
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.data.base import (
    PARTS,
    BadImage,
    DataError,
    DataSet,
    MaskFacts,
    Sample,
    opened,
    orientation,
    read_image,
    unknown,
)
from pipeline.data.classes import Splits
from pipeline.ops.labels import IGNORE, LABEL, counts

INVALID = -2  # entry of a table of raw ids: no such id
STAMP_BYTES = 16 * 1024  # read from each end of a file for its stamp
COMPRESSED = (".png", ".jpg", ".jpeg", ".webp")  # any edit changes their size or their end


class FileDataSet(DataSet):
    """Images and indexed masks in files. A subclass names its classes, lists its samples and says what raw ids mean.

    It lies in the folder `root`; of each part only the first `limit` samples are taken, for tries. Its unseen
    classes are `unseen`, or else those of `split`, or else those of the first of the published `splits`.
    `table` (R,) int16 maps the raw ids of a mask to class ids, IGNORE or INVALID.
    Raises: DataError for a folder that isn't there, an unknown split or name, a limit below 1; listing the
    samples, for what is missing.
    """

    has_files = True
    names: Sequence[str] = ()  # of its classes
    own_palette: np.ndarray | None = None
    splits: Splits = {}  # noqa: RUF012 - nobody writes into it
    table: np.ndarray
    tables: Mapping[str, np.ndarray] = {}  # of masks whose names end like that, instead

    def __init__(
        self, root: str, *, limit: int | None = None, unseen: Sequence[str] | None = None, split: str | None = None
    ) -> None:
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
            raise DataError(f"data.limit is {limit!r}; want a whole number of samples, 1 or more, or null for all.")
        self.limit, self.is_unseen_given = limit, unseen is not None
        self._samples: dict[str, list[Sample]] = {}
        described = {"unseen": next(iter(self.splits.values()), ())} | self.describe(root)
        if split is not None:
            described["unseen"] = self._unseen_of(split)
        super().__init__(**described if unseen is None else described | {"unseen": unseen})

    def describe(self, root: str) -> dict[str, Any]:
        """What DataSet is constructed with. It finds out where the data set lies, too."""
        self.root = root_of(root, self.name)
        return {"classes": self.names, "palette": self.own_palette}

    def _unseen_of(self, split: str) -> Sequence[str]:
        if not self.splits:
            raise DataError(f"data.split is {split!r}, but {self.name} has no named splits; use data.unseen.")
        if split not in self.splits:
            raise unknown(f"data.split: {self.name} has no split", split, self.splits)
        return self.splits[split]

    @abstractmethod
    def list_samples(self, part: str) -> list[Sample]:
        """All samples of a part, read from the disk once."""

    def table_of(self, sample: Sample) -> np.ndarray:
        """The table for this sample's mask."""
        name = str(sample.mask)
        return next((table for ending, table in self.tables.items() if name.endswith(ending)), self.table)

    def label_hint(self, raw: set[int]) -> str:
        """What may be behind raw ids that the table doesn't know, and what to do."""
        return ""

    def samples(self, part: str) -> list[Sample]:
        if part not in PARTS:
            raise unknown(f"{self.name}: unknown part", part, PARTS)
        if part not in self._samples:
            found = self.list_samples(part)
            if not found:
                raise DataError(f"{self.name}: the {part} part has no image.")
            self._samples[part] = found[: self.limit]
        return list(self._samples[part])

    def image(self, sample: Sample) -> np.ndarray:
        return read_image(sample.image)

    def labels(self, sample: Sample) -> np.ndarray | None:
        found = self._read(sample)
        return None if found is None else found[1]

    def mask_facts(self, sample: Sample) -> MaskFacts | None:
        found = self._read(sample)
        if found is None:
            return None
        stored, labels, doubt = found
        raw, colours = None, None
        if stored.pixels.ndim == 2:
            raw = frozenset(values_in(stored.pixels))
            colours = None if stored.palette is None else _colours_of(stored.palette, raw)
        return MaskFacts(counts(labels, len(self.classes)), raw, colours, doubt)

    def _read(self, sample: Sample) -> tuple[StoredMask, np.ndarray, str] | None:
        """A sample's mask as stored, its labels, and what can't be decided about the pair. Raises: DataError."""
        if sample.mask is None:
            return None
        stored = stored_mask(sample.mask)
        doubt = self._check_size(sample, stored.pixels.shape[1], stored.pixels.shape[0])
        return stored, self.labels_of(sample, stored), doubt

    def labels_of(self, sample: Sample, stored: StoredMask) -> np.ndarray:
        """(H, W) int16 class ids and IGNORE of a mask as it is stored. Raises: DataError."""
        if stored.pixels.ndim != 2:
            raise DataError(
                f"{sample.mask}: mode {stored.mode}: a picture of colours. A mask has one channel, whose values are "
                f"class ids.{self.colour_hint(stored)}"
            )
        raw, table = stored.pixels, self.table_of(sample)
        inside = np.clip(raw, 0, len(table) - 1)  # (H, W)
        ids = table[inside]  # (H, W)
        if (is_strange := (ids == INVALID) | (inside != raw)).any():
            strange = np.unique(raw[is_strange]).tolist()
            listed = ", ".join(map(str, strange[:5])) + (", ..." if len(strange) > 5 else "")
            raise DataError(
                f"{sample.mask}: label id {listed} is none of {self.name}'s {len(self.classes)} classes, "
                f"nor ignored.{self.label_hint(set(strange))}"
                f"{'' if stored.palette is None else self.colour_hint(stored)}"
            )
        return np.asarray(ids)

    def colour_hint(self, stored: StoredMask) -> str:
        """What to do about a mask that is a picture of colours, or whose indices have colours and can't be read."""
        return ""

    def _check_size(self, sample: Sample, width: int, height: int) -> str:
        """Compares a mask's size with its image's; returns the doubt that is left where an EXIF tag turns the image
        and the mask fits it either way."""
        sizes = image_sizes(sample.image)
        if (width, height) == self.size_read(sizes):
            fits_both = sizes.turn != 1 and (width, height) == sizes.stored == sizes.upright
            return self.turned_doubt(sample, sizes.turn) if fits_both else ""
        hint = "Image and mask must belong to the same picture; resize masks with nearest neighbour only."
        if (width, height) in (sizes.stored, sizes.upright):
            hint = self.turned_hint(sizes)
        shown = self.size_read(sizes)
        raise DataError(
            f"{sample.mask}: the mask is {width} x {height} pixels, its image {sample.image} is "
            f"{shown[0]} x {shown[1]}. {hint}"
        )

    def size_read(self, sizes: Sizes) -> tuple[int, int]:
        """(width, height) of the image as `image` reads it."""
        return sizes.upright

    def turned_hint(self, sizes: Sizes) -> str:
        """What to do where the mask fits the image turned the other way."""
        return "It fits the image before its EXIF rotation: turn the mask too, or remove that EXIF tag."

    def turned_doubt(self, sample: Sample, turn: int) -> str:
        """A sentence on a mask that fits a turned image either way; or raises DataError."""
        return (
            f"{sample.image}: has an EXIF orientation of {turn} and is turned upright, and whether {sample.mask} was "
            "drawn on the upright picture can't be seen by its size: look at the overlay of one."
        )

    def stamp(self, sample: Sample) -> str:
        return file_stamp(sample.image)

    def mask_stamp(self, sample: Sample) -> str:
        """What the mask's pixels mean follows from options, which fingerprints have."""
        return "no mask" if sample.mask is None else file_stamp(sample.mask, whole=True)

    def files(self, part: str) -> list[str]:
        found = {path for sample in self.samples(part) for path in (sample.image, sample.mask) if path}
        return sorted(found | {str(path) for path in self.description_files(part)})

    def description_files(self, part: str) -> list[Path]:
        """What a part is described by beside its images and masks, if it is there: lists, tags, the description."""
        return []


def file_stamp(path: str | Path, *, whole: bool = False) -> str:
    """Size and blake2b of the first and last 16 KiB: a copy has the same stamp, unlike with times of change.

    Compressed pictures that differ at all differ in size or near their end; an edit in the middle of a large
    uncompressed file goes unnoticed unless `whole`, for labels, which are edited: then other files than compressed
    pictures are read from end to end. Raises: DataError when the file can't be read.
    """
    most = STAMP_BYTES
    if whole and not str(path).lower().endswith(COMPRESSED):
        most = max(most, os.path.getsize(path) if os.path.exists(path) else 0)
    try:
        with open(path, "rb") as file:
            digest = hashlib.blake2b(file.read(most), digest_size=16)
            size = file.seek(0, 2)
            file.seek(max(most, size - STAMP_BYTES))
            digest.update(file.read())
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror}. Restore the file or correct the list.") from None
    return f"{size}-{digest.hexdigest()}"


@dataclass(frozen=True)
class StoredMask:
    """A mask as its file has it: (H, W) integers, or (H, W, 3 or 4) uint8 colours.

    `palette` (256, 3) uint8 has the colours of indices.
    """

    mode: str
    pixels: np.ndarray
    palette: np.ndarray | None = None


def stored_mask(path: str | Path) -> StoredMask:
    """A mask as it is stored: palette indices, grey values, or colours. Raises: DataError.

    An orientation tag is refused: whether the pixels were turned before it was copied here, nobody can tell.
    """
    with opened(path, DataError) as image:
        if image.format in ("JPEG", "MPO"):
            raise DataError("a JPEG mask; its compression changes ids. Save masks as PNG")
        if image.mode not in {"L", "P", "1", "I", "I;16", "I;16B", "RGB", "RGBA"}:
            raise DataError(
                f"mode {image.mode}: no kind of mask. A mask has one channel, whose values are class ids, or colours "
                "(mode RGB) that `palette` names"
            )
        if any(str(tile[3]) in {"L;2", "L;4"} for tile in getattr(image, "tile", ())):
            raise DataError("greys of 2 or 4 bits, which decoders stretch to 0-255. Save the mask with 8 bits")
        if orientation(image) != 1:  # asked last: it decodes a PNG, and the tiles above are gone
            raise DataError(
                f"an EXIF orientation of {orientation(image)}; labels are read as stored. Save the mask upright, "
                "as its image is shown, without that tag"
            )
        pixels, mode = np.array(image), image.mode
        palette = _palette_of(image) if mode == "P" else None
        return StoredMask(mode, pixels.astype(np.uint8) if pixels.dtype == bool else pixels, palette)


def read_mask(path: str | Path) -> np.ndarray:
    """Class ids as they are stored, (H, W) integers: palette indices or grey values. Raises: DataError."""
    stored = stored_mask(path)
    if stored.pixels.ndim != 2:
        raise DataError(f"{path}: mode {stored.mode}: a picture of colours; want one channel of class ids.")
    return stored.pixels


def values_in(pixels: np.ndarray) -> list[int]:
    """The values that occur, sorted; counted up to 16 bits, since sorting the pixels takes ten times as long."""
    if pixels.dtype in (np.uint8, np.uint16):
        return np.flatnonzero(np.bincount(pixels.ravel())).tolist()
    return np.unique(pixels).tolist()


def _colours_of(palette: np.ndarray, used: Iterable[int]) -> dict[int, tuple[int, int, int]] | None:
    """The colours of the indices that occur; None where each is its own grey, which says nothing."""
    found = {i: (int(palette[i, 0]), int(palette[i, 1]), int(palette[i, 2])) for i in used}
    return None if all(colour == (i, i, i) for i, colour in found.items()) else found


def _palette_of(image: Image.Image) -> np.ndarray:
    """(256, 3) uint8; entries that the file lacks are black."""
    found = np.array(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)[:256]
    return np.concatenate([found, np.zeros((256 - len(found), 3), np.uint8)])


@dataclass(frozen=True)
class Sizes:
    """(width, height) of a picture as stored and upright, and its EXIF orientation, 1 to 8."""

    stored: tuple[int, int]
    upright: tuple[int, int]
    turn: int


def image_sizes(path: str | Path) -> Sizes:
    """The sizes of a picture, from its header. Raises: BadImage, DataError."""
    with opened(path, BadImage) as image:
        (width, height), turn = image.size, orientation(image)
        return Sizes((width, height), (height, width) if turn >= 5 else (width, height), turn)


def folder_of(path: Path, todo: str) -> Path:
    """The folder itself, if it is there. Raises: DataError that ends in what to do."""
    if not path.is_dir():
        raise DataError(f"{path}: no such folder. {todo}")
    return path


def root_of(root: object, kind: str) -> Path:
    """`data.root` as a folder that exists; ~ is the home folder."""
    if not isinstance(root, str | Path) or not str(root):
        raise DataError(f"data.root is {root!r}; kind {kind!r} wants the path of its folder.")
    return folder_of(Path(root).expanduser(), "Set data.root to where the data set lies.")


def read_ids(path: Path, todo: str = "") -> list[str]:
    """The lines of a list of sample ids; blank ones don't count. Raises: DataError, also for repeated ids."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise DataError(f"{path}: the list of samples can't be read: {error.strerror}. {todo}".rstrip()) from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: the list of samples is not UTF-8 text. Save it as such.") from None
    ids = [line.strip() for line in lines if line.strip()]
    refuse_repeated(ids, str(path))
    return ids


def refuse_repeated(ids: Sequence[str], where: str) -> None:
    repeated = [i for i, count in Counter(ids).items() if count > 1]
    if repeated:
        raise DataError(f"{where}: {repeated[0]!r} is listed twice; list each sample once.")


def files_by_id(folder: Path, ending: str) -> dict[str, str]:
    """id -> path of the files of a folder that end in `ending`, in any case; the id is what comes before.

    Raises: DataError for two files of one id.
    """
    found: dict[str, str] = {}
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.lower().endswith(ending.lower()) and not entry.name.startswith("."):
                other = found.setdefault(entry.name[: -len(ending)], entry.path)
                if other != entry.path:
                    raise DataError(f"{other} and {entry.path} have the same id; remove one.")
    return found


def refuse_missing(ids: Iterable[str], have: Mapping[str, str], what: str, where: object, todo: str) -> None:
    """Raises DataError naming the first ids that `have` lacks, and how many they are."""
    missing = [i for i in ids if i not in have]
    if missing:
        first = ", ".join(repr(i) for i in missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise DataError(f"{where}: {len(missing)} {what}: {first}. {todo}")


def paired(images: Path, ending: str, masks: Path, todo: str) -> list[Sample]:
    """The images of a folder that end in `ending`, each with the PNG of the same name in another, by name.

    Raises: DataError for images without a mask, or for a folder that isn't there, ending in what to do.
    """
    found, of_id = files_by_id(folder_of(images, todo), ending), files_by_id(folder_of(masks, todo), ".png")
    refuse_missing(found, of_id, "images have no mask", masks, "Complete the download.")
    return [Sample(i, found[i], of_id[i]) for i in sorted(found)]


def raw_table(num: int, *, shift: int = 0, ignored: Sequence[int] = (255,), most: int = 255) -> np.ndarray:
    """Raw ids shift..shift+num-1 -> 0..num-1, the ignored ones -> IGNORE, all others INVALID.

    (R,) int16, R as many as these and `most` ask for, at least 256.
    """
    table = np.full(1 + max(shift + num - 1, most, *ignored), INVALID, LABEL)
    table[shift : shift + num] = np.arange(num)
    table[list(ignored)] = IGNORE
    return table
