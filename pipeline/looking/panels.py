"""Pictures of images and label maps: palettes, panels, contact sheets. Arrays in, pixels or bytes out.

A panel is a photograph or a map of small ids with a palette. One id of a map may be clear: what lies
under it (hatching, a flat ground, the greyed photograph) is drawn by whoever shows the panel, in a
browser by its style sheet, in a PNG by `sheet` below.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.ops.labels import IGNORE, LABEL, counts, no_class, to_file

Under = Literal["hatch", "ground", "photo"]

MOST_COLOURS = 255  # of an indexed PNG, beside the one that is clear
PADDING_GREY = (120, 120, 120)
# Vermilion, blue and yellow of Okabe and Ito's colour-blind-safe set ("Color Universal Design", 2008).
RIGHT, MISSED_UNSEEN, FALSE_UNSEEN, OTHER_WRONG, UNLABELLED = range(5)
ERRORS = ("right", "unseen taken for seen", "seen taken for unseen", "mixed up within its group", "no label")
ERROR_PALETTE = np.array([(0, 0, 0), (213, 94, 0), (0, 114, 178), (240, 228, 66), PADDING_GREY], np.uint8)

# sRGB (linear) -> OKLab: B. Ottosson, "A perceptual color space for image processing", 2020.
_TO_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
# Full protanopia and deuteranopia, on linear sRGB: Machado, Oliveira and Fernandes, 2009, table 1.
_PROTAN = np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]])
_DEUTAN = np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]])
_LIGHTNESS = (0.42, 0.90)  # neither black nor white,
_CHROMA = (0.04, 0.17)  # nor one of the greys that mean "no label", nor glaring


def _oklab(linear: np.ndarray) -> np.ndarray:
    return np.cbrt(np.clip(linear, 0, 1) @ _TO_CONES.T) @ _TO_LAB.T


@lru_cache(maxsize=1)
def object_palette() -> np.ndarray:
    """Colours of potential objects: row 0 black (annotated, drawn clear), 1..254 objects, 255 padding grey.

    Each colour is the candidate farthest from all before it, in OKLab, in the eyes of those who see all
    colours, of protanopes and of deuteranopes alike: the first dozens stay apart for everybody.
    Shapes: -> (256, 3) uint8.
    """
    steps = np.linspace(0, 255, 12).round()
    candidates = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)  # (1728, 3)
    unit = candidates / 255
    linear = np.where(unit <= 0.04045, unit / 12.92, ((unit + 0.055) / 1.055) ** 2.4)
    lab = _oklab(linear)
    lightness, chroma = lab[:, 0], np.hypot(lab[:, 1], lab[:, 2])
    usable = (lightness > _LIGHTNESS[0]) & (lightness < _LIGHTNESS[1])
    usable &= (chroma > _CHROMA[0]) & (chroma < _CHROMA[1])
    candidates, linear = candidates[usable], linear[usable]
    eyes = np.stack([_oklab(linear), _oklab(linear @ _PROTAN.T), _oklab(linear @ _DEUTAN.T)])  # (3, n, 3)
    chosen = [int(np.abs(candidates - (0, 114, 178)).sum(1).argmin())]
    nearest = np.full(len(candidates), np.inf)
    while len(chosen) < 254:
        distance = np.linalg.norm(eyes - eyes[:, chosen[-1:]], axis=-1).min(0)
        nearest = np.minimum(nearest, distance)
        chosen.append(int(nearest.argmax()))
    palette = np.zeros((256, 3), np.uint8)
    palette[1:255], palette[255] = candidates[chosen], PADDING_GREY
    return palette


@dataclass(frozen=True)
class Panel:
    """One picture: a photograph (H, W, 3) uint8, or a map (H, W) uint8 with its palette (256 or K, 3).

    `kind` names what the colours mean: photo, classes, objects, errors or percent.
    """

    title: str
    kind: Literal["photo", "classes", "objects", "errors", "percent"]
    pixels: np.ndarray
    palette: np.ndarray | None = None
    clear: int | None = None
    under: Under = "ground"


def photo(image: np.ndarray, title: str = "image") -> Panel:
    return Panel(title, "photo", image)


def class_panel(title: str, labels: np.ndarray, palette: np.ndarray, under: Under = "hatch") -> Panel:
    """A map of class ids, (H, W) int16; IGNORE is clear over `under`.

    A picture has 256 values: of more classes those that occur are numbered anew, by their area, and what is beyond
    the 254 largest is black.
    """
    num, clear = len(palette), no_class(MOST_COLOURS)
    if num > MOST_COLOURS:
        area = counts(labels, num)
        kept = np.argsort(-area[:num], kind="stable")[: MOST_COLOURS - 1]
        table = np.full(num + 1, MOST_COLOURS - 1, LABEL)
        table[kept], table[IGNORE] = np.arange(len(kept)), IGNORE
        labels, palette = table[labels], np.concatenate([palette[kept], np.zeros((1, 3), np.uint8)])
    return Panel(title, "classes", to_file(labels, np.uint8), palette, clear=clear, under=under)


def object_panel(title: str, pseudo: np.ndarray) -> Panel:
    """A map of potential objects on the token grid; 0 (annotated) is clear."""
    return Panel(title, "objects", pseudo, object_palette(), clear=0, under="ground")


def error_panel(title: str, truth: np.ndarray, prediction: np.ndarray, unseen: Sequence[int]) -> Panel:
    """Where and how a prediction is wrong; what is right is clear over the greyed photograph."""
    wrong = error_map(truth, prediction, unseen)
    return Panel(title, "errors", wrong, ERROR_PALETTE, clear=RIGHT, under="photo")


def error_map(truth: np.ndarray, prediction: np.ndarray, unseen: Sequence[int]) -> np.ndarray:
    """Kinds of error, codes into ERRORS: truth and prediction (H, W) class ids, truth IGNORE unlabelled."""
    is_unseen, is_claimed = np.isin(truth, list(unseen)), np.isin(prediction, list(unseen))
    out = np.full(truth.shape, OTHER_WRONG, np.uint8)
    out[is_unseen & ~is_claimed] = MISSED_UNSEEN
    out[~is_unseen & is_claimed] = FALSE_UNSEEN
    out[truth == prediction] = RIGHT
    out[truth == IGNORE] = UNLABELLED
    return out


# ---- files -------------------------------------------------------------------------------------


def indexed(ids: np.ndarray, palette: np.ndarray, clear: int | None = None) -> bytes:
    """A map as a PNG whose pixel values are the ids: see `id_picture`."""
    return png(id_picture(ids, palette), **({} if clear is None else {"transparency": clear}))


def id_picture(ids: np.ndarray, palette: np.ndarray) -> Image.Image:
    """A picture whose pixel values are the ids: uint8 with a palette (K, 3), uint16 as greys of 16 bits."""
    if ids.dtype == np.uint16:
        return Image.fromarray(np.ascontiguousarray(ids))
    picture = Image.fromarray(np.ascontiguousarray(ids, np.uint8), mode="P")
    picture.putpalette(_full(palette).tobytes())
    return picture


def png(picture: Image.Image, **options: int) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG", optimize=True, **options)
    return out.getvalue()


def _full(palette: np.ndarray) -> np.ndarray:
    """A palette (K, 3) with a row for every id, (256, 3): a PNG's clear id must have one."""
    return np.pad(palette, ((0, 256 - len(palette)), (0, 0)))


def encoded(panel: Panel, max_side: int, max_bytes: int | None = None) -> tuple[str, bytes]:
    """MIME type and bytes of a panel, at most max_side pixels wide and high, photographs within max_bytes.

    A map keeps its ids (nearest), small photographs their pixels (PNG), larger ones become JPEG and lose
    side until they fit.
    """
    if panel.palette is not None:
        return "image/png", indexed(shrunk(panel.pixels, max_side), panel.palette, panel.clear)
    if max(panel.pixels.shape[:2]) <= 160:
        return "image/png", png(Image.fromarray(panel.pixels))
    side = max_side
    while True:
        out = io.BytesIO()
        Image.fromarray(shrunk(panel.pixels, side)).save(out, "JPEG", quality=85, optimize=True)
        if max_bytes is None or out.tell() <= max_bytes or side <= 96:
            return "image/jpeg", out.getvalue()
        side = int(side * 0.8)


def hex_colour(colour: np.ndarray) -> str:
    """(3,) uint8 -> "#rrggbb"."""
    return "#" + "".join(f"{int(value):02x}" for value in colour)


def data_uri(mime: str, content: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode('ascii')}"


def shrunk(pixels: np.ndarray, max_side: int) -> np.ndarray:
    """At most max_side pixels a side: photographs (H, W, 3) averaged, maps (H, W) by nearest."""
    height, width = pixels.shape[:2]
    scale = min(1.0, max_side / max(height, width))
    if scale == 1.0:
        return pixels
    return resized(pixels, (max(1, round(width * scale)), max(1, round(height * scale))))


def resized(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """To (width, height): photographs (H, W, 3) averaged, maps (H, W) by nearest at pixel centres."""
    how = Image.Resampling.LANCZOS if pixels.ndim == 3 else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(pixels).resize(size, how))


# ---- one PNG with many panels ------------------------------------------------------------------

PAGE, INK, QUIET = (255, 255, 255), (25, 28, 33), (104, 110, 120)
GROUND, HATCH_LIGHT, HATCH_DARK = (226, 228, 232), (244, 244, 246), (176, 180, 188)
GAP = 12  # between panels, in pixels
CAPTION, TITLE, LINE = 24, 22, 18  # pixels high: a strip's caption, the panels' titles, a line of the legend
SHEET_ASPECT = 1.5  # width to height that a sheet of many strips comes near to


def drawn(panel: Panel, size: tuple[int, int], image: np.ndarray | None = None) -> np.ndarray:
    """A panel as it looks, (width, height) -> (height, width, 3) uint8; `image` is what lies under errors."""
    if panel.palette is None:
        enlarges = panel.pixels.shape[1] * 2 <= size[0]
        how = Image.Resampling.NEAREST if enlarges else Image.Resampling.LANCZOS
        return np.asarray(Image.fromarray(panel.pixels).resize(size, how))
    ids = resized(panel.pixels, size)
    out = _full(panel.palette)[ids]
    if panel.clear is None:
        return out
    ground = np.broadcast_to(np.array(GROUND, np.uint8), out.shape)
    if panel.under == "hatch":
        rows, columns = np.mgrid[0 : out.shape[0], 0 : out.shape[1]]
        stripes = ((rows + columns) // 3 % 3 == 0)[..., None]
        ground = np.where(stripes, np.array(HATCH_DARK, np.uint8), np.array(HATCH_LIGHT, np.uint8))
    elif panel.under == "photo" and image is not None:
        grey = resized(image, size).mean(-1, keepdims=True)
        ground = np.broadcast_to(0.45 * grey + 0.55 * 235, out.shape).astype(np.uint8)
    return np.where((ids == panel.clear)[..., None], ground, out)


@dataclass(frozen=True)
class Strip:
    """One row of a contact sheet: a caption, panels of one image, and a legend of (name, colour)."""

    caption: str
    panels: Sequence[Panel]
    legend: Sequence[tuple[str, tuple[int, int, int]]] = ()


def sheet(strips: Sequence[Strip], *, side: int = 224) -> Image.Image:
    """A contact sheet: a row of panels a strip, caption above, titles and class names below.

    Panels are `side` high or wide, whichever is longer; many strips stand in several columns.
    Raises: ValueError without strips.
    """
    if not strips:
        raise ValueError("a contact sheet wants at least one strip.")
    width = max(max(len(strip.panels) for strip in strips) * (side + GAP), 400) + GAP
    drawn_strips = [_drawn_strip(strip, side, width) for strip in strips]
    total = sum(strip.height for strip in drawn_strips)
    num_columns = max(1, min(len(strips), round(math.sqrt(SHEET_ASPECT * total / width))))
    columns: list[list[Image.Image]] = [[]]
    for strip in drawn_strips:
        if len(columns) < num_columns and sum(s.height for s in columns[-1]) + strip.height / 2 > total / num_columns:
            columns.append([])
        columns[-1].append(strip)
    page = Image.new("RGB", (len(columns) * width, GAP + max(sum(s.height for s in c) for c in columns)), PAGE)
    for place, column in enumerate(columns):
        top = GAP
        for strip in column:
            page.paste(strip, (place * width, top))
            top += strip.height
    return page


def _drawn_strip(strip: Strip, side: int, width: int) -> Image.Image:
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    size, lines, height = _lay(strip, side, width, small)
    page = Image.new("RGB", (width, height), PAGE)
    pen = ImageDraw.Draw(page)
    pen.text((GAP, 0), strip.caption, fill=INK, font=font)
    image = next((p.pixels for p in strip.panels if p.kind == "photo"), None)
    for place, panel in enumerate(strip.panels):
        x = GAP + place * (side + GAP)
        page.paste(Image.fromarray(drawn(panel, size, image)), (x, CAPTION))
        pen.text((x, CAPTION + size[1] + 3), panel.title, fill=QUIET, font=small)
    for row, line in enumerate(lines):
        y = CAPTION + size[1] + TITLE + row * LINE
        for x, name, colour in line:
            pen.rectangle((x, y + 2, x + 10, y + 12), fill=colour, outline=QUIET)
            pen.text((x + 15, y), name, fill=INK, font=small)
    return page


Line = list[tuple[int, str, tuple[int, int, int]]]


def _lay(
    strip: Strip, side: int, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont
) -> tuple[tuple[int, int], list[Line], int]:
    """Panel size (width, height), the legend's lines as (x, name, colour), and the strip's height."""
    rows, columns = (strip.panels[0].pixels.shape[:2]) if strip.panels else (1, 1)
    longest = max(rows, columns)
    size = (max(1, round(side * columns / longest)), max(1, round(side * rows / longest)))
    lines: list[Line] = []
    x = math.inf
    for name, colour in strip.legend:
        needed = 15 + int(font.getlength(name)) + 16
        if x + needed > width - GAP:
            lines.append([])
            x = GAP
        lines[-1].append((int(x), name, colour))
        x += needed
    return size, lines, CAPTION + size[1] + TITLE + LINE * len(lines) + GAP
