"""SegNeXt against what is published of it: parameters, cost, names, and its factorisation on a case worked by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import Student
from pipeline.models.segnext import SIZES, MatrixDecomposition, Mscan, SegNext, _updated, published_names
from pipeline.models.student import StudentError, build_student

# Millions of parameters and GFLOPs (multiplications) at 512 x 512 and 150 classes, of the published table.
PUBLISHED = {"mscan_t": (4.3, 6.6), "mscan_s": (13.9, 15.9), "mscan_b": (27.6, 34.9), "mscan_l": (48.9, 70.0)}


@pytest.mark.parametrize("encoder", SIZES)
def test_parameters_and_cost_are_the_published_ones(encoder):
    """On torch's meta device: shapes and counts without the arithmetic."""
    model = SegNext(encoder, 150).eval().to("meta")
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        out = model(torch.empty(1, 3, 512, 512, device="meta"))
    parameters, gflops = PUBLISHED[encoder]
    assert out.shape == (1, 150, 64, 64)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == parameters
    # torch counts convolutions and matrix products; what else the published tool counted isn't stated.
    assert 0.93 * gflops < counter.get_total_flops() / 2e9 <= gflops


def test_one_update_by_hand():
    # X = [[1, 2], [3, 4]] = D C^T with D = (1, 1)^T and C = (1, 1)^T:
    # C * X^T D / (C D^T D) = (1, 1) * (4, 6) / (2, 2) = (2, 3).
    x, bases, codes = torch.tensor([[[1.0, 2], [3, 4]]]), torch.ones(1, 2, 1), torch.ones(1, 2, 1)
    assert torch.allclose(_updated(codes, x.transpose(1, 2) @ bases, bases), torch.tensor([[[2.0], [3.0]]]))


def test_the_factorisation_keeps_what_is_of_low_rank():
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(1, 32, 2, generator=generator) @ torch.rand(1, 2, 36, generator=generator)
    features = low.view(1, 32, 6, 6)
    module = MatrixDecomposition(32).eval()
    kept = module(features)
    assert ((kept - features).norm() / features.norm()) < 0.1
    assert torch.equal(kept, module(features))


def published_name(name):
    """Ours turned into theirs, written down independently of the table in the module."""
    part, stage, rest = name.split(".", 2)
    number = int(stage) + 1
    if part == "norms":
        return f"norm{number}.{rest}"
    if part == "downs":
        layer, _, tensor = rest.partition(".")
        if number == 1:
            return f"patch_embed1.proj.{layer}.{tensor}"
        return f"patch_embed{number}.{'proj' if layer == '0' else 'norm'}.{tensor}"
    index, _, rest = rest.partition(".")
    gate = "attn.spatial_gating_unit."
    for ours, theirs in {
        "scale1": "layer_scale_1",
        "scale2": "layer_scale_2",
        "attention.into": "attn.proj_1",
        "attention.out": "attn.proj_2",
        "attention.local": gate + "conv0",
        "attention.mix": gate + "conv3",
        "attention.strips.0.0": gate + "conv0_1",
        "attention.strips.0.1": gate + "conv0_2",
        "attention.strips.1.0": gate + "conv1_1",
        "attention.strips.1.1": gate + "conv1_2",
        "attention.strips.2.0": gate + "conv2_1",
        "attention.strips.2.1": gate + "conv2_2",
        "feed.rise": "mlp.fc1",
        "feed.fall": "mlp.fc2",
        "feed.depthwise": "mlp.dwconv.dwconv",
    }.items():
        if rest == ours or rest.startswith(ours + "."):
            rest = theirs + rest[len(ours) :]
            break
    return f"block{number}.{index}.{rest}"


def test_published_weights_load_under_our_names():
    model = Mscan(SIZES["mscan_t"])
    state = model.state_dict()
    theirs = {published_name(name): value for name, value in state.items()} | {"head.weight": torch.ones(1)}
    assert "block3.4.attn.spatial_gating_unit.conv2_1.weight" in theirs
    assert "patch_embed1.proj.0.weight" in theirs
    renamed = published_names(theirs)
    assert renamed.keys() == state.keys()
    assert all(renamed[name] is value for name, value in state.items())
    assert published_names({f"backbone.{k}": v for k, v in theirs.items()}).keys() == state.keys()


def test_gradients_reach_the_first_layer():
    model = SegNext("mscan_t", 4)
    model(torch.rand(2, 3, 64, 64)).square().sum().backward()
    assert model.encoder.downs[0][0].weight.grad.abs().sum() > 0


def test_segnext_is_a_student_like_any_other(tmp_path):
    section = Student(arch="SegNeXt", encoder="mscan_t", encoder_weights=None)
    student = build_student(section, 16).eval()
    assert student(torch.zeros(1, 3, 64, 96)).shape == (1, 16, 16, 24)
    theirs = {published_name(name): value for name, value in student.net.encoder.state_dict().items()}
    torch.save({"state_dict": theirs | {"head.weight": torch.ones(1)}}, tmp_path / "mscan_t.pth")
    again = build_student(section.model_copy(update={"weights": str(tmp_path / "mscan_t.pth")}), 16)
    for name, value in student.net.encoder.state_dict().items():
        assert torch.equal(value, again.net.encoder.state_dict()[name]), name
    with pytest.raises(StudentError, match=r"mscan_x.*only mscan_t, mscan_s"):
        build_student(section.model_copy(update={"encoder": "mscan_x"}), 16)
    with pytest.raises(StudentError, match=r"published file into student\.weights"):
        build_student(section.model_copy(update={"encoder_weights": "imagenet"}), 16)
