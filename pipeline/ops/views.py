"""Views: boxes of an image that are drawn once, stored, and replayed to the bit.

The teacher sees a view when its features are extracted, the student when it trains on them; both
replay the same box through the functions below, in other processes, on other machines.

Axes: V views, H x W the source image, h x w tokens, `size` the side of the square model input.
A box is (x0, y0, x1, y1) in source pixels, whole numbers held in float32, x1 and y1 exclusive;
it may leave the image. `patch` is the side of a token in model-input pixels.

Replay uses integers only (weights are rationals rounded to 2^-14, sums stay below 2^53), so the
order of additions, the number of threads and the instruction set can't change a pixel.
"""

import json
from hashlib import blake2b

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pipeline.ops.labels import IGNORE, LABEL

SCALE_RATIO = (0.5, 2.0)  # mmseg RandomResize(ratio_range=(0.5, 2.0)), the schedule the paper names
LONG_TO_SHORT = 4  # mmseg's base scale (2048, 512): the long side may reach 4 times the crop's
WEIGHT_BITS = 14  # 8-bit pixels x 14-bit weights: partial sums below 2^24 are exact in float32

ANNOTATED, IGNORED, PADDING = 0, 1, 2  # the states of a token, method section 3


def _digest(*key: str | int) -> bytes:
    """16 bytes that depend on the key alone (Python's own hash changes from process to process)."""
    return blake2b(json.dumps(key).encode(), digest_size=16).digest()


def draw_views(dataset: str, sample: str, num_views: int, width: int, height: int, size: int) -> NDArray:
    """The views of one image: view 0 is all of it, the others are random squares.

    A square is what a `size` x `size` crop covers after mmseg's random resize to ratio x (4 size, size).
    Where it is larger than the image it contains the image's whole extent, at a random place. Each view
    depends on (dataset, sample, view) only, so more views never change the earlier ones.

    Shapes: -> (V, 4) float32, whole source pixels.
    Source: method section 2; ratio and base scale from mmseg (cat_max_ratio left out on purpose).
    Raises: ValueError if a count or a side is below 1.
    """
    if min(num_views, width, height, size) < 1:
        raise ValueError(
            f"{dataset}/{sample}: {num_views} views of a {width} x {height} image at size {size}; "
            "all four must be at least 1."
        )
    boxes = [(0, 0, width, height)]
    for view in range(1, num_views):
        # Raw Philox words: unlike Generator's methods their stream is frozen across numpy versions.
        words = np.random.Philox(key=np.frombuffer(_digest(dataset, sample, view), "<u8")).random_raw(3)
        u_scale, u_x, u_y = (int(word) >> 11 for word in words)  # 53 bits each
        ratio = SCALE_RATIO[0] + (SCALE_RATIO[1] - SCALE_RATIO[0]) * u_scale / 2**53
        zoom = ratio * min(LONG_TO_SHORT * size / max(width, height), size / min(width, height))
        side = max(1, round(size / zoom))
        x0, y0 = _place(u_x, width - side), _place(u_y, height - side)
        boxes.append((x0, y0, x0 + side, y0 + side))
    return np.array(boxes, np.float32)


def _place(u: int, room: int) -> int:
    """A uniform integer between 0 and `room`, which is negative when the crop exceeds the image."""
    offset = u * (abs(room) + 1) >> 53
    return offset if room >= 0 else -offset


def view_of(sample: str, epoch: int, num_views: int) -> int:
    """The view a sample shows in an epoch: (epoch + offset(sample)) mod V, so every view has its turn."""
    return (epoch + int.from_bytes(_digest(sample)[:8], "little")) % num_views


def _whole(box: ArrayLike) -> tuple[int, int, int, int]:
    values = np.asarray(box, np.float64)
    if values.shape != (4,) or not np.isfinite(values).all() or (values != np.round(values)).any():
        raise ValueError(f"box {values.tolist()}: four whole source-pixel coordinates x0, y0, x1, y1 wanted.")
    x0, y0, x1, y1 = (int(value) for value in values)
    if x1 <= x0 or y1 <= y0:
        raise ValueError(f"box {values.tolist()} is empty; x0 < x1 and y0 < y1 wanted.")
    return x0, y0, x1, y1


def _triangle_bags(start: int, side: int, length: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The source pixels that make each output pixel of one axis, as ragged bags: indices, offsets, weights.

    Antialiased bilinear, pixel centres at half-integers: the weight of source pixel j in output i is
    max(0, 1 - |(j + 1/2) - (i + 1/2) r| / max(r, 1)) with r = side / size, over the box's own pixels,
    normalised, in units of 2^-WEIGHT_BITS; each output's weights sum to exactly one unit.
    Pixels outside 0..length are left out afterwards: they are mean colour, that is zero (replay_image).
    """
    reach = max(side, size)  # everything is scaled by 2 * size, to stay with integers
    centre = (2 * np.arange(size, dtype=np.int64) + 1) * side  # (size,)
    first = (centre - 2 * reach) // (2 * size)
    taps = first[:, None] + np.arange(2 * reach // size + 3)  # (size, K) pixels of the box
    distance = np.abs((2 * taps + 1) * size - centre[:, None])
    weight = np.where((taps >= 0) & (taps < side), np.maximum(2 * reach - distance, 0), 0)
    up_to = weight.cumsum(1)  # rounding the running sum keeps the total exact
    total = up_to[:, -1:]
    rounded = ((up_to << (WEIGHT_BITS + 1)) + total) // (2 * total)
    unit = np.diff(rounded, axis=1, prepend=0)  # (size, K), rows sum to 2^WEIGHT_BITS
    source = taps + start
    used = (unit > 0) & (source >= 0) & (source < length)
    offsets = np.concatenate([[0], used.sum(1).cumsum()[:-1]])
    return torch.from_numpy(source[used]), torch.from_numpy(offsets), torch.from_numpy(unit[used])


def _resample_rows(rows: Tensor, bags: tuple[Tensor, Tensor, Tensor], first: int) -> Tensor:
    """Weighted sums of rows: rows (N, M) -> (size, M). Exact: operands are small integers."""
    indices, offsets, weights = bags
    return F.embedding_bag(indices - first, rows, offsets, mode="sum", per_sample_weights=weights.to(rows.dtype))


def replay_image(image: NDArray, box: ArrayLike, size: int, mean_colour: ArrayLike) -> Tensor:
    """What a model sees of a view: the box, mean colour outside the image, resized to a square.

    The padding takes part in the antialiasing, as if the padded crop had been built: subtracting the
    mean colour first makes it zero, so it is never built, however far the box reaches.

    Shapes: image (H, W, 3) uint8 RGB, box (4,), mean_colour (3,) uint8 -> (3, size, size) uint8.
    Raises: ValueError for another image shape or type, or a box that is empty, fractional or wholly outside.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image is {image.shape} {image.dtype}; (H, W, 3) uint8 wanted.")
    height, width = image.shape[:2]
    x0, y0, x1, y1 = _whole(box)
    left, right, top, bottom = max(x0, 0), min(x1, width), max(y0, 0), min(y1, height)
    if left >= right or top >= bottom:
        raise ValueError(f"box {(x0, y0, x1, y1)} lies outside the {width} x {height} image.")
    mean = torch.from_numpy(np.asarray(mean_colour, np.uint8).astype(np.int64))  # (3,)

    crop = torch.from_numpy(image[top:bottom, left:right].astype(np.float32)) - mean  # (h, w, 3)
    vertical = (_triangle_bags(y0, y1 - y0, height, size), top)
    horizontal = (_triangle_bags(x0, x1 - x0, width, size), left)
    is_wide = crop.shape[1] > crop.shape[0]  # the longer axis goes first, for speed alone: sums are exact
    if is_wide:
        crop, vertical, horizontal = crop.transpose(0, 1), horizontal, vertical
    rows = _resample_rows(crop.flatten(1), *vertical)  # (size, w * 3)
    columns = rows.unflatten(1, (-1, 3)).transpose(0, 1).double().flatten(1)  # (w, size * 3)
    both = _resample_rows(columns, *horizontal).unflatten(1, (-1, 3))  # (size, size, 3), axes exchanged
    pixels = both.permute((2, 0, 1) if is_wide else (2, 1, 0))  # (3, size, size), units of 2^-28
    # Rounded half up. Exact, and seven times as fast as in integers: 37 bits of a double's 53 are in use.
    rounded = pixels.mul(2.0 ** (-2 * WEIGHT_BITS)).add_(0.5).floor_().add_(mean[:, None, None])
    return rounded.to(torch.uint8).contiguous()


def _nearest(start: int, side: int, length: int, size: int) -> tuple[NDArray, NDArray]:
    """The source pixel under each output pixel's centre on one axis, and whether it is in the image."""
    source = (2 * np.arange(size, dtype=np.int64) + 1) * side // (2 * size) + start
    is_inside = (source >= 0) & (source < length)
    return np.clip(source, 0, length - 1), is_inside


def replay_labels(labels: NDArray, box: ArrayLike, size: int) -> Tensor:
    """The label map of a view: nearest at pixel centres, IGNORE outside the image.

    Shapes: labels (H, W) int16, box (4,) -> (size, size) int16.
    Raises: ValueError for another shape or type, or a box that is empty or fractional.
    """
    if labels.ndim != 2 or labels.dtype != LABEL:
        raise ValueError(f"labels are {labels.shape} {labels.dtype}; (H, W) int16 wanted.")
    x0, y0, x1, y1 = _whole(box)
    rows, in_height = _nearest(y0, y1 - y0, labels.shape[0], size)
    columns, in_width = _nearest(x0, x1 - x0, labels.shape[1], size)
    replayed = np.where(in_height[:, None] & in_width, labels[rows[:, None], columns], IGNORE)
    return torch.from_numpy(replayed.astype(LABEL, copy=False))


def inside(box: ArrayLike, width: int, height: int, size: int) -> Tensor:
    """Which pixels of a view have their centre in the image: (size, size) bool."""
    x0, y0, x1, y1 = _whole(box)
    _, in_height = _nearest(y0, y1 - y0, height, size)
    _, in_width = _nearest(x0, x1 - x0, width, size)
    return torch.from_numpy(in_height[:, None] & in_width)


def token_state(labels: Tensor | None, inside: Tensor, patch: int) -> Tensor:
    """What clustering does with each token: annotated (0), ignored (1) or padding (2).

    Padding: at least half of the patch is outside the image; it comes first. Ignored: at least half of
    the patch has no label inside the image. Without labels everything but padding is ignored.

    Shapes: labels (size, size) int16 of a view, unseen classes already IGNORE, or None;
    inside (size, size) bool -> (h, w) uint8.
    Source: method section 3.
    Raises: ValueError if the side is no multiple of `patch` or the two shapes differ.
    """
    if inside.shape[0] % patch or inside.shape[1] % patch:
        raise ValueError(f"a {tuple(inside.shape)} view can't be cut into patches of {patch} pixels.")
    if labels is not None and labels.shape != inside.shape:
        raise ValueError(f"labels {tuple(labels.shape)} and view {tuple(inside.shape)} differ in size.")

    def at_least_half(pixels: Tensor) -> Tensor:  # (size, size) bool -> (h, w) bool
        cells = pixels.unflatten(0, (-1, patch)).unflatten(2, (-1, patch))  # (h, patch, w, patch)
        return 2 * cells.sum((1, 3)) >= patch * patch

    is_padding = at_least_half(~inside)
    is_ignored = ~is_padding if labels is None else at_least_half((labels == IGNORE) & inside)
    state = torch.where(is_ignored, IGNORED, ANNOTATED)
    return torch.where(is_padding, PADDING, state).to(torch.uint8)
