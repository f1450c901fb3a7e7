"""PASCAL Context with 59 classes, background without a label, in mmseg's layout.

root/JPEGImages/*.jpg  root/SegmentationClassContext/*.png
root/ImageSets/SegmentationContext/{train,val}.txt
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.data.base import Sample, chosen_split
from pipeline.data.classes import CONTEXT_CLASSES, CONTEXT_SPLITS
from pipeline.data.files import FileDataSet, raw_table, root_of
from pipeline.data.voc import listed_samples


class Context(FileDataSet):
    """Raw 0 and 255 -> 255, 1..59 -> 0..58. Splits: context-49-10 (CLIPTeacher's), context-49-10-cascade.

    Raises: DataError for an unknown split or name; listing the samples, for what is missing.
    """

    name = "context"
    table = raw_table(len(CONTEXT_CLASSES), shift=1, ignored=(0, 255))

    def __init__(
        self,
        root: str,
        *,
        limit: int | None = None,
        unseen: Sequence[str] | None = None,
        split: str | None = None,
    ) -> None:
        unseen = chosen_split("context", CONTEXT_SPLITS, unseen, split)
        super().__init__(limit=limit, classes=CONTEXT_CLASSES, unseen=unseen)
        self.root = root_of(root, "context")

    def list_samples(self, part: str) -> list[Sample]:
        lists = self.root / "ImageSets" / "SegmentationContext"
        names = {"train": "train", "test": "val"}[part]
        return listed_samples(self.root, lists, names, ("SegmentationClassContext",))

    def label_hint(self, raw: set[int]) -> str:
        return " Masks must hold 0 (background) and 1-59, as mmseg converts them, not the 459 original ids."
