"""What a dry run says of memory: by hand, and against a training that is looked at while it runs."""

import re
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest

from pipeline.config import Train
from pipeline.learning.memory import LAUNCHER_BYTES, Forecast, views_to_keep
from tests.conftest import ROOT, TINY


def test_views_that_are_still_to_be_kept_by_hand():
    # 10 images of 2 views and 3 held out, 4 * 8^2 = 256 bytes each: 23 views. A process takes 4 / 2 a step.
    views = SimpleNamespace(size=8, rows=range(10), num_views=2, held_out=range(3))
    train = Train(batch=4, iterations=100)
    assert views_to_keep(views, train, 10**9, 2, 5) == 256 * (23 - 10)
    assert views_to_keep(views, train, 256 * 15, 2, 5) == 256 * 5
    assert views_to_keep(views, train, 256 * 15, 2, 10) == 0
    assert views_to_keep(views, Train(batch=4, iterations=7), 10**9, 2, 5) == 256 * (14 - 10)
    assert views_to_keep(views, train, 0, 2, 5) == 0


def test_a_sum_by_hand():
    # Two processes of 10 + 3 + 3 + 2, one copy of the student, 5, and the launcher.
    found = Forecast(2, own=10**9, loaders={1: 3 * 10**8, 2: 3 * 10**8}, views=2 * 10**8, saving=5 * 10**8)
    assert found.total == 2 * 1.8e9 + 0.5e9 + LAUNCHER_BYTES
    assert found.line().startswith("4.15 GB of the machine's at its peak, in each of 2 processes 1.00 GB")


def test_a_dry_run_foretells_the_memory_of_the_run(cached_demo, tmp_path):
    """A loader process beside the training, its peak as `ps` would show it: within 20 %."""
    settings = (f"runs={tmp_path}", f"cache.path={cached_demo}", *TINY, "train.workers=1")
    more = ("train.iterations=20", "train.checkpoint_every=10", "train.validate.fraction=0.2")
    arguments = [part for each in (*settings, *more) for part in ("--set", each)]
    command = [sys.executable, "cli.py", "train", *arguments]
    said = subprocess.run([*command, "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=True)
    foretold = float(re.search(r"memory ([\d.]+) GB of the machine's", said.stderr + said.stdout)[1])
    assert not (tmp_path / "demo").exists(), "it writes nothing"

    run = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    process, peak = psutil.Process(run.pid), 0
    while run.poll() is None:
        peak = max(peak, sum(map(resident_bytes, family(process))))
        time.sleep(0.05)
    assert run.returncode == 0
    assert foretold == pytest.approx(peak / 1e9, rel=0.2)


def family(process):
    try:
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def resident_bytes(process):
    try:
        return process.memory_info().rss
    except psutil.Error:  # has ended meanwhile
        return 0
