"""PASCAL VOC 2012: twenty classes, background without a label or as a class of its own.

    root/JPEGImages/*.jpg  root/SegmentationClass/*.png  root/SegmentationClassAug/*.png
    root/ImageSets/Segmentation/{train_aug,val,...}.txt
    root/Annotations/*.xml    the objects of every image: its image-level labels

`train_aug` is the usual list of 10,582 images: VOC's own 1,464 and those annotated by SBD, whose
masks lie in SegmentationClassAug. Where both folders have a mask, VOC's own is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from pipeline.data.base import DataError, Sample, chosen_split, unknown
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
    root_of,
)


def listed_samples(root: Path, lists: Path, names: str, mask_folders: Sequence[str]) -> list[Sample]:
    """The samples of lists joined by "+" ("train+aug"), masks from the first folder that has one.

    Raises: DataError when a folder, a list, an image or a mask is missing, or an id is listed twice.
    """
    if (root / root.name / "JPEGImages").is_dir() or (root / "VOC2012" / "JPEGImages").is_dir():
        todo = "data.root must be the folder that holds JPEGImages, one further down."
    else:
        todo = "data.root must be the folder that holds JPEGImages."
    images = files_by_id(folder_of(root / "JPEGImages", todo), ".jpg")
    there = [folder for name in mask_folders if (folder := root / name).is_dir()]
    if not there:
        raise DataError(f"{root}: has no folder {' nor '.join(mask_folders)}, where the masks should be.")
    masks: dict[str, str] = {}
    for folder in reversed(there):
        masks |= files_by_id(folder, ".png")
    have = ", ".join(sorted(path.stem for path in lists.glob("*.txt"))) or "none"
    ids = [
        i for name in names.split("+") for i in read_ids(lists / f"{name}.txt", f"The lists there: {have}.")
    ]
    refuse_repeated(ids, f"{lists}: {names}")
    where = f"{lists}: {names}"
    refuse_missing(
        ids, images, f"listed images are not in {root / 'JPEGImages'}", where, "Complete the download."
    )
    kept = " or ".join(str(folder) for folder in there)
    refuse_missing(
        ids,
        masks,
        f"listed images have no mask in {kept}",
        where,
        "Complete the masks, or take another list.",
    )
    return [Sample(i, images[i], masks[i]) for i in ids]


TAGS = ("xml", "masks")
TRAIN_AUG, SAME_LIST = "train_aug", ("trainaug",)  # mmseg's converter writes it without the underline


class Voc(FileDataSet):
    """VOC 2012. Without `background`: raw 0 and 255 -> 255, 1..20 -> 0..19, split voc-15-5.

    With it: 21 classes, raw ids as they are, none unseen unless asked for; an image's labels (`tags`) are the
    objects of its XML, difficult ones included, or the ids of its mask.
    Raises: DataError for an unknown split, name or source of tags; listing the samples, for what is missing.
    """

    name = "voc"

    def __init__(
        self,
        root: str,
        *,
        limit: int | None = None,
        unseen: Sequence[str] | None = None,
        split: str | None = None,
        train_list: str = TRAIN_AUG,
        test_list: str = "val",
        background: bool = False,
        tags: str = "xml",
    ) -> None:
        if tags not in TAGS:
            raise unknown("data.tags: voc has no image-level labels from", tags, TAGS)
        is_closed = background and split is None and unseen is None
        super().__init__(
            limit=limit,
            classes=(BACKGROUND, *VOC_CLASSES) if background else VOC_CLASSES,
            unseen=() if is_closed else chosen_split("voc", VOC_SPLITS, unseen, split),
            palette=with_black(bitwise_palette(len(VOC_CLASSES))) if background else None,
        )
        first = len(self.classes) - len(VOC_CLASSES)
        self.background = 0 if background else None
        self.table = raw_table(len(self.classes), shift=1 - first, ignored=(255,) if background else (0, 255))
        self.root, self.tags_from = root_of(root, "voc"), tags
        self.lists = {"train": train_list, "test": test_list}

    def list_samples(self, part: str) -> list[Sample]:
        lists, names = self.root / "ImageSets" / "Segmentation", self._list_names(part)
        return listed_samples(self.root, lists, names, ("SegmentationClass", "SegmentationClassAug"))

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
        lists = self.root / "ImageSets" / "Segmentation"
        found = [lists / f"{name}.txt" for name in self._list_names(part).split("+")]
        if self.tags_from == "xml":
            found += [path for sample in self.samples(part) if (path := self._annotation(sample)).is_file()]
        return found

    def _list_names(self, part: str) -> str:
        """The lists of a part: those given, or another name of the usual one's file."""
        lists, names = self.root / "ImageSets" / "Segmentation", self.lists[part]
        if names == TRAIN_AUG and not (lists / f"{TRAIN_AUG}.txt").is_file():
            names = next((name for name in SAME_LIST if (lists / f"{name}.txt").is_file()), names)
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
