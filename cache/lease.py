"""The lock of an object store, which has no kernel to ask: an object with its owner and a heartbeat.

Who makes the object holds it, and rewrites it every BEAT_S seconds. One whose last beat is older than
STALE_S is a killed run's and may be taken over. What this can't rule out, unlike the kernel's lock: two
runs that take over the same stale lock within the same second, a holder that stops for longer than STALE_S
and then goes on, and clocks that differ by more than STALE_S. The loser notices at its next beat and says
so at its end. Even then nothing is torn: objects are put whole, and a shard's content doesn't depend on who
makes it.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from cache.errors import CacheLocked
from cache.files import writing
from cache.places import RemotePath
from cache.records import misfit, parsed

BEAT_S = 15.0
STALE_S = 120.0  # eight beats: a holder may be slow, or its clock a little off


@contextmanager
def lease(path: RemotePath, stage: str) -> Iterator[None]:
    """Holds the lock object at `path` while its body runs.

    Raises: CacheLocked at once while another holds it, and at the end when it was lost; CacheWriteFailed.
    """
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "stage": stage, "token": uuid.uuid4().hex}
    owner["since"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    with writing(path):
        _take(path, owner)
    ended, lost = threading.Event(), threading.Event()
    beating = threading.Thread(target=_beat, args=(path, owner, ended, lost), daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        with suppress(OSError):
            if _holder(path).get("token") == owner["token"]:
                path.unlink()
    if lost.is_set():
        raise CacheLocked(f"{path}: another run has taken this lock over meanwhile. Run `cli.py verify`.")


def _take(path: RemotePath, owner: Mapping[str, Any]) -> None:
    with suppress(FileExistsError):
        return path.put(_now(owner), only_new=True)
    holder = _holder(path)
    if time.time() - holder.get("beat", 0.0) < STALE_S:
        raise CacheLocked(
            f"{path}: {holder.get('stage')} is writing to this cache, process {holder.get('pid')} on "
            f"{holder.get('host')} since {holder.get('since')}. Wait for it to end, or stop it; a killed one's lock "
            f"is free {STALE_S:.0f} seconds after its last beat."
        )
    path.put(_now(owner))
    if _holder(path).get("token") != owner["token"]:
        raise CacheLocked(f"{path}: another run took over the same stale lock. Wait for it to end.")


def _beat(path: RemotePath, owner: Mapping[str, Any], ended: threading.Event, lost: threading.Event) -> None:
    while not ended.wait(BEAT_S):
        with suppress(OSError):  # a beat that fails is made up for by the next
            if _holder(path).get("token") != owner["token"]:
                lost.set()
                return
            path.put(_now(owner))


def _now(owner: Mapping[str, Any]) -> bytes:
    return json.dumps({**owner, "beat": time.time()}, sort_keys=True).encode()


def _holder(path: RemotePath) -> dict[str, Any]:
    """What the lock object says; nothing when it is gone or says nothing."""
    try:
        found = parsed(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return found if misfit(found, {"beat?": float}) is None else {}
