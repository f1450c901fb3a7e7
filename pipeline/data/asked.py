"""What `cli.py prepare folder` is asked for: one export, its place, and the reader of its format."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.data.base import PARTS, DataError, unknown
from pipeline.data.coco import ROBOFLOW, coco, roboflow_coco
from pipeline.data.coded import CLASSES_CSV, binary, colours, roboflow_masks
from pipeline.data.label_studio import label_studio
from pipeline.data.labelled import Item, Labelled, parts_by_folder, stem_of
from pipeline.data.supervisely import supervisely

Tick = Callable[[int], None]
VOC_MASKS, VOC_IMAGES = "SegmentationClass", "JPEGImages"  # CVAT's folders beside labelmap.txt


@dataclass(frozen=True)
class Asked:
    """The options of the command; one of the first six says what is read. `test` is the share held out for testing."""

    coco: Path | None = None
    colours: Path | None = None
    binary: str | None = None
    label_studio: Path | None = None
    supervisely: Path | None = None
    roboflow: Path | None = None
    images: Path | None = None
    masks: Path | None = None
    tasks: Path | None = None
    mask_suffix: str = ""
    part: str = "train"
    test: float = 0.0
    background: bool = False

    @property
    def source(self) -> str:
        """The name of the source. Raises: DataError unless there is one."""
        given = [name for name in READERS if getattr(self, name) is not None]
        if len(given) != 1:
            options = ", ".join(_option(name) for name in READERS)
            what = f"{' and '.join(map(_option, given))} are given" if given else "none is given"
            raise DataError(f"prepare folder: what to read is one of {options}, and {what}. Give one of them.")
        return given[0]

    def root(self) -> Path:
        """Where dataset.yaml goes unless --root says so: beside what the export is described by."""
        name = self.source
        if name == "binary":
            return self.wanted("masks").absolute().parent
        if name == "label_studio":
            return self.wanted("tasks").absolute().parent
        path: Path = getattr(self, name)
        return path.absolute() if name in ("supervisely", "roboflow") else path.absolute().parent

    def wanted(self, name: str, otherwise: Path | None = None) -> Path:
        """An option that the source can't do without. Raises: DataError."""
        found: Path | None = getattr(self, name) or otherwise
        if found is None:
            raise DataError(f"prepare folder: {_option(self.source)} needs {_option(name)}, {MEANINGS[name]}.")
        return found


MEANINGS = {
    "images": "the folder of its images",
    "masks": "the folder of its masks",
    "tasks": "the project's export as JSON, which says what image each task is of",
}
# What each source takes beside the options of all: --root, --background (binary has one), --part and --test.
TAKES = {
    "coco": ("images", "background"),
    "colours": ("images", "masks", "mask_suffix", "background"),
    "binary": ("images", "masks", "mask_suffix"),
    "label_studio": ("images", "tasks", "background"),
    "supervisely": ("background",),
    "roboflow": ("background",),
}


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def read(asked: Asked, tick: Tick = lambda num: None) -> Labelled:
    """The export, listed; `tick` is called with the bytes of a JSON that were read. Raises: DataError."""
    name = asked.source
    for option in ("images", "masks", "tasks", "mask_suffix", "background"):
        if getattr(asked, option) and option not in TAKES[name]:
            raise DataError(f"prepare folder: {_option(option)} is nothing for {_option(name)}. Leave it out.")
    if asked.part not in PARTS:
        raise unknown("prepare folder: --part: no part is called", asked.part, PARTS)
    if not 0 <= asked.test < 1:
        raise DataError(f"prepare folder: --test is {asked.test:g}; want a share of the images, such as 0.1.")
    if asked.test and asked.part != "train":
        raise DataError("prepare folder: --test holds out some of the training images; give it or --part test.")
    return _held_out(READERS[name](asked, tick), asked)


def _held_out(found: Labelled, asked: Asked) -> Labelled:
    """With `test` some training images as the test part: by their names, so that more images move none."""
    if not asked.test:
        return found
    if set(found.parts) != {"train"}:
        raise DataError("prepare folder: --test: the export has a test part of its own. Leave --test out.")
    parts: Mapping[str, list[Item]] = {part: [] for part in PARTS}
    for item in found.parts["train"]:
        digest = hashlib.blake2b(stem_of(item.image).encode(), digest_size=8).digest()
        parts["test" if int.from_bytes(digest) / 2**64 < asked.test else "train"].append(item)
    if empty := [part for part in PARTS if not parts[part]]:
        num = len(found.parts["train"])
        raise DataError(f"prepare folder: --test {asked.test:g} of {num} images leaves none to {empty[0]}. Change it.")
    return replace(found, parts=parts)


def _coco(asked: Asked, tick: Tick) -> Labelled:
    assert asked.coco is not None
    return coco(asked.coco, asked.wanted("images"), tick, part=asked.part, background=asked.background)


def _colours(asked: Asked, tick: Tick) -> Labelled:
    path = asked.colours
    assert path is not None
    beside = {name: folder for name in (VOC_MASKS, VOC_IMAGES) if (folder := path.parent / name).is_dir()}
    masks = asked.wanted("masks", beside.get(VOC_MASKS))
    images = asked.wanted("images", beside.get(VOC_IMAGES))
    return colours(path, masks, images, part=asked.part, suffix=asked.mask_suffix, background=asked.background)


def _binary(asked: Asked, tick: Tick) -> Labelled:
    assert asked.binary is not None
    masks, images = asked.wanted("masks"), asked.wanted("images")
    return binary(asked.binary, masks, images, part=asked.part, suffix=asked.mask_suffix)


def _label_studio(asked: Asked, tick: Tick) -> Labelled:
    assert asked.label_studio is not None
    tasks, images = asked.wanted("tasks"), asked.wanted("images")
    return label_studio(asked.label_studio, tasks, images, part=asked.part, background=asked.background)


def _supervisely(asked: Asked, tick: Tick) -> Labelled:
    assert asked.supervisely is not None
    return supervisely(asked.supervisely, part=asked.part, background=asked.background)


def _roboflow(asked: Asked, tick: Tick) -> Labelled:
    """Its folders train, valid and test; of the last two test counts. Or one folder alone, of --part."""
    top = asked.roboflow
    assert top is not None
    if not top.is_dir():
        raise DataError(f"{top}: no such folder. --roboflow names the folder of an unpacked export.")
    for described, reader in ((ROBOFLOW, roboflow_coco), (CLASSES_CSV, roboflow_masks)):
        names = [path.name for path in sorted(top.iterdir()) if (path / described).is_file()]
        folders = {part: top / name for part, name in parts_by_folder(names).items()}
        if not folders and (top / described).is_file():
            folders = {asked.part: top}
        if not folders:
            continue
        if reader is roboflow_coco:
            found = roboflow_coco(folders, tick, background=asked.background)
        else:
            found = roboflow_masks(folders, background=asked.background)
        left = [name for name in names if top / name not in folders.values()]
        remarks = [f"{top / name}: left out, for there are a training and a test part without it" for name in left]
        return replace(found, remarks=[*found.remarks, *remarks])
    raise DataError(
        f"{top}: holds no train/{ROBOFLOW} and no train/{CLASSES_CSV}. Export as COCO Segmentation or as Semantic "
        "Segmentation Masks, and unpack it."
    )


READERS: Mapping[str, Callable[[Asked, Tick], Labelled]] = {
    "coco": _coco,
    "colours": _colours,
    "binary": _binary,
    "label_studio": _label_studio,
    "supervisely": _supervisely,
    "roboflow": _roboflow,
}
SOURCES: Sequence[str] = tuple(READERS)
