"""COCO-Stuff 164k: 171 classes, as mmseg lays it out or with the masks as published (stuffthingmaps).

    root/images/{train2017,val2017}/*.jpg
    root/annotations/{train2017,val2017}/*_labelTrainIds.png    ids 0-170, 255; or else
    root/annotations/{train2017,val2017}/*.png                  ids 0-181 with gaps, 255

If a folder has any converted mask (_labelTrainIds), all of its images need one: a conversion that
stopped half-way is an error, not a mixture.
"""

from __future__ import annotations

import numpy as np

from pipeline.data.base import Sample
from pipeline.data.classes import COCO_STUFF_CLASSES, COCO_STUFF_RAW_GAPS, COCO_STUFF_SPLITS
from pipeline.data.files import FileDataSet, files_by_id, folder_of, raw_table, refuse_missing

FOLDERS = {"train": "train2017", "test": "val2017"}
CONVERTED = "_labelTrainIds.png"


def _published_table() -> np.ndarray:
    table = raw_table(0)
    used = [raw for raw in range(182) if raw not in COCO_STUFF_RAW_GAPS]
    table[used] = np.arange(len(COCO_STUFF_CLASSES))
    return table


class CocoStuff(FileDataSet):
    """COCO-Stuff 164k in either form of its masks. Split: coco-stuff-156-15."""

    name, names, splits = "coco_stuff", COCO_STUFF_CLASSES, COCO_STUFF_SPLITS
    table, tables = _published_table(), {CONVERTED: raw_table(len(COCO_STUFF_CLASSES))}

    def list_samples(self, part: str) -> list[Sample]:
        folder = FOLDERS[part]
        todo = "data.root must hold images/ and annotations/, each with train2017 and val2017."
        images = files_by_id(folder_of(self.root / "images" / folder, todo), ".jpg")
        annotations = folder_of(self.root / "annotations" / folder, todo)
        masks = files_by_id(annotations, CONVERTED)
        if masks:
            todo = "The conversion to _labelTrainIds stopped half-way, or the download is incomplete."
        else:
            masks = files_by_id(annotations, ".png")
            todo = "Complete the download of the masks."
        refuse_missing(images, masks, "images have no mask", annotations, todo)
        refuse_missing(masks, images, "masks have no image", annotations, "Complete the download of the images.")
        return [Sample(i, images[i], masks[i]) for i in sorted(images)]

    def label_hint(self, raw: set[int]) -> str:
        if max(raw) > 181:
            return " COCO-Stuff's masks hold 0-170 (_labelTrainIds) or 0-181 (as published), and 255."
        if min(raw) > 170:
            return " 171-181 are published ids: this file is not converted, but named _labelTrainIds."
        return " As a published id it has no class; masks converted to 0-170 must be named *_labelTrainIds.png."
