"""`cli.py prepare folder`: each format's small export, what its masks hold, killed and wrong ones."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline.data.base import open_data_set
from pipeline.data.coco import filled, read_instances
from pipeline.data.files import read_mask
from tests.conftest import ROOT, is_one_line_error
from tests.exports import (
    BEE,
    BLACK,
    HEIGHT,
    SKY,
    WIDTH,
    boxed,
    brush,
    coco_export,
    coco_json,
    coloured,
    cvat_export,
    expected_coco,
    label_studio_export,
    photo,
    picture,
    roboflow_coco_export,
    roboflow_masks_export,
    runs,
    square,
    supervisely_export,
    thing,
)

NONE = 255


def of_coco(root: Path) -> tuple:
    return ("--coco", root / "annotations.json", "--images", root / "photos")


def masks_of(root: Path, part="train") -> dict:
    return {path.stem: read_mask(path) for path in sorted((root / "prepared_masks" / part).glob("*.png"))}


def labels_of(root: Path, part="train") -> dict:
    """What the data set makes of it, by id; the masks, as the pipeline reads them."""
    data = open_data_set("folder", root=str(root))
    return {sample.id: data.labels(sample) for sample in data.samples(part)}


@pytest.fixture
def prepare(run_cli):
    """Runs the command, which must end well unless `code` says otherwise."""

    def run(*arguments, code=0):
        done = run_cli("prepare", "folder", *arguments)
        assert done.returncode == code, done.stdout + done.stderr
        return done

    return run


# COCO


def test_coco(tmp_path, prepare):
    coco_export(tmp_path)
    done = prepare(*of_coco(tmp_path))
    assert "3 masks made, 0 were there; 2 classes" in done.stderr
    assert "train: 3 images, 3 looked at" in done.stderr  # what doctor says of it
    expected = expected_coco()
    for name, mask in masks_of(tmp_path).items():
        assert mask.dtype == np.uint8
        assert np.array_equal(mask, expected[name]), name
    described = yaml.safe_load((tmp_path / "dataset.yaml").read_text())
    assert described == {
        "name": tmp_path.name,
        "classes": ["bee", "sky"],
        "unseen": [],
        "ignore": 255,
        "train": {"images": "photos/*.jpg", "masks": "prepared_masks/train/*.png", "list": "prepared_masks/train.txt"},
    }
    assert labels_of(tmp_path)["b"][0].tolist() == [0] * WIDTH
    assert labels_of(tmp_path)["b"][5].tolist() == [-1] * WIDTH


def test_the_second_part_joins_the_first_and_the_users_words_stay(tmp_path, prepare):
    coco_export(tmp_path)
    prepare(*of_coco(tmp_path), "--root", tmp_path / "out")
    path = tmp_path / "out" / "dataset.yaml"
    path.write_text(path.read_text().replace("unseen: []", "unseen: [bee]"))
    other = coco_json(names=("d", "e", "f"))
    for name in "def":
        photo(tmp_path / "val" / f"{name}.jpg")
    (tmp_path / "val.json").write_text(json.dumps(other))
    test = ("--coco", tmp_path / "val.json", "--images", tmp_path / "val", "--part", "test", "--root", tmp_path / "out")
    prepare(*test)
    data = open_data_set("folder", root=str(tmp_path / "out"))
    assert [[s.id for s in data.samples(part)] for part in ("train", "test")] == [["a", "b", "c"], ["d", "e", "f"]]
    assert data.unseen == ("bee",)
    assert data.samples("test")[0].image == str(tmp_path / "val" / "d.jpg")  # outside the root: as it is
    before = path.read_text()
    assert "0 masks made, 3 were there" in prepare(*test).stderr
    assert path.read_text() == before


def test_overwriting_a_part_keeps_the_rest(tmp_path, prepare):
    coco_export(tmp_path)
    for name in "abc":
        photo(tmp_path / "others" / f"{name}.jpg")
    for name in "def":
        photo(tmp_path / "val" / f"{name}.jpg")
    (tmp_path / "val.json").write_text(json.dumps(coco_json(names="def")))
    prepare(*of_coco(tmp_path))
    prepare("--coco", tmp_path / "val.json", "--images", tmp_path / "val", "--part", "test")
    path = tmp_path / "dataset.yaml"
    path.write_text(path.read_text().replace("unseen: []", "unseen: [bee]"))
    moved = (*of_coco(tmp_path)[:3], tmp_path / "others")
    assert is_one_line_error(prepare(*moved, code=2), "dataset.yaml: is there, and its train is not of this export")
    prepare(*moved, "--overwrite")
    described = yaml.safe_load(path.read_text())
    assert (described["unseen"], described["train"]["images"]) == (["bee"], "others/*.jpg")
    assert described["test"]["images"] == "val/*.jpg"
    content = coco_json()
    content["categories"][0]["name"] = "clouds"
    coco_export(tmp_path, content)
    done = prepare(*of_coco(tmp_path), "--overwrite")
    assert "has other classes now, so its test part is left out" in done.stderr
    assert "test" not in yaml.safe_load(path.read_text())


def test_a_share_is_held_out_by_name(tmp_path, prepare):
    content = coco_json(names=[f"{i:02}" for i in range(20)])
    for image in content["images"]:
        photo(tmp_path / "photos" / image["file_name"])
        content["annotations"].append(thing(100 + image["id"], image["id"], 7, [square(0, 0, 8, 2)]))
        content["annotations"].append(thing(300 + image["id"], image["id"], 3, [square(0, 4, 8, 5)]))
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    prepare(*of_coco(tmp_path), "--test", 0.3)
    held = set(labels_of(tmp_path, "test"))
    assert 1 < len(held) < 12
    assert held | set(labels_of(tmp_path)) == {f"{i:02}" for i in range(20)}
    done = prepare(*of_coco(tmp_path), "--test", 0.3, "--part", "test", code=2)
    assert is_one_line_error(done, "--test holds out some of the training images")


def test_background_is_a_class_if_asked_for(tmp_path, prepare):
    coco_export(tmp_path)
    prepare(*of_coco(tmp_path), "--background")
    wanted = expected_coco()["a"]
    wanted = np.where(wanted == NONE, 0, wanted + 1)
    wanted[4:, :6] = NONE  # the crowd's
    assert np.array_equal(masks_of(tmp_path)["a"], wanted)


def test_more_than_255_classes_take_16_bits(tmp_path, prepare):
    content = coco_json()
    content["categories"] += [{"id": 100 + i, "name": f"thing {i}"} for i in range(300)]
    content["annotations"].append(thing(9, 30, 399, [square(0, 0, 8, 1)]))
    coco_export(tmp_path, content)
    prepare(*of_coco(tmp_path), code=2)  # doctor: most classes never occur
    mask = masks_of(tmp_path)["c"]
    assert (mask.dtype, mask[0, 0], mask[1, 0]) == (np.uint16, 301, 65535)
    assert yaml.safe_load((tmp_path / "dataset.yaml").read_text())["ignore"] == 65535


def test_polygons_are_filled_as_cocos_own_tool_does():
    mask = filled([square(1, 1, 3, 3), [5, 0, 6, 0]], (HEIGHT, WIDTH))  # two corners cover nothing
    assert np.array_equal(mask, boxed(1, 1, 3, 3))
    triangle = filled([[0, 0, 8, 0, 0, 6]], (HEIGHT, WIDTH))
    assert 20 <= triangle.sum() <= 28  # half of 48
    assert not filled([], (HEIGHT, WIDTH)).any()


def test_the_json_is_read_once_and_waits_on_the_disk(tmp_path):
    path, read = coco_export(tmp_path), []
    found = read_instances(path, read.append)
    assert sum(read) == path.stat().st_size
    assert [row[0] for row in found.objects(10)] == [1, 2, 3, 4]
    assert found.store.execute("PRAGMA database_list").fetchone()[2] == ""  # a temporary file of SQLite's


def test_images_in_folders_and_under_other_names(tmp_path, prepare):
    content = coco_json()
    content["images"][0]["file_name"] = "/srv/data/in/a.jpg"
    content["images"][1]["file_name"] = "sub\\b.JPG"
    coco_export(tmp_path, content)
    (tmp_path / "photos" / "sub").mkdir()
    (tmp_path / "photos" / "b.jpg").rename(tmp_path / "photos" / "sub" / "b.JPG")
    prepare(*of_coco(tmp_path))
    described = yaml.safe_load((tmp_path / "dataset.yaml").read_text())
    assert described["train"]["images"] == ["photos/*.jpg", "photos/sub/*.jpg"]
    assert sorted(labels_of(tmp_path)) == ["a", "b", "c"]


def broken(change):
    content = coco_json()
    change(content)
    return json.dumps(content)


WRONG_COCO = {
    "no json": ("[1, 2", ["annotations.json: is no whole JSON", "Export it again"]),
    "half a json": (json.dumps(coco_json())[:-400], ["annotations.json: is no whole JSON"]),
    "nothing": ("", ["annotations.json: is no whole JSON"]),
    "another schema": (
        '{"shapes": [], "version": "5.0"}',
        ["annotations.json: not COCO's instances: its list 'images' is empty or not there"],
    ),
    "a list of numbers": (broken(lambda c: c.update(images=[1])), ["images holds 1, which is no mapping"]),
    "no size": (broken(lambda c: c["images"][0].pop("height")), ["an entry of its lists has no 'height'"]),
    "a category that isn't": (
        broken(lambda c: c["annotations"][0].update(category_id=99)),
        ["category_id 99, which is in no entry of `categories` (7, 3)"],
    ),
    "an image that isn't": (broken(lambda c: c["annotations"][0].update(image_id=99)), ["image_id 99", "`images`"]),
    "an image missing": (
        broken(lambda c: c["images"][0].update(file_name="x.jpg")),
        ["image 'x.jpg' is not in", "--images"],
    ),
    "one id twice": (broken(lambda c: c["images"][1].update(id=10)), ["two images have the id 10"]),
    "one file twice": (
        broken(lambda c: c["images"][1].update(file_name="a.jpg")),
        ["two images are the file", "a.jpg"],
    ),
    "a category twice": (broken(lambda c: c["categories"][1].update(id=7)), ["two categories have the id 7"]),
    "a name twice": (broken(lambda c: c["categories"][1].update(name="sky")), ["classes: 'sky' is listed twice"]),
    "a crowd in words": (
        broken(lambda c: c["annotations"][0].update(iscrowd="0")),
        ["an object's iscrowd is '0'; want 0 or 1"],
    ),
    "boxes alone": (
        broken(lambda c: [a.update(segmentation=[]) for a in c["annotations"]]),
        ["its 5 objects are boxes without a `segmentation`"],
    ),
    "odd corners": (
        broken(lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3]])),
        ["'a.jpg', annotation 1", "x, y"],
    ),
    "text for corners": (broken(lambda c: c["annotations"][0].update(segmentation=[["a", "b"]])), ["aren't numbers"]),
    "far away": (
        broken(lambda c: c["annotations"][0].update(segmentation=[[0, 0, 1e7, 0, 1, 1]])),
        ["reaches 1e+07, in an image of 8 x 6 pixels"],
    ),
    "runs that are short": (
        broken(lambda c: c["annotations"][4]["segmentation"].update(counts=[3, 4])),
        ["'b.jpg', annotation 5", "runs of 7 pixels don't fill a mask of 6 x 8"],
    ),
    "runs of another size": (
        broken(lambda c: c["annotations"][4]["segmentation"].update(size=[8, 6])),
        ["runs of 8 x 6 pixels (height x width), and its image has 6 x 8"],
    ),
    "another image's size": (
        broken(lambda c: c["images"][2].update(width=9)),
        ["c.jpg: is 8 x 6 pixels, and its labels are of 9 x 6"],
    ),
}


@pytest.mark.parametrize("name", WRONG_COCO)
def test_wrong_coco(name, tmp_path, prepare):
    text, words = WRONG_COCO[name]
    coco_export(tmp_path).write_text(text)
    assert is_one_line_error(prepare(*of_coco(tmp_path), code=2), *words)
    assert not (tmp_path / "dataset.yaml").exists()


def test_some_boxes_are_told(tmp_path, prepare):
    content = coco_json()
    content["annotations"][0]["segmentation"] = []
    coco_export(tmp_path, content)
    assert "1 objects are boxes without an outline" in prepare(*of_coco(tmp_path)).stderr


def test_two_images_with_one_stem(tmp_path, prepare):
    content = coco_json()
    content["images"][1]["file_name"] = "a.png"
    coco_export(tmp_path, content)
    photo(tmp_path / "photos" / "a.png")
    done = prepare(*of_coco(tmp_path), code=2)
    assert is_one_line_error(done, "a.jpg", "a.png", "two images with one stem, 'a'", "Rename one")


def test_turned_images(tmp_path, prepare):
    """Labels that fit the pixels as they are stored are read so; an image of equal sides can't tell."""
    exif = Image.Exif()
    exif[274] = 6
    coco_export(tmp_path)
    photo(tmp_path / "photos" / "a.jpg", exif=exif)
    prepare(*of_coco(tmp_path))
    assert yaml.safe_load((tmp_path / "dataset.yaml").read_text())["exif"] == "as_stored"
    assert labels_of(tmp_path)["a"].shape == (HEIGHT, WIDTH)
    photo(tmp_path / "photos" / "b.jpg", size=(HEIGHT, WIDTH), exif=exif)  # upright 8 x 6
    done = prepare(*of_coco(tmp_path), "--root", tmp_path / "again", code=2)
    assert is_one_line_error(done, "b.jpg", "a.jpg", "labels of the one fit the image turned by its EXIF orientation")


# Resuming


def test_killed_it_goes_on_and_makes_nothing_twice(tmp_path, prepare):
    coco_export(tmp_path)
    code = (
        "import os, signal, sys\n"
        "sys.argv = ['cli.py', *sys.argv[1:]]\n"
        "import cache.files, cli\n"
        "real, calls = os.fsync, []\n"
        "def sync(descriptor):\n"
        "    calls.append(descriptor)\n"
        "    if len(calls) == 3: os.kill(os.getpid(), signal.SIGKILL)\n"  # file, folder, second file
        "    real(descriptor)\n"
        "cache.files.os.fsync = sync\n"
        "cli.main()\n"
    )
    command = [sys.executable, "-c", code, "prepare", "folder", *map(str, of_coco(tmp_path))]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    folder = tmp_path / "prepared_masks" / "train"
    assert sorted(path.suffix for path in folder.iterdir()) == [".partial", ".png"]
    assert not (tmp_path / "dataset.yaml").exists()
    first = (folder / "a.png").stat().st_mtime_ns
    assert "2 masks made, 1 were there" in prepare(*of_coco(tmp_path)).stderr
    assert (folder / "a.png").stat().st_mtime_ns == first
    assert sorted(path.name for path in folder.iterdir()) == ["a.png", "b.png", "c.png"]
    assert all(np.array_equal(mask, expected_coco()[name]) for name, mask in masks_of(tmp_path).items())


def test_what_was_made_of_something_else_is_never_taken_for_it(tmp_path, prepare):
    coco_export(tmp_path)
    prepare(*of_coco(tmp_path))
    content = coco_json()
    content["annotations"][4]["segmentation"]["counts"] = runs(boxed(0, 0, 8, 2))
    coco_export(tmp_path, content)
    done = prepare(*of_coco(tmp_path), code=2)
    assert is_one_line_error(done, "b.png: is there, and was made of other annotations", "--overwrite")
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "prepared_masks" / "train").iterdir()}
    assert "1 masks made, 2 were there" in prepare(*of_coco(tmp_path), "--overwrite").stderr
    now = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "prepared_masks" / "train").iterdir()}
    assert [name for name in times if times[name] != now[name]] == ["b.png"]
    assert masks_of(tmp_path)["b"][2, 0] == NONE
    content["categories"][0]["name"] = "clouds"
    coco_export(tmp_path, content)
    done = prepare(*of_coco(tmp_path), code=2)
    assert is_one_line_error(done, "dataset.yaml: is there, and its classes are not of this export", "--overwrite")
    picture(tmp_path / "own" / "prepared_masks" / "train" / "a.png", np.zeros((HEIGHT, WIDTH)))
    done = prepare(*of_coco(tmp_path), "--root", tmp_path / "own", code=2)
    assert is_one_line_error(done, "a.png: is there", "not by this command")


def test_other_ids_of_the_same_classes_are_other_annotations(tmp_path, prepare):
    coco_export(tmp_path)
    prepare(*of_coco(tmp_path))
    content = coco_json()
    content["categories"] = [{"id": 1, "name": "bee"}, {"id": 3, "name": "sky"}]  # what was bee's is sky's now
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] == 3]
    coco_export(tmp_path, content)
    assert is_one_line_error(prepare(*of_coco(tmp_path), code=2), "was made of other annotations")
    prepare(*of_coco(tmp_path), "--overwrite", code=2)  # bee has no pixel, says doctor
    assert labels_of(tmp_path)["b"][0].tolist() == [1] * WIDTH


def test_an_image_has_one_part(tmp_path, prepare):
    coco_export(tmp_path)
    prepare(*of_coco(tmp_path))
    done = prepare(*of_coco(tmp_path), "--part", "test", code=2)
    assert is_one_line_error(done, "dataset.yaml: 3 of these images are in its train part", "a.jpg", "Give --test")
    assert not (tmp_path / "prepared_masks" / "test").exists()


def test_a_mark_before_the_json_is_skipped(tmp_path, prepare):
    path = coco_export(tmp_path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    prepare(*of_coco(tmp_path))
    assert np.array_equal(masks_of(tmp_path)["a"], expected_coco()["a"])


def test_crowds_are_told(tmp_path, prepare):
    coco_export(tmp_path)
    assert "annotations.json: 1 x crowd" in prepare(*of_coco(tmp_path)).stderr
    content = coco_json()
    for each in content["annotations"]:
        each["iscrowd"] = 1
    coco_export(tmp_path, content)
    done = prepare(*of_coco(tmp_path), "--root", tmp_path / "out", code=2)
    assert is_one_line_error(done, "its 5 objects are all crowds", "CVAT")


# Colours


def test_cvat(tmp_path, prepare):
    path = cvat_export(tmp_path)
    done = prepare("--colours", path)
    assert "'background' is what nobody has drawn on" in done.stderr
    for mask in masks_of(tmp_path).values():
        assert mask[:, 0].tolist() == [1, 1, 0, 0, NONE, NONE]
    described = yaml.safe_load((tmp_path / "dataset.yaml").read_text())
    assert (described["classes"], described["palette"]) == (["bee", "sky"], [list(BEE), list(SKY)])
    prepare("--colours", path, "--background", "--root", tmp_path / "closed")
    assert masks_of(tmp_path / "closed")["a"][:, 0].tolist() == [2, 2, 1, 1, 0, 0]


def colour_export(root: Path, text: str, **pixels) -> tuple:
    (root / "map.yaml").write_text(text)
    for name, colours in pixels.items():
        photo(root / "photos" / f"{name}.JPG", format="JPEG")
        picture(root / "drawn" / f"{name}_col.PNG", colours)
    return (
        "--colours",
        root / "map.yaml",
        "--images",
        root / "photos",
        "--masks",
        root / "drawn",
        "--mask-suffix",
        "_col",
    )


MAP = "sky: [[70, 130, 180], '#0000ff']\nbee: [200, 10, 10]\nignore: [0, 0, 0]\n"


def test_a_map_of_colours(tmp_path, prepare):
    pixels = coloured({"sky": SKY, "bee": BEE, "nothing": BLACK})
    pixels[0, 0] = (0, 0, 255)  # sky's other colour
    asked = colour_export(tmp_path, MAP, a=pixels)
    photo(tmp_path / "photos" / "plain.jpg")  # without a mask: unlabelled
    clear = np.dstack([pixels, np.full((HEIGHT, WIDTH), 255, np.uint8)])
    clear[0, 1, 3] = 0
    photo(tmp_path / "photos" / "b.jpg")
    picture(tmp_path / "drawn" / "b_col.png", clear)
    prepare(*asked)
    masks = masks_of(tmp_path)
    assert masks["a"][:, 0].tolist() == [0, 0, 1, 1, NONE, NONE]
    assert masks["b"][0].tolist() == [0, NONE, 0, 0, 0, 0, 0, 0]
    assert (masks["plain"] == NONE).all()
    described = yaml.safe_load((tmp_path / "dataset.yaml").read_text())
    assert described["classes"] == ["sky", "bee"]
    assert "palette" not in described  # sky has two
    assert sorted(labels_of(tmp_path)) == ["a", "b", "plain"]


def test_unknown_colours_of_all_masks_are_named(tmp_path, prepare):
    odd = coloured({"sky": SKY, "bee": (1, 2, 3), "nothing": BLACK})
    more = coloured({"sky": (1, 2, 3), "bee": BEE, "nothing": (9, 9, 9)})
    fine = coloured({"sky": SKY, "bee": BEE, "nothing": BLACK})
    asked = colour_export(tmp_path, MAP, a=odd, b=fine, c=more)
    done = prepare(*asked, code=2)
    assert is_one_line_error(done, "a_col.PNG", "colour [1, 2, 3] (32 pixels, first in", "map.yaml, or to its `ignore`")
    assert "colour [9, 9, 9] (16 pixels" in done.stderr
    assert "in 2 masks" in done.stderr
    assert sorted(masks_of(tmp_path)) == ["b"]
    assert not (tmp_path / "dataset.yaml").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sky: [70, 130]\n", ["map.yaml, sky: [70, 130] is no colour", "0-255"]),
        ("sky: blue\n", ["'blue' is no colour"]),
        ("- sky\n", ["want `name: [r, g, b]` a class; found list"]),
        ("ignore: [0, 0, 0]\n", ["map.yaml: names no class"]),
        ("sky: [1, 2, 3]\nbee: [1, 2, 3]\n", ["'sky' and 'bee' have the colour [1, 2, 3]"]),
        ("sky: [1, 2, 3\n", ["map.yaml: not readable as YAML"]),
        ("no: [1, 2, 3]\n", ["name 0 is False; want text"]),
    ],
)
def test_wrong_maps(text, words, tmp_path, prepare):
    asked = colour_export(tmp_path, text, a=coloured({"sky": SKY, "bee": BEE, "nothing": BLACK}))
    assert is_one_line_error(prepare(*asked, code=2), *words)


def test_masks_and_images_that_do_not_pair(tmp_path, prepare):
    fine = coloured({"sky": SKY, "bee": BEE, "nothing": BLACK})
    asked = colour_export(tmp_path, MAP, a=fine)
    assert is_one_line_error(prepare(*asked[:-2], code=2), "a_col.PNG: a mask without an image", "--mask-suffix")
    assert is_one_line_error(prepare(*asked[:-1], "_no", code=2), "no mask ends in '_no'")
    picture(tmp_path / "drawn" / "a_col.bmp", fine)
    assert is_one_line_error(prepare(*asked, code=2), "a_col.PNG", "a_col.bmp", "two masks with one stem, 'a'")
    (tmp_path / "drawn" / "a_col.bmp").unlink()
    picture(tmp_path / "drawn" / "a_col.PNG", fine[:, :5])
    assert is_one_line_error(prepare(*asked, code=2), "a.JPG: is 8 x 6 pixels, and its labels are of 5 x 6")
    assert is_one_line_error(prepare(*asked[:3], tmp_path / "no", *asked[4:], code=2), "no: no such folder. --images")


def test_a_broken_image_is_told_and_extract_may_leave_it_out(tmp_path, prepare):
    coco_export(tmp_path)
    (tmp_path / "photos" / "c.jpg").write_bytes(b"broken")
    assert "1 images can't be decoded" in prepare(*of_coco(tmp_path)).stderr


# 0 and 255


@pytest.mark.parametrize("white", [255, 1])
def test_binary(white, tmp_path, prepare):
    mask = boxed(0, 0, 4, 6).astype(np.uint8) * white
    photo(tmp_path / "photos" / "a.jpg")
    picture(tmp_path / "drawn" / "a.png", mask)
    photo(tmp_path / "photos" / "b.jpg")
    picture(tmp_path / "drawn" / "b.tif", np.repeat(mask[..., None], 3, axis=2))  # three equal channels
    photo(tmp_path / "photos" / "c.jpg")
    Image.fromarray(mask > 0).save(tmp_path / "drawn" / "c.bmp")
    photo(tmp_path / "photos" / "d.jpg")
    indexed = Image.fromarray((mask == 0).astype(np.uint8), "P")
    indexed.putpalette([255, 255, 255, 0, 0, 0])  # white first, as what makes files small may write it
    indexed.save(tmp_path / "drawn" / "d.png")
    asked = ("--binary", "house", "--images", tmp_path / "photos", "--masks", tmp_path / "drawn")
    prepare(*asked)
    for found in masks_of(tmp_path).values():
        assert np.array_equal(found, boxed(0, 0, 4, 6).astype(np.uint8))
    assert yaml.safe_load((tmp_path / "dataset.yaml").read_text())["classes"] == ["background", "house"]
    picture(tmp_path / "drawn" / "a.png", np.array([[0, 255, 255, 128, 127, 0, 0, 0]] * HEIGHT))
    done = prepare(*asked, "--overwrite", code=2)
    assert is_one_line_error(done, "a.png", "value 127 (6 pixels", "value 128 (6 pixels", "0 and 255 alone")
    (tmp_path / "drawn" / "a.png").rename(tmp_path / "drawn" / "a.JPG")  # its image isn't one without a label
    assert is_one_line_error(prepare(*asked, "--overwrite", code=2), "a.JPG: a JPEG mask", "PNG")
    Image.fromarray(mask).save(tmp_path / "drawn" / "a.png", "JPEG")
    assert is_one_line_error(prepare(*asked, "--overwrite", code=2), "a.png: a JPEG mask")


# Label Studio


def of_label_studio(root: Path) -> tuple:
    return ("--label-studio", root / "brushes", "--tasks", root / "export.json", "--images", root / "photos")


@pytest.mark.parametrize("is_min", [False, True])
def test_label_studio(is_min, tmp_path, prepare):
    label_studio_export(tmp_path, is_min=is_min)
    assert "passed over: 1 x brush without a label" in prepare(*of_label_studio(tmp_path)).stderr
    assert yaml.safe_load((tmp_path / "dataset.yaml").read_text())["classes"] == ["bee/wasp", "garden bee", "sky"]
    a = np.where(boxed(0, 0, 8, 4), 2, NONE)
    a[1:3, 1:3] = 0  # the bee, smaller, on the sky
    b = np.where(boxed(0, 0, 2, 2) | boxed(6, 4, 8, 6), 1, NONE)
    masks = masks_of(tmp_path)
    assert np.array_equal(masks["a"], a)
    assert np.array_equal(masks["b"], b)
    assert (masks["c"] == NONE).all()


def test_label_studio_loses_nothing_silently(tmp_path, prepare):
    path = label_studio_export(tmp_path)
    asked, tasks = of_label_studio(tmp_path), json.loads(path.read_text())
    region = {"from_name": "shapes", "value": {"points": [[0, 0], [9, 0], [9, 9]], "polygonlabels": ["tree"]}}
    tasks[2]["annotations"][0]["result"] = [region]
    path.write_text(json.dumps(tasks))
    assert "passed over: 1 x region that isn't of the brush" in prepare(*asked).stderr
    tasks[2]["annotations"][0]["result"] = [{"from_name": "my-tag", "value": {"rle": [0], "brushlabels": ["sky"]}}]
    path.write_text(json.dumps(tasks))
    assert is_one_line_error(prepare(*asked, code=2), "task 3 has a brush region 'sky', of which no PNG is in")
    tasks[2] = {"id": 3, "data": {"before": "b.jpg", "photo": "c.jpg"}}
    path.write_text(json.dumps(tasks))
    assert is_one_line_error(prepare(*asked, code=2), "either may be the image of task 3")
    tasks[2] = {"id": 3, "data": {"before": "b.jpg", "image": "c.jpg"}}
    path.write_text(json.dumps(tasks))
    prepare(*asked)
    assert labels_of(tmp_path)["b"][0, 0] == 1


def test_wrong_label_studio(tmp_path, prepare):
    label_studio_export(tmp_path)
    asked = of_label_studio(tmp_path)
    extra = brush(tmp_path, 9, 1, "my-tag-sky-0", boxed(0, 0, 1, 1))
    assert is_one_line_error(prepare(*asked, code=2), extra.name, "has no task 9")
    extra.unlink()
    extra = brush(tmp_path, 1, 99, "my-tag-sky-0", boxed(0, 0, 1, 1))
    assert is_one_line_error(prepare(*asked, code=2), "task 1 has two annotations. Keep the PNGs of one")
    extra.unlink()
    extra = brush(tmp_path, 1, 11, "my-tag-sky-bee-0", boxed(0, 0, 1, 1))
    assert is_one_line_error(prepare(*asked, code=2), "has no region 'my-tag-sky-bee'")
    extra.unlink()
    extra = picture(tmp_path / "brushes" / "mine.png", boxed(0, 0, 1, 1))
    assert is_one_line_error(prepare(*asked, code=2), "mine.png: not called as Label Studio calls brush labels")
    extra.unlink()
    extra = brush(tmp_path, 1, 11, "my-tag-sky-1", boxed(0, 0, 1, 1, (2, 2)))
    assert is_one_line_error(prepare(*asked, code=2), extra.name, "2 x 2 pixels, others of its task 8 x 6")
    extra.unlink()
    tasks = json.loads((tmp_path / "export.json").read_text())
    tasks[0]["annotations"][0]["result"][0]["value"]["brushlabels"] = ["sky", "bee"]
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    assert is_one_line_error(prepare(*asked, code=2), "task 1: a region has several labels, 'sky', 'bee'")
    tasks[0]["annotations"][0]["result"] = [
        {"from_name": tag, "value": {"rle": [0], "brushlabels": [label]}}
        for tag, label in (("my-tag", "sky-bee"), ("my-tag-sky", "bee"))
    ]
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    assert is_one_line_error(prepare(*asked, code=2), "files of 'my-tag-sky-bee' may be of two labels")
    (tmp_path / "export.json").write_text(json.dumps([{**task, "annotations": []} for task in tasks]))
    assert is_one_line_error(prepare(*asked, code=2), "has no region 'my-tag-", "(it has no brush)")
    label_studio_export(tmp_path)
    (tmp_path / "photos" / "b.jpg").unlink()
    assert is_one_line_error(prepare(*asked, code=2), "task 2: its image, 'b.jpg', is not in")
    (tmp_path / "export.json").write_text('{"tasks": []}')
    assert is_one_line_error(prepare(*asked, code=2), "export.json: holds no task")
    (tmp_path / "export.json").write_text('[{"id": 1')
    assert is_one_line_error(prepare(*asked, code=2), "export.json: is no whole JSON")
    assert is_one_line_error(prepare(*asked[:2], *asked[4:], code=2), "--label-studio needs --tasks")


# Supervisely


def test_supervisely(tmp_path, prepare):
    supervisely_export(tmp_path)
    done = prepare("--supervisely", tmp_path)
    assert "'box' is of rectangles, which label no pixels: no class" in done.stderr
    assert "passed over: 2 x object of geometry rectangle" in done.stderr
    wanted = np.where(boxed(0, 0, 8, 4), 0, NONE)
    wanted[0:2, 6:7] = NONE  # the hole without its edge: columns 5 and 7, row 2 belong to the sky
    wanted[0, 6] = 0
    wanted[3:5, 2] = 1
    wanted[4, 3] = 1
    for part, name in (("train", "a"), ("test", "b")):
        assert np.array_equal(masks_of(tmp_path, part)[name], wanted)
    described = yaml.safe_load((tmp_path / "dataset.yaml").read_text())
    assert described["palette"] == [[70, 130, 180], [200, 10, 10]]
    assert described["test"]["images"] == "val/img/*.jpg"


def test_data_sets_of_other_names_are_one_part(tmp_path, prepare):
    supervisely_export(tmp_path, folders=("ds0", "ds1"))
    prepare("--supervisely", tmp_path)
    assert sorted(labels_of(tmp_path)) == ["a", "b"]


def test_wrong_supervisely(tmp_path, prepare):
    supervisely_export(tmp_path)
    note = tmp_path / "train" / "ann" / "a.jpg.json"
    found = json.loads(note.read_text())
    asked = ("--supervisely", tmp_path)

    def changed(change, *words):
        content = json.loads(json.dumps(found))
        change(content)
        note.write_text(json.dumps(content))
        assert is_one_line_error(prepare(*asked, code=2), "a.jpg.json", *words)

    changed(lambda c: c["objects"][0].update(classTitle="tree"), "an object is a 'tree', which is no class in")
    changed(lambda c: c["objects"][1]["bitmap"].update(origin=[7, 5]), "is not inside the image of 8 x 6")
    changed(lambda c: c["objects"][1]["bitmap"].update(data="eJw"), "a bitmap can't be decoded")
    changed(lambda c: c["objects"][0]["points"].update(exterior=[[0, 0], [1e9, 2]]), "is no corner of a polygon")
    changed(lambda c: c.pop("size"), "not Supervisely's annotation of an image (KeyError: 'size')")
    note.write_text("{")
    assert is_one_line_error(prepare(*asked, code=2), "a.jpg.json: is no whole JSON")
    (tmp_path / "train" / "img" / "a.jpg").rename(tmp_path / "train" / "img" / "z.jpg")
    assert is_one_line_error(prepare(*asked, code=2), "a.jpg.json: its image is not in")
    (tmp_path / "meta.json").write_text('{"categories": []}')
    assert is_one_line_error(prepare(*asked, code=2), "meta.json: not Supervisely's")
    (tmp_path / "meta.json").unlink()
    assert is_one_line_error(prepare(*asked, code=2), "meta.json: can't be read")


# Roboflow


def test_roboflow_coco(tmp_path, prepare):
    roboflow_coco_export(tmp_path)
    done = prepare("--roboflow", tmp_path)
    assert "'garden' is the name of a group of categories and of no object: no class" in done.stderr
    assert "valid: left out" in done.stderr
    wanted = np.where(boxed(0, 0, 8, 4), 1, NONE)
    wanted[1:3, 1:3] = 0
    for part in ("train", "test"):
        assert np.array_equal(masks_of(tmp_path, part)[f"a_jpg.rf.{part}"], wanted)
    assert yaml.safe_load((tmp_path / "dataset.yaml").read_text())["classes"] == ["bee", "sky"]
    prepare("--roboflow", tmp_path / "train", "--root", tmp_path / "one", "--part", "test")  # one folder alone
    assert list(labels_of(tmp_path / "one", "test")) == ["a_jpg.rf.train"]


def test_roboflow_masks(tmp_path, prepare):
    roboflow_masks_export(tmp_path)
    prepare("--roboflow", tmp_path)
    assert masks_of(tmp_path)["a_jpg.rf.train"][:, 0].tolist() == [0, 0, 1, 1, NONE, NONE]
    assert list(labels_of(tmp_path, "test")) == ["a_jpg.rf.valid"]
    prepare("--roboflow", tmp_path, "--background", "--root", tmp_path / "closed")
    assert masks_of(tmp_path / "closed")["a_jpg.rf.train"][:, 0].tolist() == [1, 1, 2, 2, 0, 0]


def test_wrong_roboflow(tmp_path, prepare):
    roboflow_masks_export(tmp_path)
    asked = ("--roboflow", tmp_path)
    picture(tmp_path / "train" / "a_jpg.rf.train_mask.png", np.full((HEIGHT, WIDTH), 7))
    assert is_one_line_error(prepare(*asked, code=2), "value 7 (48 pixels", "_classes.csv")
    (tmp_path / "valid" / "_classes.csv").write_text("Pixel Value, Class\n0, background\n1, sky\n2, bee\n")
    assert is_one_line_error(prepare(*asked, code=2), "list other classes")
    (tmp_path / "train" / "_classes.csv").write_text("filename, bee\n")
    assert is_one_line_error(prepare(*asked, code=2), "_classes.csv: want a line `Pixel Value, Class`")
    assert is_one_line_error(prepare("--roboflow", tmp_path / "no", code=2), "no: no such folder")
    (tmp_path / "empty").mkdir()
    assert is_one_line_error(prepare("--roboflow", tmp_path / "empty", code=2), "holds no train/_annotations.coco.json")


# The command


def test_one_source_and_what_belongs_to_it(tmp_path, prepare, run_cli):
    coco_export(tmp_path)
    assert is_one_line_error(prepare(code=2), "--coco, --colours, --binary", "none is given")
    both = prepare(*of_coco(tmp_path), "--roboflow", tmp_path, code=2)
    assert is_one_line_error(both, "--coco and --roboflow are given")
    assert is_one_line_error(prepare(*of_coco(tmp_path)[:2], code=2), "--coco needs --images, the folder of its images")
    assert is_one_line_error(prepare(*of_coco(tmp_path), "--masks", tmp_path, code=2), "--masks is nothing for --coco")
    assert is_one_line_error(prepare(*of_coco(tmp_path), "--part", "val", code=2), "no part is called 'val'")
    assert is_one_line_error(prepare(*of_coco(tmp_path), "--test", 2, code=2), "want a share of the images")
    done = run_cli("prepare", "voc", "--root", tmp_path, *of_coco(tmp_path))
    assert is_one_line_error(done, "the other options are those of `folder`")
    assert is_one_line_error(run_cli("prepare", "voc"), "--root is missing")


def test_a_missing_package_is_named(tmp_path, prepare, monkeypatch):
    coco_export(tmp_path)
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    assert is_one_line_error(prepare(*of_coco(tmp_path), code=2), "pycocotools: pip install -e '.[prepare]'")
    monkeypatch.setitem(sys.modules, "ijson", None)
    assert is_one_line_error(prepare(*of_coco(tmp_path), code=2), "ijson: pip install -e '.[prepare]'")
