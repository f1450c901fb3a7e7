"""Hugging Face's nets as students: from a random config in a folder, offline, through every command."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from pipeline.config import Student, UserError
from pipeline.learning.checkpoint import load_student
from pipeline.models.dense import HEAD_STD, StudentError
from pipeline.models.student import build_student
from tests.conftest import ROOT, TINY, is_one_line_error

SWIN = transformers.SwinConfig(
    embed_dim=16, depths=[1] * 4, num_heads=[1, 1, 2, 2], out_features=[f"stage{i}" for i in range(1, 5)]
)
VIT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 64}
CONFIGS = {
    "segformer": transformers.SegformerConfig(
        hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16
    ),
    "upernet": transformers.UperNetConfig(backbone_config=SWIN, hidden_size=32, auxiliary_channels=16),
    "dpt": transformers.DPTConfig(
        **VIT, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=16
    ),
    "beit": transformers.BeitConfig(**VIT, out_indices=[1, 2, 3, 4], auxiliary_channels=16),
}
STRIDES = {"segformer": 4, "upernet": 4, "dpt": 2, "beit": 4}
LABELS, C = 5, 6


def saved(folder, kind="segformer", **more):
    """A model with random weights, as save_pretrained leaves it."""
    config = type(CONFIGS[kind]).from_dict(CONFIGS[kind].to_dict() | {"num_labels": LABELS} | more)
    model = transformers.AutoModelForSemanticSegmentation.from_config(config).eval()
    model.save_pretrained(folder)
    return model


def built(folder, channels=C, **more):
    return build_student(Student(arch=f"hf:{folder}", **more), channels, side=64)


@pytest.fixture
def settings(cached_demo, tmp_path):
    """A tiny run whose student is the SegFormer in a folder, by its config alone."""
    folder = tmp_path / "model"
    CONFIGS["segformer"].save_pretrained(folder)
    chosen = [f"runs={tmp_path}/runs", f"cache.path={cached_demo}", *TINY, f"student.arch=hf:{folder}"]
    chosen += ["student.encoder_weights=null", "student.options={drop_path_rate: 0.2}"]
    return [part for each in chosen for part in ("--set", each)]


def test_segformer_of_a_random_config_through_every_command(settings, tmp_path, run_cli):
    """A saved student needs the folder no more."""
    for stage in (["doctor", "--dry"], ["train"], ["eval"]):
        done = run_cli(*stage, *settings)
        assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / "model")
    run = tmp_path / "runs" / "demo"
    student, checkpoint = load_student(run / "train" / "student.safetensors")
    assert student.encoder_parts == ("model.segformer",)
    assert student.net.model.config.drop_path_rate == 0.2
    assert student.net.model.config.num_labels == checkpoint.text.shape[1]
    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)).save(picture)
    for words in (
        ["predict", picture, "--run", run, "--out", tmp_path / "found"],
        ["export", run, "--out", tmp_path / "model.onnx"],
        ["eval", *settings, "--on", "demo_other"],
    ):
        done = run_cli(*words)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "found" / "picture.mask.png").is_file()
    assert (tmp_path / "model.onnx").is_file()


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_same_features_as_transformers(kind, tmp_path):
    """With the classifier put back, its own logits; before their enlargement, where it enlarges them."""
    model = saved(tmp_path, kind)
    student = built(tmp_path, LABELS).eval()
    theirs = model.state_dict()
    last = [name for name in theirs if name.split(".")[-2] in ("classifier", "4") and not name.startswith("auxiliary")]
    assert len(last) == 2
    for name, value in student.net.model.state_dict().items():
        if name in last:
            value.copy_(theirs[name])
        assert torch.equal(value, theirs[name]), name
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        found, wanted = student.net(images), model(pixel_values=images).logits
    assert found.shape == (2, LABELS, 64 // STRIDES[kind], 64 // STRIDES[kind])
    if found.shape != wanted.shape:
        ends_in_corners = kind == "dpt"  # its nn.Upsample is made with align_corners
        found = torch.nn.functional.interpolate(found, (64, 64), mode="bilinear", align_corners=ends_in_corners)
    assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_classifier_of_c_channels(kind, tmp_path):
    saved(tmp_path, kind)
    student = built(tmp_path)
    (note,) = [note for note in student.notes if "tensors of the encoder" in note]
    assert "missing: none" in note
    assert "of another shape, so drawn anew: " in note
    layers = [layer for layer in student.net.modules() if getattr(layer, "out_channels", 0) == C]
    assert len(layers) == 1
    assert layers[0].weight.std().item() == pytest.approx(HEAD_STD, rel=0.3)
    assert not layers[0].bias.any()
    assert not any(name.startswith("model.auxiliary") for name, _ in student.net.named_parameters())
    encoder = {name for name, _ in student.net.named_parameters() if student.is_encoder(name)}
    assert encoder == {name for name, _ in student.net.named_parameters() if name.split(".")[1] in (kind, "backbone")}


def test_half_precision_becomes_single(tmp_path):
    model = saved(tmp_path).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in built(tmp_path).parameters()} == {torch.float32}
    (tmp_path / "model.safetensors").unlink()
    assert {p.dtype for p in built(tmp_path, encoder_weights=None).parameters()} == {torch.float32}


def test_weights_of_an_encoder(tmp_path):
    """As NVIDIA's mit-b* are published: a classifier of images on the same encoder."""
    CONFIGS["segformer"].save_pretrained(tmp_path)
    published = transformers.SegformerForImageClassification(CONFIGS["segformer"])
    published.save_pretrained(tmp_path / "published")
    file = tmp_path / "published" / "model.safetensors"
    student = built(tmp_path, weights=str(file))
    theirs = published.segformer.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in student.net.model.segformer.state_dict().items())
    (note,) = student.notes
    assert f"student.weights {file} into hf:{tmp_path}: " in note
    assert "left out: classifier.bias, classifier.weight" in note
    other = transformers.BertModel(
        transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    )
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(StudentError, match="holds 0 % of the encoder, want 50 % at least"):
        built(tmp_path, weights=str(tmp_path / "other" / "model.safetensors"))


def test_a_folder_of_another_normalisation_says_so(tmp_path):
    saved(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    assert any("normalised with mean [0.5, 0.5, 0.5]" in note for note in built(tmp_path).notes)
    assert not any("normalised" in note for note in built(tmp_path, mean=(0.5,) * 3, std=(0.5,) * 3).notes)


def test_what_is_wrong_with_a_folder_is_one_line(tmp_path):
    def says(match, folder=tmp_path, **more):
        with pytest.raises(StudentError, match=match) as raised:
            built(folder, **more)
        assert "\n" not in str(raised.value)

    says("there is no folder .*nowhere", tmp_path / "nowhere")
    says("has no config.json")
    (tmp_path / "config.json").write_text("{")
    says("hf:.*: ")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    says("no_such_model")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    says("transformers has no semantic segmentation of model_type 'bert'; want one of beit, .*segformer")
    CONFIGS["segformer"].save_pretrained(tmp_path)
    says(r"no \*\.safetensors in .*Set student\.encoder_weights to null")
    torch.save({}, tmp_path / "pytorch_model.bin")
    says("its pytorch_model.bin is a pickle")
    says("options depth: SegformerConfig .* the nearest is depths", encoder_weights=None, options={"depth": [1]})
    says("options num_labels: follows from the rest", encoder_weights=None, options={"num_labels": 3})
    says("a stride of 16; want one of", encoder_weights=None, options={"strides": [16, 1, 1, 1], "sr_ratios": [1] * 4})
    (tmp_path / "model.safetensors").write_bytes(b"no such thing")
    says("hf:.*: ")


def test_a_name_that_the_hub_has_not(monkeypatch):
    """Not a folder: the hub is asked, which isn't there."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        StudentError, match=r"hf:nobody/nothing: is no folder here, and can't be had from the hub: "
    ) as raised:
        built("nobody/nothing")
    assert "\n" not in str(raised.value)


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: ...\nclass Net: ...\n")
    config = {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForSemanticSegmentation": "evil.Net"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(StudentError):
        built(tmp_path, encoder_weights=None)
    assert not (tmp_path / "ran").exists()


def test_without_transformers(settings, run_cli, monkeypatch):
    import pipeline.train  # noqa: F401  (torchmetrics takes transformers where it is)

    monkeypatch.setitem(sys.modules, "transformers", None)
    done = run_cli("train", *settings)
    assert is_one_line_error(done, "needs the package transformers", "pip install -e '.[hf]'")
    with pytest.raises(UserError):
        built(ROOT)


def test_building_draws_what_the_seed_says(tmp_path):
    saved(tmp_path)
    students = []
    for _ in range(2):
        torch.manual_seed(0)
        students.append(built(tmp_path, encoder_weights=None))
    first, second = (student.state_dict() for student in students)
    assert all(torch.equal(first[name], second[name]) for name in first)
