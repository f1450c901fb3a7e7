"""Shared parts of the tests: a tiny random CLIP, tiny demo runs, and what stands for a user's shell."""

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"

TINY = [  # a demo that runs in seconds: 70 images are two shards, so a kill can fall between them
    "data.train=70",
    "data.test=6",
    "views.num=2",
    "train.iterations=6",
    "train.warmup=2",
    "train.batch=4",
    "train.checkpoint_every=3",
    "train.log_every=1",
    "student.encoder=tu-resnet10t",
    "report.images=3",
]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def tiny(tmp_path):
    """Builds the config of a tiny demo run under tmp_path."""
    from pipeline.config import load

    def build(*settings: str):
        return load(ROOT / "config" / "demo.yaml", [f"runs={tmp_path}/runs", *TINY, *settings])

    os.chdir(ROOT)
    return build


@pytest.fixture
def run_cli():
    """Runs cli.py as a user would; returns the finished process with its output."""

    def run(*arguments: object, **options: object) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)

    return run


def is_one_line_error(done: subprocess.CompletedProcess, *words: str) -> bool:
    """Exit code 2, one line that starts with `error:` and holds all the words, no traceback."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert len(lines) == 1, done.stderr
    assert all(word in lines[0] for word in words), lines[0]
    return True
