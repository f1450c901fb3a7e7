"""Students against what is published of them: parameters and cost at 512 x 512 with 150 classes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import Student
from pipeline.models.student import StudentError, build_student

# encoder, decoder channels, millions of parameters, GFLOPs (multiplications); SegFormer's Table 1 and its configs.
PUBLISHED = {"mit_b0": (256, 3.8, 8.4), "mit_b4": (768, 64.1, 95.7)}


@pytest.mark.parametrize("encoder", PUBLISHED)
def test_segformer_is_the_published_one(encoder):
    channels, parameters, gflops = PUBLISHED[encoder]
    options = {"decoder_segmentation_channels": channels}
    student = build_student(Student(encoder=encoder, encoder_weights=None, options=options), 150).eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        out = student.to("meta")(torch.empty(1, 3, 512, 512, device="meta"))
    assert out.shape == (1, 150, 128, 128)
    assert round(sum(p.numel() for p in student.parameters()) / 1e6, 1) == parameters
    assert counter.get_total_flops() / 2e9 == pytest.approx(gflops, rel=0.01)


def test_deeplabv2_is_the_published_one():
    """ResNet-101 without its classifier, 42.5 M, and four 3 x 3 convolutions of 2048 x 21 with biases."""
    student = build_student(Student(arch="DeepLabV2", encoder="resnet101", encoder_weights=None), 21).eval()
    heads = 4 * (9 * 2048 * 21 + 21)
    assert sum(p.numel() for p in student.net.segmentation_head.parameters()) == heads
    assert sum(p.numel() for p in student.parameters()) == 42_500_160 + heads
    student.to("meta")
    assert student(torch.empty(1, 3, 321, 321, device="meta")).shape == (1, 21, 80, 80)
    assert student.net.encoder(torch.empty(1, 3, 320, 320, device="meta"))[-1].shape == (1, 2048, 40, 40)


@pytest.mark.parametrize(("arch", "encoder"), [("Segformer", "mit_b0"), ("FPN", "tu-resnet10t")])
def test_a_side_that_is_no_multiple_of_32_is_padded_and_cut(arch, encoder):
    """224 and 336 pixels of patches of 14; what is added says nothing of the rest."""
    student = build_student(Student(arch=arch, encoder=encoder, encoder_weights=None), 8).eval()
    image = torch.rand(1, 3, 84, 84) * 255
    wide = torch.cat([image, student.mean.expand(1, 3, 84, 12)], 3)
    wide = torch.cat([wide, student.mean.expand(1, 3, 12, 96)], 2)
    with torch.inference_mode():
        assert torch.equal(student(image), student(wide)[:, :, :21, :21])


def test_an_option_that_a_decoder_lacks():
    for arch in ("DeepLabV2", "FPN"):
        section = Student(arch=arch, encoder="tu-resnet10t", encoder_weights=None, options={"no_such": 1})
        with pytest.raises(StudentError, match="no_such"):
            build_student(section, 8)
