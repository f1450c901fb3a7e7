"""The ledger, manifests and the lock: what a killed run leaves is never taken for done."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cache.files
from cache.errors import CacheError, CacheLocked, CacheWriteFailed
from cache.ledger import Ledger, lock, read_manifest, refuse_if_locked, write_manifest

ROOT = Path(__file__).parents[1]
ENTRY = {"rows": [0, 64], "fingerprint": "f", "digests": {"cls": "00"}, "quarantined": {}}
HOLD = textwrap.dedent("""
    import sys, time
    from cache.ledger import lock
    with lock(sys.argv[1], "extract"):
        print("held", flush=True)
        time.sleep(60)
""")


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock on tmp_path."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_records_by_hand(tmp_path):
    ledger = Ledger(tmp_path, "extract")
    assert ledger.done("f") == set()
    assert ledger.entry(12) is None
    ledger.record(12, ENTRY)
    ledger.record(3, ENTRY | {"fingerprint": "g"})
    assert (tmp_path / "ledger" / "extract" / "00012.json").is_file()
    assert ledger.entry(12) == ENTRY | {"shard": 12}
    assert (ledger.done("f"), ledger.done("g"), list(ledger.entries())) == ({12}, {3}, [3, 12])
    ledger.record(12, ENTRY | {"fingerprint": "g"})
    assert (ledger.done("f"), ledger.done("g")) == (set(), {3, 12})
    assert Ledger(tmp_path, "cluster").done("g") == set()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=15, deadline=None)
@given(shard=st.integers(0, 10**6), extra=st.dictionaries(st.text(max_size=5), json_values, max_size=4))
def test_any_record_comes_back(shard, extra, tmp_path_factory):
    ledger = Ledger(tmp_path_factory.getbasetemp(), "any")
    extra = {f"more {key}": value for key, value in extra.items()}
    ledger.record(shard, ENTRY | extra)
    assert ledger.entry(shard) == ENTRY | extra | {"shard": shard}


@pytest.mark.parametrize(
    "odd",
    [
        {"rows": 64},
        {"rows": [0]},
        {"rows": [0, 10**12]},
        {"rows": [0, 65]},
        {"rows": [64, 0]},
        {"rows": [False, 64]},
        {"fingerprint": None},
        {"digests": ["cls"]},
        {"digests": {"cls": 0}},
        {"quarantined": 3},
        {"stamps": "none"},
        {"stamps": [1]},
        {"stamps": ["one"]},
        {"digests": {"text": "00"}},
        {"stats": {"objects": "x"}},
        {"seconds": "long"},
        {"shard": True},
    ],
)
def test_a_malformed_record_is_none(tmp_path, odd):
    """Whatever reads a record may rely on its shape; a shard without one is made again."""
    ledger = Ledger(tmp_path, "extract")
    ledger.record(1, ENTRY)
    ledger.path(1).write_text(json.dumps({**ENTRY, "shard": 1, **odd}))
    assert ledger.entry(1) is None
    assert ledger.entries() == {}


@pytest.mark.parametrize("content", [b"", b'{"shard": 1, "finger', b"[1]", b"\xff\xfe", b"null", b'{"shard": 2}'])
def test_a_torn_or_foreign_record_is_none(tmp_path, content):
    ledger = Ledger(tmp_path, "extract")
    ledger.record(0, ENTRY)
    ledger.record(1, ENTRY)
    ledger.path(1).write_bytes(content)
    (ledger.folder / "00001.json.77.partial").write_bytes(b"{")
    (ledger.folder / "notes.json").write_text("{}")
    assert ledger.entry(1) is None
    assert ledger.done("f") == {0}
    ledger.record(1, ENTRY)
    assert ledger.done("f") == {0, 1}


def test_a_record_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path, "extract")
    ledger.record(0, ENTRY)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache.files.os, "fsync", full)
    with pytest.raises(CacheWriteFailed, match=r"00000\.json.*No space left.*Free space") as caught:
        ledger.record(0, ENTRY | {"fingerprint": "g"})
    assert isinstance(caught.value, OSError)
    assert ledger.done("f") == {0}
    assert os.listdir(ledger.folder) == ["00000.json"]


def test_permission_denied(tmp_path, monkeypatch):
    def deny(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", deny)
    with pytest.raises(CacheWriteFailed, match=r"Permission denied.*writable"):
        Ledger(tmp_path, "extract").record(0, ENTRY)


def test_a_file_in_place_of_the_folder(tmp_path):
    path = tmp_path / "cache"
    path.write_text("")
    with pytest.raises(CacheWriteFailed, match="can't be written"):
        Ledger(path, "extract").record(0, ENTRY)
    with pytest.raises(CacheWriteFailed, match="can't be written"):
        lock(path, "extract").__enter__()


def test_equal_manifests_are_equal_bytes(tmp_path):
    one, two = tmp_path / "a.manifest.json", tmp_path / "new" / "b.manifest.json"
    write_manifest(one, {"stage": "extract", "num": 2, "list": [1]})
    write_manifest(two, {"list": [1], "num": 2, "stage": "extract"})
    assert one.read_bytes() == two.read_bytes()
    assert read_manifest(one) == {"stage": "extract", "num": 2, "list": [1]}


@pytest.mark.parametrize("key", ["time", "host", "pid"])
def test_a_manifest_holds_no_time_and_no_host(tmp_path, key):
    with pytest.raises(ValueError, match=key):
        write_manifest(tmp_path / "m.json", {key: 1})


def test_manifests_that_are_none(tmp_path, monkeypatch):
    path = tmp_path / "m.json"
    assert read_manifest(path) is None
    for content in ("", "{", "[]"):
        path.write_text(content)
        assert read_manifest(path) is None
    assert read_manifest(path / "below_a_file") is None

    def deny(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", deny)
    with pytest.raises(CacheError, match="Permission denied"):
        read_manifest(path)


def test_a_second_process_is_told_at_once(tmp_path, holder):
    with pytest.raises(CacheLocked, match=f"extract is writing.*process {holder.pid} on ") as caught:
        lock(tmp_path, "cluster").__enter__()
    assert "\n" not in str(caught.value)
    assert json.loads((tmp_path / "lock").read_text())["stage"] == "extract"


def test_a_look_at_the_lock(tmp_path, holder):
    with pytest.raises(CacheLocked, match=f"extract is writing.*process {holder.pid} on "):
        refuse_if_locked(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    before = (tmp_path / "lock").read_bytes()
    refuse_if_locked(tmp_path)
    refuse_if_locked(tmp_path / "no cache")
    assert (tmp_path / "lock").read_bytes() == before
    assert os.listdir(tmp_path) == ["lock"]
    with lock(tmp_path, "cluster"), pytest.raises(CacheLocked):
        refuse_if_locked(tmp_path)


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert json.loads((tmp_path / "lock").read_text())["pid"] == holder.pid
    with lock(tmp_path, "cluster"):
        holder_now = json.loads((tmp_path / "lock").read_text())
        assert (holder_now["pid"], holder_now["stage"]) == (os.getpid(), "cluster")
        assert set(holder_now) == {"pid", "host", "stage", "since"}


def test_this_process_holds_it(tmp_path):
    with lock(tmp_path, "extract"):
        with pytest.raises(CacheLocked, match="this process already holds the lock, for extract"):
            lock(tmp_path, "cluster").__enter__()
        with pytest.raises(CacheLocked):  # and that attempt didn't release it
            lock(tmp_path, "cluster").__enter__()
    with lock(tmp_path, "cluster"):
        pass


def test_the_lock_ends_with_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), lock(tmp_path, "extract"):
        raise ZeroDivisionError
    with lock(tmp_path, "extract"):
        pass


def test_a_lock_file_that_says_nothing(tmp_path, holder):
    (tmp_path / "lock").write_text("garbage")
    with pytest.raises(CacheLocked, match="another process"):
        lock(tmp_path, "cluster").__enter__()


def test_the_lock_clears_what_killed_writers_left(tmp_path):
    shard, record = "data.zarr/cls/c.0.12.partial", "ledger/extract/00001.json.9.partial"
    left = [tmp_path / shard, tmp_path / record]
    for path in left:
        path.parent.mkdir(parents=True)
        path.write_bytes(b"half")
    hosts = [tmp_path / f"{path}.host.example.12.partial" for path in ("data.zarr/zarr.json", "data.zarr/cls/c.1")]
    hosts.append(tmp_path / "extract.manifest.json.host.12.partial")
    for path in hosts:
        path.write_bytes(b"half")
    kept = tmp_path / "data.zarr" / "cls" / "c.0"
    kept.write_bytes(b"whole")
    with lock(tmp_path, "extract"):
        assert not list(tmp_path.rglob("*.partial"))
        assert kept.read_bytes() == b"whole"


def test_the_lock_removes_nothing_else(tmp_path):
    """Only our names, only files, only in our own folders; what a link leads to stays, too."""
    with lock(tmp_path / "cache", "extract"):
        pass
    data = tmp_path / "cache" / "data.zarr"
    mine = [
        data / "cls" / "photo.partial",
        data / "cls" / "deep" / "c.0.host.12.partial",
        data / "cls" / "c.0.host.12.partial" / "inside",
        tmp_path / "cache" / "ledger" / "extract" / "thesis.host.12.partial",
        tmp_path / "elsewhere" / "c.0.host.12.partial",
    ]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"mine")
    (data / "cls" / "c.1.host.12.partial").symlink_to(mine[-1])
    with lock(tmp_path / "cache", "extract"):
        pass
    assert [path.read_bytes() for path in mine] == [b"mine"] * len(mine)


@pytest.mark.parametrize(
    "name", ["thesis.partial", "notes/a.partial", "lock", "data.zarr/mine.txt", "data.zarr", "ledger.txt"]
)
def test_a_folder_of_other_things_is_refused_untouched(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    before = [(path, path.stat().st_mtime_ns) for path in sorted(tmp_path.rglob("*"))]
    for refused in (lambda: lock(tmp_path, "extract").__enter__(), lambda: refuse_if_locked(tmp_path)):
        with pytest.raises(CacheError, match=r"is no cache, but holds .*Nothing was changed.*cache\.path") as caught:
            refused()
        assert "\n" not in str(caught.value)
    assert [(path, path.stat().st_mtime_ns) for path in sorted(tmp_path.rglob("*"))] == before
    assert (tmp_path / name).read_text() == "mine"


def test_what_a_killed_first_run_leaves_is_no_other_folder(tmp_path):
    with lock(tmp_path, "extract"):
        pass
    Ledger(tmp_path, "extract").record(0, ENTRY)
    (tmp_path / "data.zarr" / "sample").mkdir(parents=True)
    (tmp_path / "data.zarr" / "zarr.json.host.12.partial").write_bytes(b"half")
    refuse_if_locked(tmp_path)
    with lock(tmp_path, "extract"):
        pass


@pytest.mark.parametrize("kind", ["symlink", "hard link", "pipe", "dangling"])
def test_a_lock_that_leads_elsewhere_is_refused(tmp_path, kind):
    mine, path = tmp_path / "mine.txt", tmp_path / "cache" / "lock"
    mine.write_text("mine")
    path.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "hard link":
        with lock(path.parent, "extract"):
            pass
        mine.write_bytes(path.read_bytes())
        path.unlink()
        path.hardlink_to(mine)
    else:
        path.symlink_to(mine if kind == "symlink" else tmp_path / "new.txt")
    before = mine.read_bytes()
    with pytest.raises(CacheError, match="lock") as caught:
        lock(path.parent, "extract").__enter__()
    assert "\n" not in str(caught.value)
    assert mine.read_bytes() == before
    assert not (tmp_path / "new.txt").exists()


def test_locking_a_read_only_place(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("cache.ledger.os.open", refuse)
    with pytest.raises(CacheWriteFailed, match="Read-only"):
        lock(tmp_path, "extract").__enter__()
