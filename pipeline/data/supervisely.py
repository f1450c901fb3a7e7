"""A project of Supervisely: meta.json, and DATASET/img/NAME.jpg with DATASET/ann/NAME.jpg.json.

Objects are bitmaps (a PNG, deflated, in base64, at `origin`) and polygons with holes. They lie in their order, a later
one on top, as the tool draws them. Source of the geometry: Supervisely's SDK (supervisely/geometry).
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.data.base import MAX_PIXELS, DataError
from pipeline.data.convert import mask_of_polygons
from pipeline.data.files import image_sizes
from pipeline.data.labelled import (
    Item,
    Labelled,
    Shape,
    by_stem,
    checked_classes,
    painted,
    parts_by_folder,
    pictures_below,
    stamp_of,
    with_background,
)

AREAS = ("bitmap", "polygon", "any")  # shapes of a class whose objects may cover pixels
OVERHEAD = 1 << 16  # bytes of a small bitmap beside its pixels


def supervisely(project: Path, *, part: str = "train", background: bool = False) -> Labelled:
    """A project's folder. Where its data sets are called train and test (or val), these are the parts.

    Raises: DataError.
    """
    meta = _json(project / "meta.json", "It is in the folder of an exported project, which --supervisely names.")
    try:
        listed = [(entry["title"], str(entry.get("shape", "any")), entry.get("color")) for entry in meta["classes"]]
    except (KeyError, TypeError) as error:
        raise DataError(f"{project / 'meta.json'}: not Supervisely's ({type(error).__name__}: {error}).") from None
    kept = [entry for entry in listed if entry[1] in AREAS]
    others = [entry for entry in listed if entry not in kept]
    names = checked_classes(project / "meta.json", [title for title, _, _ in kept])
    classes, unlabelled = with_background(names, is_class=background)
    passed_over = Counter[str]()
    read = _Project(project, classes, unlabelled, {title for title, _, _ in others}, passed_over)
    folders = sorted(path.parent for path in project.rglob("ann") if path.is_dir() and (path.parent / "img").is_dir())
    if not folders:
        raise DataError(f"{project}: no data set in it: want folders with img/ and ann/. Export the project again.")
    chosen = parts_by_folder([folder.name for folder in folders])
    parts: dict[str, list[Item]] = defaultdict(list)
    for folder in folders:
        its = next((p for p, name in chosen.items() if name == folder.name), "") if chosen else part
        if its:
            parts[its] += read.items(folder)
        else:
            passed_over[f"data set {folder.name}"] += 1
    for items in parts.values():
        by_stem((item.image for item in items), "images")
    remarks = [
        f"{project / 'meta.json'}: {title!r} is of {shape}s, which label no pixels: no class"
        for title, shape, _ in others
    ]
    colours = {title: _rgb(colour) for title, _, colour in kept}
    palette = [colours.get(name) for name in classes]
    whole = [colour for colour in palette if colour is not None]
    is_whole = len(whole) == len(palette) and len({tuple(c) for c in whole}) == len(whole)
    return Labelled(classes, parts, whole if is_whole else None, passed_over, remarks)


def _rgb(colour: object) -> list[int] | None:
    is_one = isinstance(colour, str) and re.fullmatch(r"#[0-9A-Fa-f]{6}", colour)
    return list(bytes.fromhex(str(colour)[1:])) if is_one else None


class _Project:
    """What every image of a project is read with."""

    def __init__(
        self, project: Path, classes: tuple[str, ...], unlabelled: int, others: set[str], passed_over: Counter[str]
    ) -> None:
        self.project, self.classes, self.unlabelled = project, classes, unlabelled
        self.others, self.passed_over = others, passed_over

    def items(self, folder: Path) -> list[Item]:
        pictures = {path.name: path for path in pictures_below(folder / "img", "--supervisely")}
        notes = {path.name.removesuffix(".json"): path for path in sorted((folder / "ann").glob("*.json"))}
        if lonely := [str(path) for name, path in notes.items() if name not in pictures]:
            raise DataError(f"{lonely[0]}: its image is not in {folder / 'img'}. Export the project with its images.")
        return [self._item(picture, notes.get(name)) for name, picture in pictures.items()]

    def _item(self, image: Path, note: Path | None) -> Item:
        def stamp() -> str:
            text = "no annotation" if note is None else _text(note)
            return stamp_of("supervisely", self.classes, self.unlabelled, text)

        def make() -> np.ndarray:
            if note is None:
                width, height = image_sizes(image).upright
                return painted((height, width), (), self.unlabelled)
            found = _json(note, "")
            try:
                size = (found["size"]["height"], found["size"]["width"])
                if not all(type(side) is int and side > 0 for side in size) or size[0] * size[1] > MAX_PIXELS:
                    raise ValueError(f"a size of {size[0]!r} x {size[1]!r} pixels")
                return painted(size, self._shapes(note, found["objects"], size), self.unlabelled)
            except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
                if isinstance(error, DataError):
                    raise
                what = f"{type(error).__name__}: {error}"
                raise DataError(
                    f"{note}: not Supervisely's annotation of an image ({what}). Export it again."
                ) from None

        return Item(image, stamp, make)

    def _shapes(self, note: Path, objects: Sequence[Mapping[str, Any]], size: tuple[int, int]) -> Iterator[Shape]:
        for thing in objects:
            title, kind = thing["classTitle"], thing["geometryType"]
            if title not in self.classes and title not in self.others:
                raise DataError(f"{note}: an object is a {title!r}, which is no class in {self.project / 'meta.json'}.")
            if kind not in GEOMETRIES or title in self.others:
                self.passed_over[f"object of geometry {kind}"] += 1
                continue
            yield GEOMETRIES[kind](note, thing, size, self.classes.index(title))


def _polygon(note: Path, thing: Mapping[str, Any], size: tuple[int, int], label: int) -> Shape:
    """Inside the exterior and in none of the interiors; a hole's edge is the object's."""
    points = thing["points"]
    most = 10 * max(size)
    for corner in (corner for line in (points["exterior"], *points.get("interior", ())) for corner in line):
        if len(corner) != 2 or not all(type(v) in (int, float) and abs(v) <= most for v in corner):
            raise DataError(
                f"{note}: {corner!r} is no corner of a polygon in {size[1]} x {size[0]} pixels. Correct it."
            )
    mask = mask_of_polygons([_flat(points["exterior"])], size)
    for hole in points.get("interior", ()):
        mask &= ~mask_of_polygons([_flat(hole)], size, is_edge_inside=False)
    return Shape.of(label, mask)


def _flat(corners: Sequence[Sequence[float]]) -> list[float]:
    return [value for corner in corners for value in corner]


def _bitmap(note: Path, thing: Mapping[str, Any], size: tuple[int, int], label: int) -> Shape:
    """A PNG at its origin, (x, y): what is opaque, or not 0 where it has no transparency."""
    origin, mask = thing["bitmap"]["origin"], _pixels(note, thing["bitmap"]["data"], size)
    if len(origin) != 2 or not all(type(value) is int for value in origin):
        raise DataError(f"{note}: a bitmap's origin is {origin!r}; want [x, y]. Export it again.")
    left, top = origin
    if left < 0 or top < 0 or top + mask.shape[0] > size[0] or left + mask.shape[1] > size[1]:
        raise DataError(
            f"{note}: a bitmap of {mask.shape[1]} x {mask.shape[0]} pixels at {origin} is not inside the image of "
            f"{size[1]} x {size[0]}. Export it again."
        )
    return Shape(label, mask, top, left)


def _pixels(note: Path, text: str, size: tuple[int, int]) -> np.ndarray:
    try:
        data = base64.b64decode(text, validate=True)
        if not data.startswith(b"\x89PNG"):  # some are not deflated
            data = zlib.decompressobj().decompress(data, 4 * size[0] * size[1] + OVERHEAD)
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            if picture.width > size[1] or picture.height > size[0]:
                raise ValueError(f"{picture.width} x {picture.height} pixels")
            if picture.has_transparency_data:
                return np.asarray(np.array(picture.convert("RGBA"))[..., 3] > 0)
            values = np.array(picture)
    except (binascii.Error, zlib.error, OSError, ValueError, TypeError, SyntaxError) as error:
        raise DataError(
            f"{note}: a bitmap can't be decoded: {' '.join(str(error).split())[:200]}. Export it again."
        ) from None
    return np.asarray(values > 0 if values.ndim == 2 else values.any(axis=2))


GEOMETRIES: dict[str, Callable[[Path, Mapping[str, Any], tuple[int, int], int], Shape]] = {
    "bitmap": _bitmap,
    "polygon": _polygon,
}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror}. Export the project again.") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not UTF-8 text. Export the project again.") from None


def _json(path: Path, todo: str) -> Any:
    try:
        return json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: is no whole JSON: {error}. Export the project again. {todo}".rstrip()) from None
