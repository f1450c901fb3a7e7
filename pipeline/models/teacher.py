"""The frozen teacher: what looks at images (`Encoder`) and also reads what they are compared with (`Teacher`).

What a model is made of stays behind the two: its image tower is a `Tower` (pipeline/models/towers.py), its building is
open_clip's (pipeline/models/clip.py).

Axes: B images, S image side, h = w = S / patch token grid, C joint space, K classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from pipeline.config import TeacherSection
from pipeline.config.places import looked_in, where_is
from pipeline.models.clip import (
    Description,
    build,
    check_quick_gelu,
    describe,
    is_tag,
    local_weights,
    seen_by,
    stamps_of_files,
    tokenizer_of,
    weights_file,
)
from pipeline.models.towers import CAN_EXPLAIN, TeacherError, Tower, tower_of
from pipeline.models.weights import Stamps

__all__ = [
    "CAN_EXPLAIN",
    "Encoder",
    "Teacher",
    "TeacherError",
    "TeacherShape",
    "flops_of_a_view",
    "flops_of_cams",
    "located",
    "shape_asked",
    "shape_of",
    "stamps_asked",
]

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TEXT_BATCH = 256
BRING_IT = "Put it there, or work in the folder that holds it."


@dataclass(eq=False)
class Encoder:
    """A frozen model that cuts images into tokens, on one device, with what is needed to tell where these came from.

    The cache asks no more of it than this. `channels` is C, `mean` and `std` are what images are normalised with.
    """

    tower: Tower
    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device
    dtype: torch.dtype
    provenance: dict[str, Any]

    @property
    def patch(self) -> int:
        """Pixels of a token's side."""
        return self.tower.patch

    @property
    def side(self) -> int:
        """Tokens of a view's side."""
        return self.image_size // self.patch

    @property
    def can_explain(self) -> bool:
        """Whether CAMs can be made with it: its attention and gradients are within reach."""
        return self.tower.can_explain

    def normalised(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 RGB -> the same shape in the model's dtype, on its device."""
        mean = torch.tensor(self.mean, device=self.device).view(1, 3, 1, 1)
        std = torch.tensor(self.std, device=self.device).view(1, 3, 1, 1)
        return ((images.to(self.device).float() / 255 - mean) / std).to(self.dtype)

    @torch.inference_mode()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The global token (CLS, or what the model pools) and dense tokens of a batch of views, neither normalised.

        Shapes: images (B, 3, S, S) uint8 RGB -> cls (B, C), tokens (B, h, w, C), in the model's dtype.
        Source: method section 2; dense tokens are what the tower says of itself.
        """
        return self.tower(self.normalised(images))


@dataclass(eq=False)
class Teacher(Encoder):
    """An encoder whose tokens live where text does: a CLIP of open_clip, in eval mode."""

    model: Any
    description: Description

    @classmethod
    def load(
        cls,
        name: str,
        pretrained: str | None = None,
        *,
        image_size: int | None,
        quick_gelu: bool | None = None,
        dense: str = "paper",
        output_stride: int | None = None,
        precision: str = "fp32",
        device: str = "cpu",
        near: Path | None = None,
    ) -> Teacher:
        """Builds the model at `image_size` (None: its own), positions interpolated as open_clip does, weights checked.

        name: an open_clip model, `local-dir:folder` (of open_clip or of transformers) or `hf-hub:repo`; pretrained: a
        tag, a checkpoint (a file, the index of several, a folder that holds one) or None; dense and output_stride: as
        in the config; near: where relative paths are looked for first, see pipeline/config/places.py.
        Raises: TeacherError for unknown names, missing or foreign weights, a QuickGELU mismatch, a side that is no
        multiple of the patch, a tower without dense tokens.
        """
        written = {"model": name, "pretrained": pretrained}
        name, pretrained = _located(name, pretrained, near)
        found = describe(name, pretrained, output_stride)
        check_quick_gelu(found, pretrained, quick_gelu)
        path = weights_file(name, pretrained)
        image_size = image_size or found.own_size
        seen = seen_by(found, image_size, dense)
        if image_size % seen.patch:
            raise TeacherError(
                f"teacher.image_size {image_size} is no multiple of the patch of {name!r}, {seen.patch}."
            )
        dtype = PRECISIONS[precision]
        model = build(found, image_size, path, quick_gelu).eval().requires_grad_(False).to(device=device, dtype=dtype)
        tower = tower_of(model.visual, dense)
        return cls(
            tower=tower,
            image_size=image_size,
            channels=seen.channels,
            mean=found.mean,
            std=found.std,
            device=torch.device(device),
            dtype=dtype,
            provenance={
                **written,
                "weights_sha256": weights_sha256(model),
                "quick_gelu": found.quick_gelu,
                "image_size": image_size,
                "patch": seen.patch,
                "channels": seen.channels,
                "mean": [float(value) for value in found.mean],
                "std": [float(value) for value in found.std],
                "dense": tower.described,
                "precision": precision,
                "open_clip": version("open_clip_torch"),
                "torch": version("torch"),
            },
            model=model,
            description=found,
        )

    @classmethod
    def of(cls, section: TeacherSection, *, image_size: int | None, device: str, precision: str = "fp32") -> Teacher:
        """The teacher of a config, at this size and on this device. Raises: TeacherError."""
        return cls.load(
            section.model,
            section.pretrained,
            image_size=image_size,
            quick_gelu=section.quick_gelu,
            dense=section.dense,
            output_stride=section.output_stride,
            near=section.near,
            precision=precision,
            device=device,
        )

    @cached_property
    def tokenizer(self) -> Any:
        """Made when words are first read: SigLIP's wants transformers, and features of a file want none."""
        return tokenizer_of(self.description)

    @property
    def logit_scale(self) -> float:
        """What cosines are multiplied with before the model's own softmax."""
        return float(self.model.logit_scale.exp())

    @torch.inference_mode()
    def encode_text(self, prompts: Sequence[Sequence[str]]) -> Tensor:
        """Class features: each prompt encoded, normalised, averaged over the class, normalised.

        Shapes: K lists of prompts -> (K, C) float32, unit norm, on the CPU. Raises: TeacherError without a tokenizer.
        """
        flat = [prompt for group in prompts for prompt in group]
        features = torch.cat(
            [
                normalize(
                    self.model.encode_text(self.tokenizer(flat[i : i + TEXT_BATCH]).to(self.device)).float(), dim=1
                )
                for i in range(0, len(flat), TEXT_BATCH)
            ]
        ).cpu()
        means = torch.stack([part.mean(0) for part in features.split([len(group) for group in prompts])])
        return normalize(means, dim=1)


@dataclass(frozen=True)
class TeacherShape:
    """What a model's description says of it, weights unread; `weights` is their file, None if not on this machine.

    width and layers: of open_clip's own ViTs, else 0; flops: of a view of the size asked for, multiply-adds as two.
    """

    channels: int
    patch: int
    width: int
    layers: int
    image_size: int
    weights: Path | None
    flops: float = 0.0
    can_explain: bool = True


def shape_of(
    name: str,
    pretrained: str | None,
    *,
    image_size: int | None = None,
    dense: str = "paper",
    output_stride: int | None = None,
    near: Path | None = None,
) -> TeacherShape:
    """The numbers that a run's cost follows from. Downloads no weights. Raises: TeacherError."""
    name, pretrained = _located(name, pretrained, near)
    found = describe(name, pretrained, output_stride)
    weights = local_weights(name, pretrained)
    seen = seen_by(found, image_size or found.own_size, dense)
    vision = found.config["vision_cfg"]
    is_vit = not found.is_timm and isinstance(vision.get("layers", 12), int)
    return TeacherShape(
        channels=seen.channels,
        patch=seen.patch,
        width=int(vision.get("width", 768)) if is_vit else 0,
        layers=int(vision.get("layers", 12)) if is_vit else 0,
        image_size=found.own_size,
        weights=weights,
        flops=seen.flops,
        can_explain=seen.can_explain,
    )


def shape_asked(section: TeacherSection) -> TeacherShape:
    """`shape_of` a config's teacher, at its size of a view. Raises: TeacherError."""
    return shape_of(
        section.model,
        section.pretrained,
        image_size=section.image_size,
        dense=section.dense,
        output_stride=section.output_stride,
        near=section.near,
    )


def flops_of_a_view(shape: TeacherShape, side: int) -> float:
    """Of a forward, multiply-adds counted as two; a ViT's: 12 d^2 a token and layer, and attention's 2 L d twice."""
    if not shape.layers:
        return shape.flops
    tokens = side * side + 1
    return shape.layers * 2 * (12 * shape.width**2 * tokens + 2 * tokens**2 * shape.width)


def flops_of_cams(shape: TeacherShape, num_tokens: int, num_classes: int) -> float:
    """Of one image's CAMs: a forward, and for each class a backward through the last block, which costs another block.

    Gradients of weights aren't taken, so a backward is as much as a forward; the affinity's square is added.
    """
    length = num_tokens + 1
    block = 2 * (12 * shape.width**2 * length + 2 * length**2 * shape.width)
    return (shape.layers + num_classes) * block + 2.0 * num_tokens**3


def weights_sha256(model: torch.nn.Module) -> str:
    """Hash of names, shapes and float32 values of all weights: independent of file format and device."""
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        total.update(f"{name}{tuple(value.shape)}".encode())
        total.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def located(section: TeacherSection) -> tuple[str, str | None]:
    """Its model and pretrained, the paths in them where they are. Raises: TeacherError for a folder that is nowhere."""
    return _located(section.model, section.pretrained, section.near)


def stamps_asked(section: TeacherSection) -> Stamps:
    """Path, size and time of the files that a config's teacher is loaded from: one that is loaded is kept by them."""
    return stamps_of_files(*located(section))


def _located(name: str, pretrained: str | None, near: Path | None) -> tuple[str, str | None]:
    """Both with the paths that they name where these are; a folder that is nowhere is an error, a tag stays a tag."""
    schema, _, folder = name.partition(":")
    if schema == "local-dir":
        if not (place := where_is(folder, near)).is_dir():
            raise TeacherError(f"teacher.model {name!r}: no such folder in {looked_in(near)}. {BRING_IT}")
        name = f"{schema}:{place}"
    if pretrained is None or is_tag(name, pretrained):  # whatever folder has the tag's name
        return name, pretrained
    if (place := where_is(pretrained, near)).exists():
        pretrained = str(place)
    elif near is not None and Path(pretrained).suffix:  # a folder or a tag has no ending
        raise TeacherError(f"teacher.pretrained {pretrained!r}: no such file in {looked_in(near)}. {BRING_IT}")
    return name, pretrained
