"""The student at test time: no CLIP, no adapter, only dense features and text features.

Axes: K classes, n names of a class, C channels, H x W the image's own size, S the student's input side. Text features
are (K, C), or (K, n, C): of several names the best one's logit is the class's.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pipeline.config import Eval
from pipeline.data.base import BadImage
from pipeline.models.dense import DIVISOR, DenseStudent, StudentError, refused
from pipeline.ops.enlarge import best_enlarged
from pipeline.ops.views import replay_image

MOST_WINDOWS = 4096  # of one image in mode `slide`: some two thousand times as long as it is wide
MOST_SLID_BYTES = 2**32  # of one image's colours and logits in mode `slide` at scale 1, where its windows lie
COLOURS = 4  # the three, and how many windows there were
BLACK = np.zeros(3, np.uint8)
# Best seen class, best unseen class, the gamma to be passed: (H, W) each.
Best = tuple[Tensor, Tensor, Tensor]


@torch.inference_mode()
def class_logits(student: DenseStudent, text: Tensor, image: np.ndarray, size: int, section: Eval) -> Tensor:
    """Logits R^T T at the image's size, gamma not yet added.

    Shapes: text (K, C) or (K, n, C), image (H, W, 3) uint8 -> (K, H, W) float32.
    `whole` squashes the image to the student's side, as view 0; `slide` scales the short side to it and
    averages the logits of overlapping windows (mmseg's slide_inference).
    With `flip` or `scales` the softmax is averaged over all sights of the image (mmseg's SegTTAModel), and its
    logarithm returned: of a single sight that is the logits but for a number a pixel, so gamma means the same.
    Raises: BadImage in mode `slide` (see `slid`), StudentError for a scale that the student can't take.
    """
    see = {"whole": _whole, "slide": _slide}[section.mode]
    if not section.is_averaged:
        return see(student, text, image, size, section, 1.0)
    total: Tensor | None = None
    for scale in section.scales or (1.0,):
        for is_mirrored in (False, True) if section.flip else (False,):
            seen = np.ascontiguousarray(image[:, ::-1]) if is_mirrored else image
            logs = see(student, text, seen, size, section, scale).log_softmax(0)
            logs = logs.flip(2) if is_mirrored else logs
            total = logs if total is None else torch.logaddexp(total, logs, out=total)
    assert total is not None
    return total - math.log(len(section.scales or (1.0,)) * (1 + section.flip))


def scaled(size: int, scale: float) -> int:
    """The input's side at a scale: the nearest multiple of DIVISOR, at least one of them; at 1 the side itself."""
    return size if scale == 1 else max(1, round(size * scale / DIVISOR)) * DIVISOR


def _whole(student: DenseStudent, text: Tensor, image: np.ndarray, size: int, section: Eval, scale: float) -> Tensor:
    logits = _logits(student, text, squashed(image, scaled(size, scale))[None])
    return interpolate(logits, image.shape[:2], mode="bilinear", align_corners=False)[0]


def squashed(image: np.ndarray, size: int) -> Tensor:
    """What the student sees in mode `whole`: (H, W, 3) uint8 -> (3, S, S) uint8."""
    height, width = image.shape[:2]
    if height == width == size:  # what replaying it would give
        return torch.from_numpy(image).permute(2, 0, 1).contiguous()
    return replay_image(image, np.array([0, 0, width, height], np.float32), size, BLACK)


@torch.inference_mode()
def best_classes(
    student: DenseStudent, text: Tensor, views: Tensor, sizes: list[tuple[int, int]], seen: list[int], unseen: list[int]
) -> list[Best]:
    """`best_by_group` of the logits of mode `whole`, of several squashed images, without all planes at full size.

    Shapes: text (K, C) or (K, n, C), views (B, 3, S, S) uint8, sizes: the images' own (H, W) -> B times `Best`, on the
    CPU.
    """
    device = next(student.parameters()).device
    dense = student(views.to(device)).float()  # (B, C, h, w)
    found = []
    for image, size in zip(dense, sizes, strict=True):
        groups = []
        for ids in (seen, unseen):
            if ids:
                names = text[ids].flatten(0, -2).to(device)
                scores = torch.mm(image.flatten(1).T, names.T)  # (h w, K n), without a copy
                if text.ndim == 3:
                    scores = scores.unflatten(1, (len(ids), -1)).amax(2)
                value, place = best_enlarged(scores.unflatten(0, image.shape[1:]), size)
                groups.append((value, torch.tensor(ids, device=device)[place]))
            else:
                value = torch.full(size, -torch.inf, device=device)
                groups.append((value, torch.zeros(size, dtype=torch.long, device=device)))
        (top_seen, best_seen), (top_unseen, best_unseen) = groups
        found.append((best_seen.cpu(), best_unseen.cpu(), (top_seen - top_unseen).cpu()))
    return found


def _slide(student: DenseStudent, text: Tensor, image: np.ndarray, size: int, section: Eval, scale: float) -> Tensor:
    found = slid(student, text, image, size, section, scale)
    return interpolate(found[None], image.shape[:2], mode="bilinear", align_corners=False)[0]


def slid(
    student: DenseStudent, text: Tensor, image: np.ndarray, size: int, section: Eval, scale: float = 1.0
) -> Tensor:
    """Logits of mode `slide` before they are enlarged to the image: the means over overlapping windows.

    Shapes: image (H, W, 3) uint8 -> (K, h, w) float32, the short side `scaled(size, scale)`.
    Raises: BadImage for an image so long that its windows, or their logits, are too many; before any work.
    """
    height, width = image.shape[:2]
    short = scaled(size, scale)
    side = min(size, short)  # of a window: mmseg's shrink with an image that is smaller than they are
    factor = short / min(height, width)
    rows, columns = max(short, round(height * factor)), max(short, round(width * factor))
    step = max(int(side * section.stride), 1)
    num_windows = math.prod(1 + math.ceil((length - side) / step) for length in (rows, columns))
    num_bytes, most_bytes = 4 * (len(text) + COLOURS) * rows * columns, MOST_SLID_BYTES * max(1, scale) ** 2
    if num_windows > MOST_WINDOWS or num_bytes > most_bytes:
        raise BadImage(
            f"{width} x {height} pixels: too long for its width and {len(text)} names in mode slide: {num_windows:,} "
            f"windows (at most {MOST_WINDOWS:,}) and {num_bytes / 1e9:.1f} GB (at most {most_bytes / 1e9:.1f}). Crop "
            "it, name fewer, or take mode whole."
        )
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    pixels = interpolate(pixels, (rows, columns), mode="bilinear", align_corners=False, antialias=True)
    total = torch.zeros(len(text), rows, columns)
    count = torch.zeros(rows, columns)
    for top in _starts(rows, side, step):
        for left in _starts(columns, side, step):
            window = pixels[:, :, top : top + side, left : left + side]
            logits = _logits(student, text, window)
            logits = interpolate(logits, (side, side), mode="bilinear", align_corners=False)[0]
            total[:, top : top + side, left : left + side] += logits.cpu()
            count[top : top + side, left : left + side] += 1
    return total.div_(count)


def _starts(length: int, size: int, step: int) -> list[int]:
    """Where windows begin so that they cover 0..length, the last one flush with the end."""
    return sorted({min(start, length - size) for start in range(0, length - size + step, step)})


def _logits(student: DenseStudent, text: Tensor, images: Tensor) -> Tensor:
    device, side = next(student.parameters()).device, images.shape[-1]
    try:
        dense = student(images.to(device)).float()
    except Exception as error:
        # Some encoders are built for one side.
        if isinstance(student, DenseStudent) and refused(student, side):
            raise StudentError(
                f"eval.scales: this student can't look at images of {side} x {side}, only of the side it was trained "
                f"at ({' '.join(str(error).split())}). Leave eval.scales out."
            ) from None
        raise
    return dense_logits(dense, text.to(device))


def dense_logits(dense: Tensor, text: Tensor) -> Tensor:
    """R^T T; of a class with several names the best one's.

    Shapes: dense (B, C, h, w), text (K, C) or (K, n, C) -> (B, K, h, w).
    """
    if text.ndim == 2:
        return torch.einsum("bchw,kc->bkhw", dense, text)
    return torch.einsum("bchw,knc->bknhw", dense, text).amax(2)


def best_by_group(logits: Tensor, seen: list[int], unseen: list[int]) -> Best:
    """What a gamma sweep needs of the logits.

    Shapes: logits (K, H, W) -> best seen class (H, W), best unseen class (H, W), and the gamma from
    which on the unseen one wins (H, W); an empty group never wins.
    """
    nothing = torch.full(logits.shape[1:], -torch.inf)
    zeros = torch.zeros(logits.shape[1:], dtype=torch.long)
    logits = logits.cpu()
    top_seen, at_seen = logits[seen].max(0) if seen else (nothing, zeros)
    top_unseen, at_unseen = logits[unseen].max(0) if unseen else (nothing, zeros)
    best_seen = torch.tensor(seen)[at_seen] if seen else at_seen
    best_unseen = torch.tensor(unseen)[at_unseen] if unseen else at_unseen
    return best_seen, best_unseen, top_seen - top_unseen


def predicted(best: Best, gamma: float) -> Tensor:
    """Class ids (H, W) when gamma is added to the unseen logits; at a tie the seen class, within a group the lower."""
    seen, unseen, needed = best
    return torch.where(needed < gamma, unseen, seen)
