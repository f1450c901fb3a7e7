"""Does the cache still hold what the ledger says? Every shard is read, hashed and looked into.

`verify` lists all damage; `read_recorded` and `check_whole` are how a stage reads what another stage
made: what was recorded, or an error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cache.errors import CacheError, StaleCache, damaged
from cache.ledger import Ledger, read_manifest
from cache.places import Place, place
from cache.schema import ARRAYS, SAMPLE, ArraySpec
from cache.shards import block_digest
from cache.store import Store

OK = 0  # code of a usable row in `status`
MANIFEST = ".manifest.json"
FOREIGN = "readable, but not what was recorded (another shard, or another cache's)"
NOT_NAMED = "its record doesn't speak of it"
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Finding:
    """Something wrong. kind: corrupt, changed, invalid, incomplete or stale."""

    kind: str
    where: str
    what: str
    todo: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}. {self.todo}"


def verify(
    cache_root: str | Place, *, fingerprints: Mapping[str, str] | None = None, progress: Progress | None = None
) -> list[Finding]:
    """All that is wrong with a cache; an empty list when every recorded shard is as it was written.

    `fingerprints` says what each stage should have been made from; otherwise its manifest does.
    `progress(done, total)` is called after each recorded shard.
    Raises: MissingCache, StaleCache (schema version), CorruptShard (the group's own metadata).
    """
    root, fingerprints = place(cache_root), fingerprints or {}
    store = Store.open(root)
    stages = sorted(
        {*fingerprints}
        | {path.name for path in (root / "ledger").glob("*") if path.is_dir()}
        | {path.name.removesuffix(MANIFEST) for path in root.glob(f"*{MANIFEST}")}
    )
    ledgers = {stage: Ledger(root, stage) for stage in stages}
    entries = {stage: ledger.entries() for stage, ledger in ledgers.items()}
    findings = list(_whole_arrays(store))
    done, total = 0, sum(len(found) for found in entries.values())
    for stage in stages:
        findings += _completion(store, ledgers[stage], entries[stage], fingerprints.get(stage))
        for shard, entry in entries[stage].items():
            findings += _shard(store, ledgers[stage], shard, entry)
            done += 1
            if progress:
                progress(done, total)
    return findings


def read_recorded(
    store: Store, shard: int, fingerprints: Mapping[str, str], names: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """The arrays of one shard that these stages recorded, by name, if they still are what was recorded.

    `fingerprints` says, stage by stage, what the shard must have been made from; `names` leaves out the
    other arrays. Checksums alone would take a sound shard in the wrong place for the right one.
    Raises: CorruptShard (no record, or other content than recorded), StaleCache (another fingerprint).
    """
    blocks = {}
    for stage, wanted in fingerprints.items():
        record = Ledger(store.path, stage).path(shard)
        entry = Ledger(store.path, stage).entry(shard)
        if entry is None:
            raise damaged(record, stage, shard, "it has no record that can be read")
        if entry.get("fingerprint") != wanted:
            raise StaleCache(
                f"{record}: shard {shard} was made by {stage} with fingerprint {entry.get('fingerprint')}, wanted "
                f"{wanted}. Run `cli.py verify --config CONFIG`: it says how to have just that made again."
            )
        for name, digest in dict(entry.get("digests") or {}).items():
            if names is None or name in names:
                blocks[name] = store.read_shard(name, shard)
                if block_digest(name, shard, blocks[name]) != digest:
                    raise damaged(store.data / name, name, shard, FOREIGN)
    absent = sorted(set(names or ()) - set(blocks))
    if absent:
        where = Ledger(store.path, ARRAYS[absent[0]].stage).path(shard)
        raise damaged(where, absent[0], shard, NOT_NAMED)
    return blocks


def whole_digests(store: Store, stage: str) -> dict[str, str]:
    """Digests of what no ledger speaks of, for a stage's manifest: whole arrays, and the ids."""
    ids = {SAMPLE.name: _ids_digest(store)} if stage == SAMPLE.stage else {}
    return ids | {n: store.digest(n, 0) for n in _whole(store) if ARRAYS[n].stage == stage}


def _whole(store: Store) -> list[str]:
    return [name for name in store.arrays if not ARRAYS[name].is_sharded]


def _ids_digest(store: Store) -> str:
    return hashlib.blake2b(json.dumps(store.samples).encode(), digest_size=16).hexdigest()


def read_whole(store: Store, name: str, manifest: Mapping[str, Any]) -> np.ndarray:
    """An array without a sample axis, compared with what its stage's manifest says. Raises: CorruptShard."""
    values = store.read_whole(name)
    if block_digest(name, 0, values) != dict(manifest.get("whole") or {}).get(name):
        raise damaged(store.data / name, name, 0, FOREIGN)
    return values


def check_whole(store: Store, manifest: Mapping[str, Any]) -> None:
    """Compares ids and whole arrays with what their stage's manifest says. Raises: CorruptShard."""
    found = whole_digests(store, str(manifest.get("stage", SAMPLE.stage)))
    for name, digest in dict(manifest.get("whole") or {}).items():
        if found.get(name) != digest:
            raise damaged(store.data / name, name, 0, FOREIGN)


def _whole_arrays(store: Store) -> Iterator[Finding]:
    """The sample ids and the arrays without a sample axis: no ledger speaks of them, the manifest does."""
    recorded: dict[str, str] = {}
    for stage in {SAMPLE.stage, *(ARRAYS[name].stage for name in _whole(store))}:
        recorded |= dict((read_manifest(_manifest(store, stage)) or {}).get("whole") or {})
    todo = f"Delete {store.path} and run extract again."
    try:
        if recorded.get(SAMPLE.name, _ids_digest(store)) != _ids_digest(store):
            yield Finding("changed", str(store.data / "sample"), FOREIGN, todo)
    except CacheError as error:
        yield Finding("corrupt", str(store.data / "sample"), _reason(error), todo)
    for name in _whole(store):
        todo = _redo(store, ARRAYS[name].stage)
        try:
            values = store.read_whole(name)
        except CacheError as error:
            yield Finding("corrupt", str(store.data / name), _reason(error), todo)
            continue
        digest = block_digest(name, 0, values)
        if recorded.get(name, digest) != digest:
            yield Finding("changed", str(store.data / name), FOREIGN, todo)
        if not np.isfinite(values).all():
            yield Finding("invalid", str(store.data / name), "holds values that aren't finite", todo)


def _completion(
    store: Store, ledger: Ledger, entries: Mapping[int, dict[str, Any]], wanted: str | None
) -> Iterator[Finding]:
    """Is every shard recorded, and made from the same thing as the manifest and the config say?"""
    path, stage = _manifest(store, ledger.stage), ledger.stage
    manifest, redo = read_manifest(path), _redo(store, stage)
    made = manifest.get("fingerprint") if manifest else None
    missing = sorted(set(range(store.num_shards)) - set(entries))
    if manifest is None:
        what = f"{stage} has not ended: {len(entries)} of {store.num_shards} shards are recorded"
        yield Finding("incomplete", str(path), what, f"Run `cli.py {stage}` again.")
    elif missing:
        what = f"{stage} has ended, but has no record of {len(missing)} shards, the first is {missing[0]}"
        yield Finding("incomplete", str(ledger.folder), what, redo)
    if manifest and manifest.get("num_samples", store.num_samples) != store.num_samples:
        what = f"speaks of {manifest['num_samples']} samples, the cache has {store.num_samples}"
        yield Finding("stale", str(path), what, redo)
    if manifest and wanted and made != wanted:
        todo = f"Run `cli.py {stage}` with this config, or point cache.path elsewhere."
        yield Finding("stale", str(path), f"has fingerprint {made}, wanted {wanted}", todo)
    expected = wanted or made
    others = [shard for shard, entry in entries.items() if entry.get("fingerprint") != expected]
    if expected and others:
        found = entries[others[0]].get("fingerprint")
        what = f"{len(others)} shards aren't of fingerprint {expected} (shard {others[0]} is of {found})"
        yield Finding("stale", str(ledger.folder), what, redo)


def _shard(store: Store, ledger: Ledger, shard: int, entry: Mapping[str, Any]) -> Iterator[Finding]:
    """Every array of one recorded shard."""
    record = ledger.path(shard)
    todo = f"Delete {record} and {_manifest(store, ledger.stage)}, then run `cli.py {ledger.stage}` again."
    if shard >= store.num_shards:
        what = f"speaks of shard {shard}, the cache has {store.num_shards}"
        yield Finding("stale", str(record), what, f"Delete {record}.")
        return
    rows = store.rows(shard)
    if entry.get("rows", [rows.start, rows.stop]) != [rows.start, rows.stop]:
        what = f"speaks of rows {entry['rows']}, the shard has {[rows.start, rows.stop]}"
        yield Finding("stale", str(record), what, todo)
    for name, digest in dict(entry.get("digests") or {}).items():
        where = f"{store.data / name} shard {shard}"
        try:
            block = store.read_shard(name, shard)
        except CacheError as error:
            yield Finding("corrupt", where, _reason(error), todo)
            continue
        if block_digest(name, shard, block) != digest:
            yield Finding("changed", where, FOREIGN, todo)
        for what in _invalid(store.spec(name), block, _usable(store, shard)):
            yield Finding("invalid", where, what, todo)


def _usable(store: Store, shard: int) -> np.ndarray:
    """(rows,) bool: which rows must hold data; none when `status` can't be read, which is its own finding."""
    if not store.has("status"):
        return np.ones(len(store.rows(shard)), bool)
    try:
        return store.read_shard("status", shard) == OK
    except CacheError:
        return np.zeros(len(store.rows(shard)), bool)


def _invalid(spec: ArraySpec, block: np.ndarray, usable: np.ndarray) -> Iterator[str]:
    """What is wrong with the values of a shard."""
    if np.issubdtype(block.dtype, np.integer):
        if ((block[usable] if spec.blank else block) == spec.fill).any():
            yield f"holds the fill value {spec.fill}, which no datum uses"
        return
    values = block[usable]
    bad = ~np.isfinite(values)
    if spec.padded:  # a vector is either all there or all NaN
        bad &= ~np.isnan(values).all(axis=-1, keepdims=True)
    rows = np.flatnonzero(usable)[bad.any(axis=tuple(range(1, bad.ndim)))]
    if len(rows):
        yield f"{len(rows)} usable rows hold values that aren't finite, the first is row {rows[0]} in it"


def _manifest(store: Store, stage: str) -> Place:
    return store.path / f"{stage}{MANIFEST}"


def _redo(store: Store, stage: str) -> str:
    """A stage with a manifest does nothing; without, it makes what the ledger lacks."""
    return f"Delete {_manifest(store, stage)} and run `cli.py {stage}` again."


def _reason(error: Exception) -> str:
    """The reason within a CacheError's message, without its advice."""
    return str(error).partition(". Run `cli.py verify")[0].rstrip(".")
