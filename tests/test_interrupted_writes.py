"""Disk full, no permission, two runs at once: one clear line, nothing lost, and the same command resumes."""

import ctypes
import errno
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

import cache.files
import pipeline.cluster
import pipeline.extract
from bench.small_run import content_digest, small_arguments, small_config
from pipeline.data.demo import DemoDataSet
from tests.conftest import ROOT, is_one_line_error
from tests.test_cache_ledger import HOLD

SETTINGS = ("data.train=136", "views.num=1")  # shards of 64, 64 and 8
# <linux/capability.h>: what lets root write where no permission is
VERSION_3, OVERRIDE, READ_SEARCH = 0x20080522, 1 << 1, 1 << 2


@contextmanager
def permissions_that_count():
    """Permissions bind root too, in this thread and those it starts: its right to ignore them is put aside."""
    libc, header = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(VERSION_3, 0)
    rights = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 bits
    assert libc.capget(header, rights) == 0
    effective = rights[0]
    rights[0] = effective & ~(OVERRIDE | READ_SEARCH)
    assert libc.capset(header, rights) == 0, os.strerror(ctypes.get_errno())
    try:
        yield
    finally:
        rights[0] = effective
        assert libc.capset(header, rights) == 0


@contextmanager
def read_only(folder):
    folder.chmod(0o555)
    try:
        yield
    finally:
        folder.chmod(0o755)


@contextmanager
def small_disk(folder, size):
    """A tmpfs of so many bytes; yields a function that resizes it. None where mounting isn't allowed."""
    folder.mkdir()

    def mount(*options):
        return subprocess.run(["mount", *map(str, options)], capture_output=True).returncode == 0

    if not mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder):
        yield None
        return
    try:
        yield lambda size: mount("-o", f"remount,size={size}", folder)
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: the digests of its cache after each stage, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    config, digests = small_config(folder, *SETTINGS), {}
    os.chdir(ROOT)
    for name, stage in (("extract", pipeline.extract.extract), ("cluster", pipeline.cluster.cluster)):
        stage(config)
        digests[name] = content_digest(config.cache_path)
    return folder, digests


def size_of(*folders):
    """Bytes that these take on a tmpfs, in pages of 4096, folders left out."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in files)


def test_a_disk_that_fills_in_the_middle(whole, tmp_path, run_cli, monkeypatch):
    """Room for two shards of three, then for all of extract but not for cluster, then for all."""
    folder, digests = whole
    made = small_config(folder, *SETTINGS).cache_path / "data.zarr"
    needed = size_of(*(made / name for name in ("view", "cls", "tokens", "status", "text", "sample")))
    disk = tmp_path / "disk"
    arguments = small_arguments(tmp_path, *SETTINGS, f"cache.path={disk}/cache")
    with small_disk(disk, int(0.9 * needed)) as resize:
        if resize is None:
            resize = _pretended_disk(monkeypatch, disk, int(0.9 * needed))
        done = run_cli("extract", *arguments)
        assert is_one_line_error(done, "No space left on device", str(disk), "Free space", "same command")
        resize(needed + 150_000)  # the ledger, zarr's own files and one file beside its place
        done = run_cli("extract", *arguments)
        assert done.returncode == 0, done.stderr
        assert "resuming, 128 of 136" in done.stderr or "resuming, 64 of 136" in done.stderr
        assert content_digest(disk / "cache") == digests["extract"]
        done = run_cli("cluster", *arguments)
        assert is_one_line_error(done, "No space left on device", str(disk))
        resize(1 << 28)
        done = run_cli("cluster", *arguments)
        assert done.returncode == 0, done.stderr
        assert content_digest(disk / "cache") == digests["cluster"]


def test_a_read_only_folder(tmp_path, run_cli):
    place = tmp_path / "place"
    place.mkdir()
    arguments = small_arguments(tmp_path, *SETTINGS, f"cache.path={place}/cache")
    with permissions_that_count(), read_only(place):
        done = run_cli("extract", *arguments)
        assert is_one_line_error(done, str(place), "Permission denied", "writable")
        assert list(place.iterdir()) == []
    (place / "cache").mkdir()
    with permissions_that_count(), read_only(place / "cache"):
        done = run_cli("extract", *arguments)
        assert is_one_line_error(done, str(place), "Permission denied", "writable")
        assert list((place / "cache").iterdir()) == []


@pytest.mark.parametrize("lost", ["data.zarr/tokens", "ledger/extract"])
def test_permission_lost_in_the_middle(whole, tmp_path, run_cli, monkeypatch, lost):
    arguments, config = small_arguments(tmp_path, *SETTINGS), small_config(tmp_path, *SETTINGS)
    original = pipeline.extract.extract_shard
    folder = config.cache_path / lost

    def extract_shard(config, identity, shard, **options):
        if shard == 1:
            folder.chmod(0o555)
        return original(config, identity, shard, **options)

    with monkeypatch.context() as patch, permissions_that_count():
        patch.setattr(pipeline.extract, "extract_shard", extract_shard)
        done = run_cli("extract", *arguments)
    assert is_one_line_error(done, lost, "Permission denied", "writable", "same command")
    folder.chmod(0o755)
    done = run_cli("extract", *arguments)
    assert done.returncode == 0, done.stderr
    assert "resuming, 64 of 136" in done.stderr
    assert content_digest(config.cache_path) == whole[1]["extract"]


def test_permission_to_read_lost(whole, tmp_path, run_cli):
    """What can't be read may be sound: no word of damage, and nothing is made again."""
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    config = small_config(tmp_path, *SETTINGS)
    (config.cache_path / "cluster.manifest.json").unlink()
    shutil.rmtree(config.cache_path / "ledger" / "cluster")
    folder = config.cache_path / "data.zarr" / "tokens"
    folder.chmod(0)
    with permissions_that_count():
        done = run_cli("cluster", *small_arguments(tmp_path, *SETTINGS))
    folder.chmod(0o755)
    assert is_one_line_error(done, str(folder), "Permission denied", "mend permissions")
    done = run_cli("cluster", *small_arguments(tmp_path, *SETTINGS))
    assert done.returncode == 0, done.stderr
    assert content_digest(config.cache_path) == whole[1]["cluster"]


def snapshot(folder):
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("stage", ["extract", "cluster"])
def test_a_second_run_is_told_at_once_and_changes_nothing(whole, tmp_path, run_cli, monkeypatch, stage):
    """And when the first is killed, its lock means nothing any more."""
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    config, arguments = small_config(tmp_path, *SETTINGS), small_arguments(tmp_path, *SETTINGS)
    (config.cache_path / f"{stage}.manifest.json").unlink()
    (config.cache_path / "ledger" / stage / "00001.json").unlink()
    half = config.cache_path / "data.zarr" / "cls" / "c.1.0.0.77.partial"  # the first run is writing this
    half.write_bytes(b"half")
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(config.cache_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout.readline() == "held\n"
        before = snapshot(tmp_path)
        with monkeypatch.context() as patch:  # at once: before it looks at the images
            patch.setattr(DemoDataSet, "identity", lambda *_: pytest.fail("looked at the data first"))
            done = run_cli(stage, *arguments)
        assert is_one_line_error(done, "extract is writing to this cache", f"process {first.pid}", "Wait for it")
        assert snapshot(tmp_path) == before
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
        first.stdout.close()
    assert str(first.pid) in (config.cache_path / "lock").read_text(), "the killed run's lock is still there"
    done = run_cli(stage, *arguments)
    assert done.returncode == 0, done.stderr
    assert "resuming, 72 of 136" in done.stderr
    assert not half.exists()
    assert content_digest(config.cache_path) == whole[1]["cluster"]


def _pretended_disk(monkeypatch, disk, size):
    """Where nothing may be mounted: forcing a file to disk fails once there are more than `size` bytes."""
    limit, fsync = [size], os.fsync

    def full(descriptor):
        if size_of(disk) > limit[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(cache.files.os, "fsync", full)
    return lambda size: limit.__setitem__(0, size)
