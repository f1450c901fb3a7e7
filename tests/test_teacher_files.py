"""Checkpoint files of strangers: every layout gives its tensors, nothing that a file brings along is run."""

import os
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from pipeline.config import ConfigError
from pipeline.models.teacher import Teacher, TeacherError
from pipeline.models.weights import MOST_PICKLED, WeightsError, is_torchscript, read_state, torchscript_state
from pipeline.running.devices import device_of
from tests.conftest import ROOT, is_one_line_error
from tests.test_teacher import Holder, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch.jit, which others' archives are made with


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny CLIP as open_clip builds it."""
    name = tiny_model(tmp_path_factory.mktemp("clip") / "tiny")
    return open_clip.create_model(name).eval()


def same(found, wanted):
    assert list(found) == list(wanted)
    assert all(found[name].dtype == value.dtype for name, value in wanted.items())
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    return True


# ---- what is read ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda state: state,
        lambda state: {"model": state},
        lambda state: {"model_state_dict": state, "epoch": 3},
        lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3, "optimizer": {"a": 1}},
        lambda state: {"state_dict": {f"model.{k}": v for k, v in state.items()}},
        lambda state: {f"module._orig_mod.{k}": v for k, v in state.items()},
    ],
    ids=["plain", "model", "model_state_dict", "ddp", "lightning", "compiled"],
)
def test_a_state_dict_is_found_where_training_scripts_put_it(tmp_path, model, wrapped):
    state = {name: value.half() for name, value in model.state_dict().items()}
    for is_zip in (True, False):
        torch.save(wrapped(state), tmp_path / "w.pt", _use_new_zipfile_serialization=is_zip)
        assert same(read_state(tmp_path / "w.pt"), state)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"net": {"a": torch.zeros(1)}, "epoch": 3}, ["'net'", "'epoch'", "state_dict, model_state_dict, model"]),
        ({"model": {"a": torch.zeros(1), "epoch": 3}}, ["'epoch'", "under 'model'"]),
        ({1: torch.zeros(1)}, ["1 is a Tensor"]),
        ({}, ["an empty dict"]),
        ([torch.zeros(1)], ["a list"]),
        (torch.zeros(1), ["a Tensor"]),
        ({"epoch": np.float64(3), "state_dict": {"a": torch.zeros(1)}}, ["numpy", "scalar", "torch.save("]),
    ],
)
def test_other_files_are_one_line_with_what_was_found(tmp_path, content, words):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(WeightsError) as error:
        read_state(tmp_path / "w.pt")
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"<!doctype html><html>404</html>", "begins with b'<!doctype html><'"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    ],
)
def test_what_is_downloaded_instead_of_a_checkpoint_is_one_line(tmp_path, content, words):
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(WeightsError, match="not a checkpoint that can be read") as error:
        read_state(tmp_path / "w.pt")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_that_are_not_finite_are_refused(tmp_path, model):
    name = "ViT-S-16-alt"
    state = open_clip.create_model(name, load_weights=False).state_dict()
    state["visual.proj"][0, 0] = float("nan")
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "w.safetensors")
    with pytest.raises(TeacherError, match=r"visual\.proj holds numbers that are not finite"):
        Teacher.load(name, str(tmp_path / "w.safetensors"), image_size=224, quick_gelu=False)


# ---- TorchScript -------------------------------------------------------------------------------


class Other(torch.nn.Module):
    """What a real model has beside parameters: buffers, kept and not, tensors that are neither, lists, children."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 4).half())
        self.turned = torch.nn.Parameter(torch.randn(6, 5)[1:4, ::2].t())  # a view: offset and strides
        self.scalar = torch.nn.Parameter(torch.tensor(2.5))
        self.register_buffer("ids", torch.arange(3))
        self.register_buffer("rounded", torch.randn(2).bfloat16())
        self.register_buffer("nothing", torch.zeros(0, 4))
        self.mask = torch.zeros(2)  # as OpenAI's attention masks: an attribute, and no part of the state
        self.names, self.sizes, self.parts = ["a", "b"], [1, 2], [torch.ones(1)]
        self.children_ = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.children_(x) + self.mask + self.parts[0]


def archive(path, module):
    torch.jit.save(module, path)
    return path


@pytest.mark.parametrize("how", ["script", "trace"])
def test_an_archive_s_tensors_are_those_of_its_own_state_dict(tmp_path, how):
    module = torch.jit.script(Other()) if how == "script" else torch.jit.trace(Other().eval(), torch.ones(1, 2))
    path = archive(tmp_path / "w.pt", module)
    assert is_torchscript(path)
    assert same(torchscript_state(path), torch.jit.load(path).state_dict())


def test_a_clip_in_openai_s_layout(tmp_path, model):
    state = {name: value.half() for name, value in model.state_dict().items()}
    path = archive(tmp_path / "w.pt", torch.jit.script(Holder(state)))
    own = torch.jit.load(path).state_dict()
    assert same(read_state(path), own)
    assert own["visual.conv1.weight"].dtype == torch.float16
    assert set(own) == {*state, "input_resolution", "context_length", "vocab_size"}


class Writes(torch.nn.Module):
    """Code of an archive that runs when torch loads it, and writes a file where it likes."""

    def __init__(self, where: str):
        super().__init__()
        self.weight, self.where = torch.nn.Parameter(torch.ones(1)), where

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, str, bool]:
        return self.weight, self.where, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, str, bool]) -> None:
        self.weight, self.where, self.training = state
        torch.save(self.weight, self.where)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_code_in_an_archive_is_never_run(tmp_path):
    victim = tmp_path / "victim"
    path = archive(tmp_path / "w.pt", torch.jit.script(Writes(str(victim))))
    with pytest.raises(TeacherError, match=r"'.*w\.pt': a TorchScript archive.*a state of its own"):
        Teacher.load("ViT-B-16-quickgelu", str(path), image_size=224, quick_gelu=True)
    assert not victim.exists()
    torch.jit.load(path)
    assert victim.exists(), "torch itself runs it: the test attacks nothing"


def with_record(path, to, ending, content):
    """A copy of an archive with one record replaced; None leaves it out."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(to, "w") as new:
        for info in old.infolist():
            own = content if info.filename.endswith(ending) else old.read(info)
            if own is not None:
                new.writestr(info, own)
    return to


class Runs:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickles_that_would_run_something_are_refused(tmp_path):
    victim = tmp_path / "victim"
    evil = pickle.dumps({"weight": Runs(victim)}, protocol=2)
    good = archive(tmp_path / "good.pt", torch.jit.script(Other()))
    for path in (
        with_record(good, tmp_path / "a.pt", "/data.pkl", evil),
        with_record(
            with_record(good, tmp_path / "b0.pt", "/data.pkl", evil), tmp_path / "b.pt", "/constants.pkl", None
        ),
    ):
        with pytest.raises(WeightsError, match="mkdir"):
            read_state(path)
    torch.save({"state_dict": {"a": torch.zeros(1)}, "more": Runs(victim)}, tmp_path / "c.pt")
    with pytest.raises(WeightsError, match=r"mkdir.*can run code"):
        read_state(tmp_path / "c.pt")
    assert not victim.exists()


# Pickles that bend what the reader knows: states for its own classes and functions, storages that aren't there.
DESCRIBED = b"ctorch._utils\n_rebuild_tensor_v2\n"
MODULE = b"c__torch__\nOther\n"
BENT = {
    "a state of the class": b"\x80\x02" + MODULE + b"N}X\x01\x00\x00\x00aK\x01s\x86b.",
    "a state of the function": b"\x80\x02" + DESCRIBED + b"N}X\x01\x00\x00\x00aK\x01s\x86b.",
    "a dtype called": b"\x80\x02ctorch\nFloatStorage\n)R.",
    "a storage of another kind": b"\x80\x02X\x01\x00\x00\x00aQ.",
    "a tensor with a state": b"\x80\x02" + DESCRIBED + b"(NNNNtR}b.",
    "no module": b"\x80\x02K\x01.",
    "a builtin": b"\x80\x02cbuiltins\neval\nX\x03\x00\x00\x001+1\x85R.",
    "a dotted name": b"\x80\x04\x8c\x05torch\x8c\x13serialization.os.rmdir\x93.",
    "nothing": b"",
    "cut": MODULE,
}


@pytest.mark.parametrize("kind", BENT)
def test_bent_pickles_are_one_line(tmp_path, kind):
    good = archive(tmp_path / "good.pt", torch.jit.script(Other()))
    path = with_record(good, tmp_path / "bent.pt", "/data.pkl", BENT[kind])
    with pytest.raises(WeightsError, match="a TorchScript archive") as error:
        read_state(path)
    assert "\n" not in str(error.value)
    assert same(torchscript_state(good), torch.jit.load(good).state_dict()), "the reader is what it was"


def test_bent_archives_are_one_line(tmp_path):
    good = archive(tmp_path / "good.pt", torch.jit.script(Other()))
    for ending, content, words in (
        ("/data/0", b"", "data/0"),
        ("/data/0", None, "data/0"),
        ("/data.pkl", None, "data.pkl"),
        ("/byteorder", b"big", "big-endian"),
    ):
        with pytest.raises(WeightsError, match=words):
            read_state(with_record(good, tmp_path / "bent.pt", ending, content))
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(WeightsError, match="compressed"):
        read_state(tmp_path / "bomb.pt")
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(tmp_path / "code.pt", "w") as new:
        for info in old.infolist():
            content = b"x" * (MOST_PICKLED + 1) if info.filename.endswith(".py") else old.read(info)
            new.writestr(info, content)
    with pytest.raises(WeightsError, match="of code"):
        read_state(tmp_path / "code.pt")
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(tmp_path / "twice.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        new.filelist += new.filelist * 40  # the directory names each record again: a small file of much content
    with pytest.raises(WeightsError, match="overlap"):
        read_state(tmp_path / "twice.pt")
    huge = with_record(good, tmp_path / "huge.pt", "/data.pkl", read_pickle(good).replace(b"K\x03K\x04", b"K\xffK\xff"))
    with pytest.raises(WeightsError, match="beyond data/"):
        read_state(huge)


def read_pickle(path):
    with zipfile.ZipFile(path) as old:
        return old.read(next(name for name in old.namelist() if name.endswith("/data.pkl")))


def test_no_part_of_the_project_runs_torchscript():
    for path in (*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("cache/**/*.py"), ROOT / "cli.py"):
        text = path.read_text()
        assert "jit.load(" not in text.replace("torch.jit.load would", ""), path
        assert "weights_only=False" not in text.replace("(file, weights_only=False)", ""), path


# ---- devices and commits -----------------------------------------------------------------------


@pytest.mark.parametrize("key", ["teacher.device", "cluster.device", "cams.device"])
@pytest.mark.parametrize(
    "wanted", ["", "nonsense", "cpu:7", "cuda:x", "cuda:-1", "cuda:999", "xla", "meta", "hpu", "GPU", "cuda:1e3", "0"]
)
def test_a_device_that_isn_t_here_is_one_line(key, wanted):
    with pytest.raises(ConfigError, match=f"{key} is '{wanted}'") as error:
        device_of(key, wanted)
    assert "\n" not in str(error.value)
    assert "auto" in str(error.value)


def test_a_device_of_another_machine_is_one_line(run_cli, tmp_path):
    foreign = "hpu" if torch.backends.mps.is_available() else "mps"
    done = run_cli(
        "extract", "--set", f"runs={tmp_path}", "--set", f"teacher.device={foreign}", "--set", "data.train=2"
    )
    assert is_one_line_error(done, f"teacher.device is '{foreign}'", "auto or cpu")


def test_doctor_names_a_device_that_isn_t_here(run_cli):
    foreign = "hpu" if torch.backends.mps.is_available() else "mps"
    done = run_cli("doctor", "--dry", "--config", "config/demo.yaml", "--set", f"teacher.device={foreign}")
    assert f"no device: teacher.device is '{foreign}'" in done.stdout + done.stderr


def test_code_inside_another_repository_has_no_commit(tmp_path):
    """As an unpacked tarball in a home folder under version control; that repository's commit says nothing of it."""
    (tmp_path / "project" / "pipeline" / "running").mkdir(parents=True)
    copied = tmp_path / "project" / "pipeline" / "running" / "provenance.py"
    copied.write_bytes((ROOT / "pipeline" / "running" / "provenance.py").read_bytes())
    code = (
        "import importlib.util as u, sys; s = u.spec_from_file_location('copied', sys.argv[1]); "
        "m = u.module_from_spec(s); s.loader.exec_module(m); print(m.revision())"
    )

    def revision():
        words = [sys.executable, "-c", code, str(copied)]
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    def git(folder):
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        for words in (["init", "-q"], [*who, "commit", "-q", "--allow-empty", "-m", "one"]):
            subprocess.run(["git", "-C", str(folder), *words], check=True)

    git(tmp_path)
    assert revision() == "None"
    git(tmp_path / "project")
    assert revision() not in ("None", "")
