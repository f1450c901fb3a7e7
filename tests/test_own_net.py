"""A net of one's own, and torchvision's, as students: trained, reloaded and exported, and each mistake in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

from pipeline.config import Student, from_mapping
from pipeline.learning.checkpoint import load_student
from pipeline.models.dense import HEAD_STD, StudentError
from pipeline.models.student import build_student, check_batch, cost_of, parameter_groups
from pipeline.running.table import config_fingerprint
from tests.conftest import ROOT, TINY, is_one_line_error

NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, channels, width=8, stride=4):
        super().__init__()
        self.encoder = nn.Conv2d(3, width, stride, stride)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Conv2d(width, channels, 1)

    def forward(self, images):
        return self.head(self.norm(self.encoder(images)).relu())
"""
C = 6


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module into the working directory, under a name that no other test has; returns the name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    written = []

    def write(text, more=""):
        name = f"net_{tmp_path.name.replace('-', '_')}_{len(written)}"
        (tmp_path / f"{name}.py").write_text(text + more)
        written.append(name)
        return name

    yield write
    for name in written:
        sys.modules.pop(name, None)


def built(arch, side=64, channels=C, **more):
    return build_student(Student(arch=arch, **more), channels, side=side)


def command(folder, *words):
    """cli.py as another process, somewhere else than in the checkout."""
    return subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *map(str, words)],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_out_of_tree_trained_in_two_processes_reloaded_and_exported(tmp_path, cached_demo, run_cli, monkeypatch):
    """By processes of its own; reloaded by this one, and refused in one line where its module isn't."""
    monkeypatch.setattr(sys, "path", sys.path.copy())
    own, other = tmp_path / "own", tmp_path / "other"
    (own / "mypackage").mkdir(parents=True)
    other.mkdir()
    (own / "mypackage" / "nets.py").write_text(NET)
    run = own / "runs" / "own"
    settings = [f"runs={own}/runs", "name=own", f"cache.path={cached_demo}", *TINY, "train.processes=2"]
    settings += ["student.arch=mypackage.nets:Net", "student.options={width: 12}", "train.tracker=none"]
    words = ["--config", ROOT / "config" / "demo.yaml", *(part for each in settings for part in ("--set", each))]
    done = command(own, "train", *words)
    assert done.returncode == 0, done.stderr

    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)).save(picture)
    for words in (["predict", picture, "--run", run], ["export", run]):
        done = run_cli(*words, folder=other)
        assert is_one_line_error(done, "there is no module 'mypackage'", str(other), "PYTHONPATH")
    try:
        done = run_cli("predict", picture, "--run", run, folder=own)
        assert done.returncode == 0, done.stderr
        assert (own / "predictions" / "picture.mask.png").is_file()
        done = run_cli("export", run, "--out", "own.onnx", folder=own)
        assert done.returncode == 0, done.stderr
        student, found = load_student(run / "train" / "student.safetensors")
        assert found.config.student.arch == "mypackage.nets:Net"
        assert student.net.encoder.out_channels == 12
    finally:
        for name in ("mypackage", "mypackage.nets"):
            sys.modules.pop(name, None)


def test_evaluated_like_any_other(cached_demo, module, tmp_path, run_cli):
    name = module(NET)
    settings = [f"runs={tmp_path}/runs", f"cache.path={cached_demo}", *TINY, f"student.arch={name}:Net"]
    (tmp_path / "config").symlink_to(ROOT / "config")
    words = [part for each in [*settings, "student.options={}"] for part in ("--set", each)]
    for stage in ("train", "eval", "report"):
        done = run_cli(stage, *words, folder=tmp_path)
        assert done.returncode == 0, done.stderr
    done = run_cli("results", tmp_path / "runs" / "demo", folder=tmp_path)
    assert "hIoU" in done.stdout + done.stderr
    assert f"Student {name}:Net, teacher" in (tmp_path / "runs" / "demo" / "report" / "index.html").read_text()
    done = run_cli("eval", *words, "--on", "demo_other", folder=tmp_path)
    assert done.returncode == 0, done.stderr

    with (tmp_path / f"{name}.py").open("a") as file:
        file.write("# changed\n")
    sys.modules.pop(name)
    done = run_cli("predict", ROOT / "docs" / "scene.png", "--run", tmp_path / "runs" / "demo", folder=tmp_path)
    assert "has changed since this student was trained with it" in done.stderr


def test_options_are_content():
    plain = {"arch": "mynets:Net", "options": {"width": 12}}
    first, other = (from_mapping({"student": plain | {"options": {"width": width}}}) for width in (12, 16))
    assert config_fingerprint(first, "train") == config_fingerprint(from_mapping({"student": plain}), "train")
    assert config_fingerprint(first, "train") != config_fingerprint(other, "train")


WRONG = {
    "no module": ("no_such_module:Net", NET, {}, "there is no module 'no_such_module', neither in the working dir"),
    "no class": ("{}:Nets", NET, {}, "has no Nets. Its nets are Net."),
    "no net": ("{}:torch", NET, {}, "torch is no class of torch.nn.Module. Its nets are Net."),
    "no spec": ("{}:Net.inner", NET, {}, "want <module>:<Class>"),
    "a module that lacks another": ("{}:Net", "import no_such_one\n" + NET, {}, "No module named 'no_such_one'"),
    "a module that fails": ("{}:Net", NET + "\n1 / 0\n", {}, "ZeroDivisionError: division by zero \\("),
    "no Python": ("{}:Net", "class Net(:\n", {}, "importing net_.* fails: SyntaxError"),
    "a module that exits": ("{}:Net", NET + "\nraise SystemExit(0)\n", {}, "importing net_.* fails: SystemExit"),
    "an option too many": (
        "{}:Net",
        NET,
        {"widht": 3},
        "unexpected keyword argument 'widht'.*takes channels, width, st",
    ),
    "an option too few": ("{}:Net", NET.replace("width=8", "width"), {}, "missing a required argument: 'width'"),
    "channels as an option": ("{}:Net", NET, {"channels": 3}, "student.options channels: is set by"),
    "a constructor that fails": ("{}:Net", NET, {"width": "wide"}, r"building it fails: .*net_.*\.py, line \d+"),
    "channels": ("{}:Net", NET.replace("width, channels", "width, 21"), {}, "21 channels; want 6, the `channels`"),
    "stride 16": ("{}:Net", NET, {"stride": 16}, "a stride of 16; want one of 1, 2, 4, 8"),
    "rank": (
        "{}:Net",
        NET.replace(".relu())", ".relu()).flatten(2)"),
        {},
        r"gives \(2, 6, 256\).*want one tensor of shape",
    ),
    "a dictionary": (
        "{}:Net",
        NET.replace("return ", "return {'out': ").replace("relu())", "relu())}"),
        {},
        "gives a dict",
    ),
    "integers": ("{}:Net", NET.replace(".relu())", ".relu()).long()"), {}, "gives torch.int64; want"),
    "no numbers": ("{}:Net", NET.replace(".relu())", ".relu()) / 0 * 0"), {}, "numbers that aren't finite"),
    "no gradient": ("{}:Net", NET.replace(".relu())", ".relu()).detach()"), {}, "no gradient comes back"),
    "a forward that fails": (
        "{}:Net",
        NET.replace("self.norm(", "self.none("),
        {},
        "64 x 64 fails: AttributeError: .*'none'",
    ),
}


IN_TRAINING = {
    "two tensors": ("return dense, dense", "in training the net gives a tuple, not one tensor"),
    "an error": ("return dense + self.none", r"in training a forward over images of 64 x 64 fails: .*'none' \(.*net_"),
}


@pytest.mark.parametrize("case", IN_TRAINING)
def test_what_is_wrong_in_training_alone(case, module):
    line, says = IN_TRAINING[case]
    more = "\nclass Two(Net):\n    def forward(self, images):\n        dense = super().forward(images)\n"
    more += f"        if self.training:\n            {line}\n        return dense\n"
    section = Student(arch=f"{module(NET, more)}:Two")
    student = build_student(section, C, side=64)
    with pytest.raises(StudentError, match=says) as raised:
        check_batch(student, section, 2, 64)
    assert "\n" not in str(raised.value)


def test_code_that_changed_in_one_session(module, tmp_path):
    """What was imported runs, is what the student says it is made of, and a line says so."""
    name = module(NET)
    first = built(f"{name}:Net")
    (tmp_path / f"{name}.py").write_text(NET.replace("relu()", "sigmoid()"))
    again = built(f"{name}:Net")
    assert again.origin == first.origin
    assert any("has changed since this Python imported it" in note for note in again.notes)
    assert not any("has changed" in note for note in first.notes)


def test_a_module_of_the_same_name_elsewhere(module, tmp_path, monkeypatch):
    name = module(NET)
    built(f"{name}:Net")
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    built(f"{name}:Net")  # nothing of that name here
    (other / f"{name}.py").write_text(NET)
    with pytest.raises(StudentError, match=r"was imported from .* before, and .*other.* has the same name"):
        built(f"{name}:Net")


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_net_is_one_line(case, module):
    arch, text, options, says = WRONG[case]
    with pytest.raises(StudentError, match=says) as raised:
        built(arch.format(module(text)), options=options)
    assert "\n" not in str(raised.value)
    assert str(raised.value).endswith(".")


def test_train_and_doctor_say_so_before_any_work(cached_demo, module, tmp_path, run_cli):
    (tmp_path / "config").symlink_to(ROOT / "config")
    settings = [f"runs={tmp_path}/runs", f"cache.path={cached_demo}", *TINY, f"student.arch={module(NET)}:Net"]
    settings += ["student.options={stride: 16}"]
    words = [part for each in settings for part in ("--set", each)]
    for stage in ("train", "doctor"):
        assert is_one_line_error(run_cli(stage, *words, folder=tmp_path), "a stride of 16; want one of 1, 2, 4, 8")


def test_an_unknown_arch_names_all_kinds():
    with pytest.raises(
        StudentError, match=r"Segformer.*SegNeXt.*torchvision:fcn_resnet50.*hf:<folder.*<module>:<Class>"
    ):
        built("Segfomer")


def rates(student):
    """Learning rate of each parameter of the net, encoder 1 and the rest 10."""
    groups = parameter_groups(student, nn.Linear(1, 1), lr=1.0, head_lr_factor=10.0, decay=0.0)
    of = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    return {name: of[id(parameter)] for name, parameter in student.net.named_parameters()}


def test_what_counts_as_the_encoder(module):
    name = module(NET)
    student = built(f"{name}:Net")
    assert student.encoder_parts == ("encoder",)
    assert {part for part, rate in rates(student).items() if rate == 1} == {"encoder.weight", "encoder.bias"}
    student = built(f"{name}:Net", encoder_parts=("norm", "head.bias"))
    assert {part for part, rate in rates(student).items() if rate == 1} == {"norm.weight", "norm.bias", "head.bias"}
    with pytest.raises(StudentError, match=r"encoder_parts 'enc': .* has no such part.*encoder, norm, head\."):
        built(f"{name}:Net", encoder_parts=("enc",))
    student = built(f"{module(NET.replace('self.encoder', 'self.first'))}:Net")
    assert set(rates(student).values()) == {10.0}
    assert any("none of its parts is an encoder" in note for note in student.notes)
    assert built(f"{module(NET.replace('self.encoder', 'self.backbone'))}:Net").encoder_parts == ("backbone",)


@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_any_stride_becomes_four(stride, module):
    student = built(f"{module(NET)}:Net", options={"stride": stride}).eval()
    assert student(torch.zeros(1, 3, 70, 90)).shape == (1, C, 17, 22)


def test_looking_at_a_net_changes_nothing(module):
    """First weights and batch norm's means are those of the class alone, and so is what is drawn next."""
    name = module(NET)
    torch.manual_seed(0)
    student = built(f"{name}:Net")
    drawn = torch.rand(1)
    torch.manual_seed(0)
    alone = sys.modules[name].Net(channels=C)
    assert torch.equal(drawn, torch.rand(1))
    assert student.training
    assert all(torch.equal(value, alone.state_dict()[key]) for key, value in student.net.state_dict().items())


def test_a_net_that_has_no_shapes_alone(module):
    """One that looks at values is run for what others say on torch's meta device."""
    text = NET.replace(
        "        return", "        if images.mean().item() > 99:\n            return None\n        return"
    )
    arch = f"{module(text)}:Net"
    student = built(arch)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    check_batch(student, Student(arch=arch), 1, 64)
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())
    cost = cost_of(Student(arch=arch), C, 64)
    # 16 x 16 positions, each 4 x 4 x 3 numbers into 8, and 8 into 6.
    assert cost.multiply_adds == 16 * 16 * (4 * 4 * 3 * 8 + 8 * 6)
    with pytest.raises(StudentError, match="no images of 96 x 96"):
        built(f"{module(text.replace('images.mean().item() > 99', 'images.shape[2] == 96'))}:Net", side=96)


def test_a_net_of_one_size(module):
    text = NET.replace("        return", "        assert images.shape[2:] == (96, 96)\n        return")
    assert built(f"{module(text)}:Net", side=96).eval()(torch.zeros(1, 3, 96, 96)).shape == (1, C, 24, 24)


def test_layers_that_get_no_gradient_are_named(module):
    text = NET.replace("self.norm =", "self.idle = nn.Linear(2, 2)\n        self.norm =")
    assert any(
        "2 parameters get no gradient, the first idle.weight" in note for note in built(f"{module(text)}:Net").notes
    )


def test_weights_of_the_whole_net(module, tmp_path):
    name = module(NET)
    other = sys.modules[name].Net(channels=21) if name in sys.modules else built(f"{name}:Net", channels=21).net
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in other.state_dict().items()}}, tmp_path / "a.pth"
    )
    student = built(f"{name}:Net", weights=str(tmp_path / "a.pth"))
    assert torch.equal(student.net.encoder.weight, other.encoder.weight)
    assert torch.equal(student.net.norm.running_mean, other.norm.running_mean)
    assert any("2 of 2 tensors of the encoder and 4 of the rest loaded" in note for note in student.notes)
    assert any("of another shape, so drawn anew: head.bias, head.weight" in note for note in student.notes)


def test_code_that_changed_in_the_middle_of_a_training(cached_demo, module, tmp_path, run_cli):
    name = module(NET)
    (tmp_path / "config").symlink_to(ROOT / "config")
    settings = [f"runs={tmp_path}/runs", f"cache.path={cached_demo}", *TINY, f"student.arch={name}:Net"]
    words = [part for each in [*settings, "student.options={}"] for part in ("--set", each)]
    assert run_cli("train", *words, folder=tmp_path).returncode == 0
    folder = tmp_path / "runs" / "demo" / "train"
    for ended in ("train.manifest.json", "student.safetensors"):
        (folder / ended).unlink()
    (tmp_path / f"{name}.py").write_text(NET.replace("self.norm(", "self.norm(1.0 * "))
    sys.modules.pop(name)
    done = run_cli("train", *words, folder=tmp_path)
    assert done.returncode == 0
    assert "that its net is built from has changed since" in done.stderr
    for ended in ("train.manifest.json", "student.safetensors"):
        (folder / ended).unlink()
    (tmp_path / f"{name}.py").write_text(NET.replace("width=8", "width=16"))
    sys.modules.pop(name)
    assert is_one_line_error(run_cli("train", *words, folder=tmp_path), "its weights don't fit the student")


TORCHVISION = ["lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large", "fcn_resnet50"]


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvisions_models_are_torchvisions(name, tmp_path):
    """The whole file, classifier left out; then the same logits where the classifier is put back."""
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=21).eval()
    path = tmp_path / "model.pth"
    torch.save(model.state_dict(), path)
    student = built(f"torchvision:{name}", channels=8, weights=str(path)).eval()
    assert student.encoder_parts == ("backbone",)
    (note,) = [note for note in student.notes if "student.weights" in note]
    assert "missing: none; of another shape, so drawn anew: classifier." in note
    last = [layer for layer in student.net.classifier.modules() if getattr(layer, "out_channels", 0) == 8]
    assert last
    assert all(layer.weight.std().item() == pytest.approx(HEAD_STD, rel=0.3) for layer in last)
    same = built(f"torchvision:{name}", channels=21, weights=str(path)).eval()
    same.net.classifier.load_state_dict(model.classifier.state_dict())
    images = torch.rand(1, 3, 64, 64)
    dense = same.net(images)
    assert dense.shape == (1, 21, 8, 8)
    if name != "deeplabv3_mobilenet_v3_large":  # stride 16, enlarged in two steps
        enlarged = nn.functional.interpolate(dense, (64, 64), mode="bilinear", align_corners=False)
        assert torch.allclose(enlarged, model(images)["out"], atol=1e-5)


def test_a_backbones_own_file(tmp_path):
    backbone = torchvision.models.mobilenet_v3_large()
    torch.save(backbone.state_dict(), tmp_path / "backbone.pth")
    student = built("torchvision:lraspp_mobilenet_v3_large", weights=str(tmp_path / "backbone.pth"))
    assert torch.equal(student.net.backbone["0"][0].weight, backbone.features[0][0].weight)
    assert any("left out: classifier.0.weight" in note and "missing: none" in note for note in student.notes)


def test_what_torchvision_has_not(monkeypatch):
    with pytest.raises(StudentError, match=r"no such model; want one of torchvision:deeplabv3_mobilenet_v3_large, "):
        built("torchvision:unet")
    with pytest.raises(StudentError, match=r"student\.options aux_loss: torchvision:fcn_resnet50 takes none"):
        built("torchvision:fcn_resnet50", options={"aux_loss": True})

    def download(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    with pytest.raises(
        StudentError, match=r"IMAGENET1K_V1 can't be had: no route\. Offline, set student\.encoder_weights"
    ):
        built("torchvision:lraspp_mobilenet_v3_large")


def test_the_run_folder_says_which_net(cached_demo, module, tmp_path, run_cli):
    name = module(NET)
    (tmp_path / "config").symlink_to(ROOT / "config")
    settings = [f"runs={tmp_path}/runs", f"cache.path={cached_demo}", *TINY, f"student.arch={name}:Net"]
    words = [part for each in [*settings, "student.options={width: 9}"] for part in ("--set", each)]
    assert run_cli("train", *words, folder=tmp_path).returncode == 0
    manifest = json.loads((tmp_path / "runs" / "demo" / "train" / "train.manifest.json").read_text())
    assert manifest["asked"]["student.arch"] == f"{name}:Net"
    assert manifest["asked"]["student.options.width"] == 9
    assert f"arch: {name}:Net" in Path(tmp_path / "runs" / "demo" / "config.yaml").read_text()
