"""How many files a newcomer visits who follows an image to its metric, and how many of them the config comes with.

Both are counted by running a small run under a profiler. A file is on an image's way when one of its functions holds an
array of two axes or more: pixels, labels, tokens, features, counts. Where something is written twice, plainly and fast,
the plain one counts; pictures for people are beside the way. The config's files
are those that are called with all of it.
"""

import sys
import threading
from collections import defaultdict
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch

from bench.small_run import small_config
from pipeline.cluster import cluster
from pipeline.config import Config
from pipeline.evaluate import evaluate
from pipeline.extract import extract
from pipeline.train import train
from tests.conftest import ROOT

ON_THE_WAY, WITH_CONFIG = 28, 10
PLAIN = ("cluster.backend=torch", "train.losses=plain")
SETTINGS = ("data.train=6", "eval.pictures=0", "train.warmup=0", "train.checkpoint_every=1", *PLAIN)
STAGES = {"extract": extract, "cluster": cluster, "train": train, "eval": evaluate}


@pytest.fixture(scope="module")
def visited(tmp_path_factory):
    """Files by stage: those on an image's way, and those with the config."""
    arrays, configs = defaultdict[str, set[str]](set), defaultdict[str, set[str]](set)
    config, ours = small_config(tmp_path_factory.mktemp("way"), *SETTINGS), f"{ROOT}/"
    now = ""

    def look(frame: FrameType, event: str, value: Any) -> None:
        path = frame.f_code.co_filename
        if event not in ("call", "return") or not path.startswith((f"{ours}pipeline/", f"{ours}cache/")):
            return
        for found in (*frame.f_locals.values(), value):
            if isinstance(found, np.ndarray | torch.Tensor) and found.ndim > 1 and "looking" not in path:
                arrays[now].add(path.removeprefix(ours))
            elif isinstance(found, Config) and event == "call":
                configs[now].add(path.removeprefix(ours))

    for name, run in STAGES.items():
        now = name
        threading.setprofile(look)
        sys.setprofile(look)
        try:
            run(config)
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
    return arrays, configs


def test_an_image_passes_few_files_on_its_way_to_its_metric(visited):
    files = set().union(*visited[0].values())
    assert len(files) <= ON_THE_WAY, sorted(files)


def test_the_config_visits_few_files_of_extract(visited):
    assert len(visited[1]["extract"]) <= WITH_CONFIG, sorted(visited[1]["extract"])
