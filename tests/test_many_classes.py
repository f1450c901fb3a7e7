"""A data set of 300 classes, its masks of 16 bits, through every command as a user runs them."""

import json

import numpy as np
import pytest
import yaml
from PIL import Image

from cache.store import Store
from pipeline.config import load
from pipeline.data.demo import CLASSES, DemoDataSet
from tests.conftest import ROOT, TINY

NUM = 300
WORDS = (
    "old",
    "new",
    "big",
    "small",
    "wet",
    "dry",
    "far",
    "near",
    "dark",
    "light",
    "hot",
    "cold",
    "soft",
    "hard",
)
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
    return [
        data,
        f"runs={runs}",
        f"name={name}",
        "teacher.image_size=64",
        "train.iterations=3",
        *small,
        *more,
    ]


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
    true = np.concatenate(
        [np.asarray(Image.open(path)).ravel() for path in (orchard / "test_masks").glob("*")]
    )
    assert matrix.sum(1).tolist() == np.bincount(true[true < NUM], minlength=NUM).tolist()

    out = tmp_path / "found"
    done = run_cli("predict", orchard / "test", "--run", run, "--out", out, "--reject", "0.5")
    assert done.returncode == 0, done.stderr
    mask = Image.open(out / "0.mask.png")
    assert mask.mode == "I;16"
    assert np.isin(np.asarray(mask), [*range(NUM), 65535]).all()
    assert np.array_equal(np.unique(np.asarray(mask)), np.unique(np.asarray(Image.open(out / "0.mask.png"))))
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
