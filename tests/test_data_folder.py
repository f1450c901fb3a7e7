"""The user's own folder: dataset.yaml, pairing, and every way to get it wrong."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline.data.base import DataError, open_data_set

TRAIN = {"images": "photos/*.jpg", "masks": "masks/*.png"}


def described(**changes) -> dict:
    wanted = {"name": "orchard", "classes": ["apple", "pear", "sky"], "unseen": ["pear"], "train": dict(TRAIN)}
    return {key: value for key, value in (wanted | changes).items() if value is not ...}


def write(folder: Path, names=("a", "b"), mask_names=None, value=0, **changes) -> Path:
    for name in names:
        (folder / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 3), (50, 60, 70)).save(folder / "photos" / f"{name}.jpg")
    (folder / "masks").mkdir(exist_ok=True)
    for name in names if mask_names is None else mask_names:
        Image.fromarray(np.full((3, 4), value, np.uint8)).save(folder / "masks" / f"{name}.png")
    (folder / "dataset.yaml").write_text(yaml.safe_dump(described(**changes)), encoding="utf-8")
    return folder


def opened(folder: Path, **options):
    return open_data_set("folder", root=str(folder), **options)


def test_reads_pairs_in_order(tmp_path):
    data = opened(write(tmp_path, names=("b", "a", "c 写 1"), palette=[[1, 2, 3], [4, 5, 6], [7, 8, 9]]))
    samples = data.samples("train")
    assert [s.id for s in samples] == ["a", "b", "c 写 1"]
    assert data.image(samples[0]).shape == (3, 4, 3)
    assert data.labels(samples[2]).tolist() == [[0] * 4] * 3
    assert (data.name, data.unseen, data.palette[2].tolist()) == ("orchard", ("pear",), [7, 8, 9])


def test_root_may_be_the_yaml_file_of_any_name(tmp_path):
    (write(tmp_path) / "dataset.yaml").rename(tmp_path / "mine.yaml")
    assert len(opened(tmp_path / "mine.yaml").samples("train")) == 2
    with pytest.raises(DataError, match=r"dataset.yaml: no such file. It describes"):
        opened(tmp_path)


def test_limit_and_unseen_options(tmp_path):
    data = opened(write(tmp_path), limit=1, unseen=["sky"])
    assert [s.id for s in data.samples("train")] == ["a"]
    assert data.unseen == ("sky",)


def test_images_without_masks_serve_for_training_only(tmp_path):
    only = {"images": "photos/*.jpg"}
    data = opened(write(tmp_path, train=only, test=only))
    assert data.labels(data.samples("train")[0]) is None
    with pytest.raises(DataError, match="test: no masks are given"):
        data.samples("test")


def test_list_and_mask_suffix(tmp_path):
    part = TRAIN | {"mask_suffix": "_ids", "list": "train.txt"}
    write(tmp_path, names=("a", "b", "c"), mask_names=("a_ids", "c_ids"), train=part)
    (tmp_path / "train.txt").write_text("\ufeffc\n\na\n", encoding="utf-8")
    samples = opened(tmp_path).samples("train")
    assert [(s.id, Path(s.mask).name) for s in samples] == [("c", "c_ids.png"), ("a", "a_ids.png")]


def test_subfolders_with_odd_characters(tmp_path):
    root = tmp_path / "my [data] *"
    root.mkdir()
    write(root, names=("x/a", "y/b"), mask_names=("a", "b"), train=TRAIN | {"images": "photos/**/*.jpg"})
    assert [s.id for s in opened(root).samples("train")] == ["a", "b"]


@pytest.mark.parametrize(
    ("seen", "unseen", "expected"),
    [
        (["apple"], ..., ("pear", "sky")),
        (["apple", "sky"], ["pear"], ("pear",)),
        (..., ["pear", "sky"], ("pear", "sky")),
        (..., ..., ()),
    ],
)
def test_seen_and_unseen(tmp_path, seen, unseen, expected):
    assert opened(write(tmp_path, seen=seen, unseen=unseen)).unseen == expected


def test_reduce_zero_label(tmp_path):
    write(tmp_path, reduce_zero_label=True)
    data = opened(tmp_path)
    Image.fromarray(np.array([[0, 1, 2, 3]] * 3, np.uint8)).save(tmp_path / "masks" / "a.png")
    assert data.labels(data.samples("train")[0])[0].tolist() == [-1, 0, 1, 2]
    Image.fromarray(np.full((3, 4), 4, np.uint8)).save(tmp_path / "masks" / "a.png")
    with pytest.raises(DataError, match=r"label id 4 .* raw ids are 1 to the number of classes"):
        data.labels(data.samples("train")[0])


def test_ignore_value(tmp_path):
    data = opened(write(tmp_path, ignore=7, value=7))
    assert (data.labels(data.samples("train")[0]) == -1).all()


@pytest.mark.parametrize(
    ("value", "changes", "message"),
    [
        (3, {}, "a.png: label id 3 is none of orchard's 3 classes.*set `reduce_zero_label: true`"),
        (255, {"ignore": 7}, "label id 255 .*set `ignore: 255`"),
        (40, {}, "label id 40 .*List the missing classes in dataset.yaml"),
    ],
)
def test_label_errors_say_what_to_do(tmp_path, value, changes, message):
    data = opened(write(tmp_path, value=value, **changes))
    with pytest.raises(DataError, match=message):
        data.labels(data.samples("train")[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clases": []}, "unknown key 'clases'; the nearest valid one is 'classes'"),
        ({"classes": ...}, "classes: want a list of names, found None"),
        ({"classes": "apple"}, "classes: want a list of names, found 'apple'"),
        ({"classes": ["apple", False]}, "name 1 is False; want text .in YAML, quote"),
        ({"unseen": ["pair"]}, "unseen: no class is called 'pair'; the nearest valid one is 'pear'"),
        ({"seen": ["aple"]}, "seen: no class is called 'aple'; the nearest valid one is 'apple'"),
        ({"seen": ["apple", "pear"]}, "'pear' is both seen and unseen"),
        ({"seen": ["apple"]}, "'sky' is neither seen nor unseen"),
        ({"unseen": ["apple", "pear", "sky"]}, "all 3 classes are unseen"),
        ({"ignore": 1}, "ignore: 1 is the id of class 'pear'"),
        ({"ignore": 0}, "ignore: 0 is the id of class 'apple'. If the classes start at 1"),
        ({"ignore": "none"}, "ignore is 'none'; want the raw id"),
        ({"reduce_zero_label": "maybe"}, "reduce_zero_label is 'maybe'; want true or false"),
        ({"palette": [[1, 2, 3]]}, "palette: want 3 colours"),
        ({"palette": [[0.5, 0, 0]] * 3}, "palette: want 3 colours"),
        ({"palette": [[0, 0, 256]] * 3}, "palette: want 3 colours"),
        ({"palette": [[0], [0, 1], [1]]}, "palette: want 3 colours"),
        ({"train": ...}, "neither train nor test is described"),
        ({"train": "photos"}, "train is 'photos'; want a mapping"),
        ({"train": {"masks": "masks/*.png"}}, "train.images is missing"),
        ({"train": {"images": ["a", 1]}}, r"train.images is \['a', 1\]; want text, or a list of them"),
        ({"train": TRAIN | {"list": ["a"]}}, r"train.list is \['a'\]; want text\."),
        ({"train": TRAIN | {"mask": "x"}}, "unknown key in train: 'mask'; the nearest valid one is 'masks'"),
    ],
)
def test_wrong_descriptions(tmp_path, changes, message):
    with pytest.raises(DataError, match=message) as caught:
        opened(write(tmp_path, **changes))
    assert "dataset.yaml" in str(caught.value) or "orchard" in str(caught.value)


@pytest.mark.parametrize(("text", "message"), [("a: [", "not readable as YAML"), ("- a", "want a mapping")])
def test_not_a_description(tmp_path, text, message):
    (tmp_path / "dataset.yaml").write_text(text)
    with pytest.raises(DataError, match=message):
        opened(tmp_path)


def test_no_named_splits(tmp_path):
    with pytest.raises(DataError, match="folder has no named splits"):
        opened(write(tmp_path), split="voc-15-5")


@pytest.mark.parametrize(
    ("names", "mask_names", "part", "message"),
    [
        (("a", "b"), ("c",), {}, "2 images have no mask: 'a', 'b'"),
        (("a",), ("a", "b"), {}, "1 masks have no image: 'b'"),
        (("a",), ("a",), {"images": "fotos/*.jpg"}, "train.images: no file matches 'fotos/.*jpg'"),
        (("x/a", "y/a"), ("a",), {"images": "photos/*/*.jpg"}, "have the same id 'a'; rename one"),
        (("a",), ("a",), {"mask_suffix": "_ids"}, "a.png does not end in the mask_suffix '_ids'"),
        (("a",), ("a",), {"list": "gone.txt"}, "gone.txt: the list of samples can't be read"),
        (("a",), ("a",), {"list": "odd.txt"}, "1 listed ids have no image: 'z'"),
        (("a",), ("a",), {"list": "twice.txt"}, "twice.txt: 'a' is listed twice"),
        (("a",), ("a",), {"list": "latin.txt"}, "latin.txt: the list of samples is not UTF-8"),
    ],
)
def test_files_that_do_not_pair_up(tmp_path, names, mask_names, part, message):
    write(tmp_path, names=names, mask_names=mask_names, train=TRAIN | part)
    (tmp_path / "odd.txt").write_text("a\nz\n")
    (tmp_path / "twice.txt").write_text("a\na\n")
    (tmp_path / "latin.txt").write_bytes(b"\xe4\n")
    with pytest.raises(DataError, match=message):
        opened(tmp_path).samples("train")


def test_missing_part(tmp_path):
    with pytest.raises(DataError, match=r"has no test part, and needs it. Add `test: {images"):
        opened(write(tmp_path)).samples("test")


def test_lists_of_patterns_and_folders_of_masks(tmp_path):
    """Photographs of three folders, masks in one, each of another kind and beside what is none."""
    part = {"images": ["photos/*.JPG", "more/**/*.jpg", "one.png", "photos/*.jpg"], "masks": "masks"}
    write(tmp_path, names=("a", "b"), mask_names=(), train=part)
    for name in ("more/x/c.jpg", "one.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 3)).save(tmp_path / name)
    (tmp_path / "photos" / "a.jpg").rename(tmp_path / "photos" / "a.JPG")
    for name in ("a.PNG", "b.bmp", "c.TIF", "one.tiff"):
        Image.fromarray(np.full((3, 4), 1, np.uint8)).save(tmp_path / "masks" / name)
    (tmp_path / "masks" / "readme.txt").write_text("not a mask")
    Image.new("RGB", (4, 3)).save(tmp_path / "masks" / "a.jpg")  # a preview
    data = opened(tmp_path)
    samples = data.samples("train")
    assert [(s.id, Path(s.mask).name) for s in samples] == [
        ("a", "a.PNG"),
        ("b", "b.bmp"),
        ("c", "c.TIF"),
        ("one", "one.tiff"),
    ]
    assert all((data.labels(sample) == 1).all() for sample in samples)
    write(tmp_path, names=(), mask_names=(), train=part | {"masks": ["masks/a.*", "masks/[bco]*"]})
    with pytest.raises(
        DataError, match=r"masks/a\.(PNG|jpg) and .*masks/a\.(PNG|jpg) have the same id 'a'; rename one"
    ):
        opened(tmp_path).samples("train")
    (tmp_path / "masks" / "a.jpg").unlink()
    assert len(opened(tmp_path).samples("train")) == 4


def test_a_folder_of_images_is_its_pictures(tmp_path):
    write(tmp_path, train={"images": "photos", "masks": "masks/*"})
    (tmp_path / "photos" / "notes.txt").write_text("x")
    (tmp_path / "masks" / "notes.txt").write_text("x")
    assert [s.id for s in opened(tmp_path).samples("train")] == ["a", "b"]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"images": ["photos/*.jpg", "fotos/*.jpg"]}, "train.images: no file matches 'fotos/.*jpg'"),
        (
            {"images": ["photos/*.jpg", "other/*.jpg"]},
            r"photos/a.jpg and .*other/a.jpg have the same id 'a'; rename one",
        ),
        ({"images": ["photos/*.jpg", "masks/b.png"]}, r"b.jpg and .*b.png have the same id 'b'"),
        ({"images": "masks/*.png"}, r"masks/a.png is found as an image and as a mask. Give `images` an ending"),
        ({"masks": ["masks/*.png", "masks/a.bmp"]}, r"masks/a.png and .*masks/a.bmp have the same id 'a'"),
        ({"images": []}, r"train.images is \[\]; want text, or a list of them"),
        ({"images": "photos/*.{jpg,png}"}, "Braces are not read: .* and lists"),
    ],
)
def test_lists_that_do_not_fit(tmp_path, part, message):
    write(tmp_path, train=TRAIN | part)
    (tmp_path / "other").mkdir()
    Image.new("RGB", (4, 3)).save(tmp_path / "other" / "a.jpg")
    if "masks" in part:
        Image.fromarray(np.zeros((3, 4), np.uint8)).save(tmp_path / "masks" / "a.bmp")
    with pytest.raises(DataError, match=message):
        opened(tmp_path).samples("train")
