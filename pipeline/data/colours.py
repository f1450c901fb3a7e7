"""Masks that are pictures of colours: which class each colour is.

A colour is one number of 24 bits, red the highest: what a table of 2^24 entries turns into labels at once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.data.base import DataError
from pipeline.data.files import INVALID
from pipeline.ops.labels import IGNORE


def known_colours(
    path: Path,
    palette: np.ndarray,
    ignored: Sequence[tuple[int, int, int]],
    classes: tuple[str, ...],
    *,
    is_wanted: bool,
) -> dict[int, int] | None:
    """Colour -> class id or IGNORE; None where two classes share a colour, which can be drawn but not read."""
    found: dict[int, int] = {}
    for i, code in enumerate(code_of(palette).tolist()):
        if code in found:
            if not is_wanted and not ignored:
                return None
            both = f"{classes[found[code]]!r} and {classes[i]!r}"
            raise DataError(f"{path}: palette: {both} have the same colour, and masks are to be read by it.")
        found[code] = i
    for colour in ignored:
        code = int(code_of(np.array(colour)))
        if code in found and found[code] != IGNORE:
            raise DataError(f"{path}: ignore: {list(colour)} is the colour of class {classes[found[code]]!r}.")
        found[code] = IGNORE
    return found


def code_of(colours: np.ndarray) -> np.ndarray:
    """(..., 3) -> (...): a colour as one number of 24 bits."""
    red, green, blue = (colours[..., channel].astype(np.int32) for channel in range(3))
    return (red << 16) | (green << 8) | blue


def rgb(code: int) -> str:
    return str([code >> 16, code >> 8 & 255, code & 255])


@functools.lru_cache(maxsize=1)
def label_of_code(colours: tuple[tuple[int, int], ...]) -> np.ndarray:
    """(2^24,) int16: colour -> class id, IGNORE or INVALID; 32 MiB, for a sort of each mask's pixels takes longer."""
    table = np.full(1 << 24, INVALID, np.int16)
    for code, label in colours:
        table[code] = label
    return table
