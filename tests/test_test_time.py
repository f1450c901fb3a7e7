"""Flip and scales at test time: averages of softmax by hand, and students for which they change nothing."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import avg_pool2d

from pipeline.config import ConfigError, Eval, from_mapping
from pipeline.learning.inference import best_by_group, class_logits, predicted


class Student(nn.Module):
    """What a student is to inference: something with a device that makes (B, C, S / 4, S / 4) of images."""

    def __init__(self, dense):
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))
        self.dense, self.sides = dense, []

    def forward(self, images):
        self.sides.append(tuple(images.shape[2:]))
        return self.dense(images)


def halves(images):
    """Two channels whatever the image: 2 and 0 in the left half, 0 and 0 in the right one."""
    side = images.shape[3] // 4
    dense = torch.zeros(len(images), 2, side, side)
    dense[:, 0, :, : side // 2] = 2.0
    return dense


def by_size(images):
    """Two channels, the first one a thirty-second of the input's side."""
    side = images.shape[3] // 4
    return torch.tensor([images.shape[3] / 32, 0.0]).view(1, 2, 1, 1).expand(len(images), 2, side, side)


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_flip_by_hand(mode):
    # The outermost column is 2, 0 as it is, softmax e^2 / (e^2 + 1) = 0.8808, and 0, 0 mirrored, softmax 0.5: their
    # mean is 0.6904. On the right it is the other way round. The picture is one window wide in both modes.
    image = np.zeros((32, 32, 3), np.uint8)
    logs = class_logits(Student(halves), torch.eye(2), image, 32, Eval(mode=mode, flip=True))
    assert logs.shape == (2, 32, 32)
    wanted = (math.e**2 / (math.e**2 + 1) + 0.5) / 2
    for column in (0, 31):
        assert torch.allclose(logs[:, :, column].exp(), torch.tensor([[wanted], [1 - wanted]]))


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_scales_by_hand(mode):
    # An image of 64 x 64 at scales 0.5 and 1: the student sees 32 and 64 pixels and says 1, 0 and 2, 0.
    student, image = Student(by_size), np.zeros((64, 64, 3), np.uint8)
    logs = class_logits(student, torch.eye(2), image, 64, Eval(mode=mode, scales=(0.5, 1)))
    assert student.sides == [(32, 32), (64, 64)]
    mean = (math.e / (math.e + 1) + math.e**2 / (math.e**2 + 1)) / 2
    assert torch.allclose(logs.exp(), torch.tensor([mean, 1 - mean])[:, None, None].expand(2, 64, 64))


def test_windows_keep_their_side_where_the_image_grows():
    # The short side 32 becomes 64, the long one 96: windows of 32, half a window apart, at 0, 16, 32 by 0, ..., 64.
    student, image = Student(by_size), np.zeros((32, 48, 3), np.uint8)
    class_logits(student, torch.eye(2), image, 32, Eval(mode="slide", stride=0.5, scales=(2,)))
    assert student.sides == [(32, 32)] * 3 * 5


def test_sides_are_multiples_of_32_but_at_scale_1():
    # 40 * 0.75 = 30 -> 32, 40 * 0.1 = 4 -> 32, 40 * 1.25 = 50 -> 64 (1.56 thirty-twos).
    student, image = Student(by_size), np.zeros((40, 40, 3), np.uint8)
    class_logits(student, torch.eye(2), image, 40, Eval(scales=(0.75, 0.1, 1, 1.25)))
    assert student.sides == [(32, 32), (32, 32), (40, 40), (64, 64)]


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_a_student_that_mirrors_with_its_image_predicts_the_same(mode):
    """Means of 4 x 4 pixels: mirrored, the mirrored means. Windows at 0, 16, 32 are symmetric too."""
    student = Student(lambda images: avg_pool2d(images.float(), 4) / 64)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    once, both = (
        class_logits(student, torch.eye(3), pixels, 32, Eval(mode=mode, stride=0.5, flip=flip))
        for flip in (False, True)
    )
    torch.testing.assert_close(both, once.log_softmax(0), atol=1e-5, rtol=1e-5)
    plain, averaged = (best_by_group(logits, [0, 2], [1]) for logits in (once, both))
    torch.testing.assert_close(plain[2], averaged[2], atol=1e-5, rtol=1e-5)  # so gamma means the same
    for gamma in (0.0, 0.5, 1.5):
        is_same = predicted(plain, gamma) == predicted(averaged, gamma)
        assert (is_same | ((plain[2] - gamma).abs() < 1e-5)).all()


def test_one_sight_is_not_averaged():
    student, image = Student(halves), np.zeros((32, 32, 3), np.uint8)
    plain = class_logits(student, torch.eye(2), image, 32, Eval())
    assert torch.equal(plain, class_logits(student, torch.eye(2), image, 32, Eval(scales=(1,))))
    assert plain[0, 0, 0] == 2.0  # logits, not logarithms of a softmax


def test_a_scale_of_nothing():
    with pytest.raises(ConfigError, match=r"eval.scales.1 = 0: input should be greater than 0"):
        from_mapping({"eval": {"scales": [1, 0]}})
