"""A shard of images through the frozen teacher: what extraction writes, as arrays in memory.

Decoded and cut into views by a few threads, run through the teacher in padded batches of fixed size, so
that a row never depends on its neighbours. Tokens are packed on the teacher's device.

Axes: n images, V views, b <= batch views of a forward, S view side, h = w tokens a side, C channels.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache.schema import spec_of
from cache.verify import OK
from pipeline.config import Cluster, Config, TeacherSection
from pipeline.data.base import BadImage, DataSet, Sample
from pipeline.models.second import second_encoder, second_stamps
from pipeline.models.teacher import Encoder, Teacher, TeacherError, stamps_asked
from pipeline.models.weights import Stamps
from pipeline.ops.quantise import quantised
from pipeline.ops.views import draw_views, replay_image
from pipeline.running.devices import device_of
from pipeline.running.rows import is_listed
from pipeline.running.table import STREAM

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
DECODE_THREADS = min(max(CORES, 2), 16)  # 16 feed an H100, 5 an A100 (docs/scale.md)
VERSIONS = ("open_clip", "timm", "torch")  # of a model's provenance: said, and no reason to run it again
BAD_IMAGE = 1  # code of a row without a usable image in `status`


def _as_float16(tokens: Tensor) -> dict[str, Tensor]:
    return {"tokens": tokens.to(torch.float16)}


def _as_int8(tokens: Tensor) -> dict[str, Tensor]:
    numbers, scale = quantised(tokens)
    return {"tokens": numbers, "token_scale": scale}


def _as_mean(tokens: Tensor) -> dict[str, Tensor]:
    return {"pooled": tokens.float().mean((1, 2)).to(torch.float16)}


@dataclass(frozen=True)
class Storage:
    """What leaves the device of dense tokens (B, h, w, C), as which arrays, of which unusual dtypes."""

    packed: Callable[[Tensor], dict[str, Tensor]]
    arrays: tuple[str, ...] = ("tokens",)
    dtypes: dict[str, str] = field(default_factory=dict)
    is_kept: bool = True


# By cache.tokens. Streamed tokens are rounded as the kept ones are, so that both end in the same pseudo labels.
STORAGE = {
    "float16": Storage(_as_float16),
    "int8": Storage(_as_int8, ("tokens", "token_scale"), {"tokens": "int8"}),
    STREAM: Storage(_as_float16, is_kept=False),
    "pooled": Storage(_as_mean, ("pooled",)),
}


def teacher_of(section: TeacherSection) -> Teacher:
    """The run's teacher, loaded once a process, and anew when its files have changed. Raises: TeacherError."""
    return _teacher(section, stamps_asked(section))


@functools.lru_cache(maxsize=1)
def _teacher(section: TeacherSection, stamps: Stamps) -> Teacher:
    device = str(device_of("teacher.device", section.device))
    return Teacher.of(section, image_size=section.image_size, device=device, precision=section.precision)


def second_of(config: Config, side: int) -> Encoder:
    """The model of cluster.teacher for side x side tokens, loaded once a process, and anew when its files have changed.

    Raises: TeacherError.
    """
    return _second(config.cluster, config.teacher, side, second_stamps(config.cluster))


@functools.lru_cache(maxsize=1)
def _second(section: Cluster, teacher: TeacherSection, side: int, stamps: Stamps) -> Encoder:
    device = str(device_of("teacher.device", teacher.device))
    return second_encoder(section, side, precision=teacher.precision, device=device)


def said_of(model: Encoder) -> dict[str, Any]:
    """What a cache says of a model whose tokens it holds."""
    return {key: value for key, value in model.provenance.items() if key not in VERSIONS}


def axis_sizes(teacher: Encoder, num_views: int) -> dict[str, int]:
    """Lengths of the axes that the teacher and the views fix."""
    return {"V": num_views, "C": teacher.channels, "h": teacher.side, "w": teacher.side}


def shard_blocks(
    data: DataSet,
    teacher: Teacher,
    samples: Sequence[Sample],
    *,
    num_views: int,
    batch: int,
    tokens: str,
    tick: Any = None,
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of one shard, dense tokens kept as `tokens` says, a key of STORAGE; why images are quarantined, by id.

    Rows of quarantined images keep the fill values (NaN), status says so.
    Raises: TeacherError for values that aren't finite.
    """
    num = len(samples)
    blocks: dict[str, np.ndarray] = {
        "view": np.full((num, num_views, 4), np.nan, np.float32),
        "status": np.full(num, OK, np.uint8),
    }
    bad: dict[str, str] = {}
    sizes, storage = axis_sizes(teacher, num_views), STORAGE[tokens]
    for name in ("cls", *storage.arrays):
        spec = spec_of(name, storage.dtypes.get(name))
        blocks[name] = np.full((num, *spec.shape({"N": num, **sizes})[1:]), spec.fill, spec.dtype)

    load = functools.partial(_load_views, data, num_views, teacher.image_size, mean_colour(teacher.mean))

    def views() -> Iterator[tuple[int, int, Tensor]]:
        with ThreadPoolExecutor(DECODE_THREADS) as pool:
            for row, loaded in enumerate(pool.map(load, samples)):
                if isinstance(loaded, str):
                    bad[samples[row].id], blocks["status"][row] = loaded, BAD_IMAGE
                else:
                    blocks["view"][row], images = loaded
                    yield from ((row, view, image) for view, image in enumerate(images))
                if tick:
                    tick(1)

    _encode_views(teacher, views(), batch, storage, blocks)
    good = blocks["status"] == OK
    if not all(np.isfinite(blocks[name][good]).all() for name in blocks):
        raise TeacherError(
            f"the teacher {teacher.provenance['model']!r} gave values that are not finite in float16 for images "
            f"{samples[0].id} to {samples[-1].id}: try teacher.precision fp32."
        )
    return blocks, bad


def second_blocks(
    data: DataSet,
    model: Encoder,
    samples: Sequence[Sample],
    boxes: np.ndarray,
    usable: np.ndarray,
    *,
    batch: int,
    tokens: str,
    tick: Any = None,
) -> dict[str, np.ndarray]:
    """A second model's dense tokens of the views that the teacher has seen, kept as `tokens` says, a key of STORAGE.

    Shapes: boxes (n, V, 4), usable (n,) bool -> tokens (n, V, h, w, C_c); rows that aren't usable keep the fill values.
    Raises: BadImage for an image that can't be read any more, TeacherError for values that aren't finite.
    """
    storage, blocks, mean = STORAGE[tokens], dict[str, np.ndarray](), mean_colour(model.mean)
    sizes = {"N": len(samples), "V": boxes.shape[1], "C": model.channels, "h": model.side, "w": model.side}
    for name in storage.arrays:
        spec = spec_of(name, storage.dtypes.get(name))
        blocks[name] = np.full(spec.shape(sizes), spec.fill, spec.dtype)

    def load(row: int) -> list[Tensor]:
        image = data.image(samples[row])
        return [replay_image(image, box, model.image_size, mean) for box in boxes[row]]

    def views() -> Iterator[tuple[int, int, Tensor]]:
        rows = [int(row) for row in np.flatnonzero(usable)]
        with ThreadPoolExecutor(DECODE_THREADS) as pool:
            for row, images in zip(rows, pool.map(load, rows), strict=True):
                yield from ((row, view, image) for view, image in enumerate(images))
                if tick:
                    tick(1)

    _encode_views(model, views(), batch, storage, blocks)
    if tick:
        tick(int((~usable).sum()))
    if not all(np.isfinite(block[usable]).all() for block in blocks.values()):
        raise TeacherError(
            f"cluster.teacher {model.provenance['model']!r} gave values that are not finite in float16 for images "
            f"{samples[0].id} to {samples[-1].id}: try teacher.precision fp32."
        )
    return blocks


def _load_views(
    data: DataSet, num_views: int, size: int, mean: np.ndarray, sample: Sample
) -> tuple[np.ndarray, list[torch.Tensor]] | str:
    """Boxes (V, 4) and V views (3, S, S) uint8 of one image, or why there are none."""
    if not is_listed(sample):
        return "not listed"
    try:
        image = data.image(sample)
    except BadImage as error:
        return str(error)
    height, width = image.shape[:2]
    boxes = draw_views(data.name, sample.id, num_views, width, height, size)
    return boxes, [replay_image(image, box, size, mean) for box in boxes]


def _encode_views(
    model: Encoder,
    views: Iterator[tuple[int, int, Tensor]],
    batch: int,
    storage: Storage,
    blocks: Mapping[str, np.ndarray],
) -> None:
    """Writes what is kept of each view, (its row, its number, the image), into those of `blocks` that are there."""
    while waiting := list(islice(views, batch)):
        encoded = _encode_padded(model, [image for _, _, image in waiting], batch, storage)
        for name in blocks.keys() & encoded.keys():
            for (row, view, _), value in zip(waiting, encoded[name], strict=True):
                blocks[name][row, view] = value


def _encode_padded(teacher: Encoder, views: list[Tensor], batch: int, storage: Storage) -> dict[str, np.ndarray]:
    """What is kept of the teacher's outputs for b <= batch views: arrays (b, ...) by name."""
    images, missing = torch.stack(views), batch - len(views)
    if missing:
        images = torch.cat([images, images[-1:].expand(missing, -1, -1, -1)])
    cls, tokens = teacher.encode(images)
    packed = {"cls": cls.to(torch.float16), **storage.packed(tokens)}
    return {name: value[: len(views)].cpu().numpy() for name, value in packed.items()}


def mean_colour(mean: tuple[float, ...]) -> np.ndarray:
    """The colour outside of an image, (3,) uint8: what the teacher's normalisation takes to zero."""
    return np.round(np.array(mean) * 255).astype(np.uint8)
