"""ADE20K's 150 classes (SceneParse150), for evaluation, as published.

root/images/{training,validation}/*.jpg  root/annotations/{training,validation}/*.png
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.data.base import Sample
from pipeline.data.classes import ADE20K_CLASSES
from pipeline.data.files import FileDataSet, files_by_id, folder_of, raw_table, refuse_missing, root_of

FOLDERS = {"train": "training", "test": "validation"}


class Ade20k(FileDataSet):
    """Raw 0 (other objects) and 255 -> 255, 1..150 -> 0..149. Every class is seen unless `unseen` says otherwise.

    Raises: DataError listing the samples, for images without a mask.
    """

    name = "ade20k"
    table = raw_table(len(ADE20K_CLASSES), shift=1, ignored=(0, 255))

    def __init__(self, root: str, *, limit: int | None = None, unseen: Sequence[str] = ()) -> None:
        super().__init__(limit=limit, classes=ADE20K_CLASSES, unseen=unseen)
        self.root = root_of(root, "ade20k")

    def list_samples(self, part: str) -> list[Sample]:
        todo = "data.root must be ADEChallengeData2016, which holds images/ and annotations/."
        folder = FOLDERS[part]
        images = files_by_id(folder_of(self.root / "images" / folder, todo), ".jpg")
        annotations = folder_of(self.root / "annotations" / folder, todo)
        masks = files_by_id(annotations, ".png")
        refuse_missing(images, masks, "images have no mask", annotations, "Complete the download.")
        return [Sample(i, images[i], masks[i]) for i in sorted(images)]

    def label_hint(self, raw: set[int]) -> str:
        return " Masks hold 0 (other) and 1-150: those of SceneParse150, not the full ADE20K's."
