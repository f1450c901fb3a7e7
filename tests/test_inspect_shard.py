"""`inspect --shard`: what it prints is what is on the disk; and other tools open the cache with what docs give."""

import re
import socket

import numpy as np
import pytest
import zarr

from cache.ledger import Ledger
from cache.store import Store
from pipeline.config import UserError
from pipeline.report import inspect
from tests.conftest import ROOT, is_one_line_error
from tests.test_report import BROKEN, CHANNELS, TRAIN, make_cache, pseudo_of, tiny_config


@pytest.fixture
def config(tmp_path):
    config = tiny_config(tmp_path)
    make_cache(config, clustered=(0,))
    return config


def line(said: str, *words: str) -> list[str]:
    """The cells of the one line that begins with these words, behind the tree's branches."""
    found = [row.lstrip(" │├└─").split() for row in said.splitlines()]
    (row,) = [row for row in found if row[: len(words)] == list(words)]
    return row


def test_one_shard(config, capsys):
    inspect(config.run_path, shard=0)
    said = capsys.readouterr().out
    store = Store.open(config.cache_path)
    assert "shard 0 of 2, rows 0 to 63" in said
    entry = Ledger(config.cache_path, "extract").entry(0)
    origin = [entry["time"], socket.gethostname(), str(entry["pid"]), str(entry["seconds"]), "e0"]
    assert line(said, "extract") == ["extract", *origin]
    assert line(said, "cluster")[-1] == "c0"
    size = (store.data / "pseudo" / "c.0.0.0.0").stat().st_size
    digest = store.digest("pseudo", 0)
    assert line(said, "pseudo") == [
        "pseudo",
        *["64", "x", "2", "x", "8", "x", "8", "uint8"],
        str(size),
        digest,
        "as",
        "recorded",
    ]
    total = sum(store.size_bytes(name, 0) for name in ("view", "cls", "status", "pseudo"))
    assert f"({total} bytes)" in said
    assert line(said, "3", "train-00003")[2:4] == ["[truncated]", "file"]
    # Row 7: 7 % 3 = 1, so in each of two views of 8 x 8 tokens the upper half is ignored, two objects, 32
    # tokens; view 1's last column is padding, 4 of it above and 4 below: 60 annotated, 60 ignored, 8 padding.
    assert pseudo_of(7, 1)[:, -1].tolist() == [255] * 8
    assert line(said, "7", "train-00007")[2:] == ["ok", "2", "2", "60", "60", "8"]
    assert line(said, "6", "train-00006")[2:] == ["ok", "0", "0", "120", "0", "8"]


def test_a_shard_that_is_half_done(config, capsys):
    inspect(config.run_path, shard=1)
    said = capsys.readouterr().out
    assert "rows 64 to 65" in said
    assert line(said, "cluster")[1:3] == ["no", "record:"]
    assert line(said, "pseudo")[-2:] == ["not", "recorded"]
    assert line(said, "65", "train-00065")[2:] == ["ok", "-", "-", "-", "-"]


def test_a_shard_that_is_damaged(config, capsys):
    store = Store.open(config.cache_path)
    one, two = (store.data / "cls" / f"c.{shard}.0.0" for shard in (0, 1))
    (store.data / "view" / "c.0.0.0").unlink()
    two_bytes = two.read_bytes()
    assert len(two_bytes) < len(one.read_bytes())
    block = store.read_shard("cls", 0)
    block[5] = 1
    store.write_shard("cls", 0, block)
    inspect(config.run_path, shard=0)
    said = " ".join(capsys.readouterr().out.split())
    assert "CHANGED: not what was recorded" in said
    assert "DAMAGED: the file is missing or empty" in said


def test_a_shard_that_there_is_not(config, run_cli):
    with pytest.raises(UserError, match="no shard 2; there are 2, 0 to 1"):
        inspect(config.run_path, shard=2)
    done = run_cli("inspect", config.run_path, "--shard", -1)
    assert is_one_line_error(done, "no shard -1", "0 to 1")
    done = run_cli("inspect", config.run_path, "--shard", 0)
    assert done.returncode == 0, done.stderr
    assert "samples, 64" in done.stdout


# ---- what docs/cache.md tells readers to type ----------------------------------------------------


def recipe(word: str) -> str:
    """The code block of docs/cache.md that imports `word`, without napari, which needs a screen."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "cache.md").read_text(), re.DOTALL)
    (found,) = [block for block in blocks if f"import {word}" in block]
    return found


@pytest.mark.parametrize("word", ["zarr", "xarray"])
def test_the_cache_opens_as_the_docs_say(config, word, capsys):
    names: dict = {}
    exec(recipe(word).replace("runs/demo/cache", str(config.cache_path)), names)
    cache, store = names["cache"], Store.open(config.cache_path)
    if word == "xarray":
        assert cache.sizes["N"] == TRAIN
        assert names["usable"].shape == (TRAIN - 1, CHANNELS)
    for name in ("view", "cls", "status", "text"):
        assert np.array_equal(np.asarray(cache[name]), store.read_whole(name), equal_nan=True), name
    assert [str(sample) for sample in np.asarray(cache["sample"])] == store.samples
    assert cache.attrs["teacher"]["patch"] == 8
    assert np.array_equal(np.asarray(cache["pseudo"])[7], np.stack([pseudo_of(7, 0), pseudo_of(7, 1)]))
    assert np.isnan(np.asarray(cache["view"])[BROKEN]).all()


def test_the_recipe_for_napari_names_what_is_there(config):
    code = recipe("napari")
    (path,), (view,) = re.findall(r'"runs/demo/cache/([^"]+)"', code), re.findall(r"\[:, (\d)\]", code)
    labels = zarr.open_array(str(config.cache_path / path), mode="r")[:, int(view)]
    assert labels.shape == (TRAIN, 8, 8)
    assert labels.dtype == np.uint8, "napari's labels are integers"
