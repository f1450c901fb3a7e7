"""Labels for other tools: what a recipe teaches from, as indexed PNGs."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cache.errors import MissingCache
from cache.files import write_atomic
from cache.store import Store
from pipeline.config import UserError
from pipeline.data.base import DataSet
from pipeline.looking.gallery import Selection, Taught
from pipeline.looking.panels import indexed


def export_labels(folder: Path, store: Store, data: DataSet, chosen: Selection, taught: Taught, stage: str) -> int:
    """Writes the whole image's pseudo labels or CLIP-ES's mask as <sample id>.png, and returns how many.

    At the image's own size. Pseudo labels: 0 annotated, 1..P potential objects, 255 padding, the token grid by
    nearest. Masks: class ids, of more than 255 classes as greys of 16 bits. Quarantined images have none.
    Raises: MissingCache (no labels yet), UserError (none of the images has any).
    """
    if not taught.done:
        raise MissingCache(f"{store.path}: no labels yet. Run `cli.py {stage}` first.")
    holds = _holders(data, chosen)
    ids, count = store.samples, 0
    for shard in sorted(taught.done):
        status = store.read_shard("status", shard)
        for place, row in enumerate(store.rows(shard)):
            is_wanted = chosen.image in (None, ids[row]) and (holds is None or ids[row] in holds)
            if is_wanted and status[place] == 0:
                write_atomic(_png_path(folder, ids[row]), indexed(*taught.exported(row)))
                count += 1
    if not count:
        raise UserError("none of these images has labels: they are test images, quarantined, or hold no such class.")
    return count


def _holders(data: DataSet, chosen: Selection) -> set[str] | None:
    """Ids of the training images that hold the selected class; None when no class is selected."""
    if chosen.class_id is None:
        return None
    labelled = ((sample.id, data.labels(sample)) for sample in data.samples("train"))
    return {name for name, labels in labelled if labels is not None and np.any(labels == chosen.class_id)}


def _png_path(folder: Path, name: str) -> Path:
    path = folder / f"{name}.png"
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"image {name!r}: its id leads out of {folder}, so it can't name a file there.")
    return path
