"""A photograph under the colours of the names found in it, and the legend that says which is which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.data.classes import bitwise_palette
from pipeline.looking.panels import HATCH_DARK, HATCH_LIGHT, INK, PAGE, QUIET, id_picture, resized
from pipeline.ops.labels import IGNORE, counts, file_dtype, to_file

NONE_TITLE = "none of these"  # IGNORE in a map of ids
NONE_COLOUR = (224, 224, 192)  # its entry of a mask's palette: VOC's for void; of up to 254 names no other has it
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
    """(num + 1, 3) uint8: VOC's colours for the ids of `num` names, and last, so at IGNORE, NONE_COLOUR."""
    return np.concatenate([bitwise_palette(num), np.array([NONE_COLOUR], np.uint8)])


def file_of(ids: np.ndarray, num: int) -> Image.Image:
    """The ids of `num` names (H, W) as a file's picture: indexed with their colours, or greys of 16 bits."""
    dtype, palette = file_dtype(num), palette_of(num)
    beyond = np.zeros((max(0, 255 - num), 3), np.uint8)  # black, for ids of nothing
    return id_picture(to_file(ids, dtype), np.concatenate([palette[:-1], beyond, palette[-1:]]))


def shares(ids: np.ndarray, titles: Sequence[str]) -> list[Share]:
    """What is found in a map of ids (H, W), the largest part first; none of the names, if it is there, last."""
    num, palette = counts(ids, len(titles)), palette_of(len(titles))
    order = sorted(np.flatnonzero(num[:IGNORE]).tolist(), key=lambda i: (-num[i], i))
    order += [IGNORE] * bool(num[IGNORE])
    colours = {i: (int(palette[i, 0]), int(palette[i, 1]), int(palette[i, 2])) for i in order}
    names = [*titles, NONE_TITLE]  # the last is IGNORE's
    return [Share(i, names[i], float(num[i] / ids.size), colours[i]) for i in order]


def painted(image: np.ndarray, ids: np.ndarray, num: int) -> Image.Image:
    """The image under the colours of `num` names, none of them hatched, at most LARGEST pixels a side.

    Shapes: image (H, W, 3) uint8, ids (H, W) int16.
    """
    height, width = ids.shape
    scale = min(max(1, round(SMALLEST / min(height, width))), LARGEST / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    how = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
    picture = Image.fromarray(image).resize(size, how)
    small = resized(ids, size)
    colours = palette_of(num)[small]
    mixed = Image.blend(picture, Image.fromarray(colours), OPACITY)
    is_none = Image.fromarray(np.where(small == IGNORE, 255, 0).astype(np.uint8))
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
            if share.id == IGNORE:
                page.paste(_hatching((swatch, swatch)), (x, y))
            else:
                pen.rectangle((x, y, x + swatch, y + swatch), fill=share.colour)
            pen.rectangle((x, y, x + swatch, y + swatch), outline=QUIET)
            pen.text((x + int(line * 1.2), y), f"{share.title}  {share.percent}", fill=INK, font=font)
        x += width
    return page
