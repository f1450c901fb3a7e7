"""Shared parts of the tests: a tiny random CLIP, tiny demo runs, and what stands for a user's shell."""

import functools
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
def _fresh_process():
    """What a new process would start with: one thread, and no precision chosen yet."""
    torch.set_num_threads(1)
    forget_accelerator()


def forget_accelerator() -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def tiny(tmp_path):
    """Builds the config of a tiny demo run under tmp_path."""
    from pipeline.config import load

    def build(*settings: str):
        return load(ROOT / "config" / "demo.yaml", [f"runs={tmp_path}/runs", *TINY, *settings])

    os.chdir(ROOT)
    return build


@pytest.fixture(scope="session")
def cached_demo(tmp_path_factory):
    """The cache of a tiny demo run, extracted and clustered once; training only reads it."""
    from pipeline.cluster import cluster
    from pipeline.config import load
    from pipeline.extract import extract

    os.chdir(ROOT)
    config = load(ROOT / "config" / "demo.yaml", [f"runs={tmp_path_factory.mktemp('cached')}", *TINY])
    extract(config)
    cluster(config)
    return config.cache_path


@dataclass
class Said:
    """What a command left behind, as subprocess.CompletedProcess has it."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run_cli(capsys, monkeypatch):
    """Runs cli.py as a user would, in this process (starting torch takes seconds) but with nothing remembered.

    `commands` are another Typer app's, such as those of `python -m evidence`; `folder` is where it is run.
    """
    import cli
    from pipeline.data import base
    from pipeline.teaching import encode

    def run(*arguments: object, commands: Any = cli.app, folder: Path = ROOT) -> Said:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["cli.py", *map(str, arguments)])
        base._data.cache_clear()
        encode._teacher.cache_clear()
        encode._second.cache_clear()
        forget_accelerator()
        capsys.readouterr()
        try:
            cli.main(commands)
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        said = capsys.readouterr()
        return Said(code, said.out, said.err)

    return run


@pytest.fixture
def run_evidence(run_cli):
    """The same of `python -m evidence`."""
    from evidence.__main__ import app

    return functools.partial(run_cli, commands=app)


def is_one_line_error(done: Any, *words: str) -> bool:
    """Exit code 2, one line that starts with `error:` and holds all the words, no traceback."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert len(lines) == 1, done.stderr
    assert all(word in lines[0] for word in words), lines[0]
    return True
