"""Pictures of the images that a student does worst and best on: image, truth, prediction, errors, score."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from cache.files import remove, whole_file
from pipeline.data.base import DataSet
from pipeline.learning.scoring import Extreme
from pipeline.looking.gallery import present
from pipeline.looking.panels import (
    ERROR_PALETTE,
    ERRORS,
    RIGHT,
    UNLABELLED,
    Strip,
    class_panel,
    error_panel,
    photo,
    sheet,
)

SIDE = 320  # pixels of a panel's longer side: with four panels a picture is some 100 kB
QUALITY = 90  # of the JPEGs


def save_extremes(folder: Path, extremes: Iterable[Extreme], data: DataSet) -> None:
    """Draws each into a JPEG of its own, in place of the pictures that were there."""
    remove(folder)
    for extreme in extremes:
        name = re.sub(r"[^A-Za-z0-9._-]", "_", extreme.name)
        picture = sheet([_strip(extreme, data)], side=SIDE)
        with whole_file(folder / f"{name}.jpg") as file:
            picture.save(file, "JPEG", quality=QUALITY)


def _strip(extreme: Extreme, data: DataSet) -> Strip:
    names = [(i, data.classes[i] + "*" * (i in data.unseen_ids)) for i in present(extreme.truth, extreme.guess)]
    legend = [(name, _rgb(data.palette[i])) for i, name in names]
    errors = error_panel("errors", extreme.truth, extreme.guess, list(data.unseen_ids))
    maps = (("truth", extreme.truth), ("prediction", extreme.guess))
    panels = (photo(extreme.image), *(class_panel(*titled, data.palette) for titled in maps), errors)
    mark = "  (* unseen)" if any(name.endswith("*") for name, _ in legend) else ""
    wrong = np.setdiff1d(errors.pixels, (RIGHT, UNLABELLED))
    legend += [(f"error: {ERRORS[kind]}", _rgb(ERROR_PALETTE[kind])) for kind in wrong]
    return Strip(f"{extreme.name}: mean IoU {100 * extreme.score:.1f}{mark}", panels, legend)


def _rgb(colour: np.ndarray) -> tuple[int, int, int]:
    return int(colour[0]), int(colour[1]), int(colour[2])
