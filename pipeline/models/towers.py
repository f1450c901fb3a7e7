"""open_clip's image towers behind one call: normalised pixels -> a global token and dense tokens of the joint space.

One rule makes dense tokens of all of them: what follows a tower's pooling, norms and projections, is run at each place
of its last feature map by itself. A mean over one place is the place, and attention over one place passes its value on
(the value path of MaskCLIP), so where nothing but a linear map follows an average, the dense tokens' mean is the global
token. Where a norm follows the average (ConvNeXt, CLIPA), each place takes it by itself.

Axes: B images, S image side, h = w = S / patch token grid, L = h * w, D width of the tower, C joint space.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import AttentionalPooler, VisionTransformer
from timm.layers import AttentionPool2d, AttentionPoolLatent
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import UserError

HAVE_DENSE = (
    "open_clip's own ViTs and ResNets, and timm's towers whose last feature map is a square grid: ViT, SigLIP, EVA-02, "
    "ViTamin, ConvNeXt, FastViT (MobileCLIP), Swin, ResNet"
)
CAN_EXPLAIN = "open_clip's own ViTs without attention pooling (ViT-B-16, ViT-L-14, ...)"
NEIGHBOURHOOD = 5.0  # tokens, the standard deviation of NACLIP's window


class TeacherError(UserError):
    """The teacher can't be built as the config asks."""


class Tower(Protocol):
    """What sees: all that a cache's tokens need of a model.

    patch: pixels of a token's side; can_explain: whether CAMs can be made of it (pipeline/models/explain.py);
    described: what dense tokens are, for the cache's provenance.
    """

    patch: int
    can_explain: bool
    described: str

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, S, S) normalised -> global tokens (B, C) and dense tokens (B, h, w, C), neither of unit norm."""
        ...


def tower_of(visual: nn.Module, dense: str = "paper") -> Tower:
    """The tower of a model of open_clip, `dense` as `teacher.dense` has it. Raises: TeacherError."""
    if isinstance(visual, VisionTransformer):
        return OwnViT(visual, dense)
    if dense != "paper":
        raise TeacherError(
            f"teacher.dense {dense!r} recomputes the last block of open_clip's own ViTs, and this image tower is "
            f"another ({_kind(visual)}): use paper."
        )
    if isinstance(visual, TimmModel):
        return TimmTower(visual)
    if isinstance(visual, ModifiedResNet):
        return ResNetTower(visual)
    raise no_dense_path(visual)


def no_dense_path(visual: nn.Module, why: str = "") -> TeacherError:
    return TeacherError(
        f"the image tower {_kind(visual)} has no dense tokens that are sound{why and f' ({why})'}. "
        f"These have: {HAVE_DENSE}."
    )


def cost_on(tower: Tower, visual: nn.Module, size: int) -> tuple[int, float]:
    """Channels of its tokens and operations of a view, found without arithmetic: `visual` lies on torch's meta device.

    Raises: TeacherError where it doesn't make a square grid of tokens of such a view, and a global token beside it.
    """
    counter = FlopCounterMode(display=False)
    try:
        with counter:
            pooled, tokens = tower(torch.zeros(1, 3, size, size, device="meta"))
    except Exception as error:  # whatever the model's parts raise
        raise no_dense_path(visual, f"at {size} x {size}: {' '.join(str(error).split())[:120]}") from None
    side = size // tower.patch
    if tokens.shape[:3] != (1, side, side) or pooled.shape != (1, tokens.shape[-1]):
        raise no_dense_path(visual, f"it makes {tuple(tokens.shape[1:])} of {size} x {size} pixels")
    return int(tokens.shape[-1]), float(counter.get_total_flops())


def _kind(visual: nn.Module) -> str:
    trunk = getattr(visual, "trunk", None)
    is_timm = trunk is not None or type(visual).__module__.startswith("timm.")
    return f"timm's {type(visual if trunk is None else trunk).__name__}" if is_timm else type(visual).__name__


# ---- open_clip's own ViTs ----------------------------------------------------------------------------


class OwnViT:
    """A VisionTransformer of open_clip, whatever it pools by, with or without a projection."""

    def __init__(self, visual: Any, dense: str):
        is_plain = all(isinstance(b.attn, nn.MultiheadAttention) for b in visual.transformer.resblocks)
        if dense != "paper" and not is_plain:
            raise TeacherError(
                f"teacher.dense {dense!r} takes a last block of plain attention, and this ViT's is another: use paper."
            )
        self.visual, self.dense = visual, dense
        self.patch = int(visual.patch_size[0])
        self.can_explain = is_plain and visual.attn_pool is None
        self.described = DESCRIBED[dense]

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        *earlier, last = self.visual.transformer.resblocks
        entering = self.visual._embeds(pixels)  # (B, 1 + L, D)
        for block in earlier:
            entering = block(entering)
        leaving = last(entering)
        pooled = self.visual._pool(leaving)[0]
        pooled = self._projected(pooled[:, 0] if pooled.ndim == 3 else pooled)  # (B, C)
        seen = leaving if self.dense == "paper" else recomputed(last, entering, self.dense)
        dense = self._projected(self._head(seen[:, 1:]))  # (B, L, C)
        side = pixels.shape[-1] // self.patch
        return pooled, dense.reshape(len(pixels), -1, side, dense.shape[-1])

    def _head(self, tokens: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, width of the projection): what the pooled token gets, of each token alone."""
        visual = self.visual
        if visual.attn_pool is None:
            return visual.ln_post(tokens)
        if visual.attn_pool_contrastive is None:
            return visual.ln_post(_value(visual.attn_pool, tokens))
        tokens = visual.ln_post(tokens)
        if visual.attn_pool_type == "cascade":
            tokens = _value(visual.attn_pool, tokens)
        return _value(visual.attn_pool_contrastive, tokens)

    def _projected(self, tokens: Tensor) -> Tensor:
        return tokens if self.visual.proj is None else tokens @ self.visual.proj


DESCRIBED = {
    "paper": "last block, ln_post, projection",
    "value": "last block with values alone in place of attention, ln_post, projection",
    "qq": "last block's attention of queries to queries, no residual, no mlp, ln_post, projection",
    "naclip": "last block's attention of keys to near keys, no residual, no mlp, ln_post, projection",
}


def recomputed(block: Any, entering: Tensor, dense: str) -> Tensor:
    """What leaves the last block when its attention is another one: (B, 1 + L, D) -> (B, 1 + L, D).

    value: each token passes its own value on, residual and mlp as ever. qq: queries attend to queries. naclip: keys
    attend to keys, to near ones more; G_ij = exp(-|p_i - p_j|^2 / (2 * 5^2)) in tokens is added, 0 for CLS. The last
    two leave residual and mlp out. Source: MaskCLIP, ClearCLIP, NACLIP.
    """
    query, key, value = projections(block.attn, block.ln_1(entering))
    if dense == "value":
        mixed = value
    elif dense == "qq":
        mixed = scaled_dot_product_attention(query, query, value)
    else:
        mixed = scaled_dot_product_attention(key, key, value, attn_mask=nearness(value))
    branch = block.ls_1(block.attn.out_proj(mixed.transpose(1, 2).reshape(entering.shape)))
    if dense != "value":
        return branch
    tokens = entering + branch
    return tokens + block.ls_2(block.mlp(block.ln_2(tokens)))


def projections(attn: nn.MultiheadAttention, entering: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values: (B, 1 + L, D) -> each (B, heads, 1 + L, D / heads)."""
    joint = linear(entering, attn.in_proj_weight, attn.in_proj_bias)
    query, key, value = joint.view(*entering.shape[:2], 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    return query, key, value


def nearness(value: Tensor) -> Tensor:
    """NACLIP's window over a square grid: (..., 1 + L, d) -> (1 + L, 1 + L), of the same dtype, 0 for CLS."""
    num = value.shape[-2] - 1
    side = round(num**0.5)
    places = torch.cartesian_prod(*[torch.arange(side, device=value.device).float()] * 2)  # (L, 2)
    window = torch.zeros(num + 1, num + 1, device=value.device)
    window[1:, 1:] = torch.exp(-torch.cdist(places, places).square() / (2 * NEIGHBOURHOOD**2))
    return window.to(value.dtype)


def _value(pooler: AttentionalPooler, tokens: Tensor) -> Tensor:
    """What attention pooling gives of each token alone, whatever its queries are: (B, L, D) -> (B, L, C)."""
    attn, width = pooler.attn, pooler.attn.embed_dim
    weight = attn.in_proj_weight[-width:] if attn._qkv_same_embed_dim else attn.v_proj_weight
    return attn.out_proj(linear(pooler.ln_k(tokens), weight, attn.in_proj_bias[-width:]))


# ---- timm's towers, ResNets --------------------------------------------------------------------------


class TimmTower:
    """Any image tower of timm inside open_clip's TimmModel: its head is run on maps of one place."""

    can_explain = False
    described = "last feature map, the head on each place"

    def __init__(self, visual: Any):
        self.trunk, self.head = visual.trunk, visual.head
        if any(
            isinstance(m, AttentionPool2d | AttentionPoolLatent) and m.pos_embed is not None
            for m in self.trunk.modules()
        ):
            raise no_dense_path(visual, "its attention pooling has positions of its own")
        self.patch = _stride(self.trunk, visual)
        self.num_prefix = int(getattr(self.trunk, "num_prefix_tokens", 0))
        self.is_channels_last = getattr(self.trunk, "output_fmt", "NCHW") == "NHWC"

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features, side = self.trunk.forward_features(pixels), pixels.shape[-1] // self.patch
        pooled = self.head(self.trunk.forward_head(features))  # (B, C)
        if features.ndim == 4 and not self.is_channels_last:
            features = features.permute(0, 2, 3, 1)
        width = features.shape[-1]
        if features.ndim == 3:  # class and register tokens stand before the places, and a single place takes theirs
            alone = features[:, self.num_prefix :].reshape(-1, 1, width).expand(-1, self.num_prefix + 1, -1)
        elif self.is_channels_last:
            alone = features.reshape(-1, 1, 1, width)
        else:
            alone = features.reshape(-1, width, 1, 1)
        places = self.trunk.forward_head(alone)
        pool = getattr(self.head, "pool", None)  # open_clip's own attention pooling over a CNN
        dense = self.head(places) if pool is None else self.head[1:](_pooled_alone(pool, places.flatten(1)))
        return pooled, dense.reshape(len(pixels), side, side, pooled.shape[-1])


def _stride(trunk: Any, visual: nn.Module) -> int:
    """Pixels of a place of a last feature map. Raises: TeacherError."""
    try:
        return int(trunk.feature_info[-1]["reduction"])
    except (AttributeError, LookupError, TypeError):
        raise no_dense_path(visual, "timm doesn't say its stride") from None


class FeatureTower:
    """A model of timm by itself, without a joint space: its last feature map as it is, and the mean of it."""

    can_explain = False
    described = "last feature map"

    def __init__(self, trunk: Any):
        self.trunk, self.patch = trunk, _stride(trunk, trunk)

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features, side = self.trunk.forward_features(pixels), pixels.shape[-1] // self.patch
        if features.ndim == 3:  # class and register tokens stand before the places
            features = features[:, int(getattr(self.trunk, "num_prefix_tokens", 0)) :].unflatten(1, (side, side))
        elif getattr(self.trunk, "output_fmt", "NCHW") != "NHWC":
            features = features.permute(0, 2, 3, 1)
        return features.mean((1, 2)), features


def _pooled_alone(pool: Any, places: Tensor) -> Tensor:
    """The value path of timm's AttentionPool2d and RotAttentionPool2d: (N, D) -> (N, C)."""
    if pool.qkv is None:
        return pool.proj(pool.v(places))
    return pool.proj(pool.qkv(places)[:, -pool.embed_dim :])


class ResNetTower:
    """A ModifiedResNet of CLIP: its attention pooling's value path at each place, without positions (MaskCLIP)."""

    can_explain = False
    described = "last feature map, value path of the attention pooling"
    patch = 32

    def __init__(self, visual: Any):
        self.visual = visual

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        visual = self.visual
        features = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(pixels)))))  # (B, D, h, w)
        pool = visual.attnpool
        return pool(features), pool.c_proj(pool.v_proj(features.permute(0, 2, 3, 1)))
