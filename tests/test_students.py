"""Students against what is published of them: parameters and cost at 512 x 512 with 150 classes."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import Eval, Student, load
from pipeline.learning.inference import class_logits
from pipeline.models.student import StudentError, build_student, check_batch, licence_of
from tests.conftest import ROOT, TINY, is_one_line_error

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


def built(arch, encoder, side=None, **more):
    return build_student(Student(arch=arch, encoder=encoder, **{"encoder_weights": None, **more}), 8, side=side)


def test_an_option_that_smp_would_drop_without_a_word():
    with pytest.raises(StudentError, match=r"decoder_pyramid_channel: .*nearest is decoder_pyramid_channels\."):
        built("FPN", "resnet18", options={"decoder_pyramid_channel": 64})
    with pytest.raises(StudentError, match=r"student\.options classes: is set by"):
        built("FPN", "resnet18", options={"classes": 5})


@pytest.mark.parametrize(
    ("encoder", "near"),
    [("mit_b9", "mit_b5, mit_b4"), ("resnet10t", "tu-resnet10t"), ("tu-resnet10tt", "tu-resnet10t")],
)
def test_an_unknown_encoder_names_the_nearest(encoder, near):
    with pytest.raises(StudentError) as raised:
        built("Segformer", encoder)
    assert near in str(raised.value)
    assert "Offline" not in str(raised.value), "a name that doesn't exist is nowhere to be had"
    assert str(raised.value).endswith(".")


def test_weights_that_are_not_there():
    with pytest.raises(StudentError, match=r"`imagenett`.*Available options are: \['imagenet'"):
        built("FPN", "resnet18", encoder_weights="imagenett")
    with pytest.raises(StudentError, match=r"Invalid pretrained tag.*tu-resnet10t\.c3_in1k"):
        built("FPN", "tu-resnet10t.no_such")
    with pytest.raises(StudentError, match=r"student\.weights nowhere\.pt: .*No such file"):
        built("FPN", "resnet18", weights="nowhere.pt")


def test_a_download_that_fails(monkeypatch):
    """Only then is being offline the matter; the reason is cut between words."""

    def download(*_, **__):
        raise OSError("no route to " + "somewhere " * 100)

    monkeypatch.setattr("segmentation_models_pytorch.encoders.hf_hub_download", download)
    with pytest.raises(StudentError, match=r"somewhere \.\.\.\. Offline, set student\.encoder_weights to null"):
        built("FPN", "resnet18", encoder_weights="imagenet")


@pytest.mark.parametrize("side", [64, 100])
def test_a_vision_transformer_takes_the_views_side_and_others(side):
    student = built("DPT", "tu-vit_tiny_patch16_224", side).eval()
    for each in (side, 224, 96):
        assert student(torch.zeros(1, 3, each, each)).shape == (1, 8, each // 4, each // 4)
    section = Student(arch="DPT", encoder="tu-vit_tiny_patch16_224", encoder_weights=None)
    check_batch(student, section, 1, side)
    assert not student.training


def test_swin_is_built_for_the_views_side():
    options = {"decoder_channels": 32}
    student = built("UPerNet", "tu-swin_tiny_patch4_window7_224", 64, options=options).eval()
    assert student(torch.zeros(1, 3, 64, 64)).shape == (1, 8, 16, 16)
    assert student(torch.zeros(1, 3, 96, 96)).shape == (1, 8, 24, 24)


def test_a_side_that_a_student_cannot_take():
    # Windows of 7 at strides 4 to 32: 224, 448, 672. Built for 144, padded to 160, they are 144 / 32 = 4: 40 / 4 fits,
    # the last stage's 5 don't.
    with pytest.raises(StudentError, match=r"144 x 144 \(.*divisible by window.*it takes 224, 448, 672"):
        built("UPerNet", "tu-maxvit_tiny_tf_224", 144)
    with pytest.raises(StudentError, match=r"PAN on 'resnet18': no images of 64 x 64.*it takes 128"):
        built("PAN", "resnet18", 64)


def test_looking_for_a_side_draws_nothing():
    """First weights are those of a student that was built without looking."""
    students = []
    for side in (None, 64):
        torch.manual_seed(0)
        students.append(built("FPN", "tu-resnet10t", side))
    first, second = (student.state_dict() for student in students)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("arch", ["DeepLabV3Plus", "PAN", "UPerNet"])
def test_one_image_is_too_few_for_a_batch_norm_of_1_x_1(arch):
    section = Student(arch=arch, encoder="resnet18", encoder_weights=None)
    student = build_student(section, 8, side=128)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    check_batch(student, section, 2, 128)
    with pytest.raises(StudentError, match=rf"{arch} pools to 1 x 1.*train\.batch leaves 1"):
        check_batch(student, section, 1, 128)
    assert student.training
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_train_and_doctor_say_so_before_any_work(cached_demo, tmp_path, run_cli):
    settings = [f"runs={tmp_path}", f"cache.path={cached_demo}", *TINY, "student.arch=PAN", "train.batch=1"]
    settings += ["student.options={}"]
    arguments = [part for setting in settings for part in ("--set", setting)]
    for command in ("train", "doctor"):
        assert is_one_line_error(run_cli(command, *arguments), "student.arch PAN", "train.batch leaves 1")


def test_scales_that_a_student_of_one_side_cannot_look_at():
    student = built("UPerNet", "tu-maxvit_tiny_tf_224", 64).eval()
    image = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(StudentError, match=r"eval\.scales: .*96 x 96"):
        class_logits(student, torch.eye(8), image, 64, Eval(scales=(1.5,)))


def test_what_starts_by_itself_may_be_used_at_work(run_cli):
    """The default, and the preset for data of one's own; what is known of an encoder's licence is said."""
    own = load(ROOT / "config" / "vit_b16.yaml").student
    assert {licence_of(section) for section in (Student(), own)} == {"apache-2.0"}
    assert licence_of(Student(encoder="mit_b0")).startswith("NVIDIA Source Code License")
    assert licence_of(Student(encoder="tu-convnextv2_atto")) == "cc-by-nc-4.0"
    for silent in ({"encoder_weights": None}, {"weights": "a.pth"}, {"arch": "mynets:Net"}, {"encoder": "mscan_t"}):
        assert licence_of(Student(**silent)) == ""
    said = run_cli("doctor", "--dry", "--config", "config/voc.yaml").stderr
    assert "weights of mit_b4 are under NVIDIA Source Code License" in " ".join(said.split())


def test_every_presets_encoder_stands_in_the_table_of_licences():
    table = (ROOT / "docs" / "students.md").read_text().partition("| licence of its code |")[2].partition("\n\n")[0]
    families = ("mit_b", "tu-pvt_v2", "tu-swin", "tu-convnext", "tu-edgenext_xx_small", "resnet", "mscan_")
    assert all(f"`{family}" in table for family in families)
    for path in (ROOT / "config").glob("*.yaml"):
        if path.stem != "environment":
            assert load(path).student.encoder.startswith(families), path
