"""The segmenter that is taught: the only door to timm and segmentation_models_pytorch.

Axes: B images, C = the teacher's channels, H = W = S / 4.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, cast

import segmentation_models_pytorch as smp
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import Student, UserError
from pipeline.models.segnext import SegNext, published_names

HEAD_STD = (
    0.01  # mmseg's init of its last layer; a longer R makes GLM's attention (eq. 1) a spike from the start
)
STRIDE = 4  # of the dense output; SegFormer's (method section 4)
DIVISOR = 32  # of the input's sides: encoders halve it five times
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
# What segmentation_models_pytorch lacks.
OWN_ARCHS: dict[str, Any] = {"segnext": SegNext, "deeplabv2": DeepLabV2}


def build_student(section: Student, channels: int, *, pretrained: bool = True) -> DenseStudent:
    """Builds encoder and decoder by name; `pretrained=False` skips all weights (a checkpoint follows).

    Raises: StudentError naming the arch, the encoder or the option that doesn't exist.
    """
    archs = {name.lower(): arch for name, arch in vars(smp).items() if _is_arch(arch)} | OWN_ARCHS
    if section.arch.lower() not in archs:
        raise StudentError(
            f"student.arch {section.arch!r}: want one of {', '.join(a.__name__ for a in archs.values())}."
        )
    build = _own_net if section.arch.lower() in OWN_ARCHS else _smp_net
    try:
        net = build(archs[section.arch.lower()], section, channels, pretrained and section.weights is None)
        if pretrained and section.weights is not None:
            _load_encoder(net, section.weights)
    except Exception as error:  # timm, smp, the hub and torch each raise their own
        what = " ".join(str(error).split())[:300]
        raise StudentError(
            f"student {section.arch} on {section.encoder!r} (weights {section.weights or section.encoder_weights!r}): "
            f"{what}. Offline, set student.encoder_weights to null or student.weights to a file."
        ) from None
    head = next(
        layer
        for layer in reversed(list(cast(nn.Module, net.segmentation_head).modules()))
        if isinstance(layer, nn.Conv2d)
    )
    nn.init.normal_(head.weight, std=HEAD_STD)
    if head.bias is not None:
        nn.init.zeros_(head.bias)
    return DenseStudent(net, section.mean, section.std)


@dataclass(frozen=True)
class StudentCost:
    """What one image costs; a multiply-add counts once here, twice as FLOP."""

    parameters: int
    multiply_adds: float


def cost_of(section: Student, channels: int, side: int) -> StudentCost:
    """Of a forward over one image of side x side, counted on shapes alone (torch's meta device).

    Convolutions and matrix products count; norms, activations, pooling and resizing don't. Raises: StudentError.
    """
    student = build_student(section, channels, pretrained=False).eval()
    parameters = sum(parameter.numel() for parameter in student.parameters())
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        student.to("meta")(torch.empty(1, 3, side, side, device="meta"))
    return StudentCost(parameters, counter.get_total_flops() / 2)


def _smp_net(arch: Any, section: Student, channels: int, pretrained: bool) -> nn.Module:
    options: dict[str, Any] = dict(section.options)
    if "upsampling" in inspect.signature(arch).parameters:
        options.setdefault("upsampling", 1)  # leave the logits on the decoder's own grid
    return smp.create_model(
        section.arch,
        encoder_name=section.encoder,
        encoder_weights=section.encoder_weights if pretrained else None,
        classes=channels,
        **options,
    )


def _own_net(arch: Any, section: Student, channels: int, pretrained: bool) -> nn.Module:
    if arch is DeepLabV2:
        return arch(
            section.encoder, channels, section.encoder_weights if pretrained else None, **section.options
        )
    if pretrained and section.encoder_weights is not None:
        raise StudentError(
            f"no weights of {section.encoder!r} can be downloaded by name; put the published file into student.weights"
        )
    return arch(section.encoder, channels, **section.options)


def _load_encoder(net: nn.Module, path: str) -> None:
    """Encoder weights of a local file: safetensors or a state dict, MSCAN's under their published names."""
    if path.endswith(".safetensors"):
        state: dict[str, Any] = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = dict(state.get("state_dict", state))
    if isinstance(net, SegNext):
        state = published_names(state)
    cast(nn.Module, net.encoder).load_state_dict(state)


def _is_arch(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, smp.base.SegmentationModel)


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
