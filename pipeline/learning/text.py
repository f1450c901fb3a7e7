"""Text features at test time: rows of the student's own table, the teacher's text encoder, or a file.

Axes: K classes, C the teacher's joint space.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.data.base import DataError
from pipeline.data.prompts import prompts
from pipeline.learning.checkpoint import Checkpoint


def text_teacher(checkpoint: Checkpoint) -> Any:
    """The student's teacher, for its text encoder. Raises: TeacherError."""
    from pipeline.models.teacher import Teacher

    section = checkpoint.config.teacher
    return Teacher.load(
        section.model, section.pretrained, image_size=section.image_size, quick_gelu=section.quick_gelu
    )


def text_of_names(
    checkpoint: Checkpoint,
    named: Sequence[Sequence[str]],
    load: Callable[[Checkpoint], Any] = text_teacher,
) -> Tensor:
    """(K, C) unit norm: a class that goes by one name of the student's takes its row, others the teacher encodes.

    `named` holds what each class is called, one name or several that are averaged; the templates are those the
    student was trained with. The teacher is loaded, by `load`, only if there is something to encode.
    """
    known: dict[tuple[str, ...], Tensor] = {
        (name,): row for name, row in zip(checkpoint.classes, checkpoint.text, strict=True)
    }
    strange = list(dict.fromkeys(tuple(names) for names in named if tuple(names) not in known))
    if strange:
        teacher = load(checkpoint)
        templates = checkpoint.config.text.templates
        groups = [[prompt for name in names for prompt in prompts(templates, name)] for names in strange]
        known |= dict(zip(strange, teacher.encode_text(groups), strict=True))
    return torch.stack([known[tuple(names)] for names in named])


def features_of_file(path: str, shape: tuple[int, int], data_name: str) -> np.ndarray:
    """(K, C) float32, unit norm, from a .npy made elsewhere. Raises: DataError unless it has that shape."""
    try:
        features = np.load(path, allow_pickle=False).astype(np.float32)
    except (OSError, ValueError) as error:
        raise DataError(
            f"text.features {path!r}: not a .npy of numbers: {' '.join(str(error).split())}"
        ) from None
    if features.shape != shape or not np.isfinite(features).all():
        raise DataError(
            f"text.features {path!r}: found shape {features.shape}, want {shape} finite numbers "
            f"(the {shape[0]} classes of {data_name}, the teacher's {shape[1]} channels)."
        )
    return features / np.linalg.norm(features, axis=1, keepdims=True)
