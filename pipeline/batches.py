"""Cache rows and replayed views, made into training batches.

What goes into iteration t is a pure function of (seed, t): the plan names the rows and epochs, each
item draws its flip and colours from a generator keyed by (seed, t, position). So resuming needs no
sampler state, and several processes read disjoint parts of one batch.

Axes: B images of this process, S view side, h = w token grid, C channels.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cache.store import Store
from cache.verify import check_whole, read_recorded
from pipeline.config import LABELS_FROM, Config
from pipeline.data.base import DataError, DataSet, Sample, open_data_set
from pipeline.ops.views import replay_image, replay_labels, view_of
from pipeline.rows import cached_samples
from pipeline.targets import targets_of
from pipeline.tracking import required_manifest

IGNORE = 255  # label of a pixel without annotation
FLIPPED = ("image", "labels", "pseudo")  # of an item: its maps
# Up to this all that is read of the cache is read once and kept, and no checksum a step: CLIPTeacher's boxes, CLS
# tokens and pseudo labels are about 2 KiB a view at C = 512, so 130,000 views.
KEEP_BYTES = 1 << 28

# mmseg's PhotoMetricDistortion: brightness +-32 of 255, contrast and saturation 0.5-1.5, hue +-18 of 180.
BRIGHTNESS, CONTRAST, SATURATION, HUE = 32.0, (0.5, 1.5), (0.5, 1.5), 18 / 180


@functools.lru_cache(maxsize=1)
def _data(dumped: str) -> DataSet:
    section = Config.model_validate_json(dumped).data
    return open_data_set(section.kind, **section.options())


def data_of(config: Config) -> DataSet:
    """The run's data set, opened once a process."""
    return _data(config.model_dump_json(by_alias=True))


@dataclass(frozen=True)
class Plan:
    """Which rows make iteration t: shuffled epochs laid end to end, cut into batches."""

    rows: tuple[int, ...]  # usable rows of the cache, quarantined ones left out
    batch: int
    seed: int

    def items(self, iteration: int) -> list[tuple[int, int]]:
        """(row, epoch) of each place in the batch of `iteration`, counted from 0."""
        first, num = iteration * self.batch, len(self.rows)
        places = range(first, first + self.batch)
        return [
            (self.rows[_order(self.seed, place // num, num)[place % num]], place // num) for place in places
        ]


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, num: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num)


@dataclass(frozen=True)
class Place:
    """One item of a batch: the key of the dataset below."""

    row: int
    epoch: int
    iteration: int
    position: int


class CachedViews(Dataset):
    """Training items: a cached view replayed on its image and labels, with what the recipe has of the view beside.

    Item: image (3, S, S) uint8, labels (S, S) uint8 (unseen, unannotated and not confident 255), sample int64 (the
    row, for GLM's mask); in clip_teacher pseudo (h, w) uint8 and cls (C,) float32.
    Raises: StaleCache when the cache's samples aren't the data set's; DataError as `targets_of`.
    """

    def __init__(self, config: Config, data: DataSet) -> None:
        self.config, self.data = config, data
        self.store = Store.open(config.cache_path)
        self.samples = cached_samples(data, self.store)
        self.row_of = {sample.id: row for row, sample in enumerate(self.samples)}
        self.targets = targets_of(config, data)
        self.arrays = ("view", *self.targets.arrays)
        self.size = int(self.store.attributes["teacher"]["image_size"])
        self.mean_colour = np.array(self.store.attributes["mean_colour"], np.uint8)
        self.num_views = self._views_used(int(self.store.attributes["views"]["num"]))
        self.kept, status = self._checked()
        usable = [int(row) for row in np.flatnonzero(status == 0)]
        if not usable:
            raise DataError(f"{config.cache_path}: no usable image is cached; see `cli.py verify`.")
        seed, fraction = config.train.seed, config.train.validation.fraction
        self.held_out = tuple(row for row in usable if held_out(self.samples[row].id, seed, fraction))
        self.rows = tuple(row for row in usable if not held_out(self.samples[row].id, seed, fraction))
        if not self.rows or (fraction and not self.held_out):
            raise DataError(
                f"train.validate.fraction {fraction} holds out {len(self.held_out)} of {len(usable)} images; both "
                "parts need one. Choose another fraction."
            )

    def _views_used(self, cached: int) -> int:
        wanted = self.config.train.views or cached
        if wanted > cached:
            raise DataError(
                f"train.views is {wanted}, and {self.config.cache_path} holds {cached} views an image. Lower it, or "
                "extract again with more views.num."
            )
        return wanted

    def _checked(self) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """What is read of the cache, when it is small enough to keep, and `status`, shard by shard as recorded.

        Raises: CorruptShard, StaleCache: training never begins on a cache that was tampered with.
        """
        stages = ("extract", LABELS_FROM[self.config.recipe])
        above = {stage: required_manifest(self.config, stage) for stage in stages}
        check_whole(self.store, above["extract"])
        fingerprints = {stage: str(manifest["fingerprint"]) for stage, manifest in above.items()}
        specs = [self.store.spec(name) for name in self.arrays]
        sizes = [math.prod(s.shape(self.store.sizes)) * np.dtype(s.dtype).itemsize for s in specs]
        keep = sum(sizes) <= KEEP_BYTES
        found: dict[str, list[np.ndarray]] = {name: [] for name in (*self.arrays * keep, "status")}
        for shard in range(self.store.num_shards):
            blocks = read_recorded(self.store, shard, fingerprints, (*self.arrays, "status"))
            for name, parts in found.items():
                parts.append(blocks[name])
        whole = {name: np.concatenate(parts) for name, parts in found.items()}
        return whole, whole.pop("status")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: Place) -> dict[str, Any]:
        train, view = self.config.train, view_of(self.samples[place.row].id, place.epoch, self.num_views)
        item = self._item(place.row, view)
        rng = np.random.Generator(
            np.random.Philox(key=[train.seed, (place.iteration << 20) + place.position])
        )
        if rng.random() < train.flip:
            item |= {name: item[name].flip(-1) for name in FLIPPED if name in item}
        if train.photometric:
            item["image"] = distorted(item["image"], rng)
        return item | {"sample": place.row}

    def whole(self, row: int) -> dict[str, Tensor]:
        """View 0 of a row as it is, neither flipped nor distorted: an item without `sample`."""
        return self._item(row, 0)

    def _item(self, row: int, view: int) -> dict[str, Tensor]:
        image, labels = self.replay(self.samples[row], self._row("view", row)[view])
        beside = {name: torch.from_numpy(self._row(name, row)[view]) for name in self.targets.by_view}
        if "cls" in beside:
            beside["cls"] = beside["cls"].float()
        return {"image": image, "labels": labels, **beside}

    def _row(self, array: str, row: int) -> np.ndarray:
        return (
            self.kept[array][row] if array in self.kept else self.store.read_rows(array, np.array([row]))[0]
        )

    def replay(self, sample: Sample, box: np.ndarray) -> tuple[Tensor, Tensor]:
        """A view as extraction saw it, and the labels under it: (3, S, S) uint8, (S, S) uint8."""
        image, cached = self.data.image(sample), functools.partial(self._row, row=self.row_of[sample.id])
        labels = self.targets.labels(self.config, self.data, sample, cached, (image.shape[0], image.shape[1]))
        if labels is None:
            labels = np.full(image.shape[:2], IGNORE, np.uint8)
        return replay_image(image, box, self.size, self.mean_colour), replay_labels(labels, box, self.size)


def held_out(sample: str, seed: int, fraction: float) -> bool:
    """Whether an image is kept for validation: a draw keyed by (seed, id), so other images don't matter."""
    drawn = hashlib.blake2b(f"{seed}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(drawn) < fraction * 2**64


def distorted(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Photometric distortion of (3, S, S) uint8, each part with probability 1/2 (mmseg's, in its order)."""
    from torchvision.transforms.v2 import functional as transforms

    values = image.float()
    if rng.random() < 0.5:
        values = values + rng.uniform(-BRIGHTNESS, BRIGHTNESS)
    contrast_first = rng.random() < 0.5
    contrast = rng.uniform(*CONTRAST) if rng.random() < 0.5 else 1.0
    values = values * contrast if contrast_first else values
    unit = values.clamp(0, 255) / 255
    if rng.random() < 0.5:
        unit = transforms.adjust_saturation(unit, rng.uniform(*SATURATION))
    if rng.random() < 0.5:
        unit = transforms.adjust_hue(unit, rng.uniform(-HUE, HUE))
    values = unit * 255
    values = values if contrast_first else values * contrast
    return values.clamp(0, 255).round().to(torch.uint8)


def training_batches(
    views: CachedViews, *, start: int, stop: int, process: int = 0, num_processes: int = 1
) -> Iterator[dict[str, Tensor]]:
    """The batches of iterations start..stop-1, this process's places of each."""
    train = views.config.train
    plan = Plan(views.rows, train.batch, train.seed)
    loader: DataLoader = DataLoader(
        views,
        batch_sampler=_Batches(plan, start, stop, process, num_processes),
        num_workers=train.workers,
        multiprocessing_context="spawn" if train.workers else None,  # a forked zarr reader can deadlock
        pin_memory=torch.cuda.is_available(),
    )
    return iter(loader)


@dataclass(frozen=True)
class _Batches:
    plan: Plan
    start: int
    stop: int
    process: int
    num_processes: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[Place]]:
        for iteration in range(self.start, self.stop):
            places = [Place(r, e, iteration, i) for i, (r, e) in enumerate(self.plan.items(iteration))]
            yield places[self.process :: self.num_processes]
