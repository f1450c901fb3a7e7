"""Labels that can't be what they seem: named with file and key by doctor, extract, cluster and eval, or read right."""

import json

import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline.data.base import BadImage, DataError, open_data_set, read_image
from pipeline.data.survey import complaints, look, look_at_masks, never_seen
from pipeline.teaching.verdict import verdict
from tests.conftest import is_one_line_error
from tests.test_verdict import HEALTHY
from tests.test_wrong_input import garden, options

COLOURS = np.array([(0, 0, 0), (128, 0, 0), (0, 128, 0)], np.uint8)
IDS = np.array([[0, 0, 0, 0], [1, 1, 1, 1], [2, 2, 2, 2]], np.uint8)  # (3, 4)


def described(folder, **changes):
    part = {"images": "train/*.jpg", "masks": "train/*.png"}
    text = {"name": "g", "classes": ["soil", "leaf", "bloom"], "train": part} | changes
    (folder / "dataset.yaml").write_text(yaml.safe_dump(text))
    return open_data_set("folder", root=str(folder))


@pytest.fixture
def pairs(tmp_path):
    """Writes images with the given masks (images of PIL, or ids) and a description; returns the data set."""

    def build(masks, exif=None, size=(4, 3), **changes):
        (tmp_path / "train").mkdir(exist_ok=True)
        for i, mask in enumerate(masks):
            tag = Image.Exif()
            if exif:
                tag[274] = exif
            Image.new("RGB", size, (9, 90, 200)).save(tmp_path / "train" / f"{i}.jpg", exif=tag)
            made = mask if isinstance(mask, Image.Image) else Image.fromarray(np.asarray(mask, np.uint8))
            made.save(tmp_path / "train" / f"{i}.png")
        return described(tmp_path, **changes)

    return build


def labels(data, place=0):
    return data.labels(data.samples("train")[place])


def indexed(ids, order):
    """An indexed mask that shows IDS' colours, with its palette in another order."""
    place = np.argsort(order)
    made = Image.fromarray(place[ids].astype(np.uint8), mode="P")
    made.putpalette(COLOURS[list(order)].tobytes())
    return made


# ---- values ------------------------------------------------------------------------------------


def test_values_give_raw_ids_their_classes(pairs):
    raw = [[0, 255, 7, 2]] * 3
    data = pairs([raw], values={0: "soil", 255: 1, 7: "ignore"})
    assert labels(data)[0].tolist() == [0, 1, -1, 2], "bloom keeps its position"
    data = pairs([[[0, 1, 2, 255]] * 3], values={255: "leaf"})
    with pytest.raises(DataError, match="label id 1 "):
        labels(data)
    data = pairs([Image.fromarray(np.array([[0, 1000, 2000, 0]] * 3, np.uint16))], values={1000: 1, 2000: "bloom"})
    assert labels(data)[0].tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": {255: "leef"}}, "raw id 255 is no class or id: 'leef'; the nearest valid one is 'leaf'"),
        ({"values": {255: 3}}, "raw id 255 is no class or id"),
        ({"values": {"x": 1}}, "'x' is no raw id"),
        ({"values": {-1: 1}}, "-1 is no raw id"),
        ({"values": [255]}, "values is"),
        ({"values": {255: 1}, "ignore": 255}, "ignore: 255 is 'leaf' in values"),
        ({"values": {0: 1}, "reduce_zero_label": True}, "leave the other out"),
        ({"values": {0: 1, 1: 2, 2: 1}}, "no raw id to class 'soil'"),
        ({"exif": "turned"}, "exif is 'turned'; want upright or as_stored"),
        ({"read_masks": "colour"}, "read_masks is 'colour'; want by_colour or by_index"),
        ({"read_masks": "by_colour"}, "no palette"),
        ({"ignore": [0, 0, 0]}, "no palette"),
        ({"ignore": [0, 0], "palette": COLOURS.tolist()}, "want a raw id, 0 to 65535, or colours"),
        ({"ignore": [0, 0, 0], "palette": COLOURS.tolist()}, "is the colour of class 'soil'"),
        ({"palette": [[1, 1, 1]] * 3, "read_masks": "by_colour"}, "'soil' and 'leaf' have the same colour"),
        ({"value": {255: 1}}, "unknown key 'value'; the nearest valid one is 'values'"),
    ],
)
def test_descriptions_that_contradict_themselves(tmp_path, changes, message):
    with pytest.raises(DataError, match=message) as caught:
        described(tmp_path, **changes)
    assert "dataset.yaml" in str(caught.value)


def test_a_key_that_stands_twice(tmp_path):
    (tmp_path / "dataset.yaml").write_text("classes: [a]\nclasses: [b]\ntrain: {images: x}\n")
    with pytest.raises(DataError, match="'classes' is given twice"):
        open_data_set("folder", root=str(tmp_path))


# ---- 0 and 255 ---------------------------------------------------------------------------------

BINARY = {"classes": ["background", "building"]}


def black_and_white(value=255):
    return [np.where(np.arange(12).reshape(3, 4) % 5 < i % 3 + 1, value, 0) for i in range(10)]


def kinds(data, part="train"):
    return [complaint.kind for complaint in complaints(data, [look(data, part, 64)], 10)]


def test_masks_of_0_and_255(pairs):
    assert kinds(pairs(black_and_white(), **BINARY)) == ["255 is ignored"]
    mended = pairs(black_and_white(), **BINARY, values={255: 1})
    assert kinds(mended) == []
    assert set(np.unique(labels(mended))) == {0, 1}
    assert kinds(pairs(black_and_white(), **BINARY, ignore=255)) == ["seen classes without a training pixel"]
    assert kinds(pairs(black_and_white(1), **BINARY)) == []


def test_nearly_all_masks_of_0_and_255(pairs):
    masks = [*black_and_white(), *black_and_white(1)[:1]]
    assert kinds(pairs(masks, **BINARY)) == ["255 is ignored"]
    partly = [np.array([[0, 1, 255, 255]] * 3), *black_and_white()]  # 255 beside both: parts without a label
    assert kinds(pairs(partly, **BINARY)) == []


def test_one_class_with_the_rest_unlabelled_is_fine(pairs):
    """What an own folder may look like: the first class is all that is labelled, and seen."""
    assert kinds(pairs(black_and_white(), **BINARY, unseen=["building"])) == []
    assert kinds(pairs(black_and_white(), classes=["soil"])) == []


def test_extract_and_eval_refuse_black_and_white(tmp_path, run_cli):
    folder = garden(tmp_path / "garden", images=8)
    for path in folder.glob("t*/*.png"):
        Image.fromarray(np.where(np.array(Image.open(path)) > 0, 255, 0).astype(np.uint8)).save(path)
    text = json.loads((folder / "dataset.yaml").read_text()) | BINARY
    del text["unseen"]
    (folder / "dataset.yaml").write_text(json.dumps(text))
    done = run_cli("extract", *options(tmp_path))
    assert is_one_line_error(done, "0.png", "values: {255: 1}", "ignore: 255", "'building'")
    assert not (tmp_path / "runs").exists()


def test_eval_refuses_test_masks_without_a_label(tmp_path, run_cli):
    folder = garden(tmp_path / "garden")
    for stage in ("extract", "cluster", "train"):
        assert run_cli(stage, *options(tmp_path)).returncode == 0
    for path in folder.glob("test/*.png"):
        Image.fromarray(np.full((64, 96), 255, np.uint8)).save(path)
    done = run_cli("eval", *options(tmp_path))
    assert is_one_line_error(done, "nothing is labelled", "3 test masks")
    assert not (tmp_path / "runs/garden/eval/metrics.json").exists()


# ---- palettes ----------------------------------------------------------------------------------


def test_palettes_that_permute_labels(pairs):
    masks = [indexed(IDS, (0, 1, 2)), indexed(IDS, (1, 0, 2))]
    data = pairs(masks)
    (found,) = complaints(data, [look(data, "train", 64)], 10)
    assert found.kind == "palettes differ"
    assert all(word in str(found) for word in ("0.png", "1.png", "`palette`", "read_masks: by_index"))
    mended = pairs(masks, palette=COLOURS.tolist())
    assert kinds(mended) == []
    assert (labels(mended, 0) == IDS).all()
    assert (labels(mended, 1) == IDS).all()
    meant = pairs(masks, palette=COLOURS.tolist(), read_masks="by_index")
    assert kinds(meant) == []
    assert labels(meant, 1)[:, 0].tolist() == [1, 0, 2]


def test_palettes_that_differ_between_the_parts(pairs, tmp_path):
    pairs([indexed(IDS, (0, 1, 2))] * 2)
    (tmp_path / "test").mkdir()
    Image.new("RGB", (4, 3)).save(tmp_path / "test/9.jpg")
    indexed(IDS, (2, 1, 0)).save(tmp_path / "test/9.png")
    data = described(tmp_path, test={"images": "test/*.jpg", "masks": "test/*.png"})
    found = complaints(data, [look(data, part, 64) for part in ("train", "test")], 10)
    assert [complaint.kind for complaint in found] == ["palettes differ"]


def test_greys_and_equal_palettes_say_nothing(pairs):
    grey = Image.fromarray(IDS, mode="P")
    grey.putpalette([i for i in range(256) for _ in range(3)])
    assert kinds(pairs([grey, IDS, indexed(IDS, (0, 1, 2)), indexed(IDS, (0, 1, 2))])) == []
    reversed_colours = COLOURS[::-1].tolist()
    assert (labels(pairs([grey], palette=reversed_colours)) == IDS).all()


def test_coloured_masks(pairs):
    shown = COLOURS[IDS]
    with pytest.raises(DataError, match=r"0\.png: mode RGB.*`palette` in dataset.yaml"):
        labels(pairs([shown]))
    assert (labels(pairs([shown], palette=COLOURS.tolist())) == IDS).all()
    alpha = np.dstack([shown, np.where(IDS == 2, 0, 255).astype(np.uint8)])
    assert labels(pairs([alpha], palette=COLOURS.tolist()))[:, 0].tolist() == [0, 1, -1]
    with pytest.raises(DataError, match="half transparent"):
        labels(pairs([np.dstack([shown, np.full((3, 4), 9, np.uint8)])], palette=COLOURS.tolist()))
    shown[0, 0] = (224, 224, 192)
    with pytest.raises(DataError, match=r"colour \[224, 224, 192\] is no class's.*ignore: \[\[224, 224, 192\]\]"):
        labels(pairs([shown], palette=COLOURS.tolist()))
    data = pairs([shown], palette=COLOURS.tolist(), ignore=[[224, 224, 192], [9, 9, 9]])
    assert labels(data)[0].tolist() == [-1, 0, 0, 0]
    with pytest.raises(DataError, match="three channels are equal"):
        labels(pairs([np.dstack([IDS] * 3)]))
    with pytest.raises(DataError, match=r"has no colours .mode L"):
        labels(pairs([IDS], palette=COLOURS.tolist(), read_masks="by_colour"))


def test_an_indexed_mask_with_a_strange_colour(pairs):
    """Void at 255 beside right indices is read by index; with other indices nobody can tell."""
    ids = IDS.copy()
    ids[0, 0] = 255
    void = Image.fromarray(ids, mode="P")
    void.putpalette(np.concatenate([COLOURS, np.full((253, 3), 224, np.uint8)]).tobytes())
    assert (labels(pairs([void], palette=COLOURS.tolist())) == np.where(ids == 255, -1, ids.astype(int))).all()
    void.putpalette(np.concatenate([COLOURS[[1, 0, 2]], np.full((253, 3), 224, np.uint8)]).tobytes())
    with pytest.raises(DataError, match=r"index 0 has the colour \[128, 0, 0\].*read_masks: by_index"):
        labels(pairs([void], palette=COLOURS.tolist()))


# ---- EXIF --------------------------------------------------------------------------------------


@pytest.mark.parametrize("exif", range(2, 9))
def test_orientations_that_keep_the_size(pairs, exif):
    data = pairs([np.zeros((4, 4))], exif=exif, size=(4, 4))
    with pytest.raises(DataError, match=rf"0\.jpg: has an EXIF orientation of {exif}.*exif: as_stored.*exif: upright"):
        labels(data)
    for stated in ("as_stored", "upright"):
        assert labels(described(data.path.parent, exif=stated)).shape == (4, 4)


def test_masks_drawn_on_the_stored_pixels(pairs, tmp_path):
    data = pairs([np.zeros((3, 4))], exif=6)
    with pytest.raises(DataError, match=r"set `exif: as_stored` in dataset.yaml"):
        labels(data)
    (sample,) = data.samples("train")
    turned, stamp = data.image(sample), data.stamp(sample)
    stored = described(tmp_path, exif="as_stored")
    assert labels(stored).shape == (3, 4)
    assert stored.image(sample).shape == (3, 4, 3)
    assert turned.shape == (4, 3, 3)
    assert stored.stamp(sample) != stamp, "another image for the teacher"
    Image.fromarray(np.zeros((4, 3), np.uint8)).save(sample.mask)
    with pytest.raises(DataError, match="take `exif: as_stored` out"):
        labels(stored)


def test_as_stored_changes_no_image_without_a_tag(pairs, tmp_path):
    data = pairs([IDS])
    (sample,) = data.samples("train")
    assert described(tmp_path, exif="as_stored").stamp(sample) == data.stamp(sample)


# ---- what was measured, and what never occurs ----------------------------------------------------


def test_a_seen_class_that_never_occurs(pairs):
    data = pairs([np.minimum(IDS, 1)] * 9)
    assert kinds(data) == ["seen classes without a training pixel"]
    assert never_seen(data, look_at_masks(data, data.samples("train"), "train")) == ["bloom"]
    assert never_seen(data, look(data, "train", 4)) == [], "not all were looked at"
    (said,) = verdict(HEALTHY | {"never_seen": ["bloom"]}, None)
    assert "'bloom' (1)" in said.what


def test_cluster_says_what_purity_was_measured_on(tmp_path, run_cli):
    folder = garden(tmp_path / "garden")
    text = json.loads((folder / "dataset.yaml").read_text())
    (folder / "dataset.yaml").write_text(json.dumps(text | {"classes": ["soil", "leaf", "bloom", "root"]}))
    done = run_cli("extract", *options(tmp_path))
    assert "1 seen classes are in no training mask and can't be learned: 'root'" in done.stderr
    done = run_cli("cluster", *options(tmp_path))
    assert "tokens with a label)" in done.stderr
    assert "trouble ahead: seen classes without a training pixel: 'root' (1)" in done.stderr
    for stage in ("train", "eval"):
        done = run_cli(stage, *options(tmp_path))
        assert done.returncode == 0, done.stderr
    assert "2 of 3 seen, 1 of 1 unseen classes scored" in " ".join(done.stderr.split())
    found = json.loads((tmp_path / "runs/garden/eval/metrics.json").read_text())["scored"]
    assert found["seen"] == {"classes": 3, "occur": 2, "scored": 2, "pixels": 3 * 64 * 64}
    assert found["unseen"] == {"classes": 1, "occur": 1, "scored": 1, "pixels": 3 * 64 * 32}


def test_doctors_advice_ends(pairs):
    """On one class nothing is asked; what was answered isn't asked again."""
    assert kinds(pairs([np.where(IDS > 0, 255, 0)] * 9, classes=["soil"])) == []
    assert kinds(pairs([IDS > 0] * 9, classes=["soil"], reduce_zero_label=True)) == []
    mostly = [np.array([[0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 0, 0]])] * 9
    assert kinds(pairs(mostly)) == ["background read as a class"]
    assert kinds(pairs(mostly, reduce_zero_label=False)) == []


# ---- partly labelled -----------------------------------------------------------------------------


def test_photographs_without_a_mask_are_unlabelled(tmp_path, run_cli):
    folder = garden(tmp_path / "garden", images=4)
    for i in (1, 2):
        (folder / f"train/{i}.png").unlink()
    done = run_cli("extract", *options(tmp_path))
    assert "labels: 4 train images, 2 without a mask: unlabelled" in done.stderr
    for stage in ("cluster", "train", "eval"):
        done = run_cli(stage, *options(tmp_path))
        assert done.returncode == 0, done.stderr
    assert "4 images, 4 looked at, 2 without a mask" in run_cli("doctor", *options(tmp_path)).stderr
    (folder / "test/1.png").unlink()
    assert is_one_line_error(run_cli("eval", *options(tmp_path)), "test: 1 images have no mask: '1'")


def test_training_without_any_label(tmp_path, run_cli):
    folder = garden(tmp_path / "garden", images=2)
    text = json.loads((folder / "dataset.yaml").read_text())
    (folder / "dataset.yaml").write_text(json.dumps(text | {"train": {"images": "train/*.jpg"}}))
    assert "nothing is labelled" in run_cli("doctor", *options(tmp_path)).stdout
    assert run_cli("extract", *options(tmp_path)).returncode == 0, "they may be labelled later"
    assert is_one_line_error(run_cli("cluster", *options(tmp_path)), "nothing is labelled", "masks")


# ---- stamps and files ----------------------------------------------------------------------------


def test_stamps_follow_what_masks_mean(pairs, tmp_path):
    data = pairs([IDS])
    (sample,) = data.samples("train")
    usual = data.mask_stamp(sample)
    same = [{"classes": ["a", "b", "c"]}, {"unseen": ["leaf"]}, {"ignore": 255}, {"palette": COLOURS.tolist()}]
    same += [{"classes": ["soil", "leaf", "bloom", "more"]}, {"read_masks": "by_index"}, {"exif": "upright"}]
    for changes in same:
        assert described(tmp_path, **changes).mask_stamp(sample) == usual, changes
    other = [{"ignore": 254}, {"reduce_zero_label": True}, {"values": {254: 1}}, {"values": {254: "bloom"}}]
    stamps = {described(tmp_path, **changes).mask_stamp(sample) for changes in other}
    assert len(stamps | {usual}) == 5
    assert data.stamps([sample], "labels") == [usual]
    indexed(IDS, (0, 1, 2)).save(sample.mask)
    by_colour = described(tmp_path, palette=COLOURS.tolist())
    assert by_colour.mask_stamp(sample) != described(tmp_path).mask_stamp(sample)


def test_the_files_that_a_part_is_read_from(pairs, tmp_path):
    pairs([IDS, IDS])
    (tmp_path / "tags.yaml").write_text("'0': [soil]\n")
    (tmp_path / "ids.txt").write_text("0\n")
    part = {"images": "train/*.jpg", "masks": "train/*.png", "list": "ids.txt"}
    data = described(tmp_path, tags="tags.yaml", train=part)
    names = ["dataset.yaml", "ids.txt", "tags.yaml", "train/0.jpg", "train/0.png"]
    assert data.files("train") == [str(tmp_path / name) for name in names]
    assert open_data_set("demo", train=2, test=1).files("train") == []


# ---- patterns, lists, names, tags -----------------------------------------------------------------


def test_endings_in_any_case_and_brackets(pairs, tmp_path):
    pairs([IDS] * 3)
    (tmp_path / "train/1.jpg").rename(tmp_path / "train/1.JPG")
    (tmp_path / "train/2.png").rename(tmp_path / "train/2.PNG")
    assert [sample.id for sample in described(tmp_path).samples("train")] == ["0", "1", "2"]
    (tmp_path / "train").rename(tmp_path / "in [2024]")
    part = {"images": "in [2024]/[0-9].jpg", "masks": "in [2024]/*.png"}
    assert len(described(tmp_path, train=part).samples("train")) == 3
    (tmp_path / "in [2024]/1.jpg").write_bytes((tmp_path / "in [2024]/1.JPG").read_bytes())
    with pytest.raises(DataError, match="have the same id '1'"):
        described(tmp_path, train=part).samples("train")
    for pattern in ("/**/*.jpg", "../" * 40 + "**/*.jpg"):
        with pytest.raises(DataError, match="root of the disk"):
            described(tmp_path, train={"images": pattern}).samples("train")


def test_lists_of_file_names(pairs, tmp_path):
    pairs([IDS] * 3)
    part = {"images": "train/*.jpg", "masks": "train/*.png", "list": "ids.txt"}
    (tmp_path / "ids.txt").write_text("2.jpg\ntrain/0.jpg\n")
    assert [sample.id for sample in described(tmp_path, train=part).samples("train")] == ["2", "0"]
    (tmp_path / "ids.txt").write_text("2.jpg\n2\n")
    with pytest.raises(DataError, match="names '2' twice"):
        described(tmp_path, train=part).samples("train")
    (tmp_path / "ids.txt").write_text("train/0.jpg train/0.png\n")
    with pytest.raises(DataError, match="Give one id, or the name of one image, a line"):
        described(tmp_path, train=part).samples("train")


@pytest.mark.parametrize("alike", ["Soil", "soil ", "SOIL", "  soil", "so&#105;l"])
def test_names_that_clip_reads_alike(tmp_path, alike):
    with pytest.raises(DataError, match=r"CLIP reads 'soil' and .* alike"):
        described(tmp_path, classes=["soil", alike, "bloom"])


def test_ids_of_tags_are_text(pairs, tmp_path):
    pairs([IDS] * 11)
    for i in range(11):
        for ending in ("jpg", "png"):
            (tmp_path / f"train/{i}.{ending}").rename(tmp_path / f"train/{i:04}.{ending}")
    (tmp_path / "tags.yaml").write_text("".join(f"{i:04}: [leaf]\n" for i in range(10)) + "8: [bloom]\n0010:\n")
    data = described(tmp_path, tags="tags.yaml")
    samples = data.by_id("train")
    assert data.tags(samples["0008"]) == (1,)
    assert data.tags(samples["0010"]) == ()
    (tmp_path / "tags.yaml").write_text("0001: [leaf]\n0001: [bloom]\n")
    with pytest.raises(DataError, match="'0001' is given twice"):
        described(tmp_path, tags="tags.yaml")


def test_doctor_and_extract_read_tags(tmp_path, run_cli):
    folder = garden(tmp_path / "garden")
    text = json.loads((folder / "dataset.yaml").read_text())
    text |= {"classes": ["background", "leaf", "bloom"], "tags": "tags.yaml"}
    del text["unseen"]
    (folder / "dataset.yaml").write_text(json.dumps(text))
    (folder / "tags.yaml").write_text("0: [leaf]\n1: [background]\nelsewhere: []\n")
    settings = options(tmp_path, "recipe=clip_es", "train.nel=off", "cache.tokens=pooled")
    done = run_cli("doctor", *settings)
    assert "tags that can't be used: 2 images, the first: garden: image 1 has the label 0" in done.stdout
    assert "1 of 3 training images have them; listed and no training image: 1, the first 'elsewhere'" in done.stderr
    assert is_one_line_error(run_cli("extract", *settings), "image 1", "2 of 3 images")


# ---- what is opened ------------------------------------------------------------------------------


def test_no_picture_starts_ghostscript(tmp_path, monkeypatch):
    from PIL import EpsImagePlugin

    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", format="EPS")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("started"))
    with pytest.raises(BadImage, match=r"not a picture of a kind that is read .JPEG.*%!PS"):
        read_image(tmp_path / "a.jpg")


def test_an_image_size_that_the_teacher_refuses(tmp_path, run_cli):
    garden(tmp_path / "garden")
    done = run_cli("doctor", *options(tmp_path, "teacher.image_size=100"))
    assert "image size: teacher.image_size 100" in done.stdout
    assert "Set it to 96 or 104." in done.stdout


ODD = [
    "[]",
    "{}",
    '{"images": 3, "annotations": [], "categories": []}',
    '{"images": [], "annotations": [[]], "categories": []}',
    '{"images": [{"id": 1, "file_name": 3, "height": 4, "width": 4}], "annotations": [], "categories": []}',
    '{"images": [{"id": 1, "file_name": "a", "height": "4", "width": 4}], "annotations": [], "categories": []}',
    '{"images": [{"id": 1, "file_name": "a", "height": 99999, "width": 99999}], "annotations": [], "categories": []}',
    '{"images": [], "annotations": [{"image_id": "x", "category_id": 1}], "categories": [{"id": 1, "name": 5}]}',
    "[" * 100_000,
]


@pytest.mark.parametrize("text", ODD)
def test_odd_json_of_coco(tmp_path, run_cli, text):
    (tmp_path / "annotations").mkdir()
    for part in ("train", "val"):
        (tmp_path / f"annotations/instances_{part}2014.json").write_text(text)
    if text != ODD[-2]:
        assert is_one_line_error(run_cli("prepare", "coco14", "--root", tmp_path), "instances_train2014.json")
    data = open_data_set("coco14", root=str(tmp_path), tags="json")
    if "images" not in text or '"x"' in text or "[[]]" in text:
        with pytest.raises(DataError, match=r"instances_train2014\.json"):
            data._instances("train")


def many(num):
    return {"classes": [f"c{i}" for i in range(num)]}


def test_stamps_follow_the_class_that_255_becomes(pairs, tmp_path):
    """Of 255 classes 255 has no label, of 256 it is one: what was made of the masks is made again."""
    data = pairs([np.array([[0, 1], [255, 1]], np.uint8)], size=(2, 2))
    (sample,) = data.samples("train")
    few, more = described(tmp_path, **many(255)), described(tmp_path, **many(256), ignore=65535)
    assert (few.labels(sample)[1, 0], more.labels(sample)[1, 0]) == (-1, 255)
    assert few.mask_stamp(sample) == data.mask_stamp(sample) != more.mask_stamp(sample)
    with pytest.raises(DataError, match=r"255 in 8 bits.*'c255'.*ignore: 65535.*16 bits"):
        described(tmp_path, **many(300)).labels(sample)


@pytest.mark.parametrize("num", [254, 255, 256])
def test_a_zero_that_is_no_class_beside_many(pairs, tmp_path, num):
    pairs([Image.fromarray(np.array([[0, 1], [1, num]], np.uint16))], size=(2, 2))
    data = described(tmp_path, **many(num), reduce_zero_label=True)
    assert data.labels(data.samples("train")[0]).tolist() == [[-1, 0], [0, num - 1]]


def test_what_data_unseen_replaces_is_not_looked_at(pairs, tmp_path):
    pairs([IDS])
    changes = {"classes": ["a", "b", "c"], "seen": ["a"], "unseen": ["b"]}
    with pytest.raises(DataError, match="'c'"):
        described(tmp_path, **changes)
    assert open_data_set("folder", root=str(tmp_path), unseen=["c"]).unseen == ("c",)
