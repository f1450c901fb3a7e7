"""Exports of Label Studio and Supervisely.

    Label Studio    brush labels as PNG, one file a label: task-1-annotation-2-by-3-tag-sky-0.png, whose pixels are the
                    label's opacity, 0 where it isn't; and the export as JSON (or JSON-MIN), which says of what image a
                    task is. Where labels overlap, the smaller one (in pixels) is on top.
    Supervisely     meta.json, and DATASET/img/NAME.jpg with DATASET/ann/NAME.jpg.json: bitmaps (a PNG, deflated, in
                    base64, at `origin`), polygons with holes. Objects lie in their order, a later one on top, as the
                    tool draws them.

What Label Studio's files are called and what their values mean: its converter (label-studio-converter, brush.py).
Supervisely's geometry: its SDK (supervisely/geometry).
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
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
from PIL import Image

from pipeline.data.base import MAX_PIXELS, DataError
from pipeline.data.convert import mask_of_polygons
from pipeline.data.files import file_stamp, image_sizes, stored_mask
from pipeline.data.labelled import (
    Item,
    Labelled,
    Shape,
    by_stem,
    checked_classes,
    painted,
    parts_by_folder,
    pictures_below,
    smaller_on_top,
    stamp_of,
    with_background,
)

BRUSH = re.compile(r"task-(\d+)-annotation-(\d+)-by-([^-]*)-(.+)-(\d+)\.png", re.IGNORECASE)
NO_LABEL = "no_label"  # a region that nobody has given a label
UPLOADED = re.compile(r"^[0-9a-f]{8}-")  # before the name of a file that was uploaded
LABELS = ("brushlabels", "labels")
AREAS = ("bitmap", "polygon", "any")  # shapes of a class whose objects may cover pixels
OVERHEAD = 1 << 16  # bytes of a small bitmap beside its pixels


# ---- Label Studio ----------------------------------------------------------------------------------------------------


def label_studio(folder: Path, tasks: Path, images: Path, *, part: str = "train", background: bool = False) -> Labelled:
    """Brush PNGs in `folder`, whose tasks are of `images` as the JSON `tasks` says. Raises: DataError."""
    image_of, said = _tasks(tasks, images)
    brushes, passed_over = _brushes(folder, tasks, set(image_of), said)
    names = sorted({label for _, label in said} | {label for each in brushes.values() for label, _ in each})
    classes, unlabelled = with_background(checked_classes(tasks, names), is_class=background)
    by_stem(image_of.values(), "images")
    if len(set(image_of.values())) < len(image_of):
        twice = next(path for path, num in Counter(image_of.values()).items() if num > 1)
        raise DataError(f"{tasks}: two tasks are of the image {twice}. Remove one of them, and its PNGs.")

    def item(task: str, image: Path) -> Item:
        drawn = brushes.get(task, [])

        def stamp() -> str:
            return stamp_of("label studio", classes, unlabelled, [(label, file_stamp(path)) for label, path in drawn])

        def make() -> np.ndarray:
            width, height = image_sizes(image).upright
            shapes: list[Shape] = []
            size: tuple[int, ...] = (height, width)
            for label, path in drawn:
                pixels = stored_mask(path).pixels
                if pixels.ndim != 2:
                    raise DataError(
                        f"{path}: has colours; Label Studio's brush PNGs have one channel. Export it again."
                    )
                if shapes and pixels.shape != size:
                    raise DataError(
                        f"{path}: {pixels.shape[1]} x {pixels.shape[0]} pixels, others of its task {size[1]} "
                        f"x {size[0]}. Export them again."
                    )
                size = pixels.shape
                shapes.append(Shape.of(classes.index(label), pixels > 0))
            return painted((size[0], size[1]), smaller_on_top(shapes), unlabelled)

        return Item(image, stamp, make)

    items = [item(task, image_of[task]) for task in sorted(image_of, key=int)]
    return Labelled(classes, {part: items}, passed_over=passed_over)


def _tasks(path: Path, images: Path) -> tuple[dict[str, Path], set[tuple[str, str]]]:
    """The image of each task, and what tags (`from_name`) and labels its regions have. Raises: DataError."""
    pictures = pictures_below(images, "--images")
    by_name: dict[str, list[Path]] = defaultdict(list)
    for picture in pictures:
        by_name[picture.name].append(picture)
    image_of: dict[str, Path] = {}
    said: set[tuple[str, str]] = set()
    for task in _listed(path):
        key = task.get("id")
        if type(key) is not int:
            raise DataError(f"{path}: a task's id is {key!r}; want Label Studio's JSON, with whole numbers.")
        if str(key) in image_of:
            raise DataError(f"{path}: task {key} stands there twice. Export it again.")
        image_of[str(key)] = _image_of(path, task, by_name, images)
        for tag, labels in _regions(task):
            if len(labels) > 1:
                several = ", ".join(map(repr, labels))
                raise DataError(
                    f"{path}: task {key}: a region has several labels, {several}; a pixel has one. Keep one."
                )
            said |= {(tag, label) for label in labels}
    if not image_of:
        raise DataError(f"{path}: holds no task. Export the project again, as JSON.")
    return image_of, said


def _listed(path: Path) -> Iterator[dict[str, Any]]:
    """The tasks, one at a time: a task's runs may be long. Raises: DataError."""
    try:
        import ijson
    except ImportError:
        raise DataError(f"{path}: JSON is read by ijson: pip install -e '.[prepare]'.") from None
    try:
        with path.open("rb") as file:
            for task in ijson.items(file, "item"):
                if not isinstance(task, dict):
                    raise DataError(f"{path}: want a list of tasks, which are mappings. Export the project as JSON.")
                yield task
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror}. --tasks is the project's export as JSON.") from None
    except (ijson.JSONError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: is no whole JSON: {' '.join(str(error).split())[:200]}. Export it again.") from None


def _image_of(path: Path, task: Mapping[str, Any], by_name: Mapping[str, list[Path]], images: Path) -> Path:
    """The picture among `by_name` that one of a task's values names: a path, an address or an uploaded file."""
    data = task.get("data")
    values = [*(data if isinstance(data, Mapping) else task).values(), task.get("file_upload")]
    named = [name for value in values if isinstance(value, str) for name in _names(value)]
    if found := next((by_name[name] for name in named if name in by_name), None):
        if len(found) > 1:
            raise DataError(
                f"{found[0]} and {found[1]}: either may be the image of task {task['id']} in {path}. Rename one."
            )
        return found[0]
    shown = named[0] if named else "none that it names"
    raise DataError(f"{path}: task {task['id']}: its image, {shown!r}, is not in {images}. Complete the images.")


def _names(value: str) -> list[str]:
    """File names that a value may mean: `/data/upload/1/0a1b2c3d-x.jpg`, `/data/local-files/?d=a/x.jpg`, `s3://a/x.jpg`."""
    address = urlsplit(value)
    paths = [*parse_qs(address.query).get("d", []), unquote(address.path), value]
    names = [PurePosixPath(path.replace("\\", "/")).name for path in paths]
    names += [UPLOADED.sub("", name) for name in names]
    return [name for name in dict.fromkeys(names) if name]


def _regions(task: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Tag and labels of a task's regions, in JSON or JSON-MIN."""
    for annotation in task.get("annotations") or task.get("completions") or ():
        for result in annotation.get("result", ()) if isinstance(annotation, Mapping) else ():
            value = result.get("value") if isinstance(result, Mapping) else None
            if isinstance(value, Mapping) and "rle" in value:
                yield str(result.get("from_name")), _labels(value)
    for tag, results in task.items():
        for value in results if isinstance(results, list) else ():
            if isinstance(value, Mapping) and "rle" in value:
                yield tag, _labels(value)


def _labels(value: Mapping[str, Any]) -> list[str]:
    return [str(label) for label in next((value[key] for key in LABELS if isinstance(value.get(key), list)), [])]


def _brushes(
    folder: Path, tasks: Path, known: set[str], said: set[tuple[str, str]]
) -> tuple[dict[str, list[tuple[str, Path]]], Counter[str]]:
    """Label and file of each brush, by task; and what has none. Raises: DataError."""
    label_of = {f"{tag}-{label}": label for tag, label in said}
    found: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    annotation_of: dict[str, tuple[str, Path]] = {}
    passed_over: Counter[str] = Counter()
    for path in pictures_below(folder, "--label-studio", (".png",)):
        match = BRUSH.fullmatch(path.name)
        if match is None:
            raise DataError(
                f"{path}: not called as Label Studio calls brush labels, task-1-annotation-2-by-3-tag-sky-0.png."
            )
        task, annotation, _, rest, _ = match.groups()
        if task not in known:
            raise DataError(f"{path}: {tasks} has no task {task}. Export both at the same time.")
        other, first = annotation_of.setdefault(task, (annotation, path))
        if other != annotation:
            raise DataError(f"{first} and {path}: task {task} has two annotations. Keep the PNGs of one.")
        if rest == NO_LABEL or rest.endswith(f"-{NO_LABEL}"):
            passed_over["brush without a label"] += 1
            continue
        label = label_of.get(rest) if label_of else rest.partition("-")[2]
        if not label:
            have = ", ".join(sorted(label_of)[:5]) or "no brush"
            raise DataError(f"{path}: {tasks} has no region {rest!r} (it has {have}). Export both at the same time.")
        found[task].append((label, path))
    return found, passed_over


# ---- Supervisely -----------------------------------------------------------------------------------------------------


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
