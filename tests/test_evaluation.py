"""Evaluation's short cuts against the plain definition: enlarge every plane, take the best, count every gamma."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import interpolate
from torchmetrics.classification import MulticlassConfusionMatrix

from pipeline.config import Eval, Student
from pipeline.learning.inference import best_by_group, best_classes, class_logits, dense_logits, predicted, squashed
from pipeline.learning.text import stacked
from pipeline.models.student import build_student
from pipeline.ops import enlarge
from pipeline.ops.metrics import SweptConfusion
from pipeline.ops.views import replay_image

GAMMAS = (0.0, 0.5, 1.5, 4.0)


def plain(scores, size):
    planes = interpolate(scores.permute(2, 0, 1)[None], size, mode="bilinear", align_corners=False)[0]
    return planes.max(0)


def test_best_enlarged_by_hand():
    # One row of two cells' corners, two classes: class 0 is 8, 0, 0, class 1 is 0, 4, 4; twice as wide, so the
    # pixels lie at 0 (edge), 1/4, 3/4, 5/4, 7/4, 2 (edge): class 0 is 8, 6, 2, 0, 0, 0 and class 1 0, 1, 3, 4, 4, 4.
    row = torch.tensor([[8.0, 0.0], [0.0, 4.0], [0.0, 4.0]])  # (w, K)
    scores = torch.cat([row, row.new_full((3, 30), -9.0)], 1)[None].repeat(2, 1, 1)  # and 30 that never win
    assert scores.shape[2] > enlarge.FEW
    values, classes = enlarge.best_enlarged(scores, (2, 6))
    assert values.tolist() == [[8, 6, 3, 4, 4, 4]] * 2
    assert classes.tolist() == [[0, 0, 1, 1, 1, 1]] * 2


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), few=st.booleans(), spread=st.sampled_from([1, 3, 40]))
def test_best_enlarged_is_the_definition_at_ties_too(seed, few, spread):
    """Whole numbers and weights of eighths and sixteenths: float32 is exact, and equal logits abound."""
    rng = np.random.default_rng(seed)
    num = int(rng.integers(1, enlarge.FEW)) if few else enlarge.FEW + int(rng.integers(1, 9))
    height, width = (int(side) for side in rng.integers(1, 7, 2))
    scores = torch.from_numpy(rng.integers(-spread, spread + 1, (height, width, num))).float()
    size = tuple(int(side * 2 ** rng.integers(0, 4)) for side in (height, width))
    values, classes = enlarge.best_enlarged(scores, size)
    wanted_values, wanted = plain(scores, size)
    assert torch.equal(values, wanted_values)
    assert torch.equal(classes, wanted)


@pytest.mark.parametrize("size", [(37, 53), (9, 100), (3, 5)])
def test_best_enlarged_to_any_size(size):
    scores = torch.randn(9, 11, 40, generator=torch.Generator().manual_seed(0))
    values, classes = enlarge.best_enlarged(scores, size)
    planes = interpolate(scores.permute(2, 0, 1)[None], size, mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(values, planes.amax(0), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(planes.gather(0, classes[None])[0], planes.amax(0), atol=2e-6, rtol=0)


def test_a_student_that_says_nan_is_scored_all_the_same():
    scores = torch.full((4, 4, 30), torch.nan)
    values, classes = enlarge.best_enlarged(scores, (8, 8))
    assert values.isnan().all()
    assert 0 <= classes.min() <= classes.max() < 30


def test_swept_matrices_are_those_of_every_gamma_alone():
    generator = torch.Generator().manual_seed(1)
    swept = SweptConfusion(7, GAMMAS, 255)
    theirs = {gamma: MulticlassConfusionMatrix(7, ignore_index=255) for gamma in GAMMAS}
    for size in ((5, 9), (8, 3), (40, 40)):
        logits = torch.randint(-8, 9, (7, *size), generator=generator) / 2.0  # needed is often just a gamma
        best = best_by_group(logits, [0, 2, 3, 6], [1, 4, 5])
        truth = torch.randint(0, 8, size, generator=generator).to(torch.uint8)
        truth[truth == 7] = 255
        swept.update(truth, *best)
        for gamma, matrix in theirs.items():
            matrix.update(predicted(best, gamma), truth.long())
    for gamma, matrix in theirs.items():
        assert swept.matrix(gamma).tolist() == matrix.compute().tolist()


def test_a_true_class_that_is_not_there():
    swept, ids = SweptConfusion(3, GAMMAS, 255), torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="true classes 1 to 9, of 3 classes"):
        swept.update(torch.tensor([[1, 9]], dtype=torch.uint8), ids, ids, torch.zeros(1, 2))


def test_the_best_of_a_classes_names_counts_by_hand():
    dense = torch.tensor([[3.0, 1.0], [1.0, 3.0]]).view(1, 2, 1, 2)  # 3, 1 at the left, 1, 3 at the right
    text = stacked([[torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])], [torch.tensor([0.6, 0.8])]])
    assert text.shape == (2, 2, 2)
    # Of class 0 one name says 3 and 1, the other 1 and 3; their mean would say 2 and lose to class 1's 2.6 and 3.
    found = dense_logits(dense, text)
    torch.testing.assert_close(found, torch.tensor([[3.0, 3.0], [2.6, 3.0]]).view(1, 2, 1, 2))
    one = [[torch.tensor([1.0, 0.0])], [torch.tensor([0.6, 0.8])]]
    assert stacked(one).shape == (2, 2)


@pytest.mark.parametrize("names", [1, 3])
@pytest.mark.parametrize(("seen", "unseen"), [([0, 2, 3], [1, 4]), ([0, 1, 2, 3, 4], []), ([], [0, 1, 2, 3, 4])])
def test_best_classes_of_a_batch_are_those_of_class_logits(names, seen, unseen):
    student = build_student(Student(encoder="tu-resnet10t", encoder_weights=None, arch="FPN"), 16).eval()
    generator = torch.Generator().manual_seed(2)
    text = torch.randn(5, names, 16, generator=generator)
    text = text[:, 0] if names == 1 else text
    images = [
        torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=generator).numpy()
        for size in ((64, 64), (50, 90))
    ]
    views = torch.stack([squashed(image, 64) for image in images])
    assert torch.equal(views[0], replay_image(images[0], (0, 0, 64, 64), 64, (9, 9, 9)))
    found = best_classes(student, text, views, [image.shape[:2] for image in images], seen, unseen)
    for image, best in zip(images, found, strict=True):
        logits = class_logits(student, text, image, 64, Eval())
        torch.testing.assert_close(best[2], best_by_group(logits, seen, unseen)[2], atol=1e-4, rtol=1e-4)
        for gamma in GAMMAS:
            added = logits.clone()
            added[unseen] += gamma
            chosen = added.gather(0, predicted(best, gamma)[None])[0]
            torch.testing.assert_close(chosen, added.amax(0), atol=1e-4, rtol=1e-4)
