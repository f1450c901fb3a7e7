"""The segmenter that is taught, built from the config and looked at before any work.

Axes: B images, C = the teacher's channels, H = W = S / 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import Student
from pipeline.models import decoders, huggingface, own_net, torchvision_nets
from pipeline.models.dense import DIVISOR, STRIDES, DenseStudent, StudentError, forward_on, refused, said, try_shapes

SMALL = 64  # side of the images that a foreign net is tried on
PARAMETERS_WITHOUT_DECAY = ("pos_embed", "position", "relative_position_bias_table")


def archs() -> str:
    """What student.arch may be, for an error: the one list of all kinds of net."""
    return (
        f"{', '.join(decoders.ARCHS)}; {', '.join(map('torchvision:{}'.format, torchvision_nets.names()))}; "
        "hf:<folder or name>; or a net of your own, <module>:<Class> (docs/extending.md)"
    )


def build_student(
    section: Student,
    channels: int,
    *,
    side: int | None = None,
    pretrained: bool = True,
    origin: dict[str, Any] | None = None,
) -> DenseStudent:
    """Builds the net by the name of its arch; `pretrained=False` skips all weights (a checkpoint follows).

    `side`: of the views in pixels, which the student must take. `origin`: a saved student's `origin`.
    Raises: StudentError naming the arch, the encoder, the module or the option that doesn't exist, sides that the
    student takes, or what is wrong with a net's output.
    """
    kind, colon, name = section.arch.partition(":")
    if not colon and kind.lower() in map(str.lower, decoders.ARCHS):
        return decoders.decoder_student(section, channels, side, pretrained)
    if not colon or not name:
        raise StudentError(f"student.arch {section.arch!r}: want one of {archs()}.")
    if kind == "torchvision":
        student = torchvision_nets.torchvision_student(section, channels, pretrained)
    elif kind == "hf":
        student = huggingface.huggingface_student(section, channels, pretrained, origin or {})
    else:
        student = own_net.own_student(section, channels, pretrained, origin or {})
    notes = check_net(student, section, channels, side)
    if pretrained:  # it is to be trained
        student.notes += notes
    return student


def check_net(student: DenseStudent, section: Student, channels: int, side: int | None) -> list[str]:
    """One small forward and backward of a foreign net, in evaluation, and its shapes at the views' side.

    Returns lines on how it will be trained: parameters without gradient, no encoder.
    Raises: StudentError for an output that isn't (B, channels, h, w) of a floating type at a stride of STRIDES, that
    isn't finite or that no gradient comes back from.
    """
    what, was_training = f"student {section.arch}", student.training
    student.eval()
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            notes = _check_output(student, channels, what, side)
    finally:
        student.train(was_training)
    if side is not None and (error := refused(student, side)) is not None:
        raise StudentError(
            f"{what}: no images of {side} x {side} ({said(error)}). Change teacher.image_size or student.options."
        )
    return notes


def _check_output(student: DenseStudent, channels: int, what: str, side: int | None) -> list[str]:
    tried = SMALL
    try:
        dense: Any = student.net(torch.rand(2, 3, tried, tried))
    except Exception as error:
        reason = own_net.placed(error)
        tried = -(-side // DIVISOR) * DIVISOR if side else SMALL
        try:  # a net of one size
            dense = None if tried == SMALL else student.net(torch.rand(2, 3, tried, tried))
        except Exception as other:
            reason, dense = own_net.placed(other), None
        if dense is None:
            raise StudentError(f"{what}: a forward over 2 images of {tried} x {tried} fails: {reason}.") from None
    wanted = f"want one tensor of shape (B, {channels}, h, w) for images (B, 3, H, W)"
    if not isinstance(dense, Tensor):
        raise StudentError(f"{what}: gives a {type(dense).__name__}; {wanted}.")
    given = f"gives {tuple(dense.shape)} for 2 images of {tried} x {tried}"
    if dense.ndim != 4 or len(dense) != 2:
        raise StudentError(f"{what}: {given}; {wanted}.")
    if dense.shape[1] != channels:
        raise StudentError(
            f"{what}: {given}, {dense.shape[1]} channels; want {channels}, the `channels` that it is called with."
        )
    rows, columns = dense.shape[2:]
    if rows != columns or tried not in [rows * stride for stride in STRIDES]:
        raise StudentError(
            f"{what}: {given}, a stride of {tried / max(rows, 1):.3g}; want one of {', '.join(map(str, STRIDES))}. "
            "Enlarge its features before the last layer, or keep them larger in its encoder."
        )
    if not dense.is_floating_point():
        raise StudentError(f"{what}: gives {dense.dtype}; want numbers of a floating type.")
    if not dense.isfinite().all():
        raise StudentError(f"{what}: gives numbers that aren't finite, from its first weights on.")
    trained = {name: value for name, value in student.net.named_parameters() if value.requires_grad}
    gradients: tuple[Any, ...] = ()
    if dense.requires_grad:
        gradients = torch.autograd.grad(dense.sum(), list(trained.values()), allow_unused=True)
    if all(gradient is None for gradient in gradients):
        raise StudentError(
            f"{what}: no gradient comes back from its output to any of its {len(trained)} trained parameters. Look for "
            "no_grad, detach or frozen layers in it."
        )
    notes, idle = [], [name for name, gradient in zip(trained, gradients, strict=True) if gradient is None]
    if idle:
        notes.append(f"{what}: {len(idle)} parameters get no gradient, the first {idle[0]}")
    if not student.encoder_parts:
        notes.append(
            f"{what}: none of its parts is an encoder, so all of it learns at train.lr x train.head_lr_factor "
            "(student.encoder_parts names them)"
        )
    return notes


def check_batch(student: DenseStudent, section: Student, batch: int, side: int) -> None:
    """Raises: StudentError when a training step of `batch` images in one process can't be, before the first."""
    try:
        # On shapes any batch costs nothing; a foreign net that must be run for it shows the same with two images.
        try_shapes(student, min(batch, 2) if student.is_foreign else batch, side, training=True)
    except StudentError as error:
        raise StudentError(f"student {section.arch}: in training {error}") from None
    except Exception as error:
        if "more than 1 value per channel" not in str(error):
            if not student.is_foreign:
                raise
            raise StudentError(
                f"student {section.arch}: in training a forward over images of {side} x {side} fails: "
                f"{own_net.placed(error)}."
            ) from None
        raise StudentError(
            f"student.arch {section.arch} pools to 1 x 1, and its batch norm needs two images or more in each training "
            f"process; train.batch leaves {batch}. Raise train.batch, lower train.processes, or take another arch "
            "(Segformer, FPN)."
        ) from None


def licence_of(section: Student) -> str:
    """What is known of the licence of the weights that a decoder's encoder starts from; "" where nothing is."""
    is_published = section.encoder_weights is not None and section.weights is None
    return decoders.licence(section) if is_published and ":" not in section.arch else ""


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
    return StudentCost(parameters, _flops(student, side) / 2)


def _flops(student: DenseStudent, side: int) -> float:
    """Of a forward over one image: on shapes alone, or as it is of a foreign net that can't."""
    for device in ("meta", "cpu"):
        counter = FlopCounterMode(display=False)
        try:
            with torch.random.fork_rng(devices=[]), counter:
                forward_on(student, 1, side, device, training=False)
        except Exception:
            if device == "cpu" or not student.is_foreign:
                raise
        else:
            break
    return counter.get_total_flops()


def parameter_groups(
    student: DenseStudent, extra: nn.Module, *, lr: float, head_lr_factor: float, decay: float
) -> list:
    """AdamW's groups: encoder at lr, decoder, head and VLA at lr * factor; no decay on norms, biases, positions.

    Source: mmseg's SegFormer schedule (method section 4).
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    named = [(name, p, student.is_encoder(name)) for name, p in student.net.named_parameters()]
    named += [(name, p, False) for name, p in extra.named_parameters()]
    for name, parameter, is_encoder in named:
        if parameter.requires_grad:
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
