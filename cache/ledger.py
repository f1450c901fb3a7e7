"""Which shards are done, by whom and from what; the manifests; the one-writer lock.

A record is written after its shard is on disk and was read back, so what is recorded can be
trusted, and a killed run loses at most the shards it had in flight.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cache.errors import CacheLocked, unreadable
from cache.files import held, remove, write_atomic
from cache.folder import HOLDER, LEDGER, LOCK, refuse_other_folder, remove_partials
from cache.lease import lease
from cache.places import Place, RemotePath, place
from cache.records import Shape, misfit, parsed
from cache.schema import ARRAYS, MOST_SAMPLES, SHARD

NOT_IN_MANIFESTS = {"time", "host", "pid", "since"}
# Of a record; what the stages add beside these they look at themselves.
RECORD = {
    "shard": int,
    "rows": [range(MOST_SAMPLES + 1)],
    "fingerprint": str,
    "digests": {str: str},
    "quarantined?": {str: str},
    "stamps?": [str],
    "stats?": {str: list},
    "seconds?": float,
}
MANIFEST = {
    "fingerprint?": str,
    "content?": str,
    "config?": str,
    "num_samples?": int,
    "num_shards?": int,
    "quarantined?": {str: str},
    "whole?": {str: str},
}


class Ledger:
    """The finished shards of one stage: a JSON file each, cache_root/ledger/<stage>/00012.json.

    One file a shard, because many workers record at once and none may wait for, or tear, another's.
    """

    def __init__(self, cache_root: str | Place, stage: str) -> None:
        self.folder = place(cache_root) / LEDGER / stage
        self.stage = stage

    def path(self, shard: int) -> Place:
        return self.folder / f"{shard:05d}.json"

    def record(self, shard: int, entry: Mapping[str, Any]) -> None:
        """Says that `shard` is done; call it only after the shard was written.

        Entry: {rows: [lo, hi], fingerprint, digests: {array: hex}, quarantined: {sample: reason},
        host, pid, time, seconds} and what else the stage wants to remember.
        Raises: CacheWriteFailed.
        """
        write_atomic(self.path(shard), _json({**entry, "shard": shard}))

    def entry(self, shard: int) -> dict[str, Any] | None:
        """The record of `shard`; None when there is none, or it is torn, unreadable, malformed or another shard's."""
        try:
            found = parsed(self.path(shard).read_bytes())
        except (OSError, ValueError):
            return None
        if misfit(found, RECORD) or found["shard"] != shard or len(found["rows"]) != 2:
            return None
        first, stop = found["rows"]
        is_of_rows = 0 <= stop - first <= SHARD and len(found.get("stamps", [])) in (0, stop - first)
        are_sharded = all(name in ARRAYS and ARRAYS[name].is_sharded for name in found["digests"])
        return found if is_of_rows and are_sharded else None

    def entries(self) -> dict[int, dict[str, Any]]:
        """All readable records by shard, in order."""
        numbers = sorted(int(path.stem) for path in self.folder.glob("*.json") if path.stem.isdecimal())
        found = {shard: self.entry(shard) for shard in numbers}
        return {shard: entry for shard, entry in found.items() if entry is not None}

    def clear(self) -> None:
        """Forgets all records: of shards whose arrays are gone. Hold the lock. Raises: CacheWriteFailed."""
        remove(self.folder)

    def entries_of(self, fingerprint: str) -> dict[int, dict[str, Any]]:
        """The records of this fingerprint, by shard, in order."""
        return {s: entry for s, entry in self.entries().items() if entry.get("fingerprint") == fingerprint}

    def done(self, fingerprint: str) -> set[int]:
        """The shards that were made for this fingerprint; of a data set that has grown the last may be short."""
        return set(self.entries_of(fingerprint))


def write_manifest(path: str | Place, payload: Mapping[str, Any]) -> None:
    """Writes a stage's manifest, the sign of its completion: atomic, and the same bytes for the same payload.

    Raises: ValueError for a time or a host (a repeated extraction must leave an identical file),
    CacheWriteFailed.
    """
    found = NOT_IN_MANIFESTS & payload.keys()
    if found:
        raise ValueError(f"{path}: a manifest holds no {sorted(found)}; they belong in the ledger.")
    write_atomic(place(path), _json(payload))


def read_manifest(path: str | Place, shape: Shape = MANIFEST) -> dict[str, Any] | None:
    """A stage's manifest; None when the stage never ended (no file, or nothing of this shape in it).

    Raises: CacheError when there is a file that can't be read.
    """
    try:
        found = parsed(place(path).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        raise unreadable(path, error) from error
    return found if misfit(found, shape) is None else None


@contextmanager
def lock(cache_root: str | Place, stage: str) -> Iterator[None]:
    """Holds the cache for one writing stage, and clears what killed writers left in it.

    The lock is the kernel's (flock) and ends with its process, so a killed run leaves at most a
    file that says nothing. The file is never deleted: two processes could then lock two files.
    On an object store it is a lease, see there.
    Raises: CacheLocked at once while it is held, by another process or by this one; CacheWriteFailed;
    CacheError for a folder of other things, in which nothing is touched.
    """
    root = place(cache_root)
    if isinstance(root, RemotePath):
        with lease(root / LOCK, stage):
            yield
        return
    refuse_other_folder(root)
    since = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "stage": stage, "since": since}
    with held(root / LOCK, _json(holder), lambda: CacheLocked(_held(root / LOCK))) as descriptor:
        remove_partials(root)
        yield
        os.ftruncate(descriptor, 0)


@contextmanager
def reading(cache_root: str | Place) -> Iterator[None]:
    """Keeps writing stages out while the body reads; other readers may be in. On an object store it does nothing.

    Raises: CacheLocked at once while a stage is writing.
    """
    path = place(cache_root) / LOCK
    if isinstance(path, RemotePath):
        yield
        return
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        yield  # a copy that nobody has written to here
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CacheLocked(_held(path)) from None
        yield
    finally:
        os.close(descriptor)


def refuse_if_locked(cache_root: str | Place) -> None:
    """Says at once what `lock` would say, before the minutes that a stage may take to look at its data.

    Changes nothing and promises nothing: only `lock` keeps others out. On an object store it says nothing.
    Raises: CacheLocked; CacheError for a folder of other things.
    """
    root = place(cache_root)
    if not isinstance(root, RemotePath):
        refuse_other_folder(root)
    with reading(root):
        pass  # nobody writes


def _held(path: Path) -> str:
    try:
        holder = parsed(path.read_bytes())
        if misfit(holder, HOLDER):
            raise ValueError
        stage, pid, host, since = (holder[key] for key in ("stage", "pid", "host", "since"))
    except (OSError, ValueError):
        return (
            f"{path}: another process holds this cache: a training reads it, or a stage has just begun to write. Wait "
            "for it to end, or stop it."
        )
    if (pid, host) == (os.getpid(), socket.gethostname()):
        return f"{path}: this process already holds the lock, for {stage}. End that stage first."
    return (
        f"{path}: {stage} is writing to this cache, process {pid} on {host} since {since}. "
        "Wait for it to end, or stop it."
    )


def _json(payload: Mapping[str, Any]) -> bytes:
    return (json.dumps(payload, sort_keys=True, indent=1) + "\n").encode()
