"""Data sets of files: images, indexed masks, lists of ids, and how they are found and paired."""

from __future__ import annotations

import hashlib
import os
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.base import (
    IGNORE,
    PARTS,
    BadImage,
    DataError,
    DataSet,
    Sample,
    opened,
    orientation,
    read_image,
    unknown,
)

INVALID = -1  # entry of a table of raw ids: no such id
STAMP_BYTES = 16 * 1024  # read from each end of a file for its stamp


class FileDataSet(DataSet):
    """Images and indexed masks in files. A subclass lists its samples and says what raw ids mean.

    `table` (256,) int16 maps raw ids of a mask to class ids, 255 or INVALID; `limit` keeps the first N
    samples of each part, for tries.
    """

    table: np.ndarray

    def __init__(self, *, limit: int | None = None, **described: Any) -> None:
        super().__init__(**described)
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
            raise DataError(
                f"data.limit is {limit!r}; want a whole number of samples, 1 or more, or null for all."
            )
        self.limit = limit
        self._samples: dict[str, list[Sample]] = {}

    @abstractmethod
    def list_samples(self, part: str) -> list[Sample]:
        """All samples of a part, read from the disk once."""

    def table_of(self, sample: Sample) -> np.ndarray:
        """The table for this sample's mask."""
        return self.table

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
        if sample.mask is None:
            return None
        raw = read_mask(sample.mask)
        self._check_size(sample, raw.shape[1], raw.shape[0])
        inside = np.clip(raw, 0, 255)  # (H, W)
        ids = self.table_of(sample)[inside]  # (H, W)
        strange = np.unique(raw[(ids == INVALID) | (inside != raw)]).tolist()
        if strange:
            listed = ", ".join(map(str, strange[:5])) + (", ..." if len(strange) > 5 else "")
            raise DataError(
                f"{sample.mask}: label id {listed} is none of {self.name}'s {len(self.classes)} classes, "
                f"nor ignored.{self.label_hint(set(strange))}"
            )
        return ids.astype(np.uint8)

    def _check_size(self, sample: Sample, width: int, height: int) -> None:
        stored, upright = image_sizes(sample.image)
        if (width, height) == upright:
            return
        hint = "Image and mask must belong to the same picture; resize masks with nearest neighbour only."
        if (width, height) == stored:
            hint = "It fits the image before its EXIF rotation: turn the mask too, or remove that EXIF tag."
        raise DataError(
            f"{sample.mask}: the mask is {width} x {height} pixels, its image {sample.image} is "
            f"{upright[0]} x {upright[1]}. {hint}"
        )

    def stamp(self, sample: Sample) -> str:
        return file_stamp(sample.image)

    def mask_stamp(self, sample: Sample) -> str:
        return "no mask" if sample.mask is None else file_stamp(sample.mask)


def file_stamp(path: str | Path) -> str:
    """Size and blake2b of the first and last 16 KiB: a copy has the same stamp, unlike with times of change.

    Compressed pictures that differ at all differ in size or near their end; an edit in the middle of a large
    uncompressed file would go unnoticed. Raises: DataError when the file can't be read.
    """
    try:
        with open(path, "rb") as file:
            digest = hashlib.blake2b(file.read(STAMP_BYTES), digest_size=16)
            size = file.seek(0, 2)
            file.seek(max(STAMP_BYTES, size - STAMP_BYTES))
            digest.update(file.read())
    except OSError as error:
        raise DataError(
            f"{path}: can't be read: {error.strerror}. Restore the file or correct the list."
        ) from None
    return f"{size}-{digest.hexdigest()}"


def read_mask(path: str | Path) -> np.ndarray:
    """Class ids as they are stored, (H, W) integers: palette indices or grey values. Raises: DataError.

    An orientation tag is refused: whether the pixels were turned before it was copied here, nobody can tell.
    """
    with opened(path, DataError) as image:
        if image.format == "JPEG":
            raise DataError("a JPEG mask; its compression changes ids. Save masks as PNG")
        if image.mode not in {"L", "P", "1", "I", "I;16", "I;16B"}:
            raise DataError(
                f"mode {image.mode}: a picture of colours. A mask has one channel, whose values are class ids"
            )
        if any(str(tile[3]) in {"L;2", "L;4"} for tile in getattr(image, "tile", ())):
            raise DataError(
                "greys of 2 or 4 bits, which decoders stretch to 0-255. Save the mask with 8 bits"
            )
        if orientation(image) != 1:  # asked last: it decodes a PNG, and the tiles above are gone
            raise DataError(
                f"an EXIF orientation of {orientation(image)}; labels are read as stored. Save the mask upright, "
                "as its image is shown, without that tag"
            )
        pixels = np.array(image)
        return pixels.astype(np.uint8) if pixels.dtype == bool else pixels


def image_sizes(path: str | Path) -> tuple[tuple[int, int], tuple[int, int]]:
    """(width, height) as stored and upright, from the header. Raises: BadImage, DataError."""
    with opened(path, BadImage) as image:
        width, height = image.size
        return (width, height), (height, width) if orientation(image) >= 5 else (width, height)


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
        raise DataError(
            f"{path}: the list of samples can't be read: {error.strerror}. {todo}".rstrip()
        ) from None
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
    """id -> path of the files of a folder that end in `ending`; the id is what comes before."""
    with os.scandir(folder) as entries:
        return {
            entry.name[: -len(ending)]: entry.path
            for entry in entries
            if entry.name.endswith(ending) and not entry.name.startswith(".")
        }


def refuse_missing(ids: Iterable[str], have: Mapping[str, str], what: str, where: object, todo: str) -> None:
    """Raises DataError naming the first ids that `have` lacks, and how many they are."""
    missing = [i for i in ids if i not in have]
    if missing:
        first = ", ".join(repr(i) for i in missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise DataError(f"{where}: {len(missing)} {what}: {first}. {todo}")


def raw_table(num: int, *, shift: int = 0, ignored: Iterable[int] = (IGNORE,)) -> np.ndarray:
    """(256,) int16: raw ids shift..shift+num-1 -> 0..num-1, the ignored ones -> 255, all others INVALID."""
    table = np.full(256, INVALID, np.int16)
    table[shift : shift + num] = np.arange(num)
    table[list(ignored)] = IGNORE
    return table
