"""doctor: costs by hand, and data sets with the usual faults, each named."""

import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline.config import Student, Train, load
from pipeline.data.base import open_data_set
from pipeline.data.survey import Seen, complaints, count_complaint, look
from pipeline.looking.forecast import array_bytes, flops_of_training, forecast, num_forwards
from pipeline.models.student import StudentCost, cost_of
from pipeline.models.teacher import TeacherShape, flops_of_a_view, flops_of_cams, shape_of
from tests.conftest import ROOT, is_one_line_error

CLASSES = ["grass", "path", "flower", "gnome"]


def test_bytes_by_hand():
    """70 samples of 2 views: values, 4 bytes of crc a sample, two indices of 64 x 16 + 4, 1,200 of zarr.json."""
    sizes = {"N": 70, "V": 2, "C": 8, "h": 4, "w": 4}
    overhead = 70 * 4 + 2 * (64 * 16 + 4) + 1200
    assert array_bytes("cls", sizes) == 70 * 2 * 8 * 2 + overhead
    assert array_bytes("tokens", sizes) == 70 * 2 * 16 * 8 * 2 + overhead
    assert array_bytes("tokens", sizes, "int8") == 70 * 2 * 16 * 8 + overhead
    assert array_bytes("token_scale", sizes) == 70 * 2 * 16 * 4 + overhead
    assert array_bytes("pseudo", sizes) == pytest.approx(0.17 * 70 * 2 * 16 + overhead)
    # status: one chunk and one index entry a shard, the last filled up
    assert array_bytes("status", sizes) == 2 * 64 + 2 * 4 + 2 * (16 + 4) + 1200


def test_forwards_by_hand():
    # 70 images of 3 views, batch 16: 64 x 3 = 192 are 12 batches, 6 x 3 = 18 are 2.
    assert num_forwards(70, 3, 16) == 14
    assert num_forwards(64, 1, 64) == 1


def test_the_papers_teacher_from_its_description():
    shape = shape_of("ViT-B-16-quickgelu", "openai")
    assert (shape.channels, shape.patch, shape.width, shape.layers, shape.weights) == (512, 16, 768, 12, None)
    # 24 x (12 x 768^2 x 1025 + 2 x 1025^2 x 768) = 24 x (7.2549e9 + 1.6138e9)
    assert flops_of_a_view(shape, 32) == pytest.approx(212.85e9, rel=1e-4)


def test_cams_by_hand(run_cli):
    # Width 1, two layers, one patch token, so two positions: a block is 2 x (12 x 2 + 2 x 4) = 64; forward and one
    # backward of a block are three of them, and the affinity's square is 2.
    assert flops_of_cams(TeacherShape(1, 1, 1, 2, 1, None), 1, 1) == 3 * 64 + 2
    done = run_cli("doctor", "--dry", "--config", "config/clip_es_voc.yaml")
    # (12 + 3) x 17.74 GFLOP + 2 x 1024^3 = 268.2 GFLOP an image of 512 x 512; an A100 in float32, 6.825 TFLOP/s
    assert "cams: 10,582 images of 512 x 512 with 3 classes each, 268 GFLOP an image; 6.93 minutes" in done.stderr


@pytest.mark.parametrize(("tokens", "budget"), [("float16", 1_060_000), ("int8", 540_000), ("stream", 2_600)])
def test_the_papers_caches_keep_to_their_budgets(tokens, budget):
    config = load(ROOT / "config" / "coco_stuff.yaml")
    shape = shape_of(config.teacher.model, config.teacher.pretrained)
    cost = forecast(config, shape, 118_287, 171, tokens)
    assert 0.45 * budget < cost.per_view < budget
    assert cost.total == pytest.approx(cost.per_view * 118_287 * 4, rel=0.05)


@pytest.fixture
def garden(tmp_path):
    """Builds a folder data set whose masks `mask_of(part, index)` gives, (8, 8) raw ids."""

    def build(mask_of, **described):
        for part in ("train", "test"):
            (tmp_path / part).mkdir()
            for index in range(10):
                rng = np.random.default_rng([index, part == "test"])
                image = Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8))
                image.save(tmp_path / part / f"{index}.jpg")
                Image.fromarray(mask_of(part, index).astype(np.uint8)).save(tmp_path / part / f"{index}.png")
        text = {"name": "garden", "classes": CLASSES, "unseen": ["gnome"]} | described
        text |= {p: {"images": f"{p}/*.jpg", "masks": f"{p}/*.png"} for p in ("train", "test")} | {
            key: value for key, value in described.items() if key in ("train", "test")
        }
        (tmp_path / "dataset.yaml").write_text(yaml.safe_dump(text))
        return open_data_set("folder", root=str(tmp_path))

    return build


def kinds(data, max_bad=10):
    return [c.kind for c in complaints(data, [look(data, part, 64) for part in ("train", "test")], max_bad)]


def ids(*values):
    """Every mask holds these raw ids in equal shares."""
    return lambda part, index: np.resize(values, (8, 8))


def test_a_sound_data_set(garden):
    assert kinds(garden(ids(0, 1, 2, 3, 255))) == []


def test_ids_that_begin_at_one(garden):
    assert kinds(garden(ids(1, 2, 3))) == ["off by one"] * 2


def test_zeros_that_are_background(garden):
    masks = ids(0, 0, 0, 0, 1, 2, 3)
    assert kinds(garden(masks)) == ["background read as a class"] * 2


def test_background_with_its_name_is_fine(garden):
    assert kinds(garden(ids(0, 0, 0, 0, 1, 2, 3), classes=["background", *CLASSES[1:]])) == []


def test_ids_reduced_twice(garden):
    assert kinds(garden(ids(0, 1, 2, 3), reduce_zero_label=True)) == ["off by one", "off by one"] + [
        "unseen classes without a test pixel"
    ]


def test_nothing_labelled(garden):
    found = kinds(garden(ids(255)))
    assert found == ["nothing is labelled"] * 2 + ["unseen classes without a test pixel"]


def test_masks_with_foreign_ids(garden):
    data = garden(lambda part, index: np.full((8, 8), 4 if (part, index) == ("train", 3) else index % 4))
    found = complaints(data, [look(data, "train", 64)], 10)
    assert [c.kind for c in found] == ["masks that can't be used"]
    assert "1 of 10 train masks" in found[0].what
    assert "reduce_zero_label" in found[0].what


def test_the_same_images_in_both_parts(garden):
    part = {"images": "train/*.jpg", "masks": "train/*.png"}
    assert kinds(garden(ids(0, 1, 2, 3), test=part)) == ["training images in the test part"]


def test_broken_images_are_counted_against_max_bad(garden, tmp_path):
    data = garden(ids(0, 1, 2, 3))
    (tmp_path / "train" / "3.jpg").write_bytes(b"")
    assert kinds(data, max_bad=1) == []
    assert kinds(data, max_bad=0) == ["images that can't be decoded"]


def test_the_command(garden, tmp_path, run_cli):
    garden(ids(1, 2, 3))
    config = ["--config", ROOT / "config" / "vit_b16.yaml", "--set", "data.kind=folder", "--set", "views.num=1"]
    done = run_cli("doctor", *config, "--set", f"data.root={tmp_path}")
    assert done.returncode == 2
    assert done.stdout.startswith("off by one: ")
    assert all(word in done.stderr for word in ("10 images x 1 views", "213", "float16 (chosen)", "1 path"))
    done = run_cli("doctor", *config, "--set", f"data.root={tmp_path / 'nowhere'}")
    assert done.returncode == 2
    assert "no such folder" in done.stdout
    assert len(done.stdout.splitlines()) == 1
    dry = run_cli("doctor", *config, "--set", f"data.root={tmp_path / 'nowhere'}", "--dry")
    assert dry.returncode == 0, dry.stdout
    assert "not known" in dry.stderr
    assert is_one_line_error(run_cli("doctor", *config, "--set", "teacher.model=ViT-Q-16"), "ViT-Q-16")


def test_too_little_disk(tmp_path, run_cli, monkeypatch):
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))
    config = ["--config", ROOT / "config" / "coco_stuff.yaml", "--set", f"runs={tmp_path}", "--dry"]
    config += ["--set", "cache.tokens=float16"]
    done = run_cli("doctor", *config)
    assert done.returncode == 2
    assert "too little disk" in done.stdout
    assert "cache.tokens: stream would fit" in done.stdout
    assert run_cli("doctor", *config, "--set", "cache.tokens=stream").returncode == 0


def test_training_by_hand():
    # 3 forwards' worth x 2 FLOP x 100 multiply-adds x 4 images x 10 iterations
    cost = StudentCost(parameters=7, multiply_adds=100.0)
    assert flops_of_training(cost, Train(batch=4, iterations=10)) == 24_000


def test_the_cost_of_a_student_by_hand():
    """DeepLabV2 on ResNet-18 with C and 2 C channels: what is added is four 3 x 3 convolutions, 512 to C, on 8 x 8."""
    section = Student(arch="DeepLabV2", encoder="resnet18", encoder_weights=None)
    narrow, wide = (cost_of(section, channels, 64) for channels in (8, 16))
    assert wide.multiply_adds - narrow.multiply_adds == 4 * 9 * 512 * 8 * 8 * 8
    assert wide.parameters - narrow.parameters == 4 * (9 * 512 + 1) * 8


@pytest.mark.parametrize(
    ("options", "num", "is_wrong"),
    [
        ({}, 10_582, False),
        ({}, 1_464, True),
        ({"limit": 50}, 50, False),
        ({"train_list": "train"}, 1_464, False),
        ({"test_list": "test"}, 1_464, True),
    ],
)
def test_counts_against_the_published_ones(options, num, is_wrong):
    found = count_complaint("voc", options, Seen("train", num))
    assert (found is not None) == is_wrong
    if found:
        assert "voc has 10,582 train images, found 1,464" in str(found)
    assert count_complaint("context", {}, Seen("test", 5_104)) is None  # the paper's, mmseg's 5,105
    assert count_complaint("folder", {}, Seen("test", 1)) is None


def test_all_images_are_looked_at_when_asked(tmp_path, run_cli):
    """The one bad mask of eighty is not among the 64 that are spread over the part."""
    for index in range(80):
        name = f"{index:02d}"
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.jpg")
        Image.fromarray(np.full((8, 8), index % 4, np.uint8)).save(tmp_path / f"{name}.png")
    part = {"images": "*.jpg", "masks": "*.png"}
    described = {"name": "garden", "classes": CLASSES, "unseen": ["gnome"], "train": part, "test": part}
    (tmp_path / "dataset.yaml").write_text(yaml.safe_dump(described))
    looked = set(np.linspace(0, 79, 64).astype(int).tolist())
    missed = next(i for i in range(80) if i not in looked)
    Image.fromarray(np.full((8, 8), 77, np.uint8)).save(tmp_path / f"{missed:02d}.png")
    config = ["--config", ROOT / "config" / "vit_b16.yaml", "--set", f"data.root={tmp_path}"]
    assert "masks that can't be used" not in run_cli("doctor", *config).stdout
    assert "1 of 80 train masks" in run_cli("doctor", *config, "--all").stdout


def test_a_missing_file_of_student_weights(garden, tmp_path, run_cli):
    garden(ids(0, 1, 2, 3))
    config = ["--config", ROOT / "config" / "vit_b16.yaml", "--set", f"data.root={tmp_path}"]
    config += ["--set", "student.weights=nowhere.pth"]
    done = run_cli("doctor", *config)
    assert done.returncode == 2
    assert "no weights: student.weights nowhere.pth: no such file." in done.stdout
    assert run_cli("doctor", *config, "--dry").returncode == 0
