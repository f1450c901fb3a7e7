"""Your own images: a folder with a dataset.yaml.

    name: orchard
    classes: [apple, pear, leaf, sky]
    unseen: [pear]                # or `seen`, or both; the rest is the other
    ignore: 255                   # raw id of pixels without a label
    train: {images: "train/*.jpg", masks: "train_masks/*.png"}   # masks may be left out
    test: {images: "test/*.jpg", masks: "test_masks/*_ids.png", mask_suffix: _ids, list: test.txt}
    tags: tags.yaml               # `id: [apple, pear]`, which classes an image holds; left out: its mask says so

Globs and lists are relative to the yaml's folder; image and mask are paired by the file name without
its ending (and without `mask_suffix`), which is the sample's id, in Unicode's composed form (NFC), for
some systems decompose names when copying. A list names the ids to take, one a line. Raw ids of the masks
are positions in `classes`; with `reduce_zero_label: true` raw 0 has no label and the classes are 1, 2, ...
`palette` gives each class a colour, [r, g, b] of 0-255.
"""

from __future__ import annotations

import glob
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.base import IGNORE, PARTS, DataError, Sample, check_names, unknown
from pipeline.data.classes import BACKGROUND
from pipeline.data.files import FileDataSet, raw_table, read_ids, refuse_missing, root_of
from pipeline.reading import Unreadable, read_yaml

KEYS = (
    *("name", "classes", "unseen", "seen", "ignore", "reduce_zero_label", "palette", "train", "test"),
    "tags",
)
PART_KEYS = ("images", "masks", "mask_suffix", "list")


class FolderDataSet(FileDataSet):
    """The data set that a dataset.yaml describes; `root` is that file or the folder that holds it.

    Raises: DataError for a description that doesn't fit (naming the nearest valid key or class), a pattern
    without files, or files that don't pair up.
    """

    name = "folder"

    def __init__(
        self,
        root: str,
        *,
        limit: int | None = None,
        unseen: Sequence[str] | None = None,
        split: str | None = None,
    ) -> None:
        self.path = _yaml_path(root)
        described = _read_yaml(self.path)
        if split is not None:
            raise DataError(
                f"data.split is {split!r}, but a folder has no named splits; use unseen in {self.path}."
            )
        classes = check_names(
            f"{self.path}: classes", described.get("classes"), described.get("classes") or []
        )
        super().__init__(
            limit=limit,
            name=str(described.get("name") or self.path.parent.name),
            classes=classes,
            unseen=_unseen(self.path, classes, described) if unseen is None else unseen,
            palette=_palette(self.path, described.get("palette"), len(classes)),
        )
        self.parts = {part: _part(self.path, part, described[part]) for part in PARTS if described.get(part)}
        if not self.parts:
            raise DataError(
                f"{self.path}: neither train nor test is described; give at least `train: {{images: ...}}`."
            )
        self.background = classes.index(BACKGROUND) if BACKGROUND in classes else None
        self.listed_tags = _tags(self.path, described.get("tags"), classes)
        self.reduce_zero_label = _reduced(self.path, described.get("reduce_zero_label", False))
        self.table = _table(self.path, classes, described.get("ignore", IGNORE), self.reduce_zero_label)

    def label_hint(self, raw: set[int]) -> str:
        num = len(self.classes)
        if self.reduce_zero_label:
            return (
                " With reduce_zero_label: true, raw ids are 1 to the number of classes, and 0 has no label."
            )
        if raw == {num}:
            return (
                f" Ids count from 0, so {num} is one too many. If 0 means background or no label here and "
                f"the classes start at 1, set `reduce_zero_label: true` in {self.path.name}; if background "
                "is a class, list it first."
            )
        if raw == {IGNORE}:
            return (
                f" 255 is the usual value for pixels without a label: set `ignore: 255` in {self.path.name}."
            )
        return (
            f" List the missing classes in {self.path.name}, or give the id of unlabelled pixels as `ignore`."
        )

    def tags(self, sample: Sample) -> tuple[int, ...]:
        if self.listed_tags is None:
            return super().tags(sample)
        if sample.id not in self.listed_tags:
            raise DataError(
                f"{self.path}: tags: image {sample.id!r} is not in the list; give it, or an empty list for none."
            )
        return self.listed_tags[sample.id]

    def mask_stamp(self, sample: Sample) -> str:
        stamp = super().mask_stamp(sample)
        return stamp if self.listed_tags is None else f"{stamp} {self.listed_tags.get(sample.id)}"

    def list_samples(self, part: str) -> list[Sample]:
        if part not in self.parts:
            raise DataError(
                f"{self.path}: has no {part} part, and needs it. Add `{part}: {{images: ..., masks: ...}}`."
            )
        described = self.parts[part]
        where, suffix = f"{self.path}: {part}", described.get("mask_suffix") or ""
        images = self._matching(where, "images", described["images"], "")
        masks = self._matching(where, "masks", described["masks"], suffix) if described.get("masks") else None
        if masks is None and part == "test":
            raise DataError(
                f"{where}: no masks are given, and evaluation needs them. Add a pattern `masks:`."
            )
        ids = sorted(images)
        if described.get("list"):
            listed = read_ids(self.path.parent / described["list"], f"It is named in {self.path}.")
            ids = [unicodedata.normalize("NFC", i) for i in listed]
            refuse_missing(
                ids, images, "listed ids have no image", where, "Correct the list or the pattern of images."
            )
        if masks is None:
            return [Sample(i, images[i]) for i in ids]
        todo = "Names must agree without their endings; is mask_suffix right?"
        refuse_missing(ids, masks, "images have no mask", where, todo)
        if not described.get("list"):
            refuse_missing(masks, images, "masks have no image", where, todo)
        return [Sample(i, images[i], masks[i]) for i in ids]

    def _matching(self, where: str, key: str, pattern: str, suffix: str) -> dict[str, str]:
        """id -> path of what a pattern matches, ids being unique."""
        folder = self.path.parent
        found: dict[str, str] = {}
        for name in sorted(glob.glob(pattern, root_dir=folder, recursive=True)):
            path = folder / name
            if not path.is_file():
                continue
            if not path.stem.endswith(suffix):
                raise DataError(
                    f"{where}.{key}: {path} does not end in the mask_suffix {suffix!r} before its ending."
                )
            stem = unicodedata.normalize("NFC", path.stem.removesuffix(suffix))
            if any(
                unicodedata.category(character) == "Cs" for character in stem
            ):  # Python's undecodable bytes
                raise DataError(
                    f"{where}.{key}: {str(path)!a} has bytes in its name that are no text; rename it."
                )
            if stem in found:
                raise DataError(
                    f"{where}.{key}: {found[stem]} and {path} have the same id {stem!r}; rename one."
                )
            found[stem] = str(path)
        if not found:
            raise DataError(f"{where}.{key}: no file matches {pattern!r} in {folder}. Correct the pattern.")
        return found


def _yaml_path(root: object) -> Path:
    if isinstance(root, str | Path) and str(root).endswith((".yaml", ".yml")):
        path = Path(root).expanduser()
    else:
        path = root_of(root, "folder") / "dataset.yaml"
    if not path.is_file():
        raise DataError(f"{path}: no such file. It describes your images: classes, unseen, train and test.")
    return path


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        described = read_yaml(path, where=str(path))
    except Unreadable as error:
        raise DataError(str(error)) from None
    if not isinstance(described, dict):
        raise DataError(f"{path}: want a mapping with {', '.join(KEYS)}; found {type(described).__name__}.")
    for key in described:
        if key not in KEYS:
            raise unknown(f"{path}: unknown key", key, KEYS)
    return described


def _part(path: Path, part: str, described: object) -> dict[str, str]:
    if not isinstance(described, dict):
        raise DataError(
            f"{path}: {part} is {described!r}; want a mapping such as {{images: 'photos/*.jpg', masks: ...}}."
        )
    for key, value in described.items():
        if key not in PART_KEYS:
            raise unknown(f"{path}: unknown key in {part}:", key, PART_KEYS)
        if value is not None and not isinstance(value, str):
            raise DataError(f"{path}: {part}.{key} is {value!r}; want text.")
    if not described.get("images"):
        raise DataError(f"{path}: {part}.images is missing; give a pattern such as 'photos/*.jpg'.")
    return described


def _unseen(path: Path, classes: tuple[str, ...], described: Mapping[str, Any]) -> tuple[str, ...]:
    """The unseen names from `unseen`, `seen` or both, which must then divide the classes."""
    given = {
        key: check_names(f"{path}: {key}", described[key], classes)
        for key in ("seen", "unseen")
        if described.get(key)
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
        raise DataError(
            f"{path}: {neither[0]!r} is neither seen nor unseen; leave one of the lists out, or add it."
        )
    return given["unseen"]


def _tags(path: Path, named: object, classes: tuple[str, ...]) -> dict[str, tuple[int, ...]] | None:
    """The class ids of each image by the list that `tags` names; None without one."""
    if named is None:
        return None
    if not isinstance(named, str):
        raise DataError(f"{path}: tags is {named!r}; want the name of a YAML file, `id: [class, ...]`.")
    where = path.parent / named
    try:
        listed = read_yaml(where, where=str(where), keys_are_text=True)
    except Unreadable as error:
        raise DataError(str(error)) from None
    if not isinstance(listed, dict):
        raise DataError(f"{where}: want `id: [class, ...]` for every image; found {type(listed).__name__}.")
    return {
        unicodedata.normalize("NFC", str(key)): tuple(
            classes.index(name) for name in check_names(f"{where}: {key}", names or [], classes)
        )
        for key, names in listed.items()
    }


def _palette(path: Path, palette: object, num: int) -> np.ndarray | None:
    if palette is None:
        return None
    try:
        colours = np.array(palette)
    except ValueError:  # rows of different lengths
        colours = np.zeros(0)
    if colours.shape != (num, 3) or colours.dtype.kind != "i" or colours.min() < 0 or colours.max() > 255:
        raise DataError(
            f"{path}: palette: want {num} colours, one a class, each [r, g, b] of whole numbers 0-255."
        )
    return colours.astype(np.uint8)


def _reduced(path: Path, value: object) -> bool:
    if not isinstance(value, bool):
        raise DataError(f"{path}: reduce_zero_label is {value!r}; want true or false.")
    return value


def _table(path: Path, classes: tuple[str, ...], ignore: object, reduced: bool) -> np.ndarray:
    shift = 1 if reduced else 0
    if not isinstance(ignore, int) or isinstance(ignore, bool) or not 0 <= ignore <= 255:
        raise DataError(f"{path}: ignore is {ignore!r}; want the raw id of unlabelled pixels, 0 to 255.")
    if shift <= ignore < shift + len(classes):
        hint = " If the classes start at 1, set reduce_zero_label: true instead." if ignore == 0 else ""
        raise DataError(f"{path}: ignore: {ignore} is the id of class {classes[ignore - shift]!r}.{hint}")
    return raw_table(len(classes), shift=shift, ignored=(ignore, 0) if reduced else (ignore,))
