"""The pictures that a user names: files, folders, patterns, and lists of them; and a place for what comes of each.

Two pictures never get the same place. A file's is its name without ending; below a folder or a pattern its
structure is kept, from the folder or the first part with a wildcard on; of a list the paths as they stand. Where two
differ by their endings alone (`a.jpg` and its mask `a.png`) both keep them.
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image

from pipeline.data.base import FORMATS, BadImage, DataError, as_array, read_image
from pipeline.data.patterns import divided, files_below, matching

LIST = "-"  # in place of a picture: a list of them, a path a line, on the standard input
# What is a picture in a folder or behind a pattern; a file that is named itself is tried whatever it is called.
ENDINGS = tuple(ending for endings in FORMATS.values() for ending in endings)
# Pictures that aren't read: cameras' raw files, and formats for which PIL has no decoder, or none that is used here.
_UNREAD = (
    ".heic .heif .hif .jxl .jxr .psd .svg .eps .pdf .xcf .exr .hdr .tga .ico .cr2 .cr3 .crw .nef .nrw .arw .sr2 .dng "
    ".orf .rw2 .raf .raw .pef .srw .3fr .iiq .x3f .pcx .dds .qoi .fits .icns .cur"
)
UNREAD = tuple(_UNREAD.split())


@dataclass(frozen=True)
class Picture:
    """A file, and the path without ending, below the folder of results, of what is made from it."""

    path: Path
    place: PurePath


def pixels_of(image: Any) -> np.ndarray:
    """A picture as (H, W, 3) uint8 RGB: of a file, upright by its EXIF; of PIL, the same; or of an array.

    Arrays: uint8, (H, W, 3) RGB, (H, W, 4) with transparency, laid on white, (H, W) grey, also uint16.
    Raises: BadImage for what is none of them, DataError for a file that can't be read.
    """
    if isinstance(image, str | os.PathLike):
        return read_image(Path(image).expanduser())
    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        kinds = {"uint8": ((2,), (3, 3), (3, 4)), "uint16": ((2,),)}.get(array.dtype.name, ())
        if not array.size or (array.ndim, *array.shape[2:]) not in kinds:
            raise BadImage(
                f"an image of shape {array.shape} and dtype {array.dtype}: want (H, W, 3) uint8, RGB from 0 to 255; "
                "or a path, or a PIL image."
            )
        image = Image.fromarray(np.ascontiguousarray(array))
    try:
        return as_array(image)
    except BadImage as error:
        raise BadImage(f"the image: {error}.") from None
    except Exception as error:  # PIL decodes a file when its pixels are asked for, and raises nearly anything
        raise BadImage(f"the image can't be decoded: {' '.join(str(error).split()) or type(error).__name__}.") from None


def pictures(
    given: Sequence[str],
    listed: Iterable[str] = (),
    *,
    results: Sequence[str] = (),
    tell: Callable[[str], None] = lambda line: None,
) -> list[Picture]:
    """The pictures of files, folders, patterns, and of `listed` lines where "-" is given, in that order.

    Folders and patterns give files with one of ENDINGS, sorted, none that is hidden or ends in one of `results`
    (what an earlier run left there); `tell` is told of those in UNREAD, and of places that keep an ending. A file that
    is met twice counts once.
    Raises: BadImage for a path that isn't there, DataError where there is no picture or two would share a place.
    """
    found: dict[str, Picture] = {}
    for word in given:
        lines = [line.rstrip("\r\n") for line in listed] if word == LIST else []
        for picture in [_listed(line) for line in lines if line.strip()] if word == LIST else _of(word, results, tell):
            found.setdefault(os.path.realpath(picture.path), picture)
        if word == LIST and not any(line.strip() for line in lines):
            raise DataError("-: the list on the standard input is empty; want the path of a picture a line.")
    return _apart(list(found.values()), tell)


def _apart(found: list[Picture], tell: Callable[[str], None]) -> list[Picture]:
    """The pictures with places of their own: those that only differ in their endings keep them.

    Raises: DataError for two that would share a place even so.
    """
    made = found
    for _ in range(2):  # a place with its ending may be that of another file, as a.jpg's is of a.jpg.png
        num = Counter(_seen_as(picture) for picture in made)
        made = [
            replace(picture, place=picture.place.with_name(old.place.name + picture.path.suffix))
            if num[_seen_as(picture)] > 1
            else picture
            for old, picture in zip(found, made, strict=True)
        ]
    by_place: dict[str, Path] = {}
    for old, picture in zip(found, made, strict=True):
        other = by_place.setdefault(_seen_as(picture), picture.path)
        if other != picture.path:
            raise DataError(
                f"{other} and {picture.path}: the results of both would be called {old.place}.*. Choose by a "
                f"pattern such as '{other.parent / ('*' + other.suffix)}', or name the folder that both lie below, "
                "whose structure is kept."
            )
    kept = [picture for old, picture in zip(found, made, strict=True) if old != picture]
    if kept:
        tell(
            f"{len(kept)} pictures differ from others by their endings alone, and their results keep them: "
            f"{kept[0].path} becomes {kept[0].place}.*"
        )
    return made


def _seen_as(picture: Picture) -> str:
    return str(picture.place).casefold()  # some disks ignore case


def _of(word: str, results: Sequence[str], tell: Callable[[str], None]) -> list[Picture]:
    path = Path(word).expanduser()
    if path.is_file():
        return [Picture(path, PurePath(path.stem))]
    if path.is_dir():
        return _below(path, files_below(path, word), results, f"{word}: no picture in this folder or below it", tell)
    if glob.has_magic(word):
        top, rest = divided(str(path), Path())
        if glob.has_magic(rest):
            first = next(i for i, part in enumerate(Path(rest).parts) if glob.has_magic(part))
            top, rest = top.joinpath(*Path(rest).parts[:first]), str(Path(*Path(rest).parts[first:]))
            names = matching(rest, top, word)
            return _below(top, names, results, f"{word}: no picture fits this pattern", tell)
    raise BadImage(f"{word}: no such image file, nor a folder or a pattern.")


def _below(
    top: Path, names: Iterable[str], results: Sequence[str], otherwise: str, tell: Callable[[str], None]
) -> list[Picture]:
    files = sorted(name for name in names if (top / name).is_file() and not name.endswith(tuple(results)))
    found = [Picture(top / name, PurePath(name).with_suffix("")) for name in files if name.lower().endswith(ENDINGS)]
    unread = Counter(Path(name).suffix.lower() for name in files if name.lower().endswith(UNREAD))
    passed = ", ".join(f"{num} {ending}" for ending, num in sorted(unread.items()))
    if not found:
        passed = f" {passed} can't be read here: convert them to JPEG or PNG." if passed else ""
        raise DataError(f"{otherwise}; it would end in one of {', '.join(ENDINGS)}.{passed}")
    if passed:
        tell(f"passed over in {top}, for they can't be read here: {passed}. Convert them to JPEG or PNG.")
    return found


def _listed(line: str) -> Picture:
    path = Path(line).expanduser()
    if not path.is_file():
        raise BadImage(f"{line}: no such image file; it stands in the list.")
    if path.is_absolute() or ".." in path.parts:
        path = Path(os.path.abspath(path))
        return Picture(path, path.relative_to(path.anchor).with_suffix(""))
    return Picture(path, path.with_suffix(""))
