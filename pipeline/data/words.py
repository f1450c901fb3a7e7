"""What classes and background are called in prompts: named sets of words, as data with their sources.

Source of SYNONYMS and BACKGROUNDS: CLIP-ES, section 3.2 and its public tables (method section 11).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.data.base import DataError, key_of, unknown
from pipeline.data.classes import COCO_STUFF_CLASSES

__all__ = ["key_of"]  # beside what is defined here, for those who read words

# Synonym fusion: what stands in the sentence instead of the class's own name.
SYNONYMS: dict[str, dict[str, str]] = {
    "voc": {
        "person": "person with clothes,people,human",
        "bird": "bird avian",
        "chair": "chair seat",
        "tvmonitor": "tvmonitor screen",
    }
}
_VOC_BACKGROUND = (
    "ground land grass tree building wall sky lake water river sea railway railroad keyboard helmet cloud house "
    "mountain ocean road rock street valley bridge sign"
)
# What the background of a picture may be: each name is a class of its own in the softmax.
BACKGROUNDS: dict[str, tuple[str, ...]] = {
    "voc": tuple(_VOC_BACKGROUND.split()),
    "coco": tuple(name for name in _VOC_BACKGROUND.split() if name not in ("keyboard", "sign")),
}

SEVERAL = "best"  # which of a class's several names counts at test time: said in metrics.json, once it was their mean


def fused_name(synonyms: str | Mapping[str, str], class_name: str) -> str:
    """The words of a class in a prompt: those of the named set or mapping, else its own name.

    Raises: DataError for an unknown set.
    """
    if isinstance(synonyms, str):
        if synonyms not in SYNONYMS:
            raise unknown("cams.synonyms: unknown set", synonyms, SYNONYMS)
        synonyms = SYNONYMS[synonyms]
    return synonyms.get(class_name, class_name)


def background_names(name_or_list: str | Sequence[str]) -> tuple[str, ...]:
    """The background's names: a named set's, or the given ones. Raises: DataError for an unknown or empty one."""
    if isinstance(name_or_list, str):
        if name_or_list not in BACKGROUNDS:
            raise unknown("cams.background: unknown set", name_or_list, BACKGROUNDS)
        return BACKGROUNDS[name_or_list]
    if not name_or_list or not all(isinstance(name, str) and name.strip() for name in name_or_list):
        raise DataError(f"cams.background is {list(name_or_list)!r}: want names, or one of {', '.join(BACKGROUNDS)}.")
    return tuple(name_or_list)


def _spoken(name: str) -> str:
    """COCO-Stuff's wall-brick as brick wall; wall-other and desk-stuff as wall and desk."""
    head, _, kind = name.partition("-")
    return name if not kind else head if kind in ("other", "stuff") else f"{kind} {head}"


# Renamed classes, for all data sets that have them. Source: MaskCLIP (Zhou et al. 2022), its published
# tools/maskclip_utils/prompt_engineering.py: four names of VOC and Context, 29 of COCO-Stuff.
RENAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "maskclip": {
        "aeroplane": ("airplane",),
        "diningtable": ("dining table",),
        "pottedplant": ("potted plant",),
        "tvmonitor": ("tv monitor",),
        **{name: (_spoken(name),) for name in COCO_STUFF_CLASSES if _spoken(name) != name},
    }
}


def other_names(classes: Sequence[str], synonyms: str | Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """`text.synonyms` as a mapping: of a named set of RENAMES what bears on these classes.

    Raises: DataError for an unknown set.
    """
    if not isinstance(synonyms, str):
        return {name: list(others) for name, others in synonyms.items()}
    if synonyms not in RENAMES:
        raise unknown("text.synonyms: unknown set", synonyms, RENAMES)
    return {name: list(others) for name, others in RENAMES[synonyms].items() if name in classes}


def names_of_classes(classes: Sequence[str], synonyms: str | Mapping[str, Sequence[str]]) -> list[tuple[str, ...]]:
    """What each class is called in its prompts: the names given for it, or in a named set, else its own.

    Raises: DataError for an unknown set, names of no class, an empty list of them, or a blank one.
    """
    found = other_names(classes, synonyms)
    for name, others in found.items():
        if name not in classes:
            raise unknown("text.synonyms: no class is called", name, classes)
        if not others or not all(other.strip() for other in others):
            raise DataError(f"text.synonyms.{name} is {list(others)!r}: want at least one name, none of them blank.")
    return [tuple(found.get(name, (name,))) for name in classes]
