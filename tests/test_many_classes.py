"""A data set of 300 classes, its masks of 16 bits, through every command as a user runs them."""

import json

import numpy as np
import pytest
import yaml
from PIL import Image

from cache.store import Store
from pipeline.config import load
from pipeline.data.base import DataError, open_data_set
from pipeline.data.demo import CLASSES, DemoDataSet
from tests.conftest import ROOT, TINY, is_one_line_error

NUM = 300
WORDS = ["old", "new", "big", "small", "wet", "dry", "far", "near", "dark", "light", "hot", "cold", "soft", "hard"]
# The world's twenty classes lie among the others at 15 i + 14: 14 to 299.
NAMES = [CLASSES[i // 15] if i % 15 == 14 else f"{WORDS[i % 15]} {CLASSES[i // 15]}" for i in range(NUM)]
UNSEEN = ["brick", "bee", "chessboard"]


@pytest.fixture(scope="module")
def orchard(tmp_path_factory):
    """12 training and 5 test scenes; a mask's 65535 is unlabelled."""
    folder = tmp_path_factory.mktemp("many") / "many"
    world = DemoDataSet(train=12, test=5, size=64)
    for part in ("train", "test"):
        for kind in (part, f"{part}_masks"):
            (folder / kind).mkdir(parents=True)
        for place, sample in enumerate(world.samples(part)):
            ids = (15 * world.labels(sample).astype(np.int32) + 14).astype(np.uint16)
            ids[:8, :8] = 65535
            ids[-1] = (64 * place + np.arange(64)) % NUM  # the masks of a part hold every class
            Image.fromarray(world.image(sample)).save(folder / part / f"{place}.png")
            Image.fromarray(ids).save(folder / f"{part}_masks" / f"{place}.png")
    described = {"name": "many", "classes": NAMES, "unseen": UNSEEN} | {
        part: {"images": f"{part}/*.png", "masks": f"{part}_masks/*.png"} for part in ("train", "test")
    }
    (folder / "dataset.yaml").write_text(yaml.safe_dump(described))
    return folder


def settings(folder, runs, name="many", *more):
    small = [word for word in TINY if not word.startswith("data.")]
    data = f"data={{kind: folder, root: {folder}}}"
    return [data, f"runs={runs}", f"name={name}", "teacher.image_size=64", "train.iterations=3", *small, *more]


def test_the_whole_way(orchard, tmp_path, run_cli):
    wanted = settings(orchard, tmp_path / "runs")
    config = load(ROOT / "config" / "demo.yaml", wanted)
    words = ["--config", ROOT / "config" / "demo.yaml", *(w for s in wanted for w in ("--set", s))]
    done = run_cli("doctor", *words)
    assert done.returncode == 0, done.stderr
    assert "many test: 5 images, 5 looked at" in done.stderr + done.stdout
    for stage in ("extract", "cluster", "train", "eval"):
        done = run_cli(stage, *words)
        assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "many"
    scores = json.loads((run / "eval" / "metrics.json").read_text())
    assert len(scores["per_class"]) == NUM
    assert scores["scored"]["seen"]["classes"] == NUM - 3
    matrix = np.load(run / "eval" / "confusion.npy")
    assert matrix.shape == (NUM, NUM)
    assert matrix.sum() == 5 * (64 * 64 - 8 * 8)
    true = np.concatenate([np.asarray(Image.open(path)).ravel() for path in (orchard / "test_masks").glob("*")])
    assert matrix.sum(1).tolist() == np.bincount(true[true < NUM], minlength=NUM).tolist()

    out = tmp_path / "found"
    done = run_cli("predict", orchard / "test", "--run", run, "--out", out, "--reject", "0.5")
    assert done.returncode == 0, done.stderr
    mask = Image.open(out / "0.mask.png")
    assert mask.mode == "I;16"
    assert np.isin(np.asarray(mask), [*range(NUM), 65535]).all()
    none = tmp_path / "none"
    done = run_cli("predict", orchard / "test", "--run", run, "--out", none, "--reject", "1")
    assert done.returncode == 0, done.stderr
    assert (np.asarray(Image.open(none / "0.mask.png")) == 65535).all()  # no score is that high
    again = run_cli("predict", orchard / "test", "--run", run, "--out", out, "--reject", "0.5")
    assert "5 of 5 are in" in again.stdout + again.stderr
    few = tmp_path / "few"
    done = run_cli("predict", orchard / "test", "--run", run, "--out", few, "--names", "bee,zebra")
    assert done.returncode == 0, done.stderr
    assert Image.open(few / "0.mask.png").mode == "P"

    done = run_cli("report", run)
    assert done.returncode == 0, done.stderr
    page = (run / "report" / "index.html").read_text()
    assert NAMES[-1] in page
    done = run_cli("inspect", run)
    assert done.returncode == 0, done.stderr
    done = run_cli("verify", *words)
    assert done.returncode == 0, done.stderr
    assert Store.open(config.cache_path).spec("pseudo").dtype == "uint8"


def wide_mask(folder, ending, mode, ids, **described):
    """A data set of one image and its mask, stored as PIL's `mode`."""
    ids = np.array(ids)
    dtype = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]
    Image.new("RGB", ids.shape[::-1]).save(folder / "a.jpg")
    Image.frombytes(mode, ids.shape[::-1], ids.astype(dtype).tobytes()).save(folder / f"a.{ending}")
    part = {"images": "*.jpg", "masks": f"*.{ending}"}
    described = {"classes": NAMES, "train": part, "test": part} | described
    (folder / "dataset.yaml").write_text(yaml.safe_dump(described))
    data = open_data_set("folder", root=str(folder))
    return data, data.samples("train")[0]


WAYS = [("png", "I;16"), ("tif", "I;16"), ("tif", "I;16B"), ("tif", "I")]


@pytest.mark.parametrize(("ending", "mode"), WAYS)
def test_wide_masks_as_programs_store_them(tmp_path, ending, mode):
    data, sample = wide_mask(tmp_path, ending, mode, [[0, 255, 256], [299, 65535, 65535]])
    assert Image.open(sample.mask).mode in (mode, "I;16")
    assert data.labels(sample).tolist() == [[0, 255, 256], [299, -1, -1]]
    facts = data.mask_facts(sample)
    assert (facts.pixels[[0, 255, 256, 299, -1]].tolist(), facts.pixels.sum()) == ([1, 1, 1, 1, 2], 6)
    assert facts.raw == {0, 255, 256, 299, 65535}


@pytest.mark.parametrize(
    ("described", "raw", "labels"),
    [
        ({"reduce_zero_label": True}, [0, 1, 300, 65535], [-1, 0, 299, -1]),
        ({"ignore": 300}, [0, 1, 299, 300], [0, 1, 299, -1]),
        ({"values": {40000: NAMES[299], 65535: NAMES[0], 500: "ignore"}}, [40000, 65535, 8, 500], [299, 0, 8, -1]),
        ({"classes": NAMES[:3]}, [0, 2, 255, 255], [0, 2, -1, -1]),  # of 16 bits, but few
        ({"classes": NAMES[:255]}, [0, 254, 255, 255], [0, 254, -1, -1]),
        ({"classes": NAMES[:256]}, [0, 254, 255, 65535], [0, 254, 255, -1]),
    ],
)
def test_what_wide_masks_mean(tmp_path, described, raw, labels):
    data, sample = wide_mask(tmp_path, "png", "I;16", [raw], **described)
    assert data.labels(sample).tolist() == [labels]


@pytest.mark.parametrize(
    ("ids", "words"),
    [([[0, 300, 70000]], "label id 300, 70000"), ([[-1, 0, 1]], "label id -1"), ([[254, 255, 65534]], "65534")],
)
def test_what_does_not_fit_is_one_line(tmp_path, run_cli, ids, words):
    wide_mask(tmp_path, "tif", "I", ids)
    done = run_cli("extract", *(w for s in settings(tmp_path, tmp_path / "runs") for w in ("--set", s)))
    assert is_one_line_error(done, "a.tif", words)


@pytest.mark.parametrize("ignored", [65536, -1, 2.5, [[0, 0, 65535]]])
def test_an_ignored_value_that_no_mask_can_hold(tmp_path, ignored):
    with pytest.raises(DataError, match=r"ignore is .* 0 to 65535"):
        wide_mask(tmp_path, "png", "I;16", [[0, 1]], ignore=ignored)
