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
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache.ledger import lock, refuse_if_locked
from cache.store import Store
from cache.verify import OK, read_recorded
from pipeline.config import Cams, Config, ConfigError, digest, fingerprint
from pipeline.data.base import DataSet, Sample, data_of
from pipeline.data.words import background_names, fused_name
from pipeline.learning.batches import FULL_CONFIDENCE, refuse_unseen
from pipeline.ops import pamr
from pipeline.ops.masks import class_scores, fitted_size
from pipeline.running.console import say
from pipeline.running.engine import Job
from pipeline.running.labels import checked_tags, make_shards, record_labels, summary_of
from pipeline.running.manifests import asked_of, finish, found_manifest, required_manifest
from pipeline.running.rows import current_samples, samples_of, stamps_of
from pipeline.teaching import crf
from pipeline.teaching.encode import DECODE_THREADS
from pipeline.teaching.maps import explained_maps, explained_teacher, fitted, text_features
from pipeline.teaching.seeds import add_refined, add_seeds, new_stats, summarise

NO_CLASS = 255  # in cam_class: no further class in this image


def cams(config: Config, *, workers: int = 0, scheduler: str | None = None) -> dict[str, Any]:
    """Runs the stage to its end, or finds it there; returns the manifest with its summary.

    Raises: MissingCache, StaleCache, CorruptShard, DataError, ConfigError (a data set without a background class).
    """
    data = data_of(config.data)  # what is wrong with it is said before what is stale
    above = required_manifest(config, "extract")
    manifest = found_manifest(config, "cams")
    if manifest is None:
        refuse_if_locked(config.cache_path)  # below every mask is looked at
    if data.background is None:
        raise ConfigError(
            f"data.kind {config.data.kind!r} as configured has no background class, and CAMs compete with one: set "
            "data.background, or in a folder's dataset.yaml call a class background."
        )
    refuse_unseen(data)
    if config.cams.refine == "crf":
        crf.required()  # before an hour is spent
    names = {"background": background_names(config.cams.background), "classes": _words(config.cams, data)}
    identity = fingerprint(config, "cams", above["fingerprint"], names)
    store = Store.open(config.cache_path)
    samples = current_samples(config, data, store)
    stamps = stamps_of(data, samples, "labels")
    content = digest([identity, above["content"], stamps])
    if manifest is not None and manifest.get("content") == content and "summary" in manifest:
        finish(config, "cams", manifest | asked_of(config, "cams"))
        say(f"cams: nothing to do, {len(samples)} images have CAMs")
        return manifest
    with lock(config.cache_path, "cams"):
        store = Store.open(config.cache_path)
        store.add_arrays(written_arrays(config.cams), _axis_sizes(config, data), replace=True)
        job = Job(config, identity)
        entries = make_shards("cams", cams_shard, job, store, stamps, workers=workers, scheduler=scheduler)
        manifest = {
            "stage": "cams",
            "fingerprint": identity,
            "content": content,
            **asked_of(config, "cams"),
            "arrays": list(written_arrays(config.cams)),
            "upstream": above["fingerprint"],
            "num_samples": store.num_samples,
            "num_shards": store.num_shards,
            "summary": summary_of("cams", store, entries, summarise),
            "digests": digest([entry["digests"] for entry in entries]),
        }
        store.update_attributes("cams", {"fingerprint": identity, **names, "power": config.cams.power})
        finish(config, "cams", manifest)
    return manifest


def written_arrays(section: Cams) -> tuple[str, ...]:
    """The arrays that this stage makes."""
    debug = ("cam_raw",) if section.debug else ()
    return (
        "cam",
        "cam_class",
        "cam_shape",
        *debug,
        *(("mask", "confidence") if section.refine != "none" else ()),
    )


def _axis_sizes(config: Config, data: DataSet) -> dict[str, int]:
    """The grid of the largest image allowed, and room for every class: the rest is zeros."""
    patch = explained_teacher(config.teacher, config.cams).patch
    side = fitted_size(config.cams.max_side, config.cams.max_side, config.cams.max_side, patch)[0] // patch
    return {"K_max": len(data.classes) - 1, "g_h": side, "g_w": side, "H": side * patch, "W": side * patch}


def cams_shard(job: Job, shard: int, *, tick: Any = None) -> int:
    """Makes, writes and records the CAMs of one shard; returns its row count."""
    began, config = time.time(), job.config
    data, store = data_of(config.data), Store.open(config.cache_path)
    rows = store.rows(shard)
    samples = samples_of(data, store, rows)
    made = read_recorded(store, shard, {"extract": store.fact(str, "fingerprint")}, ("status",))
    blocks, stats = shard_maps(config, data, samples, made["status"] == OK, store, tick)
    digests = {name: store.write_shard(name, shard, block) for name, block in blocks.items()}
    record_labels("cams", job, store, shard, {"digests": digests, "stats": stats}, began)
    return len(rows)


def shard_maps(
    config: Config,
    data: DataSet,
    samples: Sequence[Sample],
    usable: np.ndarray,
    store: Store,
    tick: Any = None,
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
        maps, raw = explained_maps(
            teacher, section, images, [tags[row] for row in group], foreground, background
        )
        height, width = maps.shape[2:]
        for place, row in enumerate(group):
            num = len(tags[row])
            for name, values in (("cam", maps), ("cam_raw", raw)):
                if name in blocks:
                    blocks[name][row] = 0
                    blocks[name][row, :num, :height, :width] = values[place, :num].numpy()
            blocks["cam_class"][row] = NO_CLASS
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
    pairs = (
        (image, class_scores(cam, (image.shape[1], image.shape[2]), section.power))
        for _, image, cam in waiting
    )
    for (row, image, _), scores in zip(waiting, REFINERS[section.refine](pairs), strict=True):
        best, ids = scores.max(0)
        mask = torch.tensor([background, *tags[row]], dtype=torch.uint8)[ids]
        height, width = image.shape[1:]
        blocks["mask"][row], blocks["confidence"][row] = NO_CLASS, 0
        blocks["mask"][row, :height, :width] = mask.numpy()
        blocks["confidence"][row, :height, :width] = (
            (FULL_CONFIDENCE * best).round().clamp(0, FULL_CONFIDENCE).numpy()
        )
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
