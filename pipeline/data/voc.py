"""PASCAL VOC 2012: twenty classes, background without a label or as a class of its own.

    root/JPEGImages/*.jpg  root/SegmentationClass/*.png  root/SegmentationClassAug/*.png
    root/ImageSets/Segmentation/{train_aug,val,...}.txt
    root/Annotations/*.xml    the objects of every image: its image-level labels

`train_aug` is the usual list of 10,582 images: VOC's own 1,464 and those annotated by SBD, whose
masks lie in SegmentationClassAug. Where both folders have a mask, VOC's own is taken.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from pipeline.data.base import DataError, Sample, unknown
from pipeline.data.classes import BACKGROUND, VOC_CLASSES, VOC_SPLITS, bitwise_palette, with_black
from pipeline.data.files import (
    FileDataSet,
    file_stamp,
    files_by_id,
    folder_of,
    raw_table,
    read_ids,
    refuse_missing,
    refuse_repeated,
)
from pipeline.ops.labels import no_class


class VocLayout(FileDataSet):
    """Lists of ids in ImageSets, their images in JPEGImages, their masks in the first of `mask_folders` that has one.

    In a mask 0 is what no class is: without a label, and the classes from 1 on; or, with `background`, a class of its
    own, raw ids being class ids, and no class unseen unless asked for. 255, or 65535 of 16 bits, has no label.
    """

    lists_folder: str
    mask_folders: tuple[str, ...]

    def __init__(self, root: str, *, background: bool = False, **shared: Any) -> None:
        self.background = 0 if background else None
        super().__init__(root, **shared)

    def describe(self, root: str) -> dict[str, Any]:
        described, num, most = super().describe(root), len(self.names), no_class(1 + len(self.names))
        if self.background is None:
            self.table = raw_table(num, shift=1, ignored=(0, most))
            return described
        self.table = raw_table(1 + num, ignored=(most,))
        palette = with_black(bitwise_palette(num))
        return described | {"classes": (BACKGROUND, *self.names), "palette": palette, "unseen": ()}

    @property
    def lists(self) -> Path:
        return self.root / "ImageSets" / self.lists_folder

    @abstractmethod
    def list_names(self, part: str) -> str:
        """The lists of a part, joined by "+" ("train+aug")."""

    def description_files(self, part: str) -> list[Path]:
        return [self.lists / f"{name}.txt" for name in self.list_names(part).split("+")]

    def list_samples(self, part: str) -> list[Sample]:
        root, lists, names = self.root, self.lists, self.list_names(part)
        if (root / root.name / "JPEGImages").is_dir() or (root / "VOC2012" / "JPEGImages").is_dir():
            todo = "data.root must be the folder that holds JPEGImages, one further down."
        else:
            todo = "data.root must be the folder that holds JPEGImages."
        images = files_by_id(folder_of(root / "JPEGImages", todo), ".jpg")
        there = [folder for name in self.mask_folders if (folder := root / name).is_dir()]
        if not there:
            wanted = " nor ".join(self.mask_folders)
            raise DataError(f"{root}: has no folder {wanted}, where the masks should be.")
        masks: dict[str, str] = {}
        for folder in reversed(there):
            masks |= files_by_id(folder, ".png")
        have = ", ".join(sorted(path.stem for path in lists.glob("*.txt"))) or "none"
        where, todo = f"{lists}: {names}", f"The lists there: {have}."
        ids = [i for name in names.split("+") for i in read_ids(lists / f"{name}.txt", todo)]
        refuse_repeated(ids, where)
        what = f"listed images are not in {root / 'JPEGImages'}"
        refuse_missing(ids, images, what, where, "Complete the download.")
        what = f"listed images have no mask in {' or '.join(map(str, there))}"
        refuse_missing(ids, masks, what, where, "Complete the masks, or take another list.")
        return [Sample(i, images[i], masks[i]) for i in ids]


TAGS = ("xml", "masks")
TRAIN_AUG, SAME_LIST = "train_aug", ("trainaug",)  # mmseg's converter writes it without the underline


class Voc(VocLayout):
    """VOC 2012: twenty classes, split voc-15-5. An image's labels (`tags`) are the objects of its XML, difficult ones
    included, or the ids of its mask.

    Raises: see FileDataSet; DataError for an unknown source of tags.
    """

    name, names, splits = "voc", VOC_CLASSES, VOC_SPLITS
    lists_folder, mask_folders = "Segmentation", ("SegmentationClass", "SegmentationClassAug")

    def __init__(
        self, root: str, *, train_list: str = TRAIN_AUG, test_list: str = "val", tags: str = "xml", **shared: Any
    ) -> None:
        if tags not in TAGS:
            raise unknown("data.tags: voc has no image-level labels from", tags, TAGS)
        super().__init__(root, **shared)
        self.tags_from, self.asked_lists = tags, {"train": train_list, "test": test_list}

    def tags(self, sample: Sample) -> tuple[int, ...]:
        if self.tags_from == "masks":
            return super().tags(sample)
        names = objects_of(self._annotation(sample))
        strange = [name for name in names if name not in VOC_CLASSES]
        if strange:
            raise unknown(f"{self._annotation(sample)}: {self.name} has no class", strange[0], VOC_CLASSES)
        return tuple(sorted({self.classes.index(name) for name in names}))

    def mask_stamp(self, sample: Sample) -> str:
        """Of all that labels come from: the XML too, where tags are read off it (CLIP-ES, cluster.named_above)."""
        path = self._annotation(sample)
        has_xml = self.tags_from == "xml" and path.is_file()
        return super().mask_stamp(sample) + (f" {file_stamp(path)}" if has_xml else "")

    def description_files(self, part: str) -> list[Path]:
        found = super().description_files(part)
        if self.tags_from == "xml":
            found += [path for sample in self.samples(part) if (path := self._annotation(sample)).is_file()]
        return found

    def list_names(self, part: str) -> str:
        """The lists of a part: those given, or another name of the usual one's file."""
        names = self.asked_lists[part]
        if names == TRAIN_AUG and not (self.lists / f"{TRAIN_AUG}.txt").is_file():
            names = next((name for name in SAME_LIST if (self.lists / f"{name}.txt").is_file()), names)
        return names

    def _annotation(self, sample: Sample) -> Path:
        return self.root / "Annotations" / f"{sample.id}.xml"

    def label_hint(self, raw: set[int]) -> str:
        return " VOC masks hold 0 (background), 1-20 and 255; are these masks of another data set?"


def objects_of(path: Path) -> list[str]:
    """The names of the objects of one of VOC's XML files, difficult ones included, their parts not.

    Raises: DataError when it isn't there or is something else.
    """
    try:
        found = ElementTree.parse(path).getroot()
    except OSError as error:
        todo = "Complete the download, or set data.tags to masks."
        raise DataError(f"{path}: an image's labels can't be read: {error.strerror}. {todo}") from None
    except ElementTree.ParseError as error:
        raise DataError(f"{path}: not XML: {error}. Replace the file.") from None
    if found.tag != "annotation":
        raise DataError(f"{path}: its root is <{found.tag}>; want VOC's <annotation>.")
    return [str(thing.findtext("name", "")).strip() for thing in found.findall("object")]
