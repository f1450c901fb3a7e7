"""What becomes of dense tokens: kept as float16 or int8, or streamed; what each costs and changes."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from cache.errors import CacheError, CorruptShard
from cache.store import Store
from pipeline.cluster import cluster
from pipeline.extract import audit, extract
from pipeline.ops.quantise import dequantised, quantised
from pipeline.teaching.encode import STORAGE, STREAM
from pipeline.verify import verify
from tests.conftest import ROOT, TINY

SMALL = [*TINY, "data.train=66", "views.num=1"]  # two shards
# Bytes a view at C = 512 and 32 x 32 tokens, CLS and pseudo labels included.
BUDGETS = {"float16": 1_060_000, "int8": 540_000, STREAM: 2_600}


def test_quantised_by_hand():
    # The largest is 2.54, so the scale is 0.02: -2.54 -> -127, 0.029 -> 1.45 -> 1, 1 -> 50.
    numbers, scale = quantised(torch.tensor([[-2.54, 0.029, 1.0], [0.0, 0.0, 0.0]]))
    assert numbers.tolist() == [[-127, 1, 50], [0, 0, 0]]
    assert scale.tolist() == pytest.approx([0.02, 1.0])
    assert dequantised(numbers, scale)[0].tolist() == pytest.approx([-2.54, 0.02, 1.0])


def test_quantised_costs_a_cosine_of_3e_5():
    """Gaussian values, C = 512: a step is max / 127, about 3.1 / 127 sigma, and half of step^2 / 12 is 2.5e-5."""
    tokens = torch.randn(4000, 512, generator=torch.Generator().manual_seed(0))
    error = 1 - cosine_similarity(tokens.double(), dequantised(*quantised(tokens)).double(), dim=-1)
    assert 1.5e-5 < error.mean() < 4e-5
    assert error.max() < 1e-4


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-60000, 60000, width=16), min_size=1, max_size=8))
def test_any_token_comes_back_within_half_a_step(values):
    token = torch.tensor(values)
    numbers, scale = quantised(token)
    assert numbers.abs().max() <= 127
    assert ((dequantised(numbers, scale) - token).abs() <= 0.5001 * scale + 1e-38).all()


def test_what_is_not_finite_shows_in_the_scale():
    for bad in (float("nan"), float("inf")):
        assert not torch.isfinite(quantised(torch.tensor([[1.0, bad]]))[1]).any()


CLUSTERED = [tokens for tokens in STORAGE if tokens != "pooled"]


@pytest.mark.parametrize("tokens", CLUSTERED)
def test_bytes_per_view_at_vit_b16(tokens, tmp_path):
    """Random values, which no codec makes smaller; 16 images of 4 views."""
    num, sizes = 16, {"N": 16, "V": 4, "C": 512, "h": 32, "w": 32, "K": 171}
    storage, rng = STORAGE[tokens], np.random.default_rng(0)
    names = ["view", "cls", "status", "pseudo", *(storage.arrays if storage.is_kept else ())]
    store = Store.create(
        tmp_path,
        sizes=sizes,
        arrays=names,
        samples=[f"COCO_train2014_{row:012d}" for row in range(num)],
        attributes={},
        dtypes=storage.dtypes,
    )
    for name in names:
        spec = store.spec(name)
        values = rng.integers(0, 58, spec.shape(sizes), np.uint8).astype(spec.dtype)
        store.write_shard(name, 0, values)
        assert np.array_equal(store.read_shard(name, 0), values)
    on_disk = sum(file.stat().st_size for name in names for file in (store.data / name).iterdir())
    assert on_disk / (num * sizes["V"]) <= BUDGETS[tokens]
    if storage.is_kept:  # the tokens alone: no budget is met by leaving something out
        assert on_disk / (num * sizes["V"]) > {"float16": 2, "int8": 1}[tokens] * 32 * 32 * 512


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The same tiny data set extracted and clustered in each way."""
    from pipeline.config import load

    os.chdir(ROOT)
    folder, configs = tmp_path_factory.mktemp("runs"), {}
    for tokens in CLUSTERED:
        config = load(
            ROOT / "config" / "demo.yaml", [f"runs={folder}", f"name={tokens}", f"cache.tokens={tokens}", *SMALL]
        )
        extract(config)
        cluster(config)
        configs[tokens] = config
    return configs


def array(config, name):
    return Store.open(config.cache_path).read_whole(name)


@pytest.mark.parametrize("tokens", CLUSTERED)
def test_the_doctor_predicts_what_inspect_finds(made, tokens):
    """Within 3 %, pseudo labels estimated; 66 images, so a short shard too."""
    from pipeline.looking.facts import array_facts, bytes_per_view
    from pipeline.looking.forecast import forecast
    from pipeline.models.teacher import shape_of

    config = made[tokens]
    store = Store.open(config.cache_path)
    facts = array_facts(config, store)
    shape = shape_of(config.teacher.model, config.teacher.pretrained)
    expected = forecast(config, shape, 66, 20, tokens)
    assert expected.per_view == pytest.approx(bytes_per_view(facts), rel=0.03)
    assert expected.arrays.keys() == {fact.name for fact in facts} - {"text"}
    assert all(expected.arrays[f.name] >= f.size_bytes for f in facts if f.name in ("centroids", "pseudo_raw"))
    on_disk = sum(file.stat().st_size for file in config.cache_path.rglob("*") if file.is_file())
    assert expected.total >= 0.97 * on_disk


def test_streaming_changes_no_pseudo_label(made):
    kept, streamed = made["float16"], made[STREAM]
    assert not Store.open(streamed.cache_path).has("tokens")
    for name in ("pseudo", "pseudo_raw", "centroids", "cls", "view"):
        assert array(kept, name).tobytes() == array(streamed, name).tobytes(), name
    summaries = [json.loads((c.cache_path / "cluster.manifest.json").read_text()) for c in (kept, streamed)]
    assert summaries[0]["summary"] == summaries[1]["summary"]


def test_int8_changes_few_pseudo_labels(made):
    store = Store.open(made["int8"].cache_path)
    assert (store.spec("tokens").dtype, store.spec("tokens").fill) == ("int8", -128)
    tokens = torch.from_numpy(array(made["float16"], "tokens")).float()
    numbers, scale = (torch.from_numpy(array(made["int8"], name)) for name in ("tokens", "token_scale"))
    error = 1 - cosine_similarity(tokens.double(), dequantised(numbers, scale).double(), dim=-1)
    assert error.mean() < 5e-5
    one, two = (array(made[name], "pseudo") for name in ("float16", "int8"))
    assert ((one == 0) == (two == 0)).all()  # the ignored area is the mask's, not the tokens'
    assert (one == two).mean() > 0.95


def test_each_way_verifies_and_has_nothing_more_to_do(made):
    for config in made.values():
        assert verify(config) == []
        before = {p: p.stat().st_mtime_ns for p in config.cache_path.rglob("*")}
        extract(config)
        cluster(config)
        assert before == {p: p.stat().st_mtime_ns for p in config.cache_path.rglob("*")}


def test_audit_says_what_it_compares(made):
    lines = {tokens: audit(config, 3) for tokens, config in made.items()}
    assert "kept as float16): largest difference 0, lowest cosine 1.000000" in lines["float16"]
    assert "tokens (kept as int8)" in lines["int8"]
    assert "lowest cosine 0.9999" in lines["int8"]
    assert "tokens not compared, they are not kept (cache.tokens: stream)" in lines[STREAM]


def test_audit_fails_on_another_teachers_tokens(made, monkeypatch):
    monkeypatch.setattr("pipeline.extract._vectors", lambda store, name, rows: np.ones(store_shape(store, name, rows)))
    with pytest.raises(CorruptShard, match=r"want at least 0\.999"):
        audit(made["int8"], 2)


def store_shape(store, name, rows):
    return (len(rows), *store.spec(name).shape(store.sizes)[1:])


def test_another_storage_is_another_extraction(made):
    config = made["float16"]
    for tokens in ("int8", STREAM):
        other = config.model_copy(update={"cache": config.cache.model_copy(update={"tokens": tokens})})
        with pytest.raises(CacheError, match=r"float16.*" + tokens):
            extract(other)


def test_streaming_the_split_enters_at_extract(made):
    """The pseudo labels are extract's there, so another split or lambda is another extraction; kept, only cluster's."""
    from pipeline.config import from_mapping
    from pipeline.running.table import config_fingerprint

    for tokens, is_same in (("float16", True), (STREAM, False)):
        raw = made[tokens].model_dump(mode="json", by_alias=True)
        for change in ("data.unseen=[bee]", "cluster.threshold=0.7"):
            other = from_mapping(raw, [change])
            same = config_fingerprint(made[tokens], "extract") == config_fingerprint(other, "extract")
            assert same == is_same


def test_a_streamed_pseudo_label_that_changed_is_noticed(made, tmp_path):
    import shutil

    config = made[STREAM].model_copy(update={"runs": str(tmp_path)})
    shutil.copytree(made[STREAM].cache_path, config.cache_path)
    (config.cache_path / "cluster.manifest.json").unlink()
    (config.cache_path / "ledger" / "cluster" / "00001.json").unlink()
    store = Store.open(config.cache_path)
    store.write_shard("pseudo", 1, store.read_shard("pseudo", 1) * 0)
    with pytest.raises(CorruptShard, match="shard 1 of 'pseudo'"):
        cluster(config)


def test_a_killed_streaming_extract_resumes(made, tmp_path):
    settings = [f"runs={tmp_path}", "name=stream", "cache.tokens=stream", *SMALL]
    command = [sys.executable, ROOT / "cli.py", "extract", "--config", ROOT / "config" / "demo.yaml"]
    command = [*map(str, command), *(word for setting in settings for word in ("--set", setting))]
    cache = tmp_path / "stream" / "cache"
    first = cache / "ledger" / "extract" / "00000.json"
    started = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not first.exists() and time.time() < deadline:
        time.sleep(0.005)
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    assert not (cache / "extract.manifest.json").exists(), "the kill came too late to test anything"
    config = made[STREAM].model_copy(update={"runs": str(tmp_path)})
    extract(config)
    cluster(config)
    for stage in ("extract", "cluster"):
        manifests = [(c.cache_path / f"{stage}.manifest.json").read_bytes() for c in (config, made[STREAM])]
        assert manifests[0] == manifests[1]


def test_pooled_tokens_are_the_mean_and_cannot_be_clustered(made, tmp_path):
    from pipeline.config import ConfigError, load

    settings = [f"runs={tmp_path}", "name=pooled", "recipe=clip_es", "cache.tokens=pooled", *SMALL]
    config = load(ROOT / "config" / "demo.yaml", settings)
    extract(config)
    assert not Store.open(config.cache_path).has("tokens")
    mean = array(made["float16"], "tokens").astype(np.float32).mean((2, 3))
    assert np.abs(array(config, "pooled").astype(np.float32) - mean).max() < 5e-3
    assert "not compared" in audit(config, 1)
    with pytest.raises(ConfigError, match="pooled keeps no dense tokens"):
        load(ROOT / "config" / "demo.yaml", [*settings, "recipe=clip_teacher"])
