"""Is an array's own metadata what this program writes? Only then zarr is handed it.

A stranger's may name codecs that run code (numcodecs has a pickle filter), or shapes that no memory holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import numpy as np

from cache.records import misfit, said
from cache.schema import MOST_BYTES, MOST_SAMPLES, SAMPLE, ArraySpec

# What zarr reads by. Notes and names of axes may be another version's.
READ_BY = ("zarr_format", "node_type", "shape", "data_type", "chunk_grid", "chunk_key_encoding", "codecs", "fill_value")


def misfit_of_array(
    spec: ArraySpec,
    sizes: Mapping[str, int],
    found: Any,
    written: Callable[[ArraySpec, tuple[int, ...]], Mapping[str, Any]],
) -> str | None:
    """What differs from what `written` gives for this array, in words; None when nothing does.

    An array over N may have fewer rows than `sizes` says, and the ids more: appending was killed.
    Raises: ValueError for an axis without a size.
    """
    if (what := misfit(found, {"shape": [range(1, MOST_SAMPLES + 1)]})) is not None:
        return what
    shape, is_over_samples = spec.shape(sizes), spec.axes[0] == "N"
    if is_over_samples and found["shape"]:
        rows = found["shape"][0]
        if rows > shape[0] and spec.name != SAMPLE.name:
            return f"it has {rows} rows for {shape[0]} samples"
        shape = (rows, *shape[1:])
    at_once = shape[1:] if is_over_samples else shape
    if spec.name != SAMPLE.name and prod(at_once) * np.dtype(spec.dtype).itemsize > MOST_BYTES:
        return f"shape {shape} is too large"
    wanted = written(spec, shape)
    differs = [key for key in READ_BY if found.get(key) != wanted[key]]
    differs += ["storage_transformers"] if found.get("storage_transformers") else []
    return said(differs[0], found.get(differs[0])) if differs else None
