"""Photometric distortion against its definition, pixel by pixel: bytes as mmseg has them, HSV as Python's colorsys."""

import colorsys
import math

import numpy as np
import pytest
import torch

from pipeline.learning.batches import BRIGHTNESS, CONTRAST, HUE, SATURATION, distorted, saturated, turned


def of(*pixels):
    """(3, 1, n) float32 of RGB pixels."""
    return torch.tensor(pixels, dtype=torch.float32).T[:, None]


def pixels_of(values):
    return [tuple(float(x) for x in pixel) for pixel in values[:, 0].T]


def test_saturation_is_that_of_hsv_by_hand():
    # (200, 100, 50): V 200, S = 150/200. Times 0.5: the distances from V, 0, 100 and 150, are halved; blending with
    # grey (ITU-R 601: 124.2) would give (162.1, 112.1, 87.1). Times 2: S = 1.5, cut to 1: distances times 200/150.
    assert pixels_of(saturated(of((200, 100, 50), (0, 0, 0), (7, 7, 7)), 0.5)) == [
        (200, 150, 125),
        (0, 0, 0),
        (7, 7, 7),
    ]
    assert pixels_of(saturated(of((200, 100, 50)), 2.0))[0] == pytest.approx((200, 200 - 400 / 3, 0), abs=1e-4)


def test_hue_by_hand():
    # Red, a third of a turn on, is green; half a sixth on from it, as much red as half the value.
    assert pixels_of(turned(of((240, 0, 0), (30, 30, 30)), 1 / 3)) == [
        pytest.approx((0, 240, 0), abs=1e-3),
        (30, 30, 30),
    ]
    assert pixels_of(turned(of((240, 0, 0)), 1 / 12))[0] == pytest.approx((240, 120, 0), abs=1e-3)
    assert pixels_of(turned(of((240, 0, 0)), -1 / 12))[0] == pytest.approx((240, 0, 120), abs=1e-3)


def test_brightness_is_clipped_before_contrast():
    """250 + 30 is 255, not 280, times 0.5: 127.5, cut to 127."""

    class Drawn:
        """Brightness +30, contrast first and 0.5, nothing else."""

        coins = iter((0.1, 0.1, 0.1, 0.9, 0.9))
        values = iter((30.0, 0.5))

        def random(self):
            return next(self.coins)

        def uniform(self, low, high):
            return next(self.values)

    image = torch.full((3, 1, 1), 250, dtype=torch.uint8)
    assert distorted(image, Drawn()).flatten().tolist() == [127, 127, 127]


def by_definition(pixel, rng):
    """One pixel, with Python's own HSV, from the same draws."""
    r, g, b = map(float, pixel)
    byte = lambda x: math.floor(min(max(x, 0.0), 255.0))  # noqa: E731
    if rng.random() < 0.5:
        delta = rng.uniform(-BRIGHTNESS, BRIGHTNESS)
        r, g, b = (byte(x + delta) for x in (r, g, b))
    contrast_first = rng.random() < 0.5
    contrast = rng.uniform(*CONTRAST) if rng.random() < 0.5 else 1.0
    if contrast_first:
        r, g, b = (byte(x * contrast) for x in (r, g, b))
    hue, saturation, value = colorsys.rgb_to_hsv(r / 255, g / 255, b / 255)
    if rng.random() < 0.5:
        saturation = min(saturation * rng.uniform(*SATURATION), 1.0)
    if rng.random() < 0.5:
        hue = (hue + rng.uniform(-HUE, HUE)) % 1
    r, g, b = (round(255 * x) for x in colorsys.hsv_to_rgb(hue, saturation, value))
    return (r, g, b) if contrast_first else tuple(byte(x * contrast) for x in (r, g, b))


def test_it_is_its_definition_on_every_pixel():
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 8, 8), np.uint8))
    image[:, 0, :4] = torch.tensor([[0, 255, 7, 128]] * 3, dtype=torch.uint8)  # greys
    changed = 0
    for seed in range(40):  # of 32 ways to combine the parts
        found = distorted(image, np.random.default_rng(seed))
        assert found.dtype == torch.uint8
        for y in range(8):
            for x in range(8):
                wanted = by_definition(image[:, y, x].tolist(), np.random.default_rng(seed))
                # A value on the edge between two whole numbers may fall on either side.
                assert np.abs(np.subtract(found[:, y, x].tolist(), wanted)).max() <= 1, (seed, y, x)
                changed += found[:, y, x].tolist() != list(wanted)
    assert changed < 0.01 * 40 * 64
