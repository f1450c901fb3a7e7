"""Views: drawn once, replayed to the bit."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.ops.labels import IGNORE
from pipeline.ops.views import draw_views, inside, replay_image, replay_labels, token_state, view_of

MEAN = (124, 116, 104)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# --- drawing -------------------------------------------------------------------------------------


def test_first_view_is_the_whole_image_and_the_others_are_squares_on_it():
    boxes = draw_views("voc", "2007_000032", 200, 500, 375, 512)
    assert boxes.dtype == np.float32
    assert boxes[0].tolist() == [0, 0, 500, 375]
    x0, y0, x1, y1 = boxes[1:].T
    side = x1 - x0
    assert (side == y1 - y0).all()
    assert (boxes == np.round(boxes)).all()
    # min(2048 / 500, 512 / 375) = 1.3653 at ratio 1, so a crop is 375 / ratio: 187.5 to 750 source pixels.
    assert side.min() >= 187
    assert side.max() <= 750
    assert side.max() - side.min() > 400
    fits = side <= 375
    assert fits.any()
    assert (~fits).any()
    assert ((x0 >= 0) & (y0 >= 0) & (x1 <= 500) & (y1 <= 375))[fits].all()
    # Larger than the image's height: the whole height is inside the box.
    assert ((y0 <= 0) & (y1 >= 375))[~fits].all()


def test_long_images_are_limited_by_their_long_side():
    # 10 x 4000 at size 128: min(512 / 4000, 128 / 10) = 0.128; a crop is 128 / 0.128 / ratio = 1000 / ratio.
    side = np.diff(draw_views("d", "s", 100, 4000, 10, 128)[1:, [0, 2]]).ravel()
    assert side.min() >= 500
    assert side.max() <= 2000


def test_a_view_depends_on_its_key_alone():
    few, many = draw_views("d", "s", 3, 640, 480, 512), draw_views("d", "s", 9, 640, 480, 512)
    assert (few == many[:3]).all()
    assert (draw_views("d", "t", 3, 640, 480, 512)[1:] != few[1:]).any()
    assert (draw_views("e", "s", 3, 640, 480, 512)[1:] != few[1:]).any()


def test_drawn_boxes_are_the_same_for_ever():
    # A cache stores its boxes, but appended images must be drawn as they would have been.
    drawn = draw_views("voc", "2007_000032", 3, 500, 375, 512).tolist()
    assert drawn == GOLDEN_BOXES


GOLDEN_BOXES = [[0.0, 0.0, 500.0, 375.0], [106.0, 2.0, 326.0, 222.0], [33.0, 161.0, 226.0, 354.0]]


@pytest.mark.parametrize("numbers", [(0, 5, 5, 8), (1, 0, 5, 8), (1, 5, 0, 8), (1, 5, 5, 0)])
def test_draw_refuses_nothing(numbers):
    with pytest.raises(ValueError, match="at least 1"):
        draw_views("d", "s", *numbers)


def test_every_view_has_its_turn():
    assert sorted(view_of("a", epoch, 5) for epoch in range(5)) == [0, 1, 2, 3, 4]
    assert view_of("a", 7, 5) == view_of("a", 2, 5)
    assert len({view_of(str(sample), 0, 5) for sample in range(100)}) == 5  # samples start apart


# --- images --------------------------------------------------------------------------------------


def test_same_size_is_the_image_itself():
    image = noise(16, 16)
    replayed = replay_image(image, (0, 0, 16, 16), 16, MEAN)
    assert replayed.dtype == torch.uint8
    assert replayed.is_contiguous()
    assert (replayed.permute(1, 2, 0).numpy() == image).all()


def test_halving_by_hand():
    # Four columns to two: output 0 is centred at 1.0 and its triangle reaches 2 source pixels, so the pixels
    # centred at 0.5, 1.5, 2.5 weigh 3/4, 3/4, 1/4 of 7/4: (3 * 0 + 3 * 70 + 140) / 7 = 50. Output 1 mirrors
    # it: (70 + 3 * 140 + 3 * 210) / 7 = 160.
    image = np.broadcast_to(np.array([0, 70, 140, 210], np.uint8)[None, :, None], (4, 4, 3))
    replayed = replay_image(image, (0, 0, 4, 4), 2, (0, 0, 0))
    assert replayed[0].tolist() == [[50, 160], [50, 160]]
    assert replay_image(image.swapaxes(0, 1), (0, 0, 4, 4), 2, (9, 9, 9))[0].tolist() == [[50, 50], [160, 160]]


def test_doubling_by_hand():
    # Two columns to four: outputs are centred at 0.25, 0.75, 1.25, 1.75 between pixels 0.5 and 1.5:
    # 0, 3/4 * 0 + 1/4 * 100 = 25, 75, 100 (the outer ones only reach one pixel of the box).
    image = np.broadcast_to(np.array([0, 100], np.uint8)[None, :, None], (2, 2, 3))
    assert replay_image(image, (0, 0, 2, 2), 4, MEAN)[1, 0].tolist() == [0, 25, 75, 100]


def test_padding_takes_part_in_antialiasing():
    # One white pixel, right half of a 2 x 1 box halved to 1 x 1: weights 1/2 and 1/2: (0 + 200) / 2 = 100.
    image = np.full((1, 1, 3), 200, np.uint8)
    assert replay_image(image, (-1, 0, 1, 1), 1, (0, 0, 0)).flatten().tolist() == [100, 100, 100]


boxes = st.tuples(st.integers(-30, 20), st.integers(-30, 20), st.integers(1, 60), st.integers(1, 60))


@settings(max_examples=60, deadline=None)
@given(box=boxes, height=st.integers(1, 30), width=st.integers(1, 30), size=st.sampled_from([1, 5, 16]))
def test_padding_is_what_an_explicitly_padded_image_gives(box, height, width, size):
    x0, y0, w, h = box
    x0, y0 = min(x0, width - 1), min(y0, height - 1)
    w, h = max(w, 1 - x0), max(h, 1 - y0)
    image = noise(height, width)
    padded = np.full((130, 130, 3), MEAN, np.uint8)
    padded[40 : 40 + height, 40 : 40 + width] = image
    expected = replay_image(padded, (x0 + 40, y0 + 40, x0 + 40 + w, y0 + 40 + h), size, MEAN)
    assert torch.equal(replay_image(image, (x0, y0, x0 + w, y0 + h), size, MEAN), expected)


@pytest.mark.parametrize(("height", "width", "size"), [(37, 61, 32), (20, 13, 48), (301, 40, 16), (8, 8, 8)])
def test_agrees_with_torch_antialiased_bilinear(height, width, size):
    image = noise(height, width)
    planes = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    expected = F.interpolate(planes, (size, size), mode="bilinear", antialias=True)[0]
    # Half a level of rounding, and what 2^-14 in the weights can add.
    assert (replay_image(image, (0, 0, width, height), size, MEAN) - expected).abs().max() <= 0.55


def test_a_box_far_larger_than_the_image_costs_nothing_and_shows_it_small():
    image = np.zeros((10, 10, 3), np.uint8)
    replayed = replay_image(image, (-50_000, -50_000, 50_010, 50_010), 64, MEAN)
    assert (replayed == torch.tensor(MEAN, dtype=torch.uint8)[:, None, None]).all()
    strip = noise(2, 40_000)
    assert replay_image(strip, (0, -19_999, 40_000, 20_001), 64, MEAN).shape == (3, 64, 64)


def test_read_only_images_are_fine(recwarn):
    image = noise(8, 8)
    image.setflags(write=False)
    replay_image(image, (0, 0, 8, 8), 8, MEAN)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((0, 0, 4.5, 4), "whole"),
        ((0, 0, float("nan"), 4), "whole"),
        ((4, 0, 4, 4), "empty"),
        ((9, 0, 12, 4), "outside"),
    ],
)
def test_impossible_boxes(box, message):
    with pytest.raises(ValueError, match=message):
        replay_image(noise(8, 8), box, 8, MEAN)


def test_other_images_are_refused():
    with pytest.raises(ValueError, match="uint8 wanted"):
        replay_image(noise(8, 8).astype(np.float32), (0, 0, 8, 8), 8, MEAN)
    for labels in (noise(8, 8), np.zeros((8, 8), np.uint8)):
        with pytest.raises(ValueError, match="int16 wanted"):
            replay_labels(labels, (0, 0, 8, 8), 8)


def replay_hash() -> str:
    """Everything a stage replays, hashed: run here and in another process."""
    digest = hashlib.blake2b()
    image = noise(375, 500, seed=3)
    for box in draw_views("voc", "replay", 5, 500, 375, 128):
        digest.update(box.tobytes())
        digest.update(replay_image(image, box, 128, MEAN).numpy().tobytes())
        digest.update(replay_labels(image[..., 0].astype(np.int16), box, 128).numpy().tobytes())
    digest.update(bytes(view_of("replay", epoch, 5) for epoch in range(5)))
    return digest.hexdigest()


def test_another_process_with_other_threads_replays_the_same_bits():
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "7"}
    code = "import torch, tests.test_views as t; torch.set_num_threads(2); print(t.replay_hash())"
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    other = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    assert other.stdout.strip() == replay_hash()


# --- labels and tokens ---------------------------------------------------------------------------


def test_labels_are_nearest_and_without_a_class_outside():
    labels = np.array([[1, 2], [3, 400]], np.int16)
    assert replay_labels(labels, (0, 0, 2, 2), 4).tolist() == [
        [1, 1, 2, 2],
        [1, 1, 2, 2],
        [3, 3, 400, 400],
        [3, 3, 400, 400],
    ]
    # Box columns -1..0 and rows 0..1: the left half is outside.
    assert replay_labels(labels, (-1, 0, 1, 2), 2).tolist() == [[IGNORE, 1], [IGNORE, 3]]
    assert inside((-1, 0, 1, 2), 2, 2, 2).tolist() == [[False, True], [False, True]]
    # 4 pixels to 2: output centres 1.0 and 3.0 are the edges of pixels 1 and 3, which they belong to.
    row = np.array([[1, 2, 3, 4]], np.int16)
    assert replay_labels(row, (0, 0, 4, 1), 2).tolist() == [[2, 4], [2, 4]]


@settings(max_examples=40, deadline=None)
@given(box=boxes, height=st.integers(1, 30), width=st.integers(1, 30))
def test_labels_are_missing_exactly_outside(box, height, width):
    x0, y0, w, h = box
    corner = (x0, y0, x0 + w, y0 + h)
    labels = np.zeros((height, width), np.int16)
    assert torch.equal(replay_labels(labels, corner, 16) == 0, inside(corner, width, height, 16))


def test_token_state_by_hand():
    # Patches of 2 x 2, four side by side in two rows.
    labels = torch.tensor(
        [
            [0, 0, 0, -1, 0, -1, -1, -1],
            [0, 0, 0, 0, 0, -1, -1, -1],
            [0, -1, -1, -1, -1, -1, -1, -1],
            [0, -1, -1, -1, -1, -1, -1, -1],
            *[[0] * 8] * 4,
        ],
        dtype=torch.int16,
    )
    within = torch.ones(8, 8, dtype=torch.bool)
    within[2:4, 1] = False  # patch (1, 0): two of four pixels outside: padding
    within[2:4, 2:4] = False  # patch (1, 1): all outside
    within[2, 4] = False  # patch (1, 2): one outside, three ignored inside
    assert token_state(labels, within, 2).tolist() == [[0, 0, 1, 1], [2, 2, 1, 1], [0] * 4, [0] * 4]
    assert token_state(None, within, 2).tolist() == [[1, 1, 1, 1], [2, 2, 1, 1], [1] * 4, [1] * 4]


def test_padding_comes_before_ignored_and_too_few_of_both_is_annotated():
    labels = torch.full((2, 2), IGNORE, dtype=torch.int16)
    within = torch.tensor([[True, True], [False, False]])
    assert token_state(labels, within, 2).tolist() == [[2]]  # half outside, half ignored
    labels[0, 1] = 3
    within[1, 0] = True
    labels[1, 0] = 3  # one ignored, two annotated, one outside
    assert token_state(labels, within, 2).tolist() == [[0]]


def test_token_state_refuses_a_patch_that_does_not_divide():
    with pytest.raises(ValueError, match="patches of 3"):
        token_state(None, torch.ones(8, 8, dtype=torch.bool), 3)
