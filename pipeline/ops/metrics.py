"""Segmentation scores, all from one confusion matrix over the whole test set.

Axes: K classes (seen and unseen together). matrix[t, p] counts pixels of true class t predicted as p, as
torchmetrics counts them. Per-image averages are another benchmark: add matrices up, then score once.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Matrix = Tensor | NDArray


def _counts(matrix: Matrix) -> NDArray:
    counts = matrix.detach().cpu().numpy() if isinstance(matrix, Tensor) else np.asarray(matrix)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
        raise ValueError(f"a confusion matrix is square; this one is {counts.shape}.")
    return counts.astype(np.float64)


def pixel_accuracy(matrix: Matrix) -> float:
    """Share of pixels predicted right, 0..1; NaN for an empty matrix."""
    counts = _counts(matrix)
    total = counts.sum()
    return float(counts.trace() / total) if total else float("nan")


def iou_per_class(matrix: Matrix) -> NDArray:
    """Intersection over union of each class, 0..1, NaN where neither truth nor prediction has it: (K,)."""
    counts = _counts(matrix)
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    return np.divide(counts.diagonal(), union, out=np.full(len(counts), np.nan), where=union > 0)


def _mean(values: NDArray) -> float:
    """The mean of what is not NaN; NaN, without numpy's warning, if nothing is left."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def harmonic_mean(seen: float, unseen: float) -> float:
    """2 S U / (S + U), 0 when both are 0 (CLIPTeacher eq. 13)."""
    return 0.0 if seen + unseen == 0 else 2 * seen * unseen / (seen + unseen)


def summary(matrix: Matrix, seen_ids: Sequence[int], unseen_ids: Sequence[int]) -> dict:
    """The benchmark's numbers, in percent.

    pAcc over all pixels; mIoU_S and mIoU_U over the classes of each group that occur in truth or
    prediction; hIoU their harmonic mean; per_class IoU by class id. NaN means "nothing to score": an
    absent class, or a group without any class that occurs (then hIoU is NaN too).

    Source: method section 8, CLIPTeacher eq. 13.
    """
    iou = 100 * iou_per_class(matrix)
    seen, unseen = _mean(iou[list(seen_ids)]), _mean(iou[list(unseen_ids)])
    return {
        "pAcc": 100 * pixel_accuracy(matrix),
        "mIoU_S": seen,
        "mIoU_U": unseen,
        "hIoU": harmonic_mean(seen, unseen),
        "per_class": {class_id: float(value) for class_id, value in enumerate(iou)},
    }
