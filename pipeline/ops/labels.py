"""Label maps: which numbers stand for classes, in memory and in files.

In memory a map is (H, W) int16: class ids from 0, and IGNORE, -1, which can't be a class. So a table over K classes has
K + 1 entries, the last that of IGNORE, and is indexed with a map as it is. Files have no negative numbers: there
the largest value of 8 or of 16 bits, 255 or 65535, says that a pixel has no class.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike

IGNORE = -1  # a pixel without a class: not annotated (method section 1), or outside the image
LABEL = np.int16
MOST_CLASSES = int(np.iinfo(LABEL).max)  # 32,767, ids up to 32,766


def file_dtype(num: int) -> np.dtype:
    """What `num` values and one more, that of no class, fit into: uint8 up to 255, else uint16."""
    return np.dtype(np.uint8 if num <= 255 else np.uint16)


def cached_dtype(num: int) -> np.dtype:
    """Of an array of the cache with ids of `num` classes: its largest value is no class, the next was never written."""
    return file_dtype(num + 1)


def no_class(num: int) -> int:
    """What a pixel without a class is in a file of `num` classes: 255, or 65535 where that is an id."""
    return int(np.iinfo(file_dtype(num)).max)


def to_file(labels: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """Labels of any shape as a file holds them, IGNORE the largest value of `dtype`."""
    return np.where(labels == IGNORE, np.iinfo(np.dtype(dtype)).max, labels.astype(np.int32)).astype(dtype)


def from_file(ids: np.ndarray) -> np.ndarray:
    """Ids of any shape, uint8 or uint16, as labels; the largest value of their dtype is IGNORE."""
    return np.where(ids == np.iinfo(ids.dtype).max, IGNORE, ids.astype(np.int32)).astype(LABEL)


def counts(labels: np.ndarray, num: int) -> np.ndarray:
    """(num + 1,): the pixels of each class, and last, so at IGNORE, those without one."""
    return np.roll(np.bincount(labels.ravel().astype(np.intp) + 1, minlength=num + 1), -1)
