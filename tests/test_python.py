"""clipteacher.py: what docs/python.md, the notebook and the docstrings promise, on a tiny run of the demo."""

import doctest
import os
import re
import shutil
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import timm
import torch
import yaml
from nbclient import NotebookClient
from PIL import Image
from torch.utils.data import DataLoader

import clipteacher
from cache.errors import CacheError, MissingCache, StaleCache
from pipeline.config import load
from pipeline.data.base import BadImage
from pipeline.learning import batches
from pipeline.learning.segmenter import Segmenter
from tests.conftest import ROOT

SETTINGS = {
    "data.train": 12,
    "data.test": 4,
    "views.num": 1,
    "train.iterations": 6,
    "train.warmup": 2,
    "train.batch": 4,
    "train.tracker": "none",
    "student.encoder": "tu-resnet10t",
    "report.images": 3,
}
SCENE = ROOT / "docs" / "scene.png"


def written(config, path: Path) -> None:
    from pipeline.config import as_mapping
    from pipeline.config.reading import yaml_text

    path.write_text(yaml_text(as_mapping(config)))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A user's folder: a config, a photograph, and the run of that config, evaluated."""
    folder = tmp_path_factory.mktemp("a project")
    (folder / "docs").mkdir()
    shutil.copy(SCENE, folder / "docs" / "scene.png")
    written(load(ROOT / "config" / "demo.yaml", [f"{k}={v}" for k, v in SETTINGS.items()]), folder / "demo.yaml")
    Image.open(SCENE).convert("RGB").save(folder / "photo.jpg")
    before = Path.cwd()
    os.chdir(folder)
    try:
        clipteacher.run("demo", quiet=True)
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def inside(project, monkeypatch):
    monkeypatch.chdir(project)
    return project


# ---- what the documents promise ----------------------------------------------------------------


def test_the_five_lines(inside):
    image, config = Image.open("photo.jpg"), "demo"

    run = clipteacher.load("runs/demo")  # a Run: .config, .classes, .metrics
    mask = run.predict(image, names=["zebra", "sofa|couch"])  # PIL, array or path -> ids; .overlay(), .probabilities
    cache = clipteacher.open_cache("runs/demo/cache")  # .rows, .tokens(id), .pseudo(id), an xarray view
    dataset = clipteacher.training_set(run.config)  # a torch Dataset with integer indices
    made = clipteacher.run(config, until="train")  # the stages, from Python

    assert run.config.data.kind == "demo"
    assert len(run.classes) == 20
    assert run.metrics["num_images"] == 4
    assert mask.ids.shape == (image.height, image.width)
    assert mask.overlay().width > mask.overlay(legend=False).width
    assert mask.probabilities.shape == (2, *mask.shape)
    assert cache.rows == tuple(f"train-{i:05d}" for i in range(12))
    assert cache.tokens("train-00003").shape == (1, 16, 16, 128)
    assert cache.pseudo("train-00003").dtype == np.uint8
    assert cache.to_xarray().sizes["N"] == 12
    assert isinstance(dataset, torch.utils.data.Dataset)
    assert dataset[5]["image"].shape == (3, 128, 128)
    assert made.path == Path("runs/demo")


def test_the_docstrings(inside):
    image = np.asarray(Image.open("photo.jpg").resize((160, 120)))
    failed, tried = doctest.testmod(clipteacher, extraglobs={"clipteacher": clipteacher, "image": image})
    assert tried >= 10
    assert not failed


def test_the_page(inside, capsys):
    """docs/python.md and the section of README, block after block, in one namespace."""
    space: dict = {}
    pages = [(ROOT / "docs" / "python.md").read_text(), (ROOT / "README.md").read_text()]
    found = re.findall(r"```python\n(.*?)```", "".join(pages), re.DOTALL)
    assert len(found) == 7
    for block in found:
        exec(block, space)
    assert "runs/none: not a run folder" in capsys.readouterr().out
    assert space["batch"]["image"].shape[1:] == (3, 128, 128)
    assert Path("mask.png").is_file()
    assert space["mask"].names == ("zebra", "sofa")


def test_the_notebook(project, monkeypatch):
    """docs/notebook.ipynb, executed where it would lie; in git it has no outputs."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "docs" / "notebook.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    resources = {"metadata": {"path": str(project / "docs")}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    pictures = [out for cell in code for out in cell.outputs if "image/png" in out.get("data", {})]
    assert len(pictures) == 7
    assert "20 classes, extract, cluster, train done" in code[0].outputs[0]["data"]["text/plain"]


# ---- runs --------------------------------------------------------------------------------------


def test_a_run_says_what_it_is(inside):
    run = clipteacher.load("runs/demo")
    assert re.fullmatch(
        r"<Run 'runs/demo': 20 classes, extract, cluster, train done, pAcc [\d.]+, mIoU\(S\) .*hIoU [\d.]+>", repr(run)
    )
    assert run.classes[run.config.data.kind == "x"] == "grass"


def test_a_run_that_is_half_done(inside):
    run = clipteacher.run("demo", "extract", settings=["name=half", "data.train=4"], quiet=True)
    assert repr(run) == "<Run 'runs/half': 20 classes, extract done>"
    assert run.metrics is None
    with pytest.raises(clipteacher.UserError, match="no trained student in it"):
        run.predict("photo.jpg")
    with pytest.raises(MissingCache, match="`cluster` has not been completed"):
        clipteacher.training_set(run.config)


def test_metrics_of_another_student_are_refused(inside):
    run = clipteacher.run("demo", settings=["name=again", "cache.path=runs/demo/cache"], quiet=True)
    assert run.metrics["student"]
    changed = {"name": "again", "cache.path": "runs/demo/cache", "train.seed": 1}
    run = clipteacher.run("demo", until="train", settings=changed, quiet=True)
    assert run.metrics is None  # the other training is kept with its evaluation
    (kept,) = Path("runs/again/kept").glob("*/eval")
    kept.rename("runs/again/eval")
    with pytest.raises(StaleCache, match=r"of another student.*eval"):
        _ = run.metrics
    assert "of another student" in repr(run)


def test_a_student_by_its_file(inside, tmp_path):
    shutil.copy("runs/demo/train/student.safetensors", tmp_path / "student.safetensors")
    run = clipteacher.load(tmp_path / "student.safetensors")
    assert run.classes[0] == "grass"
    assert run.metrics is None  # though runs/demo, which its config names, is here
    assert repr(run).endswith("student.safetensors': 20 classes, a student by itself>")
    with pytest.raises(clipteacher.UserError, match="open_cache"):
        _ = run.cache
    assert (run.predict("photo.jpg").ids == clipteacher.load("runs/demo").predict("photo.jpg").ids).all()


def test_a_student_that_was_trained_again_is_loaded_again(inside, tmp_path):
    shutil.copytree("runs/demo", tmp_path / "demo")
    run = clipteacher.load(tmp_path / "demo")
    first = run.segmenter
    assert run.segmenter is first
    file = tmp_path / "demo" / "train" / "student.safetensors"
    os.utime(file, ns=(1, 1))
    assert run.segmenter is not first


@pytest.mark.parametrize("path", ["runs/none", "photo.jpg", "docs"])
def test_what_is_no_run(path, inside):
    with pytest.raises(clipteacher.UserError) as error:
        clipteacher.load(path)
    assert "\n" not in str(error.value)


# ---- masks -------------------------------------------------------------------------------------


def test_a_mask_is_the_commands(inside, run_cli, tmp_path):
    """The same ids as `cli.py predict` writes, with its names and options; probabilities are the command's, rounded."""
    mask = clipteacher.load("runs/demo").predict("photo.jpg", names=["zebra", "sofa|couch"], reject=0.5, gamma=0.25)
    words = ("--names", "zebra,sofa|couch", "--reject", 0.5, "--gamma", 0.25, "--probabilities", "--out", tmp_path)
    done = run_cli("predict", inside / "photo.jpg", "--run", inside / "runs" / "demo", *words)
    assert done.returncode == 0, done.stderr
    kept = np.asarray(Image.open(tmp_path / "photo.mask.png"))
    assert (np.where(mask.ids == -1, 255, mask.ids) == kept).all()
    assert (mask.probabilities.astype(np.float16) == np.load(tmp_path / "photo.probabilities.npy")).all()
    mask.save(tmp_path / "own.png")
    assert (np.asarray(Image.open(tmp_path / "own.png")) == kept).all()
    overlay = np.asarray(Image.open(tmp_path / "photo.overlay.png"))
    assert (np.asarray(mask.overlay()) == overlay).all()


def test_a_mask_behaves_as_its_ids(inside):
    from pipeline.looking.mask import Mask

    ids = np.array([[0, 1, 1], [-1, 1, 0]], np.int16)
    mask = Mask(ids, ["cat", "dog"], np.zeros((2, 3, 3), np.uint8))
    assert isinstance(mask, clipteacher.Mask)
    assert (np.asarray(mask) == ids).all()
    assert np.array(mask, np.int64).dtype == np.int64
    assert np.array(mask) is not ids  # a copy is the caller's
    assert ((mask == 1) == (ids == 1)).all()
    assert (mask + 1).max() == 2
    assert np.max(mask) == 1
    assert np.add.reduce(mask, axis=0).tolist() == [-1, 2, 1]
    assert mask[0, 1] == 1
    assert mask[mask >= 0].tolist() == [0, 1, 1, 1, 0]
    assert (len(mask), mask.shape, mask.dtype) == (2, (2, 3), np.int16)
    assert np.unique(mask).tolist() == [-1, 0, 1]
    assert mask.of("dog").sum() == 3
    assert mask.shares() == {"dog": 0.5, "cat": pytest.approx(1 / 3), "none of these": pytest.approx(1 / 6)}
    assert repr(mask) == "<Mask of 2 x 3 pixels: dog 50 %, cat 33 %, none of these 17 %>"
    assert mask._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(KeyError, match="'cow' is none of 'cat', 'dog'"):
        mask.of("cow")
    with pytest.raises(TypeError):
        np.add(ids, 1, out=mask)


def test_what_an_image_may_be(inside, tmp_path):
    """A path, PIL and arrays give one mask; EXIF turns what has it, as predict does."""
    run = clipteacher.load("runs/demo")
    picture = Image.open("photo.jpg").resize((90, 60))
    exif = Image.Exif()
    exif[274] = 6  # stored on its side
    picture.save(tmp_path / "turned.png", exif=exif)
    upright = np.rot90(np.asarray(picture), -1)
    masks = [
        run.predict(image)
        for image in (
            tmp_path / "turned.png",
            str(tmp_path / "turned.png"),
            Image.open(tmp_path / "turned.png"),
            upright,
            np.dstack([upright, np.full((90, 60), 255, np.uint8)]),
        )
    ]
    assert masks[0].shape == (90, 60)
    assert all((mask.ids == masks[0].ids).all() for mask in masks)
    grey = np.asarray(picture.convert("L"))
    assert (run.predict(grey).image == grey[..., None]).all()


@pytest.mark.parametrize(
    ("image", "word"),
    [
        (np.zeros((8, 8, 3)), "dtype float64"),
        (np.zeros((3, 8, 8), np.uint8), r"shape \(3, 8, 8\)"),
        (np.zeros((0, 8, 3), np.uint8), r"shape \(0, 8, 3\)"),
        (np.zeros(8, np.uint8), r"shape \(8,\)"),
        (None, "dtype object"),
        (Image.new("F", (8, 8)), "unknown range"),
        ("demo.yaml", "not a picture"),
    ],
)
def test_what_no_image_is(image, word, inside):
    with pytest.raises(BadImage, match=word) as error:
        clipteacher.load("runs/demo").predict(image)
    assert "\n" not in str(error.value)


def test_a_picture_that_is_cut_off(inside, tmp_path):
    (tmp_path / "cut.jpg").write_bytes((inside / "photo.jpg").read_bytes()[:3000])
    with pytest.raises(BadImage, match="can't be decoded"):
        clipteacher.load("runs/demo").predict(Image.open(tmp_path / "cut.jpg"))


@pytest.mark.parametrize(
    ("names", "word"),
    [
        ([], "0 names"),
        (["zebra", "Zebra"], "'Zebra' stands there twice|'zebra' stands there twice"),
        (["zebra", ""], "'' is no name"),
        (["zebra", "|"], "empty"),
        (["zebra", 3], "3 is no name"),
        ([("sofa", None)], "is no name"),
        ("zebra,zebra", "stands there twice"),
        (5, "names 5: not a list of names"),
    ],
)
def test_what_no_names_are(names, word, inside):
    with pytest.raises(clipteacher.UserError, match=word):
        clipteacher.load("runs/demo").predict("photo.jpg", names=names)


def test_names_one_by_one():
    from pipeline.learning.segmenter import listed_names

    own = ("road, street", "a|b", "cat")
    assert listed_names(["cat", "sofa | couch"]) == (("cat",), ("sofa", "couch"))
    assert listed_names(["road, street|lane", "a|b", ("x", "y,z")], own) == (
        ("road, street", "lane"),
        ("a|b",),
        ("x", "y,z"),
    )
    assert listed_names(['"a|b"|c']) == (("a|b", "c"),)


@pytest.mark.parametrize(
    "wrong", [{"reject": 2}, {"mode": "hole"}, {"gamma": float("nan")}, {"gamma": "1"}, {"reject": True}]
)
def test_wrong_options(wrong, inside):
    with pytest.raises(clipteacher.UserError, match=next(iter(wrong))):
        clipteacher.load("runs/demo").predict("photo.jpg", **wrong)


# ---- from any working directory ----------------------------------------------------------------


@pytest.fixture
def own_teacher(inside, tmp_path):
    """A project whose teacher lies in a folder of its own: nothing of it is among the presets."""
    folder = tmp_path / "mine"
    shutil.copytree(ROOT / "config" / "demo_teacher", folder / "weights" / "clip")
    here = Path.cwd()
    os.chdir(folder)
    settings = {**SETTINGS, "teacher.model": "local-dir:weights/clip", "data.train": 4, "train.iterations": 2}
    clipteacher.run(here / "demo.yaml", until="train", settings=settings, quiet=True)
    os.chdir(tmp_path)
    return folder


def test_new_words_from_any_working_directory(own_teacher, run_cli, tmp_path):
    run = clipteacher.load(own_teacher / "runs" / "demo")
    mask = run.predict(SCENE, names=["sofa"])
    assert mask.names == ("sofa",)
    done = run_cli("predict", SCENE, "--run", own_teacher / "runs" / "demo", "--names", "sofa", "--out", tmp_path / "o")
    assert done.returncode == 0, done.stderr
    # The rest of the run is found as well, its fingerprints being what they were.
    assert len(clipteacher.training_set(run.config)) == 4
    again = clipteacher.run(run.config, until="train", quiet=True)
    assert again.path.resolve() == (own_teacher / "runs" / "demo").resolve()
    assert not Path("runs").exists()


def test_a_project_that_moved_as_a_whole(own_teacher, tmp_path):
    own_teacher.rename(tmp_path / "elsewhere")
    assert clipteacher.load(tmp_path / "elsewhere" / "runs" / "demo").predict(SCENE, names=["sofa"]).names == ("sofa",)


def test_a_run_that_moved_by_itself(own_teacher, run_cli, tmp_path):
    (tmp_path / "there" / "runs").mkdir(parents=True)
    (own_teacher / "runs" / "demo").rename(tmp_path / "there" / "runs" / "new name")
    run = clipteacher.load(tmp_path / "there" / "runs" / "new name")
    assert run.predict(SCENE).names == run.classes  # its own classes need no teacher
    assert len(clipteacher.training_set(run.config)) == 4
    with pytest.raises(clipteacher.UserError, match="name = 'new name'"):
        clipteacher.run(run.config)
    with pytest.raises(clipteacher.UserError) as error:
        run.predict(SCENE, names=["sofa"])
    said = str(error.value)
    assert "local-dir:weights/clip" in said
    assert f"{tmp_path / 'there'} (where the run was made)" in said
    assert "\n" not in said


def test_another_teacher_in_its_place_is_refused(own_teacher):
    """A folder that lies where the run's teacher lay, with other weights: their features would be of another space."""
    from safetensors.torch import load_file, save_file

    file = own_teacher / "weights" / "clip" / "open_clip_model.safetensors"
    torch.manual_seed(0)
    save_file({name: value + 0.1 * torch.randn_like(value) for name, value in load_file(file).items()}, file)
    with pytest.raises(clipteacher.UserError, match="another teacher than the student learned from"):
        clipteacher.load(own_teacher / "runs" / "demo").predict(SCENE, names=["sofa"])


def test_a_second_model_s_weights_from_any_working_directory(own_teacher, tmp_path):
    timm_weights(own_teacher / "second.pth", seed=0)
    os.chdir(own_teacher)
    settings = {"cluster.teacher": "timm:test_vit3", "cluster.teacher_weights": "second.pth"}
    run = clipteacher.run("runs/demo/config.yaml", until="cluster", settings=settings, quiet=True)
    os.chdir(tmp_path)
    again = clipteacher.load(run.path if run.path.is_absolute() else own_teacher / run.path)
    assert "extract, encode, cluster" in repr(clipteacher.run(again.config, until="cluster", quiet=True))
    assert not Path("runs").exists()
    (own_teacher / "second.pth").unlink()
    with pytest.raises(clipteacher.UserError, match=r"'second.pth': no such file in .*where the run was made"):
        clipteacher.run(again.config, until="cluster", quiet=True)


def test_a_session_loads_models_anew_whose_files_have_changed(own_teacher, run_cli):
    """What a teacher is loaded from may be replaced between two runs of a session, under the same name."""
    from safetensors.torch import load_file, save_file

    os.chdir(own_teacher)
    settings = {"cluster.teacher": "timm:test_vit3", "cluster.teacher_weights": "second.pth"}

    def seen(cache):
        found = clipteacher.run(
            "runs/demo/config.yaml", until="encode", settings=settings | {"cache.path": cache}, quiet=True
        ).cache
        return found.cls("train-00000"), found.read("cluster_tokens", "train-00000")

    timm_weights(own_teacher / "second.pth", seed=0)
    first = seen("one")
    timm_weights(own_teacher / "second.pth", seed=1)
    second = seen("two")
    assert (second[0] == first[0]).all()
    assert (second[1] != first[1]).any()
    file = own_teacher / "weights" / "clip" / "open_clip_model.safetensors"
    save_file({name: value * 1.1 for name, value in load_file(file).items()}, file)
    assert (seen("three")[0] != first[0]).any()


def timm_weights(path, seed):
    torch.manual_seed(seed)
    torch.save(timm.create_model("test_vit3").state_dict(), path)


def test_a_weights_file_that_is_gone(inside, tmp_path):
    run = clipteacher.load(inside / "runs" / "demo")
    section = run.config.teacher.model_copy(update={"model": "ViT-B-16", "pretrained": "clip.pt", "quick_gelu": False})
    config = run.config.model_copy(update={"teacher": section}).made_in(tmp_path)
    object.__setattr__(run.segmenter.checkpoint, "config", config)
    with pytest.raises(clipteacher.UserError, match=r"'clip.pt': no such file in .*where the run was made"):
        run.predict("photo.jpg", names=["sofa"])


def test_runs_from_before_paths_were_recorded(own_teacher):
    """A relative `runs` says where the working directory was."""
    file = own_teacher / "runs" / "demo" / "config.yaml"
    kept = yaml.safe_load(file.read_text())
    assert kept["written_by"].pop("made_in") == "../.."
    file.write_text(yaml.safe_dump(kept))
    assert clipteacher.load(own_teacher / "runs" / "demo").predict(SCENE, names=["sofa"]).names == ("sofa",)


# ---- caches ------------------------------------------------------------------------------------


def test_a_cache_image_by_image(inside):
    cache = clipteacher.open_cache("runs/demo/cache")
    raw = cache.store.read_rows("tokens", [7])[0]
    assert (cache.tokens("train-00007") == raw.astype(np.float32)).all()
    assert cache.tokens("train-00007").dtype == np.float32
    assert cache.cls("train-00007").shape == (1, 128)
    assert cache.boxes("train-00007").tolist() == [[0, 0, 128, 128]]
    assert cache.usable == cache.rows
    assert len(cache) == 12
    assert repr(cache).startswith("<Cache 'runs/demo/cache': 12 images, view, cls, tokens")
    view = cache.to_xarray()
    assert (view.pseudo.sel(N="train-00007").values == cache.pseudo("train-00007")).all()
    assert view.text.sel(K="zebra").shape == (128,)
    with pytest.raises(clipteacher.UserError, match="caches no image 'train-7'; near it are train-0000"):
        cache.tokens("train-7")
    with pytest.raises(MissingCache, match="no array 'cam'"):
        cache.read("cam", "train-00007")
    with pytest.raises(MissingCache, match="no cache here"):
        clipteacher.open_cache("runs")


def test_int8_tokens_are_what_the_teacher_said(inside):
    whole = clipteacher.open_cache("runs/demo/cache")
    run = clipteacher.run(
        "demo", "extract", settings={"name": "small", "cache.tokens": "int8", "data.train": 3}, quiet=True
    )
    exact, kept = whole.tokens("train-00002"), run.cache.tokens("train-00002")
    cosine = (exact * kept).sum(-1) / np.linalg.norm(exact, axis=-1) / np.linalg.norm(kept, axis=-1)
    assert cosine.min() > 0.999


def test_rows_without_an_image(inside, tmp_path):
    shutil.copytree("runs/demo/cache", tmp_path / "cache")
    cache = clipteacher.open_cache(tmp_path / "cache")
    cache.store.write_shard("status", 0, np.array([0, 1, 2, 255, *[0] * 8], np.uint8))
    cache = clipteacher.open_cache(str(tmp_path / "cache"))
    assert cache.usable == (cache.rows[0], *cache.rows[4:])
    for row, word in ((1, "quarantined"), (2, "no longer in the data set"), (3, "not extracted yet")):
        with pytest.raises(clipteacher.UserError, match=word):
            cache.tokens(cache.rows[row])


def test_xarray_that_is_not_installed(inside, monkeypatch):
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(clipteacher.UserError, match=r"pip install 'clipteacher\[xarray\]'"):
        clipteacher.open_cache("runs/demo/cache").to_xarray()


# ---- training sets -----------------------------------------------------------------------------


def test_items_are_those_of_training(inside):
    config = clipteacher.read_config("demo", {"train.flip": 0, "train.photometric": False})
    dataset = clipteacher.training_set(config)
    assert (len(dataset), len(dataset.ids), len(dataset.classes), len(dataset.unseen)) == (12, 12, 20, 5)
    for name, value in dataset.views.whole(7).items():  # view 0 as it is: the only one that is cached
        assert torch.equal(dataset[7][name], value)
    assert dataset[-5]["sample"] == 7
    assert dataset[np.int64(7)]["sample"] == 7
    dataset[7]["image"].zero_()  # what is handed out is the reader's own
    assert dataset[7]["image"].any()
    with pytest.raises(IndexError, match="item 12 of 12"):
        dataset[12]
    assert [item["sample"] for item in dataset] == list(range(12))


def test_an_epoch_is_a_draw_that_can_be_repeated(inside):
    one, two = (clipteacher.training_set("demo") for _ in range(2))
    first = [one[i]["image"] for i in range(12)]
    assert all(torch.equal(a, two[i]["image"]) for i, a in enumerate(first))
    one.set_epoch(1)
    flipped = [torch.equal(one[i]["image"], a.flip(-1)) and not torch.equal(a, a.flip(-1)) for i, a in enumerate(first)]
    assert any(flipped)
    assert not all(flipped)


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_loader_processes_read_the_same(inside, how, monkeypatch):
    """Also where the arrays don't fit into memory, and each process reads the cache itself."""
    monkeypatch.setattr(batches, "KEEP_BYTES", 0)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    dataset = clipteacher.training_set("demo")
    alone = list(DataLoader(dataset, batch_size=6))  # the parent has read the cache, too
    spread = list(DataLoader(dataset, batch_size=6, num_workers=1, multiprocessing_context=how, timeout=60))
    for one, two in zip(alone, spread, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)


# ---- configs and stages ------------------------------------------------------------------------


def test_what_a_config_may_be(inside):
    made = clipteacher.load("runs/demo").config
    mapping = yaml.safe_load(Path("demo.yaml").read_text())
    for source in ("demo", "demo.yaml", Path("demo.yaml"), mapping, made):
        config = clipteacher.read_config(source, {"train.lr": 1e-3, "data.unseen": ["bee"]})
        assert (config.train.lr, config.data.options()["unseen"], config.train.iterations) == (1e-3, ["bee"], 6)
    assert clipteacher.read_config("voc").data.kind == "voc"  # a preset
    assert clipteacher.read_config("demo", "train.lr=0.5").train.lr == 0.5
    assert made.train.lr == clipteacher.read_config("demo").train.lr


def test_names_in_the_working_directory_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert clipteacher.read_config("demo").train.iterations == 1700  # the preset's
    assert clipteacher.read_config("config/demo.yaml").train.iterations == 1700
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "demo.yaml").write_text("train: {iterations: 2}\n")
    assert clipteacher.read_config("demo").train.iterations == 2
    (tmp_path / "demo.yaml").write_text("train: {iterations: 3}\n")
    assert clipteacher.read_config("demo").train.iterations == 3
    (tmp_path / "demo").mkdir()  # a folder is no config
    assert clipteacher.read_config("demo").train.iterations == 3


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: clipteacher.run("dmeo"), "dmeo.yaml: no such config file"),
        (lambda: clipteacher.run("demo", until="trian"), "until 'trian': .* extract, cluster, train, eval"),
        (lambda: clipteacher.run("demo", until="cams"), "recipe clip_teacher has the stages"),
        (lambda: clipteacher.run("demo", settings={"train.lrr": 1}), "nearest valid one is 'train.lr'"),
        (lambda: clipteacher.run({"trian": {}}), "unknown key 'trian'"),
        (lambda: clipteacher.run({"data": {"kind": "folder", "root": "nowhere"}}), "nowhere"),
    ],
)
def test_mistakes_are_user_errors(call, word, inside):
    with pytest.raises(clipteacher.UserError, match=word) as error:
        call()
    assert "\n" not in str(error.value)


def test_recipe_clip_es_has_its_own_stage(inside, capsys):
    small = {**SETTINGS, "data.train": 4, "train.iterations": 2, "cams.max_side": 64}
    run = clipteacher.run("demo_clip_es", until="train", settings=small, quiet=True)
    assert repr(run) == "<Run 'runs/demo_clip_es': 17 classes, extract, cams, train done>"
    assert clipteacher.training_set(run.config)[0]["pseudo"].shape == (1, 1)
    assert run.predict("photo.jpg").names == run.classes
    with pytest.raises(clipteacher.UserError, match="knows no other name"):
        run.predict("photo.jpg", names=["sofa"])


def test_two_trainings_of_a_session_may_differ_in_precision(inside):
    for precision in ("bf16", "fp32"):
        settings = {"name": precision, "cache.path": "runs/demo/cache", "train.precision": precision}
        threads = torch.get_num_threads()
        clipteacher.run("demo", "train", settings={**settings, "train.threads": 2, "train.iterations": 1}, quiet=True)
        assert torch.get_num_threads() == threads


def test_a_session_sees_images_come(inside, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "dataset.yaml").write_text(
        "name: mine\nclasses: [a, b]\n"
        + "".join(f"{part}: {{images: '*.jpg', masks: '*.png'}}\n" for part in ("train", "test"))
    )
    config = yaml.safe_load((inside / "demo.yaml").read_text()) | {"data": {"kind": "folder", "root": "mine"}}
    rng = np.random.default_rng(0)
    for num in (1, 2):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / f"{num}.jpg")
        Image.fromarray(rng.integers(0, 2, (64, 64), np.uint8)).save(folder / f"{num}.png")
        assert len(clipteacher.run(config, "extract", quiet=True).cache) == num


def test_training_in_processes(inside, tmp_path, monkeypatch, capfd):
    """Of the command's own processes; one that fails is an error, and never ends this one."""
    import cli

    settings = {"name": "two", "cache.path": "runs/demo/cache", "train.processes": 2, "train.iterations": 1}
    run = clipteacher.run("demo", until="train", settings=settings, quiet=True)
    assert repr(run).startswith("<Run 'runs/two': 20 classes, extract, cluster, train done")
    (tmp_path / "fails.py").write_text("import sys\nsys.exit(f'it had {sys.argv[1]} {sys.argv[4]}')\n")
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "fails.py"))
    with pytest.raises(clipteacher.UserError, match="one of 2 processes ended with code 1; what it said is above"):
        clipteacher.run("demo", until="train", settings={**settings, "train.seed": 2}, quiet=True)
    assert "it had train --quiet" in capfd.readouterr().err


def test_quiet_says_results_and_warnings_alone(inside, capsys):
    """What was done before is only mentioned."""
    clipteacher.run("demo", quiet=True)
    quiet = capsys.readouterr().err
    clipteacher.run("demo")
    loud = capsys.readouterr().err
    for said in (quiet, loud):
        assert "mIoU(U)" in said
        assert "pseudo labels:" in said
    assert "nothing to do" in loud
    assert "nothing to do" not in quiet


def test_errors_are_of_two_kinds():
    assert issubclass(clipteacher.UserError, ValueError)
    assert clipteacher.CacheError is CacheError
    assert clipteacher.ConfigError.__mro__[1] is clipteacher.UserError


def test_all_that_is_exported_is_there():
    assert {name: getattr(clipteacher, name) for name in clipteacher.__all__}
    assert clipteacher.TrainingSet.__module__ == "pipeline.learning.trainingset"
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = clipteacher.Nothing


def test_a_segmenter_is_shared_by_predictions(inside, monkeypatch):
    made = []
    monkeypatch.setattr(
        Segmenter, "__init__", lambda self, path, own=Segmenter.__init__: made.append(path) or own(self, path)
    )
    run = clipteacher.load("runs/demo")
    for _ in range(2):
        run.predict("photo.jpg", names=["zebra"])
    assert len(made) == 1
