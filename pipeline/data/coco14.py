"""COCO 2014 for segmentation from image-level labels: 80 objects and background, id 0.

    root/JPEGImages/train2014/*.jpg          or root/train2014/*.jpg, or both parts in root/JPEGImages
    root/SegmentationClass/train2014/*.png   or both parts in root/SegmentationClass
    root/annotations/instances_train2014.json    with data.tags: json
    the same with val2014

Masks are those made from the instance annotations, as this field's papers use them: 0 background, 1-80 the objects
in the order of COCO's category ids, without their gaps, and 255. Images and masks pair up by number, whether they
are called COCO_train2014_000000000009 or 000000000009. `train_list` and `test_list` are files below root with
a name a line; without them every image of the folder is meant, and needs a mask.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.data.base import DataError, Sample, unknown
from pipeline.data.classes import BACKGROUND, COCO_CLASSES, bitwise_palette, with_black
from pipeline.data.files import FileDataSet, files_by_id, raw_table, read_ids, refuse_missing, refuse_repeated

FOLDERS = {"train": "train2014", "test": "val2014"}
TAGS = ("masks", "json")
GAPS = "COCO's category ids go to 90, with gaps: convert the masks to 0-80"


class Coco14(FileDataSet):
    """COCO 2014 with 81 classes, none unseen unless asked for. An image's labels are its mask's ids, or its instances'.

    Raises: see FileDataSet; DataError for an unknown source of tags.
    """

    name, names, background = "coco14", (BACKGROUND, *COCO_CLASSES), 0
    own_palette = with_black(bitwise_palette(len(COCO_CLASSES)))
    table = raw_table(1 + len(COCO_CLASSES))

    def __init__(
        self,
        root: str,
        *,
        train_list: str | None = None,
        test_list: str | None = None,
        tags: str = "masks",
        **shared: Any,
    ) -> None:
        if tags not in TAGS:
            raise unknown("data.tags: coco14 has no image-level labels from", tags, TAGS)
        super().__init__(root, **shared)
        self.tags_from = tags
        self.lists = {"train": train_list, "test": test_list}

    def list_samples(self, part: str) -> list[Sample]:
        year = FOLDERS[part]
        images = self._numbered(year, ("JPEGImages/" + year, year, "JPEGImages"), ".jpg")
        masks = self._numbered(year, ("SegmentationClass/" + year, "SegmentationClass"), ".png")
        chosen = self.lists[part]
        if chosen is None:
            ids = sorted(images)
        else:
            ids = [_number(name) for name in read_ids(self.root / chosen)]
            refuse_repeated(ids, str(self.root / chosen))
            refuse_missing(ids, images, "listed images are not there", self.root / chosen, "Complete the download.")
        todo = f"Complete the masks, or name the images that have one in data.{part}_list."
        refuse_missing(ids, masks, f"images of {year} have no mask", self.root, todo)
        return [Sample(i, images[i], masks[i]) for i in ids]

    def _numbered(self, year: str, folders: Sequence[str], ending: str) -> dict[str, str]:
        """The files of a part by number, from the first of these folders that is there."""
        for name in folders:
            if (self.root / name).is_dir():
                found = files_by_id(self.root / name, ending)
                is_shared = not name.endswith(year) and ending == ".jpg"  # both parts lie in it
                return {_number(i): path for i, path in found.items() if not is_shared or year in i}
        raise DataError(f"{self.root}: has no folder {' nor '.join(folders)}. data.root must hold one of them.")

    def tags(self, sample: Sample) -> tuple[int, ...]:
        if self.tags_from == "masks":
            return super().tags(sample)
        part = next(part for part in FOLDERS if sample.id in self.by_id(part))
        return self._instances(part).get(int(sample.id), ())

    @functools.lru_cache(maxsize=2)  # noqa: B019 - as many as there are parts, as long-lived as a run
    def _instances(self, part: str) -> dict[int, tuple[int, ...]]:
        """The class ids of every image that has an object, by number."""
        path = self._json(part)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            names = {item["id"]: str(item["name"]) for item in found["categories"]}
            pairs = {(int(item["image_id"]), names[item["category_id"]]) for item in found["annotations"]}
        except OSError as error:
            todo = "Complete the download, or set data.tags to masks."
            raise DataError(f"{path}: the images' labels can't be read: {error.strerror}. {todo}") from None
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise DataError(f"{path}: not COCO's instances ({type(error).__name__}: {error}).") from None
        strange = sorted({name for _, name in pairs} - set(COCO_CLASSES))
        if strange:
            raise unknown(f"{path}: coco14 has no class", strange[0], COCO_CLASSES)
        labels: dict[int, list[int]] = {}
        for image, name in pairs:
            labels.setdefault(image, []).append(self.classes.index(name))
        return {image: tuple(sorted(ids)) for image, ids in labels.items()}

    def _json(self, part: str) -> Path:
        return self.root / "annotations" / f"instances_{FOLDERS[part]}.json"

    def mask_stamp(self, sample: Sample) -> str:
        """Of all that labels come from: an image's instances too."""
        if self.tags_from == "masks":
            return super().mask_stamp(sample)
        return f"{super().mask_stamp(sample)} {self.tags(sample)}"

    def description_files(self, part: str) -> list[Path]:
        chosen = self.lists[part]
        return [*([self.root / chosen] if chosen else []), *([self._json(part)] if self.tags_from == "json" else [])]

    def label_hint(self, raw: set[int]) -> str:
        return f" {GAPS}." if max(raw) <= 90 else " Are these masks of another data set?"


def _number(name: str) -> str:
    """COCO_train2014_000000000009 -> 000000000009."""
    return name.rpartition("_")[2]
