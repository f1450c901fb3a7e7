"""The crash benches in small: kills and faults as bench/ deals them out, and that they can fail."""

import numpy as np
import pytest

from bench import command_kills, faults, kills
from cache.ledger import Ledger


@pytest.mark.parametrize("stage", kills.STAGES)
def test_nothing_is_lost_by_kills(stage, tmp_path):
    count = kills.kill_stage(stage, 2, 0, tmp_path, "data.train=136", "views.num=1")
    assert count.faults == []
    assert count.kills == 2
    assert count.rounds >= 1
    assert count.most_in_flight <= kills.IN_FLIGHT


@pytest.mark.parametrize("command", ["predict", "prepare", "report"])
def test_nothing_is_lost_by_kills_of_a_command(command, tmp_path):
    count = command_kills.kill_command(command, 2, 0, tmp_path)
    assert count.faults == []
    assert count.kills == 2


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    return faults.Damaged(tmp_path_factory.mktemp("damaged"), "data.train=72")  # two shards


@pytest.fixture
def mended(damaged):
    yield damaged
    damaged.mend()


@pytest.mark.parametrize("kind", faults.KINDS)
def test_every_fault_is_found_named_and_refused(mended, kind):
    count, missed = faults.inject(mended, kind, 6, 1, seed=2)
    assert missed == []
    assert (count.injected, count.found, count.named) == (6, 6, 6)
    assert count.refused == count.asked


def test_a_sound_cache_is_taken(mended):
    """What the two benches call a miss: no finding, no refusal; else they could not fail."""
    assert faults.verify(mended.cache) == []
    shard = next(shard for shard in mended.shards if shard.array == "tokens")
    assert not mended.differs(shard)
    assert "nothing to do" in mended.asked("extract", [shard])
    assert "exit code 0" in mended.asked("cluster", [shard])


def test_damage_that_the_kill_bench_would_see(mended):
    config = kills.small_config(mended.folder, *mended.settings)
    assert kills.wrong_shards(config, "extract") == []
    assert kills.rows_missing(mended.cache, kills.STAGES) == []
    before, sound = kills.records(config, "extract"), kills.content(config, "cluster")
    store = kills.Store.open(mended.cache)
    block = store.read_shard("cls", 1)
    block[3] = np.nan
    store.write_shard("cls", 1, block)
    assert kills.wrong_shards(config, "extract") == ["cls shard 1 is recorded, but not on the disk"]
    assert kills.rows_missing(mended.cache, kills.STAGES) == ["cls row 67"]
    assert kills.content(config, "cluster") != sound
    Ledger(mended.cache, "extract").path(0).unlink()
    count = kills.Count()
    kills.look_after_kill(count, config, "extract", before, {"train-00000", "train-00001", "train-00070"})
    assert count.faults == [
        "extract: record 00000.json changed or went",
        "extract: cls shard 1 is recorded, but not on the disk",
    ]
    assert (count.most_in_flight, count.images_redone, count.file_without_record) == (1, 2, 1)
