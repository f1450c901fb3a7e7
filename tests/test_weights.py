"""With CLIP's published ViT-B/16: our text features are those that others made of the same prompts.

    python -m pytest -m weights tests/test_weights.py

takes the weights of config/coco_stuff.yaml, from open_clip's cache or downloaded; CLIP_WEIGHTS names a file instead
(ViT-B-16.pt). The reference features are
ZegCLIP's published .npy files, in ../shared/data/clip_vit_b16. Deselected unless asked for; asked for without weights
or reference features, it fails.
"""

import os

import numpy as np
import pytest

from pipeline.config import load
from pipeline.data.classes import COCO_STUFF_CLASSES, VOC_CLASSES
from pipeline.data.prompts import prompts
from pipeline.models.teacher import Teacher
from tests.conftest import ROOT, SHARED

pytestmark = pytest.mark.weights
FOLDER = SHARED / "clip_vit_b16"


@pytest.fixture(scope="module")
def teacher():
    section = load(ROOT / "config" / "coco_stuff.yaml").teacher
    path = os.environ.get("CLIP_WEIGHTS")
    return Teacher.load(
        section.model,
        path or section.pretrained,
        image_size=section.image_size,
        quick_gelu=True if path else section.quick_gelu,
    )


@pytest.mark.parametrize(
    ("name", "classes", "templates"),
    [
        ("voc12_single", VOC_CLASSES, "single"),
        ("coco_single", COCO_STUFF_CLASSES, "single"),
        ("coco_multi", COCO_STUFF_CLASSES, "zegclip15"),
    ],
)
def test_text_features_are_the_published_ones(name, classes, templates, teacher):
    theirs = np.load(FOLDER / f"{name}.npy").astype(np.float32)
    ours = teacher.encode_text([prompts(templates, class_name) for class_name in classes]).numpy()
    assert theirs.shape == ours.shape
    cosine = (ours * theirs).sum(1) / np.linalg.norm(theirs, axis=1)
    assert cosine.min() >= 0.999, f"{classes[int(cosine.argmin())]}: {cosine.min():.4f}"


def test_the_position_embedding_is_the_published_one(teacher):
    """Before it is interpolated for 512 x 512: 14 x 14 patches and CLS, rebuilt at the weights' own size."""
    path = os.environ.get("CLIP_WEIGHTS")
    section = load(ROOT / "config" / "coco_stuff.yaml").teacher
    own = Teacher.load(section.model, path or section.pretrained, image_size=224, quick_gelu=True if path else None)
    theirs = np.load(FOLDER / "vit-b-16-pos_emb_197x768.npy").astype(np.float32)
    ours = own.model.visual.positional_embedding.numpy()
    assert np.allclose(ours, theirs, atol=2e-3)  # float16's rounding
