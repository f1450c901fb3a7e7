"""What `cluster` predicts: by hand on made-up summaries, and on the demo's cache under good and bad settings."""

import json
import shutil

import numpy as np
import pytest

from pipeline.cluster import summarise
from pipeline.config import Cluster
from pipeline.teaching.verdict import signs, verdict
from tests.conftest import ROOT, TINY

HEALTHY = {
    "views": 10,
    "objects_histogram": {"0": 4, "1": 1, "4": 4, "8": 1},
    "coverage": 24.0,
    "tokens_per_mask": 20.0,
    "largest_mask_share": 75.0,
    "purity": 98.0,
}


def kinds(section=None, **changed):
    return [complaint.kind for complaint in verdict(HEALTHY | changed, section or Cluster())]


def test_signs_by_hand():
    # Six views have an ignored area, with 1 + 16 + 8 = 25 objects; one of the six has a single one, four of ten none.
    assert signs(HEALTHY) == {"objects": 25 / 6, "single": 100 / 6, "empty": 40}


def test_complaints_by_hand():
    assert kinds() == []
    assert kinds(purity=None) == []
    assert kinds(objects_histogram={"0": 10}, coverage=0.0, tokens_per_mask=0, purity=None) == ["no ignored area"]
    assert kinds(coverage=4.9) == ["little ignored area"]
    assert kinds(coverage=100.0) == ["no seen label"]
    assert kinds(objects_histogram={"1": 8, "2": 1}, largest_mask_share=99) == ["few objects"]
    assert kinds(largest_mask_share=88.1) == ["one giant object"]
    assert kinds(objects_histogram={"10": 6}) == ["splinters"]
    assert kinds(objects_histogram={"0": 50, "9": 6}) == []  # views without an ignored area don't count
    assert kinds(purity=94.9) == ["mixed objects"]
    assert kinds(views=0, objects_histogram={}, coverage=0.0) == []


def test_the_knob_is_the_one_that_was_turned():
    few = HEALTHY | {"objects_histogram": {"1": 9}}
    (windows,) = verdict(few, Cluster(sizes=(1,)))
    assert "cluster.sizes is [1]" in windows.todo
    (merging,) = verdict(few, Cluster(threshold=0.3))
    assert "raise cluster.threshold, now 0.3" in merging.todo
    (tokens,) = verdict(few, Cluster(sizes=(1,), window="tokens"))  # windows of one token are many
    assert "cluster.threshold" in tokens.todo


BAD = {
    "": [],
    "cluster.threshold=0.99": ["splinters", "lower cluster.threshold, now 0.99"],
    "cluster.threshold=0.1": ["few objects", "raise cluster.threshold, now 0.1"],
    "cluster.sizes=[1]": ["few objects", "cluster.sizes is [1]"],
    "data.unseen=[]": ["no ignored area", "data.unseen"],
    "data.unseen=[zebra]": ["little ignored area", "views.num"],
}


@pytest.mark.parametrize("setting", BAD)
def test_the_demos_cache_under_good_and_bad_settings(cached_demo, run_cli, tmp_path, setting):
    shutil.copytree(cached_demo, tmp_path / "cache")
    settings = [f"runs={tmp_path}/runs", *TINY, f"cache.path={tmp_path}/cache", *([setting] if setting else [])]
    words = [word for one in settings for word in ("--set", one)]
    (tmp_path / "cache" / "cluster.manifest.json").unlink()
    done = run_cli("cluster", "--config", ROOT / "config" / "demo.yaml", *words)
    assert done.returncode == 0, done.stderr
    kept = json.loads((tmp_path / "cache" / "cluster.manifest.json").read_text())["summary"]["verdict"]
    lines = [line for line in done.stderr.splitlines() if line.startswith("trouble ahead: ")]
    assert lines == [f"trouble ahead: {line}" for line in kept]
    if not setting:
        assert kept == []
        assert "nothing here predicts trouble" in done.stderr
    else:
        assert kept[0].startswith(f"{BAD[setting][0]}: ")
        assert BAD[setting][1] in kept[0]


def test_a_summary_without_views_is_summed_up():
    parts = [{"objects": [0, 0], "tokens": [0, 0, 0], "masks": [0], "largest": [0], "majority": [0], "known": [0]}]
    summary = summarise(parts)
    assert verdict(summary, Cluster()) == []
    assert np.isclose(signs(summary)["objects"], 0)
