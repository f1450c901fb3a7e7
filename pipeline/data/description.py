"""What a dataset.yaml says, read and checked: every function gives one key's value, or an error that names the file.

`read_yaml` is the one reader of YAML here.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import reading
from pipeline.data.base import DataError, check_names, unknown
from pipeline.data.files import INVALID, raw_table, root_of
from pipeline.ops.labels import IGNORE, no_class

_MASKS = ("ignore", "reduce_zero_label", "values", "palette", "read_masks", "exif")
KEYS = ("name", "classes", "unseen", "seen", *_MASKS, "train", "test", "tags")
PART_KEYS = ("images", "masks", "mask_suffix", "list")
PATTERN_KEYS = ("images", "masks")  # which may be lists
BY_COLOUR, BY_INDEX = "by_colour", "by_index"
UPRIGHT, AS_STORED = "upright", "as_stored"
MOST_RAW = 65535  # 16 bits


def yaml_path(root: object) -> Path:
    if isinstance(root, str | Path) and str(root).endswith((".yaml", ".yml")):
        path = Path(root).expanduser()
    else:
        path = root_of(root, "folder") / "dataset.yaml"
    if not path.is_file():
        raise DataError(f"{path}: no such file. It describes your images: classes, unseen, train and test.")
    return path


def read_yaml(path: Path, *, is_text: bool = False) -> Any:
    """What a YAML file holds; with `is_text` every scalar is text as it is written. Raises: DataError."""
    try:
        return reading.read_yaml(path, where=str(path), is_text=is_text)
    except reading.Unreadable as error:
        raise DataError(str(error)) from None


def read_description(path: Path) -> dict[str, Any]:
    described = read_yaml(path)
    if not isinstance(described, dict):
        raise DataError(f"{path}: want a mapping with {', '.join(KEYS)}; found {type(described).__name__}.")
    for key in described:
        if key not in KEYS:
            raise unknown(f"{path}: unknown key", key, KEYS)
    return described


def one_of(path: Path, key: str, value: object, known: Sequence[str]) -> str | None:
    if value is None or value in known:
        return value if isinstance(value, str) else None
    raise DataError(f"{path}: {key} is {value!r}; want {' or '.join(known)}.")


def part_of(path: Path, part: str, described: object) -> dict[str, Any]:
    if not isinstance(described, dict):
        raise DataError(
            f"{path}: {part} is {described!r}; want a mapping such as {{images: 'photos/*.jpg', masks: ...}}."
        )
    for key, value in described.items():
        if key not in PART_KEYS:
            raise unknown(f"{path}: unknown key in {part}:", key, PART_KEYS)
        is_list = key in PATTERN_KEYS and isinstance(value, list) and value and all(isinstance(v, str) for v in value)
        if value is not None and not isinstance(value, str) and not is_list:
            or_list = ", or a list of them" if key in PATTERN_KEYS else ""
            raise DataError(f"{path}: {part}.{key} is {value!r}; want text{or_list}.")
    if not described.get("images"):
        raise DataError(f"{path}: {part}.images is missing; give a pattern such as 'photos/*.jpg'.")
    return described


def unseen_of(path: Path, classes: tuple[str, ...], described: Mapping[str, Any]) -> tuple[str, ...]:
    """The unseen names from `unseen`, `seen` or both, which must then divide the classes."""
    given = {
        key: check_names(f"{path}: {key}", described[key], classes) for key in ("seen", "unseen") if described.get(key)
    }
    if "seen" not in given:
        return given.get("unseen", ())
    rest = tuple(name for name in classes if name not in given["seen"])
    if "unseen" not in given:
        return rest
    both = sorted(set(given["seen"]) & set(given["unseen"]))
    if both:
        raise DataError(f"{path}: {both[0]!r} is both seen and unseen; take it out of one list.")
    neither = sorted(set(rest) - set(given["unseen"]))
    if neither:
        raise DataError(f"{path}: {neither[0]!r} is neither seen nor unseen; leave one of the lists out, or add it.")
    return given["unseen"]


def tags_path(path: Path, named: object) -> Path | None:
    """The file that `tags` names; None without one."""
    if named is not None and not isinstance(named, str):
        raise DataError(f"{path}: tags is {named!r}; want the name of a YAML file, `id: [class, ...]`.")
    return None if named is None else path.parent / named


def read_tags(where: Path, classes: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """The class ids of each image by its list of tags. Ids are text: `0001` is an image, not a number."""
    listed = read_yaml(where, is_text=True)
    if not isinstance(listed, dict):
        raise DataError(f"{where}: want `id: [class, ...]` for every image; found {type(listed).__name__}.")
    found: dict[str, tuple[int, ...]] = {}
    for key, names in listed.items():
        sample = unicodedata.normalize("NFC", str(key))
        if sample in found:
            raise DataError(f"{where}: {sample!r} is listed twice; list each image once.")
        named = [] if names in ("", "~", "null") else names
        found[sample] = tuple(classes.index(n) for n in check_names(f"{where}: {key}", named, classes))
    return found


def palette_of(path: Path, palette: object, num: int) -> np.ndarray | None:
    if palette is None:
        return None
    try:
        colours = np.array(palette)
    except ValueError:  # rows of different lengths
        colours = np.zeros(0)
    if colours.shape != (num, 3) or colours.dtype.kind != "i" or colours.min() < 0 or colours.max() > 255:
        raise DataError(f"{path}: palette: want {num} colours, one a class, each [r, g, b] of whole numbers 0-255.")
    return colours.astype(np.uint8)


def is_reduced(path: Path, value: object) -> bool:
    if not isinstance(value, bool):
        raise DataError(f"{path}: reduce_zero_label is {value!r}; want true or false.")
    return value


def values_of(path: Path, classes: tuple[str, ...], values: object) -> dict[int, int]:
    """`values` as raw id -> class id or IGNORE; empty without it."""
    if values is None:
        return {}
    if not isinstance(values, dict) or not values:
        raise DataError(f"{path}: values is {values!r}; want raw ids and classes, `{{0: {classes[0]}, 255: ...}}`.")
    found: dict[int, int] = {}
    for key, name in values.items():
        raw = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key
        if not isinstance(raw, int) or isinstance(raw, bool) or not 0 <= raw <= MOST_RAW:
            raise DataError(f"{path}: values: {key!r} is no raw id; want a whole number, 0 to {MOST_RAW}.")
        if raw in found:
            raise DataError(f"{path}: values: raw id {raw} stands there twice.")
        is_id = isinstance(name, int) and not isinstance(name, bool)
        if isinstance(name, str) and name in classes:
            found[raw] = classes.index(name)
        elif name == "ignore" or (is_id and name == no_class(len(classes))):
            found[raw] = IGNORE
        elif is_id and 0 <= name < len(classes):
            found[raw] = name
        else:
            raise unknown(f"{path}: values: raw id {raw} is no class or id:", name, (*classes, "ignore"))
    return found


def table_of_ids(
    path: Path, classes: tuple[str, ...], ignore: object, reduced: bool, values: Mapping[int, int], *, is_stated: bool
) -> np.ndarray:
    """(R,) int16: raw ids -> class ids, IGNORE or INVALID. `is_stated`: `ignore` isn't the default."""
    shift = 1 if reduced else 0
    if not isinstance(ignore, int) or isinstance(ignore, bool) or not 0 <= ignore <= MOST_RAW:
        raise DataError(f"{path}: ignore is {ignore!r}; want the raw id of unlabelled pixels, 0 to {MOST_RAW}.")
    if values and reduced:
        raise DataError(f"{path}: reduce_zero_label and values: values alone says it all, leave the other out.")
    if is_stated and values.get(ignore, IGNORE) != IGNORE:
        raise DataError(f"{path}: ignore: {ignore} is {classes[values[ignore]]!r} in values; leave one of them out.")
    most = max(255, ignore, *values)
    table = raw_table(len(classes), shift=shift, ignored=(0,) if reduced else (), most=most)
    # These have the raw ids that values gives them.
    table[[i for i in set(values.values()) if i != IGNORE]] = INVALID
    if table[ignore] >= 0 and ignore not in values:
        hint = " If the classes start at 1, set reduce_zero_label: true instead." if ignore == 0 else ""
        raise DataError(f"{path}: ignore: {ignore} is the id of class {classes[table[ignore]]!r}.{hint}")
    table[ignore] = IGNORE
    for raw, label in values.items():
        table[raw] = label
    lost = [name for i, name in enumerate(classes) if not (table == i).any()]
    if lost:
        raise DataError(f"{path}: values leaves no raw id to class {lost[0]!r}; give it one.")
    return table


def ignored_colours(path: Path, ignored: list[Any]) -> list[tuple[int, int, int]]:
    """`ignore` as colours: one [r, g, b], or a list of them."""
    colours = ignored if ignored and all(isinstance(colour, list) for colour in ignored) else [ignored]
    for colour in colours:
        if len(colour) != 3 or not all(type(value) is int and 0 <= value <= 255 for value in colour):
            raise DataError(
                f"{path}: ignore is {ignored!r}; want a raw id, 0 to {MOST_RAW}, or colours [r, g, b] of whole "
                "numbers 0-255."
            )
    return [(colour[0], colour[1], colour[2]) for colour in colours]
