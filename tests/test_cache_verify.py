"""Verify: a sound cache has no findings, and each kind of damage has exactly its own."""

import shutil

import numpy as np
import pytest

from cache.errors import CorruptShard, MissingCache, StaleCache
from cache.ledger import Ledger, write_manifest
from cache.store import Store
from cache.verify import check_whole, read_recorded, verify, whole_digests

NUM = 70  # two shards: 64 rows and 6
SIZES = {"N": NUM, "V": 1, "C": 2, "h": 1, "w": 1, "K": 2, "K_c": 2}


def build(path, seed=0, fingerprint="fx"):
    """A complete cache: extract and cluster, two shards each; row 1 is quarantined."""
    rng = np.random.default_rng(seed)
    ids = [str(row) for row in range(NUM)]
    names = ["cls", "status", "text", "pseudo", "centroids"]
    made = {"fingerprint": fingerprint}
    store = Store.create(path, sizes=SIZES, arrays=names, samples=ids, attributes=made)
    store.write_whole("text", np.eye(2, dtype=np.float32))
    for shard in (0, 1):
        num = len(store.rows(shard))
        status, cls = np.zeros(num, np.uint8), rng.normal(size=(num, 1, 2)).astype(np.float16)
        status[1], cls[1] = 1, np.nan
        centroids = np.full((num, 1, 2, 2), np.nan, np.float16)
        centroids[:, :, 0] = 1
        pseudo = np.ones((num, 1, 1, 1), np.uint8)
        write(store, "extract", shard, fingerprint, cls=cls, status=status)
        write(store, "cluster", shard, "fc", pseudo=pseudo, centroids=centroids)
    for stage, made in (("extract", fingerprint), ("cluster", "fc")):
        write_manifest(path / f"{stage}.manifest.json", {"fingerprint": made, "num_samples": NUM})
    return store


def write(store, stage, shard, fingerprint, **blocks):
    """Writes and records, as a stage does; blocks that aren't given stay as they are recorded."""
    ledger = Ledger(store.path, stage)
    digests = dict((ledger.entry(shard) or {}).get("digests", {}))
    digests |= {name: store.write_shard(name, shard, block) for name, block in blocks.items()}
    rows = store.rows(shard)
    entry = {"rows": [rows.start, rows.stop], "fingerprint": fingerprint, "digests": digests}
    ledger.record(shard, entry)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return build(tmp_path_factory.mktemp("sound")).path


@pytest.fixture
def store(sound, tmp_path):
    return Store.open(shutil.copytree(sound, tmp_path / "cache"))


def found(store, **options):
    return [(finding.kind, finding.where) for finding in verify(store.path, **options)]


def only(store, kind, *words, **options):
    """There is one finding, of this kind, that holds the words, on one line, and says what to do."""
    (finding,) = verify(store.path, **options)
    assert finding.kind == kind
    assert finding.todo.endswith(".")
    assert "\n" not in str(finding)
    assert all(word in str(finding) for word in words), str(finding)
    return True


def test_a_sound_cache(store):
    calls = []
    wanted = {"extract": "fx", "cluster": "fc"}
    assert verify(store.path, fingerprints=wanted, progress=lambda *call: calls.append(call)) == []
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]  # two shards of two stages
    assert verify(str(store.path)) == []


def test_no_cache(tmp_path):
    with pytest.raises(MissingCache):
        verify(tmp_path)


def test_a_flipped_bit(store):
    file = store.data / "cls" / "c.1.0.0"
    content = bytearray(file.read_bytes())
    content[0] ^= 4
    file.write_bytes(content)
    todo = [str(Ledger(store.path, "extract").path(1)), "extract.manifest.json", "cli.py extract"]
    assert only(store, "corrupt", "cls shard 1", "checksum", *todo)


def test_a_truncated_and_a_missing_shard(store):
    (store.data / "pseudo" / "c.0.0.0.0").write_bytes(b"")
    (store.data / "centroids" / "c.1.0.0.0").unlink()
    assert found(store) == [
        ("corrupt", f"{store.data / 'pseudo'} shard 0"),
        ("corrupt", f"{store.data / 'centroids'} shard 1"),
    ]


def test_a_missing_array(store):
    shutil.rmtree(store.data / "centroids")
    assert [kind for kind, _ in found(store)] == ["corrupt", "corrupt"]


def test_what_to_do_works(store):
    """Following the advice makes the cache sound again."""
    good = store.read_shard("cls", 0)
    (store.data / "cls" / "c.0.0.0").write_bytes(b"torn")
    assert only(store, "corrupt", "cls shard 0")
    write(store, "extract", 0, "fx", cls=good)
    assert verify(store.path) == []


def test_two_shards_swapped(store):
    one, two = store.data / "cls" / "c.0.0.0", store.data / "cls" / "c.1.0.0"
    first = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(first)
    # Every checksum still holds. Shard 1 has 6 chunks, so rows 6 to 63 of shard 0 are fill values now.
    assert {where for kind, where in found(store) if kind == "changed"} == {
        f"{store.data / 'cls'} shard 0",
        f"{store.data / 'cls'} shard 1",
    }


def test_a_shard_of_another_cache(store, tmp_path):
    other = build(tmp_path / "other", seed=1, fingerprint="fy")
    shutil.copy(other.data / "cls" / "c.0.0.0", store.data / "cls" / "c.0.0.0")
    assert only(store, "changed", "cls shard 0", "another cache's")


def test_a_record_of_another_config(store):
    write(store, "cluster", 1, "old")
    assert only(store, "stale", "1 shards", "old", "fc")


def test_another_config_than_wanted(store):
    kinds = [finding.kind for finding in verify(store.path, fingerprints={"cluster": "fz"})]
    assert kinds == ["stale", "stale"]  # the manifest, and the records
    message = str(verify(store.path, fingerprints={"cluster": "fz"})[0])
    assert "fingerprint fc, wanted fz" in message
    assert "cli.py cluster" in message


def test_a_record_is_missing_or_torn(store):
    Ledger(store.path, "extract").path(1).write_text('{"shard": 1, "row')
    assert only(store, "incomplete", "no record of 1 shards, the first is 1")


def test_a_stage_that_has_not_ended(store):
    (store.path / "cluster.manifest.json").unlink()
    Ledger(store.path, "cluster").path(1).unlink()
    assert only(store, "incomplete", "1 of 2 shards", "cli.py cluster")


def test_a_stage_that_never_ran(store):
    assert only(store, "incomplete", "cams has not ended", fingerprints={"cams": "f"})


def test_a_manifest_of_other_samples(store):
    write_manifest(store.path / "extract.manifest.json", {"fingerprint": "fx", "num_samples": 71})
    assert only(store, "stale", "71 samples", "has 70")


def test_records_that_do_not_fit(store):
    ledger = Ledger(store.path, "extract")
    entry = ledger.entry(0)
    ledger.record(2, entry | {"rows": [128, 192]})
    ledger.record(0, entry | {"rows": [0, 32]})
    assert found(store) == [("stale", str(ledger.path(0))), ("stale", str(ledger.path(2)))]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_usable_row_that_is_not_finite(store, value):
    cls = store.read_shard("cls", 1)
    cls[1] = value  # quarantined: may hold anything
    write(store, "extract", 1, "fx", cls=cls)
    assert verify(store.path) == []
    cls[3, 0, 1] = value
    write(store, "extract", 1, "fx", cls=cls)
    assert only(store, "invalid", "1 usable rows", "row 3")


def test_padding_of_centroids_is_whole_vectors(store):
    centroids = store.read_shard("centroids", 1)
    assert np.isnan(centroids[0, 0, 1]).all()  # legal
    centroids[0, 0, 1, 0] = 1
    write(store, "cluster", 1, "fc", centroids=centroids)
    assert only(store, "invalid", "row 0")


def test_a_pseudo_label_that_was_never_written(store):
    pseudo = store.read_shard("pseudo", 1)
    pseudo[2] = 254
    write(store, "cluster", 1, "fc", pseudo=pseudo)
    assert only(store, "invalid", "fill value 254")


def test_text_and_ids(store):
    store.write_whole("text", np.array([[1, np.nan], [0, 1]], np.float32))
    assert only(store, "invalid", "text", "finite", "cli.py extract")
    (store.data / "text" / "c.0.0").unlink()
    (store.data / "sample" / "c.0").write_bytes(b"")
    assert found(store) == [("corrupt", str(store.data / "sample")), ("corrupt", str(store.data / "text"))]


def test_unreadable_status_is_one_finding(store):
    (store.data / "status" / "c.1").unlink()
    assert only(store, "corrupt", "status shard 1")


def test_a_shard_without_a_usable_row(store):
    num = len(store.rows(1))
    blocks = {"status": np.ones(num, np.uint8), "cls": np.full((num, 1, 2), np.nan, np.float16)}
    write(store, "extract", 1, "fx", **blocks)
    assert verify(store.path) == []


def test_a_stage_reads_what_was_recorded(store):
    blocks = read_recorded(store, 1, {"extract": "fx", "cluster": "fc"})
    assert set(blocks) == {"cls", "status", "pseudo", "centroids"}
    assert np.array_equal(blocks["cls"], store.read_shard("cls", 1), equal_nan=True)
    assert set(read_recorded(store, 0, {"extract": "fx"}, ["status"])) == {"status"}
    with pytest.raises(CorruptShard, match=r"shard 0 of 'pseudo'.*doesn't speak of it.*cli\.py verify"):
        read_recorded(store, 0, {"extract": "fx"}, ["status", "pseudo"])


def test_a_stage_refuses_what_was_not_recorded(store, tmp_path):
    """Checksums hold in all of these: only the record tells."""
    with pytest.raises(StaleCache, match=r"shard 1 was made by extract with fingerprint fx, wanted fy"):
        read_recorded(store, 1, {"extract": "fy"})
    other = build(tmp_path / "other", seed=1)
    shutil.copy(other.data / "cls" / "c.1.0.0", store.data / "cls" / "c.1.0.0")
    with pytest.raises(CorruptShard, match=r"shard 1 of 'cls' .*another cache"):
        read_recorded(store, 1, {"extract": "fx"}, ["cls"])
    assert read_recorded(store, 1, {"extract": "fx"}, ["status"])
    Ledger(store.path, "extract").path(1).unlink()
    with pytest.raises(CorruptShard, match=r"00001\.json.*no record"):
        read_recorded(store, 1, {"extract": "fx"}, ["status"])


def test_text_and_ids_of_another_cache(store):
    manifest = {"fingerprint": "fx", "num_samples": NUM, "whole": whole_digests(store, "extract")}
    write_manifest(store.path / "extract.manifest.json", manifest)
    assert set(manifest["whole"]) == {"sample", "text"}
    assert verify(store.path) == []
    check_whole(store, manifest)
    store.write_whole("text", np.eye(2, dtype=np.float32)[::-1].copy())  # sound, but not the one recorded
    assert only(store, "changed", "data.zarr/text", "another cache's", "cli.py extract")
    with pytest.raises(CorruptShard, match="'text'"):
        check_whole(store, manifest)
    store.write_whole("text", np.eye(2, dtype=np.float32))
    other = Store.create(
        store.path.parent / "other",
        sizes=SIZES,
        arrays=[],
        samples=[f"x{i}" for i in range(NUM)],
        attributes={"fingerprint": "fx"},
    )
    shutil.copy(other.data / "sample" / "c.0", store.data / "sample" / "c.0")
    assert only(Store.open(store.path), "changed", "data.zarr/sample", "extract again")
    with pytest.raises(CorruptShard, match="'sample'"):
        check_whole(Store.open(store.path), manifest)
