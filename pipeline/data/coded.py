"""Masks whose pixels say the class in another way than by its position: by colours, by values of a table, by 0 and 255.

    a colour map    sky: [70, 130, 180], `#4682b4`, or a list of colours; `ignore`: colours without a label
    labelmap.txt    CVAT's: `label:r,g,b:parts:actions` a line; its `background` is what nobody has drawn on
    _classes.csv    Roboflow's: `Pixel Value, Class` a line, masks NAME_mask.png beside the images
    --binary NAME   0 is background, 255 (or 1) is NAME; an indexed mask of black and white is read by its colours

Colours are exact: one that is in no entry is an error, which names it, its pixels and a file.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from pipeline.data.base import FORMATS, DataError
from pipeline.data.classes import BACKGROUND
from pipeline.data.colours import code_of, label_of_code, rgb
from pipeline.data.description import read_yaml
from pipeline.data.files import INVALID, StoredMask, file_stamp, image_sizes, stored_mask, values_in
from pipeline.data.labelled import (
    MASK_ENDINGS,
    Item,
    Labelled,
    WrongValues,
    by_stem,
    checked_classes,
    pictures_below,
    stamp_of,
    stem_of,
)
from pipeline.data.patterns import files_below
from pipeline.ops.labels import IGNORE, LABEL

IGNORED = "ignore"  # the key of a colour map for colours without a label
CLASSES_CSV, ROBOFLOW_SUFFIX = "_classes.csv", "_mask"
NAMED_BACKGROUND = (BACKGROUND, "unlabeled", "unlabelled")


def colours(
    path: Path, masks: Path, images: Path, *, part: str = "train", suffix: str = "", background: bool = False
) -> Labelled:
    """Colour-coded masks and their map, a YAML or CVAT's labelmap.txt. Raises: DataError."""
    is_cvat = path.suffix.lower() == ".txt"
    named = _labelmap(path) if is_cvat else _colour_map(path)
    unlabelled = [] if is_cvat and background else [name for name in named if name in NAMED_BACKGROUND and is_cvat]
    classes = checked_classes(path, [name for name in named if name != IGNORED and name not in unlabelled])
    table: dict[int, int] = {}
    for name, listed in named.items():
        label = classes.index(name) if name in classes else IGNORE
        for colour in listed:
            if table.setdefault(colour, label) != label:
                other = next(n for n, them in named.items() if colour in them)
                raise DataError(f"{path}: {other!r} and {name!r} have the colour {rgb(colour)}; give each its own.")
    known = tuple(sorted(table.items()))
    todo = f"Add them to {path}, or to its `{IGNORED}`. Masks must not be smoothed or compressed with loss."
    if is_cvat:
        todo = f"Add them to {path}. Masks must not be smoothed or compressed with loss."

    def read(mask: Path) -> np.ndarray:
        pixels, alpha = _colours_of(mask, stored_mask(mask))
        codes = code_of(pixels)
        labels = label_of_code(known)[codes]
        if alpha is not None:
            if ((alpha > 0) & (alpha < 255)).any():
                raise DataError(
                    f"{mask}: half transparent pixels; want each opaque, or without a label. Save it again."
                )
            labels = np.where(alpha == 0, LABEL(IGNORE), labels)
        _refuse(mask, codes, labels == INVALID, lambda code: f"colour {rgb(code)}", todo)
        return labels

    items = _paired(images, masks, suffix, ("colours", known, classes), read)
    palette = None
    if all(len(named[name]) == 1 for name in classes):
        palette = [[code >> 16, code >> 8 & 255, code & 255] for name in classes for code in named[name]]
    remarks = [
        f"{path}: {name!r} is what nobody has drawn on, so it has no label (--background makes a class of it)"
        for name in unlabelled
    ]
    return Labelled(classes, {part: items}, palette, remarks=remarks)


def binary(name: str, masks: Path, images: Path, *, part: str = "train", suffix: str = "") -> Labelled:
    """Masks of 0 and 255, or of 0 and 1: background and `name`. Raises: DataError."""
    classes = checked_classes("--binary", [BACKGROUND, name])
    todo = "A mask of one class holds 0 and 255 alone, or 0 and 1; save it without smoothing, or use --colours."

    def read(mask: Path) -> np.ndarray:
        values = _black_and_white(mask, stored_mask(mask))
        is_one = values.max(initial=0) <= 1
        known = (values == 0) | (values == (1 if is_one else 255))
        _refuse(mask, values, ~known, lambda value: f"value {value}", todo)
        return (values > 0).astype(LABEL)

    return Labelled(classes, {part: _paired(images, masks, suffix, ("binary", classes), read)})


def roboflow_masks(folders: Mapping[str, Path], *, background: bool = False) -> Labelled:
    """Roboflow's masks by part: each folder has images, masks NAME_mask.png and _classes.csv. Raises: DataError."""
    tables = {part: _classes_csv(folder / CLASSES_CSV) for part, folder in folders.items()}
    path, table = folders["train"] / CLASSES_CSV, tables["train"]
    for part, other in tables.items():
        if other != table:
            raise DataError(
                f"{path} and {folders[part] / CLASSES_CSV}: list other classes. Export both parts together."
            )
    unlabelled = [name for name in table.values() if name in NAMED_BACKGROUND and not background]
    classes = checked_classes(path, [name for name in table.values() if name not in unlabelled])
    label_of = np.full(1 + max(table), INVALID, LABEL)
    for value, name in table.items():
        label_of[value] = classes.index(name) if name in classes else IGNORE
    todo = f"Correct {path}, or export the masks again."

    def read(mask: Path) -> np.ndarray:
        values = _one_channel(mask, stored_mask(mask))
        labels = np.where(values < len(label_of), label_of[np.minimum(values, len(label_of) - 1)], LABEL(INVALID))
        _refuse(mask, values, labels == INVALID, lambda value: f"value {value}", todo)
        return labels

    facts = ("roboflow", tuple(table.items()), classes)
    parts = {part: _paired(folder, folder, ROBOFLOW_SUFFIX, facts, read) for part, folder in folders.items()}
    remarks = [
        f"{path}: {name!r} is what nobody has drawn on, so it has no label (--background makes a class of it)"
        for name in unlabelled
    ]
    return Labelled(classes, parts, remarks=remarks)


def _paired(
    images: Path, masks: Path, suffix: str, facts: tuple[object, ...], read: Callable[[Path], np.ndarray]
) -> list[Item]:
    """The images of a folder, each with its mask; one without is unlabelled. Raises: DataError."""
    of_stem = by_stem((p for p in pictures_below(masks, "--masks", MASK_ENDINGS) if _ends(p, suffix)), "masks", suffix)
    pictures = pictures_below(images, "--images")
    if images.resolve() == masks.resolve():  # what isn't a mask there is an image
        are_masks = {path.resolve() for path in of_stem.values()}
        pictures = [path for path in pictures if path.resolve() not in are_masks]
    elif both := sorted({path.resolve() for path in pictures} & {path.resolve() for path in of_stem.values()}):
        raise DataError(f"{both[0]}: is found as an image and as a mask. Give them folders of their own.")
    found = by_stem(pictures, "images")
    if lonely := [str(of_stem[stem]) for stem in of_stem if stem not in found]:
        raise DataError(
            f"{lonely[0]}: a mask without an image in {images} ({len(lonely)} of {len(of_stem)}). Names must agree but "
            "for their endings; what masks have before it is --mask-suffix."
        )
    if not of_stem:
        raise DataError(f"{masks}: no mask ends in {suffix!r} before its ending. Correct --mask-suffix.")
    _refuse_jpeg(masks, suffix, set(found) - set(of_stem), {path.resolve() for path in pictures})
    return [_item(image, of_stem.get(stem), facts, read) for stem, image in found.items()]


def _refuse_jpeg(masks: Path, suffix: str, bare: set[str], pictures: set[Path]) -> None:
    """Raises: DataError for a JPEG that looks like the mask of an image that has none."""
    for name in sorted(files_below(masks, str(masks))):
        path = masks / name
        is_one = path.suffix.lower() in FORMATS["JPEG"] and stem_of(path, suffix) in bare and _ends(path, suffix)
        if is_one and path.resolve() not in pictures:
            raise DataError(f"{path}: a JPEG mask; its compression changes values. Save masks as PNG.")


def _ends(path: Path, suffix: str) -> bool:
    return path.stem.endswith(suffix)


def _item(image: Path, mask: Path | None, facts: tuple[object, ...], read: Callable[[Path], np.ndarray]) -> Item:
    if mask is not None:
        return Item(image, lambda: stamp_of(*facts, file_stamp(mask, whole=True)), lambda: read(mask))

    def nothing() -> np.ndarray:
        width, height = image_sizes(image).upright
        return np.full((height, width), IGNORE, LABEL)

    return Item(image, lambda: stamp_of(*facts, "no mask"), nothing)


def _refuse(mask: Path, values: np.ndarray, is_strange: np.ndarray, name: Callable[[int], str], todo: str) -> None:
    if is_strange.any():
        found, num = np.unique(values[is_strange], return_counts=True)
        counts = {name(int(value)): int(count) for value, count in zip(found, num, strict=True)}
        raise WrongValues(str(mask), counts, todo)


def _colours_of(path: Path, stored: StoredMask) -> tuple[np.ndarray, np.ndarray | None]:
    """(H, W, 3) uint8 colours, and (H, W) alpha if there is any; an indexed mask's are its palette's, a grey is one."""
    pixels = stored.pixels
    if pixels.ndim == 3:
        return pixels[..., :3], pixels[..., 3] if pixels.shape[2] == 4 else None
    if stored.palette is not None:
        return stored.palette[pixels], None
    if stored.mode == "1":
        pixels = pixels * np.uint8(255)
    if pixels.dtype != np.uint8:
        raise DataError(f"{path}: greys of {pixels.dtype.itemsize * 8} bits are no colours. Save the mask as RGB.")
    return np.repeat(pixels[..., None], 3, axis=2), None


def _black_and_white(path: Path, stored: StoredMask) -> np.ndarray:
    """`_one_channel`, but the colours of an indexed mask that has black and white: its indices may be in any order.

    Raises: DataError.
    """
    if stored.palette is not None:
        colours = {i: tuple(stored.palette[i].tolist()) for i in values_in(stored.pixels)}
        if set(colours.values()) <= {(0, 0, 0), (255, 255, 255)} and len(set(colours.values())) == len(colours):
            return np.asarray(stored.palette[stored.pixels][..., 0])
    return _one_channel(path, stored)


def _one_channel(path: Path, stored: StoredMask) -> np.ndarray:
    """(H, W) values of a mask: its greys or indices, or those of three channels that are equal. Raises: DataError."""
    pixels = stored.pixels
    if pixels.ndim == 2:
        return pixels
    if (pixels[..., :3] != pixels[..., :1]).any():
        raise DataError(f"{path}: has colours, and values are wanted here. Use --colours with a map of them.")
    if pixels.shape[2] == 4 and (pixels[..., 3] != 255).any():
        raise DataError(f"{path}: has transparent pixels, and values are wanted here. Save it without transparency.")
    return np.asarray(pixels[..., 0])


def _text_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror}. Correct the path.") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not UTF-8 text. Save it as such.") from None


def _labelmap(path: Path) -> dict[str, list[int]]:
    """CVAT's labelmap.txt: label -> its colour, in the order of the file. Raises: DataError."""
    found: dict[str, list[int]] = {}
    for number, line in enumerate(_text_lines(path), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, *rest = line.rsplit(":", 3)
        if len(rest) != 3:
            raise DataError(f"{path}, line {number}: {line!r} is no `label:r,g,b:parts:actions`. Export it again.")
        colour = _code(path, f"line {number}", [int(v) if v.strip().isdigit() else v for v in rest[0].split(",")])
        if name.strip() in found:
            raise DataError(f"{path}, line {number}: {name.strip()!r} stands there twice. Name each label once.")
        found[name.strip()] = [colour]
    return found


def _colour_map(path: Path) -> dict[str, list[int]]:
    """A YAML of names and colours, [r, g, b] or #rrggbb, one or several. Raises: DataError."""
    if not path.is_file():
        raise DataError(f"{path}: no such file. It says which colour is which class: `sky: [70, 130, 180]`.")
    listed = read_yaml(path)
    if not isinstance(listed, dict) or not listed:
        raise DataError(f"{path}: want `name: [r, g, b]` a class; found {type(listed).__name__}.")
    found: dict[str, list[int]] = {}
    for name, value in listed.items():
        several = isinstance(value, list) and value and all(isinstance(one, list | str) for one in value)
        found[name] = [_code(path, str(name), one) for one in (value if several else [value])]
    return found


def _code(path: Path, where: str, colour: object) -> int:
    if isinstance(colour, str) and colour.startswith("#") and len(colour) == 7:
        try:
            return int(colour[1:], 16)
        except ValueError:
            pass
    if isinstance(colour, Sequence) and len(colour) == 3 and all(type(v) is int and 0 <= v <= 255 for v in colour):
        return int(code_of(np.array(colour)))
    raise DataError(f"{path}, {where}: {colour!r} is no colour; want [r, g, b] of whole numbers 0-255, or '#rrggbb'.")


def _classes_csv(path: Path) -> dict[int, str]:
    """Roboflow's table: pixel value -> class. Raises: DataError."""
    rows = [[cell.strip() for cell in row] for row in csv.reader(_text_lines(path)) if any(map(str.strip, row))]
    found: dict[int, str] = {}
    for row in rows[1:]:
        if len(row) != 2 or not row[0].isdigit() or not 0 <= int(row[0]) <= 65535 or int(row[0]) in found:
            raise DataError(f"{path}: {','.join(row)!r} is no `pixel value, class`. Export the masks again.")
        found[int(row[0])] = row[1]
    if not found or [cell.lower() for cell in rows[0]] != ["pixel value", "class"]:
        raise DataError(f"{path}: want a line `Pixel Value, Class`, then one a class. Export the masks again.")
    return found
