"""A shard's bytes as zarr lays them out, made without zarr's copies: writing one costs what the disk costs; its digest.

The layout is Zarr v3's `sharding_indexed` with the index at the end: the inner chunks one after another, each
compressed where its array is and followed by its crc32c; then where each begins and how long it is, two
little-endian uint64 a chunk, and a crc32c of that. A test holds the bytes to zarr's own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import google_crc32c
import numpy as np
import xxhash
from numcodecs.zstd import Zstd

from cache.schema import SHARD, ArraySpec

ZSTD_LEVEL = 3  # zstd's own default
NOT_THERE = np.iinfo(np.uint64).max  # place and length of a chunk past the last row

Bytes = bytes | memoryview


def shard_bytes(spec: ArraySpec, block: np.ndarray) -> list[Bytes]:
    """The bytes of one shard in pieces, uncompressed chunks not copied.

    block: (rows, ...) of the array's dtype, C-contiguous, at most 64 rows; a last chunk is filled up.
    """
    rows = spec.chunk
    index = np.full((SHARD // rows, 2), NOT_THERE, "<u8")
    pieces: list[Bytes] = []
    at = 0
    for number, first in enumerate(range(0, len(block), rows)):
        chunk = block[first : first + rows]
        if len(chunk) < rows:
            missing = np.full((rows - len(chunk), *chunk.shape[1:]), spec.fill, chunk.dtype)
            chunk = np.concatenate([chunk, missing])
        content: Bytes = chunk.reshape(-1).view(np.uint8).data
        if spec.compressed:
            content = Zstd(level=ZSTD_LEVEL).encode(content)
        pieces += [content, _checksum(content)]
        index[number] = at, len(content) + 4
        at += len(content) + 4
    places = index.tobytes()
    return [*pieces, places, _checksum(places)]


def _checksum(content: Bytes) -> bytes:
    return google_crc32c.value(bytes(content)).to_bytes(4, "little")


def holds(found: np.ndarray, pieces: Sequence[Bytes]) -> bool:
    """Whether a file's bytes, uint8, are exactly these pieces."""
    at = 0
    for piece in pieces:
        wanted = np.frombuffer(piece, np.uint8)
        if not np.array_equal(found[at : at + len(wanted)], wanted):
            return False
        at += len(wanted)
    return at == len(found)


def block_digest(array: str, shard: int, block: np.ndarray) -> str:
    """Hash of a shard's content and place, so that two swapped shards don't pass; 32 hex digits.

    xxh3 of 128 bits: it finds damage, at memory's speed; it isn't meant to withstand forgery.
    """
    head = json.dumps([array, shard, block.dtype.str, block.shape])
    found = xxhash.xxh3_128(head.encode())
    found.update(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
    return found.hexdigest()
