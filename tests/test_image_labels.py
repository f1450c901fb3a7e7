"""Data sets with a background class and image-level labels: VOC and COCO 2014 on layouts made here, and the demo."""

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import load
from pipeline.data.base import DataError, open_data_set
from pipeline.data.classes import COCO_STUFF_CLASSES
from pipeline.data.prompts import templates
from pipeline.data.words import BACKGROUNDS, background_names, fused_name, names_of_classes
from pipeline.looking.results import result_table
from tests.conftest import ROOT
from tests.test_data_sets import save_image, save_list, save_mask

XML = "<annotation><filename>{}.jpg</filename>{}</annotation>"
THING = (
    "<object><name>{}</name><difficult>{}</difficult><part><name>head</name></part>"
    "<bndbox><xmin>1</xmin></bndbox></object>"
)


def save_objects(path: Path, *things) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(XML.format(path.stem, "".join(THING.format(*thing) for thing in things)))


@pytest.fixture
def voc(tmp_path) -> Path:
    root = tmp_path / "VOC2012"
    for name, ids in (("a", (0, 1, 20, 255)), ("b", (0, 0, 255, 255))):
        save_image(root / "JPEGImages" / f"{name}.jpg")
        save_mask(root / "SegmentationClass" / f"{name}.png", ids)
    save_objects(root / "Annotations" / "a.xml", ("tvmonitor", 0), ("person", 1), ("person", 0))
    save_objects(root / "Annotations" / "b.xml")
    for name in ("train_aug", "val"):
        save_list(root / "ImageSets" / "Segmentation" / f"{name}.txt", "a", "b")
    return root


def test_voc_with_background(voc):
    data = open_data_set("voc", root=str(voc), background=True)
    assert (data.background, len(data.classes), data.unseen) == (0, 21, ())
    assert (data.classes[0], data.classes[1], data.classes[20]) == ("background", "aeroplane", "tvmonitor")
    assert data.palette[:2].tolist() == [[0, 0, 0], [128, 0, 0]]  # VOC's own colours
    a, b = data.samples("train")
    assert data.labels(a).tolist() == data.seen_labels(a).tolist() == [[0, 1, 20, -1]]
    assert data.tags(a) == (15, 20)  # person, though one is difficult; parts of objects are none
    assert data.tags(b) == ()
    assert open_data_set("voc", root=str(voc), background=True, split="voc-15-5").unseen_ids == (16, 17, 18, 19, 20)


def test_voc_tags_from_masks_and_without_background(voc):
    masks = open_data_set("voc", root=str(voc), background=True, tags="masks")
    assert [masks.tags(s) for s in masks.samples("train")] == [(1, 20), ()]
    plain = open_data_set("voc", root=str(voc))
    assert (plain.background, len(plain.classes)) == (None, 20)
    assert plain.tags(plain.samples("train")[0]) == (14, 19)


@pytest.mark.parametrize("background", [True, False])
def test_voc_annotations_that_are_wrong(voc, background):
    data = open_data_set("voc", root=str(voc), background=background)
    a, _ = data.samples("train")
    path = voc / "Annotations" / "a.xml"
    before = data.mask_stamp(a)
    save_objects(path, ("tvmonitr", 0))
    assert data.mask_stamp(a) != before  # so CAMs are made again
    with pytest.raises(DataError, match=r"a.xml: voc has no class 'tvmonitr'; the nearest valid one is 'tvmonitor'"):
        data.tags(a)
    for content, wrong in (("<annotation><object>", "not XML"), ("<html></html>", "its root is <html>")):
        path.write_text(content)
        with pytest.raises(DataError, match=wrong):
            data.tags(a)
    path.unlink()
    with pytest.raises(DataError, match=r"a.xml: an image's labels can't be read: .*data.tags to masks"):
        data.tags(a)
    with pytest.raises(DataError, match="no image-level labels from 'json'; the nearest valid one is"):
        open_data_set("voc", root=str(voc), tags="json")


# --- COCO 2014 ------------------------------------------------------------------------------------


def coco(root: Path, images: str, masks: str) -> Path:
    """Images 9 and 25 of train2014, 42 of val2014; `{}` stands for the part."""
    for part, number, ids in (("train", 9, (0, 1, 80, 255)), ("train", 25, (0, 0, 0, 0)), ("val", 42, (0, 3, 3, 3))):
        name = f"COCO_{part}2014_{number:012d}"
        save_image(root / images.format(f"{part}2014") / f"{name}.jpg")
        save_mask(root / masks.format(f"{part}2014") / f"{name[-12:]}.png", ids)
    return root


@pytest.mark.parametrize(
    ("images", "masks"),
    [("JPEGImages/{}", "SegmentationClass/{}"), ("{}", "SegmentationClass/{}"), ("JPEGImages", "SegmentationClass")],
)
def test_coco14_in_its_layouts(tmp_path, images, masks):
    data = open_data_set("coco14", root=str(coco(tmp_path, images, masks)))
    assert (data.background, len(data.classes), data.unseen, len(data.palette)) == (0, 81, (), 81)
    assert (data.classes[0], data.classes[1], data.classes[80]) == ("background", "person", "toothbrush")
    train = data.samples("train")
    assert [s.id for s in train] == ["000000000009", "000000000025"]
    assert [s.id for s in data.samples("test")] == ["000000000042"]
    assert data.labels(train[0]).tolist() == [[0, 1, 80, -1]]
    assert [data.tags(s) for s in train] == [(1, 80), ()]


def test_coco14_tags_from_instances(tmp_path):
    root = coco(tmp_path, "{}", "SegmentationClass/{}")
    data = open_data_set("coco14", root=str(root), tags="json")
    first, second = data.samples("train")
    with pytest.raises(DataError, match=r"instances_train2014.json: the images' labels can't be read"):
        data.tags(first)
    found = {
        # COCO's own ids have gaps: 90 is the eightieth class
        "categories": [{"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}],
        "annotations": [{"image_id": 9, "category_id": i} for i in (90, 1, 90)],
    }
    path = root / "annotations" / "instances_train2014.json"
    path.parent.mkdir()
    path.write_text(json.dumps(found))
    assert (data.tags(first), data.tags(second)) == ((1, 80), ())
    assert data.mask_stamp(first).endswith("(1, 80)")
    found["categories"][0]["name"] = "persn"
    for content, wrong in ((json.dumps(found), "coco14 has no class 'persn'"), ("{}", "not COCO's instances")):
        path.write_text(content)
        other = open_data_set("coco14", root=str(root), tags="json")
        with pytest.raises(DataError, match=wrong):
            other.tags(other.samples("train")[0])


def test_coco14_lists_and_what_is_missing(tmp_path):
    root = coco(tmp_path, "{}", "SegmentationClass")
    (root / "SegmentationClass" / "000000000025.png").unlink()
    with pytest.raises(DataError, match=r"1 images of train2014 have no mask: '000000000025'. .*data.train_list"):
        open_data_set("coco14", root=str(root)).samples("train")
    save_list(root / "train.txt", "COCO_train2014_000000000009")
    listed = open_data_set("coco14", root=str(root), train_list="train.txt")
    (sample,) = listed.samples("train")
    assert sample.id == "000000000009"
    save_mask(root / "SegmentationClass" / "000000000009.png", (0, 1, 90, 255))
    with pytest.raises(DataError, match=r"label id 90 .* convert the masks to 0-80"):
        listed.labels(sample)
    save_list(root / "train.txt", "COCO_train2014_000000000009", "000000000009")
    with pytest.raises(DataError, match="listed twice"):
        open_data_set("coco14", root=str(root), train_list="train.txt").samples("train")
    (root / "val2014").rename(root / "val")
    with pytest.raises(DataError, match="has no folder JPEGImages/val2014 nor val2014 nor JPEGImages"):
        open_data_set("coco14", root=str(root)).samples("test")


# --- the demo, and text ---------------------------------------------------------------------------


def test_the_demo_with_background():
    textures = ["grass", "sand", "water", "brick"]
    world = open_data_set("demo", train=4, test=1)
    data = open_data_set("demo", train=4, test=1, background=textures)
    assert (data.background, len(data.classes), data.unseen) == (0, 17, ())
    for one, other in zip(world.samples("train"), data.samples("train"), strict=True):
        names = np.array(world.classes)[world.labels(one)]
        names[np.isin(names, textures)] = "background"
        assert (names == np.array(data.classes)[data.labels(other)]).all()
        assert set(np.array(data.classes)[list(data.tags(other))]) == set(np.unique(names)) - {"background"}
    with pytest.raises(DataError, match="no class is called 'gras'"):
        open_data_set("demo", background=["gras"])


def test_names_of_classes():
    assert names_of_classes(("background", "bee"), {"background": ["grass", "sand"]}) == [("grass", "sand"), ("bee",)]
    with pytest.raises(DataError, match=r"text.synonyms: no class is called 'backgroud'; .* 'background'"):
        names_of_classes(("background", "bee"), {"backgroud": ["grass"]})
    for names in ([], [" "]):
        with pytest.raises(DataError, match=r"text\.synonyms\.bee is"):
            names_of_classes(("background", "bee"), {"bee": names})


def test_renames_of_maskclip():
    assert names_of_classes(("aeroplane", "cat", "tvmonitor"), "maskclip") == [("airplane",), ("cat",), ("tv monitor",)]
    named = dict(zip(COCO_STUFF_CLASSES, names_of_classes(COCO_STUFF_CLASSES, "maskclip"), strict=True))
    some = {"wall-brick": "brick wall", "wall-other": "wall", "desk-stuff": "desk", "wine glass": "wine glass"}
    assert {name: named[name][0] for name in some} == some
    published = """building, ceiling, tile ceiling, desk, door, marble floor, floor, stone floor, tile floor,
        wood floor, food, furniture, ground, mirror, plant, sky, solid, structural, textile, brick wall, concrete wall,
        wall, panel wall, stone wall, tile wall, wood wall, water, blind window, window"""
    wanted = [" ".join(name.split()) for name in published.split(",")]
    assert [named[name][0] for name in COCO_STUFF_CLASSES if named[name] != (name,)] == wanted
    assert len(set(named.values())) == 171  # no two classes are called alike
    with pytest.raises(DataError, match=r"text.synonyms: unknown set 'maskclp'; .* 'maskclip'"):
        names_of_classes(("cat",), "maskclp")


# --- presets and tables ---------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "words", "classes"), [("voc", "voc", 21), ("coco14", "coco", 81)])
def test_presets(tmp_path, name, words, classes):
    """Every option of theirs exists, their words name classes, and the text's background is the CAMs'."""
    config = load(ROOT / "config" / f"clip_es_{name}.yaml", [f"data.root={tmp_path}"])
    data = open_data_set(config.data.kind, **config.data.options())
    assert (len(data.classes), data.background, data.unseen) == (classes, 0, ())
    assert background_names(config.cams.background) == BACKGROUNDS[words]
    assert names_of_classes(data.classes, config.text.synonyms)[0] == BACKGROUNDS[words]
    assert templates(config.cams.template) == templates("clip-es")
    assert fused_name(config.cams.synonyms, "bird") == ("bird avian" if name == "voc" else "bird")
    assert (config.recipe, config.student.arch, config.cams.refine) == ("clip_es", "DeepLabV2", "crf")


def test_the_table_of_a_closed_set_has_one_miou():
    closed = {"pAcc": 80.04, "mIoU_S": 50.0, "mIoU_U": None, "hIoU": None, "gamma": 1.5, "unseen": []}
    table = result_table({"es": closed})
    assert (table.head, table.lines) == (("run", "pAcc", "mIoU"), [["es", "80.0", "50.0"]])
    both = result_table({"es": closed, "zs": closed | {"mIoU_U": 40.0, "hIoU": 44.4, "unseen": ["bee"]}})
    assert [line[3] for line in both.lines] == ["-", "40.0"]
