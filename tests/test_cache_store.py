"""The store: what is written comes back, and nothing that changed on the way is taken for data."""

import errno
import json
import multiprocessing
import os
import pickle
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import cache.files
import cache.store
import cache.store as store_module
from cache.errors import CacheError, CacheWriteFailed, CorruptShard, MissingCache, StaleCache
from cache.schema import ARRAYS, SAMPLE, SHARD, ArraySpec
from cache.shards import block_digest
from cache.store import Store

NUM = 70  # two shards: 64 rows and 6
SIZES = {"N": NUM, "V": 2, "C": 3, "h": 2, "w": 2, "K": 4}
IDS = [f"bild_ä{row}" for row in range(NUM)]
NAMES = ["view", "cls", "tokens", "status", "text"]
ATTRIBUTES = {"teacher": {"name": "tiny", "image_size": 64}, "views": [1, 2]}


def make(path, **changes):
    wanted = {"sizes": SIZES, "arrays": NAMES, "samples": IDS, "attributes": ATTRIBUTES} | changes
    return Store.create(path, **wanted)


def block_of(name, rows, seed=0):
    shape = (rows, *ARRAYS[name].shape(SIZES)[1:])
    values = np.random.default_rng(seed).integers(0, 50, shape)
    return values.astype(ARRAYS[name].dtype)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two caches to copy from: one without data, one with both shards of three arrays."""
    empty, full = tmp_path_factory.mktemp("empty"), tmp_path_factory.mktemp("full")
    make(empty)
    store = make(full)
    for name in ("view", "cls", "status"):
        store.write_shard(name, 0, block_of(name, 64))
        store.write_shard(name, 1, block_of(name, 6, seed=1))
    return empty, full


@pytest.fixture
def store(made, tmp_path):
    return Store.open(shutil.copytree(made[0], tmp_path / "cache"))


@pytest.fixture
def filled(made, tmp_path):
    return Store.open(shutil.copytree(made[1], tmp_path / "cache"))


def shard_file(store, name, shard):
    return store.data / name / ".".join(["c", str(shard)] + ["0"] * (len(ARRAYS[name].axes) - 1))


def test_shapes_by_hand():
    assert ARRAYS["view"].shape({"N": 5, "V": 2}) == (5, 2, 4)
    assert ARRAYS["tokens"].shape(SIZES) == (70, 2, 2, 2, 3)
    with pytest.raises(ValueError, match="K_c"):
        ARRAYS["centroids"].shape(SIZES)


def test_rows_and_shards_by_hand(store):
    # 70 = 64 + 6
    assert (store.num_samples, store.num_shards) == (70, 2)
    assert (store.rows(0), store.rows(1)) == (range(0, 64), range(64, 70))
    for shard in (-1, 2):
        with pytest.raises(IndexError):
            store.rows(shard)


def test_shards_come_back(filled):
    assert np.array_equal(filled.read_shard("cls", 0), block_of("cls", 64))
    assert np.array_equal(filled.read_shard("cls", 1), block_of("cls", 6, seed=1))
    assert filled.read_shard("cls", 1).dtype == np.float16


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_rows_in_any_order(data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "rows"
    store = make(path)
    whole = np.concatenate([block_of("cls", 64), block_of("cls", 6, seed=1)])
    if not shard_file(store, "cls", 1).exists():
        store.write_shard("cls", 0, whole[:64])
        store.write_shard("cls", 1, whole[64:])
    rows = data.draw(st.lists(st.integers(0, NUM - 1), max_size=8))
    assert np.array_equal(store.read_rows("cls", rows), whole[rows])


@settings(max_examples=15, deadline=None)
@given(bits=st.lists(st.integers(0, 2**16 - 1), min_size=6, max_size=6), num=st.integers(1, 66))
def test_any_bits_come_back(bits, num, tmp_path_factory):
    """All float16 patterns, NaN payloads and both zeros too, at any length of the last shard."""
    path = tmp_path_factory.getbasetemp() / f"bits{num}"
    store = make(path, sizes=SIZES | {"N": num}, samples=IDS[:num], arrays=["cls"])
    last = store.num_shards - 1
    row = np.array(bits, np.uint16).view(np.float16).reshape(1, 2, 3)
    block = np.repeat(row, len(store.rows(last)), axis=0)
    store.write_shard("cls", last, block)
    assert store.read_shard("cls", last).tobytes() == block.tobytes()


def test_rows_beyond_the_array(filled):
    for rows in ([70], [-1], [3, 70]):
        with pytest.raises(IndexError, match="0 to 69"):
            filled.read_rows("cls", rows)
    assert filled.read_rows("cls", []).shape == (0, 2, 3)


def test_one_row_reads_only_its_chunk(filled):
    """A training item must not pay for its shard: damage to another sample's chunk goes unnoticed."""
    file = shard_file(filled, "cls", 0)
    content = bytearray(file.read_bytes())
    content[0] ^= 1  # chunk of row 0: 12 bytes of data and 4 of crc32c, in order
    file.write_bytes(content)
    assert np.array_equal(filled.read_rows("cls", [5]), block_of("cls", 64)[5:6])
    with pytest.raises(CorruptShard):
        filled.read_rows("cls", [0])


def test_digest_by_hand():
    block = np.array([[1, 2]], np.uint8)
    same = block_digest("a", 3, block)
    assert same == block_digest("a", 3, np.asfortranarray(block))
    assert len(same) == 32
    others = [("b", 3, block), ("a", 4, block), ("a", 3, block.astype(np.int8)), ("a", 3, block[0])]
    assert same not in [block_digest(*other) for other in others]


def test_write_returns_the_digest_of_the_disk(filled):
    block = block_of("cls", 64, seed=7)
    assert filled.write_shard("cls", 0, block) == filled.digest("cls", 0) == block_digest("cls", 0, block)


def test_only_whole_shards_of_the_right_dtype(store):
    for block in (block_of("cls", 63), block_of("cls", 64).astype(np.float32), block_of("cls", 64)[..., 0]):
        with pytest.raises(ValueError, match="only whole shards"):
            store.write_shard("cls", 0, block)
    with pytest.raises(ValueError, match="written by shards"):
        store.write_whole("cls", block_of("cls", 64))


def test_a_block_of_fill_values_is_written(store):
    """Rows of a quarantined shard are all NaN, which is the fill value; they must not pass for missing."""
    block = np.full((64, 2, 3), np.nan, np.float16)
    store.write_shard("cls", 0, block)
    assert np.isnan(store.read_shard("cls", 0)).all()
    assert shard_file(store, "cls", 0).stat().st_size > 64 * 12


def test_text_is_one_file(store):
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    digest = store.write_whole("text", values)
    assert np.array_equal(store.read_whole("text"), values)
    assert np.array_equal(store.read_rows("text", [3, 1]), values[[3, 1]])
    assert store.digest("text", 0) == digest
    with pytest.raises(IndexError):
        store.read_shard("text", 1)


def test_any_zarr_tool_can_read_it(filled):
    group = zarr.open_group(str(filled.data), mode="r")
    assert group.attrs["teacher"] == ATTRIBUTES["teacher"]
    assert group.attrs["cache"]["version"] == 2
    assert list(group["sample"][:]) == IDS
    array = group["cls"]
    assert array.metadata.dimension_names == ("N", "V", "C")
    assert (array.chunks, array.shards) == ((1, 2, 3), (SHARD, 2, 3))
    assert np.array_equal(array[64:], block_of("cls", 6, seed=1))
    inner = array.metadata.to_dict()["codecs"][0]["configuration"]["codecs"]
    assert [codec["name"] for codec in inner] == ["bytes", "crc32c"]


def test_zarr_would_have_written_the_same_file(filled, tmp_path):
    twin = shutil.copytree(filled.data, tmp_path / "twin.zarr")
    array = zarr.open_array(str(twin / "cls"), mode="r+", config={"write_empty_chunks": True})
    array[64:70] = block_of("cls", 6, seed=1)
    assert (twin / "cls" / "c.1.0.0").read_bytes() == shard_file(filled, "cls", 1).read_bytes()


def test_no_warnings(tmp_path, recwarn):
    store = make(tmp_path / "quiet")
    store.write_shard("cls", 0, block_of("cls", 64))
    assert store.samples == IDS
    assert not [str(warning.message) for warning in recwarn if "zarr" in str(warning.filename).lower()]


@pytest.mark.parametrize("name", ["view", "cls", "status"])
def test_a_flipped_bit_is_an_error(filled, name):
    file = shard_file(filled, name, 0)
    good = file.read_bytes()
    for place in range(0, len(good), max(1, len(good) // 40)):
        content = bytearray(good)
        content[place] ^= 1 << (place % 8)
        file.write_bytes(content)
        with pytest.raises(CorruptShard, match=r"cli\.py verify"):
            filled.read_shard(name, 0)


def test_a_flipped_bit_in_a_compressed_shard(store):
    store.add_arrays(["pseudo"], {})
    block = block_of("pseudo", 64)
    store.write_shard("pseudo", 0, block)
    assert np.array_equal(store.read_shard("pseudo", 0), block)
    file = shard_file(store, "pseudo", 0)
    content = bytearray(file.read_bytes())
    content[3] ^= 16
    file.write_bytes(content)
    with pytest.raises(CorruptShard, match="'pseudo'"):
        store.read_shard("pseudo", 0)


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_truncated_shard_is_an_error(filled, keep):
    file = shard_file(filled, "cls", 0)
    file.write_bytes(file.read_bytes()[:keep])
    for read in (lambda: filled.read_shard("cls", 0), lambda: filled.read_rows("cls", [63])):
        with pytest.raises(CorruptShard, match=r"c\.0\.0\.0"):
            read()


def test_a_missing_shard_is_an_error(filled):
    shard_file(filled, "cls", 1).unlink()
    assert len(filled.read_rows("cls", [63])) == 1
    with pytest.raises(CorruptShard, match="shard 1 of 'cls'"):
        filled.read_rows("cls", [63, 64])
    with pytest.raises(CorruptShard, match="missing"):
        filled.digest("cls", 1)


def test_a_corrupt_shard_can_be_written_again(filled):
    file = shard_file(filled, "cls", 0)
    file.write_bytes(b"nonsense")
    filled.write_shard("cls", 0, block_of("cls", 64))
    assert np.array_equal(filled.read_shard("cls", 0), block_of("cls", 64))


def test_damaged_metadata_and_ids(filled):
    (filled.data / "cls" / "zarr.json").write_text("{")
    with pytest.raises(CorruptShard, match=r"zarr\.json"):
        Store.open(filled.path).read_shard("cls", 0)
    (filled.data / "sample" / "c.0").unlink()
    with pytest.raises(CorruptShard, match="'sample'"):
        _ = Store.open(filled.path).samples
    shutil.rmtree(filled.data / "sample")
    with pytest.raises(CorruptShard, match="'sample'"):
        _ = Store.open(filled.path).samples
    (filled.data / "zarr.json").write_text("{")
    with pytest.raises(CorruptShard, match="isn't JSON"):
        Store.open(filled.path)


def test_a_disk_that_lies(store, monkeypatch):
    """Reading back is a part of writing."""
    write = store_module.write_atomic

    def lying(path, *pieces):
        write(path, *pieces)
        content = bytearray(path.read_bytes())
        content[100] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(store_module, "write_atomic", lying)
    with pytest.raises(CorruptShard, match="read back"):
        store.write_shard("cls", 0, block_of("cls", 64))


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, ["No space left", "Free space"]),
        (errno.EACCES, ["Permission denied", "writable"]),
        (errno.EROFS, ["Read-only", "Mount it"]),
        (errno.EIO, ["Input/output error", "Check the path"]),
    ],
)
def test_a_failed_write_is_one_line_and_loses_nothing(filled, monkeypatch, code, words):
    def fail(_):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(cache.files.os, "fsync", fail)
        with pytest.raises(CacheWriteFailed) as caught:
            filled.write_shard("cls", 0, block_of("cls", 64, seed=9))
        with pytest.raises(CacheWriteFailed):
            filled.update_attributes("cluster", {"a": 1})
    message = str(caught.value)
    assert "\n" not in message
    assert "c.0.0.0" in message
    assert all(word in message for word in words)
    assert np.array_equal(filled.read_shard("cls", 0), block_of("cls", 64))
    assert not list(filled.path.rglob("*.partial"))
    assert "cluster" not in Store.open(filled.path).attributes


def test_a_shard_is_forced_to_disk_before_its_name(store, monkeypatch):
    """fsync of the file, then the rename, then fsync of the folder: a power cut leaves all or nothing."""
    events, fsync, replace = [], os.fsync, Path.replace

    def see_fsync(descriptor):
        events.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def see_replace(self, target):
        events.append("rename")
        return replace(self, target)

    monkeypatch.setattr(cache.files.os, "fsync", see_fsync)
    monkeypatch.setattr(Path, "replace", see_replace)
    store.write_shard("cls", 0, block_of("cls", 64))
    file = shard_file(store, "cls", 0)
    assert events == [file.stat().st_ino, "rename", file.parent.stat().st_ino]


def test_no_room_to_create(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(cache.files.os, "fsync", fail)
        with pytest.raises(CacheWriteFailed, match="No space left"):
            make(tmp_path / "cache")
    assert make(tmp_path / "cache").samples == IDS


def test_permission_to_read(filled, monkeypatch):
    def deny(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    filled.read_shard("cls", 0)  # its metadata is read
    monkeypatch.setattr("zarr.storage._local._get", deny)
    with pytest.raises(CacheError, match="Permission denied") as caught:
        filled.read_shard("cls", 0)
    assert not isinstance(caught.value, CorruptShard)


def test_creating_again_changes_nothing(filled):
    before = {path: path.read_bytes() for path in filled.data.rglob("*") if path.is_file()}
    again = make(filled.path)
    assert {path: path.read_bytes() for path in filled.data.rglob("*") if path.is_file()} == before
    assert np.array_equal(again.read_shard("cls", 0), block_of("cls", 64))


def test_creating_again_adds_arrays(filled):
    again = make(filled.path, arrays=[*NAMES, "pseudo"])
    assert again.has("pseudo")
    assert not filled.has("centroids")
    assert again.arrays == ["view", "cls", "tokens", "status", "text", "pseudo"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attributes": ATTRIBUTES | {"teacher": {"name": "big"}}}, ["'tiny'", "'big'", "teacher"]),
        ({"attributes": {"views": [1, 2]}}, ["teacher", "None"]),
        ({"attributes": ATTRIBUTES | {"new": 1}}, ["new", "None", "1"]),
        ({"samples": [*IDS[:-1], "other"]}, ["sample 69", "'bild_ä69'", "'other'"]),
        ({"samples": IDS[:65], "sizes": SIZES | {"N": 65}}, ["size N", "70", "65"]),
        ({"sizes": SIZES | {"C": 8}}, ["size C", "3", "8"]),
    ],
)
def test_creating_from_something_else(filled, changes, words):
    with pytest.raises(StaleCache) as caught:
        make(filled.path, **changes)
    assert all(word in str(caught.value) for word in [*words, "cache.path"])


@pytest.mark.parametrize(
    "changes",
    [
        {"samples": IDS[:-1]},
        {"samples": [*IDS[:-1], IDS[0]]},
        {"samples": [], "sizes": SIZES | {"N": 0}},
        {"attributes": {"cache": 1}},
        {"arrays": ["nonsense"]},
        {"arrays": ["centroids"]},
    ],
)
def test_arguments_that_do_not_fit(tmp_path, changes):
    with pytest.raises(ValueError, match=r"samples|own|nonsense|K_c"):
        make(tmp_path / "new", **changes)


def test_class_ids_of_16_bits(filled):
    """An array in another dtype is dropped, and the header says which one it has; extraction stays what it was."""
    filled.add_arrays(["named"], {"K_c": 5}, dtypes={"named": "uint8"})
    filled.write_shard("named", 1, np.zeros((6, 2, 5), np.uint8))
    filled.add_arrays(["named"], {}, dtypes={"named": "uint8"})
    assert filled.size_bytes("named", 1)
    filled.add_arrays(["named"], {}, dtypes={"named": "uint16"})
    assert not filled.size_bytes("named", 1)
    ids = np.full((6, 2, 5), 300, np.uint16)
    filled.write_shard("named", 1, ids)
    again = Store.open(filled.path)
    assert np.array_equal(again.read_shard("named", 1), ids)
    make(filled.path)
    again.add_arrays(["named"], {}, dtypes={"named": "uint8"})
    assert Store.open(filled.path).spec("named").dtype == "uint8"


def test_adding_arrays_of_another_stage(filled):
    filled.add_arrays(["pseudo", "centroids"], {"K_c": 5})
    assert Store.open(filled.path).sizes == SIZES | {"K_c": 5}
    block = np.zeros((6, 2, 5, 3), np.float16)
    Store.open(filled.path).write_shard("centroids", 1, block)
    filled.add_arrays(["pseudo", "centroids"], {"K_c": 5})
    assert np.array_equal(filled.read_shard("centroids", 1), block)
    with pytest.raises(StaleCache, match=r"\(70, 2, 5, 3\).*\(70, 2, 9, 3\)"):
        filled.add_arrays(["centroids"], {"K_c": 9})
    with pytest.raises(StaleCache, match="'view'"):
        filled.add_arrays(["centroids"], {"V": 1}, replace=True)
    filled.add_arrays(["centroids"], {"K_c": 9}, replace=True)
    assert filled.sizes["K_c"] == 9
    filled.write_shard("centroids", 1, np.zeros((6, 2, 9, 3), np.float16))
    make(filled.path)  # the extraction's own creation doesn't mind what was added
    filled.add_arrays(["pseudo"], {"K_c": 5}, replace=True)  # left behind by a run that kept them; not asked for now
    assert not filled.has("centroids")


def test_attributes_of_later_stages(filled):
    other = Store.open(filled.path)
    other.update_attributes("cluster", {"fingerprint": "f", "device": "cpu"})
    filled.update_attributes("cluster", {"device": "cuda"})
    assert filled.attributes == ATTRIBUTES | {"cluster": {"fingerprint": "f", "device": "cuda"}}
    make(filled.path)
    for section in ("teacher", "cache"):
        with pytest.raises(ValueError, match="made from"):
            filled.update_attributes(section, {"name": "x"})


def test_no_cache(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    zarr.create_group(str(tmp_path / "foreign" / "data.zarr"), zarr_format=3)
    for name in ("nowhere", "file", "other", "foreign"):
        with pytest.raises(MissingCache, match=r"cli\.py extract --config") as caught:
            Store.open(tmp_path / name)
        assert isinstance(caught.value, FileNotFoundError)
        assert str(tmp_path / name) in str(caught.value)


def test_another_schema_version(filled):
    file = filled.data / "zarr.json"
    group = json.loads(file.read_text())
    group["attributes"]["cache"]["version"] = 1
    file.write_text(json.dumps(group))
    for do in (Store.open, make):
        with pytest.raises(StaleCache, match=r"version 1.*version 2"):
            do(filled.path)


def test_an_array_that_is_not_there(filled):
    with pytest.raises(MissingCache, match=r"cli\.py cluster"):
        filled.read_rows("pseudo", [0])
    for name in ("nonsense", "sample"):
        with pytest.raises(MissingCache, match="schema"):
            filled.read_shard(name, 0)


def test_what_a_killed_creation_leaves(tmp_path):
    path = tmp_path / "cache"
    (path / "data.zarr.partial" / "sample").mkdir(parents=True)
    (path / "data.zarr.partial" / "zarr.json").write_text("{")
    with pytest.raises(MissingCache):
        Store.open(path)
    store = make(path)
    shutil.rmtree(store.data / "cls")  # killed before this array was made
    assert make(path).has("cls")


def test_what_a_killed_write_leaves(filled):
    (filled.data / "cls" / "c.0.0.0.1234.partial").write_bytes(b"half")
    assert np.array_equal(filled.read_shard("cls", 0), block_of("cls", 64))
    filled.write_shard("cls", 0, block_of("cls", 64, seed=2))
    assert len(zarr.open_group(str(filled.data), mode="r")["cls"][:]) == NUM


def test_size_on_disk(filled):
    # 70 chunks of 12 + 4 bytes, and two indexes of 64 * 16 + 4: a short shard has no padding.
    files = 70 * 16 + 2 * (64 * 16 + 4)
    assert filled.size_bytes("cls") == files + (filled.data / "cls" / "zarr.json").stat().st_size
    assert filled.size_bytes("pseudo") == 0


@pytest.mark.parametrize("num", [72, 130])
def test_samples_are_appended(filled, num):
    """70 -> 72: the last shard has two more rows, unwritten; 70 -> 130: and there is a third one."""
    more = [f"new{row}" for row in range(70, num)]
    before = filled.read_shard("cls", 0).tobytes(), filled.read_rows("cls", [69]).tobytes()
    again = make(filled.path, samples=[*IDS, *more], sizes=SIZES | {"N": num})
    assert (again.samples, again.num_samples, again.num_shards) == ([*IDS, *more], num, -(-num // SHARD))
    assert (again.read_shard("cls", 0).tobytes(), again.read_rows("cls", [69]).tobytes()) == before
    assert again.ids(range(64, num)) == [*IDS[64:], *more]
    block = block_of("cls", len(again.rows(1)), seed=5)
    assert again.write_shard("cls", 1, block) == again.digest("cls", 1)
    group = zarr.open_group(str(filled.data), mode="r")
    assert list(group["sample"][:]) == [*IDS, *more]
    assert {group[name].shape[0] for name in ("cls", "view", "tokens", "status")} == {num}
    assert group["text"].shape == (4, 3)


@pytest.mark.parametrize("stop", range(1, 8))
def test_a_killed_appending_is_mended_by_the_next(filled, monkeypatch, stop):
    """Killed after each of its writes: the ids' file and their length, the header, four arrays' lengths."""
    grown = {"samples": [*IDS, "new"], "sizes": SIZES | {"N": 71}}
    count, write = [0], cache.store.write_atomic

    def killed(*arguments):
        count[0] += 1
        if count[0] > stop:
            raise KeyboardInterrupt
        write(*arguments)

    with monkeypatch.context() as patched:
        for module in ("store", "header"):
            patched.setattr(f"cache.{module}.write_atomic", killed)
        if stop < 7:
            with pytest.raises(KeyboardInterrupt):
                make(filled.path, **grown)
        else:
            make(filled.path, **grown)
    assert count[0] == min(stop + 1, 7)
    assert np.array_equal(Store.open(filled.path).read_rows("cls", [5]), block_of("cls", 64)[5:6])
    again = make(filled.path, **grown)
    assert again.samples == [*IDS, "new"]
    assert {again._zarr(name).shape[0] for name in ("view", "cls", "tokens", "status")} == {71}


def test_ids_over_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr("cache.store.SAMPLE", replace(SAMPLE, chunk=3))
    ids = [str(row) for row in range(7)]
    store = make(tmp_path, samples=ids, sizes=SIZES | {"N": 7})
    assert store.samples == ids
    assert store.ids(range(2, 4)) == ["2", "3"]
    assert sorted(file.name for file in (store.data / "sample").iterdir()) == ["c.0", "c.1", "c.2", "zarr.json"]
    kept = (store.data / "sample" / "c.1").stat().st_mtime_ns
    more = [str(row) for row in range(11)]
    assert make(tmp_path, samples=more, sizes=SIZES | {"N": 11}).samples == more
    assert (store.data / "sample" / "c.1").stat().st_mtime_ns == kept
    assert list(zarr.open_array(str(store.data / "sample"), mode="r")[:]) == more


def test_pickles_into_a_spawned_worker(filled):
    filled.read_rows("cls", [0])  # open here; the worker opens its own
    assert len(pickle.dumps(filled)) < 400
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        there = pool.submit(filled.read_rows, "cls", [1, 65]).result(timeout=60)
    assert np.array_equal(there, filled.read_rows("cls", [1, 65]))


def test_errors_survive_pickling():
    """A worker's error travels to the driver as a pickle."""
    for kind in (MissingCache, StaleCache, CorruptShard, CacheWriteFailed):
        again = pickle.loads(pickle.dumps(kind("one line")))
        assert type(again) is kind
        assert str(again) == "one line"


def test_no_datum_equals_a_fill_value():
    for spec in ARRAYS.values():
        assert isinstance(spec, ArraySpec)
        if spec.dtype.startswith("float"):
            assert np.isnan(spec.fill)
        else:  # ids end at 253; codes and counts never reach the largest number, but 255 is padding
            with_padding = ("pseudo", "pseudo_raw", "named", "cam_class", "mask")
            wanted = dict.fromkeys(with_padding, 254) | {"cam_shape": 65535}
            assert spec.fill == wanted.get(spec.name, 255)
