"""The demo on a tiny config end to end: twice, killed in the middle, and resumed in training."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from cache.store import Store
from pipeline.learning.checkpoint import load_student
from tests.conftest import ROOT, TINY

CONFIG = ["--config", ROOT / "config" / "demo.yaml"]


def options(folder, *settings):
    return [*CONFIG, *(word for s in (f"runs={folder}", *TINY, *settings) for word in ("--set", s))]


def digests(cache, stage):
    entries = [json.loads(p.read_text()) for p in sorted((cache / "ledger" / stage).glob("*.json"))]
    return [entry["digests"] for entry in entries]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny demo run through the CLI, stage by stage."""
    folder = tmp_path_factory.mktemp("runs")
    said = {}
    for stage in ("extract", "cluster", "train", "eval"):
        command = [sys.executable, ROOT / "cli.py", stage, *options(folder)]
        done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said[stage] = done.stderr
    return folder, said


def test_the_run_folder_is_what_other_tools_rely_on(finished):
    folder, said = finished
    run = folder / "demo"
    for name in (
        "cache/data.zarr",
        "cache/ledger",
        "cache/lock",
        "cache/extract.manifest.json",
        "cache/cluster.manifest.json",
        "train/train.manifest.json",
        "train/student.safetensors",
        "train/checkpoint-000003",
        "eval/metrics.json",
        "config.yaml",
    ):
        assert (run / name).exists(), name
    assert list((run / "train").glob("**/events.out.tfevents.*"))
    metrics = json.loads((run / "eval" / "metrics.json").read_text())
    assert set(metrics) >= {"pAcc", "mIoU_S", "mIoU_U", "hIoU", "per_class", "gamma", "gamma_sweep"}
    assert metrics["gamma_sweep"]["1.5"]["hIoU"] == metrics["hIoU"]
    assert len(metrics["per_class"]) == 20
    assert "purity" in said["cluster"]


def test_the_cache_holds_every_array_whole(finished):
    store = Store.open(finished[0] / "demo" / "cache")
    assert store.num_samples == 70
    assert store.num_shards == 2
    rows = np.arange(70)
    assert np.isfinite(store.read_rows("tokens", rows)).all()
    pseudo = store.read_rows("pseudo", rows)
    assert not (pseudo == 254).any()
    assert (pseudo[:, 0] > 0).any(), "no potential object anywhere"
    assert np.allclose(np.linalg.norm(store.read_whole("text"), axis=1), 1, atol=1e-5)
    view = store.read_rows("view", rows)
    assert (view[:, 0] == [0, 0, 128, 128]).all()


def test_centroids_are_the_mean_tokens_of_their_masks(finished):
    store = Store.open(finished[0] / "demo" / "cache")
    tokens, pseudo, centroids = (store.read_rows(n, [3])[0, 0] for n in ("tokens", "pseudo", "centroids"))
    tokens = tokens.astype(np.float32)
    tokens /= np.linalg.norm(tokens, axis=-1, keepdims=True)
    count = int(pseudo[pseudo < 254].max())
    for mask in range(1, count + 1):
        assert np.allclose(centroids[mask - 1], tokens[pseudo == mask].mean(0), atol=2e-3)
    assert np.isnan(centroids[count:]).all()


def test_a_second_run_does_nothing(finished, run_cli):
    folder, _ = finished
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    for stage in ("extract", "cluster", "train", "eval"):
        done = run_cli(stage, *options(folder))
        assert done.returncode == 0, done.stderr
        assert "nothing to do" in done.stderr
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_verify_finds_a_sound_cache_and_a_flipped_bit(finished, run_cli, tmp_path):
    import shutil

    folder, _ = finished
    assert run_cli("verify", *options(folder)).returncode == 0
    shutil.copytree(folder, tmp_path / "runs")
    shard = tmp_path / "runs" / "demo" / "cache" / "data.zarr" / "pseudo" / "c"
    file = next(p for p in sorted(shard.parent.rglob("*")) if p.is_file() and p.name != "zarr.json")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    done = run_cli("verify", *options(tmp_path / "runs"))
    assert done.returncode == 2
    assert "pseudo" in done.stdout
    assert run_cli("train", *options(tmp_path / "runs", "train.seed=5")).returncode == 2


def test_audit_recomputes_rows_to_the_bit(finished, run_cli):
    done = run_cli("extract", *options(finished[0]), "--audit", 3)
    assert done.returncode == 0, done.stderr
    assert "audit of 3 rows" in done.stderr


def test_a_killed_extract_resumes_and_ends_with_the_same_bytes(finished, tmp_path):
    command = list(map(str, [sys.executable, ROOT / "cli.py", "extract", *options(tmp_path)]))
    first = tmp_path / "demo" / "cache" / "ledger" / "extract" / "00000.json"
    started = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not first.exists() and time.time() < deadline:
        time.sleep(0.005)
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    kept = first.stat().st_mtime_ns
    manifest = tmp_path / "demo" / "cache" / "extract.manifest.json"
    assert not manifest.exists(), "the kill came too late to test anything"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "resuming, 64 of 70" in done.stderr
    assert first.stat().st_mtime_ns == kept, "a finished shard was made again"
    whole = finished[0] / "demo" / "cache"
    assert digests(tmp_path / "demo" / "cache", "extract") == digests(whole, "extract")
    assert json.loads(manifest.read_text()) == json.loads((whole / "extract.manifest.json").read_text())


def test_resumed_training_is_the_uninterrupted_one(finished, tmp_path, run_cli):
    """From the checkpoint of iteration 3 on: the same losses and, bitwise, the same student."""
    import shutil

    folder, _ = finished
    shutil.copytree(folder, tmp_path / "runs")
    train = tmp_path / "runs" / "demo" / "train"
    (train / "train.manifest.json").unlink()
    (train / "student.safetensors").unlink()
    done = run_cli("train", *options(tmp_path / "runs"))
    assert done.returncode == 0, done.stderr
    assert "resuming at iteration 3" in done.stderr

    def losses(path):
        lines = [json.loads(line) for line in (path / "losses.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]

    assert losses(train) == losses(folder / "demo" / "train")
    one, two = (load_student(p / "student.safetensors")[0].state_dict() for p in (train, folder / "demo" / "train"))
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_backends_agree_on_the_pseudo_labels(finished, tiny):
    """FAISS and torch on the cached tokens of a real teacher: the same fused label nearly everywhere."""
    from pipeline.data.base import data_of
    from pipeline.teaching.pseudo import pseudo_labels, token_states

    config = tiny()
    store, data = Store.open(finished[0] / "demo" / "cache"), data_of(config.data)
    same = total = 0
    for row in range(0, 70, 7):
        tokens = torch.from_numpy(store.read_rows("tokens", [row])[0]).float()
        grid = torch.nn.functional.normalize(tokens, dim=-1)
        state, _ = token_states(data, data.samples("train")[row], store.read_rows("view", [row])[0], 16, 128)
        one, two = (
            pseudo_labels(grid, state, config.cluster.model_copy(update={"backend": b}))[0] for b in ("faiss", "torch")
        )
        same, total = same + int((one == two).sum()), total + one.numel()
    assert same / total >= 0.999


def test_the_losses_see_no_unseen_text(finished, tiny, monkeypatch):
    """The table of all classes is a payload: what the losses are handed has one row per seen class."""
    from pipeline import train as stage

    handed = []
    original = stage.OBJECTIVES["clip_teacher"]

    def spy(section, learner, *rest):
        handed.append(learner.text_seen)
        return original(section, learner, *rest)

    monkeypatch.setitem(stage.OBJECTIVES, "clip_teacher", spy)
    config = tiny("name=spy", f"cache.path={finished[0]}/demo/cache", "train.iterations=1")
    stage.train(config)
    table = Store.open(config.cache_path).read_whole("text")
    seen = [i for i in range(20) if i not in (3, 6, 9, 15, 16)]
    assert torch.equal(handed[0], torch.from_numpy(table[seen]))


@pytest.mark.parametrize(
    "setting",
    [
        "train.glm=max",
        "train.glm=mean",
        "train.glm=off",
        "train.vla=mlp",
        "train.vla=original",
        "train.nel=off",
        "train.nel=seen",
        "train.potential=false",
        "train.potential_ce=false",
        "train.generate=false",
        "train.potentials=image",
        "train.loss_grid=full",
        "train.photometric=true",
        "train.channels_last=false",
    ],
)
def test_every_switch_trains(finished, tiny, setting):
    from pipeline.train import train

    config = tiny(
        f"name={setting.replace('=', '-')}", f"cache.path={finished[0]}/demo/cache", setting, "train.iterations=2"
    )
    train(config)
    lines = (config.run_path / "train" / "losses.jsonl").read_text().splitlines()
    terms = json.loads(lines[-1])
    expected = {"global", "generate", "ce", "focal", "dice"}
    expected -= {
        "train.glm=off": {"global"},
        "train.nel=off": {"focal", "dice"},
        "train.generate=false": {"generate"},
    }.get(setting, set())
    assert expected <= set(terms)
    assert not ({"global", "generate", "ce", "focal", "dice"} - expected) & set(terms)
    if setting == "train.potential=false":
        assert terms["potential"] == 0
