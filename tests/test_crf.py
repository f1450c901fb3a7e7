"""The dense CRF: against mean field with exact kernels, by hand, in several processes, and without its package.

Tests with the mark `crf` need the package pydensecrf2; where it is missing they fail, and `make test` leaves
them out by their mark.
"""

import os
import sys

import numpy as np
import pytest

from pipeline.config import UserError
from pipeline.teaching import crf


def mean_field(image, scores, rounds, near=(1, 3), like=(67, 3, 4)):
    """Every pixel with every other, the Gaussian kernels as they are defined, normalised by rows and columns."""
    num, height, width = scores.shape
    y, x = np.mgrid[:height, :width]
    place = np.stack([y, x], -1).reshape(-1, 2).astype(np.float64)
    colour = image.transpose(1, 2, 0).reshape(-1, 3).astype(np.float64)

    def normalised(features):
        distance = ((features[:, None] - features[None]) ** 2).sum(-1)
        kernel = np.exp(-distance / 2)
        weight = kernel.sum(1) ** -0.5
        return weight[:, None] * kernel * weight

    by_place = normalised(place / near[0])
    by_both = normalised(np.concatenate([place / like[0], colour / like[1]], 1))
    log = np.log(np.clip(scores, 1e-5, 1)).reshape(num, -1)
    found = scores.reshape(num, -1) / scores.reshape(num, -1).sum(0)
    for _ in range(rounds):
        energy = log + near[1] * found @ by_place + like[2] * found @ by_both
        found = np.exp(energy - energy.max(0))
        found /= found.sum(0)
    return found.reshape(scores.shape)


def ramp():
    """12 x 100 pixels: a slow ramp of red, a step of blue, some noise; unsure scores of background and two classes."""
    generator = np.random.default_rng(0)
    image = np.full((3, 12, 100), 60)
    image[0] += np.arange(100) // 3
    image[2, :, 70:] += 60
    image = (image + generator.integers(-2, 3, image.shape)).astype(np.uint8)
    scores = generator.uniform(0.2, 0.6, (3, 12, 100))
    scores[1, :, :40] += 0.1
    scores[2, :, 40:] += 0.1
    return image, (scores / scores.sum(0)).astype(np.float32)


def band():
    """3 x 100 pixels of one colour, the class at one end and the background at the other: distance alone counts."""
    share = np.linspace(0.2, 0.8, 100, dtype=np.float32)
    scores = np.stack([share, 1 - share])[:, None].repeat(3, 1)
    return np.full((3, 3, 100), 80, np.uint8), scores


# One constant changed at a time: mean field with it must be farther off, or the comparison sees nothing.
OTHER = {
    "near pixels": {"near": (2, 3)},
    "near weight": {"near": (1, 2.5)},
    "like pixels": {"like": (50, 3, 4)},
    "like levels": {"like": (67, 5, 4)},
    "like weight": {"like": (67, 3, 3.5)},
    "rounds": {"rounds": 2},
}
NEAR_ENOUGH = 0.003  # mean difference of a probability: the package's kernels are approximations


@pytest.mark.crf
def test_one_round_is_mean_field_with_these_constants(monkeypatch):
    monkeypatch.setattr(crf, "ROUNDS", 1)
    pairs = [ramp(), band()]
    found = [crf.refine(*pair) for pair in pairs]

    def apart(**constants):
        exact = [mean_field(*pair, **({"rounds": 1} | constants)) for pair in pairs]
        return max(np.abs(one - other).mean() for one, other in zip(found, exact, strict=True))

    assert apart() < NEAR_ENOUGH
    assert {name for name, other in OTHER.items() if apart(**other) < NEAR_ENOUGH} == set()


@pytest.mark.crf
def test_ten_rounds_are_mean_field():
    found, exact = crf.refine(*ramp()), mean_field(*ramp(), rounds=10)
    assert (found.argmax(0) == exact.argmax(0)).mean() > 0.99
    assert np.abs(found - exact).mean() < 2 * NEAR_ENOUGH
    assert np.allclose(found.sum(0), 1, atol=1e-5)
    assert (found.dtype, found.shape) == (np.float32, (3, 12, 100))


@pytest.mark.crf
def test_two_pixels_by_hand(monkeypatch):
    """One round on two pixels of one colour, side by side: probabilities 0.9 and 0.4 of the first class.

    Distance 1: near exp(-1/2) = 0.6065, rows sum to 1.6065: weights 0.6225 and 0.3775; like exp(-1/8978) = 0.9999:
    0.5 and 0.5. What is said in favour of the first class over the second, 0.8 and -0.2:
    first pixel  ln 9 + 3 (0.6225 * 0.8 - 0.3775 * 0.2) + 4 * 0.3 = 2.1972 + 1.2675 + 1.2 = 4.6647,
    second      ln 2/3 + 3 (0.3775 * 0.8 - 0.6225 * 0.2) + 4 * 0.3 = -0.4055 + 0.5325 + 1.2 = 1.3270;
    1 / (1 + exp(-4.6647)) = 0.9907 and 1 / (1 + exp(-1.3270)) = 0.7903.
    """
    monkeypatch.setattr(crf, "ROUNDS", 1)
    image = np.full((3, 1, 2), 80, np.uint8)
    scores = np.array([[[0.9, 0.4]], [[0.1, 0.6]]], np.float32)
    assert mean_field(image, scores, 1)[0].ravel() == pytest.approx([0.9907, 0.7903], abs=1e-4)
    assert crf.refine(image, scores)[0].ravel() == pytest.approx([0.9907, 0.7903], abs=0.03)
    monkeypatch.setattr(crf, "ROUNDS", 0)
    assert np.allclose(crf.refine(image, scores), scores)


@pytest.mark.crf
def test_the_image_is_taken_as_it_is():
    """Colours 122 and 124 lie on either side of a mean of 123: subtracted and cast to bytes they'd be 255 and 1."""
    image = np.full((3, 8, 20), 122, np.uint8)
    image[:, :, 10:] = 124
    scores = np.empty((2, 8, 20), np.float32)
    scores[0, :, :10], scores[0, :, 10:] = 0.9, 0.4
    scores[1] = 1 - scores[0]
    found = crf.refine(image, scores)
    assert (found[0] > 0.99).all()  # less than a deviation apart: the sure half convinces the other
    wrapped = crf.refine((image.astype(int) - 123).astype(np.uint8), scores)
    assert (wrapped[0, :, 10:] < 0.01).all()  # far apart: it doesn't
    image.setflags(write=False)
    assert np.array_equal(crf.refine(image, scores), found)


@pytest.mark.crf
def test_several_processes_give_the_same_in_order():
    image, scores = ramp()
    pairs = [(image[:, :, start:], scores[:, :, start:]) for start in range(0, 60, 10)]
    taken = []

    def counted():
        for place, pair in enumerate(pairs):
            taken.append(place)
            yield pair

    several = crf.refine_all(counted(), processes=2)
    first = next(several)
    assert len(taken) <= 5  # not all are held at once
    one = list(crf.refine_all(pairs, processes=1))
    for got, wanted in zip([first, *several], one, strict=True):
        assert np.array_equal(got, wanted)


@pytest.mark.crf
def test_a_process_that_is_killed_is_one_line(monkeypatch):
    monkeypatch.setattr(crf, "refine", _dies)
    with pytest.raises(UserError, match="fewer cores"):
        list(crf.refine_all([band()] * 3, processes=2))


def _dies(image, scores):
    os._exit(9)


@pytest.mark.crf
def test_what_it_wants_and_a_single_class():
    image, scores = band()
    assert np.array_equal(crf.refine(image, np.zeros((1, 3, 100), np.float32)), np.ones((1, 3, 100)))
    for wrong, word in (
        ((image, scores[:, :, 1:]), "one size"),
        ((image, scores[:0]), "at least one class"),
        ((image.astype(np.float32), scores), "uint8 wanted"),
        ((image, scores * 3), "0 to 1 wanted"),
        ((image, scores * np.nan), "0 to 1 wanted"),
    ):
        with pytest.raises(ValueError, match=word):
            crf.refine(*wrong)


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    monkeypatch.delitem(sys.modules, "pydensecrf.densecrf", raising=False)
    with pytest.raises(UserError, match=r"is not installed.*pip install.*pamr") as found:
        crf.required()
    assert "\n" not in str(found.value)
    with pytest.raises(UserError, match="is not installed"):
        list(crf.refine_all([]))  # before the first image is asked for


def test_a_package_that_cant_be_loaded_says_why(monkeypatch, tmp_path):
    (tmp_path / "pydensecrf").mkdir()
    (tmp_path / "pydensecrf" / "__init__.py").touch()
    (tmp_path / "pydensecrf" / "densecrf.py").write_text("raise ImportError('libX.so: undefined symbol')")
    for name in ("pydensecrf", "pydensecrf.densecrf", "pydensecrf.eigen"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"can't be loaded \(libX.so: undefined symbol\)"):
        crf.required()
    for name in ("pydensecrf", "pydensecrf.densecrf"):
        sys.modules.pop(name, None)
