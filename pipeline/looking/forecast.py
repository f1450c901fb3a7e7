"""What a run will cost, from its config alone: bytes on disk and forwards of the teacher.

Uncompressed arrays are exact: values, a crc32c of 4 bytes a chunk, a shard's index. What zstd makes of label maps,
and the sizes of JSON files, are estimates and said to be.

Axes: as in cache/schema.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from cache.schema import ARRAYS, FIXED, SHARD, spec_of
from pipeline.config import Config, Train
from pipeline.models.second import SecondShape
from pipeline.models.student import StudentCost
from pipeline.models.teacher import TeacherShape
from pipeline.running.table import STAGES, in_cache
from pipeline.teaching.encode import STORAGE
from pipeline.teaching.pseudo import num_centres

CRC, INDEX_ENTRY = 4, 16  # bytes: a crc32c; where a chunk begins and how long it is (cache/shards.py)
METADATA = 1_200  # bytes of an array's zarr.json: 1,010 to 1,430 in caches of the demo
# zstd's bytes a token of a label map: 0.15 to 0.20 in caches of the demo (256 tokens, 2 to 3 objects a view). Random
# ids of 58 take log2(58) / 8 = 0.73, and no map takes more.
PSEUDO_BYTES_PER_TOKEN = 0.17
RECORD_BYTES_PER_IMAGE = 110  # both stages' ledger records, mostly stamps: 105 to 130 in caches of the demo
ID_BYTES = 12  # of a sample's id, compressed
FORWARDS_A_STEP = 3  # a backward costs two forwards: gradients of the features, gradients of the weights


@dataclass(frozen=True)
class Forecast:
    """Bytes of a finished cache, by array and in all; of these, how many are estimates or an upper limit."""

    num_images: int
    num_views: int
    arrays: Mapping[str, float]  # name -> bytes
    other: float  # text, ids, ledger

    @property
    def total(self) -> float:
        return sum(self.arrays.values()) + self.other

    @property
    def per_view(self) -> float:
        """As `inspect` counts it: sharded arrays, those of cluster.debug apart."""
        counted = (size for name, size in self.arrays.items() if not ARRAYS[name].is_debug)
        return sum(counted) / (self.num_images * self.num_views)


def forecast(
    config: Config,
    shape: TeacherShape,
    num_images: int,
    num_classes: int,
    tokens: str,
    second: SecondShape | None = None,
) -> Forecast:
    """The cache of `num_images` with dense tokens kept as `tokens` says. Raises: ConfigError (cluster.sizes).

    `second`: of cluster.teacher.
    """
    config = config.model_copy(update={"cache": config.cache.model_copy(update={"tokens": tokens})})
    side = side_of(config, shape)
    sizes = {"N": num_images, "V": config.views.num, "C": shape.channels, "h": side, "w": side}
    sizes |= {"K": num_classes, "K_c": num_centres(config.cluster, side)}
    sizes |= {} if second is None else {"C_c": second.channels}
    storage = STORAGE[tokens]
    names = ["view", "cls", "status", *(storage.arrays if storage.is_kept else ())]
    written = [stage for stage in in_cache(config) if STAGES[stage].work]
    names += [name for stage in written for name in STAGES[stage].arrays_of(config)]
    # Of arrays over the sample axis; what CAMs take depends on the images.
    known = [n for n in names if ARRAYS[n].is_sharded and {*ARRAYS[n].axes} <= {*sizes, *FIXED}]
    dtypes = storage.dtypes | {
        name: dtype for s in written for name, dtype in STAGES[s].loaded().dtypes(config).items()
    }
    arrays = {name: array_bytes(name, sizes, dtypes.get(name)) for name in known}
    text = 4.0 * num_classes * shape.channels
    other = text + num_images * (RECORD_BYTES_PER_IMAGE + ID_BYTES)
    return Forecast(num_images, config.views.num, arrays, other)


def array_bytes(name: str, sizes: Mapping[str, int], dtype: str | None = None) -> float:
    """Bytes of a sharded array whose rows are all written, its metadata included."""
    spec = spec_of(name, dtype)
    rows, *inner = spec.shape(sizes)
    num_shards = -(-rows // SHARD)
    num_chunks = -(-rows // spec.chunk)
    overhead = METADATA + num_chunks * CRC + num_shards * (SHARD // spec.chunk * INDEX_ENTRY + CRC)
    if spec.compressed and not spec.is_debug:
        return overhead + PSEUDO_BYTES_PER_TOKEN * rows * prod(inner)
    # Of arrays for debugging the limit: what zstd makes of mostly empty centroids depends on the scenes.
    filled = -(-rows // spec.chunk) * spec.chunk
    return overhead + float(filled * prod(inner) * np.dtype(spec.dtype).itemsize)


def side_of(config: Config, shape: TeacherShape) -> int:
    """Tokens along a view's side."""
    return (config.teacher.image_size or shape.image_size) // shape.patch


def num_forwards(num_images: int, num_views: int, batch: int) -> int:
    """Batches that the teacher is given: each shard's views by themselves, the last batch padded."""
    whole, rest = divmod(num_images, SHARD)
    return whole * -(-SHARD * num_views // batch) + -(-rest * num_views // batch)


def flops_of_training(cost: StudentCost, train: Train) -> float:
    """Of the student over a whole training, multiply-adds counted as two; losses and optimiser apart."""
    return FORWARDS_A_STEP * 2 * cost.multiply_adds * train.batch * train.iterations
