"""CLIP-ES's half of stage one: from image-level labels to refined class activation maps, in place of cluster.

    python cli.py cams --config config/demo_clip_es.yaml
    python cli.py cams --text "the man in red" --image photo.jpg --out refined.png

CLIP itself runs here, since gradients are needed, on every image at its own size; a shard of images is one unit
of work. Maps are kept on each image's own token grid. What becomes of them, background and threshold, is
decided in training, so that sweeping these recomputes nothing.

Axes: n rows of a shard, B images of one size, K classes in an image at most, g_h x g_w token grid.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache.store import Store
from cache.verify import OK
from pipeline.config import Cams, Config, ConfigError
from pipeline.data.base import DataSet, Sample
from pipeline.data.words import background_names, fused_name
from pipeline.learning.batches import FULL_CONFIDENCE, refuse_unseen
from pipeline.ops import pamr
from pipeline.ops.masks import class_scores, fitted_size
from pipeline.running.shards import Made, Part, Run, ShardStage, run_stage
from pipeline.teaching import crf
from pipeline.teaching.encode import DECODE_THREADS
from pipeline.teaching.maps import explained_maps, explained_teacher, fitted, refuse_cams, text_features
from pipeline.teaching.names import checked_tags
from pipeline.teaching.seeds import add_refined, add_seeds, new_stats, summarise


def cams(config: Config, *, workers: int = 0, scheduler: str | None = None) -> dict[str, Any]:
    """Runs the stage to its end, or finds it there; returns the manifest with its summary. Raises: see run_stage."""
    return run_stage("cams", config, workers=workers, scheduler=scheduler)


class ActivationMaps(ShardStage):
    """Images and their tags in, refined class activation maps out."""

    name, makes = "cams", "CAMs"

    def facts(self, run: Run) -> dict[str, Any]:
        """Raises: ConfigError for a data set without a background class, DataError for one with unseen classes."""
        section, data = run.config.cams, run.data
        if data.background is None:
            raise ConfigError(
                f"data.kind {run.config.data.kind!r} as configured has no background class, and CAMs compete with one: "
                "set data.background, or in a folder's dataset.yaml call a class background."
            )
        refuse_unseen(data)
        if section.refine == "crf":
            crf.required()  # before an hour is spent
        return {"background": background_names(section.background), "classes": _words(section, data)}

    def look(self, run: Run) -> None:
        refuse_cams(run.config)

    def arrays(self, config: Config) -> tuple[str, ...]:
        return written_arrays(config.cams)

    def sizes(self, run: Run, store: Store) -> dict[str, int]:
        """The grid of the largest image allowed, and room for every class: the rest is zeros."""
        section = run.config.cams
        patch = explained_teacher(run.config.teacher, section).patch
        side = fitted_size(section.max_side, section.max_side, section.max_side, patch)[0] // patch
        num = len(run.data.classes) - 1
        return {"K_max": num, "g_h": side, "g_w": side, "H": side * patch, "W": side * patch}

    def make(self, part: Part) -> Made:
        is_ok = part.read("extract", ("status",))["status"] == OK
        return Made(*shard_maps(part.config, part.data, part.samples, is_ok, part.store, part.tick))

    def summary(self, run: Run, stats: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return summarise(stats)

    def attributes(self, run: Run) -> dict[str, Any]:
        return {**self.facts(run), "power": run.config.cams.power}


def written_arrays(section: Cams) -> tuple[str, ...]:
    """The arrays that this stage makes."""
    debug = ("cam_raw",) if section.debug else ()
    return ("cam", "cam_class", "cam_shape", *debug, *(("mask", "confidence") if section.refine != "none" else ()))


def shard_maps(
    config: Config, data: DataSet, samples: Sequence[Sample], usable: np.ndarray, store: Store, tick: Any = None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of `written_arrays` for n samples, and counts for the summary. Rows that aren't usable stay unwritten.

    Raises: DataError for a tag that is none of the data set's classes.
    """
    section, teacher = config.cams, explained_teacher(config.teacher, config.cams)
    foreground, background = text_features(config.teacher, section, _words(section, data))
    blocks = {}
    for name in written_arrays(section):
        spec = store.spec(name)
        blocks[name] = np.full((len(samples), *spec.shape(store.sizes)[1:]), spec.fill, spec.dtype)
    stats = new_stats(len(data.classes))
    tags = [checked_tags(data, sample) if usable[row] else () for row, sample in enumerate(samples)]
    refines, waiting = section.refine != "none", []
    for group, images in _same_sized(data, samples, usable, section, teacher.patch):
        maps, raw = explained_maps(teacher, section, images, [tags[row] for row in group], foreground, background)
        height, width = maps.shape[2:]
        for place, row in enumerate(group):
            num = len(tags[row])
            for name, values in (("cam", maps), ("cam_raw", raw)):
                if name in blocks:
                    blocks[name][row] = 0
                    blocks[name][row, :num, :height, :width] = values[place, :num].numpy()
            blocks["cam_class"][row] = np.iinfo(blocks["cam_class"].dtype).max  # no further class
            blocks["cam_class"][row, :num] = tags[row]
            blocks["cam_shape"][row] = height, width
            add_seeds(stats, data, samples[row], tags[row], raw[place, :num], maps[place, :num])
            if refines:
                waiting.append((row, images[place], maps[place, :num]))
            elif tick:
                tick(1)
    if refines:
        for row, mask in _refine(section, waiting, tags, data.background or 0, blocks):
            add_refined(stats, data, samples[row], mask)
            if tick:
                tick(1)
    if tick:
        tick(int((~usable).sum()))
    return blocks, {name: value.tolist() for name, value in stats.items()}


def _refine(
    section: Cams,
    waiting: Sequence[tuple[int, Tensor, Tensor]],
    tags: Sequence[Sequence[int]],
    background: int,
    blocks: dict[str, np.ndarray],
) -> Iterator[tuple[int, Tensor]]:
    """Masks at pixels of (row, image, maps), by `cams.refine`, into `blocks`; yields row and mask as each is done."""
    pairs = ((image, class_scores(cam, (image.shape[1], image.shape[2]), section.power)) for _, image, cam in waiting)
    for (row, image, _), scores in zip(waiting, REFINERS[section.refine](pairs), strict=True):
        best, ids = scores.max(0)
        mask = torch.tensor([background, *tags[row]])[ids]
        height, width = image.shape[1:]
        blocks["mask"][row], blocks["confidence"][row] = np.iinfo(blocks["mask"].dtype).max, 0
        blocks["mask"][row, :height, :width] = mask.numpy()
        blocks["confidence"][row, :height, :width] = (FULL_CONFIDENCE * best).round().clamp(0, FULL_CONFIDENCE).numpy()
        yield row, mask


def _by_pamr(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    return (pamr.refine(image, scores) for image, scores in pairs)


def _by_crf(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    return map(torch.from_numpy, crf.refine_all((image.numpy(), scores.numpy()) for image, scores in pairs))


# By cams.refine: pairs of an image (3, H, W) and its scores (n + 1, H, W) -> scores, in order.
REFINERS = {"pamr": _by_pamr, "crf": _by_crf}


def _same_sized(
    data: DataSet, samples: Sequence[Sample], usable: np.ndarray, section: Cams, patch: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Rows and their images (B, 3, H, W) uint8, at most `batch` at once, all of one size."""
    waiting: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}
    rows = [row for row in range(len(samples)) if usable[row]]
    load = functools.partial(_fitted, data, section, patch)
    with ThreadPoolExecutor(DECODE_THREADS) as pool:
        for row, image in zip(rows, pool.map(load, [samples[row] for row in rows]), strict=True):
            size = (image.shape[1], image.shape[2])
            waiting.setdefault(size, []).append((row, image))
            if len(waiting[size]) == section.batch:
                yield _stacked(waiting.pop(size))
    for group in waiting.values():
        yield _stacked(group)


def _stacked(group: list[tuple[int, Tensor]]) -> tuple[list[int], Tensor]:
    return [row for row, _ in group], torch.stack([image for _, image in group])


def _fitted(data: DataSet, section: Cams, patch: int, sample: Sample) -> Tensor:
    return fitted(data.image(sample), section, patch)


def _words(section: Cams, data: DataSet) -> tuple[str, ...]:
    return tuple(fused_name(section.synonyms, name) for name in data.classes)
