"""All writing of a cache: durable, atomic, with its failures in words.

A reader sees the old file or the new one, never a part: on this machine a file is written beside its place
under a name that ends in `.partial`, forced to disk, then renamed; an object store puts it whole.
"""

from __future__ import annotations

import errno
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cache.errors import CacheError, CacheWriteFailed
from cache.places import Place, RemotePath

PARTIAL = ".partial"
ADVICE = {
    errno.ENOSPC: "Free space on that disk, or write to another one (of a cache: cache.path)",
    errno.EDQUOT: "Free some of your quota, or write to another disk (of a cache: cache.path)",
    errno.EACCES: "Make it writable for this user, or write elsewhere (of a cache: cache.path)",
    errno.EPERM: "Make it writable for this user, or write elsewhere (of a cache: cache.path)",
    errno.EROFS: "Mount it writable, or write elsewhere (of a cache: cache.path)",
}
OTHERWISE = "Check the path and its disk"


@contextmanager
def writing(path: Place) -> Iterator[None]:
    """Turns an OSError of its body into one CacheWriteFailed line about `path`."""
    try:
        yield
    except CacheError:
        raise  # some of them are OSErrors too
    except OSError as error:
        reason = error.strerror or str(error)
        advice = ADVICE.get(error.errno or 0, OTHERWISE)
        raise CacheWriteFailed(
            f"{path}: can't be written: {reason}. {advice}, then run the same command again; "
            "what was complete before is still there."
        ) from error


def write_atomic(path: Place, *pieces: Any) -> None:
    """Replaces `path` by these pieces (bytes-like) one after another, on disk when this returns.

    Raises: CacheWriteFailed; the old file, if there was one, is untouched.
    """
    if isinstance(path, RemotePath):
        with writing(path):
            path.put(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        return
    # Host and process keep a repeated task on a lost worker from writing into its twin's file.
    partial = path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}{PARTIAL}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                file.writelines(pieces)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise
        sync(path.parent)


def sync(path: Path) -> None:
    """Forces a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Place) -> None:
    """Removes a file, or a folder with all below it, if it is there. Raises: CacheWriteFailed."""
    with writing(path):
        if not path.exists():
            return
        if isinstance(path, RemotePath):
            return path.remove_tree() if path.is_dir() else path.unlink()
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        sync(path.parent)


def remove_partials(folder: Path) -> None:
    """Removes what killed writers left. Only for the holder of the lock: nobody else is writing."""
    with writing(folder):
        for path in list(folder.rglob(f"*{PARTIAL}")):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
