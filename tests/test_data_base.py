"""Decoding, labels, splits, stamps and the door `open_data_set`, on files made here."""

import os
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.base import BadImage, DataError, DataSet, Sample, open_data_set, read_image
from pipeline.data.files import FileDataSet, file_stamp, raw_table
from pipeline.ops.labels import IGNORE

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


class Pair(FileDataSet):
    """Three classes and one sample, a.png with m.png."""

    name = "pair"
    table = raw_table(3)

    def __init__(self, folder: Path, limit=None, **described):
        self.others = {"classes": ("cat", "dog", "sky"), "unseen": ("dog",)} | described
        super().__init__(str(folder), limit=limit)

    def describe(self, root: str) -> dict:
        return super().describe(root) | self.others

    def list_samples(self, part: str) -> list[Sample]:
        return [Sample("a", str(self.root / "a.png"), str(self.root / "m.png"))]


def pair(folder: Path, mask: Image.Image, size=(3, 2), **described) -> tuple[Pair, Sample]:
    Image.new("RGB", size).save(folder / "a.png")
    mask.save(folder / "m.png")
    data = Pair(folder, **described)
    return data, data.samples("train")[0]


def grey(values) -> Image.Image:
    return Image.fromarray(np.array(values, np.uint8))


# Images


def test_rgb_image_keeps_its_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png")
    assert read.dtype == np.uint8
    assert read.flags.writeable
    assert np.array_equal(read, pixels)


@pytest.mark.parametrize("orientation", range(0, 10))
def test_exif_orientation_is_applied(tmp_path, orientation):
    # The upright picture is 3 wide, 2 high, its corners known; what a camera stores is its inverse turn.
    upright = Image.new("RGB", (3, 2))
    upright.putpixel((0, 0), RED)
    upright.putpixel((2, 1), GREEN)
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }.get(orientation)
    exif = Image.Exif()
    exif[274] = orientation  # 0 and 9 are not in the standard and mean upright
    stored = upright if inverse is None else upright.transpose(inverse)
    stored.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png"), np.array(upright))


def test_broken_exif_does_not_spoil_the_image(tmp_path):
    Image.new("RGB", (3, 2), RED).save(tmp_path / "a.jpg", exif=b"Exif\0\0garbage that is no TIFF header")
    assert read_image(tmp_path / "a.jpg").shape == (2, 3, 3)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / {"CMYK": "a.tif", "YCbCr": "a.jpg"}.get(mode, "a.png")
    Image.new("RGB", (3, 2), "white").convert(mode).save(path)
    assert np.array_equal(read_image(path), np.full((2, 3, 3), 255, np.uint8))


def test_cmyk_jpeg_has_right_colours(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)  # no cyan: red
    red, green, blue = read_image(tmp_path / "a.jpg")[8, 8]
    assert red > 200
    assert max(green, blue) < 60


def test_16_bit_greys_are_scaled_not_clipped(tmp_path):
    # 257 = 65535 / 255, so 0, 257, 32896, 65535 are 0, 1, 128, 255 exactly.
    Image.fromarray(np.array([[0, 257, 32896, 65535]], np.uint16)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png")[0, :, 0].tolist() == [0, 1, 128, 255]


def test_transparency_is_laid_on_white(tmp_path):
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    image.putpixel((1, 0), (10, 20, 30, 0))
    image.save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in (BLUE, RED)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "a.gif")[0, 0].tolist() == list(BLUE)


def test_one_pixel_is_an_image(tmp_path):
    Image.new("RGB", (1, 1), RED).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").tolist() == [[list(RED)]]


def test_odd_names(tmp_path):
    path = tmp_path / "Ä b [1] 'q' 写真.png"
    Image.new("RGB", (1, 1)).save(path)
    assert read_image(path).shape == (1, 1, 3)


def test_bad_images_name_file_and_reason(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = {}
    for ending in ("jpg", "png"):
        Image.fromarray(noise).save(tmp_path / f"whole.{ending}")
        whole[ending] = (tmp_path / f"whole.{ending}").read_bytes()
    bad = {
        "empty.jpg": (b"", "is empty"),
        "text.jpg": (b"<html>404 not found</html>", "begins with b'<html>404"),
        "cut.jpg": (whole["jpg"][: len(whole["jpg"]) // 2], "can't be decoded"),
        "cut.png": (whole["png"][: len(whole["png"]) // 2], "can't be decoded"),
        "float.tif": (None, "floating point"),
    }
    Image.fromarray(np.zeros((2, 2), np.float32)).save(tmp_path / "float.tif")
    for name, (content, reason) in bad.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(BadImage) as caught:
            read_image(tmp_path / name)
        assert name in str(caught.value)
        assert reason in str(caught.value)


def png_of(width: int, height: int, bits: int, rows: bytes) -> bytes:
    """A grey PNG written by hand, for what PIL can't write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_decompression_bomb_is_a_bad_image(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png_of(60000, 60000, 8, b"\0"))
    with pytest.raises(BadImage, match=r"bomb.png: .*exceeds limit"):
        read_image(tmp_path / "bomb.png")


def test_missing_file_and_folder_are_data_errors_not_bad_images(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    for name in ("gone.jpg", "folder.jpg"):
        with pytest.raises(DataError, match=f"{name}: can't be read: .*Restore the file") as caught:
            read_image(tmp_path / name)
        assert not isinstance(caught.value, BadImage)


# Labels


@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_labels_are_the_stored_ids(tmp_path, mode):
    ids = np.array([[0, 1, 2], [255, 0, 2]])
    mask = Image.fromarray(ids.astype(np.uint16 if mode == "I;16" else np.uint8))
    if mode == "P":
        mask.putpalette([9, 9, 9] * 256)  # equal colours: only the indices count
    data, sample = pair(tmp_path, mask)
    labels = data.labels(sample)
    assert labels.dtype == np.int16
    assert np.array_equal(labels, np.where(ids == 255, IGNORE, ids))


def test_two_valued_mask(tmp_path):
    data, sample = pair(tmp_path, Image.fromarray(np.array([[True, False, True]] * 2)))
    assert data.labels(sample).tolist() == [[1, 0, 1]] * 2


def test_seen_labels_hide_the_unseen(tmp_path):
    data, sample = pair(tmp_path, grey([[0, 1, 2], [255, 1, 2]]))
    assert data.seen_labels(sample).tolist() == [[0, -1, 2], [-1, -1, 2]]
    assert (data.seen_ids, data.unseen_ids) == ((0, 2), (1,))


def test_without_mask_there_are_no_labels(tmp_path):
    data, sample = pair(tmp_path, grey([[0, 0, 0]] * 2))
    bare = Sample("a", sample.image)
    assert data.labels(bare) is None
    assert data.seen_labels(bare) is None
    assert data.mask_stamp(bare) == "no mask"


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (grey([[0, 3, 2]] * 2), ["m.png", "label id 3", "3 classes"]),
        (grey([[9, 8, 7], [6, 5, 4]]), ["label id 4, 5, 6, 7, 8, ..."]),
        (Image.fromarray(np.array([[0, 256, 70]] * 2, np.uint16)), ["label id 70, 256"]),
        (Image.new("RGB", (3, 2)), ["m.png", "mode RGB", "colours", "class ids"]),
        (Image.new("LA", (3, 2)), ["mode LA"]),
        (grey([[0, 0]] * 3), ["2 x 3 pixels", "a.png is 3 x 2"]),
    ],
)
def test_wrong_masks(tmp_path, mask, words):
    data, sample = pair(tmp_path, mask)
    with pytest.raises(DataError) as caught:
        data.labels(sample)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_mask_of_the_unrotated_image(tmp_path):
    data, sample = pair(tmp_path, grey([[0, 0, 0]] * 2))
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (3, 2)).save(sample.image, exif=exif)  # upright 2 x 3
    with pytest.raises(DataError, match="before its EXIF rotation"):
        data.labels(sample)
    grey([[0, 0]] * 3).save(sample.mask)
    assert data.labels(sample).shape == data.image(sample).shape[:2] == (3, 2)


def test_jpeg_4_bit_broken_and_missing_masks(tmp_path):
    data, sample = pair(tmp_path, grey([[0, 0, 0]] * 2))
    grey([[0, 0, 0]] * 2).save(sample.mask, format="JPEG")
    with pytest.raises(DataError, match=r"m.png: a JPEG mask.*PNG"):
        data.labels(sample)
    Path(sample.mask).write_bytes(png_of(3, 2, 4, b"\0\x01\x20" * 2))
    with pytest.raises(DataError, match="2 or 4 bits"):
        data.labels(sample)
    Path(sample.mask).write_bytes(b"")
    with pytest.raises(DataError, match=r"m.png: the file is empty") as caught:
        data.labels(sample)
    assert not isinstance(caught.value, BadImage)  # only images are quarantined
    os.remove(sample.mask)
    with pytest.raises(DataError, match=r"m.png: can't be read"):
        data.labels(sample)


# Classes, splits, options


def test_defaults_of_a_data_set(tmp_path):
    data = Pair(tmp_path)
    assert IGNORE == -1
    assert data.palette.shape == (3, 3)
    assert len({tuple(colour) for colour in data.palette}) == 3
    assert pickle.loads(pickle.dumps(data)).classes == data.classes


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"unseen": ("dogg",)}, "no class is called 'dogg'; the nearest valid one is 'dog'"),
        ({"unseen": ("dog", "dog")}, "'dog' is listed twice"),
        ({"unseen": "dog"}, "want a list of names"),
        ({"unseen": ("cat", "dog", "sky")}, "all 3 classes are unseen"),
        ({"classes": ("cat", "dog", "cat")}, "classes: 'cat' is listed twice"),
        ({"classes": ("dog", False)}, "name 1 is False; want text"),
        ({"classes": ("dog", " ")}, "name 1 is ' '"),
        ({"classes": tuple(map(str, range(32768))), "unseen": ()}, "32768 classes; want 1 to 32767"),
        ({"classes": (), "unseen": ()}, "0 classes"),
        ({"palette": np.zeros((2, 3))}, r"palette of shape \(2, 3\); want \(3, 3\)"),
        ({"limit": 0}, "data.limit is 0"),
        ({"limit": "5"}, "data.limit is '5'"),
    ],
)
def test_wrong_descriptions(tmp_path, described, message):
    with pytest.raises(DataError, match=message):
        Pair(tmp_path, **described)


def test_unknown_part(tmp_path):
    with pytest.raises(DataError, match=r"unknown part 'tst'; the nearest valid one is 'test'"):
        Pair(tmp_path).samples("tst")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("vooc", {}, "unknown kind 'vooc'; the nearest valid one is 'voc'"),
        ("voc", {"rot": "/x"}, "no option 'rot'; the nearest valid one is 'root'"),
        ("voc", {}, "data.root is missing, and kind 'voc' needs it"),
        ("voc", {"root": "/no/such"}, "/no/such: no such folder. Set data.root"),
        ("voc", {"root": None}, "data.root is None"),
        ("voc", {"root": ".", "split": "voc-15_5"}, "nearest valid one is 'voc-15-5'"),
        ("context", {"root": ".", "split": "cascade"}, "nearest valid one is 'context-49-10-cascade'"),
        ("coco_stuff", {"root": ".", "unseen": ["gras"]}, "nearest valid one is 'grass'"),
    ],
)
def test_open_data_set_refuses(kind, options, message):
    with pytest.raises(DataError, match=message):
        open_data_set(kind, **options)


def test_open_data_set_knows_the_demo():
    data = open_data_set("demo", train=2, test=1, size=32)
    assert isinstance(data, DataSet)
    assert data.identity("train") != data.identity("test")
    assert len(data.identity("train", what="labels")) == 32


# Stamps


def test_stamp_follows_content_not_time(tmp_path):
    first, copy = tmp_path / "a", tmp_path / "b"
    first.write_bytes(bytes(100_000))
    copy.write_bytes(bytes(100_000))
    os.utime(copy, (1, 1))
    assert file_stamp(first) == file_stamp(copy)
    for content in (bytes(99_999), b"x" + bytes(99_999), bytes(99_999) + b"x"):
        copy.write_bytes(content)
        assert file_stamp(first) != file_stamp(copy)
    copy.write_bytes(bytes(50_000) + b"x" + bytes(49_999))  # an edit in the middle of an uncompressed file
    assert file_stamp(first) == file_stamp(copy)
    assert file_stamp(first, whole=True) != file_stamp(copy, whole=True)
    for whole in (False, True):
        with pytest.raises(DataError, match="gone: can't be read"):
            file_stamp(tmp_path / "gone", whole=whole)


def test_identity_of_images_and_labels_are_apart(tmp_path):
    data, sample = pair(tmp_path, grey([[0, 0, 0]] * 2))
    images, labels = data.identity("train"), data.identity("train", what="labels")
    grey([[0, 0, 1]] * 2).save(sample.mask)
    assert data.identity("train") == images
    assert data.identity("train", what="labels") != labels
    Image.new("RGB", (3, 2), RED).save(sample.image)
    assert data.identity("train") != images
    with pytest.raises(DataError, match="nearest valid one is 'labels'"):
        data.identity("train", what="label")
