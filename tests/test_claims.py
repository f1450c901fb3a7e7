"""Whose a run's folder is: one training at a time, none overwritten; and who may write to a cache that is read."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from cache.errors import CacheLocked
from cache.ledger import lock, reading
from pipeline.config import Config, UserError, from_mapping, kept, load
from pipeline.learning.checkpoint import (
    CONTENT,
    LAST,
    OWNER,
    Checkpoint,
    CheckpointError,
    content_digest,
    load_student,
    save_student,
)
from pipeline.learning.claims import KEPT, RunBusy, claim, training_in
from pipeline.models.student import build_student
from tests.conftest import ROOT


def finished(run, identity):
    """What a training and its evaluation leave, as far as `claim` looks."""
    for name in ("train", "eval", "eval-on-other", "report"):
        (run / name).mkdir(parents=True, exist_ok=True)
        (run / name / "of").write_text(identity)
    (run / "train" / OWNER).write_text(identity)


def of(run):
    return {path.parent.name: path.read_text() for path in sorted(run.glob("*/of"))}


def test_a_training_is_kept_and_comes_back(tmp_path):
    finished(tmp_path, "aaaa")
    claim(tmp_path, "bbbb")
    assert of(tmp_path) == {}
    assert of(tmp_path / KEPT / "aaaa") == dict.fromkeys(("eval", "eval-on-other", "report", "train"), "aaaa")
    finished(tmp_path, "bbbb")
    claim(tmp_path, "aaaa")
    assert set(of(tmp_path).values()) == {"aaaa"}
    assert set(of(tmp_path / KEPT / "bbbb").values()) == {"bbbb"}
    assert not (tmp_path / KEPT / "aaaa").exists()
    claim(tmp_path, "aaaa")
    assert set(of(tmp_path).values()) == {"aaaa"}, "its own folder it leaves as it is"


def test_a_kill_while_a_training_is_moved(tmp_path, monkeypatch):
    """Each folder is moved whole, `train` last, so that the next command goes on moving."""
    from pathlib import Path

    finished(tmp_path, "aaaa")
    moved, rename = [], Path.rename

    def killed(self, target):
        if len(moved) == 2:
            raise KeyboardInterrupt
        moved.append(self.name)
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            claim(tmp_path, "bbbb")
    assert (tmp_path / "train" / "of").is_file()
    claim(tmp_path, "bbbb")
    assert set(of(tmp_path / KEPT / "aaaa").values()) == {"aaaa"}
    assert of(tmp_path) == {}


def test_one_training_at_a_time(tmp_path):
    with training_in(tmp_path), pytest.raises(RunBusy, match=rf"process {os.getpid()} on .* is training there"):
        training_in(tmp_path).__enter__()
    with training_in(tmp_path):
        pass  # free again


def test_the_lock_ends_with_its_process(tmp_path):
    code = (
        "import sys, time; from pathlib import Path\n"
        "from pipeline.learning.claims import training_in\n"
        f"with training_in(Path({str(tmp_path)!r})):\n"
        "    print('held', flush=True); time.sleep(60)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(RunBusy, match=f"process {other.pid} "):
        training_in(tmp_path).__enter__()
    other.send_signal(signal.SIGKILL)
    other.wait()
    with training_in(tmp_path):
        pass


def test_a_lock_that_is_a_symlink_is_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    run = tmp_path / "run"
    run.mkdir()
    (run / "train.lock").symlink_to(precious)
    with pytest.raises(Exception, match=r"train\.lock"):
        training_in(run).__enter__()
    assert precious.read_text() == "mine"


def test_nobody_writes_to_a_cache_that_is_read(tmp_path):
    with lock(tmp_path, "extract"), pytest.raises(CacheLocked, match="already holds the lock, for extract"):
        reading(tmp_path).__enter__()
    with reading(tmp_path), reading(tmp_path), pytest.raises(CacheLocked, match="a training reads it"):
        lock(tmp_path, "cluster").__enter__()
    with lock(tmp_path, "cluster"):
        pass


# --- a student is what its manifest says -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    config = load(ROOT / "config" / "demo.yaml", ["student.encoder=tu-resnet10t"])
    path = tmp_path_factory.mktemp("made") / LAST
    checkpoint = Checkpoint(config, "t0", ("a", "b"), ("b",), torch.eye(2, 8))
    save_student(path, build_student(config.student, 8, pretrained=False), checkpoint)
    return path


def rewritten(source, target, change, *, sealed=True):
    """The student with its metadata and tensors changed, its hash made anew or left."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(source, "pt") as file:
        metadata, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(metadata, tensors)
    if sealed:
        metadata[CONTENT] = content_digest(metadata, tensors)
    save_file(tensors, target, metadata=metadata)
    return target


def poisoned(metadata, tensors):
    tensors["text"][0, 0] = float("nan")


def without_a_tensor(metadata, tensors):
    del tensors[next(name for name in tensors if name.startswith("student."))]


def of_another_shape(metadata, tensors):
    tensors["text"] = torch.eye(3, 8)


def other_names(metadata, tensors):
    metadata["classes"] = '["b", "a"]'


@pytest.mark.parametrize(
    ("change", "sealed", "words"),
    [
        (poisoned, True, "aren't finite"),
        (without_a_tensor, True, "weights don't fit"),
        (without_a_tensor, False, "is not what was written"),
        (of_another_shape, True, "don't belong together"),
        (other_names, False, "is not what was written"),
        (lambda metadata, tensors: metadata.update(classes="5"), True, "don't belong together"),
        (lambda metadata, tensors: metadata.update(config="[]"), True, "not a student"),
        (lambda metadata, tensors: metadata.pop("config"), True, "not a student"),
        (lambda metadata, tensors: tensors.pop("text"), True, "not a student"),
    ],
)
def test_a_student_that_is_not_what_was_written(student, tmp_path, change, sealed, words):
    path = rewritten(student, tmp_path / LAST, change, sealed=sealed)
    with pytest.raises(UserError, match=words) as caught:
        load_student(path)
    assert "\n" not in str(caught.value)


def test_two_hundred_flipped_bits(student, tmp_path):
    content = bytearray(student.read_bytes())
    for place in range(200):
        content[len(content) // 2 + place * 97] ^= 1 << place % 8
    (tmp_path / LAST).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is not what was written|aren.t finite"):
        load_student(tmp_path / LAST)


def test_another_trainings_student(student, tmp_path):
    (tmp_path / LAST).write_bytes(student.read_bytes())
    manifest = {"fingerprint": "t0", "student": LAST}
    (tmp_path / "train.manifest.json").write_text(json.dumps(manifest))
    assert load_student(tmp_path / LAST)[1].identity == "t0"
    (tmp_path / "train.manifest.json").write_text(json.dumps(manifest | {"fingerprint": "t1"}))
    with pytest.raises(CheckpointError, match="is of training t0, its manifest speaks of t1"):
        load_student(tmp_path / LAST)


# --- what another version wrote --------------------------------------------------------------------------------------


def test_a_key_that_a_newer_version_has_at_its_default_is_passed_over():
    written = kept(Config())
    written["train"]["colour_of_the_bar"] = "green"
    written["weather"] = {"rain": True}
    assert from_mapping(written) == Config()


def test_a_key_that_a_newer_version_has_set_is_named():
    written = kept(load(ROOT / "config" / "demo.yaml"))
    written["train"]["colour_of_the_bar"] = "red"
    written["written_by"]["keys"].append("train.colour_of_the_bar")
    written["written_by"]["version"] = "9.1"
    with pytest.raises(UserError, match=r"version 9\.1, which knows 'train\.colour_of_the_bar'"):
        from_mapping(written)


def test_what_a_config_asks_leaves_defaults_out():
    from pipeline.running.table import asked, config_fingerprint, difference

    plain = Config()
    assert asked(plain, "train") == {"student.encoder": plain.student.encoder}  # see the next test
    same = from_mapping({"train": {"lr": plain.train.lr}, "data": {"limit": None}})
    other = from_mapping({"train": {"lr": 0.5}})
    assert config_fingerprint(same, "train") == config_fingerprint(plain, "train")
    assert config_fingerprint(other, "train") != config_fingerprint(plain, "train")
    assert difference(asked(plain, "train"), asked(other, "train")) == "train.lr was 6e-05 and is 0.5"


def test_a_default_that_has_changed_leaves_finished_trainings_what_they_are():
    """student.encoder was mit_b0 by default: written out, left out before, or kept, it is the same still."""
    from pipeline.running.table import asked, config_fingerprint, difference

    new, old = Config(), from_mapping({"student": {"encoder": "mit_b0"}})
    assert new.student.encoder == "tu-pvt_v2_b0"
    assert asked(old, "train") == {}
    assert from_mapping(kept(old)) == old
    said = difference(asked(old, "train"), asked(new, "train"))
    assert said == "student.encoder was 'mit_b0' and is 'tu-pvt_v2_b0'"
    assert config_fingerprint(old, "train") == "7f30b0e29b86c64b"
    assert config_fingerprint(new, "train") != config_fingerprint(old, "train")


def test_defaults_are_pinned():
    """A default that changes changes what finished runs mean: name the old one as `first`, then this."""
    from pipeline.config import aside_keys, defaults, digest
    from pipeline.running.table import MEANING

    content = {key: value for key, value in defaults().items() if key not in aside_keys()}
    assert (MEANING, digest(content)) == (3, "193113bbfce551cf")
