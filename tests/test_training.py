"""Training as an engine: killed and resumed, repeated, validated, and blind to everything unseen."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

from cache.store import Store
from pipeline import train as stage
from pipeline.config import Config
from pipeline.data.base import DataError, data_of
from pipeline.learning.batches import CachedViews, held_out
from pipeline.learning.checkpoint import (
    Checkpoint,
    CheckpointError,
    latest_checkpoint,
    load_student,
    save_checkpoint,
    student_file,
)
from pipeline.learning.training import negatives_of
from pipeline.learning.validation import Best, seen_miou
from pipeline.train import TrainError, train
from tests.conftest import ROOT, TINY, forget_accelerator, is_one_line_error


@pytest.fixture
def run_of(cached_demo, tiny):
    """The config of a tiny training on the shared cache."""

    def build(name, *settings):
        forget_accelerator()
        return tiny(f"name={name}", f"cache.path={cached_demo}", *settings)

    return build


def weights(config, name="student.safetensors"):
    return load_student(config.run_path / "train" / name)[0].state_dict()


def curve(config):
    lines = (config.run_path / "train" / "losses.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in two)


def test_only_the_first_views_are_used_when_asked_for(run_of):
    config = run_of("views", "train.views=1")
    views = CachedViews(config, data_of(config.data))
    cached = int(views.store.attributes["views"]["num"])
    assert views.num_views == 1 < cached
    with pytest.raises(DataError, match=f"train.views is {cached + 1}.* holds {cached} views"):
        CachedViews(run_of("views", f"train.views={cached + 1}"), data_of(config.data))


def test_negatives_come_from_all_training_rows_when_asked_for(run_of):
    config = run_of("negatives", "train.negatives=7", "train.validate.fraction=0.2")
    views = CachedViews(config, data_of(config.data))
    tokens, samples = negatives_of(views, int(views.store.sizes["C"])).entries()
    assert len(tokens) == 7
    assert set(samples.tolist()) <= set(views.rows)
    cached = views.store.read_whole("cls")
    for token, sample in zip(tokens.numpy(), samples.tolist(), strict=True):
        assert any(np.array_equal(token, own.astype(np.float32)) for own in cached[sample])
    train(config)
    plain = run_of("bank", "train.validate.fraction=0.2")
    train(plain)
    assert curve(config)[0]["global"] > curve(plain)[0]["global"], "the bank is empty at first, the cache isn't"


def test_more_negatives_than_tokens_are_refused(run_of):
    config = run_of("greedy", "train.negatives=100000")
    views = CachedViews(config, data_of(config.data))
    with pytest.raises(TrainError, match=r"train.negatives is 100000, and \d+ CLS tokens are cached. Lower it."):
        negatives_of(views, int(views.store.sizes["C"]))


# --- exactness -----------------------------------------------------------------------------------

LONG = ("train.iterations=9", "train.checkpoint_every=1", "train.photometric=true", "train.bank=3") + (
    "student.arch=FPN",  # its dropout makes every iteration draw
    "student.options={decoder_dropout: 0.2}",
)


def test_killed_twice_and_resumed_is_the_uninterrupted_run(cached_demo, run_of):
    """Losses and weights to the last bit, with the CLS bank turning over and dropout in the decoder."""
    whole = run_of("whole", *LONG)
    train(whole)
    settings = [f"runs={whole.runs}", *TINY, "name=killed", f"cache.path={cached_demo}", *LONG]
    config = run_of("killed", *LONG)
    command = [sys.executable, str(ROOT / "cli.py"), "train", "--config", str(ROOT / "config/demo.yaml")]
    command += [word for setting in settings for word in ("--set", setting)]
    folder, rng, kills = config.run_path / "train", random.Random(0), 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for at_least in (1, 4):
        running = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
        deadline = time.time() + 120
        while time.time() < deadline and running.poll() is None and not newest(folder) >= at_least:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        running.kill()
        kills += running.wait() == -signal.SIGKILL
    assert kills == 2, "a kill came too late to test anything"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "resuming at iteration" in done.stderr
    assert curve(config) == curve(whole)
    assert same(weights(config), weights(whole))
    assert len(list(folder.glob("checkpoint-*"))) == config.train.keep


def newest(folder):
    return max((int(path.name[-6:]) for path in folder.glob("checkpoint-*")), default=0)


def saved(folder, iteration, identity="a", keep=2, value=0.0):
    student = nn.Linear(2, 1)
    nn.init.constant_(student.weight, value)
    content = Checkpoint(Config(), identity, ("x", "y"), ("y",), torch.eye(2))
    save_checkpoint(folder, iteration, content, student, {"best": {"score": value}}, keep=keep)


@pytest.mark.parametrize("name", ["student.safetensors", "state.pt", "seal.json"])
@pytest.mark.parametrize("harm", ["cut", "bit", "gone"])
def test_a_torn_checkpoint_is_never_loaded(tmp_path, name, harm):
    saved(tmp_path, 3)
    saved(tmp_path, 6)
    assert latest_checkpoint(tmp_path, "a") == tmp_path / "checkpoint-000006"
    path = tmp_path / "checkpoint-000006" / name
    content = bytearray(path.read_bytes())
    if harm == "gone":
        path.unlink()
    else:
        content[len(content) // 3] ^= 1
        path.write_bytes(content if harm == "bit" else content[:-7])
    assert latest_checkpoint(tmp_path, "a") == tmp_path / "checkpoint-000003"


def test_the_last_checkpoints_are_kept_and_anothers_left_alone(tmp_path):
    saved(tmp_path, 900, identity="other")
    for iteration in (2, 4, 6):
        saved(tmp_path, iteration)
    (tmp_path / ".checkpoint-000008.partial").mkdir()  # what a kill while writing leaves
    names = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert names == ["checkpoint-000004", "checkpoint-000006", "checkpoint-000900"]
    assert latest_checkpoint(tmp_path, "a") == tmp_path / "checkpoint-000006"
    assert latest_checkpoint(tmp_path, "third") is None


def test_a_student_file_says_where_it_comes_from(run_of, monkeypatch):
    config = run_of("origin", "train.iterations=1")
    manifest = train(config)
    checkpoint = load_student(config.run_path / "train" / "student.safetensors")[1]
    assert checkpoint.cache == manifest["upstream"]
    in_checkout = (ROOT / ".git").exists()
    assert (checkpoint.revision is not None) == in_checkout
    assert checkpoint.config.made_in(None) == config
    from pipeline.running.provenance import revision

    monkeypatch.setenv("GIT_DIR", "/nonexistent")
    assert revision() is None


def test_a_loss_that_is_not_finite_stops_and_leaves_the_last_checkpoint(run_of, monkeypatch):
    config = run_of("not-finite")
    original, count = stage.OBJECTIVES["clip_teacher"], [0]

    def spoiled(*arguments):
        terms, counts = original(*arguments)
        count[0] += 1
        return ({**terms, "dice": terms["dice"] / 0} if count[0] == 5 else terms), counts

    monkeypatch.setitem(stage.OBJECTIVES, "clip_teacher", spoiled)
    with pytest.raises(TrainError, match=r"iteration 4: dice is not finite \(batch: train-\d+") as stop:
        train(config)
    assert str(stop.value).count("train-") == 4, "every sample of the batch is named"
    assert latest_checkpoint(config.run_path / "train", manifest_identity(config)).name == "checkpoint-000003"


def manifest_identity(config):
    from pipeline.running.manifests import required_manifest
    from pipeline.running.table import fingerprint

    data, text = data_of(config.data), required_manifest(config, "extract")["text"]
    facts = {"classes": data.classes, "unseen": data.unseen, "text": text}
    return fingerprint(config, "train", required_manifest(config, "cluster")["content"], facts)


# --- nothing unseen ------------------------------------------------------------------------------


def test_nothing_unseen_is_read(run_of, monkeypatch):
    """The unseen classes' text features, names and labels may be anything: the same student comes out.

    Their text rows become absurd, their names others, and labels and `labels` itself raise when touched.
    """
    plain = run_of("plain", "train.validate={fraction: 0.2, every: 3}")
    train(plain)
    config = run_of("blind", "train.validate={fraction: 0.2, every: 3}")
    data = data_of(config.data)
    unseen = list(data.unseen_ids)
    seen_labels = {sample.id: data.seen_labels(sample) for sample in data.samples("train")}
    assert any((data.labels(sample) != seen_labels[sample.id]).any() for sample in data.samples("train"))
    read_whole = Store.read_whole

    def touched(*_):
        raise AssertionError("an unseen label was read")

    def text_without_unseen(store, name):
        found = read_whole(store, name).copy()
        if name == "text":
            found[unseen] = 1e30  # whatever touched it would show
        return found

    names = tuple(f"secret {i}" if i in unseen else name for i, name in enumerate(data.classes))
    monkeypatch.setattr(stage, "check_current", lambda *_: None)  # it would refuse the other names
    monkeypatch.setattr(type(data), "labels", touched)
    monkeypatch.setattr(type(data), "unseen_ids", property(touched))
    monkeypatch.setattr(type(data), "seen_labels", lambda self, sample: seen_labels[sample.id])
    monkeypatch.setattr(Store, "read_whole", text_without_unseen)
    monkeypatch.setattr(data, "classes", names)
    monkeypatch.setattr(data, "unseen", tuple(name for name in names if name.startswith("secret")))
    try:
        train(config)
    finally:
        data_of.__globals__["_data"].cache_clear()
    assert curve(config) == curve(plain)
    monkeypatch.undo()
    assert same(weights(config), weights(plain))


# --- validation ----------------------------------------------------------------------------------


def test_held_out_images_depend_on_seed_and_id_alone(run_of):
    ids = [f"image {i}" for i in range(4000)]
    drawn = {i for i in ids if held_out(i, 0, 0.25)}
    assert 0.22 < len(drawn) / len(ids) < 0.28
    assert drawn == {i for i in reversed(ids) if held_out(i, 0, 0.25)}
    assert drawn <= {i for i in ids if held_out(i, 0, 0.5)}
    assert drawn != {i for i in ids if held_out(i, 1, 0.25)}
    assert not any(held_out(i, 0, 0.0) for i in ids)
    config = run_of("split", "train.validate.fraction=0.3")
    views = CachedViews(config, data_of(config.data))
    assert views.held_out
    assert sorted(views.held_out + views.rows) == list(range(70))


def test_seen_miou_by_hand():
    # Two seen classes, 4 and 7, whose text features are the unit vectors; the student copies two channels.
    # Labels 4 4 7 and none against predictions 0 1 1 1: class 4: 1 of 2 in the union; class 7: 1 of 2. Mean 50 %.
    class Copies(nn.Module):
        def forward(self, images):
            return images[:, :2]

    class Views:
        held_out = (0,)

        def whole(self, row):
            image = torch.tensor([[[9, 0, 0, 0]], [[0, 9, 9, 9]], [[0, 0, 0, 0]]], dtype=torch.uint8)
            return {"image": image, "labels": torch.tensor([[4, 4, 7, -1]], dtype=torch.int16)}

    assert seen_miou(Copies(), Views(), torch.eye(2), torch.tensor([4, 7])) == pytest.approx(50.0)


def test_training_ends_early_and_eval_takes_the_best(run_of, monkeypatch):
    scores = iter([10.0, 30.0, 20.0, 30.0, 99.0])
    monkeypatch.setattr(stage, "seen_miou", lambda *_: next(scores))
    config = run_of("early", "train.validate={fraction: 0.2, every: 1, patience: 2}")
    manifest = train(config)
    assert manifest["iterations"] == 4, "two validations without a better one"
    assert manifest["validation"] == {"score": 30.0, "iteration": 2, "num_worse": 2}
    assert manifest["student"] == "student.best.safetensors"
    assert student_file(config.run_path).name == "student.best.safetensors", "predict, export and the report's too"
    assert not same(weights(config), weights(config, "student.best.safetensors"))
    from pipeline import evaluate

    loaded, load = [], evaluate.load_student
    monkeypatch.setattr(evaluate, "load_student", lambda path: loaded.append(path.name) or load(path))
    evaluate.evaluate(config)
    assert loaded == ["student.best.safetensors"]


def test_another_training_in_the_same_folder_takes_nothing_over(run_of, monkeypatch):
    monkeypatch.setattr(stage, "seen_miou", lambda *_: 50.0)
    validate = "train.validate={fraction: 0.2, every: 1}"
    first, other = run_of("one", validate), run_of("one", validate, "train.lr=1e-5")
    train(first)
    curves = curve(first)
    with monkeypatch.context() as patched:
        patched.setattr(stage, "save_checkpoint", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(other)  # has validated by then, and kept its best student
    monkeypatch.setattr(stage, "seen_miou", lambda *_: 40.0)
    with pytest.raises(CheckpointError, match="no trained student"):  # the first's is not the one asked for now
        student_file(first.run_path)
    done = train(run_of("one", validate))
    _, best = load_student(first.run_path / "train" / done["student"])
    assert best.identity == done["fingerprint"]
    assert done["validation"]["score"] == 50.0, "the first training was kept and is back, its score with it"
    assert curve(first) == curves


def stopped(*_, **__):
    raise KeyboardInterrupt


def test_an_equal_score_is_not_a_better_one():
    best = Best()
    assert best.better(0.0, 1)
    assert not best.better(0.0, 2)
    assert (best.iteration, best.num_worse) == (1, 1)


def test_a_fraction_that_leaves_nothing(run_of):
    with pytest.raises(Exception, match=r"train.validate.fraction 1e-06 holds out 0 of 70"):
        train(run_of("none", "train.validate.fraction=1e-6"))


# --- habits --------------------------------------------------------------------------------------


def test_a_dry_run_says_the_plan_and_writes_nothing(cached_demo, tmp_path, run_cli):
    settings = [f"runs={tmp_path}/runs", *TINY, f"cache.path={cached_demo}", "train.iterations=700"]
    words = [word for setting in settings for word in ("--set", setting)]
    done = run_cli("train", "--config", ROOT / "config/demo.yaml", *words, "--dry-run")
    assert done.returncode == 0, done.stderr
    for part in ("700 iterations of 4 images", "40.0 epochs of 70 images", "M parameters", "GB", "s an iteration"):
        assert part in done.stderr, part
    assert not (tmp_path / "runs").exists()


def test_two_runs_with_one_seed_are_one_and_pictures_change_nothing(run_of):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    without = run_of("plain")
    train(without)
    config = run_of("pictures", "train.pictures_every=2")
    train(config)
    events = EventAccumulator(str(config.run_path / "train" / "losses"))
    events.Reload()
    (tag, *_) = events.Tags()["images"]
    assert tag.startswith("fixed batch")
    assert [event.step for event in events.Images(tag)] == [2, 4, 6]
    assert (events.Images(tag)[0].width, events.Images(tag)[0].height) == (4 * 128, 4 * 128)
    assert same(weights(config), weights(without))


def test_the_tracker_shows_the_attention_that_training_pays(run_of):
    from pipeline.learning.training import new_run, open_accelerator
    from pipeline.looking.pictures import pictures

    def shown(length):
        config = run_of("attention", f"train.glm_length={length}")
        run = new_run(config, open_accelerator(config, tracks=False), "", None)
        with torch.no_grad():
            for layer in run.learner.student.net.segmentation_head.parameters():
                layer.mul_(30)  # else attention is even at the start
        return pictures(run.learner, run.student, run.views)[0, :, -128:].astype(float)

    assert shown(0.01).min() > 250, "of a CLS token without length all positions are alike"
    assert shown(100).mean() < 128, "of a long one a few"


def test_trackers_by_one_key(run_of, run_cli):
    config = run_of("none", "train.tracker=none", "train.iterations=1")
    train(config)
    assert not list(config.run_path.rglob("events.out.*"))
    done = run_cli("train", "--set", "train.tracker=tensorbord", "--set", "name=none")
    assert done.returncode == 2
    with pytest.raises(TrainError, match=r"'tensorbord': want one of none.*installed: .*tensorboard"):
        train(run_of("odd", "train.tracker=tensorbord"))


def test_a_key_below_a_renamed_section_is_named(run_cli):
    assert is_one_line_error(
        run_cli("train", "--set", "train.validate.fracton=0.1"), "train.validate.fracton", "fraction"
    )
