"""PASCAL Context in mmseg's layout: 59 classes, background without a label or as a class of its own.

root/JPEGImages/*.jpg  root/SegmentationClassContext/*.png
root/ImageSets/SegmentationContext/{train,val}.txt
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.data.base import Sample, chosen_split
from pipeline.data.classes import (
    BACKGROUND,
    CONTEXT_CLASSES,
    CONTEXT_SPLITS,
    bitwise_palette,
    with_black,
)
from pipeline.data.files import FileDataSet, raw_table, root_of
from pipeline.data.voc import listed_samples

LISTS = {"train": "train", "test": "val"}


class Context(FileDataSet):
    """Without `background`: raw 0 and 255 -> 255, 1..59 -> 0..58; split context-49-10 (CLIPTeacher's), or
    context-49-10-cascade. With it: 60 classes, raw ids as they are, none unseen unless asked for.

    Raises: DataError for an unknown split or name; listing the samples, for what is missing.
    """

    name = "context"

    def __init__(
        self,
        root: str,
        *,
        limit: int | None = None,
        unseen: Sequence[str] | None = None,
        split: str | None = None,
        background: bool = False,
    ) -> None:
        is_closed = background and split is None and unseen is None
        super().__init__(
            limit=limit,
            classes=(BACKGROUND, *CONTEXT_CLASSES) if background else CONTEXT_CLASSES,
            unseen=() if is_closed else chosen_split("context", CONTEXT_SPLITS, unseen, split),
            palette=with_black(bitwise_palette(len(CONTEXT_CLASSES))) if background else None,
        )
        first = len(self.classes) - len(CONTEXT_CLASSES)
        self.background = 0 if background else None
        self.table = raw_table(len(self.classes), shift=1 - first, ignored=(255,) if background else (0, 255))
        self.root = root_of(root, "context")

    def description_files(self, part: str) -> list[Path]:
        return [self.root / "ImageSets" / "SegmentationContext" / f"{LISTS[part]}.txt"]

    def list_samples(self, part: str) -> list[Sample]:
        lists, names = self.root / "ImageSets" / "SegmentationContext", LISTS[part]
        return listed_samples(self.root, lists, names, ("SegmentationClassContext",))

    def label_hint(self, raw: set[int]) -> str:
        return " Masks must hold 0 (background) and 1-59, as mmseg converts them, not the 459 original ids."
