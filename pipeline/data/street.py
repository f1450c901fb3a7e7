"""Street scenes for evaluation: Cityscapes as published or as mmseg converts it, CamVid in the layout of SegNet.

Cityscapes  root/leftImg8bit/{train,val}/<city>/*_leftImg8bit.png
            root/gtFine/{train,val}/<city>/*_gtFine_labelTrainIds.png (0-18, 255) or *_gtFine_labelIds.png (0-33)
CamVid      root/{train,val,test}/*.png   root/{train,val,test}annot/*.png (0-10, 11 is unlabelled)
"""

from __future__ import annotations

import numpy as np

from pipeline.data.base import Sample
from pipeline.data.classes import CAMVID_CLASSES, CAMVID_PALETTE, CITYSCAPES_CLASSES, CITYSCAPES_PALETTE, CITYSCAPES_RAW
from pipeline.data.files import FileDataSet, files_by_id, folder_of, paired, raw_table, refuse_missing
from pipeline.ops.labels import IGNORE

IMAGE, CONVERTED, PUBLISHED = "_leftImg8bit.png", "_gtFine_labelTrainIds.png", "_gtFine_labelIds.png"
CAMVID_VOID = 11


def _published_table() -> np.ndarray:
    """Ids 0-33 of which nineteen are evaluated, as cityscapesScripts' labels.py has it; the others are ignored."""
    table = raw_table(0)
    table[:34] = IGNORE
    table[list(CITYSCAPES_RAW)] = np.arange(len(CITYSCAPES_RAW))
    return table


class Cityscapes(FileDataSet):
    """Nineteen classes; "test" is val, whose labels are public. Every class is seen unless `unseen` says otherwise."""

    name, names, own_palette = "cityscapes", CITYSCAPES_CLASSES, CITYSCAPES_PALETTE
    table, tables = _published_table(), {CONVERTED: raw_table(len(CITYSCAPES_CLASSES))}

    def list_samples(self, part: str) -> list[Sample]:
        part = {"train": "train", "test": "val"}[part]
        todo = "data.root must hold leftImg8bit/ and gtFine/, each with train and val."
        images: dict[str, str] = {}
        masks: dict[str, dict[str, str]] = {CONVERTED: {}, PUBLISHED: {}}
        for city in sorted(p for p in folder_of(self.root / "leftImg8bit" / part, todo).iterdir() if p.is_dir()):
            images |= files_by_id(city, IMAGE)
            labels = folder_of(self.root / "gtFine" / part / city.name, todo)
            for ending, found in masks.items():
                found |= files_by_id(labels, ending)
        chosen = masks[CONVERTED] or masks[PUBLISHED]
        refuse_missing(
            images,
            chosen,
            "images have no mask",
            self.root / "gtFine" / part,
            "Complete the download, or the conversion to labelTrainIds.",
        )
        return [Sample(i, images[i], chosen[i]) for i in sorted(images)]


class CamVid(FileDataSet):
    """Eleven classes, raw 11 is unlabelled."""

    name, names, own_palette = "camvid", CAMVID_CLASSES, CAMVID_PALETTE
    table = raw_table(len(CAMVID_CLASSES), ignored=(CAMVID_VOID, 255))

    def list_samples(self, part: str) -> list[Sample]:
        todo = "data.root must hold train/, trainannot/, test/ and testannot/."
        return paired(self.root / part, ".png", self.root / f"{part}annot", todo)

    def label_hint(self, raw: set[int]) -> str:
        return " CamVid's masks hold 0-10 and 11 (unlabelled), as SegNet's authors reduced them from 32 classes."
