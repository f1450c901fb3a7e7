"""Stage one on paper: disk, forwards, hours, files and memory for COCO-Stuff and for 100 million images.

    python bench/scale.py

Bytes and forwards are `doctor`'s arithmetic (pipeline/looking/forecast.py). Hours assume that a GPU does 35 % of
the peak that its maker states, the least that the teacher's forward should reach; nothing here was measured on a
GPU. What a row costs the host is measured when this is run: decoding and cutting views, and the lists of ids and
stamps in memory.
"""

from __future__ import annotations

import io
import json
import time
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from interleaved import heading
from PIL import Image
from rich.console import Console
from rich.table import Table

from cache.schema import SHARD
from pipeline.config import load
from pipeline.data.base import Sample, read_image
from pipeline.data.demo import render_scene
from pipeline.looking.forecast import Forecast, forecast, side_of
from pipeline.models.teacher import flops_of_a_view, shape_of
from pipeline.ops.views import draw_views, replay_image
from pipeline.teaching.encode import DECODE_THREADS, STORAGE

ROOT = Path(__file__).resolve().parents[1]
SIDE, PHOTO = 512, (640, 480)
UTILISATION = 0.35  # of the peak: what is wanted of the teacher's forward on a GPU
# Dense bf16 tensor-core peaks in FLOP/s, as NVIDIA's data sheets state them (without sparsity).
PEAKS = {"A100": 312e12, "H100 SXM": 989e12}
GPUS = (1, 8, 64)
# Measured elsewhere on the machine of bench/README.md: bench/rows.py, and bench/cluster.py (one thread).
STORE_US_A_ROW, CLUSTER_MS_A_VIEW, RECORD_US = 65.0, 7.1, 51.0
ROWS = 100_000  # of the lists that are measured


@dataclass(frozen=True)
class Job:
    name: str
    num_images: int
    num_views: int


JOBS = (Job("COCO-Stuff", 118_287, 4), Job("100 M images", 100_000_000, 1))


def decode_ms() -> float:
    """One view of a 640 x 480 JPEG, decoding shared by four views: milliseconds of one thread."""
    photo = Image.fromarray(render_scene(1, 0, PHOTO[1]).image).resize(PHOTO)
    file = io.BytesIO()
    photo.save(file, "JPEG", quality=90)
    taken = []
    for index in range(12):
        began = time.thread_time()
        image = read_image(io.BytesIO(file.getvalue()))
        for box in draw_views("bench", str(index), 4, *PHOTO, SIDE):
            replay_image(image, box, SIDE, np.zeros(3, np.uint8))
        taken.append(time.thread_time() - began)
    return 1e3 * float(np.median(taken)) / 4


def bytes_a_row() -> float:
    """What `extract` holds of each image before it begins: samples, their index, ids, stamps, the hashed JSON."""
    tracemalloc.start()
    samples = [Sample(f"image-{row:09d}", f"/data/set/train/image-{row:09d}.jpg") for row in range(ROWS)]
    held = [{sample.id: sample for sample in samples}, [sample.id for sample in samples]]
    held.append([f"{100_000 + row}-{row:032x}" for row in range(ROWS)])
    json.dumps(held[1:]).encode()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak / ROWS


def human(value: float, units: tuple[str, ...], step: float) -> str:
    for unit in units[:-1]:
        if value < step:
            return f"{value:,.3g} {unit}"
        value /= step
    return f"{value:,.3g} {units[-1]}"


def size(value: float) -> str:
    return human(value, ("B", "kB", "MB", "GB", "TB", "PB"), 1000)


def main() -> None:
    torch.set_num_threads(1)
    config = load(ROOT / "config" / "coco_stuff.yaml")
    shape = shape_of(config.teacher.model, config.teacher.pretrained)
    flops = flops_of_a_view(shape, side_of(config, shape))
    heading(f"scale: {config.teacher.model} at {SIDE} x {SIDE}, {flops / 1e9:.1f} GFLOP a view")
    out = Console(width=110, highlight=False)

    def costs(job: Job) -> dict[str, Forecast]:
        views = config.views.model_copy(update={"num": job.num_views})
        asked = config.model_copy(update={"views": views})
        return {name: forecast(asked, shape, job.num_images, 171, name) for name in STORAGE}

    disk = Table("disk", *STORAGE, title="bytes a view, and in all")
    hours = Table("hours of forwards", "views/s a GPU", *(f"on {n}" for n in GPUS))
    rows = Table("", *(job.name for job in JOBS), title="rows, files, host")
    for job in JOBS:
        each = costs(job)
        disk.add_row(job.name, *(f"{c.per_view:,.0f}: {size(c.total)}" for c in each.values()))
        for gpu, peak in PEAKS.items():
            rate = UTILISATION * peak / flops
            taken = [job.num_images * job.num_views / rate / n / 3600 for n in GPUS]
            hours.add_row(f"{job.name}, {gpu}", f"{rate:,.0f}", *(f"{t:.2g}" for t in taken))
    decode, held = decode_ms(), bytes_a_row()
    shards = [-(-job.num_images // SHARD) for job in JOBS]
    views = [job.num_images * job.num_views for job in JOBS]
    for what, values in {
        "views": [f"{v:,}" for v in views],
        "forwards, PFLOP": [f"{v * flops / 1e15:,.0f}" for v in views],
        "shards": [f"{s:,}" for s in shards],
        "files: 4 arrays streamed, 2 records, ids": [
            f"{6 * s + -(-j.num_images // 4096):,}" for s, j in zip(shards, JOBS, strict=True)
        ],
        f"store and ledger, {STORE_US_A_ROW:g} us a row": [
            f"{STORE_US_A_ROW * j.num_images / 3.6e9:,.3f} h" for j in JOBS
        ],
        f"ledger read when resuming, {RECORD_US:g} us a record": [f"{RECORD_US * s / 1e6:,.1f} s" for s in shards],
        f"lists in extract's memory, {held:,.0f} bytes an image": [size(held * j.num_images) for j in JOBS],
        f"clustering on the host, {CLUSTER_MS_A_VIEW:g} ms a view": [
            f"{CLUSTER_MS_A_VIEW * v / 3.6e6:,.1f} core hours" for v in views
        ],
        f"decoding and views, {decode:.1f} ms a view": [f"{decode * v / 3.6e6:,.1f} core hours" for v in views],
    }.items():
        rows.add_row(what, *values)
    for table in (disk, hours, rows):
        out.print(table)
    for gpu, peak in PEAKS.items():
        rate = UTILISATION * peak / flops
        print(f"one {gpu}: {rate * decode / 1e3:.0f} cores decode, {rate * CLUSTER_MS_A_VIEW / 1e3:.0f} cluster")
    print(
        f"a worker's {DECODE_THREADS} decoding threads, as many as cores here, feed at most "
        f"{1e3 * DECODE_THREADS / decode:.0f} views/s"
    )


if __name__ == "__main__":
    main()
