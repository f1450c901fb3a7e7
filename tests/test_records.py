"""Odd JSON in any record of a cache is one line, or changes nothing: never another exception, never other values."""

import copy
import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.errors import CacheError, CorruptShard, MissingCache
from cache.ledger import Ledger, read_manifest
from cache.records import misfit, parsed
from cache.store import SIDES, Store
from cache.verify import check_whole, read_recorded, verify
from pipeline.looking.facts import found_metrics
from tests.test_cache_verify import build

ODD = st.one_of(
    st.sampled_from([None, True, False, 0, -1, 1, 2, 65, 10**12, 2**70, 0.5, float("nan"), float("inf")]),
    st.sampled_from(["", "x", "NaN", "float64", "1", "../../etc/passwd", [], {}, [[]], [1], {"a": 1}, ["a", None]]),
    st.sampled_from([{"name": "numcodecs.pickle", "configuration": {}}, [{"name": "bytes"}], {"configuration": 3}]),
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A cache of two shards and two stages, with a stamp a row and the digests of whole arrays."""
    path = tmp_path_factory.mktemp("records") / "cache"
    store = build(path)
    store.update_attributes("teacher", {"image_size": 64})
    for stage in ("extract", "cluster"):
        ledger = Ledger(path, stage)
        for shard in (0, 1):
            entry, rows = ledger.entry(shard), store.rows(shard)
            ledger.record(shard, entry | {"stamps": [f"s{row}" for row in rows], "quarantined": {"1": "torn"}})
    return path


@pytest.fixture(scope="module")
def wanted(sound):
    return results(sound)


def places(value, path=()):
    """Every place in a record, as keys from the outside in."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield from places(each, (*path, key))


def replaced(record, path, value):
    record = copy.deepcopy(record)
    if not path:
        return value
    place = record
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return record


def results(path):
    """All that the stages read of a cache, each as its values or the word for a CacheError."""
    found = {}

    def note(name, read):
        try:
            found[name] = read()
        except CacheError as error:
            found[name] = ERROR if "\n" not in str(error) else "several lines"

    store = Store.open(path)
    note("samples", lambda: store.samples)
    note("size", lambda: store.fact(SIDES, "teacher", "image_size"))
    for name in ("cls", "status", "pseudo", "centroids", "text"):
        note(name, lambda name=name: store.read_rows(name, [0, 1]).tobytes())
        note(f"{name} 1", lambda name=name: store.read_shard(name, 0).tobytes())
    for shard in range(min(store.num_shards, 2)):
        for stage, made in (("extract", "fx"), ("cluster", "fc")):
            note((stage, shard), lambda s=shard, t=stage, m=made: _bytes(read_recorded(store, s, {t: m})))
    note("whole", lambda: check_whole(store, read_manifest(path / "extract.manifest.json") or {}))
    verify(path)
    return found


def _bytes(blocks):
    return {name: block.tobytes() for name, block in blocks.items()}


ERROR = "one line"
RECORDS = (
    "data.zarr/zarr.json",
    "data.zarr/sample/zarr.json",
    "data.zarr/cls/zarr.json",
    "data.zarr/pseudo/zarr.json",
    "data.zarr/text/zarr.json",
    "ledger/extract/00000.json",
    "ledger/cluster/00001.json",
    "extract.manifest.json",
)


@pytest.mark.parametrize("name", RECORDS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_odd_values_in_a_record(sound, wanted, tmp_path_factory, name, data):
    twin = tmp_path_factory.getbasetemp() / "twin"
    if not twin.exists():
        shutil.copytree(sound, twin)
    file = twin / name
    record = json.loads((sound / name).read_bytes())
    where = data.draw(st.sampled_from(list(places(record))))
    file.write_text(json.dumps(replaced(record, where, data.draw(ODD))))
    try:
        found = results(twin)
    except CacheError as error:
        found = {"opening": str(error).count("\n") * "several lines" or ERROR}
    finally:
        shutil.copy(sound / name, file)
    for key, value in found.items():
        if key == "size" or value == ERROR:
            continue  # what an attribute says is the stage's own
        if key == "samples":  # fewer: as if appending had been killed; then no array that is longer is read
            assert value == wanted[key][: len(value)]
        elif isinstance(value, dict):  # of a record that names fewer arrays there is less to read
            assert value.items() <= wanted[key].items(), key
        else:
            assert value == wanted[key], key


@pytest.mark.parametrize("content", [b"[" * 100_000, b"1" * 5000])
@pytest.mark.parametrize("name", RECORDS)
def test_json_that_is_none(sound, tmp_path, name, content):
    shutil.copytree(sound, tmp_path / "cache")
    (tmp_path / "cache" / name).write_bytes(content)
    if name == RECORDS[0]:
        with pytest.raises(CorruptShard, match=r"isn't JSON|no cache"):
            results(tmp_path / "cache")
    else:
        results(tmp_path / "cache")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["codecs"].append({"name": "numcodecs.pickle"}), "codecs"),
        (lambda m: m["codecs"][0]["configuration"].update(codecs=[{"name": "bytes"}]), "codecs"),
        (lambda m: m.update(shape=[70, 10**12, 2]), "shape"),
        (lambda m: m.update(shape=[10**12, 1, 2]), "shape"),
        (lambda m: m.update(data_type="float64"), "data_type"),
        (lambda m: m.update(fill_value=0), "fill_value"),
        (lambda m: m.update(storage_transformers=[{"name": "x"}]), "storage_transformers"),
        (lambda m: m["chunk_key_encoding"].update(name="v2"), "chunk_key_encoding"),
    ],
)
def test_zarr_is_handed_only_what_the_schema_has(sound, tmp_path, monkeypatch, change, words):
    """No codec of a stranger's is ever looked up: numcodecs' pickle filter runs what it reads."""
    store = Store.open(shutil.copytree(sound, tmp_path / "cache"))
    file = store.data / "cls" / "zarr.json"
    metadata = json.loads(file.read_text())
    change(metadata)
    file.write_text(json.dumps(metadata))
    monkeypatch.setattr("cache.store.zarr.open_array", lambda *_, **__: pytest.fail("zarr was asked"))
    for read in (lambda: store.read_rows("cls", [0]), lambda: store.write_shard("cls", 0, np.zeros((64, 1, 2)))):
        with pytest.raises(CorruptShard, match=rf"cls/zarr\.json.*{words}.*schema"):
            read()


@pytest.mark.parametrize(
    "header",
    [
        {"sizes": {"N": 10**12}},
        {"sizes": {"N": 70, "V": 1, "C": 10**12}},
        {"sizes": {"N": True}},
        {"sizes": {"N": 0}},
        {"sizes": {"N": 70.5}},
        {"sizes": {"V": 1}},
        {"sizes": [70]},
        {"dtypes": {"tokens": "object"}},
        {"dtypes": {"nonsense": "int8"}},
        {"dtypes": None},
        {"identity": [1]},
        {"identity": "data"},
    ],
)
def test_a_header_that_can_not_be(sound, tmp_path, header):
    path = shutil.copytree(sound, tmp_path / "cache")
    group = json.loads((path / "data.zarr" / "zarr.json").read_text())
    group["attributes"]["cache"].update(header)
    (path / "data.zarr" / "zarr.json").write_text(json.dumps(group))
    with pytest.raises(CorruptShard, match=r"zarr\.json: isn't the header of a cache: .*Delete") as caught:
        Store.open(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("attributes", [None, [], "x", {"cache": 3}, {"cache": None}])
def test_attributes_that_are_none(sound, tmp_path, attributes):
    path = shutil.copytree(sound, tmp_path / "cache")
    (path / "data.zarr" / "zarr.json").write_text(json.dumps({"attributes": attributes}))
    with pytest.raises(MissingCache, match="no cache of this program"):
        Store.open(path)


def test_facts_that_are_missing_or_odd(sound, tmp_path):
    store = Store.open(shutil.copytree(sound, tmp_path / "cache"))
    assert store.fact(SIDES, "teacher", "image_size") == 64
    store.update_attributes("views", {"num": "two"})
    store.update_attributes("teacher", {"image_size": 10**12})
    for shape, keys in ((SIDES, ("teacher", "image_size")), (SIDES, ("views", "num")), (str, ("nothing", "here"))):
        with pytest.raises(CorruptShard, match=rf"attribute {keys[0]}\.{keys[1]} is .*run extract again"):
            store.fact(shape, *keys)
    with pytest.raises(CorruptShard, match="mean_colour"):
        _ = store.mean_colour


def test_fewer_rows_or_ids_than_the_header_says(sound, tmp_path):
    store = Store.open(shutil.copytree(sound, tmp_path / "cache"))
    for name in ("cls", "sample"):
        file = store.data / name / "zarr.json"
        metadata = json.loads(file.read_text())
        metadata["shape"][0] = 65
        file.write_text(json.dumps(metadata))
    with pytest.raises(CorruptShard, match="65 rows, the cache 70"):
        store.read_rows("cls", [69])
    with pytest.raises(CorruptShard, match="65 ids for 70 samples"):
        _ = store.samples
    assert len(store.read_rows("cls", [64])) == 1


def test_shapes_by_hand():
    assert misfit({"a": 1, "b": [1.5, 2]}, {"a": int, "b": [float], "c?": str}) is None
    assert misfit({"a": 1, "more": 0}, {"a": range(2)}) is None
    assert misfit({"a": {"x": None}}, {"a": {str: (str, None)}}) is None
    assert misfit({"a": True}, {"a": int}) == "a is True"
    assert misfit({}, {"a": int}) == "a is None"
    assert misfit({"a": [0, "x"]}, {"a": [int]}) == "a[1] is 'x'"
    assert misfit({"a": float("nan")}, {"a": float}) == "a is nan"
    assert misfit(["x" * 99], [int]).endswith("...")
    with pytest.raises(ValueError, match="nested too deeply"):
        parsed(b"[" * 100_000)


SCORES = {"pAcc": 1.0, "mIoU_S": 2.0, "mIoU_U": None, "hIoU": None, "gamma": 0}


@pytest.mark.parametrize(
    ("change", "is_sound"),
    [
        ({}, True),
        ({"gamma_sweep": {"0.0": {"hIoU": None}}}, True),
        ({"gamma_sweep": {"many": {}}}, False),
        ({"pAcc": "high"}, False),
        ({"gamma": None}, False),
        ({"per_class": [1]}, False),
        ({"num_images": "7"}, False),
        ({"made": "yesterday"}, False),
    ],
)
def test_metrics_of_odd_types_are_none(tmp_path, change, is_sound):
    (tmp_path / "metrics.json").write_text(json.dumps(SCORES | change))
    assert (found_metrics(tmp_path / "metrics.json") is not None) == is_sound
