"""Your own images: a folder with a dataset.yaml.

    name: orchard
    classes: [apple, pear, leaf, sky]
    unseen: [pear]                # or `seen`, or both; the rest is the other
    ignore: 255                   # raw id of pixels without a label; the default with more than 255 classes is 65535
    train: {images: "train/*.jpg", masks: "train_masks/*.png"}   # masks may be left out
    test: {images: "test/*.jpg", masks: "test_masks/*_ids.png", mask_suffix: _ids, list: test.txt}
    tags: tags.yaml               # `id: [apple, pear]`, which classes an image holds; left out: its mask says so
    exif: upright                 # how images with an EXIF orientation are read; as_stored: as their masks were drawn

`images` and `masks` are a glob, a folder, or a list of them; of `masks: train_masks` or `train_masks/*` the ending may
be any of a picture without loss (png, bmp, tif, ...), in either case. Globs and lists are relative to the yaml's
folder; image and mask are paired by the file name without its ending (and without `mask_suffix`), which is the
sample's id, in Unicode's composed form (NFC), for some systems decompose names when copying. A list names the ids to
take, one a line. A training image without a mask is unlabelled.

What a mask's pixels mean. Raw ids are positions in `classes`; with `reduce_zero_label: true` raw 0 has no label and the
classes are 1, 2, ... `values: {0: sky, 255: apple, 7: ignore}` says it of single raw ids; a class that it names has no
others. `palette` gives each class a colour, [r, g, b] of 0-255, to draw it with; and masks that are pictures of these
colours (RGB, or indexed and all of their colours in it) are read by colour, whatever their indices are. Beside it
`ignore` may be a colour, or a list of them; what is transparent has no label. `read_masks: by_index` or `by_colour`
says it where both would do.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.base import FORMATS, PARTS, BadImage, DataError, MaskFacts, Sample, check_names, opened, read_image
from pipeline.data.classes import BACKGROUND
from pipeline.data.colours import code_of, known_colours, label_of_code, rgb
from pipeline.data.description import (
    AS_STORED,
    BY_COLOUR,
    BY_INDEX,
    UPRIGHT,
    ignored_colours,
    is_reduced,
    one_of,
    palette_of,
    part_of,
    read_description,
    read_tags,
    table_of_ids,
    tags_path,
    unseen_of,
    values_of,
    yaml_path,
)
from pipeline.data.files import (
    INVALID,
    FileDataSet,
    Sizes,
    StoredMask,
    file_stamp,
    image_sizes,
    read_ids,
    refuse_missing,
    values_in,
)
from pipeline.data.inputs import ENDINGS, UNREAD
from pipeline.data.patterns import matching
from pipeline.ops.labels import IGNORE, LABEL, no_class

# What a mask may end in, where its pattern doesn't say: JPEG's compression changes ids.
MASK_ENDINGS = tuple(ending for kind, endings in FORMATS.items() for ending in endings if kind != "JPEG")


class FolderDataSet(FileDataSet):
    """The data set that a dataset.yaml describes; `root` is that file or the folder that holds it.

    `stated` are the keys that stand there: what is stated is no longer doubted.
    Raises: DataError for a description that doesn't fit (naming the nearest valid key or class), a pattern
    without files, or files that don't pair up.
    """

    name = "folder"

    def __init__(self, root: str, **shared: Any) -> None:
        super().__init__(root, **shared)
        described, path = self.yaml, self.path
        self.parts = {part: part_of(path, part, described[part]) for part in PARTS if described.get(part)}
        if not self.parts:
            raise DataError(f"{path}: neither train nor test is described; give at least `train: {{images: ...}}`.")
        self.stated = frozenset(key for key, value in described.items() if value is not None)
        self.background = self.classes.index(BACKGROUND) if BACKGROUND in self.classes else None
        self.tags_path = tags_path(path, described.get("tags"))
        self.listed_tags = None if self.tags_path is None else read_tags(self.tags_path, self.classes)
        self.reduce_zero_label = is_reduced(path, described.get("reduce_zero_label", False))
        self.exif = one_of(path, "exif", described.get("exif"), (UPRIGHT, AS_STORED)) or UPRIGHT
        # What a mask says of pixels without a class, unless `ignore` does.
        self.no_class = no_class(len(self.classes) + self.reduce_zero_label)  # 0 takes a value, too
        self._read_masks_by(described)

    def describe(self, root: str) -> dict[str, Any]:
        self.path = yaml_path(root)
        self.yaml = found = read_description(self.path)
        classes = check_names(f"{self.path}: classes", found.get("classes"), found.get("classes") or [])
        return {
            "name": str(found.get("name") or self.path.parent.name),
            "classes": classes,
            "unseen": () if self.is_unseen_given else unseen_of(self.path, classes, found),
            "palette": palette_of(self.path, found.get("palette"), len(classes)),
        }

    def _read_masks_by(self, described: Mapping[str, Any]) -> None:
        """What turns pixels into class ids: `table` for raw ids, `colours` (code -> class) where there is a palette."""
        path, classes = self.path, self.classes
        self.read_masks = one_of(path, "read_masks", described.get("read_masks"), (BY_COLOUR, BY_INDEX))
        ignored = described.get("ignore", self.no_class)
        colours = ignored_colours(path, ignored) if isinstance(ignored, list) else []
        if colours:
            ignored = self.no_class
        values = values_of(path, classes, described.get("values"))
        self.raw_meaning = {"reduced": self.reduce_zero_label, "ignored": ignored, "values": self._as_in_files(values)}
        self.table = table_of_ids(
            path, classes, ignored, self.reduce_zero_label, values, is_stated="ignore" in described
        )
        self.colours: dict[int, int] | None = None
        if "palette" in self.stated and self.read_masks != BY_INDEX:
            self.colours = known_colours(path, self.palette, colours, classes, is_wanted=self.read_masks == BY_COLOUR)
        if self.colours is None and (colours or self.read_masks == BY_COLOUR):
            raise DataError(f"{path}: colours of masks are named, but no palette that has one for each class.")

    # --- what a mask means ---

    def labels_of(self, sample: Sample, stored: StoredMask) -> np.ndarray:
        self._refuse_doubtful(sample, stored)
        if self.colours is None:
            return super().labels_of(sample, stored)
        if stored.pixels.ndim == 3:
            return self._of_colours(sample, stored.pixels)
        if stored.palette is not None and self._is_by_colour(sample, stored):
            codes = code_of(stored.palette)
            table = np.array([self.colours.get(int(code), INVALID) for code in codes], LABEL)
            return self._checked_colours(sample, table[stored.pixels], codes[stored.pixels])
        if stored.palette is None and self.read_masks == BY_COLOUR:
            raise DataError(f"{sample.mask}: has no colours (mode {stored.mode}), and read_masks is {BY_COLOUR}.")
        return super().labels_of(sample, stored)

    def _refuse_doubtful(self, sample: Sample, stored: StoredMask) -> None:
        """In 8 bits 255 usually means "no label", and of more than 255 classes it is one's id. Raises: DataError."""
        num = len(self.classes)
        is_of_ids = stored.pixels.ndim == 2 and stored.pixels.dtype == np.uint8 and self.colours is None
        if num > 255 and is_of_ids and not {"ignore", "values"} & self.stated and (stored.pixels == 255).any():
            raise DataError(
                f"{sample.mask}: holds 255 in 8 bits, which with {num} classes is the id of {self.classes[255]!r}. If "
                f"it is that, write `ignore: {self.no_class}` in {self.path.name}; if it means no label, save masks of "
                f"16 bits with {self.no_class} in its place."
            )

    def _is_by_colour(self, sample: Sample, stored: StoredMask) -> bool:
        """Whether an indexed mask is read by its colours: all of them are known. Raises: DataError for some."""
        assert self.colours is not None
        assert stored.palette is not None
        used = np.array(values_in(stored.pixels))
        codes = code_of(stored.palette)[used].tolist()
        is_ramp = (stored.palette[used] == used[:, None]).all()  # a grey for each index says nothing
        if self.read_masks == BY_COLOUR or (all(code in self.colours for code in codes) and not is_ramp):
            return True
        wrong = [i for i, code in zip(used.tolist(), codes, strict=True) if self._disagrees(i, code)]
        if wrong and not is_ramp:
            code = int(code_of(stored.palette)[wrong[0]])
            strange = next(code for code in codes if code not in self.colours)
            raise DataError(
                f"{sample.mask}: index {wrong[0]} has the colour {rgb(code)}, which is another class's in `palette`, "
                f"and {rgb(strange)} is in no class. List it as `ignore`, or set `read_masks: by_index` in "
                f"{self.path.name} if colours don't count."
            )
        return False

    def _disagrees(self, index: int, code: int) -> bool:
        assert self.colours is not None
        return code in self.colours and (index >= len(self.table) or self.colours[code] != self.table[index])

    def _of_colours(self, sample: Sample, pixels: np.ndarray) -> np.ndarray:
        """Labels of a picture of colours, (H, W, 3 or 4) uint8 -> (H, W) int16; what is transparent has none."""
        assert self.colours is not None
        codes = code_of(pixels[..., :3])
        ids = label_of_code(tuple(self.colours.items()))[codes]
        if pixels.shape[2] == 4:
            alpha = pixels[..., 3]
            if ((alpha > 0) & (alpha < 255)).any():
                raise DataError(f"{sample.mask}: half transparent pixels; want each opaque, or without a label.")
            ids = np.where(alpha == 0, LABEL(IGNORE), ids)
        return self._checked_colours(sample, ids, codes)

    def _checked_colours(self, sample: Sample, ids: np.ndarray, codes: np.ndarray) -> np.ndarray:
        is_strange = ids == INVALID
        if is_strange.any():
            found, num = np.unique(codes[is_strange], return_counts=True)
            most = found[np.argmax(num)]
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise DataError(
                f"{sample.mask}: colour {rgb(int(most))}{more} is no class's in `palette` ({is_strange.sum():,} "
                f"pixels). Correct `palette` in {self.path.name}, or list colours without a label there: "
                f"`ignore: [{rgb(int(most))}]`. Masks must not be smoothed or compressed with loss."
            )
        return ids

    def colour_hint(self, stored: StoredMask) -> str:
        if stored.palette is not None:
            return f" If it is its colours that say the classes, list them as `palette` in {self.path.name}."
        flat = stored.pixels[..., :3]
        if (flat == flat[..., :1]).all():
            return " Its three channels are equal: save one of them (mode L)."
        return f" If each class has a colour, list them as `palette` in {self.path.name}, [r, g, b] a class."

    def mask_facts(self, sample: Sample) -> MaskFacts | None:
        found = super().mask_facts(sample)
        if found is None or (self.colours is None and self.read_masks is None):
            return found
        is_raw = self.read_masks == BY_INDEX
        return MaskFacts(found.pixels, found.raw if is_raw or found.colours is None else None, None, found.doubt)

    def usual_meaning(self) -> str:
        """The one that stamps don't state, of up to 255 classes: those of earlier versions imply it."""
        return self._digest({"reduced": False, "ignored": no_class(1), "values": []}, None)

    def _as_in_files(self, table: Mapping[int, int]) -> list[tuple[int, int]]:
        return sorted((key, self.no_class if label == IGNORE else label) for key, label in table.items())

    def _digest(self, raw: Mapping[str, Any], colours: Mapping[int, int] | None) -> str:
        said = repr((sorted(raw.items()), self._as_in_files(colours) if colours else None))
        return hashlib.blake2b(said.encode(), digest_size=4).hexdigest()

    def mask_stamp(self, sample: Sample) -> str:
        """Of all that labels come from: the mask, what its pixels mean, and the image's tags where they are listed."""
        stamp = "no mask" if sample.mask is None else file_stamp(sample.mask, whole=True) + self._meant(sample.mask)
        return stamp if self.listed_tags is None else f"{stamp} {self.listed_tags.get(sample.id)}"

    def _meant(self, mask: str) -> str:
        """What a mask's stamp says of its meaning, "" for the usual one: colours matter to a mask that has some."""
        colours = self.colours
        if colours is not None:
            try:
                with opened(mask, DataError) as image:
                    colours = colours if image.mode in ("P", "RGB", "RGBA") else None
            except DataError:  # whoever reads it says what is wrong
                pass
        meaning = self._digest(self.raw_meaning, colours)
        return "" if meaning == self.usual_meaning() else f" {meaning}"

    # --- how an image is read ---

    def image(self, sample: Sample) -> np.ndarray:
        return read_image(sample.image, as_stored=self.exif == AS_STORED)

    def stamp(self, sample: Sample) -> str:
        stamp = super().stamp(sample)
        if self.exif != AS_STORED:
            return stamp
        try:
            return stamp if image_sizes(sample.image).turn == 1 else f"{stamp} as stored"
        except BadImage:
            return stamp

    def size_read(self, sizes: Sizes) -> tuple[int, int]:
        return sizes.stored if self.exif == AS_STORED else sizes.upright

    def turned_hint(self, sizes: Sizes) -> str:
        if self.exif == AS_STORED:
            return f"It fits the image turned upright by its EXIF tag: take `exif: as_stored` out of {self.path.name}."
        return (
            "It fits the image before its EXIF rotation: if all masks were drawn like that, set `exif: as_stored` in "
            f"{self.path.name}; or turn the mask too."
        )

    def turned_doubt(self, sample: Sample, turn: int) -> str:
        if "exif" in self.stated:
            return ""
        raise DataError(
            f"{sample.image}: has an EXIF orientation of {turn}, and the size of {sample.mask} fits it turned or not. "
            f"Set `exif: as_stored` in {self.path.name} if masks were drawn on the pixels as stored, or "
            "`exif: upright` if on the picture as viewers show it."
        )

    def label_hint(self, raw: set[int]) -> str:
        num = len(self.classes)
        if self.reduce_zero_label:
            return " With reduce_zero_label: true, raw ids are 1 to the number of classes, and 0 has no label."
        if raw == {num}:
            return (
                f" Ids count from 0, so {num} is one too many. If 0 means background or no label here and "
                f"the classes start at 1, set `reduce_zero_label: true` in {self.path.name}; if background "
                "is a class, list it first."
            )
        if self.colours is None and len(raw) == 1 and num == 2 and raw - {255, 65535}:
            return f" If {min(raw)} means {self.classes[1]!r}, set `values: {{{min(raw)}: 1}}` in {self.path.name}."
        if raw & {255, 65535} == raw:
            usual = min(raw)
            return f" {usual} is the usual value for pixels without a label: set `ignore: {usual}` in {self.path.name}."
        return (
            f" List the missing classes in {self.path.name}, say what ids mean by `values: {{{min(raw)}: ...}}`, "
            "or give the id of unlabelled pixels as `ignore`."
        )

    def tags(self, sample: Sample) -> tuple[int, ...]:
        if self.listed_tags is None:
            return super().tags(sample)
        if sample.id not in self.listed_tags:
            raise DataError(
                f"{self.path}: tags: image {sample.id!r} is not in the list; give it, or an empty list for none."
            )
        return self.listed_tags[sample.id]

    def description_files(self, part: str) -> list[Path]:
        named = self.parts.get(part, {}).get("list")
        return [
            self.path,
            *([self.path.parent / named] if named else []),
            *([self.tags_path] if self.tags_path else []),
        ]

    def list_samples(self, part: str) -> list[Sample]:
        if part not in self.parts:
            raise DataError(
                f"{self.path}: has no {part} part, and needs it. Add `{part}: {{images: ..., masks: ...}}`."
            )
        described = self.parts[part]
        where, suffix = f"{self.path}: {part}", described.get("mask_suffix") or ""
        images = self._matching(where, "images", described["images"])
        masks = self._matching(where, "masks", described["masks"], suffix) if described.get("masks") else None
        if masks is None and part == "test":
            raise DataError(f"{where}: no masks are given, and evaluation needs them. Add a pattern `masks:`.")
        if both := set(images.values()) & set((masks or {}).values()):
            raise DataError(
                f"{where}: {min(both)} is found as an image and as a mask. Give `images` an ending, or a list."
            )
        ids = sorted(images)
        if described.get("list"):
            listed = read_ids(self.path.parent / described["list"], f"It is named in {self.path}.")
            ids = self._ids_of(listed, images, where)
        if masks is None:
            return [Sample(i, images[i]) for i in ids]
        todo = "Names must agree without their endings; is mask_suffix right?"
        if part == "test" or not any(i in masks for i in ids):
            refuse_missing(ids, masks, "images have no mask", where, todo)
        if not described.get("list"):
            refuse_missing(masks, images, "masks have no image", where, todo)
        return [Sample(i, images[i], masks.get(i)) for i in ids]

    def _ids_of(self, listed: Sequence[str], images: Mapping[str, str], where: str) -> list[str]:
        """The ids of a list's lines: ids, or the names of images, alone or with their folders as in the pattern."""
        top = os.path.join(self._top(), "")
        by_name: dict[str, str] = {}
        for i, path in images.items():
            for name in (os.path.basename(path), path.removeprefix(top)):
                by_name[unicodedata.normalize("NFC", name)] = i
        lines = [unicodedata.normalize("NFC", line) for line in listed]
        ids = [line if line in images else by_name.get(line, line) for line in lines]
        todo = "Correct the list or the pattern of images."
        strange = next((i for i in ids if i not in images), "")
        if any(word in images or word in by_name for word in strange.split()):
            todo = "Give one id, or the name of one image, a line: masks are found by the pattern `masks`."
        refuse_missing(ids, images, "listed ids have no image", where, todo)
        if len(set(ids)) < len(ids):
            twice = next(i for place, i in enumerate(ids) if i in ids[:place])
            raise DataError(f"{where}: the list names {twice!r} twice; list each sample once.")
        return ids

    def _top(self) -> str:
        return "" if self.path.parent == Path() else str(self.path.parent)

    def _matching(self, where: str, key: str, patterns: str | list[str], suffix: str = "") -> dict[str, str]:
        """id -> path of what a pattern matches, or any of a list, ids being unique."""
        found: dict[str, str] = {}
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            self._add_matching(found, where, key, pattern, suffix)
        return found

    def _add_matching(self, found: dict[str, str], where: str, key: str, pattern: str, suffix: str) -> None:
        """Adds what one pattern matches. Plain strings: there may be 100,000 files."""
        folder, num = self._top(), 0
        endings = _endings(key, pattern, is_folder=os.path.isdir(os.path.join(folder, pattern)))
        wanted = os.path.join(pattern, "*") if os.path.isdir(os.path.join(folder, pattern)) else pattern
        for name in matching(wanted, self.path.parent, f"{where}.{key}: {pattern!r}"):
            path = os.path.join(folder, name)
            if not path.lower().endswith(endings) or not os.path.isfile(path):
                continue
            num += 1
            stem = os.path.splitext(os.path.basename(path))[0]
            if not stem.endswith(suffix):
                raise DataError(f"{where}.{key}: {path} does not end in the mask_suffix {suffix!r} before its ending.")
            try:
                stem.encode()
            except UnicodeEncodeError:
                raise DataError(f"{where}.{key}: {path!a} has bytes in its name that are no text; rename it.") from None
            stem = unicodedata.normalize("NFC", stem.removesuffix(suffix))
            if found.setdefault(stem, path) != path:
                raise DataError(f"{where}.{key}: {found[stem]} and {path} have the same id {stem!r}; rename one.")
        if not num:
            braces = " Braces are not read: * and mask_suffix do, and lists." if "{" in pattern else ""
            raise DataError(
                f"{where}.{key}: no file matches {pattern!r} in {self.path.parent}. Correct the pattern.{braces}"
            )


def _endings(key: str, pattern: str, *, is_folder: bool) -> tuple[str, ...]:
    """What files end in that a pattern is taken to mean: any if it has an ending; else masks end as pictures without
    loss do, whatever lies beside them, and the images of a folder as pictures."""
    if key == "masks" and (is_folder or not os.path.splitext(pattern)[1]):
        return MASK_ENDINGS
    return (*ENDINGS, *UNREAD) if is_folder else ("",)
