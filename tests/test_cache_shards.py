"""A shard's bytes, held to zarr's own."""

import numpy as np
import pytest

from cache.schema import ARRAYS, SHARD, VARIANTS, ArraySpec
from cache.shards import holds, shard_bytes
from cache.store import METADATA, _encoded

SPECS = {spec.name: spec for spec in ARRAYS.values() if spec.is_sharded}
SPECS |= {"-".join(key): spec for key, spec in VARIANTS.items()}
SIZES = {
    "N": SHARD,
    "V": 2,
    "C": 3,
    "C_c": 2,
    "h": 2,
    "w": 2,
    "K": 4,
    "K_c": 5,
    "K_max": 3,
    "g_h": 2,
    "g_w": 3,
    "H": 4,
    "W": 5,
}


def block_of(spec: ArraySpec, rows: int) -> np.ndarray:
    shape = spec.shape({**SIZES, "N": rows})
    values = np.random.default_rng(0).integers(0, 9, shape)
    return values.astype(spec.dtype)


@pytest.mark.parametrize("rows", [SHARD, 5, 1])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_bytes_are_zarrs(spec, rows):
    block = block_of(spec, rows)
    made = _encoded(spec, block.shape, block)
    (theirs,) = (bytes(value) for key, value in made.items() if not key.endswith(METADATA))
    assert b"".join(shard_bytes(spec, block)) == theirs


def test_holds_is_exact():
    pieces = shard_bytes(SPECS["cls"], block_of(SPECS["cls"], 5))
    found = np.frombuffer(b"".join(pieces), np.uint8).copy()
    assert holds(found, pieces)
    assert not holds(found[:-1], pieces)
    assert not holds(np.append(found, 0).astype(np.uint8), pieces)
    found[7] ^= 1
    assert not holds(found, pieces)
