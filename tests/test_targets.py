"""The presets that a student is evaluated on, `cli.py eval --on`: made-up files in each data set's published layout."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config import load
from pipeline.data.ade20k import full_classes
from pipeline.data.base import DataError, open_data_set
from pipeline.data.classes import CONTEXT_CLASSES
from pipeline.train import train
from tests.conftest import ROOT, TINY, is_one_line_error
from tests.test_data_sets import save_list

SIDE = 64


def image(path: Path, size=(SIDE, SIDE)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(str(path)))
    Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(path)


def mask(path: Path, ids, dtype=np.uint8) -> None:
    """Rows of these ids."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = np.resize(np.asarray(ids, dtype), SIDE)
    Image.fromarray(np.repeat(rows[:, None], SIDE, axis=1)).save(path)


def cityscapes(root: Path) -> None:
    image(root / "leftImg8bit" / "val" / "ulm" / "ulm_1_leftImg8bit.png")
    mask(root / "gtFine" / "val" / "ulm" / "ulm_1_gtFine_labelIds.png", [7, 26, 4])  # road, car, static


def camvid(root: Path) -> None:
    image(root / "test" / "a.png")
    mask(root / "testannot" / "a.png", [0, 8, 11])  # sky, car, unlabelled


def ade20k(root: Path) -> None:
    image(root / "images" / "validation" / "a.jpg")
    mask(root / "annotations" / "validation" / "a.png", [0, 1, 150])  # other, wall, flag


def context459(root: Path) -> None:
    image(root / "JPEGImages" / "a.jpg")
    mask(root / "SegmentationClassContext459" / "a.png", [0, 1, 459], np.uint16)
    lists = root / "ImageSets" / "SegmentationContext"
    save_list(lists / "val.txt", "a")
    save_list(lists / "classes459.txt", *CONTEXT_CLASSES, *(f"thing {i}" for i in range(400)))


def scene(folder: Path, name: str, numbers, objects) -> None:
    """One image of the full ADE20K: numbers as red and green, objects in its JSON."""
    image(folder / f"{name}.jpg")
    rows = np.resize(np.asarray(numbers), SIDE)
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    pixels[..., 0], pixels[..., 1], pixels[..., 2] = (rows // 256 * 10)[:, None], (rows % 256)[:, None], 77
    Image.fromarray(pixels).save(folder / f"{name}_seg.png")
    (folder / name).mkdir()
    Image.new("L", (SIDE, SIDE)).save(folder / name / f"instance_000_{name}.png")
    things = [
        {"name": text, "name_ndx": number, "hypernym": [text, kind], "parts": {"part_level": level}}
        for number, text, kind, level in objects
    ]
    (folder / f"{name}.json").write_text(json.dumps({"annotation": {"filename": f"{name}.jpg", "object": things}}))


def ade847(root: Path) -> None:
    """847 objects in both parts, one more in training alone, a part of one in both; two objects have one name."""
    both = [(number, f"thing {number}", "object", 0) for number in range(300, 1145)]
    both += [(2978, "wall", "structure", 0), (77, "Wall", "barrier, fence", 0), (5, "leg", "limb", 1)]
    assert sum(level == 0 for *_, level in both) == 847
    top = root / "images" / "ADE"
    scene(top / "training" / "urban" / "street", "ADE_train_00000001", [2978], [*both, (9, "rare", "x", 0)])
    scene(top / "validation" / "urban" / "street", "ADE_val_00000001", [0, 2978, 300, 9], both)


MAKERS = {"cityscapes": cityscapes, "camvid": camvid, "ade20k": ade20k, "context459": context459, "ade847": ade847}
COUNTED = {"cityscapes": (19, 2), "camvid": (11, 2), "ade20k": (150, 2), "context459": (459, 2), "ade847": (847, 2)}


@pytest.fixture(scope="module")
def student(cached_demo, tmp_path_factory):
    """A trained tiny student's settings."""
    runs = tmp_path_factory.mktemp("runs")
    settings = [*TINY, f"runs={runs}", f"cache.path={cached_demo}"]
    train(load(ROOT / "config" / "demo.yaml", settings))
    return settings


@pytest.mark.parametrize("name", MAKERS)
def test_a_student_is_evaluated_on_it(name, student, tmp_path, run_cli):
    root = tmp_path / "data"
    MAKERS[name](root)
    if name == "ade847":
        done = run_cli("prepare", "ade847", "--root", root)
        assert done.returncode == 0, done.stderr
        assert "2 masks made, 0 were there" in done.stderr
    words = [word for setting in student for word in ("--set", setting)]
    done = run_cli("eval", *words, "--on", name, "--on-set", f"data.root={root}")
    assert done.returncode == 0, done.stderr
    (runs,) = (Path(setting.partition("=")[2]) for setting in student if setting.startswith("runs="))
    metrics = json.loads((runs / "demo" / f"eval-on-{name}" / "metrics.json").read_text())
    num, present = COUNTED[name]
    assert metrics["on"]["num_classes"] == num
    assert metrics["num_images"] == 1
    lines = (runs / "demo" / f"eval-on-{name}" / "per_class.csv").read_text().splitlines()[1:]
    assert sum(int(line.rsplit(",", 1)[1]) > 0 for line in lines) == present
    assert metrics["mIoU_U"] is None  # no class of it is unseen


def test_the_full_ade20k(tmp_path, run_cli):
    ade847(tmp_path)
    found = full_classes(tmp_path)
    assert len(found) == 847
    assert (found[77], found[2978], found[300]) == ("Wall (barrier)", "wall (structure)", "thing 300")
    assert 9 not in found  # in training alone
    assert 5 not in found  # a part of an object
    run_cli("prepare", "ade847", "--root", tmp_path)
    data = open_data_set("ade20k", root=str(tmp_path), num_classes=847)
    (sample,) = data.samples("test")
    assert sample.id == "ADE_val_00000001"
    ids = {name: i for i, name in enumerate(data.classes)}
    assert data.labels(sample)[:4, 0].tolist() == [-1, ids["wall (structure)"], ids["thing 300"], -1]
    assert [sample.id for sample in data.samples("train")] == ["ADE_train_00000001"]
    assert str(tmp_path / "classes847.txt") in data.files("test")
    with Image.open(sample.mask) as made:
        assert np.array(made)[:4, 0].tolist() == [0, 2978, 300, 9]  # the release's numbers: any list of classes fits


def test_the_full_ade20k_gone_wrong(tmp_path, run_cli):
    ade847(tmp_path)
    command = ("prepare", "ade847", "--root", tmp_path)
    note = tmp_path / "images" / "ADE" / "validation" / "urban" / "street" / "ADE_val_00000001.json"
    whole = note.read_text()
    found = json.loads(whole)
    del found["annotation"]["object"][0]
    note.write_text(json.dumps(found))
    assert is_one_line_error(run_cli(*command), "846 objects occur in both parts, and 847 are evaluated", "--source")
    note.write_text("{}")
    assert is_one_line_error(run_cli(*command), "ADE_val_00000001.json: not the full ADE20K's (KeyError: 'annotation')")
    note.unlink()
    assert is_one_line_error(run_cli(*command), "ADE_val_00000001.json: can't be read")
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"{number}: thing {number}\n" for number in range(1, 848)))
    assert run_cli(*command, "--source", listed).returncode == 0  # a list needs no JSON
    data = open_data_set("ade20k", root=str(tmp_path), num_classes=847)
    assert data.classes[299] == "thing 300"
    assert data.labels(data.samples("test")[0])[:4, 0].tolist() == [-1, -1, 299, 8]
    listed.write_text("wall\n")
    assert is_one_line_error(run_cli(*command, "--source", listed), "'wall' is no `number: name`")
    with pytest.raises(DataError, match=r"num_classes is 100; ADE20K's are 150, or 847"):
        open_data_set("ade20k", root=str(tmp_path), num_classes=100)
    (tmp_path / "classes847.txt").unlink()
    with pytest.raises(DataError, match=r"classes847.txt: .*prepare ade847"):
        open_data_set("ade20k", root=str(tmp_path), num_classes=847)
    assert is_one_line_error(
        run_cli("prepare", "ade847", "--root", tmp_path / "images"), "data.root must be ADE20K_2021_17_01"
    )
