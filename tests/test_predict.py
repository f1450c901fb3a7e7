"""Any images, any names: what is a picture, what a name stands for, which pixel gets it, and what is written."""

import os
from pathlib import Path, PurePath

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import avg_pool2d, interpolate, normalize

from pipeline.config import UserError, load
from pipeline.data.base import BadImage, DataError
from pipeline.data.inputs import pictures
from pipeline.learning.checkpoint import Checkpoint, save_student
from pipeline.learning.inference import best_by_group, class_logits, predicted
from pipeline.learning.scoring import Loaded, predictions
from pipeline.learning.segmenter import Segmenter, parsed_names
from pipeline.looking.overlay import LARGEST, NONE_COLOUR, Share, painted, palette_of, shares, with_legend
from pipeline.models.student import build_student
from pipeline.models.teacher import Teacher
from pipeline.ops import enlarge
from pipeline.ops.labels import IGNORE
from pipeline.ops.metrics import SweptConfusion
from tests.conftest import ROOT, is_one_line_error

CLASSES, UNSEEN = ("soil", "leaf", "bloom"), ("bloom",)
CHANNELS = 128  # of the demo's teacher


def made_student(run: Path, *settings: str, text: torch.Tensor | None = None) -> Path:
    """The folder of a run whose student has random weights, for the three classes."""
    os.chdir(ROOT)
    config = load(
        ROOT / "config" / "demo.yaml",
        ["teacher.image_size=64", "student.arch=FPN", "student.encoder=tu-resnet10t", "student.options={}", *settings],
    )
    torch.manual_seed(0)
    text = normalize(torch.randn(len(CLASSES), CHANNELS), dim=1) if text is None else text
    (run / "train").mkdir(parents=True)
    student = build_student(config.student, text.shape[1], pretrained=False)
    checkpoint = Checkpoint(config=config, identity="t0", classes=CLASSES, unseen=UNSEEN, text=text)
    save_student(run / "train" / "student.safetensors", student, checkpoint)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made_student(tmp_path_factory.mktemp("student") / "run")


class Colours(nn.Module):
    """Its dense features are the image's red, green and blue, 0 to 1, in cells of 4 x 4 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1 / 255))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return avg_pool2d(images.float(), 4) * self.scale


@pytest.fixture
def colours(run):
    """A segmenter for which soil is red, leaf green and bloom (unseen) blue: a logit is a colour's strength."""
    segmenter = Segmenter(run)
    segmenter.student = Colours()
    object.__setattr__(segmenter.checkpoint, "text", torch.eye(3))
    return segmenter


def picture(path: Path, size: tuple[int, int] = (40, 30), mode: str = "RGB", seed: int = 0, **saved) -> Path:
    """A photograph of noise, (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).convert(mode).save(path, **saved)
    return path


# ---- which pictures ----------------------------------------------------------------------------


def places(found):
    return [(each.path.as_posix(), each.place.as_posix()) for each in found]


def test_files_folders_patterns_and_lists(tmp_path, monkeypatch):
    for name in ("a.jpg", "in/b.PNG", "in/deep/a.jpg", ".hidden/c.jpg", "in/a.mask.png", "in/notes.txt", "in/[1].png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path)
    assert places(pictures(["a.jpg", "in/deep/../notes.txt"])) == [("a.jpg", "a"), ("in/deep/../notes.txt", "notes")], (
        "what is named itself is tried, whatever its ending"
    )
    below = [("in/[1].png", "[1]"), ("in/b.PNG", "b"), ("in/deep/a.jpg", "deep/a")]
    assert places(pictures(["in"], results=[".mask.png"])) == below
    assert places(pictures(["in", "in/b.PNG"], results=[".mask.png"])) == below, "met twice, taken once"
    assert places(pictures(["in/**/a.jpg"])) == [("in/deep/a.jpg", "deep/a")]
    assert places(pictures(["*/deep/*"])) == [("in/deep/a.jpg", "in/deep/a")]
    assert places(pictures(["in/[1].png"])) == [("in/[1].png", "[1]")], "a file comes before a pattern"
    listed = ["in/deep/a.jpg\n", "\n", "a.jpg\n", f"{tmp_path}/in/b.PNG"]
    found = places(pictures(["-"], listed))
    assert found[:2] == [("in/deep/a.jpg", "in/deep/a"), ("a.jpg", "a")]
    assert found[2] == (f"{tmp_path}/in/b.PNG", f"{tmp_path}/in/b".lstrip("/"))
    assert places(pictures(["-"], ["in/../a.jpg"]))[0][1] == f"{tmp_path}/a".lstrip("/"), "never outside of --out"


def test_no_two_pictures_share_a_place(tmp_path, monkeypatch):
    for name in ("x/a.jpg", "y/a.jpg", "z/a.png", "z/A.jpg"):
        picture(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"x/a\.jpg and y/a\.jpg: .* called a\.\*"):
        pictures(["x/a.jpg", "y/a.jpg"])
    assert len(pictures(["?/a.jpg"])) == 2
    said = []
    found = places(pictures(["z"], tell=said.append))
    assert found == [("z/A.jpg", "A.jpg"), ("z/a.png", "a.png")], "a photograph and its mask"
    assert "2 pictures differ from others by their endings alone" in said[0]
    picture(tmp_path / "z/a.png.jpg")
    found = places(pictures(["z"]))
    assert [place for _, place in found] == ["A.jpg", "a.png", "a.png.jpg"], "nor is its place another's"


def test_endings_brackets_and_what_is_not_read(tmp_path, monkeypatch):
    for name in ("in [2024]/a.JPG", "in [2024]/b.jfif", "in [2024]/c.heic", "in [2024]/d.NEF", "in [2024]/e.txt"):
        picture(tmp_path / name, format="JPEG")
    monkeypatch.chdir(tmp_path)
    said = []
    found = places(pictures(["in [2024]"], tell=said.append))
    assert found == [("in [2024]/a.JPG", "a"), ("in [2024]/b.jfif", "b")]
    assert "1 .heic, 1 .nef. Convert them" in said[0]
    assert places(pictures(["in [2024]/*.jpg"])) == [("in [2024]/a.JPG", "a")]
    assert places(pictures(["in [2024]/[ab].jp*"])) == [("in [2024]/a.JPG", "a")]
    (tmp_path / "raw").mkdir()
    (tmp_path / "in [2024]/c.heic").rename(tmp_path / "raw/c.heic")
    with pytest.raises(DataError, match=r"raw: no picture.* 1 \.heic can't be read here"):
        pictures(["raw"])


@pytest.mark.parametrize(
    "given", ["/**/*.jpg", "..", "/", "../a/../../../../../../../../../../../../**", "*/../../**/*.jpg"]
)
def test_no_pattern_searches_the_whole_disk(tmp_path, monkeypatch, given):
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    if given == "..":  # by a link
        (tmp_path / "everything").symlink_to("/")
    with pytest.raises(DataError, match=r"root of the disk|climbs after its wildcards"):
        pictures([given])


def test_links_in_a_circle(tmp_path, monkeypatch):
    picture(tmp_path / "a/one.jpg")
    (tmp_path / "a/up").symlink_to(tmp_path / "a")
    (tmp_path / "a/again").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert places(pictures(["a"])) == [("a/one.jpg", "one")]
    assert places(pictures(["**/*.jpg"])) == [("a/one.jpg", "a/one")]


def test_what_is_no_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for given, words in (
        (["gone.jpg"], "gone.jpg: no such image file"),
        (["empty"], "empty: no picture in this folder"),
        (["*.jpg"], "no picture fits this pattern"),
        (["-"], "-: the list on the standard input is empty"),
    ):
        with pytest.raises(DataError, match=words.replace("*", r"\*")):
            pictures(given, [])
    with pytest.raises(BadImage, match=r"gone\.jpg: no such image file; it stands in the list"):
        pictures(["-"], ["gone.jpg\n"])


# ---- names -------------------------------------------------------------------------------------


OWN = ("road, street", "Grass", "traffic light|signal", '5" pipe')


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("road, street,water", (("road, street",), ("water",))),
        ("ROAD,  street|way", (("ROAD, street", "way"),)),
        ("road, streets", (("road",), ("streets",))),
        ("traffic light|signal,water", (("traffic light|signal",), ("water",))),
        ('"sea, lake"|pond,"a ""b"""', (("sea, lake", "pond"), ('a "b"',))),
        ('5" pipe, 6" pipe', (('5" pipe',), ('6" pipe',))),
        (" sofa |couch,, cat|", (("sofa", "couch"), ("cat",))),
    ],
)
def test_names_that_hold_commas_and_bars(text, names):
    assert parsed_names(text, OWN) == names


@pytest.mark.parametrize("text", ['"a, b', '"a" b', ",", "a,A", "a,&#97;"])
def test_names_that_are_refused(text):
    with pytest.raises(UserError, match="--names"):
        parsed_names(text)


def test_gamma_that_is_no_number(run, tmp_path, run_cli):
    photo = picture(tmp_path / "a.jpg")
    for value in ("nan", "inf"):
        done = run_cli("predict", photo, "--run", run, "--gamma", value, "--out", tmp_path / "out")
        assert is_one_line_error(done, "--gamma", value, "not a finite number")


def test_a_class_of_the_run_that_holds_a_comma(tmp_path, run_cli):
    run = made_student(tmp_path / "run")
    photo = picture(tmp_path / "a.jpg")
    done = run_cli("predict", photo, "--run", run, "--names", '"soil"|leaf,bloom', "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert '"names": [["soil", "leaf"], ["bloom"]]' in Image.open(tmp_path / "out/a.mask.png").info["recipe"]


def test_names_by_hand():
    assert parsed_names("sofa|couch, cat") == (("sofa", "couch"), ("cat",))
    assert parsed_names(" a  b , ,c|,") == (("a b",), ("c",))
    for text, words in (("cat,Cat", "'cat' stands there twice"), ("a|b,b", "'b' stands"), (" ,", "0 names")):
        with pytest.raises(UserError, match=words):
            parsed_names(text)
    with pytest.raises(UserError, match="32768 names; want 1 to 32767"):
        parsed_names(",".join(map(str, range(32768))))
    assert len(parsed_names(",".join(map(str, range(300))))) == 300


def test_gamma_is_for_names_that_never_had_a_label(tmp_path):
    run = made_student(tmp_path / "run", "text.synonyms={leaf: [leaf, foliage], bloom: [bloom, flower]}")
    asked = Segmenter(run).ask(parsed_names("SOIL,foliage,petal|leaf,bloom,flower,pond"))
    assert asked.titles == ("SOIL", "foliage", "petal", "bloom", "flower", "pond")
    assert asked.is_trained == (True, True, True, False, False, False)


def test_a_name_has_its_row_and_of_synonyms_the_best_counts(run):
    segmenter = Segmenter(run)
    text = segmenter.ask(parsed_names("Bloom,pond")).text
    assert torch.equal(text[0], segmenter.checkpoint.text[2])
    section = segmenter.config.teacher
    teacher = Teacher.load(section.model, section.pretrained, image_size=64, quick_gelu=section.quick_gelu)
    each = teacher.encode_text([[f"a photo of a {word}."] for word in ("pond", "soil", "mud")])  # (3, C) unit norm
    assert torch.allclose(text[1], each[0], atol=1e-6)
    joined = segmenter.ask(parsed_names("pond|Soil|mud,bloom"))
    assert joined.text.shape[:2] == (2, 3)
    own = segmenter.checkpoint.text
    assert torch.allclose(joined.text[0], torch.stack([each[0], own[0], each[2]]), atol=1e-6)
    assert torch.equal(joined.text[1], own[[2, 2, 2]])
    image = np.random.default_rng(4).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    (apart,) = segmenter.scores([image], segmenter.ask(parsed_names("pond,soil,mud,bloom")), gamma=0.0)
    (found,) = segmenter.scores([image], joined, gamma=0.0)
    assert torch.allclose(found, torch.stack([apart[:3].amax(0), apart[3]]), atol=1e-5)


def test_a_learned_classifier_knows_its_classes_alone(tmp_path):
    segmenter = Segmenter(
        made_student(tmp_path / "run", "recipe=clip_es", "student.classifier=learned", text=torch.eye(3))
    )
    assert segmenter.ask(parsed_names("leaf, Soil")).text.tolist() == [[0, 1, 0], [1, 0, 0]]
    assert segmenter.ask(parsed_names("soil|bloom")).text.tolist() == [[[1, 0, 0], [0, 0, 1]]]
    with pytest.raises(UserError, match=r"'pond'.*has learned its 3 classes"):
        segmenter.ask(parsed_names("soil,leaf|pond"))


def test_a_teacher_that_is_not_there_is_missed_only_by_strange_names(tmp_path):
    segmenter = Segmenter(made_student(tmp_path / "run", f"teacher.model=local-dir:{tmp_path}/gone"))
    assert segmenter.ask(None).titles == CLASSES
    with pytest.raises(UserError, match=r"'pond' is none of the run's classes.*gone"):
        segmenter.ask(parsed_names("pond"))


# ---- pixels ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (64, 64), (37, 5)])
def test_strips_are_what_interpolate_gives(monkeypatch, size):
    planes = torch.randn(4, 16, 12)
    whole = interpolate(planes[None], size, mode="bilinear", align_corners=False)[0]
    for values in (1, 4 * 50 * 7, 2**24):
        monkeypatch.setattr(enlarge, "STRIP_VALUES", values)
        rows, parts = zip(*enlarge.strips(planes, size), strict=True)
        assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)
        assert [(each.start, each.stop) for each in rows][-1][1] == size[0]


def test_winners_gamma_and_threshold_by_hand(colours):
    # Left half: red 0.8, blue 0.4; right half: green 0.2. Logits are the strengths, blue (bloom) gets gamma.
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, :32], image[:, 32:] = (204, 0, 102), (0, 51, 0)
    asked = colours.ask(None)

    def halves(gamma, reject):
        (scores,) = colours.scores([image], asked, gamma)
        ids = colours.decide(scores, (64, 64), reject)
        return int(ids[32, 8]), int(ids[32, 56])

    assert halves(0.0, None) == (0, 1)
    assert halves(0.3, None) == (0, 2)  # 0.4 + 0.3 < 0.8, but 0 + 0.3 > 0.2
    assert halves(0.5, None) == (2, 2)
    # sigmoid(0.8) = 0.690, sigmoid(0.2) = 0.550
    assert halves(0.0, 0.54) == (0, 1)
    assert halves(0.0, 0.56) == (0, IGNORE)
    assert halves(0.0, 0.70) == (IGNORE, IGNORE)
    # with gamma 0.5: left bloom, sigmoid(0.9) = 0.711; right bloom, sigmoid(0.5) = 0.622
    assert halves(0.5, 0.70) == (2, IGNORE)
    learned = colours.config.student.model_copy(update={"classifier": "learned"})
    colours.config = colours.config.model_copy(update={"student": learned})
    # softmax of (0.8, 0, 0.4): e^0.8 / (e^0.8 + 1 + e^0.4) = 0.472; of (0, 0.2, 0): e^0.2 / (e^0.2 + 2) = 0.379
    assert halves(0.0, 0.40) == (0, IGNORE)
    assert halves(0.0, 0.48) == (IGNORE, IGNORE)


def test_one_name_alone_can_be_rejected(colours):
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, :32] = (255, 0, 0)
    (scores,) = colours.scores([image], colours.ask((("soil",),)))
    ids = colours.decide(scores, (64, 64), 0.6)  # sigmoid(1) = 0.73, sigmoid(0) = 0.5
    assert (ids[:, :30] == 0).all()
    assert (ids[:, 34:] == IGNORE).all()


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_pixels_are_those_of_the_evaluation(run, mode):
    """The evaluation's own path, of one image at a time and all planes at once, gives the same mask."""
    segmenter, asked = Segmenter(run), Segmenter(run).ask(None)
    section = segmenter.config.eval.model_copy(update={"mode": mode})
    rng = np.random.default_rng(1)
    images = [rng.integers(0, 256, (*size, 3), np.uint8) for size in ((48, 70), (64, 64), (1, 1), (90, 200))]
    scores = segmenter.scores(images, asked, 0.05, mode)
    for image, planes in zip(images, scores, strict=True):
        logits = class_logits(segmenter.student, asked.text, image, 64, section)
        wanted = predicted(best_by_group(logits, [0, 1], [2]), 0.05).numpy()
        size = (image.shape[0], image.shape[1])
        probabilities = np.empty((3, *size), np.float32)
        ids = segmenter.decide(planes, size, None, probabilities)
        assert (ids == wanted).mean() > 0.9995  # sums are in another order
        assert np.array_equal(probabilities.argmax(0), ids)
        added = logits + torch.tensor([0, 0, 0.05])[:, None, None]
        assert np.allclose(probabilities, added.softmax(0).numpy(), atol=0.02)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_slide_shrinks_a_photograph_as_the_evaluation_does(run, seed):
    """Smooth, large and no multiple of anything: no pixel of eval's argmax is another in predict."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 13, 3), np.uint8))
    image = np.array(coarse.resize((333, 217), Image.Resampling.BICUBIC))
    segmenter, asked = Segmenter(run), Segmenter(run).ask(None)
    section = segmenter.config.eval.model_copy(update={"mode": "slide"})
    wanted = predicted(
        best_by_group(class_logits(segmenter.student, asked.text, image, 64, section), [0, 1], [2]), 0.05
    )
    (scores,) = segmenter.scores([image], asked, 0.05, "slide")
    assert np.array_equal(segmenter.decide(scores, (217, 333), asked=asked), wanted.numpy())


def test_a_tie_goes_to_the_name_that_has_labels(colours):
    # Grey 51: every name's logit is 0.2. Bloom is unseen: 0.2 + 0 = 0.2, a tie with soil and leaf.
    image = np.full((64, 64, 3), 51, np.uint8)
    for names, winner in (("soil,leaf,bloom", 0), ("bloom,leaf,soil", 1)):
        asked = colours.ask(parsed_names(names))
        (scores,) = colours.scores([image], asked, 0.0)
        probabilities = np.empty((3, 64, 64), np.float32)
        assert (colours.decide(scores, (64, 64), None, probabilities, asked) == winner).all()
        assert np.allclose(probabilities, 1 / 3)
    # In eval the same: ids of bloom, leaf, soil are 0, 1, 2, and 0 is unseen.
    logits = torch.full((3, 2, 2), 0.25)
    best = best_by_group(logits, [1, 2], [0])
    assert (predicted(best, 0.0) == 1).all()
    swept = SweptConfusion(3, (0.0,), IGNORE)
    swept.update(torch.ones(2, 2, dtype=torch.uint8), *best)
    assert swept.matrix(0.0)[1].tolist() == [0, 4, 0]
    # Unequal again, names apart: the softmax comes back in the order that was asked for.
    asked = colours.ask(parsed_names("bloom,leaf,soil"))
    image[..., :] = (204, 102, 0)
    (scores,) = colours.scores([image], asked, 0.0)
    colours.decide(scores, (64, 64), None, probabilities, asked)
    # softmax of bloom 0, leaf 0.4, soil 0.8: 1, 1.492, 2.226, of 4.717
    assert np.allclose(probabilities[:, 32, 32], (0.212, 0.316, 0.472), atol=1e-3)


@pytest.mark.parametrize("size", [(1, 3_000_000), (2, 20_000), (20_000, 2)])
def test_an_image_too_long_for_windows_is_said_to_be_so(run, size):
    segmenter, image = Segmenter(run), np.zeros((*size, 3), np.uint8)
    asked, told = segmenter.ask(None), rf"{size[1]} x {size[0]} pixels: too long.*windows.*mode whole"
    with pytest.raises(BadImage, match=told):
        segmenter.scores([image], asked, mode="slide")
    section = segmenter.config.eval.model_copy(update={"mode": "slide"})
    item = Loaded(image, torch.zeros(size, dtype=torch.uint8), torch.zeros(3, 64, 64), "strip")
    with pytest.raises(BadImage, match=f"test image strip: {told}"):
        next(predictions(segmenter.student, asked.text, [item], 64, section, [0, 1], [2]))


# ---- pictures of results -----------------------------------------------------------------------


def test_shares_and_colours_by_hand():
    ids = np.array([[0, 0, 1, IGNORE], [0, 0, IGNORE, IGNORE]], np.int16)
    found = shares(ids, ("a", "b"))
    assert [(share.title, share.part) for share in found] == [("a", 0.5), ("b", 0.125), ("none of these", 0.375)]
    assert found[0].colour == (128, 0, 0)
    assert Share(0, "a", 0.004, (0, 0, 0)).percent == "< 1 %"
    assert found[1].percent == "12 %"
    assert palette_of(2).tolist() == [[128, 0, 0], [0, 128, 0], list(NONE_COLOUR)]
    image = np.full((400, 400, 3), 100, np.uint8)
    halves = np.repeat(np.array([[0, 1]], np.int16), 200, 1).repeat(400, 0)
    shown = np.asarray(painted(image, halves, 2))
    # 0.45 * 100 + 0.55 * 128 = 115.4; 0.45 * 100 = 45
    assert np.abs(shown[200, 100].astype(int) - (115, 45, 45)).max() <= 1
    assert np.abs(shown[200, 300].astype(int) - (45, 115, 45)).max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (1, 9000), (9000, 1), (3000, 3000)])
def test_an_overlay_is_neither_tiny_nor_endless(size):
    ids = np.zeros(size, np.int16)
    ids[0, 0] = 1
    page = with_legend(painted(np.zeros((*size, 3), np.uint8), ids, 2), shares(ids, ("a", "b" * 40)))
    assert max(page.size) < LARGEST + 1000
    assert page.height >= 3 * 16  # two lines of legend and a margin


def test_a_long_legend_stands_in_columns():
    ids = np.arange(200, dtype=np.int16).repeat(400).reshape(400, 200)
    page = with_legend(
        painted(np.zeros((400, 200, 3), np.uint8), ids, 200), shares(ids, [f"name {i}" for i in range(200)])
    )
    assert page.height < 900


# ---- the command -------------------------------------------------------------------------------


@pytest.fixture
def odd(tmp_path):
    """A folder of what people have: sizes, modes, a turned photograph, and one file that is none."""
    folder = tmp_path / "odd"
    picture(folder / "tiny.png", (1, 1))
    picture(folder / "grey.png", (50, 20), "L")
    picture(folder / "deep" / "cmyk.jpg", (33, 44), "CMYK")
    picture(folder / "alpha.png", (20, 20), "RGBA")
    exif = Image.Exif()
    exif[274] = 6  # shown turned by 90 degrees
    picture(folder / "turned.jpg", (60, 20), exif=exif)
    picture(folder / "long.png", (2000, 3))
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff not a photograph")
    return folder


def mask_of(out: Path, place: str) -> Image.Image:
    return Image.open(out / f"{place}.mask.png")


def test_a_folder_with_a_broken_file(run, odd, tmp_path, run_cli):
    out = tmp_path / "out"
    command = ("predict", odd, "--run", run, "--out", out)
    done = run_cli(*command)
    assert is_one_line_error(done, "1 of 7 images", "broken.jpg", str(out))
    assert "passed over" in done.stderr
    sizes = {
        "tiny": (1, 1),
        "grey": (50, 20),
        "deep/cmyk": (33, 44),
        "alpha": (20, 20),
        "turned": (20, 60),
        "long": (2000, 3),
    }
    for place, size in sizes.items():
        mask = mask_of(out, place)
        assert mask.mode == "P"
        assert mask.size == size, place
        assert mask.getpalette()[:9] == [128, 0, 0, 0, 128, 0, 128, 128, 0]
        assert set(np.unique(np.asarray(mask))) <= {0, 1, 2}
        assert (out / f"{place}.overlay.png").is_file()
    assert len(done.stdout.splitlines()) == 6
    assert not list(out.rglob(".*")), "nothing unfinished is left"

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    picture(odd / "grey.png", (50, 20), "L", seed=1)
    (out / "alpha.overlay.png").unlink()
    again = run_cli(*command)
    assert is_one_line_error(again, "1 of 7 images")
    assert "4 of 7 are in" in again.stderr
    assert len(again.stdout.splitlines()) == 6, "what was there is told too"
    changed = {path.name for path in out.rglob("*.png") if path.stat().st_mtime_ns != before.get(path)}
    assert changed == {f"{name}.{kind}.png" for name in ("grey", "alpha") for kind in ("mask", "overlay")}


def test_other_names_are_another_result(run, tmp_path, run_cli):
    photo, out = picture(tmp_path / "a.png"), tmp_path / "out"
    for extra in ((), ("--names", "leaf,soil"), ("--gamma", 9), ("--reject", 0.5), ("--mode", "slide")):
        done = run_cli("predict", photo, "--run", run, "--out", out, *extra)
        assert done.returncode == 0, done.stderr
        assert "already" not in done.stderr, extra
    done = run_cli("predict", photo, "--run", run, "--out", out, "--mode", "slide")
    assert "1 of 1 are in" in done.stderr


def test_everything_rejected_and_probabilities(run, tmp_path, run_cli):
    photo, out = picture(tmp_path / "a.png"), tmp_path / "out"
    done = run_cli("predict", photo, "--run", run, "--out", out, "--reject", 1, "--probabilities")
    assert done.returncode == 0, done.stderr
    mask = mask_of(out, "a")
    assert set(np.unique(np.asarray(mask))) == {255}
    assert tuple(np.asarray(mask.convert("RGB"))[0, 0]) == NONE_COLOUR
    probabilities = np.load(out / "a.probabilities.npy")
    assert (probabilities.dtype, probabilities.shape) == (np.float16, (3, 30, 40))
    assert np.allclose(probabilities.astype(np.float32).sum(0), 1, atol=2e-3)
    done = run_cli("predict", photo, "--run", run, "--out", out)
    assert done.returncode == 0, done.stderr
    assert not (out / "a.probabilities.npy").exists(), "they were of another question"
    ids = np.asarray(mask_of(out, "a"))
    best = np.take_along_axis(probabilities, ids[None].astype(int), 0)[0]
    assert (best >= probabilities.max(0) - 1e-3).all()  # float16


def test_a_list_on_the_standard_input(run, tmp_path, run_cli, monkeypatch):
    import io
    import sys

    photos = [picture(tmp_path / name / "a.png") for name in ("x", "y")]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{photo}\n" for photo in photos)))
    out = tmp_path / "out"
    done = run_cli("predict", "-", "--run", run, "--out", out)
    assert done.returncode == 0, done.stderr
    for photo in photos:
        assert mask_of(out, str(photo.with_suffix("")).lstrip("/")).size == (40, 30)


def test_wrong_input_is_one_line(run, tmp_path, run_cli):
    photo = picture(tmp_path / "x" / "a.png")
    twin = picture(tmp_path / "y" / "a.png")
    told = [
        ((photo, "--reject", 1.5), ("--reject 1.5", "0", "1")),
        ((photo, "--mode", "whle"), ("--mode", "whole, slide")),
        ((photo, "--names", "a,A"), ("--names", "different")),
        ((photo, "--names", ""), ("--names", "0 names")),
        ((photo, twin), ("x/a.png", "y/a.png")),
        ((tmp_path / "no.png",), ("no.png", "no such")),
        ((photo, "--out", photo), ("a.png",)),
    ]
    for arguments, words in told:
        assert is_one_line_error(run_cli("predict", *arguments, "--run", run), *words)


def test_a_file_killed_between_two_results_is_made_again(run, tmp_path, run_cli, monkeypatch):
    from pipeline import predict as stage

    photo, out = picture(tmp_path / "a.png"), tmp_path / "out"
    real = stage.whole_file

    def dies_at_the_mask(path):
        if path.name.endswith(stage.MASK):
            raise KeyboardInterrupt
        return real(path)

    monkeypatch.setattr(stage, "whole_file", dies_at_the_mask)
    done = run_cli("predict", photo, "--run", run, "--out", out)
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == "error: interrupted; the same command resumes."
    assert [path.name for path in out.iterdir()] == ["a.overlay.png"]
    monkeypatch.undo()
    done = run_cli("predict", photo, "--run", run, "--out", out)
    assert done.returncode == 0, done.stderr
    assert mask_of(out, "a").size == (40, 30)


def test_batches_are_bounded_by_images_and_pixels(tmp_path, monkeypatch):
    from pipeline import predict as stage
    from pipeline.data.inputs import Picture

    sizes = [(10, 10), (10, 10), (10, 10), (40, 40), (10, 10)]
    found = [Picture(picture(tmp_path / f"{i}.png", size), PurePath(str(i))) for i, size in enumerate(sizes)]
    monkeypatch.setattr(stage, "MOST_PIXELS", 1000)
    assert [[each.place.name for each in group] for group in stage._groups(found, 2)] == [
        ["0", "1"],
        ["2"],
        ["3"],
        ["4"],
    ]
