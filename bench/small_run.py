"""The small run that the crash benches break: the demo's world and teacher, scenes of 64 x 64, five shards.

config = small_config(folder)          # a run under folder/runs/small
content_digest(config.cache_path)      # one number for all that the cache holds
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from pathlib import Path

import numpy as np

from cache.schema import ARRAYS
from cache.store import Store
from pipeline.config import Config, load

ROOT = Path(__file__).parents[1]
NUM_IMAGES = 296  # four shards of 64 and one of 40
SETTINGS = (
    "name=small",
    f"data.train={NUM_IMAGES}",
    "data.test=2",
    "data.size=64",
    "teacher.image_size=64",
    "teacher.batch=16",  # fixed, the last one padded: a row never depends on where a run was cut
    "views.num=2",
    "train.iterations=1",
    "train.batch=2",
    "train.precision=fp32",
    "student.encoder=tu-resnet10t",
)

PRELOADED = ["cli", "distributed.nanny", "pipeline.extract", "pipeline.cluster", "pipeline.data.demo"]
PRELOADED += ["pipeline.ops.kmeans_faiss"]


def forkserver() -> multiprocessing.context.ForkServerContext:
    """Processes start in a moment, since the server that they are forked off has imported torch already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    nothing = context.Process(target=os.getpid)  # the server starts and imports now, not in a run
    nothing.start()
    nothing.join()
    return context


def small_arguments(folder: Path, *settings: str) -> list[str]:
    """What stands after `cli.py STAGE` for a run under folder/runs."""
    chosen = (f"runs={folder}/runs", *SETTINGS, *settings)
    return ["--config", str(ROOT / "config" / "demo.yaml"), *(w for s in chosen for w in ("--set", s))]


def small_config(folder: Path, *settings: str) -> Config:
    return load(ROOT / "config" / "demo.yaml", [f"runs={folder}/runs", *SETTINGS, *settings])


def content_digest(cache: Path) -> str:
    """32 hex digits over all that is in the cache: ids, provenance, every shard's values as they are read.

    Raises: CorruptShard for a shard that is missing or damaged.
    """
    store = Store.open(cache)
    found = hashlib.blake2b(json.dumps([store.samples, store.attributes]).encode(), digest_size=16)
    for name in store.arrays:
        for shard in range(store.num_shards if ARRAYS[name].is_sharded else 1):
            found.update(store.digest(name, shard).encode())
    return found.hexdigest()


def rows_missing(cache: Path, stages: tuple[str, ...]) -> list[str]:
    """Rows that a finished cache lacks, array by array; [] when each holds data. None is quarantined here."""
    store, bad = Store.open(cache), []
    for name in store.arrays:
        spec = ARRAYS[name]
        if not spec.is_sharded or spec.padded or spec.stage not in stages:
            continue  # centroids of a view without potential objects are all NaN, and rightly so
        values = store.read_whole(name).reshape(store.num_samples, -1)
        never = np.isnan(values) if values.dtype.kind == "f" else values == spec.fill
        bad += [f"{name} row {row}" for row in np.flatnonzero(never.all(axis=1))]
    bad += [f"status row {row}" for row in np.flatnonzero(store.read_whole("status"))]
    return bad
