"""The paper's Figures 5, 6 and 7 of one's own run, and what clustering found, as small pictures.

Images are spread evenly over those that have several potential objects (training) or over all (test), never picked
by what a student makes of them. Axes: h x w the token grid, H x W an image's own size, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from cache.store import Store
from pipeline.data.base import BadImage, DataSet, Sample
from pipeline.learning.inference import squashed
from pipeline.looking.gallery import Pupil, Selection, eval_cards, spread
from pipeline.looking.panels import Panel, Strip, class_panel, object_panel, photo, png, resized, sheet
from pipeline.looking.quality import quality_picture
from pipeline.looking.tagged import percent_panel
from pipeline.models.glm import attention_over_largest
from pipeline.ops.fusion import is_object, num_objects

ROWS = 4  # images in a figure: what a screen holds
CENTRES = 4  # single centres shown of each image, those with most tokens
MANY = 2  # potential objects from which on an image is worth a figure
PROBED = 400  # cache rows looked at for that
MAX_BYTES = 290_000  # of a PNG, so that a repository can hold it


@dataclass(frozen=True)
class Figure:
    """A picture, its file's stem, and what it shows."""

    name: str
    caption: str
    png: bytes


def figures(
    store: Store, data: DataSet, done: set[int], pupil: Pupil | None, *, predictions: bool = True
) -> list[Figure]:
    """Those that can be drawn: attention and predictions want a student, single centres a cache with cluster.debug."""
    found = []
    rows = [row for *_, row in _images(store, data, telling_rows(store, done))]  # that can still be read
    if rows and pupil is not None:
        found.append(attention_figure(store, data, rows, pupil))
    if rows and store.has("pseudo_raw"):
        found.append(centres_figure(store, data, rows))
    if pupil is not None and predictions:
        cards = eval_cards(data, Selection(limit=2 * ROWS), [pupil])
        strips = [card.strip(data) for card in cards if card.panels]
        caption = "Test images, truth and predictions (the paper's Figure 7). Names with a star are unseen."
        found += [Figure("predictions", caption, fitted_png(sheet(strips, side=160)))] if strips else []
    if done:
        found.append(Figure("clusters", *quality_picture(store, data, done)))
    return found


def telling_rows(store: Store, done: set[int]) -> list[int]:
    """Up to ROWS cached images whose whole view has several potential objects, evenly spread."""
    rows = [row for shard in sorted(done) for row in store.rows(shard)]
    probed = [rows[i] for i in spread(len(rows), PROBED)]
    if not probed:
        return []
    maps = store.read_rows("pseudo", probed)[:, 0]
    good = [row for row, pseudo in zip(probed, maps, strict=True) if num_objects(pseudo) >= MANY]
    return [good[i] for i in spread(len(good), ROWS)]


def attention_figure(store: Store, data: DataSet, rows: Sequence[int], pupil: Pupil) -> Figure:
    """Figure 5: where the student's features answer to the teacher's CLS token."""
    strips = []
    for sample, image, row in _images(store, data, rows):
        cls = torch.from_numpy(store.read_rows("cls", [row])[0][0]).float()
        share = attention(pupil, image, cls)
        shown = _enlarged(share, image.shape[:2])
        lit = (image * (0.25 + 0.75 * shown[..., None])).round().astype(np.uint8)
        panels = (photo(image), percent_panel("attention", shown), photo(lit, "image by attention"))
        truth = data.labels(sample)
        hidden = [] if truth is None else [class_panel("truth", truth, data.palette)]
        strips.append(Strip(sample.id, (*panels, *hidden)))
    caption = (
        "GLM's attention (eq. 1, the paper's Figure 5): where the student's features answer to the teacher's CLS "
        "token, in percent of its largest value. Training never read the truth of the unseen classes, shown last."
    )
    return Figure("attention", caption, fitted_png(sheet(strips)))


@torch.inference_mode()
def attention(pupil: Pupil, image: np.ndarray, cls: torch.Tensor) -> np.ndarray:
    """Eq. 1's weights over their largest: image (H, W, 3) uint8, cls (C,) -> (h, w) float32, 0 to 1."""
    device = next(pupil.student.parameters()).device
    view = squashed(image, pupil.checkpoint.config.teacher.image_size)
    dense = pupil.student(view[None].to(device).float()).float()[0]  # (C, h, w)
    length = pupil.checkpoint.config.train.glm_length
    return attention_over_largest(cls.to(device), dense, length).cpu().numpy()


def centres_figure(store: Store, data: DataSet, rows: Sequence[int]) -> Figure:
    """Figure 6: what single centres of K-means hold, before fusion, and what fusion makes of them."""
    strips = []
    for sample, image, row in _images(store, data, rows):
        raw, pseudo = (store.read_rows(name, [row])[0][0] for name in ("pseudo_raw", "pseudo"))
        ids, counts = np.unique(raw[is_object(raw)], return_counts=True)
        largest = sorted(zip(-counts, ids, strict=True))[:CENTRES]
        masks = [(resized((raw == i).astype(np.uint8), (image.shape[1], image.shape[0])), n) for n, i in largest]
        single = [_only(image, mask, f"{-n} tokens") for mask, n in masks]
        shown = (object_panel(f"K-means, {len(ids)} centres", raw), *single)
        strips.append(Strip(sample.id, (photo(image), *shown, object_panel("fused", pseudo))))
    caption = (
        "The masks of single K-means centres (the paper's Figure 6), those with most tokens, and the potential objects "
        "that mask fusion makes of all of them. Grey is annotated."
    )
    return Figure("centres", caption, fitted_png(sheet(strips, side=160)))


def _only(image: np.ndarray, mask: np.ndarray, title: str) -> Panel:
    """The image where the mask is, a pale grey one elsewhere."""
    pale = 0.3 * image.mean(-1, keepdims=True) + 0.7 * 235
    return photo(np.where(mask[..., None] > 0, image, pale).astype(np.uint8), title)


def _images(store: Store, data: DataSet, rows: Sequence[int]) -> list[tuple[Sample, np.ndarray, int]]:
    """The images of some rows; those that can't be read any more are left out."""
    listed, ids, found = data.by_id("train"), store.samples, []
    for row in rows:
        if ids[row] not in listed:
            continue
        try:
            found.append((listed[ids[row]], data.image(listed[ids[row]]), row))
        except BadImage:
            continue
    return found


def _enlarged(share: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(h, w) in 0..1 -> (H, W), bilinear."""
    picture = Image.fromarray(share.astype(np.float32))
    return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR)).clip(0, 1)


def fitted_png(picture: Image.Image) -> bytes:
    """A PNG of at most MAX_BYTES: as it is, else with 256 colours, else smaller as well."""
    whole = png(picture)
    if len(whole) <= MAX_BYTES:
        return whole
    while True:
        content = png(picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=256))
        if len(content) <= MAX_BYTES or picture.width <= 400:
            return content
        smaller = (int(picture.width * 0.85), int(picture.height * 0.85))
        picture = picture.resize(smaller, Image.Resampling.LANCZOS)
