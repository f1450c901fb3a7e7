"""Conversions of published annotations: ids and runs by hand, layouts made here, and what the loaders then read."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
from scipy.io import savemat

from pipeline.data.base import DataError, open_data_set
from pipeline.data.classes import CONTEXT_CLASSES, VOC_CLASSES
from pipeline.data.convert import CONTEXT_RAW, coco_mask, context_ids, mask_of_polygons, mask_of_runs
from pipeline.data.files import read_mask
from pipeline.prepare import prepare
from tests.conftest import ROOT, is_one_line_error
from tests.test_data_sets import save_image, save_list, save_mask


def text_of_runs(runs):
    """COCO's text of run lengths, written down from its definition, the other way round."""
    text = ""
    for place, run in enumerate(runs):
        value = run - runs[place - 2] if place > 2 else run
        while True:
            group, value = value & 31, value >> 5
            has_more = value != (-1 if group & 16 else 0)
            text += chr(48 + group + 32 * has_more)
            if not has_more:
                break
    return text


def test_runs_by_hand():
    # Down the columns of 2 x 3: one off, two on, three off.
    wanted = [[False, True, False], [True, False, False]]
    assert mask_of_runs([1, 2, 3], (2, 3)).tolist() == wanted
    assert mask_of_runs("123", (2, 3)).tolist() == wanted
    # 40 = 8 + 32 x 1: 8 with "more" is 48 + 8 + 32 = X, then 1. The fourth run is told as 1 - 2 = -1: 48 + 31 = O.
    assert text_of_runs([40, 2, 1, 1]) == "X121O"[:2] + "21O"
    assert np.flatnonzero(mask_of_runs("X121O", (44, 1))[:, 0]).tolist() == [40, 41, 43]
    assert mask_of_runs("6", (2, 3)).sum() == 0
    with pytest.raises(DataError, match="runs of 6 pixels don't fill a mask of 2 x 4"):
        mask_of_runs("123", (2, 4))


def test_runs_written_and_read_again():
    rng = np.random.default_rng(0)
    for _ in range(50):
        height, width = rng.integers(1, 90, 2)
        mask = rng.random((height, width)) < rng.choice([0.01, 0.5, 0.99])
        flat = mask.ravel(order="F")
        edges = np.flatnonzero(np.diff(flat)) + 1
        runs = np.diff([0, *edges, flat.size]).tolist()
        runs = [0, *runs] if flat[0] else runs
        assert np.array_equal(mask_of_runs(text_of_runs(runs), (height, width)), mask)


def test_contexts_ids_are_those_of_their_names():
    assert list(CONTEXT_RAW) == sorted(CONTEXT_RAW)
    assert len(CONTEXT_RAW) == len(CONTEXT_CLASSES) == 59
    # VOC's twenty among the 459, in VOC's order, as PASCAL-Part and Detail list them; a dining table is a table.
    voc = (2, 23, 25, 31, 34, 45, 59, 65, 72, 98, 397, 113, 207, 258, 284, 308, 347, 368, 416, 427)
    names = ["table" if name == "diningtable" else name for name in VOC_CLASSES]
    assert [CONTEXT_CLASSES[CONTEXT_RAW.index(raw)] for raw in voc] == names
    assert context_ids(np.array([[0, 1, 2, 458, 459, 98]])).tolist() == [[0, 0, 1, 59, 0, 20]]


def test_smaller_objects_are_on_top_and_crowds_below():
    def box(x0, y0, x1, y1):
        return [[x0, y0, x1, y0, x1, y1, x0, y1]]

    assert mask_of_polygons(box(1, 0, 2, 1), (3, 4)).astype(int).tolist() == [[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    objects = [
        {"name": "bicycle", "area": 1, "segmentation": box(1, 1, 1, 1)},
        {"name": "person", "area": 4, "segmentation": box(0, 0, 1, 1)},
        {"name": "toothbrush", "area": 0, "iscrowd": 1, "segmentation": {"counts": [0, 9], "size": [3, 3]}},
    ]
    assert coco_mask((3, 3), objects).tolist() == [[1, 1, 80], [1, 2, 80], [80, 80, 80]]
    assert coco_mask((1, 2), []).tolist() == [[0, 0]]
    with pytest.raises(DataError, match=r"of 3 x 3 pixels, its image has 2 x 3"):
        coco_mask((2, 3), objects)


@pytest.fixture
def sbd(tmp_path):
    """VOC with a (train) and v (val) of its own; SBD with a, b and v."""
    voc, release = tmp_path / "VOC2012", tmp_path / "benchmark_RELEASE"
    for name in "abv":
        save_image(voc / "JPEGImages" / f"{name}.jpg")
        (release / "dataset" / "cls").mkdir(parents=True, exist_ok=True)
        ids = np.array([[0, 1, 20, 5]], np.uint8)
        savemat(release / "dataset" / "cls" / f"{name}.mat", {"GTcls": {"Segmentation": ids, "Boundaries": 1}})
    for name in "av":
        save_mask(voc / "SegmentationClass" / f"{name}.png", (0, 2, 2, 255))
    lists = voc / "ImageSets" / "Segmentation"
    for part, ids in (("train", "a"), ("val", "v")):
        save_list(lists / f"{part}.txt", *ids)
    save_list(release / "dataset" / "train.txt", "b", "v")
    save_list(release / "dataset" / "val.txt", "a")
    return voc, release


def test_voc_from_sbd(sbd, run_cli):
    voc, release = sbd
    done = run_cli("prepare", "voc", "--root", voc, "--source", release)
    assert done.returncode == 0, done.stderr
    assert "voc: 3 masks made, 0 were there" in done.stderr
    data = open_data_set("voc", root=str(voc))
    a, b = data.samples("train")
    assert (a.id, b.id) == ("a", "b")
    assert data.labels(a).tolist() == [[-1, 1, 1, -1]]  # VOC's own mask comes first
    assert data.labels(b).tolist() == [[-1, 0, 19, 4]]


def test_a_conversion_that_stopped_goes_on(sbd, run_cli):
    voc, release = sbd
    broken = release / "dataset" / "cls" / "b.mat"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    again = ("prepare", "voc", "--root", voc, "--source", release)
    assert is_one_line_error(run_cli(*again), "b.mat", "as a MATLAB file")
    out = voc / "SegmentationClassAug"
    assert [path.name for path in sorted(out.iterdir())] == ["a.png"]  # no part of b
    assert not (voc / "ImageSets" / "Segmentation" / "train_aug.txt").exists()
    before = (out / "a.png").stat().st_mtime_ns
    broken.write_bytes(whole)
    assert "2 masks made, 1 were there" in run_cli(*again).stderr
    assert (out / "a.png").stat().st_mtime_ns == before
    assert "0 masks made, 3 were there" in run_cli(*again).stderr
    save_list(voc / "ImageSets" / "Segmentation" / "train_aug.txt", "a")
    assert is_one_line_error(run_cli(*again), "train_aug.txt: holds 1 other ids than the 2", "Move it away")


@pytest.mark.parametrize("form", ["merged", "mat"])
def test_context_in_both_forms(form, tmp_path, run_cli):
    """The same map of 2 x 2 as runs and as a .mat: aeroplane 2 and wood 458, an id of no class, and nothing."""
    root = tmp_path / "VOC2010"
    raw = np.array([[2, 458], [7, 0]])
    for part, name in (("train", "a"), ("val", "b")):
        save_list(root / "ImageSets" / "Main" / f"{part}.txt", name)
    if form == "mat":
        source = tmp_path / "trainval"
        source.mkdir()
        for name in "ab":
            savemat(source / f"{name}.mat", {"LabelMap": raw.astype(np.uint16)})
    else:
        source = tmp_path / "trainval_merged.json"
        runs = {2: [0, 1, 3], 7: [1, 1, 2], 458: [2, 1, 1]}
        images = [("a", 1, "train"), ("b", 2, "val"), ("c", 3, "test")]
        merged = {
            "images": [
                {"file_name": f"{name}.jpg", "image_id": i, "phase": phase, "height": 2, "width": 2}
                for name, i, phase in images
            ],
            "annos_segmentation": [
                {"image_id": i, "category_id": raw_id, "segmentation": {"counts": text_of_runs(r), "size": [2, 2]}}
                for i in (1, 2)
                for raw_id, r in runs.items()
            ],
        }
        source.write_text(json.dumps(merged))
    done = run_cli("prepare", "context", "--root", root, "--source", source)
    assert done.returncode == 0, done.stderr
    for name in "ab":
        assert read_mask(root / "SegmentationClassContext" / f"{name}.png").tolist() == [[1, 59], [0, 0]]
        (root / "JPEGImages").mkdir(exist_ok=True)
        (root / "JPEGImages" / f"{name}.jpg").touch()
    data = open_data_set("context", root=str(root))
    assert [sample.id for part in ("train", "test") for sample in data.samples(part)] == ["a", "b"]


def test_context_with_all_its_classes(tmp_path, run_cli):
    root, source = tmp_path / "VOC2010", tmp_path / "published" / "trainval"
    source.mkdir(parents=True)
    raw = np.array([[2, 459, 255, 0]], np.uint16)
    for part, name in (("train", "a"), ("val", "b")):
        save_list(root / "ImageSets" / "Main" / f"{part}.txt", name)
        savemat(source / f"{name}.mat", {"LabelMap": raw})
    command = ("prepare", "context459", "--root", root, "--source")
    assert is_one_line_error(run_cli(*command, tmp_path / "x.json"), "must be the folder of .mat")
    assert is_one_line_error(run_cli(*command, source), "labels.txt", "comes with the .mat files")
    labels = [f"{i}: thing {i}" for i in range(460)]
    save_list(source.parent / "labels.txt", *labels[:-1])
    assert is_one_line_error(run_cli(*command, source), "labels.txt: has no name for class 459")
    save_list(source.parent / "labels.txt", *labels)
    done = run_cli(*command, source)
    assert done.returncode == 0, done.stderr
    save_image(root / "JPEGImages" / "b.jpg")
    data = open_data_set("context", root=str(root), num_classes=459)
    (sample,) = data.samples("test")
    assert data.labels(sample).tolist() == [[1, 458, 254, -1]]
    assert data.classes[::458] == ("thing 1", "thing 459")


def test_coco14(tmp_path, run_cli):
    (tmp_path / "annotations").mkdir()
    for part in ("train", "val"):
        name = f"COCO_{part}2014_000000000009"
        save_image(tmp_path / "JPEGImages" / f"{part}2014" / f"{name}.jpg")
        corner = {"image_id": 9, "category_id": 90, "area": 1, "segmentation": [[0, 0, 0, 0, 0, 0]]}
        found = {
            "images": [{"id": 9, "file_name": f"{name}.jpg", "height": 1, "width": 4}],
            "categories": [{"id": 90, "name": "toothbrush"}],
            "annotations": [corner],
        }
        (tmp_path / "annotations" / f"instances_{part}2014.json").write_text(json.dumps(found))
    done = run_cli("prepare", "coco14", "--root", tmp_path)
    assert done.returncode == 0, done.stderr
    data = open_data_set("coco14", root=str(tmp_path), tags="json")
    (sample,) = data.samples("train")
    assert data.labels(sample).tolist() == [[80, 0, 0, 0]]  # ids without COCO's gaps
    assert data.tags(sample) == (80,)


def test_wrong_input(sbd, tmp_path, run_cli):
    voc, release = sbd
    root = ("--root", voc)
    assert is_one_line_error(run_cli("prepare", "vok", *root), "no conversion for 'vok'", "'voc'")
    assert is_one_line_error(run_cli("prepare", "voc", *root), "--source is missing")
    assert is_one_line_error(run_cli("prepare", "voc", *root, "--source", tmp_path), "dataset/cls")
    assert is_one_line_error(run_cli("prepare", "context", *root, "--source", "no.json"), "no.json", "can't be read")
    (tmp_path / "x.json").write_text("{}")
    assert is_one_line_error(
        run_cli("prepare", "context", *root, "--source", tmp_path / "x.json"), "not the annotations"
    )
    assert is_one_line_error(run_cli("prepare", "coco14", *root), "instances_train2014.json")
    savemat(release / "dataset" / "cls" / "a.mat", {"GTcls": {"Segmentation": np.array([[21]], np.uint8)}})
    assert is_one_line_error(run_cli("prepare", "voc", *root, "--source", release), "a.mat", "numbers 0-20")
    savemat(release / "dataset" / "cls" / "a.mat", {"GTinst": 1})
    assert is_one_line_error(run_cli("prepare", "voc", *root, "--source", release), "has no GTcls, only GTinst")
    done = run_cli("prepare", "coco_stuff", *root)
    assert done.returncode == 0
    assert "nothing to prepare, masks are read as published" in done.stderr
    assert prepare("demo", voc).masks == {}


def test_a_killed_conversion_is_cleared_by_the_next(tmp_path):
    """Killed in the middle of a mask: the same command goes on, and nothing of the killed one is left."""
    code = (
        "import os, signal, sys, cache.files\n"
        "from pathlib import Path\n"
        "cache.files.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "cache.files.write_atomic(Path(sys.argv[1]), b'half')\n"
    )
    folder = tmp_path / "SegmentationClass" / "train2014"
    killed = subprocess.run([sys.executable, "-c", code, str(folder / "7.png")], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert [path.suffix for path in folder.iterdir()] == [".partial"]
    (folder / "thesis.partial").write_text("mine")
    image = {"id": 7, "file_name": "7.jpg", "height": 2, "width": 3}
    (tmp_path / "annotations").mkdir()
    for part in ("train", "val"):
        found = {"images": [image] if part == "train" else [], "annotations": [], "categories": []}
        (tmp_path / "annotations" / f"instances_{part}2014.json").write_text(json.dumps(found))
    prepare("coco14", tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["7.png", "thesis.partial"]
