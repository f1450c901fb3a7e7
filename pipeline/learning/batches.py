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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset, default_collate

from cache.store import SIDES, Store
from cache.verify import check_whole, read_recorded
from pipeline.config import Config
from pipeline.data.base import DataError, DataSet, Sample
from pipeline.learning.loading import Kept, loader_processes, made_ahead
from pipeline.ops.labels import IGNORE, LABEL, from_file
from pipeline.ops.masks import fitted_size, mask_and_confidence, named_labels
from pipeline.ops.views import replay_image, replay_labels, view_of
from pipeline.running.manifests import required_manifest
from pipeline.running.processes import Watched
from pipeline.running.rows import cached_samples
from pipeline.running.table import labels_stage

# What training reads, by recipe. Views, CLS tokens and pseudo labels are about 2 KiB a view at C = 512.
READ = {"clip_teacher": ("view", "cls", "pseudo"), "clip_es": ("view", "cls", "cam", "cam_class", "cam_shape")}
REFINED = ("view", "cls", "mask", "confidence")  # clip_es, with cams.refine
FULL_CONFIDENCE = 200  # of the array `confidence`
KEEP_BYTES = 1 << 28  # up to this they are read once and kept: 130,000 views, and no checksum a step

# mmseg's PhotoMetricDistortion: brightness +-32 of 255, contrast and saturation 0.5-1.5, hue +-18 of 180.
BRIGHTNESS, CONTRAST, SATURATION, HUE = 32.0, (0.5, 1.5), (0.5, 1.5), 18 / 180


def refuse_unseen(data: DataSet) -> None:
    """Raises: DataError for unseen classes, of which recipe clip_es knows none."""
    if data.unseen:
        raise DataError(
            f"recipe clip_es learns every class from its tags, and data.unseen names {', '.join(data.unseen)}. "
            "Leave data.unseen empty."
        )


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
        return [(self.rows[_order(self.seed, place // num, num)[place % num]], place // num) for place in places]


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
    """Training items: a cached view replayed on its image and labels, with its CLS token and pseudo labels.

    Item: image (3, S, S) uint8, labels (S, S) int16 (unseen and unannotated IGNORE), pseudo (h, w) uint8,
    cls (C,) float32, sample int64 (the row, for GLM's mask). In recipe clip_es the labels are those of the
    refined CAMs, IGNORE where they are less sure than train.confidence, and pseudo is a single 0.
    Raises: StaleCache when the cache's samples aren't the data set's, DataError (clip_es with unseen classes).
    """

    def __init__(self, config: Config, data: DataSet) -> None:
        self.config, self.data = config, data
        self.store = Store.open(config.cache_path)
        self.samples = cached_samples(data, self.store)
        self.row_of = {sample.id: row for row, sample in enumerate(self.samples)}
        self.arrays = REFINED if self.is_tagged and config.cams.refine != "none" else READ[config.recipe]
        if self.is_named:
            self.arrays = (*self.arrays, "named")
        if self.is_tagged:
            refuse_unseen(data)
        self.size = self.store.fact(SIDES, "teacher", "image_size")
        self.mean_colour = self.store.mean_colour
        cached = self.store.fact(SIDES, "views", "num")
        self.num_views = config.train.views or cached
        if self.num_views > cached:
            raise DataError(
                f"train.views is {self.num_views}, and {config.cache_path} holds {cached} views an image. Lower it, or "
                "extract again with more views.num."
            )
        self.replayed = Kept(int(config.train.views_in_memory_gb * 1e9))
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

    @property
    def is_tagged(self) -> bool:
        """Whether labels come from image-level labels (clip_es)."""
        return self.config.recipe == "clip_es"

    @property
    def is_named(self) -> bool:
        """Whether potential objects have names by the image's tags (clip_teacher with cluster.named_above)."""
        return not self.is_tagged and self.config.cluster.named_above is not None

    @property
    def taught_ids(self) -> tuple[int, ...]:
        """The classes whose names training may know: the seen ones, and with tags all."""
        return tuple(range(len(self.data.classes))) if self.is_named else self.data.seen_ids

    def cls_tokens(self) -> np.ndarray:
        """Of all training images and the views in use: (R, V, C) in the cache's precision, in the order of `rows`."""
        whole = self.kept["cls"] if "cls" in self.kept else self.store.read_whole("cls")
        return np.ascontiguousarray(whole[np.array(self.rows), : self.num_views])

    def _checked(self) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The small arrays, when they are small enough to keep, and `status`, shard by shard as recorded.

        Raises: CorruptShard, StaleCache: training never begins on a cache that was tampered with.
        """
        above = {stage: required_manifest(self.config, stage) for stage in ("extract", labels_stage(self.config))}
        check_whole(self.store, above["extract"])
        fingerprints = {stage: str(manifest["fingerprint"]) for stage, manifest in above.items()}
        # Of all rows, decoded: on the disk the zeros of padded CAMs take next to nothing.
        specs = [self.store.spec(name) for name in self.arrays]
        keep = sum(math.prod(s.shape(self.store.sizes)) * np.dtype(s.dtype).itemsize for s in specs) <= KEEP_BYTES
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
        sample, train = self.samples[place.row], self.config.train
        view = view_of(sample.id, place.epoch, self.num_views)
        image, labels = self.replay(sample, self._row("view", place.row)[view])
        labels, pseudo = self._labelled(labels, place.row, view)
        rng = np.random.Generator(np.random.Philox(key=[train.seed, (place.iteration << 20) + place.position]))
        if rng.random() < train.flip:
            image, labels, pseudo = image.flip(-1), labels.flip(-1), pseudo.flip(-1)
        if train.photometric:
            image = distorted(image, rng)
        cls = torch.from_numpy(self._row("cls", place.row)[view]).float()
        return {"image": image, "labels": labels, "pseudo": pseudo, "cls": cls, "sample": place.row}

    def whole(self, row: int) -> dict[str, Tensor]:
        """View 0 of a row as it is, neither flipped nor distorted: image, labels, pseudo, cls."""
        image, labels = self.replay(self.samples[row], self._row("view", row)[0])
        labels, pseudo = self._labelled(labels, row, 0)
        cls = torch.from_numpy(self._row("cls", row)[0])
        return {"image": image, "labels": labels, "pseudo": pseudo, "cls": cls.float()}

    def _labelled(self, labels: Tensor, row: int, view: int) -> tuple[Tensor, Tensor]:
        """Labels (S, S) int16 and pseudo labels (h, w) uint8, a single 0 (all annotated) where labels are CAMs."""
        if self.is_tagged:
            return labels, torch.zeros(1, 1, dtype=torch.uint8)
        pseudo = torch.from_numpy(self._row("pseudo", row)[view])
        if not self.is_named:
            return labels, pseudo
        return named_labels(labels, pseudo, torch.from_numpy(from_file(self._row("named", row)[view])))

    def _row(self, array: str, row: int) -> np.ndarray:
        if array in self.kept:
            return self.kept[array][row]
        return self.store.read_rows(array, np.array([row]))[0]

    def replay(self, sample: Sample, box: np.ndarray) -> tuple[Tensor, Tensor]:
        """A view as extraction saw it, and the seen labels under it: (3, S, S) uint8, (S, S) int16.

        Not to be written into: it is kept for the next epochs while there is room.
        """
        image, labels = self.replayed.get((sample.id, box.tobytes()), lambda: self._replay(sample, box))
        return image, labels

    def _replay(self, sample: Sample, box: np.ndarray) -> tuple[Tensor, Tensor]:
        image = self.data.image(sample)
        labels = self._from_cams(sample, image.shape[:2]) if self.is_tagged else self.data.seen_labels(sample)
        if labels is None:
            labels = np.full(image.shape[:2], IGNORE, LABEL)
        return replay_image(image, box, self.size, self.mean_colour), replay_labels(labels, box, self.size)

    def _from_cams(self, sample: Sample, size: tuple[int, ...]) -> np.ndarray:
        """The classes of an image's pixels by its CAMs, IGNORE below train.confidence: (H, W) int16.

        Source: CLIP-ES's confidence-guided loss (method section 11).
        """
        row = self.row_of[sample.id]
        mask, sure = mask_from_cams(self.config, self.data, self.store, lambda name: self._row(name, row), size)
        return mask.where(sure >= self.config.train.confidence, IGNORE).numpy()


def mask_from_cams(
    config: Config, data: DataSet, store: Store, read: Callable[[str], np.ndarray], size: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """The class of an image's pixels and its score, as `cams` refined them, or else from the maps.

    `read` gives the image's row of an array. Shapes: -> (H, W) int16 and (H, W) float32, 0 to 1, `size` (H, W).
    """
    height, width = int(size[0]), int(size[1])
    if config.cams.refine != "none":
        patch = store.fact(SIDES, "teacher", "patch")
        rows, columns = fitted_size(height, width, config.cams.max_side, patch)
        found = [from_file(read("mask")[:rows, :columns]), read("confidence")[:rows, :columns]]
        kept = torch.from_numpy(np.stack(found))
        mask, confidence = interpolate(kept[None].float(), (height, width), mode="nearest-exact")[0]
        return mask.to(torch.int16), confidence / FULL_CONFIDENCE
    assert data.background is not None  # the cams stage has refused others
    rows, columns = read("cam_shape")
    classes = [int(i) for i in from_file(read("cam_class")) if i != IGNORE]
    cam = torch.from_numpy(read("cam")[: len(classes), :rows, :columns])
    return mask_and_confidence(cam, classes, data.background, (height, width), config.cams.power)


def held_out(sample: str, seed: int, fraction: float) -> bool:
    """Whether an image is kept for validation: a draw keyed by (seed, id), so other images don't matter."""
    drawn = hashlib.blake2b(f"{seed}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(drawn) < fraction * 2**64


def distorted(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Photometric distortion of (3, S, S) uint8, each part with probability 1/2 (mmseg's, in its order).

    As there, values are clipped to 0..255 after each part, cut to whole numbers after brightness and contrast, and
    saturation and hue are those of HSV. Theirs are kept in bytes, hue in steps of 2 degrees; ours are real numbers.
    """
    values = image.float()
    if rng.random() < 0.5:
        values = _whole(values + rng.uniform(-BRIGHTNESS, BRIGHTNESS))
    contrast_first = rng.random() < 0.5
    contrast = rng.uniform(*CONTRAST) if rng.random() < 0.5 else 1.0
    if contrast_first:
        values = _whole(values * contrast)
    if rng.random() < 0.5:
        values = saturated(values, rng.uniform(*SATURATION))
    if rng.random() < 0.5:
        values = turned(values, rng.uniform(-HUE, HUE))
    values = values.round()
    if not contrast_first:
        values = _whole(values * contrast)
    return values.to(torch.uint8)


def _whole(values: Tensor) -> Tensor:
    return values.clamp_(0, 255).floor_()


def saturated(values: Tensor, factor: float) -> Tensor:
    """HSV's S times a factor, at most 1; hue and value stay. Shapes: (3, H, W) float32, 0 to 255 -> the same."""
    value = values.amax(0)
    spread = value - values.amin(0)  # S = spread / value; all distances from the value grow alike
    growth = torch.where(factor * spread > value, value / spread, factor)
    return value - (value - values) * growth


def turned(values: Tensor, turn: float) -> Tensor:
    """HSV's H moved by a part of a full turn; saturation and value stay. Shapes: (3, H, W) float32 -> the same."""
    red, green, blue = values
    value = values.amax(0)
    spread = value - values.amin(0)
    safe = spread.clamp(min=1e-6)  # grey has no hue, and spread 0 keeps it grey
    hue = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )  # in sixths of a turn
    found = torch.empty_like(values)
    for channel, offset in zip(found, (5, 3, 1), strict=True):
        # A channel's distance from the value along the turn: 0 for two sixths, rising, spread for two, falling.
        place = (hue + (offset + 6 * turn)).remainder_(6)
        torch.sub(value, spread * torch.minimum(place, 4 - place).clamp_(0, 1), out=channel)
    return found


def training_batches(
    views: CachedViews, *, start: int, stop: int, process: int = 0, num_processes: int = 1
) -> Iterator[dict[str, Tensor]]:
    """The batches of iterations start..stop-1, this process's places of each."""
    train = views.config.train
    places = _Batches(Plan(views.rows, train.batch, train.seed), start, stop, process, num_processes)
    num_bytes = len(views.rows) * views.num_views * 5 * views.size**2  # three colours, labels of 2 bytes
    fits = num_bytes <= views.replayed.room_bytes
    kept_bytes = sum(array.nbytes for array in views.kept.values())
    workers = loader_processes(train.workers, num_processes, fits=fits, kept_bytes=kept_bytes, is_main=process == 0)
    has_gpu = torch.cuda.is_available()
    if workers == 0:

        def batch(places: list[Place]) -> dict[str, Tensor]:
            made: dict[str, Tensor] = default_collate([views[place] for place in places])
            return {name: value.pin_memory() for name, value in made.items()} if has_gpu else made

        return made_ahead(places, batch)
    views.replayed = Kept(views.replayed.room_bytes // workers)  # each keeps its own
    loader: DataLoader = DataLoader(
        views,
        batch_sampler=places,
        num_workers=workers,
        multiprocessing_context=Watched(),  # spawned: a forked zarr reader can deadlock
        pin_memory=has_gpu,
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
