"""The best class of every pixel at the image's size, from logits on the student's grid.

Axes: K classes, h x w the student's grid, H x W the image, P = H * W its pixels. Enlarging is bilinear with
pixel centres at half-integers (torch's interpolate, align_corners False).

Enlarging all planes costs as much as the student: 171 planes at 640 x 480 are 200 MB. But a pixel's logit lies
between those of the four grid points around it. So of a cell between four points only those classes can win
whose largest corner reaches the best class's smallest one: one class within an object, a few at its border.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import interpolate

FEW = 24  # classes up to which enlarging them all is faster (measured: bench/evaluation.py)
# Logits enlarged at once where all are wanted: 16 MiB, whatever the image (2**24: half as fast).
STRIP_VALUES = 2**22
Taps = tuple[Tensor, Tensor, Tensor]


def best_enlarged(scores: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The largest logit of each pixel and its class: interpolate, then max over the classes (the lowest at a tie).

    On the CPU only classes that can win are enlarged: the same but for rounding of the last bit.

    Shapes: scores (h, w, K) float32, K at least 1 -> (H, W) float32, (H, W) int64.
    """
    height, width, num_classes = scores.shape
    if scores.device.type != "cpu" or min(height, width) < 2 or num_classes <= FEW:
        return _all_planes(scores, size)
    best = scores.max(2).indices
    is_one = (best[1:] == best[:-1])[:, 1:] & (best[:, 1:] == best[:, :-1])[1:]
    is_one &= best[1:, 1:] == best[:-1, :-1]  # (h - 1, w - 1): one class is best at all four corners
    mixed = (~is_one).flatten().nonzero()[:, 0]  # (M,)
    corner = mixed // (width - 1) * width + mixed % (width - 1)  # the upper left one
    at = torch.stack([scores.view(-1, num_classes).index_select(0, corner + step) for step in (0, 1, width, width + 1)])
    can_win = at.amax(0) >= at.amin(0).amax(1, keepdim=True)  # (M, K)
    num = torch.ones(is_one.numel(), dtype=torch.int64)
    num[mixed] = can_win.sum(1)
    if not num.all():  # NaN
        return _all_planes(scores, size)
    begin = num.cumsum(0) - num
    classes = torch.empty(int(num.sum()), dtype=torch.int64)
    classes[begin] = best[:-1, :-1].flatten()  # of a mixed cell written over
    pair, candidate = can_win.nonzero().unbind(1)
    first = num[mixed].cumsum(0) - num[mixed]
    place = (begin.index_select(0, mixed) - first).index_select(0, pair) + torch.arange(len(pair))
    classes.index_copy_(0, place, candidate)
    return _of_those(scores, size, classes, num)


def _all_planes(scores: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    planes = scores.permute(2, 0, 1).contiguous()[None]  # (1, K, h, w)
    planes = interpolate(planes, size, mode="bilinear", align_corners=False)[0]
    top = planes.amax(0)
    # max(0) isn't vectorised where it has to tell the index; the lowest class that holds the maximum is.
    rank = torch.arange(len(planes), 0, -1, dtype=torch.int16, device=scores.device)[:, None, None]
    return top, len(planes) - ((planes == top) * rank).amax(0).long().clamp(min=1)


def _of_those(scores: Tensor, size: tuple[int, int], classes: Tensor, num: Tensor) -> tuple[Tensor, Tensor]:
    """The best of each cell's own classes: `num` of each cell (cells,), listed cell by cell in `classes`."""
    height, width, num_classes = scores.shape
    top, bottom, down = _taps(height, size[0])
    left, right, along = _taps(width, size[1])
    cell = (top.clamp(max=height - 2)[:, None] * (width - 1) + left.clamp(max=width - 2)).flatten()  # (P,)
    corners = [
        ((row[:, None] * width + column) * num_classes).flatten() for row in (top, bottom) for column in (left, right)
    ]
    down, along = (part.expand(size).flatten() for part in (down[:, None], along))
    flat, begin = scores.flatten(), (num.cumsum(0) - num).index_select(0, cell)  # (P,)

    def values(chosen: Tensor, at: list[Tensor], down: Tensor, along: Tensor) -> Tensor:
        a, b, c, d = (flat.index_select(0, corner + chosen) for corner in at)
        return (1 - down) * ((1 - along) * a + along * b) + down * ((1 - along) * c + along * d)

    best_class = classes.index_select(0, begin)
    best = values(best_class, corners, down, along)
    left_over, pixels, nth = num.index_select(0, cell), torch.arange(len(cell)), 0
    while True:
        nth += 1
        more = (left_over > nth).nonzero()[:, 0]
        if len(more) == 0:
            return best.view(size), best_class.view(size)
        left_over, pixels, begin, down, along, *corners = (
            each.index_select(0, more) for each in (left_over, pixels, begin, down, along, *corners)
        )
        chosen = classes.index_select(0, begin + nth)
        found, so_far = values(chosen, corners, down, along), best.index_select(0, pixels)
        better = found > so_far
        best.index_copy_(0, pixels, torch.where(better, found, so_far))
        chosen = torch.where(better, chosen, best_class.index_select(0, pixels))
        best_class.index_copy_(0, pixels, chosen)


def _taps(length: int, size: int) -> Taps:
    """For each output pixel of one axis the two grid points beside it and the second one's weight."""
    place = ((torch.arange(size) + 0.5) * (length / size) - 0.5).clamp(min=0)
    first = place.long()
    return first, (first + 1).clamp(max=length - 1), (place - first).float()


def strips(planes: Tensor, size: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
    """All planes at the image's size, as interpolate gives them, so many rows at a time that memory is bounded.

    Shapes: planes (K, h, w) float32 -> (rows, (K, R, W)) from top to bottom, R rows each but in the last.
    """
    num = max(1, STRIP_VALUES // (len(planes) * max(size[1], planes.shape[2])))
    top, bottom, down = (tap.to(planes.device) for tap in _taps(planes.shape[1], size[0]))
    for first in range(0, size[0], num):
        rows = slice(first, min(first + num, size[0]))
        part = torch.lerp(planes[:, top[rows]], planes[:, bottom[rows]], down[rows, None])  # (K, R, w)
        yield rows, interpolate(part[None], (part.shape[1], size[1]), mode="bilinear", align_corners=False)[0]
