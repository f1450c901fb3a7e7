"""Published annotations turned into indexed masks: what SBD, PASCAL Context and COCO 2014 come as.

    SBD          dataset/cls/<id>.mat, GTcls.Segmentation: VOC's ids, 0 background
    Context      trainval/<id>.mat, LabelMap: ids of 459 classes; or trainval_merged.json: runs of 59 of them
    COCO 2014    annotations/instances_{train,val}2014.json: polygons and runs of eighty objects

Axes: H, W pixels of one image. Every function gives (H, W) ids as the loaders of this folder read them, uint8 but
for the map of 459 classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from pipeline.data.base import DataError
from pipeline.data.classes import COCO_CLASSES, CONTEXT_CLASSES, CONTEXT_NUM_RAW, VOC_CLASSES
from pipeline.data.files import read_ids
from pipeline.ops.labels import file_dtype

# The 59 classes among PASCAL Context's 459 (its labels.txt), in the order of CONTEXT_CLASSES: both are alphabetical.
# The same ids as in mmseg's converter (tools/dataset_converters/pascal_context.py).
CONTEXT_RAW = (
    *(2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113, 115, 144),
    *(158, 159, 162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326, 347, 349, 354),
    *(355, 360, 366, 368, 397, 415, 416, 420, 424, 427, 440, 445, 454, 458),
)
# COCO's run lengths as text: six bits a character from this one on, five of them value, one for "more follows".
FIRST_CHARACTER, VALUE_BITS, MORE, SIGN = 48, 5, 32, 16


def sbd_mask(path: Path) -> np.ndarray:
    """SBD's classes, 0 background, 1-20, as VOC has them. Raises: DataError."""
    segmentation = _loaded(path, "GTcls")
    try:
        ids = np.asarray(segmentation["Segmentation"][0, 0])
    except (IndexError, KeyError, ValueError):
        raise DataError(f"{path}: GTcls has no Segmentation; want a file of SBD's dataset/cls.") from None
    return _checked(path, ids, len(VOC_CLASSES))


def context_mask(path: Path) -> np.ndarray:
    """PASCAL Context's map of 459 classes as 59: 0 for all others, 1-59. Raises: DataError."""
    return context_ids(context_map(path))


def context_map(path: Path) -> np.ndarray:
    """PASCAL Context's map as published, 0-459: (H, W) uint16. Raises: DataError."""
    return _checked(path, np.asarray(_loaded(path, "LabelMap")), CONTEXT_NUM_RAW)


def context_names(path: Path) -> list[str]:
    """The names of the 459 classes from PASCAL Context's labels.txt, `1: accordion` a line. Raises: DataError."""
    names = dict(line.split(":", 1) for line in read_ids(path, "It comes with the .mat files.") if ":" in line)
    found = [names.get(str(i), "").strip() for i in range(1, CONTEXT_NUM_RAW + 1)]
    if not all(found):
        first = 1 + [bool(name) for name in found].index(False)
        raise DataError(f"{path}: has no name for class {first}; want `id: name`, 1 to 459, a line each.")
    return found


def context_ids(raw: np.ndarray) -> np.ndarray:
    """The 459 ids of a map as 0-59. Shapes: (H, W) integers -> (H, W) uint8."""
    table = np.zeros(CONTEXT_NUM_RAW + 1, np.uint8)
    table[list(CONTEXT_RAW)] = np.arange(1, len(CONTEXT_CLASSES) + 1)
    return table[raw]


def context_mask_of_runs(size: tuple[int, int], objects: Iterable[Mapping[str, Any]]) -> np.ndarray:
    """The same from the merged JSON: its segments in their order, a later one on top. `size` is (H, W)."""
    raw = np.zeros(size, np.int64)
    for thing in objects:
        runs = thing["segmentation"]
        if not 0 <= thing["category_id"] <= CONTEXT_NUM_RAW:
            raise DataError(f"category_id {thing['category_id']} is none of PASCAL Context's 459 classes.")
        raw[_mask_of_image(runs, size)] = thing["category_id"]
    return context_ids(raw)


def coco_mask(size: tuple[int, int], objects: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """COCO's objects as 0 (background) and 1-80. `objects` have `name`, `area`, `segmentation`, `iscrowd`.

    Where objects overlap the smaller one is on top, crowds are below everything [settled: COCO doesn't say, and the
    masks in circulation differ there]. Polygons are filled by PIL: a pixel on an edge may fall otherwise than in
    COCO's own tool.
    """
    mask = np.zeros(size, np.uint8)
    for thing in sorted(objects, key=lambda thing: (not thing.get("iscrowd", 0), -thing["area"])):
        shape = thing["segmentation"]
        inside = _mask_of_image(shape, size) if isinstance(shape, Mapping) else mask_of_polygons(shape, size)
        mask[inside] = 1 + COCO_CLASSES.index(thing["name"])
    return mask


def mask_of_polygons(
    polygons: Sequence[Sequence[float]], size: tuple[int, int], *, is_edge_inside: bool = True
) -> np.ndarray:
    """(H, W) bool: the pixels inside any of the polygons, each x0, y0, x1, y1, ..."""
    canvas = Image.new("1", (size[1], size[0]))
    for polygon in polygons:
        ImageDraw.Draw(canvas).polygon(list(polygon), fill=1, outline=int(is_edge_inside))
    return np.array(canvas)


def _mask_of_image(runs: Mapping[str, Any], size: tuple[int, int]) -> np.ndarray:
    """`mask_of_runs` of the JSON's runs. Raises: DataError for runs of another size than the image's (H, W)."""
    if tuple(runs["size"]) != tuple(size):
        found = " x ".join(map(str, runs["size"]))
        raise DataError(f"a segment is of {found} pixels, its image has {size[0]} x {size[1]}.")
    return mask_of_runs(runs["counts"], size)


def mask_of_runs(counts: str | Sequence[int], size: tuple[int, ...]) -> np.ndarray:
    """(H, W) bool of run lengths, off first, down the columns. Raises: DataError unless they fill the mask."""
    runs = _runs_of_text(counts) if isinstance(counts, str) else list(counts)
    if min(runs, default=0) < 0 or sum(runs) != size[0] * size[1]:
        raise DataError(f"runs of {sum(runs)} pixels don't fill a mask of {size[0]} x {size[1]}.")
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(size, order="F")


def _runs_of_text(text: str) -> list[int]:
    """COCO's compressed runs: little-endian groups of five bits, from the fourth on as differences from two before."""
    runs: list[int] = []
    value = bits = 0
    for character in text:
        group = ord(character) - FIRST_CHARACTER
        value |= (group & (MORE - 1)) << bits
        bits += VALUE_BITS
        if group & MORE:
            continue
        if group & SIGN:
            value -= 1 << bits
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = bits = 0
    return runs


def _loaded(path: Path, name: str) -> Any:
    """One variable of a MATLAB file. Raises: DataError."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise DataError(f"{path}: MATLAB files need scipy: pip install -e '.[prepare]'.") from None
    try:
        found = loadmat(path)
    except Exception as error:  # scipy raises nearly anything on damaged files
        what = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{path}: can't be read as a MATLAB file: {what}. Replace it.") from None
    if name not in found:
        have = ", ".join(sorted(key for key in found if not key.startswith("__"))) or "nothing"
        raise DataError(f"{path}: has no {name}, only {have}. Is this the right folder?")
    return found[name]


def _checked(path: Path, ids: np.ndarray, most: int) -> np.ndarray:
    """A map of ids 0..most, two axes. Raises: DataError."""
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or ids.min(initial=0) < 0 or ids.max(initial=0) > most:
        raise DataError(f"{path}: a map of shape {ids.shape}, {ids.dtype}; want two axes of whole numbers 0-{most}.")
    return ids.astype(file_dtype(most + 1))
