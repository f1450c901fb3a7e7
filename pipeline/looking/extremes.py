"""Pictures of the images that a student does worst and best on: image, truth, prediction, errors, score."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from cache.files import remove, whole_file
from pipeline.data.base import DataSet
from pipeline.learning.scoring import Extreme
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
from pipeline.ops.labels import IGNORE

SIDE = 320  # pixels of a panel's longer side: with four panels a picture is some 100 kB
QUALITY = 90  # of the JPEGs


def save_extremes(folder: Path, extremes: Iterable[Extreme], data: DataSet) -> None:
    """Draws each into a JPEG of its own, in place of the pictures that were there."""
    remove(folder)
    for extreme in extremes:
        name, picture = (
            re.sub(r"[^A-Za-z0-9._-]", "_", extreme.name),
            sheet([_strip(extreme, data)], side=SIDE),
        )
        with whole_file(folder / f"{name}.jpg") as file:
            picture.save(file, "JPEG", quality=QUALITY)


def _strip(extreme: Extreme, data: DataSet) -> Strip:
    shown = [i for i in np.union1d(extreme.truth, extreme.guess) if i != IGNORE]
    legend = []
    for i in shown:
        red, green, blue = (int(value) for value in data.palette[i])
        legend.append((data.classes[i] + "*" * (i in data.unseen_ids), (red, green, blue)))
    errors = error_panel("errors", extreme.truth, extreme.guess, list(data.unseen_ids))
    panels = (
        photo(extreme.image),
        class_panel("truth", extreme.truth, data.palette),
        class_panel("prediction", extreme.guess, data.palette),
        errors,
    )
    mark = "  (* unseen)" if any(name.endswith("*") for name, _ in legend) else ""
    for kind in np.setdiff1d(errors.pixels, (RIGHT, UNLABELLED)):
        red, green, blue = (int(value) for value in ERROR_PALETTE[kind])
        legend.append((f"error: {ERRORS[kind]}", (red, green, blue)))
    return Strip(f"{extreme.name}: mean IoU {100 * extreme.score:.1f}{mark}", panels, legend)
