"""Both teachers as one: potential objects named by image-level labels and CLIP-ES's maps."""

import numpy as np
import pytest
import torch

from cache.store import Store
from pipeline.cluster import cluster
from pipeline.data.base import data_of, open_data_set
from pipeline.extract import extract
from pipeline.learning.batches import CachedViews, Place
from pipeline.ops.masks import named_labels
from pipeline.running.table import config_fingerprint
from pipeline.teaching.names import UNNAMED, named, on_tokens
from pipeline.train import train
from tests.conftest import TINY, is_one_line_error

TAGGED = ("cluster.named_above=0.3", "views.num=2", "cams.max_side=128", "cams.blocks=4")


def test_a_mask_gets_the_tag_that_is_highest_over_it():
    # Two masks on 2 x 3 tokens. Means of tags 7 and 9: mask 1 has 0.4 and 0.2, mask 2 has 0.1 and 0.25.
    pseudo = np.array([[1, 1, 0], [2, 2, 255]], np.uint8)
    maps = np.array([[[0.3, 0.5, 1], [0.1, 0.1, 1]], [[0.2, 0.2, 1], [0.5, 0.0, 1]]], np.float32)
    assert named(pseudo, maps, [7, 9], 3, 0.0).tolist() == [7, 9, UNNAMED]
    assert named(pseudo, maps, [7, 9], 3, 0.3).tolist() == [7, UNNAMED, UNNAMED]


def test_a_whole_images_map_at_a_views_tokens():
    # A map that grows by 1 a column, 4 columns over 8 pixels: at pixel x it is (x - 1) / 2, and 0 or 3 beyond.
    maps = torch.arange(4.0).expand(1, 4, 4)
    found = on_tokens(maps, np.array([2, 2, 6, 6], np.float32), (8, 8), 2)
    torch.testing.assert_close(found, torch.tensor([[[1.0, 2.0], [1.0, 2.0]]]))
    beyond = on_tokens(maps, np.array([-8, 0, 16, 8], np.float32), (8, 8), 3)
    torch.testing.assert_close(beyond[0, 0], torch.tensor([0.0, 1.5, 3.0]))


def test_named_objects_become_labels():
    labels = torch.tensor([[3, 255, 255, 255], [255, 255, 255, 255]], dtype=torch.uint8)
    pseudo = torch.tensor([[1, 2]], dtype=torch.uint8)
    found, left = named_labels(labels, pseudo, torch.tensor([8, 255], dtype=torch.uint8))
    assert found.tolist() == [[3, 8, 255, 255], [8, 8, 255, 255]]
    assert left.tolist() == [[0, 2]]
    assert labels[1, 0] == 255, "what came in stays as it was"
    assert pseudo[0, 0] == 1


@pytest.fixture(scope="module")
def tagged(tmp_path_factory):
    from pipeline.config import load
    from tests.conftest import ROOT

    runs = tmp_path_factory.mktemp("tagged")
    config = load(ROOT / "config" / "demo.yaml", [f"runs={runs}", *TINY, *TAGGED])
    extract(config)
    cluster(config)
    return config


def test_a_cache_with_names(tagged):
    data, store = data_of(tagged.data), Store.open(tagged.cache_path)
    pseudo, names = (store.read_rows(name, np.arange(70)) for name in ("pseudo", "named"))
    num_named = num_right = 0
    for row, sample in enumerate(data.samples("train")):
        tags = {tag for tag in data.tags(sample) if tag in data.unseen_ids}
        found = set(np.unique(names[row]).tolist()) - {UNNAMED}
        assert found <= tags, "only what the image is tagged with"
        truth = data.labels(sample).reshape(16, 8, 16, 8)
        for mask, name in enumerate(names[row, 0].tolist(), 1):
            inside = pseudo[row, 0] == mask
            if name == UNNAMED or not inside.any():
                assert name == UNNAMED or inside.any(), "no name without an object"
                continue
            num_named += 1
            num_right += np.bincount(truth.transpose(0, 2, 1, 3)[inside].ravel()).argmax() == name
    assert num_named > 50
    assert num_right / num_named > 0.75, "two tags at random: about 0.7 of all objects"


def test_training_is_told_the_tagged_classes(tagged):
    views = CachedViews(tagged, data_of(tagged.data))
    unseen = set(views.data.unseen_ids)
    item = [views[Place(row, 0, 0, 0)] for row in range(20)]
    taught = {int(label) for each in item for label in each["labels"].unique()} & unseen
    assert taught
    assert views.taught_ids == tuple(range(len(views.data.classes)))
    train(tagged)


def test_names_change_cluster_and_what_is_below_alone(tagged, tiny):
    plain, named = (tiny(f"cluster.named_above={value}", "cams.blocks=4") for value in ("null", "0.3"))
    other = tiny("cluster.named_above=0.3", "cams.blocks=2")
    assert config_fingerprint(plain, "extract") == config_fingerprint(named, "extract")
    prints = {config_fingerprint(config, "cluster") for config in (plain, named, other)}
    assert len(prints) == 3
    assert config_fingerprint(plain, "cluster") == config_fingerprint(tiny("cams.blocks=2"), "cluster")


def test_streamed_tokens_are_refused(run_cli, tmp_path):
    settings = [f"runs={tmp_path}", *TINY, "cluster.named_above=0.3", "cache.tokens=stream"]
    done = run_cli("cluster", *(word for setting in settings for word in ("--set", setting)))
    assert is_one_line_error(done, "cluster.named_above", "cache.tokens")


def test_tags_of_a_folder(tmp_path):
    from PIL import Image

    for name in ("a", "b"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "dataset.yaml").write_text(
        "classes: [apple, pear]\nunseen: [pear]\ntrain: {images: '*.png'}\ntags: tags.yaml\n"
    )
    (tmp_path / "tags.yaml").write_text("a: [pear]\nb:\n")
    data = open_data_set("folder", root=str(tmp_path))
    first, second = data.samples("train")
    assert (data.tags(first), data.tags(second)) == ((1,), ())
    before = data.mask_stamp(first)
    (tmp_path / "tags.yaml").write_text("a: [apple, pear]\n")
    data = open_data_set("folder", root=str(tmp_path))
    assert data.mask_stamp(first) != before, "another tag is noticed"
    with pytest.raises(ValueError, match="'b' is not in the list"):
        data.tags(second)
    (tmp_path / "tags.yaml").write_text("a: [pearl]\n")
    with pytest.raises(ValueError, match=r"pearl.*nearest valid one is 'pear'"):
        open_data_set("folder", root=str(tmp_path))
