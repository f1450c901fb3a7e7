"""A photograph under the colours of the names found in it, and the legend that says which is which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.data.classes import bitwise_palette
from pipeline.looking.panels import HATCH_DARK, HATCH_LIGHT, INK, PAGE, QUIET

NONE = 255  # the id of what is none of the names,
NONE_TITLE = "none of these"
NONE_COLOUR = (224, 224, 192)  # its entry of a mask's palette: VOC's for void, bordering on nothing else's
OPACITY = 0.55  # of the class colours over the image
# Pixels a side: enlarged to the one, so that the legend is legible, and cut to the other.
SMALLEST, LARGEST = (384, 2048)
FEW_LINES = 8  # of a legend, however flat the picture


@dataclass(frozen=True)
class Share:
    """A name that was found: its id, what it is called, its part of the pixels (0 to 1], its colour."""

    id: int
    title: str
    part: float
    colour: tuple[int, int, int]

    @property
    def percent(self) -> str:
        return f"{100 * self.part:.0f} %" if self.part >= 0.01 else "< 1 %"


def palette_of(num: int) -> np.ndarray:
    """(256, 3) uint8: VOC's colours for the ids of `num` names, NONE_COLOUR for 255, black for ids of nothing."""
    palette = np.zeros((256, 3), np.uint8)
    palette[:num], palette[NONE] = bitwise_palette(num), NONE_COLOUR
    return palette


def shares(ids: np.ndarray, titles: Sequence[str]) -> list[Share]:
    """What is found in a map of ids (H, W), the largest part first; none of the names, if it is there, last."""
    counts, palette = np.bincount(ids.ravel(), minlength=256), palette_of(len(titles))
    order = sorted(np.flatnonzero(counts).tolist(), key=lambda i: (i == NONE, -counts[i], i))
    colours = {i: (int(palette[i, 0]), int(palette[i, 1]), int(palette[i, 2])) for i in order}
    names = {i: NONE_TITLE if i == NONE else titles[i] for i in order}
    return [Share(i, names[i], float(counts[i] / ids.size), colours[i]) for i in order]


def painted(image: np.ndarray, ids: np.ndarray, num: int) -> Image.Image:
    """The image under the colours of `num` names, none of them hatched, at most LARGEST pixels a side.

    Shapes: image (H, W, 3) uint8, ids (H, W) uint8.
    """
    height, width = ids.shape
    scale = min(max(1, round(SMALLEST / min(height, width))), LARGEST / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    how = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
    picture = Image.fromarray(image).resize(size, how)
    small = Image.fromarray(ids).resize(size, Image.Resampling.NEAREST)
    colours = palette_of(num)[np.asarray(small)]
    mixed = Image.blend(picture, Image.fromarray(colours), OPACITY)
    is_none = Image.fromarray(np.where(np.asarray(small) == NONE, 255, 0).astype(np.uint8))
    mixed.paste(Image.blend(picture, _hatching(size), OPACITY), (0, 0), is_none)
    return mixed


def _hatching(size: tuple[int, int]) -> Image.Image:
    rows, columns = np.ogrid[0 : size[1], 0 : size[0]]
    stripes = ((rows + columns) // 5 % 3 == 0)[..., None]
    return Image.fromarray(np.where(stripes, HATCH_DARK, HATCH_LIGHT).astype(np.uint8))


def with_legend(picture: Image.Image, found: Sequence[Share]) -> Image.Image:
    """The picture, and beside it what was found, in as many columns as its height asks for."""
    line = min(max(16, picture.height // 24), 40)
    font = ImageFont.load_default(line * 0.75)
    num_lines = max(FEW_LINES, picture.height // line - 1)
    columns = [found[i : i + num_lines] for i in range(0, len(found), num_lines)]
    texts = [[f"{share.title}  {share.percent}" for share in column] for column in columns]
    widths = [int(max(map(font.getlength, column))) + 2 * line for column in texts]
    height = max(picture.height, line * (1 + min(len(found), num_lines)))
    page = Image.new("RGB", (picture.width + sum(widths) + line // 2, height), PAGE)
    page.paste(picture, (0, 0))
    pen, x = ImageDraw.Draw(page), picture.width + line // 2
    swatch = int(line * 0.8)
    for column, width in zip(columns, widths, strict=True):
        for row, share in enumerate(column):
            y = line // 2 + row * line
            if share.id == NONE:
                page.paste(_hatching((swatch, swatch)), (x, y))
            else:
                pen.rectangle((x, y, x + swatch, y + swatch), fill=share.colour)
            pen.rectangle((x, y, x + swatch, y + swatch), outline=QUIET)
            pen.text((x + int(line * 1.2), y), f"{share.title}  {share.percent}", fill=INK, font=font)
        x += width
    return page
