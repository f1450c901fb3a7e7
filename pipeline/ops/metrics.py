"""Segmentation scores, all from one confusion matrix over the whole test set.

Axes: K classes (seen and unseen together). matrix[t, p] counts pixels of true class t predicted as p, as
torchmetrics counts them. Per-image averages are another benchmark: add matrices up, then score once.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Matrix = Tensor | NDArray
MANY_PLACES = 2**20  # of truth, class and gamma: above, an image's few are sorted, below all are counted
MOST_PLACES = 2**31 - 1  # of 32 bits


def _counts(matrix: Matrix) -> NDArray:
    counts = matrix.detach().cpu().numpy() if isinstance(matrix, Tensor) else np.asarray(matrix)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
        raise ValueError(f"a confusion matrix is square; this one is {counts.shape}.")
    return counts.astype(np.float64)


class SweptConfusion:
    """The confusion matrix for each of several gammas, from one count of every image.

    A pixel's prediction changes once along gamma: from its best seen class to its best unseen one, at the first
    gamma above what the unseen one lacks; at a tie it stays with the seen one. So pixels are counted by truth,
    class and that gamma's place.
    """

    def __init__(self, num_classes: int, gammas: Sequence[float], ignore: int) -> None:
        self.num_classes, self.gammas, self.ignore = num_classes, sorted({*gammas}), ignore
        shape = (num_classes, num_classes, len(self.gammas) + 1)  # the last place: never
        self.seen, self.unseen = np.zeros(shape, np.int64), np.zeros(shape, np.int64)

    def update(self, truth: Tensor, seen: Tensor, unseen: Tensor, needed: Tensor) -> None:
        """Counts an image: ids of its true, best seen and best unseen classes, and the gamma that must be passed.

        Shapes: all (H, W), integers but for `needed`, float32.
        Raises: ValueError for a true class that isn't there.
        """
        turn = torch.bucketize(needed, torch.tensor(self.gammas), right=True, out_int32=True)
        truth = truth.to(torch.int32).flatten()
        row = truth.where(truth != self.ignore, self.num_classes)  # ignored pixels in a row that is cut off
        if row.numel() and not 0 <= int(row.min()) <= int(row.max()) <= self.num_classes:
            raise ValueError(f"true classes {int(row.min())} to {int(row.max())}, of {self.num_classes} classes.")
        places = len(self.gammas) + 1
        if self.seen.size + self.seen[0].size > MOST_PLACES:
            row = row.long()
        row = row * (self.num_classes * places) + turn.flatten()
        can_turn = (turn.flatten() < len(self.gammas)).nonzero()[:, 0]  # elsewhere the unseen one never wins
        self._count(self.seen, row + seen.flatten().to(torch.int32) * places)
        chosen = unseen.flatten().index_select(0, can_turn).to(torch.int32)
        self._count(self.unseen, row.index_select(0, can_turn) + chosen * places)

    @staticmethod
    def _count(counts: NDArray, places: Tensor) -> None:
        if counts.size > MANY_PLACES:
            found, num = torch.unique(places, return_counts=True)
            is_known = found < counts.size
            counts.reshape(-1)[found[is_known].numpy()] += num[is_known].numpy()
        else:
            found = torch.bincount(places, minlength=counts.size + counts[0].size)[: counts.size]
            counts += found.view(counts.shape).numpy()

    def matrix(self, gamma: float) -> NDArray:
        """(K, K) int64, rows truth, of one of the gammas."""
        place = self.gammas.index(gamma)
        seen, unseen = self.seen[:, :, place + 1 :], self.unseen[:, :, : place + 1]
        return np.asarray(seen.sum(2) + unseen.sum(2))


def class_accuracy(matrix: Matrix) -> NDArray:
    """Share of each class's own pixels that is predicted right, 0..1, NaN for a class without pixels: (K,)."""
    counts = _counts(matrix)
    pixels = counts.sum(1)
    return np.divide(counts.diagonal(), pixels, out=np.full(len(counts), np.nan), where=pixels > 0)


def image_iou(truth: NDArray, prediction: NDArray, num_classes: int, ignore: int) -> float:
    """Mean IoU of one image over the classes of its truth or prediction, 0..1; NaN without a labelled pixel.

    To find images by; the benchmark's mIoU is no mean of these.
    Shapes: class ids, both (H, W).
    """
    truth, prediction = truth.ravel(), prediction.ravel()
    is_known = truth != ignore
    truth, prediction = truth[is_known], prediction[is_known]
    right, true, said = (
        np.bincount(ids, minlength=num_classes) for ids in (truth[truth == prediction], truth, prediction)
    )
    union = true + said - right
    return _mean(np.divide(right, union, out=np.full(num_classes, np.nan), where=union > 0))


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
    absent class, or a group without any class that occurs (then hIoU is NaN too). scored says on how
    much this was measured: of each group its classes, how many of them occur in truth and how many have
    an IoU (0 if only predicted), and the pixels whose true class is in it.

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
        "scored": {
            group: {
                "classes": len(ids),
                "occur": int((_counts(matrix)[list(ids)].sum(1) > 0).sum()),
                "scored": int((~np.isnan(iou[list(ids)])).sum()),
                "pixels": int(_counts(matrix)[list(ids)].sum()),
            }
            for group, ids in (("seen", seen_ids), ("unseen", unseen_ids))
        },
    }
