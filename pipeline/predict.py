"""Any image, any class names: a coloured overlay with its legend, and the raw mask.

    python cli.py predict photo.jpg --run runs/demo --names "zebra,grass,water"

Names that the student's file knows need nothing else; others need the teacher's text encoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pipeline.config import UserError
from pipeline.data.base import BadImage, read_image
from pipeline.data.classes import bitwise_palette
from pipeline.learning.checkpoint import Checkpoint, load_student, student_file
from pipeline.learning.inference import best_by_group, class_logits, predicted
from pipeline.learning.text import text_of_names

OPACITY = 0.55  # of the class colours over the image
MIN_SIDE = 384  # small images are enlarged to this for the overlay, so that the legend can be read


def predict(
    run: Path, images: Sequence[Path], *, names: list[str] | None, out: Path, gamma: float | None = None
) -> Iterator[tuple[Path, Path]]:
    """Segments each image and yields the paths of its overlay and its indexed mask.

    The mask's ids follow `names` (default: the run's classes). gamma is added to the logits of names
    that are not the run's seen classes.
    Raises: CheckpointError, BadImage, UserError for empty or repeated names.
    """
    student, checkpoint = load_student(student_file(run))
    names = list(checkpoint.classes) if names is None else names
    if not names or len(set(names)) != len(names) or len(names) > 255:
        raise UserError(f"--names {','.join(names)!r}: want 1 to 255 different names, separated by commas.")
    missing = [path for path in images if not path.is_file()]
    if missing:
        raise BadImage(f"{missing[0]}: no such image file.")
    text = text_features(checkpoint, names)
    if torch.cuda.is_available():
        student = student.cuda()
    trained = {checkpoint.classes[i] for i in checkpoint.seen_ids}
    seen = [i for i, name in enumerate(names) if name in trained]
    unseen = [i for i, name in enumerate(names) if name not in trained]
    added = checkpoint.config.eval.gamma if gamma is None else gamma
    palette = bitwise_palette(len(names))
    out.mkdir(parents=True, exist_ok=True)
    for path in images:
        image = read_image(path)
        logits = class_logits(
            student, text, image, checkpoint.config.teacher.image_size, checkpoint.config.eval
        )
        ids = predicted(best_by_group(logits, seen, unseen), added).numpy().astype(np.uint8)
        mask = Image.fromarray(ids, mode="P")
        mask.putpalette(palette.tobytes())
        mask_path, overlay_path = out / f"{path.stem}.mask.png", out / f"{path.stem}.overlay.png"
        mask.save(mask_path)
        overlay(image, ids, names, palette).save(overlay_path)
        yield overlay_path, mask_path


def text_features(checkpoint: Checkpoint, names: Sequence[str]) -> Tensor:
    """(K, C): rows of the run's own table, and the teacher's text encoder for names that aren't in it.

    Raises: UserError for such names when the student's classifier was learned.
    """
    known = checkpoint.classes
    strange = [name for name in names if name not in known]
    if strange and checkpoint.config.student.classifier == "learned":
        raise UserError(
            f"--names {strange[0]!r}: this student has learned its {len(known)} classes and knows no "
            f"other ({', '.join(known)}). Train with student.classifier text for any names."
        )
    return text_of_names(checkpoint, [(name,) for name in names])


def overlay(image: np.ndarray, ids: np.ndarray, names: Sequence[str], palette: np.ndarray) -> Image.Image:
    """The image under its class colours, and beside it the names found, most pixels first."""
    height, width = ids.shape
    zoom = max(1, round(MIN_SIDE / min(height, width)))
    mixed = ((1 - OPACITY) * image + OPACITY * palette[ids]).astype(np.uint8)
    picture = Image.fromarray(mixed).resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
    found = sorted(np.unique(ids), key=lambda i: -int((ids == i).sum()))
    line = max(16, picture.height // 24)
    font = ImageFont.load_default(line * 0.75)
    widest = max(font.getlength(f"{names[i]} 100 %") for i in found)
    page = Image.new(
        "RGB", (picture.width + int(widest) + 3 * line, max(picture.height, line * (len(found) + 1))), "white"
    )
    page.paste(picture, (0, 0))
    pen = ImageDraw.Draw(page)
    for row, i in enumerate(found):
        x, y = picture.width + line // 2, line // 2 + row * line
        pen.rectangle(
            (x, y, x + int(line * 0.8), y + int(line * 0.8)), fill=tuple(int(v) for v in palette[i])
        )
        share = 100 * (ids == i).mean()
        pen.text((x + int(line * 1.2), y - line * 0.05), f"{names[i]} {share:.0f} %", fill="black", font=font)
    return page
