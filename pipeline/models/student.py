"""The segmenter that is taught: the only door to timm and segmentation_models_pytorch.

Axes: B images, C = the teacher's channels, H = W = S / 4.
"""

from __future__ import annotations

import difflib
import inspect
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, cast

import segmentation_models_pytorch as smp
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import interpolate, pad
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import Student, UserError
from pipeline.models.segnext import SegNext, published_names

# mmseg's init of its last layer; a longer R makes GLM's attention (eq. 1) a spike from the start.
HEAD_STD = 0.01
STRIDE = 4  # of the dense output; SegFormer's (method section 4)
DIVISOR = 32  # of the input's sides: encoders halve it five times
MOST_SIDE = 1024  # up to which sides that a student takes are looked for, when it doesn't take the views'
# What makes timm's encoders take a side they weren't published for: ViT resizes its positions at every call, Swin and
# its kin are built for a side and pad others, the rest are built for a side.
SIDE_OPTIONS: tuple[Callable[[int], dict[str, Any]], ...] = (
    lambda side: {"dynamic_img_size": True},
    lambda side: {"img_size": side, "strict_img_size": False},
    lambda side: {"img_size": side},
)
# No options: they follow from other keys.
GIVEN = ("encoder_name", "encoder_weights", "in_channels", "classes")
MOST_SAID = 300  # characters of another library's error
PARAMETERS_WITHOUT_DECAY = ("pos_embed", "position", "relative_position_bias_table")


class StudentError(UserError):
    """The student can't be built as the config asks."""


class DenseStudent(nn.Module):
    """Any decoder of segmentation_models_pytorch, or one of our own, with C output channels at stride 4.

    Shapes: images (B, 3, S, S) float, normalised -> R (B, C, S/4, S/4).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, S, S) in 0..255 RGB, uint8 or float; of any S, padded to what encoders can halve."""
        pixels = (images.float() - self.mean) / self.std
        height, width = pixels.shape[2:]
        below, right = -height % DIVISOR, -width % DIVISOR
        if below or right:  # the patch size of ViT-L/14 is no power of two
            pixels = pad(pixels, (0, right, 0, below))
        dense = self.net(pixels)
        size = (pixels.shape[2] // STRIDE, pixels.shape[3] // STRIDE)
        if dense.shape[2:] != size:
            dense = interpolate(dense, size, mode="bilinear", align_corners=False)
        return dense[:, :, : height // STRIDE, : width // STRIDE]


class DeepLabV2(nn.Module):
    """CLIP-ES's student: a dilated encoder at stride 8, and four dilated convolutions that add up.

    Shapes: images (B, 3, S, S) -> (B, C, S/8, S/8).
    Source: Chen et al., DeepLab (2016, arXiv 1606.00915), the large field of view (ASPP-L).
    """

    def __init__(self, encoder: str, classes: int, weights: str | None = None) -> None:
        super().__init__()
        self.encoder = smp.encoders.get_encoder(encoder, weights=weights, output_stride=8)
        width = self.encoder.out_channels[-1]
        self.segmentation_head = nn.ModuleList(
            nn.Conv2d(width, classes, 3, padding=rate, dilation=rate) for rate in ASPP_RATES
        )
        for branch in self.segmentation_head:
            nn.init.normal_(cast(nn.Conv2d, branch).weight, std=HEAD_STD)

    def forward(self, images: Tensor) -> Tensor:
        deepest = self.encoder(images)[-1]
        return sum((branch(deepest) for branch in self.segmentation_head), start=torch.zeros(()))


ASPP_RATES = (6, 12, 18, 24)  # ASPP-L's
OWN_ARCHS: tuple[Any, ...] = (SegNext, DeepLabV2)  # what segmentation_models_pytorch lacks


def build_student(section: Student, channels: int, *, side: int | None = None, pretrained: bool = True) -> DenseStudent:
    """Builds encoder and decoder by name; `pretrained=False` skips all weights (a checkpoint follows).

    With `side`, that of the views in pixels, timm's encoders are built so that they take it, and others where they can.
    Raises: StudentError naming the arch, the encoder or the option that doesn't exist, or sides that the student takes.
    """
    archs = {
        name.lower(): arch
        for name, arch in (vars(smp) | {own.__name__: own for own in OWN_ARCHS}).items()
        if isinstance(arch, type) and issubclass(arch, (smp.base.SegmentationModel, *OWN_ARCHS))
    }
    if section.arch.lower() not in archs:
        raise StudentError(
            f"student.arch {section.arch!r}: want one of {', '.join(a.__name__ for a in archs.values())}."
        )
    arch = archs[section.arch.lower()]
    if arch is not SegNext:  # it names its own
        _check_encoder(section.encoder)
    if given := [key for key in GIVEN if key in section.options]:
        raise StudentError(f"student.options {given[0]}: is set by the other keys of student. Leave it out.")
    known = _options_of(arch)
    # smp drops what its own encoders and decoders don't know.
    if not section.encoder.startswith(("tu-", "timm-")):
        for option in section.options.keys() - known:
            raise _no_option(section, option, known)

    def made(more: dict[str, Any], weights: bool = pretrained and section.weights is None) -> DenseStudent:
        net = _net(arch, section, channels, weights, more | section.options)
        return DenseStudent(net, section.mean, section.std)

    try:
        student = made({})
    except Exception as error:  # timm, smp, the hub and torch each raise their own
        raise _explained(section, arch, error, lambda: made({}, False)) from None
    if side is not None:
        student = _taking(student, side, section, made)
    net = student.net
    if pretrained and section.weights is not None:
        try:
            _load_encoder(net, section.weights)
        except Exception as error:
            raise StudentError(
                f"student.weights {section.weights}: no weights of {section.encoder!r}: {_said(error)}. Give the "
                "encoder's own file, or null."
            ) from None
    layers = cast(nn.Module, net.segmentation_head).modules()
    head = [layer for layer in layers if isinstance(layer, nn.Conv2d)][-1]
    nn.init.normal_(head.weight, std=HEAD_STD)
    if head.bias is not None:
        nn.init.zeros_(head.bias)
    return student


def _check_encoder(name: str) -> None:
    """Raises: StudentError with the nearest names that exist."""
    own, timms = smp.encoders.get_encoder_names(), [f"tu-{model}" for model in timm.list_models()]
    if name in own or name.startswith("timm-") or ":" in name:  # timm's models from a folder or a hub
        return
    if name.partition(".")[0] in timms:  # after the point, whose weights: timm names the ones that exist
        return
    plain = name.lower().removeprefix("tu-")
    near = difflib.get_close_matches(plain, [*own, *timms, *(each[3:] for each in timms)], 4)
    named = [each if each in own else f"tu-{each.removeprefix('tu-')}" for each in near]
    nearest = f"the nearest are {', '.join(dict.fromkeys(named))}" if near else "and none is called alike"
    raise StudentError(
        f"student.encoder {name!r}: no such encoder; {nearest}. docs/students.md lists some, with their sizes; timm's "
        "models go by tu-<name>."
    )


def _explained(section: Student, arch: Any, error: Exception, without: Callable[[], Any]) -> StudentError:
    """Why a student can't be built, with the cure that fits; `without` builds it without weights."""
    if isinstance(error, UserError):
        return StudentError(str(error))
    if found := re.search(r"unexpected keyword argument '(\w+)'", str(error)):
        return _no_option(section, found[1], _options_of(arch))
    what = f"student {section.arch} on {section.encoder!r}"
    if isinstance(error, KeyError):  # its text is the repr of what was missing
        error = ValueError(*error.args)
    if "Invalid pretrained tag" in str(error):
        name = section.encoder.removeprefix("tu-").partition(".")[0]
        tags = ", ".join(f"tu-{each}" for each in timm.list_pretrained(f"{name}.*")) or "none"
        return StudentError(f"{what}: {_said(error)}. Published are {tags}.")
    if "Wrong pretrained weights" in str(error):
        return StudentError(f"{what}: {_said(error)}. Set student.encoder_weights to one of them, or to null.")
    if section.encoder_weights is not None and section.weights is None:
        try:
            without()
        except Exception:
            pass  # the weights aren't what is wrong
        else:
            return StudentError(
                f"{what}, weights {section.encoder_weights!r}: {_said(error)}. Offline, set student.encoder_weights "
                "to null or student.weights to a file."
            )
    return StudentError(f"{what}: {_said(error)}. Change student.arch, student.encoder or student.options.")


def _options_of(arch: Any) -> list[str]:
    """What student.options may hold for the decoder."""
    parameters = inspect.signature(arch).parameters.values()
    taken = (*GIVEN, "encoder", "weights")
    return [each.name for each in parameters if each.kind != each.VAR_KEYWORD and each.name not in taken]


def _no_option(section: Student, option: str, known: list[str]) -> StudentError:
    near = difflib.get_close_matches(option, known, 1)
    return StudentError(
        f"student.options {option}: neither {section.arch} nor {section.encoder!r} knows it"
        + (f"; the nearest is {near[0]}" if near else "")
        + f". {section.arch} takes {', '.join(known) or 'none'}."
    )


def _said(error: Exception) -> str:
    """Another library's error on one line, cut between words, without its final stop."""
    text = " ".join((str(error) or type(error).__name__).split()).rstrip(".")
    return textwrap.shorten(text, MOST_SAID, placeholder=" ...")


def _taking(
    student: DenseStudent, side: int, section: Student, made: Callable[[dict[str, Any]], DenseStudent]
) -> DenseStudent:
    """The student, or the first built with SIDE_OPTIONS that takes the side; best, another side as well."""
    error = refused(student, side)
    other = side + DIVISOR  # of scales and windows at test time
    if error is None and (not section.encoder.startswith("tu-") or refused(student, other) is None):
        return student
    fallback, state = (student if error is None else None), torch.get_rng_state()
    for options in SIDE_OPTIONS if section.encoder.startswith("tu-") else ():
        torch.set_rng_state(state)
        try:
            found = made(options(side))
        except Exception:  # an encoder that has no such option
            continue
        if (why := refused(found, side)) is not None:
            error = why  # nearer to the point than that of a net that wasn't built for the side
            continue
        if refused(found, other) is None:
            return found
        fallback = fallback or found
    if fallback is not None:
        return fallback
    assert error is not None
    sides = sorted(range(DIVISOR, MOST_SIDE + 1, DIVISOR), key=lambda each: abs(each - side))
    fitting = list(islice((str(each) for each in sides if refused(student, each) is None), 3))
    todo = (
        f"it takes {', '.join(fitting)}, for example. Change teacher.image_size, or student.encoder"
        if fitting
        else f"nor of any side up to {MOST_SIDE}. Change student.encoder"
    )
    what = f"student {section.arch} on {section.encoder!r}: no images of {side} x {side}"
    raise StudentError(f"{what} ({_said(error)}); {todo}.")


def refused(student: DenseStudent, side: int) -> Exception | None:
    """What a forward in evaluation raises at a side, on shapes alone."""
    try:
        try_shapes(student, 1, side, training=False)
    except Exception as error:  # each net raises its own
        return error
    return None


def try_shapes(student: DenseStudent, batch: int, side: int, *, training: bool) -> None:
    """A forward on shapes alone (torch's meta device) that leaves the student as it is; raises what it raises."""
    was_training = student.training
    tensors = chain(student.named_parameters(), student.named_buffers())
    state = {name: value.detach().to("meta") for name, value in tensors}
    student.train(training)
    try:
        with torch.no_grad():
            functional_call(student, state, (torch.empty(batch, 3, side, side, device="meta"),))
    finally:
        student.train(was_training)


def check_batch(student: DenseStudent, section: Student, batch: int, side: int) -> None:
    """Raises: StudentError when a training step of `batch` images in one process can't be, before the first."""
    try:
        try_shapes(student, batch, side, training=True)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise StudentError(
            f"student.arch {section.arch} pools to 1 x 1, and its batch norm needs two images or more in each training "
            f"process; train.batch leaves {batch}. Raise train.batch, lower train.processes, or take another arch "
            "(Segformer, FPN)."
        ) from None


@dataclass(frozen=True)
class StudentCost:
    """What one image costs; a multiply-add counts once here, twice as FLOP."""

    parameters: int
    multiply_adds: float


def cost_of(section: Student, channels: int, side: int, batch: int = 2) -> StudentCost:
    """Of a forward over one image of side x side, counted on shapes alone (torch's meta device).

    Convolutions and matrix products count; norms, activations, pooling and resizing don't.
    Raises: StudentError, also for a `batch` of a training process that is too small.
    """
    student = build_student(section, channels, side=side, pretrained=False).eval()
    check_batch(student, section, batch, side)
    parameters = sum(parameter.numel() for parameter in student.parameters())
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        student.to("meta")(torch.empty(1, 3, side, side, device="meta"))
    return StudentCost(parameters, counter.get_total_flops() / 2)


def _net(arch: Any, section: Student, channels: int, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    weights = section.encoder_weights if pretrained else None
    if arch in OWN_ARCHS:
        return arch(section.encoder, channels, weights, **options)
    if "upsampling" in inspect.signature(arch).parameters:
        options.setdefault("upsampling", 1)  # leave the logits on the decoder's own grid
    return smp.create_model(section.arch, section.encoder, weights, classes=channels, **options)


def _load_encoder(net: nn.Module, path: str) -> None:
    """Encoder weights of a local file: safetensors or a state dict, MSCAN's under their published names."""
    if path.endswith(".safetensors"):
        state: dict[str, Any] = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = dict(state.get("state_dict", state.get("model", state)))
    if isinstance(net, SegNext):
        state = published_names(state)
    cast(nn.Module, net.encoder).load_state_dict(state)


def parameter_groups(
    student: DenseStudent, extra: nn.Module, *, lr: float, head_lr_factor: float, decay: float
) -> list:
    """AdamW's groups: encoder at lr, decoder, head and VLA at lr * factor; no decay on norms, biases, positions.

    Source: mmseg's SegFormer schedule (method section 4).
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    named = [(f"student.{n}", p) for n, p in student.named_parameters()]
    named += [(f"vla.{n}", p) for n, p in extra.named_parameters()]
    for name, parameter in named:
        if parameter.requires_grad:
            is_encoder = name.startswith("student.net.encoder.")
            has_decay = parameter.ndim > 1 and not any(part in name for part in PARAMETERS_WITHOUT_DECAY)
            groups.setdefault((is_encoder, has_decay), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": lr if is_encoder else lr * head_lr_factor,
            "weight_decay": decay if has_decay else 0.0,
        }
        for (is_encoder, has_decay), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
