"""Data sets that need a conversion before they can be pointed to: masks as indexed PNGs, lists of samples.

    python cli.py prepare voc        --root VOCdevkit/VOC2012 --source benchmark_RELEASE     (SBD)
    python cli.py prepare context    --root VOCdevkit/VOC2010 --source trainval_merged.json  (or the folder of .mat)
    python cli.py prepare context459 --root VOCdevkit/VOC2010 --source trainval              (the folder of .mat)
    python cli.py prepare coco14     --root coco14                       (its annotations/instances_*2014.json)
    python cli.py prepare ade847     --root ADE20K_2021_17_01            (the full ADE20K's own files)
    python cli.py prepare folder     --coco annotations.json --images photos         (a tool's export: docs/data.md)

A mask appears whole or not at all, and those that are there stay: a killed conversion goes on where it was. The lists
are written last, so a list is only there when its masks are.
"""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cache.files import write_atomic
from pipeline.data.ade20k import FOLDERS, FULL_MASKS, FULL_NAMES, full_classes, full_images, full_mask, read_numbers
from pipeline.data.asked import Asked, read
from pipeline.data.base import MAX_PIXELS, DataError, unknown
from pipeline.data.classes import ADE20K_FULL, COCO_CLASSES
from pipeline.data.coco import ROBOFLOW
from pipeline.data.convert import coco_mask, context_map, context_mask, context_mask_of_runs, context_names, sbd_mask
from pipeline.data.files import files_by_id, folder_of, read_ids, refuse_missing
from pipeline.running.console import progress, say
from pipeline.running.described import write_data_set

PARTS = ("train", "val")
MEGABYTE = 10**6
CONTEXT_LISTS, LABELS = Path("ImageSets", "SegmentationContext"), "labels.txt"


@dataclass(frozen=True)
class Conversion:
    """Masks to be made, by their place, and the lists to be written after them."""

    masks: Mapping[Path, Callable[[], np.ndarray]]
    lists: Mapping[Path, Sequence[str]] = field(default_factory=dict)


def prepare(kind: str, root: Path | None, source: Path | None = None) -> Conversion:
    """Converts what isn't converted yet, with a progress bar; returns what there was to do.

    Raises: DataError for an unknown kind, a missing folder or file, a mask that can't be read.
    """
    if kind in AS_PUBLISHED:
        say(f"{kind}: nothing to prepare, {AS_PUBLISHED[kind]}")
        return Conversion({})
    if kind not in CONVERSIONS:
        raise unknown("prepare: no conversion for", kind, [*CONVERSIONS, *AS_PUBLISHED])
    if root is None:
        raise DataError(f"prepare {kind}: --root is missing: the data set's folder.")
    conversion = CONVERSIONS[kind](folder_of(root, "--root must be the data set's folder."), source)
    todo = {path: make for path, make in conversion.masks.items() if not path.is_file()}
    with progress(kind, len(conversion.masks), done=len(conversion.masks) - len(todo)) as advance:
        for path, make in todo.items():
            try:
                mask = make()
            except (DataError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
                what = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}."
                raise DataError(f"{path.name}: can't be made: {what}") from None
            write_atomic(path, _png(mask))
            advance()
    for path, ids in conversion.lists.items():
        _write_list(path, ids)
    say(f"{kind}: {len(todo)} masks made, {len(conversion.masks) - len(todo)} were there")
    return conversion


def prepare_folder(asked: Asked, root: Path | None = None, *, overwrite: bool = False) -> Path:
    """What a labelling tool exports as masks, lists and a dataset.yaml in `root`, whose path is returned.

    Raises: DataError for what isn't of its format, doesn't fit together, or is there and says something else.
    """
    root = root or asked.root()
    jsons = [asked.coco] if asked.coco else sorted(asked.roboflow.rglob(ROBOFLOW)) if asked.roboflow else []
    size = sum(path.stat().st_size for path in jsons if path.is_file())
    if size < MEGABYTE:
        return write_data_set(read(asked), root, overwrite=overwrite)
    with progress("reading", size // MEGABYTE, unit="MB") as advance:
        found = read(asked, lambda num: advance(num / MEGABYTE))
    return write_data_set(found, root, overwrite=overwrite)


def _png(mask: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    return file.getvalue()


def _write_list(path: Path, ids: Sequence[str]) -> None:
    """Writes a list; one that is there and says something else is the user's, and an error."""
    if path.is_file() and set(read_ids(path)) != set(ids):
        raise DataError(
            f"{path}: holds {len(read_ids(path))} other ids than the {len(ids)} of this conversion. Move it away."
        )
    if not path.is_file():
        write_atomic(path, "".join(f"{i}\n" for i in ids).encode())
    say(f"{path}: {len(ids)} lines")


def _voc(root: Path, source: Path | None) -> Conversion:
    """SBD's masks beside VOC's, and train_aug: VOC's train and all of SBD, VOC's val left out (10,582 images)."""
    if source is None:
        raise DataError("prepare voc: --source is missing: the folder of SBD (benchmark_RELEASE).")
    sbd = source / "dataset" if (source / "dataset").is_dir() else source
    mats = files_by_id(folder_of(sbd / "cls", "--source must be SBD's folder, with dataset/cls."), ".mat")
    lists = root / "ImageSets" / "Segmentation"
    own = {part: read_ids(lists / f"{part}.txt", "Complete VOC 2012.") for part in PARTS}
    theirs = [i for part in PARTS for i in read_ids(sbd / f"{part}.txt", "Complete SBD.")]
    refuse_missing(theirs, mats, "listed images have no .mat", sbd, "Complete SBD.")
    train_aug = sorted({*own["train"], *theirs} - set(own["val"]))
    out = root / "SegmentationClassAug"
    masks = {out / f"{i}.png": partial(sbd_mask, Path(mats[i])) for i in sorted(mats)}
    return Conversion(masks, {lists / "train_aug.txt": train_aug})


def _context(root: Path, source: Path | None) -> Conversion:
    """Masks of 59 classes, from the merged JSON or from the folder of .mat, and the lists of both parts."""
    if source is None:
        raise DataError("prepare context: --source is missing: trainval_merged.json, or the folder of .mat.")
    if source.is_dir():
        return _of_mats(root, source, "SegmentationClassContext", context_mask)
    return _of_context(root, "SegmentationClassContext", *_of_merged(source))


def _context459(root: Path, source: Path | None) -> Conversion:
    """The same with all 459 classes, in 16 bits, from the folder of .mat, and their names from labels.txt beside it."""
    if source is None or not source.is_dir():
        raise DataError("prepare context459: --source must be the folder of .mat; the JSON has 59 classes.")
    within = source / LABELS
    names = context_names(within if within.is_file() else source.resolve().parent / LABELS)
    made = _of_mats(root, source, "SegmentationClassContext459", context_map)
    return Conversion(made.masks, {**made.lists, root / CONTEXT_LISTS / "classes459.txt": names})


def _of_mats(root: Path, source: Path, folder: str, read: Callable[[Path], np.ndarray]) -> Conversion:
    mats, main = files_by_id(source, ".mat"), root / "ImageSets" / "Main"
    ids = {part: read_ids(main / f"{part}.txt", "Complete VOC 2010.") for part in PARTS}
    for part in PARTS:
        refuse_missing(ids[part], mats, f"{part} images have no .mat", source, "Complete the download.")
    return _of_context(root, folder, ids, {i: partial(read, Path(mats[i])) for i in mats})


def _of_context(
    root: Path, folder: str, ids: Mapping[str, list[str]], makers: Mapping[str, Callable[[], np.ndarray]]
) -> Conversion:
    masks = {root / folder / f"{i}.png": makers[i] for part in PARTS for i in ids[part]}
    return Conversion(masks, {root / CONTEXT_LISTS / f"{part}.txt": sorted(ids[part]) for part in PARTS})


def _of_merged(path: Path) -> tuple[dict[str, list[str]], dict[str, Callable[[], np.ndarray]]]:
    """The parts' ids and what makes each mask, of PASCAL in Detail's merged annotations."""
    images, objects = _by_image(path, "annos_segmentation")
    ids: dict[str, list[str]] = {part: [] for part in PARTS}
    makers: dict[str, Callable[[], np.ndarray]] = {}
    for image in images:
        if image["phase"] in ids:
            name = Path(image["file_name"]).stem
            ids[image["phase"]].append(name)
            size = (image["height"], image["width"])
            makers[name] = partial(context_mask_of_runs, size, objects[image["image_id"]])
    return ids, makers


def _coco14(root: Path, source: Path | None) -> Conversion:
    """SegmentationClass/{train2014,val2014} from the instances; images without an object are all background."""
    masks: dict[Path, Callable[[], np.ndarray]] = {}
    for part in PARTS:
        path = (source or root / "annotations") / f"instances_{part}2014.json"
        images, objects = _by_image(path, "annotations")
        for image in images:
            size, name = (image["height"], image["width"]), Path(image["file_name"]).stem
            place = root / "SegmentationClass" / f"{part}2014" / f"{name}.png"
            masks[place] = partial(coco_mask, size, objects[image["id"]])
    return Conversion(masks)


def _ade847(root: Path, source: Path | None) -> Conversion:
    """16-bit masks of the full release's objects, validation first; the classes from its own files, or from a list."""
    images = {part: full_images(root, part) for part in ("test", "train")}
    listed = source or root / FULL_NAMES
    if source or listed.is_file():
        numbers = read_numbers(listed)
    else:
        with progress("classes", sum(map(len, images.values()))) as advance:
            numbers = full_classes(root, advance)
        if len(numbers) != ADE20K_FULL:
            raise DataError(
                f"{root}: {len(numbers)} objects occur in both parts, and {ADE20K_FULL} are evaluated. Complete the "
                "download, or give the list of classes by --source, `number: name` a line."
            )
    masks = {
        root / FULL_MASKS / FOLDERS[part] / f"{path.stem}.png": partial(full_mask, path)
        for part, paths in images.items()
        for path in paths
    }
    return Conversion(masks, {root / FULL_NAMES: [f"{number}: {name}" for number, name in numbers.items()]})


def _by_image(path: Path, key: str) -> tuple[list[dict[str, Any]], Mapping[Any, list[dict[str, Any]]]]:
    """The images of a JSON in COCO's form, and their objects by image; `name` is that of the category.

    Raises: DataError.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        objects: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        for thing in found[key]:
            objects[thing["image_id"]].append(thing)
        images = [_image_of(image, key) for image in found["images"]]
        if key == "annotations":
            names = {item["id"]: item["name"] for item in found["categories"]}
            for thing in found[key]:
                thing["name"] = names[thing["category_id"]]
            strange = sorted(set(names.values()) - set(COCO_CLASSES))
            if strange:
                raise unknown(f"{path}: COCO has no object", strange[0], COCO_CLASSES)
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror}. Complete the download.") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not the annotations ({type(error).__name__}: {error}).") from None
    return images, objects


def _image_of(image: Any, key: str) -> dict[str, Any]:
    """An image's entry, if it has what a mask is made with. Raises: KeyError, TypeError, ValueError."""
    _ = image["id" if key == "annotations" else "image_id"], Path(image["file_name"])
    if key != "annotations":
        _ = image["phase"]
    sides = image["height"], image["width"]
    if not all(type(side) is int and side > 0 for side in sides) or sides[0] * sides[1] > MAX_PIXELS:
        raise ValueError(f"image {image['file_name']!r} of {sides[0]!r} x {sides[1]!r} pixels")
    return image


CONVERSIONS: dict[str, Callable[[Path, Path | None], Conversion]] = {
    "voc": _voc,
    "context": _context,
    "context459": _context459,
    "coco14": _coco14,
    "ade847": _ade847,
}
AS_PUBLISHED = {
    "coco_stuff": "masks are read as published (stuffthingmaps) or as _labelTrainIds.",
    "cityscapes": "masks are read as published (labelIds) or as labelTrainIds.",
    "camvid": "its masks are read as SegNet's authors published them.",
    "ade20k": "its masks are read as published (SceneParse150; the full release: prepare ade847).",
    "demo": "it is made in memory.",
}
