"""VOC, Context and COCO-Stuff: on layouts made here, and on real photographs where they are at hand."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.base import DataError, open_data_set
from pipeline.data.classes import COCO_STUFF_CLASSES, CONTEXT_CLASSES, VOC_CLASSES
from pipeline.ops.labels import counts

SHARED = Path(__file__).parents[2] / "shared" / "data"


def save_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 1)).save(path)


def save_mask(path: Path, ids=(0, 1, 2, 255)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array([ids], np.uint8)).save(path)


def save_list(path: Path, *ids: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{i}\n" for i in ids))


@pytest.fixture
def voc(tmp_path) -> Path:
    root = tmp_path / "VOC2012"
    for name in ("a", "b", "c"):
        save_image(root / "JPEGImages" / f"{name}.jpg")
    save_mask(root / "SegmentationClass" / "a.png", (0, 1, 20, 255))
    for name in ("a", "b"):
        save_mask(root / "SegmentationClassAug" / f"{name}.png", (0, 5, 5, 5))
    lists = root / "ImageSets" / "Segmentation"
    save_list(lists / "train_aug.txt", "b", "a")
    save_list(lists / "train.txt", "a")
    save_list(lists / "aug.txt", "b")
    save_list(lists / "val.txt", "c")
    return root


def test_voc_background_is_ignored_and_own_masks_come_first(voc):
    data = open_data_set("voc", root=str(voc))
    b, a = data.samples("train")
    assert (b.id, a.id) == ("b", "a")
    assert data.labels(a).tolist() == [[-1, 0, 19, -1]]
    assert data.labels(b).tolist() == [[-1, 4, 4, 4]]
    assert data.seen_labels(a).tolist() == [[-1, 0, -1, -1]]  # 19, tvmonitor, is unseen
    assert data.unseen_ids == (15, 16, 17, 18, 19)


def test_voc_other_lists(voc):
    joined = open_data_set("voc", root=str(voc), train_list="train+aug")
    assert [s.id for s in joined.samples("train")] == ["a", "b"]
    with pytest.raises(DataError, match="'a' is listed twice"):
        open_data_set("voc", root=str(voc), train_list="train+train_aug").samples("train")
    with pytest.raises(DataError, match=r"trainaug.txt: .* lists there: aug, train, train_aug, val"):
        open_data_set("voc", root=str(voc), train_list="trainaug").samples("train")


def test_voc_with_the_list_that_mmseg_writes(voc):
    lists = voc / "ImageSets" / "Segmentation"
    (lists / "train_aug.txt").rename(lists / "trainaug.txt")
    assert [s.id for s in open_data_set("voc", root=str(voc)).samples("train")] == ["b", "a"]
    save_list(lists / "train_aug.txt", "a")  # the usual name comes first
    assert [s.id for s in open_data_set("voc", root=str(voc)).samples("train")] == ["a"]


def test_voc_says_what_is_missing(voc):
    data = open_data_set("voc", root=str(voc))
    with pytest.raises(DataError, match=r"1 listed images have no mask in .*SegmentationClassAug: 'c'"):
        data.samples("test")
    (voc / "JPEGImages" / "b.jpg").unlink()
    with pytest.raises(DataError, match=r"1 listed images are not in .*JPEGImages: 'b'"):
        data.samples("train")
    with pytest.raises(DataError, match=r"JPEGImages: no such folder. .* one further down"):
        open_data_set("voc", root=str(voc.parent)).samples("train")
    save_list(voc / "ImageSets" / "Segmentation" / "val.txt")
    with pytest.raises(DataError, match="voc: the test part has no image"):
        data.samples("test")


def test_voc_without_mask_folders(voc):
    for name in ("SegmentationClass", "SegmentationClassAug"):
        (voc / name).rename(voc / f"no{name}")
    with pytest.raises(DataError, match="has no folder SegmentationClass nor SegmentationClassAug"):
        open_data_set("voc", root=str(voc)).samples("train")


def test_voc_strange_id(voc):
    save_mask(voc / "SegmentationClass" / "a.png", (0, 1, 21, 255))
    data = open_data_set("voc", root=str(voc))
    with pytest.raises(DataError, match=r"a.png: label id 21 is none of voc's 20 classes.*another data set"):
        data.labels(data.samples("train")[1])


def test_context(tmp_path):
    save_image(tmp_path / "JPEGImages" / "a.jpg")
    save_mask(tmp_path / "SegmentationClassContext" / "a.png", (0, 1, 59, 20))
    for name in ("train", "val"):
        save_list(tmp_path / "ImageSets" / "SegmentationContext" / f"{name}.txt", "a")
    data = open_data_set("context", root=str(tmp_path))
    sample = data.samples("test")[0]
    assert data.labels(sample).tolist() == [[-1, 0, 58, 19]]
    assert data.seen_labels(sample).tolist() == [[-1, -1, 58, -1]]  # aeroplane and cow are unseen
    assert sorted(data.unseen_ids) == [0, 6, 7, 14, 19, 24, 31, 33, 48, 54]
    other = open_data_set("context", root=str(tmp_path), split="context-49-10-cascade")
    assert other.unseen_ids == (0, 2, 3, 7, 9, 13, 17, 19, 31, 37)
    sixty = open_data_set("context", root=str(tmp_path), background=True)
    assert (len(sixty.classes), sixty.classes[0], sixty.background, sixty.unseen) == (60, "background", 0, ())
    assert sixty.labels(sixty.samples("test")[0]).tolist() == [[0, 1, 59, 20]]
    assert sixty.palette[:2].tolist() == [[0, 0, 0], data.palette[0].tolist()]
    assert open_data_set("context", root=str(tmp_path), background=True, split="context-49-10").unseen_ids == (
        *(1, 7, 8, 15, 20, 25, 32, 34, 49, 55),
    )
    save_mask(tmp_path / "SegmentationClassContext" / "a.png", (0, 1, 60, 20))
    with pytest.raises(DataError, match=r"label id 60 .* not the 459 original ids"):
        data.labels(sample)


def coco(root: Path, ending: str, ids=(0, 170, 9, 255)) -> Path:
    for folder in ("train2017", "val2017"):
        save_image(root / "images" / folder / "1.jpg")
        save_mask(root / "annotations" / folder / f"1{ending}", ids)
    return root


def test_coco_stuff_converted_masks(tmp_path):
    root = coco(tmp_path, "_labelTrainIds.png")
    save_mask(root / "annotations" / "train2017" / "1.png", (11, 11, 11, 11))  # the published one lies beside it
    data = open_data_set("coco_stuff", root=str(root))
    assert data.labels(data.samples("train")[0]).tolist() == [[0, 170, 9, -1]]
    assert [s.id for s in data.samples("test")] == ["1"]


def test_coco_stuff_published_masks(tmp_path):
    # Raw 12 (stop sign) follows the gap at 11; 181 - 11 gaps = 170.
    data = open_data_set("coco_stuff", root=str(coco(tmp_path, ".png", (10, 12, 181, 255))))
    assert data.labels(data.samples("train")[0]).tolist() == [[10, 11, 170, -1]]
    assert data.classes[11] == "stop sign"


@pytest.mark.parametrize(
    ("ending", "strange", "hint"),
    [
        ("_labelTrainIds.png", 181, "this file is not converted"),
        ("_labelTrainIds.png", 200, "hold 0-170"),
        (".png", 11, "must be named .*_labelTrainIds.png"),
        (".png", 182, "hold 0-170"),
    ],
)
def test_coco_stuff_strange_ids(tmp_path, ending, strange, hint):
    data = open_data_set("coco_stuff", root=str(coco(tmp_path, ending, (0, strange, 9, 255))))
    with pytest.raises(DataError, match=f"label id {strange} is none of coco_stuff's 171 classes.*{hint}"):
        data.labels(data.samples("train")[0])


def test_coco_stuff_half_converted(tmp_path):
    root = coco(tmp_path, "_labelTrainIds.png")
    save_image(root / "images" / "train2017" / "2.jpg")
    save_mask(root / "annotations" / "train2017" / "2.png")
    with pytest.raises(DataError, match=r"1 images have no mask: '2'. The conversion .* half-way"):
        open_data_set("coco_stuff", root=str(root)).samples("train")
    (root / "images" / "val2017" / "1.jpg").rename(root / "images" / "val2017" / "._1.jpg")
    with pytest.raises(DataError, match="1 masks have no image: '1'"):
        open_data_set("coco_stuff", root=str(root)).samples("test")
    with pytest.raises(DataError, match=r"images.train2017: no such folder. data.root must hold images/"):
        open_data_set("coco_stuff", root=str(root / "images")).samples("train")


# Real photographs


@pytest.mark.shared_data
def test_real_coco_stuff_loads():
    data = open_data_set("coco_stuff", root=str(SHARED / "coco_stuff164k"))
    found, grey = np.zeros(172, int), []
    for part in ("train", "test"):
        samples = data.samples(part)
        assert len(samples) == len({s.id for s in samples}) == 100
        for sample in samples:
            image, labels = data.image(sample), data.labels(sample)
            assert (image.dtype, labels.dtype) == (np.uint8, np.int16)
            assert image.shape == (*labels.shape, 3)
            found += counts(labels, 171)
            if (image == image[..., :1]).all():
                grey.append(sample.id)
    assert found[0] > 0  # person
    assert 0.05 < found[-1] / found.sum() < 0.2
    assert {"000000000086", "000000007888"} <= set(grey)  # stored as greyscale JPEGs
    assert len(open_data_set("coco_stuff", root=str(SHARED / "coco_stuff164k"), limit=3).samples("test")) == 3


@pytest.mark.shared_data
def test_real_voc_loads():
    data = open_data_set("voc", root=str(SHARED / "VOCdevkit" / "VOC2012"))
    samples = data.samples("train") + data.samples("test")
    assert len(samples) == 9
    present = set()
    for sample in samples:
        image, labels = data.image(sample), data.labels(sample)
        assert image.shape == (*labels.shape, 3)
        present |= set(np.unique(labels).tolist())
    assert 14 in present  # person
    assert present <= {*range(20), -1}
    assert data.identity("train") == data.identity("train") != data.identity("test")


# COCO's names of VOC's classes, where they differ.
TWINS = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}


@pytest.mark.shared_data
def test_class_orders_agree_with_real_text_features():
    """In CLIP's text space the nearest COCO-Stuff name of each VOC name is its twin; kin are near, too."""
    folder = SHARED / "clip_vit_b16"
    voc_text, coco_text = (np.load(folder / f"{name}_single.npy").astype(np.float32) for name in ("voc12", "coco"))
    assert coco_text.shape == (len(COCO_STUFF_CLASSES), 512)
    nearest = (voc_text @ coco_text.T).argmax(axis=1)
    assert [COCO_STUFF_CLASSES[i] for i in nearest] == [TWINS.get(name, name) for name in VOC_CLASSES]
    cosine = coco_text @ coco_text.T
    for one, other in (("wall-concrete", "wall-stone"), ("window-blind", "window-other"), ("stone", "rock")):
        i, j = COCO_STUFF_CLASSES.index(one), COCO_STUFF_CLASSES.index(other)
        assert (cosine[i] > cosine[i, j]).sum() <= 1  # only itself is nearer


def test_cityscapes_in_both_forms_of_its_masks(tmp_path):
    root = tmp_path / "cityscapes"
    for city in ("ulm", "bonn"):
        save_image(root / "leftImg8bit" / "val" / city / f"{city}_1_leftImg8bit.png")
        save_mask(root / "gtFine" / "val" / city / f"{city}_1_gtFine_labelIds.png", (7, 33, 0, 29))
    data = open_data_set("cityscapes", root=str(root))
    first, second = data.samples("test")
    assert (first.id, second.id) == ("bonn_1", "ulm_1")
    assert data.labels(first).tolist() == [[0, 18, -1, -1]]  # road, bicycle, unlabelled, caravan
    assert (data.classes[0], data.classes[18]) == ("road", "bicycle")
    save_mask(root / "gtFine" / "val" / "ulm" / "ulm_1_gtFine_labelTrainIds.png", (0, 18, 255, 3))
    half = open_data_set("cityscapes", root=str(root))
    with pytest.raises(DataError, match=r"1 images have no mask: 'bonn_1'. .*conversion to labelTrainIds"):
        half.samples("test")
    save_mask(root / "gtFine" / "val" / "bonn" / "bonn_1_gtFine_labelTrainIds.png", (0, 18, 255, 19))
    whole = open_data_set("cityscapes", root=str(root))
    bonn, ulm = whole.samples("test")
    assert whole.labels(ulm).tolist() == [[0, 18, -1, 3]]
    with pytest.raises(DataError, match="label id 19 is none of cityscapes's 19 classes"):
        whole.labels(bonn)


def test_camvid(tmp_path):
    root = tmp_path / "CamVid"
    save_image(root / "test" / "a.png")
    save_mask(root / "testannot" / "a.png", (0, 10, 11, 255))
    data = open_data_set("camvid", root=str(root), unseen=["bicyclist"])
    (sample,) = data.samples("test")
    assert data.labels(sample).tolist() == [[0, 10, -1, -1]]
    assert data.seen_labels(sample).tolist() == [[0, -1, -1, -1]]
    save_mask(root / "testannot" / "a.png", (0, 10, 31, 255))
    with pytest.raises(DataError, match=r"label id 31 .* reduced them from 32 classes"):
        data.labels(sample)


def test_ade20k(tmp_path):
    root = tmp_path / "ADEChallengeData2016"
    save_image(root / "images" / "validation" / "a.jpg")
    save_mask(root / "annotations" / "validation" / "a.png", (0, 1, 150, 255))
    data = open_data_set("ade20k", root=str(root))
    (sample,) = data.samples("test")
    assert data.labels(sample).tolist() == [[-1, 0, 149, -1]]
    assert (len(data.classes), data.classes[0], data.classes[149]) == (150, "wall", "flag")
    with pytest.raises(DataError, match=r"training: no such folder. data.root must be ADEChallengeData2016"):
        data.samples("train")


def test_context_with_all_its_classes(tmp_path):
    lists, masks = (tmp_path / "ImageSets" / "SegmentationContext", tmp_path / "SegmentationClassContext459")
    save_image(tmp_path / "JPEGImages" / "a.jpg")
    masks.mkdir()
    Image.fromarray(np.array([[0, 1, 255, 459]], np.uint16)).save(masks / "a.png")
    for name in ("train", "val"):
        save_list(lists / f"{name}.txt", "a")
    whole = {"root": str(tmp_path), "num_classes": 459}
    with pytest.raises(DataError, match=r"classes459.txt: .*prepare context459"):
        open_data_set("context", **whole)
    names = [*CONTEXT_CLASSES, *(f"thing {i}" for i in range(400))]
    save_list(lists / "classes459.txt", *names[:458])
    with pytest.raises(DataError, match=r"classes459.txt: 458 names; want those of 459"):
        open_data_set("context", **whole)
    save_list(lists / "classes459.txt", *names)
    data = open_data_set("context", **whole)
    (sample,) = data.samples("test")
    assert data.labels(sample).tolist() == [[-1, 0, 254, 458]]
    assert (data.classes, data.unseen, data.palette.shape) == (tuple(names), (), (459, 3))
    assert len({tuple(colour) for colour in data.palette.tolist()}) == 459
    assert str(lists / "classes459.txt") in data.files("test")
    assert len(open_data_set("context", split="context-49-10", **whole).unseen) == 10
    closed = open_data_set("context", background=True, **whole)
    assert closed.labels(closed.samples("test")[0]).tolist() == [[0, 1, 255, 459]]
    Image.fromarray(np.array([[0, 1, 255, 460]], np.uint16)).save(masks / "a.png")
    with pytest.raises(DataError, match=r"label id 460 is none of context's 459 classes.* 1-459"):
        data.labels(sample)
    with pytest.raises(DataError, match=r"num_classes is 60; .* 59 or 459"):
        open_data_set("context", root=str(tmp_path), num_classes=60)


@pytest.mark.parametrize("kind", ["cityscapes", "camvid", "ade20k", "coco14"])
def test_kinds_without_a_published_split(kind, tmp_path):
    with pytest.raises(DataError, match=f"data.split is 'x', but {kind} has no named splits; use data.unseen"):
        open_data_set(kind, root=str(tmp_path), split="x")
    assert open_data_set(kind, root=str(tmp_path)).unseen == ()
