"""PASCAL VOC 2012: twenty classes, background without a label.

    root/JPEGImages/*.jpg  root/SegmentationClass/*.png  root/SegmentationClassAug/*.png
    root/ImageSets/Segmentation/{train_aug,val,...}.txt

`train_aug` is the usual list of 10,582 images: VOC's own 1,464 and those annotated by SBD, whose
masks lie in SegmentationClassAug. Where both folders have a mask, VOC's own is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.data.base import DataError, Sample, chosen_split
from pipeline.data.classes import VOC_CLASSES, VOC_SPLITS
from pipeline.data.files import (
    FileDataSet,
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


class Voc(FileDataSet):
    """VOC 2012 without background: raw 0 and 255 -> 255, 1..20 -> 0..19. Split: voc-15-5.

    Raises: DataError for an unknown split or name; listing the samples, for what is missing.
    """

    name = "voc"
    table = raw_table(len(VOC_CLASSES), shift=1, ignored=(0, 255))

    def __init__(
        self,
        root: str,
        *,
        limit: int | None = None,
        unseen: Sequence[str] | None = None,
        split: str | None = None,
        train_list: str = "train_aug",
        test_list: str = "val",
    ) -> None:
        super().__init__(
            limit=limit, classes=VOC_CLASSES, unseen=chosen_split("voc", VOC_SPLITS, unseen, split)
        )
        self.root = root_of(root, "voc")
        self.lists = {"train": train_list, "test": test_list}

    def list_samples(self, part: str) -> list[Sample]:
        lists = self.root / "ImageSets" / "Segmentation"
        return listed_samples(
            self.root, lists, self.lists[part], ("SegmentationClass", "SegmentationClassAug")
        )

    def label_hint(self, raw: set[int]) -> str:
        return " VOC masks hold 0 (background), 1-20 and 255; are these masks of another data set?"
