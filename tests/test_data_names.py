"""Class lists, named splits, palettes and prompts."""

import numpy as np
import pytest

from pipeline.data import classes
from pipeline.data.base import DataError
from pipeline.data.prompts import TEMPLATES, prompts


@pytest.mark.parametrize(
    ("names", "count", "some"),
    [
        (classes.VOC_CLASSES, 20, {0: "aeroplane", 10: "diningtable", 19: "tvmonitor"}),
        (classes.CONTEXT_CLASSES, 59, {0: "aeroplane", 33: "motorbike", 54: "tvmonitor", 58: "wood"}),
        (classes.COCO_STUFF_CLASSES, 171, {0: "person", 79: "toothbrush", 80: "banner", 170: "wood"}),
    ],
)
def test_class_lists(names, count, some):
    assert len(names) == len(set(names)) == count
    assert {i: names[i] for i in some} == some


@pytest.mark.parametrize(
    ("names", "split", "ids"),
    [
        (classes.VOC_CLASSES, classes.VOC_SPLITS["voc-15-5"], "15 16 17 18 19"),
        (classes.CONTEXT_CLASSES, classes.CONTEXT_SPLITS["context-49-10"], "19 33 48 14 7 24 6 54 31 0"),
        (classes.CONTEXT_CLASSES, classes.CONTEXT_SPLITS["context-49-10-cascade"], "0 2 3 7 9 13 17 19 31 37"),
        (
            classes.COCO_STUFF_CLASSES,
            classes.COCO_STUFF_SPLITS["coco-stuff-156-15"],
            "19 23 28 29 36 51 76 88 94 112 133 136 137 157 160",
        ),
    ],
)
def test_splits_are_the_published_ids(names, split, ids):
    assert [names.index(name) for name in split] == [int(i) for i in ids.split()]


def test_palette_is_vocs_and_distinct():
    # Aeroplane's raw id is 1: bit 0 is red's highest, so 128, 0, 0. Tvmonitor's is 20 = 4 + 16: bit 2 is
    # blue's highest, bit 4 green's second: 0, 64, 128.
    palette = classes.bitwise_palette(20)
    assert palette[0].tolist() == [128, 0, 0]
    assert palette[19].tolist() == [0, 64, 128]
    full = classes.bitwise_palette(255)
    assert full.dtype == np.uint8
    assert len(np.unique(full, axis=0)) == 255
    assert full.any(axis=1).all()


def test_template_sets():
    assert {name: len(found) for name, found in TEMPLATES.items()} == {
        "single": 1,
        "simple7": 7,
        "zegclip15": 15,
        "clip-es": 1,
        "clip80": 80,
    }
    assert all(len(set(found)) == len(found) for found in TEMPLATES.values())
    assert set(TEMPLATES["simple7"]) <= set(TEMPLATES["clip80"])
    for name in TEMPLATES:
        assert all("{" not in prompt for prompt in prompts(name, "zebra"))


def test_prompts():
    assert prompts("single", "wall-brick") == ["a photo of a wall-brick"]
    assert prompts(["{}", "my {}!"], "cat {0}") == ["cat {0}", "my cat {0}!"]
    assert prompts("one {}", "cat") == ["one cat"]


@pytest.mark.parametrize(
    ("templates", "name", "message"),
    [
        ("singel", "cat", "unknown set 'singel'; the nearest valid one is 'single'"),
        ([], "cat", "the list is empty"),
        (["a photo"], "cat", "'a photo' must be text with exactly one {}"),
        (["{} {}"], "cat", "exactly one"),
        ([3], "cat", "3 must be text"),
        ("{c}", "cat", "exactly one"),
        ("single", " ", "class name is blank"),
    ],
)
def test_wrong_prompts(templates, name, message):
    with pytest.raises(DataError, match=message):
        prompts(templates, name)
