"""Where a cache lies: a folder of this machine, or an object store by its fsspec URL.

The only file that knows the difference. `place` gives a pathlib.Path for the one and, for the other, an
object with those of Path's words that the cache uses; what is written goes through `put`, which an
object store does whole or not at all.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import fsspec

from cache.errors import CacheError

LOCAL_SCHEMES = ("file", "local")


@dataclass(frozen=True)
class RemotePath:
    """A key of an object store. Picklable: fsspec keeps the connections, one a process."""

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def stem(self) -> str:
        return self.name.rpartition(".")[0] or self.name

    def resolve(self) -> RemotePath:
        return self

    def read_bytes(self) -> bytes:
        return bytes(self._asked("cat_file"))

    def exists(self) -> bool:
        return bool(self._asked("exists"))

    def is_file(self) -> bool:
        return bool(self._asked("isfile"))

    def is_dir(self) -> bool:
        return bool(self._asked("isdir"))

    def size_bytes(self) -> int:
        """Raises: FileNotFoundError."""
        return int(self._asked("size"))

    def glob(self, pattern: str) -> list[RemotePath]:
        """What matches right below."""
        return [self / found.rstrip("/").rpartition("/")[2] for found in (self / pattern)._asked("glob")]

    def put(self, content: Any, *, only_new: bool = False) -> None:
        """Stores an object, whole or not at all. Raises: FileExistsError with `only_new` if there is one."""
        self._asked("pipe_file", bytes(memoryview(content)), mode="create" if only_new else "overwrite")

    def unlink(self) -> None:
        self._asked("rm_file")

    def remove_tree(self) -> None:
        self._asked("rm", recursive=True)

    def _asked(self, method: str, *values: Any, **options: Any) -> Any:
        """What a method of fsspec's file system says of this path.

        Raises: OSError whatever the store's client raises, CacheError.
        """
        try:
            # Listings aren't remembered: other processes write there too.
            files, path = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        except (ValueError, ImportError) as error:  # no such protocol, or its package isn't installed
            raise CacheError(f"{self.url}: can't be opened: {error}. Correct cache.path.") from None
        try:
            return getattr(files, method)(path, *values, **options)
        except OSError:
            raise
        except Exception as error:  # each client has errors of its own, such as missing credentials
            raise OSError(errno.EIO, " ".join(str(error).split()) or type(error).__name__) from error


Place = Path | RemotePath


def place(where: str | Place) -> Place:
    """A local path (as such, or file://) as a Path, any other URL as a RemotePath."""
    if not isinstance(where, str):
        return where
    scheme, is_url, _ = where.partition("://")
    if not is_url:
        return Path(where)
    if scheme in LOCAL_SCHEMES:
        parts = urlsplit(where)
        return Path(unquote(parts.netloc + parts.path))
    return RemotePath(where.rstrip("/"))


def size_of(path: Place) -> int | None:
    """Bytes of a file; None when there is none. Raises: OSError."""
    try:
        if isinstance(path, RemotePath):
            return path.size_bytes()
        return path.stat().st_size if path.is_file() else None
    except FileNotFoundError:
        return None
