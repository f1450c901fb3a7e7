"""Prompt templates: a class name goes where the braces are.

A template set's features are averaged per class (method: each prompt encoded, normalised, averaged,
normalised), so the order within a set doesn't matter; the names do: they are recorded in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.data.base import DataError, unknown

TEMPLATES: dict[str, tuple[str, ...]] = {}

# CLIPTeacher and ZegCLIP on VOC: without a full stop, as their published text features have it.
TEMPLATES["single"] = ("a photo of a {}",)

# The seven of the eighty below that forward selection kept; source: the same notebook.
TEMPLATES["simple7"] = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)

# ZegCLIP's for COCO-Stuff; source: configs/_base_/datasets/text_embedding/get_embedding.ipynb of ZegCLIP.
TEMPLATES["zegclip15"] = (
    "a photo of a {}.",
    "a photo of a small {}.",
    "a photo of a medium {}.",
    "a photo of a large {}.",
    "This is a photo of a {}.",
    "This is a photo of a small {}.",
    "This is a photo of a medium {}.",
    "This is a photo of a large {}.",
    "a {} in the scene.",
    "a photo of a {} in the scene.",
    "There is a {} in the scene.",
    "There is the {} in the scene.",
    "This is a {} in the scene.",
    "This is the {} in the scene.",
    "This is one {} in the scene.",
)

# CLIP-ES, foreground and background alike (section 11 of the method).
TEMPLATES["clip-es"] = ("a clean origami {}.",)

# CLIP's eighty for ImageNet; source: notebooks/Prompt_Engineering_for_ImageNet.ipynb of openai/CLIP.
TEMPLATES["clip80"] = (
    "a bad photo of a {}.",
    "a photo of many {}.",
    "a sculpture of a {}.",
    "a photo of the hard to see {}.",
    "a low resolution photo of the {}.",
    "a rendering of a {}.",
    "graffiti of a {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.",
    "a tattoo of a {}.",
    "the embroidered {}.",
    "a photo of a hard to see {}.",
    "a bright photo of a {}.",
    "a photo of a clean {}.",
    "a photo of a dirty {}.",
    "a dark photo of the {}.",
    "a drawing of a {}.",
    "a photo of my {}.",
    "the plastic {}.",
    "a photo of the cool {}.",
    "a close-up photo of a {}.",
    "a black and white photo of the {}.",
    "a painting of the {}.",
    "a painting of a {}.",
    "a pixelated photo of the {}.",
    "a sculpture of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a plastic {}.",
    "a photo of the dirty {}.",
    "a jpeg corrupted photo of a {}.",
    "a blurry photo of the {}.",
    "a photo of the {}.",
    "a good photo of the {}.",
    "a rendering of the {}.",
    "a {} in a video game.",
    "a photo of one {}.",
    "a doodle of a {}.",
    "a close-up photo of the {}.",
    "a photo of a {}.",
    "the origami {}.",
    "the {} in a video game.",
    "a sketch of a {}.",
    "a doodle of the {}.",
    "a origami {}.",
    "a low resolution photo of a {}.",
    "the toy {}.",
    "a rendition of the {}.",
    "a photo of the clean {}.",
    "a photo of a large {}.",
    "a rendition of a {}.",
    "a photo of a nice {}.",
    "a photo of a weird {}.",
    "a blurry photo of a {}.",
    "a cartoon {}.",
    "art of a {}.",
    "a sketch of the {}.",
    "a embroidered {}.",
    "a pixelated photo of a {}.",
    "itap of the {}.",
    "a jpeg corrupted photo of the {}.",
    "a good photo of a {}.",
    "a plushie {}.",
    "a photo of the nice {}.",
    "a photo of the small {}.",
    "a photo of the weird {}.",
    "the cartoon {}.",
    "art of the {}.",
    "a drawing of the {}.",
    "a photo of the large {}.",
    "a black and white photo of a {}.",
    "the plushie {}.",
    "a dark photo of a {}.",
    "itap of a {}.",
    "graffiti of the {}.",
    "a toy {}.",
    "itap of my {}.",
    "a photo of a cool {}.",
    "a photo of a small {}.",
    "a tattoo of the {}.",
)


def templates(name_or_list: str | Sequence[str]) -> tuple[str, ...]:
    """The templates of a named set, or the given ones once they are checked.

    Raises: DataError for an unknown name, an empty list, or a template without exactly one "{}".
    """
    if isinstance(name_or_list, str) and "{" not in name_or_list:
        if name_or_list not in TEMPLATES:
            raise unknown("text.templates: unknown set", name_or_list, TEMPLATES)
        return TEMPLATES[name_or_list]
    chosen = (name_or_list,) if isinstance(name_or_list, str) else tuple(name_or_list)
    if not chosen:
        raise DataError(f"text.templates: the list is empty; give templates or one of {', '.join(TEMPLATES)}.")
    for template in chosen:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise DataError(f"text.templates: {template!r} must be text with exactly one {{}} for the class name.")
    return chosen


def prompts(name_or_list: str | Sequence[str], class_name: str) -> list[str]:
    """One prompt per template of the set (or list) for one class, in the set's order.

    Raises: DataError as `templates` does, and for a blank class name.
    """
    if not class_name.strip():
        raise DataError("a class name is blank; every class needs one for its text features.")
    return [template.replace("{}", class_name) for template in templates(name_or_list)]
