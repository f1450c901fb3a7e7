"""Odd and broken files through the `folder` data set, the real extract and cluster: right, or quarantined.

One folder holds all of them. Where the pixels are known, a plain PNG of them stands beside the odd file,
under another name, and both must have the same CLS token and pseudo labels (one view, so that the name
draws no boxes).
"""

import io
import json
import os
import unicodedata

import numpy as np
import pytest
from PIL import Image

from cache.ledger import read_manifest
from cache.store import Store
from pipeline.cluster import cluster
from pipeline.config import load
from pipeline.data.base import BadImage, DataError, open_data_set
from pipeline.extract import extract
from tests.conftest import ROOT, is_one_line_error
from tests.test_data_base import png_of
from tests.test_wrong_input import garden, options

RNG = np.random.default_rng(0)
SCENE = RNG.integers(0, 256, (6, 8, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1)  # (48, 64, 3), coarse
LABELS = np.zeros((48, 64), np.uint8)  # soil, then leaf, then bloom, which is unseen, in a corner
LABELS[:, 20:], LABELS[30:, 40:] = 1, 2
ROTATED = 6  # EXIF: turn by 90 degrees clockwise to see it upright (CIPA DC-008, section 4.6.4)


def encoded(pixels, kind, **options) -> bytes:
    content = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(content, kind, **options)
    return content.getvalue()


def decoded(content: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(content)).convert("RGB"))


def animated(kind: str) -> bytes:
    """The scene first, then its negative."""
    first, second = Image.fromarray(SCENE), Image.fromarray(255 - SCENE)
    lossless = {"lossless": True} if kind == "WEBP" else {}
    return encoded(first, kind, save_all=True, append_images=[second], **lossless)


def right() -> dict[str, tuple[bytes, np.ndarray]]:
    """File name -> its bytes, and the RGB pixels that are the right result."""
    grey, exif = SCENE[:, :, 0], Image.Exif()
    exif[274] = ROTATED
    turned = encoded(np.rot90(SCENE), "JPEG", quality=95, exif=exif)  # what a camera on its side stores
    inks = encoded(Image.fromarray(SCENE).convert("CMYK"), "JPEG", quality=95)
    gif = animated("GIF")
    long = np.zeros((20, 20_000, 3), np.uint8)
    long[:, ::2], long[:, :10_000, 0] = 200, 90
    return {
        "one.png": (encoded(SCENE[:1, :1], "PNG"), SCENE[:1, :1]),
        "long.png": (encoded(long, "PNG"), long),
        "cmyk.jpg": (inks, decoded(inks)),
        "deep.png": (encoded(grey.astype(np.uint16) * 257, "PNG"), grey[..., None].repeat(3, 2)),
        "grey.png": (encoded(grey, "PNG"), grey[..., None].repeat(3, 2)),
        "turned.jpg": (turned, np.rot90(decoded(turned), -1)),
        "moving.gif": (gif, decoded(gif)),
        "moving_too.png": (animated("PNG"), SCENE),
        "moving_still.webp": (animated("WEBP"), SCENE),
        "with a space.png": (encoded(SCENE, "PNG"), SCENE),
        "Äpfel 写真.png": (encoded(SCENE, "PNG"), SCENE),
        "up..and..down.png": (encoded(SCENE, "PNG"), SCENE),
    }


def broken() -> dict[str, tuple[bytes, str]]:
    """File name -> its bytes, and what the reason must say."""
    whole = encoded(SCENE, "JPEG")
    return {
        "cut.jpg": (whole[: len(whole) // 2], "can't be decoded: Truncated"),
        "nothing.jpg": (b"", "the file is empty"),
        "text.jpg": (b"<!DOCTYPE html> not found", "begins with b'<!DOCTYPE"),
        "bomb.png": (png_of(60_000, 60_000, 8, b"\0"), "exceeds limit of 178956970 pixels"),
        "half_a_bomb.png": (png_of(10_000, 10_000, 8, b"\0"), "10000 x 10000 pixels, and more than 89478485"),
    }


def stem(name: str) -> str:
    return name.rpartition(".")[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All of them with their masks and references; the masks are of several legal kinds."""
    folder = tmp_path_factory.mktemp("odd") / "garden"
    for part in ("train", "masks"):
        (folder / part).mkdir(parents=True)
    for name, (content, pixels) in right().items():
        height, width = pixels.shape[:2]
        labels = np.zeros((height, width), np.uint8)
        labels[: LABELS.shape[0], : LABELS.shape[1]] = LABELS[:height, :width]
        (folder / "train" / name).write_bytes(content)
        (folder / "train" / f"{stem(name)}_plain.png").write_bytes(encoded(pixels.copy(), "PNG"))
        mask = Image.fromarray(labels)
        mask.save(folder / "masks" / f"{stem(name)}_plain.png")
        mask.putpalette([7, 7, 7, 200, 0, 0] * 128)  # a palette of any colours: the indices count
        mask.save(folder / "masks" / f"{stem(name)}.png")
    for name, (content, _) in broken().items():
        (folder / "train" / name).write_bytes(content)
        Image.fromarray(LABELS).save(folder / "masks" / f"{stem(name)}.png")
    part = {"images": "train/*", "masks": "masks/*.png"}
    described = {"name": "garden", "classes": ["soil", "leaf", "bloom"], "unseen": ["bloom"], "train": part}
    (folder / "dataset.yaml").write_text(json.dumps(described))
    return folder


@pytest.fixture(scope="module")
def cached(folder):
    os.chdir(ROOT)
    settings = [f"runs={folder.parent}/runs", f"data={{kind: folder, root: {folder}}}"]
    settings += ["teacher.image_size=64", "teacher.batch=4", "views.num=1"]
    config = load(ROOT / "config" / "demo.yaml", settings)
    extract(config)
    cluster(config)
    return config


def row_of(store, name):
    return [store.samples.index(unicodedata.normalize("NFC", name))]


@pytest.mark.parametrize("name", right())
def test_an_odd_image_is_what_its_pixels_are(cached, name):
    store = Store.open(cached.cache_path)
    odd, plain = (row_of(store, n) for n in (stem(name), f"{stem(name)}_plain"))
    height, width = right()[name][1].shape[:2]
    for row in (odd, plain):
        assert store.read_rows("status", row).tolist() == [0]
        assert store.read_rows("view", row)[0, 0].tolist() == [0, 0, width, height]
    for array in ("cls", "tokens", "pseudo"):
        assert np.array_equal(store.read_rows(array, odd), store.read_rows(array, plain)), array
    if right()[name][1].shape == SCENE.shape:  # bloom's corner alone is in the ignored area
        pseudo = store.read_rows("pseudo", odd)[0, 0]
        is_bloom = np.zeros((8, 8), bool)
        is_bloom[5:, 5:] = True  # rows 30 to 48 and columns 40 to 64 of 48 x 64, in eighths
        assert np.array_equal(pseudo > 0, is_bloom)


def test_broken_images_are_quarantined_with_the_reason(cached):
    bad = read_manifest(cached.cache_path / "extract.manifest.json")["quarantined"]
    assert set(bad) == {stem(name) for name in broken()}
    for name, (_, reason) in broken().items():
        assert name in bad[stem(name)]
        assert reason in bad[stem(name)]
    store = Store.open(cached.cache_path)
    for name in broken():
        row = row_of(store, stem(name))
        assert store.read_rows("status", row).tolist() == [1]
        assert np.isnan(store.read_rows("tokens", row)).all(), "never zeros"
        assert (store.read_rows("pseudo", row) == 255).all(), "never trained on"


@pytest.mark.parametrize(("max_bad", "passes"), [(5, True), (4, False)])
def test_max_bad_is_honoured_to_the_image(cached, max_bad, passes):
    """5 are broken. The config's own limit doesn't enter the fingerprint, so the same shards are asked again."""
    section = cached.cache.model_copy(update={"max_bad": max_bad})
    config = cached.model_copy(update={"cache": section})
    path = config.cache_path / "extract.manifest.json"
    finished = path.read_bytes()
    path.unlink()
    try:
        if passes:
            assert len(extract(config)["quarantined"]) == 5
        else:
            with pytest.raises(DataError, match=r"5 images can't be used, more than cache.max_bad = 4: .*\.jpg"):
                extract(config)
            assert not path.exists()
    finally:
        path.write_bytes(finished)


def test_a_mask_with_an_orientation_is_refused(tmp_path):
    """Turned or not? A flip keeps the size, so nothing else would tell."""
    data = open_data_set("folder", root=str(garden(tmp_path / "garden", images=1)))
    (sample,) = data.samples("train")
    exif = Image.Exif()
    exif[274] = 3
    Image.fromarray(np.zeros((64, 96), np.uint8)).save(sample.mask, exif=exif)
    with pytest.raises(DataError, match=r"0\.png: an EXIF orientation of 3.*upright") as caught:
        data.labels(sample)
    assert not isinstance(caught.value, BadImage)


def test_a_coloured_mask_stops_extract(tmp_path, run_cli):
    garden(tmp_path / "garden", images=1)
    Image.new("RGB", (96, 64)).save(tmp_path / "garden" / "train" / "0.png")
    done = run_cli("extract", *options(tmp_path))
    assert not (tmp_path / "runs").exists(), "before the teacher has seen an image"
    assert is_one_line_error(done, "0.png", "mode RGB", "class ids")


def test_names_composed_and_decomposed_pair_up(tmp_path):
    folder = garden(tmp_path / "garden", images=1)
    name = "Ä"
    assert unicodedata.normalize("NFD", name) != name
    (folder / "train" / "0.jpg").rename(folder / "train" / f"{unicodedata.normalize('NFD', name)}.jpg")
    (folder / "train" / "0.png").rename(folder / "train" / f"{name}.png")
    data = open_data_set("folder", root=str(folder))
    (sample,) = data.samples("train")
    assert sample.id == name
    assert data.image(sample).shape[:2] == data.labels(sample).shape


def test_a_name_that_is_no_text(tmp_path, run_cli):
    folder = garden(tmp_path / "garden", images=1)
    for ending in (b"jpg", b"png"):
        os.rename(folder / "train" / f"0.{ending.decode()}", os.fsencode(folder / "train") + b"/\xff." + ending)
    done = run_cli("extract", *options(tmp_path))
    assert is_one_line_error(done, "udcff.jpg", "rename")


def test_dots_that_lead_out_of_the_folder(tmp_path):
    """A pattern may point anywhere, for it is the user's; an id is a name and never a path."""
    folder = garden(tmp_path / "garden", images=1)
    (folder / "lists").mkdir()
    path = folder / "lists" / "dataset.yaml"
    described = json.loads((folder / "dataset.yaml").read_text())
    described["train"] = {"images": "../train/*.jpg", "masks": "../train/*.png", "list": "ids.txt"}
    path.write_text(json.dumps(described))
    (folder / "lists" / "ids.txt").write_text("0\n")
    (sample,) = open_data_set("folder", root=str(path)).samples("train")
    assert sample.id == "0"
    (folder / "lists" / "ids.txt").write_text("../train/0\n")
    with pytest.raises(DataError, match=r"1 listed ids have no image: '\.\./train/0'"):
        open_data_set("folder", root=str(path)).samples("train")
