"""Every file is written anew, whole, by the umask; links stay what they were; no room is one line with the path."""

import errno
import json
import multiprocessing
import os
import platform
import resource
import shutil
import stat
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import cache.files
from bench.small_run import content_digest, small_arguments, small_config
from cache.errors import CacheWriteFailed
from cache.files import new_log, partial_of, whole_file, write_atomic, write_text
from cache.ledger import Ledger, write_manifest
from evidence.pages import write_page
from pipeline import predict, prompts
from pipeline.config import load
from pipeline.learning.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint, save_student
from pipeline.learning.journal import Curve
from pipeline.looking.confusion import confusion_picture
from pipeline.running import console
from pipeline.teaching.takeover import take_over
from tests.conftest import is_one_line_error

FEW = ("data.train=6", "views.num=1", "eval.pictures=2", "report.images=2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run from extraction to predictions, made with a umask of 027; its folder."""
    from pipeline.cluster import cluster
    from pipeline.evaluate import evaluate
    from pipeline.extract import extract
    from pipeline.report import draw_figures, report
    from pipeline.train import train
    from tests.conftest import forget_accelerator

    folder = tmp_path_factory.mktemp("finished")
    config, before = (small_config(folder, *FEW, "train.iterations=2", "train.checkpoint_every=1"), os.umask(0o027))
    forget_accelerator()
    try:
        console.log_to(folder / "runs" / "log.txt")
        for stage in (extract, cluster, train, evaluate, report, draw_figures):
            stage(config)
        Image.new("RGB", (20, 10), "red").save(folder / "photo.png")
        photo = predict.Picture(folder / "photo.png", Path("photo"))
        wanted = predict.Wanted(probabilities=True)
        assert list(predict.predict(config.run_path, [photo], config.run_path / "predictions", wanted))
    finally:
        os.umask(before)
        console._log.clear()
    return folder


def test_every_file_has_the_umasks_mode(finished):
    files = [path for path in (finished / "runs").rglob("*") if path.is_file()]
    assert {"student.safetensors", "state.pt", "lock", "metrics.json", "log.txt"} <= {path.name for path in files}
    modes = {path: oct(stat.S_IMODE(path.stat().st_mode)) for path in files}
    assert {mode for path, mode in modes.items() if path.name != ".training"} == {"0o640"}, modes
    assert not list(finished.rglob("*.partial"))


def a_checkpoint():
    return Checkpoint(load("config/demo.yaml"), "f", ("a", "b"), ("b",), torch.eye(2))


def a_student():
    torch.manual_seed(0)
    return torch.nn.Linear(300, 300)


def save_state(path):
    state = {"moments": torch.zeros(300, 300)}
    save_checkpoint(path.parents[1], 7, a_checkpoint(), torch.nn.Linear(3, 3), state, keep=1)


def fill_probabilities(path):
    with whole_file(path) as file:
        predict.mapped_array(file, np.float16, (3, 400, 400))[:] = 1


def write_array(path):
    with whole_file(path) as file:
        np.save(file, np.zeros(100_000))


def keep_curve(path):
    curve = Curve(path.parent, 0)
    for iteration in range(3000):
        curve.write(iteration, {"total": 1.0})
    curve.close()


def keep_log(path):
    console.log_to(path)
    try:
        for _ in range(3000):
            console.say(40 * "x")
    finally:
        console._log.clear()


def noise(side=300):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8))


def drawn(path):
    figure = Figure((9, 9))
    figure.add_subplot().imshow(np.asarray(noise()))
    with whole_file(path) as file:
        figure.savefig(file, format="png")


WRITERS = {  # name of the file: what writes some 100 kB to it
    "any.bin": lambda path: write_atomic(path, bytes(100_000)),
    "any.txt": lambda path: write_text(path, 100_000 * "x"),
    "student.safetensors": lambda path: save_student(path, a_student(), a_checkpoint()),
    "checkpoint-000007/state.pt": save_state,
    "a.probabilities.npy": fill_probabilities,
    "confusion.npy": write_array,
    "losses.jsonl": keep_curve,
    "log.txt": keep_log,
    "drawn.png": drawn,
    "cluster.manifest.json": lambda path: write_manifest(path, {"whole": {str(i): "0" for i in range(9999)}}),
    "confusion.png": lambda path: confusion_picture(np.eye(40), [40 * "x"] * 40, (), path, 900 * "title "),
    "page.md": lambda path: write_page(path, ["x" * 100_000], []),
}


@contextmanager
def no_larger_than(size):
    """As after `ulimit -f`: a longer file is EFBIG, also for room that is reserved."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", WRITERS)
def test_no_room_is_one_line_with_the_path(tmp_path, name, capsys):
    path = tmp_path / "out" / name
    with no_larger_than(20_000), pytest.raises(CacheWriteFailed, match=r"File too large.*ulimit -f") as caught:
        WRITERS[name](path)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)
    assert not list(tmp_path.rglob("*.partial"))
    WRITERS[name](path)  # there is room again
    assert path.stat().st_size > 20_000


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("kind", ["symlink", "hard link"])
def test_what_a_link_leads_to_stays(tmp_path, name, kind, capsys):
    path, mine = tmp_path / "out" / name, tmp_path / "mine.txt"
    mine.write_text("mine")
    path.parent.mkdir(parents=True)
    partial = partial_of(path)
    for place in (path, partial):
        place.symlink_to(mine) if kind == "symlink" else place.hardlink_to(mine)
    WRITERS[name](path)
    assert mine.read_text() == "mine"
    assert not path.is_symlink()
    assert path.stat().st_ino != mine.stat().st_ino
    assert not os.path.lexists(partial)


def test_a_link_in_the_place_of_a_checkpoint(tmp_path):
    """Folders are made anew as well."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    for name in ("checkpoint-000007", ".checkpoint-000007.partial", ".checkpoint-000003.partial"):
        (tmp_path / name).symlink_to(mine)
    save_state(tmp_path / "checkpoint-000007" / "state.pt")
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]
    assert not (tmp_path / "checkpoint-000007").is_symlink()
    assert latest_checkpoint(tmp_path, "f") == tmp_path / "checkpoint-000007"
    assert not list(tmp_path.glob(".*"))


def test_links_in_the_place_of_an_evaluation(finished, tmp_path, run_cli):
    shutil.copytree(finished / "runs", tmp_path / "runs")
    config = small_config(tmp_path, *FEW)
    folder, mine = config.run_path / "eval", tmp_path / "mine.txt"
    mine.write_text("mine")
    names = ["confusion.npy", "per_class.csv", "confusion.png", "metrics.json", "pictures"]
    for name in names:
        cache.files.remove(folder / name)
        (folder / name).symlink_to(mine)
    arguments = small_arguments(tmp_path, *FEW, "train.iterations=2", "train.checkpoint_every=1")
    done = run_cli("eval", *arguments)
    assert done.returncode == 0, done.stderr
    assert mine.read_text() == "mine"
    assert not any((folder / name).is_symlink() for name in names)


def fill(path):
    """Takes all room that is left on a disk."""
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**20))


@pytest.mark.parametrize("name", ["eval", "report", "predict", "train"])
def test_no_room_for_a_command_is_one_line(finished, tmp_path, run_cli, name):
    """A full disk as the kernel has it; where nothing may be mounted, a limit on the size of files."""
    from tests.test_interrupted_writes import small_disk

    arguments = small_arguments(tmp_path / "disk", *FEW, "train.iterations=2", "train.checkpoint_every=1")
    with small_disk(tmp_path / "disk", 2**28) as resize:
        shutil.copytree(finished / "runs", tmp_path / "disk" / "runs")
        run = tmp_path / "disk" / "runs" / "small"
        if name == "predict":
            arguments = [finished / "photo.png", "--run", run, "--out", run / "new", "--probabilities"]
        elif name == "train":
            shutil.rmtree(run / "train")
        elif name == "eval":
            (run / "eval" / "metrics.json").unlink()
        if resize:
            fill(tmp_path / "disk" / "fill")
            done = run_cli(name, *arguments)
            assert is_one_line_error(done, "No space left on device", str(run), "Free space")
            (tmp_path / "disk" / "fill").unlink()
        else:
            with no_larger_than(1000):
                done = run_cli(name, *arguments)
            assert is_one_line_error(done, "File too large", str(run))
        done = run_cli(name, *arguments)
        assert done.returncode == 0, done.stderr


def test_predictions_by_strips_are_the_same_file(tmp_path):
    """With its room reserved, an .npy is what numpy writes."""
    values = np.random.default_rng(0).random((3, 5, 7)).astype(np.float16)
    with whole_file(tmp_path / "a.npy") as file:
        kept = predict.mapped_array(file, np.float16, values.shape)
        for row in range(5):
            kept[:, row] = values[:, row]
        kept.flush()
    np.save(tmp_path / "b.npy", values)
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


def test_a_file_system_without_fsync_of_folders(tmp_path, monkeypatch, capsys):
    fsync = os.fsync

    def refuse(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(cache.files, "_unsynced", set())
    for name in ("a", "b"):
        write_text(tmp_path / name, "content")
    cache.files.remove(tmp_path / "b")
    save_state(tmp_path / "checkpoint-000007" / "state.pt")
    assert (tmp_path / "a").read_text() == "content"
    said = capsys.readouterr().err
    assert said.count("can't force a folder to disk") == 1
    assert str(tmp_path) in said

    def broken(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(CacheWriteFailed, match="Input/output error"):
        write_text(tmp_path / "c", "content")


def test_a_folder_that_is_removed_meanwhile(tmp_path):
    def write():
        with whole_file(tmp_path / "out" / "a") as file:
            shutil.rmtree(tmp_path / "out")
            file.write(b"content")

    with pytest.raises(CacheWriteFailed, match=r"out/a.*folder was removed"):
        write()


@pytest.mark.parametrize("where", ["pipe", "/dev/null", "/dev/stdout"])
def test_a_device_stays_one(tmp_path, where):
    path = tmp_path / "pipe" if where == "pipe" else Path(where)
    if where == "pipe":
        os.mkfifo(path)
    before = path.lstat()
    with pytest.raises(CacheWriteFailed, match=r"is a device or a pipe.*Name a file"):
        write_text(path, "content")
    assert (path.lstat().st_ino, path.lstat().st_mode) == (before.st_ino, before.st_mode)
    if where != "pipe":
        new_log(path).close()  # a log may go there
        assert (path.lstat().st_ino, path.lstat().st_mode) == (before.st_ino, before.st_mode)


def test_a_name_as_long_as_names_may_be(tmp_path):
    for name in (255 * "a", 84 * "あ" + "abc"):
        write_text(tmp_path / name, "content")
        assert (tmp_path / name).read_text() == "content"
    assert len(list(tmp_path.iterdir())) == 2


def dead_pid():
    """The number of a process that has ended."""
    process = multiprocessing.get_context("forkserver").Process(target=os.getpid)
    process.start()
    process.join()
    return process.pid


def test_what_killed_writers_left_is_cleared_and_nothing_else(tmp_path):
    host, pid = platform.node(), dead_pid()
    dead = [tmp_path / f"{name}.{host}.{pid}.partial" for name in ("a.png", "b.c.txt")]
    alive = [
        tmp_path / f"a.png.{host}.{os.getppid()}.partial",
        tmp_path / f"a.png.other-{host}.{pid}.partial",
        tmp_path / f".{host}.{pid}.partial",
        tmp_path / "thesis.partial",
        tmp_path / "deep" / f"a.png.{host}.{pid}.partial",
        tmp_path / f"folder.{host}.{pid}.partial" / "inside",
    ]
    for path in [*dead, *alive]:
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    (tmp_path / f"link.{host}.{pid}.partial").symlink_to(alive[0])
    write_text(tmp_path / "new.txt", "content")
    assert not any(path.exists() for path in dead)
    assert [path.read_text() for path in alive] == ["half"] * len(alive)
    assert (tmp_path / f"link.{host}.{pid}.partial").is_symlink()


def test_a_killed_take_over_is_cleared_by_the_next(finished, tmp_path):
    like = small_config(finished, *FEW)
    config = small_config(tmp_path, *FEW)
    folder, host, pid = config.cache_path.parent, platform.node(), dead_pid()
    half = folder / f"cache.{host}.{pid}.partial"
    kept = [folder / f"cache.{host}.{os.getppid()}.partial", folder / f"other.{host}.{pid}.partial"]
    for path in (half, *kept):
        (path / "data.zarr").mkdir(parents=True)
    assert take_over(like.cache_path, config)
    assert not half.exists()
    assert all(path.is_dir() for path in kept)
    assert Ledger(config.cache_path, "extract").entries() == Ledger(like.cache_path, "extract").entries()


def test_a_folder_that_is_no_cache_is_left_alone(tmp_path, run_cli):
    """The worst there was: extract ended well and had removed every *.partial below, folders too."""
    mine = tmp_path / "photos"
    for name in ("a.partial", "deep/b.partial/c.txt", "notes.txt"):
        (mine / name).parent.mkdir(parents=True, exist_ok=True)
        (mine / name).write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in mine.rglob("*")} | {mine: mine.stat().st_mtime_ns}
    arguments = small_arguments(tmp_path, *FEW, f"cache.path={mine}")
    done = run_cli("extract", *arguments)
    assert is_one_line_error(done, str(mine), "is no cache", "Nothing was changed", "cache.path")
    assert {path: path.stat().st_mtime_ns for path in mine.rglob("*")} | {mine: mine.stat().st_mtime_ns} == before
    (tmp_path / "empty").mkdir()
    arguments = small_arguments(tmp_path, *FEW, f"cache.path={tmp_path / 'empty'}")
    assert run_cli("extract", *arguments).returncode == 0
    assert content_digest(tmp_path / "empty")


def test_a_ranking_of_prompts_has_no_room(tmp_path):
    config = small_config(tmp_path)
    with no_larger_than(50), pytest.raises(CacheWriteFailed, match=r"config\.yaml"):
        prompts._write(config, [("a photo of a {}", 1.0)], {})


def test_a_curve_with_odd_lines_is_cut_back(tmp_path):
    lines = [{"iteration": 1, "total": 2.0}, [1], {"iteration": "2"}, 7, {"iteration": 3}]
    (tmp_path / "losses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Curve(tmp_path, 2).close()
    assert (tmp_path / "losses.jsonl").read_text() == '{"iteration": 1, "total": 2.0}\n'
