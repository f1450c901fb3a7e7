"""The student as the rest of the code knows it: whatever the net is, C channels at stride 4.

Axes: B images, C = the teacher's channels, H = W = S / 4.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import interpolate, pad

from pipeline.config import Student, UserError

STRIDE = 4  # of the dense output; SegFormer's (method section 4)
STRIDES = (1, 2, 4, 8)  # that a net may have: up to SegNeXt's and DeepLab's, which are enlarged to STRIDE
DIVISOR = 32  # of the input's sides: encoders halve it five times
# mmseg's init of its last layer; a longer R makes GLM's attention (eq. 1) a spike from the start.
HEAD_STD = 0.01
MOST_SAID = 300  # characters of another library's error


class StudentError(UserError):
    """The student can't be built as the config asks."""


class DenseStudent(nn.Module):
    """A net that gives C channels at a stride of STRIDES, normalised images going in.

    Shapes: images (B, 3, S, S) float, normalised -> R (B, C, S/4, S/4).
    `encoder_parts`: dotted names of the net's modules that are its encoder. `origin`: what the net is built from beside
    the config, plain values that travel with the weights. `notes`: lines on how it was built, for the terminal.
    `is_foreign`: a net that may not run on shapes alone.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        net: nn.Module,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        encoder_parts: tuple[str, ...] = ("encoder",),
        origin: dict[str, Any] | None = None,
        is_foreign: bool = False,
    ) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.encoder_parts, self.origin, self.is_foreign = encoder_parts, origin or {}, is_foreign
        self.notes: list[str] = []

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, S, S) in 0..255 RGB, uint8 or float; of any S, padded to what encoders can halve."""
        pixels = (images.float() - self.mean) / self.std
        height, width = pixels.shape[2:]
        below, right = -height % DIVISOR, -width % DIVISOR
        if below or right:  # the patch size of ViT-L/14 is no power of two
            pixels = pad(pixels, (0, right, 0, below))
        dense = self.net(pixels)
        if not isinstance(dense, Tensor):  # seen in evaluation before, but some nets give more in training
            raise StudentError(f"the net gives a {type(dense).__name__}, not one tensor. Give one in both.")
        size = (pixels.shape[2] // STRIDE, pixels.shape[3] // STRIDE)
        if dense.shape[2:] != size:
            dense = interpolate(dense, size, mode="bilinear", align_corners=False)
        return dense[:, :, : height // STRIDE, : width // STRIDE]

    def is_encoder(self, name: str) -> bool:
        """Whether a parameter of the net, called by its dotted name there, is the encoder's."""
        return any(name == part or name.startswith(f"{part}.") for part in self.encoder_parts)


def parts_of(net: nn.Module, section: Student, usual: Sequence[str], inside: str = "") -> tuple[str, ...]:
    """The encoder's parts as the config names them, else the first of `usual` that the net has, else none.

    `inside`: the module that they are named in. Raises: StudentError for a part without parameters.
    """
    names = [name for name, _ in net.named_parameters()]

    def is_there(part: str) -> bool:
        return any(f"{name}.".startswith(f"{inside}{part}.") for name in names)

    if section.encoder_parts is None:
        return tuple(f"{inside}{part}" for part in usual if is_there(part))[:1]
    for part in section.encoder_parts:
        if not is_there(part):
            tops = dict.fromkeys(name.removeprefix(inside).partition(".")[0] for name in names)
            raise StudentError(
                f"student.encoder_parts {part!r}: {section.arch} has no such part with parameters. Its parts are "
                f"{', '.join(tops)}."
            )
    return tuple(f"{inside}{part}" for part in section.encoder_parts)


def start_head(layer: nn.Module) -> None:
    """Draws a last layer's weights as mmseg does, its bias zero."""
    nn.init.normal_(layer.weight, std=HEAD_STD)  # type: ignore[arg-type]
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]


def refused(student: DenseStudent, side: int) -> Exception | None:
    """What a forward in evaluation raises at a side, on shapes alone where the net can."""
    try:
        try_shapes(student, 1, side, training=False)
    except Exception as error:  # each net raises its own
        return error
    return None


def try_shapes(student: DenseStudent, batch: int, side: int, *, training: bool) -> None:
    """A forward on shapes alone (torch's meta device) that leaves the student as it is; raises what it raises.

    A foreign net that fails there, since it makes tensors on the CPU or looks at values, is run as it is.
    """
    try:
        forward_on(student, batch, side, "meta", training=training)
    except Exception:
        if not student.is_foreign:
            raise
        device = next(chain(student.parameters(), student.buffers())).device
        with torch.random.fork_rng(devices=[]):
            forward_on(student, batch, side, str(device), training=training)


def forward_on(student: DenseStudent, batch: int, side: int, device: str, *, training: bool) -> None:
    """A forward over zeros with copies of the student's tensors on a device."""
    was_training = student.training
    tensors = chain(student.named_parameters(), student.named_buffers())
    state = {name: value.detach().to(device, copy=True) for name, value in tensors}
    student.train(training)
    try:
        with torch.no_grad():
            functional_call(student, state, (torch.zeros(batch, 3, side, side, device=device),))
    finally:
        student.train(was_training)


def said(error: Exception) -> str:
    """Another library's error on one line, cut between words, without its final stop."""
    text = " ".join((str(error) or type(error).__name__).split()).rstrip(".")
    return textwrap.shorten(text, MOST_SAID, placeholder=" ...")
