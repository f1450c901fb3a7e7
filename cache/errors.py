"""What can go wrong with a cache. Every message says where, what was found, what was wanted, what to do.

Each kind is a CacheError (one `except` for the command line) and the builtin that fits it.
"""

from __future__ import annotations


class CacheError(Exception):
    """Base of all errors of a cache."""


class MissingCache(CacheError, FileNotFoundError):
    """There is no cache, or it lacks the array that was asked for."""


class StaleCache(CacheError, ValueError):
    """The cache was made from something else: other samples, teacher, sizes or schema version."""


class CorruptShard(CacheError, ValueError):
    """A file of the cache is missing, cut off or changed."""


class CacheLocked(CacheError, RuntimeError):
    """Somebody else is writing to the cache."""


class CacheWriteFailed(CacheError, OSError):
    """Disk full, no permission, read-only: nothing that was there is lost."""


def damaged(file: object, array: str, shard: int, why: object) -> CorruptShard:
    """The error for a shard whose bytes are not what was written."""
    reason = " ".join(str(why).split()).rstrip(".")
    return CorruptShard(
        f"{file}: shard {shard} of {array!r} can't be trusted: {reason}. "
        "Run `cli.py verify --config CONFIG`: it lists all damage and how to have just that made again."
    )


def unreadable(file: object, error: OSError) -> CacheError:
    """The error for a file that is there and may be sound, but can't be read."""
    return CacheError(f"{file}: can't be read: {error.strerror or error}. Check permissions and disk.")
