"""Training images of CLIPTeacher: seen labels, potential objects, and what training never sees.

Axes: H x W an image's own size (or S x S for a replayed view), h x w the token grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cache.store import SIDES, Store
from pipeline.config import Config
from pipeline.data.base import DataSet, Sample
from pipeline.looking.gallery import IGNORE, Card, present
from pipeline.looking.panels import Panel, class_panel, object_palette, object_panel, photo, resized
from pipeline.ops.fusion import is_object, num_objects
from pipeline.ops.views import replay_image, replay_labels


@dataclass(frozen=True)
class Clustered:
    """Teaching from seen labels and potential objects."""

    config: Config
    store: Store
    data: DataSet
    done: set[int]

    def telling(self, rows: Sequence[int]) -> Sequence[bool]:
        """Those whose whole image has potential objects."""
        maps = self.store.read_rows("pseudo", rows)[:, 0]
        return [bool(is_object(pseudo).any()) for pseudo in maps]

    def cards(self, sample: Sample, row: int, has_labels: bool, views: int) -> Iterator[Card]:
        for view in range(views):
            yield self._card(sample, row, view, has_labels)

    def _card(self, sample: Sample, row: int, view: int, has_labels: bool) -> Card:
        """Image, seen labels, clusters before fusion if kept, potential objects, and what training never sees."""
        store, data = self.store, self.data
        image, seen, truth = data.image(sample), data.seen_labels(sample), data.labels(sample)
        seen = np.full(image.shape[:2], IGNORE, np.uint8) if seen is None else seen
        notes = []
        if view:
            box, size = store.read_rows("view", [row])[0][view], store.fact(SIDES, "teacher", "image_size")
            mean = store.mean_colour
            image = replay_image(image, box, size, mean).permute(1, 2, 0).numpy()
            seen = replay_labels(seen, box, size).numpy()
            truth = None if truth is None else replay_labels(truth, box, size).numpy()
            notes.append(f"view {view}: box {', '.join(f'{v:g}' for v in box)}")
        shown = [photo(image), class_panel("seen labels", seen, data.palette)]
        num = None
        if has_labels:
            if store.has("pseudo_raw"):
                shown.append(object_panel("K-means", store.read_rows("pseudo_raw", [row])[0][view]))
            pseudo = store.read_rows("pseudo", [row])[0][view]
            num = num_objects(pseudo)
            notes.append(f"{num} potential object{'' if num == 1 else 's'}")
            shown.append(object_panel("pseudo labels", pseudo))
        classes = present(seen)
        if truth is not None:
            hidden = np.where(seen == IGNORE, truth, IGNORE).astype(np.uint8)
            if (hidden != IGNORE).any():
                shown.append(
                    Panel("hidden truth", "classes", hidden, data.palette, clear=IGNORE, under="ground")
                )
            classes = present(seen, hidden)
        return Card(sample.id, "train", tuple(shown), classes, num_objects=num, notes=tuple(notes))

    def exported(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """View 0's token grid by nearest: its box is the image."""
        x0, y0, x1, y1 = (int(v) for v in self.store.read_rows("view", [row])[0][0])
        return resized(self.store.read_rows("pseudo", [row])[0][0], (x1 - x0, y1 - y0)), object_palette()
