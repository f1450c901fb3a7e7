"""dataset.yaml and the masks beside it, as `cli.py prepare folder` writes them.

    ROOT/dataset.yaml                      the user's from then on: `unseen` is left to be filled in
    ROOT/prepared_masks/train/NAME.png     indexed masks, 8 or 16 bits by the number of classes
    ROOT/prepared_masks/train.txt          the names of the part's images, which stay where they are

A mask carries what it was made of, so the same command goes on where it was killed, and one that was made of other
annotations is never taken for this one's. Lists come after the masks, dataset.yaml last.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image, PngImagePlugin

from cache.files import write_atomic, write_text
from pipeline.data.base import PARTS, BadImage, DataError
from pipeline.data.description import AS_STORED, UPRIGHT, read_description
from pipeline.data.files import Sizes, image_sizes
from pipeline.data.folder import FolderDataSet
from pipeline.data.labelled import PREPARED, Item, Labelled, WrongValues, stem_of, told
from pipeline.ops.labels import file_dtype, no_class, to_file
from pipeline.running.console import progress, say

STAMP = "made of"  # a mask's own words
HEAD = "# Made by `cli.py prepare folder` and yours from now on; docs/data.md explains every key.\n"
UNSEEN = "  # names of classes whose labels training mustn't use"


@dataclass
class Made:
    """What is known once all masks are there."""

    num_made: int = 0
    num_there: int = 0
    bad: list[str] = field(default_factory=list)  # images that can't be decoded
    turned: dict[str, str] = field(default_factory=dict)  # how masks of turned images fit -> the first of them


def write_data_set(found: Labelled, root: Path, *, overwrite: bool = False) -> Path:
    """Writes what isn't there yet; returns dataset.yaml. Raises: DataError, CacheWriteFailed.

    Without `overwrite` nothing that says something else is replaced.
    """
    path = root / "dataset.yaml"
    said = _description(found, root)
    before = _before(path, said, overwrite)
    _refuse_both(found, path, before)
    made = Made()
    for part, items in found.parts.items():
        _make_masks(items, root / PREPARED / part, part, made, len(found.classes), overwrite)
    for part, items in found.parts.items():
        write_atomic(root / PREPARED / f"{part}.txt", "".join(f"{stem_of(i.image)}\n" for i in items).encode())
    exif = _exif(made, before)
    if before is None or before.get("classes") != said["classes"]:
        write_text(path, HEAD + _yaml(said | ({"exif": exif} if exif else {})))
    elif any(part in before and before[part] != said[part] for part in found.parts):
        write_text(path, HEAD + _yaml(before | {part: said[part] for part in found.parts}))
    elif missing := {part: said[part] for part in found.parts if part not in before}:
        text = path.read_text(encoding="utf-8")
        write_text(path, f"{text}{'' if text.endswith(chr(10)) else chr(10)}{_yaml(missing)}")
    for line in found.remarks:
        say(line)
    for what, num in found.passed_over.items():
        say(f"passed over: {num} x {what}")
    if made.bad:
        say(f"{len(made.bad)} images can't be decoded, and extract will leave them out; the first: {made.bad[0]}")
    say(f"{path}: {made.num_made} masks made, {made.num_there} were there; {len(found.classes)} classes")
    return path


def _description(found: Labelled, root: Path) -> dict[str, Any]:
    """What dataset.yaml says, but for `exif`."""
    said: dict[str, Any] = {"name": root.absolute().name, "classes": list(found.classes), "unseen": []}
    said["ignore"] = no_class(len(found.classes))
    if found.palette is not None:
        said["palette"] = [list(colour) for colour in found.palette]
    for part in PARTS:
        if part in found.parts:
            said[part] = {
                "images": _patterns(found.parts[part], root),
                "masks": f"{PREPARED}/{part}/*.png",
                "list": f"{PREPARED}/{part}.txt",
            }
    return said


def _patterns(items: Sequence[Item], root: Path) -> list[str] | str:
    """What finds the images where they are: a pattern for each folder and ending."""
    top, found = root.absolute(), dict[str, None]()
    for item in items:
        folder = item.image.absolute().parent
        place = folder.relative_to(top) if folder.is_relative_to(top) else folder
        found[os.path.join("" if place == Path() else str(place), f"*{item.image.suffix.lower()}")] = None
    return next(iter(found)) if len(found) == 1 else list(found)


def _before(path: Path, said: Mapping[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """What dataset.yaml said before, None if there is none. Raises: DataError for one that says something else, which
    `overwrite` replaces: a part, or all of it with other classes."""
    if not path.is_file():
        return None
    before = read_description(path)
    keys = ("classes", *(part for part in PARTS if part in said and part in before))
    other = next((key for key in keys if before.get(key) != said[key]), None)
    if other is not None and not overwrite:
        raise DataError(
            f"{path}: is there, and its {other} {'are' if other == 'classes' else 'is'} not of this export. Choose "
            "another --root, or let --overwrite replace it and its masks."
        )
    if other == "classes" and (left := [part for part in PARTS if part in before and part not in said]):
        say(f"{path}: has other classes now, so its {left[0]} part is left out: prepare it again")
    return before


def _refuse_both(found: Labelled, path: Path, before: Mapping[str, Any] | None) -> None:
    """Raises: DataError for images that a part of dataset.yaml holds which this export is not of."""
    others = [part for part in PARTS if before and part in before and part not in found.parts]
    if not others or before is None or before.get("classes") != list(found.classes):  # of other classes none is kept
        return
    now = {os.path.realpath(item.image) for items in found.parts.values() for item in items}
    for part in others:
        try:
            there = [sample.image for sample in FolderDataSet(str(path)).samples(part)]
        except DataError:  # doctor says what is wrong with it
            continue
        if both := [image for image in there if os.path.realpath(image) in now]:
            raise DataError(
                f"{path}: {len(both)} of these images are in its {part} part, the first {both[0]}, and an image has "
                f"one part. Give --test as before, leave them out of the export, or take `{part}` out of {path.name}."
            )


def _yaml(said: Mapping[str, Any]) -> str:
    lines = []
    for key, value in said.items():
        text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**9, sort_keys=False)
        as_yaml = text.removesuffix("...\n").strip()
        lines.append(f"{key}: {as_yaml}{UNSEEN if key == 'unseen' else ''}\n")
    return "".join(lines)


def _make_masks(items: Sequence[Item], folder: Path, part: str, made: Made, num_classes: int, overwrite: bool) -> None:
    wrong: list[WrongValues] = []
    with progress(part, len(items)) as advance:
        for item in items:
            path, stamp = folder / f"{stem_of(item.image)}.png", item.stamp()
            advance()
            was, size = _there(path)
            if was == stamp:
                _check_size(item.image, size, made)
                made.num_there += 1
                continue
            if was is not None and not overwrite:
                raise DataError(
                    f"{path}: is there, and was made of other annotations, or not by this command. Choose another "
                    "--root, or let --overwrite make it again."
                )
            try:
                labels = item.make()
            except WrongValues as error:  # those of all masks are told at once
                wrong.append(error)
                continue
            except BadImage as error:  # without labels, and of unknown size
                made.bad.append(str(error))
                continue
            _check_size(item.image, (labels.shape[1], labels.shape[0]), made)
            write_atomic(path, _png(labels, num_classes, stamp))
            made.num_made += 1
    if wrong:
        raise DataError(told(wrong))


def _there(path: Path) -> tuple[str | None, tuple[int, int]]:
    """What the mask at `path` was made of, "" if it doesn't say, None if there is none; and its (width, height)."""
    try:
        with Image.open(path, formats=["PNG"]) as mask:
            return str(mask.info.get(STAMP, "")), mask.size
    except FileNotFoundError:
        return None, (0, 0)
    except (OSError, ValueError, SyntaxError):
        return "", (0, 0)


def _png(labels: np.ndarray, num_classes: int, stamp: str) -> bytes:
    file, facts = io.BytesIO(), PngImagePlugin.PngInfo()
    facts.add_text(STAMP, stamp)
    Image.fromarray(to_file(labels, file_dtype(num_classes))).save(file, "PNG", pnginfo=facts)
    return file.getvalue()


def _check_size(image: Path, size: tuple[int, int], made: Made) -> None:
    """Compares an image with its labels, and notes how those of turned ones fit. Raises: DataError."""
    try:
        sizes = image_sizes(image)
    except BadImage as error:
        made.bad.append(str(error))
        return
    fit = _fit(size, sizes)
    if not fit:
        raise DataError(
            f"{image}: is {sizes.upright[0]} x {sizes.upright[1]} pixels, and its labels are of {size[0]} x {size[1]}. "
            "Image and labels must belong together: export them again, or give the images that were labelled."
        )
    if sizes.turn != 1:
        made.turned.setdefault(fit, str(image))


def _fit(size: tuple[int, int], sizes: Sizes) -> str:
    """How labels of this (width, height) fit: upright, as_stored, either way, or not at all ("")."""
    fits = {UPRIGHT: size == sizes.upright, AS_STORED: size == sizes.stored}
    return "either way" if all(fits.values()) else next((way for way, does in fits.items() if does), "")


def _exif(made: Made, before: Mapping[str, Any] | None) -> str | None:
    """How images with an EXIF orientation are to be read. Raises: DataError where labels don't agree."""
    ways = [way for way in (UPRIGHT, AS_STORED) if way in made.turned]
    was = None if before is None else before.get("exif") or UPRIGHT
    if len(ways) == 2:
        raise DataError(
            f"{made.turned[UPRIGHT]} and {made.turned[AS_STORED]}: labels of the one fit the image turned by its EXIF "
            "orientation, of the other as it is stored. Save the images as they were labelled, without that tag."
        )
    if was and ways and ways[0] != was:
        raise DataError(
            f"{made.turned[ways[0]]}: its labels fit the image {ways[0]}, and dataset.yaml has exif: {was}. Save the "
            "images as they were labelled, without their EXIF orientation."
        )
    return ways[0] if ways else None
