"""A shard of images through the frozen teacher: what extraction writes, as arrays in memory.

Decoded and cut into views by a few threads, run through the teacher in padded batches of fixed size, so
that a row never depends on its neighbours. Tokens are packed on the teacher's device.

Axes: n images, V views, b <= batch views of a forward, S view side, h = w tokens a side, C channels.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache.schema import spec_of
from cache.verify import OK
from pipeline.config import TeacherSection
from pipeline.data.base import BadImage, DataSet, Sample
from pipeline.models.teacher import Teacher, TeacherError
from pipeline.ops.quantise import quantised
from pipeline.ops.views import draw_views, replay_image
from pipeline.running.devices import device_of
from pipeline.running.rows import is_listed
from pipeline.running.table import STREAM

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
DECODE_THREADS = min(max(CORES, 2), 16)  # 16 feed an H100, 5 an A100 (docs/scale.md)
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


@functools.lru_cache(maxsize=1)
def teacher_of(section: TeacherSection) -> Teacher:
    """The run's teacher, loaded once a process."""
    return Teacher.load(
        section.model,
        section.pretrained,
        image_size=section.image_size,
        quick_gelu=section.quick_gelu,
        precision=section.precision,
        device=str(device_of("teacher.device", section.device)),
        near=section.near,
    )


def axis_sizes(teacher: Teacher, num_views: int) -> dict[str, int]:
    """Lengths of the axes that the teacher and the views fix."""
    side = teacher.image_size // teacher.patch
    return {"V": num_views, "C": teacher.channels, "h": side, "w": side}


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
    waiting: list[tuple[int, int, Tensor]] = []
    sizes, storage = axis_sizes(teacher, num_views), STORAGE[tokens]
    for name in ("cls", *storage.arrays):
        spec = spec_of(name, storage.dtypes.get(name))
        blocks[name] = np.full((num, *spec.shape({"N": num, **sizes})[1:]), spec.fill, spec.dtype)

    def flush() -> None:
        encoded = _encode_padded(teacher, [image for _, _, image in waiting], batch, storage)
        for name, values in encoded.items():
            for (row, view, _), value in zip(waiting, values, strict=True):
                blocks[name][row, view] = value
        waiting.clear()

    load = functools.partial(_load_views, data, num_views, teacher.image_size, mean_colour(teacher.mean))
    with ThreadPoolExecutor(DECODE_THREADS) as pool:
        for row, loaded in enumerate(pool.map(load, samples)):
            if isinstance(loaded, str):
                bad[samples[row].id], blocks["status"][row] = loaded, BAD_IMAGE
            else:
                boxes, images = loaded
                blocks["view"][row] = boxes
                for view, image in enumerate(images):
                    waiting.append((row, view, image))
                    if len(waiting) == batch:
                        flush()
            if tick:
                tick(1)
    if waiting:
        flush()
    good = blocks["status"] == OK
    if not all(np.isfinite(blocks[name][good]).all() for name in blocks):
        raise TeacherError(
            f"the teacher {teacher.provenance['model']!r} gave values that are not finite in float16 for images "
            f"{samples[0].id} to {samples[-1].id}: try teacher.precision fp32."
        )
    return blocks, bad


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


def _encode_padded(teacher: Teacher, views: list[Tensor], batch: int, storage: Storage) -> dict[str, np.ndarray]:
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
