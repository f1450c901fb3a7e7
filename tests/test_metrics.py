"""Scores of small confusion matrices, by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torchmetrics.classification import MulticlassConfusionMatrix

from pipeline.looking.results import result_table
from pipeline.ops import metrics
from pipeline.ops.metrics import harmonic_mean, iou_per_class, pixel_accuracy, summary


def confusion(truth: np.ndarray, prediction: np.ndarray, num_classes: int) -> np.ndarray:
    """From the definition, pixel by pixel: what torchmetrics' matrix is held to."""
    matrix = np.zeros((num_classes, num_classes), np.int64)
    for t, p in zip(truth.ravel().tolist(), prediction.ravel().tolist(), strict=True):
        if t != 255:
            matrix[t, p] += 1
    return matrix


def test_evals_matrix_is_the_definitions():
    # Classes 3 and 4 are nowhere; the second image is all 255; sizes differ.
    rng = np.random.default_rng(0)
    images = [(rng.integers(0, 3, shape), rng.integers(0, 3, shape)) for shape in ((4, 6), (5, 5), (2, 9))]
    images[0][0][:2] = 255
    images[1][0][:] = 255
    theirs = MulticlassConfusionMatrix(5, ignore_index=255)
    for truth, prediction in images:
        theirs.update(torch.from_numpy(prediction), torch.from_numpy(truth))
    assert theirs.compute().tolist() == sum(confusion(t, p, 5) for t, p in images).tolist()


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_summary_by_hand(kind):
    # Rows are truth. Class 0: 6 right, row 8, column 7 -> 6 / 9. Class 1: 2, row 4, column 4 -> 2 / 6.
    # Class 2: 3, row 3, column 4 -> 3 / 4. Class 3 is nowhere. Accuracy (6 + 2 + 3) / 15.
    matrix = kind([[6, 2, 0, 0], [1, 2, 1, 0], [0, 0, 3, 0], [0, 0, 0, 0]])
    assert pixel_accuracy(matrix) == pytest.approx(11 / 15)
    assert iou_per_class(matrix)[:3] == pytest.approx([6 / 9, 2 / 6, 3 / 4])
    result = summary(matrix, seen_ids=[0, 2], unseen_ids=[1, 3])
    seen, unseen = 100 * (6 / 9 + 3 / 4) / 2, 100 * 2 / 6  # class 3 is left out, not counted as 0
    assert result["pAcc"] == pytest.approx(100 * 11 / 15)
    assert result["mIoU_S"] == pytest.approx(seen)
    assert result["mIoU_U"] == pytest.approx(unseen)
    assert result["hIoU"] == pytest.approx(2 * seen * unseen / (seen + unseen))
    assert list(result["per_class"]) == [0, 1, 2, 3]
    assert result["per_class"][2] == pytest.approx(75.0)
    assert math.isnan(result["per_class"][3])


def test_a_class_predicted_but_absent_from_truth_counts_as_zero():
    matrix = np.array([[3, 1], [0, 0]])
    assert iou_per_class(matrix).tolist() == [0.75, 0.0]


def test_the_papers_harmonic_means():
    # Table 1, SegNeXt on VOC: 89.2 and 82.2 give 85.6.
    assert round(harmonic_mean(89.2, 82.2), 1) == 85.6
    assert harmonic_mean(0.0, 0.0) == 0.0
    assert harmonic_mean(50.0, 0.0) == 0.0
    assert summary(np.array([[0, 1], [1, 0]]), [0], [1])["hIoU"] == 0.0


def test_nothing_to_score_is_nan_not_zero():
    result = summary(np.zeros((2, 2), np.int64), [0], [1])
    assert all(math.isnan(result[name]) for name in ("pAcc", "mIoU_S", "mIoU_U", "hIoU"))
    no_unseen = summary(np.eye(2, dtype=np.int64), [0, 1], [])
    assert no_unseen["mIoU_S"] == 100
    assert math.isnan(no_unseen["hIoU"])
    with pytest.raises(ValueError, match="square"):
        iou_per_class(np.zeros((2, 3)))


@given(truth=arrays(np.uint8, 30, elements=st.integers(0, 3)), seed=st.integers(0, 99))
def test_matrices_add_up_and_perfection_is_100(truth, seed):
    prediction = np.random.default_rng(seed).integers(0, 4, 30)
    halves = confusion(truth[:11], prediction[:11], 4) + confusion(truth[11:], prediction[11:], 4)
    assert np.array_equal(halves, confusion(truth, prediction, 4))
    perfect = confusion(truth, truth, 4)
    assert pixel_accuracy(perfect) == 1.0
    assert set(iou_per_class(perfect)[~np.isnan(iou_per_class(perfect))]) == {1.0}


def test_on_how_much_a_score_was_measured():
    # Class 1 is in no truth and predicted once, class 2 is nowhere: both are said.
    scored = summary(np.array([[3, 1, 0], [0, 0, 0], [0, 0, 0]]), [0, 2], [1])["scored"]
    assert scored["seen"] == {"classes": 2, "occur": 1, "scored": 1, "pixels": 4}
    assert scored["unseen"] == {"classes": 1, "occur": 0, "scored": 1, "pixels": 0}
    result = {"pAcc": 1.0, "mIoU_S": 1.0, "mIoU_U": 0.0, "hIoU": 0.0, "gamma": 1, "scored": scored}
    title = result_table({"a": result}).title
    assert "1 of 2 seen, 1 of 1 unseen (1 without a test pixel) classes scored" in title
    both = result_table({"a": result, "b": result | {"scored": None}})
    assert [line[0] for line in both.lines] == ["a (1 of 2 seen, 1 of 1 unseen (1 without a test pixel))", "b"]


def test_many_classes_are_counted_as_few_are(monkeypatch):
    rng = np.random.default_rng(0)
    truth, seen, unseen = (torch.from_numpy(rng.integers(-low, 300, (40, 30))) for low in (1, 0, 0))
    needed = torch.from_numpy(rng.normal(size=(40, 30)).astype(np.float32))
    found = []
    for most in (1, 2**60):  # places are sorted, or all of them counted; in 64 bits, or 32
        monkeypatch.setattr(metrics, "MANY_PLACES", most)
        monkeypatch.setattr(metrics, "MOST_PLACES", most)
        swept = metrics.SweptConfusion(300, (0.0, 0.5), -1)
        for _ in range(2):
            swept.update(truth, seen, unseen, needed)
        found.append([swept.matrix(gamma) for gamma in (0.0, 0.5)])
    assert np.array_equal(*found)
    guess = torch.where(needed < 0.5, unseen, seen)
    pairs = (300 * truth + guess)[truth >= 0]
    assert np.array_equal(found[0][1], 2 * torch.bincount(pairs, minlength=90_000).view(300, 300).numpy())
