"""A data set of one's own: the page's twenty lines as they stand, and every way to get them wrong."""

import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from pipeline.config import load
from pipeline.data.base import DataError, open_data_set
from pipeline.data.own import CHECKS
from pipeline.running.manifests import required_manifest
from pipeline.running.table import config_fingerprint
from pipeline.snakefile import stage_triggers
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "data.md").read_text()


def blocks(language: str) -> dict[str, str]:
    """The page's blocks of a language by the name in their first line."""
    found = re.findall(rf"```{language}\n# (\S+)\n(.*?)```", PAGE, re.DOTALL)
    return dict(found)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder outside the checkout with the page's two files, twelve images with arrays, and config/."""
    for name, text in (blocks("python") | blocks("yaml")).items():
        (tmp_path / name).write_text(text)
    os.symlink(ROOT / "config", tmp_path / "config")
    rng = np.random.default_rng(0)
    for part, num in (("train", 10), ("test", 2)):
        (tmp_path / "photos" / part).mkdir(parents=True)
        for i in range(num):
            Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(
                tmp_path / "photos" / part / f"{i:02}.png"
            )
            np.save(tmp_path / "photos" / part / f"{i:02}.npy", rng.integers(-1, 3, (48, 64)))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("garden_data", None)
    sys.path[:] = [place for place in sys.path if place != str(tmp_path)]


@pytest.fixture
def run(folder, run_cli):
    """`python cli.py ...` of the checkout, with the folder as working directory; with --workers as its own process."""

    def called(*words: str, code: int = 0) -> str:
        if "--workers" in words:
            command = [sys.executable, str(ROOT / "cli.py"), *words]
            done = subprocess.run(command, capture_output=True, text=True)
        else:
            done = run_cli(*words, folder=folder)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    return called


def test_the_page_runs_as_it_stands(folder, run):
    commands = re.findall(r"^    python cli\.py (.*--config garden\.yaml.*)$", PAGE, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["doctor", "extract", "cluster"]
    for command in commands:
        said = run(*shlex.split(command))
    assert "objects" in said
    config = load("garden.yaml")
    before = required_manifest(config, "extract")["content"]
    photo = folder / "photos" / "train" / "00.png"
    Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(photo)  # another image: told by its stamp
    assert "00" in run("extract", "--config", "garden.yaml", code=2)
    assert required_manifest(config, "extract")["content"] == before
    run("extract", "--config", "garden.yaml", "--renew")
    assert required_manifest(config, "extract")["content"] != before


def test_fingerprints_follow_its_options_and_not_its_place(folder):
    one = load("garden.yaml")
    moved, other = load("garden.yaml", ["data.root=elsewhere"]), load("garden.yaml", ["data.options.ending=jpg"])
    assert config_fingerprint(one, "extract") == config_fingerprint(moved, "extract")
    assert config_fingerprint(one, "extract") != config_fingerprint(other, "extract")


def test_snakemake_sees_its_files(folder):
    before = stage_triggers(load("garden.yaml"))
    from pipeline import snakefile

    np.save(folder / "photos" / "train" / "00.npy", np.zeros((48, 64, 1)))
    snakefile._listing.cache_clear()
    now = stage_triggers(load("garden.yaml"))
    assert now["extract"] == before["extract"]
    assert now["cluster"] != before["cluster"]


def opened(folder, change=("", ""), kind="garden_data:Garden", **options):
    text = blocks("python")["garden_data.py"]
    assert change[0] in text
    (folder / "garden_data.py").write_text(text.replace(*change, 1))
    sys.modules.pop("garden_data", None)
    sys.dont_write_bytecode = True
    return open_data_set(kind, **{"root": "photos", "options": {"ending": "png"}} | options)


def test_it_is_a_data_set_like_any_other(folder):
    data = opened(folder)
    assert (data.name, data.unseen, len(data.samples("train"))) == ("garden", ("gnome",), 10)
    assert len(data.identity("train")) == 32
    assert opened(folder, unseen=["path"]).unseen == ("path",)
    assert opened(folder, root=str(folder / "photos")).samples("test")[0].image.endswith("photos/test/00.png")


LABELS = "np.load(sample.mask).astype(np.int16)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("def image(", "def images("), r"Garden lacks image\(\)\. docs/data.md says"),
        (("def stamp(", "def stamps("), r"Garden lacks stamp\(\)"),
        (("(DataSet):", ":"), "Garden is type <class .*; want a class derived from pipeline.data.base.DataSet"),
        (("class Garden", "class Gardn"), "garden_data has no Garden; want a class"),
        (
            ("import numpy as np", "import numppy as np"),
            "garden_data can't be imported in .*: ModuleNotFoundError: .*'numppy'",
        ),
        (("self.root, self.ending", "self.root self.ending"), "can't be imported in .*: SyntaxError"),
        (("super().__init__(", "dict("), r"its __init__ must call super\(\).__init__\(classes="),
        (
            ("self.root, self.ending = Path(root), ending", "1 / 0"),
            r"constructor fails: ZeroDivisionError: .*garden_data.py, line \d+",
        ),
        (('"gnome"], unseen', '"grass"], unseen'), "classes: 'grass' is listed twice"),
        (("return [Sample(", "return (Sample("), "SyntaxError"),
        (("return [Sample(path.stem, ", "return [Sample('a', "), r"samples\('train'\) gives the id 'a' twice"),
        (("return [Sample(path.stem, ", "return [Sample(7, "), r"samples\('train'\) gives the id 7; want text"),
        (
            ('f"*.{self.ending}"))\n        if not found', '"*.x"))\n        if found is None'),
            r"samples\('train'\) gives no sample; want at least one",
        ),
        (("        return [", "        return None and ["), r"samples\('train'\) gives NoneType None; want a list of"),
        (
            ("read_image(sample.image)", "read_image(sample.image)[..., :1]"),
            r"image\('00'\) gives an array of shape \(48, 64, 1\)",
        ),
        (
            ("read_image(sample.image)", "read_image(sample.pixels)"),
            r"image\('00'\) fails: AttributeError: .*pixels.*line \d+",
        ),
        (
            (LABELS, "np.load(sample.mask)"),
            r"labels\('00'\) gives an array of shape \(48, 64\), int64; want ids of .* int16",
        ),
        ((LABELS, LABELS + " + 1"), r"labels\('00'\) gives ids from 0 to 3; want 0 to 2, and -1"),
        ((LABELS, LABELS + "[1:]"), r"labels\('00'\) is of shape \(47, 64\), and the image of \(48, 64\)"),
        (("file_stamp(sample.image)", "7"), r"stamp\('00'\) gives int 7; want text"),
        (("file_stamp(sample.mask, whole=True)", "None"), r"mask_stamp\('00'\) gives NoneType None; want text"),
    ],
)
def test_what_is_missing_is_named(change, message, folder):
    with pytest.raises(DataError, match=message) as caught:
        opened(folder, change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"kind": "nowhere.at_all:Garden"},
            "nowhere.at_all can't be imported in .*: ModuleNotFoundError: No module named 'nowhere'",
        ),
        ({"kind": "garden data:Garden"}, "want package.module:Class"),
        ({"kind": "garden_data:"}, "want package.module:Class"),
        ({"kind": "garden_data:np"}, "np is module .*; want a class derived"),
        ({"ending": "png"}, r"data.ending: .* write options: \{ending: ...\}"),
        ({"options": {"endin": "png"}}, "constructor takes no 'endin'; the nearest valid one is 'ending'"),
        ({"options": ["png"]}, r"data.options is \['png'\]; want a mapping"),
        ({"options": {"root": "x"}}, "data.options.root: stands in data.root, too"),
        ({"limit": 3}, "constructor takes no 'limit'"),
    ],
)
def test_wrong_options(given, message, folder):
    with pytest.raises(DataError, match=message):
        opened(folder, **given)


def test_a_missing_option_and_a_part_that_is_not_there(folder, run):
    (folder / "garden_data.py").write_text(blocks("python")["garden_data.py"])
    with pytest.raises(
        DataError, match=r"data.root is missing, and garden_data:Garden needs it; it takes root, unseen, ending"
    ):
        open_data_set("garden_data:Garden")
    data = open_data_set("garden_data:Garden", root="nothing")  # whoever needs a part says that it isn't there
    with pytest.raises(DataError, match=r"nothing/train: no images that end in .jpg"):
        data.samples("train")
    said = run("extract", "--config", "garden.yaml", "--set", "data.root=nothing", code=2)
    assert "error: nothing/train: no images that end in .png." in said


def test_the_command_ends_in_one_line(folder, run):
    said = run("extract", "--config", "garden.yaml", "--set", "data.kind=gone:Garden", code=2)
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "gone can't be imported" in lines[0]
    assert "Traceback" not in said


def test_a_run_of_a_stranger_imports_nothing_when_it_predicts(folder):
    from pipeline.learning.segmenter import Segmenter

    (folder / "trap.py").write_text("raise SystemExit('imported')")
    segmenter = Segmenter.__new__(Segmenter)
    segmenter.config = load("garden.yaml", ["data.kind=trap:Trap"])
    assert segmenter.renamed() == ""
    assert "trap" not in sys.modules


def test_the_page_names_what_is_checked():
    assert all(f"`{name}(sample)`" in PAGE for name in CHECKS)
