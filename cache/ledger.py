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
from cache.files import remove, remove_partials, write_atomic, writing
from cache.lease import lease
from cache.places import Place, RemotePath, place

LOCK = "lock"
NOT_IN_MANIFESTS = {"time", "host", "pid", "since"}


class Ledger:
    """The finished shards of one stage: a JSON file each, cache_root/ledger/<stage>/00012.json.

    One file a shard, because many workers record at once and none may wait for, or tear, another's.
    """

    def __init__(self, cache_root: str | Place, stage: str) -> None:
        self.folder = place(cache_root) / "ledger" / stage
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
        """The record of `shard`; None when there is none, or it is torn, unreadable or another shard's."""
        try:
            found = json.loads(self.path(shard).read_bytes())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and found.get("shard") == shard else None

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


def read_manifest(path: str | Place) -> dict[str, Any] | None:
    """A stage's manifest; None when the stage never ended (no file, or no JSON object in it).

    Raises: CacheError when there is a file that can't be read.
    """
    try:
        found = json.loads(place(path).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        raise unreadable(path, error) from error
    return found if isinstance(found, dict) else None


@contextmanager
def lock(cache_root: str | Place, stage: str) -> Iterator[None]:
    """Holds the cache for one writing stage, and clears what killed writers left in it.

    The lock is the kernel's (flock) and ends with its process, so a killed run leaves at most a
    file that says nothing. The file is never deleted: two processes could then lock two files.
    On an object store it is a lease, see there.
    Raises: CacheLocked at once while it is held, by another process or by this one; CacheWriteFailed.
    """
    root = place(cache_root)
    if isinstance(root, RemotePath):
        with lease(root / LOCK, stage):
            yield
        return
    path = root / LOCK
    with writing(path):
        root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with writing(path):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CacheLocked(_held(path)) from None
            since = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "stage": stage, "since": since}
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, _json(holder), 0)
        remove_partials(root)
        yield
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)  # this releases the lock


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
        descriptor = os.open(path, os.O_RDONLY)
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
    Raises: CacheLocked.
    """
    path = place(cache_root) / LOCK
    if isinstance(path, RemotePath):
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return  # no cache yet, or one that `lock` will speak of
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CacheLocked(_held(path)) from None
    finally:
        os.close(descriptor)


def _held(path: Path) -> str:
    try:
        holder = json.loads(path.read_bytes())
        stage, pid, host, since = (holder[key] for key in ("stage", "pid", "host", "since"))
    except (OSError, ValueError, KeyError, TypeError):
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
