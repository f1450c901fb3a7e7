"""A stage that is new: one file, one entry of the table; the rest of the program knows it by that.

In a copy of the project a stage reduces the centroids of all views to one array, and goes through the command line, the
ledger, a kill, `verify`, `inspect` and Snakemake.
"""

import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from bench.small_run import small_arguments, small_config
from cache.errors import CorruptShard
from cache.ledger import Ledger, read_manifest
from cache.store import Store
from pipeline.cluster import cluster
from pipeline.data.base import data_of
from pipeline.extract import extract
from pipeline.running.shards import Part
from tests.conftest import ROOT

FILE = '''
"""How far apart potential objects lie: the standard deviation of all views' centroids, channel by channel."""

import pathlib
import time

import numpy as np

from pipeline.running.shards import Made, ShardStage


class Spread(ShardStage):
    name, makes = "spread", "a part in the spread"

    def make(self, part):
        if pathlib.Path("slow").exists():
            time.sleep(1)
        centroids = part.read("cluster", ["centroids"])["centroids"].astype(np.float64)
        rows = centroids.reshape(-1, centroids.shape[-1])
        rows = rows[~np.isnan(rows).any(1)]
        if part.tick:
            part.tick(len(part.samples))
        sums = {"sum": rows.sum(0).tolist(), "squares": (rows**2).sum(0).tolist()}
        return Made({}, {"count": [len(rows)], **sums})

    def reduce(self, run, store, stats):
        count, total, squares = (
            np.sum([part[key] for part in stats], axis=0) for key in ("count", "sum", "squares")
        )
        return {"spread": np.sqrt(squares / count - (total / count) ** 2).astype(np.float32)}

    def summary(self, run, stats):
        return {"objects": int(sum(part["count"][0] for part in stats))}
'''
ENTRY = """
    Stage(
        "spread",
        (),
        "cluster",
        work="pipeline.spread:Spread",
        help="How far apart potential objects lie.",
        specs=(
            ArraySpec(
                "spread", ("C",), "float32", float("nan"), "spread", "deviation of centroids", 0, is_sharded=False
            ),
        ),
        in_cache=True,
        says={"summary?": {"objects": int}},
    ),
"""
LAST = '    Stage("figures", ("report",), "eval", recipe="clip_teacher", writes_last="clusters.png"),\n'
PARTS = ("pipeline", "cache", "config", "profiles", "cli.py", "Snakefile")
SETTINGS = ("views.num=1", "cluster.debug=true")  # five shards; debug keeps centroids


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The copy, and a run's extraction and clusters in it."""
    folder = tmp_path_factory.mktemp("project")
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy2
        copy(ROOT / part, folder / part)
    table = folder / "pipeline" / "running" / "table.py"
    before = table.read_text()
    assert LAST in before
    table.write_text(before.replace(LAST, LAST + ENTRY.lstrip("\n")))
    (folder / "pipeline" / "spread.py").write_text(FILE.lstrip("\n"))
    config = small_config(folder, *SETTINGS)
    extract(config)
    cluster(config)
    return folder, config


def command(project, name, *words):
    config = ["--config", "config/demo.yaml", *small_arguments(project, *SETTINGS)[2:]]
    return [sys.executable, "cli.py", name, *(words or config)]


def run(project, name, *words):
    words = command(project, name, *words)
    return subprocess.run(words, cwd=project, capture_output=True, text=True, timeout=120)


def test_a_stage_is_one_file_and_one_entry(project):
    """Killed in the middle, resumed by the same command, done once, and its array what numpy makes of the centroids."""
    folder, config = project
    ledger = Ledger(config.cache_path, "spread")
    (folder / "slow").touch()
    begun = subprocess.Popen(command(folder, "spread"), cwd=folder, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not ledger.folder.exists() or not ledger.entries():
        assert begun.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    begun.send_signal(signal.SIGKILL)
    begun.wait()
    (folder / "slow").unlink()
    assert 0 < len(ledger.entries()) < 5
    assert read_manifest(config.cache_path / "spread.manifest.json") is None

    done = run(folder, "spread")
    assert done.returncode == 0, done.stderr
    assert "spread: resuming, " in done.stderr
    assert len(ledger.entries()) == 5
    assert "spread: nothing to do, 296 images have a part in the spread" in run(folder, "spread").stderr

    centroids = Store.open(config.cache_path).read_whole("centroids").astype(np.float64)
    rows = centroids.reshape(-1, centroids.shape[-1])
    wanted = rows[~np.isnan(rows).any(1)].std(0)
    found = np.frombuffer((config.cache_path / "data.zarr" / "spread" / "c.0").read_bytes()[: wanted.size * 4], "f4")
    assert np.allclose(found, wanted, rtol=1e-4, atol=1e-5)

    shown = run(folder, "inspect", "runs/small")
    assert shown.returncode == 0, shown.stderr
    assert "spread" in shown.stdout
    assert "How far apart potential objects lie." in run(folder, "spread", "--help").stdout


def test_verify_looks_at_it(project):
    folder, config = project
    assert run(folder, "spread").returncode == 0
    sound = run(folder, "verify")
    assert sound.returncode == 0, sound.stdout
    path = config.cache_path / "data.zarr" / "spread" / "c.0"
    kept = path.read_bytes()
    path.write_bytes(bytes([kept[0] ^ 1]) + kept[1:])
    hurt = run(folder, "verify")
    path.write_bytes(kept)
    assert hurt.returncode == 2
    assert "data.zarr/spread" in hurt.stdout


def test_it_is_refused_on_another_clustering(project):
    folder, _ = project
    assert run(folder, "spread").returncode == 0
    other = [*command(folder, "spread")[2:], "--set", "cluster.threshold=0.7"]
    refused = run(folder, *other)
    assert refused.returncode == 2
    assert "cluster.threshold was 0.8 and is 0.7. Run `cli.py cluster`" in refused.stderr


def test_a_stage_reads_whole_arrays_as_they_were_left(project):
    _, config = project
    store = Store.open(config.cache_path)
    part = Part(config, data_of(config.data), store, 0, [])
    assert np.array_equal(part.whole("text"), store.read_whole("text"))
    path = config.cache_path / "data.zarr" / "text" / "c.0.0"
    kept = path.read_bytes()
    path.write_bytes(bytes([kept[0] ^ 1]) + kept[1:])
    try:
        with pytest.raises(CorruptShard, match=r"data\.zarr/text"):
            part.whole("text")
    finally:
        path.write_bytes(kept)


def test_snakemake_knows_it(project):
    folder, config = project
    (config.cache_path / "spread.manifest.json").unlink(missing_ok=True)
    given = " ".join([f"runs={folder}/runs", *small_arguments(folder, *SETTINGS)[5::2]])
    words = [sys.executable, "-m", "snakemake", "spread", "--cores", "1", "--config", f"set={given}"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert (config.cache_path / "spread.manifest.json").is_file()
    again = subprocess.run([*words, "-n"], cwd=folder, capture_output=True, text=True, timeout=200)
    assert "Nothing to be done" in again.stdout + again.stderr
