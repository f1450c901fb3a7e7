"""student.weights: files as they are published go into the encoder, and what did is said."""

import re

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.config import Student
from pipeline.models.dense import StudentError
from pipeline.models.published import match
from pipeline.models.student import build_student


def filled(state, path, arch="FPN", encoder="tu-resnet10t", **more):
    """A student with a state dict for weights, in safetensors or pickled."""
    state = {name: value.contiguous() for name, value in state.items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return build_student(Student(arch=arch, encoder=encoder, weights=str(path), **more), 8, side=64)


def as_published_by_its_authors(state):
    """timm's PVTv2 under the names of the authors' own files."""
    found = {}
    for name, value in state.items():
        name = re.sub(r"stages\.(\d)\.blocks\.", lambda at: f"block{int(at[1]) + 1}.", name)
        name = re.sub(r"stages\.(\d)\.norm", lambda at: f"norm{int(at[1]) + 1}", name)
        name = re.sub(r"stages\.(\d)\.downsample", lambda at: f"patch_embed{int(at[1]) + 1}", name)
        name = re.sub(r"^patch_embed\.", "patch_embed1.", name).replace("dwconv.", "dwconv.dwconv.")
        found[name] = value
    return found


LAYOUTS = {
    "timm's": lambda state: state,
    "of a trainer": lambda state: {f"module.backbone.{name}": value for name, value in state.items()},
    "its authors'": as_published_by_its_authors,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_default_encoder_from_a_file(layout, tmp_path):
    """All tensors in their places: the encoder gives the published net's features."""
    published = timm.create_model("pvt_v2_b0").eval()
    arch, encoder = Student().arch, Student().encoder
    assert encoder == "tu-pvt_v2_b0"
    student = filled(LAYOUTS[layout](published.state_dict()), tmp_path / "a.safetensors", arch, encoder).eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(student.net.encoder(images)[-1], published.forward_features(images))
    (note,) = student.notes
    assert note.startswith(
        f"student.weights {tmp_path}/a.safetensors into tu-pvt_v2_b0: 176 of 176 tensors of the encoder"
    )
    head = "module.backbone.head" if layout == "of a trainer" else "head"
    assert set(re.search("left out: (.*); missing: none", note)[1].split(", ")) == {f"{head}.weight", f"{head}.bias"}


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("UPerNet", "swin_tiny_patch4_window7_224"),
        ("UPerNet", "convnext_atto"),
        ("DPT", "vit_tiny_patch16_224"),
        ("Segformer", "edgenext_xx_small"),
        ("FPN", "mobilenetv3_small_050"),
    ],
)
def test_timms_files(arch, name, tmp_path):
    student = filled(timm.create_model(name).state_dict(), tmp_path / "a.pth", arch, f"tu-{name}")
    (note,) = student.notes
    (inside, of) = re.search(r"(\d+) of (\d+) tensors of the encoder loaded", note).groups()
    assert inside == of
    assert "missing: none" in note


def test_torchvisions_file_in_smps_encoder(tmp_path):
    published = timm.create_model("resnet18")  # its names are torchvision's
    student = filled(published.state_dict(), tmp_path / "a.pth", encoder="resnet18")
    assert torch.equal(student.net.encoder.layer4[1].conv2.weight, published.layer4[1].conv2.weight)
    assert "left out: fc.weight, fc.bias; missing: none" in student.notes[0]


def test_a_whole_students_file(tmp_path):
    published = smp.create_model("FPN", "tu-resnet10t", None, classes=3)
    student = filled(published.state_dict(), tmp_path / "a.pth")
    assert torch.equal(student.net.decoder.p5.weight, published.decoder.p5.weight)
    assert "of another shape, so drawn anew: segmentation_head.0.bias, segmentation_head.0.weight" in student.notes[0]


def test_what_is_missing_is_named(tmp_path):
    state = timm.create_model("resnet10t").state_dict()
    del state["layer1.0.conv1.weight"]
    (note,) = filled(state, tmp_path / "a.pth").notes
    assert "69 of 70 tensors" in note
    assert "missing: encoder.model.layer1.0.conv1.weight" in note


def test_less_than_half_of_the_encoder_is_an_error(tmp_path):
    with pytest.raises(StudentError, match=r"holds 0 % of the encoder, want 50 % at least.*of another shape"):
        filled(timm.create_model("pvt_v2_b1").state_dict(), tmp_path / "a.pth", "Segformer", "tu-pvt_v2_b0")
    state = timm.create_model("resnet10t").state_dict()
    large = {name: value for name, value in state.items() if name.startswith(("layer4", "conv1"))}  # 3.9 of 4.9 M
    filled(large, tmp_path / "a.pth")
    small = {name: value for name, value in state.items() if not name.startswith("layer4")}
    with pytest.raises(StudentError, match=r"holds 2\d % of the encoder") as raised:
        filled(small, tmp_path / "a.pth")
    assert "\n" not in str(raised.value)


def test_files_that_are_no_weights(tmp_path):
    def says(what, path):
        with pytest.raises(StudentError, match=what) as raised:
            build_student(Student(arch="FPN", encoder="tu-resnet10t", weights=str(path)), 8)
        assert "\n" not in str(raised.value)

    says("No such file", tmp_path / "none.pth")
    for name in ("a.pth", "a.safetensors"):
        (tmp_path / name).write_bytes(b"no such thing")
        says("can't be read: ", tmp_path / name)
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")  # a pickle of code
    says("can't be read: .*Want safetensors or a state dict", tmp_path / "module.pth")
    torch.save({"epoch": 3}, tmp_path / "b.pth")
    says("holds no tensors by name", tmp_path / "b.pth")
    state = timm.create_model("resnet10t").state_dict()
    state["bn1.weight"][0] = torch.nan
    torch.save(state, tmp_path / "c.pth")
    says("bn1.weight holds values that aren't finite", tmp_path / "c.pth")


def test_names_by_hand():
    """Two layers and a head; in the file under another prefix, one of another shape, one too many."""
    net = nn.ModuleDict(
        {"encoder": nn.ModuleDict({"a_0": nn.Linear(2, 2), "b": nn.Linear(2, 2)}), "head": nn.Linear(2, 3)}
    )
    file = {"model.a.0.weight": torch.ones(2, 2), "model.a.0.bias": torch.ones(2), "model.b.weight": torch.ones(2, 2)}
    file |= {"model.b.bias": torch.ones(5), "model.c": torch.ones(1)}
    found = match(net, file, lambda name: name.startswith("encoder."))
    assert found.pairs == {
        "encoder.a_0.weight": "model.a.0.weight",
        "encoder.a_0.bias": "model.a.0.bias",
        "encoder.b.weight": "model.b.weight",
    }
    assert found.misshapen == ["encoder.b.bias"]
    assert found.left_out == ["model.c"]
