"""ADE20K's 150 classes (SceneParse150), for evaluation, as published.

root/images/{training,validation}/*.jpg  root/annotations/{training,validation}/*.png
"""

from __future__ import annotations

from pipeline.data.base import Sample
from pipeline.data.classes import ADE20K_CLASSES
from pipeline.data.files import FileDataSet, paired, raw_table

FOLDERS = {"train": "training", "test": "validation"}


class Ade20k(FileDataSet):
    """Raw 0 (other objects) and 255 have no label, 1..150 -> 0..149. All are seen unless `unseen` says otherwise."""

    name, names = "ade20k", ADE20K_CLASSES
    table = raw_table(len(ADE20K_CLASSES), shift=1, ignored=(0, 255))

    def list_samples(self, part: str) -> list[Sample]:
        todo = "data.root must be ADEChallengeData2016, which holds images/ and annotations/."
        images, masks = (self.root / kind / FOLDERS[part] for kind in ("images", "annotations"))
        return paired(images, ".jpg", masks, todo)

    def label_hint(self, raw: set[int]) -> str:
        return " Masks hold 0 (other) and 1-150: those of SceneParse150, not the full ADE20K's."
