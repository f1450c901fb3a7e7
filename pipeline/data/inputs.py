"""The pictures that a user names: files, folders, patterns, and lists of them; and a place for what comes of each.

Two pictures never get the same place. A file's is its name without ending; below a folder or a pattern its
structure is kept, from the folder or the first part with a wildcard on; of a list the paths as they stand.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from pipeline.data.base import BadImage, DataError

LIST = "-"  # in place of a picture: a list of them, a path a line, on the standard input
# What is a picture in a folder or behind a pattern; a file that is named itself is tried whatever it is called.
ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".jp2", ".ppm", ".pgm")


@dataclass(frozen=True)
class Picture:
    """A file, and the path without ending, below the folder of results, of what is made from it."""

    path: Path
    place: PurePath


def pictures(
    given: Sequence[str], listed: Iterable[str] = (), *, results: Sequence[str] = ()
) -> list[Picture]:
    """The pictures of files, folders, patterns, and of `listed` lines where "-" is given, in that order.

    Folders and patterns give files with one of ENDINGS, sorted, none that is hidden or ends in one of `results`
    (what an earlier run left there). A file that is met twice counts once.
    Raises: BadImage for a path that isn't there, DataError where there is no picture or two would share a place.
    """
    found: dict[str, Picture] = {}
    for word in given:
        lines = [line.rstrip("\r\n") for line in listed] if word == LIST else []
        for picture in (
            [_listed(line) for line in lines if line.strip()] if word == LIST else _of(word, results)
        ):
            found.setdefault(os.path.realpath(picture.path), picture)
        if word == LIST and not any(line.strip() for line in lines):
            raise DataError("-: the list on the standard input is empty; want the path of a picture a line.")
    by_place: dict[str, Path] = {}
    for picture in found.values():
        other = by_place.setdefault(str(picture.place).casefold(), picture.path)  # some disks ignore case
        if other != picture.path:
            raise DataError(
                f"{other} and {picture.path}: the results of both would be called {picture.place}.*. Choose by a "
                f"pattern such as '{other.parent / ('*' + other.suffix)}', or name the folder that both lie below, "
                "whose structure is kept."
            )
    return list(found.values())


def _of(word: str, results: Sequence[str]) -> list[Picture]:
    path = Path(word).expanduser()
    if path.is_file():
        return [Picture(path, PurePath(path.stem))]
    if path.is_dir():
        names = glob.iglob("**/*", root_dir=path, recursive=True)
        return _below(path, names, results, f"{word}: no picture in this folder or below it")
    if glob.has_magic(word):
        parts = path.parts
        first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
        top, pattern = Path(*parts[:first]), str(Path(*parts[first:]))
        names = glob.iglob(pattern, root_dir=top, recursive=True)
        return _below(top, names, results, f"{word}: no picture fits this pattern")
    raise BadImage(f"{word}: no such image file, nor a folder or a pattern.")


def _below(top: Path, names: Iterable[str], results: Sequence[str], otherwise: str) -> list[Picture]:
    chosen = sorted(
        name for name in names if name.lower().endswith(ENDINGS) and not name.endswith(tuple(results))
    )
    found = [Picture(top / name, PurePath(name).with_suffix("")) for name in chosen if (top / name).is_file()]
    if not found:
        raise DataError(f"{otherwise}; it would end in one of {', '.join(ENDINGS)}.")
    return found


def _listed(line: str) -> Picture:
    path = Path(line).expanduser()
    if not path.is_file():
        raise BadImage(f"{line}: no such image file; it stands in the list.")
    if path.is_absolute() or ".." in path.parts:
        path = Path(os.path.abspath(path))
        return Picture(path, path.relative_to(path.anchor).with_suffix(""))
    return Picture(path, path.with_suffix(""))
