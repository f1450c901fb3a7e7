"""What a user gets wrong: one clear line, exit code 2, no traceback, and nothing lost."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ROOT, is_one_line_error

CONFIG = ROOT / "config" / "demo.yaml"


def garden(folder, *, images=3):
    """A folder data set of tiny photographs: classes soil, leaf, bloom (unseen)."""
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        (folder / part).mkdir(parents=True)
        for i in range(images):
            labels = (np.mgrid[0:64, 0:96][1] // 32).astype(np.uint8)
            pixels = (labels[..., None] * 80 + rng.integers(0, 40, (64, 96, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(folder / part / f"{i}.jpg")
            Image.fromarray(labels).save(folder / part / f"{i}.png")
    parts = {p: {"images": f"{p}/*.jpg", "masks": f"{p}/*.png"} for p in ("train", "test")}
    described = {"name": "garden", "classes": ["soil", "leaf", "bloom"], "unseen": ["bloom"], **parts}
    (folder / "dataset.yaml").write_text(json.dumps(described))  # JSON is YAML
    return folder


def options(tmp_path, *settings):
    """The demo's teacher and a tiny student on the garden; the demo's own data options don't apply to it."""
    config = tmp_path / "garden.yaml"
    config.write_text(
        "name: garden\n"
        f"runs: {tmp_path}/runs\n"
        f"data: {{kind: folder, root: {tmp_path}/garden}}\n"
        "teacher: {model: 'local-dir:config/demo_teacher', pretrained: null, image_size: 64, batch: 4}\n"
        "student: {arch: FPN, encoder: tu-resnet10t, encoder_weights: null}\n"
        "train: {iterations: 2, batch: 2, checkpoint_every: 1, photometric: false}\n"
    )
    return ["--config", config, *(word for s in settings for word in ("--set", s))]


@pytest.fixture
def cached(tmp_path, run_cli):
    """A garden with its cache extracted."""
    garden(tmp_path / "garden")
    done = run_cli("extract", *options(tmp_path))
    assert done.returncode == 0, done.stderr
    return tmp_path


def test_a_folder_of_photographs_runs_end_to_end(cached, run_cli):
    for stage in ("cluster", "train", "eval", "report"):
        done = run_cli(stage, *options(cached))
        assert done.returncode == 0, done.stderr
    metrics = json.loads((cached / "runs" / "garden" / "eval" / "metrics.json").read_text())
    assert set(metrics["per_class"]) == {"soil", "leaf", "bloom"}
    photo = cached / "garden" / "test" / "0.jpg"
    done = run_cli(
        "predict", photo, "--run", cached / "runs" / "garden", "--names", "soil,pond", "--out", cached / "out"
    )
    assert done.returncode == 0, done.stderr
    mask = np.asarray(Image.open(cached / "out" / "0.mask.png"))
    assert mask.shape == (64, 96)
    assert set(np.unique(mask)) <= {0, 1}
    assert Image.open(cached / "out" / "0.overlay.png").width > 96
    done = run_cli("predict", photo, "--run", cached / "runs" / "garden", "--names", "soil,soil")
    assert is_one_line_error(done, "--names", "different")
    done = run_cli("predict", cached / "no.jpg", "--run", cached / "runs" / "garden")
    assert is_one_line_error(done, "no.jpg", "no such")
    assert is_one_line_error(run_cli("predict", photo, "--run", cached / "nowhere"), "nowhere", "cli.py train")


def test_a_missing_folder(tmp_path, run_cli):
    assert is_one_line_error(run_cli("extract", *options(tmp_path)), "garden")


def test_an_unknown_config_key(run_cli):
    assert is_one_line_error(run_cli("extract", "--config", CONFIG, "--set", "views.nmu=2"), "views.nmu", "views.num")


def test_a_missing_config(run_cli):
    assert is_one_line_error(run_cli("train", "--config", "config/dmeo.yaml"), "config/dmeo.yaml", "config/demo.yaml")


def test_a_broken_image_is_quarantined_and_too_many_stop(tmp_path, run_cli):
    garden(tmp_path / "garden")
    (tmp_path / "garden" / "train" / "1.jpg").write_bytes(b"not an image")
    done = run_cli("extract", *options(tmp_path, "cache.max_bad=0"))
    assert is_one_line_error(done, "1.jpg", "cache.max_bad = 0")
    again = run_cli("extract", *options(tmp_path, "cache.max_bad=0"))
    assert is_one_line_error(again, "1.jpg", "cache.max_bad = 0"), "repeating the run must not make it pass"
    done = run_cli("extract", *options(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "resuming, 3 of 3" in done.stderr, "what was extracted stays"
    assert "quarantined 1" in done.stderr
    assert "1" in json.loads((tmp_path / "runs/garden/cache/extract.manifest.json").read_text())["quarantined"]
    for stage in ("cluster", "train"):
        done = run_cli(stage, *options(tmp_path))
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: Image.new("L", (10, 10)).save(path), ["10", "64"]),
        (lambda path: Image.fromarray(np.full((64, 96), 7, np.uint8)).save(path), ["7", "3 classes"]),
    ],
    ids=["size", "label id"],
)
def test_a_mask_that_does_not_fit(cached, run_cli, spoil, words):
    spoil(cached / "garden" / "train" / "2.png")
    done = run_cli("cluster", *options(cached))
    assert is_one_line_error(done, "2.png", *words)


def test_seen_and_unseen_overlapping_and_a_name_that_is_not_there(cached, run_cli):
    path = cached / "garden" / "dataset.yaml"
    described = json.loads(path.read_text())
    path.write_text(json.dumps({**described, "seen": ["soil", "bloom"]}))
    assert is_one_line_error(run_cli("cluster", *options(cached)), "bloom", "dataset.yaml")
    path.write_text(json.dumps({**described, "unseen": ["blom"]}))
    assert is_one_line_error(run_cli("cluster", *options(cached)), "blom", "'bloom'")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("removed", ["'0'", "no longer lists", "cli.py extract"]),
        ("renamed", ["'0'", "no longer lists", "cli.py extract"]),
        ("added", ["'00'", "cli.py extract", "new ones only"]),
    ],
)
def test_images_that_changed_after_extract(cached, run_cli, change, words):
    """Rows of the cache would otherwise meet the labels of other images."""
    folder = cached / "garden" / "train"
    for ending in ("jpg", "png"):
        source = folder / f"0.{ending}"
        if change == "added":
            shutil.copy(source, folder / f"00.{ending}")
        else:
            source.rename(folder / f"3.{ending}" if change == "renamed" else cached / source.name)
    done = run_cli("cluster", *options(cached))
    assert is_one_line_error(done, *words)


def test_a_cache_made_by_another_teacher(cached, run_cli):
    other = cached / "other_teacher"
    shutil.copytree(ROOT / "config" / "demo_teacher", other)
    for stage in ("cluster", "extract"):
        done = run_cli(stage, *options(cached, f"teacher.model=local-dir:{other}"))
        assert is_one_line_error(done, "local-dir:config/demo_teacher")
    assert run_cli("cluster", *options(cached)).returncode == 0


@pytest.mark.parametrize("setting", ["text.templates=singel", "text.features=gone.npy"])
def test_text_features_that_were_mended_need_no_new_folder(tmp_path, run_cli, setting):
    garden(tmp_path / "garden")
    assert is_one_line_error(run_cli("extract", *options(tmp_path, setting)), setting.partition("=")[0])
    done = run_cli("extract", *options(tmp_path))
    assert done.returncode == 0, done.stderr


def test_a_data_set_that_was_moved_keeps_its_cache(cached, run_cli):
    (cached / "garden").rename(cached / "elsewhere")
    moved = f"data.root={cached}/elsewhere"
    assert "nothing to do" in run_cli("extract", *options(cached, moved)).stderr
    assert run_cli("cluster", *options(cached, moved)).returncode == 0


@pytest.mark.parametrize(
    ("command", "setting", "says"),
    [
        (["extract"], "teacher.device=cuda", "no GPUs here"),
        (["extract"], "teacher.device=gpu", "want auto, cpu, cuda"),
        (["cluster"], "cluster.device=cuda", "FAISS"),
        (["cluster", "--set", "cluster.backend=torch"], "cluster.device=cuda:1", "no GPUs here"),
    ],
)
def test_a_device_that_is_not_there(tmp_path, run_cli, monkeypatch, command, setting, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # whatever this machine has
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr("pipeline.ops.kmeans_faiss._num_gpus", lambda: 0)
    garden(tmp_path / "garden")
    if command[0] == "cluster":
        run_cli("extract", *options(tmp_path))
    done = run_cli(command[0], *options(tmp_path, setting), *command[1:])
    assert is_one_line_error(done, setting.partition("=")[0], says)


def test_numbers_below_zero(run_cli):
    for word in ("--workers", "--audit"):
        done = run_cli("extract", "--config", CONFIG, word, -1)
        assert (done.returncode, word in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["predict", "a.jpg", "--gamma", "nan"], ["--gamma", "nan", "finite"]),
        (["predict", "a.jpg", "--gamma", "-inf"], ["--gamma", "finite"]),
        (["predict", "a.jpg", "--reject", "inf"], ["--reject", "finite"]),
        (["trian"], ["trian", "train", "--help"]),
        (["train", "--wrokers", "3"], ["--wrokers", "train --help"]),
        (["extract", "--workers", "x"], ["--workers"]),
        (["extract", "--workers", "-1"], ["--workers"]),
        (["train", "--config"], ["--config"]),
        (["predict"], ["images"]),
        (["eval", "more"], ["more"]),
    ],
)
def test_the_command_line_itself(run_cli, words, says):
    """Options are a user's mistakes like any other: one line, not a page of help."""
    done = run_cli(*words)
    assert is_one_line_error(done, *says)
    assert len(done.stderr.splitlines()) == 1


def test_help_is_help(run_cli):
    assert run_cli("--help").returncode == 0
    assert run_cli("train", "--help").returncode == 0
    done = run_cli()
    assert (done.returncode, "error:" in done.stderr) == (2, False)


def test_help_has_the_commands_in_groups(run_cli):
    text = run_cli("--help").stdout
    headings = ("Stages of a run", "Use a student", "Look at a run", "Data and machine")
    order = [text.index(f" {word} ") for word in (*headings, "extract", "predict", "inspect", "prepare")]
    stages, use, look, data, extract, predict, inspect, prepare = order
    assert stages < extract < use < predict < look < inspect < data < prepare


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: a\nname: b\n", "given twice"),
        ("train: {iterations: yes}\n", "train.iterations"),
        ("train: {lr: .nan}\n", "train.lr"),
        ("name: a\0\n", "U+0000"),
        ("train: {iterations: " + "9" * 5000 + "}\n", "5,000"),
        ("train: " + "[" * 5000, "nesting"),
        ("train: &a [*a]\n", "anchor"),
    ],
)
def test_a_config_that_is_odd_yaml(tmp_path, run_cli, text, says):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert is_one_line_error(run_cli("train", "--config", path), "run.yaml", says)


@pytest.mark.parametrize("name", ["dataset.yaml", "tags.yaml"])
@pytest.mark.parametrize(
    ("text", "says"), [("a: 1\na: 2\n", "given twice"), ("a: b\0", "U+0000"), ("[" * 999, "nesting")]
)
def test_a_data_set_that_is_odd_yaml(tmp_path, run_cli, name, text, says):
    folder = garden(tmp_path / "garden")
    described = json.loads((folder / "dataset.yaml").read_text())
    (folder / "dataset.yaml").write_text(json.dumps({**described, "tags": "tags.yaml"}))
    (folder / name).write_text(text)
    assert is_one_line_error(run_cli("extract", *options(tmp_path)), name, says)


def test_audit_of_an_image_that_was_damaged_since(tmp_path, run_cli):
    """In the middle, which the stamp doesn't read: extract says there is nothing to do."""
    garden(tmp_path / "garden")
    noise = np.random.default_rng(1).integers(0, 256, (256, 384, 3), dtype=np.uint8)
    photo = tmp_path / "garden/train/0.jpg"
    for i in range(3):
        Image.fromarray(noise).save(photo.with_name(f"{i}.jpg"), "PNG")
        Image.fromarray(np.zeros((256, 384), np.uint8)).save(photo.with_name(f"{i}.png"))
    run_cli("extract", *options(tmp_path))
    for path in photo.parent.glob("*.jpg"):
        whole = bytearray(path.read_bytes())
        whole[len(whole) // 2] ^= 255
        path.write_bytes(whole)
    assert "nothing to do" in run_cli("extract", *options(tmp_path)).stderr
    done = run_cli("extract", *options(tmp_path), "--audit", 2)
    assert done.returncode == 2, done.stderr
    assert is_one_line_error(done, "audit")


def test_a_stage_before_its_time(tmp_path, run_cli):
    garden(tmp_path / "garden")
    assert is_one_line_error(run_cli("cluster", *options(tmp_path)), "extract", "cli.py extract")
    assert is_one_line_error(run_cli("train", *options(tmp_path)), "cluster", "cli.py cluster")
    assert is_one_line_error(run_cli("eval", *options(tmp_path)), "train", "cli.py train")
    assert is_one_line_error(run_cli("inspect", tmp_path / "runs" / "garden"), "runs/garden")


def test_a_truncated_shard(cached, run_cli):
    shard = next(p for p in (cached / "runs/garden/cache/data.zarr/tokens").iterdir() if p.name.startswith("c"))
    shard.write_bytes(shard.read_bytes()[:-100])
    done = run_cli("cluster", *options(cached))
    assert is_one_line_error(done, "tokens", "shard 0")
    found = run_cli("verify", *options(cached))
    assert found.returncode == 2
    assert "tokens" in found.stdout


FULL_DISK = """
import errno, os, sys
import cache.files as files
real, count = files.write_atomic, [0]
def write_atomic(path, *pieces):
    count[0] += 1
    if "tokens" in str(path) and path.name != "zarr.json":
        raise files.CacheWriteFailed(f"{path}: No space left on device. Make room; the same command resumes.")
    return real(path, *pieces)
import cache.store
cache.store.write_atomic = write_atomic
import cli
sys.argv = ["cli.py", *sys.argv[1:]]
cli.main()
"""


def test_no_room_for_a_cache(tmp_path):
    """A real small disk: the run stops with one line, and ends well on a larger one."""
    garden(tmp_path / "garden")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", disk], capture_output=True)
    settings = options(tmp_path, f"cache.path={disk}/cache")
    command = [sys.executable, ROOT / "cli.py", "extract", *settings]
    if mounted.returncode:  # no right to mount here: let the write of a shard fail as a full disk does
        command = [sys.executable, "-c", FULL_DISK, "extract", *settings]
    try:
        done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
        assert is_one_line_error(done, "No space left on device", str(disk))
        if not mounted.returncode:
            subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        command = [sys.executable, ROOT / "cli.py", "extract", *settings]
        done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    finally:
        if not mounted.returncode:
            subprocess.run(["umount", disk], check=True)


def test_no_permission(tmp_path, run_cli):
    """A file where the run folder should be can't be written into, by root neither."""
    garden(tmp_path / "garden")
    (tmp_path / "taken").write_text("")
    done = run_cli("extract", *options(tmp_path, f"cache.path={tmp_path}/taken/cache"))
    assert is_one_line_error(done, "taken")


def test_every_error_is_of_one_family():
    from cache.errors import CacheError
    from pipeline.config import ConfigError, UserError
    from pipeline.data.base import BadImage, DataError
    from pipeline.learning.checkpoint import CheckpointError
    from pipeline.models.student import StudentError, build_student
    from pipeline.models.teacher import TeacherError
    from pipeline.train import TrainError

    for error in (ConfigError, DataError, BadImage, TeacherError, StudentError, TrainError, CheckpointError):
        assert issubclass(error, UserError)
    assert not issubclass(CacheError, UserError)
    from pipeline.config import Student

    with pytest.raises(StudentError, match=r"Segfomer.*Segformer"):
        build_student(Student(arch="Segfomer", encoder_weights=None), 8)
    with pytest.raises(StudentError, match="resnet10tt"):
        build_student(Student(arch="FPN", encoder="tu-resnet10tt", encoder_weights=None), 8)
