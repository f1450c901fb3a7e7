"""Instances in COCO's JSON, as labelling tools export them: polygons, runs and crowds of any categories.

The file is read once, from its beginning to its end, and may be larger than memory: its objects wait in a temporary
database on the disk, which is gone when the process ends.

Classes are the categories in the order of their ids. Where objects overlap, the smaller one (in pixels) is on top, as
in the masks of COCO 2014 (convert.py); a crowd is below all others and has no label. Polygons are filled by COCO's own
tool, pycocotools.
"""

from __future__ import annotations

import json
import math
import sqlite3
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from pipeline.data.base import MAX_PIXELS, DataError
from pipeline.data.convert import mask_of_runs
from pipeline.data.labelled import (
    Item,
    Labelled,
    Shape,
    by_stem,
    checked_classes,
    painted,
    smaller_on_top,
    stamp_of,
    with_background,
)
from pipeline.ops.labels import IGNORE

NEEDS = "pip install -e '.[prepare]'"
LISTS = ("images", "annotations", "categories")
AGAIN = "Export it again as COCO's instance segmentation (JSON)."
BEYOND = 10  # images' sides: a polygon that reaches further is no outline but a slip, and filling it fills memory
CHUNK = 1 << 20  # bytes
ROBOFLOW = "_annotations.coco.json"
Tick = Callable[[int], None]


@dataclass
class Instances:
    """What one JSON holds. Ids are as they stand there, numbers or text.

    Of its objects `num_boxes` have no outline, and `num_crowds` of the others are crowds.
    """

    path: Path
    images: list[dict[str, Any]] = field(default_factory=list)
    categories: dict[Any, Mapping[str, Any]] = field(default_factory=dict)
    used: set[Any] = field(default_factory=set)  # categories of objects
    num_objects: int = 0
    num_boxes: int = 0
    num_crowds: int = 0
    store: sqlite3.Connection = field(default_factory=lambda: sqlite3.connect(""))  # "": a file that is never seen

    def objects(self, image: Any) -> list[list[Any]]:
        """The objects of an image in their order: id, category, whether a crowd, segmentation."""
        rows = self.store.execute("SELECT body FROM objects WHERE image = ? ORDER BY place", (json.dumps(image),))
        return [json.loads(body) for (body,) in rows]


def read_instances(path: Path, tick: Tick) -> Instances:
    """Reads a JSON once; `tick` is called with the bytes that were read. Raises: DataError."""
    try:
        import ijson
    except ImportError:
        raise DataError(f"{path}: COCO's JSON is read by ijson: {NEEDS}.") from None
    found = Instances(path)
    found.store.execute("CREATE TABLE objects (image TEXT, place INTEGER, body TEXT)")
    waiting = {key: ijson.sendable_list() for key in LISTS}
    parsers = [ijson.items_coro(items, f"{key}.item", use_float=True) for key, items in waiting.items()]
    try:
        with path.open("rb") as file:
            skip_mark(file)
            data = b"begin"
            while data:
                data = file.read(CHUNK)
                tick(len(data))
                for parser in parsers:
                    parser.send(data) if data else parser.close()
                for key, items in waiting.items():
                    for item in items:
                        _take(found, key, item)
                    items.clear()
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror}. Correct the path.") from None
    except (ijson.JSONError, UnicodeDecodeError) as error:
        what = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: is no whole JSON: {what}. {AGAIN}") from None
    except DataError:
        raise
    except KeyError as error:
        raise DataError(f"{path}: not COCO's instances: an entry of its lists has no {error}. {AGAIN}") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: not COCO's instances ({type(error).__name__}: {error}). {AGAIN}") from None
    for key, num in zip(LISTS, (len(found.images), found.num_objects, len(found.categories)), strict=True):
        if not num:
            raise DataError(f"{path}: not COCO's instances: its list {key!r} is empty or not there. {AGAIN}")
    found.store.execute("CREATE INDEX of_image ON objects (image)")
    _check_ids(found)
    return found


def skip_mark(file: BinaryIO) -> None:
    """Skips the mark that some editors write before UTF-8, which is no JSON."""
    if file.read(len(BOM_UTF8)) != BOM_UTF8:
        file.seek(0)


def _take(found: Instances, key: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise TypeError(f"{key} holds {value!r}, which is no mapping")
    if key == "images":
        sides, name = (value["height"], value["width"]), value["file_name"]
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"an image's file_name is {name!r}")
        if not all(type(side) is int and side > 0 for side in sides) or sides[0] * sides[1] > MAX_PIXELS:
            raise ValueError(f"image {name!r} is of {sides[0]!r} x {sides[1]!r} pixels")
        found.images.append({"id": value["id"], "file_name": name, "size": sides})
    elif key == "categories":
        name = value["name"]
        if not isinstance(name, str):
            raise TypeError(f"a category's name is {name!r}")
        if found.categories.setdefault(value["id"], value) is not value:
            raise ValueError(f"two categories have the id {value['id']!r}")
    else:
        shape, category = value.get("segmentation"), value["category_id"]
        found.num_objects += 1
        found.used.add(category)
        if not shape or shape == [[]]:
            found.num_boxes += 1
            return
        if not isinstance(shape, list | Mapping):
            raise TypeError(f"a segmentation is {type(shape).__name__}, neither polygons nor runs")
        is_crowd = value.get("iscrowd") or 0
        if is_crowd not in (0, 1):
            raise ValueError(f"an object's iscrowd is {is_crowd!r}; want 0 or 1")
        found.num_crowds += bool(is_crowd)
        body = json.dumps([value.get("id"), category, bool(is_crowd), shape])
        row = (json.dumps(value["image_id"]), found.num_objects, body)
        found.store.execute("INSERT INTO objects VALUES (?, ?, ?)", row)


def _check_ids(found: Instances) -> None:
    """Raises: DataError for objects of categories or images that aren't listed, images listed twice, boxes alone."""
    path = found.path
    strange = [category for category in found.used if category not in found.categories]
    if strange:
        raise DataError(
            f"{path}: annotations have category_id {strange[0]!r}, which is in no entry of `categories` "
            f"({', '.join(map(repr, list(found.categories)[:5])) or 'none'}). {AGAIN}"
        )
    known = Counter(json.dumps(image["id"]) for image in found.images)
    if twice := [key for key, num in known.items() if num > 1]:
        raise DataError(f"{path}: two images have the id {twice[0]}. {AGAIN}")
    for (image,) in found.store.execute("SELECT DISTINCT image FROM objects"):
        if image not in known:
            raise DataError(f"{path}: annotations have image_id {image}, which is in no entry of `images`. {AGAIN}")
    if found.num_objects and found.num_boxes == found.num_objects:
        raise DataError(
            f"{path}: its {found.num_objects} objects are boxes without a `segmentation`, and boxes label no pixels. "
            "Export outlines or masks."
        )
    if found.num_crowds and found.num_crowds == found.num_objects - found.num_boxes:
        raise DataError(
            f"{path}: its {found.num_crowds} objects are all crowds (iscrowd: 1), which have no label. CVAT writes "
            "that of whatever was drawn with its brush: if they are single objects, set iscrowd to 0 in the file."
        )


def coco(path: Path, images: Path, tick: Tick, *, part: str = "train", background: bool = False) -> Labelled:
    """An export of one JSON, whose images lie in the folder `images`. Raises: DataError."""
    return _labelled({part: (read_instances(path, tick), images)}, path, (), background)


def roboflow_coco(folders: Mapping[str, Path], tick: Tick, *, background: bool = False) -> Labelled:
    """Roboflow's folders by part, each with its JSON among its images.

    Its first category is the project's name, of which no object is: it is no class. Raises: DataError.
    """
    found = {part: (read_instances(folder / ROBOFLOW, tick), folder) for part, folder in folders.items()}
    files = [instances for instances, _ in found.values()]
    first = files[0]
    for other in files[1:]:
        if _names(other) != _names(first):
            raise DataError(f"{first.path} and {other.path}: list other categories. Export both parts together.")
    used = set[Any]().union(*(each.used for each in files))
    above = {str(category.get("supercategory")) for category in first.categories.values()}
    groups = tuple(key for key, one in first.categories.items() if key not in used and one["name"] in above)
    return _labelled(found, first.path, groups, background)


def _names(found: Instances) -> dict[Any, str]:
    return {key: str(category["name"]) for key, category in found.categories.items()}


def _labelled(
    found: Mapping[str, tuple[Instances, Path]], where: Path, groups: Sequence[Any], background: bool
) -> Labelled:
    one = next(iter(found.values()))[0]
    ids = [key for key in one.categories if key not in groups]
    if all(isinstance(key, int) for key in ids):
        ids.sort()
    names = [one.categories[key]["name"] for key in ids]
    classes, unlabelled = with_background(checked_classes(where, names), is_class=background)
    label_of = {key: classes.index(name) for key, name in zip(ids, names, strict=True)}
    remarks = []
    if num := sum(instances.num_boxes for instances, _ in found.values()):
        remarks.append(f"{where}: {num} objects are boxes without an outline, and label no pixel")
    if num := sum(instances.num_crowds for instances, _ in found.values()):
        remarks.append(f"{where}: {num} x crowd (iscrowd: 1), which has no label")
    if groups:
        dropped = ", ".join(repr(one.categories[key]["name"]) for key in groups)
        remarks.append(f"{where}: {dropped} is the name of a group of categories and of no object: no class")
    parts = {
        part: list(_items(instances, folder, label_of, classes, unlabelled))
        for part, (instances, folder) in found.items()
    }
    return Labelled(classes, parts, remarks=remarks)


def _items(
    found: Instances, folder: Path, label_of: Mapping[Any, int], classes: Sequence[str], unlabelled: int
) -> Iterator[Item]:
    paths = [_image_file(found.path, folder, image["file_name"]) for image in found.images]
    by_stem(paths, "images")
    if len(set(paths)) < len(paths):
        twice = next(path for place, path in enumerate(paths) if path in paths[:place])
        raise DataError(f"{found.path}: two images are the file {twice}. {AGAIN}")
    for image, path in zip(found.images, paths, strict=True):

        def stamp(image: Mapping[str, Any] = image) -> str:
            drawn = [(label_of[category], *rest) for _, category, *rest in found.objects(image["id"])]
            return stamp_of("coco", tuple(classes), unlabelled, image["size"], drawn)

        def make(image: Mapping[str, Any] = image) -> np.ndarray:
            where = f"{found.path}: image {image['file_name']!r}"
            shapes = _shapes(where, found.objects(image["id"]), image["size"], label_of)
            return painted(image["size"], smaller_on_top(shapes), unlabelled)

        yield Item(path, stamp, make)


def _image_file(json_path: Path, folder: Path, name: str) -> Path:
    """The file that `file_name` means in the folder of images, with the folders that stand there or without."""
    pure = PurePosixPath(name.replace("\\", "/"))
    tried = [folder / pure.name]
    if not pure.is_absolute() and ".." not in pure.parts:
        tried.insert(0, folder / pure)
    for path in tried:
        if path.is_file():
            return path
    raise DataError(f"{json_path}: image {name!r} is not in {folder}. Complete the images, or correct --images.")


def _shapes(
    where: str, objects: Iterable[Sequence[Any]], size: tuple[int, int], label_of: Mapping[Any, int]
) -> Iterator[Shape]:
    for key, category, is_crowd, shape in objects:
        try:
            mask = _mask_of(shape, size)
        except (DataError, KeyError, TypeError, ValueError) as error:
            what = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}."
            raise DataError(f"{where}, annotation {key!r}: {what} {AGAIN}") from None
        yield Shape.of(IGNORE if is_crowd else label_of[category], mask)


def _mask_of(shape: Any, size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool of polygons, or of runs in either form. Raises: DataError, KeyError, TypeError, ValueError."""
    if not isinstance(shape, Mapping):
        return filled(shape, size)
    if list(shape["size"]) != list(size):
        found = " x ".join(map(str, shape["size"]))
        raise DataError(f"runs of {found} pixels (height x width), and its image has {size[0]} x {size[1]}.")
    counts = shape["counts"]
    if not isinstance(counts, str) and not all(type(count) is int for count in counts):
        raise DataError("counts are neither text nor whole numbers.")
    return mask_of_runs(counts, size)


def filled(polygons: Sequence[Sequence[float]], size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool: the pixels in any polygon, each x0, y0, x1, y1, ..., as COCO's own tool fills them.

    Fewer than three corners cover nothing. Raises: DataError for what is no polygon.
    """
    try:
        from pycocotools import mask as tool
    except ImportError:
        raise DataError(f"polygons are filled by pycocotools: {NEEDS}.") from None
    wanted = []
    most = BEYOND * max(size)
    for polygon in polygons:
        if not isinstance(polygon, Sequence) or isinstance(polygon, str) or len(polygon) % 2:
            raise DataError("a polygon is no list of x, y, x, y, ...")
        if not all(type(value) in (int, float) and math.isfinite(value) for value in polygon):
            raise DataError("a polygon's coordinates aren't numbers.")
        if any(abs(value) > most for value in polygon):
            far = max(polygon, key=abs)
            raise DataError(f"a polygon reaches {far:g}, in an image of {size[1]} x {size[0]} pixels.")
        if len(polygon) >= 6:
            wanted.append([float(value) for value in polygon])
    if not wanted:
        return np.zeros(size, bool)
    runs = tool.frPyObjects(wanted, *size)
    return np.asarray(tool.decode(tool.merge(runs)), bool)
