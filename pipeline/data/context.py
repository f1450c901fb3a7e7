"""PASCAL Context in mmseg's layout: 59 classes or all 459, background without a label or as a class of its own.

root/JPEGImages/*.jpg  root/SegmentationClassContext/*.png     0 (no label, or background), 1-59
root/ImageSets/SegmentationContext/{train,val}.txt
root/SegmentationClassContext459/*.png                         16 bits: 0 (no label), 1-459 as published
root/ImageSets/SegmentationContext/classes459.txt              their names, one a line
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.data.base import DataError
from pipeline.data.classes import CONTEXT_CLASSES, CONTEXT_NUM_RAW, CONTEXT_SPLITS
from pipeline.data.files import read_ids, root_of
from pipeline.data.voc import VocLayout

LISTS, NAMES = {"train": "train", "test": "val"}, "classes459.txt"


class Context(VocLayout):
    """Split context-49-10 (CLIPTeacher's), or context-49-10-cascade; of `num_classes` 459 none unless asked for.

    Raises: see FileDataSet; DataError for another number of classes, or without the names of 459.
    """

    name, splits = "context", CONTEXT_SPLITS
    names: Sequence[str] = CONTEXT_CLASSES
    lists_folder, mask_folders = "SegmentationContext", ("SegmentationClassContext",)

    def __init__(self, root: str, *, num_classes: int = len(CONTEXT_CLASSES), **shared: Any) -> None:
        if num_classes not in (len(CONTEXT_CLASSES), CONTEXT_NUM_RAW):
            raise DataError(f"data.num_classes is {num_classes!r}; PASCAL Context's are 59 or 459.")
        self.is_whole = num_classes == CONTEXT_NUM_RAW
        if self.is_whole:
            self.mask_folders = ("SegmentationClassContext459",)
        super().__init__(root, **shared)

    def describe(self, root: str) -> dict[str, Any]:
        if not self.is_whole:
            return super().describe(root)
        path = root_of(root, self.name) / "ImageSets" / self.lists_folder / NAMES
        self.names = read_ids(path, "`cli.py prepare context459` makes it, and the masks.")
        if len(self.names) != CONTEXT_NUM_RAW:
            raise DataError(f"{path}: {len(self.names)} names; want those of {CONTEXT_NUM_RAW} classes.")
        return super().describe(root) | {"unseen": ()}

    def list_names(self, part: str) -> str:
        return LISTS[part]

    def description_files(self, part: str) -> list[Path]:
        return [*super().description_files(part), *([self.lists / NAMES] if self.is_whole else [])]

    def label_hint(self, raw: set[int]) -> str:
        if self.is_whole:
            return " Masks must hold 0 (no label) and 1-459, as published."
        return " Masks must hold 0 (background) and 1-59, as mmseg converts them, not the 459 original ids."
