"""The training items of a run as an ordinary torch data set: integer indices, for a DataLoader and a loop of one's own.

What `cli.py train` reads, checked as it checks it; item i of an epoch is a function of (train.seed, epoch, i).
Axes: S view side, h = w token grid, C channels.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.utils.data import Dataset

from pipeline.config import Config
from pipeline.data.base import data_of
from pipeline.learning.batches import CachedViews, Place
from pipeline.running.manifests import required_manifest
from pipeline.running.rows import check_current
from pipeline.running.table import labels_stage


class TrainingSet(Dataset[dict[str, Any]]):
    """A cached view of each training image with its labels, pseudo labels and CLS token, replayed on the image.

    An item is a dict that torch's own collation takes: image (3, S, S) uint8, labels (S, S) int16 (seen class ids,
    -1 elsewhere), pseudo (h, w) uint8 (0 annotated, 1 and on potential objects, 255 padding; (1, 1) in recipe
    clip_es), cls (C,) float32, sample int (its row in the cache). Images are flipped and recoloured as the config says;
    `set_epoch` chooses other views, flips and colours. Each loader process keeps up to train.views_in_memory_gb of
    replayed views.
    Raises: MissingCache, StaleCache, CorruptShard, DataError.
    """

    def __init__(self, config: Config) -> None:
        data, stage = data_of(config.data), labels_stage(config)
        made = required_manifest(config, stage)
        check_current(config.cache_path, stage, data, str(made["fingerprint"]))
        self.views = CachedViews(config, data)
        self.epoch = 0

    @property
    def classes(self) -> tuple[str, ...]:
        """Names by id."""
        return self.views.data.classes

    @property
    def unseen(self) -> tuple[str, ...]:
        """Those that no label of training is of."""
        return self.views.data.unseen

    @property
    def ids(self) -> tuple[str, ...]:
        """The sample id of each item."""
        return tuple(self.views.samples[row].id for row in self.views.rows)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch, from 0. Before the loader's iterator is made: its processes hold copies."""
        self.epoch = operator.index(epoch)

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = operator.index(index)
        if not -len(self) <= place < len(self):
            raise IndexError(f"item {index} of {len(self)} training images")
        place %= len(self)
        item = self.views[Place(self.views.rows[place], self.epoch, self.epoch * len(self) + place, 0)]
        # Replayed views are kept for other epochs; what is handed out belongs to its reader.
        return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in item.items()}
