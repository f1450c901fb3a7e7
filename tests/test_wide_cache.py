"""Class ids above 253 in the cache: names of potential objects, classes of CAMs and masks made of them."""

import numpy as np
import pytest
import yaml
from PIL import Image

from cache.store import Store
from pipeline.config import load
from pipeline.data.base import open_data_set
from pipeline.data.demo import CLASSES, DemoDataSet
from tests.conftest import ROOT, TINY

NUM, FIRST = 300, 280  # the world's twenty classes are the last ones
NAMES = ["background", *(f"thing {i}" for i in range(1, FIRST)), *CLASSES]


@pytest.fixture
def garden(tmp_path):
    folder, world = tmp_path / "garden", DemoDataSet(train=4, test=2, size=64)
    described = {"classes": NAMES}
    for part in ("train", "test"):
        (folder / part).mkdir(parents=True)
        described[part] = {"images": f"{part}/*.jpg", "masks": f"{part}/*.png"}
        for place, sample in enumerate(world.samples(part)):
            Image.fromarray(world.image(sample)).save(folder / part / f"{place}.jpg")
            ids = world.labels(sample).astype(np.uint16) + FIRST
            Image.fromarray(ids).save(folder / part / f"{place}.png")
    (folder / "dataset.yaml").write_text(yaml.safe_dump(described))
    return folder


def made(run_cli, config, garden, settings, *stages):
    """The config after these commands."""
    data = [f"data={{kind: folder, root: {garden}}}", f"runs={garden}/runs", "teacher.image_size=64"]
    small = [word for word in TINY if not word.startswith("data.")]
    wanted, path = [*data, *small, *settings, "cams.max_side=64", "cams.blocks=4"], ROOT / "config" / config
    for stage in stages:
        done = run_cli(stage, "--config", path, *(word for setting in wanted for word in ("--set", setting)))
        assert done.returncode == 0, done.stderr
    return load(path, wanted)


def test_cams_and_masks(garden, run_cli, tmp_path):
    stages = ("extract", "cams", "train", "eval", "verify")
    config = made(run_cli, "demo_clip_es.yaml", garden, ["cams.refine=pamr"], *stages)
    store, data = Store.open(config.cache_path), open_data_set("folder", root=str(garden))
    classes, mask = store.read_whole("cam_class"), store.read_whole("mask")
    assert classes.dtype == mask.dtype == np.uint16
    assert 256 < mask.max() < NUM
    for row, sample in enumerate(data.samples("train")):
        tags = data.tags(sample)
        assert classes[row].tolist() == [*tags, *[65535] * (NUM - 1 - len(tags))]
        assert set(np.unique(mask[row]).tolist()) <= {0, *tags}
    done = run_cli("inspect", config.run_path, "--export", tmp_path / "masks")
    assert done.returncode == 0, done.stderr
    exported = Image.open(tmp_path / "masks" / "0.png")
    assert exported.mode == "I;16"
    exports = [np.asarray(Image.open(path)) for path in (tmp_path / "masks").glob("*.png")]
    assert 255 < max(ids[ids < NUM].max() for ids in exports) < NUM
    assert set(np.unique(np.asarray(exported)).tolist()) <= {0, *data.tags(data.samples("train")[0])}


def test_names_of_potential_objects(garden, run_cli):
    tags = {i for s in open_data_set("folder", root=str(garden)).samples("train") for i in ids_of(s)}
    unseen = sorted(tags)[::2]
    described = yaml.safe_load((garden / "dataset.yaml").read_text())
    described["unseen"] = [NAMES[i] for i in unseen]
    (garden / "dataset.yaml").write_text(yaml.safe_dump(described))
    config = made(run_cli, "demo.yaml", garden, ["cluster.named_above=0.05"], "extract", "cluster", "train")
    names = Store.open(config.cache_path).read_whole("named")
    assert names.dtype == np.uint16
    assert {65535} < set(names.ravel().tolist()) <= {*unseen, 65535}


def ids_of(sample):
    return np.unique(np.asarray(Image.open(sample.mask))).tolist()
