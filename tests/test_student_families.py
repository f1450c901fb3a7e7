"""Each family of students learns from real photographs: ten iterations on the CPU, from random weights.

python -m pytest tests/test_student_families.py                  the smallest of each family at 64 x 64: seconds
python -m pytest tests/test_student_families.py -m full_size     those of config/ at 256 x 256: minutes each
"""

import json
import math
import os

import pytest

from pipeline.cluster import cluster
from pipeline.config import load
from pipeline.extract import extract
from pipeline.learning.checkpoint import load_student
from pipeline.train import train
from tests.conftest import ROOT, SHARED, forget_accelerator

pytestmark = pytest.mark.shared_data

FAMILIES = {
    "SegFormer": ("Segformer", "mit_b0", "{decoder_segmentation_channels: 64}"),
    "its free twin": ("Segformer", "tu-pvt_v2_b0", "{decoder_segmentation_channels: 64}"),
    "Swin": (
        "UPerNet",
        "tu-swin_tiny_patch4_window7_224",
        "{img_size: 64, strict_img_size: false, decoder_channels: 64, embed_dim: 48}",
    ),
    "SegNeXt": ("SegNeXt", "mscan_t", "{}"),
    "ConvNeXt": ("UPerNet", "tu-convnext_atto", "{decoder_channels: 64}"),
    "DeepLabV2": ("DeepLabV2", "resnet18", "{}"),
}
ITERATIONS = 10


def settings(runs, size, *more):
    """COCO-Stuff's preset on eight photographs, with the demo's small teacher at size x size."""
    return [
        f"runs={runs}",
        f"data.root={SHARED}/coco_stuff164k",
        "data.limit=8",
        "teacher.model=local-dir:config/demo_teacher",
        "teacher.pretrained=null",
        f"teacher.image_size={size}",
        "text.templates=single",
        "views.num=1",
        f"train.iterations={ITERATIONS}",
        "train.batch=4",
        "train.precision=fp32",
        "train.workers=0",
        "train.lr=5e-5",
        "train.warmup=0",
        "train.photometric=false",
        "train.log_every=1",
        "train.tracker=none",
        "student.encoder_weights=null",
        "student.weights=null",
        *more,
    ]


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """Extracts and clusters once for each size that is asked for; returns settings on that cache."""
    runs, made = tmp_path_factory.mktemp("families"), {}

    def build(size, *more):
        os.chdir(ROOT)
        forget_accelerator()
        if size not in made:
            config = load("config/coco_stuff.yaml", settings(runs, size, f"name=cache-{size}"))
            extract(config)
            cluster(config)
            made[size] = config.cache_path
        return settings(runs, size, f"cache.path={made[size]}", *more)

    return build


def curve_of(config):
    lines = (config.run_path / "train" / "losses.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def learns(config):
    """Every term stays finite, and the loss over eight photographs, seen again and again, goes down."""
    train(config)
    curve = curve_of(config)
    assert len(curve) == ITERATIONS
    terms = ("global", "ce", "focal", "dice", "generate", "total")
    assert all(math.isfinite(line[term]) for line in curve for term in terms)
    first, last = (sum(line["total"] for line in lines) / 3 for lines in (curve[:3], curve[-3:]))
    assert last < 0.8 * first
    load_student(config.run_path / "train" / "student.safetensors")  # it loads from its file alone


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_learns(family, cached):
    arch, encoder, options = FAMILIES[family]
    chosen = (f"student.arch={arch}", f"student.encoder={encoder}", f"student.options={options}")
    config = load("config/coco_stuff.yaml", cached(64, *chosen, f"name={arch}-{encoder}"))
    learns(config)


@pytest.mark.full_size
@pytest.mark.parametrize("preset", ["coco_stuff", "coco_stuff_swin_b", "coco_stuff_segnext_b", "clip_es_coco14"])
def test_a_preset_of_full_size_learns(preset, cached):
    """The students of config/ as they are, at 256 x 256, two images a step."""
    section = load(ROOT / "config" / f"{preset}.yaml").student
    chosen = (f"student.arch={section.arch}", f"student.encoder={section.encoder}")
    options = f"student.options={json.dumps(section.options)}"
    config = load("config/coco_stuff.yaml", cached(256, *chosen, options, "train.batch=2", f"name={preset}"))
    learns(config)
