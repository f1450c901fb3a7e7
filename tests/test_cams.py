"""The stage that makes CAMs: what it writes, odd images, resuming, refusals, and seeds counted by hand."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from cache.ledger import Ledger
from cache.store import Store
from pipeline.cams import _words, cams
from pipeline.config import Cams, ConfigError, load
from pipeline.data.base import DataError
from pipeline.data.words import background_names, fused_name
from pipeline.extract import extract
from pipeline.refer import refer
from pipeline.teaching.maps import explained_maps, explained_teacher, fitted, text_features
from pipeline.teaching.seeds import BACKGROUNDS, add_seeds, new_stats, summarise
from pipeline.verify import verify
from tests.conftest import ROOT, is_one_line_error

TEXTURES = "[grass, sand, water, brick]"
SETTINGS = (
    "recipe=clip_es",
    "cache.tokens=pooled",
    "data.train=70",  # two shards
    "data.test=6",
    f"data.background={TEXTURES}",
    f"cams.background={TEXTURES}",
    "cams.template=a photo of a {}.",
    "cams.debug=true",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The demo's scenes with image-level labels, extracted, and their CAMs."""
    import os

    os.chdir(ROOT)
    config = load("config/demo.yaml", [f"runs={tmp_path_factory.mktemp('es')}", "name=es", *SETTINGS])
    extract(config)
    return config, cams(config)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Twelve scenes, extracted, for what is made anew in each test."""
    import os

    os.chdir(ROOT)
    runs = tmp_path_factory.mktemp("few")
    config = load("config/demo.yaml", [f"runs={runs}", "name=es", *SETTINGS, "data.train=12", "cams.max_side=128"])
    extract(config)
    return config


def copy_of(config, tmp_path):
    shutil.copytree(config.run_path, tmp_path / "es")
    return config.model_copy(update={"runs": str(tmp_path)})


def test_what_is_written(made):
    config, manifest = made
    store = Store.open(config.cache_path)
    cam, classes, shape = (store.read_whole(name) for name in ("cam", "cam_class", "cam_shape"))
    assert cam.shape == (70, 16, 128, 128)  # 16 things; max_side 1024 is 128 patches of 8
    assert (shape == 16).all()  # scenes of 128 pixels
    assert (cam[:, :, 16:] == 0).all()
    assert (cam[:, :, :, 16:] == 0).all()
    from pipeline.data.base import data_of

    data = data_of(config.data)
    assert (data.background, data.classes[0], data.classes[1]) == (0, "background", "tomato")
    for row, sample in enumerate(data.samples("train")):
        tags = [int(i) for i in np.unique(data.labels(sample)) if i]
        assert classes[row, : len(tags)].tolist() == tags
        assert (classes[row, len(tags) :] == 255).all()
        assert (cam[row, len(tags) :] == 0).all()
        assert set(cam[row, : len(tags)].max((1, 2)).tolist()) <= {0, 1}
    assert verify(config) == []
    summary = manifest["summary"]
    assert summary["maps"] == (classes != 255).sum()
    assert 30 < summary["seeds"]["CAM"]["power 2"] < 70
    before = {p: p.stat().st_mtime_ns for p in config.cache_path.rglob("*")}
    cams(config)
    assert before == {p: p.stat().st_mtime_ns for p in config.cache_path.rglob("*")}


def test_a_row_does_not_depend_on_its_neighbours(made):
    """Maps of one image alone are those of its batch, in float16's precision."""
    from pipeline.data.base import data_of

    config, _ = made
    data, section = data_of(config.data), config.cams
    teacher = explained_teacher(config.teacher, section)
    words = text_features(config.teacher, section, _words(section, data))
    sample = data.samples("train")[5]
    image = fitted(data.image(sample), section, teacher.patch)
    maps, raw = explained_maps(teacher, section, image[None], [data.tags(sample)], *words)
    store = Store.open(config.cache_path)
    for name, values in (("cam", maps), ("cam_raw", raw)):
        kept = store.read_rows(name, [5])[0, : len(data.tags(sample)), :16, :16]
        assert np.abs(kept.astype(np.float32) - values[0].numpy()).max() < 2e-3


def test_it_resumes_from_the_ledger(made, tmp_path):
    config, manifest = made
    again = copy_of(config, tmp_path)
    (again.cache_path / "cams.manifest.json").unlink()
    Ledger(again.cache_path, "cams").path(1).unlink()
    kept = Ledger(again.cache_path, "cams").path(0).stat().st_mtime_ns
    assert cams(again) == manifest
    assert Ledger(again.cache_path, "cams").path(0).stat().st_mtime_ns == kept


def test_another_question_makes_them_again_and_a_threshold_does_not(few, tmp_path):
    again = copy_of(few, tmp_path)
    manifest = cams(again)
    other = again.model_copy(update={"cams": again.cams.model_copy(update={"sinkhorn": 1})})
    assert cams(other)["digests"] != manifest["digests"]
    swept = again.model_copy(update={"train": again.train.model_copy(update={"confidence": 0.3})})
    from pipeline.running.table import config_fingerprint

    assert config_fingerprint(swept, "cams") == config_fingerprint(again, "cams")


def test_refusals(made, tmp_path, run_cli):
    config, _ = made
    plain = load("config/demo.yaml", [f"runs={tmp_path}", "name=x", "data.train=4"])
    extract(plain)
    with pytest.raises(ConfigError, match="has no background class"):
        cams(plain)
    unseen = config.data.model_copy(update={"unseen": ["tomato"]})
    with pytest.raises(DataError, match=r"every class from its tags, and data.unseen names tomato"):
        cams(config.model_copy(update={"data": unseen}))
    words = config.model_copy(update={"cams": config.cams.model_copy(update={"background": "vok"})})
    with pytest.raises(DataError, match=r"cams.background: unknown set 'vok'; the nearest valid one is 'voc'"):
        cams(words)
    done = run_cli("cams", "--set", f"runs={tmp_path}/nowhere", "--set", "recipe=clip_es")
    assert is_one_line_error(done, "`extract` has not been completed")


def test_words():
    assert fused_name("voc", "bird") == "bird avian"
    assert fused_name("voc", "cow") == "cow"
    assert fused_name({"cow": "cow cattle"}, "cow") == "cow cattle"
    assert len(background_names("voc")) == 25
    assert set(background_names("voc")) - set(background_names("coco")) == {"keyboard", "sign"}
    with pytest.raises(DataError, match="want names"):
        background_names([])


# --- odd images ----------------------------------------------------------------------------------


@pytest.fixture
def odd(tmp_path):
    """A folder with an image smaller than a patch, one without any class, and a long one."""
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        (tmp_path / "odd" / part).mkdir(parents=True)
        for name, size, ids in (("dot", (3, 5), (0, 1)), ("empty", (40, 40), (0, 0)), ("long", (16, 300), (1, 2))):
            image = rng.integers(0, 256, (*size, 3), np.uint8)
            labels = np.full(size, ids[0], np.uint8)
            labels[:, size[1] // 2 :] = ids[1]
            Image.fromarray(image).save(tmp_path / "odd" / part / f"{name}.jpg")
            Image.fromarray(labels).save(tmp_path / "odd" / part / f"{name}.png")
        (tmp_path / "odd" / part / "torn.jpg").write_bytes(b"\xff\xd8\xff no picture")
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "odd" / part / "torn.png")
    parts = {p: {"images": f"{p}/*.jpg", "masks": f"{p}/*.png"} for p in ("train", "test")}
    described = {"name": "odd", "classes": ["background", "bee", "taxi"], "unseen": [], **parts}
    (tmp_path / "odd" / "dataset.yaml").write_text(json.dumps(described))
    return tmp_path


def test_odd_images(odd, monkeypatch):
    import yaml

    monkeypatch.chdir(ROOT)
    raw = yaml.safe_load((ROOT / "config/demo.yaml").read_text())
    raw |= {"data": {"kind": "folder", "root": str(odd / "odd")}, "runs": str(odd / "runs"), "name": "odd"}
    (odd / "odd.yaml").write_text(json.dumps(raw))
    config = load(odd / "odd.yaml", ["recipe=clip_es", "cache.tokens=pooled", "cams.max_side=160", "cams.batch=2"])
    assert list(extract(config)["quarantined"]) == ["torn"]
    summary = cams(config)["summary"]
    assert summary == summary | {"images": 3, "maps": 3, "untagged": 1}
    store = Store.open(config.cache_path)
    shapes = dict(zip(store.samples, store.read_whole("cam_shape").tolist(), strict=True))
    assert shapes == {"dot": [1, 1], "empty": [5, 5], "long": [2, 20], "torn": [65535, 65535]}
    classes = dict(zip(store.samples, store.read_whole("cam_class").tolist(), strict=True))
    assert classes == {"dot": [1, 255], "empty": [255, 255], "long": [1, 2], "torn": [254, 254]}
    assert verify(config) == []


def test_a_tag_that_is_no_class(made, tmp_path, monkeypatch):
    config, _ = made
    again = copy_of(config, tmp_path)
    (again.cache_path / "cams.manifest.json").unlink()
    Ledger(again.cache_path, "cams").path(1).unlink()
    monkeypatch.setattr("pipeline.data.demo.DemoDataSet.tags", lambda self, sample: (3, 17))
    with pytest.raises(DataError, match=r"train-0006\d has the label 17, which is none of its 16"):
        cams(again)


def test_own_size():
    image = np.zeros((100, 50, 3), np.uint8)
    assert fitted(image, Cams(), 16).shape == (3, 112, 64)  # each side rounded up
    assert fitted(image, Cams(max_side=50), 16).shape == (3, 48, 32)  # 48 is the largest multiple; 24 becomes 32
    assert fitted(image[:5, :3], Cams(), 16).shape == (3, 16, 16)
    exact = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    assert torch.equal(fitted(exact, Cams(), 16), torch.from_numpy(exact).permute(2, 0, 1))


@pytest.mark.parametrize("refine", ["pamr", pytest.param("crf", marks=pytest.mark.crf)])
def test_masks_at_pixels(few, tmp_path, refine):
    """They follow colours, so they are better seeds than maps of 16 x 16; training reads them."""
    from pipeline.data.base import data_of
    from pipeline.learning.batches import CachedViews

    config = copy_of(few, tmp_path)
    section = config.cams.model_copy(update={"refine": refine, "power": 2.0})
    config = config.model_copy(update={"cams": section})
    summary = cams(config)["summary"]
    assert summary["refined"] > summary["seeds"]["CAM + CAA"]["power 2"] + 1
    store = Store.open(config.cache_path)
    mask, confidence = store.read_whole("mask"), store.read_whole("confidence")
    assert mask.shape == confidence.shape == (12, 128, 128)
    assert confidence.max() <= 200
    assert verify(config) == []
    views = CachedViews(config, data_of(config.data))
    labels = views.whole(3)["labels"].numpy()
    assert np.array_equal(labels, np.where(confidence[3] >= 190, mask[3].astype(int), -1))  # train.confidence 0.95


# --- free text ------------------------------------------------------------------------------------


def test_free_text_finds_the_thing_it_names(made, run_cli, tmp_path):
    """Scenes with one thing: its map is twice as hot on the thing as beside it, in most (chance: next to none)."""
    from pipeline.data.base import data_of

    data, hotter = data_of(made[0].data), []
    scenes = [s for s in data.samples("train") if len(data.tags(s)) == 1][:12]
    for sample in scenes:
        image, name = tmp_path / f"{sample.id}.png", data.classes[data.tags(sample)[0]]
        Image.fromarray(data.image(sample)).save(image)
        (found,) = refer(made[0], [name], image, tmp_path / "found.png")
        is_thing = data.labels(sample) > 0
        assert found.shape == is_thing.shape
        hotter.append(found[is_thing].mean() > 2 * found[~is_thing].mean())
    assert sum(hotter) >= 9
    sets = [word for setting in SETTINGS for word in ("--set", setting)]
    texts = ("--text", name, "--text", "zebra")
    done = run_cli("cams", *sets, *texts, "--image", image, "--out", tmp_path / "out" / "found.png")
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "out" / "found.png").width == 3 * 384
    for wrong, word in ((("--image", tmp_path / "no.png"), "no such image"), ((), "--image")):
        assert is_one_line_error(run_cli("cams", *sets, *texts, *wrong), word)
    assert is_one_line_error(run_cli("cams", *sets, "--text", " ", "--image", image), "want words")


# --- seeds ---------------------------------------------------------------------------------------


class TwoPixels:
    """A data set of one image: a background pixel, one of class 1, an ignored one."""

    classes, background = ("background", "bee"), 0

    def labels(self, sample):
        return np.array([[0, 1, -1]], np.int16)


def test_seeds_by_hand():
    stats = new_stats(2)
    raw, better = torch.tensor([[[0.9, 0.9, 0.9]]]), torch.tensor([[[0.0, 1.0, 0.0]]])
    add_seeds(stats, TwoPixels(), None, (1,), raw, better)
    summary = summarise([{name: value.tolist() for name, value in stats.items()}])
    # Raw: both pixels are bee: IoU 1/2 for bee, 0 for background: 25. Refined: both are right.
    assert summary["seeds"]["CAM"] == dict.fromkeys(BACKGROUNDS, 25.0)
    assert summary["seeds"]["CAM + CAA"] == dict.fromkeys(BACKGROUNDS, 100.0)
    assert summary == summary | {"images": 1, "maps": 1, "empty": 0, "untagged": 0}
