"""Where in a picture is "the man in red"? The refined CAM of free text, one map a text.

    python cli.py cams --text "the man in red" --image photo.jpg --out refined.png

The use that CLIP-ES makes of its maps for referring expressions. Each text competes with the config's background
names; several texts compete with one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch.nn.functional import interpolate

from cache.files import whole_file
from pipeline.config import Config, UserError
from pipeline.data.base import BadImage, read_image
from pipeline.running.console import say
from pipeline.teaching.maps import explained_maps, explained_teacher, fitted, text_features

OPACITY = 0.6  # of the hottest place; a map of 0 leaves the picture as it is
COLOURS = "viridis"  # even steps for every eye, in grey too
MIN_SIDE = 384  # small pictures are enlarged to this


def refer(config: Config, texts: Sequence[str], image: Path, out: Path) -> np.ndarray:
    """Writes the picture, one panel a text, and returns the maps (texts, H, W) float32, 0 to 1, at the image's size.

    Raises: BadImage, UserError for a blank text.
    """
    if not texts or not all(text.strip() for text in texts):
        raise UserError(f"--text {list(texts)!r}: want words to look for.")
    if not image.is_file():
        raise BadImage(f"{image}: no such image file.")
    pixels, section = read_image(image), config.cams
    teacher = explained_teacher(config.teacher, section)
    foreground, background = text_features(config.teacher, section, tuple(texts))
    size = pixels.shape[:2]
    one = fitted(pixels, section, teacher.patch)[None]
    maps, _ = explained_maps(teacher, section, one, [range(len(texts))], foreground, background)
    full = interpolate(maps, size, mode="bilinear", align_corners=False)[0].numpy()  # (texts, H, W)
    picture = _picture(pixels, full, texts)
    with whole_file(out) as file:
        picture.save(file, "PNG")
    for text, found in zip(texts, full, strict=True):
        if not found.any():
            say(f"cams: {text!r}: an empty map; nothing in {image} speaks for it against {section.background}")
    say(f"cams: {out}")
    return full


def _picture(image: np.ndarray, maps: np.ndarray, texts: Sequence[str]) -> Image.Image:
    """The image, then each map over it with its text above."""
    height, width = image.shape[:2]
    zoom = max(1.0, MIN_SIDE / min(height, width))
    side = (round(width * zoom), round(height * zoom))
    line = max(16, side[1] // 20)
    panels, names = [image], ["", *texts]
    for found in maps:
        colour = 255 * matplotlib.colormaps[COLOURS](found)[..., :3]
        weight = OPACITY * found[..., None]
        panels.append(((1 - weight) * image + weight * colour).astype(np.uint8))
    page = Image.new("RGB", (len(panels) * side[0], side[1] + 2 * line), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(line)
    for place, (panel, name) in enumerate(zip(panels, names, strict=True)):
        page.paste(Image.fromarray(panel).resize(side, Image.Resampling.BILINEAR), (place * side[0], 2 * line))
        pen.text((place * side[0] + line // 2, line // 3), name, fill="black", font=font)
    return page
