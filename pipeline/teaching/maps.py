"""Images in, refined class activation maps out: CLIP-ES's computation for the stage and for free text.

Axes: B images of one size, K classes in an image at most, N background names, C joint space, g_h x g_w token grid.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pipeline.config import Cams, Config, ConfigError, TeacherSection
from pipeline.data.words import background_names
from pipeline.models.explain import explain, refuse_unexplained, required
from pipeline.models.teacher import Teacher, shape_asked, stamps_asked
from pipeline.models.weights import Stamps
from pipeline.ops.cam import activation_maps, affinity, box_masks, refined
from pipeline.ops.masks import fitted_size
from pipeline.running.devices import device_of


def explained_maps(
    teacher: Teacher,
    section: Cams,
    images: Tensor,
    tags: Sequence[Sequence[int]],
    foreground: Tensor,
    background: Tensor,
) -> tuple[Tensor, Tensor]:
    """CAMs of images of one size, refined by CAA and raw, zeros beyond an image's classes; on the CPU.

    Shapes: images (B, 3, H, W) uint8, tags B lists of class ids, foreground (classes, C), background (N, C)
    -> twice (B, K, g_h, g_w) float32.
    """
    most = max(max(map(len, tags)), 1)
    chosen = torch.tensor([[*ids, *[0] * (most - len(ids))] for ids in tags])  # (B, K)
    present = torch.arange(most) < torch.tensor([len(ids) for ids in tags])[:, None]
    features, present = foreground[chosen.to(foreground.device)], present.to(foreground.device)
    found = explain(teacher, images, features, present, background, section.blocks)
    grid = (images.shape[2] // teacher.patch, images.shape[3] // teacher.patch)
    raw = activation_maps(found.activations, found.gradients) * present[..., None]  # (B, K, L)
    boxes = box_masks(raw.unflatten(2, grid), section.box_threshold).flatten(2)
    maps = refined(raw, affinity(found.attention, section.sinkhorn), boxes)
    return maps.unflatten(2, grid).cpu(), raw.unflatten(2, grid).cpu()


def fitted(image: np.ndarray, section: Cams, patch: int) -> Tensor:
    """An image at `fitted_size`: (H, W, 3) uint8 -> (3, H', W') uint8."""
    height, width = image.shape[:2]
    sides = fitted_size(height, width, section.max_side, patch)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    if sides != (height, width):
        pixels = interpolate(pixels, sides, mode="bilinear", align_corners=False, antialias=True)
    return pixels[0].round().clamp(0, 255).to(torch.uint8)


@functools.lru_cache(maxsize=1)
def _loaded(section: TeacherSection, device: str, precision: str, stamps: Stamps) -> Teacher:
    # At its own size: every image has its own positions, interpolated once.
    return Teacher.of(section, image_size=None, device=str(device_of("cams.device", device)), precision=precision)


def explained_teacher(section: TeacherSection, cams: Cams) -> Teacher:
    """The run's teacher at its own size, loaded once a process. Raises: TeacherError if CAMs can't be made."""
    return required(_loaded(section, cams.device, cams.precision, stamps_asked(section)))


def refuse_cams(config: Config) -> None:
    """Raises: TeacherError where the config makes CAMs and its teacher can't be asked why; reads no weights."""
    if config.reads_tags:
        refuse_unexplained(config.teacher.model, shape_asked(config.teacher).can_explain)


def text_features(section: TeacherSection, cams: Cams, words: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Features of the classes' words (K, C) and of the background's names (N, C), unit norm, on the device."""
    asked = (section, cams.device, cams.precision, stamps_asked(section))
    return _encoded(*asked, cams.template, words, background_names(cams.background))


@functools.lru_cache(maxsize=2)
def _encoded(
    section: TeacherSection,
    device: str,
    precision: str,
    stamps: Stamps,
    template: str,
    words: tuple[str, ...],
    background: tuple[str, ...],
) -> tuple[Tensor, Tensor]:
    teacher = _loaded(section, device, precision, stamps)
    if template.count("{}") != 1:
        raise ConfigError(f"cams.template {template!r}: want exactly one {{}} for the name.")
    features = teacher.encode_text([[template.replace("{}", name)] for name in (*words, *background)])
    # Made in inference mode, and used where gradients are taken.
    features = features.clone().to(teacher.device)
    return features[: len(words)], features[len(words) :]
