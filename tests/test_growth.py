"""A data set that grows, shrinks or changes between two runs: new images only, or one clear line."""

import json

import numpy as np
import pytest
from PIL import Image

from cache.errors import CorruptShard, StaleCache
from cache.store import Store
from pipeline import extract as stage
from pipeline.cluster import cluster
from pipeline.data import base
from pipeline.data.demo import CLASSES, render_scene
from pipeline.extract import extract
from pipeline.learning import batches
from pipeline.running import table
from pipeline.running.rows import in_row_order, is_listed
from pipeline.running.shards import Made, ShardStage, run_stage
from pipeline.running.table import Stage
from pipeline.train import train
from pipeline.verify import verify
from tests.conftest import ROOT, TINY


def records(config, name):
    return [json.loads(p.read_text()) for p in sorted((config.cache_path / "ledger" / name).glob("*.json"))]


def manifest(config, name):
    return json.loads((config.cache_path / f"{name}.manifest.json").read_text())


@pytest.fixture
def seen_by_the_teacher(monkeypatch):
    """Ids of the images that go through the teacher, in order."""
    seen, original = [], stage.shard_blocks

    def spy(data, teacher, samples, **options):
        seen.extend(sample.id for sample in samples)
        return original(data, teacher, samples, **options)

    monkeypatch.setattr(stage, "shard_blocks", spy)
    return seen


@pytest.mark.parametrize(("tokens", "old", "new"), [("float16", 66, 70), ("stream", 63, 66)])
def test_a_grown_cache_is_the_one_made_at_once(tmp_path, seen_by_the_teacher, tokens, old, new):
    """The last shard of two gets four rows more; a single one gets its last and a second one comes."""
    from pipeline.config import load

    def build(name, train):
        common = [*TINY, "views.num=1", f"cache.tokens={tokens}", f"runs={tmp_path}", f"name={name}"]
        return load(ROOT / "config" / "demo.yaml", [*common, f"data.train={train}"])

    extract(build("grown", old))
    cluster(build("grown", old))
    before = [records(build("grown", old), name)[0] for name in ("extract", "cluster")]
    del seen_by_the_teacher[:]
    config = build("grown", new)
    extract(config)
    assert seen_by_the_teacher == [f"train-{row:05d}" for row in range(old, new)]
    assert not (config.cache_path / "cluster.manifest.json").exists()
    cluster(config)
    if old >= 64:
        now = [records(config, name)[0] for name in ("extract", "cluster")]
        assert now == before, "a shard that didn't change was made again"
    at_once = build("at_once", new)
    extract(at_once)
    cluster(at_once)
    for name in ("extract", "cluster"):
        assert manifest(config, name) == manifest(at_once, name)
    assert verify(config) == []


def picture(folder, name, index):
    scene = render_scene(3, index, 64)
    Image.fromarray(scene.image).save(folder / "images" / f"{name}.png")
    Image.fromarray(scene.labels).save(folder / "masks" / f"{name}.png")


@pytest.fixture
def garden(tmp_path, tiny):
    """A folder of three pictures b, d, f, and the config of a run on it."""
    folder = tmp_path / "garden"
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for index, name in enumerate("bdf"):
        picture(folder, name, index)
    listed = "{images: images/*.png, masks: masks/*.png}"
    (folder / "dataset.yaml").write_text(
        f"name: garden\nclasses: {list(CLASSES)}\nunseen: [{CLASSES[-1]}]\ntrain: {listed}\ntest: {listed}\n"
    )

    def config(*settings):
        base._data.cache_clear()  # a new process would read the folder again
        raw = tiny(*settings).model_dump(mode="json", by_alias=True)
        raw["data"] = {"kind": "folder", "root": str(folder)}
        from pipeline.config import from_mapping

        return from_mapping(raw)

    return folder, config


def test_new_names_between_old_ones_come_after_them(garden, seen_by_the_teacher):
    folder, config = garden
    extract(config())
    cluster(config())
    before = Store.open(config().cache_path).read_whole("tokens")
    for index, name in enumerate("ace"):
        picture(folder, name, 10 + index)
    del seen_by_the_teacher[:]
    grown = config()
    with pytest.raises(StaleCache, match=r"caches 3 images, garden lists 6.*'a'.*cli\.py extract"):
        cluster(grown)
    extract(grown)
    assert seen_by_the_teacher == ["a", "c", "e"]
    store = Store.open(grown.cache_path)
    assert store.samples == ["b", "d", "f", "a", "c", "e"]
    assert store.read_rows("tokens", [0, 1, 2]).tobytes() == before.tobytes()
    cluster(grown)
    assert verify(grown) == []
    extract(grown)
    cluster(grown)
    assert seen_by_the_teacher == ["a", "c", "e"]
    # A reader finds the image that a row was made from: row 3 is "a", the first of the listed ones.
    views = batches.CachedViews(grown, base.data_of(grown.data))
    assert [sample.id for sample in views.samples] == store.samples
    train(grown)


def test_a_removed_image_goes_out_of_use_and_comes_back(garden, seen_by_the_teacher):
    """Its row stays, marked in `status`; whatever reads the cache leaves it out, and nothing is computed again."""
    folder, config = garden
    extract(config())
    cluster(config())
    before = Store.open(config().cache_path).read_whole("tokens")
    kept = {path: path.read_bytes() for path in (folder / "images" / "d.png", folder / "masks" / "d.png")}
    for path in kept:
        path.unlink()
    with pytest.raises(StaleCache, match=r"'d', which garden no longer lists. Run `cli.py extract`"):
        cluster(config())
    del seen_by_the_teacher[:]
    assert extract(config())["not_listed"] == ["d"]
    assert cluster(config())["num_samples"] == 3
    store = Store.open(config().cache_path)
    assert store.samples == ["b", "d", "f"]
    assert store.read_whole("status").tolist() == [0, 2, 0]
    assert verify(config()) == []
    for path, content in kept.items():
        path.write_bytes(content)
    with pytest.raises(StaleCache, match=r"'d' was out of use, and garden lists it again"):
        cluster(config())
    assert extract(config())["not_listed"] == []
    cluster(config())
    store = Store.open(config().cache_path)
    assert store.read_whole("status").tolist() == [0, 0, 0]
    assert np.array_equal(store.read_whole("tokens"), before)
    assert seen_by_the_teacher == []
    assert verify(config()) == []


def test_a_changed_image_is_named_and_can_be_made_again(garden, seen_by_the_teacher):
    folder, config = garden
    extract(config())
    cluster(config())
    picture(folder, "d", 20)
    with pytest.raises(StaleCache, match=r"image 'd' has changed .* `cli.py extract --renew`") as caught:
        extract(config())
    assert "\n" not in str(caught.value)
    assert (config().cache_path / "extract.manifest.json").exists(), "an error must not change the cache"
    del seen_by_the_teacher[:]
    extract(config(), renew=True)  # as the line says
    assert seen_by_the_teacher == ["b", "d", "f"]
    before = records(config(), "cluster")
    cluster(config())
    assert records(config(), "cluster") != before
    assert verify(config()) == []


def test_a_changed_mask_is_clustered_again_without_the_teacher(garden, seen_by_the_teacher):
    folder, config = garden
    extract(config())
    cluster(config())
    before = Store.open(config().cache_path).read_whole("pseudo")
    Image.fromarray(np.full((64, 64), len(CLASSES) - 1, np.uint8)).save(folder / "masks" / "d.png")
    extract(config())
    cluster(config())
    assert seen_by_the_teacher == ["b", "d", "f"]
    after = Store.open(config().cache_path).read_whole("pseudo")
    assert (after[1, 0] > 0).all(), "all of d is unseen now"
    assert np.array_equal(after[[0, 2]], before[[0, 2]])


class Objects(ShardStage):
    """A stage on the clusters: how many potential objects each image has."""

    name, makes = "objects", "counted objects"

    def arrays(self, config):
        return ()

    def make(self, part):
        return Made({}, {"objects": [int(part.read("cluster", ["pseudo"])["pseudo"].max())]})

    def summary(self, run, stats):
        return {"objects": sum(part["objects"][0] for part in stats)}


def test_a_stage_on_stale_clusters_names_what_renews_them(garden, monkeypatch):
    folder, config = garden
    entry = Stage("objects", (), "cluster", work=f"{__name__}:Objects", in_cache=True, says={"summary?": dict})
    monkeypatch.setitem(table.STAGES, "objects", entry)
    monkeypatch.setattr(table, "IN_CACHE", (*table.IN_CACHE, "objects"))
    extract(config())
    cluster(config())
    assert run_stage("objects", config())["summary"]["objects"] == 0
    Image.fromarray(np.full((64, 64), len(CLASSES) - 1, np.uint8)).save(folder / "masks" / "d.png")
    with pytest.raises(StaleCache, match=r"labels of image 'd'.*Run `cli\.py cluster` again"):
        run_stage("objects", config())
    cluster(config())
    assert not (config().cache_path / "objects.manifest.json").exists(), "it stands on what was made again"
    assert run_stage("objects", config())["summary"]["objects"] > 0
    assert verify(config()) == []


def test_streaming_a_changed_mask_is_named(garden):
    folder, config = garden
    streaming = "cache.tokens=stream"
    extract(config(streaming))
    Image.fromarray(np.full((64, 64), 1, np.uint8)).save(folder / "masks" / "d.png")
    for run in (cluster, extract):
        with pytest.raises(StaleCache, match="'d' has changed"):
            run(config(streaming))


def test_damaged_rows_are_not_carried_over(garden):
    folder, config = garden
    extract(config())
    store = Store.open(config().cache_path)
    store.write_shard("cls", 0, store.read_shard("cls", 0) * 0)
    picture(folder, "g", 30)
    with pytest.raises(CorruptShard, match="'cls'"):
        extract(config())


def test_a_growth_that_was_killed_makes_the_new_rows_only(garden, seen_by_the_teacher, monkeypatch):
    folder, config = garden
    extract(config())
    picture(folder, "a", 30)
    wanted = Store.write_shard

    def killed(self, array, shard, block):
        if array == "tokens":
            raise KeyboardInterrupt
        return wanted(self, array, shard, block)

    with monkeypatch.context() as patched:
        patched.setattr(Store, "write_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            extract(config())
    del seen_by_the_teacher[:]
    extract(config())
    assert seen_by_the_teacher == ["a"]
    cluster(config())
    assert verify(config()) == []


def test_row_order_by_hand(garden):
    data = base.data_of(garden[1]().data)
    assert [s.id for s in in_row_order(data, [])] == ["b", "d", "f"]
    assert [s.id for s in in_row_order(data, ["f", "b"])] == ["f", "b", "d"]
    gone = in_row_order(data, ["b", "z", "y"])
    assert [(s.id, is_listed(s)) for s in gone] == [("b", 1), ("z", 0), ("y", 0), ("d", 1), ("f", 1)]
