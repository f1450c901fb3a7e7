"""One shard as text: what is in it, what it weighs, whether it still is what was written, when and where that was.

    python cli.py inspect runs/demo --shard 3

Its arrays are read and hashed; neither the images nor the config are needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from cache.errors import CacheError
from cache.ledger import Ledger
from cache.schema import ARRAYS, SHARD
from cache.shards import block_digest
from cache.store import Store
from pipeline.config import UserError
from pipeline.looking.facts import human_bytes
from pipeline.ops.fusion import PSEUDO_PADDING, is_object, num_objects
from pipeline.ops.views import ANNOTATED
from pipeline.running.table import IN_CACHE

UNKNOWN = "-"


def shard_tree(store: Store, shard: int) -> Tree:
    """Where the shard comes from, its arrays, its samples. Raises: UserError for a shard that there is not."""
    if not 0 <= shard < store.num_shards:
        raise UserError(
            f"{store.path}: no shard {shard}; there are {store.num_shards}, 0 to {store.num_shards - 1}, of "
            f"{SHARD} images each."
        )
    rows, entries = store.rows(shard), {s: Ledger(store.path, s).entry(shard) for s in IN_CACHE}
    blocks: dict[str, np.ndarray] = {}
    arrays = _arrays(store, shard, entries, blocks)
    tree = Tree(Text(f"{store.path}: shard {shard} of {store.num_shards}, rows {rows.start} to {rows.stop - 1}"))
    tree.add("written").add(_origin(entries))
    size = sum(store.size_bytes(name, shard) for name in store.arrays if ARRAYS[name].is_sharded)
    tree.add(f"arrays, {human_bytes(size)} ({size} bytes)").add(arrays)
    quarantined = dict((entries["extract"] or {}).get("quarantined") or {})
    tree.add(f"samples, {len(rows)}").add(_samples(store, rows, blocks, quarantined))
    return tree


def _table(*names: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in names:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return table


def _origin(entries: Mapping[str, dict[str, Any] | None]) -> Table:
    """Stage by stage: when, on which host, by which process, how long it took, from which fingerprint."""
    table = _table("stage", "time", "host", "process", "seconds", "fingerprint", right=("process", "seconds"))
    for stage, entry in entries.items():
        if entry is None:
            table.add_row(stage, "no record: not written yet, or not to the end")
            continue
        table.add_row(
            stage, *(str(entry.get(key, UNKNOWN)) for key in ("time", "host", "pid", "seconds", "fingerprint"))
        )
    return table


def _arrays(
    store: Store, shard: int, entries: Mapping[str, dict[str, Any] | None], blocks: dict[str, np.ndarray]
) -> Table:
    """Array by array: shape, size on disk, recorded checksum, and whether the disk still agrees; fills `blocks`."""
    table = _table("array", "shape", "dtype", "bytes", "checksum", "state", right=("bytes",))
    digests: dict[str, str] = {}
    for entry in entries.values():
        digests |= dict((entry or {}).get("digests") or {})
    for name in store.arrays:
        spec = store.spec(name)
        if not spec.is_sharded:
            continue
        shape = " x ".join(map(str, (len(store.rows(shard)), *spec.shape(store.sizes)[1:])))
        recorded, size = digests.get(name), store.size_bytes(name, shard)
        if recorded is None:
            table.add_row(name, shape, spec.dtype, str(size), UNKNOWN, "not recorded")
            continue
        try:
            blocks[name] = store.read_shard(name, shard)
            is_same = block_digest(name, shard, blocks[name]) == recorded
            state = "as recorded" if is_same else "CHANGED: not what was recorded"
        except CacheError as error:
            state = f"DAMAGED: {_reason(error)}"
        table.add_row(name, shape, spec.dtype, str(size), recorded, Text(state))
    return table


def _reason(error: CacheError) -> str:
    """What is wrong, without the file and the advice around it."""
    return str(error).partition("trusted: ")[2].partition(". Run")[0] or str(error)


def _samples(store: Store, rows: range, blocks: Mapping[str, np.ndarray], quarantined: Mapping[str, str]) -> Table:
    """Row by row: status, potential objects of each view, and the tokens of all views by kind."""
    names = ("row", "sample", "status", "objects a view", "annotated", "ignored", "padding")
    table, ids = _table(*names, right=("row", "annotated", "ignored", "padding")), store.samples
    for place, row in enumerate(rows):
        name = ids[row]
        status = blocks["status"][place] if "status" in blocks else None
        word = UNKNOWN if status is None else "ok" if status == 0 else quarantined.get(name, f"status {status}")
        counts = _label_counts(blocks["pseudo"][place]) if "pseudo" in blocks and not status else [UNKNOWN] * 4
        table.add_row(str(row), Text(name), Text(word), *counts)
    return table


def _label_counts(pseudo: np.ndarray) -> list[str]:
    """Of one sample's pseudo labels (V, h, w): objects of each view; annotated, ignored and padding tokens."""
    kinds = (pseudo == ANNOTATED, is_object(pseudo), pseudo == PSEUDO_PADDING)
    return [" ".join(str(num_objects(view)) for view in pseudo), *(str(int(kind.sum())) for kind in kinds)]
