"""Training from image-level labels: what of the CAMs becomes a label, the closed-set loss, and the student it gives."""

import json
import os

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from cache.store import Store
from pipeline.cams import cams
from pipeline.config import ConfigError, Train, load
from pipeline.data.base import DataError, data_of
from pipeline.evaluate import evaluate
from pipeline.extract import extract
from pipeline.learning.batches import CachedViews
from pipeline.learning.checkpoint import load_student
from pipeline.learning.objective import Learner, closed_set_terms
from pipeline.ops.masks import mask_and_confidence
from pipeline.train import train
from tests.conftest import ROOT, TINY, forget_accelerator, is_one_line_error

TEXTURES = "[grass, sand, water, brick]"
SETTINGS = (
    "recipe=clip_es",
    "cache.tokens=pooled",
    f"data.background={TEXTURES}",
    f"cams.background={TEXTURES}",
    "cams.template=a photo of a {}.",
    "student.classifier=learned",
    "train.confidence=0.4",
)


@pytest.fixture(scope="module")
def tagged(tmp_path_factory):
    """A tiny demo with image-level labels, its CAMs made: builds configs on that cache."""
    os.chdir(ROOT)
    runs = tmp_path_factory.mktemp("tagged")
    settings = [f"runs={runs}", *TINY, *SETTINGS]
    config = load("config/demo.yaml", [*settings, "name=made"])
    extract(config)
    cams(config)

    def build(name, *more):
        forget_accelerator()
        return load("config/demo.yaml", [*settings, f"cache.path={config.cache_path}", f"name={name}", *more])

    return build


def test_labels_are_the_cams_that_are_sure(tagged):
    config = tagged("labels")
    views, data = CachedViews(config, data_of(config.data)), data_of(config.data)
    store = Store.open(config.cache_path)
    item = views.whole(7)
    classes = [int(i) for i in store.read_rows("cam_class", [7])[0] if i != 255]
    cam = torch.from_numpy(store.read_rows("cam", [7])[0, : len(classes), :16, :16])
    mask, confidence = mask_and_confidence(cam, classes, 0, (128, 128), 1.0)
    assert torch.equal(item["labels"], mask.where(confidence >= 0.4, -1))
    assert set(item["labels"].unique().tolist()) <= {0, *data.tags(data.samples("train")[7]), -1}
    every = CachedViews(tagged("labels", "train.confidence=0"), data).whole(7)["labels"]
    assert torch.equal(every, mask)
    none = CachedViews(tagged("labels", "train.confidence=1"), data).whole(7)["labels"]
    assert set(none.unique().tolist()) <= {0, -1}  # only where every map is exactly 0 is background sure
    with pytest.raises(DataError, match=r"data\.unseen names bee"):
        CachedViews(tagged("labels", "data.unseen=[bee]"), data_of(tagged("labels", "data.unseen=[bee]").data))


def test_the_loss_is_cross_entropy_on_labelled_pixels():
    torch.manual_seed(0)
    dense, text = torch.randn(2, 5, 4, 4, requires_grad=True), torch.eye(5)
    labels = torch.randint(0, 5, (2, 16, 16), dtype=torch.int16)
    labels[0, :8] = -1
    learner = Learner(None, torch.nn.Identity(), torch.nn.Identity(), text, torch.arange(5))
    terms, counts = closed_set_terms(Train(), learner, dense, {"labels": labels})
    small = labels[:, 2::4, 2::4].long()  # nearest at the centres of 4 x 4 cells
    wanted = cross_entropy(dense, small, ignore_index=-1)
    assert torch.allclose(terms["ce"], wanted)
    (found,), (plain,) = (torch.autograd.grad(loss, dense, retain_graph=True) for loss in (terms["ce"], wanted))
    assert torch.allclose(found, plain, atol=1e-6)
    assert counts["labelled"] == pytest.approx(0.75)
    nothing, _ = closed_set_terms(Train(), learner, dense, {"labels": torch.full_like(labels, -1)})
    assert nothing["ce"] == 0


@pytest.mark.parametrize("classifier", ["learned", "text"])
def test_a_student_is_trained_resumed_and_evaluated(tagged, run_cli, classifier, tmp_path):
    config = tagged(classifier, f"student.classifier={classifier}", "train.iterations=6")
    manifest = train(config)
    metrics = evaluate(config)
    assert (metrics["hIoU"], metrics["mIoU_U"]) == (None, None)
    assert metrics["mIoU_S"] is not None
    student, checkpoint = load_student(config.run_path / "train" / manifest["student"])
    channels = 17 if classifier == "learned" else Store.open(config.cache_path).sizes["C"]
    assert student(torch.zeros(1, 3, 64, 64)).shape[1] == checkpoint.text.shape[1] == channels
    again = tagged(f"{classifier}-again", f"student.classifier={classifier}", "train.iterations=6")
    (config.run_path / "train").rename(tmp_path / "kept")
    (tmp_path / "kept" / "train.manifest.json").unlink()
    again.run_path.mkdir()
    (tmp_path / "kept").rename(again.run_path / "train")  # the checkpoint of iteration 3 is all that is used
    (again.run_path / "train" / "student.safetensors").unlink()
    train(again)
    resumed, _ = load_student(again.run_path / "train" / "student.safetensors")
    for name, value in student.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    lines = (again.run_path / "train" / "losses.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == list(range(1, 7))
    scene = ROOT / "docs" / "scene.png"
    done = run_cli("predict", scene, "--run", again.run_path, "--names", "bee,zebra", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    if classifier == "learned":
        done = run_cli("predict", scene, "--run", again.run_path, "--names", "bee,dragon")
        assert is_one_line_error(done, "dragon", "has learned its 17 classes")


def test_a_learned_classifier_is_for_closed_sets(tagged):
    with pytest.raises(ConfigError, match="knows its classes alone"):
        tagged("x", "recipe=clip_teacher")


def test_image_labels_are_all_that_training_reads(tagged, monkeypatch):
    """With the masks' pixels shuffled, which keeps every image's tags, not one label changes."""
    config = tagged("blind")
    before = [CachedViews(config, data_of(config.data)).whole(row)["labels"] for row in (0, 40)]
    from pipeline.data.demo import DemoDataSet

    original = DemoDataSet.labels
    monkeypatch.setattr(DemoDataSet, "labels", lambda self, sample: np.roll(original(self, sample), 50, 1))
    after = [CachedViews(config, data_of(config.data)).whole(row)["labels"] for row in (0, 40)]
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
