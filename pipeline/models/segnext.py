"""SegNeXt: the MSCAN encoder and its Hamburger decoder, which neither timm nor segmentation_models_pytorch has.

Source: Guo et al., SegNeXt (2022, arXiv 2209.08575), and for the decoder Geng et al., Is Attention Better Than
Matrix Decomposition? (2021, arXiv 2109.04553). Published encoder weights load by renaming (`published_names`).

Axes: B images, D channels, H x W positions, N = H * W, R bases.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize, softmax

from pipeline.config import UserError


@dataclass(frozen=True)
class Size:
    """One row of the paper's Table 2; decoder widths from its configs."""

    channels: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    drop_path: float
    decoder: int


EXPANSION = (8, 8, 4, 4)  # of the feed-forward part, stage by stage (Table 2)
SIZES = {
    "mscan_t": Size((32, 64, 160, 256), (3, 3, 5, 2), 0.1, 256),
    "mscan_s": Size((64, 128, 320, 512), (2, 2, 4, 2), 0.1, 256),
    "mscan_b": Size((64, 128, 320, 512), (3, 3, 12, 3), 0.1, 512),
    "mscan_l": Size((64, 128, 320, 512), (3, 5, 27, 3), 0.3, 1024),
}
STRIPS = (7, 11, 21)  # lengths of the strip convolutions (Section 3.1)
LAYER_SCALE = 1e-2  # initial weight of a residual branch (the published code)
# R, updates in training and after, 1/t (the published configs)
BASES, STEPS, EVAL_STEPS, SHARPNESS = 16, 6, 7, 100.0
GROUPS = 32  # of the decoder's group norm (the published configs)
TINY = 1e-6


def _depthwise(width: int, kernel: int | tuple[int, int]) -> nn.Conv2d:
    size = (kernel, kernel) if isinstance(kernel, int) else kernel
    return nn.Conv2d(width, width, size, padding=(size[0] // 2, size[1] // 2), groups=width)


class MultiScaleAttention(nn.Module):
    """Eq. 1-2: a 5 x 5 convolution, three pairs of strips, a mixing 1 x 1, and their product with the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.into = nn.Conv2d(width, width, 1)
        self.local = _depthwise(width, 5)
        self.strips = nn.ModuleList(
            nn.Sequential(_depthwise(width, (1, length)), _depthwise(width, (length, 1))) for length in STRIPS
        )
        self.mix = nn.Conv2d(width, width, 1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, features: Tensor) -> Tensor:
        entered = nn.functional.gelu(self.into(features))
        near = self.local(entered)
        weight = self.mix(near + sum(strip(near) for strip in self.strips))
        return self.out(weight * entered) + features


class FeedForward(nn.Module):
    """1 x 1, 3 x 3 of each channel, GELU, 1 x 1."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.rise = nn.Conv2d(width, hidden, 1)
        self.depthwise = _depthwise(hidden, 3)
        self.fall = nn.Conv2d(hidden, width, 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.fall(nn.functional.gelu(self.depthwise(self.rise(features))))


class Block(nn.Module):
    """Attention, then the feed-forward part, each with batch norm before and a learned scale after."""

    def __init__(self, width: int, expansion: int, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.attention = MultiScaleAttention(width)
        self.feed = FeedForward(width, expansion * width)
        self.scale1 = nn.Parameter(torch.full((width,), LAYER_SCALE))
        self.scale2 = nn.Parameter(torch.full((width,), LAYER_SCALE))
        self.drop = DropPath(drop_path)

    def forward(self, features: Tensor) -> Tensor:
        features = features + self.drop(self.scale1[:, None, None] * self.attention(self.norm1(features)))
        return features + self.drop(self.scale2[:, None, None] * self.feed(self.norm2(features)))


class Mscan(nn.Module):
    """The encoder. Shapes: images (B, 3, S, S) -> features at strides 4, 8, 16 and 32."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        rates = torch.linspace(0, size.drop_path, sum(size.depths)).tolist()
        self.downs, self.stages, self.norms = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        before = 3
        for width, depth, expansion in zip(size.channels, size.depths, EXPANSION, strict=True):
            self.downs.append(_stem(width) if before == 3 else _halving(before, width))
            self.stages.append(nn.Sequential(*(Block(width, expansion, rates.pop(0)) for _ in range(depth))))
            self.norms.append(nn.LayerNorm(width, eps=TINY))
            before = width

    def forward(self, images: Tensor) -> list[Tensor]:
        features, found = images, []
        for down, stage, norm in zip(self.downs, self.stages, self.norms, strict=True):
            features = stage(down(features))
            features = norm(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            found.append(features)
        return found


def _halving(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after))


def _stem(width: int) -> nn.Sequential:
    return nn.Sequential(*_halving(3, width // 2), nn.GELU(), *_halving(width // 2, width))


class MatrixDecomposition(nn.Module):
    """Hamburger's bread removed: the features' non-negative factorisation of rank R, and nothing else of them.

    The bases start from a fixed draw, so that evaluation repeats; in training a new one each call, as published.
    Shapes: (B, D, H, W), not negative -> the same.
    """

    start: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        drawn = torch.rand(width, BASES, generator=torch.Generator().manual_seed(0))
        self.register_buffer("start", drawn, persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        batch, width, height, across = features.shape
        found = features.flatten(2).float()  # (B, D, N)
        drawn = torch.rand_like(self.start.expand(batch, -1, -1)) if self.training else self.start
        bases = normalize(drawn.float().expand(batch, width, BASES), dim=1)  # (B, D, R)
        codes = softmax(SHARPNESS * found.transpose(1, 2) @ bases, dim=-1)  # (B, N, R)
        for _ in range(STEPS if self.training else EVAL_STEPS):
            codes = _updated(codes, found.transpose(1, 2) @ bases, bases)
            bases = _updated(bases, found @ codes, codes)
        codes = _updated(codes, found.transpose(1, 2) @ bases, bases)
        return (bases @ codes.transpose(1, 2)).view(batch, width, height, across).to(features.dtype)


def _updated(factor: Tensor, wanted: Tensor, other: Tensor) -> Tensor:
    """Lee and Seung's multiplicative update of one factor, the other held."""
    return factor * wanted / (factor @ (other.transpose(1, 2) @ other) + TINY)


class Hamburger(nn.Module):
    """The decoder: strides 8, 16 and 32 squeezed together, factorised, put out at stride 8."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width = size.decoder
        self.squeeze = nn.Sequential(*_grouped(sum(size.channels[1:]), width), nn.ReLU())
        self.enter = nn.Conv2d(width, width, 1)
        self.decompose = MatrixDecomposition(width)
        self.leave = nn.Sequential(*_grouped(width, width))
        self.align = nn.Sequential(*_grouped(width, width), nn.ReLU())

    def forward(self, features: list[Tensor]) -> Tensor:
        size = features[1].shape[2:]
        joined = [interpolate(f, size, mode="bilinear", align_corners=False) for f in features[1:]]
        squeezed = self.squeeze(torch.cat(joined, dim=1))
        context = self.leave(self.decompose(self.enter(squeezed).relu()))
        return self.align((squeezed + context).relu())


def _grouped(before: int, after: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(before, after, 1, bias=False), nn.GroupNorm(GROUPS, after)


class SegNext(nn.Module):
    """Encoder, decoder and a last layer of C channels, named as segmentation_models_pytorch names its parts.

    Shapes: images (B, 3, S, S) -> (B, C, S/8, S/8).
    Raises: UserError for an unknown encoder, and for weights by name: none are published where they can be fetched.
    """

    def __init__(self, encoder: str, classes: int, weights: str | None = None, dropout: float = 0.1) -> None:
        super().__init__()
        if encoder not in SIZES:
            raise UserError(f"SegNeXt has no encoder {encoder!r}, only {', '.join(SIZES)}")
        if weights is not None:
            raise UserError(
                f"no weights of {encoder!r} can be downloaded by name; put the published file into student.weights"
            )
        size = SIZES[encoder]
        self.encoder, self.decoder = Mscan(size), Hamburger(size)
        self.segmentation_head = nn.Sequential(nn.Dropout2d(dropout), nn.Conv2d(size.decoder, classes, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.segmentation_head(self.decoder(self.encoder(images)))


# Published names of an encoder's tensors -> ours, the first pattern that fits.
PUBLISHED = (
    (r"^patch_embed1\.proj\.(\d)\.", r"downs.0.\1."),
    (r"^patch_embed(\d)\.proj\.", r"downs.<\1>.0."),
    (r"^patch_embed(\d)\.norm\.", r"downs.<\1>.1."),
    (r"^norm(\d)\.", r"norms.<\1>."),
    (r"^block(\d)\.(\d+)\.norm(\d)\.", r"stages.<\1>.\2.norm\3."),
    (r"^block(\d)\.(\d+)\.layer_scale_(\d)$", r"stages.<\1>.\2.scale\3"),
    (r"^block(\d)\.(\d+)\.attn\.proj_1\.", r"stages.<\1>.\2.attention.into."),
    (r"^block(\d)\.(\d+)\.attn\.proj_2\.", r"stages.<\1>.\2.attention.out."),
    (r"^block(\d)\.(\d+)\.attn\.spatial_gating_unit\.conv0\.", r"stages.<\1>.\2.attention.local."),
    (r"^block(\d)\.(\d+)\.attn\.spatial_gating_unit\.conv3\.", r"stages.<\1>.\2.attention.mix."),
    (r"^block(\d)\.(\d+)\.attn\.spatial_gating_unit\.conv(\d)_([12])\.", r"stages.<\1>.\2.attention.strips.\3.<\4>."),
    (r"^block(\d)\.(\d+)\.mlp\.fc1\.", r"stages.<\1>.\2.feed.rise."),
    (r"^block(\d)\.(\d+)\.mlp\.fc2\.", r"stages.<\1>.\2.feed.fall."),
    (r"^block(\d)\.(\d+)\.mlp\.dwconv\.dwconv\.", r"stages.<\1>.\2.feed.depthwise."),
)


def published_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A published MSCAN checkpoint's tensors under our names; ours are left as they are, its classifier left out."""
    state = {name.removeprefix("backbone."): value for name, value in state.items()}
    renamed = {}
    for name, value in state.items():
        if name.startswith(("head.", "decode_head.")):
            continue
        for pattern, ours in PUBLISHED:
            if re.match(pattern, name):
                name = re.sub(r"<(\d)>", lambda found: str(int(found[1]) - 1), re.sub(pattern, ours, name))
                break
        renamed[name] = value
    return renamed
