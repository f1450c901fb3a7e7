"""The student as ONNX: the same numbers in onnxruntime, whatever the sizes and the classes."""

import json

import numpy as np
import onnxruntime
import pytest
import torch
from torch.nn.functional import normalize

from pipeline.config import Config, Student
from pipeline.learning.checkpoint import Checkpoint, save_student
from pipeline.models.student import build_student
from tests.conftest import is_one_line_error


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A student's file with three classes, and the student."""
    config = Config(student=Student(arch="FPN", encoder="tu-resnet10t", encoder_weights=None))
    torch.manual_seed(0)
    student = build_student(config.student, 16).eval()
    with torch.no_grad():  # the last layer starts near zero; a trained one has logits of some size
        student.net.segmentation_head[0].weight.mul_(100)
    text = normalize(torch.randn(3, 16), dim=1)
    path = tmp_path_factory.mktemp("trained") / "student.safetensors"
    save_student(path, student, Checkpoint(config, "print", ("sky", "sea", "boat"), ("boat",), text))
    return path, student


def test_onnxruntime_agrees_with_torch(trained, run_cli, tmp_path):
    path, student = trained
    done = run_cli("export", path, "--out", tmp_path / "net.onnx")
    assert done.returncode == 0, done.stderr
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    known = session.get_modelmeta().custom_metadata_map
    assert (json.loads(known["classes"]), json.loads(known["unseen"])) == (["sky", "sea", "boat"], ["boat"])
    assert np.load(tmp_path / "net.text.npy").shape == (3, 16)
    for batch, height, width, classes in ((1, 96, 96, 3), (3, 64, 160, 7)):
        images = 255 * torch.rand(batch, 3, height, width)
        text = normalize(torch.randn(classes, 16), dim=1)
        (logits,) = session.run(None, {"images": images.numpy(), "text": text.numpy()})
        with torch.inference_mode():
            wanted = torch.einsum("bchw,kc->bkhw", student(images), text)
        assert logits.shape == (batch, classes, height // 4, width // 4)
        assert wanted.abs().max() > 0.1
        assert np.abs(logits - wanted.numpy()).max() < 1e-3


def test_a_file_that_differs_from_torch_is_not_left(trained, run_cli, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.export.TOLERANCE", 0)
    monkeypatch.setattr("pipeline.export._written", fake)
    done = run_cli("export", trained[0], "--out", tmp_path / "net.onnx")
    assert is_one_line_error(done, "FPN", "can't be written as ONNX", "--size")
    assert list(tmp_path.iterdir()) == []


def fake(model, text, size):
    """An ONNX model with the right names that gives zeros."""
    from onnx import TensorProto, helper

    shapes = {"images": ["B", 3, "H", "W"], "text": ["K", 16], "logits": [1]}
    made = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, s) for name, s in shapes.items()}
    zero = helper.make_node("Constant", [], ["logits"], value=helper.make_tensor("zero", TensorProto.FLOAT, [1], [0.0]))
    graph = helper.make_graph([zero], "fake", [made["images"], made["text"]], [made["logits"]])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_wrong_input(trained, run_cli, tmp_path):
    done = run_cli("export", trained[0], "--out", tmp_path / "net.onnx", "--size", 100)
    assert is_one_line_error(done, "--size 100", "multiple of 32")
    assert is_one_line_error(run_cli("export", tmp_path / "nowhere"), "no trained student")
