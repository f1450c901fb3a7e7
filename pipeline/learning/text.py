"""Text features at test time: rows of the student's own table, the teacher's text encoder, or a file.

Axes: K classes, n names of a class, C the teacher's joint space.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.data.base import DataError
from pipeline.data.prompts import prompts
from pipeline.data.words import key_of, names_of_classes, other_names
from pipeline.learning.checkpoint import Checkpoint

# Cosine of a class's text features in the student and from the teacher at hand. Of the demo's teacher: 0.9999 or more
# between float32 and bfloat16, below 0.996 with a tenth of its weights' spread as noise, below 0.1 with random weights.
SAME_TEACHER = 0.999


def text_teacher(checkpoint: Checkpoint) -> Any:
    """The student's teacher, for its text encoder. Raises: TeacherError."""
    from pipeline.models.teacher import Teacher

    section = checkpoint.config.teacher
    teacher = Teacher.of(section, image_size=section.image_size, device="cpu")
    _refuse_other_teacher(checkpoint, teacher)
    return teacher


def _refuse_other_teacher(checkpoint: Checkpoint, teacher: Any) -> None:
    """Raises: DataError where this teacher reads the first class otherwise than the one the student learned from."""
    config = checkpoint.config
    if config.text.features is not None or checkpoint.cache is None:  # made elsewhere, or nobody knows where
        return
    names = names_of_classes(checkpoint.classes, config.text.synonyms)[0]
    row = teacher.encode_text([[prompt for name in names for prompt in prompts(config.text.templates, name)]])[0]
    if row.shape != checkpoint.text[0].shape or float(row @ checkpoint.text[0]) < SAME_TEACHER:
        raise DataError(
            f"teacher.model {config.teacher.model!r}, pretrained {config.teacher.pretrained!r}: what is there now is "
            f"another teacher than the student learned from (its features of {checkpoint.classes[0]!r} differ). Put "
            "the old one back."
        )


def text_of_names(
    checkpoint: Checkpoint, named: Sequence[Sequence[str]], load: Callable[[Checkpoint], Any] = text_teacher
) -> Tensor:
    """`stacked` features: a name of the student's classes takes its row of the table, others the teacher encodes.

    `named` holds what each class is called, one name or several; the templates are those the student was trained
    with. The teacher is loaded, by `load`, only if there is something to encode.
    """
    known = dict(zip(checkpoint.classes, checkpoint.text, strict=True))
    strange = list(dict.fromkeys(name for names in named for name in names if name not in known))
    if strange:
        templates = checkpoint.config.text.templates
        rows = load(checkpoint).encode_text([prompts(templates, name) for name in strange])
        known |= dict(zip(strange, rows, strict=True))
    return stacked([[known[name] for name in names] for names in named])


def labelled_words(checkpoint: Checkpoint) -> frozenset[str]:
    """What the classes that the student had labels of go by, as `key_of` has it: their names and `text.synonyms`."""
    seen = [checkpoint.classes[i] for i in checkpoint.seen_ids]
    synonyms = other_names(checkpoint.classes, checkpoint.config.text.synonyms)
    return frozenset(key_of(word) for name in seen for word in (name, *synonyms.get(name, ())))


def stacked(classes: Sequence[Sequence[Tensor]]) -> Tensor:
    """(K, C) from a feature (C,) for each class; (K, n, C) where one has several, shorter lists repeating their first.

    Of several names the best one's logit counts (`dense_logits`), not their mean's: the mean of tomato and lemon is
    near neither.
    """
    most = max(len(rows) for rows in classes)
    table = torch.stack([torch.stack([*rows, *[rows[0]] * (most - len(rows))]) for rows in classes])
    return table[:, 0] if most == 1 else table


def features_of_file(path: str, shape: tuple[int, int], data_name: str) -> np.ndarray:
    """(K, C) float32, unit norm, from a .npy made elsewhere. Raises: DataError unless it has that shape."""
    try:
        features = np.load(path, allow_pickle=False).astype(np.float32)
    except (OSError, ValueError) as error:
        raise DataError(f"text.features {path!r}: not a .npy of numbers: {' '.join(str(error).split())}") from None
    if features.shape != shape or not np.isfinite(features).all():
        raise DataError(
            f"text.features {path!r}: found shape {features.shape}, want {shape} finite numbers "
            f"(the {shape[0]} classes of {data_name}, the teacher's {shape[1]} channels)."
        )
    return features / np.linalg.norm(features, axis=1, keepdims=True)
