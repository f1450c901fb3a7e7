"""A cache at any fsspec URL: the same as in a folder, bit for bit, and as safe."""

import json
import pickle
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest

import cache.lease
from cache.errors import CacheError, CacheLocked, CacheWriteFailed, CorruptShard, MissingCache
from cache.ledger import Ledger, lock, read_manifest, write_manifest
from cache.places import RemotePath, place, size_of
from cache.store import Store
from cache.verify import verify as verify_cache
from pipeline.cluster import cluster
from pipeline.extract import extract
from pipeline.train import train
from pipeline.verify import verify

MEMORY = fsspec.filesystem("memory", use_listings_cache=False)
FEW = ["data.train=8", "train.iterations=2", "train.batch=2"]


@pytest.fixture
def bucket(tmp_path):
    """A place of its own in the store that lives in this process."""
    url = f"memory://{tmp_path.name}"
    yield url
    if MEMORY.exists(f"/{tmp_path.name}"):
        MEMORY.rm(f"/{tmp_path.name}", recursive=True)


def test_places_by_hand():
    assert place("runs/demo/cache") == Path("runs/demo/cache")
    assert place("file:///a/b%20c") == place("local:///a/b c") == place(Path("/a/b c")) == Path("/a/b c")
    remote = place("s3://bucket/demo/")
    assert remote == RemotePath("s3://bucket/demo")
    assert str(remote / "ledger" / "00012.json") == "s3://bucket/demo/ledger/00012.json"
    assert ((remote / "00012.json").name, (remote / "00012.json").stem, remote.stem) == ("00012.json", "00012", "demo")
    assert pickle.loads(pickle.dumps(remote)) == remote


def test_an_object_by_hand(bucket):
    path = place(bucket) / "a" / "b.json"
    assert (size_of(path), path.exists(), path.is_file()) == (None, False, False)
    with pytest.raises(FileNotFoundError):
        path.read_bytes()
    path.put(b"12")
    path.put(np.frombuffer(b"345", np.uint8))
    assert (path.read_bytes(), size_of(path), path.is_file()) == (b"345", 3, True)
    with pytest.raises(FileExistsError):
        path.put(b"6", only_new=True)
    assert place(bucket).glob("*") == [place(bucket) / "a"]
    assert (place(bucket) / "a").glob("*.json") == [path]
    assert (place(bucket) / "a").is_dir()
    path.unlink()
    assert not path.exists()


def test_an_unknown_kind_of_place_is_one_line():
    with pytest.raises(CacheError, match=r"nowhere://x.*cache\.path") as caught:
        Store.open("nowhere://x")
    assert "\n" not in str(caught.value)


def test_whatever_a_store_raises_is_a_cache_error(bucket, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no credentials\nfound")

    monkeypatch.setattr(type(MEMORY), "pipe_file", refuse)
    with pytest.raises(CacheWriteFailed, match="can't be written: no credentials found"):
        write_manifest(f"{bucket}/m.json", {"a": 1})
    monkeypatch.setattr(type(MEMORY), "cat_file", refuse)
    with pytest.raises(CacheError, match="can't be read: no credentials found"):
        read_manifest(f"{bucket}/m.json")


def test_ledger_and_manifests(bucket):
    ledger = Ledger(bucket, "extract")
    assert ledger.entries() == {}
    ledger.record(12, {"rows": [0, 64], "fingerprint": "f", "digests": {}})
    ledger.record(3, {"rows": [0, 64], "fingerprint": "g", "digests": {}})
    assert list(ledger.entries()) == [3, 12]
    assert ledger.done("f") == {12}
    assert read_manifest(f"{bucket}/m.json") is None
    write_manifest(f"{bucket}/m.json", {"b": 1, "a": 2})
    assert read_manifest(f"{bucket}/m.json") == {"b": 1, "a": 2}


def test_a_remote_cache_is_the_local_one(tiny, bucket):
    local, remote = tiny("name=local", *FEW), tiny("name=remote", f"cache.path={bucket}/cache", *FEW)
    for config in (local, remote):
        extract(config)
        cluster(config)
        train(config)
        assert verify(config) == []
    at = lambda config, name: place(config.cache_path) / name  # noqa: E731
    for name in ("extract.manifest.json", "cluster.manifest.json"):
        assert at(local, name).read_bytes() == at(remote, name).read_bytes()
        assert at(local, name).read_bytes() == (remote.manifest_folder / name).read_bytes()
    files = {
        p.relative_to(local.cache_path / "data.zarr").as_posix()
        for p in (local.cache_path / "data.zarr").rglob("*")
        if p.is_file()
    }
    assert files == {
        p.partition("/data.zarr/")[2] for p in MEMORY.find(f"/{bucket.partition('://')[2]}/cache/data.zarr")
    }
    for name in files - {"zarr.json"}:
        assert at(local, f"data.zarr/{name}").read_bytes() == at(remote, f"data.zarr/{name}").read_bytes(), name
    students = [(c.run_path / "train" / "losses.jsonl").read_text() for c in (local, remote)]
    without_times = [
        [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in student.splitlines()]
        for student in students
    ]
    assert without_times[0] == without_times[1]
    assert not at(remote, "lock").exists(), "the lock is given back"


def test_a_remote_cache_grows_and_has_nothing_more_to_do(tiny, bucket):
    where = f"cache.path={bucket}/cache"
    extract(tiny(where, *FEW))
    cluster(tiny(where, *FEW))
    grown = tiny(where, *FEW, "data.train=10")
    extract(grown)
    assert not (grown.manifest_folder / "cluster.manifest.json").exists()
    assert not (place(grown.cache_path) / "cluster.manifest.json").exists()
    cluster(grown)
    assert verify(grown) == []
    before = MEMORY.find(bucket.partition("://")[2], detail=True)
    extract(grown)
    cluster(grown)
    assert MEMORY.find(bucket.partition("://")[2], detail=True) == before


def test_damage_is_found_there_too(bucket):
    sizes = {"N": 3, "V": 1, "C": 2, "h": 1, "w": 1, "K": 1}
    with pytest.raises(MissingCache, match="no cache here"):
        Store.open(bucket)
    store = Store.create(bucket, sizes=sizes, arrays=["cls"], samples=["a", "b", "c"], attributes={})
    digest = store.write_shard("cls", 0, np.ones((3, 1, 2), np.float16))
    Ledger(bucket, "extract").record(0, {"rows": [0, 3], "fingerprint": "f", "digests": {"cls": digest}})
    write_manifest(f"{bucket}/extract.manifest.json", {"fingerprint": "f"})
    assert verify_cache(bucket) == []
    assert store.size_bytes("cls") > 12
    file = place(bucket) / "data.zarr" / "cls" / "c.0.0.0"
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    for damage in (bytes(content), bytes(content[:-3]), b""):
        file.put(damage)
        with pytest.raises(CorruptShard, match="shard 0 of 'cls'"):
            store.read_shard("cls", 0)
        assert [finding.kind for finding in verify_cache(bucket)] == ["corrupt"]
    file.unlink()
    assert [finding.kind for finding in verify_cache(bucket)] == ["corrupt"]


def test_a_second_run_is_told_at_once(bucket):
    with lock(bucket, "extract"):
        with pytest.raises(CacheLocked, match="extract is writing to this cache, process"):
            lock(bucket, "cluster").__enter__()
        assert json.loads((place(bucket) / "lock").read_bytes())["stage"] == "extract"
    with lock(bucket, "cluster"):
        pass


def test_the_lock_ends_with_an_error(bucket):
    with pytest.raises(ZeroDivisionError), lock(bucket, "extract"):
        raise ZeroDivisionError
    assert not (place(bucket) / "lock").exists()


@pytest.mark.parametrize("age", [cache.lease.STALE_S - 5, cache.lease.STALE_S + 5])
def test_a_killed_runs_lock_is_free_after_a_while(bucket, age):
    left = {"stage": "extract", "pid": 1, "host": "h", "token": "t", "beat": time.time() - age}
    (place(bucket) / "lock").put(json.dumps(left).encode())
    if age < cache.lease.STALE_S:
        with pytest.raises(CacheLocked, match="process 1 on h"):
            lock(bucket, "cluster").__enter__()
    else:
        with lock(bucket, "cluster"):
            assert json.loads((place(bucket) / "lock").read_bytes())["stage"] == "cluster"


def test_the_heart_beats(bucket, monkeypatch):
    monkeypatch.setattr(cache.lease, "BEAT_S", 0.01)
    with lock(bucket, "extract"):
        first = json.loads((place(bucket) / "lock").read_bytes())
        until = time.time() + 10
        while (now := json.loads((place(bucket) / "lock").read_bytes())) == first and time.time() < until:
            time.sleep(0.01)
        assert now["beat"] > first["beat"]
        assert {**now, "beat": 0} == {**first, "beat": 0}


def test_a_lost_lock_is_said(bucket, monkeypatch):
    monkeypatch.setattr(cache.lease, "BEAT_S", 0.01)
    other = json.dumps({"token": "other", "beat": time.time()}).encode()
    held = lock(bucket, "extract")
    held.__enter__()
    for _ in range(30):  # a beat may come between
        (place(bucket) / "lock").put(other)
        time.sleep(0.01)
    with pytest.raises(CacheLocked, match="taken this lock over"):
        held.__exit__(None, None, None)
    assert (place(bucket) / "lock").read_bytes() == other, "another's lock isn't removed"
