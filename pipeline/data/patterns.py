"""File patterns as a user writes them: `photos/**/*.jpg`, relative to a folder; names that exist are taken literally.

What differs from `glob`: a folder or file that exists is taken as it is called, brackets and all; the case of the
ending doesn't count (cameras write .JPG); a search of the whole disk is refused.
"""

from __future__ import annotations

import fnmatch
import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pipeline.data.base import DataError

LEFT_BY_SYSTEMS = {"thumbs.db", "desktop.ini"}  # in folders of pictures, by Windows


def divided(pattern: str, folder: Path) -> tuple[Path, str]:
    """The longest part of a pattern that exists below `folder`, relative to it, and the rest, "" if there is none."""
    parts = Path(pattern).parts
    there = Path()
    for place, part in enumerate(parts):
        if not os.path.lexists(folder / there / part):
            return there, str(Path(*parts[place:]))
        there /= part
    return there, ""


def matching(pattern: str, folder: Path, where: str) -> list[str]:
    """The paths that fit a pattern, relative to `folder` as the pattern is, sorted; hidden ones only if it names them.

    Raises: DataError, beginning with `where`, for a recursive pattern that would search the whole disk.
    """
    top, rest = divided(pattern, folder)
    if not rest:
        return [str(top)] if top.parts else []
    rest = _any_case(rest)
    parts = Path(rest).parts
    if "**" not in parts:
        found: Iterable[str] = glob.glob(rest, root_dir=folder / top)
    else:
        if ".." in parts:
            raise DataError(f"{where}: climbs after its wildcards. Begin it at the folder that the images lie in.")
        first = parts.index("**")
        heads = glob.glob(str(Path(*parts[:first])), root_dir=folder / top) if first else [""]
        found = (
            os.path.join(head, name)
            for head in heads
            for name in files_below(folder / top / head, where)
            if _fits(name.split(os.sep), parts[first:])
        )
    above = str(top) if top.parts else ""
    return sorted(os.path.join(above, name) for name in found if os.path.basename(name).lower() not in LEFT_BY_SYSTEMS)


def files_below(top: Path, where: str) -> Iterator[str]:
    """The files of a folder and of those below it, each folder once, relative to it; none that is hidden.

    Links are followed. Raises: DataError, beginning with `where`, for the root of the disk, or a link to it.
    """
    seen: set[str] = set()
    for at, folders, names in os.walk(top, followlinks=True):
        place = os.path.realpath(at)
        if place == os.path.abspath(os.sep):
            raise DataError(f"{where}: {at} is the root of the disk. Name the folder that the images lie in.")
        folders[:] = [name for name in folders if not name.startswith(".")] if place not in seen else []
        if place in seen:
            continue
        seen.add(place)
        below = os.path.relpath(at, top)
        yield from (os.path.normpath(os.path.join(below, name)) for name in names if not name.startswith("."))


def _fits(names: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether the parts of a path fit those of a pattern, in which ** stands for any number of folders."""
    if not parts:
        return not names
    if parts[0] == "**":
        return any(_fits(names[place:], parts[1:]) for place in range(len(names) + 1)) or len(parts) == 1
    return bool(names) and fnmatch.fnmatchcase(names[0], parts[0]) and _fits(names[1:], parts[1:])


def _any_case(pattern: str) -> str:
    """The pattern with the letters of its ending, after the last dot, in either case."""
    head, dot, ending = pattern.rpartition(".")
    if not dot or "/" in ending or os.sep in ending:
        return pattern
    made, is_inside = [], False
    for letter in ending:
        is_inside = letter == "[" or (is_inside and letter != "]")
        made.append(f"[{letter.lower()}{letter.upper()}]" if letter.isalpha() and not is_inside else letter)
    return head + dot + "".join(made)
