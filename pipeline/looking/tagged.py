"""Training images of CLIP-ES: their classes' activation maps, the mask made of them, how sure it is, and the truth.

Axes: n classes of one image, g_h x g_w its token grid, H x W its own size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cache.store import Store
from pipeline.config import Config
from pipeline.data.base import DataSet, Sample
from pipeline.learning.batches import mask_from_cams
from pipeline.looking.gallery import Card, present, scores_of
from pipeline.looking.panels import Panel, class_panel, photo
from pipeline.ops.labels import IGNORE, LABEL, file_dtype, from_file, to_file

# Ends and middle of cividis, which looks alike to those who see all colours and to the colour-blind: Nunez,
# Anderton and Renslow, "Optimizing colormaps with consideration for color vision deficiency", 2018.
_LOW, _MIDDLE, _HIGH = (0, 34, 78), (125, 124, 120), (254, 232, 56)


def percent_palette() -> np.ndarray:
    """Colours of 0 to 100 percent, dark to bright and all distinct: (101, 3) uint8."""
    marks = np.array([_LOW, _MIDDLE, _HIGH], np.float64)
    channels = [np.interp(np.arange(101), (0, 50, 100), marks[:, c]) for c in range(3)]
    return np.stack(channels, 1).astype(np.uint8)


def percent_panel(title: str, shares: np.ndarray) -> Panel:
    """A map of shares from 0 to 1, drawn in percent."""
    return Panel(title, "percent", np.round(100 * shares).astype(np.uint8), percent_palette())


@dataclass(frozen=True)
class Tagged:
    """Teaching from image-level labels."""

    config: Config
    store: Store
    data: DataSet
    done: set[int]

    def telling(self, rows: Sequence[int]) -> Sequence[bool]:
        """Those that have a class at all."""
        return [bool(c[0] != IGNORE) for c in from_file(self.store.read_rows("cam_class", rows))]

    def cards(self, sample: Sample, row: int, has_labels: bool, views: int) -> Iterator[Card]:
        """One card: CAMs are of the whole image, whatever the views."""
        image, truth = self.data.image(sample), self.data.labels(sample)
        shown, notes, scores, classes = [photo(image)], [], None, [np.zeros(0, LABEL)]
        if has_labels:
            tags, maps = self.maps(row, "cam")
            names = [self.data.classes[tag] for tag in tags]
            raw = self.maps(row, "cam_raw")[1] if self.store.has("cam_raw") else None
            for k, name in enumerate(names):
                if raw is not None:
                    shown.append(percent_panel(f"{name}: CAM", raw[k]))
                shown.append(percent_panel(f"{name}: CAM + CAA", maps[k]))
            mask, sure = self.mask(row, (image.shape[0], image.shape[1]))
            least = self.config.train.confidence
            used = np.where(sure >= least, mask, IGNORE).astype(LABEL)
            shown += [class_panel("mask", mask, self.data.palette), percent_panel("confidence", sure)]
            shown.append(class_panel("trained on", used, self.data.palette))
            notes = [", ".join(names) or "no class", f"{100 * (sure >= least).mean():.0f} % at {least:g} or surer"]
            classes.append(mask)
            scores = None if truth is None else scores_of(mask, truth, len(self.data.classes))
        if truth is not None:
            shown.append(class_panel("truth", truth, self.data.palette))
            classes.append(truth)
        accuracy, iou = scores or (None, None)
        yield Card(sample.id, "train", tuple(shown), present(*classes), accuracy, iou, notes=tuple(notes))

    def exported(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        x0, y0, x1, y1 = (int(v) for v in self.store.read_rows("view", [row])[0][0])  # view 0 is the image
        mask, palette = self.mask(row, (y1 - y0, x1 - x0))[0], self.data.palette
        return to_file(mask, file_dtype(len(palette))), palette

    def maps(self, row: int, name: str) -> tuple[list[int], np.ndarray]:
        """The image's classes and their maps (n, g_h, g_w) float32, without what is beyond them."""
        classes = from_file(self.store.read_rows("cam_class", [row])[0])
        height, width = (int(side) for side in self.store.read_rows("cam_shape", [row])[0])
        tags = [int(tag) for tag in classes if tag != IGNORE]
        maps = self.store.read_rows(name, [row])[0][: len(tags), :height, :width]
        return tags, maps.astype(np.float32)

    def mask(self, row: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Class ids and their scores from 0 to 1 at the image's size, (H, W) each: those that training reads."""

        def read(name: str) -> np.ndarray:
            return self.store.read_rows(name, [row])[0]

        mask, sure = mask_from_cams(self.config, self.data, self.store, read, size)
        return mask.numpy(), sure.numpy()
