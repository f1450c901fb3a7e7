"""All writing of files, the cache's and the pipeline's: durable, atomic, with its failures in words.

A reader sees the old file or the new one, never a part: on this machine a file is written beside its place as
`<name>.<host>.<pid>.partial`, forced to disk, then renamed; an object store puts it whole. The file is always a
new one, so what a link at that place leads to is left alone, and its permissions are the umask's.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from cache.errors import CacheError, CacheWriteFailed
from cache.places import Place, RemotePath

PARTIAL = ".partial"
LONGEST_NAME = 255  # bytes, of the usual file systems (NAME_MAX)
ADVICE = {
    errno.ENOSPC: "Free space on that disk, or write to another one (of a cache: cache.path)",
    errno.EDQUOT: "Free some of your quota, or write to another disk (of a cache: cache.path)",
    errno.EFBIG: "Raise this shell's limit on the size of files (ulimit -f)",
    errno.EACCES: "Make it writable for this user, or write elsewhere (of a cache: cache.path)",
    errno.EPERM: "Make it writable for this user, or write elsewhere (of a cache: cache.path)",
    errno.EROFS: "Mount it writable, or write elsewhere (of a cache: cache.path)",
    errno.ENOENT: "Its folder was removed meanwhile: leave it in place",
    errno.ELOOP: "It is a symbolic link: remove it",
}
OTHERWISE = "Check the path and its disk"
# What file systems say that have no fsync for a folder: some network and FUSE mounts, folders that can't be listed.
NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES}


@contextmanager
def writing(path: Place) -> Iterator[None]:
    """Turns an OSError of its body into one CacheWriteFailed line about `path`."""
    try:
        yield
    except CacheError:
        raise  # some of them are OSErrors too
    except OSError as error:
        raise _failed(path, error) from error
    except RuntimeError as error:  # torch.save raises one of its own over the disk's word
        if not isinstance(error.__context__, OSError):
            raise
        raise _failed(path, error.__context__) from error


def _failed(path: Place, error: OSError) -> CacheWriteFailed:
    reason = error.strerror or str(error)
    advice = ADVICE.get(error.errno or 0, OTHERWISE)
    return CacheWriteFailed(
        f"{path}: can't be written: {reason}. {advice}, then run the same command again; "
        "what was complete before is still there."
    )


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A new binary file, which takes its place at `path` when the body ends, forced to disk, or never.

    Raises: CacheWriteFailed; the old file, if there was one, is untouched, and so is what a link there leads to.
    """
    with writing(path):
        if _is_device(path):  # the rename would put a file in its place
            raise CacheWriteFailed(f"{path}: is a device or a pipe, and results go into files. Name a file.")
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_dead(path.parent)
        partial = partial_of(path)
        partial.unlink(missing_ok=True)  # of a killed process that had this one's number
        try:
            # Read and write: numpy writes a file that is for writing alone by a C call that forgets the reason.
            with partial.open("x+b") as file:
                with suppress(OSError):  # says that this writer lives; not every file system can
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield file
                file.flush()
                os.fsync(file.fileno())
                partial.replace(path)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise
        sync_folder(path.parent)


def write_atomic(path: Place, *pieces: Any) -> None:
    """Replaces `path` by these pieces (bytes-like) one after another, on disk when this returns.

    Raises: CacheWriteFailed; the old file, if there was one, is untouched.
    """
    if isinstance(path, RemotePath):
        with writing(path):
            path.put(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        return
    with whole_file(path) as file:
        file.writelines(pieces)


def write_text(path: Path, text: str) -> None:
    """`write_atomic` of text, in UTF-8."""
    write_atomic(path, text.encode())


def new_log(path: Path) -> IO[str]:
    """A new text file at `path` that is there from the start and grows, for logs; a device is opened as it is.

    Raises: CacheWriteFailed.
    """
    with writing(path):
        if _is_device(path):
            return path.open("w", encoding="utf-8")
    write_atomic(path, b"")
    with writing(path):
        return path.open("a", encoding="utf-8")


def partial_of(path: Path) -> Path:
    """Where `path` is written first. Host and process keep a repeated task on a lost worker out of its twin's file."""
    ending = f".{platform.node()}.{os.getpid()}{PARTIAL}"
    name = path.name.encode()[: LONGEST_NAME - len(ending.encode())].decode(errors="ignore")
    return path.with_name(name + ending)


def dead_partials(folder: Path, name: str | None = None) -> list[Path]:
    """What writers on this host that no longer live have left in a folder; with `name`, of that file alone."""
    wanted = re.compile(rf"(.+)\.{re.escape(platform.node())}\.(\d+){re.escape(PARTIAL)}", re.DOTALL)
    found = []
    for entry in os.scandir(folder):
        match = wanted.fullmatch(entry.name)
        if match and name in (None, match[1]) and not entry.is_symlink() and not _lives(int(match[2])):
            found.append(Path(entry.path))
    return found


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's; no number of a process
        pass
    return True


_cleared: set[tuple[int, Path]] = set()


def _clear_dead(folder: Path) -> None:
    """Removes what killed writers left in a folder, when this process first writes to it."""
    if (key := (os.getpid(), folder)) in _cleared:
        return
    _cleared.add(key)
    with suppress(OSError):  # whether they can be removed is not this writer's affair
        for path in dead_partials(folder):
            # In another container on this host its writer may live under a number that is unknown here.
            if path.is_file() and not is_held(path):
                path.unlink()


def is_held(path: Path) -> bool:
    """Whether another process holds the kernel's lock on a file. Raises: OSError."""
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextmanager
def held(path: Path, holder: bytes, busy: Callable[[], Exception]) -> Iterator[int]:
    """Holds the kernel's lock on a file of its own, which says who holds it; yields its descriptor.

    The lock ends with its process, however that dies. The file stays: two processes could else lock two files.
    Raises: what `busy` gives, at once, while another holds it; CacheWriteFailed, also for a file that isn't ours alone.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:  # what a lock says is written over what is there
            raise CacheWriteFailed(f"{path}: is no file of its own, but a device or another file's link: remove it.")
        with writing(path):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise busy() from None
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, holder, 0)
        yield descriptor
    finally:
        os.close(descriptor)  # this releases the lock


def _is_device(path: Path) -> bool:
    """Whether there is a device or a pipe, such as /dev/null, or /dev/stdout, which may lead to a file."""
    if os.path.abspath(path.parent) in ("/dev", "/dev/fd", "/proc/self/fd"):
        return os.path.lexists(path)
    try:
        mode = path.stat().st_mode
    except OSError:  # nothing there, or a link that leads nowhere
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def sync(path: Path) -> None:
    """Forces a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_unsynced: set[int] = set()


def sync_folder(folder: Path) -> None:
    """Forces the names in a folder to disk where its file system can; says once a process where it can't."""
    try:
        sync(folder)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise
        device = folder.stat().st_dev
        if device not in _unsynced:
            _unsynced.add(device)
            print(
                f"{folder}: this file system can't force a folder to disk ({error.strerror}); after a power cut "
                "the newest files may be missing, and are made again.",
                file=sys.stderr,
            )


def remove(path: Place) -> None:
    """Removes a file, or a folder with all below it, if it is there; of a link the link. Raises: CacheWriteFailed."""
    with writing(path):
        if isinstance(path, RemotePath):
            if path.exists():
                path.remove_tree() if path.is_dir() else path.unlink()
            return
        if not os.path.lexists(path):
            return
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
        sync_folder(path.parent)
