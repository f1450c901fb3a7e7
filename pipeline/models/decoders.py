"""Students of segmentation_models_pytorch's decoders, and of our own two, over the encoders of smp and timm.

The only door to timm and segmentation_models_pytorch. Axes: B images, C = the teacher's channels.
"""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Callable
from itertools import islice
from typing import Any, cast

import segmentation_models_pytorch as smp
import timm
import torch
from torch import Tensor, nn

from pipeline.config import Student, UserError
from pipeline.models.dense import DIVISOR, HEAD_STD, DenseStudent, StudentError, parts_of, refused, said, start_head
from pipeline.models.published import load, match, read_state
from pipeline.models.segnext import SegNext, published_names

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
ARCHS = {
    name: arch
    for name, arch in (vars(smp) | {"SegNeXt": SegNext, "DeepLabV2": DeepLabV2}).items()
    if isinstance(arch, type) and issubclass(arch, (smp.base.SegmentationModel, *OWN_ARCHS))
}


def decoder_student(section: Student, channels: int, side: int | None, pretrained: bool) -> DenseStudent:
    """Builds encoder and decoder by name.

    With `side`, timm's encoders are built so that they take it, and others where they can.
    Raises: StudentError naming the encoder or the option that doesn't exist, or sides that the student takes.
    """
    arch = {name.lower(): arch for name, arch in ARCHS.items()}[section.arch.lower()]
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
        return DenseStudent(net, section.mean, section.std, encoder_parts=parts_of(net, section, ("encoder",)))

    try:
        student = made({})
    except Exception as error:  # timm, smp, the hub and torch each raise their own
        raise _explained(section, arch, error, lambda: made({}, False)) from None
    if side is not None:
        student = _taking(student, side, section, made)
    if pretrained and section.weights is not None:
        student.notes.append(_loaded(student, section.weights, section.encoder))
    layers = cast(nn.Module, student.net.segmentation_head).modules()
    start_head([layer for layer in layers if isinstance(layer, nn.Conv2d)][-1])
    return student


def licence(section: Student) -> str:
    """What is known of the licence of an encoder's published weights, docs/students.md; "" of others."""
    name = section.encoder
    if name.startswith("mit_"):
        return "NVIDIA Source Code License, code and weights: research and evaluation only"
    if not name.startswith("tu-"):
        return ""
    record = timm.get_pretrained_cfg(name.removeprefix("tu-"), allow_unregistered=True)
    return str(record.license) if record is not None and record.license else ""


def _loaded(student: DenseStudent, path: str, name: str) -> str:
    """Fills the encoder from a local file, and the decoder where the file has it; what to say of that."""
    net, state = student.net, read_state(path)
    if isinstance(net, SegNext):
        state = published_names(state)
    found = match(net, state, student.is_encoder)
    if (renamed := _as_timm_names(net.encoder, state)) is not None:
        other = match(net, renamed, student.is_encoder)
        if len(other.pairs) > len(found.pairs):
            state, found = renamed, other
    return load(net, state, found, student.is_encoder, f"student.weights {path} into {name}")


def _as_timm_names(encoder: Any, state: dict[str, Any]) -> dict[str, Any] | None:
    """A checkpoint of a net's authors as timm names its tensors and has their shapes, where timm knows how.

    Each of timm's models has its own conversion, which expects the model that it is for.
    """
    model = getattr(encoder, "model", None)
    if not isinstance(encoder, smp.encoders.TimmUniversalEncoder) or model is None:
        return None
    try:
        module = sys.modules[timm.model_entrypoint(encoder.name.partition(".")[0]).__module__]
        convert = getattr(module, "checkpoint_filter_fn", None)
        found = None if convert is None else convert(dict(state), getattr(model, "model", model))
    except Exception:  # not of these authors, or of another size
        return None
    return found if isinstance(found, dict) else None


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
        return StudentError(f"{what}: {said(error)}. Published are {tags}.")
    if "Wrong pretrained weights" in str(error):
        return StudentError(f"{what}: {said(error)}. Set student.encoder_weights to one of them, or to null.")
    if section.encoder_weights is not None and section.weights is None:
        try:
            without()
        except Exception:
            pass  # the weights aren't what is wrong
        else:
            return StudentError(
                f"{what}, weights {section.encoder_weights!r}: {said(error)}. Offline, set student.encoder_weights "
                "to null or student.weights to a file."
            )
    return StudentError(f"{what}: {said(error)}. Change student.arch, student.encoder or student.options.")


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
    raise StudentError(f"{what} ({said(error)}); {todo}.")


def _net(arch: Any, section: Student, channels: int, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    weights = section.encoder_weights if pretrained else None
    if arch in OWN_ARCHS:
        return arch(section.encoder, channels, weights, **options)
    if "upsampling" in inspect.signature(arch).parameters:
        options.setdefault("upsampling", 1)  # leave the logits on the decoder's own grid
    return smp.create_model(section.arch, section.encoder, weights, classes=channels, **options)
