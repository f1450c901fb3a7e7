"""Whatever starts processes can be killed with SIGKILL, and nothing of what it started is left."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.conftest import ROOT, TINY

STARTED_S, GONE_S = 60.0, 6.0


def session_of(leader):
    """All living processes of a session but its leader."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader.pid and process.pid != leader.pid:
                found += [process] * (process.status() != psutil.STATUS_ZOMBIE)
        except (OSError, psutil.Error):
            continue  # has ended meanwhile
    return found


def spawned(leader):
    """Those that hold our code: multiprocessing's, and training processes."""
    return [p for p in session_of(leader) if {"--multiprocessing-fork", "cli.py"} & set(words(p))]


def words(process):
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def leaves_nobody(command, num, *, wait_s=0.0, **options):
    """Starts a command in a session of its own, kills it once it has started `num` processes, looks who is left."""
    leader = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, **options
    )
    try:
        deadline = time.monotonic() + STARTED_S
        while len(spawned(leader)) < num:
            assert leader.poll() is None, leader.stderr.read().decode()
            assert time.monotonic() < deadline, "nothing was started"
            time.sleep(0.1)
        time.sleep(wait_s)
        assert leader.poll() is None, leader.stderr.read().decode()
        leader.kill()
        leader.wait()
        deadline = time.monotonic() + GONE_S
        while (left := session_of(leader)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left, [words(process) for process in left]
    finally:
        for process in session_of(leader):
            process.send_signal(signal.SIGKILL)
        leader.kill()
        leader.wait()
    return True


def arguments(folder, *settings):
    wanted = (f"runs={folder}", *TINY, "train.iterations=100000", "train.warmup=2", *settings)
    return [part for setting in wanted for part in ("--set", setting)]


@pytest.mark.parametrize("wait_s", [0.0, 12.0], ids=["while they start", "at work"])
def test_loaders_of_a_killed_training(cached_demo, tmp_path, wait_s):
    command = ["cli.py", "train", *arguments(tmp_path, f"cache.path={cached_demo}", "train.workers=1")]
    assert leaves_nobody(command, 1, wait_s=wait_s)


def test_training_processes_and_their_loaders(cached_demo, tmp_path):
    settings = (f"cache.path={cached_demo}", "train.processes=2", "train.workers=1")
    assert leaves_nobody(["cli.py", "train", *arguments(tmp_path, *settings)], 3)


@pytest.mark.parametrize("wait_s", [0.0, 8.0], ids=["while they start", "at work"])
def test_dask_workers_of_a_killed_extraction(tmp_path, wait_s):
    command = ["cli.py", "extract", *arguments(tmp_path, "data.train=100000"), "--workers", "2"]
    assert leaves_nobody(command, 2, wait_s=wait_s)


def test_what_accelerate_has_launched(cached_demo, tmp_path):
    command = ["-m", "accelerate.commands.launch", "--cpu", "cli.py", "train"]
    # accelerate doesn't tell its processes who it is: it must live until they have asked (half a second).
    assert leaves_nobody([*command, *arguments(tmp_path, f"cache.path={cached_demo}")], 1, wait_s=5.0)


def test_a_stage_whose_shell_is_left_behind(cached_demo, tmp_path):
    """Snakemake, say, is killed, and its shell waits on: the environment says whom the stage is for."""
    script = tmp_path / "runner.py"
    command = ["cli.py", "train", *arguments(tmp_path, f"cache.path={cached_demo}")]
    script.write_text(
        "import os, subprocess\n"
        "os.environ['CLIPTEACHER_PARENT'] = str(os.getpid())\n"
        f"subprocess.run(['sh', '-c', '\"$@\"; true', 'sh', {sys.executable!r}, *{command!r}])\n"
    )
    assert leaves_nobody([str(script)], 1)
