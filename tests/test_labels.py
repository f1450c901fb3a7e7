"""Label maps in memory and in files."""

import numpy as np
import pytest
import torch

from pipeline.looking.panels import class_panel, error_map, indexed
from pipeline.ops.labels import IGNORE, MOST_CLASSES, cached_dtype, counts, file_dtype, from_file, no_class, to_file
from pipeline.ops.losses import combined_labels


@pytest.mark.parametrize(
    ("num", "bits", "none"),
    [(2, 8, 255), (254, 8, 255), (255, 8, 255), (256, 16, 65535), (257, 16, 65535), (847, 16, 65535)],
)
def test_labels_in_files(num, bits, none):
    labels = np.array([[0, num - 1], [IGNORE, 1]], np.int16)
    stored = to_file(labels, file_dtype(num))
    assert stored.dtype == f"uint{bits}"
    assert stored.tolist() == [[0, num - 1], [none, 1]]
    assert no_class(num) == none
    assert from_file(stored).dtype == np.int16
    assert from_file(stored).tolist() == labels.tolist()


def test_ids_in_the_cache_leave_room_for_the_fill_value():
    assert [cached_dtype(num).itemsize for num in (254, 255, 256)] == [1, 2, 2]  # of 255 classes 254 is one


def test_counts_end_with_the_pixels_without_a_class():
    assert counts(np.array([[2, 0, IGNORE], [2, IGNORE, IGNORE]], np.int16), 4).tolist() == [1, 0, 2, 0, 3]


def test_the_last_id_is_a_class_of_the_loss():
    labels = torch.tensor([[[MOST_CLASSES - 1, 255, IGNORE]]], dtype=torch.int16)
    found = combined_labels(labels, torch.zeros(1, 1, 1, dtype=torch.uint8), [255, MOST_CLASSES - 1])
    assert found.ids.tolist() == [[[1, 0, -100]]]


def test_a_picture_of_many_classes_has_each_its_colour():
    palette = np.random.default_rng(0).integers(0, 256, (300, 3), np.uint8)
    panel = class_panel("", np.array([[299, 7, IGNORE, 255]], np.int16), palette)
    assert panel.pixels.dtype == np.uint8
    assert panel.palette[panel.pixels[0, [0, 1, 3]]].tolist() == palette[[299, 7, 255]].tolist()
    assert panel.pixels[0, 2] == panel.clear == 255
    assert indexed(panel.pixels, panel.palette, panel.clear)
    every = class_panel("", np.repeat(np.arange(300, dtype=np.int16), 2)[None, :-60], palette)
    assert (every.pixels < 255).all()
    assert every.palette[every.pixels[0, -1]].tolist() == [0, 0, 0]  # 270 classes: the last aren't told apart


def test_errors_of_many_classes():
    truth, guess = np.array([[299, 299, 3, 4, IGNORE]], np.int16), np.array([[299, 3, 299, 3, 0]], np.int16)
    assert error_map(truth, guess, [299]).tolist() == [[0, 1, 2, 3, 4]]
